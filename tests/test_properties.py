"""Properties over drawn inputs: the configuration, the controller with its features, and everything that reads a file."""

from __future__ import annotations

import json
import math
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import fields
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import scratch_network
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from test_report import make_record

from hf_alrs import ALRSConfig, InputError
from hf_alrs.arguments import read_recipe
from hf_alrs.callback import _keep_history
from hf_alrs.controller import ALRSController
from hf_alrs.features import FEATURE_NAMES, SIGNALS
from hf_alrs.meta_training.bank import load_group
from hf_alrs.meta_training.command import read_config
from hf_alrs.network import WEIGHTS_DIR, load_network
from hf_alrs.report import read_result, summarize, validate_result
from hf_alrs.report.runs import Run
from tasks.tabular import TabularProcessor


FIELDS = [field.name for field in fields(ALRSConfig)]
NUMBERS = st.one_of(
    st.integers(), st.floats(), st.sampled_from([10**400, -(10**400), True, False, -0.0, 5e-324, 1e308])
)
SIMPLE = st.one_of(st.none(), NUMBERS, st.text(max_size=8), st.binary(max_size=4))
ANYTHING = st.one_of(
    SIMPLE,
    st.lists(SIMPLE, max_size=3),
    st.lists(SIMPLE, max_size=3).map(tuple),
    st.dictionaries(st.text(max_size=3), SIMPLE, max_size=2),
    st.complex_numbers(),
    st.sampled_from([Decimal("0.1"), Decimal("nan"), Fraction(1, 3), np.float32(0.1), np.int64(3), np.float64("nan")]),
    st.sampled_from([object(), len, int, np.zeros(0), np.ones(2), range(3), {1, 2}, iter([8])]),
)


# Shrinking a run of forty steps takes minutes, and the first failing one tells as much.
NO_SHRINKING = (Phase.explicit, Phase.generate)


# The configuration


@settings(max_examples=200, deadline=None, phases=NO_SHRINKING)
@given(name=st.sampled_from(FIELDS), value=ANYTHING)
@example(name="gain", value=10**400)
@example(name="hidden_sizes", value=None)
@example(name="decision_interval", value=np.ones(2))
def test_a_field_of_any_value_is_accepted_or_refused(name: str, value: Any) -> None:
    try:
        config = ALRSConfig(**{name: value})
    except InputError as error:
        assert error.field in (name, "min_lr")  # a low max_lr is an error of the pair
        assert str(error).startswith(f"{error.field}=")
    else:
        json.dumps(config.to_dict(), allow_nan=False)


VALID = {
    "hidden_sizes": st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple),
    "phase1_steps": st.integers(1, 60) | st.floats(0, 1, exclude_min=True),
    "num_probes": st.none() | st.just(0) | st.integers(3, 9),
    "probe_steps": st.integers(1, 60) | st.floats(0, 1, exclude_min=True),
    "meta_num_epochs": st.integers(0, 2),
    "decision_interval": st.integers(2, 60) | st.floats(0, 1, exclude_min=True) | st.just("epoch"),
    "feedback_interval": st.integers(0, 5),
    "min_lr": st.just(0.0) | st.floats(1e-30, 0.01),
    "max_lr": st.floats(0.011, 1e4),
    "gain": st.floats(0, 1e3, exclude_min=True),
    "max_log_change": st.floats(0, 1e3, exclude_min=True),
    "max_first_rise": st.floats(0, 1e3, exclude_min=True),
    "max_first_fall": st.floats(0, 1e3, exclude_min=True),
    "max_restarts": st.integers(0, 3),
    "restart_window": st.floats(0, 1),
    "anchor": st.floats(0, 10),
    "seed": st.integers(0, 2**31),
    "guard_patience": st.integers(1, 3),
    "rollback": st.booleans(),
    "average_weights": st.booleans(),
    "final_lr_ratio": st.none() | st.floats(0, 1),
    "max_beta1": st.none() | st.floats(0, 1),
}
ANY = st.floats(allow_nan=True, allow_infinity=True)
# The square of a larger loss overflows, see `test_a_huge_loss_is_taken_silently`.
LOSSES = ANY.filter(lambda loss: not math.isfinite(loss) or abs(loss) < 1e150)


# The controller: whatever it is told, features are finite and the rate stays where it may be


