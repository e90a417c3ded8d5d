import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_alrs import statistics


# Four runs of two tasks. Sorted together: 1 1 2 3 | 4 5 6 7; the middle half is 2 3 4 5.
SCORES = np.array([[1.0, 4.0], [2.0, 5.0], [3.0, 6.0], [1.0, 7.0]])


def test_describe():
    assert statistics.describe([1, 2, 4]) == (3, pytest.approx(7 / 3), pytest.approx(math.sqrt(7 / 3)), 2.0)
    assert statistics.describe([1, 2, 4, 8]).median == 3.0


def test_describe_keeps_infinite_scores():
    summary = statistics.describe([1.0, math.inf, 2.0])
    assert summary.mean == math.inf and summary.median == 2.0 and math.isnan(summary.sd)
    assert statistics.describe([1.0, math.inf, math.inf, math.inf]).median == math.inf


def test_describe_one_run_has_no_deviation():
    summary = statistics.describe([0.5])
    assert summary[:2] == (1, 0.5) and math.isnan(summary.sd)
    assert statistics.describe([]).num_runs == 0


def test_interquartile_mean_is_the_mean_of_the_middle_half():
    assert statistics.interquartile_mean(SCORES) == 3.5
    spoiled = SCORES.copy()
    spoiled[3, 1] = math.inf
    assert statistics.interquartile_mean(spoiled) == 3.5


def test_interquartile_mean_keeps_leading_dimensions():
    assert statistics.interquartile_mean(np.stack([SCORES, SCORES + 1])).tolist() == [3.5, 4.5]


def test_probability_of_improvement_counts_pairs_and_halves_ties():
    first, second = np.array([[1.0, 5.0], [3.0, 6.0]]), np.array([[2.0, 1.0], [3.0, 2.0]])
    # Task 1: 1<2, 1<3, 3>2, 3=3 -> 1.5 of 4. Task 2: 4 of 4.
    assert statistics.probability_of_improvement(first, second) == pytest.approx((1.5 / 4 + 1) / 2)
    assert statistics.probability_of_improvement(first, second, higher_is_better=False) == pytest.approx(2.5 / 8)
    failed = np.full((2, 1), math.inf)
    assert statistics.probability_of_improvement(failed, failed, higher_is_better=False) == 0.5


def test_bootstrap_resamples_within_tasks_only():
    # Every task is constant, so drawing its runs again changes nothing, and drawing across tasks would.
    constant = np.array([[1.0, 9.0, 5.0]] * 4)
    interval = statistics.stratified_bootstrap(
        statistics.interquartile_mean, constant, generator=np.random.default_rng(0), num_resamples=50
    )
    assert interval == (statistics.interquartile_mean(constant),) * 2


def test_bootstrap_agrees_with_the_enumeration_of_all_resamples():
    scores = np.array([[0.0], [1.0]])
    interval = statistics.stratified_bootstrap(
        lambda resampled: resampled.mean(axis=(-2, -1)),
        scores,
        generator=np.random.default_rng(0),
        confidence=0.8,
        num_resamples=4000,
    )
    # The mean is 0, 1/2, 1 with chances 1/4, 1/2, 1/4, so both 10 % tails lie on an end.
    assert interval == (0.0, 1.0)


def test_bootstrap_depends_on_its_generator_only():
    def interval(seed):
        return statistics.stratified_bootstrap(
            statistics.interquartile_mean, SCORES, generator=np.random.default_rng(seed), num_resamples=200
        )

    assert interval(3) == interval(3)
    low, high = interval(3)
    assert 1.0 <= low <= 3.5 <= high <= 7.0


def test_bootstrap_of_one_run_is_no_interval():
    interval = statistics.stratified_bootstrap(
        statistics.interquartile_mean, SCORES[:1], generator=np.random.default_rng(0)
    )
    assert all(map(math.isnan, interval))


def test_bootstrap_with_infinite_scores_has_no_nan():
    scores = np.array([[1.0], [math.inf], [math.inf]])
    interval = statistics.stratified_bootstrap(
        statistics.interquartile_mean, scores, generator=np.random.default_rng(0), num_resamples=300
    )
    assert interval == (1.0, math.inf)


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([1.0, 2.0, 3.0], 0.25),  # 2 of 8 sign patterns are as extreme
        ([1.0, 2.0, -3.0], 1.0),
        ([1.0, 2.0, -0.5], 0.5),  # sums of at least 2.5: (+,+,+) and (+,+,-), doubled
        ([1.0] * 5, 2 / 32),
        ([2.0], 1.0),
        ([0.0, 0.0, 0.0], 1.0),
    ],
)
def test_sign_flip_is_exact_for_few_pairs(differences, expected):
    assert statistics.sign_flip_test(differences) == pytest.approx(expected)


