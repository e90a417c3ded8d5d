"""Cells in processes of their own: a killed one is recorded and costs no other, a launched one is one run."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_alrs.config import ALRSConfig, InputError
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


@pytest.mark.slow
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
def test_a_launched_cell_that_cannot_work_is_refused_and_not_recorded(tmp_path: Path) -> None:
    experiment = Experiment(
        task=TASKS["titanic"],
        data=DataArguments(task_name="titanic", dataset_name="sample"),
        arguments={"max_steps": 4, "report_to": "none", "label_smoothing_factor": 0.1},
        alrs_config=ALRSConfig(),
        launcher=sys.executable,
    )
    with pytest.raises(InputError, match=r"label_smoothing_factor=0.1.*has one logit"):
        run_matrix(experiment, build_matrix("sample", ["linear"], [1e-3], [0]), tmp_path)
    assert not list(tmp_path.glob("*.json"))


LAUNCHER = (
    f"{sys.executable} -m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 "
    "--mixed_precision no --dynamo_backend no --main_process_port 0"
)


def launched_comparison(output_dir: Path, steps: int, *schedulers: str) -> list[str]:
    return [
        sys.executable, "-m", "hf_alrs.cli", "compare", "--task", "titanic", "--dataset_name", "sample", "--max_steps",
        str(steps), "--schedulers", *schedulers, "--seeds", "0", "--launcher", LAUNCHER, "--output_dir", str(output_dir),
    ]  # fmt: skip


ON_CPU = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_cell_under_accelerate_launch_is_one_run_of_two_processes(tmp_path: Path) -> None:
    command = launched_comparison(tmp_path, 8, "alrs", "range_test")
    subprocess.run(command, cwd=ROOT, env=os.environ | ON_CPU, check=True, capture_output=True)
    records = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*--*.json"))]
    assert [record["status"] for record in records] == ["completed"] * 2
    assert {record["config"]["training"]["num_processes"] for record in records} == {2}
    assert {len(record["history"]["loss"]) for record in records} == {8}


# Both processes keep checkpoints every 20 steps, say what steps they make, and end at the one that the environment names
CUT_SHORT = """
import os
if os.environ.get("LOCAL_RANK"):
    from hf_alrs import recording, unfinished
    unfinished.SECONDS_BETWEEN_CHECKPOINTS = 0.0
    on_step_end = recording.RunRecorder.on_step_end
    def end_at(self, args, state, control, **kwargs):
        on_step_end(self, args, state, control, **kwargs)
        with open(os.environ["HF_ALRS_TEST_STEPS"], "a") as file:
            print(state.global_step, file=file)
        if state.global_step == int(os.environ.get("HF_ALRS_TEST_LAST_STEP", 0)):
            os._exit(1)
    recording.RunRecorder.on_step_end = end_at
"""


@pytest.mark.slow
@pytest.mark.reliability
def test_a_launched_cell_that_was_killed_goes_on_to_the_same_record(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(CUT_SHORT)
    environment = os.environ | ON_CPU | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def run(folder: Path, steps: str, **more: str) -> int:
        command, more = launched_comparison(folder, 52, "alrs"), more | {"HF_ALRS_TEST_STEPS": str(tmp_path / steps)}
        return subprocess.run(command, cwd=ROOT, env=environment | more, check=False, capture_output=True).returncode

    assert run(whole, "first") == 0
    assert run(parts, "second", HF_ALRS_TEST_LAST_STEP="47") == 1
    failed = next(parts.glob("*--*.json"))
    assert json.loads(failed.read_text())["status"] == "failed"
    failed.unlink()
    assert run(parts, "third") == 0
    steps = sorted(map(int, (tmp_path / "third").read_text().split()))
    assert steps == sorted(2 * [*range(43, 53)]), "both processes go on from the end of the epoch at step 42"
    first, second = (json.loads(next(folder.glob("*--*.json")).read_text()) for folder in (whole, parts))
    for key in ("loss", "learning_rate", "phase"):
        assert second["history"][key] == first["history"][key]
    assert second["results"]["eval_loss"] == first["results"]["eval_loss"]


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
