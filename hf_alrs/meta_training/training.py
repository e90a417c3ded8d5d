"""
Hindsight regression of the best rate, with data aggregation (DAgger, Ross et al. 2011).

Round 0 visits states under random changes of the rate, or driven by an earlier network; later rounds under the network's
own control with noise. Every state is labelled from the regret curve of its task: for the correction `u` that the network
gives at peak rate `x`, the loss is the regret at `x + u`, plus a small Huber term towards the best rate, which has a
gradient where the curve is flat.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import MAX_HIDDEN_SIZE, ALRSConfig, InputError
from ..controller import CONTROL_VERSION
from ..features import FEATURE_NAMES, FEATURE_VERSION
from ..network import MetaLRNetwork
from .bank import Group, fill_bank, group_path, load_group, load_stored
from .evaluation import NothingLearntError, evaluate_held_out, init_worker
from .population import GRID_SIZE
from .rollout import rollout
from .spec import (
    BATCH_SEED,
    BRIEF_SEED,
    EXTENDED_SEED,
    LARGE_SEED,
    LONG_SEED,
    POPULATION_VERSION,
    SHORT_SEED,
    family_of,
)


logger = logging.getLogger(__name__)


_HUBER_WEIGHT = 0.03
_L2 = 1e-5
_FEATURE_NOISE = 0.05
# Slope of the regret curve beyond the grid, per natural log of the rate
_BEYOND_GRID = 0.1
_CONFIGURATION = "config.json"
_STATE_FILE = re.compile(r"round(\d+)-(\d+)\.pt")
_NETWORK_FOLDER = re.compile(r"network-round(\d+)-[\d-]+")
# What states were visited and labelled under
_VERSIONS = {
    "population_version": POPULATION_VERSION,
    "feature_version": FEATURE_VERSION,
    "control_version": CONTROL_VERSION,
}
# What a configuration calls the parts of the population
_PARTS = {"": "standard"} | {name: name for name in ("long", "extended", "short", "large", "brief", "batch")}


@dataclass
class MetaTrainingConfig:
    """
    What `hf-alrs meta-train` does.

    Args:
        output_dir (`str`): Bank, aggregated states and networks; a run that finds them there goes on.
        num_groups (`int`): Task groups to train on.
        num_held_out_groups (`int`): Further groups that judge the networks, never trained on.
        num_long_groups, num_held_out_long_groups (`int`): The same for groups of long runs; they cost several times as
            much. The held-out ones are judged in a table of their own.
        num_extended_groups, num_held_out_extended_groups (`int`): The same for groups of many epochs.
        num_short_groups, num_held_out_short_groups (`int`): The same for groups of a few dozen steps.
        num_large_groups, num_held_out_large_groups (`int`): The same for groups of wide and deep models.
        num_brief_groups, num_held_out_brief_groups (`int`): The same for groups of wide and deep models in a few dozen steps.
        num_batch_groups, num_held_out_batch_groups (`int`): The same for groups with large and accumulated batches.
        num_tasks, num_long_tasks, num_large_tasks (`int`): Tasks of a group, which share shapes but not data and initial
            weights; the last one is for wide and deep models, in a few dozen steps as well, the second one for all other kinds
            of groups but the first.
        num_members (`int`): Runs of each task in a round.
        num_rounds (`int`): Rounds of data aggregation, the first one without a network, or with the first of
            `earlier_networks`.
        num_iterations (`int`): Steps of the regression after each round.
        batch_size (`int`), learning_rate (`float`): Of the regression (Adam, linear decay).
        hidden_sizes (`list[list[int]]`): Networks to fit; the first one drives the rollouts.
        ensemble (`list[dict]`): Further networks fitted to all states, each with `hidden_sizes`, `seed`,
            `num_iterations` and, where they differ, `feature_noise` and `feature_dropout`. Where there are some, the
            result is distilled from the mean of all networks: single fits differ widely in how they do under their own
            control.
        feature_noise (`dict[str, float]`): Standard deviation of further noise on single features in the regression. Those
            that hardly vary within a group tell groups apart, and invite learning them by heart.
        feature_dropout (`float`): Probability that a feature is 0 in the regression.
        part_weights (`dict[str, float]`): Factor on the weight of the states of each part of the population in the
            regression and the distillation: `standard`, `long`, `extended`, `short`, `large`, `brief`, `batch`. Default: 1.
        states_from (`list[str]`): Output folders of earlier runs, whose states and networks count as well.
        num_distillation_iterations (`int`): Steps of the distillation.
        earlier_networks (`list[str]`): Folders of networks of an earlier meta-training, one for each of `hidden_sizes`.
            The distillation starts from them, and keeps what they say on those parts of the population that
            `earlier_shares` names, so that something is learnt without losing the rest.
        earlier_shares (`dict[str, float]`): Weight, from 0 to 1, of the earlier network's word beside the mean of the
            others on the states of each part: `standard`, `long`, `extended`, `short`, `large`, `brief`, `batch`. Default:
            0.5.
        max_cost, max_long_cost, max_extended_cost, max_short_cost, max_large_cost, max_brief_cost, max_batch_cost (`float`, *optional*):
            Groups whose grid would take more seconds than about this with four tasks are made shorter.
        num_workers (`int`): Processes.
        seed (`int`): Groups are drawn from seeds `seed`, `seed + 1`, ...; the held-out ones come first.
    """

    output_dir: str
    num_groups: int = 400
    num_held_out_groups: int = 40
    num_long_groups: int = 0
    num_held_out_long_groups: int = 0
    num_extended_groups: int = 0
    num_held_out_extended_groups: int = 0
    num_short_groups: int = 0
    num_held_out_short_groups: int = 0
    num_large_groups: int = 0
    num_held_out_large_groups: int = 0
    num_brief_groups: int = 0
    num_held_out_brief_groups: int = 0
    num_batch_groups: int = 0
    num_held_out_batch_groups: int = 0
    num_tasks: int = 4
    num_long_tasks: int = 2
    num_large_tasks: int = 1
    num_members: int = 6
    num_rounds: int = 4
    num_iterations: int = 6000
    batch_size: int = 2048
    learning_rate: float = 2e-3
    hidden_sizes: list[list[int]] = field(default_factory=lambda: [[64, 32], [64, 64]])
    ensemble: list[dict[str, Any]] = field(default_factory=list)
    feature_noise: dict[str, float] = field(default_factory=dict)
    feature_dropout: float = 0.0
    part_weights: dict[str, float] = field(default_factory=dict)
    states_from: list[str] = field(default_factory=list)
    num_distillation_iterations: int = 10_000
    earlier_networks: list[str] = field(default_factory=list)
    earlier_shares: dict[str, float] = field(default_factory=dict)
    max_cost: float | None = 4.0
    max_long_cost: float | None = 16.0
    max_extended_cost: float | None = 24.0
    max_short_cost: float | None = 3.0
    max_large_cost: float | None = 60.0
    max_brief_cost: float | None = 40.0
    max_batch_cost: float | None = 24.0
    num_workers: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "num_groups",
            "num_held_out_groups",
            "num_tasks",
            "num_long_tasks",
            "num_large_tasks",
            "num_members",
            "num_rounds",
            "num_iterations",
            "batch_size",
            "num_distillation_iterations",
            "num_workers",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(name, value, "must be a whole number of at least 1.", "Correct the configuration.")
        for name in (
            "max_cost",
            "max_long_cost",
            "max_extended_cost",
            "max_short_cost",
            "max_large_cost",
            "max_brief_cost",
            "max_batch_cost",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(name, value, "must be at least 1, to leave every kind of task.", "Raise it.")
        for member in self.ensemble:
            sizes = member.get("hidden_sizes")
            numbers = [
                member.get("seed"),
                member.get("num_iterations"),
                *(sizes if isinstance(sizes, list) else [None]),
            ]
            unknown = member.keys() - {"hidden_sizes", "seed", "num_iterations", "feature_noise", "feature_dropout"}
            whole = not any(type(number) is not int for number in numbers)
            if unknown or not whole or not sizes or member["seed"] < 0 or min(numbers[1:]) < 1:
                rule = (
                    "must have hidden_sizes and num_iterations (whole numbers of at least 1) and seed, may have "
                    "feature_noise and feature_dropout, and nothing else."
                )
                raise InputError("ensemble", member, rule, "Correct the configuration.")
            _check_noise(**self.noise_of(member))
        for sizes in (*self.hidden_sizes, *(member["hidden_sizes"] for member in self.ensemble)):
            if max(sizes) > MAX_HIDDEN_SIZE:
                rule = f"must be at most {MAX_HIDDEN_SIZE} each."
                raise InputError("hidden_sizes", sizes, rule, "Correct the configuration.")
        _check_noise(self.feature_noise, self.feature_dropout)
        for folder in self.states_from:
            if not (Path(folder) / "states").is_dir():
                rule = "is not the output folder of an earlier run."
                raise InputError("states_from", folder, rule, "Make that run first, or leave it out.")
            if self.ensemble:
                _last_networks(Path(folder))
        for folder in self.earlier_networks:
            if not (Path(folder) / "config.json").is_file():
                rule = "is not the folder of a network."
                raise InputError("earlier_networks", folder, rule, "Name one with a config.json, or leave it out.")
        if self.earlier_networks and not (self.ensemble and len(self.earlier_networks) == len(self.hidden_sizes)):
            rule = "must be as many as hidden_sizes, and go with an ensemble."
            raise InputError("earlier_networks", self.earlier_networks, rule, "Correct one of them.")
        for folder, sizes in zip(self.earlier_networks, self.hidden_sizes, strict=False):
            found = MetaLRNetwork.from_pretrained(folder).hidden_sizes
            if found != tuple(sizes):
                rule = f"has layers of {found}, and its place among hidden_sizes is that of {tuple(sizes)}."
                raise InputError("earlier_networks", folder, rule, "Give them in the order of hidden_sizes.")
        for name, most in (("earlier_shares", 1), ("part_weights", math.inf)):
            for part, value in getattr(self, name).items():
                if part not in _PARTS.values() or type(value) not in (int, float) or not 0 <= value <= most:
                    bound = "a number from 0 to 1" if most == 1 else "a number of at least 0"
                    rule = f"must give {bound} for some of {', '.join(_PARTS.values())}."
                    raise InputError(name, {part: value}, rule, "Correct the configuration.")
        for name in (
            "num_long_groups",
            "num_held_out_long_groups",
            "num_extended_groups",
            "num_held_out_extended_groups",
            "num_short_groups",
            "num_held_out_short_groups",
            "num_large_groups",
            "num_held_out_large_groups",
            "num_brief_groups",
            "num_held_out_brief_groups",
            "num_batch_groups",
            "num_held_out_batch_groups",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise InputError(name, value, "must be a whole number of at least 0.", "Correct the configuration.")
        if self.seed < 0:
            raise InputError("seed", self.seed, "must be at least 0.", "Correct the configuration.")
        for part, seeds in self.held_out_seeds.items():
            number = len(seeds) + self._num_train_groups[part]
            if self.seed + number > LONG_SEED:
                name = f"num_{part}_groups" if part else "num_groups"
                rule = f"a part has the seeds below {LONG_SEED:,} alone, and {self.seed} + {number} are more."
                raise InputError(name, self._num_train_groups[part], rule, "Lower it, or seed.")

    def noise_of(self, member: Mapping[str, Any]) -> dict[str, Any]:
        """`feature_noise` and `feature_dropout` of a member of the ensemble."""
        return {name: member.get(name, getattr(self, name)) for name in ("feature_noise", "feature_dropout")}

    @property
    def held_out_seeds(self) -> dict[str, range]:
        """Seeds of the held-out groups, by part of the population (see [`family_of`])."""
        sizes = {
            "": (0, self.num_held_out_groups),
            "long": (LONG_SEED, self.num_held_out_long_groups),
            "extended": (EXTENDED_SEED, self.num_held_out_extended_groups),
            "short": (SHORT_SEED, self.num_held_out_short_groups),
            "large": (LARGE_SEED, self.num_held_out_large_groups),
            "brief": (BRIEF_SEED, self.num_held_out_brief_groups),
            "batch": (BATCH_SEED, self.num_held_out_batch_groups),
        }
        return {family: range(start + self.seed, start + self.seed + n) for family, (start, n) in sizes.items()}

    @property
    def _num_train_groups(self) -> dict[str, int]:
        return {
            "": self.num_groups,
            "long": self.num_long_groups,
            "extended": self.num_extended_groups,
            "short": self.num_short_groups,
            "large": self.num_large_groups,
            "brief": self.num_brief_groups,
            "batch": self.num_batch_groups,
        }

    @property
    def train_seeds(self) -> list[int]:
        starts = {family: seeds.stop for family, seeds in self.held_out_seeds.items()}
        return [s for family, n in self._num_train_groups.items() for s in range(starts[family], starts[family] + n)]

    def size_of(self, seed: int) -> tuple[int, float | None]:
        """Number of tasks and bound on the cost of the group that `seed` draws."""
        return {
            "": (self.num_tasks, self.max_cost),
            "long": (self.num_long_tasks, self.max_long_cost),
            "extended": (self.num_long_tasks, self.max_extended_cost),
            "short": (self.num_long_tasks, self.max_short_cost),
            "large": (self.num_large_tasks, self.max_large_cost),
            "brief": (self.num_large_tasks, self.max_brief_cost),
            "batch": (self.num_long_tasks, self.max_batch_cost),
        }[family_of(seed)]


def _check_noise(feature_noise: Any, feature_dropout: Any) -> None:
    rule = f"must give a number of at least 0 for features among {', '.join(FEATURE_NAMES)}."
    if not isinstance(feature_noise, dict):
        raise InputError("feature_noise", feature_noise, rule, "Correct the configuration.")
    for name, value in feature_noise.items():
        if name not in FEATURE_NAMES or type(value) not in (int, float) or not 0 <= value < math.inf:
            raise InputError("feature_noise", {name: value}, rule, "Correct the configuration.")
    if type(feature_dropout) not in (int, float) or not 0 <= feature_dropout < 1:
        rule = "must be at least 0 and below 1."
        raise InputError("feature_dropout", feature_dropout, rule, "Correct the configuration.")


@dataclass
class States:
    """Labelled states: features `[n, num_features]` (half precision), ln rates, curves, curve origins, weights `[n]`."""

    features: Tensor
    log_rates: Tensor
    curves: Tensor
    origins: Tensor
    weights: Tensor

    @classmethod
    def join(cls, parts: Sequence[States]) -> States:
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))

    @classmethod
    def load(cls, paths: Sequence[Path]) -> States:
        """The states of several files, joined."""
        return cls.join([cls(**load_stored(path, list(cls.__dataclass_fields__))) for path in paths])


def regret_at(curves: Tensor, origins: Tensor, step: float, log_rates: Tensor) -> Tensor:
    """
    Regret curves read at given rates: linear between the points of the grid, rising slowly beyond its ends.

    Args:
        curves (`Tensor` of shape `[n, grid_size]`): Regret at `origins + i * step`.
        origins (`Tensor` of shape `[n]`): ln of the lowest rate of the grid.
        step (`float`): Distance of the grid's rates in log space.
        log_rates (`Tensor` of shape `[n]`): Where to read.
    """
    position = (log_rates - origins) / step
    inside = position.clamp(0, curves.shape[1] - 1.001)
    index = inside.floor().long()
    share = inside - index
    low = curves.gather(1, index[:, None])[:, 0]
    high = curves.gather(1, index[:, None] + 1)[:, 0]
    return low * (1 - share) + high * share + _BEYOND_GRID * step * (position - inside).abs()


def visit(group: Group, network: MetaLRNetwork | None, num_members: int, seed: int) -> States:
    """
    States of a group under the network's control with noise (or under noise alone), with their labels.

    Initial rates are drawn from the whole grid. A part of the runs is explored with independent noise, a part with a
    lasting bias, and a part not at all; half of the groups evaluate the controller's split.
    """
    rng = np.random.default_rng(seed)
    size = group.num_tasks * num_members
    low, high = float(group.log_rates[0]), float(group.log_rates[-1])
    log_rates = torch.from_numpy(rng.uniform(low, high, size))
    if network is None:
        scale, bias = np.full(size, 1.5), np.zeros(size)
    else:
        scale = rng.uniform(0, 1, size) * (rng.uniform(size=size) < 0.6)
        bias = rng.normal(0, 0.7, size) * (rng.uniform(size=size) < 0.4)
    interval = float(rng.choice([0.0125, 0.0125, 0.02, 0.02, 0.04]))
    config = ALRSConfig(decision_interval=interval, choose_average=False)  # what it ends with is not looked at
    result = rollout(
        group.population(num_members),
        log_rates,
        network,
        config,
        explore=lambda progress: rng.normal(size=size) * scale + bias * (progress < 0.6),
        num_evaluations=int(rng.choice([0, 0, 4, 10])),
    )
    decisions = result.features.shape[0]
    task = np.repeat(np.arange(group.num_tasks), num_members)
    weight = group.weight.numpy()[task]
    # What is decided early decides more.
    weights = weight[None] * (1.0 - result.progress[:, None])
    keep = np.broadcast_to(weight > 0, (decisions, size)).reshape(-1)
    curves = group.curve[torch.from_numpy(task)][None].expand(decisions, -1, -1).reshape(-1, GRID_SIZE)
    keep_index = torch.from_numpy(np.flatnonzero(keep))
    return States(
        features=torch.from_numpy(result.features.reshape(-1, len(FEATURE_NAMES)))[keep_index].half(),
        log_rates=torch.from_numpy(result.log_rates.reshape(-1)).float()[keep_index],
        curves=curves[keep_index].contiguous(),
        origins=torch.full((len(keep_index),), low),
        weights=torch.from_numpy(weights.reshape(-1)).float()[keep_index],
    )


def fit(
    network: MetaLRNetwork,
    states: States,
    num_iterations: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    feature_noise: Mapping[str, float] | None = None,
    feature_dropout: float = 0.0,
) -> float:
    """
    Trains the network on labelled states; returns the mean loss of the last tenth of the iterations.

    Args:
        network (`MetaLRNetwork`): The one to train.
        states (`States`): On these.
        num_iterations, batch_size (`int`), learning_rate (`float`), seed (`int`): Of Adam with linear decay.
        feature_noise (`Mapping[str, float]`, *optional*), feature_dropout (`float`): As in [`MetaTrainingConfig`].
    """
    noisy = [FEATURE_NAMES.index(name) for name in feature_noise or ()]
    deviations = torch.tensor([float(value) for value in (feature_noise or {}).values()])
    generator = torch.Generator().manual_seed(seed)
    step = math.log(10) * 4.5 / (GRID_SIZE - 1)
    best = states.origins + step * states.curves.argmin(1)
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    losses = []
    for iteration in range(num_iterations):
        optimizer.param_groups[0]["lr"] = learning_rate * max(0.01, 1 - iteration / num_iterations)
        index = torch.randint(len(states.weights), (batch_size,), generator=generator)
        features = states.features[index].float()
        features += _FEATURE_NOISE * torch.randn(features.shape, generator=generator)
        if noisy:
            features[:, noisy] += deviations * torch.randn((batch_size, len(noisy)), generator=generator)
        if feature_dropout:
            features *= torch.rand(features.shape, generator=generator) >= feature_dropout
        correction = network.correction(features)
        rates = states.log_rates[index]
        regret = regret_at(states.curves[index], states.origins[index], step, rates + correction)
        huber = F.smooth_l1_loss(correction, (best[index] - rates).clamp(-6, 6), reduction="none")
        loss = (states.weights[index] * (regret + _HUBER_WEIGHT * huber)).mean()
        objective = loss + _L2 * sum(p.square().sum() for p in network.parameters())
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
        losses.append(loss.detach())
    return float(torch.stack(losses[-max(1, num_iterations // 10) :]).mean())


def distill(
    network: MetaLRNetwork,
    teachers: Sequence[MetaLRNetwork],
    states: States,
    num_iterations: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    earlier: MetaLRNetwork | None = None,
    earlier_shares: Tensor | None = None,
) -> float:
    """
    Trains the network to say what several say on average (Hinton et al., 2015); returns the last loss.

    Args:
        network (`MetaLRNetwork`): The one to train.
        teachers (`Sequence[MetaLRNetwork]`): Whose mean correction it learns.
        states (`States`): Where; their labels are not read.
        num_iterations, batch_size (`int`), learning_rate (`float`), seed (`int`): As for [`fit`].
        earlier (`MetaLRNetwork`, *optional*): A further teacher, with the weight `earlier_shares`.
        earlier_shares (`Tensor` of shape `[n]`, *optional*): That weight at each state.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    loss = torch.zeros(())
    for iteration in range(num_iterations):
        optimizer.param_groups[0]["lr"] = learning_rate * max(0.01, 1 - iteration / num_iterations)
        index = torch.randint(len(states.weights), (batch_size,), generator=generator)
        features = states.features[index].float()
        features = features + _FEATURE_NOISE * torch.randn(features.shape, generator=generator)
        with torch.no_grad():
            target = torch.stack([teacher.correction(features) for teacher in teachers]).mean(0)
            if earlier is not None:
                target = torch.lerp(target, earlier.correction(features), earlier_shares[index])
        huber = F.smooth_l1_loss(network.correction(features), target, reduction="none")
        loss = (states.weights[index] * huber).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


