"""
The pages: tables of text made from the summary, and the two templates that set them.
"""

from __future__ import annotations

import html
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from .plots import BASELINE_COLORS, GRID, INK, MUTED, PAPER, Plot
from .summary import CONFIDENCE, format_interval, format_number, format_rate


class Cell(NamedTuple):
    """Text of one field; what it means: `better`, `worse`, `failed` or nothing; and a second, smaller line."""

    text: str
    kind: str = ""
    note: str = ""


@dataclass(frozen=True)
class Table:
    """
    A table ready to be set.

    Args:
        caption (`str`): What it shows, and how to read it.
        columns (`list[str]`): Heads.
        rows (`list[list[Cell]]`): Fields; the first of a row names it.
        num_text_columns (`int`): So many columns on the left hold words, the others numbers.
        emphasised (`frozenset[int]`): Rows to set apart.
    """

    caption: str
    columns: list[str]
    rows: list[list[Cell]]
    num_text_columns: int = 1
    emphasised: frozenset[int] = frozenset()


# --- the two dictionaries ---------------------------------------------------------------------------------------------


def _dictionary(scores: dict[str, float] | None, clock: dict[str, float] | None) -> str:
    """The scores as `Trainer.evaluate` returns them: metrics, times, and `epoch` at the end."""
    if scores is None:
        return "None"
    merged = {key: value for key, value in scores.items() if key != "epoch"} | (clock or {})
    if "epoch" in scores:
        merged["epoch"] = scores["epoch"]
    lines = [f"    {key!r}: {None if value is None else round(value, 4)!r}," for key, value in merged.items()]
    return "\n".join(["{", *lines, "}"])


def _dictionaries(summary: dict[str, Any]) -> list[dict[str, str]]:
    shown = []
    for name, run in summary["shown_runs"].items():
        status = "" if run["status"] == "completed" else f" (this run {_STATUS[run['status']]})"
        shown.append(
            {
                "task": name,
                "results": _dictionary(summary["results"][name], summary["timing"]["results"][name]),
                "results_of": f"{run['scheduler']} from an initial rate of {format_rate(run['learning_rate'])}, seed "
                f"{run['seed']}{status}",
                "benchmark": _dictionary(
                    summary["benchmark_results"][name], summary["timing"]["benchmark_results"][name]
                ),
            }
        )
    return shown


_STATUS = {"completed": "completed", "diverged": "diverged", "failed": "crashed"}


# --- tables -----------------------------------------------------------------------------------------------------------


def _plan(summary: dict[str, Any]) -> list[Table]:
    plan = summary["plan"]

    def told(values: Iterable[Any]) -> Cell:
        return Cell("; ".join(map(str, values)) or "not recorded")

    tables = []
    for task in plan["tasks"]:
        epochs = [
            f"{steps} steps ({steps / per_epoch:.3g} epochs of {per_epoch})" for steps, per_epoch in task["budgets"]
        ]
        rows = {
            "Data": told(task["source"]),
            "Splits (examples)": told(task["splits"]),
            "Model": told(task["model"]),
            "Optimizer": told(task["optimizer"]),
            "Batch size": told(task["batch_size"]),
            "Schedulers": Cell(", ".join(task["schedulers"])),
            "Initial learning rates": Cell(", ".join(map(format_rate, task["learning_rates"]))),
            "Seeds": Cell(", ".join(map(str, task["seeds"]))),
            "Budget of each run": told(epochs),
        }
        tables.append(
            Table(f"Plan for {task['task']}.", ["", "Plan"], [[Cell(key), cell] for key, cell in rows.items()], 2)
        )
    environment = plan["environment"]
    rows = {
        "Device": told(environment["device"]),
        "Platform": told(environment["platform"]),
        "Threads of a run": told(environment["num_threads"]),
        "Versions": Cell(
            ", ".join(f"{package} {' / '.join(values)}" for package, values in environment["versions"].items())
        ),
        "Commit": told(environment["commit"]),
        "Command": told(environment["command"]),
    }
    tables.append(
        Table("Where the runs were made.", ["", "Environment"], [[Cell(key), cell] for key, cell in rows.items()], 2)
    )
    return tables


