"""
What the runs say: aggregates, comparisons and sentences, all computed from the stored runs and nothing else.

Everything that the clock or the memory of the machine decides is kept apart under `timing`, so that two equal
experiments differ there only. Numbers that are not finite are written as `"inf"` and `"-inf"` (a target that was
missed, a run that diverged) or null (not measured), since JSON has no word for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from .. import metrics, statistics
from ..baselines import BASELINES, MIN_EVALUATIONS
from .runs import Run, TaskRuns, group_by_task, is_baseline


SUMMARY_VERSION = 1
CONFIDENCE = 0.95
PROFILE_FACTORS = (1.0, 1.05, 1.1, 1.25, 1.5, 2.0, 3.0, 4.0)
_CLOCK_SUFFIXES = ("runtime", "_per_second", "_time")
_STEP_UNITS = {"steps": "step", "epochs": "epoch"}


def _generator() -> np.random.Generator:
    # One fixed stream for each interval: a number then depends on its own runs, not on what was computed before it.
    return np.random.default_rng(0)


def format_rate(rate: float) -> str:
    """`2e-05` as people write it: `2e-5`; from a tenth up as a plain decimal."""
    mantissa, exponent = f"{rate:e}".split("e")
    return f"{rate:g}" if int(exponent) >= -1 else f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def format_number(value: float | None, digits: int = 4) -> str:
    """Fixed digits; an infinity as a sign, what was not measured as `n/a`."""
    if value is None or math.isnan(value):
        return "n/a"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    text = f"{value:.{digits}f}"
    return text if float(text) else text.lstrip("-")


def format_interval(interval: Iterable[float | None], digits: int = 4) -> str:
    low, high = interval
    if low is None or math.isnan(low):
        return "no interval"
    return f"[{format_number(low, digits)}, {format_number(high, digits)}]"


def _seeds(number: int) -> str:
    return "1 seed" if number == 1 else f"{number} seeds"


def _listed(names: list[str]) -> str:
    return ", ".join(names) if names else "none"


def _spread(values: Iterable[float]) -> dict[str, float]:
    summary = statistics.describe(list(values))
    return {"mean": summary.mean, "sd": summary.sd, "median": summary.median}


def _mean_of_numbers(values: Iterable[float]) -> float:
    values = [value for value in values if not math.isnan(value)]
    return float(np.mean(values)) if values else math.nan


# --- one cell of the matrix -------------------------------------------------------------------------------------------


def _times_to_target(task: TaskRuns, runs: list[Run], units: dict[str, str]) -> dict[str, Any]:
    times: dict[str, Any] = {}
    for name, target in task.all_targets.items():
        metric = name.split(" ")[0]
        reached = [math.isfinite(run.position_of_target("step", metric, target)) for run in runs]
        times[name] = {"reached": sum(reached)} if "steps" in units else {}
        for unit, column in units.items():
            positions = [run.position_of_target(column, metric, target) for run in runs]
            times[name][unit] = statistics.describe(positions).median
    return times


def _cell(task: TaskRuns, scheduler: str, rate: float) -> dict[str, Any]:
    runs = task.cells[scheduler, rate]
    # Schedulers that are stepped with evaluations have more of them, and the first one earlier
    evaluated = [run.record["evaluations"] for run in task.runs if run.completed and run.record["evaluations"]]
    start = max((evaluations[0]["step"] for evaluations in evaluated), default=0)
    completed = [run for run in runs if run.completed]
    rates = [run.history("learning_rate") for run in runs]
    return {
        "scheduler": scheduler,
        "learning_rate": rate,
        "tuned": task.tuned[scheduler] == rate,
        "num_runs": len(runs),
        "num_failed": len(runs) - len(completed),
        "final": {metric: _spread(run.final(metric) for run in runs) for metric in task.metrics},
        "final_of_completed": {metric: _spread(run.final(metric) for run in completed) for metric in task.metrics},
        "best": {metric: _spread(run.best(metric) for run in runs) for metric in task.metrics},
        "to_target": _times_to_target(task, runs, _STEP_UNITS),
        "area_under_curve": {
            metric: _mean_of_numbers(
                metrics.area_under_curve(run.evaluations("step"), run.evaluations(metric), start)
                if run.completed
                else metrics.worst_value(metric)
                for run in runs
            )
            for metric in ("eval_loss", task.score)
        },
        "learning_rate_stability": _mean_of_numbers(map(metrics.learning_rate_stability, rates)),
        "learning_rate_range": _mean_of_numbers(map(metrics.learning_rate_range, rates)),
        "loss_stability": _mean_of_numbers(metrics.loss_stability(run.history("loss")) for run in runs),
    }


def _speed_ups(task: TaskRuns) -> list[dict[str, Any]]:
    """
    How much sooner the mean loss of the reference is where the best others end, from each initial rate: the steps of a run over
    those to that loss, 0 where it is missed. Runs of the same steps, evaluated at the same ones, alone tell.
    """
    rows = []
    for rate in task.rates_of(task.reference) if task.reference is not None else ():
        runs = task.cells[task.reference, rate]
        if not all(run.completed for run in runs):
            continue
        steps = [tuple(step for step in run.evaluations("step") if step < _length(run)) for run in runs]
        if len({(*at, _length(run)) for at, run in zip(steps, runs, strict=True)}) > 1:
            continue
        losses = np.mean(
            [[*run.evaluations("eval_loss")[: len(steps[0])], run.final("eval_loss")] for run in runs], axis=0
        )
        for name, other in (("best_schedule", task.best_schedule), ("best_baseline", task.best_baseline)):
            if other is None:
                continue
            target = task.mean_final(other, "eval_loss")
            at = metrics.interpolated_position_of_target([*steps[0], _length(runs[0])], losses, target)
            rows.append(
                {
                    "learning_rate": rate,
                    "over": name,
                    "other": other[0],
                    "other_learning_rate": other[1],
                    "eval_loss": target,
                    "steps": at,
                    "speed_up": _length(runs[0]) / at,
                }
            )
    return rows


def _length(run: Run) -> int:
    return run.record["num_training_steps"]


def _cell_timing(task: TaskRuns, scheduler: str, rate: float) -> dict[str, Any]:
    runs = task.cells[scheduler, rate]
    memory = [run.record["peak_memory_bytes"] for run in runs if run.record["peak_memory_bytes"] is not None]
    return {
        "task": task.name,
        "scheduler": scheduler,
        "learning_rate": rate,
        "train_seconds": _spread(run.record["timing"]["train_seconds"] for run in runs),
        "total_seconds": _spread(run.record["timing"]["total_seconds"] for run in runs),
        "to_target": _times_to_target(task, runs, {"seconds": "seconds"}),
        "controller_share": _mean_of_numbers(
            metrics.controller_share(run.record["timing"]["controller_seconds"], run.record["timing"]["train_seconds"])
            for run in runs
        ),
        "peak_memory_bytes": max(memory, default=None),
    }


# --- comparisons ------------------------------------------------------------------------------------------------------


def _verdict(interval: statistics.Interval) -> str:
    if interval.low > 0:
        return "better"
    if interval.high < 0:
        return "worse"
    return "no verdict" if math.isnan(interval.low) else "not better"


def _compare(task: TaskRuns, first: tuple[str, float], second: tuple[str, float], metric: str) -> dict[str, Any]:
    ours = {run.pair: run.final(metric) for run in task.cells[first]}
    theirs = {run.pair: run.final(metric) for run in task.cells[second]}
    pairs = sorted(ours.keys() & theirs.keys())
    difference = statistics.paired_difference(
        [ours[pair] for pair in pairs],
        [theirs[pair] for pair in pairs],
        generator=_generator(),
        higher_is_better=not metric.endswith("loss"),
        confidence=CONFIDENCE,
    )
    return {
        "metric": metric,
        "scheduler": first[0],
        "learning_rate": first[1],
        "other": second[0],
        "other_learning_rate": second[1],
        "num_pairs": difference.num_pairs,
        "advantage": difference.mean,
        "interval": list(difference.interval),
        "p_value": difference.p_value,
        "verdict": _verdict(difference.interval),
    }


def _corrected(comparisons: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds Holm's correction over the comparisons of one table and one metric."""
    for metric in dict.fromkeys(row["metric"] for row in comparisons):
        family = [row for row in comparisons if row["metric"] == metric and row["num_pairs"]]
        for row, corrected in zip(family, statistics.holm([row["p_value"] for row in family]), strict=True):
            row["p_holm"] = float(corrected)
    return comparisons


