"""The configuration: what it accepts, what it refuses, and how it says so."""

from __future__ import annotations

import json
import math
import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_alrs import ALRSConfig, InputError
from hf_alrs.config import steps_of


def test_defaults_are_valid_and_plain() -> None:
    config = ALRSConfig()
    assert config.hidden_sizes == (64, 32)
    assert (config.meta_learning_rate, config.meta_batch_size, config.meta_num_epochs) == (1e-3, 64, 10)
    assert ALRSConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_probes_default_to_seven_from_scratch_and_none_otherwise() -> None:
    assert ALRSConfig().probes == 0
    assert ALRSConfig(network="scratch").probes == 7
    assert ALRSConfig(network="scratch", num_probes=0).probes == 0
    assert ALRSConfig(num_probes=5).probes == 5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_sizes", ()),
        ("hidden_sizes", (64, 0)),
        ("hidden_sizes", (64, 1.5)),
        ("phase1_steps", 0),
        ("phase1_steps", 1.5),
        ("phase1_steps", -0.1),
        ("phase1_steps", True),
        ("probe_steps", 0.0),
        ("probe_steps", "epoch"),
        ("decision_interval", 0),
        ("decision_interval", 2.0),
        ("decision_interval", "step"),
        ("decision_interval", float("nan")),
        ("meta_num_epochs", -1),
        ("meta_num_epochs", 1.0),
        ("feedback_interval", -1),
        ("max_restarts", -1),
        ("meta_batch_size", 0),
        ("max_signal_size", 0),
        ("meta_learning_rate", 0.0),
        ("meta_learning_rate", float("inf")),
        ("max_log_change", 0),
        ("max_first_rise", float("nan")),
        ("max_first_fall", -1.0),
        ("gain", 0.0),
        ("max_lr", float("inf")),
        ("min_lr", -1e-5),
        ("min_lr", 10.0),
        ("anchor", -1.0),
        ("restart_window", 1.5),
        ("average_weights", 1),
        ("average_weights", None),
        ("max_beta1", -0.1),
        ("max_beta1", 1.5),
        ("max_beta1", math.nan),
        ("max_beta1", "0.7"),
        ("final_lr_ratio", -0.1),
        ("final_lr_ratio", 1.5),
        ("final_lr_ratio", math.nan),
        ("final_lr_ratio", "0.3"),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InputError) as raised:
        ALRSConfig(**{name: value})
    error = raised.value
    assert (error.field, error.remedy != "") == (name, True)
    assert repr(value) in str(error) or name == "hidden_sizes"
    assert str(error).startswith(f"{name}=")


@pytest.mark.parametrize("value", [-1, 1, 2, 2.5])
def test_too_few_probes_are_refused_by_the_name_the_user_knows(value: Any) -> None:
    with pytest.raises(InputError) as raised:
        ALRSConfig(num_probes=value)
    assert raised.value.field == "num_probes"


def test_errors_survive_another_process() -> None:
    error = InputError("gain", -1, "must be above 0.", "Leave it out.")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.field, copy.value) == (str(error), "gain", -1)
    assert isinstance(error, ValueError)


@pytest.mark.parametrize(
    ("span", "total", "expected"),
    [(5, 1000, 5), (0.1, 200, 20), (0.025, 100, 2), (0.001, 100, 1), (1.0, 70, 70), (1, 70, 1)],
)
def test_spans_are_steps_or_a_fraction(span: int | float, total: int, expected: int) -> None:
    assert steps_of(span, total) == expected


_NUMBERS = st.one_of(st.integers(-3, 2000), st.floats(allow_nan=True, allow_infinity=True), st.none(), st.text("ab"))


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(
        ["phase1_steps", "decision_interval", "gain", "max_lr", "min_lr", "anchor", "restart_window"]
    ),
    value=_NUMBERS,
)
def test_any_value_is_accepted_or_refused_with_an_input_error(name: str, value: Any) -> None:
    try:
        config = ALRSConfig(**{name: value})
    except InputError as error:
        assert error.field in (name, "min_lr")  # a low max_lr is an error of the pair
    else:
        assert getattr(config, name) == value


@pytest.mark.parametrize(
    ("num_training_steps", "ratio"),
    [(1, 0.7), (35, 0.7), (60, 0.3 + 0.4 * math.log(100 / 60) / math.log(100 / 35)), (100, 0.3), (5000, 0.3)],
)
def test_short_runs_keep_more_of_their_rate(num_training_steps: int, ratio: float) -> None:
    assert ALRSConfig().final_ratio(num_training_steps) == pytest.approx(ratio)
    assert ALRSConfig(average_weights=False).final_ratio(num_training_steps) == 0.0
    assert ALRSConfig(final_lr_ratio=0.2).final_ratio(num_training_steps) == 0.2


@pytest.mark.parametrize(
    ("num_training_steps", "beta1"), [(1, 0.7), (333, 0.7), (400, 0.75), (500, 0.8), (1000, 0.9), (10_000, 0.99)]
)
def test_beta1_looks_back_over_a_hundredth_of_the_run(num_training_steps: int, beta1: float) -> None:
    assert ALRSConfig().highest_beta1(num_training_steps) == pytest.approx(beta1)
    assert ALRSConfig(max_beta1=0.5, average_weights=False).highest_beta1(num_training_steps) == 0.5
    assert ALRSConfig(average_weights=False).highest_beta1(num_training_steps) == 1.0
