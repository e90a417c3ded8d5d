"""[`ALRSScheduler`], a torch `LRScheduler` fed through `observe`, and [`get_scheduler`] with transformers' signature."""

from __future__ import annotations

import copy
import inspect
import logging
import math
import operator
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LRScheduler, OneCycleLR, StepLR
from transformers import SchedulerType

from .averaging import LONG_SHARES, WeightAverage, choose
from .batch_norm import BatchNormStatistics, tracking_layers
from .config import ALRSConfig, InputError
from .controller import FALLBACK, ALRSController, Decision
from .features import FEATURE_NAMES, FEATURE_VERSION, SIGNALS
from .guard import NON_FINITE, SPIKE
from .signals import SignalRecorder, is_sharded, measuring_device, sharded_like


logger = logging.getLogger(__name__)

STATE_VERSION = 7
# Where our state travels inside that of the scheduler that Trainer owns and checkpoints, with the callback
STATE_KEY = "alrs_state"
# Beside it: where the scheduler that it lies in stood, which moves on only where ALRS does not drive
STOOD_AT_KEY = "alrs_stood_at"


# Calls of `step` without any optimizer step: more than mixed precision skips while it looks for its scale
_IDLE_CALLS = 256


def unwrapped_optimizer(optimizer: Any) -> Optimizer:
    """The torch optimizer inside wrappers such as accelerate's or SAM's, whose step is the one that moves the weights."""
    while True:
        names = ["base_optimizer", "original_optimizer"]
        if not hasattr(optimizer, "_optimizer_step_pre_hooks"):  # of those that are no optimizer themselves
            names.append("optim")
        inner = [getattr(optimizer, name, None) for name in names]
        found = next((candidate for candidate in inner if isinstance(candidate, Optimizer)), None)
        if hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        elif found is not None:
            optimizer = found
        else:
            return optimizer


def _averages_weights_itself(optimizer: Optimizer) -> bool:
    """
    Whether the optimizer has modes of its own, as Schedule-Free has (but for its variants with a closure); those that a
    scheduler gave it do not count.
    """
    if "schedulefree" in type(optimizer).__name__.lower():
        return True
    switch = getattr(optimizer, "eval", None)
    return callable(switch) and not isinstance(getattr(switch, "__self__", None), ALRSScheduler)


def is_adaptive(optimizer: Optimizer) -> bool:
    """Whether the optimizer rescales gradients: everything but the SGD family."""
    return "sgd" not in type(optimizer).__name__.lower()


def _has_beta1(optimizer: Optimizer) -> bool:
    """Whether the first of `betas` is the decay of a running mean of gradients, as in Adam and what is named after it."""
    inner = getattr(optimizer, "optim", None)  # ZeRO's
    name = type(inner if isinstance(inner, Optimizer) else optimizer).__name__.lower()
    return "adam" in name and "adamuon" not in name and not _averages_weights_itself(optimizer)


