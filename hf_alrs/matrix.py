"""
A resumable matrix of runs: (task, scheduler, learning rate, seed), one result file each.

A run whose file exists is skipped, and a file appears whole or not at all. A run that was interrupted goes on from its
last checkpoint, which lies in `unfinished/` beside the files. `results_schema.json` describes a file.
"""

from __future__ import annotations

import functools
import glob
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
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from accelerate import PartialState
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import IntervalStrategy
from transformers.training_args import OptimizerNames

from .baselines import BASELINES, MIN_EVALUATIONS
from .callback import ALRSTrainer, strict_json
from .config import ALRSConfig, InputError
from .controller import CONTROL_VERSION
from .experiment import DataArguments, PreparedTask, Task, build_trainer, find_baseline, train_from
from .recording import RunRecorder, clean_scores, hash_tensors
from .report import read_result
from .scheduler import ALRSScheduler
from .unfinished import CheckpointKeeper, ProgressWriter, claimed, read_progress, write_whole
from .workers import end_with, end_with_parent


SCHEMA_VERSION = 1
_VERSIONS = ("hf-alrs", "torch", "transformers", "accelerate", "datasets", "numpy", "scikit-learn")
_DIVERGED_LOSS = 1e3
# Arguments that say where a cell wrote and not how it trained
_OF_THE_MACHINE = ("output_dir", "logging_dir", "run_name", "local_rank")
# Beginnings of the names of those that differ between the cells of a matrix
_OF_THE_CELL = ("learning_rate", "lr_scheduler", "seed", "metric_for_best_model", "greater_is_better")
# And of those that change no result
_OF_NO_RESULT = (
    *("save_", "log", "report_to", "disable_tqdm", "hub_", "push_to_hub", "project", "trackio_"),
    *("ignore_data_skip", "load_best_model_at_end", "dataloader_num", "dataloader_p"),
)
# What else of an experiment moves a result: evaluations draw random numbers, and tell ALRS and ReduceLROnPlateau something
_OF_THE_MATRIX = ("num_evaluations", "launcher")
UNFINISHED = "unfinished"
_SECONDS_BETWEEN_LOOKS = 1.0

OnStep = Callable[["RunSpec", int, int, float], None]


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
    """All cells, each once, seed by seed, so that an interrupted matrix has complete pairs."""
    cells = itertools.product(seeds, learning_rates, schedulers)
    return list(dict.fromkeys(RunSpec(task, scheduler, rate, seed) for seed, rate, scheduler in cells))


