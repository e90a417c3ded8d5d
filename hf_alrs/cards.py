"""
What a published repository shows: the rows of a results dataset, and the cards of datasets, Spaces and trained models.

A card says what the files of the run say and nothing else. Folders are named without the path that leads to them, since
that is of no use to others.
"""

from __future__ import annotations

import datetime
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import datasets
import matplotlib
import yaml
from datasets import Dataset, Features, List, Value
from huggingface_hub import (
    DatasetCardData,
    EvalResult,
    EvalResultEntry,
    ModelCardData,
    SpaceCardData,
    eval_result_entries_to_yaml,
)
from matplotlib.figure import Figure

from .report.plots import GRID, INK, MUTED, PHASE_SHADES, REFERENCE_COLOR


RUNS_FILE = "data/train-00000-of-00001.parquet"
TRACE_FILE, RECIPE_FILE, CARD_FILE = "learning_rate.png", "recipe.yaml", "README.md"
PIPELINES = {"text": "text-classification", "vision": "image-classification", "tabular": "tabular-classification"}
# Options that say where and how a run was watched, not what it was
_NOT_RECIPE = re.compile(
    r"(output_dir|config|push_to_hub|hub_.*|report_to|run_name|logging_dir|disable_tqdm|log_level.*|do_.*|"
    r"resume_from_checkpoint|trackio_.*|project|local_rank|debug)"
)
# What of an `output_dir` makes up a published model
MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "*processor_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.model",
    "alrs_history.jsonl",
    "*_results.json",
    TRACE_FILE,
    RECIPE_FILE,
    CARD_FILE,
    ".eval_results/*.yaml",
)
_METRIC_NAMES = {"f1": "F1", "loss": "Loss", "accuracy": "Accuracy"}


# --- results: rows ----------------------------------------------------------------------------------------------------


def flatten(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names: `{"a": {"b": 1}}` becomes `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in record.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def result_rows(records: Mapping[str, Mapping[str, Any]]) -> Dataset:
    """
    Stored runs as a table, one row each: every setting and score in a column of its own, the histories as lists.

    Args:
        records (`Mapping[str, Mapping]`): File name -> content of a result file.

    Returns:
        `Dataset`: Columns of one plain type each; what has several types over the runs is written as JSON.
    """
    rows = [{"file": name, **flatten(record)} for name, record in records.items()]
    names = dict.fromkeys(name for row in rows for name in row)
    columns: dict[str, list[Any]] = {}
    features: dict[str, Any] = {}
    for name in names:
        columns[name], features[name] = _column([row.get(name) for row in rows])
    return Dataset.from_dict(columns, features=Features(features))


def _column(values: list[Any]) -> tuple[list[Any], Any]:
    """The values in one type, and its feature."""
    for kinds, feature in (((bool,), "bool"), ((int,), "int64"), ((int, float), "float64"), ((str,), "string")):
        if _are(values, kinds):
            return [float(v) if feature == "float64" and v is not None else v for v in values], Value(feature)
    lists = [value for value in values if value is not None]
    if all(isinstance(value, list) for value in lists):
        items = [item for value in lists for item in value]
        if _are(items, (int, float)):
            numbers = [v and [None if item is None else float(item) for item in v] for v in values]
            return numbers, List(Value("float64"))
        if _are(items, (str,)):
            return values, List(Value("string"))
    return [None if value is None else json.dumps(value) for value in values], Value("string")


def _are(values: Iterable[Any], kinds: tuple[type, ...]) -> bool:
    # type() and not isinstance: a bool is an int
    return all(value is None or type(value) in kinds for value in values)


def parquet_bytes(rows: Dataset) -> bytes:
    """The table as a parquet file."""
    buffer = io.BytesIO()
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        rows.to_parquet(buffer)
    finally:
        if shown:
            datasets.enable_progress_bars()
    return buffer.getvalue()


# --- results: cards ---------------------------------------------------------------------------------------------------


def results_card(repo_id: str, summary: Mapping[str, Any], has_space: bool) -> str:
    """
    The card of a results dataset; its metadata tells the viewer where the rows are.

    Args:
        repo_id (`str`): `user/name`.
        summary (`Mapping`): Content of the report's `results.json`.
        has_space (`bool`): Whether the report is published as a Space of the same name.
    """
    plan = summary["plan"]
    data = DatasetCardData(
        pretty_name=f"Learning-rate schedulers on {', '.join(summary['tasks'])}",
        tags=["hf-alrs", "learning-rate"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": RUNS_FILE}]}],
    )
    report = f"The [report](https://huggingface.co/spaces/{repo_id}) is a Space. " if has_space else ""
    lines = [
        f"# {data.pretty_name}",
        "",
        f"{plan['num_runs']} training runs that `hf-alrs` compared, one row each: settings, versions, scores after and",
        "before training, times, and the loss and learning rate of every step. The files in `results/` are those that the",
        f"runs were stored in. {report}",
        "",
        "```bash",
        f"hf-alrs pull {repo_id} --output_dir RESULTS   # the files as they were",
        "hf-alrs report RESULTS OTHER_RESULTS           # one leaderboard with other results",
        "```",
        "",
        "```python",
        f'load_dataset("{repo_id}", split="train")',
        "```",
        "",
        *_task_lines(summary),
        "## Conclusion",
        "",
        *(f"- {sentence['text']}" for sentence in summary["conclusion"]),
        "",
        *([] if not plan["checks"] else ["Not every run can be compared with every other:", ""]),
        *(f"- {problem}" for problem in plan["checks"]),
    ]
    return _card(data, lines)


