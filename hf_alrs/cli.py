"""Argument dataclasses and commands: the run scripts and `hf-alrs`."""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import logging
import math
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks
from transformers.trainer_utils import get_last_checkpoint
from transformers.training_args import OptimizerNames

from . import cards, evidence, hub
from .baselines import BASELINES, MIN_EVALUATIONS
from .callback import HISTORY_NAME
from .config import ALRSConfig, InputError, read_yaml
from .experiment import DataArguments, PreparedTask, Task, build_trainer, find_baseline
from .matrix import (
    Experiment,
    RunSpec,
    build_matrix,
    environment,
    missing,
    refuse_other_settings,
    run_matrix,
    split_sizes,
)
from .network import load_network
from .report import build_report, load_runs
from .report.leaderboard import LEADERBOARD_FILE, build_leaderboard, render_leaderboard
from .report.runs import REPORT_FILE


logger = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "hf_alrs.tasks"
# What a folder of results is made of: runs, and the report of them
_RESULT_NAMES = r"[^/]+\.json|report\.(md|html)|plots/[^/]+\.svg"
SAMPLE = "sample"


@dataclass
class ALRSArguments:
    """The scheduler, and the fields of `ALRSConfig` as the command line spells them."""

    scheduler: str = field(default="alrs", metadata={"help": f"What sets the learning rate: {', '.join(BASELINES)}."})
    network: str = field(
        default="default", metadata={"help": "`default` (shipped weights), `scratch`, a folder or a Hub id."}
    )
    hidden_sizes: list[int] = field(
        default_factory=lambda: [64, 32], metadata={"help": "Hidden layers of the network."}
    )
    phase1_steps: str = field(
        default="0.025", metadata={"help": "Length of phase 1: steps (`50`) or a fraction (`0.025`)."}
    )
    decision_interval: str = field(
        default="0.0125", metadata={"help": "Time between decisions: steps, a fraction, or `epoch`."}
    )
    feedback_interval: int = field(
        default=8, metadata={"help": "Decisions between updates of the network in phase 3; 0: none."}
    )
    meta_num_epochs: int = field(default=10, metadata={"help": "Epochs of phase 2; 0: none."})
    num_probes: int | None = field(default=None, metadata={"help": "Trial runs at the end of phase 1."})
    max_restarts: int = field(default=3, metadata={"help": "Restarts from the initial weights; 0 keeps no copy."})
    controller_evaluations: int = field(
        default=10, metadata={"help": "Evaluations of the controller's split that drive the rate; 0: none."}
    )
    guard_patience: int = field(default=3, metadata={"help": "Troubles after which the last good rate just decays."})
    rollback: bool = field(
        default=False,
        metadata={"help": "Keep the last good weights on the CPU and go back to them when the run is in trouble."},
    )
    average_weights: bool = field(
        default=True,
        metadata={"help": "Average the weights along the run; the averaged ones are evaluated, saved and kept."},
    )
    final_lr_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Rate that the decay ends at over the peak rate. Default: 0.3 with averaged weights, else 0."
        },
    )
    min_lr: float = field(default=0.0, metadata={"help": "Lower bound of the rate."})
    max_lr: float = field(default=10.0, metadata={"help": "Upper bound of the rate."})

    def to_config(self, seed: int) -> ALRSConfig:
        """The `ALRSConfig` that these arguments spell."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "scheduler"}
        for name in ("phase1_steps", "decision_interval"):
            values[name] = _span(name, values[name])
        return ALRSConfig(**values, seed=seed)


@dataclass
class RunArguments:
    """What a run script reads besides."""

    config: str | None = field(
        default=None,
        metadata={"help": "YAML recipe whose keys are these options; the command line overrides it."},
    )


@dataclass
class CompareArguments:
    """The matrix of runs: every scheduler from every rate with every seed."""

    schedulers: list[str] = field(
        default_factory=lambda: ["alrs", "constant", "linear", "step", "exponential", "reduce_lr_on_plateau"],
        metadata={"help": "Schedulers to compare."},
    )
    learning_rates: list[float] = field(
        default_factory=list, metadata={"help": "Initial rates; default: --learning_rate."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds, paired over schedulers."})
    num_evaluations: int = field(
        default=10,
        metadata={
            "help": "Evaluations spread over each run, for learning curves. Schedulers that are stepped with them "
            f"(reduce_lr_on_plateau, greedy) get at least {MIN_EVALUATIONS}, of the same splits."
        },
    )
    subset_eval_samples: int | None = field(
        default=None,
        metadata={"help": "Evaluate each model on a seeded subset of this many examples too (`eval_subset_*`)."},
    )
    jobs: int = field(default=1, metadata={"help": "Runs at a time, each in a process of its own."})

    executor: str = field(default="local", metadata={"help": "`local`, or `ray` for a Ray cluster (the extra `ray`)."})
    launcher: str | None = field(
        default=None,
        metadata={"help": "Command that starts the processes of each run, as `accelerate launch --num_processes 2`."},
    )

    target: float | None = field(default=None, metadata={"help": "Score to time every run to, such as 0.9."})

    def __post_init__(self) -> None:
        if self.executor not in ("local", "ray"):
            raise InputError("executor", self.executor, "must be `local` or `ray`.", "Leave it out.")
        for name in self.schedulers:
            find_baseline(name)
        for rate in self.learning_rates:
            if not (0 < rate < float("inf")):
                raise InputError("learning_rates", rate, "must be finite and above 0.", "Give for example 1e-4 1e-3.")
        for name in ("jobs", "num_evaluations"):
            if getattr(self, name) < 1:
                raise InputError(name, getattr(self, name), "must be at least 1.", "Use 1 or more.")
        if self.launcher:
            _check_launcher(self.launcher)


def _check_launcher(launcher: str) -> None:
    try:
        program = shlex.split(launcher)[0]
    except (ValueError, IndexError):
        program = ""
    if shutil.which(program) is None:
        raise InputError(
            "launcher",
            launcher,
            f"its program {program!r} cannot be found.",
            "Give its path, such as '.venv/bin/accelerate launch', or activate the environment that has it.",
        )


_COMPARE_OPTIONS = ("--schedulers", "--learning_rates", "--learning-rates", "--seeds")


def _span(name: str, text: str) -> int | float | str:
    text = str(text)
    if text == "epoch":
        return text
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise InputError(
            name, text, "must be steps (a whole number), a fraction of the run, or `epoch`.", "Write 50 or 0.025."
        ) from None


# Tasks


def installed_tasks() -> dict[str, Task]:
    """The tasks of all installed packages that declare some (entry-point group `hf_alrs.tasks`)."""
    tasks: dict[str, Task] = {}
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        tasks.update(entry.load())
    return tasks


def find_task(name: str, tasks: Mapping[str, Task]) -> Task:
    """
    A task by its name, or by `package.module:TASK`.

    Raises:
        `InputError`: If there is none.
    """
    if name in tasks:
        return tasks[name]
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise InputError(
                "task", name, f"could not be imported ({error}).", "Give package.module:TASK of an installed package."
            ) from error
    raise InputError("task_name", name, f"must be one of {', '.join(sorted(tasks))}.", "Check the spelling.")


# Recipes


def read_recipe(path: Path) -> dict[str, Any]:
    """
    A recipe: a YAML mapping of command-line options.

    Raises:
        `InputError`: If the file is missing or not such a mapping.
    """
    recipe = read_yaml(path)
    if not isinstance(recipe, dict):
        raise InputError("config", str(path), "is not a mapping of options.", "Write `option: value` lines.")
    return recipe


def recipe_arguments(recipe: Mapping[str, Any]) -> list[str]:
    """The options of a recipe as the command line would spell them."""
    arguments: list[str] = []
    for key, value in recipe.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        arguments += [f"--{key}", *(str(v) for v in values)]
    return arguments


def task_recipe(task: Task, dataset_name: str | None, model_type: str | None) -> dict[str, Any]:
    """The recipe that goes with a task: that of its sample, of the named model, or its own."""
    folder = task.recipe.parent
    candidates = [folder / f"{task.name}-{model_type}.yaml", task.recipe] if model_type else [task.recipe]
    if dataset_name == SAMPLE:
        candidates = [folder / f"sample-{task.kind}.yaml"]
    for path in candidates:
        if path.is_file():
            # Which task and which data are the command's to say
            return {k: v for k, v in read_recipe(path).items() if k not in ("task_name", "dataset_name", "model_type")}
    return {}


def parse(
    arguments: Sequence[str], dataclass_types: Sequence[type], tasks: Mapping[str, Task], default_task: str
) -> tuple[Task, tuple[Any, ...], dict[str, Any]]:
    """
    Parses a command line over the task's recipe and the file of `--config`; later ones win.

    Without a task, a dataset or a recipe the built-in sample is run.

    Returns:
        `tuple`: The task, an instance of each dataclass, and the options that differ from their defaults.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("config", "task_name", "dataset_name", "model_type"):
        first.add_argument(f"--{name}", f"--{name.replace('_', '-')}", dest=name)
    first.add_argument("--task", dest="task_name")
    known, rest = first.parse_known_args(arguments)
    given = {"task_name": known.task_name, "dataset_name": known.dataset_name, "model_type": known.model_type}
    recipe = read_recipe(Path(known.config)) if known.config else {}
    if not any(given.values()) and not recipe:
        given["dataset_name"] = SAMPLE
        print(f"No task and no dataset given: running {default_task} on the built-in offline sample.")
    chosen = {key: value or recipe.get(key) for key, value in given.items()}
    task = find_task(chosen["task_name"] or default_task, tasks)
    chosen["task_name"] = task.name
    merged = [
        *recipe_arguments(task_recipe(task, chosen["dataset_name"], chosen["model_type"])),
        *recipe_arguments({key: value for key, value in recipe.items() if key not in chosen}),
        *rest,
        *recipe_arguments(chosen),
        *(["--config", known.config] if known.config else []),
    ]
    if not any(argument.split("=")[0] in ("--output_dir", "--output-dir") for argument in merged):
        merged += ["--output_dir", str(Path("outputs") / task.name)]
    if not any(argument.split("=")[0] in ("--report_to", "--report-to") for argument in merged):
        merged += ["--report_to", "none"]
    if not sys.stderr.isatty() and not any(argument.startswith("--disable_tqdm") for argument in merged):
        merged += ["--disable_tqdm", "True"]
    parser = HfArgumentParser(dataclass_types, allow_abbrev=False)
    options = vars(parser.parse_args(merged))
    changed = {name: value for name, value in options.items() if value != parser.get_default(name)}
    return task, parser.parse_args_into_dataclasses(merged, look_for_args_file=False), changed