def run_cell(
    experiment: Experiment,
    spec: RunSpec,
    prepared: PreparedTask,
    folder: Path,
    on_step: Callable[[int, int, float], None] | None = None,
) -> dict[str, Any]:
    """
    One run, as a record that `results_schema.json` describes. An exception of the training is recorded, not raised, but for
    an `InputError`.

    Args:
        experiment (`Experiment`): What all cells share.
        spec (`RunSpec`): The cell.
        prepared (`PreparedTask`): The experiment's task with its data.
        folder (`Path`): Where the run keeps checkpoints, and goes on from those that are there.
        on_step (`Callable[[int, int, float], None]`, *optional*): Told step, steps in all, and loss now and then.
    """
    recorder = RunRecorder(on_step)
    record = _blank_record(experiment, spec, prepared)
    start = time.perf_counter()
    earlier = 0.0
    reset_peak_memory()
    trainer: Trainer | None = None
    keeper: CheckpointKeeper | None = None
    try:
        args = cell_arguments(experiment, spec, prepared, str(folder))
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
                logs = Path(experiment.arguments.get("output_dir", folder))
                callback.logging_dir = str(logs / "runs" / Path(spec.file_name).stem)
        if isinstance(trainer, ALRSTrainer):
            trainer.alrs_callback.write_history = False
            record["config"]["alrs"] = _settings(trainer.alrs_config)
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
        code = [record["environment"][key] for key in ("versions", "commit")]
        identity = strict_json([asdict(spec), record["config"], record["initial_state_hash"], code])
        keeper = CheckpointKeeper(recorder, json.dumps(identity, sort_keys=True, default=str))
        if checkpoint := keeper.resume(args):
            earlier, args.eval_on_start = keeper.earlier_seconds, False
        trainer.add_callback(keeper)
        train_from(trainer, checkpoint)
        record["results"] = _evaluate_all(trainer, evaluation_sets) | {"epoch": trainer.state.epoch}
        recorder.average_over_processes()
    except InputError:  # of what all cells share: no outcome of this one
        raise
    except Exception as error:
        record["status"] = "failed"
        record["error"] = f"{type(error).__name__}: {error}"
        traceback.print_exc(file=sys.stderr)
        if keeper is not None:
            keeper.give_up(trainer.state)
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
            record["timing"]["controller_seconds"] = trainer.lr_scheduler.seconds
    loss = record["results"]["eval_loss"] if record["results"] else math.nan
    if record["status"] == "completed" and not (math.isfinite(loss) and loss < _DIVERGED_LOSS):
        record["status"], record["error"] = "diverged", f"the final eval_loss is {loss}"
    record["timing"] |= {
        "train_seconds": recorder.clock,
        "eval_seconds": recorder.eval_seconds,
        "total_seconds": earlier + time.perf_counter() - start,
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
        "config": {
            "data": asdict(experiment.data),
            "training": dict(experiment.arguments),
            "alrs": None,
            **{name: getattr(experiment, name) for name in _OF_THE_MATRIX},
        },
        "environment": {**environment(), "command": experiment.command},
        "source": prepared.source,
        "num_training_steps": 1,
        "steps_per_epoch": 1,
        "splits": split_sizes(prepared),
        "higher_is_better_metric": prepared.metric_for_best,
        "history": RunRecorder().history(),
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
        vars(trainer).pop("_eval_dataloaders", None)  # Trainer's persistent workers keep the data of the first one
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
        "save_strategy": "no",  # but for what CheckpointKeeper asks for
        "save_total_limit": 2,  # the last may be of a run that was killed before it was complete
        "save_only_model": False,
        "ignore_data_skip": False,
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
    write_whole(json.dumps(strict_json(record), allow_nan=False, default=str), path)


def missing(specs: Sequence[RunSpec], output_dir: Path) -> list[RunSpec]:
    """The cells that have no result file yet."""
    return [spec for spec in specs if not (output_dir / spec.file_name).exists()]


def refuse_other_settings(experiment: Experiment, task: str, output_dir: Path) -> None:
    """
    Keeps runs of a task that were made otherwise out of one report, and out of the place of those that are asked for.

    Raises:
        `InputError`: If a run of `task` lies there that had other data, training arguments, number of evaluations, launcher
            or `ALRSConfig`, or ran under another version of the control law.
    """
    arguments = TrainingArguments(**(experiment.arguments | {"output_dir": str(output_dir)})).to_dict()
    left_out = _OF_THE_MACHINE + _OF_THE_CELL + _OF_NO_RESULT
    if experiment.num_evaluations is not None:  # from which the cell's `eval_steps` follow
        left_out += ("eval_s",)
    training = {key: value for key, value in arguments.items() if not key.startswith(left_out)}
    for path in sorted(output_dir.glob(f"{glob.escape(quote(task, safe=''))}--*.json")):
        record = read_result(path)
        stored = record["config"]
        baseline = BASELINES.get(record["spec"]["scheduler"])
        of_matrix = {name: getattr(experiment, name) for name in _OF_THE_MATRIX}
        ours: dict[str, Any] = of_matrix | asdict(experiment.data) | training
        theirs = {name: stored[name] for name in _OF_THE_MATRIX if name in stored}
        theirs |= (stored.get("data") or {}) | (stored.get("training") or {})
        if baseline is None or baseline.optimizer is not None:  # which is not what the arguments say
            theirs.pop("optim", None)
        if baseline is None or baseline.needs_evaluation:  # likewise
            theirs = {key: value for key, value in theirs.items() if not key.startswith("eval_s")}
        if stored.get("alrs") is not None and baseline is not None and baseline.alrs_config is not None:
            config = replace(experiment.alrs_config, **baseline.alrs_config, seed=record["spec"]["seed"])
            # Runs from before versions were stored are of another one
            ours, theirs = ours | _settings(config), theirs | {"control_version": None} | stored["alrs"]
        ours = json.loads(json.dumps(strict_json(ours), default=str))
        for key in ours:
            if key in theirs and not same_setting(ours[key], theirs[key]):  # another version may know others
                failed = ", which failed," if record["status"] == "failed" else ""
                remedy = "Give another --output_dir, or the options of the stored runs."
                if key == "control_version":
                    remedy = "Give another --output_dir, or the version of hf-alrs that made the stored runs."
                raise InputError(
                    key,
                    ours[key],
                    f"{path}{failed} is a run of the same task with {theirs[key]!r}, and one report would mix them.",
                    remedy if not failed else f"{remedy[:-1]}, or delete the file.",
                )


def _settings(config: ALRSConfig) -> dict[str, Any]:
    """As stored with a run: the interval is the one in use, so that runs from before its default had two values fit."""
    versions = {"control_version": CONTROL_VERSION}  # the same settings end otherwise under another control law
    return config.to_dict() | {"decision_interval": config.time_between_decisions} | versions


def same_setting(ours: Any, theirs: Any) -> bool:
    """Whether two values are the same, or spell the same path."""
    paths = isinstance(ours, str) and isinstance(theirs, str) and ours and theirs
    return ours == theirs or bool(paths and Path(ours).resolve() == Path(theirs).resolve())


def run_matrix(
    experiment: Experiment,
    specs: Sequence[RunSpec],
    output_dir: Path,
    num_jobs: int = 1,
    executor: str = "local",
    on_step: OnStep | None = None,
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
        on_step (`Callable`, *optional*): Told cell, step, steps in all, and loss (with local jobs only).
        on_done (`Callable`, *optional*): Told cell and status when a cell ends.

    Returns:
        `int`: How many of the cells of the whole matrix failed.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    cells = missing(specs, output_dir)
    unfinished = output_dir / UNFINISHED
    if executor == "ray":  # whose workers may be on other machines
        finished = _ray_records(experiment, cells)
    elif num_jobs > 1 and len(cells) > 1:
        finished = _parallel_records(experiment, cells, unfinished, num_jobs, on_step)
    else:
        finished = _serial_records(experiment, cells, unfinished, on_step)
    for spec, record in finished:
        write_record(record, output_dir / spec.file_name)
        if record["status"] != "failed":  # one that failed after hours goes on when its file has been deleted
            shutil.rmtree(_folder_of(spec, unfinished), ignore_errors=True)
        if on_done is not None:
            on_done(spec, record["status"])
    with suppress(OSError):
        unfinished.rmdir()  # when it is empty
    statuses = [read_result(output_dir / spec.file_name)["status"] for spec in specs]
    return statuses.count("failed")


# What a launched cell writes in the place of its record where what all cells share cannot work
_REFUSED = ".refused"

_Records = Iterator[tuple[RunSpec, dict[str, Any]]]


def _folder_of(spec: RunSpec, unfinished: Path) -> Path:
    return unfinished / Path(spec.file_name).stem


def _serial_records(
    experiment: Experiment, specs: Sequence[RunSpec], unfinished: Path, on_step: OnStep | None
) -> _Records:
    prepared = experiment.task.prepare(experiment.data) if specs and not experiment.launcher else None
    for spec in specs:
        tell = None if on_step is None else functools.partial(on_step, spec)
        with claimed(_folder_of(spec, unfinished)) as folder:
            if prepared is None:
                record = _launch_cell(experiment, spec, folder, tell)
            else:
                record = run_cell(experiment, spec, prepared, folder, tell)
        yield spec, record


def _launch_cell(
    experiment: Experiment, spec: RunSpec, folder: Path, tell: Callable[[int, int, float], None] | None = None
) -> dict[str, Any]:
    """Runs a cell under the experiment's launcher, which starts `python -m hf_alrs.matrix` in several processes."""
    with tempfile.TemporaryDirectory(prefix="hf-alrs-") as scratch:
        cell, record = Path(scratch) / "cell.pkl", Path(scratch) / "record.json"
        cell.write_bytes(pickle.dumps((experiment, spec, folder.absolute(), os.getpid(), platform.node())))
        command = [*shlex.split(experiment.launcher), "-m", "hf_alrs.matrix", str(cell), str(record)]
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths})
        try:
            while (code := _ended(process)) is None:
                if tell is not None and (progress := read_progress(folder)) is not None:
                    tell(*progress)
        except BaseException:
            process.terminate()
            process.wait()
            raise
        if record.exists():
            return json.loads(record.read_text())
        if (refused := record.with_suffix(_REFUSED)).exists():
            raise pickle.loads(refused.read_bytes())
        return crashed_record(experiment, spec, f"{experiment.launcher!r} ended with code {code} and no result")


