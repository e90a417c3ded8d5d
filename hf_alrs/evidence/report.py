"""The report over all studies of a plan, from their stored rows."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import InputError, read_yaml
from ..report import load_runs, write_report
from ..report.runs import REPORT_FILE, Run
from .plan import Plan, Study


def build_evidence(plan: Plan, output_dir: Path) -> dict[str, Any]:
    """
    Builds the report of the stored runs of a plan: `results.json`, `report.md`, `report.html`, plots.

    In the report a study takes the place of a task, so that two sizes of one task stay apart.

    Args:
        plan (`Plan`): The plan.
        output_dir (`Path`): Folder with a folder of rows for each study; the report is written into it.

    Returns:
        `dict[str, Any]`: The content of `results.json`, whose `evidence` has what the plan says of its studies.

    Raises:
        `InputError`: If nothing is stored, or a stored run cannot be read.
    """
    stored = {
        study.name: [_renamed(run, study.name) for run in load_runs([output_dir / study.name])]
        for study in plan.studies.values()
        if _has_rows(output_dir / study.name)
    }
    if not stored:
        raise InputError("output_dir", str(output_dir), "holds no run of the plan.", "Run the plan first.")
    evidence = {
        "title": plan.title,
        "idea": list(plan.idea),
        "plan": plan.path.name,
        "studies": {name: _told(plan.studies[name], runs, output_dir) for name, runs in stored.items()},
    }
    runs = [run for group in stored.values() for run in group]
    return write_report(runs, output_dir, judged=plan.reference, evidence=evidence)


def _has_rows(folder: Path) -> bool:
    # `hf-alrs report` may have left its own file there
    return any(path.name != REPORT_FILE for path in folder.glob("*.json"))


def _renamed(run: Run, name: str) -> Run:
    return replace(run, record=run.record | {"spec": run.record["spec"] | {"task": name}})


def _told(study: Study, runs: list[Run], output_dir: Path) -> dict[str, Any]:
    """What the pages say of a study besides its runs."""
    data = runs[0].record["config"]["data"]
    model = data.get("model_name_or_path")
    recipe = read_yaml(study.recipe)
    caption = study.caption
    if study.pretrained:
        caption += f" The model is {_described(runs[0], model, study.pretrained)}."
    return {
        "title": study.title,
        "recipe": _shown_path(study.recipe),
        "updated": _shown_path(study.updated) if study.updated else None,
        "changes": _changes(recipe, read_yaml(study.updated)) if study.updated else [],
        "caption": caption,
        "learning_rate": float(recipe["learning_rate"]),
        "num_runs": len(runs),
        "num_planned": len(study.specs(study.name)),
        "run_seconds": sum(run.record["timing"]["total_seconds"] for run in runs),
        "commands": list(_commands(study, output_dir, data.get("dataset_name"), model)),
    }


def _described(run: Run, model: str | None, default: str) -> str:
    """Which model a run fine-tuned: a given one with what can be read of it, as its name may say nothing."""
    if model is None:
        return default
    words = [str(run.record["config"].get("model") or "")]
    with suppress(OSError, ValueError, TypeError, KeyError):
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        words.append(f"{int(config['num_hidden_layers'])} layers of width {int(config['hidden_size'])}")
    known = ", ".join(filter(None, words))
    return f"{model}{known and f' ({known})'}, given in place of {default}"


def _shown_path(path: Path) -> str:
    """From the root of the repository on: where the package is installed is the machine's affair."""
    return path.name if path.parent.name != "recipes" else f"tasks/recipes/{path.name}"


def _changes(before: dict[str, Any], after: dict[str, Any]) -> list[list[str]]:
    keys = dict.fromkeys([*before, *after])
    return [[key, str(before.get(key)), str(after.get(key))] for key in keys if before.get(key) != after.get(key)]


def _commands(study: Study, output_dir: Path, dataset_name: str | None, model: str | None) -> Iterable[str]:
    """The comparisons that the study is made of, as one would start them by hand."""
    shown = replace(study, recipe=Path(_shown_path(study.recipe)))
    for grid in study.grids:
        words = ["hf-alrs", "compare", *shown.arguments(output_dir, dataset_name, model)]
        for option, values in (
            ("--schedulers", grid.schedulers),
            ("--learning_rates", map("{:g}".format, grid.learning_rates)),
            ("--seeds", map(str, grid.seeds)),
        ):
            words += [option, *values]
        yield shlex.join(words)
