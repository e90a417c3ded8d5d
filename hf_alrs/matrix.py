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
import platform
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import IntervalStrategy
from transformers.training_args import OptimizerNames

from .callback import ALRSTrainer, strict_json
from .config import ALRSConfig, InputError
from .experiment import HELD_OUT, DataArguments, PreparedTask, Task, build_trainer, find_baseline
from .scheduler import ALRSScheduler


SCHEMA_VERSION = 1
_VERSIONS = ("hf-alrs", "torch", "transformers", "accelerate", "datasets", "numpy", "scikit-learn")
_EVAL_PREFIX = f"eval_{HELD_OUT}_"
# What an evaluation dictionary says about the machine or the Trainer, not about the model
_NOT_SCORES = ("model_preparation_time",)
_DIVERGED_LOSS = 1e3


@dataclass(frozen=True)
class RunSpec:
    """One cell of the matrix."""

    task: str
    scheduler: str
    learning_rate: float
    seed: int

    @property
    def file_name(self) -> str:
        return f"{self.task}--{self.scheduler}--lr{self.learning_rate:g}--seed{self.seed}.json"


@dataclass(frozen=True)
class Experiment:
    """
    What all cells of a matrix share.

    Args:
        task (`Task`): What is trained.
        data (`DataArguments`): Where its data and model come from.
        arguments (`dict`): Arguments of `TrainingArguments`; rate, seed and output folder are the cell's.
        alrs_config (`ALRSConfig`): For ALRS; ablations change it.
        num_evaluations (`int`, *optional*): Evaluations spread over a run; the arguments' `eval_strategy` by default.
    """

    task: Task
    data: DataArguments
    arguments: dict[str, Any]
    alrs_config: ALRSConfig
    num_evaluations: int | None = None


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

    def attach(self, trainer: Trainer) -> None:
        """Wraps the two methods of a trainer that see the loss and the gradient norm."""
        training_step, get_grad_norm, evaluate = trainer.training_step, trainer._get_grad_norm, trainer.evaluate

        def recorded_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.first_batch is None:
                self.first_batch = hash_tensors(inputs)
            loss = training_step(model, inputs, *args, **kwargs)
            self.loss = loss if self.loss is None else self.loss + loss
            return loss

        def recorded_norm(*args: Any, **kwargs: Any) -> Any:
            self.norm = get_grad_norm(*args, **kwargs)
            self.rate = float(trainer.optimizer.param_groups[0]["lr"])
            return self.norm

        def timed_evaluate(*args: Any, **kwargs: Any) -> dict[str, float]:
            self.pause()
            try:
                return evaluate(*args, **kwargs)
            finally:
                self.started = time.perf_counter()

        trainer.training_step, trainer._get_grad_norm, trainer.evaluate = recorded_step, recorded_norm, timed_evaluate
        trainer.add_callback(self)

    def pause(self) -> None:
        self.clock += time.perf_counter() - self.started
        self.started = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock, self.started = 0.0, time.perf_counter()

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
    record: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "spec": asdict(spec),
        "status": "completed",
        "error": None,
        "config": {
            "data": asdict(experiment.data),
            "training": dict(experiment.arguments),
            "alrs": experiment.alrs_config.to_dict(),
        },
        "environment": environment(),
        "source": prepared.source,
        "num_training_steps": 1,
        "steps_per_epoch": 1,
        "splits": split_sizes(prepared),
        "higher_is_better_metric": prepared.metric_for_best,
        "results": None,
        "benchmark_results": None,
        "initial_state_hash": "",
    }
    start = time.perf_counter()
    trainer: Trainer | None = None
    before = after = 0.0
    with tempfile.TemporaryDirectory(prefix="hf-alrs-") as scratch:
        try:
            args = cell_arguments(experiment, spec, prepared, scratch)
            set_seed(spec.seed)
            model = prepared.model_init()
            record["initial_state_hash"] = hash_tensors(model.state_dict())
            trainer = build_trainer(prepared, model, args, spec.scheduler, experiment.alrs_config)
            # The matrix has a progress of its own
            trainer.remove_callback(PrinterCallback)
            if isinstance(trainer, ALRSTrainer):
                trainer.alrs_callback.write_history = False
            record["config"]["model"] = type(model).__name__
            # An optimizer of the baseline's own is none that `args.optim` can name
            optimizer = find_baseline(spec.scheduler).optimizer
            optim = optimizer if optimizer == "prodigy" else OptimizerNames(args.optim).value
            record["config"]["training"] |= {"optim": optim, "eval_steps": args.eval_steps}
            before = time.perf_counter()
            record["benchmark_results"] = _scores(trainer.evaluate(prepared.eval_dataset))
            record["benchmark_results"].pop("epoch", None)
            before = time.perf_counter() - before
            recorder.attach(trainer)
            trainer.train()
            after = time.perf_counter()
            record["results"] = _scores(trainer.evaluate(prepared.eval_dataset)) | {"epoch": trainer.state.epoch}
            after = time.perf_counter() - after
        except Exception as error:
            record["status"] = "failed"
            record["error"] = f"{type(error).__name__}: {error}"
            traceback.print_exc(file=sys.stderr)
    history = recorder.history()
    if trainer is not None:
        record["num_training_steps"] = max(1, trainer.state.max_steps)
        record["steps_per_epoch"] = max(1, round(trainer.state.max_steps / max(1, trainer.state.num_train_epochs)))
        if isinstance(trainer.lr_scheduler, ALRSScheduler):
            history["phase"] = trainer.alrs_callback.phases
    loss = record["results"]["eval_loss"] if record["results"] else math.nan
    if record["status"] == "completed" and not (math.isfinite(loss) and loss < _DIVERGED_LOSS):
        record["status"], record["error"] = "diverged", f"the final eval_loss is {loss}"
    record |= {
        "history": history,
        "evaluations": recorder.evaluations,
        "timing": {
            "train_seconds": recorder.clock,
            "eval_seconds": max(0.0, time.perf_counter() - start - recorder.clock),
            "controller_seconds": trainer.lr_scheduler.seconds
            if trainer is not None and isinstance(trainer.lr_scheduler, ALRSScheduler)
            else 0.0,
            "total_seconds": time.perf_counter() - start,
        },
        "peak_memory_bytes": peak_memory_bytes(),
        "first_batch_hash": recorder.first_batch or "",
    }
    return record


