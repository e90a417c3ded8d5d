"""The command `hf-alrs meta-train`."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import yaml

from ..config import InputError
from .training import MetaTrainingConfig, meta_train


_SECONDS_BETWEEN_LINES = 10.0


def read_config(path: Path) -> MetaTrainingConfig:
    """
    A `MetaTrainingConfig` from a YAML file.

    Raises:
        `InputError`: If the file is missing, is not a mapping, or has unknown fields.
    """
    if not path.is_file():
        raise InputError("config", str(path), "is not a file.", "Give the path of a YAML file.")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise InputError("config", str(path), f"is not valid YAML ({error}).", "Correct the file.") from error
    known = {f.name for f in fields(MetaTrainingConfig)}
    if not isinstance(values, dict) or "output_dir" not in values:
        raise InputError("config", str(path), "must be a mapping with at least `output_dir`.", "Add it.")
    unknown = sorted(set(values) - known)
    if unknown:
        raise InputError("config", unknown, f"must be among {', '.join(sorted(known))}.", "Correct the spelling.")
    return MetaTrainingConfig(**values)


class _Lines:
    """Progress as lines: one when a stage ends, and at most one every few seconds before."""

    def __init__(self) -> None:
        self.start = self.last = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - self.last > _SECONDS_BETWEEN_LINES:
            self.last = now
            print(f"[{now - self.start:7.0f} s] {stage}: {done} of {total}", flush=True)


def meta_train_command(arguments: Sequence[str]) -> None:
    """Runs or continues the meta-training that a YAML file describes, and prints the held-out table."""
    parser = argparse.ArgumentParser(
        prog="hf-alrs meta-train", description="Train the network on a population of small tasks."
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file of MetaTrainingConfig's fields.")
    options = parser.parse_args(arguments)
    report = meta_train(read_config(options.config), _Lines())
    for name, table in report.items():
        if isinstance(table, dict) and "mean_regret" in table:
            print(f"\nNetwork {name}, held-out tasks: {json.dumps(table, indent=2)}")
