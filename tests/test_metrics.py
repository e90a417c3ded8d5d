import math

import numpy as np
import pytest

from hf_alrs import metrics


STEPS = [10, 20, 30, 40]
LOSSES = [0.9, 0.5, 0.6, 0.4]


@pytest.mark.parametrize(
    ("target", "expected"), [(0.95, 10), (0.9, 10), (0.55, 20), (0.5, 20), (0.45, 40), (0.39, math.inf)]
)
def test_target_is_reached_at_the_first_evaluation_at_or_below_it(target, expected):
    assert metrics.position_of_target(STEPS, LOSSES, target) == expected


def test_target_of_a_score_is_reached_from_below_and_in_the_unit_asked_for():
    accuracies = [0.5, 0.7, 0.65, 0.8]
    assert metrics.position_of_target(STEPS, accuracies, 0.7, higher_is_better=True) == 20
    assert metrics.position_of_target([0.5, 1.0, 1.5, 2.0], accuracies, 0.75, higher_is_better=True) == 2.0
    assert metrics.position_of_target(STEPS, accuracies, 0.81, higher_is_better=True) == math.inf


def test_values_that_are_not_numbers_reach_no_target_and_are_never_the_best():
    assert metrics.position_of_target(STEPS, [math.nan, 0.5, math.nan, 0.4], 0.45) == 40
    assert metrics.position_of_target([], [], 0.45) == math.inf
    assert metrics.best_value([math.nan, 0.5, 0.7]) == 0.5
    assert metrics.best_value([math.nan, 0.5, 0.7], higher_is_better=True) == 0.7
    assert math.isnan(metrics.best_value([math.nan]))
    assert math.isnan(metrics.best_value([]))


@pytest.mark.parametrize(("target", "expected"), [(1.0, 10), (0.75, 15), (0.5, 20), (0.4, 26), (0.2, math.inf)])
def test_lines_between_evaluations_reach_a_target(target, expected):
    # From 1.0 at 10 to 0.5 at 20, up again, and from 0.7 at 24 down to 0.3 at 26 + 2/3
    positions, values = [10, 20, 24, 26 + 2 / 3], [1.0, 0.5, 0.7, 0.3]
    assert metrics.interpolated_position_of_target(positions, values, target) == pytest.approx(expected)


def test_a_target_is_not_reached_before_what_is_no_number():
    assert metrics.interpolated_position_of_target([10, 20], [math.nan, 0.5], 0.6) == 20
    assert metrics.interpolated_position_of_target([10], [math.nan], 0.6) == math.inf


def test_rate_that_changes_by_one_factor_is_perfectly_stable():
    assert metrics.learning_rate_stability([1e-3] * 5) == 0.0
    assert metrics.learning_rate_stability([8.0, 4.0, 2.0, 1.0]) == pytest.approx(0.0, abs=1e-12)


def test_rate_stability_is_the_deviation_of_log_changes():
    # Changes of +1, -1, +1, -1 nats: mean 0, deviation 1.
    assert metrics.learning_rate_stability([1, math.e, 1, math.e, 1]) == pytest.approx(1.0)
    # The step at a rate of 0, where an anneal ends, has no logarithm.
    assert metrics.learning_rate_stability([1, math.e, 1, math.e, 1, 0.0]) == pytest.approx(1.0)
    assert math.isnan(metrics.learning_rate_stability([1e-3]))


def test_rate_range_is_in_decades():
    assert metrics.learning_rate_range([1e-4, 1e-2, 1e-3]) == pytest.approx(2.0)
    assert metrics.learning_rate_range([1e-3, 1e-3]) == 0.0
    assert math.isnan(metrics.learning_rate_range([0.0]))


def test_loss_stability_ignores_the_trend_and_counts_a_spike():
    assert metrics.loss_stability([5.0, 4.0, 3.0, 2.0, 1.0, 0.0, -1.0], window=3) == 0.0
    # One spike of height 7 on a flat line: residuals (0, 0, 0, 7, 0, 0, 0), variance 49/7 - 1.
    assert metrics.loss_stability([1, 1, 1, 8, 1, 1, 1], window=3) == pytest.approx(6.0)
    # An even window is widened to be centred.
    assert metrics.loss_stability([1, 1, 1, 8, 1, 1, 1], window=2) == pytest.approx(6.0)


def test_loss_stability_of_steep_curves_is_their_noise():
    steps, noise = np.arange(2000), np.random.default_rng(0).normal(scale=0.1, size=2000)
    curve = 2 * np.exp(-steps / 300)
    assert metrics.loss_stability(curve) < 1e-3
    assert metrics.loss_stability(curve + noise) == pytest.approx(0.01, rel=0.15)


def test_loss_stability_of_short_and_of_broken_runs():
    assert math.isnan(metrics.loss_stability([1.0, 2.0]))
    assert metrics.loss_stability([1.0, 2.0, math.nan, 1.0, 1.0]) == math.inf


def test_controller_share_is_part_of_the_training_time():
    assert metrics.controller_share(0.2, 10.0) == pytest.approx(0.02)
    assert math.isnan(metrics.controller_share(0.0, 0.0))


def test_area_is_the_mean_height_of_the_curve():
    # (1 + 0.5)/2 * 10 + (0.5 + 0.5)/2 * 30 = 22.5 over a length of 40.
    assert metrics.area_under_curve([0, 10, 40], [1.0, 0.5, 0.5]) == pytest.approx(0.5625)
    assert math.isnan(metrics.area_under_curve([10], [0.5]))
    # From 20 on, where the line from 10 to 40 is at 0.5
    assert metrics.area_under_curve([0, 10, 40], [1.0, 0.5, 0.5], start=20) == pytest.approx(0.5)
    assert metrics.area_under_curve([0, 10, 40], [1.0, 0.6, 0.3], start=20) == pytest.approx(0.4)
    assert metrics.area_under_curve([20, 40], [0.5, 0.3], start=20) == metrics.area_under_curve([20, 40], [0.5, 0.3])


def test_regret_is_measured_against_the_best_cell_of_all_baselines():
    baselines = [[0.5, 0.4, 0.9], [0.45, math.nan, 0.6]]
    assert metrics.tuning_free_regret([0.5, 0.3, math.inf], baselines) == pytest.approx([0.1, -0.1, math.inf])
    assert metrics.tuning_free_regret([0.5, math.inf], [[math.inf]]).tolist() == [-math.inf, 0.0]
    accuracies = [[0.8, 0.7], [0.6, 0.9]]
    assert metrics.tuning_free_regret([0.85, 0.95], accuracies, higher_is_better=True) == pytest.approx([0.05, -0.05])


def test_failed_runs_count_as_the_worst_value_of_the_scale():
    worst = {
        "eval_loss": math.inf,
        "eval_accuracy": 0.0,
        "eval_f1": 0.0,
        "eval_pearson": -1.0,
        "eval_matthews_correlation": -1.0,
        "eval_reward": -math.inf,
    }
    assert {name: metrics.worst_value(name) for name in worst} == worst
