"""
What the network sees: scale-free features of a run so far.

One training step yields *signals* (a loss, and at decisions the inner products of gradients, updates and weights).
[`RunState`] holds running averages over them as an init/update pair, and each feature is a pure function of one
[`Moment`]. Everything works elementwise on Python floats and on float64 arrays of any shape, so that one run (floats) and
a population of runs (`[num_members]`) go through the same code. Numpy takes longer over one number than a small model
over a part of its training step, hence the elementwise functions that leave floats to Python.

The failure mode that the definitions guard against is a feature with a unit: multiplying the loss by a constant, the
inputs by a constant or the initial rate by a constant must leave every feature where it was, up to what the change does
to the training itself. Positive quantities are therefore compared in log space, against values of the same run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np


Array = np.ndarray | float

# Bumped whenever a feature's meaning, order or count changes: networks are trained for one version.
FEATURE_VERSION = 4

# Inner products at a decision. g: gradient at this step, h: gradient of the step before, u: update of the step before,
# w: weights, x: w minus the initial weights, d: displacement since the last decision, e: the displacement before that.
SIGNALS = (
    "gg",
    "gh",
    "hh",
    "gu",
    "hu",
    "uu",
    "ww",
    "gx",
    "xx",
    "initial",  # |initial weights|^2
    "dd",
    "de",
    "ee",
    "matrix_update_ratio",  # mean over weight matrices of ln(|u_i| / |w_i|)
    "zero_gradient",  # mean over weight matrices of the share of gradient entries that are exactly zero
    # What no step changes comes last
    "matrix_width",  # mean over weight matrices of ln(sqrt(min(fan_in, fan_out)))
    "kernel_width",  # that part of it that is due to kernels of convolutions
    "matrix_count",  # ln(number of weight matrices)
    "size",  # ln(sqrt(number of weights))
)

_EPS = 1e-20
_LOSS_EPS = 1e-6
_LOSS_CAP = 1e3  # losses past this many times the initial one carry no more information than "diverged"
_LIMIT = 4.0
# The longest run and the most epochs that networks are trained on. Longer runs count as such: extrapolated, these two
# features alone put the rate off by a factor of ten and more.
_LONGEST, _MOST_EPOCHS = 4000, 100
# As far as most of the population's convolutions reach, for the same reason; ResNet-18 would have 2.7.
_WIDEST_KERNELS = 1.7
_LARGEST = 1e150


# Elementwise functions of floats and arrays, with numpy's outcome for numbers that Python's own functions refuse


def where(condition: Any, x: Array, y: Array) -> Array:
    if isinstance(condition, np.ndarray):
        return np.where(condition, x, y)
    return x if condition else y


def maximum(x: Array, y: Array) -> Array:
    if isinstance(x, np.ndarray) or isinstance(y, np.ndarray):
        return np.maximum(x, y)
    return x if x >= y or x != x else y


def minimum(x: Array, y: Array) -> Array:
    if isinstance(x, np.ndarray) or isinstance(y, np.ndarray):
        return np.minimum(x, y)
    return x if x <= y or x != x else y


def clip(x: Array, low: float, high: float) -> Array:
    if isinstance(x, np.ndarray):
        return np.clip(x, low, high)
    return low if x < low else high if x > high else x


def isfinite(x: Array) -> Any:
    return np.isfinite(x) if isinstance(x, np.ndarray) else math.isfinite(x)


def sqrt(x: Array) -> Array:
    if isinstance(x, np.ndarray):
        return np.sqrt(x)
    return math.sqrt(x) if x >= 0 else math.nan


def ln(x: Array) -> Array:
    if isinstance(x, np.ndarray):
        return np.log(x)
    return math.log(x) if x > 0 else -math.inf if x == 0 else math.nan


def without_nan(x: Array) -> Array:
    """`x` with 0 for NaN."""
    return where(x != x, 0.0, x)


def log(x: Array) -> Array:
    return ln(maximum(x, _EPS))


def cosine(product: Array, square_a: Array, square_b: Array) -> Array:
    """Cosine of two vectors from their inner product and squared norms, 0 where one of them is zero."""
    norm = sqrt(maximum(square_a, _EPS) * maximum(square_b, _EPS))
    return clip(product / norm, -1.0, 1.0)


def ema(average: Array, value: Array, count: Array, rate: float) -> Array:
    """
    Exponential moving average that starts as a plain mean: the weight of `value` is `max(rate, 1 / count)`.

    Args:
        average, value (`float` or `np.ndarray`): The average before and the new value.
        count (`float` or `np.ndarray`): How many values have been seen, this one included.
        rate (`float`): Weight of a new value once the average is warm.
    """
    if isinstance(count, np.ndarray):
        return average + np.maximum(rate, 1.0 / np.maximum(count, 1.0)) * (value - average)
    return average + max(rate, 1.0 / max(count, 1.0)) * (value - average)


@dataclass(frozen=True)
class RunState:
    """
    Running statistics of a run. Every field is a float64 scalar or an array of shape `[num_members]`.

    Args:
        initial_loss: Mean loss of the first steps of the run (kept over restarts).
        initial_count: Losses in `initial_loss`.
        initial_gradient: Gradient norm at the first decision of the run (kept over restarts), 0 before it.
        step_count: Steps since the last restart.
        decision_count: Decisions since the last restart.
        loss_fast, loss_slow, loss_variance: Moving averages of the loss and of its squared deviation, over steps.
        loss_minimum: Lowest `loss_fast` at a decision.
        gradient_fast, gradient_slow: Moving averages of the gradient norm, over decisions.
        cos_*: Moving averages of cosines, over decisions.
        descent_before, descent_after: Moving averages of -h.u and -g.u, the slope along an update before and after it.
        path: Length of the path travelled, with the last update standing for its window.
        squared_rate_free: Sum of |update|^2 / lr^2 (the denominator of DoG, Ivgi et al. 2023).
        farthest: Largest distance from the initial weights.
        eval_loss, eval_best, eval_count: Last and lowest loss on the controller's split, and evaluations seen.
        eval_accuracy, eval_best_accuracy: Last and highest accuracy on the controller's split, 0 where not measured.
    """

    initial_loss: Array
    initial_count: Array
    initial_gradient: Array
    step_count: Array
    decision_count: Array
    loss_fast: Array
    loss_slow: Array
    loss_variance: Array
    loss_minimum: Array
    gradient_fast: Array
    gradient_slow: Array
    cos_gradients_fast: Array
    cos_gradients_slow: Array
    cos_after_fast: Array
    cos_after_slow: Array
    cos_before_fast: Array
    cos_before_slow: Array
    cos_displacements_fast: Array
    cos_displacements_slow: Array
    cos_from_start: Array
    descent_before: Array
    descent_after: Array
    path: Array
    squared_rate_free: Array
    farthest: Array
    eval_loss: Array
    eval_best: Array
    eval_count: Array
    eval_accuracy: Array
    eval_best_accuracy: Array


_KEPT_OVER_RESTARTS = ("initial_loss", "initial_count", "initial_gradient")


def initial_state(shape: tuple[int, ...] = ()) -> RunState:
    """The state before the first step, zeros of `shape`."""
    return RunState(**{field.name: np.zeros(shape) if shape else 0.0 for field in fields(RunState)})


def _changed(state: RunState, **values: Array) -> RunState:
    """`dataclasses.replace`, which takes longer over so many fields than the arithmetic of a step."""
    new = object.__new__(RunState)
    new.__dict__.update(state.__dict__)
    new.__dict__.update(values)
    return new


def restart_state(state: RunState, mask: Array) -> RunState:
    """`state` with everything but the initial loss and gradient forgotten where `mask` is true."""
    return _changed(
        state,
        **{
            field.name: where(mask, 0.0, getattr(state, field.name))
            for field in fields(RunState)
            if field.name not in _KEPT_OVER_RESTARTS
        },
    )


def loss_cap(state: RunState) -> Array:
    """
    The loss from which on a run counts as diverged: 1000 times the initial loss, infinite before that is known.

    An initial loss below 1 counts as 1: losses that start near zero or below it may rise without harm.
    """
    return where(state.initial_count > 0, _LOSS_CAP * maximum(abs(state.initial_loss), 1.0), math.inf)


def loss_over_initial(state: RunState) -> Array:
    """Fast loss average over the initial loss; 0, which stands for good progress, where the latter is not positive."""
    known = state.initial_loss > _LOSS_EPS
    return where(known, state.loss_fast / where(known, state.initial_loss, 1.0), 0.0)


def capped_loss(loss: Array, state: RunState) -> Array:
    """`loss` as a finite number: at most `loss_cap`, and 1000 where not even the first loss was finite."""
    cap = loss_cap(state)
    if isinstance(loss, float) and -_LARGEST <= loss <= cap and loss <= _LARGEST:
        return loss  # as nearly all are, at every step of a run
    known = isfinite(cap)
    bad = where(known, cap, _LOSS_CAP)
    loss = where((loss != loss) | (loss == math.inf), bad, where(loss == -math.inf, 0.0, loss))
    # Squares of what is beyond overflow
    return clip(where(known, minimum(loss, bad), loss), -_LARGEST, _LARGEST)


def _loss_windows(num_training_steps: int) -> tuple[float, float]:
    """Steps that the fast and the slow average of the loss span."""
    return max(4.0, 0.02 * num_training_steps), max(12.0, 0.1 * num_training_steps)


def update_step(state: RunState, loss: Array, num_training_steps: int, decision_interval: int) -> RunState:
    """
    The state after one more training loss.

    The fast average spans about 2 % and the slow one about 10 % of the run, at least 4 and 12 steps.

    Args:
        state (`RunState`): The state before.
        loss (`float` or `np.ndarray`): Training loss of the step; at most 1000 times the initial loss is taken, for
            non-finite values too.
        num_training_steps (`int`): Length of the run in optimizer steps.
        decision_interval (`int`): Steps between two decisions.
    """
    finite = isfinite(loss)
    loss = capped_loss(loss, state)
    count = state.step_count + 1
    fast, slow = (1 / window for window in _loss_windows(num_training_steps))
    deviation = loss - state.loss_slow
    opening = (state.initial_count < max(3, decision_interval)) & finite
    initial_count = state.initial_count + opening
    return _changed(
        state,
        initial_loss=where(
            opening,
            state.initial_loss + (loss - state.initial_loss) / maximum(initial_count, 1),
            state.initial_loss,
        ),
        initial_count=initial_count,
        step_count=count,
        loss_fast=ema(state.loss_fast, loss, count, fast),
        loss_slow=ema(state.loss_slow, loss, count, slow),
        loss_variance=where(count > 1, ema(state.loss_variance, deviation * deviation, count, slow), 0.0),
    )


def update_evaluation(state: RunState, eval_loss: Array, eval_accuracy: Array = 0.0) -> RunState:
    """The state after an evaluation on the controller's split: mean loss, and accuracy from 0 to 1 where there is one."""
    eval_loss = maximum(capped_loss(eval_loss, state), 0.0)
    eval_accuracy = clip(without_nan(eval_accuracy), 0.0, 1.0)
    best = where(state.eval_count > 0, minimum(state.eval_best, eval_loss), eval_loss)
    return _changed(
        state,
        eval_loss=eval_loss,
        eval_best=best,
        eval_count=state.eval_count + 1,
        eval_accuracy=eval_accuracy + 0.0 * state.eval_accuracy,
        eval_best_accuracy=maximum(state.eval_best_accuracy, eval_accuracy),
    )


