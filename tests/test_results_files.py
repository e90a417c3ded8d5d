"""Every file under results/ follows the schema that says what is in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from hf_alrs.report import validate_result


FOLDER = Path(__file__).parents[1] / "results"
SCHEMA = FOLDER / "schema.json"
FILES = sorted(path for path in FOLDER.rglob("*.json") if path != SCHEMA)


def validator() -> Draft202012Validator:
    schema = json.loads(SCHEMA.read_text())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def refuse_constant(token: str) -> None:
    raise ValueError(f"{token} is no strict JSON")


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(FOLDER)) for path in FILES])
def test_a_file_follows_its_schema(path: Path) -> None:
    content = json.loads(path.read_text(), parse_constant=refuse_constant)
    if "spec" in content:
        validate_result(content, str(path))
    else:
        validator().validate(content)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"eval_accuracy": 0.9},
        {"eval_loss": "0.3"},
        {"eval_loss": 0.3, "note": 1},
        {"train_runtime": 3.0, "results": {"eval_loss": 0.1}, "benchmark": {"eval_loss": 0.1}},
        {"train_runtime": 3.0, "results": {"eval_accuracy": 0.1}, "benchmark_results": {"eval_loss": 0.1}},
        {"schema_version": 1, "results": {}, "plan": {}},
    ],
)
def test_the_schema_refuses_what_is_none(content: dict[str, Any]) -> None:
    assert not validator().is_valid(content)
