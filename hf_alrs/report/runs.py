"""
The stored runs: read, checked, and grouped into the cells of each task's matrix.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from .. import metrics
from ..config import InputError


REFERENCE = "alrs"
SCHEMA_FILE = Path(__file__).parents[1] / "results_schema.json"
# What a report writes beside the runs it was built from.
REPORT_FILE = "results.json"
# A million steps take about 60 MB.
MAX_RESULT_BYTES = 2**28
_RUN_AGAIN = "Delete the file and run the comparison again: only the missing run is repeated."


def is_baseline(scheduler: str) -> bool:
    """ALRS and its ablations, all named `alrs...`, are what is judged; everything else is what it is judged against."""
    return not scheduler.startswith(REFERENCE)


@dataclass(frozen=True)
class Run:
    """
    One stored run.

    Args:
        record (`dict[str, Any]`): Content of the file, as `results_schema.json` describes it.
        path (`Path`): Where it was read from.
        origin (`int`): Index of the folder it came from.
        comparison (`int`): Index of the first folder of its comparison, within which runs are paired: its own, or an
            earlier one that holds some of the same runs.
    """

    record: dict[str, Any]
    path: Path
    origin: int = 0
    comparison: int = 0

    @property
    def task(self) -> str:
        return self.record["spec"]["task"]

    @property
    def scheduler(self) -> str:
        return self.record["spec"]["scheduler"]

    @property
    def learning_rate(self) -> float:
        return float(self.record["spec"]["learning_rate"])

    @property
    def seed(self) -> int:
        return self.record["spec"]["seed"]

    @property
    def pair(self) -> tuple[int, int]:
        """Runs with the same value started from the same weights and saw the same batches."""
        return self.comparison, self.seed

    @property
    def budget(self) -> tuple[int, int] | None:
        """Optimizer steps of the run and of an epoch; `None` where it failed before its training, and knows neither."""
        if self.record["status"] == "failed" and not self.record["history"]["step"]:
            return None
        return self.record["num_training_steps"], self.record["steps_per_epoch"]

    @property
    def completed(self) -> bool:
        return self.record["status"] == "completed"

    def history(self, name: str) -> np.ndarray:
        """A column of the per-step history; null becomes nan."""
        return np.array(self.record["history"][name] or [], dtype=float)

    def evaluations(self, name: str) -> np.ndarray:
        """A column of the evaluations; null or missing becomes nan."""
        return np.array([evaluation.get(name) for evaluation in self.record["evaluations"]], dtype=float)

    def final(self, metric: str) -> float:
        """The metric after training; the worst value for a run that did not complete."""
        value = self.record["results"].get(metric) if self.completed else None
        return metrics.worst_value(metric) if value is None else float(value)

    def best(self, metric: str) -> float:
        """The best evaluation of the run; the worst value for a run that did not complete."""
        if not self.completed:
            return metrics.worst_value(metric)
        value = metrics.best_value([*self.evaluations(metric), self.final(metric)], not metric.endswith("loss"))
        return metrics.worst_value(metric) if math.isnan(value) else value

    def position_of_target(self, unit: str, metric: str, target: float) -> float:
        """Steps, epochs or seconds to the target; infinite when it was missed or the run did not complete."""
        if not self.completed:
            return math.inf
        return metrics.position_of_target(
            self.evaluations(unit), self.evaluations(metric), target, higher_is_better=not metric.endswith("loss")
        )


@cache
def _validator() -> Draft202012Validator:
    return Draft202012Validator(json.loads(SCHEMA_FILE.read_text(encoding="utf-8")))


def validate_result(record: Any, name: str) -> None:
    """
    Checks one result against `results_schema.json`, and that the lists of its history are equally long.

    Args:
        record (`Any`): Content of a result file.
        name (`str`): File name, for the message.

    Raises:
        [`InputError`]: Names the file, the place in it and the rule that is broken.
    """
    history = record.get("history") if isinstance(record, dict) else None
    history = history if isinstance(history, dict) else {}
    columns = {key: value for key, value in history.items() if isinstance(value, list)}
    # The schema's rule for every single number of a long history takes seconds to check in Python. The types of a whole
    # column take microseconds, and the schema then sees the first entries.
    allowed = {"step": {int}, "phase": {str, type(None)}}
    for key, values in columns.items():
        wrong = set(map(type, values)) - allowed.get(key, {int, float, type(None)})
        if wrong:
            found = ", ".join(sorted(kind.__name__ for kind in wrong))
            raise InputError(name, f"history.{key}", f"must hold numbers or null, and holds {found}.", _RUN_AGAIN)
    head = record
    if columns:
        head = {**record, "history": {**history, **{key: values[:3] for key, values in columns.items()}}}
    error = best_match(_validator().iter_errors(head))
    if error is not None:
        place = ".".join(map(str, error.absolute_path)) or "the file"
        raise InputError(
            name,
            place,
            f"does not follow the schema of results: {error.message[:300]}.",
            f"Use a file written by this version. {_RUN_AGAIN}",
        )
    for key in ("task", "scheduler"):
        if not record["spec"][key].isprintable():  # control signs break the drawings, and others turn text around
            raise InputError(name, record["spec"][key], f"spec.{key} must be one line of printable signs.", _RUN_AGAIN)
    lengths = {key: len(values) for key, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise InputError(name, lengths, "the lists of `history` must be equally long.", _RUN_AGAIN)


def _refuse_constant(token: str) -> None:
    raise ValueError(f"{token} is no strict JSON; a value that is not finite must be null")


def _finite(token: str) -> float:
    value = float(token)
    if math.isinf(value):
        raise ValueError(f"{token[:20]} is larger than any number a run can have; write null")
    return value


def _integer(token: str) -> int:
    value = int(token)
    if abs(value) >= 2**63:
        raise ValueError(f"{token[:20]}... is larger than any number a run can have")
    return value


def read_result(path: Path) -> dict[str, Any]:
    """
    Reads one result file.

    Raises:
        [`InputError`]: Names the file, where it is missing, too large, truncated, no strict JSON, or breaks the schema.
    """
    try:
        if not path.is_file():  # a pipe would wait for ever
            raise ValueError("it is no file")
        if (size := path.stat().st_size) > MAX_RESULT_BYTES:
            raise ValueError(f"it has {size} bytes, more than the {MAX_RESULT_BYTES} that are read")
        record = json.loads(
            path.read_text(encoding="utf-8"),
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_integer,
        )
        # Text that JSON can spell and no file can hold, such as half a surrogate pair
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(str(path), path.name, f"cannot be read as a result: {error}.", _RUN_AGAIN) from error
    validate_result(record, str(path))
    return record


def load_runs(directories: Iterable[Path]) -> list[Run]:
    """
    Reads every `*.json` in the folders, one run each. A file that is still being written (`*.tmp`) and the
    `results.json` of an earlier report are passed over; the same file found in two folders counts once, and makes them one
    comparison.

    Args:
        directories (`Iterable[Path]`): Folders of result files.

    Returns:
        `list[Run]`: Ordered by task, scheduler, learning rate and seed, whatever the files are called.

    Raises:
        [`InputError`]: A folder or file that cannot be used, by name.
    """
    directories = list(map(Path, directories))
    found: dict[tuple, Run] = {}
    contents: dict[str, Run] = {}
    compared: set[tuple] = set()
    for origin, directory in enumerate(directories):
        if not directory.is_dir():
            raise InputError(
                "results_dir",
                str(directory),
                "is no folder.",
                "Give the folder that a comparison wrote its results to.",
            )
        if (directory / "all_results.json").is_file():
            raise InputError(
                "results_dir",
                str(directory),
                "is the folder of a single run; a report is built of the results of a comparison.",
                "Give the folder of a comparison, which --schedulers, --learning_rates or --seeds make of the run.",
            )
        fresh: dict[str, Run] = {}
        shared: dict[str, int] = {}
        for path in sorted(directory.glob("*.json")):
            if path.name == REPORT_FILE:
                continue
            run = Run(read_result(path), path, origin, origin)
            content = json.dumps(run.record, sort_keys=True)
            if content in contents:
                shared.setdefault(run.task, contents[content].comparison)
                continue
            contents[content] = fresh[content] = run
        for content, run in fresh.items():
            # A folder that repeats runs of an earlier one goes on with its comparison, but for a run that both made.
            if run.task in shared and (shared[run.task], *_spec(run)) not in compared:
                contents[content] = run = replace(run, comparison=shared[run.task])
            compared.add((run.comparison, *_spec(run)))
            key = (origin, *_spec(run))
            if key in found:
                raise InputError(
                    str(run.path),
                    run.record["spec"],
                    f"is the same run as {found[key].path.name}, with another outcome.",
                    "Keep one of the two files.",
                )
            found[key] = run
    if not found:
        raise InputError(
            "results_dir",
            [str(directory) for directory in directories],
            "holds no result file; a report needs at least one stored run.",
            "Run a comparison first.",
        )
    return sorted(
        found.values(),
        key=lambda run: (run.task, is_baseline(run.scheduler), run.scheduler, run.learning_rate, run.pair),
    )


def _spec(run: Run) -> tuple[str, str, float, int]:
    return run.task, run.scheduler, run.learning_rate, run.seed


@dataclass(frozen=True)
class TaskRuns:
    """
    All runs of one task, as cells of (scheduler, initial learning rate).

    Args:
        name (`str`): The task.
        runs (`list[Run]`): Its runs, in the order of [`load_runs`].
        target (`float`, *optional*): A score to time every run to, besides what the best tuned baseline reaches.
        judged (`str`, *optional*): The scheduler that the others are compared with, where it was run.
    """

    name: str
    runs: list[Run]
    target: float | None = None
    judged: str | None = None

    @cached_property
    def score(self) -> str:
        """The task's metric for which higher is better."""
        return self.runs[0].record["higher_is_better_metric"]

    @cached_property
    def metrics(self) -> list[str]:
        """What the tables show: the loss, the score, and accuracy and F1 where they were measured."""
        known = set().union(*(run.record["results"] or {} for run in self.runs))
        extra = [name for name in ("eval_accuracy", "eval_f1") if name in known and name != self.score]
        return ["eval_loss", self.score, *extra]

    @cached_property
    def cells(self) -> dict[tuple[str, float], list[Run]]:
        cells: dict[tuple[str, float], list[Run]] = {}
        for run in self.runs:
            cells.setdefault((run.scheduler, run.learning_rate), []).append(run)
        return cells

    @cached_property
    def schedulers(self) -> list[str]:
        return list(dict.fromkeys(run.scheduler for run in self.runs))

    @cached_property
    def learning_rates(self) -> list[float]:
        return sorted({run.learning_rate for run in self.runs})

    def rates_of(self, scheduler: str) -> list[float]:
        return [rate for name, rate in self.cells if name == scheduler]

    def mean_final(self, cell: tuple[str, float], metric: str) -> float:
        return float(np.mean([run.final(metric) for run in self.cells[cell]]))

    @cached_property
    def tuned(self) -> dict[str, float]:
        """Best initial rate of each scheduler: lowest mean final loss, then fewest failures, then the lower rate."""

        def badness(cell: tuple[str, float]) -> tuple[float, int, float]:
            failures = sum(not run.completed for run in self.cells[cell])
            return self.mean_final(cell, "eval_loss"), failures, cell[1]

        return {
            name: min((cell for cell in self.cells if cell[0] == name), key=badness)[1] for name in self.schedulers
        }

    def tuned_runs(self, scheduler: str) -> list[Run]:
        return self.cells[scheduler, self.tuned[scheduler]]

    @cached_property
    def reference(self) -> str | None:
        """What the others are compared with: `judged`, else `alrs`, or its first variant where only those were run."""
        variants = [name for name in self.schedulers if not is_baseline(name)]
        return next((name for name in (self.judged, REFERENCE) if name in variants), next(iter(variants), None))

    @cached_property
    def best_baseline(self) -> tuple[str, float] | None:
        """The baseline cell with the lowest mean final loss; `None` when no baseline completed at any rate."""
        return self._best((name, rate) for name, rate in self.tuned.items() if is_baseline(name))

    @cached_property
    def best_schedule(self) -> tuple[str, float] | None:
        """As [`best_baseline`], among a constant rate and the decays that are tuned most."""
        return self._best(cell for cell in self.tuned.items() if cell[0] in ("linear", "cosine", "constant"))

    def _best(self, cells: Iterable[tuple[str, float]]) -> tuple[str, float] | None:
        finite = [cell for cell in cells if math.isfinite(self.mean_final(cell, "eval_loss"))]
        return min(finite, key=lambda cell: self.mean_final(cell, "eval_loss"), default=None)

    @cached_property
    def targets(self) -> dict[str, float]:
        """
        Final loss and score of the best tuned baseline: what every scheduler is timed to. The median over its seeds, of
        an even number the worse of the two in the middle, so that at least half of its own runs reach it.
        """
        if self.best_baseline is None:
            return {}
        targets = {}
        for metric in ("eval_loss", self.score):
            values = sorted(
                (run.final(metric) for run in self.cells[self.best_baseline]), reverse=not metric.endswith("loss")
            )
            targets[metric] = values[len(values) // 2]
        return targets

    @cached_property
    def all_targets(self) -> dict[str, float]:
        """[`targets`], and the given one under the name of the score and the word `given`."""
        return self.targets | ({} if self.target is None else {f"{self.score} (given)": self.target})


def group_by_task(runs: Iterable[Run], target: float | None = None, judged: str | None = None) -> list[TaskRuns]:
    """The runs of [`load_runs`], one [`TaskRuns`] for each task."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.task, []).append(run)
    return [TaskRuns(name, group, target, judged) for name, group in groups.items()]
