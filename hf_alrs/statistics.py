"""
Many runs' scores turned into evidence. Pure functions over `scores` of shape `(num_runs, num_tasks)`.

Every random number comes from a `np.random.Generator` that the caller passes, so that a report built twice from the
same files is the same. Runs that failed enter as the worst value (`inf` for losses) and stay in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


__all__ = [
    "Interval",
    "PairedDifference",
    "Summary",
    "describe",
    "holm",
    "interquartile_mean",
    "paired_difference",
    "performance_profile",
    "probability_of_improvement",
    "sign_flip_test",
    "stratified_bootstrap",
    "time_ratios",
]


class Interval(NamedTuple):
    """Lower and upper end; both `nan` where the data allow no interval, as with a single run."""

    low: float
    high: float


class Summary(NamedTuple):
    """Number, mean, sample standard deviation (`nan` for a single run) and median of some scores."""

    num_runs: int
    mean: float
    sd: float
    median: float


class PairedDifference(NamedTuple):
    """Differences of runs that share a seed: their number, mean, interval of the mean, and permutation p-value."""

    num_pairs: int
    mean: float
    interval: Interval
    p_value: float


def describe(scores: ArrayLike) -> Summary:
    """
    Mean, standard deviation and median.

    Args:
        scores (`ArrayLike` of any shape): Scores; infinite ones make the mean infinite and leave the median alone.

    Returns:
        [`Summary`]: `sd` is the sample standard deviation (`ddof=1`), `nan` with one score or an infinite one.
    """
    scores = np.asarray(scores, dtype=float).ravel()
    if not scores.size:
        return Summary(0, math.nan, math.nan, math.nan)
    spread = scores.std(ddof=1) if scores.size > 1 and np.isfinite(scores).all() else math.nan
    # The middle order statistics themselves: np.median would subtract one infinity from another.
    ordered = np.sort(scores)
    low, high = ordered[(scores.size - 1) // 2], ordered[scores.size // 2]
    return Summary(scores.size, float(scores.mean()), float(spread), float(low if low == high else (low + high) / 2))


def interquartile_mean(scores: ArrayLike) -> np.ndarray:
    """
    Mean of the middle half of all runs of all tasks: as efficient as the mean, as robust as the median.

    Source: Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice", 2021.

    Args:
        scores (`ArrayLike` of shape `(..., num_runs, num_tasks)`): Leading dimensions are kept.

    Returns:
        `np.ndarray` of shape `(...)`: 25 % trimmed mean over runs and tasks together.
    """
    scores = np.asarray(scores, dtype=float)
    return np.asarray(stats.trim_mean(scores.reshape(*scores.shape[:-2], -1), 0.25, axis=-1))


def probability_of_improvement(scores: ArrayLike, baseline: ArrayLike, higher_is_better: bool = True) -> np.ndarray:
    """
    Probability that a run of the first scheduler beats a run of the other on a random task; a tie counts one half.

    The Mann-Whitney statistic of each task divided by the number of pairs, averaged over tasks (Agarwal et al., 2021).

    Args:
        scores (`ArrayLike` of shape `(..., num_runs, num_tasks)`): Scores of the first scheduler.
        baseline (`ArrayLike` of shape `(..., num_baseline_runs, num_tasks)`): Scores of the other.
        higher_is_better (`bool`, *optional*, defaults to `True`): `False` for losses.

    Returns:
        `np.ndarray` of shape `(...)`: Between 0 and 1.
    """
    first = np.asarray(scores, dtype=float)[..., :, None, :]
    second = np.asarray(baseline, dtype=float)[..., None, :, :]
    wins = first > second if higher_is_better else first < second
    return (wins + 0.5 * (first == second)).mean(axis=(-3, -2, -1))


def stratified_bootstrap(
    statistic: Callable[..., np.ndarray],
    *scores: ArrayLike,
    generator: np.random.Generator,
    confidence: float = 0.95,
    num_resamples: int = 2000,
) -> Interval:
    """
    Percentile interval of a statistic when the runs of every task are drawn again with replacement, task by task.

    Tasks are not resampled: the interval speaks of other seeds on these tasks, not of other tasks.

    Args:
        statistic (`Callable`):
            Takes as many arrays as `scores` has, of shape `(num_resamples, num_runs, num_tasks)`, and returns one value
            for each resample, as [`interquartile_mean`] does.
        scores (`ArrayLike` of shape `(num_runs, num_tasks)`): One or several score matrices, resampled independently.
        generator (`np.random.Generator`): Source of the resamples.
        confidence (`float`, *optional*, defaults to 0.95): Coverage that is aimed at.
        num_resamples (`int`, *optional*, defaults to 2000): Number of bootstrap samples.

    Returns:
        [`Interval`]: `nan` at both ends when any matrix has a single run: one run says nothing about its spread.
    """
    matrices = [np.asarray(matrix, dtype=float) for matrix in scores]
    if min(matrix.shape[0] for matrix in matrices) < 2:
        return Interval(math.nan, math.nan)
    resampled = []
    for matrix in matrices:
        num_runs, num_tasks = matrix.shape
        rows = generator.integers(num_runs, size=(num_resamples, num_runs, num_tasks))
        resampled.append(matrix[rows, np.arange(num_tasks)])
    tail = (1 - confidence) / 2
    # An observed value at each end: interpolating between two infinite ones would give nan.
    low, high = np.quantile(statistic(*resampled), [tail, 1 - tail], method="inverted_cdf")
    return Interval(float(low), float(high))


def sign_flip_test(
    differences: ArrayLike, generator: np.random.Generator | None = None, max_resamples: int = 2**14
) -> float:
    """
    Two-sided permutation test of paired differences: under the null hypothesis every sign is a fair coin.

    Exact, over all `2 ** num_pairs` sign patterns, while those are at most `max_resamples`. The smallest p-value that
    `n` pairs can give is `2 ** (1 - n)`. Infinite differences are replaced by signed ranks, as in Wilcoxon's test.

    Args:
        differences (`ArrayLike` of shape `(num_pairs,)`): One difference for each pair.
        generator (`np.random.Generator`, *optional*): Source of the sign patterns where they are too many to list.
        max_resamples (`int`, *optional*, defaults to 16384): Sign patterns looked at.

    Returns:
        `float`: The p-value; `nan` without any pair.
    """
    differences = np.asarray(differences, dtype=float)
    if not differences.size:
        return math.nan
    if not np.isfinite(differences).all():
        differences = np.sign(differences) * stats.rankdata(np.abs(differences))
    if differences.size == 1:
        return 1.0
    scale = np.abs(differences).max() or 1.0

    def mean(patterns: np.ndarray, axis: int = -1) -> np.ndarray:
        # Shares such as accuracies tie exactly in examples, and only nearly in floats: a tie is as extreme as the outcome.
        return np.round(np.mean(patterns, axis=axis) / scale, 9)

    outcome = stats.permutation_test(
        (differences,),
        mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=max_resamples,
        rng=generator,
    )
    return float(outcome.pvalue)


def holm(p_values: ArrayLike) -> np.ndarray:
    """
    Holm's step-down correction, which keeps the chance of any false claim among all comparisons below the level.

    Source: Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979.

    Args:
        p_values (`ArrayLike` of shape `(num_comparisons,)`): Uncorrected p-values of one family of comparisons.

    Returns:
        `np.ndarray` of shape `(num_comparisons,)`: Corrected p-values, in the order given.
    """
    p_values = np.asarray(p_values, dtype=float)
    order = np.argsort(p_values, kind="stable")
    steps = p_values[order] * np.arange(p_values.size, 0, -1)
    corrected = np.empty_like(p_values)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return corrected


def paired_difference(
    scores: ArrayLike,
    baseline: ArrayLike,
    generator: np.random.Generator | None = None,
    higher_is_better: bool = True,
    confidence: float = 0.95,
) -> PairedDifference:
    """
    How much better the first scheduler's runs are than the other's runs of the same seed.

    The interval is Student's for the mean of the differences. A percentile bootstrap would be far too narrow for the
    three to five seeds that are usual: of three differences with equal signs, which chance gives one time in four, it
    always excludes zero. Two runs that both failed count as equal. Where only one of a pair failed the mean is infinite
    and the interval is the whole line, unless all pairs agree that way.

    Args:
        scores (`ArrayLike` of shape `(num_pairs,)`): Scores of the first scheduler.
        baseline (`ArrayLike` of shape `(num_pairs,)`): Scores of the other, in the same order of seeds.
        generator (`np.random.Generator`, *optional*): For [`sign_flip_test`] with many pairs.
        higher_is_better (`bool`, *optional*, defaults to `True`): `False` for losses.
        confidence (`float`, *optional*, defaults to 0.95): Coverage of the interval.

    Returns:
        [`PairedDifference`]: Positive means better than the baseline, whatever the direction of the score. The interval
        is `nan` with a single pair, and with two that do not vary.
    """
    scores, baseline = np.asarray(scores, dtype=float), np.asarray(baseline, dtype=float)
    both_failed = np.isinf(scores) & (scores == baseline)
    differences = np.zeros(scores.shape)
    np.subtract(scores, baseline, out=differences, where=~both_failed)
    if not higher_is_better:
        # Adding zero turns the -0.0 of a tie into 0.0.
        differences = -differences + 0.0
    num_pairs, p_value = differences.size, sign_flip_test(differences, generator)
    infinite = differences[np.isinf(differences)]
    if infinite.size:
        agree = bool((infinite == infinite[0]).all())
        mean = float(infinite[0]) if agree else math.nan
        whole_line = Interval(-math.inf, math.inf)
        interval = Interval(mean, mean) if agree and infinite.size == num_pairs else whole_line
    else:
        mean = float(differences.mean()) if num_pairs else math.nan
        margin = 0.0
        if num_pairs > 1:
            margin = stats.t.ppf((1 + confidence) / 2, num_pairs - 1) * stats.sem(differences)
        interval = Interval(float(mean - margin), float(mean + margin))
    # Two differences may be equal by chance, as those of accuracies often are, and then say nothing of how they vary
    if num_pairs < 2 or (num_pairs == 2 and mean != 0 and interval.low == interval.high and math.isfinite(mean)):
        interval = Interval(math.nan, math.nan)
    return PairedDifference(num_pairs, mean, interval, p_value)


def time_ratios(times: ArrayLike) -> np.ndarray:
    """
    Times to the target relative to the fastest scheduler of each workload.

    Args:
        times (`ArrayLike` of shape `(num_schedulers, num_workloads)`): Times to the target, `inf` where it was missed.

    Returns:
        `np.ndarray` of the same shape: 1 for the fastest, `inf` where the target was missed, also where all missed it.
    """
    times = np.asarray(times, dtype=float)
    best = times.min(axis=0, keepdims=True)
    return np.divide(times, best, out=np.full(times.shape, math.inf), where=np.isfinite(times))


def performance_profile(times: ArrayLike, factors: ArrayLike) -> np.ndarray:
    r"""
    Share of workloads on which each scheduler reaches the target within a factor of the fastest,

    $$\rho_s(\tau) = \frac{1}{|W|} \left|\{w : t_{s,w} \le \tau \min_{s'} t_{s',w}\}\right|$$

    A missed target is never within any factor and stays in the denominator. Sources: Dolan and Moré, "Benchmarking
    Optimization Software with Performance Profiles", 2002; Dahl et al., "Benchmarking Neural Network Training
    Algorithms" (AlgoPerf), 2023.

    Args:
        times (`ArrayLike` of shape `(num_schedulers, num_workloads)`): Times to the target, `inf` where it was missed.
        factors (`ArrayLike` of shape `(num_factors,)`): Values of tau, from 1 up.

    Returns:
        `np.ndarray` of shape `(num_schedulers, num_factors)`: Shares between 0 and 1.
    """
    ratios, factors = time_ratios(times), np.asarray(factors, dtype=float)
    return (ratios[:, :, None] <= factors).mean(axis=1)