# Training


def train(arguments: Sequence[str], tasks: Mapping[str, Task], default_task: str) -> dict[str, float]:
    """
    One run of a task: train, evaluate, predict, save.

    Returns:
        `dict[str, float]`: The metrics of the last evaluation, with `eval_` keys and `epoch`.
    """
    types = (DataArguments, ALRSArguments, RunArguments, TrainingArguments)
    task, (data, alrs, _, args), changed = parse(arguments, types, tasks, default_task)
    token = _take_token(args, changed)
    # What the task's recipe says and someone set back to the default is no difference from the default, and one from it.
    settings = vars(args) | vars(alrs) | vars(data)
    options = {key: settings[key] for key in task_recipe(task, data.dataset_name, data.model_type)} | changed
    find_baseline(alrs.scheduler)
    config = alrs.to_config(args.seed)
    args.dataloader_pin_memory = args.dataloader_pin_memory and args.device.type != "cpu"
    _set_up_logging(args)
    # TrainingArguments turns do_eval on by itself where eval_strategy is set: ask what was given.
    if not any(changed.get(name) for name in ("do_train", "do_eval", "do_predict")):
        args.do_train = args.do_eval = True
    with args.main_process_first(desc="dataset"):
        prepared = task.prepare(data)
    if prepared.reference is not None and data.fold is None:
        if args.push_to_hub:
            raise InputError(
                "push_to_hub", True, "every fold has a model of its own.", "Give --fold to train and push one of them."
            )
        return _cross_validate(task, data, alrs.scheduler, args, config)
    repo_id = _prepare_push(args, changed, token)

    def on_end(trainer: Trainer) -> None:
        _describe_model(task, prepared, alrs.scheduler, trainer, options, repo_id)
        if repo_id is not None:
            _push_model(repo_id, Path(args.output_dir), token)

    return _train_prepared(task, prepared, alrs.scheduler, args, config, on_end)


