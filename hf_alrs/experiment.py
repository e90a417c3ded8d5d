"""What an experiment is made of: a task, one run of it, and a resumable matrix of runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .config import InputError


__all__ = ["DataArguments", "InputError", "PreparedTask", "Task"]


@dataclass
class DataArguments:
    """
    Where a task takes its data and its model from. One dataclass serves every task and the command line.
    """

    task_name: str = field(default="sst2", metadata={"help": "Name of the task; `hf-alrs tasks` lists them."})
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, local folder or file (parquet, csv, json, image folder), or `sample` for the built-in "
            "offline sample. Default: the task's own Hub id."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a pretrained model. Default: the task's own model."}
    )
    model_type: str | None = field(
        default=None,
        metadata={"help": "Built-in model of the task where it has several (cifar10: `cnn`, `resnet18`)."},
    )
    text_column: str | None = field(default=None, metadata={"help": "Column that holds the text."})
    text_pair_column: str | None = field(default=None, metadata={"help": "Column that holds the second sentence."})
    image_column: str | None = field(default=None, metadata={"help": "Column that holds the image."})
    label_column: str | None = field(default=None, metadata={"help": "Column that holds the label."})
    max_seq_length: int | None = field(default=None, metadata={"help": "Longer texts are cut to this many tokens."})
    augmentation: str = field(default="standard", metadata={"help": "Images: `standard`, `report` or `none`."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Stratified, seeded subset of the train split (before the controller's)."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Stratified, seeded subset of the eval split."}
    )
    controller_split: float = field(
        default=0.1, metadata={"help": "Share of train carved out for the controller; 0 carves none."}
    )
    data_seed: int = field(default=0, metadata={"help": "Seed of the splits and subsets."})
    num_folds: int = field(
        default=5, metadata={"help": "Tabular data without an eval split: 1/num_folds is held out."}
    )
    fold: int = field(default=0, metadata={"help": "Which of the folds is held out."})


@dataclass
class PreparedTask:
    """
    A task with its data loaded: everything a `Trainer` needs and nothing about learning rates.

    Args:
        train_dataset, controller_dataset, eval_dataset (`torch.utils.data.Dataset`):
            Disjoint. `controller_dataset` is carved from train and is the only data besides train that may drive the
            learning rate; `None` when `controller_split` is 0.
        predict_dataset (`Dataset`, *optional*): Examples without a label, where the source has such a split.
        model_init (`Callable[[], PreTrainedModel]`): Builds the model; draws its weights from torch's global generator.
        data_collator (`Callable`): Examples to a batch.
        compute_metrics (`Callable[[EvalPrediction], dict[str, float]]`): Metrics without the `eval_` prefix.
        processing_class (*optional*): Tokenizer, image processor or feature extractor saved beside the model.
        label_names (`list[str]`, *optional*): Class names; `None` for regression.
        source (`str`): Where the data came from, in words, for the report (says so where it is synthetic).
        metric_for_best (`str`): Key of the metric that is "the" score, with its prefix.
    """

    train_dataset: Any
    eval_dataset: Any
    model_init: Callable[[], Any]
    data_collator: Callable[[list[Any]], dict[str, Any]]
    compute_metrics: Callable[[Any], dict[str, float]]
    controller_dataset: Any = None
    predict_dataset: Any = None
    processing_class: Any = None
    label_names: list[str] | None = None
    source: str = ""
    metric_for_best: str = "eval_accuracy"


@dataclass(frozen=True)
class Task:
    """
    A supervised problem that models are trained on.

    Args:
        name (`str`): What `--task_name` calls it.
        kind (`str`): `"text"`, `"vision"` or `"tabular"`.
        prepare (`Callable[[DataArguments], PreparedTask]`): Loads the data, checks it, and says how to build the model.
        recipe (`Path`): YAML file with the training arguments of the report, as the command line spells them.
        description (`str`): One line for `hf-alrs tasks`.
    """

    name: str
    kind: str
    prepare: Callable[[DataArguments], PreparedTask]
    recipe: Path
    description: str
