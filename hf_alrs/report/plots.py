"""
The figures, one panel each, so that a page can set them side by side on a desk and below each other on a phone.

Figures are drawn on `matplotlib.figure.Figure` objects, without pyplot and its global state.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from .. import metrics, statistics
from .runs import Run, TaskRuns, is_baseline
from .summary import format_number, format_rate, profile_times


INK, MUTED, GRID, PAPER = "#1f2430", "#5d6675", "#e2e5ea", "#ffffff"
# Okabe and Ito's colours, told apart with every common kind of colour blindness. Vermillion is kept for ALRS; yellow is
# left out, since it vanishes on a light page.
REFERENCE_COLOR = "#d55e00"
BASELINE_COLORS = ("#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f")
DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (3, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P")
# Colour and opacity; the longest phase is only tinted.
PHASE_SHADES = {
    "gather": ("#56b4e9", 0.28),
    "fit": ("#e69f00", 0.28),
    "drive": ("#009e73", 0.1),
    "fallback": ("#d55e00", 0.2),
}
# With more baselines than this the curves of the others are drawn in grey behind those of the best.
MAX_NAMED_BASELINES = 6
MAX_TRACE_POINTS = 400
WIDTH, HEIGHT = 4.4, 2.9

_RC = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "figure.titlesize": 10,
    "figure.titleweight": "bold",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    # Text stays text: it can be searched, read aloud, and coloured by the page.
    "svg.fonttype": "none",
    # Names of clip paths are random otherwise, and a report built twice should be the same.
    "svg.hashsalt": "hf-alrs",
}


@dataclass(frozen=True)
class Plot:
    """
    A drawn figure.

    Args:
        name (`str`): File name without suffix.
        section (`str`): Part of the page it belongs to.
        caption (`str`): What is shown, and how it was computed; also its description for a screen reader.
        svg (`str`): The drawing.
        task (`str`, *optional*): The task it shows; `None` for all of them.
    """

    name: str
    section: str
    caption: str
    svg: str
    task: str | None = None


@dataclass(frozen=True)
class Style:
    """How one scheduler looks in every figure of a report."""

    color: str
    dashes: Any
    marker: str
    width: float

    def line(self) -> dict[str, Any]:
        return {"color": self.color, "linestyle": self.dashes, "linewidth": self.width}


def scheduler_styles(tasks: list[TaskRuns]) -> dict[str, Style]:
    """
    One style for each scheduler of the report. The best baselines, by their mean place over the tasks, take the solid
    lines of the six colours; ALRS and its ablations share one colour and differ in dashes. Without baselines the
    ablations take the six colours.
    """
    places: dict[str, list[int]] = {}
    for task in tasks:
        losses = {name: task.mean_final((name, rate), "eval_loss") for name, rate in task.tuned.items()}
        for place, name in enumerate(sorted(losses, key=lambda name: (losses[name], name))):
            places.setdefault(name, []).append(place)
    ranked = sorted(places, key=lambda name: (float(np.mean(places[name])), name))
    judged = sorted((name for name in places if not is_baseline(name)), key=lambda name: (len(name), name))
    colors_are_free = not any(map(is_baseline, ranked))
    styles = {}
    for index, name in enumerate(judged):
        color, dashes = REFERENCE_COLOR, DASHES[index % len(DASHES)]
        if index > 0 and colors_are_free:
            color, dashes = BASELINE_COLORS[(index - 1) % len(BASELINE_COLORS)], DASHES[0]
        styles[name] = Style(color, dashes, MARKERS[index % len(MARKERS)], 2.3 if index == 0 else 1.4)
    for index, name in enumerate(filter(is_baseline, ranked)):
        cycle, place = divmod(index, len(BASELINE_COLORS))
        marker = MARKERS[(place + cycle) % len(MARKERS)]
        styles[name] = Style(BASELINE_COLORS[place], DASHES[cycle % len(DASHES)], marker, 1.6)
    return styles


def _named(task: TaskRuns) -> list[str]:
    """Schedulers drawn in their own colour in a figure of many curves: the judged ones, then the best baselines."""
    baselines = [name for name in task.schedulers if is_baseline(name)]
    baselines.sort(key=lambda name: task.mean_final((name, task.tuned[name]), "eval_loss"))
    return [name for name in task.schedulers if not is_baseline(name)] + baselines[:MAX_NAMED_BASELINES]


# --- shared pieces ----------------------------------------------------------------------------------------------------


def _panel(title: str, xlabel: str, ylabel: str = "", height: float = HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    # Over the whole figure: beside long row labels the axes are too narrow for it.
    figure.suptitle(textwrap.fill(title, 52), x=0.02, ha="left")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(color=GRID, linewidth=0.7)
    axes.tick_params(length=3)
    return figure, axes


def _linear(axis: Axis, num_ticks: int = 5) -> None:
    axis.set_major_locator(MaxNLocator(num_ticks))


def _log_rates(axis: Axis, rates: Iterable[float] = ()) -> None:
    """Few ticks on a log axis of learning rates: at the rates that were run, or else at decades."""
    rates = sorted(set(rates))
    if 0 < len(rates) <= 7:
        axis.set_major_locator(FixedLocator(rates))
    else:
        axis.set_major_locator(LogLocator(numticks=6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_rate(value)))
    axis.set_minor_locator(NullLocator())


def _focus(axes: Axes, values: np.ndarray) -> None:
    """Limits the vertical axis to these values, so that a steep start does not flatten what comes after it."""
    values = values[np.isfinite(values)]
    if values.size and values.max() > values.min():
        margin = 0.08 * (values.max() - values.min())
        axes.set_ylim(values.min() - margin, values.max() + margin)


def _legend(figure: Figure, handles: list[Any]) -> None:
    """Below the panel, never on the data; the panel keeps its height and the figure grows."""
    longest = max((len(handle.get_label()) for handle in handles), default=0)
    columns = min(len(handles), 4 if longest <= 11 else 3 if longest <= 17 else 2)
    rows = math.ceil(len(handles) / max(columns, 1))
    figure.set_figheight(figure.get_figheight() + 0.19 * rows)
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=columns,
        columnspacing=1.4,
        handlelength=2.2,
        labelspacing=0.3,
    )


def _line_handle(style: Style, label: str, marker: bool = False) -> Line2D:
    return Line2D([], [], label=label, marker=style.marker if marker else "", markersize=4.5, **style.line())


def _name_with_failures(name: str, runs: list[Run]) -> str:
    failed = sum(not run.completed for run in runs)
    return f"{name} ({failed} of {len(runs)} failed)" if failed else name


def _rows(axes: Axes, names: list[str]) -> None:
    """A categorical axis read from the top, with light row lines only."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _row_height(number: int) -> float:
    return 1.05 + 0.25 * max(number, 2)