# Publishing a model


def _take_token(args: TrainingArguments, changed: dict[str, Any]) -> str | None:
    """
    Takes the access token out of everything that is stored, logged or handed to other code: the arguments, which the
    Trainer pickles beside the model, and the command line, which result files record.
    """
    token, args.hub_token = args.hub_token, None
    changed.pop("hub_token", None)
    if token:
        sys.argv[:] = [argument.replace(token, "***") for argument in sys.argv]
    return token


def _prepare_push(args: TrainingArguments, changed: Mapping[str, Any], token: str | None) -> str | None:
    """
    The repository that the model goes to once it is trained, `None` where none was asked for. It is looked for before
    the run, which may take hours.

    The Trainer is not told: it would push every checkpoint, with a card of its own.
    """
    if not args.push_to_hub:
        return None
    args.push_to_hub = False
    if not args.do_train:
        raise InputError("push_to_hub", True, "without training there is no model to push.", "Add --do_train.")
    if changed.get("hub_strategy", "end") != "end" or args.hub_revision is not None or args.hub_always_push:
        name = next(n for n in ("hub_strategy", "hub_revision", "hub_always_push") if n in changed)
        raise InputError(
            name, changed[name], "a run script pushes once, to `main`, when the run is over.", "Leave it out."
        )
    if args.process_index != 0:
        return None
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    return hub.prepare_repo("hub_model_id", name, args.hub_private_repo, token)


def _describe_model(
    task: Task,
    prepared: PreparedTask,
    scheduler: str,
    trainer: Trainer,
    options: Mapping[str, Any],
    repo_id: str | None,
) -> None:
    """Writes the card, the plot and the recipe beside the trained model."""
    folder = Path(trainer.args.output_dir)
    cards.write_model_card(
        cards.TrainedModel(
            folder=folder,
            name=(repo_id or folder.resolve().name).split("/")[-1],
            kind=task.kind,
            task=task.name,
            scheduler=scheduler,
            architecture=type(trainer.model).__name__,
            source=prepared.source,
            splits=split_sizes(prepared),
            metric=prepared.metric_for_best,
            options=options,
            versions=environment()["versions"],
            base_model=getattr(trainer.model.config, "_name_or_path", None) or None,
        )
    )


def _push_model(repo_id: str, folder: Path, token: str | None) -> None:
    upload = hub.Upload("model", repo_id, cards.model_files(folder))
    try:
        address = hub.publish([upload], "hub_model_id", True, token=token, message="Trained with hf-alrs")[0]
    except InputError as error:
        remedy = (
            f"The trained model and its card are in {folder}. When the cause is removed, run the same command again, "
            "which resumes from the last checkpoint and pushes."
        )
        raise InputError(error.field, error.value, error.rule, f"{error.remedy} {remedy}") from error
    print(f"Model: {address}")