def _comparisons(task: TaskRuns) -> dict[str, list[dict[str, Any]]]:
    reference = task.reference
    if reference is None:
        return {"tuned": [], "same_rate": [], "without_tuning": []}
    others = [name for name in task.schedulers if name != reference]
    measured = ("eval_loss", task.score)
    ours = (reference, task.tuned[reference])
    tuned = [_compare(task, ours, (name, task.tuned[name]), metric) for metric in measured for name in others]
    same_rate = [
        _compare(task, (reference, rate), (name, rate), metric)
        for metric in measured
        for rate in task.rates_of(reference)
        for name in others
        if (name, rate) in task.cells
    ]
    return {
        "tuned": _corrected(tuned),
        "same_rate": _corrected(same_rate),
        "without_tuning": _corrected(_without_tuning(task, reference, measured)),
    }


def _without_tuning(task: TaskRuns, reference: str, measured: Iterable[str]) -> list[dict[str, Any]]:
    """The reference at every initial rate against the best cell of all tuned baselines."""
    rows = []
    cells = [cell for cell in task.cells if is_baseline(cell[0])]
    for metric in measured if cells else ():
        higher_is_better = not metric.endswith("loss")
        sign = -1 if higher_is_better else 1
        best = min(cells, key=lambda cell, metric=metric, sign=sign: sign * task.mean_final(cell, metric))
        rates = task.rates_of(reference)
        regrets = metrics.tuning_free_regret(
            [task.mean_final((reference, rate), metric) for rate in rates],
            [[task.mean_final(cell, metric) for cell in cells]],
            higher_is_better,
        )
        for rate, regret in zip(rates, regrets, strict=True):
            rows.append({**_compare(task, (reference, rate), best, metric), "regret": float(regret)})
    return rows


