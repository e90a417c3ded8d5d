"""A matrix of runs: comparable cells, stored runs that are not repeated, failures that are recorded."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from conftest import tiny_classifier, tiny_dataset
from transformers import TrainerCallback, TrainingArguments

from hf_alrs import matrix
from hf_alrs.baselines import BASELINES, MIN_EVALUATIONS, scheduler_kwargs
from hf_alrs.callback import ALRSTrainer
from hf_alrs.config import ALRSConfig, InputError
from hf_alrs.experiment import DataArguments
from hf_alrs.matrix import (
    Experiment,
    RunSpec,
    build_matrix,
    missing,
    refuse_other_settings,
    run_matrix,
    write_record,
)
from hf_alrs.range_test import RangeTestScheduler, suggested_rate
from hf_alrs.recording import RunRecorder, hash_tensors
from hf_alrs.report import validate_result
from tasks import TASKS


ROOT = Path(__file__).parents[1]


@pytest.fixture
def experiment() -> Experiment:
    """Two epochs of the built-in tabular sample: about a second a run."""
    return Experiment(
        task=TASKS["titanic"],
        data=DataArguments(task_name="titanic", dataset_name="sample"),
        arguments={"num_train_epochs": 2.0, "per_device_train_batch_size": 32, "report_to": "none"},
        alrs_config=ALRSConfig(network="scratch", num_probes=0),
        num_evaluations=2,
    )


def read(folder: Path) -> dict[str, dict]:
    return {path.name: json.loads(path.read_text()) for path in folder.glob("*--*.json")}


def test_a_run_that_dies_has_a_valid_record(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = ALRSTrainer.training_step

    def failing(self: ALRSTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == 13:
            raise RuntimeError("CUDA out of memory")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(ALRSTrainer, "training_step", failing)
    assert run_matrix(experiment, build_matrix("sample", ["alrs"], [1e-3], [0]), tmp_path) == 1
    ((name, record),) = read(tmp_path).items()
    validate_result(record, name)
    phases = record["history"]["phase"]
    assert record["status"] == "failed" and len(phases) == 13 and "gather" in phases


def test_steps_that_mixed_precision_skips_have_no_phase(tmp_path: Path) -> None:
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", save_strategy="no", max_steps=40, disable_tqdm=True
    )
    config = ALRSConfig(network="scratch", num_probes=0)
    trainer = ALRSTrainer(tiny_classifier(), args, train_dataset=tiny_dataset(), alrs_config=config)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    calls = itertools.count()
    trainer.model.last.bias.register_hook(lambda g: g * math.inf if next(calls) in (2, 7) else g)
    recorder = RunRecorder()
    recorder.attach(trainer)
    trainer.train()
    lengths = {len(values) for values in recorder.history().values()}
    assert lengths == {40}
    assert [step for step, phase in enumerate(recorder.phases) if phase is None] == [2, 7]


def test_the_controllers_seconds_are_a_part_of_the_trainings(tmp_path: Path) -> None:
    """Those too that an evaluation of the script's costs: batch-norm's statistics of the averaged weights."""
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", save_strategy="no", max_steps=20, disable_tqdm=True
    )
    trainer = ALRSTrainer(
        tiny_classifier(batch_norm=True),
        args,
        train_dataset=tiny_dataset(512),
        eval_dataset={"one": tiny_dataset(8), "two": tiny_dataset(8)},
    )
    recorder = RunRecorder()
    recorder.attach(trainer)
    evaluations = itertools.count()

    class Evaluating(TrainerCallback):  # on its own, where Trainer asks no callback before
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            next(evaluations)
            trainer.evaluate()

    trainer.add_callback(Evaluating())
    trainer.train()
    trainer.evaluate()
    assert next(evaluations) == 20
    assert trainer.lr_scheduler.seconds < recorder.clock
    assert recorder.eval_seconds > 0


def test_cells_of_a_seed_start_alike_and_records_are_valid(experiment: Experiment, tmp_path: Path) -> None:
    specs = build_matrix("sample", ["alrs", "linear", "reduce_lr_on_plateau"], [1e-3], [0, 1])
    assert run_matrix(experiment, specs, tmp_path) == 0
    records = read(tmp_path)
    assert len(records) == 6
    for name, record in records.items():
        validate_result(record, name)
        assert record["status"] == "completed"
        steps = record["num_training_steps"]
        assert record["history"]["step"] == list(range(1, steps + 1)), "every scheduler gets the same step budget"
        assert record["evaluations"][-1]["step"] == steps
        assert record["evaluations"][-1]["eval_loss"] == pytest.approx(record["results"]["eval_loss"])
        assert "epoch" not in record["benchmark_results"]
        assert (record["history"]["phase"] is not None) == (record["spec"]["scheduler"] == "alrs")
        number = len(record["evaluations"])
        assert number >= MIN_EVALUATIONS if record["spec"]["scheduler"] == "reduce_lr_on_plateau" else number <= 3
    for seed in (0, 1):
        cells = [r for r in records.values() if r["spec"]["seed"] == seed]
        assert len({r["initial_state_hash"] for r in cells}) == 1
        assert len({r["first_batch_hash"] for r in cells}) == 1
        assert len({r["history"]["loss"][0] for r in cells}) == 1
    assert len({r["initial_state_hash"] for r in records.values()}) == 2


def test_stored_runs_are_not_repeated_and_a_rerun_gives_the_same_numbers(
    experiment: Experiment, tmp_path: Path
) -> None:
    specs = build_matrix("sample", ["alrs", "constant"], [1e-3], [0])
    done: list[RunSpec] = []
    run_matrix(experiment, specs, tmp_path, on_done=lambda spec, status: done.append(spec))
    first = read(tmp_path)
    removed = tmp_path / specs[0].file_name
    removed.unlink()
    (tmp_path / f"{removed.stem}.123.tmp").write_text("{")  # what a killed write leaves behind
    assert missing(specs, tmp_path) == [specs[0]]
    run_matrix(experiment, specs, tmp_path, on_done=lambda spec, status: done.append(spec))
    assert done == [*specs, specs[0]]
    second = read(tmp_path)
    for name in first:
        for part in ("loss", "learning_rate", "grad_norm"):
            assert first[name]["history"][part] == second[name]["history"][part]
        assert first[name]["results"]["eval_loss"] == second[name]["results"]["eval_loss"]


def test_runs_that_were_made_otherwise_are_not_mixed(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_matrix(experiment, build_matrix("sample", ["alrs", "schedule_free", "greedy"], [1e-3], [0]), tmp_path)
    refuse_other_settings(experiment, "sample", tmp_path)
    refuse_other_settings(
        replace(experiment, arguments=experiment.arguments | {"logging_steps": 5}), "sample", tmp_path
    )
    changed = {
        "num_train_epochs": replace(experiment, arguments=experiment.arguments | {"num_train_epochs": 3.0}),
        "weight_decay": replace(experiment, arguments=experiment.arguments | {"weight_decay": 0.1}),
        "optim": replace(experiment, arguments=experiment.arguments | {"optim": "sgd"}),
        "max_train_samples": replace(experiment, data=replace(experiment.data, max_train_samples=100)),
        "dataset_name": replace(experiment, data=replace(experiment.data, dataset_name="train.csv")),
        "num_evaluations": replace(experiment, num_evaluations=3),
        "launcher": replace(experiment, launcher="accelerate launch --num_processes 2"),
        "feedback_interval": replace(experiment, alrs_config=replace(experiment.alrs_config, feedback_interval=0)),
    }
    for field, other in changed.items():
        with pytest.raises(InputError, match="would mix them") as error:
            refuse_other_settings(other, "sample", tmp_path)
        assert error.value.field == field
        refuse_other_settings(other, "another task", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(matrix, "CONTROL_VERSION", -1)
        with pytest.raises(InputError, match=r"or the version of hf-alrs that made the stored runs") as error:
            refuse_other_settings(experiment, "sample", tmp_path)
        assert error.value.field == "control_version"
    by_epoch = replace(experiment, num_evaluations=None, arguments=experiment.arguments | {"eval_strategy": "epoch"})
    run_matrix(
        by_epoch, build_matrix("sample", ["constant", "reduce_lr_on_plateau"], [1e-3], [0]), tmp_path / "by epoch"
    )
    refuse_other_settings(by_epoch, "sample", tmp_path / "by epoch")
    never = replace(by_epoch, arguments=experiment.arguments)
    with pytest.raises(InputError, match="would mix them"):
        refuse_other_settings(never, "sample", tmp_path / "by epoch")
    run_matrix(never, build_matrix("sample", ["constant", "reduce_lr_on_plateau"], [1e-3], [0]), tmp_path / "never")
    refuse_other_settings(never, "sample", tmp_path / "never")
    for path in tmp_path.glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "failed"}))
    with pytest.raises(InputError, match=r"--seed0\.json, which failed, is a run .* or delete the file\.$"):
        refuse_other_settings(changed["weight_decay"], "sample", tmp_path)


def test_a_failed_run_is_recorded_and_the_matrix_goes_on(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        BASELINES, "broken", BASELINES["linear"].__class__("polynomial", scheduler_kwargs={"power": "x"})
    )
    specs = build_matrix("sample", ["broken", "linear"], [1e-3], [0])
    assert run_matrix(experiment, specs, tmp_path) == 1
    records = read(tmp_path)
    broken = records[specs[0].file_name]
    assert broken["status"] == "failed"
    assert broken["error"].startswith("TypeError")
    validate_result(broken, "broken")
    assert records[specs[1].file_name]["status"] == "completed"


@pytest.mark.parametrize("num_jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_wrong_input_is_no_outcome_of_a_run(num_jobs: int, experiment: Experiment, tmp_path: Path) -> None:
    wrong = replace(experiment, arguments=experiment.arguments | {"label_smoothing_factor": 0.1})
    with pytest.raises(InputError, match="label_smoothing_factor"):
        run_matrix(wrong, build_matrix("sample", ["linear", "alrs"], [1e-3], [0]), tmp_path, num_jobs)
    assert not list(tmp_path.glob("*.json"))


def test_two_jobs_give_the_same_numbers_as_one(experiment: Experiment, tmp_path: Path) -> None:
    specs = build_matrix("sample", ["linear", "alrs"], [1e-3], [0])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two jobs get a thread each on two cores
    try:
        run_matrix(experiment, specs, tmp_path / "one")
    finally:
        torch.set_num_threads(threads)
    run_matrix(experiment, specs, tmp_path / "two", num_jobs=2)
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    for name in one:
        np.testing.assert_allclose(one[name]["history"]["loss"], two[name]["history"]["loss"], rtol=1e-5)


@pytest.mark.slow
def test_a_killed_comparison_resumes_to_the_same_results(tmp_path: Path) -> None:
    def command(folder: Path) -> list[str]:
        return [
            sys.executable, "-m", "hf_alrs.cli", "compare", "--task", "titanic", "--dataset_name", "sample",
            "--num_train_epochs", "3", "--schedulers", "alrs", "linear", "constant", "--seeds", "0", "1",
            "--output_dir", str(folder),
        ]  # fmt: skip

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole), cwd=ROOT, check=True, capture_output=True)
    process = subprocess.Popen(command(killed), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(list(killed.glob("*--*.json"))) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run(command(killed), cwd=ROOT, check=True, capture_output=True)
    first, second = (json.loads((folder / "results.json").read_text()) for folder in (whole, killed))
    for summary in (first, second):
        summary.pop("timing")
        summary["plan"].pop("environment")
    assert first == second


@pytest.mark.slow
def test_workers_end_with_a_killed_command(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "hf_alrs.cli", "compare", "--task", "titanic", "--dataset_name", "sample",
        "--num_train_epochs", "100000", "--schedulers", "linear", "constant", "--seeds", "0", "--jobs", "2",
        "--output_dir", str(tmp_path),
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(list((tmp_path / "unfinished").glob("*"))) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert len(workers) >= 2 and not alive


@pytest.mark.slow
def test_ray_gives_the_same_numbers(experiment: Experiment, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
    specs = build_matrix("sample", ["linear", "alrs"], [1e-3], [0])
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
    try:
        run_matrix(experiment, specs, tmp_path / "ray", executor="ray")
    finally:
        ray.shutdown()
    run_matrix(experiment, specs, tmp_path / "local")
    by_ray, local = read(tmp_path / "ray"), read(tmp_path / "local")
    for name in local:
        np.testing.assert_allclose(by_ray[name]["history"]["loss"], local[name]["history"]["loss"], rtol=1e-4)


def test_a_record_is_strict_json_and_written_whole(tmp_path: Path) -> None:
    write_record({"loss": [1.0, float("nan"), float("inf")]}, tmp_path / "run.json")
    assert json.loads((tmp_path / "run.json").read_text()) == {"loss": [1.0, None, None]}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_hash_depends_on_values_and_names_alone() -> None:
    a = {"x": torch.ones(2), "y": torch.zeros(1)}
    assert hash_tensors(a) == hash_tensors({"y": torch.zeros(1), "x": torch.ones(2)})
    assert hash_tensors(a) != hash_tensors({"x": torch.ones(2), "y": torch.ones(1)})


def test_shapes_of_schedulers_that_are_told_when_to_decay() -> None:
    warmup, kwargs = scheduler_kwargs(BASELINES["warmup_stable_decay"], 100)
    assert (warmup, kwargs) == (5, {"num_decay_steps": 20, "decay_type": "linear"})
    assert scheduler_kwargs(BASELINES["linear"], 100) == (0, {})


def test_range_test_suggests_a_tenth_of_the_rate_of_the_lowest_loss() -> None:
    rates = np.geomspace(1e-4, 1.0, 50)
    losses = np.concatenate([np.linspace(1.0, 0.1, 30), np.full(20, 5.0)])
    assert suggested_rate(rates, losses) == pytest.approx(rates[29] / 10)
    losses[10:] = np.nan
    assert suggested_rate(rates, losses) == pytest.approx(rates[9] / 10)


def test_range_test_goes_back_to_the_initial_weights_then_decays() -> None:
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    scheduler = RangeTestScheduler(optimizer, num_training_steps=100)
    rates = []
    for _ in range(100):
        if scheduler.last_epoch == 20:
            assert weight.item() == 2.0
        loss = (weight**2).sum()
        loss.backward()
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.observe(loss)
        scheduler.step()
        optimizer.zero_grad()
    np.testing.assert_allclose(rates[:20], np.geomspace(1e-7, 1.0, 20))
    np.testing.assert_allclose(rates[20:], scheduler.rate * (1 - np.arange(80) / 80))