def _task_lines(summary: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    for task in summary["plan"]["tasks"]:
        table = summary["tasks"][task["task"]]
        score = table["score"]
        lines += [f"## {task['task']}", "", f"Data: {'; '.join(_shown_source(s) for s in task['source'])}.", ""]
        lines += [f"| scheduler | initial rate | runs | eval_loss | {score} |", "| --- | ---: | ---: | ---: | ---: |"]
        for cell in sorted((c for c in table["cells"] if c["tuned"]), key=lambda c: _number(c["final"]["eval_loss"])):
            final = [_spread(cell["final"][metric]) for metric in ("eval_loss", score)]
            lines.append(
                f"| {cell['scheduler']} | {cell['learning_rate']:g} | {cell['num_runs']} | {' | '.join(final)} |"
            )
        lines += ["", "Mean and standard deviation over seeds, each scheduler at its best initial rate.", ""]
    return lines


def _number(spread: Mapping[str, Any]) -> float:
    return math.inf if spread["mean"] is None else float(spread["mean"])


def _spread(spread: Mapping[str, Any]) -> str:
    mean, sd = (None if spread[key] is None else float(spread[key]) for key in ("mean", "sd"))
    if mean is None:
        return "n/a"
    return f"{mean:.4f}" if sd is None or not math.isfinite(sd) else f"{mean:.4f} ± {sd:.4f}"


def space_card(repo_id: str, title: str) -> str:
    """The card of the static Space that shows `report.html` as its `index.html`."""
    data = SpaceCardData(
        title=title[:60],
        emoji="📈",
        colorFrom="blue",
        colorTo="yellow",
        sdk="static",
        app_file="index.html",
        pinned=False,
        datasets=[repo_id],
        tags=["hf-alrs", "learning-rate"],
    )
    dataset = f"https://huggingface.co/datasets/{repo_id}"
    return _card(
        data, [f"# {title}", "", f"The report of the runs in [{repo_id}]({dataset}), made by `hf-alrs report`."]
    )


def _card(data: Any, lines: Iterable[str]) -> str:
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines).strip() + "\n"


# --- a trained model --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainedModel:
    """
    What a run says of itself.

    Args:
        folder (`Path`): Its `output_dir`: the dictionaries and the history are read from there.
        name (`str`): What the card is headed with.
        kind (`str`): `"text"`, `"vision"` or `"tabular"`.
        task (`str`): Name of the task.
        scheduler (`str`): What set the learning rate.
        architecture (`str`): Class of the model.
        source (`str`): Where the data came from, as `PreparedTask.source` says it.
        splits (`Mapping[str, int]`): Examples in each split.
        metric (`str`): The task's score, with its prefix.
        options (`Mapping[str, Any]`): Options of the run: those that the recipe of its task or its caller set.
        versions (`Mapping[str, str]`): Of the packages.
        base_model (`str`, *optional*): Hub id or folder of the pretrained model.
    """

    folder: Path
    name: str
    kind: str
    task: str
    scheduler: str
    architecture: str
    source: str
    splits: Mapping[str, int]
    metric: str
    options: Mapping[str, Any]
    versions: Mapping[str, str | None]
    base_model: str | None = None

    @property
    def is_alrs(self) -> bool:
        return self.scheduler.startswith("alrs")

    @property
    def dataset(self) -> tuple[str, str | None] | None:
        """Hub id and configuration of the data; `None` for the built-in sample and for local files."""
        found = re.match(r"Hub dataset ([^\s,;]+)(?:, configuration ([^\s,;]+))?", self.source)
        return (found[1], found[2]) if found else None

    @property
    def recipe(self) -> dict[str, Any]:
        """Options that `--config` takes to run it again."""
        return recipe_of(self.task, self.options)

    def metrics(self, which: str) -> dict[str, float]:
        """`"eval"` or `"benchmark"` results of the run, empty where it was not evaluated."""
        path = self.folder / f"{which}_results.json"
        return json.loads(path.read_text()) if path.is_file() else {}