@settings(max_examples=50, deadline=None, phases=NO_SHRINKING)
@given(
    changed=st.fixed_dictionaries({}, optional=VALID),
    rate=st.sampled_from([1e-12, 1e-4, 0.1, 1e3]) | st.floats(1e-8, 100),
    losses=st.lists(LOSSES | st.floats(-10, 10), min_size=8, max_size=40),
    signals=st.lists(st.fixed_dictionaries(dict.fromkeys(SIGNALS, ANY)), min_size=1, max_size=3),
    evaluation=st.none() | st.tuples(ANY, st.none() | ANY),
    adaptive=st.booleans(),
    warmup=st.integers(0, 12),
)
@pytest.mark.reliability(
    "any loss, gradient and evaluation: features finite and in [-4, 4], the rate within its bounds"
)
def test_features_and_rates_are_finite_whatever_is_observed(
    changed: dict[str, Any],
    rate: float,
    losses: list[float],
    signals: list[dict[str, float]],
    evaluation: tuple[float, float | None] | None,
    adaptive: bool,
    warmup: int,
) -> None:
    try:
        config = ALRSConfig(network="scratch", **({"hidden_sizes": (4,)} | changed))
        controller = ALRSController(
            config,
            len(losses),
            rate,
            adaptive=adaptive,
            num_warmup_steps=warmup,
            steps_per_epoch=5,
            network=scratch_network(scale=5.0),
        )
    except InputError:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # numpy's warnings would land in the user's log
        for step, loss in enumerate(losses):
            used = controller.learning_rate(step)
            assert math.isfinite(used)
            assert config.min_lr <= used <= config.max_lr
            controller.observe(loss)
            if evaluation is not None and step % 3 == 0:
                controller.observe_evaluation(*evaluation)
            if controller.is_decision(step):
                decision = controller.decide(step, signals[step % len(signals)])
                assert len(decision.features) == len(FEATURE_NAMES)
                assert all(abs(value) <= 4.0 for value in decision.features)  # false for NaN
                assert math.isfinite(decision.log_multiplier)
                assert decision.correction is None or abs(decision.correction) <= 6.0
    again = ALRSController(
        config, len(losses), rate, adaptive, warmup, steps_per_epoch=5, network=scratch_network(scale=5.0)
    )
    again.load_state_dict(controller.state_dict())
    assert again.learning_rate(len(losses) - 1) == controller.learning_rate(len(losses) - 1)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_huge_loss_is_taken_silently(sign: float) -> None:
    controller = ALRSController(ALRSConfig(network="scratch"), 8, 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for loss in (sign * 1e200, 0.0, sign * 1e200):
            controller.observe(loss)
    assert math.isfinite(controller.state.loss_variance)


def test_the_smallest_number_is_a_lower_bound() -> None:
    controller = ALRSController(ALRSConfig(network="scratch", min_lr=5e-324), 8, 10.0)
    assert controller.learning_rate(0) == 10.0


# Loaders: a result or an InputError


def in_file(read: Callable[[Path], Any], name: str, content: bytes) -> Any:
    """What a reader makes of a file, `None` where it refuses it; any other exception is the test's failure."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        try:
            return read(path)
        except InputError:
            return None


def network_in(path: Path) -> Any:
    return load_network(str(path.parent), (64, 32), 0)


def transform_in(path: Path) -> Any:
    return TabularProcessor.from_pretrained(path.parent)


READERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "result": (read_result, "run.json"),
    "meta-training": (read_config, "config.yaml"),
    "recipe": (read_recipe, "recipe.yaml"),
    "bank": (load_group, "group.pt"),
    "network": (network_in, "config.json"),
    "weights": (network_in, "model.safetensors"),
    "column transform": (transform_in, "preprocessor_config.json"),
    "history": (lambda path: _keep_history(path, 3), "alrs_history.jsonl"),
}
BYTES = st.binary(max_size=120) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
JSON_BYTES = JSON_VALUES.map(lambda value: json.dumps(value).encode())
YAML_BYTES = JSON_VALUES.map(lambda value: yaml.safe_dump(value).encode())


@pytest.mark.parametrize(
    "name",
    READERS,
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(content=BYTES | JSON_BYTES | YAML_BYTES)
@example(content=b"\xff\xfe")
@example(content=b"1\n")
@example(content=b"2001-99-99: 1")
@pytest.mark.reliability("random bytes and values to every loader: a result or an InputError")
def test_any_bytes_are_read_or_refused(name: str, content: bytes) -> None:
    in_file(*READERS[name], content)


@st.composite
def mutated(draw: Any, value: Any) -> Any:
    """`value` with one or two places replaced, removed or added to, at any depth."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 2))):
        value = _mutated_once(draw, value)
    return value


def _mutated_once(draw: Any, value: Any) -> Any:
    if isinstance(value, dict) and value and draw(st.integers(0, 5)):
        key = draw(st.sampled_from(sorted(value)))
        if draw(st.integers(0, 9)) == 0:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: _mutated_once(draw, value[key])}
    if isinstance(value, list) and value and draw(st.integers(0, 3)):
        index = draw(st.integers(0, len(value) - 1))
        return [*value[:index], _mutated_once(draw, value[index]), *value[index + 1 :]]
    if isinstance(value, dict) and draw(st.booleans()):
        return value | {draw(st.text(max_size=5)): draw(JSON_VALUES)}
    if isinstance(value, list) and draw(st.booleans()):
        return [*value, draw(JSON_VALUES)]
    return draw(JSON_VALUES)