def _cross_validate(
    task: Task, data: DataArguments, scheduler: str, args: TrainingArguments, config: ALRSConfig
) -> dict[str, float]:
    """
    A run for each fold, and beside it the reference model on the same fold; returns the means, and stores them and
    those of the reference.
    """
    runs: list[dict[str, float]] = []
    references: list[dict[str, float]] = []
    for fold in range(data.num_folds):
        prepared = task.prepare(replace(data, fold=fold))
        fold_args = copy.copy(args)
        fold_args.output_dir = str(Path(args.output_dir) / f"fold-{fold}")
        runs.append(_train_prepared(task, prepared, scheduler, fold_args, config))
        references.append({f"eval_{key}": value for key, value in prepared.reference().items()})
    shared = [key for key in references[0] if key in runs[0]]
    means, reference_means = (
        {key: float(np.mean([scores[key] for scores in folds])) for key in shared} for folds in (runs, references)
    )
    for name, scores in (("eval", means), ("reference", reference_means)) if args.process_index == 0 else ():
        (Path(args.output_dir) / f"{name}_results.json").write_text(json.dumps(scores, indent=4, sort_keys=True))
    print(f"\n{data.num_folds} folds, {task.name} with {scheduler} beside scikit-learn's logistic regression")
    print(f"{'fold':6}" + "".join(f"{key:>16}{'reference':>12}" for key in shared))
    rows = [(str(fold), run, reference) for fold, (run, reference) in enumerate(zip(runs, references, strict=True))]
    rows.append(("mean", means, reference_means))
    for name, run, reference in rows:
        print(f"{name:6}" + "".join(f"{run[key]:>16.4f}{reference[key]:>12.4f}" for key in shared))
    return means


def _train_prepared(
    task: Task,
    prepared: PreparedTask,
    scheduler: str,
    args: TrainingArguments,
    config: ALRSConfig,
    on_end: Callable[[Trainer], None] | None = None,
) -> dict[str, float]:
    _print_plan(task, prepared, args, scheduler)
    set_seed(args.seed)
    trainer = build_trainer(prepared, prepared.model_init(), args, scheduler, config)
    for callback in trainer.callback_handler.callbacks:
        # Its own default is known only when training begins, and the evaluation before it would go to ./runs
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(Path(args.output_dir) / "runs" / time.strftime("%Y-%m-%d_%H-%M-%S"))
    checkpoint = args.resume_from_checkpoint or _last_checkpoint(args.output_dir)
    metrics: dict[str, float] = {}
    if args.do_eval and args.do_train and checkpoint is None:
        before = _evaluate(trainer, prepared)
        before.pop("epoch", None)  # none has passed
        trainer.save_metrics("benchmark", before, combined=False)
        _print_dictionary("Benchmark Results (before training)", before)
    if args.do_train:
        if checkpoint is not None:
            logger.warning("Resuming from %s; give another --output_dir to start afresh.", checkpoint)
        result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if args.do_eval:
        metrics = _evaluate(trainer, prepared)
        metrics.setdefault("epoch", trainer.state.epoch or 0.0)
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
        _print_dictionary("Results", metrics)
    if args.do_predict:
        _predict(trainer, prepared)
    if trainer.is_world_process_zero() and (Path(args.output_dir) / HISTORY_NAME).exists():
        print(f"Learning rate, loss and decisions of every step: {Path(args.output_dir) / HISTORY_NAME}")
    if args.do_train and on_end is not None and trainer.is_world_process_zero():
        on_end(trainer)
    return metrics


def read_comparison(
    arguments: Sequence[str], tasks: Mapping[str, Task], default_task: str
) -> tuple[Experiment, CompareArguments, TrainingArguments, str]:
    """
    What all cells of a comparison share, from its command line.

    Returns:
        `tuple`: The experiment, the arguments of the matrix and of the training, and the name of the task in the rows.
    """
    types = (DataArguments, ALRSArguments, RunArguments, CompareArguments, TrainingArguments)
    task, (data, alrs, _, matrix, args), changed = parse(arguments, types, tasks, default_task)
    _take_token(args, changed)
    if args.push_to_hub:
        raise InputError(
            "push_to_hub",
            True,
            "a comparison trains many models and keeps none.",
            "Publish its results with `hf-alrs publish`, or push the model of a single run.",
        )
    if args.world_size > 1:
        raise InputError(
            "schedulers",
            f"{args.world_size} processes",
            "a matrix is started once, and starts the processes of each run itself.",
            "Start it with python, and add --launcher 'accelerate launch --num_processes 2'.",
        )
    _set_up_logging(args)
    names = {f.name for f in fields(TrainingArguments)}
    experiment = Experiment(
        task=task,
        data=data,
        arguments={name: value for name, value in changed.items() if name in names},
        alrs_config=alrs.to_config(seed=0),
        num_evaluations=matrix.num_evaluations,
        launcher=matrix.launcher,
        subset_eval_samples=matrix.subset_eval_samples,
    )
    # A sample is not the task that it stands in for
    return experiment, matrix, args, f"{task.kind}-sample" if data.dataset_name == SAMPLE else task.name


def compare(arguments: Sequence[str], tasks: Mapping[str, Task], default_task: str) -> None:
    """
    A matrix of runs and its report; runs that are already stored are not repeated.

    Exits with code 1 when a run failed.
    """
    experiment, matrix, args, name = read_comparison(arguments, tasks, default_task)
    output_dir = Path(args.output_dir)
    rates = matrix.learning_rates or [args.learning_rate]
    specs = build_matrix(name, matrix.schedulers, rates, matrix.seeds)
    refuse_other_settings(experiment, name, output_dir)
    left = missing(specs, output_dir)
    print(
        f"{len(specs)} runs: {len(matrix.schedulers)} schedulers x {len(rates)} rates x {len(matrix.seeds)} seeds; "
        f"{len(specs) - len(left)} are stored in {output_dir}, {len(left)} are left.",
        flush=True,
    )
    with MatrixProgress(len(left)) as progress:
        failed = run_matrix(
            experiment, specs, output_dir, matrix.jobs, matrix.executor, progress.on_step, progress.on_done
        )
    summary = build_report(output_dir, target=matrix.target)
    _print_summary(summary, output_dir)
    _exit_if_failed(failed)


