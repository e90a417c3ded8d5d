"""Features against numbers worked out by hand, and the properties that make them fit for any run."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_alrs.features import (
    FEATURE_NAMES,
    FEATURES,
    SIGNALS,
    Moment,
    RunState,
    clean_signals,
    clip,
    cosine,
    ema,
    feature_vector,
    initial_state,
    isfinite,
    ln,
    log,
    maximum,
    minimum,
    restart_state,
    sqrt,
    update_decision,
    update_evaluation,
    update_step,
    without_nan,
)


def moment(state: dict[str, Any] | None = None, signals: dict[str, Any] | None = None, **changed: Any) -> Moment:
    """A moment in the middle of a run where everything that is not given is 0."""
    defaults: dict[str, Any] = {
        "step": 50,
        "num_training_steps": 100,
        "decision_interval": 4,
        "num_epochs": 1.0,
        "adaptive": True,
        "learning_rate": 0.1,
        "peak_learning_rate": 0.1,
        "last_change": 0.0,
    }
    return Moment(
        state=replace(initial_state(), **(state or {})),
        signals=dict.fromkeys(SIGNALS, 0.0) | (signals or {}),
        **(defaults | changed),
    )


# ln(1e-3) = -6.907755 is the update ratio, ln(sqrt(64)) = 2.079442 the width
_MATRICES = {"matrix_update_ratio": -6.907755, "matrix_width": 2.079442, "matrix_count": 1.386294}

# feature, moment, expected: the arithmetic stands above each case
CASES: list[tuple[str, Moment, float]] = [
    # 2 * 25 / 100 - 1
    ("progress", moment(step=25), -0.5),
    # ln 1000 = 6.907755; 0.907755 / 2
    ("run_length", moment(num_training_steps=1000), 0.453878),
    ("run_length", moment(num_training_steps=1_000_000), 1.147025),  # as 4,000 steps
    ("adaptive_optimizer", moment(adaptive=True), 1.0),
    ("adaptive_optimizer", moment(adaptive=False), -1.0),
    # ln 10 = 2.302585; 1.302585 / 1.5
    ("epochs", moment(num_epochs=10.0), 0.868390),
    ("epochs", moment(num_epochs=300.0), 2.403447),  # as 100
    # ln 20 = 2.995732; 0.995732 / 1.5
    ("decisions", moment({"decision_count": 20.0}), 0.663821),
    # before the first decision: as one, (0 - 2) / 1.5
    ("decisions", moment(), -1.333333),
    # ln 0.25 = -1.386294; half of it
    ("remaining", moment(step=75), -0.693147),
    # the last step of a long run counts as 1 % left: ln 0.01 = -4.605170
    ("remaining", moment(step=9999, num_training_steps=10000), -2.302585),
    ("last_change", moment(last_change=0.3), 0.6),
    # changes past 2 count as 2
    ("last_change", moment(last_change=-5.5), -4.0),
    ("gradient_agreement_fast", moment({"cos_gradients_fast": 0.25}), 0.5),
    ("gradient_agreement_slow", moment({"cos_gradients_slow": -0.4}), -0.8),
    ("overshoot_fast", moment({"cos_after_fast": -0.3}), -0.6),
    ("overshoot_slow", moment({"cos_after_slow": 0.1}), 0.2),
    ("alignment_fast", moment({"cos_before_fast": 0.45}), 0.9),
    ("alignment_slow", moment({"cos_before_slow": 0.35}), 0.7),
    ("displacement_agreement_fast", moment({"cos_displacements_fast": -1.0}), -2.0),
    ("displacement_agreement_slow", moment({"cos_displacements_slow": 0.05}), 0.1),
    ("pull_from_start", moment({"cos_from_start": 0.25}), 0.5),
    # |d| = 1, K |u| = 4 * 0.5 = 2; ln 0.5
    ("window_growth", moment(signals={"dd": 1.0, "uu": 0.25}), -0.693147),
    # |x| = 3, path 6; ln 0.5
    ("straightness", moment({"path": 6.0}, {"xx": 9.0}), -0.693147),
    # 2 / sqrt(16) = 0.5 is DoG's rate, five times the peak rate of 0.1; ln 5 = 1.609438, half of it
    ("distance_over_gradients", moment({"farthest": 2.0, "squared_rate_free": 16.0}), 0.804719),
    # 1.5 ln 0.5 = 1.5 * -0.693147
    ("loss_decrease", moment({"loss_fast": 1.0, "initial_loss": 2.0}), -1.039721),
    # 3 ln 1.2 = 3 * 0.182322
    ("loss_above_minimum", moment({"loss_fast": 1.2, "loss_minimum": 1.0}), 0.546965),
    # (1.5 - 1.3) / sqrt(0.16)
    ("loss_trend", moment({"loss_slow": 1.5, "loss_fast": 1.3, "loss_variance": 0.16}), 0.5),
    # 5 ln 1.1 = 5 * 0.0953102
    ("loss_ratio", moment({"loss_slow": 1.1, "loss_fast": 1.0}), 0.476551),
    # sqrt(0.04) / 2 = 0.1; ln 0.1 + 1.5
    ("loss_noise", moment({"loss_slow": 2.0, "loss_variance": 0.04}), -0.802585),
    # 3 / 1.5; ln 2
    ("gradient_now", moment({"gradient_fast": 1.5}, {"gg": 9.0}), 0.693147),
    ("gradient_trend", moment({"gradient_fast": 3.0, "gradient_slow": 1.0}), 1.098612),
    # 4 / 2; ln 2 / 2
    ("gradient_growth", moment({"initial_gradient": 2.0}, {"gg": 16.0}), 0.346574),
    # rate at half its peak: -6.907755 + 2.079442 + 1.386294 + 0.693147 + 2.5 = -0.248872, a third of it
    ("update_ratio_matrices", moment(signals=_MATRICES, learning_rate=0.05), -0.082957),
    # 0.01 / 10 = 1e-3 as above, but two matrices (ln 2 = 0.693147 in place of ln 4): -0.942019 / 3
    (
        "update_ratio_total",
        moment(
            signals={"uu": 1e-4, "ww": 100.0, "matrix_width": 2.079442, "matrix_count": 0.693147}, learning_rate=0.05
        ),
        -0.314006,
    ),
    # 2 / 4, width 16: (-0.693147 + 1.386294) / 2
    ("distance_ratio", moment(signals={"xx": 4.0, "initial": 16.0, "matrix_width": 1.386294}), 0.346574),
    # 2 * (0.2 - 0.6) / 0.8
    ("curvature", moment({"descent_after": 0.2, "descent_before": 0.6}), -1.0),
    ("dead_gradients", moment(signals={"zero_gradient": 0.3}), 0.6),
    # 2 / 0.1 = 20, of 100 weights: ln 20 - ln 10
    ("update_gain", moment(signals={"uu": 4.0, "size": 2.302585}), 0.693147),
    # plain SGD: 20 against a gradient of 5; ln 4
    ("update_gain", moment(signals={"uu": 4.0, "size": 2.302585, "hh": 25.0}, adaptive=False), 1.386294),
    ("evaluated", moment(), 0.0),
    ("evaluated", moment({"eval_count": 2.0}), 1.0),
    # 3 ln (0.6 / 0.5) = 3 ln 1.2
    ("generalization_gap", moment({"eval_count": 1.0, "eval_loss": 0.6, "loss_slow": 0.5}), 0.546965),
    ("generalization_gap", moment({"loss_slow": 0.5}), 0.0),
    # 10 ln 1.1
    ("eval_above_minimum", moment({"eval_count": 3.0, "eval_loss": 0.55, "eval_best": 0.5}), 0.953102),
    ("eval_above_minimum", moment(), 0.0),
    # 10 * (0.8 - 0.75)
    ("accuracy_below_maximum", moment({"eval_best_accuracy": 0.8, "eval_accuracy": 0.75}), 0.5),
    # 0.02 of a loss of 2 at half the peak rate: ln 0.01 = -4.605170, ln 0.5 = -0.693147; (-4.605170 + 0.693147 + 5) / 3
    ("predicted_decrease", moment({"descent_before": 0.02, "loss_slow": 2.0}, learning_rate=0.05), 0.362659),
    # 0.02 given back, with the rate's square: (-4.605170 + 2 * 0.693147 + 5) / 3
    (
        "curvature_cost",
        moment({"descent_before": 0.03, "descent_after": 0.01, "loss_slow": 2.0}, learning_rate=0.05),
        0.593708,
    ),
    # Windows of 20 and 4 steps of 200: values 8 steps apart, 8 * 0.05 predicted, of which 0.1 came: 2 * 0.25 / 1.25
    (
        "trust_ratio",
        moment(
            {"step_count": 100.0, "descent_before": 0.05, "loss_slow": 1.0, "loss_fast": 0.9}, num_training_steps=200
        ),
        0.4,
    ),
    # 1.5 ln 0.5
    ("eval_decrease", moment({"eval_count": 1.0, "eval_loss": 1.0, "initial_loss": 2.0}), -1.039721),
    ("eval_decrease", moment({"initial_loss": 2.0}), 0.0),
    ("convolution_width", moment(signals={"kernel_width": 1.386294}), 1.386294),
    ("convolution_width", moment(signals={"kernel_width": 2.691}), 1.7),
]


@pytest.mark.parametrize(
    ("name", "at", "expected"), CASES, ids=[f"{name}-{i}" for i, (name, _, _) in enumerate(CASES)]
)
def test_feature_by_hand(name: str, at: Moment, expected: float) -> None:
    got = float(FEATURES[FEATURE_NAMES.index(name)](at))
    assert got == pytest.approx(expected, abs=2e-6), f"{name}: expected {expected}, got {got}"
    assert feature_vector(at)[FEATURE_NAMES.index(name)] == pytest.approx(expected, abs=2e-6)


def test_every_feature_has_a_case_and_a_documented_meaning() -> None:
    missing = [name for name in FEATURE_NAMES if name not in {case[0] for case in CASES}]
    assert not missing, f"no hand-computed case for {missing}"
    undocumented = [feature.__name__ for feature in FEATURES if not feature.__doc__]
    assert not undocumented, f"no docstring: {undocumented}"
    assert len(set(FEATURE_NAMES)) == len(FEATURE_NAMES)


# Running statistics


def test_ema_starts_as_a_mean() -> None:
    # weights 1, 1/2, then the rate 0.3 (1/10 lies below it)
    assert ema(2.0, 4.0, 1, 0.3) == 4.0
    assert ema(2.0, 4.0, 2, 0.3) == 3.0
    assert ema(2.0, 4.0, 10, 0.3) == pytest.approx(2.6)


def test_cosine() -> None:
    # |a| = 2, |b| = 3
    assert cosine(3.0, 4.0, 9.0) == pytest.approx(0.5)
    assert cosine(-60.0, 4.0, 9.0) == -1.0  # rounding must not leave [-1, 1]
    assert cosine(0.0, 0.0, 9.0) == 0.0


def test_update_step_by_hand() -> None:
    state = initial_state()
    seen = []
    for loss in (2.0, 1.0, 4.0, 3.0, 0.5):
        state = update_step(state, loss, num_training_steps=100, decision_interval=3)
        seen.append(state)
    # The rates are 1 / max(4, 2) = 1/4 and 1 / max(12, 10) = 1/12: means of the first 4, then a quarter each.
    assert [float(s.loss_fast) for s in seen] == pytest.approx([2.0, 1.5, 7 / 3, 2.5, 2.0])
    assert [float(s.loss_slow) for s in seen] == pytest.approx([2.0, 1.5, 7 / 3, 2.5, 2.1])
    # Deviations from the slow mean before: -1, 2.5, 2/3, -2, squared and averaged with weights 1/2, 1/3, 1/4, 1/5:
    # 0.5; 0.5 + 5.75 / 3 = 2.416667; - 1.972222 / 4 = 1.923611; + 2.076389 / 5 = 2.338889
    assert [float(s.loss_variance) for s in seen] == pytest.approx([0.0, 0.5, 2.416667, 1.923611, 2.338889], abs=1e-6)
    # The initial loss is the mean of the first max(3, decision_interval) = 3
    assert [float(s.initial_loss) for s in seen] == pytest.approx([2.0, 1.5, 7 / 3, 7 / 3, 7 / 3])
    assert float(seen[-1].step_count) == 5


def test_averages_span_a_share_of_the_run() -> None:
    # Of 1000 steps the fast average spans 20 and the slow one 100: one spike of 1 on a long run of 0
    state = replace(initial_state(), step_count=500.0)
    state = update_step(state, 1.0, num_training_steps=1000, decision_interval=12)
    assert float(state.loss_fast) == pytest.approx(1 / 20)
    assert float(state.loss_slow) == pytest.approx(1 / 100)


@pytest.mark.parametrize(("loss", "counts_as"), [(math.nan, 2e3), (math.inf, 2e3), (-math.inf, 0.0), (1e9, 2e3)])
def test_losses_that_are_not_finite_count_as_a_thousand_times_the_first(loss: float, counts_as: float) -> None:
    # The fourth loss after three of 2: fast weight 1/4
    state = initial_state()
    for value in (2.0, 2.0, 2.0, loss):
        state = update_step(state, value, 100, 3)
    assert float(state.loss_fast) == pytest.approx(0.75 * 2.0 + 0.25 * counts_as)
    assert float(state.initial_loss) == 2.0


def test_a_first_loss_that_is_not_finite_counts_as_a_thousand() -> None:
    for loss in (math.nan, math.inf):
        assert float(update_step(initial_state(), loss, 100, 3).loss_fast) == 1e3
    assert float(update_step(initial_state(), 1e9, 100, 3).loss_fast) == 1e9  # the unit of some regression


FIRST = {"gg": 9.0, "gh": 6.0, "hh": 16.0, "gu": -1.5, "hu": -1.0, "uu": 0.25, "gx": -3.0, "xx": 4.0}
FIRST |= {"dd": 4.0, "de": 1.0, "ee": 1.0}
SECOND = {"gg": 1.0, "gh": -0.5, "hh": 1.0, "gu": 0.2, "hu": 0.0, "uu": 0.16, "gx": 0.5, "xx": 1.0}
SECOND |= {"dd": 4.0, "de": -2.0, "ee": 4.0}


def test_update_decision_by_hand() -> None:
    state = replace(initial_state(), loss_fast=np.float64(2.0))
    state = update_decision(state, FIRST, learning_rate=0.1, decision_interval=4)
    expected = {
        "decision_count": 1.0,
        "initial_gradient": 3.0,
        "loss_minimum": 2.0,
        "gradient_fast": 3.0,
        "cos_gradients_fast": 0.5,  # 6 / (3 * 4)
        "cos_after_slow": 1.0,  # 1.5 / (3 * 0.5)
        "cos_before_fast": 0.5,  # 1 / (4 * 0.5)
        "cos_displacements_fast": 0.0,  # there is no displacement before the first
        "cos_from_start": 0.5,  # 3 / (3 * 2)
        "descent_before": 1.0,
        "descent_after": 1.5,
        "path": 2.0,  # 4 * 0.5
        "squared_rate_free": 100.0,  # 4 * 0.25 / 0.01
        "farthest": 2.0,
    }
    for name, value in expected.items():
        assert float(getattr(state, name)) == pytest.approx(value), name

    state = replace(state, loss_fast=np.float64(3.0))
    state = update_decision(state, SECOND, learning_rate=0.2, decision_interval=4)
    expected = {  # averages of two weigh them equally
        "decision_count": 2.0,
        "initial_gradient": 3.0,
        "loss_minimum": 2.0,
        "gradient_fast": 2.0,
        "gradient_slow": 2.0,
        "cos_gradients_fast": 0.0,  # 0.5 and -0.5
        "cos_gradients_slow": 0.0,
        "cos_after_fast": 0.25,  # 1 and -0.2 / 0.4
        "cos_before_slow": 0.25,  # 0.5 and 0
        "cos_displacements_fast": -0.25,  # 0 and -2 / 4
        "cos_displacements_slow": -0.25,
        "cos_from_start": 0.0,  # 0.5 and -0.5
        "descent_before": 0.5,
        "descent_after": 0.65,
        "path": 3.6,  # 2 + 4 * 0.4
        "squared_rate_free": 116.0,  # 100 + 4 * 0.16 / 0.04
        "farthest": 2.0,
    }
    for name, value in expected.items():
        assert float(getattr(state, name)) == pytest.approx(value, abs=1e-12), name


def test_update_evaluation_by_hand() -> None:
    state = initial_state()
    for loss, accuracy in ((0.7, 0.6), (0.5, 0.8), (0.6, 0.75)):
        state = update_evaluation(state, loss, accuracy)
    got = [float(getattr(state, f"eval_{name}")) for name in ("loss", "best", "count", "accuracy", "best_accuracy")]
    assert got == [0.6, 0.5, 3.0, 0.75, 0.8]
    assert float(update_evaluation(initial_state(), math.nan).eval_loss) == 1e3


def test_a_restart_forgets_all_but_where_the_run_began() -> None:
    filled = RunState(**{field.name: np.array([2.0, 3.0]) for field in fields(RunState)})
    state = restart_state(filled, np.array([True, False]))
    for field in fields(RunState):
        first, second = getattr(state, field.name)
        kept = field.name in ("initial_loss", "initial_count", "initial_gradient")
        assert (first, second) == (2.0 if kept else 0.0, 3.0), field.name


_NUMBERS = (-math.inf, -2.0, -0.0, 0.0, 1e-30, 0.5, 1.0, 3.0, 1e300, math.inf, math.nan)


@pytest.mark.parametrize(
    "function",
    [sqrt, ln, isfinite, without_nan, log, partial(clip, low=-1.0, high=2.0)],
    ids=["sqrt", "ln", "isfinite", "without_nan", "log", "clip"],
)
def test_floats_are_treated_as_arrays_are(function: Callable[[Any], Any]) -> None:
    with np.errstate(all="ignore"):
        expected = function(np.array(_NUMBERS))
    np.testing.assert_allclose([function(x) for x in _NUMBERS], expected, rtol=1e-15)


@pytest.mark.parametrize("function", [maximum, minimum])
def test_the_larger_and_the_smaller_of_floats_and_of_arrays(function: Callable[[Any, Any], Any]) -> None:
    x, y = (np.array(side) for side in zip(*itertools.product(_NUMBERS, repeat=2), strict=True))
    got = [function(a, b) for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    np.testing.assert_array_equal(got, function(x, y))


def test_a_run_of_floats_stays_one() -> None:
    state = update_evaluation(update_step(initial_state(), 2.0, 100, 3), 0.7, 0.6)
    state = update_decision(state, clean_signals(dict.fromkeys(SIGNALS, 1.0)), 0.1, 3)
    # numpy's own numbers take several times as long
    assert {type(getattr(restart_state(state, mask), f.name)) for mask in (True, False) for f in fields(state)} == {
        float
    }


def test_clean_signals_are_finite() -> None:
    signals = dict.fromkeys(SIGNALS, 1.0) | {"gg": math.nan, "uu": math.inf, "gu": -math.inf}
    cleaned = clean_signals(signals)
    assert (cleaned["gg"], cleaned["uu"], cleaned["gu"], cleaned["hh"]) == (0.0, 1e18, -1e18, 1.0)


# Whole runs

NUM_STEPS, INTERVAL = 60, 5
# Powers of the scale that each inner product carries when the loss is multiplied, and when updates are
_LOSS_POWERS = {"gg": 2, "gh": 2, "hh": 2, "gu": 1, "hu": 1, "gx": 1}
_UPDATE_POWERS = {"gu": 1, "hu": 1, "uu": 2, "gx": 1, "xx": 2, "dd": 2, "de": 2, "ee": 2}


def stream(seed: int = 0, size: int | None = None) -> tuple[np.ndarray, list[dict[str, np.ndarray]]]:
    """Losses `[steps, ...]` and signals of a made-up run, or of `size` of them."""
    generator = np.random.default_rng(seed)
    shape = () if size is None else (size,)
    losses = 0.6 * np.exp(-np.linspace(0, 1, NUM_STEPS)).reshape(-1, *([1] * len(shape)))
    losses = losses * np.exp(0.1 * generator.normal(size=(NUM_STEPS, *shape)))
    signals = []
    for _ in range(NUM_STEPS // INTERVAL):
        g, h, u, w, x, d, e = generator.normal(size=(7, *shape, 5))
        w, u, initial = 10 * w, 0.05 * u, 9 * w
        values = {
            "gg": (g * g).sum(-1),
            "gh": (g * h).sum(-1),
            "hh": (h * h).sum(-1),
            "gu": (g * u).sum(-1),
            "hu": (h * u).sum(-1),
            "uu": (u * u).sum(-1),
            "ww": (w * w).sum(-1),
            "gx": (g * x).sum(-1),
            "xx": (x * x).sum(-1),
            "initial": (initial * initial).sum(-1),
            "dd": (d * d).sum(-1),
            "de": (d * e).sum(-1),
            "ee": (e * e).sum(-1),
            "matrix_update_ratio": np.full(shape, -5.0),
            "matrix_width": np.full(shape, 1.5),
            "kernel_width": np.full(shape, 0.5),
            "matrix_count": np.full(shape, 0.7),
            "zero_gradient": np.full(shape, 0.2),
            "size": np.full(shape, 2.0),
        }
        signals.append(values)
    return losses, signals


def features_of_run(
    losses: Any, signals: list[dict[str, Any]], learning_rate: Any = 0.05, adaptive: bool = True, scale: float = 1.0
) -> np.ndarray:
    """Features at each decision of a run with linear decay; `scale` multiplies the evaluated loss."""
    state = initial_state(np.shape(losses[0]))
    rows = []
    for step in range(NUM_STEPS):
        state = update_step(state, losses[step], NUM_STEPS, INTERVAL)
        if step == 20:
            state = update_evaluation(state, scale * 0.5 + 0.0 * losses[0], 0.7)
        if step % INTERVAL == 0 and step > 0:
            rate = learning_rate * (1 - (step - 1) / NUM_STEPS)
            now = clean_signals(signals[step // INTERVAL])
            state = update_decision(state, now, rate, INTERVAL)
            rows.append(
                feature_vector(
                    Moment(
                        state=state,
                        signals=now,
                        step=step,
                        num_training_steps=NUM_STEPS,
                        decision_interval=INTERVAL,
                        num_epochs=2.0,
                        adaptive=adaptive,
                        learning_rate=rate,
                        peak_learning_rate=learning_rate,
                        last_change=0.1 + 0.0 * losses[0],
                    )
                )
            )
    return np.stack(rows)


def powers(signals: list[dict[str, Any]], scale: float, exponents: dict[str, int]) -> list[dict[str, Any]]:
    return [{name: value * scale ** exponents.get(name, 0) for name, value in now.items()} for now in signals]


def test_a_factor_on_the_loss_changes_no_feature() -> None:
    losses, signals = stream()
    # An adaptive optimizer makes the same updates; gradients carry the factor.
    before = features_of_run(losses, signals)
    after = features_of_run(1000 * losses, powers(signals, 1000.0, _LOSS_POWERS), scale=1000.0)
    for name, x, y in zip(FEATURE_NAMES, before.T, after.T, strict=True):
        np.testing.assert_allclose(y, x, atol=1e-6, err_msg=name)


def test_a_factor_on_a_loss_above_one_changes_no_feature() -> None:
    losses, signals = stream()
    before = features_of_run(10 * losses, signals, scale=10.0)
    after = features_of_run(10_000 * losses, powers(signals, 1000.0, _LOSS_POWERS), scale=10_000.0)
    for name, x, y in zip(FEATURE_NAMES, before.T, after.T, strict=True):
        np.testing.assert_allclose(y, x, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_the_unit_of_the_rate_shows_in_the_size_of_updates_alone(adaptive: bool, factor: float) -> None:
    losses, signals = stream()
    before = features_of_run(losses, signals, 0.05, adaptive)
    after = features_of_run(losses, powers(signals, factor, _UPDATE_POWERS), 0.05 * factor, adaptive)
    # Longer updates go farther relative to the weights: these features are there to see just that.
    relative = {
        "update_ratio_total",
        "distance_ratio",
        "predicted_decrease",
        "curvature_cost",
        "trust_ratio",
    }
    for name, x, y in zip(FEATURE_NAMES, before.T, after.T, strict=True):
        if name not in relative:
            np.testing.assert_allclose(y, x, atol=1e-6, err_msg=name)
    changed = {name for name, x, y in zip(FEATURE_NAMES, before.T, after.T, strict=True) if not np.allclose(x, y)}
    assert changed == relative


def test_the_unit_of_the_weights_changes_no_feature() -> None:
    # Weights, updates and the way travelled in another unit: gradients shrink by as much as weights grow.
    exponents = dict.fromkeys(("uu", "ww", "xx", "initial", "dd", "de", "ee"), 2) | {"gg": -2, "gh": -2, "hh": -2}
    losses, signals = stream()
    before = features_of_run(losses, signals)
    after = features_of_run(losses, powers(signals, 100.0, exponents), 0.05 * 100.0)
    for name, x, y in zip(FEATURE_NAMES, before.T, after.T, strict=True):
        np.testing.assert_allclose(y, x, atol=1e-6, err_msg=name)


def test_three_runs_at_once_are_three_runs() -> None:
    losses, signals = stream(seed=3, size=3)
    rates = np.array([1e-3, 1e-2, 1e-1])
    together = features_of_run(losses, signals, rates)
    assert together.shape == (NUM_STEPS // INTERVAL - 1, 3, len(FEATURES))
    for i in range(3):
        alone = features_of_run(
            losses[:, i], [{name: value[i] for name, value in now.items()} for now in signals], rates[i]
        )
        np.testing.assert_allclose(together[:, i], alone, rtol=1e-12, atol=1e-12)


# Signals are measured in float32
_ANY = st.floats(allow_nan=True, allow_infinity=True, width=32) | st.sampled_from([0.0, -0.0, 1e-38, 3e38, 1.0])


@settings(max_examples=60, deadline=None)
@given(
    losses=st.lists(_ANY, min_size=1, max_size=6),
    signals=st.lists(st.fixed_dictionaries(dict.fromkeys(SIGNALS, _ANY)), min_size=1, max_size=3),
    evaluation=st.none() | st.tuples(_ANY, st.floats(0, 1)),
    adaptive=st.booleans(),
    rate=st.sampled_from([0.0, 1e-30, 1e-4, 10.0]),
)
def test_features_are_finite_and_bounded_whatever_comes(
    losses: list[float],
    signals: list[dict[str, float]],
    evaluation: tuple[float, float] | None,
    adaptive: bool,
    rate: float,
) -> None:
    state = initial_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy's warnings would land in the user's log
        for loss in losses:
            state = update_step(state, loss, 100, 3)
        if evaluation is not None:
            state = update_evaluation(state, *evaluation)
        for now in map(clean_signals, signals):
            state = update_decision(state, now, max(rate, 1e-30), 3)
            values = feature_vector(
                Moment(
                    state=state,
                    signals=now,
                    step=30,
                    num_training_steps=100,
                    decision_interval=3,
                    num_epochs=0.0,
                    adaptive=adaptive,
                    learning_rate=max(rate, 1e-30),
                    peak_learning_rate=max(rate, 1e-30),
                    last_change=0.0,
                )
            )
            assert values.shape == (len(FEATURES),)
            assert np.isfinite(values).all(), dict(zip(FEATURE_NAMES, values, strict=True))
            assert np.abs(values).max() <= 4.0
    for field in fields(RunState):
        assert np.isfinite(getattr(state, field.name)), f"{field.name} = {getattr(state, field.name)}"


def test_a_run_without_losses_has_features() -> None:
    values = feature_vector(moment())
    assert np.isfinite(values).all()