@dataclass(frozen=True)
class Moment:
    """
    A run at a decision: what the feature functions read.

    Args:
        state (`RunState`): Running statistics, this decision included.
        signals (`Mapping[str, float or np.ndarray]`): The inner products named in `SIGNALS`.
        step (`int`): Optimizer steps done.
        num_training_steps (`int`): Length of the run.
        decision_interval (`int`): Steps between two decisions.
        num_epochs (`float`): Passes over the training data in the whole run.
        adaptive (`bool`): Whether the optimizer scales updates by a gradient statistic (Adam and its kin).
        learning_rate (`float` or `np.ndarray`): Rate of the update `u` in the signals.
        peak_learning_rate (`float` or `np.ndarray`): The same rate without warmup and decay.
        last_change (`float` or `np.ndarray`): Change of ln(rate) at the last decision.
    """

    state: RunState
    signals: Mapping[str, Array]
    step: int
    num_training_steps: int
    decision_interval: int
    num_epochs: float
    adaptive: bool
    learning_rate: Array
    peak_learning_rate: Array
    last_change: Array

    @property
    def log_decay(self) -> Array:
        return ln(self.learning_rate / self.peak_learning_rate)

    @property
    def loss_deviation(self) -> Array:
        return sqrt(self.state.loss_variance + 1e-12)


