"""
Averaging of the weights along a run, in the place of most of the decay of the learning rate.

Polynomial-decay averaging (Shamir and Zhang, 2013): the weights of the k-th update count in proportion to k^gamma, so
that about the last 1 / (gamma + 1) of the run is averaged at any time, whatever its length. The raw weights are trained
on; the averaged ones are evaluated, saved, and left in the model at the end.

A second average may be kept, of nearly all of the run (gamma = 1), which is the better one where the rate is too high or the
training overfits. Where the training is far from done, the way from the long average to the short one leads on beyond the
latter, or the raw weights are the better ones. Which of these is told by a split that is held out.

`torch.optim.swa_utils.AveragedModel` is a module beside the trained one. Here the average goes into the trained module itself for
an evaluation and out of it again, is kept for trained weights alone and in single precision, and is a part of a scheduler's state.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .batch_norm import tracking_layers
from .config import InputError
from .signals import is_sharded


GAMMA = 16
# The long average. A share of it between 0 and 1 does nearly as well as averages of their own with a gamma between.
LONG_GAMMA = 1
# In the place of a share of the long average: the raw weights
RAW_WEIGHTS = -1.0
# What there is to choose from; among equals the first. A share below 0 goes on beyond the short average, away from the long one.
LONG_SHARES = (0.0, 0.5, 1.0, -0.5, RAW_WEIGHTS)
# Examples that choose the average: this share of those that a run trains on, within bounds. On synthetic tasks 64 brought most
# of the gain of 128, and of what the weights beyond the short average add to it three quarters, in runs of a few dozen steps half.
_CHOICE_SHARE, _CHOICE_SAMPLES = 0.005, (128, 256)
# The examples that choose are looked at in so many parts at least, whose losses tell how sure a difference is.
CHOICE_PARTS = 8
# Standard errors by which others than the short average must be better. On synthetic tasks this is neither better nor worse than
# none; it protects from splits of a few examples. A whole one was 0.001 worse in runs of a few hundred steps.
_DOUBT = 0.5
_HALF = (torch.float16, torch.bfloat16)
# Most updates in a run: seven within the last 1 / (GAMMA + 1), and little work next to the optimizer's. On synthetic tasks
# twice as many ended no better.
_UPDATES = 128


def update_interval(num_training_steps: int) -> int:
    """Optimizer steps from one update of the average to the next, in a run of `num_training_steps`."""
    return max(1, math.ceil(num_training_steps / _UPDATES))


def update_share(num_updates: int | np.ndarray, gamma: int = GAMMA) -> float | np.ndarray:
    """Weight of the newest weights after k updates, (gamma + 1) / (k + gamma + 1) (Shamir and Zhang, 2013): 1 for the first."""
    return (gamma + 1) / (num_updates + gamma + 1)


def choice_size(num_trained: int) -> int:
    """Examples by whose loss the average is chosen in a run that trains on `num_trained` examples, repeated ones included."""
    least, most = _CHOICE_SAMPLES
    return max(least, min(most, int(_CHOICE_SHARE * num_trained)))


def choose(losses: np.ndarray) -> np.ndarray:
    """
    Which of some weights to take: those with the least loss, after half a standard error of the paired difference to the
    first ones has been added, so that a few examples alone do not speak for others than the short average.

    Args:
        losses (`np.ndarray` of shape `[num_candidates, num_parts, ...]`): Mean losses of equal parts of the examples; one that
            is not finite counts as infinite, and nothing where all candidates have such a one (a batch without labels).

    Returns:
        `np.ndarray` of shape `[...]`: Index of the chosen candidate, among equals the first. With a single part the least loss
            decides, and also where that of the first candidate is not finite.
    """
    losses = np.where(np.isfinite(losses), losses, np.inf)
    without = np.isinf(losses).all((0, *range(2, losses.ndim)))
    losses = losses[:, ~without] if not without.all() else losses
    num_parts = losses.shape[1]
    means = losses.mean(1)
    with np.errstate(invalid="ignore"):  # differences of infinite losses
        difference = losses - losses[:1]
        error = difference.std(1, ddof=1) / math.sqrt(num_parts) if num_parts > 1 else 0.0
        bound = difference.mean(1) + _DOUBT * error
    scores = np.where(np.isfinite(means[:1]), bound, means)
    return np.where(np.isnan(scores), np.inf, scores).argmin(0)


class WeightAverage:
    """
    The average of a model's trained weights and of its batch-norm statistics.

    Costs one copy of the weights (in single precision where they have less), one more with a long average, and one for as
    long as the average is in the model. Its state has the same copies.

    Args:
        parameters (`list[Tensor]`): Trained parameters; of sharded ones each process averages its own part.
        model (`torch.nn.Module`, *optional*): For the running statistics of batch-norm, which belong to the weights;
            needed where parameters are sharded.
        num_training_steps (`int`): Length of the run in optimizer steps.
        keep_long (`bool`, *optional*, defaults to `False`): Whether to keep a long average too.

    Attributes:
        parameters (`list[Tensor]`): As given.
        in_model (`bool`): Whether the model holds the average now.
        long_share (`float`): Share of the long average in what is shown, one of `LONG_SHARES`.

    Raises:
        `InputError`: If parameters are sharded and the model is not given.
    """

    def __init__(
        self,
        parameters: list[Tensor],
        model: torch.nn.Module | None,
        num_training_steps: int,
        keep_long: bool = False,
    ):
        if model is None and any(map(is_sharded, parameters)):
            raise InputError(
                "model",
                None,
                "is needed to average sharded weights.",
                "Pass the model to the scheduler, or set average_weights=False.",
            )
        self.parameters, self._model = parameters, model
        self._sharded = any(map(is_sharded, parameters))
        # By name, as moving a model to its device exchanges its buffers
        self._statistics = [
            (layer, name) for layer in tracking_layers(model) for name in ("running_mean", "running_var")
        ]
        self._interval = update_interval(num_training_steps)
        self._num_updates = 0
        self._keep_long = keep_long
        self._average: list[Tensor] | None = None
        self._long: list[Tensor] | None = None
        self._raw: list[Tensor] | None = None
        self._shown_share = 0.0  # of the long average in what is in the model
        self.long_share = 0.0

    @property
    def has_choice(self) -> bool:
        """Whether there is a long average beside the other one."""
        return self._long is not None

    @property
    def in_model(self) -> bool:
        return self._raw is not None

    def is_due(self, step: int) -> bool:
        """Whether the weights after the `step`-th optimizer step (counted from 0) are to be taken in."""
        return (step + 1) % self._interval == 0

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the present weights."""
        weights = self._weights()
        if self._average is None:
            self._average = [w.to(_precise(w.dtype), copy=True) for w in weights]
            self._long = [a.clone() for a in self._average] if self._keep_long else None
        else:
            if any(w.dtype in _HALF for w in weights):
                weights = [w.to(a.dtype) for w, a in zip(weights, self._average, strict=True)]
            torch._foreach_lerp_(self._average, weights, update_share(self._num_updates))
            if self._long is not None:
                torch._foreach_lerp_(self._long, weights, update_share(self._num_updates, LONG_GAMMA))
        self._num_updates += 1

    def reset(self) -> None:
        """Forgets the average: the weights went back, or are damaged."""
        self._average = self._long = None
        self._num_updates, self.long_share = 0, 0.0

    @torch.no_grad()
    def show(self) -> bool:
        """Puts the average into the model, if there is one; returns whether that changed the model."""
        if self._average is None or (self.in_model and self._shown_share == self.long_share):
            return False
        self._reshard()
        weights = self._weights()
        if self._raw is None:
            self._raw = [w.clone() for w in weights]
        share = self.long_share if self._long is not None else 0.0
        for weight, raw, short, long in zip(
            weights, self._raw, self._average, self._long or self._average, strict=True
        ):
            weight.copy_(raw if share == RAW_WEIGHTS else short if share == 0 else torch.lerp(short, long, share))
        self._shown_share = self.long_share
        return True

    @torch.no_grad()
    def hide(self) -> None:
        """Puts the raw weights back."""
        if self._raw is not None:
            self._reshard()
            for weight, raw in zip(self._weights(), self._raw, strict=True):
                weight.copy_(raw)
            self._raw = None

    def release(self) -> None:
        """Leaves the model as it is and frees the copies."""
        self._raw = self._average = self._long = None

    def state_dict(self, device: torch.device | None = None) -> dict[str, Any]:
        """
        The averages as tensors and plain Python values, and the raw weights where the model holds the average.

        Args:
            device (`torch.device`, *optional*): Copies there; without it, the tensors themselves.
        """

        def kept(tensors: list[Tensor] | None) -> list[Tensor] | None:
            return tensors if tensors is None or device is None else [t.to(device, copy=True) for t in tensors]

        return {
            "num_updates": self._num_updates,
            "average": kept(self._average),
            "long": kept(self._long),
            "long_share": self.long_share,
            "raw": kept(self._raw),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Takes over what `state_dict` gave, and puts the raw weights into the model.

        Raises:
            `ValueError`: If its tensors do not fit the weights.
        """
        weights = self._weights()
        for name in ("average", "long", "raw"):
            if state[name] is not None and [t.shape for t in state[name]] != [w.shape for w in weights]:
                raise ValueError(f"the {name} weights are of another model")
        num_updates, average, raw = state["num_updates"], state["average"], state["raw"]
        if num_updates < 0 or (num_updates > 0) != (average is not None) or (raw is not None and average is None):
            raise ValueError(f"{num_updates} updates of the average do not fit its weights")
        if state["long_share"] not in LONG_SHARES or (state["long"] is not None and average is None):
            raise ValueError("a long average that cannot be")

        def beside(tensors: list[Tensor] | None) -> list[Tensor] | None:
            if tensors is None:
                return None
            return [a.to(w.device, _precise(w.dtype), copy=True) for a, w in zip(tensors, weights, strict=True)]

        self._num_updates = num_updates + 0
        self._average = beside(average)
        # A run that goes on without a choice has the short average, whatever was chosen before
        self._long = beside(state["long"]) if self._keep_long else None
        self.long_share = state["long_share"] + 0.0 if self._long is not None else 0.0
        for weight, value in zip(weights, raw or (), strict=raw is not None):
            weight.copy_(value)
        self._raw = None

    def _reshard(self) -> None:
        """FSDP2 keeps some modules whole after an evaluation, and would not see that their shards have changed."""
        for module in self._model.modules() if self._model is not None else ():
            if hasattr(module, "reshard"):
                module.reshard()

    def _weights(self) -> list[Tensor]:
        sources = [*self.parameters, *(getattr(module, name) for module, name in self._statistics)]
        # To be used without gradients; looking at each tensor takes as long as averaging it in a very small model.
        return [t.to_local() if is_sharded(t) else t for t in sources] if self._sharded else sources


def _precise(dtype: torch.dtype) -> torch.dtype:
    """Half precision would lose the small changes of an average."""
    return torch.float32 if dtype in _HALF else dtype