def _scores(metrics: dict[str, float]) -> dict[str, float]:
    return clean_scores({key: value for key, value in metrics.items() if key.startswith("eval_")})


def cell_arguments(experiment: Experiment, spec: RunSpec, prepared: PreparedTask, folder: str) -> TrainingArguments:
    """The `TrainingArguments` of a cell."""
    values = dict(experiment.arguments)
    values |= {
        "output_dir": folder,
        "learning_rate": spec.learning_rate,
        "seed": spec.seed,
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "disable_tqdm": True,
        "logging_strategy": "no",
        "report_to": values.get("report_to") or "none",
        "push_to_hub": False,
    }
    args = TrainingArguments(**values)
    args.dataloader_pin_memory = args.dataloader_pin_memory and args.device.type != "cpu"
    if experiment.num_evaluations:
        per_step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        steps = math.ceil(len(prepared.train_dataset) / per_step)
        total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps)
        args.eval_strategy = IntervalStrategy.STEPS
        args.eval_steps = max(1, total // experiment.num_evaluations)
    return args


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
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def peak_memory_bytes() -> int:
    """Peak memory: of the GPU where there is one (since the process began), else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_record(record: dict[str, Any], path: Path) -> None:
    """Writes a record so that the file is there whole or not at all, also when the process is killed."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(strict_json(record), allow_nan=False, default=str))
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
    statuses = [json.loads((output_dir / spec.file_name).read_text())["status"] for spec in specs]
    return statuses.count("failed")


_Records = Iterator[tuple[RunSpec, dict[str, Any]]]


def _serial_records(
    experiment: Experiment,
    specs: Sequence[RunSpec],
    on_step: Callable[[RunSpec, int, int, float | None], None] | None,
) -> _Records:
    prepared = experiment.task.prepare(experiment.data) if specs else None
    for spec in specs:
        step = None if on_step is None else functools.partial(on_step, spec)
        yield spec, run_cell(experiment, spec, prepared, step)


# Data that a worker process has prepared, so that it does so once for all its cells
_prepared: dict[str, PreparedTask] = {}


def _run_in_worker(experiment: Experiment, spec: RunSpec, num_threads: int, gpu: int | None) -> dict[str, Any]:
    torch.set_num_threads(num_threads)
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
    with ProcessPoolExecutor(num_jobs, mp_context=context) as pool:
        futures = {
            pool.submit(_run_in_worker, experiment, spec, threads, index % gpus if gpus > 1 else None): spec
            for index, spec in enumerate(specs)
        }
        for future in as_completed(futures):
            yield futures[future], future.result()


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
    remote = ray.remote(num_cpus=1, num_gpus=gpus)(_run_in_worker)
    pending = {remote.remote(experiment, spec, 1, None): spec for spec in specs}
    while pending:
        done, _ = ray.wait(list(pending))
        for reference in done:
            yield pending.pop(reference), ray.get(reference)