def recipe_of(task: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run that say what it is, with its task."""
    chosen = {"task_name": task, **{k: v for k, v in options.items() if not _NOT_RECIPE.fullmatch(k)}}
    return {key: _shown_path(value) for key, value in chosen.items() if value is not None}


def _is_local(name: str) -> bool:
    return name.startswith(("/", "~", ".")) or Path(name).exists()


def _shown_path(value: Any) -> Any:
    """Folders of this machine by their last name, everything else as it is."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, str) and _is_local(value):
        return Path(value).name or value
    if isinstance(value, (list, tuple)):
        return [_shown_path(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, dict)) else str(value)


def _shown_source(source: str) -> str:
    """The description of the data, with a local path cut to its last name."""
    return re.sub(r"^(local (?:folder|file)) (.+?)(?=; |$)", lambda m: f"{m[1]} {Path(m[2]).name}", source)


def write_model_card(model: TrainedModel) -> list[str]:
    """
    Writes the card of a trained model into its folder, with the plot, the recipe and, for data of the Hub, the
    evaluation in `.eval_results/`.

    Returns:
        `list[str]`: Names of the files, relative to the folder.
    """
    recipe = yaml.safe_dump(model.recipe, sort_keys=False, allow_unicode=True)
    (model.folder / RECIPE_FILE).write_text(recipe, encoding="utf-8")
    written = [RECIPE_FILE]
    history = read_history(model.folder)
    if history:
        (model.folder / TRACE_FILE).write_bytes(trace_plot(history))
        written.append(TRACE_FILE)
    entries = eval_entries(model)
    if entries:
        path = model.folder / ".eval_results" / f"{model.task}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False), encoding="utf-8")
        written.append(str(path.relative_to(model.folder)))
    (model.folder / CARD_FILE).write_text(model_card(model, history, recipe), encoding="utf-8")
    return [*written, CARD_FILE]


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Step, learning rate and phase of each step: from ALRS's own history, else from what the Trainer logged."""
    path = folder / "alrs_history.jsonl"
    if path.is_file():
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    else:
        path = folder / "trainer_state.json"
        logged = json.loads(path.read_text())["log_history"] if path.is_file() else []
        lines = [line for line in logged if "learning_rate" in line]
    return [line for line in lines if line.get("learning_rate") is not None]


def trace_plot(history: Sequence[Mapping[str, Any]]) -> bytes:
    """The learning rate of every step on a log axis, with the phases as shades, as a PNG."""
    with matplotlib.rc_context(
        {"font.family": "sans-serif", "font.size": 9, "text.color": INK, "axes.edgecolor": MUTED}
    ):
        figure = Figure(figsize=(6.4, 3.2), dpi=120, layout="constrained")
        axes = figure.add_subplot()
        # The anneal ends at 0, which a log axis has no place for.
        shown = [line for line in history if line["learning_rate"] > 0]
        axes.plot([line["step"] for line in shown], [line["learning_rate"] for line in shown], color=REFERENCE_COLOR)
        if shown:
            rates = sorted(line["learning_rate"] for line in shown)
            axes.set_yscale("log")
            axes.set_ylim(max(rates[len(rates) // 33], rates[-1] * 1e-7) / 1.6, rates[-1] * 1.6)
        labelled = set()
        for phase, start, end in _phases(history):
            color, alpha = PHASE_SHADES.get(phase, (MUTED, 0.1))
            label = None if phase in labelled else f"phase: {phase}"
            labelled.add(phase)
            axes.axvspan(start, end, color=color, alpha=alpha, linewidth=0, label=label)
        axes.set(xlabel="optimizer steps", ylabel="learning rate")
        axes.grid(color=GRID, linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        if labelled:
            axes.legend(frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _phases(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, int]]:
    spans: list[tuple[str, int, int]] = []
    for line in history:
        phase, step = line.get("phase"), line["step"]
        if phase is None:
            continue
        if spans and spans[-1][0] == phase:
            spans[-1] = (phase, spans[-1][1], step)
        else:
            spans.append((phase, step - 1, step))
    return spans


def eval_entries(model: TrainedModel) -> list[EvalResultEntry]:
    """The task's score for the leaderboard of its dataset; none for data that is not on the Hub."""
    value = model.metrics("eval").get(model.metric)
    if value is None or model.dataset is None:
        return []
    name, config = model.dataset
    notes = f"{model.metric.removeprefix('eval_')} on {model.splits['eval']} examples; {_shown_source(model.source)}"
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return [EvalResultEntry(dataset_id=name, task_id=config or "default", value=value, date=today, notes=notes)]


def eval_results(model: TrainedModel) -> list[EvalResult]:
    """The scores for the `model-index` of the card."""
    pipeline = PIPELINES[model.kind]
    # Data of one's own has no name on the Hub, and is not what the task is called after
    name, config = model.dataset or ("local", None)
    return [
        EvalResult(
            task_type=pipeline,
            task_name=pipeline.replace("-", " ").capitalize(),
            dataset_type=name,
            dataset_name=model.task if model.dataset else _shown_source(model.source),
            dataset_config=config,
            metric_type=key.removeprefix("eval_"),
            metric_name=_METRIC_NAMES.get(key.removeprefix("eval_"), key.removeprefix("eval_").replace("_", " ")),
            metric_value=value,
        )
        for key, value in model.metrics("eval").items()
        if key.startswith("eval_") and not key.endswith(("runtime", "_per_second", "_time"))
    ]


def _how_to_load(model: TrainedModel) -> list[str]:
    """For a model that transformers does not know by itself."""
    if model.base_model:
        return []
    auto = f"AutoModelFor{'Image' if model.kind == 'vision' else 'Sequence'}Classification"
    return [
        "The architecture is one of hf-alrs, which has to be installed:",
        "",
        "```python",
        "import tasks.models  # makes it known to transformers",
        f"from transformers import {auto}",
        "",
        f'model = {auto}.from_pretrained("USER/{model.name}")',
        "```",
        "",
    ]


def model_card(model: TrainedModel, history: Sequence[Mapping[str, Any]], recipe: str) -> str:
    """The text of the card; see `write_model_card`."""
    results = eval_results(model)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=PIPELINES[model.kind],
        tags=["hf-alrs", "learning-rate", "generated_from_trainer"],
        base_model=model.base_model
        if model.base_model and _shown_path(model.base_model) == model.base_model
        else None,
        datasets=[model.dataset[0]] if model.dataset else None,
        metrics=[r.metric_type for r in results if r.metric_type != "loss"] or None,
        model_name=model.name,
        eval_results=results or None,
    )
    began = (
        f"`{_shown_path(model.base_model)}`, fine-tuned" if model.base_model else f"`{model.architecture}`, trained"
    )
    if model.is_alrs:
        driver = (
            "Its learning rate was set while it trained, by a small network that watched the run: `ALRSCallback` of "
            "hf-alrs, by way of `ALRSTrainer`"
            + (f" (scheduler `{model.scheduler}`)." if model.scheduler != "alrs" else ".")
        )
    else:
        driver = (
            f"Its learning rate followed the scheduler `{model.scheduler}`: a run of hf-alrs for comparison, without "
            "`ALRSCallback`."
        )
    splits = ", ".join(f"{name} {size:,}" for name, size in model.splits.items())
    lines = [
        f"# {model.name}",
        "",
        f"{began} on {model.task if model.dataset else f'the data below, read as the task {model.task}'}. {driver}",
        "",
        f"Data: {_shown_source(model.source)}. Examples: {splits}. The split `controller`, carved from train, may drive the",
        "learning rate; `eval` is the one that is reported.",
        "",
        *_how_to_load(model),
        "## Results",
        "",
        *_dictionary(model.metrics("eval")),
        "",
        "## Benchmark Results",
        "",
        "The same model before training.",
        "",
        *_dictionary(model.metrics("benchmark")),
        "",
        *_trace_lines(history),
        "## Recipe",
        "",
        f"`{RECIPE_FILE}` in this repository, for `--config` of the run scripts and of `hf-alrs train`:",
        "",
        "```yaml",
        recipe.strip(),
        "```",
        "",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in model.versions.items() if version) + ".",
    ]
    return _card(data, lines)


def _dictionary(metrics: Mapping[str, float]) -> list[str]:
    if not metrics:
        return ["The run was not evaluated."]
    return ["```json", json.dumps(dict(metrics), indent=4), "```"]


def _trace_lines(history: Sequence[Mapping[str, Any]]) -> list[str]:
    if not history:
        return []
    first, last = history[0], history[-1]
    peak = max(history, key=lambda line: line["learning_rate"])
    return [
        "## Learning rate",
        "",
        f"![Learning rate of every optimizer step]({TRACE_FILE})",
        "",
        f"From {first['learning_rate']:.3g} at step {first['step']} to {last['learning_rate']:.3g} at step {last['step']}; "
        f"the highest is {peak['learning_rate']:.3g} at step {peak['step']}.",
        "",
    ]


def model_files(folder: Path) -> dict[str, Path]:
    """
    What of an `output_dir` makes up the published model: weights, config, preprocessing and the card with its files.

    Checkpoints, pickles and files of other origin stay where they are.
    """
    found = {path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()}
    return {path.relative_to(folder).as_posix(): path for path in sorted(found)}