def small_record() -> dict[str, Any]:
    record = make_record()
    record["history"] = {key: value[:4] if value else value for key, value in record["history"].items()}
    return record


RECORD = small_record()


@settings(max_examples=100, deadline=None)
@given(record=mutated(RECORD))
def test_a_mutated_result_is_summarized_or_refused(record: Any) -> None:
    read = in_file(read_result, "run.json", json.dumps(record).encode())
    if read is not None:
        validate_result(read, "run.json")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            summary = summarize([Run(read, Path("run.json")), Run(RECORD, Path("other.json"), 1)])
        assert summary["conclusion"]


META_CONFIG = yaml.safe_load((WEIGHTS_DIR / "meta_training.yaml").read_text())


@settings(max_examples=60, deadline=None)
@given(values=mutated(META_CONFIG))
def test_a_mutated_configuration_is_read_or_refused(values: Any) -> None:
    config = in_file(read_config, "config.yaml", yaml.safe_dump(values).encode())
    if config is not None:
        assert isinstance(config.output_dir, str)
        assert all(isinstance(size, int) for sizes in config.hidden_sizes for size in sizes)
        assert isinstance(config.num_groups, int) and config.learning_rate > 0


NETWORK_CONFIG = json.loads((WEIGHTS_DIR / "64-32" / "config.json").read_text())
WEIGHTS = (WEIGHTS_DIR / "64-32" / "model.safetensors").read_bytes()


@settings(max_examples=80, deadline=None)
@given(config=mutated(NETWORK_CONFIG), place=st.none() | st.integers(0, 2000), byte=st.integers(0, 255))
def test_a_mutated_network_is_loaded_or_refused(config: Any, place: int | None, byte: int) -> None:
    sizes = config.get("hidden_sizes") if isinstance(config, dict) else None
    if isinstance(sizes, list) and any(isinstance(size, int) and size > 10**4 for size in sizes):
        return  # memory is tested by itself
    weights = WEIGHTS if place is None else WEIGHTS[:place] + bytes([byte]) + WEIGHTS[place + 1 :]

    def read(path: Path) -> Any:
        (path.parent / "model.safetensors").write_bytes(weights)
        return network_in(path)

    in_file(read, "config.json", json.dumps(config).encode())


TRANSFORM = {
    "numeric": [{"column": "a", "fill": 0.0, "mean": 1.0, "scale": 2.0}],
    "categorical": [{"column": "b", "fill": "x", "categories": ["x", "y"]}],
    "titanic": False,
}


@settings(max_examples=60, deadline=None)
@given(transform=mutated(TRANSFORM))
def test_a_mutated_column_transform_is_applied_or_refused(transform: Any) -> None:
    processor = in_file(transform_in, "preprocessor_config.json", json.dumps(transform).encode())
    if processor is not None and not processor.titanic:
        columns = [entry["column"] for entry in (*processor.numeric, *processor.categorical)]
        if len(set(columns)) == len(columns):
            features = processor({column: [None, None] for column in columns})["features"]
            assert features.shape == (2, processor.num_features)
