"""A comparison from its command line: the matrix of runs with its progress, and the report in short."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainingArguments

from .arguments import SAMPLE, ALRSArguments, CompareArguments, RunArguments, parse
from .cards import RECIPE_FILE
from .config import InputError
from .experiment import DataArguments, Task, find_baseline, keeps_best
from .matrix import Experiment, RunSpec, build_matrix, missing, refuse_other_settings, run_matrix
from .report import build_report
from .run import check_network, print_dictionary, set_up_logging, take_token


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
    take_token(args, changed)
    if args.push_to_hub:
        raise InputError(
            "push_to_hub",
            True,
            "a comparison trains many models and keeps none.",
            "Publish its results with `hf-alrs publish`, or push the model of a single run.",
        )
    for option in ("resume_from_checkpoint", "do_predict"):
        if changed.get(option):
            rule = "is of a single run; a comparison goes on with what is stored, and predicts nothing."
            raise InputError(option, changed[option], rule, "Leave it out.")
    if keeps_best(args):
        option = "load_best_model_at_end" if args.load_best_model_at_end else "save_strategy"
        rule = "is of a single run; a comparison reports the models that its runs end with."
        raise InputError(option, changed[option], rule, "Leave it out.")
    if "scheduler" in changed:
        if "schedulers" in changed:
            raise InputError("scheduler", alrs.scheduler, "is given beside schedulers.", "Put it among --schedulers.")
        matrix.schedulers = [alrs.scheduler]
    if args.world_size > 1:
        raise InputError(
            "schedulers",
            f"{args.world_size} processes",
            "a matrix is started once, and starts the processes of each run itself.",
            "Start it with python, and add --launcher 'accelerate launch --num_processes 2'.",
        )
    set_up_logging(args)
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
    if any((output_dir / name).is_file() for name in (RECIPE_FILE, "all_results.json", "eval_results.json")):
        raise InputError(
            "output_dir", str(output_dir), "is the folder of a single run.", "Give the comparison a folder of its own."
        )
    check_network(matrix.schedulers, experiment.alrs_config)
    stepped = [name for name in matrix.schedulers if find_baseline(name).needs_evaluation]
    if stepped and not experiment.data.controller_split:
        rule = f"{stepped[0]} is stepped with the loss on the controller's split."
        raise InputError("controller_split", experiment.data.controller_split, rule, "Set --controller_split 0.1.")
    left = missing(specs, output_dir)
    print(
        f"{len(specs)} runs: {len(set(matrix.schedulers))} schedulers x {len(set(rates))} rates x "
        f"{len(set(matrix.seeds))} seeds; "
        f"{len(specs) - len(left)} are stored in {output_dir}, {len(left)} are left.",
        flush=True,
    )
    with MatrixProgress(len(left)) as progress:
        failed = run_matrix(
            experiment, specs, output_dir, matrix.jobs, matrix.executor, progress.on_step, progress.on_done
        )
    summary = build_report(output_dir, target=matrix.target)
    _print_summary(summary, output_dir)
    exit_if_failed(failed)


def exit_if_failed(failed: int) -> None:
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
            print_dictionary(f"{name}, {shown['scheduler']}, seed {shown['seed']}: {title}", scores)
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