# Worker entry points


def _fill(arguments: tuple[str, int, int, float | None, bool]) -> None:
    folder, seed, num_tasks, max_cost, annealed = arguments
    fill_bank(Path(folder), [seed], num_tasks, max_cost, annealed)


def _visit(arguments: tuple[str, int, str | None, int, str, int]) -> None:
    bank, seed, network, num_members, target, visit_seed = arguments
    path = Path(target)
    if path.exists():
        return
    policy = MetaLRNetwork.from_pretrained(network) if network else None
    states = visit(load_group(group_path(Path(bank), seed)), policy, num_members, visit_seed)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    torch.save(asdict(states), temporary)
    temporary.replace(path)


def meta_train(
    config: MetaTrainingConfig, progress: Callable[[str, int, int], None] | None = None
) -> dict[str, object]:
    """
    Fills the bank, aggregates states over rounds, fits the networks, and judges them on held-out groups.

    Everything finished is found again in `output_dir`, so that the same call continues an interrupted one.

    Args:
        config (`MetaTrainingConfig`): What to do.
        progress (`Callable[[str, int, int], None]`, *optional*): Told the stage, what is done of it and its total.

    Returns:
        `dict`: For each network its `summarize` table; also written to `report.json`. The networks themselves, with
        their cards, lie in folders called after their hidden sizes.

    Raises:
        `InputError`: If what lies in `output_dir` was made with another configuration, or an earlier run of
            `states_from` was trained on a group that is held out here, or made with other versions.
    """
    report_progress = progress or (lambda stage, done, total: None)
    output = Path(config.output_dir)
    bank, visited = output / "bank", output / "states"
    held_out = [seed for seeds in config.held_out_seeds.values() for seed in seeds]
    _refuse_trained_on(held_out, config.states_from)
    _refuse_other_versions(config.states_from)
    visited.mkdir(parents=True, exist_ok=True)
    _keep_configuration(config)
    seeds = [*held_out, *config.train_seeds]
    with ProcessPoolExecutor(config.num_workers, initializer=init_worker) as pool:
        jobs = [(str(bank), seed, *config.size_of(seed), seed in held_out) for seed in seeds]
        for done, _ in enumerate(pool.map(_fill, jobs)):
            report_progress("bank", done + 1, len(jobs))
        # A network that drives well already visits the states that the next one has to know.
        policy = Path(config.earlier_networks[0]) if config.earlier_networks else None
        for round_index in range(config.num_rounds):
            targets = [visited / f"round{round_index}-{seed:06d}.pt" for seed in config.train_seeds]
            jobs = [
                (
                    str(bank),
                    seed,
                    str(policy) if policy else None,
                    config.num_members,
                    str(target),
                    config.seed + 7919 * round_index + seed,
                )
                for seed, target in zip(config.train_seeds, targets, strict=True)
            ]
            random.Random(config.seed + round_index).shuffle(jobs)
            for done, _ in enumerate(pool.map(_visit, jobs)):
                report_progress(f"round {round_index}", done + 1, len(jobs))
            last = round_index == config.num_rounds - 1
            policy = _fit_round(config, round_index, visited, config.hidden_sizes if last else config.hidden_sizes[:1])
            report_progress(f"fit {round_index}", 1, 1)
    report: dict[str, object] = {"config": asdict(config)} | _VERSIONS
    for sizes, folder in zip(config.hidden_sizes, _final_networks(config, report_progress), strict=True):
        name = "-".join(map(str, sizes))
        tables = {}
        for family, family_seeds in config.held_out_seeds.items():
            if family_seeds:
                key = f"{name}-{family}".rstrip("-")
                try:
                    report[key] = tables[family] = evaluate_held_out(bank, family_seeds, folder, config.num_workers)
                except NothingLearntError as error:  # no reason to give up the networks
                    logger.warning("Held-out groups %s: %s", key, error.rule)
                    report[key] = {"num_tasks": 0, "num_groups": len(family_seeds)}
        (output / name / "README.md").unlink(missing_ok=True)  # a card that is there is not written again
        MetaLRNetwork.from_pretrained(str(folder)).save_pretrained(
            output / name, model_card_kwargs=_card(config, tables)
        )
        report_progress("held out", 1, 1)
    _write_whole(report, output / "report.json")
    return report