def update_decision(
    state: RunState, signals: Mapping[str, Array], learning_rate: Array, decision_interval: int
) -> RunState:
    """
    The state after the signals of one more decision.

    Args:
        state (`RunState`): The state before.
        signals (`Mapping[str, float or np.ndarray]`): See `SIGNALS`; finite (see `clean_signals`).
        learning_rate (`float` or `np.ndarray`): Rate of the update in the signals.
        decision_interval (`int`): Steps since the last decision.
    """
    s = signals
    count = state.decision_count + 1
    gradient = sqrt(maximum(s["gg"], _EPS))
    floored_rate = maximum(learning_rate, 1e-30)
    first = count <= 1
    cos_gradients = cosine(s["gh"], s["gg"], s["hh"])
    cos_after = -cosine(s["gu"], s["gg"], s["uu"])
    cos_before = -cosine(s["hu"], s["hh"], s["uu"])
    cos_displacements = where(first, 0.0, cosine(s["de"], s["dd"], s["ee"]))
    return _changed(
        state,
        decision_count=count,
        initial_gradient=where(state.initial_gradient == 0, gradient, state.initial_gradient),
        loss_minimum=where(first, state.loss_fast, minimum(state.loss_minimum, state.loss_fast)),
        gradient_fast=ema(state.gradient_fast, gradient, count, 0.3),
        gradient_slow=ema(state.gradient_slow, gradient, count, 0.08),
        cos_gradients_fast=ema(state.cos_gradients_fast, cos_gradients, count, 0.3),
        cos_gradients_slow=ema(state.cos_gradients_slow, cos_gradients, count, 0.08),
        cos_after_fast=ema(state.cos_after_fast, cos_after, count, 0.3),
        cos_after_slow=ema(state.cos_after_slow, cos_after, count, 0.08),
        cos_before_fast=ema(state.cos_before_fast, cos_before, count, 0.3),
        cos_before_slow=ema(state.cos_before_slow, cos_before, count, 0.08),
        cos_displacements_fast=ema(state.cos_displacements_fast, cos_displacements, count, 0.3),
        cos_displacements_slow=ema(state.cos_displacements_slow, cos_displacements, count, 0.08),
        cos_from_start=ema(state.cos_from_start, -cosine(s["gx"], s["gg"], s["xx"]), count, 0.2),
        descent_before=ema(state.descent_before, -s["hu"], count, 0.15),
        descent_after=ema(state.descent_after, -s["gu"], count, 0.15),
        path=state.path + decision_interval * sqrt(maximum(s["uu"], _EPS)),
        squared_rate_free=state.squared_rate_free
        + decision_interval * maximum(s["uu"], _EPS) / (floored_rate * floored_rate),
        farthest=maximum(state.farthest, sqrt(maximum(s["xx"], _EPS))),
    )


