"""
The divergence guard: notices trouble in a run's losses and remembers the last rate that was good. Pure numbers.

A loss is compared by *level*, the median of the losses between two decisions, with the levels of the decisions before
it: single batches are too noisy to tell a spike from a hard batch.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any


NON_FINITE, SPIKE, BOUNDS = "non_finite", "spike", "bounds"

# Levels compared with, and how many there must be
_NUM_LEVELS, _LEAST_LEVELS = 16, 8
# Robust z-score (Iglewicz and Hoaglin, 1993) from which on a level is a spike: their 3.5 is for normal noise, which
# losses of small batches are not
_Z = 8.0
# A spike also has to undo this share of the initial loss: near zero loss every hard batch has a high z-score
_SHARE_OF_INITIAL = 0.25
# Levels in a row that make a spike: what passes by itself needs no guard
_IN_A_ROW = 2
# Losses kept of one stretch between decisions, the last ones
_MAX_WINDOW = 512


def robust_z_score(value: float, reference: list[float]) -> float:
    """
    Distance of `value` from the median of `reference`, in units of 1.4826 times the median absolute deviation.

    Args:
        value (`float`): What is judged.
        reference (`list[float]`): At least one value.

    Returns:
        `float`: Infinite with the sign of the distance where all of `reference` is the same, 0 where `value` is too.
    """
    median = statistics.median(reference)
    deviation = 1.4826 * statistics.median(abs(x - median) for x in reference)
    if deviation == 0:
        return 0.0 if value == median else math.copysign(math.inf, value - median)
    return (value - median) / deviation


class Guard:
    """
    Judges a run at each decision.

    Attributes:
        troubles (`int`): How often the run was in trouble since it began, restarts left out.
        good (`float`, *optional*): ln(peak rate / initial rate) at the last decision without trouble.
    """

    def __init__(self) -> None:
        self.troubles = 0
        self.good: float | None = None
        self._window: deque[float] = deque(maxlen=_MAX_WINDOW)
        self._levels: list[float] = []
        self._raised = 0

    def observe(self, loss: float) -> None:
        """Takes the training loss of one optimizer step."""
        if math.isfinite(loss):
            self._window.append(loss)

    def judge(self, finite: bool, initial_loss: float) -> str | None:
        """
        What is wrong with the stretch since the last decision: `"non_finite"`, `"spike"` or nothing.

        Args:
            finite (`bool`): Whether losses, gradients and weights are.
            initial_loss (`float`): Loss that the run began with.
        """
        window = list(self._window)
        self._window.clear()
        if not finite:
            self.forget()
            return NON_FINITE
        if not window:
            return None
        level = statistics.median(window)
        if len(self._levels) >= _LEAST_LEVELS and self._is_spike(level, initial_loss):
            self._raised += 1
            if self._raised < _IN_A_ROW:
                return None  # not among the levels either, or the next one would be compared with a spike
            self.forget()  # what comes now is compared with itself: new labels may have come to stay
            return SPIKE
        self._raised = 0
        self._levels = [*self._levels, level][-_NUM_LEVELS:]
        return None

    def _is_spike(self, level: float, initial_loss: float) -> bool:
        rise = level - statistics.median(self._levels)
        return rise > _SHARE_OF_INITIAL * abs(initial_loss) and robust_z_score(level, self._levels) > _Z

    @property
    def suspicious(self) -> bool:
        """Whether the last level was raised, so that the weights of this moment are not worth keeping."""
        return self._raised > 0

    def forget(self) -> None:
        """Forgets the levels: the weights have moved to where the loss is another one."""
        self._window.clear()
        self._levels, self._raised = [], 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "troubles": self.troubles,
            "good": self.good,
            "window": list(self._window),
            "levels": list(self._levels),
            "raised": self._raised,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.troubles, self.good, self._raised = state["troubles"], state["good"], state["raised"]
        self._window, self._levels = deque(state["window"], maxlen=_MAX_WINDOW), list(state["levels"])
