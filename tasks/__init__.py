"""
The supervised problems of both reports: GLUE, IMDB, CIFAR-10 and Titanic, each with its data, model and metrics.

A task says nothing about learning rates. `TASKS` maps each name to a [`Task`]; importing this package loads no data
library: torchvision, scikit-learn and datasets are imported when a task is prepared.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from hf_alrs.experiment import DataArguments, InputError, PreparedTask, Task


__all__ = ["TASKS", "get_task"]

RECIPES = Path(__file__).parent / "recipes"


def _prepare_text(arguments: DataArguments) -> PreparedTask:
    from .text import prepare_text

    return prepare_text(arguments)


def _prepare_vision(arguments: DataArguments) -> PreparedTask:
    from .vision import prepare_vision

    return prepare_vision(arguments)


def _prepare_tabular(arguments: DataArguments) -> PreparedTask:
    from .tabular import prepare_tabular

    return prepare_tabular(arguments)


_GLUE = {
    "sst2": "sentiment of film-review phrases",
    "cola": "is the sentence acceptable English",
    "mrpc": "do two news sentences say the same",
    "qqp": "are two questions duplicates",
    "stsb": "similarity of two sentences, a regression on 0 to 5",
    "mnli": "entailment between two sentences, evaluated on the matched validation split",
    "qnli": "does the sentence answer the question",
    "rte": "entailment between two sentences, small",
    "wnli": "Winograd sentences as entailment, very small",
}

TASKS: dict[str, Task] = {
    name: Task(
        name=name,
        kind="text",
        prepare=_prepare_text,
        recipe=RECIPES / ("sst2.yaml" if name == "sst2" else "glue.yaml"),
        description=f"GLUE {name}: {description}.",
    )
    for name, description in _GLUE.items()
}
TASKS["imdb"] = Task(
    name="imdb",
    kind="text",
    prepare=_prepare_text,
    recipe=RECIPES / "imdb.yaml",
    description="IMDB: sentiment of whole film reviews, a bidirectional LSTM over words by default.",
)
TASKS["cifar10"] = Task(
    name="cifar10",
    kind="vision",
    prepare=_prepare_vision,
    recipe=RECIPES / "cifar10-cnn.yaml",
    description="CIFAR-10: ten kinds of 32x32 photographs, a small CNN or a ResNet-18.",
)
TASKS["titanic"] = Task(
    name="titanic",
    kind="tabular",
    prepare=_prepare_tabular,
    recipe=RECIPES / "titanic.yaml",
    description="Titanic: who survived, a small dense network; any other CSV with a label column works too.",
)


def get_task(name: str) -> Task:
    """
    Returns the task of that name.

    Args:
        name (`str`): A key of `TASKS`.

    Raises:
        InputError: If there is no such task; the message lists the names and the nearest one.
    """
    if name in TASKS:
        return TASKS[name]
    nearest = difflib.get_close_matches(str(name).lower(), TASKS, n=1, cutoff=0.4)
    hint = f"did you mean `{nearest[0]}`?" if nearest else "choose one of them."
    raise InputError("task_name", name, f"must be one of {', '.join(TASKS)};", hint)