class ALRSScheduler(LRScheduler):
    """
    Learning-rate scheduler driven by a network that reads live metrics.

    Call `observe(loss=...)` after each forward pass and `step()` after each optimizer step. Gradients and weights are
    read through the optimizer's own step hooks, so that `step()` may come before or after `zero_grad()`, a step that
    mixed precision skips does not count, and calling `step()` twice (as accelerate does with several processes)
    advances once.

    Where weights are averaged, the optimizer gets the methods `eval()`, which puts the averaged ones into the model, and
    `train()`, which puts the trained ones back; Trainer and accelerate call them around evaluations, a loop of your own
    does as with Schedule-Free. After the last step the averaged weights are in the model.

    Args:
        optimizer (`torch.optim.Optimizer`): Any torch optimizer; accelerate's wrapper is seen through. Groups keep the
            ratios of their rates, and groups with rate 0 stay frozen. The beta1 of Adam, AdamW and others that are named
            after them and have `betas` is lowered to `config.highest_beta1(num_training_steps)`; the group keeps its own as
            `initial_beta1`.
        num_training_steps (`int`): Length of the run in optimizer steps.
        num_warmup_steps (`int`, *optional*, defaults to 0): Steps of linear warmup.
        config (`ALRSConfig`, *optional*): How the network drives.
        steps_per_epoch (`int`, *optional*): Optimizer steps in an epoch.
        model (`torch.nn.Module`, *optional*): Lets a restart bring back buffers too, and the average take in batch-norm's
            statistics.
        can_choose (`bool`, *optional*, defaults to `False`): Whether `choose_average` will be called, for which a second
            average is kept.

    Attributes:
        history (`list[dict]`): One entry for each optimizer step since the last `drain_history`, written at decisions:
            `step` (1 for the first), `loss`, `grad_norm`, `learning_rate`, `phase`; at decisions also `features`,
            `log_multiplier`, `correction`, `action`, `guard`, `meta_loss` and `network_change`.
        seconds (`float`): Time spent in the controller so far.
        num_choices (`int`): Choices of the average so far.
        controller ([`~hf_alrs.controller.ALRSController`]): The control law and its state.
        batch_norm ([`~hf_alrs.batch_norm.BatchNormStatistics`], *optional*): Asked for batch-norm's statistics whenever
            averaged weights are put into the model. [`ALRSCallback`] sets it; a loop of your own may.

    Raises:
        `InputError`: If `config` is no [`ALRSConfig`], a parameter group has no rate, or the optimizer has no parameter that is
            trained; and as [`~hf_alrs.controller.ALRSController`] does, for numbers of steps that make no sense.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        num_training_steps: int,
        num_warmup_steps: int = 0,
        config: ALRSConfig | None = None,
        steps_per_epoch: int | None = None,
        model: torch.nn.Module | None = None,
        can_choose: bool = False,
    ):
        if not isinstance(config, (ALRSConfig, type(None))):
            raise InputError("config", config, "must be an ALRSConfig.", "Write ALRSConfig(...).")
        self.config = config or ALRSConfig()
        self.model = model
        self._can_choose = can_choose and self.config.choose_average
        inner = unwrapped_optimizer(optimizer)
        missing = [index for index, group in enumerate(inner.param_groups) if group["lr"] is None]
        if missing:
            raise InputError(
                "lr",
                None,
                f"must be a number in every parameter group, and is none in group {missing[0]} of {type(inner).__name__}.",
                "Give the optimizer a rate; Adafactor also needs relative_step=False.",
            )
        if _averages_weights_itself(inner):
            self.config = replace(self.config, average_weights=False)
        _unshare_rates(inner.param_groups)
        rates = [float(group.get("initial_lr", group["lr"])) for group in inner.param_groups]
        self.controller = ALRSController(
            self.config,
            num_training_steps,
            max(rates),
            adaptive=is_adaptive(inner),
            num_warmup_steps=num_warmup_steps,
            steps_per_epoch=steps_per_epoch,
        )
        previous = getattr(getattr(inner, "eval", None), "__self__", None)
        if isinstance(previous, ALRSScheduler):
            previous.close()
        self._inner = inner
        self._max_beta1 = self.config.highest_beta1(self.controller.num_training_steps) if _has_beta1(inner) else None
        self._driven = [rate > 0 for rate in rates]  # groups that are not frozen by a rate of 0
        self._average: WeightAverage | None = None
        self._measured: list[int] = []  # places of the parameters among those of all groups
        self._thawed: list[int] = []  # those that came after the start; no signals are measured on them
        self._frozen: list[torch.Tensor] = []  # those that may thaw, of the first groups
        self._num_groups = 0
        self._parameters: list[torch.Tensor] = []
        self._find_parameters()
        if not self._parameters:
            raise InputError(
                "optimizer", type(inner).__name__, "has no trainable parameter.", "Unfreeze at least one parameter."
            )
        self._initial: dict[str, Any] | None = None  # what a restart goes back to
        # Before the first forward pass, which moves batch-norm's statistics; parameters are copied at the first step.
        buffers = model.named_buffers() if model is not None else ()
        self._buffer_names = [_plain(name) for name, buffer in buffers if _is_restored(buffer)]
        self._initial_buffers = self._copied_buffers()
        # A wrapper that has no modes of its own gets them too
        self._switched = [inner] if optimizer is inner or hasattr(optimizer, "eval") else [inner, optimizer]
        if self.config.average_weights:
            self._average = self._new_average(self._parameters)
        self.batch_norm: BatchNormStatistics | None = None
        self.num_choices = 0  # of the average
        self._batch_norm_fresh = False  # whether the model holds statistics of the averaged weights
        self._snapshot: dict[str, Any] | None = None
        self._good: dict[str, Any] | None = None  # what a rollback goes back to, on the CPU
        self._told: set[str] = set()
        self._steps = 0  # optimizer steps accounted for
        self._optimizer_steps = 0  # optimizer steps seen by the hook
        self._idle_calls = 0  # of `step`, before the first of them
        self._signals: torch.Tensor | None = None
        # Of the step under way: the sum of the losses, and what it is to be divided by
        self._loss: torch.Tensor | float | None = None
        self._num_losses: torch.Tensor | int = 1
        self._grad_norm: Any = None
        self._evaluation: tuple[float, float] | None = None  # told since the last flush, in several processes
        self._pending: list[tuple[int, float, Any, Any]] = []  # step, rate, loss, gradient norm: not yet read
        self.history: list[dict[str, Any]] = []
        self.last_decision: Decision | None = None
        self.last_meta_loss: float | None = None
        self.seconds = 0.0
        # For the warning that there is no loss; to the callback losses come another way
        self.loss_remedy = "call `scheduler.observe(loss=loss)` after each forward pass"
        self._closed = False
        self._depth = 0  # calls of the optimizer's `step` under way
        self._attach()
        self._is_first_call = True  # torch's own call of `step`
        super().__init__(optimizer)
        self._is_first_call = False

    def _attach(self) -> None:
        self._hooks = [
            self._inner.register_step_pre_hook(self._before_optimizer_step),
            self._inner.register_step_post_hook(self._after_optimizer_step),
        ]
        for switched in self._switched if self._average is not None else ():
            switched.eval, switched.train = self.show_average, self.train_on

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_hooks"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, whose optimizer has lost hooks and methods, as torch's optimizers do."""
        self.__dict__.update(state)
        self._hooks = []
        if not self._closed:
            self._attach()

    # What the training loop calls

    def observe(self, loss: Any = None, grad_norm: Any = None, is_share: bool = False) -> None:
        """
        Takes live metrics of the optimizer step under way. No device synchronisation happens here.

        Args:
            loss (`torch.Tensor` or `float`, *optional*): Mean loss of the batch (of a tensor with several elements the
                mean is taken), before any division for gradient accumulation; with accumulation call once per
                micro-batch, and the mean of the finite ones is taken, because one that is not may be of a step that mixed
                precision has skipped.
            is_share (`bool`, *optional*, defaults to `False`): Whether the losses of the micro-batches add up to that
                of the step instead, as those that are divided by `num_items_in_batch` do.
            grad_norm (`torch.Tensor` or `float`, *optional*): Norm of the gradient before clipping, for the history.
        """
        if loss is not None:
            if isinstance(loss, torch.Tensor):
                loss = loss.detach()
                loss = loss.float() if loss.dtype in (torch.float16, torch.bfloat16) else loss
                loss = loss.mean() if loss.dim() > 0 else loss
            else:
                loss = float(loss)  # numpy's numbers are none that `weights_only=True` loads
            if self._loss is None:
                # A copy, as the caller may write the next loss into the same memory before this one is read
                self._loss, self._num_losses = loss.clone() if isinstance(loss, torch.Tensor) else loss, 1
            elif is_share:
                self._loss = self._loss + loss
            else:
                if isinstance(self._num_losses, int) and self._num_losses == 1:
                    self._loss, self._num_losses = _finite(self._loss)
                loss, number = _finite(loss)
                self._loss, self._num_losses = self._loss + loss, self._num_losses + number
        if grad_norm is not None:
            self._grad_norm = grad_norm.detach() if isinstance(grad_norm, torch.Tensor) else float(grad_norm)

    def observe_evaluation(self, loss: float, accuracy: float | None = None) -> None:
        """
        Takes an evaluation on the controller's split (never on the split that is reported). In several processes the mean
        of those that tell one is what all decide from.

        Args:
            loss (`float`): Mean loss of the split's examples.
            accuracy (`float`, *optional*): Share of them that is right, from 0 to 1.
        """
        if _are_several_processes():  # which might have measured different things, or one alone
            known = float(self.controller.state.eval_accuracy)
            self._evaluation = (float(loss), known if accuracy is None else float(accuracy))
        else:
            self.controller.observe_evaluation(float(loss), accuracy)

    def step(self, epoch: int | None = None) -> None:
        """Advances by the optimizer step just made; does nothing when none was made since the last call."""
        if self._is_first_call:
            self.last_epoch = 0
            self._step_count = 1
            self._set_rates()
            return
        self._depth = 0  # whatever an optimizer's `step` has raised
        if self._optimizer_steps == self._steps:
            self._idle_calls += 1
            if self._optimizer_steps == 0 and self._idle_calls == _IDLE_CALLS:
                name = type(self._inner).__name__
                self._warn(
                    "idle",
                    f"`scheduler.step()` was called {_IDLE_CALLS} times and {name} has made no step: nothing is driven so far. Give "
                    "the scheduler the optimizer whose `step` moves the weights, if it is another one.",
                )
            return
        if self._steps == self.controller.num_training_steps:
            self._warn(
                "end",
                f"Step {self._steps + 1}: the learning rate is 0, as num_training_steps={self._steps} are over. Give the "
                "scheduler the number of optimizer steps that the loop makes, if it makes more.",
            )
        start = time.perf_counter()
        self.train_on()
        step = self._steps
        self._steps = self._optimizer_steps
        self.last_epoch += 1
        self._step_count += 1
        loss = self._loss
        if loss is not None and not isinstance(self._num_losses, int):
            loss = loss / self._num_losses
        elif loss is not None and self._num_losses != 1:
            loss = loss / self._num_losses if self._num_losses else math.nan
        self._pending.append((step, self.get_last_lr()[self._reference], loss, self._grad_norm))
        self._loss, self._num_losses, self._grad_norm = None, 1, None
        if self._signals is not None:
            signals, self._signals = self._signals, None
            if all(loss is None for _, _, loss, _ in self._pending):
                self._warn(
                    "loss",
                    f"Step {step + 1}: no loss has been observed, and the network decides from gradients and weights "
                    f"alone; {self.loss_remedy}.",
                )
            self._decide(step, self.flush(signals))
        if self._initial is not None and self.controller.restart_window_over(self._steps):
            self._initial = None
        if self._average is not None and not self.controller.probing:
            made = range(step, min(self._steps, self.controller.num_training_steps))
            if any(map(self._average.is_due, made)):
                self._average.update()
            if self._steps >= self.controller.num_training_steps:
                self._show_average()
        self._set_rates()
        self.seconds += time.perf_counter() - start

    def flush(self, signals: torch.Tensor | None = None) -> dict[str, float]:
        """
        Reads the losses gathered since the last decision, as means over all processes (all must call it).

        Args:
            signals (`torch.Tensor` of shape `[len(SIGNALS)]`, *optional*): Read along, in the same exchange.

        Returns:
            `dict[str, float]`: The signals by their names; empty without them.
        """
        device = self._recorder.device
        with_loss = [i for i, entry in enumerate(self._pending) if entry[2] is not None]
        losses = [self._pending[i][2] for i in with_loss]
        norms = [math.nan if entry[3] is None else entry[3] for entry in self._pending]
        parts = [_vector(numbers, device) for numbers in (losses, norms) if numbers]
        parts += [signals] if signals is not None else []
        several = _are_several_processes()
        if several:
            told = [0.0, 0.0, 0.0] if self._evaluation is None else [1.0, *self._evaluation]
            parts.insert(0, _vector(told, device))
            self._evaluation = None
        if not parts:
            return {}
        values = torch.cat(parts)
        if several:
            torch.distributed.all_reduce(values)
            values /= torch.distributed.get_world_size()
        values = values.tolist()
        if several:
            (share, loss, accuracy), values = values[:3], values[3:]
            if share > 0:
                self.controller.observe_evaluation(loss / share, accuracy / share)
        loss_of = dict(zip(with_loss, values, strict=False))
        for i, (step, rate, _, _) in enumerate(self._pending):
            loss = loss_of.get(i)
            if loss is not None:
                self.controller.observe(loss)
            norm = values[len(losses) + i]
            self.history.append(
                {
                    "step": step + 1,
                    "loss": loss,
                    "grad_norm": None if math.isnan(norm) else norm,
                    "learning_rate": rate,
                    "phase": self.controller.phase,
                }
            )
        self._pending = []
        return dict(zip(SIGNALS, values[len(losses) + len(norms) :], strict=False))

    @property
    def first_unread_step(self) -> int:
        """Optimizer steps whose metrics have been read from the device and are in the history."""
        return self._pending[0][0] if self._pending else self._steps

    def drain_history(self) -> list[dict[str, Any]]:
        """Hands the history over and forgets it."""
        history, self.history = self.history, []
        return history

    def discard(self) -> None:
        """Forgets the metrics of a step that mixed precision skipped."""
        if self._optimizer_steps == self._steps:
            self._loss, self._num_losses, self._grad_norm = None, 1, None

    def show_average(self) -> None:
        """Puts the averaged weights into the model, for an evaluation or to save them; also the optimizer's `eval()`."""
        if self._average is not None:
            start = time.perf_counter()
            self._show_average()
            self.seconds += time.perf_counter() - start

    @property
    def shows_average(self) -> bool:
        """Whether the averaged weights are in the model now."""
        return self._average is not None and self._average.in_model

    def choose_average(self, evaluate: Callable[[], float | Sequence[float]]) -> float | None:
        """
        Chooses how far back the average of the weights goes by the loss on the controller's split, and leaves it in the
        model: the short average, the long one, their middle, half the way on from the long one beyond the short one, or the
        raw weights. For a scheduler that was made with `can_choose`, and `choose_average` in the configuration; [`ALRSTrainer`]
        calls it at the end, and before as often as it costs little. A loop that goes on training calls `optimizer.train()`
        next, which puts the trained weights back.

        Args:
            evaluate (`Callable[[], float | Sequence[float]]`): Loss of the model as it is, on examples that are neither
                trained on nor reported; the same in all processes. Either their mean, or the means of equal parts of them (each
                time the same ones): then others than the short average are taken only where they are better by more than half
                a standard error. Called in the mode that the model is in: it sets `model.eval()`, takes no gradients, and sets
                the mode back.

        Returns:
            `float`, *optional*: Share of the long average, 0, 0.5, 1 or -0.5, or -1 for the raw weights; `None` where there is
                nothing to choose yet.
        """
        if self._average is None or not self._average.has_choice:
            return None
        losses = []
        for share in LONG_SHARES:
            with self.showing(share, roughly=True):
                loss = evaluate()
            parts = loss if isinstance(loss, Sequence) or getattr(loss, "ndim", 0) else [loss]
            losses.append([float(part) for part in parts])
        self._average.long_share = LONG_SHARES[int(choose(np.array(losses)))]
        self.num_choices += 1
        self._show_average()
        return self._average.long_share

    @contextmanager
    def showing(self, long_share: float, roughly: bool = False) -> Iterator[None]:
        """
        Has the averaged weights in the model for one evaluation.

        Args:
            long_share (`float`): Share of the long average, where there is one; -1 for the raw weights.
            roughly (`bool`, *optional*, defaults to `False`): Whether a part of the examples is enough for batch-norm.
        """
        if self._average is None:
            yield
            return
        # The attribute, as Trainer's evaluations call the optimizer's `eval()` themselves
        chosen, self._average.long_share = self._average.long_share, long_share
        batch_norm = self.batch_norm
        try:
            if roughly and batch_norm is not None:
                self.batch_norm = None
                self._show_average()
                batch_norm.refresh(roughly=True)
            self.show_average()
            yield
        finally:
            self._average.long_share, self.batch_norm = chosen, batch_norm
            self._batch_norm_fresh &= not roughly

    @property
    def long_share(self) -> float | None:
        """Share of the long average in what is shown, as chosen last; `None` where there is no choice."""
        return self._average.long_share if self._average is not None and self._average.has_choice else None

    def _new_average(self, parameters: list[torch.Tensor]) -> WeightAverage:
        return WeightAverage(parameters, self.model, self.controller.num_training_steps, keep_long=self._can_choose)

    def _show_average(self) -> None:
        if self._average.show():
            self._batch_norm_fresh = False
        if self.batch_norm is not None and self._average.in_model and not self._batch_norm_fresh:
            self.batch_norm.refresh()
            self._batch_norm_fresh = True

    def train_on(self) -> None:
        """The optimizer's `train()`, which puts the trained weights back: after the last step the averaged weights stay, which are what the run leaves."""
        if self._steps < self.controller.num_training_steps:
            self.hide_average()

    def _statistics(self) -> list[torch.Tensor]:
        return [value for layer in tracking_layers(self.model) for value in (layer.running_mean, layer.running_var)]

    def hide_average(self) -> None:
        """Puts the trained weights back."""
        if self._average is not None and self._average.in_model:
            self._average.hide()

    def prepare_save(self) -> None:
        """
        Reads what is pending, and puts the averaged weights into the model that a checkpoint is about to be made of.

        Of sharded weights the raw ones instead: one process alone writes the scheduler's state, and the raw shards of the
        others would be lost.
        """
        self.flush()
        if any(map(is_sharded, self._parameters)) and torch.distributed.get_world_size() > 1:
            self.hide_average()
        else:
            self.show_average()

    def close(self) -> None:
        """Takes the hooks and the two methods off the optimizer; rates, beta1 and weights stay where they are."""
        for hook in self._hooks:
            hook.remove()
        self._closed = True
        self.batch_norm = None  # and with it the training data
        if self._average is not None:
            self._average.release()
            self._average = None
            for switched in self._switched:
                for name in ("eval", "train"):
                    if getattr(getattr(switched, name, None), "__self__", None) is self:
                        delattr(switched, name)

    def refuse_closed(self) -> None:
        """
        Raises:
            `InputError`: If a run with this scheduler has ended.
        """
        if self._closed:
            raise InputError(
                "optimizers",
                type(self).__name__,
                "has driven a run to its end, and drives no other.",
                "Make a new optimizer and scheduler, or let Trainer make them.",
            )

    def _all_parameters(self) -> list[torch.Tensor]:
        return [p for group in self._inner.param_groups for p in group["params"]]

    def _driven_parameters(self) -> dict[int, torch.Tensor]:
        """The parameters of the groups that are driven, frozen ones too, by their places among those of all groups."""
        groups = self._inner.param_groups
        driven = [*self._driven, *(True for _ in groups[len(self._driven) :])]  # groups that came after the start
        all_driven = [is_driven for group, is_driven in zip(groups, driven, strict=True) for _ in group["params"]]
        return {place: p for place, p in enumerate(self._all_parameters()) if all_driven[place]}

    def _find_parameters(self, places: list[int] | None = None) -> None:
        """
        Looks up the parameters, which FSDP2 exchanges, and a device moves, after the optimizer was made; those at `places`,
        or all that are trained.
        """
        driven = self._driven_parameters()
        self._measured = [place for place, p in driven.items() if p.requires_grad] if places is None else places
        found = [driven[place] for place in self._measured]
        same = len(found) == len(self._parameters) and all(map(operator.is_, found, self._parameters))
        moved = bool(found) and same and measuring_device(self._recorder.parameters[0]) != self._recorder.device
        if not same or moved:
            self._parameters = found
            if self._average is not None:
                self._average = self._new_average(found)
            if found:
                self._recorder = SignalRecorder(found, self.config.max_signal_size)

    # What happens around the optimizer's step

    def _before_optimizer_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        self._depth += 1
        if self._depth > 1:  # torch calls the hooks again where a subclass's `step` calls that of its base class
            return None
        if self._steps >= self.controller.num_training_steps:  # the weights are no longer this scheduler's
            self._optimizer_steps += 1
            return None
        self.hide_average()
        if len(self._inner.param_groups) > len(self.base_lrs):
            self._set_rates()  # of layers that thaw with this step
        if self._optimizer_steps > 0:
            self._take_in()
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):  # some optimizers take a loss there
            self._look_at_gradients()
            return None
        seen = False

        def closure_and_look() -> Any:  # whose gradients the step is made from
            nonlocal seen
            try:
                loss = closure()
            except BaseException:  # after which torch calls no hook, and the loop may go on with another step
                self._depth = 0
                raise
            if not seen:
                seen = True
                self._look_at_gradients()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": closure_and_look}
        return (args[0], closure_and_look, *args[2:]), kwargs

    def _after_optimizer_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._depth = max(0, self._depth - 1)

    def _look_at_gradients(self) -> None:
        # A fused optimizer is called with mixed precision's scale and verdict, and unscales, or skips, by itself.
        skipped = getattr(self._inner, "found_inf", None)
        if skipped is not None and float(skipped) != 0:
            return
        start = time.perf_counter()
        scale = getattr(self._inner, "grad_scale", None)
        step = self._optimizer_steps
        if step == 0 and self._recorder.initial is None:
            self._find_parameters()
            self._recorder.start()
            if self.controller.restarts_possible:
                self._initial = {
                    "tensors": [*(_copied(p, None) for p in self._parameters), *self._initial_buffers],
                    "optimizer": _copied_state(self._inner, None),  # Adagrad's may begin before the first step
                    "groups": _numbers_of_groups(self._inner),
                }
            self._initial_buffers = []
        if self.controller.is_decision(step):
            self._signals = self._recorder.measure(scale)
        if self.controller.is_before_decision(step):
            self._recorder.record_previous(scale)
        self._optimizer_steps = step + 1
        self.seconds += time.perf_counter() - start

    def _decide(self, step: int, signals: Mapping[str, float]) -> None:
        decision = self.controller.decide(step, signals)
        self.last_decision = decision
        if self._average is not None and (decision.action == "restart" or decision.guard == NON_FINITE):
            self._average.reset()
        if decision.meta_loss is not None:
            self.last_meta_loss = decision.meta_loss
        if decision.action == "restart":
            if self._initial is not None:
                self._load(self._initial)
                self._recorder.reset()
        elif decision.action == "snapshot":
            self._snapshot = self._keep(None)
        elif decision.action == "restore" and self._snapshot is not None:
            self._bring_back(self._snapshot)
        elif decision.action == "rollback" and self._good is not None:
            self._bring_back(self._good)
            if self._average is not None and "average" in self._good:
                self._average.load_state_dict(self._good["average"])
        if decision.phase != "gather":
            self._snapshot = None
        if decision.good and self.config.rollback:
            kept = self._keep(torch.device("cpu"))
            if self._average is not None:
                kept["average"] = self._average.state_dict(torch.device("cpu"))
            # Signals are of the step before, on a part of the coordinates. Other buffers may hold the infinities of a mask.
            buffers = range(len(self._parameters), len(self._parameters) + len(self._buffer_names))
            weights = [t for i, t in enumerate(kept["tensors"]) if i not in buffers]
            if all(bool(t.isfinite().all()) for t in (*weights, *self._statistics())):
                self._good = kept
        self._tell(step, decision)
        self.history[-1].update(
            phase=decision.phase,
            log_multiplier=decision.log_multiplier,
            correction=decision.correction,
            action=decision.action,
            guard=decision.guard,
            meta_loss=decision.meta_loss,
            network_change=decision.network_change,
            features=dict(zip(FEATURE_NAMES, decision.features, strict=True)),
        )

    def _tell(self, step: int, decision: Decision) -> None:
        """Warns once of trouble and once of the plain decay; the history has every case."""
        if decision.guard not in (NON_FINITE, SPIKE):
            return
        what = {NON_FINITE: "losses, gradients or weights are not finite", SPIKE: "the loss has jumped"}[
            decision.guard
        ]
        if decision.action in ("restart", "rollback"):
            remedy = (
                "the weights go back to the " + ("initial" if decision.action == "restart" else "last good") + " ones"
            )
        elif decision.guard == NON_FINITE and not self.config.rollback:
            remedy = "weights that are lost stay lost without rollback=True; resume from a checkpoint if they are"
        else:
            remedy = "the weights stay"
        messages = {"trouble": f"Step {step + 1}: {what}; the learning rate goes down, {remedy}."}
        if decision.phase == FALLBACK:
            messages["fallback"] = (
                f"Step {step + 1}: trouble for the {self.config.guard_patience}th time or more; from here on the last good "
                "learning rate decays linearly and the network is not asked any more."
            )
        for kind, message in messages.items():
            self._warn(kind, message)

    def _warn(self, kind: str, message: str) -> None:
        """Once for each kind."""
        if kind not in self._told and _is_first_process():
            logger.warning(message)
        self._told.add(kind)

    def _keep(self, device: torch.device | None) -> dict[str, Any]:
        """Copies of weights, buffers, optimizer state and signals; on their own devices if `device` is `None`."""
        return {
            "tensors": [_copied(t, device) for t in self._restored_tensors()],
            "optimizer": _copied_state(self._inner, device),
            "groups": _numbers_of_groups(self._inner),
            "recorder": self._recorder.state_dict(),
        }

    def _bring_back(self, kept: dict[str, Any]) -> None:
        self._load(kept)
        self._recorder.load_state_dict(kept["recorder"])

    def _copied_buffers(self) -> list[torch.Tensor]:
        """What a restart brings back of the buffers; nothing if there are no restarts."""
        return [buffer.detach().clone() for buffer in self._buffers() if self.controller.restarts_possible]

    def _buffers(self) -> list[torch.Tensor]:
        buffers = {_plain(name): b for name, b in self.model.named_buffers()} if self.model is not None else {}
        nothing = torch.empty(0)  # a forward pass may make buffers, take them away, or exchange them for larger ones
        return [buffers.get(name, nothing) for name in self._buffer_names]

    def _restored_tensors(self) -> list[torch.Tensor]:
        everything = self._all_parameters() if self._thawed else []
        thawed = (everything[place] for place in self._thawed)
        return [*self._parameters, *self._buffers(), *thawed]

    @torch.no_grad()
    def _load(self, kept: dict[str, Any]) -> None:
        for target, source in zip(self._restored_tensors(), kept["tensors"], strict=True):
            if _local(target).shape == source.shape:
                _local(target).copy_(source)
        state = _state_of(self._inner)
        state.clear()
        groups = self._inner.param_groups
        places = [(p, group) for group in groups for p in group["params"]]
        changed = {
            place
            for place, p, source in zip(self._measured, self._parameters, kept["tensors"], strict=False)
            if p.dtype != source.dtype
        }
        for index, values in kept["optimizer"].items():
            if isinstance(index, str):
                state[index] = _mapped(copy.deepcopy(values), torch.clone)
                continue
            parameter, group = places[index]
            beside = partial(_cloned_beside, parameter=parameter, group=group, cast=index in changed)
            state[parameter] = _mapped(values, beside)
        present = _numbers_of_groups(self._inner)
        for group, now, then in zip(groups, present, kept["groups"], strict=False):  # later groups had none then
            for name in now.keys() - then.keys():  # of optimizers that begin to count at their first step
                del group[name]
            group.update(then)

    def _take_in(self) -> None:
        """Layers that thaw are averaged, restarted and rolled back with the others, to what they are now at the earliest."""
        num_groups = len(self._inner.param_groups)
        if num_groups == self._num_groups and not any(p.requires_grad for p in self._frozen):
            return
        known = {*self._measured, *self._thawed}
        others = {place: p for place, p in self._driven_parameters().items() if place not in known}
        self._num_groups, self._frozen = num_groups, [p for p in others.values() if not p.requires_grad]
        thawed = {place: p for place, p in others.items() if p.requires_grad}
        if not thawed:
            return
        self._thawed += thawed.keys()
        for kept in (self._initial, self._snapshot, self._good):
            if kept is not None:
                kept["tensors"] += [
                    _copied(p, torch.device("cpu") if kept is self._good else None) for p in thawed.values()
                ]
        if self._good is not None:
            self._good.pop("average", None)
        if self._average is not None:  # begins anew, with all of them
            self.hide_average()
            self._average = self._new_average([*self._average.parameters, *thawed.values()])

    # Rates

    @property
    def _reference(self) -> int:
        """Index of the group with the highest rate: the one that `min_lr` and `max_lr` speak of."""
        return self.base_lrs.index(max(self.base_lrs))

    def get_lr(self) -> list[float]:
        """Rates of all groups for the next optimizer step."""
        factor = self.controller.learning_rate(self._steps) / self.controller.initial_learning_rate
        return [float(base) * factor for base in self.base_lrs]

    def _set_rates(self) -> None:
        groups = self.optimizer.param_groups
        added = groups[len(self.base_lrs) :]  # after the start, as when layers thaw
        _unshare_rates(added)
        for group in added:
            self.base_lrs.append(float(group.setdefault("initial_lr", float(group["lr"]))))
        rates = self.get_lr()
        for group, rate in zip(groups, rates, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
            if self._max_beta1 is not None and group.get("betas") is not None:
                _lower_beta1(group, self._max_beta1)  # at every step, as a checkpoint may bring another one
        self._last_lr = rates

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the rest of the run: tensors and plain Python values alone (`weights_only=True`)."""
        state = {
            "alrs_state_version": STATE_VERSION,
            "feature_version": FEATURE_VERSION,
            "config": self.config.to_dict(),
            "controller": self.controller.state_dict(),
            "recorder": self._recorder.state_dict(),
            "initial": self._initial,
            "snapshot": self._snapshot,
            "good": self._good,
            # Copied, as it is the one part that the run goes on to change in place
            "average": self._average.state_dict(torch.device("cpu")) if self._average is not None else None,
            "rank": torch.distributed.get_rank() if any(map(is_sharded, self._parameters)) else None,
            "told": sorted(self._told),
            "measured": list(self._measured),
            "thawed": list(self._thawed),
            "num_driven_groups": len(self._driven),
            "buffer_names": list(self._buffer_names),
            "steps": self._steps,
            "optimizer_steps": self._optimizer_steps,
            "pending": [list(entry) for entry in self._pending],
            "base_lrs": [float(rate) for rate in self.base_lrs],
            "last_lr": list(self._last_lr),
            "last_epoch": self.last_epoch,
            "step_count": self._step_count,
            "seconds": self.seconds,
            "num_choices": self.num_choices,
        }
        # Trainer and accelerate load a scheduler's state onto the devices that it was saved from, which may not be there
        return _moved(state, torch.device("cpu"), scalars=True)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Takes the run up where `state_dict` left it.

        Raises:
            `InputError`: If the state is not this scheduler's, or of another version, network shape or set of
                parameters.
        """
        if isinstance(state_dict.get(STATE_KEY), dict):  # of a checkpoint that was made with the callback
            stale = state_dict.get(STOOD_AT_KEY) != state_dict.get("last_epoch")  # a run without ALRS went on from it
            state_dict = {} if stale else state_dict[STATE_KEY]
        if "alrs_state_version" not in state_dict:
            raise InputError(
                "checkpoint",
                sorted(state_dict)[:5],
                "its scheduler state was not written by ALRS.",
                "Resume with the scheduler that made it, or start a new output_dir.",
            )
        versions = (state_dict["alrs_state_version"], state_dict["feature_version"])
        if versions != (STATE_VERSION, FEATURE_VERSION):
            raise InputError(
                "checkpoint",
                versions,
                f"its state and feature versions are not this package's {(STATE_VERSION, FEATURE_VERSION)}.",
                "Resume with the hf-alrs release that made it.",
            )
        groups = len(state_dict.get("base_lrs") or ())
        if groups != len(self.base_lrs):
            raise InputError(
                "checkpoint",
                groups,
                f"its number of parameter groups is not this optimizer's {len(self.base_lrs)}.",
                "Resume with the same parameter groups, all added before the scheduler is made.",
            )
        try:
            self._take(state_dict)
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            raise InputError(
                "checkpoint",
                f"{type(error).__name__}: {error}"[:200],
                "its ALRS state is damaged.",
                "Resume from another checkpoint.",
            ) from error

    def _take(self, state_dict: dict[str, Any]) -> None:
        # Of a finished run, whose model holds those of the averaged weights
        statistics = [values.clone() for values in self._statistics()]
        num_driven = state_dict["num_driven_groups"]
        if not 1 <= num_driven <= len(self._driven):
            raise ValueError("a number of groups that cannot be")
        self._driven = self._driven[:num_driven]
        everything = self._all_parameters()
        measured, self._thawed = list(state_dict["measured"]), list(state_dict["thawed"])
        self._num_groups = 0  # to be looked through again
        places = [*measured, *self._thawed]
        if not measured or len(set(places)) < len(places) or min(places) < 0:
            raise ValueError("parameters that cannot be")
        if max(places) >= len(everything):
            raise InputError(
                "checkpoint",
                max(places) + 1,
                f"it was made for more parameters than this optimizer's {len(everything)}.",
                "Resume with the same parameters in the optimizer, in the same order.",
            )
        self._find_parameters(measured)  # signals leave out what thawed later, the average does not
        if self._average is not None and self._thawed:
            self._average = self._new_average([everything[place] for place in places])
        saved = state_dict["recorder"]["initial"]
        if saved is not None and saved.shape != self._recorder._scale.shape:
            raise InputError(
                "checkpoint",
                tuple(saved.shape),
                f"it was made for other parameters than this model's {tuple(self._recorder._scale.shape)}.",
                "Resume with the same model and max_signal_size.",
            )
        self.controller.load_state_dict(state_dict["controller"])
        self._recorder.load_state_dict(state_dict["recorder"])
        device = self._recorder.device
        initial = state_dict["initial"]
        self._initial = _moved(initial, device)
        self._buffer_names = list(map(_plain, state_dict["buffer_names"]))
        self._snapshot = _moved(state_dict["snapshot"], device)
        self._good = _moved(state_dict["good"], torch.device("cpu"))
        if any(map(is_sharded, self._parameters)) and not _are_own_shards(state_dict["rank"], device):
            self._initial = self._snapshot = self._good = None
            if _is_first_process():
                logger.warning(
                    "The checkpoint's copies of the weights are one process's shards: no restart or rollback goes back "
                    "to before the resume, and the average of the weights begins anew."
                )
        elif state_dict["average"] is not None:
            # Without averaging from here on, the raw weights still have to come back.
            average = self._average or self._new_average(self._parameters)
            average.load_state_dict(state_dict["average"])
        self._told = set(state_dict["told"])
        self._initial_buffers = [] if state_dict["optimizer_steps"] else self._copied_buffers()
        self._steps, self._optimizer_steps = state_dict["steps"] + 0, state_dict["optimizer_steps"] + 0
        if self._initial is None and self._optimizer_steps and not self.controller.restart_window_over(self._steps):
            self.controller.restarts = self.config.max_restarts  # there is nothing to go back to
        self._pending = [tuple(entry) for entry in state_dict["pending"]]
        self._signals, self._loss, self._num_losses, self._grad_norm = None, None, 1, None
        self._evaluation = None
        self.history = []  # of a run that was interrupted in this process
        self.base_lrs = list(state_dict["base_lrs"])
        self.last_epoch, self._step_count = state_dict["last_epoch"], state_dict["step_count"]
        self.seconds, self.num_choices = state_dict["seconds"], state_dict["num_choices"] + 0
        self._set_rates()
        if self._steps >= self.controller.num_training_steps:
            self.show_average()
            for values, kept in zip(self._statistics(), statistics, strict=True):
                values.copy_(kept)


def _plain(name: str) -> str:
    """A name in a model without what compiling it or spreading it over processes puts before its parts."""
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "module"))