@pytest.mark.parametrize("total", [179, 872, 10_000, 25_000])
def test_sign_flip_counts_ties_of_shares(total):
    def p_value(*examples):
        right = np.floor(np.linspace(0.8, 0.9, len(examples)) * total)
        return statistics.sign_flip_test((right + examples) / total - right / total)

    assert p_value(0, -1, 2, -1, 1) == 1.0  # the sum is odd, so at least 1, whatever the signs
    assert p_value(1, 1, 1, 1, -1, 1, 1, 1) == pytest.approx(2 * (1 + 8) / 256)


def test_sign_flip_of_infinite_differences_uses_ranks():
    assert statistics.sign_flip_test([math.inf, math.inf, math.inf]) == pytest.approx(0.25)
    # Signed ranks 3, 2, -1: sums of at least 4 are (+,+,+) and (+,+,-).
    assert statistics.sign_flip_test([math.inf, 2.0, -1.0]) == pytest.approx(0.5)
    assert math.isnan(statistics.sign_flip_test([]))


def test_sign_flip_samples_when_there_are_too_many_patterns():
    differences = np.random.default_rng(1).normal(0.1, 1.0, size=30)
    p_value = statistics.sign_flip_test(differences, np.random.default_rng(0), max_resamples=999)
    assert 0 < p_value <= 1
    assert p_value == statistics.sign_flip_test(differences, np.random.default_rng(0), max_resamples=999)


def test_holm_by_hand():
    # Sorted .01 .03 .04 times 3 2 1 = .03 .06 .04, made monotone: .03 .06 .06.
    assert statistics.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert statistics.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert statistics.holm([]).size == 0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_no_correction_and_bonferroni(p_values):
    corrected = statistics.holm(p_values)
    assert (corrected >= np.array(p_values) - 1e-12).all()
    assert (corrected <= np.minimum(np.array(p_values) * len(p_values), 1) + 1e-12).all()


def test_paired_difference_by_hand():
    difference = statistics.paired_difference([3.0, 5.0, 4.0], [2.0, 2.0, 2.0])
    # Differences 1, 3, 2: mean 2, standard error 1/sqrt(3), t(0.975, 2) = 4.3027.
    margin = 4.302653 / math.sqrt(3)
    assert difference.num_pairs == 3 and difference.mean == 2.0 and difference.p_value == pytest.approx(0.25)
    assert difference.interval == pytest.approx((2 - margin, 2 + margin))


def test_paired_difference_of_losses_is_positive_where_they_are_lower():
    difference = statistics.paired_difference([0.3, 0.4], [0.5, 0.5], higher_is_better=False)
    assert difference.mean == pytest.approx(0.15)


def test_interval_covers_as_often_as_it_says():
    # A percentile bootstrap of three pairs would miss a true difference of zero one time in four.
    generator, hits = np.random.default_rng(0), 0
    for _ in range(300):
        low, high = statistics.paired_difference(generator.normal(size=3), np.zeros(3)).interval
        hits += low <= 0 <= high
    assert hits / 300 == pytest.approx(0.95, abs=0.03)


def test_paired_difference_of_one_seed_has_no_interval():
    difference = statistics.paired_difference([0.9], [0.8])
    assert difference.mean == pytest.approx(0.1) and all(map(math.isnan, difference.interval))
    assert statistics.paired_difference([], []).num_pairs == 0


def test_two_equal_differences_tell_no_interval():
    """Accuracies of few examples: one example more each time, which says nothing of how the difference varies."""
    equal = statistics.paired_difference([0.75, 0.5], [0.5, 0.25])
    assert equal.mean == 0.25
    assert all(map(math.isnan, equal.interval))
    other = statistics.paired_difference([0.75, 0.5], [0.5, 0.125])
    assert not any(map(math.isnan, other.interval))


def test_paired_difference_with_failed_runs():
    inf = math.inf
    always = statistics.paired_difference([0.4] * 3, [inf] * 3, higher_is_better=False)
    assert always.interval == (inf, inf) and always.mean == inf
    once = statistics.paired_difference([0.4, 0.4, 0.4], [inf, 0.5, 0.5], higher_is_better=False)
    assert once.interval == (-inf, inf) and once.mean == inf
    both_ways = statistics.paired_difference([0.4, inf], [inf, 0.5], higher_is_better=False)
    assert math.isnan(both_ways.mean) and both_ways.interval == (-inf, inf)
    equal = statistics.paired_difference([inf, inf], [inf, inf], higher_is_better=False)
    assert equal.mean == 0.0 and equal.interval == (0.0, 0.0)


TIMES = np.array([[10.0, 40.0, math.inf, math.inf], [20.0, 20.0, 30.0, math.inf]])


def test_time_ratios_keep_what_was_missed():
    expected = [[1.0, 2.0, math.inf, math.inf], [2.0, 1.0, 1.0, math.inf]]
    assert statistics.time_ratios(TIMES).tolist() == expected


def test_performance_profile_by_hand():
    profile = statistics.performance_profile(TIMES, [1.0, 1.9, 2.0, 1e9])
    assert profile.tolist() == [[0.25, 0.25, 0.5, 0.5], [0.5, 0.5, 0.75, 0.75]]
