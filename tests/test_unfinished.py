"""Cells that were interrupted go on from their last checkpoint, to the same record; cells under way tell where they are."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from hf_alrs import unfinished
from hf_alrs.config import ALRSConfig
from hf_alrs.experiment import DataArguments
from hf_alrs.matrix import UNFINISHED, Experiment, build_matrix, run_matrix
from hf_alrs.recording import RunRecorder
from hf_alrs.report import validate_result
from hf_alrs.unfinished import CheckpointKeeper, ProgressWriter, read_progress
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


@pytest.mark.reliability
@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_cell_goes_on_to_the_same_record(
    name: str, experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = build_matrix("sample", [name], [1e-3], [0])
    run_matrix(experiment, specs, tmp_path / "whole")
    assert not (tmp_path / "whole" / UNFINISHED).exists()
    monkeypatch.setattr(unfinished, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)  # at steps 20 and 40
    with monkeypatch.context() as during:
        interrupt_at(47, during)
        with pytest.raises(Interruption):
            run_matrix(experiment, specs, tmp_path / "parts")
    left = tmp_path / "parts" / UNFINISHED / Path(specs[0].file_name).stem
    assert sorted(folder.name for folder in left.glob("checkpoint-*")) == ["checkpoint-20", "checkpoint-40"]
    seen: list[int] = []
    run_matrix(experiment, specs, tmp_path / "parts", on_step=lambda spec, step, total, loss: seen.append(step))
    assert seen == [52], "steps up to the checkpoint are not done again"
    assert not (tmp_path / "parts" / UNFINISHED).exists()
    whole, parts = (json.loads((tmp_path / part / specs[0].file_name).read_text()) for part in ("whole", "parts"))
    validate_result(parts, "parts")
    assert parts["status"] == "completed"
    for key in ("step", "loss", "grad_norm", "learning_rate", "phase"):
        assert parts["history"][key] == whole["history"][key], key
    assert parts["history"]["seconds"] == sorted(parts["history"]["seconds"])
    assert parts["first_batch_hash"] == whole["first_batch_hash"]
    scores = ("eval_loss", "eval_accuracy", "eval_f1")
    for key in scores:
        assert parts["results"][key] == whole["results"][key]
        assert parts["benchmark_results"][key] == whole["benchmark_results"][key]
    steps = [[(e["step"], *(e[key] for key in scores)) for e in record["evaluations"]] for record in (whole, parts)]
    assert steps[0] == steps[1]


def test_the_newest_complete_checkpoint_of_the_same_run_counts(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    recorder = RunRecorder()
    recorder.losses, recorder.norms, recorder.rates, recorder.seconds = [0.5], [1.5], [0.1], [2.0]

    def keep(step: int, identity: str) -> None:
        (tmp_path / f"checkpoint-{step}").mkdir()
        state = type("State", (), {"global_step": step})
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
        control = type("Control", (), {"should_save": False})()
        keeper.on_step_end(args, type("State", (), {"global_step": step, "max_steps": 100}), control)
        return control.should_save

    clock[0] += 599
    assert not asked(20)
    clock[0] += 2
    assert not asked(39), "the clock is looked at every 20 steps"
    assert asked(40)
    assert not asked(100), "the end needs none"
    (tmp_path / "checkpoint-40").mkdir()
    keeper.on_save(args, type("State", (), {"global_step": 40}), None)
    assert not asked(60)


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
