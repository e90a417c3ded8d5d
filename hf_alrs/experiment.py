"""What an experiment is made of: a task, and one run of it under a named scheduler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, TrainOutput

from .baselines import BASELINES, Baseline, scheduler_kwargs
from .batch_norm import BatchNormStatistics
from .callback import CONTROLLER, ALRSTrainer, prepare_again, read_scheduler_state
from .config import ALRSConfig, InputError
from .range_test import RangeTestScheduler
from .scheduler import get_scheduler


__all__ = ["DataArguments", "InputError", "PreparedTask", "Task", "build_trainer", "find_baseline"]

# Keys of the evaluation sets during training: metrics read `eval_controller_loss`, `eval_held_out_loss`
HELD_OUT = "held_out"


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
    split_seed: int = field(default=0, metadata={"help": "Seed of the splits and subsets."})
    num_folds: int = field(
        default=5, metadata={"help": "Tabular data without an eval split: 1/num_folds is held out."}
    )
    fold: int | None = field(
        default=None, metadata={"help": "Which of the folds is held out; a single run without it takes all in turn."}
    )


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
        reference (`Callable[[], dict[str, float]]`, *optional*): Trains a simple well-known model on the same train split
            and gives its metrics on the same eval split, where that is a held-out fold.
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
    reference: Callable[[], dict[str, float]] | None = None


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


class NamedSchedulerTrainer(Trainer):
    """A `Trainer` whose scheduler is any name that `hf_alrs.get_scheduler` knows."""

    def __init__(self, *args: Any, baseline: Baseline, **kwargs: Any):
        self.baseline = baseline
        self._batch_norm: BatchNormStatistics | None = None
        self._refreshed_at: int | None = None
        super().__init__(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        prepare_again(self)
        return super().train(*args, **kwargs)

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any, *rest: Any, **kwargs: Any) -> Any:
        if self.baseline.optimizer == "schedule_free":
            samples = ALRSConfig().batch_norm_samples
            self._batch_norm, self._refreshed_at = BatchNormStatistics(self.model, dataloader, args, samples), None
        return super().set_initial_training_values(args, dataloader, *rest, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._show_average()
        return super().evaluation_loop(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        # Training goes on from the raw weights of a checkpoint
        averaged = self._batch_norm is not None and not kwargs.get("_internal_call")
        if averaged:
            self._show_average()
        super().save_model(*args, **kwargs)
        if averaged:
            self.optimizer.train()

    def _show_average(self) -> None:
        """Puts the weights that Schedule-Free evaluates into the model, with batch-norm's statistics for them."""
        step = self.state.global_step
        if self._batch_norm is None or step == 0:
            return
        self.optimizer.eval()
        if step != self._refreshed_at:  # once for all evaluation sets
            # Its documentation asks for it, as no training step has run with these weights
            self._batch_norm.refresh()
            self._refreshed_at = step

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is None:
            optimizer = optimizer if optimizer is not None else self.optimizer
            self._created_lr_scheduler = True
            if self.baseline.scheduler == "range_test":
                self.lr_scheduler = RangeTestScheduler(optimizer, num_training_steps, model=self.model)
                return self.lr_scheduler
            warmup, kwargs = scheduler_kwargs(self.baseline, num_training_steps)
            self.lr_scheduler = get_scheduler(
                self.baseline.scheduler,
                optimizer,
                num_warmup_steps=max(warmup, self.args.get_warmup_steps(num_training_steps)),
                num_training_steps=num_training_steps,
                scheduler_specific_kwargs=kwargs,
            )
        return self.lr_scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if "alrs_state_version" in read_scheduler_state(checkpoint):
            raise InputError(
                "checkpoint",
                checkpoint,
                f"was written by a run of alrs, and this one is of {self.baseline.scheduler}.",
                "Give another output_dir, or the scheduler of that run.",
            )
        super()._load_optimizer_and_scheduler(checkpoint)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if self._batch_norm is not None:
            self._batch_norm.look()
        if isinstance(self.lr_scheduler, RangeTestScheduler):
            self.lr_scheduler.observe(loss)
        return loss


def find_baseline(name: str) -> Baseline:
    """
    The entry of `BASELINES` called `name`.

    Raises:
        `InputError`: If there is none.
    """
    if name not in BASELINES:
        raise InputError("scheduler", name, f"must be one of {', '.join(BASELINES)}.", "Check the spelling.")
    return BASELINES[name]


def keeps_best(args: TrainingArguments) -> bool:
    """Whether the run chooses among its checkpoints by a metric."""
    return args.load_best_model_at_end or args.save_strategy == SaveStrategy.BEST


def _metric_for_best(args: TrainingArguments, prepared: PreparedTask) -> str:
    """The metric that the best checkpoint is chosen by, on the controller's split: never on the one that is reported."""
    metric = args.metric_for_best_model
    if prepared.controller_dataset is None:
        raise InputError(
            *(("load_best_model_at_end", True) if args.load_best_model_at_end else ("save_strategy", "best")),
            "the best is chosen on the controller's split.",
            "Set --controller_split 0.1.",
        )
    name = (metric or "loss").removeprefix("eval_")
    if name.startswith(f"{HELD_OUT}_"):
        rule = "is measured on the split that is reported, which chooses nothing."
        raise InputError("metric_for_best_model", metric, rule, f"Give {name.removeprefix(f'{HELD_OUT}_')}.")
    return f"eval_{CONTROLLER}_{name.removeprefix(f'{CONTROLLER}_')}"


def _has_one_logit(prepared: PreparedTask, model: torch.nn.Module) -> bool:
    return prepared.label_names is None or getattr(getattr(model, "classifier", None), "out_features", None) == 1


