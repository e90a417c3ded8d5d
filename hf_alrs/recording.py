"""What a run leaves behind for its record: every optimizer step's numbers, its evaluations and its clock."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from .callback import ALRSTrainer
from .experiment import HELD_OUT


_EVAL_PREFIX = f"eval_{HELD_OUT}_"
# What an evaluation dictionary says about the machine or the Trainer, not about the model
_NOT_SCORES = ("model_preparation_time",)
_STEPS_BETWEEN_REPORTS = 20

logger = logging.getLogger(__name__)


class RunRecorder(TrainerCallback):
    """
    Every optimizer step's loss, pre-clip gradient norm, rate and time, read from the device at the end only.

    Args:
        on_step (`Callable[[int, int, float], None]`, *optional*): Told step, steps in all, and loss now and then.
    """

    def __init__(self, on_step: Callable[[int, int, float], None] | None = None):
        self.on_step = on_step
        self.losses: list[Any] = []
        self.norms: list[Any] = []
        self.rates: list[float] = []
        self.seconds: list[float] = []
        self.evaluations: list[dict[str, float]] = []
        self.first_batch: str | None = None
        self.loss: torch.Tensor | None = None
        self.norm: Any = None
        self.rate = math.nan
        self.clock = 0.0  # training seconds before `started`
        self.started = 0.0
        self.training = False
        self.eval_seconds = 0.0
        self._evaluating = False
        self.accelerator: Any = None
        self.trainer: Trainer | None = None
        self._earlier_phases: list[str | None] = []  # before the checkpoint that the run went on from
        self._first_step = 0  # optimizer steps of ALRS before this process
        self._alrs_steps: list[int] = []  # after each recorded step; mixed precision may skip some

    def attach(self, trainer: Trainer) -> None:
        """Wraps the methods of a trainer that see the loss and the gradient norm, or whose time is not training, the controller's part of it excepted."""
        self.trainer, self.accelerator = trainer, trainer.accelerator
        training_step, get_grad_norm = trainer.training_step, trainer._get_grad_norm
        evaluate, save = trainer.evaluate, trainer._save_checkpoint

        def recorded_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.first_batch is None:
                self.first_batch = hash_tensors(inputs)
            loss = training_step(model, inputs, *args, **kwargs)
            self.loss = loss if self.loss is None else self.loss + loss
            return loss

        def recorded_norm(*args: Any, **kwargs: Any) -> Any:
            self.norm = get_grad_norm(*args, **kwargs)
            group = trainer.optimizer.param_groups[0]
            self.rate = float(group["lr"]) * float(group.get("d", 1.0))  # Prodigy's own estimate scales the rate
            return self.norm

        def timed_evaluate(*args: Any, **kwargs: Any) -> dict[str, float]:
            if self._evaluating:  # one of several sets, each of which Trainer evaluates by the same method
                return evaluate(*args, **kwargs)
            self._evaluating = True
            self.pause()
            before = _controller_seconds(trainer)
            try:
                return evaluate(*args, **kwargs)
            finally:
                self._evaluating = False
                # Averaged weights are put into the model, and batch-norm's statistics taken anew, because of how it trains
                training = _controller_seconds(trainer) - before
                self.clock += training
                self.eval_seconds += time.perf_counter() - self.started - training
                self.started = time.perf_counter()

        def untimed_save(*args: Any, **kwargs: Any) -> None:
            self.pause()
            with_bars = is_progress_bar_enabled()
            disable_progress_bar()
            try:
                save(*args, **kwargs)
            except OSError as error:  # of a full disk, for one: no reason to end a run
                if self.accelerator.num_processes > 1:  # which the others would go on without
                    raise
                logger.warning(f"No checkpoint could be written ({error}); if interrupted, the run is lost.")
            finally:
                if with_bars:
                    enable_progress_bar()
                self.started = time.perf_counter()

        trainer.training_step, trainer._get_grad_norm = recorded_step, recorded_norm
        trainer.evaluate, trainer._save_checkpoint = timed_evaluate, untimed_save
        trainer.add_callback(self)

    def pause(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # steps that are still under way belong to training
        if self.training:
            self.clock += time.perf_counter() - self.started
        self.started = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.training, self.started = True, time.perf_counter()
        if isinstance(self.trainer, ALRSTrainer):
            self._first_step = self.trainer.alrs_callback.scheduler.last_epoch

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.losses.append(self.loss)
        self.norms.append(self.norm)
        self.rates.append(self.rate)
        self.seconds.append(self.clock + time.perf_counter() - self.started)
        if isinstance(self.trainer, ALRSTrainer):
            self._alrs_steps.append(self.trainer.alrs_callback.scheduler.last_epoch)
        self.loss = None
        if self.on_step is not None and (
            state.global_step % _STEPS_BETWEEN_REPORTS == 0 or state.global_step == state.max_steps
        ):
            self.on_step(state.global_step, state.max_steps, float(self.losses[-1]))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if metrics and f"{_EVAL_PREFIX}loss" in metrics:
            scores = {
                f"eval_{key.removeprefix(_EVAL_PREFIX)}": value
                for key, value in metrics.items()
                if key.startswith(_EVAL_PREFIX)
            }
            self.evaluations.append(
                {
                    "step": state.global_step,
                    "epoch": float(state.epoch or 0.0),
                    "seconds": self.seconds[-1] if self.seconds else 0.0,
                    **clean_scores(scores),
                }
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pause()
        self.training = False

    def average_over_processes(self) -> None:
        """The loss of a step is that of all processes; each has seen its own share of the batch."""
        if self.losses and self.accelerator.num_processes > 1:
            losses = torch.stack([torch.as_tensor(loss, device=self.accelerator.device) for loss in self.losses])
            self.losses = list(self.accelerator.reduce(losses.float(), reduction="mean").cpu())

    @property
    def phases(self) -> list[str | None] | None:
        """Phase of each recorded step where ALRS drives, `None` where the step was skipped or nothing has read it yet."""
        if not isinstance(self.trainer, ALRSTrainer):
            return None
        known, phases, before = self.trainer.alrs_callback.phases, list(self._earlier_phases), self._first_step
        for after in self._alrs_steps:
            place = after - 1 - self._first_step
            phases.append(known[place] if after > before and place < len(known) else None)
            before = after
        return phases

    def history(self) -> dict[str, Any]:
        """One list for each number of a step, rounded."""
        return {
            "step": list(range(1, len(self.losses) + 1)),
            "loss": _rounded(self.losses),
            "grad_norm": _rounded(self.norms),
            "learning_rate": _rounded(self.rates),
            "phase": self.phases,
            "seconds": _rounded(self.seconds),
        }

    def state_dict(self) -> dict[str, Any]:
        """What was recorded so far, as plain Python values."""
        return {
            "losses": [float(loss) for loss in self.losses],
            "norms": [float(norm) for norm in self.norms],
            "rates": list(self.rates),
            "seconds": list(self.seconds),
            "evaluations": list(self.evaluations),
            "phases": self.phases,
            "first_batch": self.first_batch,
            "clock": self.clock,
            "eval_seconds": self.eval_seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on after what `state_dict` gave."""
        for name in ("losses", "norms", "rates", "seconds", "evaluations"):
            setattr(self, name, list(state[name]))
        self._earlier_phases = list(state["phases"] or ())
        self.first_batch, self.clock, self.eval_seconds = state["first_batch"], state["clock"], state["eval_seconds"]


def _controller_seconds(trainer: Trainer) -> float:
    return getattr(trainer.lr_scheduler, "seconds", 0.0) if isinstance(trainer, ALRSTrainer) else 0.0


def _rounded(values: Iterable[Any]) -> list[float]:
    """To eight significant digits: a third of the file, and more than any of these numbers means."""
    return [float(f"{float(value):.8g}") for value in values]


def clean_scores(metrics: dict[str, float]) -> dict[str, float]:
    """An evaluation dictionary without what is not a score or a speed of the model."""
    return {key: value for key, value in metrics.items() if not key.endswith(_NOT_SCORES)}


def hash_tensors(value: Any) -> str:
    """SHA-256 over the bytes of all tensors of a (nested) mapping, in the order of its sorted keys."""
    digest = hashlib.sha256()

    def feed(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            digest.update(item.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif hasattr(item, "items"):
            for key in sorted(item):
                digest.update(str(key).encode())
                feed(item[key])

    feed(value)
    return digest.hexdigest()
