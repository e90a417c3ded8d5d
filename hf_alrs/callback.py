"""The one seam to transformers: [`ALRSCallback`] for any Trainer script, and [`ALRSTrainer`]."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import IterableDataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.optimization import GreedyLR
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import SaveStrategy, has_length

from .averaging import CHOICE_PARTS, LONG_SHARES, choice_size
from .batch_norm import BatchNormStatistics, tracking_layers, unchanged_modes, unchanged_random_numbers
from .config import ALRSConfig, InputError
from .controller import DRIVE, FALLBACK, FIT, GATHER
from .features import FEATURE_NAMES
from .scheduler import STATE_KEY, STOOD_AT_KEY, ALRSScheduler, get_scheduler


logger = logging.getLogger(__name__)

HISTORY_NAME = "alrs_history.jsonl"
# Key of the controller's split in a dictionary of evaluation datasets
CONTROLLER = "controller"
# Examples in one evaluation of the controller's split: this share of the examples that the run sees, within bounds. A
# forward pass costs a third of a step, so ten of them add 5 % at most to a run that sees 4,300 examples or more; a shorter
# one pays for ten times the least number.
_CONTROLLER_SHARE, _CONTROLLER_SAMPLES = 0.015, (64, 512)
# Share of the run's work so far that choices of the average before the last one may come to. Each looks at its examples once
# for each of `LONG_SHARES`; a forward pass costs a third of a step.
_CHOICES_SHARE = 0.01
_SECONDS_BETWEEN_WRITES = 1.0


def steps_per_epoch(args: TrainingArguments, num_batches: int | None) -> int | None:
    """Optimizer steps in an epoch of `num_batches` batches a process, `None` where that is not known."""
    return None if num_batches is None else max(1, math.ceil(num_batches / args.gradient_accumulation_steps))


class ALRSCallback(TrainerCallback):
    """
    Lets the network drive the learning rate of any `Trainer`; the script stays as it is.

    The rate of the script (`learning_rate`) is where it starts, warmup is kept, and the decay of `lr_scheduler_type` is
    replaced. In runs of less than 1,000 steps Adam's beta1 is lowered (`max_beta1`). Averaged weights (see
    [`hf_alrs.averaging`]) are evaluated, saved in checkpoints and left in the model at the end, while training goes on from
    the raw ones. The callback takes over the scheduler that Trainer made, so that the logged `learning_rate` is the one in
    use and checkpoints hold the callback's state.

    Put it last among the callbacks: a checkpoint that a later one asks for holds the raw weights. A checkpoint of
    [`ALRSTrainer`] is resumed with that one.

    Args:
        config (`ALRSConfig`, *optional*): How the network drives.
        write_history (`bool`, *optional*, defaults to `True`):
            Whether the main process writes `alrs_history.jsonl` into `output_dir`: a line for each optimizer step.

    Attributes:
        scheduler (`ALRSScheduler`): Of the present or last run.
        phases (`list[str]`): Phase of each optimizer step since training began or was resumed.

    Raises:
        `InputError`: At the start of training, if the script's scheduler is stepped with a metric, a DeepSpeed
            configuration holds one, or the checkpoint to resume from was not made with ALRS.
    """

    def __init__(self, config: ALRSConfig | None = None, write_history: bool = True):
        if not isinstance(config, (ALRSConfig, type(None))):
            raise InputError("config", config, "must be an ALRSConfig.", "Write ALRSCallback(ALRSConfig(...)).")
        self.config = config or ALRSConfig()
        self.write_history = write_history
        self.history_folder: Path | None = None  # in place of `output_dir`
        self.scheduler: ALRSScheduler | None = None
        self.phases: list[str] = []
        # Evaluates the controller's split where there is one; `ALRSTrainer` gives it
        self.evaluate_controller: Callable[[], dict[str, float]] | None = None
        # The losses of parts of so many examples there, with the weights as they are
        self.choose_by: Callable[[int], list[float]] | None = None
        self.choice_split, self.choice_statistics = 0, 0  # examples there, and of batch-norm for a choice
        self._chosen_at: int | None = None  # step of the last choice
        self.told_losses = False  # by `ALRSTrainer`, which tells the scheduler itself
        self.forward_batch: Callable[[Any], None] | None = None  # how `ALRSTrainer` runs its model
        self._forward_hook: Any = None
        self._num_shares = 1  # processes whose shares add up to the loss of a step
        self._next_write = 0.0  # time from which on the history may be written again

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if lr_scheduler is self.scheduler:  # a run that was interrupted goes on in the same Trainer
            self._remove_forward_hook()
        else:
            self._detach()
        self.phases, self._chosen_at = [], None
        self._num_shares = args.world_size if args.average_tokens_across_devices else 1
        _refuse_deepspeed_scheduler(args)
        if isinstance(lr_scheduler, ALRSScheduler):
            lr_scheduler.refuse_closed()
            self.scheduler = lr_scheduler
        else:
            self.scheduler = self._take_over(args, state, model, optimizer, lr_scheduler, train_dataloader)
        reason = "the model's output has no `loss` (label smoothing or a custom loss function computes it outside the model)"
        if args.n_gpu > 1:
            reason = "its batches are split over several GPUs by one process (DataParallel)"
        self.scheduler.loss_remedy = f"{reason}; use ALRSTrainer, which sees every loss"
        if not self.told_losses:
            self._forward_hook = model.register_forward_hook(_ForwardHook(self._after_forward), with_kwargs=True)
        if self.scheduler.config.average_weights:
            samples = self.scheduler.config.batch_norm_samples
            self.scheduler.batch_norm = BatchNormStatistics(model, train_dataloader, args, samples, self.forward_batch)
        if self.write_history and state.is_world_process_zero:
            _keep_history(self._history_path(args), self.scheduler.first_unread_step)

    def _history_path(self, args: TrainingArguments) -> Path:
        return (self.history_folder or Path(args.output_dir)) / HISTORY_NAME

    def _take_over(
        self,
        args: TrainingArguments,
        state: TrainerState,
        model: torch.nn.Module,
        optimizer: Any,
        lr_scheduler: Any,
        train_dataloader: Any,
    ) -> ALRSScheduler:
        if not isinstance(lr_scheduler, LRScheduler) or isinstance(lr_scheduler, (GreedyLR, ReduceLROnPlateau)):
            raise InputError(
                "lr_scheduler_type",
                type(lr_scheduler).__name__,
                "is stepped by someone else or with a metric, so that two would set the rate.",
                "Leave lr_scheduler_type at its default, and take `scheduler` out of a DeepSpeed configuration.",
            )
        num_batches = len(train_dataloader) if has_length(train_dataloader) else None
        scheduler = ALRSScheduler(
            optimizer,
            num_training_steps=state.max_steps,
            num_warmup_steps=args.get_warmup_steps(state.max_steps),
            config=_config_of_run(self.config, args),
            steps_per_epoch=steps_per_epoch(args, num_batches),
            model=model,
        )
        resumed, stood_at = (lr_scheduler.__dict__.pop(key, None) for key in (STATE_KEY, STOOD_AT_KEY))
        if resumed is not None and stood_at == _stands_at(lr_scheduler):
            scheduler.load_state_dict(resumed)
        elif state.global_step > 0:  # or an old one that a run without ALRS has carried along
            _refuse_without_state(state.global_step)
        own_state_dict = type(lr_scheduler).state_dict
        lr_scheduler.step = scheduler.step
        lr_scheduler.get_last_lr = scheduler.get_last_lr
        lr_scheduler.state_dict = lambda: {
            **{
                key: value
                for key, value in own_state_dict(lr_scheduler).items()
                if key not in ("step", "get_last_lr", "state_dict")
            },
            STATE_KEY: scheduler.state_dict(),
            STOOD_AT_KEY: _stands_at(lr_scheduler),
        }
        return scheduler

    def _after_forward(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> None:
        if not module.training or getattr(module, "_is_replica", False):  # DataParallel's, each in a thread of its own
            return
        loss = outputs.get("loss") if isinstance(outputs, dict) else getattr(outputs, "loss", None)
        if isinstance(outputs, tuple) and outputs and torch.is_tensor(outputs[0]) and outputs[0].dim() == 0:
            loss = outputs[0]  # as Trainer takes it
        if loss is not None:
            # Divided by the items of all micro-batches, and of all processes, losses add up to that of the step.
            is_share = kwargs.get("num_items_in_batch") is not None
            loss = loss.mean()
            self.scheduler.observe(loss=loss * self._num_shares if is_share else loss, is_share=is_share)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        # A `training_step` of the script's own may not call `optimizer.train()`. The model first, as layers that merge their
        # weights for an evaluation take them apart again.
        if self.scheduler.shows_average:
            model.train()
            self.scheduler.train_on()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.scheduler.discard()
        if self.scheduler.batch_norm is not None:
            self.scheduler.batch_norm.look()
        if self._controller_is_due(state, control):
            start, before = time.perf_counter(), self.scheduler.seconds
            self._observe_evaluation(self.evaluate_controller())
            self.scheduler.train_on()  # callbacks that come after this one change the weights that are trained
            self.scheduler.seconds = before + time.perf_counter() - start
        self._prepare_save(args, state, control)
        self._write_history(args, state, wait=not control.should_save)

    def _controller_is_due(self, state: TrainerState, control: TrainerControl) -> bool:
        number = self.config.controller_evaluations
        if self.evaluate_controller is None or number == 0 or control.should_evaluate or control.should_training_stop:
            return False  # an evaluation by the script is about to show the whole split, or nothing is left to decide
        return state.global_step % max(1, state.max_steps // number) == 0 and state.global_step < state.max_steps

    def _observe_evaluation(self, metrics: dict[str, float]) -> None:
        prefix = self.config.controller_metric_prefix
        if f"{prefix}_loss" in metrics:
            accuracy = metrics.get(f"{prefix}_accuracy")
            try:
                accuracy = None if accuracy is None else float(accuracy)
            except (TypeError, ValueError):  # one for each class or label is no share of all that is right
                accuracy = None
            self.scheduler.observe_evaluation(metrics[f"{prefix}_loss"], accuracy)

    def _choose_average(self, args: TrainingArguments, state: TrainerState, is_last: bool) -> None:
        """Chooses the average for what is evaluated, saved or left at this step; before the end not more often than is cheap."""
        if self.choose_by is None or self._chosen_at == state.global_step:
            return
        of_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        size = min(choice_size(state.max_steps * of_step), self.choice_split)
        cost = (self.scheduler.num_choices + 1) * (size + self.choice_statistics) * len(LONG_SHARES) / 3
        if not is_last and cost > _CHOICES_SHARE * state.global_step * of_step:
            return
        start, before = time.perf_counter(), self.scheduler.seconds
        if self.scheduler.choose_average(partial(self.choose_by, size)) is not None:
            self._chosen_at = state.global_step
        self.scheduler.seconds = before + time.perf_counter() - start

    def _prepare_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """All processes read their losses now, because one alone writes the checkpoint, with the averaged weights."""
        is_last = control.should_training_stop or state.global_step >= state.max_steps
        if is_last or control.should_save or control.should_evaluate:
            self._choose_average(args, state, is_last)
        if control.should_save:
            self.scheduler.prepare_save()
        elif control.should_evaluate:
            # Before Trainer's `model.eval()`, at which some layers take their weights into others (LoRA that merges)
            self.scheduler.show_average()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._prepare_save(args, state, control)
        self._write_history(args, state, wait=not control.should_save)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.scheduler is not None:
            self._write_history(args, state)  # a run that resumes from here goes on after these lines

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.scheduler is not None and metrics:
            self._observe_evaluation(metrics)
        if self.scheduler is not None and args.save_strategy == SaveStrategy.BEST:
            self.scheduler.flush()  # whether this is the best evaluation, and is saved, is decided next

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.scheduler.flush()
        self._write_history(args, state)
        if not (args.load_best_model_at_end and state.best_model_checkpoint):  # which has been loaded by now
            self._choose_average(args, state, is_last=True)
            self.scheduler.show_average()
        self._detach()

    def _detach(self) -> None:
        if self.scheduler is not None:
            self.scheduler.close()
        self._remove_forward_hook()

    def _remove_forward_hook(self) -> None:
        if self._forward_hook is not None:
            self._forward_hook.remove()
            self._forward_hook = None

    def _write_history(self, args: TrainingArguments, state: TrainerState, wait: bool = False) -> None:
        """
        Writes what the scheduler has gathered; with `wait` at most once a second, because opening the file takes as long
        as half a step of a very small model.
        """
        if not self.scheduler.history or (wait and time.monotonic() < self._next_write):
            return
        self._next_write = time.monotonic() + _SECONDS_BETWEEN_WRITES
        entries = self.scheduler.drain_history()
        self.phases += [entry["phase"] for entry in entries]
        if self.write_history and state.is_world_process_zero:
            with open(self._history_path(args), "a") as file:
                file.writelines(_json_line(entry) for entry in entries)


def _stands_at(scheduler: LRScheduler) -> Any:
    """The step of a scheduler, or of each one that it is made of."""
    if hasattr(scheduler, "last_epoch"):
        return scheduler.last_epoch
    return [_stands_at(part) for part in getattr(scheduler, "_schedulers", ())]  # of a `ChainedScheduler`


class _ForwardHook:
    """
    Shows the callback what the model returns.

    Copies and pickles that are made of the model during the run (as for an average of their own) hold one that does nothing,
    and with it no callback, scheduler or optimizer.

    Args:
        show (`Callable`, *optional*): Takes what torch gives a forward hook.
    """

    def __init__(self, show: Callable[..., None] | None = None):
        self._show = show

    def __call__(self, *given: Any) -> None:
        if self._show is not None:
            self._show(*given)

    def __deepcopy__(self, memo: dict[int, Any]) -> _ForwardHook:
        return _ForwardHook()

    def __reduce__(self) -> tuple[Any, ...]:
        return _ForwardHook, ()


def _refuse_without_state(step: int) -> NoReturn:
    raise InputError(
        "resume_from_checkpoint",
        step,
        "the checkpoint at this step holds no state of ALRS.",
        "Resume without ALRS, or start a new output_dir; save with ALRS and without save_only_model.",
    )


def read_scheduler_state(checkpoint: str | None) -> dict[str, Any]:
    """
    The scheduler's state in a checkpoint, empty where there is none.

    Args:
        checkpoint (`str`, *optional*): Folder of the checkpoint.

    Raises:
        `InputError`: If the file is truncated, of another kind, or holds code.
    """
    path = Path(checkpoint or ".") / SCHEDULER_NAME
    if checkpoint is None or not path.is_file():
        return {}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
    except Exception as error:  # of the many types that torch.load raises
        raise InputError(
            "checkpoint",
            str(path),
            f"cannot be read ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}).",
            "Resume from another checkpoint.",
        ) from error
    return state


def prepare_again(trainer: Trainer) -> None:
    """
    Lets a model that was evaluated first be prepared for its training in several processes.

    Accelerate prepares a model once, and `Trainer.evaluate` has it prepared without DDP: a training that followed would
    be one of each process by itself, without a word.

    Args:
        trainer (`Trainer`): About to train.
    """
    alone = trainer.args.world_size == 1 or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if alone or any(isinstance(m, DistributedDataParallel) for m in trainer.model_wrapped.modules()):
        return
    plain_forward = vars(trainer.model).pop("_original_forward", None)
    if plain_forward is not None:  # without mixed precision's wrapper, which the preparation puts around it again
        trainer.model.forward = plain_forward
    trainer.model_wrapped = trainer.model
    trainer.model._is_accelerate_prepared = False


class ALRSTrainer(Trainer):
    """
    A `Trainer` whose learning rate the network drives, with the exact loss of every step (gradient accumulation and
    label smoothing included) and the gradient norm before clipping.

    Args:
        alrs_config (`ALRSConfig`, *optional*): How the network drives.
        args, kwargs: As for `transformers.Trainer`. A controller split is driven by when `eval_dataset` is a dictionary
            with the key `"controller"`: its loss and accuracy become inputs of the network, at the script's evaluations
            and at `controller_evaluations` more on a fixed sample of it, of which no log and no callback is told. With
            `choose_average` it chooses the average of the weights too.

    Raises:
        `InputError`: If an [`ALRSCallback`] is given too, or a DeepSpeed configuration holds a scheduler.
    """

    def __init__(self, *args: Any, alrs_config: ALRSConfig | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._refuse_callbacks(0)
        if not isinstance(alrs_config, (ALRSConfig, type(None))):
            raise InputError("alrs_config", alrs_config, "must be an ALRSConfig.", "Write ALRSConfig(...).")
        self.alrs_config = alrs_config or ALRSConfig()
        _refuse_deepspeed_scheduler(self.args)
        self.alrs_callback = ALRSCallback(self.alrs_config)
        self.alrs_callback.told_losses = True
        self.alrs_callback.forward_batch = self._forward_batch
        # By the numbers of examples, in all and in a batch, and whether they keep their order
        self._controller_loaders: dict[tuple[int, int, bool], Any] = {}
        self._keeps_order = False  # of the examples, in evaluations that choose the average
        self._sample_has_metrics = True
        self._knows_loss = False
        self._num_batches: int | None = None
        self.add_callback(self.alrs_callback)

    def _refuse_callbacks(self, allowed: int) -> None:
        if sum(isinstance(callback, ALRSCallback) for callback in self.callback_handler.callbacks) > allowed:
            raise InputError(
                "callbacks",
                "ALRSCallback",
                "must not be given to ALRSTrainer, which has one.",
                "Leave it out and pass its config as alrs_config, or use Trainer.",
            )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._refuse_callbacks(1)  # one that was added later would observe every loss a second time
        prepare_again(self)
        # The datasets, or the length of the run, may be others than at the last call
        self._controller_loaders = {}
        self._sample_has_metrics, self._knows_loss = True, False
        split = self.eval_dataset.get(CONTROLLER) if isinstance(self.eval_dataset, dict) else None
        indexed = hasattr(split, "__getitem__") and not isinstance(split, IterableDataset) and has_length(split)
        indexed = indexed and len(split) > 0
        self.alrs_callback.evaluate_controller = self._evaluate_controller if indexed else None
        self.alrs_callback.choose_by = self._choice_losses if indexed and self.alrs_config.choose_average else None
        self.alrs_callback.choice_split = len(split) if indexed else 0
        batch_norm = bool(tracking_layers(self.model))
        self.alrs_callback.choice_statistics = self.alrs_config.batch_norm_samples // 4 if batch_norm else 0
        return super().train(*args, **kwargs)

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any, *rest: Any, **kwargs: Any) -> Any:
        # Of the loader that is trained from, which may be the script's own
        self._num_batches = len(dataloader) if has_length(dataloader) else None
        return super().set_initial_training_values(args, dataloader, *rest, **kwargs)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is None:
            self.lr_scheduler = get_scheduler(
                "alrs",
                optimizer if optimizer is not None else self.optimizer,
                num_warmup_steps=self.args.get_warmup_steps(num_training_steps),
                num_training_steps=num_training_steps,
                scheduler_specific_kwargs={
                    "config": _config_of_run(self.alrs_config, self.args),
                    "steps_per_epoch": steps_per_epoch(self.args, self._num_batches),
                    "model": self.model,
                    "can_choose": self.alrs_callback.choose_by is not None,
                },
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _hp_search_setup(self, trial: Any) -> None:
        super()._hp_search_setup(trial)
        # As checkpoints, which each trial has in a folder of its own
        self.alrs_callback.history_folder = None if trial is None else Path(self._get_output_dir(trial=trial))

    def _evaluate_controller(self) -> dict[str, float]:
        """Metrics on a sample of the controller's split, with the random numbers of training left as they are."""
        scheduler = self.alrs_callback.scheduler
        seen = self.state.max_steps * self.args.train_batch_size * self.args.gradient_accumulation_steps
        seen *= self.args.world_size
        least, most = _CONTROLLER_SAMPLES
        # A sample this small is not worth a larger one for batch-norm
        batch_norm, scheduler.batch_norm = scheduler.batch_norm, None
        try:
            with scheduler.showing(0.0):  # the average that the network knows
                if self.args.world_size > 1 and scheduler.shows_average and not self.is_fsdp_enabled:
                    # Each process has averaged its own running statistics, and a checkpoint holds the first one's alone.
                    for layer in tracking_layers(self.model):
                        for values in (layer.running_mean, layer.running_var):
                            torch.distributed.broadcast(values, 0)
                return self._metrics_of_sample(max(least, min(most, int(_CONTROLLER_SHARE * seen))))
        finally:
            scheduler.batch_norm = batch_norm

    def _choice_losses(self, size: int) -> list[float]:
        """Losses of equal parts of a sample of the controller's split, with the model as it is."""
        # Batches are the parts: enough of them to tell how sure a difference is, and none that is smaller than the others.
        # No loss is taken of single examples, which some losses are not made for.
        args, world_size, batch_size = self.args, self.args.world_size, self.args.per_device_eval_batch_size
        whole = args.eval_batch_size
        if not self.accelerator.split_batches:
            most = size // (world_size * math.ceil(CHOICE_PARTS / world_size) * max(1, args.n_gpu))
            args.per_device_eval_batch_size = min(batch_size, max(2, most))
            whole = args.eval_batch_size * world_size
        self._keeps_order = True
        try:
            with self._losses_of_batches() as losses:
                metrics = self._metrics_of_sample(size // whole * whole or size, loss_only=True)
        finally:
            args.per_device_eval_batch_size, self._keeps_order = batch_size, False
        if losses:
            return self.accelerator.gather(torch.stack(losses).float()).tolist()
        name = f"{self.alrs_config.controller_metric_prefix}_loss"
        if name not in metrics and self.alrs_callback.choose_by is not None:
            self.alrs_callback.choose_by = None
            logger.warning(
                "The model gives no loss on the controller's split, which would choose the average of the weights: that of the "
                "last steps is taken. Trainer finds a loss where the split has labels that `label_names` names."
            )
        return [metrics.get(name, math.nan)]

    @contextmanager
    def _losses_of_batches(self) -> Iterator[list[torch.Tensor]]:
        """Keeps the loss of each batch that is evaluated, as a subclass's own `prediction_step` gives it."""
        step, own, losses = self.prediction_step, "prediction_step" in self.__dict__, []

        def prediction_step(*args: Any, **kwargs: Any) -> Any:
            output = step(*args, **kwargs)
            if output[0] is not None:
                losses.append(output[0].detach().mean())
            return output

        self.prediction_step = prediction_step
        try:
            yield losses
        finally:
            if own:
                self.prediction_step = step
            else:
                del self.prediction_step

    def _get_eval_sampler(self, eval_dataset: Any) -> torch.utils.data.Sampler | None:
        # Batches of like lengths are others each time, and what is chosen between is compared batch by batch
        return SequentialSampler(eval_dataset) if self._keeps_order else super()._get_eval_sampler(eval_dataset)

    def _metrics_of_sample(self, size: int, loss_only: bool = False) -> dict[str, float]:
        with unchanged_random_numbers(), unchanged_modes(self.model):
            key = (size, self.args.eval_batch_size, self._keeps_order)
            if key not in self._controller_loaders:
                with self._loader_options():
                    self._controller_loaders[key] = self.get_eval_dataloader(self._controller_sample(size))
            # Neither a bar nor an early-stopping callback is to take this for an evaluation that the script asked for.
            callbacks, self.callback_handler.callbacks = self.callback_handler.callbacks, []
            # Generating costs many times a forward pass, and metrics that gather batches would keep some where they fail
            gathers = getattr(self.args, "predict_with_generate", False) or self.args.batch_eval_metrics
            loss_only = loss_only or self.compute_metrics is None or gathers or not self._sample_has_metrics
            try:
                with self._metrics_may_fail() if not loss_only else nullcontext():
                    output = self.evaluation_loop(
                        self._controller_loaders[key],
                        description="Controller",
                        prediction_loss_only=True if loss_only else None,
                        metric_key_prefix=self.alrs_config.controller_metric_prefix,
                    )
            finally:
                self.callback_handler.callbacks = callbacks
        return output.metrics

    @contextmanager
    def _metrics_may_fail(self) -> Iterator[None]:
        """A `compute_metrics` that asks for a whole split, or for other predictions, does not end the run."""
        compute_metrics, errors = self.compute_metrics, []

        def without_an_end(*args: Any, **kwargs: Any) -> dict[str, Any]:
            try:
                return compute_metrics(*args, **kwargs)
            except Exception as error:
                errors.append(error)
                return {}

        self.compute_metrics = without_an_end
        try:
            yield
        finally:
            self.compute_metrics = compute_metrics
        failed = torch.tensor([bool(errors)], device=self.args.device)
        self._sample_has_metrics = not bool(self.accelerator.gather(failed).any())  # the same on all processes
        if errors:
            logger.warning(
                "`compute_metrics` fails on a sample of the controller's split (%s: %s): its loss alone is looked at between the "
                "script's own evaluations.",
                type(errors[0]).__name__,
                errors[0],
            )

    @contextmanager
    def _loader_options(self) -> Iterator[None]:
        """A loader of the whole sample, however small, that leaves no workers behind; what Trainer keeps stays as it is."""
        kept = {name: getattr(self.args, name) for name in ("dataloader_drop_last", "dataloader_persistent_workers")}
        loaders = self.__dict__.pop("_eval_dataloaders", None)
        self.args.dataloader_drop_last = self.args.dataloader_persistent_workers = False
        try:
            yield
        finally:
            for name, value in kept.items():
                setattr(self.args, name, value)
            self._eval_dataloaders = loaders if loaders is not None else {}

    def _forward_batch(self, batch: Any) -> None:
        """As in training, whatever the script's own `_prepare_inputs` and `compute_loss` make of a batch."""
        with self.compute_loss_context_manager():
            self.compute_loss(self.model, self._prepare_inputs(batch))

    def _controller_sample(self, size: int) -> Any:
        split = self.eval_dataset[CONTROLLER]
        chosen = np.random.default_rng(self.alrs_config.seed).permutation(len(split))[:size].tolist()
        # `select` keeps the columns' names, by which the Trainer drops what the model does not take.
        return split.select(chosen) if hasattr(split, "select") else torch.utils.data.Subset(split, chosen)

    def _may_take_mean(self, num_items_in_batch: Any) -> bool:
        """Whether Trainer adds up the losses of a step, and nobody has told it whether it should."""
        adds_up = self.args.gradient_accumulation_steps > 1 or self.args.world_size > 1
        adds_up = adds_up and self.model_accepts_loss_kwargs and num_items_in_batch is not None
        told = self.compute_loss_func is not None or getattr(self, "loss_is_scaled_for_ga", None) is not None
        # A `compute_loss` of the script's own may scale as it likes; parallel processes may hold parts of one sequence or model
        plain = type(self).compute_loss is Trainer.compute_loss
        plain = plain and getattr(self.accelerator, "parallelism_config", None) is None
        return adds_up and plain and not told

    def _takes_mean(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any) -> bool | None:
        """
        Whether the loss is the mean over a batch, whatever it is told of the items in all batches of a step: of many
        classifiers that take any keyword. Trainer would add up the losses of accumulated batches, and their gradients.
        `None` where this batch does not tell.
        """
        with torch.no_grad(), unchanged_modes(model), torch.compiler.set_stance("force_eager"):
            model.eval()
            losses = []
            for factor in (1, 2):
                with unchanged_random_numbers(), self.compute_loss_context_manager():
                    items = num_items_in_batch * factor
                    loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=items)
                losses.append(loss.detach().float().mean())
        once, twice = torch.stack(losses)
        tells = torch.isfinite(once) & (once != 0)
        answers = self.accelerator.gather(torch.stack([tells, once == twice])[None])  # one for all processes
        return bool(answers[:, 1].all()) if bool(answers[:, 0].all()) else None

    def training_step(
        self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        if not self._knows_loss:
            asked = self._may_take_mean(num_items_in_batch)
            takes_mean = self._takes_mean(model, inputs, num_items_in_batch) if asked else False
            self._knows_loss = takes_mean is not None
            if takes_mean:
                self.model_accepts_loss_kwargs = False
                logger.warning(
                    "The model's loss is the mean over a batch and does not heed `num_items_in_batch`: the losses of a step are "
                    "averaged, where Trainer would add them up (`trainer.model_accepts_loss_kwargs = False`)."
                )
        loss = super().training_step(model, inputs, num_items_in_batch=num_items_in_batch, **kwargs)
        if self.alrs_callback.scheduler is not None:
            self.alrs_callback.scheduler.observe(loss=loss, is_share=True)
        return loss

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.alrs_callback.scheduler is not None:
            self.alrs_callback.scheduler.observe(grad_norm=grad_norm)
        return grad_norm

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        if self.alrs_callback.scheduler is not None and not kwargs.get("_internal_call"):
            self.alrs_callback.scheduler.show_average()  # in the middle of a run; the next step trains the raw weights on
        super().save_model(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self.alrs_callback.scheduler is not None:
            # All processes together; a callback that runs last may have asked for the save
            self.alrs_callback.scheduler.prepare_save()
        super()._save_checkpoint(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not read_scheduler_state(checkpoint) and checkpoint is not None and self.state.global_step > 0:
            _refuse_without_state(self.state.global_step)
        super()._load_optimizer_and_scheduler(checkpoint)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        scheduler = self.alrs_callback.scheduler
        if "loss" in logs and scheduler is not None and scheduler.last_decision is not None:
            decision = scheduler.last_decision
            # Numbers alone, as trackers take nothing else
            logs["alrs/phase"] = {GATHER: 1, FIT: 2, DRIVE: 3, FALLBACK: 4}[decision.phase]
            logs["alrs/log_multiplier"] = decision.log_multiplier
            if scheduler.last_meta_loss is not None:
                logs["alrs/meta_loss"] = scheduler.last_meta_loss
            if scheduler.long_share is not None:
                logs["alrs/long_share"] = scheduler.long_share
            if self.args.report_to:  # for trackers; too many for a console
                features = zip(FEATURE_NAMES, decision.features, strict=True)
                logs.update({f"alrs/feature/{name}": value for name, value in features})
        super().log(logs, *args, **kwargs)


def _config_of_run(config: ALRSConfig, args: TrainingArguments) -> ALRSConfig:
    """Without averaging under DeepSpeed, whose engine keeps weights of its own."""
    # A launcher of accelerate sets the plugin alone
    return replace(config, average_weights=False) if getattr(args, "deepspeed_plugin", None) is not None else config


def _refuse_deepspeed_scheduler(args: TrainingArguments) -> None:
    config = getattr(args, "hf_deepspeed_config", None)
    if config is not None and "scheduler" in config.config:
        raise InputError(
            "deepspeed",
            "scheduler",
            "the DeepSpeed configuration holds a scheduler, which would override ALRS.",
            "Take the `scheduler` section out of it.",
        )


_ENCODER = json.JSONEncoder(allow_nan=False)


def _json_line(entry: dict[str, Any]) -> str:
    try:
        return _ENCODER.encode(entry) + "\n"
    except ValueError:  # a number that is not finite, which is rare: looking for one takes longer than to encode
        return _ENCODER.encode(strict_json(entry)) + "\n"


def strict_json(value: Any) -> Any:
    """`value` for strict JSON: numbers that are not finite become `None`."""
    if isinstance(value, dict):
        return {key: strict_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _keep_history(path: Path, first_unread_step: int) -> None:
    """Starts the history file, or cuts off what a resumed run will write again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept: list[str] = []
    if first_unread_step > 0 and path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= first_unread_step:
                    kept.append(line + "\n")
            # The run was killed while it wrote this line, or someone else wrote it.
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)
