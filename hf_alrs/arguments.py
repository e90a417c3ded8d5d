"""What the command line says: argument dataclasses, tasks by name, recipes, and how they are put together."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import IntervalStrategy

from .baselines import BASELINES, MIN_EVALUATIONS
from .config import ALRSConfig, InputError, check_output_dir, read_yaml
from .experiment import Task, find_baseline


ENTRY_POINT_GROUP = "hf_alrs.tasks"
SAMPLE = "sample"


@dataclass
class ALRSArguments:
    """The scheduler, and the fields of `ALRSConfig` as the command line spells them."""

    scheduler: str = field(default="alrs", metadata={"help": f"What sets the learning rate: {', '.join(BASELINES)}."})
    network: str = field(
        default="default", metadata={"help": "`default` (shipped weights), `scratch`, a folder or a Hub id."}
    )
    hidden_sizes: list[int] = field(
        default_factory=lambda: [64, 32],
        metadata={"help": "Hidden layers of the network: 64 32 or 64 64, others for scratch."},
    )
    phase1_steps: str = field(
        default="0.02", metadata={"help": "Length of phase 1: steps (`50`) or a fraction (`0.02`)."}
    )
    decision_interval: str | None = field(
        default=None,
        metadata={"help": "Time between decisions: steps, a fraction, or `epoch`. Default: 0.02, with probes 0.0125."},
    )
    feedback_interval: int = field(
        default=8, metadata={"help": "Decisions between updates of the network in phase 3; 0: none."}
    )
    meta_num_epochs: int = field(default=10, metadata={"help": "Epochs of phase 2; 0: none."})
    num_probes: int | None = field(
        default=None,
        metadata={"help": "Trial runs at the end of phase 1: 0, or at least 3. Default: 0, for scratch 7."},
    )
    max_restarts: int = field(default=3, metadata={"help": "Restarts from the initial weights; 0 keeps no copy."})
    controller_evaluations: int = field(
        default=10,
        metadata={"help": "Evaluations of the controller's split in a run, besides those of --eval_strategy."},
    )
    guard_patience: int = field(default=3, metadata={"help": "Troubles after which the last good rate just decays."})
    rollback: bool = field(
        default=False,
        metadata={"help": "Keep the last good weights on the CPU and go back to them when the run is in trouble."},
    )
    average_weights: bool = field(
        default=True,
        metadata={
            "help": "Whether weights are averaged along the run, and the averaged ones evaluated, saved and kept; "
            "--no_average_weights turns it off."
        },
    )
    choose_average: bool = field(
        default=True,
        metadata={
            "help": "Whether the controller's split chooses how far back the average of the weights goes, for one more copy of "
            "them; --no_choose_average turns it off."
        },
    )
    batch_norm_samples: int = field(
        default=512,
        metadata={"help": "Training examples for batch-norm's statistics of averaged weights; 0: running averages."},
    )
    final_lr_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Rate that the decay ends at over the peak rate. Default: with averaged weights 0.3, more in runs of "
            "less than 100 steps, up to 0.7; else 0."
        },
    )
    max_beta1: float | None = field(
        default=None,
        metadata={
            "help": "--adam_beta1 is lowered to this where it is higher; 1 leaves it as it is. Default: 0.7 in runs of up to 333 "
            "steps, then 1 - 100 / steps; 1 without averaged weights."
        },
    )
    min_lr: float = field(default=0.0, metadata={"help": "Lower bound of the rate."})
    max_lr: float = field(default=10.0, metadata={"help": "Upper bound of the rate."})

    def to_config(self, seed: int) -> ALRSConfig:
        """The `ALRSConfig` that these arguments spell."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "scheduler"}
        for name in ("phase1_steps", "decision_interval"):
            values[name] = None if values[name] is None else _span(name, values[name])
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
        if len({f"{rate:g}" for rate in self.learning_rates}) < len(set(self.learning_rates)):
            rule = "must differ within six digits, which name the file of a run."
            raise InputError("learning_rates", self.learning_rates, rule, "Leave one of them out.")
        for seed in self.seeds:
            if not 0 <= seed < 2**32:
                raise InputError("seeds", seed, "must be at least 0 and below 2**32.", "Give for example 0 1 2.")
        for name in ("jobs", "num_evaluations", "subset_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(name, value, "must be at least 1.", "Use 1 or more.")
        check_target(self.target)
        if self.launcher:
            _check_launcher(self.launcher)


def check_target(target: float | None) -> None:
    """
    Raises:
        `InputError`: If it is no number that a score can reach.
    """
    if target is not None and not math.isfinite(target):
        raise InputError("target", target, "must be a finite number.", "Give a score such as 0.9.")


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
    elsewhere = name in installed_tasks()
    raise InputError(
        "task_name",
        name,
        f"must be one of {', '.join(sorted(tasks))}.",
        "It is a task of another script; `hf-alrs train` has them all." if elsewhere else "Check the spelling.",
    )


def read_recipe(path: Path) -> dict[str, Any]:
    """
    A recipe: a YAML mapping of command-line options.

    Raises:
        `InputError`: If the file is missing or not such a mapping.
    """
    recipe = read_yaml(path)
    if not isinstance(recipe, dict):
        raise InputError("config", str(path), "is not a mapping of options.", "Write `option: value` lines.")
    recipe = {str(key).replace("-", "_"): value for key, value in recipe.items()}  # as the command line may spell them
    if "config" in recipe:
        raise InputError("config", recipe["config"], f"{path} names another recipe.", "Put its options here.")
    if "task" in recipe:
        recipe = {("task_name" if key == "task" else key): value for key, value in recipe.items()}
    return recipe


def recipe_arguments(recipe: Mapping[str, Any]) -> list[str]:
    """The options of a recipe as the command line would spell them."""
    arguments: list[str] = []
    for key, value in recipe.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        arguments += [f"--{key}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
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


class _Parser(HfArgumentParser):
    """Errors in one sentence, as everywhere else, instead of behind a usage of two hundred options."""

    def __init__(self, dataclass_types: Sequence[type], recipe: Mapping[str, Any], path: str | None):
        script = Path(sys.argv[0]).name
        prog = f"{script} {sys.argv[1]}" if script == "hf-alrs" and len(sys.argv) > 1 else None
        super().__init__(dataclass_types, allow_abbrev=False, prog=prog)
        self._recipe, self._path = recipe, path

    def error(self, message: str) -> NoReturn:
        named = list(dict.fromkeys(name.replace("-", "_") for name in re.findall(r"--([\w-]+)", message)))
        from_file = [name for name in named if name in self._recipe]
        where = f" It is given in {self._path}." if from_file else ""
        raise InputError(
            "options",
            " ".join(named) or message.rpartition(": ")[2],
            f"{message}.{where}",
            "Correct it; `--help` lists the options.",
        ) from None


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
        if not {"-h", "--help"} & set(arguments):
            print(f"No task and no dataset given: running {default_task} on the built-in offline sample.")
    chosen = {key: value or recipe.get(key) for key, value in given.items()}
    for name, value in chosen.items():  # before they are looked for, of a file whose values may be of any type
        if value is not None and not isinstance(value, str):
            raise InputError(name, value, f"must be text in {known.config}.", "Correct the file.")
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
        several = CompareArguments in dataclass_types  # which does not share a folder with a single run
        merged += ["--output_dir", str(Path("outputs") / (f"{task.name}-comparison" if several else task.name))]
    if not any(argument.split("=")[0] in ("--report_to", "--report-to") for argument in merged):
        merged += ["--report_to", "none"]
    if not sys.stderr.isatty() and not any(argument.startswith("--disable_tqdm") for argument in merged):
        merged += ["--disable_tqdm", "True"]
    parser = _Parser(dataclass_types, recipe, known.config)
    options = vars(parser.parse_args(merged))
    changed = {name: value for name, value in options.items() if value != parser.get_default(name)}
    try:
        parsed = parser.parse_args_into_dataclasses(merged, look_for_args_file=False)
    except InputError:
        raise
    except (ValueError, ImportError) as error:  # what TrainingArguments finds
        named = [name for name in re.findall(r"\w+", str(error)) if name in changed]
        field, value = (named[0], changed[named[0]]) if named else ("options", _without_token(rest))
        where = f" Options are given in {known.config}, too." if recipe else ""
        rule = f"is refused: {str(error).strip().rstrip('.')}.{where}"
        raise InputError(field, value, rule, "Correct it, or what goes with it.") from error
    for values in parsed:
        if isinstance(values, TrainingArguments):
            _check_training(values)
    return task, parsed, changed


def _without_token(arguments: Sequence[str]) -> str:
    line = " ".join(arguments)
    return re.sub(r"(--hub[_-]token(?:=| +))\S+", r"\1***", line)


def _check_training(args: TrainingArguments) -> None:
    """What would otherwise be found after data and model have been loaded."""
    if not (math.isfinite(args.learning_rate) and args.learning_rate > 0):
        raise InputError("learning_rate", args.learning_rate, "must be finite and above 0.", "Give for example 1e-3.")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(args, name) < 1:
            raise InputError(name, getattr(args, name), "must be at least 1.", "Use 1 or more.")
    for name in ("adam_epsilon", "weight_decay", "dataloader_num_workers", "warmup_steps"):
        if not 0 <= getattr(args, name) < math.inf:
            raise InputError(name, getattr(args, name), "must be at least 0.", "Leave it out.")
    for strategy, name in (
        ("eval_strategy", "eval_steps"),
        ("save_strategy", "save_steps"),
        ("logging_strategy", "logging_steps"),
    ):
        steps = getattr(args, name)
        if getattr(args, strategy) == IntervalStrategy.STEPS and not (steps is not None and 0 < steps < math.inf):
            raise InputError(
                name, steps, "must be above 0: steps, or below 1 a share of the run.", "Give for example 500."
            )
    for name in ("adam_beta1", "adam_beta2", "label_smoothing_factor"):
        if not 0 <= getattr(args, name) < 1:
            raise InputError(name, getattr(args, name), "must be at least 0 and below 1.", "Leave it out.")
    if args.max_steps <= 0 and not (math.isfinite(args.num_train_epochs) and args.num_train_epochs > 0):
        raise InputError("num_train_epochs", args.num_train_epochs, "must be above 0.", "Give it, or max_steps.")
    if args.batch_eval_metrics:
        rule = "metrics here are of all predictions of an evaluation at once."
        raise InputError("batch_eval_metrics", True, rule, "Leave it out.")
    checkpoint = args.resume_from_checkpoint
    if checkpoint is not None and not Path(checkpoint).is_dir():
        raise InputError(
            "resume_from_checkpoint", checkpoint, "is no folder.", "Leave it out to go on from the last one."
        )
    if checkpoint is not None and not (Path(checkpoint) / TRAINER_STATE_NAME).is_file():
        raise InputError(
            "resume_from_checkpoint", checkpoint, f"holds no {TRAINER_STATE_NAME}.", "Give a checkpoint's folder."
        )
    check_output_dir(args.output_dir)
