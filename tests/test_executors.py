"""Cells in processes of their own: a killed one is recorded and costs no other, a launched one is one run."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_alrs.config import ALRSConfig
from hf_alrs.experiment import DataArguments
from hf_alrs.matrix import Experiment, build_matrix, run_matrix
from hf_alrs.range_test import RangeTestScheduler
from hf_alrs.report import validate_result
from tasks import TASKS


ROOT = Path(__file__).parents[1]


def die_at_seed_1(data: DataArguments) -> object:
    """The tabular sample, whose model takes the process with it when it is built for seed 1."""
    prepared = TASKS["titanic"].prepare(data)
    build = prepared.model_init

    def model_init() -> object:
        if torch.initial_seed() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return build()

    prepared.model_init = model_init
    return prepared


def test_a_killed_worker_is_recorded_and_costs_no_other_cell(tmp_path: Path) -> None:
    task = TASKS["titanic"]
    experiment = Experiment(
        task=type(task)(task.name, task.kind, die_at_seed_1, task.recipe, task.description),
        data=DataArguments(task_name="titanic", dataset_name="sample"),
        arguments={"max_steps": 4, "report_to": "none"},
        alrs_config=ALRSConfig(),
    )
    specs = build_matrix("sample", ["linear", "constant"], [1e-3], [0, 1, 2])
    assert run_matrix(experiment, specs, tmp_path, num_jobs=2) == 2
    records = [json.loads((tmp_path / spec.file_name).read_text()) for spec in specs]
    for spec, record in zip(specs, records, strict=True):
        validate_result(record, spec.file_name)
        assert (record["status"] == "failed") == (spec.seed == 1)


@pytest.mark.slow
def test_a_cell_under_accelerate_launch_is_one_run_of_two_processes(tmp_path: Path) -> None:
    launcher = (
        f"{sys.executable} -m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 "
        "--mixed_precision no --dynamo_backend no --main_process_port 0"
    )
    command = [
        sys.executable, "-m", "hf_alrs.cli", "compare", "--task", "titanic", "--dataset_name", "sample", "--max_steps", "8",
        "--schedulers", "alrs", "range_test", "--seeds", "0", "--launcher", launcher, "--output_dir", str(tmp_path),
    ]  # fmt: skip
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    records = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*--*.json"))]
    assert [record["status"] for record in records] == ["completed"] * 2
    assert {record["config"]["training"]["num_processes"] for record in records} == {2}
    assert {len(record["history"]["loss"]) for record in records} == {8}


def test_range_test_goes_back_to_the_averages_of_batch_norm() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = RangeTestScheduler(optimizer, num_training_steps=100, model=model)
    for _ in range(20):
        loss = model(torch.randn(16, 4)).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.observe(loss)
        scheduler.step()
        optimizer.zero_grad()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