# --- over all tasks ---------------------------------------------------------------------------------------------------


def _matrix(columns: list[list[Run]], tasks: list[TaskRuns], metric: str, num_seeds: int) -> np.ndarray:
    """Final values of the first seeds, `[num_seeds, num_columns]`."""
    values = [
        [run.final("eval_loss" if metric == "eval_loss" else task.score) for run in column[:num_seeds]]
        for column, task in zip(columns, tasks, strict=True)
    ]
    return np.array(values).T


def _distances(
    columns: list[list[Run]], tasks: list[TaskRuns], metric: str, num_seeds: int, several: bool
) -> np.ndarray:
    """
    [`_matrix`]; of several tasks with 0 for the best cell and 1 for the models before training. In raw units a middle half
    would leave out the tasks with the highest and the lowest values, whoever is judged.
    """
    values = _matrix(columns, tasks, metric, num_seeds)
    for place, task in enumerate(tasks if several else ()):
        name = "eval_loss" if metric == "eval_loss" else task.score
        best = (min if metric == "eval_loss" else max)(task.mean_final(cell, name) for cell in task.cells)
        if not math.isfinite(best):  # every cell has a failed run: there is a best among the completed ones
            completed = ([run.final(name) for run in runs if run.completed] for runs in task.cells.values())
            means = [float(np.mean(finals)) for finals in completed if finals]
            best = (min if metric == "eval_loss" else max)(means, default=0.0)
        before = [(run.record["benchmark_results"] or {}).get(name) for run in task.runs]
        before = [float(value) for value in before if value is not None]
        span = float(np.mean(before)) - best if before else 0.0
        # Where no cell is better than an untrained model, in raw units
        unit = span if math.isfinite(span) and span * (1 if metric == "eval_loss" else -1) > 0 else 1.0
        values[:, place] = (values[:, place] - best) / unit
    return values


def _interquartile_row(tasks: list[TaskRuns], scheduler: str, metric: str, num_seeds: int) -> dict[str, Any]:
    several = len(tasks) > 1
    tuned = _distances([task.tuned_runs(scheduler) for task in tasks], tasks, metric, num_seeds, several)
    every = [(task, rate) for task in tasks for rate in task.rates_of(scheduler)]
    columns = [task.cells[scheduler, rate] for task, rate in every]
    untuned = _distances(columns, [task for task, _ in every], metric, num_seeds, several)
    row: dict[str, Any] = {"scheduler": scheduler, "metric": metric, "num_tasks": len(tasks)}
    for name, scores in (("tuned", tuned), ("all_rates", untuned)):
        interval = statistics.stratified_bootstrap(
            statistics.interquartile_mean, scores, generator=_generator(), confidence=CONFIDENCE
        )
        row[name] = {
            "num_runs": int(scores.size),
            "iqm": float(statistics.interquartile_mean(scores)),
            "interval": list(interval),
        }
    return row