def _write_whole(content: dict[str, object], path: Path) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2))
    temporary.replace(path)


def _keep_configuration(config: MetaTrainingConfig) -> None:
    """Writes the configuration beside what is made with it; another one would find that and take it for its own."""
    ours = asdict(config) | _VERSIONS
    for name in ("output_dir", "num_workers"):
        del ours[name]
    path = Path(config.output_dir) / _CONFIGURATION
    if not path.is_file():
        _write_whole(ours, path)
        return
    try:
        theirs = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        rule = f"its {path.name}, which says what the rest was made with, is damaged ({error})."
        raise InputError(
            "output_dir", str(path.parent), rule, "Restore that file, or give another output_dir."
        ) from error
    for name, value in ours.items():
        if name in theirs and theirs[name] != value:
            rule = f"{path.parent} holds what was made with {theirs[name]!r}, and it would be taken for this one's."
            remedy = "Give another output_dir, or the configuration of before; states_from builds on an earlier run."
            raise InputError(name, value, rule, remedy)


def _refuse_trained_on(held_out: Sequence[int], states_from: Sequence[str]) -> None:
    """Keeps networks from being judged on groups that the states of an earlier run have shown them."""
    for folder in states_from:
        seeds = {
            int(match[2])
            for path in (Path(folder) / "states").iterdir()
            if (match := _STATE_FILE.fullmatch(path.name))
        }
        if shown := sorted(seeds.intersection(held_out)):
            rule = f"was trained on group {shown[0]}, which is held out here to judge."
            raise InputError("states_from", folder, rule, "Leave it out, or hold out as many groups as that run did.")