def _exit_if_failed(failed: int) -> None:
    if failed:
        print(f"error: {failed} run(s) failed; their result files hold the errors.", file=sys.stderr)
        print("Delete those files to run them again.", file=sys.stderr)
        sys.exit(1)


def _print_summary(summary: Mapping[str, Any], output_dir: Path) -> None:
    """The two dictionaries, the table of schedulers and the conclusion, as text."""
    for name, shown in summary["shown_runs"].items():
        for title, key in (("Results", "results"), ("Benchmark Results (before training)", "benchmark_results")):
            scores = summary[key].get(name) or {}
            clock = summary["timing"][key].get(name) or {}
            epoch = {"epoch": scores["epoch"]} if "epoch" in scores else {}
            scores = {k: v for k, v in scores.items() if k != "epoch"} | clock | epoch
            _print_dictionary(f"{name}, {shown['scheduler']}, seed {shown['seed']}: {title}", scores)
        table = summary["tasks"][name]
        print(f"\n{'scheduler':24}{'initial rate':>13}{'runs':>6}  final loss          {table['score']}")
        for cell in table["cells"]:
            loss, score = cell["final"]["eval_loss"], cell["final"][table["score"]]
            print(
                f"{cell['scheduler']:24}{cell['learning_rate']:>13g}{cell['num_runs']:>6}  "
                f"{_plus_minus(loss)}   {_plus_minus(score)}"
            )
    print("\nConclusion")
    for sentence in summary["conclusion"]:
        print(f"- {sentence['text']}")
    print(f"\nReport: {output_dir / 'report.html'}")


def _plus_minus(spread: Mapping[str, float | str | None]) -> str:
    """Mean and standard deviation; runs that failed count as the worst value, which may be infinite."""
    mean, sd = (float("nan") if spread[key] is None else float(spread[key]) for key in ("mean", "sd"))
    return f"{mean:.4f}" if math.isnan(sd) else f"{mean:.4f} +- {sd:.4f}"


_SECONDS_BETWEEN_LINES = 60.0