def _mean_and_sd(spread: dict[str, float], digits: int = 4) -> str:
    if math.isnan(spread["sd"]):
        return format_number(spread["mean"], digits)
    return f"{format_number(spread['mean'], digits)} ± {format_number(spread['sd'], digits)}"


def _final(cell: dict[str, Any], metric: str) -> Cell:
    text = _mean_and_sd(cell["final"][metric])
    if not cell["num_failed"]:
        return Cell(text)
    # The honest mean of a cell with a failure is useless for reading off how good the others were.
    some_left = cell["num_failed"] < cell["num_runs"]
    note = f"completed: {_mean_and_sd(cell['final_of_completed'][metric])}" if some_left else ""
    return Cell(text, "failed", note)


def _rate(cell: dict[str, Any]) -> Cell:
    return Cell(format_rate(cell["learning_rate"]) + (" *" if cell["tuned"] else ""))


def _emphasised(rows: list[dict[str, Any]], *references: str | None) -> frozenset[int]:
    return frozenset(index for index, row in enumerate(rows) if row["scheduler"] in references)


def _timing_of(summary: dict[str, Any], task: str) -> dict[tuple[str, float], dict[str, Any]]:
    rows = summary["timing"]["cells"]
    return {(row["scheduler"], row["learning_rate"]): row for row in rows if row["task"] == task}


def _small(value: float) -> str:
    return f"{value:.2g}" if math.isfinite(value) else format_number(value)


def _scheduler_table(summary: dict[str, Any], name: str) -> Table:
    task = summary["tasks"][name]
    timings, cells = _timing_of(summary, name), task["cells"]
    measured = list(cells[0]["final"])
    rows = []
    for cell in cells:
        timing = timings[cell["scheduler"], cell["learning_rate"]]
        times = [cell["to_target"][metric]["epochs"] for metric in task["targets"]]
        rows.append(
            [
                Cell(cell["scheduler"]),
                _rate(cell),
                Cell(str(cell["num_runs"])),
                Cell(str(cell["num_failed"]), "failed" if cell["num_failed"] else ""),
                *(_final(cell, metric) for metric in measured),
                *(Cell(format_number(time, 2)) for time in times),
                Cell(_mean_and_sd(timing["train_seconds"], 1)),
                Cell(format_number(cell["learning_rate_stability"])),
                Cell(_small(cell["loss_stability"])),
            ]
        )
    targets = "; ".join(f"{metric} {format_number(target)}" for metric, target in task["targets"].items())
    caption = (
        f"Schedulers on {name}: mean ± standard deviation over n seeds of the final values. * marks the best of a "
        "scheduler's initial rates, by mean final eval_loss. "
    )
    if targets:
        caption += (
            f"Epochs (median) to {targets}: the final values of the best tuned baseline, unless given; ∞: missed. "
        )
    caption += (
        "Rate stability: sd of successive log changes, nats per step. Loss stability: variance of the detrended training "
        "loss. Runs that failed count as the worst value."
    )
    columns = ["Scheduler", "Initial rate", "n", "Failed", *measured]
    columns += [f"Epochs to {metric}" for metric in task["targets"]]
    columns += ["Training time (s)", "Rate stability", "Loss stability"]
    return Table(caption, columns, rows, 1, _emphasised(cells, task["reference"]))


def _convergence_table(summary: dict[str, Any], name: str) -> Table:
    task = summary["tasks"][name]
    timings, cells = _timing_of(summary, name), task["cells"]
    curves = list(cells[0]["area_under_curve"])
    rows = []
    for cell in cells:
        timing = timings[cell["scheduler"], cell["learning_rate"]]
        row = [Cell(cell["scheduler"]), _rate(cell)]
        for metric in task["targets"]:
            reached = cell["to_target"][metric]
            row += [
                Cell(f"{reached['reached']} of {cell['num_runs']}"),
                Cell(format_number(reached["steps"], 0)),
                Cell(format_number(timing["to_target"][metric]["seconds"], 1)),
            ]
        row += [Cell(_mean_and_sd(cell["best"][metric])) for metric in curves]
        row += [Cell(format_number(cell["area_under_curve"][metric])) for metric in curves]
        memory = timing["peak_memory_bytes"]
        row += [
            Cell(format_number(cell["learning_rate_range"], 2)),
            Cell("n/a" if math.isnan(timing["controller_share"]) else f"{timing['controller_share']:.2%}"),
            Cell("n/a" if memory is None else f"{memory / 2**20:.0f}"),
        ]
        rows.append(row)
    columns = ["Scheduler", "Initial rate"]
    for metric in task["targets"]:
        columns += [f"Reached {metric}", "Steps", "Seconds"]
    columns += [f"Best {metric}" for metric in curves] + [f"Area, {metric}" for metric in curves]
    columns += ["Rate range (decades)", "Controller", "Peak memory (MiB)"]
    caption = (
        f"Convergence and cost on {name}: runs that reached each target, median steps and training seconds to it; best "
        "value of any evaluation; area under the learning curve over steps, from where all runs have been evaluated, divided by "
        "its length; the controller's "
        "share of the training time."
    )
    return Table(caption, columns, rows, 1, _emphasised(cells, task["reference"]))