def _is_restored(buffer: torch.Tensor) -> bool:
    """Whether a buffer goes back with the weights: not whole numbers, which do not train (the weights of a quantised
    model, places, masks), nor a sparse one, nor a view of fewer numbers than it shows, which cannot be written to."""
    if buffer.is_nested or buffer.layout != torch.strided:
        return False
    expanded = any(size > 1 and stride == 0 for size, stride in zip(buffer.shape, buffer.stride(), strict=True))
    return (buffer.is_floating_point() or buffer.numel() == 1) and not expanded


def _vector(numbers: list[Any], device: torch.device) -> torch.Tensor:
    """Numbers and tensors of one element as one float64 vector."""
    if all(isinstance(x, torch.Tensor) and x.dim() == 0 and x.device == device for x in numbers):
        return torch.stack(numbers).double()
    if not any(isinstance(x, torch.Tensor) for x in numbers):  # one transfer to the device, not one for each
        host = torch.tensor(numbers, dtype=torch.float64)
        return host.to(device) if device.type != "cpu" else host
    # Moved first: Apple's MPS has no double precision
    tensors = [x if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=torch.float64) for x in numbers]
    return torch.cat([x.to(device).double().reshape(1) for x in tensors])


def _finite(loss: Any) -> tuple[Any, Any]:
    """A loss and 1, or twice 0 where it is not finite, without looking at a tensor's value."""
    if isinstance(loss, torch.Tensor):
        finite = loss.isfinite()
        return torch.where(finite, loss, 0.0), finite.to(loss.dtype)
    return (loss, 1) if math.isfinite(loss) else (0.0, 0)