def _refuse_other_versions(states_from: Sequence[str]) -> None:
    """Keeps out states whose features or labels are those of another population, or of another control law."""
    for folder in states_from:
        path = Path(folder) / _CONFIGURATION
        try:
            theirs = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            rule = f"its {path.name}, which says what it was made with, cannot be read ({error})."
            raise InputError("states_from", folder, rule, "Restore that file, or leave the folder out.") from error
        for name, version in _VERSIONS.items():
            if theirs.get(name) != version:
                rule = f"was made with {name} {theirs.get(name)!r}, and this is {version!r}."
                raise InputError("states_from", folder, rule, "Leave it out, or make it again.")


def _card(config: MetaTrainingConfig, tables: dict[str, dict[str, object]]) -> dict[str, str]:
    """What a network's card says of its training and its measured regret."""
    groups = f"{config.num_groups} groups of {config.num_tasks} small tasks"
    if config.num_long_groups:
        groups += f", {config.num_long_groups} groups of {config.num_long_tasks} longer ones"
    if config.num_extended_groups:
        groups += f", {config.num_extended_groups} groups of {config.num_long_tasks} with many epochs"
    if config.num_short_groups:
        groups += f", {config.num_short_groups} groups of {config.num_long_tasks} shorter ones"
    if config.num_large_groups:
        groups += f", {config.num_large_groups} groups of {config.num_large_tasks} wide and deep ones"
    if config.num_brief_groups:
        groups += (
            f", {config.num_brief_groups} groups of {config.num_large_tasks} wide and deep ones in a few dozen steps"
        )
    if config.num_batch_groups:
        groups += f", {config.num_batch_groups} groups of {config.num_long_tasks} with large batches"
    training = (
        f"{groups} (population version {POPULATION_VERSION}; synthetic, but for scikit-learn's digits in nearly a fifth of the "
        f"groups), {config.num_rounds} round{'s' if config.num_rounds > 1 else ''} of data aggregation with "
        f"{config.num_members} runs of each task, {config.num_iterations} iterations of the regression, seed "
        f"{config.seed}."
    )
    if config.states_from:
        training += f" States and networks of {len(config.states_from)} earlier run(s) on the same population as well."
    if config.ensemble:
        training += (
            f" Distilled in {config.num_distillation_iterations} iterations from the mean of the networks of the last "
            f"rounds and of {len(config.ensemble)} further fits"
            + (
                f", starting from an earlier network, which has the weight {config.earlier_shares}."
                if config.earlier_networks
                else "."
            )
        )
    measured = (
        "Regret (0: the best of 16 peak rates with linear decay, 1: a uniform guess) from 16 initial rates over 4.5 decades, under "
        f"version {CONTROL_VERSION} of the control law."
    )
    kinds = {
        "": "",
        "long": " of longer runs",
        "extended": " of many epochs",
        "short": " of few steps",
        "large": " of wide and deep models",
        "brief": " of wide and deep models in few steps",
        "batch": " of large batches",
    }
    for family, table in tables.items():
        measured += f" On {table['num_tasks']} held-out tasks{kinds[family]}: {_measured(table)}"
    return {"training": training, "measured": measured}