class MatrixProgress:
    """One bar for a matrix of runs on a terminal; elsewhere a line for each run, and one a minute for those under way."""

    def __init__(self, total: int):
        self.total, self.done = total, 0
        self.start = self.last_line = time.monotonic()
        self.under_way: dict[RunSpec, float] = {}  # share of its steps that each run has done
        self.bar: Progress | None = None
        if sys.stdout.isatty():
            self.bar = Progress(
                TextColumn("{task.completed:.1f} of {task.total:.0f} runs"),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            self.bar_task = self.bar.add_task("", total=total)

    def __enter__(self) -> MatrixProgress:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def on_step(self, spec: RunSpec, step: int, total: int, loss: float) -> None:
        moved = self.under_way.get(spec) != step / total
        self.under_way[spec] = step / total
        text = f"{spec.scheduler} lr {spec.learning_rate:g} seed {spec.seed}: step {step}/{total} loss {loss:.4f}"
        if self.bar is not None:
            completed = self.done + sum(self.under_way.values())
            description = {"description": text} if moved else {}
            self.bar.update(self.bar_task, completed=completed, **description)
        elif moved and time.monotonic() - self.last_line > _SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            print(f"[{self.done}/{self.total}] {spec.task} {text}", flush=True)

    def on_done(self, spec: RunSpec, status: str) -> None:
        self.done += 1
        self.under_way.pop(spec, None)
        if self.bar is not None:
            self.bar.update(self.bar_task, completed=self.done + sum(self.under_way.values()))
            return
        elapsed = time.monotonic() - self.start
        left = elapsed / self.done * (self.total - self.done)
        print(
            f"[{self.done}/{self.total}] {spec.task} {spec.scheduler} lr {spec.learning_rate:g} seed {spec.seed}: "
            f"{status}, about {left:.0f} s left",
            flush=True,
        )


def _evaluate(trainer: Trainer, prepared: PreparedTask) -> dict[str, float]:
    metrics = trainer.evaluate(prepared.eval_dataset)
    metrics.pop("eval_model_preparation_time", None)
    return metrics


def _set_up_logging(args: TrainingArguments) -> None:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    level = args.get_process_log_level()
    transformers.utils.logging.set_verbosity(max(level, logging.WARNING))
    logging.getLogger("hf_alrs").setLevel(max(level, logging.INFO))
    try:
        for tracker in get_reporting_integration_callbacks(args.report_to):
            tracker()
    except (ImportError, RuntimeError, ValueError) as error:
        raise InputError(
            "report_to", args.report_to, f"cannot be used: {error}", "Install it, or give none."
        ) from error


def _print_plan(task: Task, prepared: PreparedTask, args: TrainingArguments, scheduler: str) -> None:
    if args.process_index != 0:
        return
    print(f"Task {task.name}: {prepared.source}")
    print("Splits: " + ", ".join(f"{name} {size:,}" for name, size in split_sizes(prepared).items()))
    print(
        f"Scheduler {scheduler} from learning rate {args.learning_rate:g}, batch "
        f"{args.per_device_train_batch_size} on each of {args.world_size} process(es), "
        f"optimizer {OptimizerNames(args.optim).value}, seed {args.seed}",
        flush=True,
    )


def _print_dictionary(title: str, metrics: Mapping[str, float]) -> None:
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    print(f"\n{title}:\n" + json.dumps(dict(metrics), indent=4), flush=True)


def _last_checkpoint(output_dir: str) -> str | None:
    return get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None


def _predict(trainer: Trainer, prepared: PreparedTask) -> None:
    if prepared.predict_dataset is None:
        raise InputError("do_predict", True, "this dataset has no unlabelled split.", "Leave --do_predict out.")
    logits = trainer.predict(prepared.predict_dataset, metric_key_prefix="predict").predictions
    if not trainer.is_world_process_zero():
        return
    logits = np.asarray(logits[0] if isinstance(logits, tuple) else logits)
    if prepared.label_names is None:
        predictions = [f"{value:.4f}" for value in logits.reshape(len(logits))]
    else:
        single = logits.ndim == 1 or logits.shape[-1] == 1
        classes = (logits.reshape(-1) > 0).astype(int) if single else logits.argmax(-1)
        predictions = [prepared.label_names[i] for i in classes]
    path = Path(trainer.args.output_dir) / "predict_results.txt"
    path.write_text("index\tprediction\n" + "".join(f"{i}\t{p}\n" for i, p in enumerate(predictions)))
    print(f"Predictions: {path}")


# Commands


def run_script(tasks: Mapping[str, Task], default_task: str) -> None:
    """The body of a run script: trains, and turns an input error into one message and exit code 2."""
    _guard(lambda arguments: train_or_compare(arguments, tasks, default_task), sys.argv[1:])


def train_or_compare(arguments: Sequence[str], tasks: Mapping[str, Task], default_task: str) -> None:
    """One run, or a matrix of runs where the command line names several."""
    several = any(argument.split("=")[0] in _COMPARE_OPTIONS for argument in arguments)
    (compare if several else train)(arguments, tasks, default_task)


def _guard(command: Callable[[Sequence[str]], object], arguments: Sequence[str]) -> None:
    # A bare --debug shows tracebacks; with a value it is the option of TrainingArguments.
    debug = [
        i
        for i, argument in enumerate(arguments)
        if argument == "--debug" and (i + 1 == len(arguments) or arguments[i + 1].startswith("--"))
    ]
    try:
        command([argument for i, argument in enumerate(arguments) if i not in debug])
    except InputError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _command_train(arguments: Sequence[str]) -> None:
    train(arguments, installed_tasks(), "titanic")


def _command_compare(arguments: Sequence[str]) -> None:
    compare(arguments, installed_tasks(), "titanic")


def _command_tasks(arguments: Sequence[str]) -> None:
    for name, task in installed_tasks().items():
        print(f"{name:12} {task.kind:8} {task.description}")


def _command_meta_train(arguments: Sequence[str]) -> None:
    from .meta_training.command import meta_train_command

    meta_train_command(arguments)


def _command_report(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="hf-alrs report",
        description="Build the report of stored runs; of several folders, such as those that `hf-alrs pull` wrote, also "
        "one leaderboard.",
    )
    parser.add_argument("results_dir", nargs="+", type=Path, help="Folders of result files.")
    parser.add_argument("--output_dir", type=Path, default=None, help="Default: the first folder.")
    parser.add_argument("--target", type=float, default=None, help="Score to time every run to, such as 0.9.")
    options = parser.parse_args(arguments)
    output_dir = options.output_dir or options.results_dir[0]
    summary = build_report(options.results_dir, output_dir, target=options.target)
    if len(options.results_dir) > 1:
        board = build_leaderboard(load_runs(options.results_dir), [str(folder) for folder in options.results_dir])
        text = render_leaderboard(board, summary["plan"]["checks"])
        (output_dir / LEADERBOARD_FILE).write_text(text, encoding="utf-8")
        print(text)
    print(f"Report: {output_dir / 'report.html'}")


def _command_evidence(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="hf-alrs evidence",
        description="Run the studies of a plan, as far as they are not stored yet, and build the report over them all; or "
        "write what README says of such reports.",
    )
    parser.add_argument("--plan", help="Name of a plan (report-1, arena-small, ...) or its file.")
    parser.add_argument("--output_dir", type=Path, help="Default: outputs/NAME. Each study has a folder in it.")
    parser.add_argument(
        "--data_dir",
        type=Path,
        help="Folder with the datasets by the names of their tasks: sst2/, imdb/, cifar10/, titanic/train.csv. Default: "
        "the Hub.",
    )
    parser.add_argument("--model_name_or_path", help="For the studies of a pretrained model; default: the recipe's.")
    parser.add_argument("--studies", nargs="+", help="Only these.")
    parser.add_argument("--skip_studies", nargs="+", default=(), help="Not these, as far as the plan has them.")
    parser.add_argument("--schedulers", nargs="+", help="Only the runs of these.")
    parser.add_argument("--jobs", type=int, default=1, help="Runs at a time.")
    parser.add_argument("--launcher", help="Command that starts the processes of each run: `accelerate launch`.")
    parser.add_argument("--report_only", action="store_true", help="Run nothing; build the report of what is stored.")
    parser.add_argument("--update_readme", action="store_true", help="Write README's and results/README.md's part.")
    parser.add_argument(
        "--check", action="store_true", help="With --update_readme: change nothing, and exit with 1 on drift."
    )
    parser.add_argument("--root", type=Path, default=Path(), help="Folder of README.md and results/.")
    options = parser.parse_args(arguments)
    if options.check and not options.update_readme:
        raise InputError("check", True, "belongs to --update_readme.", "Add --update_readme, or leave --check out.")
    if options.update_readme:
        drifted = evidence.update_readme(options.root, options.check)
        for path in drifted:
            print(f"{path}: {'differs from the results' if options.check else 'written'}")
        sys.exit(1 if options.check and drifted else 0)
    if options.jobs < 1:
        raise InputError("jobs", options.jobs, "must be at least 1.", "Use 1 or more.")
    tasks = installed_tasks()
    recipes = list(dict.fromkeys(task.recipe.parent for task in tasks.values()))
    if options.plan is None:
        raise InputError("plan", None, "must be given.", "Give for example --plan report-1.")
    path = evidence.find_plan(options.plan, [folder.parent / "plans" for folder in recipes])
    plan = evidence.read_plan(path, recipes)
    output_dir = options.output_dir or Path("outputs") / path.stem
    plan.check_schedulers(options.schedulers)
    chosen = [] if options.report_only else plan.select(options.studies, options.skip_studies)
    work = [(study, *_study_cells(study, options, output_dir, tasks)) for study in chosen]
    plan.check_rows(
        output_dir,
        {study.name: asdict(each.data) for study, each, specs in work if missing(specs, output_dir / study.name)},
    )
    for study, experiment, specs in work:
        if left := missing(specs, output_dir / study.name):
            _check_study(study, experiment)
        print(
            f"{study.name}: {len(specs)} runs, {len(specs) - len(left)} of them stored, {len(left)} left.", flush=True
        )
    if work:
        plan.store(output_dir)
    failed = 0
    for study, experiment, specs in work:
        left = missing(specs, output_dir / study.name)
        with MatrixProgress(len(left)) as progress:
            failed += run_matrix(
                experiment,
                specs,
                output_dir / study.name,
                options.jobs,
                on_step=progress.on_step,
                on_done=progress.on_done,
            )
    summary = evidence.build_evidence(plan, output_dir)
    plan.store(output_dir)
    for sentence in summary["conclusion"]:
        print(f"- {sentence['task']}: {sentence['text']}")
    print(f"Report: {output_dir / 'report.html'}")
    _exit_if_failed(failed)


def _study_cells(
    study: evidence.Study, options: argparse.Namespace, output_dir: Path, tasks: Mapping[str, Task]
) -> tuple[Experiment, list[RunSpec]]:
    recipe = read_recipe(study.recipe)
    dataset = recipe.get("dataset_name")
    if options.data_dir is not None and dataset != SAMPLE:
        task = find_task(recipe["task_name"], tasks)
        local = options.data_dir / task.name
        dataset = str(local / "train.csv" if task.kind == "tabular" else local)
        if not Path(dataset).exists():
            raise InputError("data_dir", dataset, f"the study {study.name} needs it.", _DATA_REMEDY)
    arguments = study.arguments(output_dir, dataset, options.model_name_or_path)
    if options.launcher:
        arguments += ["--launcher", options.launcher]
    experiment, _, _, name = read_comparison(arguments, tasks, recipe["task_name"])
    return experiment, study.specs(name, options.schedulers)


_DATA_REMEDY = (
    "Give a --data_dir with sst2/, imdb/, cifar10/ and titanic/train.csv, or leave the study out by --skip_studies."
)


def _check_study(study: evidence.Study, experiment: Experiment) -> None:
    """Loads a little of the data and the model, so that what cannot be had is said before any work."""
    few = {key: min(getattr(experiment.data, key) or 500, 500) for key in ("max_train_samples", "max_eval_samples")}
    try:
        experiment.task.prepare(replace(experiment.data, **few)).model_init()
    except InputError as error:
        remedy = _DATA_REMEDY if error.field == "dataset_name" else error.remedy
        raise InputError(error.field, error.value, f"{error.rule} The study {study.name} needs it.", remedy) from error


def _command_publish(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="hf-alrs publish",
        description="Publish the results of a comparison as a dataset on the Hub. The result files are published as they "
        "are: they hold the command line, the names of folders and the versions of the machine they were made on.",
    )
    parser.add_argument("results_dir", type=Path, metavar="DIR", help="Folder of result files.")
    parser.add_argument("--repo", required=True, help="user/name of the dataset.")
    parser.add_argument("--space", action="store_true", help="Publish report.html as a static Space of the same name.")
    parser.add_argument(
        "--network", help="Publish this network too, as the model NAME-network: `default`, a folder or a Hub id."
    )
    parser.add_argument(
        "--model", type=Path, help="Publish a trained model too, as the model NAME-model: the --output_dir of its run."
    )
    parser.add_argument("--private", action="store_true", help="Make new repositories private.")
    parser.add_argument("--overwrite", action="store_true", help="Publish into repositories that are there already.")
    options = parser.parse_args(arguments)
    hub.check_repo_id("repo", options.repo)
    with tempfile.TemporaryDirectory(prefix="hf-alrs-") as scratch:
        uploads = _result_uploads(options.results_dir, options.repo, options.space)
        if options.network is not None:
            name, folder = f"{options.repo}-network", Path(scratch)
            network = load_network(options.network, ALRSConfig().hidden_sizes, seed=0)
            network.save_pretrained(folder, model_card_kwargs={"network": name})
            uploads.append(hub.Upload("model", name, {path.name: path for path in folder.iterdir()}))
        if options.model is not None:
            files = cards.model_files(options.model)
            if "config.json" not in files or cards.CARD_FILE not in files:
                raise InputError(
                    "model", str(options.model), "holds no trained model with its card.", "Give the folder of a run."
                )
            uploads.append(hub.Upload("model", f"{options.repo}-model", files))
        addresses = hub.publish(uploads, "repo", options.overwrite, options.private or None)
    for upload, address in zip(uploads, addresses, strict=True):
        print(f"{upload.repo_type.capitalize()}: {address}")


def _result_uploads(folder: Path, repo_id: str, space: bool) -> list[hub.Upload]:
    """The dataset of a folder of results, and the Space of its report; a missing report is built first."""
    runs = load_runs([folder])
    report = folder / "report.html"
    if not report.is_file() or not (folder / REPORT_FILE).is_file():
        build_report(folder)
    again = f"Build it anew with `hf-alrs report {folder}`."
    try:
        summary = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
        card = cards.results_card(repo_id, summary, space).encode()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError("results_dir", str(folder), f"its {REPORT_FILE} is no report ({error!r}).", again) from error
    if summary["plan"]["num_runs"] != len(runs):
        raise InputError(
            "results_dir",
            str(folder),
            f"holds {len(runs)} runs and a report of {summary['plan']['num_runs']}.",
            again,
        )
    kept = [run.path for run in runs] + [folder / name for name in (REPORT_FILE, "report.md", "report.html")]
    kept += sorted((folder / "plots").glob("*.svg"))
    files: dict[str, Path | bytes] = {
        f"results/{path.relative_to(folder).as_posix()}": path for path in kept if path.is_file()
    }
    rows = cards.result_rows({run.path.name: run.record for run in runs})
    files[cards.RUNS_FILE] = cards.parquet_bytes(rows)
    files[cards.CARD_FILE] = card
    uploads = [hub.Upload("dataset", repo_id, files, replaces=("results/", "data/"))]
    if space:
        title = f"Learning-rate schedulers on {', '.join(summary['tasks'])}"
        page = {"index.html": report, cards.CARD_FILE: cards.space_card(repo_id, title).encode()}
        uploads.append(hub.Upload("space", repo_id, page))
    return uploads


def _command_pull(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="hf-alrs pull", description="Fetch results that `hf-alrs publish` made, and the report of them."
    )
    parser.add_argument("repo", help="user/name of the dataset.")
    parser.add_argument("--output_dir", type=Path, default=None, help="Default: outputs/hub/user/name.")
    parser.add_argument("--revision", default=None, help="Branch, tag or commit; the newest by default.")
    parser.add_argument("--overwrite", action="store_true", help="Replace files here that differ.")
    options = parser.parse_args(arguments)
    hub.check_repo_id("repo", options.repo)
    output_dir = options.output_dir or Path("outputs", "hub", *options.repo.split("/"))
    with tempfile.TemporaryDirectory(prefix="hf-alrs-") as scratch:
        names = hub.download(options.repo, "dataset", "results", Path(scratch), _RESULT_NAMES, options.revision)
        runs = load_runs([Path(scratch)])  # what is no result stays outside
        contents = {name: (Path(scratch) / name).read_bytes() for name in names}
    differing = [
        name
        for name, content in contents.items()
        if (output_dir / name).exists() and (output_dir / name).read_bytes() != content
    ]
    if differing and not options.overwrite:
        raise InputError(
            "output_dir",
            str(output_dir),
            f"holds {len(differing)} file(s) that differ from those on the Hub, such as {differing[0]}.",
            "Give another folder, or --overwrite to replace them.",
        )
    for name, content in contents.items():
        path = output_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.tmp")
        partial.write_bytes(content)
        partial.replace(path)
    print(f"{len(runs)} runs: {output_dir}")


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "train": (_command_train, "train one task"),
    "compare": (_command_compare, "compare schedulers on a task and build the report"),
    "tasks": (_command_tasks, "list the installed tasks"),
    "report": (_command_report, "build the report of stored runs, of several people too"),
    "evidence": (_command_evidence, "run the plan of a report, and write what README says of it"),
    "publish": (_command_publish, "publish the results of a comparison on the Hub"),
    "pull": (_command_pull, "fetch published results from the Hub"),
    "meta-train": (_command_meta_train, "train the network on a population of small tasks"),
}


def main() -> None:
    """`hf-alrs COMMAND ...`."""
    lines = "\n".join(f"  {name:12} {help_text}" for name, (_, help_text) in COMMANDS.items())
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(f"usage: hf-alrs COMMAND ...\n\n{lines}\n\n`hf-alrs COMMAND --help` lists the options of a command.")
        sys.exit(0 if len(sys.argv) > 1 else 2)
    if sys.argv[1] not in COMMANDS:
        print(f"error: unknown command {sys.argv[1]!r}; the commands are\n{lines}", file=sys.stderr)
        sys.exit(2)
    _guard(COMMANDS[sys.argv[1]][0], sys.argv[2:])


if __name__ == "__main__":
    main()
