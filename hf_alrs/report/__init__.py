"""
The report of a comparison, built from its stored result files alone: `results.json`, `report.md`, `report.html`, plots.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import InputError
from .pages import render_html, render_markdown
from .plots import draw_plots
from .runs import REPORT_FILE, Run, group_by_task, load_runs, read_result, validate_result
from .summary import json_ready, summarize


__all__ = ["build_report", "load_runs", "read_result", "summarize", "validate_result", "write_report"]

PLOTS_FOLDER = "plots"


def build_report(
    results_dir: str | Path | Sequence[str | Path], output_dir: str | Path | None = None, target: float | None = None
) -> dict[str, Any]:
    """
    Builds the report of all runs stored in one or several folders.

    Args:
        results_dir (`str`, `Path` or a sequence of them):
            Folders of result files, one `*.json` for each run. Several are merged; runs are then paired by seed within
            each folder.
        output_dir (`str` or `Path`, *optional*):
            Where `results.json`, `report.md`, `report.html` and the folder `plots` are written. Defaults to the first
            folder of results.
        target (`float`, *optional*): A score, such as an accuracy, that every run is timed to as well.

    Returns:
        `dict[str, Any]`: The content of `results.json`.

    Raises:
        [`InputError`]: A folder or file that cannot be used, by name.
    """
    folders = [results_dir] if isinstance(results_dir, (str, Path)) else list(results_dir)
    output = Path(output_dir if output_dir is not None else folders[0])
    return write_report(load_runs(map(Path, folders)), output, target)


def write_report(
    runs: list[Run],
    output: Path,
    target: float | None = None,
    judged: str | None = None,
    evidence: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """
    Writes the report of these runs.

    Args:
        runs (`list[Run]`): From [`load_runs`].
        output (`Path`): Folder of the report.
        target (`float`, *optional*): A score, such as an accuracy, that every run is timed to as well.
        judged (`str`, *optional*): The scheduler that the others are compared with, `alrs` by default.
        evidence (`dict`, *optional*): What a plan says of its studies, see `hf_alrs.evidence.report`; the page then has
            its title, its idea and its tables too.

    Returns:
        `dict[str, Any]`: The content of `results.json`.
    """
    told = evidence["studies"] if evidence else {}
    summary = summarize(runs, target, judged, {name: study["learning_rate"] for name, study in told.items()})
    if evidence is not None:
        summary["evidence"] = evidence
    plots = draw_plots(group_by_task(runs, judged=judged), summary)
    if (output / PLOTS_FOLDER).is_symlink():  # as results from elsewhere may hold: figures would be written past it
        raise InputError("output_dir", str(output / PLOTS_FOLDER), "is a link, and no folder.", "Remove it.")
    (output / PLOTS_FOLDER).mkdir(parents=True, exist_ok=True)
    # Figures of an earlier report that this one has no data for would be taken for its own.
    for leftover in (output / PLOTS_FOLDER).glob("*.svg"):
        leftover.unlink()
    for plot in plots:
        _write(output / PLOTS_FOLDER / f"{plot.name}.svg", plot.svg)
    content = json_ready(summary)
    _write(output / REPORT_FILE, json.dumps(content, indent=2, allow_nan=False) + "\n")
    _write(output / "report.md", render_markdown(summary, plots, PLOTS_FOLDER))
    _write(output / "report.html", render_html(summary, plots))
    return content


def _write(path: Path, text: str) -> None:
    # Renamed into place, so that a reader or a killed process never meets half a file.
    partial = path.with_name(f"{path.name}.tmp")
    partial.unlink(missing_ok=True)  # what a killed process left, or a link that would be written through
    with open(partial, "x", encoding="utf-8") as file:
        file.write(text)
    os.replace(partial, path)
