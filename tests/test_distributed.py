"""
Two processes (gloo on the CPU) are one process with twice the batch, and agree with each other at every step; a model that
is sharded over them (FSDP2) gives the signals, features and rates of the whole one.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import scratch_network


SCRIPT = Path(__file__).parent / "scripts" / "distributed.py"
FSDP_SCRIPT = SCRIPT.with_name("fsdp.py")
ROUTES = ["bare", "evaluated by one", "callback", "trainer", "evaluated first", "loss of the whole step"]
ROUTES += ["accumulation", "any keyword", "any keyword, accumulation", "failing metrics", "resumed", "chosen"]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(num_processes: int, network: str, out: Path) -> list[dict[str, Any]]:
    """What each rank wrote."""
    out.mkdir()
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(num_processes)]
    # The launcher starts several processes on one machine under this name; ACCELERATE_USE_CPU keeps them off a GPU.
    command += ["--multi_gpu", "--num_machines", "1"] if num_processes > 1 else ["--cpu"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port())]
    environment = os.environ | {
        "PYTHONPATH": str(SCRIPT.parents[2]),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [*command, str(SCRIPT), network, str(out)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [json.loads((out / f"rank{i}.json").read_text()) for i in range(num_processes)]
    assert [rank["num_processes"] for rank in ranks] == [num_processes] * num_processes
    return ranks


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("distributed")
    scratch_network(scale=2.0).save_pretrained(str(folder / "network"))
    return {n: launch(n, str(folder / "network"), folder / f"{n}") for n in (1, 2)}


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("route", [*ROUTES, "resumed after an epoch", "normalised", "normalised, resumed"])
@pytest.mark.reliability("2 processes (DDP): rates, weights and network equal on both ranks to the last bit")
def test_ranks_agree_to_the_last_bit(runs: dict[int, list[dict[str, Any]]], route: str) -> None:
    first, second = (rank[route] for rank in runs[2])
    assert first["rates"] == second["rates"]
    assert first["weights"] == second["weights"]
    assert first["network"] == second["network"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.reliability(
    "2 processes are 1 with twice the batch: bare loop, callback, ALRSTrainer, accumulation, resume, choice of the average"
)
def test_two_processes_are_one_with_twice_the_batch(runs: dict[int, list[dict[str, Any]]], route: str) -> None:
    one, two = runs[1][0][route], runs[2][0][route]
    num_steps = 52 if route == "resumed" else 60
    assert len(one["rates"]) == len(two["rates"]) == num_steps, "one rate for each optimizer step"
    assert len(set(one["rates"])) > 20
    for key in ("rates", "losses", "weights", "network"):
        assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-5), key


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize(
    ("route", "uninterrupted", "step"),
    [
        ("resumed", "callback", 8),
        ("resumed after an epoch", "callback", 8),
        ("normalised, resumed", "normalised", 32),
        ("chosen, resumed", "chosen", 8),
    ],
)
@pytest.mark.reliability("2 processes: a resumed run is the uninterrupted one, with batch-norm too")
def test_a_resumed_run_is_the_uninterrupted_one(
    runs: dict[int, list[dict[str, Any]]], route: str, uninterrupted: str, step: int, num_processes: int
) -> None:
    for rank in runs[num_processes]:
        whole, resumed = rank[uninterrupted], rank[route]
        assert resumed["rates"] == whole["rates"][step:]
        assert resumed["losses"] == whole["losses"]
        assert resumed["weights"] == whole["weights"]


def test_routes_agree(runs: dict[int, list[dict[str, Any]]]) -> None:
    for ranks in runs.values():
        bare = ranks[0]["bare"]["rates"]
        for route in ("callback", "trainer"):
            # Trainer clips gradients and knows the length of an epoch, which are features.
            assert ranks[0][route]["rates"][:7] == pytest.approx(bare[:7])
        assert ranks[0]["trainer"]["rates"] == pytest.approx(ranks[0]["callback"]["rates"], rel=1e-6)


# FSDP2


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks saw of a model whole and sharded."""
    pytest.importorskip("torch.distributed.fsdp", reason="this torch has no FSDP")
    folder = tmp_path_factory.mktemp("fsdp")
    scratch_network(scale=2.0).save_pretrained(str(folder / "network"))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(free_port()), str(FSDP_SCRIPT), str(folder / "network"), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"rank{i}.json").read_text()) for i in range(2)]


@pytest.mark.parametrize("layout", ["rows", "columns", "replicated", "in part"])
@pytest.mark.reliability("FSDP2 on 2 processes: signals of the sharded model are those of the whole one")
def test_signals_of_a_sharded_model(sharded: list[dict[str, Any]], layout: str) -> None:
    whole = sharded[0]["signals"]["whole"]
    assert len(whole) == 6
    for rank in sharded:
        for got, expected in zip(rank["signals"][layout], whole, strict=True):
            assert got == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("run", ["rows", "resumed", "restarted", "evaluated"])
@pytest.mark.reliability(
    "FSDP2 on 2 processes: rates, features and weights of the whole model; probes, restarts, resume, evaluations"
)
def test_a_run_of_a_sharded_model(sharded: list[dict[str, Any]], run: str) -> None:
    whole = sharded[0]["runs"][f"whole, {run}" if run in ("restarted", "evaluated") else "whole"]
    assert whole["actions"].count("restart" if run == "restarted" else "restore") >= 1
    for rank in sharded:
        got = rank["runs"][run]
        assert got["actions"] == whole["actions"]
        for key in ("rates", "losses", "weights", "evaluated"):
            assert got[key] == pytest.approx(whole[key], rel=1e-4, abs=1e-6, nan_ok=True), key
        for row, expected in zip(got["features"], whole["features"], strict=True):
            assert row == pytest.approx(expected, abs=1e-3)
    assert sharded[0]["runs"][run]["rates"] == sharded[1]["runs"][run]["rates"]
    if run == "evaluated":  # and the evaluations, of averaged weights, leave the training alone
        assert sharded[0]["runs"][run]["rates"] == sharded[0]["runs"]["rows"]["rates"]
