"""
One run's history turned into numbers. Pure functions over plain arrays; nothing here knows where a run was stored.

A target that was never reached is `math.inf`, never dropped, so that it stays in every median and every table. A
measure that the run holds too little data for is `math.nan`.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy.ndimage import median_filter


__all__ = [
    "area_under_curve",
    "best_value",
    "controller_share",
    "learning_rate_range",
    "learning_rate_stability",
    "loss_stability",
    "position_of_target",
    "tuning_free_regret",
    "worst_value",
]


def worst_value(metric: str) -> float:
    """
    What a run that crashed or diverged is counted as.

    Args:
        metric (`str`): Name of the metric, with its prefix, as in `eval_loss`.

    Returns:
        `float`: `inf` for a loss, the lower end of the scale for metrics that have one (0 for accuracy and F1, -1 for
        correlations), `-inf` for any other metric.
    """
    if metric.endswith("loss"):
        return math.inf
    if metric.endswith(("accuracy", "f1", "precision", "recall", "roc_auc", "exact_match")):
        return 0.0
    if metric.endswith(("correlation", "pearson", "pearsonr", "spearmanr")):
        return -1.0
    return -math.inf


def best_value(values: ArrayLike, higher_is_better: bool = False) -> float:
    """
    Best value over all evaluations; those that are not a number count for nothing.

    Args:
        values (`ArrayLike` of shape `(num_evaluations,)`): One metric over the run.
        higher_is_better (`bool`, *optional*, defaults to `False`): `True` for accuracy and F1, `False` for losses.

    Returns:
        `float`: The maximum or the minimum; `nan` when no value is a number.
    """
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    if not values.size:
        return math.nan
    return float(values.max() if higher_is_better else values.min())


def position_of_target(
    positions: ArrayLike, values: ArrayLike, target: float, higher_is_better: bool = False
) -> float:
    """
    Convergence speed: where an evaluation first reaches the target.

    `positions` chooses the unit: optimizer steps, epochs or training seconds. Nothing is interpolated between two
    evaluations, so the answer is never earlier than what was measured.

    Args:
        positions (`ArrayLike` of shape `(num_evaluations,)`): Where each evaluation took place, increasing.
        values (`ArrayLike` of shape `(num_evaluations,)`): The metric there.
        target (`float`): Value to reach; equality reaches it.
        higher_is_better (`bool`, *optional*, defaults to `False`): `True` for accuracy and F1, `False` for losses.

    Returns:
        `float`: The position in the unit of `positions`; `inf` when the target was missed.
    """
    positions, values = np.asarray(positions, dtype=float), np.asarray(values, dtype=float)
    # A comparison with nan is False, so an evaluation that is not a number reaches nothing.
    reached = np.flatnonzero(values >= target if higher_is_better else values <= target)
    return float(positions[reached[0]]) if reached.size else math.inf


def interpolated_position_of_target(positions: ArrayLike, values: ArrayLike, target: float) -> float:
    """
    Where a loss first comes down to the target, with straight lines between the evaluations: for means over several runs, which are
    evaluated at the same few places.

    Args:
        positions (`ArrayLike` of shape `(num_evaluations,)`): Where each evaluation took place, increasing.
        values (`ArrayLike` of shape `(num_evaluations,)`): The loss there.
        target (`float`): Value to reach; equality reaches it.

    Returns:
        `float`: The position in the unit of `positions`, never before the first evaluation; `inf` when the target was missed.
    """
    positions, values = np.asarray(positions, dtype=float), np.asarray(values, dtype=float)
    reached = np.flatnonzero(values <= target)
    if not reached.size:
        return math.inf
    last = reached[0]
    if last == 0 or not np.isfinite(values[last - 1]):
        return float(positions[last])
    share = (values[last - 1] - target) / (values[last - 1] - values[last])
    return float(positions[last - 1] + share * (positions[last] - positions[last - 1]))


def _log_of_positive(learning_rate: ArrayLike) -> np.ndarray:
    # Schedules that anneal to exactly 0 (or warm up from it) would make every log measure infinite, whatever they did
    # before; such steps train nothing and are left out.
    learning_rate = np.asarray(learning_rate, dtype=float)
    return np.log(learning_rate[np.isfinite(learning_rate) & (learning_rate > 0)])


def learning_rate_stability(learning_rate: ArrayLike) -> float:
    r"""
    How unevenly the learning rate moves: the standard deviation of its successive changes on a log scale,

    $$\operatorname{sd}_t\left(\ln \eta_{t+1} - \ln \eta_t\right)$$

    A constant rate and a rate that decays by the same factor at every step both give 0; jumps give large values.

    Args:
        learning_rate (`ArrayLike` of shape `(num_steps,)`):
            Learning rate of every optimizer step. Steps at a rate of 0 are left out.

    Returns:
        `float`: Population standard deviation, in nats per step; `nan` with fewer than two steps.
    """
    changes = np.diff(_log_of_positive(learning_rate))
    return float(changes.std()) if changes.size else math.nan


def learning_rate_range(learning_rate: ArrayLike) -> float:
    r"""
    How far the learning rate travels, $\log_{10}(\max_t \eta_t / \min_t \eta_t)$.

    Args:
        learning_rate (`ArrayLike` of shape `(num_steps,)`):
            Learning rate of every optimizer step. Steps at a rate of 0 are left out.

    Returns:
        `float`: Decades; `nan` without any step.
    """
    logs = _log_of_positive(learning_rate)
    return float((logs.max() - logs.min()) / math.log(10)) if logs.size else math.nan


def loss_stability(loss: ArrayLike, window: int | None = None) -> float:
    r"""
    Noise of the training loss: its variance after the trend has been taken out,

    $$\operatorname{Var}_t\left(L_t - \operatorname{median}(L_{t-h}, \dots, L_{t+h})\right)$$

    The trend is a centred running median (Tukey's smoother), which follows both the steep start and the flat end of a
    loss curve and is not dragged along by a single spike. A straight line, also in log space, would count curvature
    as noise. Smaller is more stable.

    Args:
        loss (`ArrayLike` of shape `(num_steps,)`): Training loss of every optimizer step.
        window (`int`, *optional*):
            Width `2h + 1` of the median in steps. Defaults to a twentieth of the run, at least 5, always odd.

    Returns:
        `float`: Variance in squared units of the loss; `nan` with fewer steps than the window, `inf` when any step's
        loss is not finite.
    """
    loss = np.asarray(loss, dtype=float)
    window = window if window is not None else max(5, loss.size // 20)
    window += 1 - window % 2
    if loss.size < window:
        return math.nan
    if not np.isfinite(loss).all():
        return math.inf
    trend = median_filter(loss, size=window, mode="nearest")
    return float(np.var(loss - trend))


def controller_share(controller_seconds: float, train_seconds: float) -> float:
    """
    Overhead: the controller's share of the step time.

    Args:
        controller_seconds (`float`): Seconds spent in the controller.
        train_seconds (`float`): Seconds of training, those of the controller included, without evaluation.

    Returns:
        `float`: Between 0 and 1; `nan` when no time was spent training.
    """
    return controller_seconds / train_seconds if train_seconds > 0 else math.nan


def area_under_curve(positions: ArrayLike, values: ArrayLike, start: float | None = None) -> float:
    r"""
    Area under a learning curve by the trapezoidal rule, divided by its length, so that it has the metric's own unit,

    $$\frac{1}{x_n - x_1} \sum_i \tfrac{1}{2} (v_i + v_{i+1}) (x_{i+1} - x_i)$$

    Args:
        positions (`ArrayLike` of shape `(num_evaluations,)`): Where each evaluation took place, increasing.
        values (`ArrayLike` of shape `(num_evaluations,)`): The metric there.
        start (`float`, *optional*): Leave out what lies before, and go on from the line between its neighbours: curves
            that begin at different positions are of different stretches otherwise.

    Returns:
        `float`: Mean height of the curve; `nan` with fewer than two evaluations.
    """
    positions, values = np.asarray(positions, dtype=float), np.asarray(values, dtype=float)
    if start is not None and positions.size and positions[0] < start < positions[-1]:
        kept = positions > start
        values = np.concatenate([[np.interp(start, positions, values)], values[kept]])
        positions = np.concatenate([[start], positions[kept]])
    if positions.size < 2:
        return math.nan
    area = np.sum((values[1:] + values[:-1]) / 2 * np.diff(positions))
    return float(area / (positions[-1] - positions[0]))


def tuning_free_regret(scores: ArrayLike, baseline_scores: ArrayLike, higher_is_better: bool = False) -> np.ndarray:
    """
    What a user loses by not tuning: the best cell of the tuned baselines minus the scheduler at each initial rate.

    Args:
        scores (`ArrayLike` of shape `(num_rates,)`): Scores of the scheduler, one for each initial learning rate.
        baseline_scores (`ArrayLike` of shape `(num_baselines, num_rates)`):
            Scores of the baselines. Cells that were not run are `nan`.
        higher_is_better (`bool`, *optional*, defaults to `False`): `True` for accuracy and F1, `False` for losses.

    Returns:
        `np.ndarray` of shape `(num_rates,)`: Regret in the unit of the scores. Positive where the best tuned baseline
        is ahead, negative where the scheduler beats it.
    """
    scores, baseline_scores = np.asarray(scores, dtype=float), np.asarray(baseline_scores, dtype=float)
    best = np.nanmax(baseline_scores) if higher_is_better else np.nanmin(baseline_scores)
    # Where the scheduler failed and so did every baseline, nobody is ahead.
    differ = scores != best
    regret = np.subtract(best, scores, out=np.zeros(scores.shape), where=differ)
    return regret if higher_is_better else 0.0 - regret