def _measured(table: dict[str, object]) -> str:
    return (
        f"mean {table['mean_regret']:.4f}, 90th percentile {table['percentile_90']:.4f}; by initial rate, lowest first: "
        f"{table['regret_by_initial_rate']}."
    )


def _network_folder(config: MetaTrainingConfig, round_index: int, sizes: Sequence[int]) -> Path:
    return Path(config.output_dir) / f"network-round{round_index}-{'-'.join(map(str, sizes))}"


def _state_files(config: MetaTrainingConfig, first_round: int) -> list[Path]:
    """Files of the states of all rounds from `first_round` on, of this run and of those that it builds on."""
    folders = [Path(config.output_dir), *map(Path, config.states_from)]
    return [
        path
        for folder in folders
        for path in sorted((folder / "states").iterdir())
        if (match := _STATE_FILE.fullmatch(path.name)) and int(match[1]) >= first_round
    ]


def _part_of(path: Path) -> str:
    """The part of the population that a file of states is of."""
    return _PARTS[family_of(int(_STATE_FILE.fullmatch(path.name)[2]))]


def _weighted_states(config: MetaTrainingConfig, paths: Sequence[Path]) -> States:
    """The states of several files, each part with its weight."""
    parts = [States.load([path]) for path in paths]
    for path, states in zip(paths, parts, strict=True):
        states.weights = states.weights * float(config.part_weights.get(_part_of(path), 1.0))
    return States.join(parts)


