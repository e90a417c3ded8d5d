"""`hf-alrs evidence`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from ..arguments import SAMPLE, find_task, installed_tasks, read_recipe
from ..comparison import MatrixProgress, exit_if_failed, read_comparison
from ..config import InputError, home_expanded
from ..experiment import Task
from ..matrix import Experiment, RunSpec, missing, refuse_other_settings, run_matrix
from .plan import Study, find_plan, read_plan
from .readme import update_readme
from .report import build_evidence


def evidence_command(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="hf-alrs evidence",
        description="Run the studies of a plan, as far as they are not stored yet, and build the report over them all; or "
        "write what README says of such reports.",
    )
    parser.add_argument("--plan", help="Name of a plan (report-1, arena-small, ...) or its file.")
    parser.add_argument(
        "--output_dir", type=home_expanded, help="Default: outputs/NAME. Each study has a folder in it."
    )
    parser.add_argument(
        "--data_dir",
        type=home_expanded,
        help="Folder with the datasets by the names of their tasks: sst2/, imdb/, cifar10/, titanic/train.csv. Default: "
        "the Hub.",
    )
    parser.add_argument("--model_name_or_path", help="For the studies of a pretrained model; default: the recipe's.")
    parser.add_argument("--studies", nargs="+", help="Only these studies of the plan.")
    parser.add_argument("--skip_studies", nargs="+", default=(), help="Not these, as far as the plan has them.")
    parser.add_argument("--schedulers", nargs="+", help="Only the runs of these.")
    parser.add_argument("--jobs", type=int, default=1, help="Runs at a time.")
    parser.add_argument("--launcher", help="Command that starts the processes of each run: `accelerate launch`.")
    parser.add_argument("--report_only", action="store_true", help="Run nothing; build the report of what is stored.")
    parser.add_argument("--update_readme", action="store_true", help="Write README's and results/README.md's part.")
    parser.add_argument(
        "--check", action="store_true", help="With --update_readme: change nothing, and exit with 1 on drift."
    )
    parser.add_argument("--root", type=home_expanded, default=Path(), help="Folder of README.md and results/.")
    options = parser.parse_args(arguments)
    if options.check and not options.update_readme:
        raise InputError("check", True, "belongs to --update_readme.", "Add --update_readme, or leave --check out.")
    if options.update_readme:
        drifted = update_readme(options.root, options.check)
        for path in drifted:
            print(f"{path}: {'differs from the results' if options.check else 'written'}")
        sys.exit(1 if options.check and drifted else 0)
    if options.jobs < 1:
        raise InputError("jobs", options.jobs, "must be at least 1.", "Use 1 or more.")
    if options.report_only and (options.studies or options.skip_studies):
        name = "studies" if options.studies else "skip_studies"
        rule = "chooses what is run, and report_only runs nothing: the report has all studies that are stored."
        raise InputError(name, getattr(options, name), rule, "Leave one of the two out.")
    tasks = installed_tasks()
    recipes = list(dict.fromkeys(task.recipe.parent for task in tasks.values()))
    if options.plan is None:
        raise InputError("plan", None, "must be given.", "Give for example --plan report-1.")
    path = find_plan(options.plan, [folder.parent / "plans" for folder in recipes])
    plan = read_plan(path, recipes)
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
            refuse_other_settings(experiment, specs[0].task, output_dir / study.name)
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
    summary = build_evidence(plan, output_dir)
    plan.store(output_dir)
    for sentence in summary["conclusion"]:
        print(f"- {sentence['task']}: {sentence['text']}")
    print(f"Report: {output_dir / 'report.html'}")
    exit_if_failed(failed)


def _study_cells(
    study: Study, options: argparse.Namespace, output_dir: Path, tasks: Mapping[str, Task]
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


def _check_study(study: Study, experiment: Experiment) -> None:
    """Loads a little of the data and the model, so that what cannot be had is said before any work."""
    few = {key: min(getattr(experiment.data, key) or 500, 500) for key in ("max_train_samples", "max_eval_samples")}
    try:
        experiment.task.prepare(replace(experiment.data, **few)).model_init()
    except InputError as error:
        remedy = _DATA_REMEDY if error.field == "dataset_name" else error.remedy
        raise InputError(error.field, error.value, f"{error.rule} The study {study.name} needs it.", remedy) from error