def clean_signals(signals: Mapping[str, Array]) -> dict[str, Array]:
    """`signals` as float64 within +-1e18, NaN as 0."""
    return {name: clip(without_nan(_as_float64(signals[name])), -1e18, 1e18) for name in SIGNALS}


def _as_float64(x: Array) -> Array:
    return x.astype(np.float64, copy=False) if isinstance(x, np.ndarray) else float(x)


def progress(m: Moment) -> Array:
    """Share of the run that is over, from -1 to 1."""
    return 2.0 * m.step / m.num_training_steps - 1.0


def run_length(m: Moment) -> Array:
    """Length of the run, (ln T - 6) / 2, with T at most 4000."""
    return (ln(min(m.num_training_steps, _LONGEST)) - 6.0) / 2.0


def adaptive_optimizer(m: Moment) -> Array:
    """1 for optimizers that rescale gradients (Adam and its kin), -1 for SGD."""
    return 1.0 if m.adaptive else -1.0


def epochs(m: Moment) -> Array:
    """Passes over the data (at most 100), (ln epochs - 1) / 1.5: many passes overfit at rates that one pass needs."""
    return (ln(min(max(m.num_epochs, 1e-3), _MOST_EPOCHS)) - 1.0) / 1.5


def decisions(m: Moment) -> Array:
    """Decisions since the last restart, (ln k - 2) / 1.5: how warm the averages are."""
    return (ln(maximum(m.state.decision_count, 1.0)) - 2.0) / 1.5