def _earlier_shares(config: MetaTrainingConfig, paths: Sequence[Path]) -> Tensor:
    """Weight of the earlier networks at each state of these files."""
    shares = []
    for path in paths:
        share = float(config.earlier_shares.get(_part_of(path), 0.5))
        shares.append(torch.full((len(States.load([path]).weights),), share))
    return torch.cat(shares)


def _last_networks(folder: Path) -> list[Path]:
    """Networks of the last round in the output folder of a run."""
    rounds: dict[int, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if (match := _NETWORK_FOLDER.fullmatch(path.name)) and (path / "config.json").is_file():
            rounds.setdefault(int(match[1]), []).append(path)
    if not rounds:
        raise InputError("states_from", str(folder), "holds no network that was fitted.", "Let that run end first.")
    return rounds[max(rounds)]


def _final_networks(config: MetaTrainingConfig, report_progress: Callable[[str, int, int], None]) -> list[Path]:
    """Folders of the resulting networks: those of the last round, or distilled from an ensemble."""
    output = Path(config.output_dir)
    if not config.ensemble:
        return [_network_folder(config, config.num_rounds - 1, sizes) for sizes in config.hidden_sizes]
    teachers = [path for folder in (*config.states_from, output) for path in _last_networks(Path(folder))]
    for index, member in enumerate(config.ensemble):
        folder = output / f"ensemble-{index}"
        if not (folder / "config.json").exists():
            torch.manual_seed(member["seed"])
            network = MetaLRNetwork(member["hidden_sizes"])
            fit(
                network, _weighted_states(config, _state_files(config, 0)), member["num_iterations"], config.batch_size, config.learning_rate,
                member["seed"], **config.noise_of(member),
            )  # fmt: skip
            network.save_pretrained(folder)
        teachers.append(folder)
        report_progress("ensemble", index + 1, len(config.ensemble))
    folders = [output / f"distilled-{'-'.join(map(str, sizes))}" for sizes in config.hidden_sizes]
    for index, (sizes, folder) in enumerate(zip(config.hidden_sizes, folders, strict=True)):
        if not (folder / "config.json").exists():
            torch.manual_seed(config.seed)
            network, earlier = MetaLRNetwork(sizes), None
            if config.earlier_networks:
                earlier = MetaLRNetwork.from_pretrained(config.earlier_networks[index])
                network.load_state_dict(earlier.state_dict())
            # What was visited without a network is left out: no network will come there again.
            paths = _state_files(config, 0 if config.earlier_networks or config.num_rounds == 1 else 1)
            distill(
                network, [MetaLRNetwork.from_pretrained(str(path)) for path in teachers], _weighted_states(config, paths),
                config.num_distillation_iterations, config.batch_size, config.learning_rate, config.seed,
                earlier, _earlier_shares(config, paths),
            )  # fmt: skip
            network.save_pretrained(folder)
        report_progress("distillation", index + 1, len(folders))
    return folders


def _fit_round(
    config: MetaTrainingConfig, round_index: int, visited: Path, all_sizes: Sequence[Sequence[int]]
) -> Path:
    """Fits networks on the states of all rounds so far; returns the folder of the first one."""
    folders = [_network_folder(config, round_index, sizes) for sizes in all_sizes]
    if not all((folder / "config.json").exists() for folder in folders):
        paths = [path for r in range(round_index + 1) for path in sorted(visited.glob(f"round{r}-*.pt"))]
        states = _weighted_states(config, paths)
        for sizes, folder in zip(all_sizes, folders, strict=True):
            torch.manual_seed(config.seed)
            network = MetaLRNetwork(sizes)
            fit(
                network, states, config.num_iterations, config.batch_size, config.learning_rate, config.seed,
                config.feature_noise, config.feature_dropout,
            )  # fmt: skip
            network.save_pretrained(folder)
    return folders[0]
