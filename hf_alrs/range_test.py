"""A baseline that tunes itself: the learning-rate range test of Smith (2017), then linear decay."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def suggested_rate(rates: np.ndarray, losses: np.ndarray) -> float:
    """
    A tenth of the rate at which the smoothed loss of a range test is lowest, the usual reading of the curve.

    Args:
        rates (`np.ndarray` of shape `[num_steps]`): Increasing rates.
        losses (`np.ndarray` of shape `[num_steps]`): Training losses at them; what follows a non-finite one is left out.
    """
    broken = np.flatnonzero(~np.isfinite(losses))
    end = len(losses) if len(broken) == 0 else max(1, int(broken[0]))
    smooth, average = [], 0.0
    for i, loss in enumerate(losses[:end]):
        average = 0.9 * average + 0.1 * float(loss)
        smooth.append(average / (1 - 0.9 ** (i + 1)))
    return float(rates[int(np.argmin(smooth))]) / 10.0


class RangeTestScheduler(LRScheduler):
    """
    Raises the rate exponentially over the first steps, then goes back to the initial weights and decays linearly from
    the rate that the losses suggest. The steps of the test count.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer; all groups get the same rate.
        num_training_steps (`int`): Length of the run, test included.
        test_share (`float`, *optional*, defaults to 0.1): Share of the run that the test takes, at least 20 steps and at
            most half of the run.
        lowest, highest (`float`, *optional*, defaults to 1e-7 and 1.0): Ends of the test.
        model (`torch.nn.Module`, *optional*): Whose buffers (the averages of batch norm) go back as well.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        num_training_steps: int,
        test_share: float = 0.1,
        lowest: float = 1e-7,
        highest: float = 1.0,
        model: torch.nn.Module | None = None,
    ):
        self.num_training_steps = num_training_steps
        self.num_test_steps = min(max(1, num_training_steps // 2), max(20, int(test_share * num_training_steps)))
        self.test_rates = np.geomspace(lowest, highest, self.num_test_steps)
        self.rate = 0.0
        self._losses: list[torch.Tensor] = []
        self._step_loss: torch.Tensor | None = None
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._parameters += [] if model is None else list(model.buffers())
        self._initial: list[torch.Tensor] | None = [p.detach().clone() for p in self._parameters]
        super().__init__(optimizer)

    def observe(self, loss: torch.Tensor) -> None:
        """Takes the loss of a (micro-)batch; those of one optimizer step are added."""
        if self._initial is not None:
            self._step_loss = loss.detach() if self._step_loss is None else self._step_loss + loss.detach()

    def get_lr(self) -> list[float]:
        step = self.last_epoch
        if self._initial is not None and step > 0:
            self._losses.append(self._step_loss if self._step_loss is not None else torch.tensor(math.nan))
            self._step_loss = None
        if step < self.num_test_steps:
            rate = float(self.test_rates[step])
        else:
            if self._initial is not None:
                self._end_test()
            left = max(1, self.num_training_steps - self.num_test_steps)
            rate = self.rate * max(0.0, 1.0 - (step - self.num_test_steps) / left)
        return [rate for _ in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """All but what the arguments say, as tensors and plain Python values."""
        return {key: value for key, value in super().state_dict().items() if key not in ("test_rates", "_parameters")}

    @torch.no_grad()
    def _end_test(self) -> None:
        losses = torch.stack([loss.float() for loss in self._losses])
        if torch.distributed.is_initialized():  # each process has its own share of the loss, and all need one rate
            torch.distributed.all_reduce(losses)
        self.rate = suggested_rate(self.test_rates, losses.cpu().numpy())
        for parameter, initial in zip(self._parameters, self._initial, strict=True):
            parameter.copy_(initial)
        inner: Any = self.optimizer
        while hasattr(inner, "optimizer"):
            inner = inner.optimizer
        inner.state.clear()
        self._initial, self._losses = None, []
