"""
A resumable matrix of runs: (task, scheduler, learning rate, seed), one result file each.

Resuming needs no machinery beyond the files: a run whose file exists is skipped, and a file appears whole or not at
all. `results_schema.json` describes a file.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
import multiprocessing
import os
import pickle
import platform
import resource
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from accelerate import PartialState
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import IntervalStrategy
from transformers.training_args import OptimizerNames

from .baselines import MIN_EVALUATIONS
from .callback import ALRSTrainer, strict_json
from .config import ALRSConfig, InputError
from .experiment import HELD_OUT, DataArguments, PreparedTask, Task, build_trainer, find_baseline
from .report import read_result
from .scheduler import ALRSScheduler


SCHEMA_VERSION = 1
_VERSIONS = ("hf-alrs", "torch", "transformers", "accelerate", "datasets", "numpy", "scikit-learn")
_EVAL_PREFIX = f"eval_{HELD_OUT}_"
# What an evaluation dictionary says about the machine or the Trainer, not about the model
_NOT_SCORES = ("model_preparation_time",)
_DIVERGED_LOSS = 1e3
# Arguments that say where a cell wrote and not how it trained
_OF_THE_MACHINE = ("output_dir", "logging_dir", "run_name", "local_rank")


@dataclass(frozen=True)
class RunSpec:
    """One cell of the matrix."""

    task: str
    scheduler: str
    learning_rate: float
    seed: int

    @property
    def file_name(self) -> str:
        # A name may hold a slash, and its file lies in the folder of results all the same.
        task, scheduler = (quote(name, safe="") for name in (self.task, self.scheduler))
        return f"{task}--{scheduler}--lr{self.learning_rate:g}--seed{self.seed}.json"


def _command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


@dataclass(frozen=True)
class Experiment:
    """
    What all cells of a matrix share.

    Args:
        task (`Task`): What is trained.
        data (`DataArguments`): Where its data and model come from.
        arguments (`dict`): Arguments of `TrainingArguments`; rate, seed and output folder are the cell's.
        alrs_config (`ALRSConfig`): For ALRS; ablations change it.
        num_evaluations (`int`, *optional*): Evaluations spread over a run, and at least `MIN_EVALUATIONS` for a scheduler
            that is stepped with them; the arguments' `eval_strategy` by default.
        launcher (`str`, *optional*): Command that starts the processes of one cell, such as
            `"accelerate launch --num_processes 2"`; by default a cell runs in the process that takes it.
        subset_eval_samples (`int`, *optional*): Before and after training, evaluate on the seeded subset of so many
            examples too, the one that `max_eval_samples` takes; its scores are called `eval_subset_*`.
        command (`str`): What the user typed, for the records; workers have another command line.
    """

    task: Task
    data: DataArguments
    arguments: dict[str, Any]
    alrs_config: ALRSConfig
    num_evaluations: int | None = None
    launcher: str | None = None
    subset_eval_samples: int | None = None
    command: str = field(default_factory=_command)


def build_matrix(
    task: str, schedulers: Iterable[str], learning_rates: Iterable[float], seeds: Iterable[int]
) -> list[RunSpec]:
    """All cells, seed by seed, so that an interrupted matrix has complete pairs."""
    cells = itertools.product(seeds, learning_rates, schedulers)
    return [RunSpec(task, scheduler, rate, seed) for seed, rate, scheduler in cells]


class _Recorder(TrainerCallback):
    """Every optimizer step's loss, pre-clip gradient norm, rate and time, read from the device at the end only."""

    def __init__(self, on_step: Callable[[int, int, float | None], None] | None):
        self.on_step = on_step
        self.losses: list[torch.Tensor] = []
        self.norms: list[Any] = []
        self.rates: list[float] = []
        self.seconds: list[float] = []
        self.evaluations: list[dict[str, float]] = []
        self.first_batch: str | None = None
        self.loss: torch.Tensor | None = None
        self.norm: Any = None
        self.rate = math.nan
        self.clock = 0.0  # training seconds before `started`
        self.started = 0.0
        self.training = False
        self.eval_seconds = 0.0
        self.accelerator: Any = None

    def attach(self, trainer: Trainer) -> None:
        """Wraps the two methods of a trainer that see the loss and the gradient norm."""
        self.accelerator = trainer.accelerator
        training_step, get_grad_norm, evaluate = trainer.training_step, trainer._get_grad_norm, trainer.evaluate

        def recorded_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.first_batch is None:
                self.first_batch = hash_tensors(inputs)
            loss = training_step(model, inputs, *args, **kwargs)
            self.loss = loss if self.loss is None else self.loss + loss
            return loss

        def recorded_norm(*args: Any, **kwargs: Any) -> Any:
            self.norm = get_grad_norm(*args, **kwargs)
            group = trainer.optimizer.param_groups[0]
            self.rate = float(group["lr"]) * float(group.get("d", 1.0))  # Prodigy's own estimate scales the rate
            return self.norm

        def timed_evaluate(*args: Any, **kwargs: Any) -> dict[str, float]:
            self.pause()
            try:
                return evaluate(*args, **kwargs)
            finally:
                self.eval_seconds += time.perf_counter() - self.started
                self.started = time.perf_counter()

        trainer.training_step, trainer._get_grad_norm, trainer.evaluate = recorded_step, recorded_norm, timed_evaluate
        trainer.add_callback(self)

    def pause(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # steps that are still under way belong to training
        if self.training:
            self.clock += time.perf_counter() - self.started
        self.started = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.training, self.started = True, time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.losses.append(self.loss)
        self.norms.append(self.norm)
        self.rates.append(self.rate)
        self.seconds.append(self.clock + time.perf_counter() - self.started)
        self.loss = None
        if self.on_step is not None and (state.global_step % 20 == 0 or state.global_step == state.max_steps):
            self.on_step(state.global_step, state.max_steps, float(self.losses[-1]))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if metrics and f"{_EVAL_PREFIX}loss" in metrics:
            scores = {
                f"eval_{key.removeprefix(_EVAL_PREFIX)}": value
                for key, value in metrics.items()
                if key.startswith(_EVAL_PREFIX)
            }
            self.evaluations.append(
                {
                    "step": state.global_step,
                    "epoch": float(state.epoch or 0.0),
                    "seconds": self.seconds[-1] if self.seconds else 0.0,
                    **clean_scores(scores),
                }
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pause()
        self.training = False

    def average_over_processes(self) -> None:
        """The loss of a step is that of all processes; each has seen its own share of the batch."""
        if self.losses and self.accelerator.num_processes > 1:
            losses = self.accelerator.reduce(torch.stack([loss.float() for loss in self.losses]), reduction="mean")
            self.losses = list(losses.cpu())

    def history(self) -> dict[str, Any]:
        return {
            "step": list(range(1, len(self.losses) + 1)),
            "loss": _rounded(self.losses),
            "grad_norm": _rounded(self.norms),
            "learning_rate": _rounded(self.rates),
            "phase": None,
            "seconds": _rounded(self.seconds),
        }


def _rounded(values: Iterable[Any]) -> list[float]:
    """To eight significant digits: a third of the file, and more than any of these numbers means."""
    return [float(f"{float(value):.8g}") for value in values]


def clean_scores(metrics: dict[str, float]) -> dict[str, float]:
    """An evaluation dictionary without what is not a score or a speed of the model."""
    return {key: value for key, value in metrics.items() if not key.endswith(_NOT_SCORES)}


def hash_tensors(value: Any) -> str:
    """SHA-256 over the bytes of all tensors of a (nested) mapping, in the order of its sorted keys."""
    digest = hashlib.sha256()

    def feed(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            digest.update(item.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif hasattr(item, "items"):
            for key in sorted(item):
                digest.update(str(key).encode())
                feed(item[key])

    feed(value)
    return digest.hexdigest()


def run_cell(
    experiment: Experiment,
    spec: RunSpec,
    prepared: PreparedTask,
    on_step: Callable[[int, int, float | None], None] | None = None,
) -> dict[str, Any]:
    """
    One run, as a record that `results_schema.json` describes. An exception of the training is recorded, not raised.

    Args:
        experiment (`Experiment`): What all cells share.
        spec (`RunSpec`): The cell.
        prepared (`PreparedTask`): The experiment's task with its data.
        on_step (`Callable[[int, int, float], None]`, *optional*): Told step, steps in all, and loss now and then.
    """
    recorder = _Recorder(on_step)
    record = _blank_record(experiment, spec, prepared)
    start = time.perf_counter()
    reset_peak_memory()
    trainer: Trainer | None = None
    with tempfile.TemporaryDirectory(prefix="hf-alrs-") as scratch:
        try:
            args = cell_arguments(experiment, spec, prepared, scratch)
            set_seed(spec.seed)
            model = prepared.model_init()
            record["initial_state_hash"] = hash_tensors(model.state_dict())
            # The controller's own chance (a random network, the order of its batches) varies with the seed as well
            config = replace(experiment.alrs_config, seed=spec.seed)
            trainer = build_trainer(prepared, model, args, spec.scheduler, config)
            # The matrix has a progress of its own
            trainer.remove_callback(PrinterCallback)
            for callback in trainer.callback_handler.callbacks:
                if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                    folder = Path(experiment.arguments.get("output_dir", scratch))
                    callback.logging_dir = str(folder / "runs" / Path(spec.file_name).stem)
            if isinstance(trainer, ALRSTrainer):
                trainer.alrs_callback.write_history = False
                record["config"]["alrs"] = trainer.alrs_config.to_dict()
            record["config"]["model"] = type(model).__name__
            # An optimizer of the baseline's own is none that `args.optim` can name
            optimizer = find_baseline(spec.scheduler).optimizer
            optim = optimizer if optimizer == "prodigy" else OptimizerNames(args.optim).value
            training = {key: value for key, value in args.to_dict().items() if key not in _OF_THE_MACHINE}
            record["config"]["training"] = training | {"optim": optim, "num_processes": args.world_size}
            recorder.attach(trainer)
            evaluation_sets = {"eval": prepared.eval_dataset}
            if experiment.subset_eval_samples is not None:
                smaller = replace(experiment.data, max_eval_samples=experiment.subset_eval_samples)
                evaluation_sets["eval_subset"] = experiment.task.prepare(smaller).eval_dataset
            record["benchmark_results"] = _evaluate_all(trainer, evaluation_sets)
            trainer.train()
            record["results"] = _evaluate_all(trainer, evaluation_sets) | {"epoch": trainer.state.epoch}
            recorder.average_over_processes()
        except Exception as error:
            record["status"] = "failed"
            record["error"] = f"{type(error).__name__}: {error}"
            traceback.print_exc(file=sys.stderr)
        finally:
            for name in ("wandb", "trackio"):  # else the next cell would go on in this one's run
                if trainer is not None and name in trainer.args.report_to and name in sys.modules:
                    with suppress(Exception):
                        sys.modules[name].finish()
    history = recorder.history()
    if trainer is not None:
        record["num_training_steps"] = max(1, trainer.state.max_steps)
        record["steps_per_epoch"] = steps_per_epoch(args, prepared)
        if isinstance(trainer.lr_scheduler, ALRSScheduler):
            history["phase"] = trainer.alrs_callback.phases
            record["timing"]["controller_seconds"] = trainer.lr_scheduler.seconds
    loss = record["results"]["eval_loss"] if record["results"] else math.nan
    if record["status"] == "completed" and not (math.isfinite(loss) and loss < _DIVERGED_LOSS):
        record["status"], record["error"] = "diverged", f"the final eval_loss is {loss}"
    record["timing"] |= {
        "train_seconds": recorder.clock,
        "eval_seconds": recorder.eval_seconds,
        "total_seconds": time.perf_counter() - start,
    }
    return record | {
        "history": history,
        "evaluations": recorder.evaluations,
        "peak_memory_bytes": peak_memory_bytes(),
        "first_batch_hash": recorder.first_batch or "",
    }


def _blank_record(experiment: Experiment, spec: RunSpec, prepared: PreparedTask) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "spec": asdict(spec),
        "status": "completed",
        "error": None,
        "config": {"data": asdict(experiment.data), "training": dict(experiment.arguments), "alrs": None},
        "environment": {**environment(), "command": experiment.command},
        "source": prepared.source,
        "num_training_steps": 1,
        "steps_per_epoch": 1,
        "splits": split_sizes(prepared),
        "higher_is_better_metric": prepared.metric_for_best,
        "history": _Recorder(None).history(),
        "evaluations": [],
        "results": None,
        "benchmark_results": None,
        "timing": dict.fromkeys(("train_seconds", "eval_seconds", "controller_seconds", "total_seconds"), 0.0),
        "peak_memory_bytes": None,
        "initial_state_hash": "",
        "first_batch_hash": "",
    }


def crashed_record(experiment: Experiment, spec: RunSpec, error: str) -> dict[str, Any]:
    """The record of a cell whose process ended before it could write one."""
    record = _blank_record(experiment, spec, experiment.task.prepare(experiment.data))
    return record | {"status": "failed", "error": error}


def _evaluate_all(trainer: Trainer, evaluation_sets: dict[str, Any]) -> dict[str, float]:
    scores: dict[str, float] = {}
    for prefix, dataset in evaluation_sets.items():
        scores |= trainer.evaluate(dataset, metric_key_prefix=prefix)
    return clean_scores({key: value for key, value in scores.items() if key.startswith("eval_")})


def cell_arguments(experiment: Experiment, spec: RunSpec, prepared: PreparedTask, folder: str) -> TrainingArguments:
    """The `TrainingArguments` of a cell."""
    values = dict(experiment.arguments)
    report_to = values.get("report_to") or "none"
    report_to = "none" if report_to in ([], ["none"]) else report_to
    values |= {
        "output_dir": folder,
        "learning_rate": spec.learning_rate,
        "seed": spec.seed,
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "disable_tqdm": True,
        "logging_strategy": values.get("logging_strategy", "steps") if report_to != "none" else "no",
        "report_to": report_to,
        "run_name": Path(spec.file_name).stem,
        "push_to_hub": False,
    }
    args = TrainingArguments(**values)
    args.dataloader_pin_memory = args.dataloader_pin_memory and args.device.type != "cpu"
    if experiment.num_evaluations:
        steps = args.num_train_epochs * steps_per_epoch(args, prepared)
        total = args.max_steps if args.max_steps > 0 else math.ceil(steps)
        args.eval_strategy = IntervalStrategy.STEPS
        needed = MIN_EVALUATIONS if find_baseline(spec.scheduler).needs_evaluation else 1
        args.eval_steps = max(1, total // max(needed, experiment.num_evaluations))
    return args


def steps_per_epoch(args: TrainingArguments, prepared: PreparedTask) -> int:
    """Optimizer steps in an epoch."""
    batches = len(prepared.train_dataset) / (args.train_batch_size * args.world_size)
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    return max(1, math.ceil(batches / args.gradient_accumulation_steps))


def split_sizes(prepared: PreparedTask) -> dict[str, int]:
    """Number of examples in each split."""
    controller = prepared.controller_dataset
    return {
        "train": len(prepared.train_dataset),
        "controller": 0 if controller is None else len(controller),
        "eval": len(prepared.eval_dataset),
    }


def environment() -> dict[str, Any]:
    """Versions, commit, device and command of this process."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in _VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    cuda = torch.cuda.is_available()
    return {
        "versions": versions,
        "commit": _commit(),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "platform": platform.platform(),
        "num_threads": torch.get_num_threads(),
        "command": _command(),
    }


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def reset_peak_memory() -> None:
    """Forgets the peak of what ran in this process before, where the system can."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """Peak memory since [`reset_peak_memory`]: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_record(record: dict[str, Any], path: Path) -> None:
    """Writes a record so that the file is there whole or not at all, also when the process is killed."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    with open(temporary, "x") as file:
        file.write(json.dumps(strict_json(record), allow_nan=False, default=str))
    temporary.replace(path)


def missing(specs: Sequence[RunSpec], output_dir: Path) -> list[RunSpec]:
    """The cells that have no result file yet."""
    return [spec for spec in specs if not (output_dir / spec.file_name).exists()]


def run_matrix(
    experiment: Experiment,
    specs: Sequence[RunSpec],
    output_dir: Path,
    num_jobs: int = 1,
    executor: str = "local",
    on_step: Callable[[RunSpec, int, int, float | None], None] | None = None,
    on_done: Callable[[RunSpec, str], None] | None = None,
) -> int:
    """
    Runs every cell that has no result file yet.

    Args:
        experiment (`Experiment`): What all cells share.
        specs (`Sequence[RunSpec]`): The cells.
        output_dir (`Path`): Folder of the result files.
        num_jobs (`int`, *optional*, defaults to 1): Processes; each gets its share of the threads, and a GPU of its
            own where there are several.
        executor (`str`, *optional*, defaults to `"local"`): `"local"`, or `"ray"` for a Ray cluster (the one of
            `RAY_ADDRESS`, else one that is started on this machine); the files are written here in both cases.
        on_step (`Callable`, *optional*): Told cell, step, steps in all, and loss (with one local job only).
        on_done (`Callable`, *optional*): Told cell and status when a cell ends.

    Returns:
        `int`: How many of the cells of the whole matrix failed.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    cells = missing(specs, output_dir)
    if executor == "ray":
        finished = _ray_records(experiment, cells)
    elif num_jobs > 1 and len(cells) > 1:
        finished = _parallel_records(experiment, cells, num_jobs)
    else:
        finished = _serial_records(experiment, cells, on_step)
    for spec, record in finished:
        write_record(record, output_dir / spec.file_name)
        if on_done is not None:
            on_done(spec, record["status"])
    statuses = [read_result(output_dir / spec.file_name)["status"] for spec in specs]
    return statuses.count("failed")


_Records = Iterator[tuple[RunSpec, dict[str, Any]]]


def _serial_records(
    experiment: Experiment,
    specs: Sequence[RunSpec],
    on_step: Callable[[RunSpec, int, int, float | None], None] | None,
) -> _Records:
    prepared = experiment.task.prepare(experiment.data) if specs and not experiment.launcher else None
    for spec in specs:
        step = None if on_step is None else functools.partial(on_step, spec)
        yield spec, run_cell(experiment, spec, prepared, step) if prepared else _launch_cell(experiment, spec)


def _launch_cell(experiment: Experiment, spec: RunSpec) -> dict[str, Any]:
    """Runs a cell under the experiment's launcher, which starts `python -m hf_alrs.matrix` in several processes."""
    with tempfile.TemporaryDirectory(prefix="hf-alrs-") as folder:
        cell, record = Path(folder) / "cell.pkl", Path(folder) / "record.json"
        cell.write_bytes(pickle.dumps((experiment, spec)))
        command = [*shlex.split(experiment.launcher), "-m", "hf_alrs.matrix", str(cell), str(record)]
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        code = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, check=False).returncode
        if record.exists():
            return json.loads(record.read_text())
        return crashed_record(experiment, spec, f"{experiment.launcher!r} ended with code {code} and no result")


def _launched(cell: Path, record: Path) -> None:
    """What each process of a launched cell does."""
    experiment, spec = pickle.loads(cell.read_bytes())
    state = PartialState()
    with state.main_process_first():
        prepared = experiment.task.prepare(experiment.data)
    outcome = run_cell(experiment, spec, prepared)
    # A process that failed alone must not leave the others waiting for it: the launcher ends them.
    if state.is_main_process or outcome["status"] == "failed":
        write_record(outcome, record)
    if outcome["status"] == "failed":
        os._exit(1)
    state.destroy_process_group()


# Data that a worker process has prepared, so that it does so once for all its cells
_prepared: dict[str, PreparedTask] = {}


def _run_in_worker(experiment: Experiment, spec: RunSpec, num_threads: int, gpu: int | None) -> dict[str, Any]:
    torch.set_num_threads(num_threads)
    if experiment.launcher:
        return _launch_cell(experiment, spec)
    if gpu is not None:
        torch.cuda.set_device(gpu)
    key = f"{experiment.task.name} {experiment.data}"
    if key not in _prepared:
        _prepared[key] = experiment.task.prepare(experiment.data)
    return run_cell(experiment, spec, _prepared[key])


def _parallel_records(experiment: Experiment, specs: Sequence[RunSpec], num_jobs: int) -> _Records:
    threads = max(1, torch.get_num_threads() // num_jobs)
    gpus = torch.cuda.device_count()
    context = multiprocessing.get_context("spawn")
    unfinished: list[RunSpec] = []
    with ProcessPoolExecutor(num_jobs, mp_context=context) as pool:
        futures = {
            pool.submit(_run_in_worker, experiment, spec, threads, index % gpus if gpus > 1 else None): spec
            for index, spec in enumerate(specs)
        }
        for future in as_completed(futures):
            try:
                record = future.result()
            except BrokenProcessPool:
                unfinished.append(futures[future])
            else:
                yield futures[future], record
    # A process that is killed takes the whole pool with it, and its cell is not known: each gets a pool of its own.
    for spec in unfinished:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            try:
                record = pool.submit(_run_in_worker, experiment, spec, threads, 0 if gpus > 1 else None).result()
            except BrokenProcessPool:
                record = crashed_record(experiment, spec, "the process of the run was killed, as for lack of memory")
        yield spec, record


def _ray_records(experiment: Experiment, specs: Sequence[RunSpec]) -> _Records:
    try:
        import ray
    except ImportError as error:
        raise InputError(
            "executor", "ray", "needs the package ray.", "Install it with `pip install hf-alrs[ray]`."
        ) from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(_run_in_worker)
    pending = {remote.remote(experiment, spec, 1, None): spec for spec in specs}
    while pending:
        done, _ = ray.wait(list(pending))
        for reference in done:
            spec = pending.pop(reference)
            try:
                record = ray.get(reference)
            except ray.exceptions.RayTaskError:
                raise  # the data could not be prepared: no cell can run
            except ray.exceptions.RayError as error:
                record = crashed_record(experiment, spec, f"{type(error).__name__}: the worker of the run was lost")
            yield spec, record


if __name__ == "__main__":
    _launched(Path(sys.argv[1]), Path(sys.argv[2]))