def _in_order(task: TaskRuns, handles: dict[str, Line2D]) -> list[Line2D]:
    """Legend of a panel with grey curves: those of the judged, then the baselines from the best on, then the grey."""
    named = _named(task)
    ordered = [handles[name] for name in named if name in handles]
    if len(named) < len(task.schedulers):
        ordered.append(Line2D([], [], color=MUTED, alpha=0.6, linewidth=0.9, label="other baselines"))
    return ordered


# --- one task ---------------------------------------------------------------------------------------------------------


def _learning_curve(task: TaskRuns, styles: dict[str, Style], metric: str, unit: str) -> Figure:
    xlabel = "optimizer steps" if unit == "step" else "training time (s)"
    figure, axes = _panel(f"{task.name}: {metric}", xlabel, metric)
    named, handles, late = _named(task), {}, []
    # The reference comes last, on top of the others.
    for name in sorted(task.schedulers, key=lambda name: (name == task.reference, name in named)):
        runs, style = task.tuned_runs(name), styles[name]
        evaluated = [run for run in runs if run.record["evaluations"]]
        completed = [run for run in evaluated if run.completed]
        marker = {"marker": style.marker, "markersize": 3.5}
        if completed:
            length = min(len(run.record["evaluations"]) for run in completed)
            values = np.array([run.evaluations(metric)[:length] for run in completed])
            positions = np.mean([run.evaluations(unit)[:length] for run in completed], axis=0)
            late += values[:, positions >= 0.25 * positions[-1]].ravel().tolist()
            if name not in named:
                axes.plot(positions, values.mean(axis=0), color=MUTED, alpha=0.45, linewidth=0.9)
                continue
            axes.plot(positions, values.mean(axis=0), **style.line(), **(marker if length <= 15 else {}))
            axes.fill_between(positions, values.min(axis=0), values.max(axis=0), color=style.color, alpha=0.13, lw=0)
        if name in named:
            for run in evaluated:
                if not run.completed:
                    end = {"marker": "x", "markersize": 7, "markeredgewidth": 2, "color": style.color}
                    axes.plot(run.evaluations(unit)[-1], run.evaluations(metric)[-1], **end)
            handles[name] = _line_handle(style, _name_with_failures(name, runs), marker=True)
    _focus(axes, np.array(late))
    _linear(axes.xaxis)
    _linear(axes.yaxis)
    _legend(figure, _in_order(task, handles))
    return figure