def _ended(process: subprocess.Popen) -> int | None:
    """The exit code, if the process ends within a second."""
    try:
        return process.wait(_SECONDS_BETWEEN_LOOKS)
    except subprocess.TimeoutExpired:
        return None


def _launched(cell: Path, record: Path) -> None:
    """What each process of a launched cell does."""
    experiment, spec, folder, starter, machine = pickle.loads(cell.read_bytes())
    if machine == platform.node():  # a launcher may start processes on others too
        end_with(starter)
    state = PartialState()
    with state.main_process_first():
        prepared = experiment.task.prepare(experiment.data)
    try:
        outcome = run_cell(
            experiment, spec, prepared, folder, ProgressWriter(folder) if state.is_main_process else None
        )
    except InputError as error:  # for the process that has started this one, which tells it as its own
        partial = record.with_suffix(f".{state.process_index}.tmp")
        partial.write_bytes(pickle.dumps(error))
        partial.replace(record.with_suffix(_REFUSED))
        os._exit(1)
    # A process that failed alone must not leave the others waiting for it: the launcher ends them.
    if state.is_main_process or outcome["status"] == "failed":
        write_record(outcome, record)
    if outcome["status"] == "failed":
        os._exit(1)
    state.destroy_process_group()


# Data that a worker process has prepared, so that it does so once for all its cells
_prepared: dict[str, PreparedTask] = {}