def build_trainer(
    prepared: PreparedTask,
    model: torch.nn.Module,
    args: TrainingArguments,
    scheduler: str,
    alrs_config: ALRSConfig | None = None,
) -> Trainer:
    """
    The Trainer that runs a prepared task under a named scheduler.

    While it trains, it evaluates the controller's split as `eval_controller_*`, which may drive the rate, and the eval
    split as `eval_held_out_*`, which never does.

    Args:
        prepared (`PreparedTask`): Data, collator and metrics.
        model (`torch.nn.Module`): What is trained.
        args (`TrainingArguments`): Of the run; changed where the scheduler asks for it.
        scheduler (`str`): A key of `hf_alrs.baselines.BASELINES`.
        alrs_config (`ALRSConfig`, *optional*): For ALRS; ablations change it.

    Raises:
        `InputError`: If the scheduler is unknown, or needs a controller split that the task has not, or if Trainer refuses the
            arguments.
    """
    baseline = find_baseline(scheduler)
    if baseline.optimizer == "schedule_free":
        args.optim = "schedule_free_sgd" if args.optim == "sgd" else "schedule_free_adamw"
        args.lr_scheduler_type = "constant"
    if baseline.needs_evaluation:
        if prepared.controller_dataset is None:
            raise InputError(
                "controller_split",
                0,
                f"the {scheduler!r} scheduler is stepped with the loss on the controller's split.",
                "Set --controller_split 0.1.",
            )
        best = args.metric_for_best_model or "loss"
        if keeps_best(args) and best.removeprefix("eval_").removeprefix(f"{CONTROLLER}_") != "loss":
            rule = f"Trainer steps the {scheduler!r} scheduler with the metric that it chooses the best model by: the loss."
            raise InputError("metric_for_best_model", best, rule, "Leave it out, or take another scheduler.")
        args.metric_for_best_model = f"eval_{CONTROLLER}_loss"
        args.greater_is_better = False
        if args.eval_strategy == IntervalStrategy.NO:
            args.eval_strategy = IntervalStrategy.EPOCH
    elif keeps_best(args):
        args.metric_for_best_model = _metric_for_best(args, prepared)
    else:  # Trainer would look for it all the same, and gives one with some of the `lr_scheduler_type`s
        args.metric_for_best_model = None
    if args.label_smoothing_factor > 0 and _has_one_logit(prepared, model):
        raise InputError(
            "label_smoothing_factor",
            args.label_smoothing_factor,
            f"smooths over the logits of the classes, and {type(model).__name__} has one logit.",
            "Leave it out.",
        )
    eval_datasets = {HELD_OUT: prepared.eval_dataset}
    if prepared.controller_dataset is not None:
        eval_datasets = {CONTROLLER: prepared.controller_dataset, **eval_datasets}
    common: dict[str, Any] = {
        "model": model,
        "args": args,
        "train_dataset": prepared.train_dataset,
        "eval_dataset": eval_datasets,
        "data_collator": prepared.data_collator,
        "compute_metrics": prepared.compute_metrics,
        "processing_class": prepared.processing_class,
    }
    if baseline.optimizer == "prodigy":
        from prodigyopt import Prodigy

        common["optimizer_cls_and_kwargs"] = (Prodigy, {"lr": 1.0, "weight_decay": args.weight_decay})
    if args.gradient_checkpointing and not getattr(model, "supports_gradient_checkpointing", True):
        rule = f"{type(model).__name__} has none."
        raise InputError("gradient_checkpointing", True, rule, "Leave it out, or take a pretrained model.")
    try:
        if baseline.alrs_config is None:
            trainer: Trainer = NamedSchedulerTrainer(baseline=baseline, **common)
        else:
            trainer = ALRSTrainer(alrs_config=replace(alrs_config or ALRSConfig(), **baseline.alrs_config), **common)
        if trainer.optimizer_cls_and_kwargs is None:  # else found after the evaluation before training
            trainer.get_optimizer_cls_and_kwargs(args, model)
    except InputError:
        raise
    except (ImportError, NotImplementedError, ValueError) as error:  # what Trainer finds
        rule = f"Trainer refuses them: {(str(error).strip() or type(error).__name__).rstrip('.')}."
        raise InputError(
            "options", f"{type(model).__name__}, {args.optim}", rule, "Leave out what it names."
        ) from error
    # The tasks' models take the mean over the batch, whatever they are told of the items in it. Believing otherwise,
    # Trainer multiplies losses, of evaluations too, and gradients by the number of processes and of accumulated batches.
    trainer.model_accepts_loss_kwargs = False
    return trainer


def num_steps_of(checkpoint: str) -> int:
    """Optimizer steps that the run of a checkpoint has made."""
    return TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)).global_step


def train_from(trainer: Trainer, checkpoint: str | None) -> TrainOutput:
    """
    `Trainer.train`, but a run that is at its end already stays as it is: Trainer looks for the end after a step, so that one
    whose last step does not end an epoch would make a further one each time that it is resumed.

    Args:
        trainer (`Trainer`): What trains.
        checkpoint (`str`, *optional*): The folder of the checkpoint to go on from.
    """
    if checkpoint is not None:
        values, num_steps = trainer.set_initial_training_values, num_steps_of(checkpoint)

        def values_at_the_end(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
            num_epochs, *others, max_steps = values(*args, **kwargs)
            return (0 if num_steps >= max_steps else num_epochs, *others, max_steps)

        trainer.set_initial_training_values = values_at_the_end
    return trainer.train(resume_from_checkpoint=checkpoint)