def _verdict_cell(row: dict[str, Any]) -> Cell:
    kind = {"better": "better", "worse": "worse"}.get(row["verdict"], "")
    if row["num_pairs"] < 2:
        return Cell("one seed: no verdict" if row["num_pairs"] else "no common seed")
    return Cell(row["verdict"], kind)


def _difference_cells(row: dict[str, Any]) -> list[Cell]:
    return [
        Cell(str(row["num_pairs"])),
        Cell(format_number(row["advantage"])),
        Cell(format_interval(row["interval"])),
        Cell(format_number(row["p_value"], 3)),
        Cell(format_number(row.get("p_holm"), 3)),
        _verdict_cell(row),
    ]


_DIFFERENCE_COLUMNS = ["n", "Advantage", f"{CONFIDENCE:.0%} interval", "p", "Holm p", "Verdict"]
_READING = (
    "Advantage: mean over shared seeds, positive where {reference} is better, with Student's interval. p: sign-flip "
    "permutation test; Holm p: corrected over this table and metric. The verdict is “better” or “worse” only where the "
    "interval excludes zero."
)


def _difference_tables(summary: dict[str, Any], name: str) -> list[Table]:
    task = summary["tasks"][name]
    reference, comparisons = task["reference"], task["comparisons"]
    if not comparisons["tuned"]:
        return []
    reading = _READING.format(reference=reference)
    best = comparisons["tuned"][0]["learning_rate"]
    num_rates = Counter(cell["scheduler"] for cell in task["cells"])
    tables = [
        Table(
            f"Both tuned, {name}: {reference} from {format_rate(best)}, the best of {num_rates[reference]}, against each "
            f"other scheduler at the best of the rates it was run from. {reading}",
            ["Against", "Metric", "Its rate", "Best of", *_DIFFERENCE_COLUMNS],
            [
                [
                    Cell(row["other"]),
                    Cell(row["metric"]),
                    Cell(format_rate(row["other_learning_rate"])),
                    Cell(str(num_rates[row["other"]])),
                    *_difference_cells(row),
                ]
                for row in comparisons["tuned"]
            ],
            2,
        )
    ]
    untuned = comparisons["without_tuning"]
    if untuned:
        tables.append(
            Table(
                f"Without tuning, {name}: {reference} at every initial rate against the best cell of all tuned baselines. "
                f"Regret: how far {reference} stays behind that cell; negative where it is ahead.",
                ["Initial rate", "Metric", "Best cell", "Regret", *_DIFFERENCE_COLUMNS],
                [
                    [
                        Cell(format_rate(row["learning_rate"])),
                        Cell(row["metric"]),
                        Cell(f"{row['other']} at {format_rate(row['other_learning_rate'])}"),
                        Cell(format_number(row["regret"])),
                        *_difference_cells(row),
                    ]
                    for row in untuned
                ],
                3,
            )
        )
    if len({row["learning_rate"] for row in comparisons["same_rate"]}) > 1:
        tables.append(
            Table(
                f"At the same initial rate, {name}: {reference} against each other scheduler.",
                ["Against", "Metric", "Initial rate", *_DIFFERENCE_COLUMNS],
                [
                    [
                        Cell(row["other"]),
                        Cell(row["metric"]),
                        Cell(format_rate(row["learning_rate"])),
                        *_difference_cells(row),
                    ]
                    for row in comparisons["same_rate"]
                ],
                2,
            )
        )
    return tables


