"""The commands `hf-alrs meta-train` and `hf-alrs meta-evaluate`."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from ..config import ALRSConfig, InputError, check_output_dir, home_expanded, read_yaml
from ..controller import CONTROL_VERSION
from ..network import load_network
from .evaluation import evaluate_network
from .spec import END_OF_SEEDS, POPULATION_VERSION, family_of
from .training import MetaTrainingConfig, meta_train


_SECONDS_BETWEEN_LINES = 10.0


def read_config(path: Path) -> MetaTrainingConfig:
    """
    A `MetaTrainingConfig` from a YAML file.

    Raises:
        `InputError`: If the file is missing, is not a mapping, or has unknown fields.
    """
    values = read_yaml(path)
    known = {f.name for f in fields(MetaTrainingConfig)}
    if not isinstance(values, dict) or "output_dir" not in values:
        raise InputError("config", str(path), "must be a mapping with at least `output_dir`.", "Add it.")
    unknown = sorted(map(str, set(values) - known))
    if unknown:
        raise InputError("config", unknown, f"must be among {', '.join(sorted(known))}.", "Correct the spelling.")
    for f in fields(MetaTrainingConfig):
        if f.name in values and not _fits(f, values[f.name]):
            raise InputError(f.name, values[f.name], f"{path} must give it as {f.type}.", "Correct the file.")
    return MetaTrainingConfig(**values)


def _fits(f: Field, value: Any) -> bool:
    """Whether a value of a YAML file is of the type that a field of `MetaTrainingConfig` asks for."""
    if f.name in (
        "ensemble",
        "states_from",
        "earlier_networks",
    ):  # what a member must be is for MetaTrainingConfig to say
        return isinstance(value, list) and all(
            isinstance(item, dict if f.name == "ensemble" else str) for item in value
        )
    if f.name in ("feature_noise", "earlier_shares", "part_weights"):
        return isinstance(value, dict)
    if f.name == "feature_dropout":
        return type(value) in (int, float)
    if f.name == "hidden_sizes":
        return bool(value) and all(
            isinstance(sizes, list) and sizes and all(type(size) is int and size > 0 for size in sizes)
            for sizes in (value if isinstance(value, list) else [value])
        )
    if f.name.startswith("max_") and value is None:
        return True
    if str(f.type).startswith("float"):
        return type(value) in (int, float) and 0 < value < 1e300
    return isinstance(value, str) if str(f.type) == "str" else type(value) is int


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
    parser.add_argument(
        "--config", type=home_expanded, required=True, help="YAML file of MetaTrainingConfig's fields."
    )
    options = parser.parse_args(arguments)
    config = read_config(options.config)
    check_output_dir(config.output_dir)
    report = meta_train(config, _Lines())
    for name, table in report.items():
        if isinstance(table, dict) and "mean_regret" in table:
            print(f"\nNetwork {name}, held-out tasks: {json.dumps(table, indent=2)}")


def meta_evaluate_command(arguments: Sequence[str], environment: Callable[[], dict[str, Any]]) -> None:
    """Judges a network on groups of tasks that it has not seen, and stores the table."""
    parser = argparse.ArgumentParser(
        prog="hf-alrs meta-evaluate", description="Judge a network on groups of small tasks that it has not seen."
    )
    defaults = ALRSConfig()
    parser.add_argument("--network", default=defaults.network, help="As of a run: `default`, a folder or a Hub id.")
    parser.add_argument(
        "--hidden_sizes", type=int, nargs="+", default=list(defaults.hidden_sizes), help="Of the default network."
    )
    parser.add_argument("--first_seed", type=int, required=True, help="Groups are drawn from this seed on.")
    parser.add_argument("--num_groups", type=int, default=100, help="Groups to judge on.")
    parser.add_argument("--num_tasks", type=int, default=2, help="Tasks of a group.")
    parser.add_argument("--max_cost", type=float, default=5.0, help="Groups that take more seconds are made shorter.")
    parser.add_argument("--num_workers", type=int, default=2, help="Processes.")
    parser.add_argument("--final_lr_ratio", type=float, help="Of the runs, in place of the default.")
    parser.add_argument(
        "--no_choose_average",
        action="store_false",
        dest="choose_average",
        help="Take the average of the last steps always, whatever the controller's split says.",
    )
    parser.add_argument("--max_beta1", type=float, help="Of the runs, in place of the default.")
    parser.add_argument(
        "--output_dir",
        type=home_expanded,
        default=Path("outputs/meta-evaluation"),
        help="For what is not to be run again.",
    )
    options = parser.parse_args(arguments)
    for name in ("num_groups", "num_tasks", "max_cost", "num_workers"):
        if not getattr(options, name) >= 1:
            raise InputError(name, getattr(options, name), "must be at least 1.", "Correct it.")
    last = options.first_seed + options.num_groups - 1
    if options.first_seed < 0 or last >= END_OF_SEEDS:
        rule = f"seeds from 0 to {END_OF_SEEDS - 1:,} draw groups, and the last one would be {last:,}."
        raise InputError("first_seed", options.first_seed, rule, "Correct it.")
    if family_of(options.first_seed) != family_of(last):
        rule = f"its {options.num_groups} groups would be of two parts of the population, which differ."
        raise InputError("first_seed", options.first_seed, rule, "Judge on one part at a time.")
    check_output_dir(options.output_dir)
    config = ALRSConfig(
        final_lr_ratio=options.final_lr_ratio, choose_average=options.choose_average, max_beta1=options.max_beta1
    )
    network = load_network(options.network, options.hidden_sizes, defaults.seed)
    seeds = range(options.first_seed, options.first_seed + options.num_groups)
    table = evaluate_network(
        network,
        options.output_dir,
        seeds,
        options.num_tasks,
        options.max_cost,
        options.num_workers,
        _Lines(),
        config.final_lr_ratio,
        config.choose_average,
        config.max_beta1,
    )
    report = {
        "network": {"name": options.network, "sha256": network.fingerprint()},
        "first_seed": options.first_seed,
        "population_version": POPULATION_VERSION,
        "control_version": CONTROL_VERSION,
        "table": table,
        "environment": environment(),
    }
    name = "-".join(map(str, [*network.hidden_sizes, options.first_seed, options.num_groups]))
    if config.final_lr_ratio is not None:
        report["final_lr_ratio"] = config.final_lr_ratio
        name += f"-decay-{config.final_lr_ratio}"
    if not config.choose_average:
        report["choose_average"] = False
        name += "-fixed-average"
    if config.max_beta1 is not None:
        report["max_beta1"] = config.max_beta1
        name += f"-beta1-{config.max_beta1}"
    path = options.output_dir / f"report-{name}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"\nHeld-out tasks: {json.dumps(table, indent=2)}\nStored in {path}")