def _thinned(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Steps and positive learning rates of a run, thinned to what a panel can show."""
    steps, rates = run.history("step"), run.history("learning_rate")
    # A rate of 0, where a schedule ends, has no place on a log axis.
    rates = np.where(rates > 0, rates, math.nan)
    kept = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MAX_TRACE_POINTS)).astype(int))
    return steps[kept], rates[kept]


def _phase_spans(run: Run) -> list[tuple[str, float, float]]:
    """Stretches of one phase: its name, and the steps it begins before and ends after."""
    phases, steps = run.record["history"]["phase"] or [], run.record["history"]["step"]
    spans: list[tuple[str, float, float]] = []
    for phase, step in zip(phases, steps, strict=True) if phases else ():
        if spans and spans[-1][0] == phase:
            spans[-1] = (phase, spans[-1][1], step)
        else:
            spans.append((phase, step - 1, step))
    return [span for span in spans if span[0] is not None]


def _mark_phases(axes: Axes, run: Run) -> list[Patch]:
    spans = _phase_spans(run)
    for phase, start, end in spans:
        color, alpha = PHASE_SHADES[phase]
        axes.axvspan(start, end, color=color, alpha=alpha, linewidth=0)
    shown = dict.fromkeys(phase for phase, _, _ in spans)
    return [
        Patch(facecolor=PHASE_SHADES[phase][0], alpha=2 * PHASE_SHADES[phase][1], label=f"phase: {phase}")
        for phase in shown
    ]


def _finish_traces(figure: Figure, axes: Axes, handles: list[Any]) -> Figure:
    axes.set_yscale("log")
    shown = np.concatenate([line.get_ydata() for line in axes.lines]) if axes.lines else np.array([])
    shown = shown[np.isfinite(shown)]
    if shown.size:
        # The last steps of an anneal to zero would take most of a log axis and say nothing.
        top = shown.max()
        axes.set_ylim(max(shown.min(), np.quantile(shown, 0.03), top * 1e-7) / 1.6, top * 1.6)
    _log_rates(axes.yaxis)
    _linear(axes.xaxis)
    _legend(figure, handles)
    return figure


def _traces_of_schedulers(task: TaskRuns, styles: dict[str, Style]) -> Figure:
    figure, axes = _panel(f"{task.name}: learning rates, each at its best", "optimizer steps", "learning rate")
    named, handles, phases = _named(task), {}, []
    for name in sorted(named, key=lambda name: name == task.reference):
        run = task.tuned_runs(name)[0]
        axes.plot(*_thinned(run), **styles[name].line())
        handles[name] = _line_handle(styles[name], name)
        if name == task.reference:
            phases = _mark_phases(axes, run)
    return _finish_traces(figure, axes, [handles[name] for name in named] + phases)


def _traces_of_rates(task: TaskRuns) -> Figure:
    title = f"{task.name}: {task.reference} from every initial rate"
    figure, axes = _panel(title, "optimizer steps", "learning rate")
    rates = task.rates_of(task.reference)
    colors = matplotlib.colormaps["viridis"](np.linspace(0.3, 0.8, len(rates)))
    handles, phases = [], []
    for rate, color in zip(rates, colors, strict=True):
        for run in task.cells[task.reference, rate]:
            axes.plot(*_thinned(run), color=color, linewidth=1.1)
        handles.append(Line2D([], [], color=color, label=f"from {format_rate(rate)}"))
        phases = phases or _mark_phases(axes, task.cells[task.reference, rate][0])
    return _finish_traces(figure, axes, handles + phases)


def _score_against_rate(task: TaskRuns, styles: dict[str, Style], metric: str) -> Figure:
    figure, axes = _panel(f"{task.name}: final {metric}", "initial learning rate", f"final {metric}")
    axes.set_xscale("log")
    named, handles, missing = _named(task), {}, []
    untrained = [run.record["benchmark_results"].get(metric) for run in task.runs if run.record["benchmark_results"]]
    # What ends worse than no training at all need not be told apart, and would flatten everything else.
    floor = max((value for value in untrained if value is not None), default=math.inf)
    shown = []
    for index, name in enumerate(sorted(task.schedulers, key=lambda name: (name == task.reference, name in named))):
        rates, style = task.rates_of(name), styles[name]
        finals = [np.array([run.final(metric) for run in task.cells[name, rate] if run.completed]) for rate in rates]
        means = np.array([values.mean() if values.size else math.nan for values in finals])
        if name not in named:
            axes.plot(rates, means, color=MUTED, alpha=0.45, linewidth=0.9)
            continue
        # A small sideways shift keeps the bars of two schedulers apart.
        shifted = np.array(rates) * 10 ** (0.012 * (index - len(task.schedulers) / 2))
        axes.plot(shifted, means, marker=style.marker, markersize=4.5, **style.line())
        for rate, values in zip(shifted, finals, strict=True):
            if values.size > 1:
                axes.plot([rate, rate], [values.min(), values.max()], color=style.color, linewidth=1)
            shown += values.tolist()
        failed = [
            shifted[place]
            for place, rate in enumerate(rates)
            if not all(run.completed for run in task.cells[name, rate])
        ]
        missing += [(rate, style.color) for rate in failed]
        runs = [run for rate in rates for run in task.cells[name, rate]]
        handles[name] = _line_handle(style, _name_with_failures(name, runs), marker=True)
    if metric.endswith("loss"):
        _focus(axes, np.minimum(shown, floor))
    edge = 0.97 if metric.endswith("loss") else 0.03
    for rate, color in missing:
        cross = {"marker": "x", "markersize": 6.5, "markeredgewidth": 1.8, "color": color, "clip_on": False}
        axes.plot(rate, edge, transform=axes.get_xaxis_transform(), **cross)
    _log_rates(axes.xaxis, task.learning_rates)
    _linear(axes.yaxis)
    _legend(figure, _in_order(task, handles))
    return figure


def _time_to_target(task: TaskRuns, styles: dict[str, Style], unit: str) -> Figure:
    target = task.targets["eval_loss"]
    xlabel = "optimizer steps" if unit == "step" else "training time (s)"
    times = {
        name: np.array([run.position_of_target(unit, "eval_loss", target) for run in task.tuned_runs(name)])
        for name in task.schedulers
    }
    medians = {name: statistics.describe(values).median for name, values in times.items()}
    names = sorted(times, key=lambda name: (medians[name], name))
    title = f"{task.name}: {'steps' if unit == 'step' else 'seconds'} to eval_loss {format_number(target)}"
    figure, axes = _panel(title, xlabel, height=_row_height(len(names)))
    finite = np.concatenate(list(times.values()))
    finite = finite[np.isfinite(finite)]
    end = finite.max() if finite.size else 1.0
    missed = end * 1.12
    for row, name in enumerate(names):
        values, style = np.where(np.isfinite(times[name]), times[name], missed), styles[name]
        axes.plot(values, np.full(len(values), row), "o", color=style.color, alpha=0.45, markersize=5, linewidth=0)
        middle = medians[name] if math.isfinite(medians[name]) else missed
        axes.plot([middle, middle], [row - 0.3, row + 0.3], color=style.color, linewidth=2.4)
        if (number := int(np.isinf(times[name]).sum())) > 1:
            axes.annotate(f"x{number}", (missed, row), (7, 0), textcoords="offset points", va="center", fontsize=8)
    axes.axvspan(end * 1.06, end * 1.22, color=MUTED, alpha=0.1, linewidth=0)
    axes.set_xlim(0, end * 1.22)
    _rows(axes, names)
    ticks = [tick for tick in MaxNLocator(4).tick_values(0, end) if tick <= end * 0.96]
    axes.set_xticks([*ticks, missed], [*(f"{tick:g}" for tick in ticks), "missed"])
    return figure


def _differences(task: TaskRuns, styles: dict[str, Style], rows: list[dict[str, Any]]) -> Figure:
    metric, names = rows[0]["metric"], [row["other"] for row in rows]
    title = f"{task.name}: {rows[0]['scheduler']} against each, final {metric}"
    figure, axes = _panel(title, "", height=_row_height(len(names)))
    # Set from the right, the label may reach under the names of the rows.
    axes.set_xlabel(f"advantage in {metric} (right of zero: {rows[0]['scheduler']} is better)", loc="right")
    axes.axvline(0, color=MUTED, linewidth=1)
    for place, row in enumerate(rows):
        color = styles[row["other"]].color
        low, high = row["interval"]
        if math.isfinite(low) and math.isfinite(high):
            axes.plot([low, high], [place, place], color=color, linewidth=2.2, solid_capstyle="butt")
        if math.isfinite(row["advantage"]):
            axes.plot(row["advantage"], place, "o", color=color, markersize=5.5)
            continue
        note = "runs failed: " + ("every pair" if math.isinf(low) and low == high else "no finite mean")
        axes.text(
            0.99, place, note, transform=axes.get_yaxis_transform(), ha="right", va="center", fontsize=8, color=MUTED
        )
    _rows(axes, names)
    _linear(axes.xaxis, 4)
    axes.margins(x=0.08)
    return figure


# --- all tasks --------------------------------------------------------------------------------------------------------


def _profile(tasks: list[TaskRuns], styles: dict[str, Style]) -> Figure | None:
    names, times = profile_times(tasks)
    if not times.size:
        return None
    figure, axes = _panel("Performance profile", "steps to target, relative to the fastest", "share of workloads")
    ratios = statistics.time_ratios(times)
    finite = ratios[np.isfinite(ratios)]
    end = max(1.5, 1.08 * finite.max()) if finite.size else 2.0
    factors = np.unique(np.concatenate([[1.0, end], finite]))
    shares = statistics.performance_profile(times, factors)
    # The curves of those who never reach a target all lie on zero: they keep their place in the legend.
    order = np.argsort(-shares.sum(axis=1), kind="stable")
    for index in order[::-1]:
        axes.step(factors, shares[index], where="post", **styles[names[index]].line())
    axes.set_xlim(1, end)
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    _linear(axes.xaxis)
    _legend(figure, [_line_handle(styles[names[index]], names[index]) for index in order])
    return figure


def _probabilities(rows: list[dict[str, Any]], styles: dict[str, Style], metric: str) -> Figure:
    reference, names = rows[0]["scheduler"], [row["other"] for row in rows]
    figure, axes = _panel(
        f"Probability that {reference} beats each, final {metric}",
        f"P({reference} better)",
        height=_row_height(len(names)),
    )
    axes.axvline(0.5, color=MUTED, linewidth=1)
    for place, row in enumerate(rows):
        color = styles[row["other"]].color
        if not math.isnan(row["interval"][0]):
            axes.plot(
                row["interval"], [place, place], color=color, linewidth=2.2, solid_capstyle="butt", clip_on=False
            )
        axes.plot(row["probability"], place, "o", color=color, markersize=5.5, clip_on=False)
    _rows(axes, names)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    return figure


def _overhead(tasks: list[TaskRuns], styles: dict[str, Style]) -> Figure | None:
    shares = {}
    for task in tasks:
        for name in task.schedulers:
            timings = [run.record["timing"] for rate in task.rates_of(name) for run in task.cells[name, rate]]
            values = [metrics.controller_share(row["controller_seconds"], row["train_seconds"]) for row in timings]
            values = [value for value in values if not math.isnan(value)]
            # Baselines have no controller; a row of zeros for each would only hide those that have one.
            if values and (not is_baseline(name) or max(values) > 0):
                shares[name if len(tasks) == 1 else f"{name}, {task.name}"] = (name, np.array(values))
    if not shares:
        return None
    figure, axes = _panel("Overhead of the controller", "share of training time", height=_row_height(len(shares)))
    for place, (name, values) in enumerate(shares.values()):
        color = styles[name].color
        axes.barh(place, values.mean(), height=0.55, color=color, alpha=0.35, linewidth=0)
        axes.plot(values, np.full(len(values), place), "o", color=color, alpha=0.6, markersize=3.5, linewidth=0)
        axes.annotate(
            f"{values.mean():.2%}",
            (values.max(), place),
            (6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
        )
    _rows(axes, list(shares))
    largest = max(values.max() for _, values in shares.values())
    axes.set_xlim(0, 1.25 * largest if largest > 0 else 0.01)
    _linear(axes.xaxis, 4)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    return figure


# --- the whole set ----------------------------------------------------------------------------------------------------


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _slug(*parts: str) -> str:
    """A file name of these parts, whatever they hold; long ones are cut, and kept apart by their hash."""

    def short(part: str) -> str:
        text = re.sub(r"[^a-z0-9_]+", "-", part.lower()).strip("-") or "x"
        return text if len(text) <= 80 else f"{text[:64]}-{hashlib.sha256(part.encode()).hexdigest()[:12]}"

    return "-".join(map(short, parts))


_BAND = (
    "Mean over seeds, each scheduler at its best initial rate; bands span the seeds; a cross ends a run that failed. The "
    "axis is set to the last three quarters of the training."
)


def _plots_of_task(task: TaskRuns, styles: dict[str, Style], summary: dict[str, Any]) -> Iterable[tuple]:
    """Name, section, caption and figure of everything drawn for one task."""
    measured = ("eval_loss", task.score)
    several_rates = len(task.learning_rates) > 1
    if several_rates:
        for metric in measured:
            yield (
                f"final-{metric}-against-rate",
                "schedulers",
                f"Final {metric} on {task.name} against the initial learning rate. Mean of the runs that completed; bars "
                "span the seeds; a cross at the edge marks a rate at which runs failed; losses above that of the untrained model "
                "leave the panel.",
                _score_against_rate(task, styles, metric),
            )
    if any(run.record["evaluations"] for run in task.runs):
        for metric in measured:
            for unit, words in (("step", "optimizer steps"), ("seconds", "training seconds")):
                caption = f"{metric} on {task.name} against {words}. {_BAND}"
                name = f"curve-{metric}-{'steps' if unit == 'step' else unit}"
                yield name, "schedulers", caption, _learning_curve(task, styles, metric, unit)
    if any(run.record["history"]["step"] for run in task.runs):
        caption = (
            f"Learning rate on {task.name}, each scheduler at its best initial rate, first seed. Shades: the phases of "
            f"{task.reference}."
        )
        yield "rates", "traces", caption, _traces_of_schedulers(task, styles)
        if task.reference is not None and len(task.rates_of(task.reference)) > 1:
            caption = (
                f"Learning rate of {task.reference} on {task.name} from every initial rate, all seeds. Shades: the phases "
                "of the first run."
            )
            yield f"rates-{task.reference}", "traces", caption, _traces_of_rates(task)
    if task.targets:
        for unit, words in (("step", "Optimizer steps"), ("seconds", "Training seconds")):
            caption = (
                f"{words} on {task.name} until the eval_loss that the best tuned baseline ends with. A dot for each seed, "
                "a bar at the median; a missed target stays in, at the right."
            )
            name = f"time-to-target-{'steps' if unit == 'step' else unit}"
            yield name, "targets", caption, _time_to_target(task, styles, unit)
    for metric in measured:
        rows = [row for row in summary["comparisons"]["tuned"] if row["metric"] == metric]
        if rows:
            caption = (
                f"Paired differences in final {metric} on {task.name}, {task.reference} and each other scheduler at their "
                "best rates, with 95 % intervals of the mean over seeds."
            )
            yield f"differences-{metric}", "differences", caption, _differences(task, styles, rows)


def _plots_of_all(tasks: list[TaskRuns], styles: dict[str, Style], overall: dict[str, Any]) -> Iterable[tuple]:
    caption = (
        "Share of workloads (one seed of one task) on which a scheduler reaches the target loss within a factor of the "
        "steps of the fastest. Missed targets are never within any factor."
    )
    yield (
        "performance-profile",
        "overall",
        caption,
        _profile([task for task in tasks if task.name in overall["tasks"]], styles),
    )
    for metric in ("eval_loss", "score"):
        rows = [row for row in overall["probability_of_improvement"] if row["metric"] == metric]
        if rows:
            shown = tasks[0].score if metric == "score" and len({task.score for task in tasks}) == 1 else metric
            caption = (
                f"Probability that a run of {rows[0]['scheduler']} ends with a better {shown} than a run of each other "
                "scheduler, both at their best rates, averaged over tasks; 95 % stratified bootstrap intervals."
            )
            yield f"probability-{metric}", "overall", caption, _probabilities(rows, styles, shown)
    caption = "Time in the controller as a share of training time: mean over all rates and seeds, a dot for each run."
    yield "overhead", "overall", caption, _overhead(tasks, styles)


def draw_plots(tasks: list[TaskRuns], summary: dict[str, Any]) -> list[Plot]:
    """
    Draws every figure that the runs allow.

    Args:
        tasks (`list[TaskRuns]`): The runs, task by task.
        summary (`dict[str, Any]`): What [`summarize`] made of them.

    Returns:
        `list[Plot]`: In the order of the page.
    """
    styles = scheduler_styles(tasks)
    plots = []
    # A context, so that the caller's own matplotlib settings are neither used nor changed.
    defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
    with matplotlib.rc_context({**defaults, **_RC}):
        for index, task in enumerate(tasks):
            for name, section, caption, figure in _plots_of_task(task, styles, summary["tasks"][task.name]):
                # The index keeps apart two tasks whose names differ only in signs that a file name cannot hold.
                file = _slug(f"{index + 1}", task.name, name)
                plots.append(Plot(file, section, caption, _svg(figure), task.name))
        for name, section, caption, figure in _plots_of_all(tasks, styles, summary["overall"]):
            if figure is not None:
                plots.append(Plot(_slug(name), section, caption, _svg(figure)))
    return plots


# --- over several reports ---------------------------------------------------------------------------------------------


class RatePanel(NamedTuple):
    """Curves of one panel: scheduler -> (initial rate, mean, standard deviation), where the last two may be nan."""

    title: str
    ylabel: str
    reference: str
    curves: dict[str, list[tuple[float, float, float]]]


def draw_rate_panels(panels: list[RatePanel]) -> str:
    """
    Final scores against the initial learning rate, a panel beside the other.

    Args:
        panels (`list[RatePanel]`): At least one.

    Returns:
        `str`: The drawing as SVG.
    """
    names = sorted(dict.fromkeys(name for panel in panels for name in panel.curves), key=is_baseline)
    judged = [name for name in names if not is_baseline(name)]
    styles = {name: Style(REFERENCE_COLOR, DASHES[i % len(DASHES)], MARKERS[i], 2.2) for i, name in enumerate(judged)}
    for index, name in enumerate(filter(is_baseline, names)):
        color = BASELINE_COLORS[index % len(BASELINE_COLORS)]
        styles[name] = Style(color, "solid", MARKERS[(index + 1) % len(MARKERS)], 1.6)
    defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
    with matplotlib.rc_context({**defaults, **_RC}):
        figure = Figure(figsize=(3.1 * len(panels), 2.6), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            axes.set_title(panel.title, loc="left", fontsize=9.5, fontweight="bold")
            axes.set_xscale("log")
            axes.set_xlabel("initial learning rate")
            axes.set_ylabel(panel.ylabel)
            axes.grid(color=GRID, linewidth=0.7)
            for name, points in panel.curves.items():
                style, (rates, means, deviations) = styles[name], np.array(sorted(points)).T
                finite = np.isfinite(means)
                axes.errorbar(
                    rates[finite],
                    means[finite],
                    np.nan_to_num(deviations[finite]),
                    marker=style.marker,
                    markersize=4.5,
                    elinewidth=1,
                    **style.line(),
                )
            _log_rates(axes.xaxis, [rate for points in panel.curves.values() for rate, _, _ in points])
            _linear(axes.yaxis)
        _legend(figure, [_line_handle(styles[name], name, marker=True) for name in names])
        return _svg(figure)