def _overall_tables(summary: dict[str, Any]) -> list[Table]:
    overall = summary["overall"]
    scores = {task["score"] for task in summary["tasks"].values()}
    words = {"score": scores.pop() if len(scores) == 1 else "score", "eval_loss": "eval_loss"}

    def with_interval(row: dict[str, Any]) -> Cell:
        return Cell(f"{format_number(row['iqm'])} {format_interval(row['interval'])}")

    several = len(overall["tasks"]) > 1
    of_which = f" Of {', '.join(overall['tasks'])}, the first {overall['num_seeds']} seeds of each."
    tables = [
        Table(
            (
                "Interquartile mean over seeds and tasks of what the final values are short of the best (0: the best cell of "
                "a task, 1: its models before training; lower is better)"
                if several
                else "Interquartile mean of the final values over seeds"
            )
            + ", with 95 % stratified bootstrap intervals: at the best of the rates that each scheduler was run from, and over all "
            "of them together, as a user would fare who picks one of them blindly." + of_which,
            ["Scheduler", "Metric", "Tasks", "At the best rate", "Over all rates"],
            [
                [
                    Cell(row["scheduler"]),
                    Cell(words[row["metric"]]),
                    Cell(str(row["num_tasks"])),
                    with_interval(row["tuned"]),
                    with_interval(row["all_rates"]),
                ]
                for row in overall["interquartile_means"]
            ],
            2,
            _emphasised(overall["interquartile_means"], *(task["reference"] for task in summary["tasks"].values())),
        )
    ]
    rows = overall["probability_of_improvement"]
    if rows:
        tables.append(
            Table(
                f"Probability that a run of {rows[0]['scheduler']} beats a run of the other on a random task, both at "
                "their best rates; ties count one half." + of_which,
                ["Against", "Metric", "Tasks", "Probability", f"{CONFIDENCE:.0%} interval"],
                [
                    [
                        Cell(row["other"]),
                        Cell(words[row["metric"]]),
                        Cell(str(row["num_tasks"])),
                        Cell(format_number(row["probability"], 3)),
                        Cell(format_interval(row["interval"], 3)),
                    ]
                    for row in rows
                ],
                2,
            )
        )
    profile = overall["performance_profile"]
    if profile["num_workloads"]:
        tables.append(
            Table(
                f"Performance profile over {profile['num_workloads']} workloads (one seed of one task): share on which the "
                "target loss is reached within so many times the steps of the fastest.",
                ["Scheduler", *(f"{factor:g}x" for factor in profile["factors"])],
                [
                    [Cell(name), *(Cell(f"{share:.0%}") for share in shares)]
                    for name, shares in profile["shares"].items()
                ],
            )
        )
    return tables


def _failure_table(summary: dict[str, Any]) -> Table | None:
    if not summary["failures"]:
        return None
    return Table(
        "Runs that did not complete. They count as the worst value and as never reaching a target.",
        ["Task", "Scheduler", "Initial rate", "Seed", "Outcome", "Error"],
        [
            [
                Cell(row["task"]),
                Cell(row["scheduler"]),
                Cell(format_rate(row["learning_rate"])),
                Cell(str(row["seed"])),
                Cell(_STATUS[row["status"]], "failed"),
                Cell(row["error"] or "not recorded"),
            ]
            for row in summary["failures"]
        ],
        6,
    )


# --- setting ----------------------------------------------------------------------------------------------------------


_THEMED = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper", BASELINE_COLORS[0]: "blue"}


def _inline_svg(plot: Plot) -> Markup:
    """
    The drawing as part of the page: it takes the page's width and colours, and keeps its ids apart from those of the
    other drawings.
    """
    svg = plot.svg[plot.svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'\bid="', f'id="{plot.name}-', svg)
    svg = svg.replace("url(#", f"url(#{plot.name}-").replace('href="#', f'href="#{plot.name}-')
    for color, name in _THEMED.items():
        svg = svg.replace(color, f"var(--{name})")
    label = html.escape(plot.caption, quote=True)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1))


