"""Cells that were interrupted go on from their last checkpoint, to the same record; cells under way tell where they are."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import Trainer, TrainingArguments

from hf_alrs import unfinished
from hf_alrs.config import ALRSConfig, InputError
from hf_alrs.experiment import DataArguments
from hf_alrs.matrix import UNFINISHED, Experiment, RunSpec, build_matrix, run_matrix
from hf_alrs.recording import RunRecorder
from hf_alrs.report import validate_result
from hf_alrs.unfinished import CheckpointKeeper, ProgressWriter, alone_in, claimed, read_progress
from tasks import TASKS


NAMES = ["alrs", "linear", "reduce_lr_on_plateau", "greedy", "prodigy", "schedule_free", "range_test"]


@pytest.fixture
def experiment() -> Experiment:
    """52 steps of the built-in tabular sample."""
    return Experiment(
        task=TASKS["titanic"],
        data=DataArguments(task_name="titanic", dataset_name="sample"),
        arguments={"max_steps": 52, "per_device_train_batch_size": 32, "report_to": "none"},
        alrs_config=ALRSConfig(),
        num_evaluations=2,
    )


class Interruption(BaseException):
    """As Ctrl-C: no exception of the training, which would be recorded."""


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        original(self, args, state, control, **kwargs)
        if state.global_step == step:
            raise Interruption

    original = RunRecorder.on_step_end
    monkeypatch.setattr(RunRecorder, "on_step_end", on_step_end)


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads(next(folder.glob("*--*.json")).read_text())


SCORES = ("eval_loss", "eval_accuracy", "eval_f1")


def assert_same(parts: dict[str, Any], whole: dict[str, Any]) -> None:
    assert parts["status"] == whole["status"] == "completed"
    for key in ("step", "loss", "grad_norm", "learning_rate", "phase"):
        assert parts["history"][key] == whole["history"][key], key
    assert parts["first_batch_hash"] == whole["first_batch_hash"]
    for key in SCORES:
        assert parts["results"][key] == whole["results"][key]
        assert parts["benchmark_results"][key] == whole["benchmark_results"][key]
    steps = [[(e["step"], *(e[key] for key in SCORES)) for e in record["evaluations"]] for record in (whole, parts)]
    assert steps[0] == steps[1]


def interrupted(experiment: Experiment, specs: list[RunSpec], folder: Path, step: int) -> list[str]:
    """Runs until `step`; returns the checkpoints that are left."""
    with pytest.MonkeyPatch.context() as during:
        during.setattr(unfinished, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)  # every 20 steps, and each epoch of 13
        interrupt_at(step, during)
        with pytest.raises(Interruption):
            run_matrix(experiment, specs, folder)
    left = folder / UNFINISHED / Path(specs[0].file_name).stem
    return sorted(found.name for found in left.glob("checkpoint-*"))


@pytest.mark.reliability
@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_cell_goes_on_to_the_same_record(name: str, experiment: Experiment, tmp_path: Path) -> None:
    specs = build_matrix("sample", [name], [1e-3], [0])
    run_matrix(experiment, specs, tmp_path / "whole")
    assert not (tmp_path / "whole" / UNFINISHED).exists()
    assert interrupted(experiment, specs, tmp_path / "parts", 47) == ["checkpoint-39", "checkpoint-40"]
    seen: list[int] = []
    run_matrix(experiment, specs, tmp_path / "parts", on_step=lambda spec, step, total, loss: seen.append(step))
    assert seen == [52], "steps up to the checkpoint are not done again"
    assert not (tmp_path / "parts" / UNFINISHED).exists()
    parts = record_of(tmp_path / "parts")
    validate_result(parts, "parts")
    assert_same(parts, record_of(tmp_path / "whole"))
    assert parts["history"]["seconds"] == sorted(parts["history"]["seconds"])


@pytest.mark.reliability
@pytest.mark.parametrize("name", ["alrs", "reduce_lr_on_plateau"])
def test_the_evaluation_at_the_end_of_an_epoch_is_before_its_checkpoint(
    name: str, experiment: Experiment, tmp_path: Path
) -> None:
    by_epoch = replace(
        experiment,
        arguments=experiment.arguments | {"eval_strategy": "epoch", "save_only_model": True, "eval_on_start": True},
        num_evaluations=None,
    )
    specs = build_matrix("sample", [name], [1e-3], [0])
    run_matrix(by_epoch, specs, tmp_path / "whole")
    whole = record_of(tmp_path / "whole")
    assert [evaluation["step"] for evaluation in whole["evaluations"]] == [0, 13, 26, 39, 52]
    assert interrupted(by_epoch, specs, tmp_path / "parts", 40)[-1] == "checkpoint-39"
    run_matrix(by_epoch, specs, tmp_path / "parts")
    assert_same(record_of(tmp_path / "parts"), whole)


def test_a_damaged_checkpoint_costs_one_try(experiment: Experiment, tmp_path: Path) -> None:
    specs = build_matrix("sample", ["linear"], [1e-3], [0])
    run_matrix(experiment, specs, tmp_path / "whole")
    folder = tmp_path / "parts"
    assert interrupted(experiment, specs, folder, 47) == ["checkpoint-39", "checkpoint-40"]
    damaged = next(folder.glob(f"{UNFINISHED}/*/checkpoint-40")) / "optimizer.pt"
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert run_matrix(experiment, specs, folder) == 1
    next(folder.glob("*--*.json")).unlink()
    seen: list[int] = []
    assert run_matrix(experiment, specs, folder, on_step=lambda spec, step, total, loss: seen.append(step)) == 0
    assert seen == [40, 52], "from checkpoint-39 on"
    assert_same(record_of(folder), record_of(tmp_path / "whole"))


def test_two_commands_do_not_share_the_folder_of_a_run(tmp_path: Path) -> None:
    with claimed(tmp_path / "run") as first, claimed(tmp_path / "run") as second:
        assert first == tmp_path / "run"
        assert second != first
        assert second.is_dir()
    assert not second.exists()
    with claimed(tmp_path / "run") as third:
        assert third == first


def test_a_full_disk_ends_no_run(experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(unfinished, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    monkeypatch.setattr(Trainer, "_save_checkpoint", full)
    monkeypatch.setattr(unfinished, "write_whole", full)
    assert run_matrix(experiment, build_matrix("sample", ["linear"], [1e-3], [0]), tmp_path) == 0
    assert record_of(tmp_path)["status"] == "completed"


def test_the_newest_complete_checkpoint_of_the_same_run_counts(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    recorder = RunRecorder()
    recorder.losses, recorder.norms, recorder.rates, recorder.seconds = [0.5], [1.5], [0.1], [2.0]

    def keep(step: int, identity: str) -> None:
        (tmp_path / f"checkpoint-{step}").mkdir()
        state = SimpleNamespace(global_step=step)
        CheckpointKeeper(recorder, identity).on_save(args, state, None)

    assert CheckpointKeeper(RunRecorder(), "a").resume(args) is None
    keep(20, "a")
    keep(100, "another run")
    (tmp_path / "checkpoint-120").mkdir()  # killed before its record was written
    (tmp_path / "checkpoint-140").mkdir()
    (tmp_path / "checkpoint-140" / "record-0.json").write_text('{"identity": "a", "seco')
    (tmp_path / "checkpoint-of-mine").mkdir()
    resumed = RunRecorder()
    keeper = CheckpointKeeper(resumed, "a")
    assert keeper.resume(args) == str(tmp_path / "checkpoint-20")
    assert resumed.history() == recorder.history()
    keep(40, "a")
    assert keeper.resume(args) == str(tmp_path / "checkpoint-40")


def test_checkpoints_are_asked_for_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    keeper = CheckpointKeeper(RunRecorder(), "a")

    def asked(step: int) -> bool:
        control = SimpleNamespace(should_save=False)
        keeper.on_step_end(args, SimpleNamespace(global_step=step, max_steps=100, epoch=step / 80), control)
        return control.should_save

    def asked_between_epochs(step: int) -> bool:
        control = SimpleNamespace(should_save=False)
        keeper.on_epoch_end(args, SimpleNamespace(global_step=step, max_steps=100), control)
        return control.should_save

    clock[0] += 599
    assert not asked(20)
    clock[0] += 2
    assert not asked(39), "the clock is looked at every 20 steps"
    assert asked(40)
    assert not asked(80), "the evaluation at an epoch's end comes after its last step"
    assert asked_between_epochs(80)
    assert not asked(100), "the end needs none"
    assert not asked_between_epochs(100)
    keeper.on_epoch_begin(args, None, None)
    assert not asked(40), "this epoch may be short"
    assert asked_between_epochs(80)
    (tmp_path / "checkpoint-80").mkdir()
    keeper.on_save(args, SimpleNamespace(global_step=80), None)
    assert not asked_between_epochs(80)


def test_progress_is_written_at_most_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    assert read_progress(tmp_path) is None
    writer = ProgressWriter(tmp_path)
    writer(20, 100, 0.5)
    clock[0] += 0.5
    writer(40, 100, 0.25)
    assert read_progress(tmp_path) == (20, 100, 0.5)
    clock[0] += 0.6
    writer(60, 100, 0.125)
    assert read_progress(tmp_path) == (60, 100, 0.125)


def slow(data: DataArguments) -> Any:
    """The tabular sample, whose model kills its process once, in the middle of a run of seed 1."""
    prepared = TASKS["titanic"].prepare(data)
    build, marker = prepared.model_init, Path(os.environ["HF_ALRS_TEST_MARKER"])

    def model_init() -> Any:
        import torch

        model = build()
        if torch.initial_seed() == 1 and not marker.exists():
            steps = [0]

            def count(*_: Any) -> None:
                steps[0] += model.training
                if steps[0] == 45:
                    marker.touch()
                    os.kill(os.getpid(), signal.SIGKILL)

            model.register_forward_hook(count)
        model.register_forward_hook(lambda *_: time.sleep(0.06))
        return model

    prepared.model_init = model_init
    return prepared


def test_workers_tell_their_steps_and_a_killed_run_is_run_again(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ALRS_TEST_MARKER", str(tmp_path / "killed"))
    task = TASKS["titanic"]
    experiment = Experiment(
        task=type(task)(task.name, task.kind, slow, task.recipe, task.description),
        data=experiment.data,
        arguments=experiment.arguments,
        alrs_config=experiment.alrs_config,
    )
    specs = build_matrix("sample", ["linear"], [1e-3], [0, 1])
    seen: dict[int, list[int]] = {0: [], 1: []}
    failed = run_matrix(
        experiment, specs, tmp_path / "runs", 2, on_step=lambda spec, step, total, loss: seen[spec.seed].append(step)
    )
    assert failed == 0
    assert (tmp_path / "killed").exists()
    assert all(set(steps) <= {20, 40, 52} and steps for steps in seen.values())
    for spec in specs:
        record = json.loads((tmp_path / "runs" / spec.file_name).read_text())
        assert record["status"] == "completed"
        assert len(record["history"]["loss"]) == 52


def test_a_folder_is_taken_by_one_run_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with alone_in(folder), pytest.raises(InputError, match="another run is at work there"), alone_in(folder):
        pytest.fail("it was taken twice")
    with alone_in(folder):  # and is free again
        assert list(folder.iterdir()) == []