def remaining(m: Moment) -> Array:
    """Share of the run that is left, ln(1 - t / T) / 2, at least ln(0.01) / 2."""
    return ln(max(1.0 - m.step / m.num_training_steps, 0.01)) / 2.0


def last_change(m: Moment) -> Array:
    """Twice the change of ln(rate) at the last decision."""
    return 2.0 * clip(m.last_change, -2.0, 2.0)


def gradient_agreement_fast(m: Moment) -> Array:
    """Cosine of successive gradients, over the last few decisions, times 2."""
    return 2.0 * m.state.cos_gradients_fast


def gradient_agreement_slow(m: Moment) -> Array:
    """Cosine of successive gradients, over many decisions, times 2."""
    return 2.0 * m.state.cos_gradients_slow


def overshoot_fast(m: Moment) -> Array:
    """Cosine of an update and the descent direction *after* it, times 2: negative where updates overshoot."""
    return 2.0 * m.state.cos_after_fast


def overshoot_slow(m: Moment) -> Array:
    """`overshoot_fast` over many decisions."""
    return 2.0 * m.state.cos_after_slow


def alignment_fast(m: Moment) -> Array:
    """Cosine of an update and the descent direction *before* it, times 2."""
    return 2.0 * m.state.cos_before_fast


def alignment_slow(m: Moment) -> Array:
    """`alignment_fast` over many decisions."""
    return 2.0 * m.state.cos_before_slow


def displacement_agreement_fast(m: Moment) -> Array:
    """Cosine of successive displacements between decisions, times 2: -1 where the weights bounce."""
    return 2.0 * m.state.cos_displacements_fast


def displacement_agreement_slow(m: Moment) -> Array:
    """`displacement_agreement_fast` over many decisions."""
    return 2.0 * m.state.cos_displacements_slow


def pull_from_start(m: Moment) -> Array:
    """Cosine of the descent direction and the way from the initial weights, times 2."""
    return 2.0 * m.state.cos_from_start


def window_growth(m: Moment) -> Array:
    """ln(|d| / (K |u|)): 0 where the updates of a window all point the same way, -ln(K) / 2 for a random walk."""
    s = m.signals
    return 0.5 * log(s["dd"] / (m.decision_interval**2 * maximum(s["uu"], _EPS)))


def straightness(m: Moment) -> Array:
    """ln(|x| / path): 0 for a straight line from the initial weights."""
    return 0.5 * log(m.signals["xx"]) - log(m.state.path)


def distance_over_gradients(m: Moment) -> Array:
    """
    ln(r / sqrt(sum |u|^2 / lr^2) / peak lr) / 2: the rate that DoG would take, relative to the present one.

    DoG (Ivgi et al., 2023) sets the rate to the largest distance from the start over the root of the summed squared
    gradients; with |u| / lr in the place of the gradient it serves any optimizer.
    """
    return (log(m.state.farthest) - 0.5 * log(m.state.squared_rate_free) - log(m.peak_learning_rate)) / 2.0


def loss_decrease(m: Moment) -> Array:
    """1.5 ln(fast loss / initial loss)."""
    state = m.state
    return 1.5 * ln(maximum(state.loss_fast, _LOSS_EPS) / maximum(state.initial_loss, _LOSS_EPS))


def loss_above_minimum(m: Moment) -> Array:
    """3 ln(fast loss / lowest fast loss)."""
    state = m.state
    return 3.0 * ln(maximum(state.loss_fast, _LOSS_EPS) / maximum(state.loss_minimum, _LOSS_EPS))


def loss_trend(m: Moment) -> Array:
    """(slow loss - fast loss) / standard deviation: positive while the loss falls faster than its noise."""
    return (m.state.loss_slow - m.state.loss_fast) / m.loss_deviation