def _markdown_text(text: str) -> str:
    """One line of text that is neither markup nor the end of a table's field."""
    text = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\|*_`\[\]])", r"\\\1", text)


def _markdown_code(text: str) -> str:
    # A fence ends at a line of backticks; the dictionaries hold names of metrics and numbers only.
    return text.replace("```", "` ` `")


def _studies_table(evidence: dict[str, Any]) -> Table:
    rows = [
        [
            Cell(name),
            Cell(study["title"]),
            Cell(study["recipe"]),
            Cell(study["caption"]),
            Cell(format_rate(study["learning_rate"])),
            Cell(f"{study['num_runs']} of {study['num_planned']}"),
            Cell(_duration(study["run_seconds"])),
        ]
        for name, study in evidence["studies"].items()
    ]
    return Table(
        "The studies. Wall-clock is the sum over runs, of which several may have run at a time.",
        ["Study", "What", "Recipe", "Size", "Initial rate of the recipe", "Runs", "Wall-clock"],
        rows,
        5,
    )


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{seconds / 60:.1f} min"


def _changes_tables(evidence: dict[str, Any]) -> list[Table]:
    return [
        Table(
            f"{name}: {study['recipe']} beside {study['updated']}; what is not named is the same.",
            ["Option", "Original", "Updated"],
            [[Cell(option), Cell(before), Cell(after)] for option, before, after in study["changes"]],
            3,
        )
        for name, study in evidence["studies"].items()
        if study["changes"]
    ]


def _context(summary: dict[str, Any], plots: list[Plot]) -> dict[str, Any]:
    names = list(summary["tasks"])
    evidence = summary.get("evidence")

    def figures(section: str, task: str | None = None) -> list[Plot]:
        return [plot for plot in plots if plot.section == section and plot.task == task]

    def captioned(tables: list[Table], name: str) -> list[Table]:
        """With the size of the runs in each caption, where a plan says it."""
        if evidence is None:
            return tables
        return [replace(table, caption=f"{table.caption} {evidence['studies'][name]['caption']}") for table in tables]

    return {
        "title": evidence["title"] if evidence else f"Learning-rate schedulers on {', '.join(names)}",
        "idea": evidence["idea"] if evidence else [],
        "studies": _studies_table(evidence) if evidence else None,
        "changes": _changes_tables(evidence) if evidence else [],
        "commands": [
            {"name": name, "lines": study["commands"]}
            for name, study in (evidence["studies"] if evidence else {}).items()
        ],
        "num_runs": summary["plan"]["num_runs"],
        "num_failed": len(summary["failures"]),
        "dictionaries": _dictionaries(summary),
        "plan": _plan(summary),
        "checks": summary["plan"]["checks"],
        "tasks": [
            {
                "name": name,
                "tables": captioned([_scheduler_table(summary, name), _convergence_table(summary, name)], name),
                "figures": {part: figures(part, name) for part in ("schedulers", "traces", "targets", "differences")},
                "differences": captioned(_difference_tables(summary, name), name),
            }
            for name in names
        ],
        "overall": {"tables": _overall_tables(summary), "figures": figures("overall")},
        "failures": _failure_table(summary),
        "analysis": [*summary["analysis"], *summary["timing"]["analysis"]],
        "conclusion": summary["conclusion"],
    }


def _template(name: str, autoescape: bool) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters.update(svg=_inline_svg, text=_markdown_text, code=_markdown_code)
    return environment.get_template(name)


def render_html(summary: dict[str, Any], plots: list[Plot]) -> str:
    """
    One self-contained page: styles and drawings inside, no script, no request to anywhere.

    Args:
        summary (`dict[str, Any]`): From [`summarize`].
        plots (`list[Plot]`): From [`draw_plots`].

    Returns:
        `str`: The page.
    """
    return _template("report.html.jinja", autoescape=True).render(_context(summary, plots))


def render_markdown(summary: dict[str, Any], plots: list[Plot], plots_folder: str) -> str:
    """
    The same in Markdown, with the drawings as files.

    Args:
        summary (`dict[str, Any]`): From [`summarize`].
        plots (`list[Plot]`): From [`draw_plots`].
        plots_folder (`str`): Where the drawings lie, as seen from the file.

    Returns:
        `str`: The text.
    """
    # Not HTML: every shown string goes through the `text` or the `code` filter instead.
    return _template("report.md.jinja", autoescape=False).render(_context(summary, plots), folder=plots_folder)