def _probability_row(tasks: list[TaskRuns], reference: str, other: str, metric: str, num_seeds: int) -> dict[str, Any]:
    tasks = [task for task in tasks if reference in task.tuned and other in task.tuned]

    def probability(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return statistics.probability_of_improvement(first, second, higher_is_better=metric != "eval_loss")

    matrices = [
        _matrix([task.tuned_runs(name) for task in tasks], tasks, metric, num_seeds) for name in (reference, other)
    ]
    interval = statistics.stratified_bootstrap(probability, *matrices, generator=_generator(), confidence=CONFIDENCE)
    return {
        "scheduler": reference,
        "other": other,
        "metric": metric,
        "num_tasks": len(tasks),
        "probability": float(probability(*matrices)),
        "interval": list(interval),
    }


def profile_times(tasks: list[TaskRuns]) -> tuple[list[str], np.ndarray]:
    """
    Steps to the target loss, each scheduler at its best rate, for the performance profile.

    Returns:
        The schedulers that were run on every task that has a target, and their times of shape
        `(num_schedulers, num_workloads)`; a workload is one seed of one task that all of them ran.
    """
    tasks = [task for task in tasks if task.targets]
    schedulers = [name for name in _all_schedulers(tasks) if all(name in task.tuned for task in tasks)]
    columns = []
    for task in tasks:
        times = [
            {run.pair: run.position_of_target("step", "eval_loss", task.targets["eval_loss"]) for run in runs}
            for runs in map(task.tuned_runs, schedulers)
        ]
        shared = set.intersection(*(set(column) for column in times)) if times else set()
        columns += [[column[pair] for column in times] for pair in sorted(shared)]
    return schedulers, np.array(columns, dtype=float).reshape(len(columns), len(schedulers)).T


def _all_schedulers(tasks: list[TaskRuns]) -> list[str]:
    names = dict.fromkeys(name for task in tasks for name in task.schedulers)
    return sorted(names, key=lambda name: (is_baseline(name), name))


def _overall(tasks: list[TaskRuns]) -> dict[str, Any]:
    # A single run beside comparisons has nothing to say about schedulers
    tasks = [task for task in tasks if any(map(is_baseline, task.schedulers))] or tasks
    # Nor has a task of one seed: the columns of one table have as many runs each
    tasks = [task for task in tasks if min(map(len, task.cells.values())) > 1] or tasks
    num_seeds = min(len(runs) for task in tasks for runs in task.cells.values())
    schedulers = _all_schedulers(tasks)
    reference = next((task.reference for task in tasks if task.reference), None)
    names, times = profile_times(tasks)
    profile = statistics.performance_profile(times, PROFILE_FACTORS) if times.size else np.empty((0, 0))
    return {
        "tasks": [task.name for task in tasks],
        "num_seeds": num_seeds,
        "interquartile_means": [
            _interquartile_row(tasks, name, metric, num_seeds)
            for metric in ("eval_loss", "score")
            for name in schedulers
            if all(name in task.tuned for task in tasks)  # means over other tasks would not compare
        ],
        "probability_of_improvement": [
            _probability_row(tasks, reference, other, metric, num_seeds)
            for metric in ("eval_loss", "score")
            for other in schedulers
            if reference is not None
            and other != reference
            and any(reference in task.tuned and other in task.tuned for task in tasks)
        ],
        "performance_profile": {
            "factors": list(PROFILE_FACTORS),
            "num_workloads": int(times.shape[1]) if times.size else 0,
            "shares": {name: shares.tolist() for name, shares in zip(names, profile, strict=False)},
        },
    }


# --- plan -------------------------------------------------------------------------------------------------------------


def _setting(config: Any, *names: str) -> str | None:
    """First setting of one of these names that holds a plain value, at any depth of the config."""
    if not isinstance(config, dict):
        return None
    for name in names:
        if isinstance(config.get(name), (str, int, float)):
            return str(config[name])
    return next(filter(None, (_setting(value, *names) for value in config.values())), None)


def _distinct(values: Iterable[Any]) -> list[str]:
    return list(dict.fromkeys(str(value) for value in values if value is not None))


def _plan_of_task(task: TaskRuns) -> dict[str, Any]:
    records = [run.record for run in task.runs]
    baseline_records = [run.record for run in task.runs if is_baseline(run.scheduler)] or records
    return {
        "task": task.name,
        "source": _distinct(record["source"] for record in records),
        "splits": _distinct(
            ", ".join(f"{name} {size}" for name, size in record["splits"].items()) for record in records
        ),
        "model": _distinct(
            " from ".join(
                filter(
                    None,
                    [
                        _setting({"model": record["config"].get("model")}, "model"),
                        _setting(record["config"].get("data"), "model_name_or_path", "model_type"),
                    ],
                )
            )
            or None
            for record in records
        ),
        "optimizer": _distinct(_setting(record["config"], "optim", "optimizer") for record in baseline_records),
        "batch_size": _distinct(
            _setting(record["config"], "per_device_train_batch_size", "train_batch_size", "batch_size")
            for record in records
        ),
        "schedulers": task.schedulers,
        "seeds": sorted({run.seed for run in task.runs}),
        "learning_rates": task.learning_rates,
        "budgets": sorted({run.budget for run in task.runs if run.budget is not None}),
    }


def _environment(runs: list[Run]) -> dict[str, Any]:
    records = [run.record["environment"] for run in runs]
    packages = sorted({package for record in records for package in record["versions"]})
    return {
        "device": _distinct(record["device"] for record in records),
        "platform": _distinct(record["platform"] for record in records),
        "num_threads": _distinct(record["num_threads"] for record in records),
        "versions": {
            package: _distinct(record["versions"].get(package) for record in records) for package in packages
        },
        "commit": _distinct(record["commit"] for record in records),
        "command": _distinct(record["command"] for record in records),
    }


def _checks(task: TaskRuns) -> list[str]:
    """What makes cells of a task incomparable; empty when every run had the same start, data and budget."""
    problems = []
    compared = {
        "numbers of training steps": lambda run: run.budget and run.budget[0],
        "data sources": lambda run: run.record["source"],
        "split sizes": lambda run: tuple(sorted(run.record["splits"].items())),
        "scores": lambda run: run.record["higher_is_better_metric"],
    }
    for what, value in compared.items():
        if (number := len(set(map(value, task.runs)) - {None})) > 1:
            problems.append(f"{task.name}: the runs have {number} different {what}.")
    for what, key in (("initial weights", "initial_state_hash"), ("first batches", "first_batch_hash")):
        for pair in sorted({run.pair for run in task.runs}):
            # A run that failed before it had a model has no hash to compare.
            hashes = {run.record[key] for run in task.runs if run.pair == pair and run.record[key]}
            if len(hashes) > 1:
                problems.append(f"{task.name}: the runs of seed {pair[1]} have {len(hashes)} different {what}.")
    for (scheduler, rate), runs in task.cells.items():
        missing = {run.pair for run in task.runs} - {run.pair for run in runs}
        if missing:
            seeds = ", ".join(str(seed) for _, seed in sorted(missing))
            beside = " in the comparisons that have it" if len({run.comparison for run in task.runs}) > 1 else ""
            problems.append(f"{task.name}: {scheduler} at {format_rate(rate)} was not run with seed {seeds}{beside}.")
    return problems


# --- sentences --------------------------------------------------------------------------------------------------------


def _cell_name(scheduler: str, rate: float) -> str:
    return f"{scheduler} at {format_rate(rate)}"


def _conclusion_of_task(task: TaskRuns, comparisons: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    reference = task.reference
    if reference is None:
        return [_sentence(task, None, "No run of ALRS is among the results: there is nothing to conclude about it.")]
    if not any(map(is_baseline, task.schedulers)):
        return [_sentence(task, None, "No baseline is among the results: there is nothing to compare with.")]
    if task.best_baseline is None:
        return [
            _sentence(
                task, None, "No baseline completed all its runs at any rate: there is no target to compare with."
            )
        ]
    sentences = []
    rows = [row for row in comparisons["tuned"] if (row["other"], row["other_learning_rate"]) == task.best_baseline]
    for row in rows:
        sentences.append(_sentence(task, row["verdict"], _headline(row)))
    for metric in ("eval_loss", task.score):
        family = [row for row in comparisons["tuned"] if row["metric"] == metric and is_baseline(row["other"])]
        counted = {
            verdict: [row["other"] for row in family if row["verdict"] == verdict]
            for verdict in ("better", "worse", "not better", "no verdict")
        }
        without = f"; of fewer than two common seeds, which allows no verdict: {_listed(counted['no verdict'])}"
        sentences.append(
            _sentence(
                task,
                None,
                f"Final {metric} against the baselines, each at the best of the rates it was run from "
                f"({_rates_had(task)}): better than "
                f"{_listed(counted['better'])}; worse than {_listed(counted['worse'])}; not better, by an interval that "
                f"includes zero, than {_listed(counted['not better'])}{without if counted['no verdict'] else ''}.",
            )
        )
    if len(task.rates_of(reference)) > 1:
        sentences += [
            _untuned_sentence(task, [row for row in comparisons["without_tuning"] if row["metric"] == metric])
            for metric in ("eval_loss", task.score)
        ]
    return sentences


def _sentence(task: TaskRuns, verdict: str | None, text: str) -> dict[str, Any]:
    return {"task": task.name, "verdict": verdict, "text": text}


def _headline(row: dict[str, Any]) -> str:
    ours = _cell_name(row["scheduler"], row["learning_rate"])
    theirs = f"the best tuned baseline, {_cell_name(row['other'], row['other_learning_rate'])}"
    if row["num_pairs"] == 0:
        return f"{ours} and {theirs} have no seed in common, which allows no verdict on final {row['metric']}."
    if row["num_pairs"] < 2:
        return (
            f"In final {row['metric']}, the advantage of {ours} over {theirs}, is {format_number(row['advantage'])}, from "
            f"{_seeds(row['num_pairs'])}; one seed allows no interval and no verdict."
        )
    text = (
        f"In final {row['metric']}, {ours} is {row['verdict']} than {theirs}: the advantage is "
        f"{format_number(row['advantage'])} {format_interval(row['interval'])}, {CONFIDENCE:.0%} "
        f"interval, {_seeds(row['num_pairs'])}, p = {row['p_holm']:.2g} after Holm's correction."
    )
    if row["verdict"] != "not better" and row["p_holm"] > 1 - CONFIDENCE:
        text += (
            " The permutation test alone does not confirm it after correction; the smallest p-value that "
            f"{_seeds(row['num_pairs'])} can give is {2.0 ** (1 - row['num_pairs']):.2g} before it."
        )
    return text


def _untuned_sentence(task: TaskRuns, rows: list[dict[str, Any]]) -> dict[str, Any]:
    first = rows[0]
    verdicts = [row["verdict"] for row in rows]
    regrets = [row["regret"] for row in rows]
    worst = rows[int(np.argmax(regrets))]
    best_cell = _cell_name(first["other"], first["other_learning_rate"])
    told = (
        f"is better in final {first['metric']} than the best cell of all tuned baselines ({best_cell}) from "
        f"{verdicts.count('better')}, worse from {verdicts.count('worse')}, and not better (no interval without zero) from "
        f"{verdicts.count('not better')}"
    )
    if not any(row["num_pairs"] for row in rows):
        told = (
            f"has no seed in common with the best cell of all tuned baselines ({best_cell}), which allows no verdict"
        )
    elif verdicts.count("no verdict") == len(rows):
        ahead = sum(row["advantage"] > 0 for row in rows)
        told = (
            f"ends ahead of the best cell of all tuned baselines ({best_cell}) in final {first['metric']} from {ahead}, and "
            "not from the others; one seed allows no interval and no verdict"
        )
    elif "no verdict" in verdicts:
        told += f"; from {verdicts.count('no verdict')} fewer than two common seeds allow no verdict"
    return _sentence(
        task,
        None,
        f"Without tuning, from {len(rows)} initial rates between {format_rate(rows[0]['learning_rate'])} and "
        f"{format_rate(rows[-1]['learning_rate'])}, {first['scheduler']} {told}. Its mean regret is "
        f"{format_number(float(np.mean(regrets)))}, the largest {format_number(worst['regret'])} from "
        f"{format_rate(worst['learning_rate'])}.",
    )


def _analysis_of_task(task: TaskRuns, cells: list[dict[str, Any]], comparisons: dict[str, Any]) -> list[str]:
    tuned = sorted((cell for cell in cells if cell["tuned"]), key=lambda cell: cell["final"]["eval_loss"]["mean"])
    texts = []
    leaders = "; ".join(
        f"{_cell_name(cell['scheduler'], cell['learning_rate'])} {format_number(cell['final']['eval_loss']['mean'])}"
        for cell in tuned[:3]
    )
    texts.append(f"Lowest mean final eval_loss of {len(tuned)} schedulers, each at the best of its rates: {leaders}.")
    by_name = {cell["scheduler"]: cell for cell in tuned}
    ours = by_name.get(task.reference)
    if _has_choices(task):
        texts.append(_sensitivity(task))
    if ours is not None and task.targets:
        baseline = by_name[task.best_baseline[0]]
        for metric, target in task.targets.items():
            reached = ours["to_target"][metric]
            texts.append(
                f"The target {metric} {format_number(target)}, the median final value of "
                f"{_cell_name(*task.best_baseline)}, is reached by {reached['reached']} of {ours['num_runs']} runs of "
                f"{_cell_name(ours['scheduler'], ours['learning_rate'])}, in the median after "
                f"{format_number(reached['steps'], 0)} steps; by the baseline itself after "
                f"{format_number(baseline['to_target'][metric]['steps'], 0)}."
            )
        texts.append(
            f"Stability at the best rates, {ours['scheduler']} beside {baseline['scheduler']}: learning rate "
            f"{format_number(ours['learning_rate_stability'])} beside "
            f"{format_number(baseline['learning_rate_stability'])} nats per step, over "
            f"{format_number(ours['learning_rate_range'], 2)} beside {format_number(baseline['learning_rate_range'], 2)} "
            f"decades; training loss {_short(ours['loss_stability'])} beside {_short(baseline['loss_stability'])}."
        )
    ablations = [row for row in comparisons["tuned"] if row["metric"] == "eval_loss" and not is_baseline(row["other"])]
    texts += [
        f"Ablation: in final eval_loss, {row['scheduler']} is {row['verdict']} than {row['other']}, advantage "
        f"{format_number(row['advantage'])} {format_interval(row['interval'])}."
        if row["num_pairs"] > 1
        else f"Ablation: in final eval_loss, the advantage of {row['scheduler']} over {row['other']} is "
        f"{format_number(row['advantage'])}; fewer than two common seeds allow no verdict."
        for row in ablations
    ]
    failed = [run for run in task.runs if not run.completed]
    if failed:
        names = dict.fromkeys(_cell_name(run.scheduler, run.learning_rate) for run in failed)
        texts.append(
            f"{len(failed)} of {len(task.runs)} runs did not complete ({', '.join(names)}). They count as the worst "
            "score and as never reaching a target."
        )
    return texts


def _short(value: float) -> str:
    return format_number(value) if not math.isfinite(value) else f"{value:.2g}"


def _has_choices(task: TaskRuns) -> bool:
    """Whether a scheduler was run from several rates."""
    return any(len(task.rates_of(name)) > 1 for name in task.schedulers)


def _sensitivity(task: TaskRuns) -> str:
    """How much the choice of the initial rate matters, scheduler by scheduler."""

    def spread(scheduler: str) -> float:
        losses = [task.mean_final((scheduler, rate), "eval_loss") for rate in task.rates_of(scheduler)]
        return max(losses) - min(losses) if math.isfinite(max(losses)) else math.inf

    spreads = {name: spread(name) for name in task.schedulers if len(task.rates_of(name)) > 1}
    ranked = sorted(spreads, key=lambda name: spreads[name])
    told = "; ".join(f"{name} {format_number(spreads[name])}" for name in ranked[:3])
    if task.reference in ranked[3:]:
        told += (
            f"; {task.reference} {format_number(spreads[task.reference])} (place {ranked.index(task.reference) + 1})"
        )
    return f"Final eval_loss moves least with the initial rate (worst minus best mean over the rates) for: {told}."


def _timing_analysis(task: TaskRuns, timings: list[dict[str, Any]]) -> list[str]:
    texts = []
    by_cell = {(row["scheduler"], row["learning_rate"]): row for row in timings}
    if task.reference is not None:
        ours = by_cell[task.reference, task.tuned[task.reference]]
        if math.isfinite(ours["controller_share"]):
            texts.append(
                f"{task.name}: the controller of {task.reference} takes {ours['controller_share']:.2%} of the training time."
            )
        if task.best_baseline is not None:
            theirs = by_cell[task.best_baseline]
            if _of_other_machines(task.tuned_runs(task.reference), task.cells[task.best_baseline]):
                texts.append(
                    f"{task.name}: the runs of {task.reference} and of {task.best_baseline[0]} are of different software or "
                    "machines, and their times are not compared."
                )
            else:
                texts.append(
                    f"{task.name}: training takes {format_number(ours['train_seconds']['mean'], 1)} s with "
                    f"{task.reference} and {format_number(theirs['train_seconds']['mean'], 1)} s with "
                    f"{task.best_baseline[0]}; the target loss is reached after "
                    f"{format_number(ours['to_target']['eval_loss']['seconds'], 1)} s and "
                    f"{format_number(theirs['to_target']['eval_loss']['seconds'], 1)} s (median)."
                )
    return texts


def _caveats(tasks: list[TaskRuns]) -> list[str]:
    texts = []
    sizes = sorted({len(runs) for task in tasks for runs in task.cells.values()})
    if sizes[0] == 1:
        texts.append("Some cells hold one seed: they have no interval, and nothing is concluded from them.")
    fewest = next((size for size in sizes if size > 1), 5)
    if fewest < 5:
        texts.append(
            f"Some cells hold only {fewest} seeds: the smallest p-value they can give is {2.0 ** (1 - fewest):.2g}, "
            "and bootstrap intervals from so few runs are too narrow."
        )
    texts += [text for task in tasks for text in _software_caveat(task)]
    if any(map(_has_choices, tasks)):
        texts.append(
            "Every scheduler's best rate was chosen on the eval scores that are compared, which flatters those the most that "
            "were run from the most rates ("
            + "; ".join(f"{task.name}: {_rates_had(task)}" for task in tasks if _has_choices(task))
            + "). “Without tuning” uses no such choice for the judged scheduler."
        )
    texts += [text for task in tasks for text in _evaluation_caveats(task)]
    return texts


def _environment_value(run: Run, name: str) -> str:
    environment = run.record["environment"]
    return str(environment[name] if name in environment else environment["versions"].get(name))


def _of_other_machines(*cells: list[Run]) -> bool:
    names = ("device", "platform", "num_threads", "torch", "transformers")
    return len({tuple(_environment_value(run, name) for name in names) for cell in cells for run in cell}) > 1


def _software_caveat(task: TaskRuns) -> Iterable[str]:
    """Where all runs of the judged scheduler are of other software than all of the baselines."""
    ours = [run for run in task.runs if run.scheduler == task.reference]
    theirs = [run for run in task.runs if is_baseline(run.scheduler)]
    differing = []
    for name in ("torch", "transformers", "device") if ours and theirs else ():
        mine, others = ({_environment_value(run, name) for run in runs} for runs in (ours, theirs))
        if not mine & others:
            differing.append(f"{name} {', '.join(sorted(mine))} beside {', '.join(sorted(others))}")
    if differing:
        yield (
            f"{task.name}: the runs of {task.reference} and those of the baselines are of different software "
            f"({'; '.join(differing)}); what that changes would count as the schedulers' doing."
        )


def _rates_had(task: TaskRuns) -> str:
    """How many initial rates each scheduler was run from."""
    names: dict[int, list[str]] = {}
    for name in task.schedulers:
        names.setdefault(len(task.rates_of(name)), []).append(name)
    counts = sorted(names, reverse=True)
    if len(counts) == 1:
        return f"{_rates(counts[0])} each"
    return ", ".join(f"{_rates(number)}: {' '.join(names[number])}" for number in counts)


def _rates(number: int) -> str:
    return "1 rate" if number == 1 else f"{number} rates"


def _evaluation_caveats(task: TaskRuns) -> Iterable[str]:
    """Schedulers that are stepped with evaluations have more of them, or had too few to act."""
    counts: dict[str, int] = {}
    for run in task.runs:
        if run.completed:
            number = len(run.record["evaluations"])
            counts[run.scheduler] = min(number, counts.get(run.scheduler, number))
    stepped = {name: n for name, n in counts.items() if name in BASELINES and BASELINES[name].needs_evaluation}
    most = max((number for name, number in counts.items() if name not in stepped), default=math.inf)
    for name, number in stepped.items():
        if number < MIN_EVALUATIONS:
            yield (
                f"{task.name}: {name} is stepped with evaluations, of which its runs have only {number}: it could hardly act."
            )
        elif number > most:
            yield (
                f"{task.name}: runs of {name}, which is stepped with evaluations, have {number} of them and others {most}, so "
                "that their best values and times to targets are taken from more."
            )


# --- everything -------------------------------------------------------------------------------------------------------


def _clock_free(scores: dict[str, float] | None, clock: bool) -> dict[str, float] | None:
    if scores is None:
        return None
    return {key: value for key, value in scores.items() if key.endswith(_CLOCK_SUFFIXES) == clock}


def _shown_run(task: TaskRuns, rate: float | None) -> Run:
    """The run whose dictionaries head the report: ALRS at this or its best rate, the first seed that completed."""
    scheduler = task.reference or (task.best_baseline or (task.schedulers[0],))[0]
    runs = task.cells.get((scheduler, rate)) or task.tuned_runs(scheduler)
    return next((run for run in runs if run.completed), runs[0])


def _map_tasks(tasks: list[TaskRuns], value: Callable[[TaskRuns], Any]) -> dict[str, Any]:
    return {task.name: value(task) for task in tasks}


def summarize(
    runs: list[Run],
    target: float | None = None,
    judged: str | None = None,
    shown_rates: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """
    Everything the report says, as the content of `results.json`.

    Args:
        runs (`list[Run]`): Stored runs of one or several tasks, from [`load_runs`].
        target (`float`, *optional*): A score that every run is timed to as well.
        judged (`str`, *optional*): The scheduler that the others are compared with, `alrs` by default.
        shown_rates (`Mapping[str, float]`, *optional*): Task -> initial rate of the run whose dictionaries are shown, its
            best one by default.

    Returns:
        `dict[str, Any]`: Python floats throughout, `inf` and `nan` included; see [`json_ready`].
    """
    tasks = group_by_task(runs, target, judged)
    shown = _map_tasks(tasks, lambda task: _shown_run(task, (shown_rates or {}).get(task.name)))
    cells = _map_tasks(tasks, lambda task: [_cell(task, *cell) for cell in task.cells])
    timings = _map_tasks(tasks, lambda task: [_cell_timing(task, *cell) for cell in task.cells])
    comparisons = _map_tasks(tasks, _comparisons)
    return {
        "schema_version": SUMMARY_VERSION,
        "results": {name: _clock_free(run.record["results"], clock=False) for name, run in shown.items()},
        "benchmark_results": {
            name: _clock_free(run.record["benchmark_results"], clock=False) for name, run in shown.items()
        },
        "shown_runs": {name: {**run.record["spec"], "status": run.record["status"]} for name, run in shown.items()},
        "plan": {
            "num_runs": len(runs),
            "tasks": [_plan_of_task(task) for task in tasks],
            "environment": _environment(runs),
            "checks": [problem for task in tasks for problem in _checks(task)],
        },
        "tasks": {
            task.name: {
                "score": task.score,
                "reference": task.reference,
                "best_baseline": task.best_baseline
                and {"scheduler": task.best_baseline[0], "learning_rate": task.best_baseline[1]},
                "targets": task.all_targets,
                "speed_ups": _speed_ups(task),
                "cells": cells[task.name],
                "comparisons": comparisons[task.name],
            }
            for task in tasks
        },
        "overall": _overall(tasks),
        "analysis": [
            *(
                f"{task.name}: {text}"
                for task in tasks
                for text in _analysis_of_task(task, cells[task.name], comparisons[task.name])
            ),
            *_caveats(tasks),
        ],
        "conclusion": [sentence for task in tasks for sentence in _conclusion_of_task(task, comparisons[task.name])],
        "failures": [
            {**run.record["spec"], "status": run.record["status"], "error": run.record["error"]}
            for run in runs
            if not run.completed
        ],
        "timing": {
            "results": {name: _clock_free(run.record["results"], clock=True) for name, run in shown.items()},
            "benchmark_results": {
                name: _clock_free(run.record["benchmark_results"], clock=True) for name, run in shown.items()
            },
            "cells": [row for task in tasks for row in timings[task.name]],
            "analysis": [text for task in tasks for text in _timing_analysis(task, timings[task.name])],
        },
    }


def json_ready(value: Any) -> Any:
    """Infinities as `"inf"` and `"-inf"`, nan as null, everything else as it is."""
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