def _run_in_worker(
    experiment: Experiment, spec: RunSpec, num_threads: int, gpu: int | None, folder: Path | None
) -> dict[str, Any]:
    torch.set_num_threads(num_threads)
    if folder is None:  # on a machine that may be another one
        with tempfile.TemporaryDirectory(prefix="hf-alrs-") as scratch:
            return _run_in_folder(experiment, spec, gpu, Path(scratch))
    with claimed(folder) as own:
        return _run_in_folder(experiment, spec, gpu, own)


def _run_in_folder(experiment: Experiment, spec: RunSpec, gpu: int | None, folder: Path) -> dict[str, Any]:
    if experiment.launcher:
        return _launch_cell(experiment, spec, folder)
    if gpu is not None:
        torch.cuda.set_device(gpu)
    key = f"{experiment.task.name} {experiment.data}"
    if key not in _prepared:
        _prepared[key] = experiment.task.prepare(experiment.data)
    return run_cell(experiment, spec, _prepared[key], folder, ProgressWriter(folder))


def _parallel_records(
    experiment: Experiment, specs: Sequence[RunSpec], unfinished: Path, num_jobs: int, on_step: OnStep | None
) -> _Records:
    threads = max(1, torch.get_num_threads() // num_jobs)
    gpus = torch.cuda.device_count()
    context = multiprocessing.get_context("spawn")
    killed: list[RunSpec] = []

    def submit(pool: ProcessPoolExecutor, spec: RunSpec, index: int) -> Future:
        gpu = index % gpus if gpus > 1 else None
        return pool.submit(_run_in_worker, experiment, spec, threads, gpu, _folder_of(spec, unfinished))

    with ProcessPoolExecutor(num_jobs, context, end_with_parent) as pool:
        futures = {submit(pool, spec, index): spec for index, spec in enumerate(specs)}
        for spec, future in _as_completed(futures, unfinished, on_step):
            try:
                record = future.result()
            except BrokenProcessPool:
                killed.append(spec)
            except InputError:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            else:
                yield spec, record
    # A process that is killed takes the whole pool with it, and its cell is not known: each gets a pool of its own.
    for spec in killed:
        with ProcessPoolExecutor(1, context, end_with_parent) as pool:
            for _, future in _as_completed({submit(pool, spec, 0): spec}, unfinished, on_step):
                try:
                    record = future.result()
                except BrokenProcessPool:
                    record = crashed_record(
                        experiment, spec, "the process of the run was killed, as for lack of memory"
                    )
        yield spec, record


def _as_completed(
    futures: dict[Future, RunSpec], unfinished: Path, on_step: OnStep | None
) -> Iterator[tuple[RunSpec, Future]]:
    """Cells as they end; `on_step` is told of the others meanwhile."""
    left = dict(futures)
    while left:
        done, _ = wait(left, _SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED)
        for future in done:
            yield left.pop(future), future
        for future, spec in left.items() if on_step is not None else ():
            if future.running() and (progress := read_progress(_folder_of(spec, unfinished))) is not None:
                on_step(spec, *progress)


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
    pending = {remote.remote(experiment, spec, 1, None, None): spec for spec in specs}
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