def loss_ratio(m: Moment) -> Array:
    """5 ln(slow loss / fast loss)."""
    state = m.state
    return 5.0 * ln(maximum(state.loss_slow, _LOSS_EPS) / maximum(state.loss_fast, _LOSS_EPS))


def loss_noise(m: Moment) -> Array:
    """ln(standard deviation / slow loss) + 1.5."""
    return ln(m.loss_deviation / maximum(m.state.loss_slow, _LOSS_EPS)) + 1.5


def gradient_now(m: Moment) -> Array:
    """ln(gradient norm / its fast average)."""
    return 0.5 * log(m.signals["gg"]) - log(m.state.gradient_fast)


def gradient_trend(m: Moment) -> Array:
    """ln(fast average of the gradient norm / slow average)."""
    return log(m.state.gradient_fast) - log(m.state.gradient_slow)


def gradient_growth(m: Moment) -> Array:
    """ln(gradient norm / gradient norm at the first decision) / 2."""
    return (0.5 * log(m.signals["gg"]) - log(m.state.initial_gradient)) / 2.0


def update_ratio_matrices(m: Moment) -> Array:
    """
    Size of an update relative to the weight matrix it changes, decay taken out, corrected for width and depth.

    `(mean ln(|u_i| / |w_i|) + ln sqrt(width) + ln(number of matrices) - ln decay + 2.5) / 3`. The width correction is
    that of maximal-update parametrisation (Yang et al., 2022): a random update of a given relative norm changes the
    output of a wider matrix less than an aligned one.
    """
    s = m.signals
    return (s["matrix_update_ratio"] + s["matrix_width"] + s["matrix_count"] - m.log_decay + 2.5) / 3.0


def update_ratio_total(m: Moment) -> Array:
    """As `update_ratio_matrices`, for all weights taken as one vector."""
    s = m.signals
    ratio = 0.5 * log(maximum(s["uu"], _EPS) / maximum(s["ww"], _EPS))
    return (ratio + s["matrix_width"] + s["matrix_count"] - m.log_decay + 2.5) / 3.0


def distance_ratio(m: Moment) -> Array:
    """(ln(|x| / |initial weights|) + ln sqrt(width)) / 2."""
    s = m.signals
    return (0.5 * log(maximum(s["xx"], _EPS) / maximum(s["initial"], _EPS)) + s["matrix_width"]) / 2.0


def curvature(m: Moment) -> Array:
    """2 (a - b) / (|a| + |b|) with a, b the slopes along an update after and before it."""
    after, before = m.state.descent_after, m.state.descent_before
    return 2.0 * (after - before) / (abs(after) + abs(before) + _EPS)


def dead_gradients(m: Moment) -> Array:
    """Twice the mean share of exactly zero gradient entries: dead units, or rows of an embedding not in the batch."""
    return 2.0 * m.signals["zero_gradient"]


def update_gain(m: Moment) -> Array:
    """
    How much an update exceeds one plain step, in log space.

    Adaptive optimizers: ln(|u| / (lr sqrt(n))), 0 for a sign step and lower the noisier the gradients. Others:
    ln(|u| / (lr |h|)), which shows momentum and clipping.
    """
    s = m.signals
    step = 0.5 * log(maximum(s["uu"], _EPS)) - ln(maximum(m.learning_rate, 1e-30))
    return step - s["size"] if m.adaptive else step - 0.5 * log(s["hh"])


def evaluated(m: Moment) -> Array:
    """1 where the controller's split has been evaluated, else 0."""
    return (m.state.eval_count > 0) * 1.0


def generalization_gap(m: Moment) -> Array:
    """3 ln(loss on the controller's split / slow training loss), 0 without evaluations."""
    state = m.state
    gap = 3.0 * ln(maximum(state.eval_loss, _LOSS_EPS) / maximum(state.loss_slow, _LOSS_EPS))
    return where(state.eval_count > 0, gap, 0.0)


def eval_above_minimum(m: Moment) -> Array:
    """10 ln(loss on the controller's split / its lowest value), 0 without evaluations."""
    state = m.state
    rise = 10.0 * ln(maximum(state.eval_loss, _LOSS_EPS) / maximum(state.eval_best, _LOSS_EPS))
    return where(state.eval_count > 0, rise, 0.0)