def _mapped(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Nested lists and dictionaries with the function of each tensor in its place."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _mapped(item, function) for key, item in value.items()}
    return [_mapped(item, function) for item in value] if isinstance(value, list) else value


def _moved(value: Any, device: torch.device, scalars: bool = False) -> Any:
    """Nested lists and dictionaries with their tensors on `device`; those of one number only with `scalars`."""
    return _mapped(value, lambda tensor: tensor.to(device) if tensor.dim() > 0 or scalars else tensor)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor: all of it unless it is sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def _copied(tensor: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    local = _local(tensor.detach())
    return local.clone() if device is None else local.to(device, copy=True)


def _cloned_beside(
    value: torch.Tensor, parameter: torch.Tensor, group: dict[str, Any], cast: bool = False
) -> torch.Tensor:
    """
    A copy on the parameter's device, sharded as it is, and with `cast` of its type, as of a run that was resumed with weights
    of another one; step counters are where torch's optimizers have them.
    """
    if value.dim() == 0:
        beside = group.get("fused") or group.get("capturable")
        return value.to(parameter.device, copy=True) if beside else value.clone()
    dtype = parameter.dtype if cast and value.is_floating_point() else value.dtype
    clone = value.to(parameter.device, dtype, copy=True)
    return (
        sharded_like(clone, parameter) if is_sharded(parameter) and value.shape == _local(parameter).shape else clone
    )


def _are_own_shards(rank: int | None, device: torch.device) -> bool:
    """Whether every process has loaded what it saved itself; Trainer saves the state of the first one alone."""
    own = torch.tensor(float(rank == torch.distributed.get_rank()), device=device)
    torch.distributed.all_reduce(own, torch.distributed.ReduceOp.MIN)
    return bool(own)


def _state_of(optimizer: Optimizer) -> dict[Any, Any]:
    """The state that the optimizer works with: ZeRO's is that of the one inside."""
    inner = getattr(optimizer, "optim", None)
    return inner.state if isinstance(inner, Optimizer) else optimizer.state


def _copied_state(optimizer: Optimizer, device: torch.device | None) -> dict[int | str, Any]:
    """The optimizer's state by parameter index, and what it keeps for all parameters by its name, tensors copied."""
    state = _state_of(optimizer)

    def copied(values: Any) -> Any:
        return _mapped(values, lambda tensor: _copied(tensor, device if tensor.dim() > 0 else None))

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    of_parameters = {index: copied(dict(state[p])) for index, p in enumerate(parameters) if p in state}
    return of_parameters | {key: copied(copy.deepcopy(value)) for key, value in state.items() if isinstance(key, str)}


def _numbers_of_groups(optimizer: Optimizer) -> list[dict[str, float]]:
    """What optimizers count in their groups (Schedule-Free, Prodigy); rates are set anew at every step."""
    return [
        {
            key: value
            for key, value in group.items()
            if type(value) in (int, float) and key not in ("lr", "initial_lr", "initial_beta1")
        }
        for group in optimizer.param_groups
    ]


def _lower_beta1(group: dict[str, Any], max_beta1: float) -> None:
    """The group's own beta1 is kept, for a later run of another length; one that is a tensor is no other optimizer's."""
    beta1, *others = group["betas"]
    is_tensor = isinstance(beta1, torch.Tensor)
    if "initial_beta1" not in group:
        group["initial_beta1"] = beta1
        if is_tensor:
            beta1 = beta1.clone()
            group["betas"] = (beta1, *others)
    if is_tensor:  # in place, and without looking at it
        beta1.copy_(group["initial_beta1"].clamp(max=max_beta1))
    else:
        group["betas"] = (min(group["initial_beta1"], max_beta1), *others)


def _unshare_rates(groups: list[dict[str, Any]]) -> None:
    """A rate that is a tensor is one for all groups that were given none of their own, later ones too."""
    for group in groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"] = group["lr"].clone()


def _are_several_processes() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _is_first_process() -> bool:
    return not _are_several_processes() or torch.distributed.get_rank() == 0


_OWN = {"alrs": ALRSScheduler, "step": StepLR, "exponential": ExponentialLR, "one_cycle": OneCycleLR}


def get_scheduler(
    name: str | SchedulerType,
    optimizer: Optimizer,
    num_warmup_steps: int | None = None,
    num_training_steps: int | None = None,
    scheduler_specific_kwargs: dict[str, Any] | None = None,
) -> LRScheduler:
    """
    Any scheduler by its name, with the signature of `transformers.get_scheduler`.

    Args:
        name (`str` or `SchedulerType`): `"alrs"`, torch's `"step"`, `"exponential"` and `"one_cycle"`, or a name of
            transformers.
        optimizer (`torch.optim.Optimizer`): The optimizer whose rates are set.
        num_warmup_steps (`int`, *optional*): Steps of linear warmup, where the scheduler has one.
        num_training_steps (`int`, *optional*): Length of the run in optimizer steps.
        scheduler_specific_kwargs (`dict`, *optional*): For `"alrs"` the arguments `config`, `steps_per_epoch`,
            `model` and `can_choose` of [`ALRSScheduler`]; for `"step"` `step_size` (default: a third of the run) and `gamma` (0.1); for
            `"exponential"` `gamma` (default: a decay to 1 % over the run), both in optimizer steps; for `"one_cycle"`
            what torch's `OneCycleLR` takes (default: the optimizer's rates as the maximum).

    Raises:
        `InputError`: If the name is unknown or `num_training_steps` is missing where it is needed.
    """
    kwargs = dict(scheduler_specific_kwargs or {})
    name = name.value if isinstance(name, SchedulerType) else name
    if name in _OWN and num_training_steps is None:
        raise InputError("num_training_steps", None, f"is needed by the {name!r} scheduler.", "Pass it.")
    if name in _OWN:
        known = list(inspect.signature(_OWN[name]).parameters)[1:]
        for key in kwargs.keys() - set(known):
            rule = f"is no argument of the {name!r} scheduler, which takes {', '.join(known)}."
            raise InputError("scheduler_specific_kwargs", {key: kwargs[key]}, rule, "Check the spelling.")
    if name == "alrs":
        return ALRSScheduler(optimizer, num_training_steps, num_warmup_steps or 0, **kwargs)
    if name == "step":
        return StepLR(optimizer, **({"step_size": max(1, num_training_steps // 3)} | kwargs))
    if name == "exponential":
        return ExponentialLR(optimizer, **({"gamma": 0.01 ** (1 / num_training_steps)} | kwargs))
    if name == "one_cycle":
        rates = [group["lr"] for group in optimizer.param_groups]
        return OneCycleLR(optimizer, **({"max_lr": rates, "total_steps": num_training_steps} | kwargs))
    known = [*_OWN, *(member.value for member in SchedulerType)]
    if name not in known:
        raise InputError("scheduler", name, f"must be one of {', '.join(known)}.", "Check the spelling.")
    return transformers.get_scheduler(
        name,
        optimizer,
        num_warmup_steps=num_warmup_steps,
        num_training_steps=num_training_steps,
        scheduler_specific_kwargs=scheduler_specific_kwargs,
    )
