"""Every file under results/ follows the schema that says what is in it."""

from __future__ import annotations

import json
import re
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


def measured(text: str) -> tuple[set[tuple[str, str]], set[str]]:
    """Figures as `mean ± standard deviation`, and the other ones of three decimals or more."""
    text = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
    pairs = re.findall(r"(\d+\.\d+)\s*±\s*(\d+\.\d+)", text)
    rest = re.sub(r"\d+\.\d+\s*±\s*\d+\.\d+", "", text)
    return set(pairs), set(re.findall(r"(?<![\d.])\d+\.\d{3,}(?![\d.])", rest))


def says(shown: str, stored: str) -> bool:
    """Whether the stored figure, which may be rounded itself, is the shown one to its digits."""
    digits = len(shown.split(".")[1])
    stored_digits = len(stored.split(".")[1])
    # A figure that was rounded twice may be off by as much again
    slack = 0.5 * 10**-digits + (0.5 * 10**-stored_digits if stored_digits > digits else 0)
    return abs(float(shown) - float(stored)) <= slack + 1e-12


def test_every_figure_in_readme_is_in_a_file_of_results() -> None:
    readme = (FOLDER.parent / "README.md").read_text()
    results = readme[readme.index("\n## Results\n") : readme.index("\n## Caveats\n")]
    pairs, singles = measured(results)
    assert pairs or singles
    texts = [path.read_text() for path in FOLDER.rglob("*.md")]
    stored_pairs = set().union(*(measured(text)[0] for text in texts))
    stored_singles = measured((FOLDER / "README.md").read_text())[1]
    missing = {p for p in pairs if not any(says(p[0], s[0]) and says(p[1], s[1]) for s in stored_pairs)}
    missing |= {n for n in singles if not any(says(n, s) for s in stored_singles)}
    assert not missing