def accuracy_below_maximum(m: Moment) -> Array:
    """10 times the fall of the accuracy on the controller's split from its highest value, 0 without evaluations."""
    return 10.0 * (m.state.eval_best_accuracy - m.state.eval_accuracy)


def predicted_decrease(m: Moment) -> Array:
    """
    (ln(|h.u| / slow loss) - ln decay + 5) / 3: the share of the loss that an update takes away to first order.

    It is the inverse of the step of Polyak (1987), loss / |h|^2 with a lowest loss of 0, relative to the present one, and
    holds for any model: whatever its width and depth, these are units of its output.
    """
    share = abs(m.state.descent_before) / maximum(m.state.loss_slow, _LOSS_EPS)
    return (log(share) - m.log_decay + 5.0) / 3.0


def curvature_cost(m: Moment) -> Array:
    """(ln(|h.u - g.u| / slow loss) - 2 ln decay + 5) / 3: the share of the loss that the curvature takes back."""
    share = abs(m.state.descent_after - m.state.descent_before) / maximum(m.state.loss_slow, _LOSS_EPS)
    return (log(share) - 2.0 * m.log_decay + 5.0) / 3.0


def trust_ratio(m: Moment) -> Array:
    """
    2 q / (1 + |q|) with q the fall of the loss over the one predicted to first order, as in trust-region methods.

    The fall is the one between the slow and the fast average of the loss, whose values are half the length of their
    windows old.
    """
    state = m.state
    fast, slow = _loss_windows(m.num_training_steps)
    age = 0.5 * (minimum(state.step_count, slow) - minimum(state.step_count, fast))
    predicted = abs(state.descent_before) * maximum(age, 1.0)
    ratio = (state.loss_slow - state.loss_fast) / maximum(predicted, _EPS)
    return 2.0 * ratio / (1.0 + abs(ratio))


def eval_decrease(m: Moment) -> Array:
    """1.5 ln(loss on the controller's split / initial training loss), 0 without evaluations."""
    state = m.state
    fall = 1.5 * ln(maximum(state.eval_loss, _LOSS_EPS) / maximum(state.initial_loss, _LOSS_EPS))
    return where(state.eval_count > 0, fall, 0.0)


def convolution_width(m: Moment) -> Array:
    """
    Part of the width correction of the update ratios that is due to kernels of convolutions.

    In wider transformers the best update is a smaller share of the weights, as the correction has it; in wider convolutional nets
    it is not. A model without convolutions has 0 here; at most 1.7.
    """
    return minimum(m.signals["kernel_width"], _WIDEST_KERNELS)


FEATURES: tuple[Callable[[Moment], Array], ...] = (
    progress,
    run_length,
    adaptive_optimizer,
    epochs,
    decisions,
    remaining,
    last_change,
    gradient_agreement_fast,
    gradient_agreement_slow,
    overshoot_fast,
    overshoot_slow,
    alignment_fast,
    alignment_slow,
    displacement_agreement_fast,
    displacement_agreement_slow,
    pull_from_start,
    window_growth,
    straightness,
    distance_over_gradients,
    loss_decrease,
    loss_above_minimum,
    loss_trend,
    loss_ratio,
    loss_noise,
    gradient_now,
    gradient_trend,
    gradient_growth,
    update_ratio_matrices,
    update_ratio_total,
    distance_ratio,
    curvature,
    dead_gradients,
    update_gain,
    evaluated,
    generalization_gap,
    eval_above_minimum,
    accuracy_below_maximum,
    predicted_decrease,
    curvature_cost,
    trust_ratio,
    eval_decrease,
    convolution_width,
)
FEATURE_NAMES: tuple[str, ...] = tuple(feature.__name__ for feature in FEATURES)


def feature_vector(moment: Moment) -> np.ndarray:
    """
    All features of a moment, clamped to +-4, NaN as 0.

    Returns:
        `np.ndarray` of float64, shape `[*members, num_features]`, in the order of `FEATURE_NAMES`.
    """
    shape = np.shape(moment.state.loss_fast)
    values = [feature(moment) for feature in FEATURES]
    if shape:
        values = [np.broadcast_to(value, shape) for value in values]
    stacked = np.stack(values, axis=-1) if shape else np.array(values)
    return without_nan(np.minimum(np.maximum(stacked, -_LIMIT), _LIMIT))
