"""
One table over the results of several people: who ran what, and which scheduler ends best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .runs import Run, TaskRuns, group_by_task
from .summary import format_number, format_rate


LEADERBOARD_FILE = "leaderboard.md"


def build_leaderboard(runs: Sequence[Run], names: Sequence[str]) -> dict[str, Any]:
    """
    Places of all schedulers, each at its own best initial rate, over the runs of all folders together.

    Args:
        runs (`Sequence[Run]`): From [`load_runs`].
        names (`Sequence[str]`): What to call the folders, in the order they were loaded in.

    Returns:
        `dict[str, Any]`: `"tasks"`: task, with the steps of a run where they differ -> rows from the lowest mean final
        loss on; `"overall"`: rows of the schedulers that were run on every task, from the lowest mean place on;
        `"contributions"`: folder -> number of runs.
    """
    tasks = _by_budget(runs)
    tables = {name: _rows(task, names) for name, task in tasks.items()}
    places = {
        scheduler: [row["place"] for rows in tables.values() for row in rows if row["scheduler"] == scheduler]
        for scheduler in dict.fromkeys(run.scheduler for run in runs)
    }
    overall = [
        {"scheduler": name, "mean_place": float(np.mean(found)), "num_tasks": len(found)}
        for name, found in places.items()
        if len(found) == len(tasks)
    ]
    return {
        "tasks": tables,
        "scores": {name: task.score for name, task in tasks.items()},
        "overall": sorted(overall, key=lambda row: (row["mean_place"], row["scheduler"])),
        "contributions": {name: sum(run.origin == index for run in runs) for index, name in enumerate(names)},
    }


def _by_budget(runs: Sequence[Run]) -> dict[str, TaskRuns]:
    """A part for each length of the runs of a task: a longer run is no better scheduler."""
    parts = {}
    for task in group_by_task(runs):
        lengths: dict[int, set[int]] = {}
        for run in task.runs:
            if run.budget is not None:
                lengths.setdefault(run.budget[0], set()).add(run.comparison)
        for length, comparisons in sorted(lengths.items()):
            # A run that failed before its training is of the length of its comparison.
            (part,) = group_by_task(
                run
                for run in task.runs
                if (run.comparison in comparisons if run.budget is None else run.budget[0] == length)
            )
            parts[task.name if len(lengths) == 1 else f"{task.name}, {length} steps"] = part
        if not lengths:
            parts[task.name] = task
    return parts


def _rows(task: TaskRuns, names: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for scheduler, rate in task.tuned.items():
        runs = task.tuned_runs(scheduler)
        rows.append(
            {
                "scheduler": scheduler,
                "learning_rate": rate,
                "num_runs": len(runs),
                "num_failed": sum(not run.completed for run in runs),
                "eval_loss": float(np.mean([run.final("eval_loss") for run in runs])),
                "score": float(np.mean([run.final(task.score) for run in runs])),
                "contributors": [names[index] for index in sorted({run.origin for run in runs})],
            }
        )
    rows.sort(key=lambda row: (row["eval_loss"], row["scheduler"]))
    for row in rows:
        # The same loss is the same place: schedulers that all failed do not differ by their names.
        row["place"] = 1 + sum(other["eval_loss"] < row["eval_loss"] for other in rows)
    return rows


def render_leaderboard(board: dict[str, Any], checks: Sequence[str] = ()) -> str:
    """
    The leaderboard in Markdown.

    Args:
        board (`dict[str, Any]`): From [`build_leaderboard`].
        checks (`Sequence[str]`): Why some runs cannot be compared with others, as the report's plan lists them.
    """
    lines = ["# Leaderboard", ""]
    lines += [f"- {_text(name)}: {number} runs" for name, number in board["contributions"].items()]
    if len(board["tasks"]) > 1:
        lines += ["", "## All tasks", "", "| scheduler | mean place | tasks |", "| --- | ---: | ---: |"]
        lines += [
            f"| {_text(row['scheduler'])} | {row['mean_place']:.2f} | {row['num_tasks']} |" for row in board["overall"]
        ]
    for name, rows in board["tasks"].items():
        lines += [
            "",
            f"## {_text(name)}",
            "",
            f"| place | scheduler | initial rate | runs | failed | eval_loss | {board['scores'][name]} | from |",
            "| ---: | --- | ---: | ---: | ---: | ---: | ---: | --- |",
        ]
        for row in rows:
            score = "n/a" if not math.isfinite(row["score"]) else format_number(row["score"])
            lines.append(
                f"| {row['place']} | {_text(row['scheduler'])} | {format_rate(row['learning_rate'])} | {row['num_runs']} | "
                f"{row['num_failed']} | {format_number(row['eval_loss'])} | {score} | "
                f"{_text(', '.join(row['contributors']))} |"
            )
    lines += [
        "",
        "Means over all runs of a scheduler at its best initial rate, whoever made them; a run that failed counts as the",
        "worst value. Places follow the loss. Intervals and paired differences are in the report.",
    ]
    if checks:
        lines += [
            "",
            "Not every run can be compared with every other:",
            "",
            *(f"- {_text(check)}" for check in checks),
        ]
    return "\n".join(lines) + "\n"


def _text(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")
