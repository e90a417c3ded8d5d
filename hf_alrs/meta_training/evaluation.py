"""
How well a network does on groups of tasks that it was not trained on.

Groups differ far more from each other than the tasks of a group or the initial rates do, so intervals count groups.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import ALRSConfig, InputError
from ..controller import CONTROL_VERSION
from ..network import MetaLRNetwork
from ..workers import end_with_parent
from .bank import Group, fill_bank, group_path, load_group
from .population import GRID_SIZE
from .rollout import rollout
from .spec import POPULATION_VERSION


class NothingLearntError(InputError):
    """Held-out groups in which no run learns anything, so that there is no regret."""


def init_worker() -> None:
    """One torch thread a process, so that processes do not fight over cores, and an end when the parent is killed."""
    end_with_parent()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def evaluate_group(group: Group, network: MetaLRNetwork | None, config: ALRSConfig | None = None) -> dict[str, list]:
    """
    Regret of the network's runs from every initial rate of the grid, on a group it was not trained on.

    Returns:
        `dict`: `regret` and `weight`, lists over tasks (of lists over initial rates), and mean `restarts`.
    """
    population = group.population(GRID_SIZE)
    result = rollout(population, group.log_rates.repeat(group.num_tasks), network, config, record=False)
    shape = (group.num_tasks, GRID_SIZE)
    return {
        "regret": group.regret(result.loss.view(shape), result.error.view(shape)).tolist(),
        "weight": group.weight.tolist(),
        "restarts": float(result.restarts.mean()),
    }


def summarize(evaluations: Sequence[dict[str, list]]) -> dict[str, object]:
    """
    Weighted mean regret over held-out tasks: overall, by initial rate, and its 90th percentile over runs; the standard
    error of the mean is over groups (of a ratio of sums, linearised), and `None` where there is only one.

    Raises:
        `NothingLearntError`: If no run of any group learns anything, so that there is no regret.
    """
    regret = np.concatenate([np.asarray(e["regret"]) for e in evaluations])
    weight = np.concatenate([np.asarray(e["weight"]) for e in evaluations])
    used = weight > 0
    if not used.any():
        rule = "in none of the held-out groups does any run learn anything, so that there is no regret to be told."
        raise NothingLearntError("num_groups", len(evaluations), rule, "Take more groups.")
    by_rate = (regret[used] * weight[used, None]).sum(0) / weight[used].sum()
    mean = float(by_rate.mean())
    sums = [(np.asarray(e["regret"]).mean(1) @ np.asarray(e["weight"]), sum(e["weight"])) for e in evaluations]
    deviations = [total - mean * size for total, size in sums]
    standard_error = None
    if len(sums) > 1:
        correction = len(sums) / (len(sums) - 1)
        standard_error = math.sqrt(correction * sum(d * d for d in deviations)) / float(weight[used].sum())
    return {
        "mean_regret": mean,
        "standard_error": standard_error,
        "regret_by_initial_rate": [round(float(x), 4) for x in by_rate],
        "percentile_90": float(np.quantile(regret[used], 0.9)),
        "num_tasks": int(used.sum()),
        "num_groups": len(sums),
        "mean_restarts": float(np.mean([e["restarts"] for e in evaluations])),
    }


def _evaluate(arguments: tuple[str, int, str]) -> dict[str, list]:
    bank, seed, network = arguments
    return evaluate_group(load_group(group_path(Path(bank), seed)), MetaLRNetwork.from_pretrained(network))


def evaluate_held_out(bank: Path, seeds: Sequence[int], network: Path, num_workers: int) -> dict[str, object]:
    """`summarize` over the held-out groups of a bank."""
    jobs = [(str(bank), seed, str(network)) for seed in seeds]
    with ProcessPoolExecutor(num_workers, initializer=init_worker) as pool:
        return summarize(list(pool.map(_evaluate, jobs)))


def _judge(arguments: tuple[str, int, int, float | None, str, dict[str, Any]]) -> dict[str, list]:
    bank, seed, num_tasks, max_cost, network, options = arguments
    path = Path(network) / f"group-{seed}.json"
    if not path.exists():
        fill_bank(Path(bank), [seed], num_tasks, max_cost)
        policy = MetaLRNetwork.from_pretrained(network)
        evaluation = evaluate_group(load_group(group_path(Path(bank), seed)), policy, ALRSConfig(**options))
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(evaluation))
        temporary.replace(path)
    return json.loads(path.read_text())


def evaluate_network(
    network: MetaLRNetwork,
    output_dir: Path,
    seeds: Sequence[int],
    num_tasks: int = 2,
    max_cost: float | None = 5.0,
    num_workers: int = 2,
    progress: Callable[[str, int, int], None] | None = None,
    final_lr_ratio: float | None = None,
    choose_average: bool = True,
    max_beta1: float | None = None,
) -> dict[str, object]:
    """
    Judges a network on groups drawn from seeds of one's choice; what is stored in `output_dir` is not run again.

    Args:
        network (`MetaLRNetwork`): The one to judge.
        output_dir (`Path`): For the bank, the network and the outcome of each group.
        seeds (`Sequence[int]`): Groups; those that the network was trained on are no judges of it.
        num_tasks (`int`), max_cost (`float`, *optional*): Of a group, as in `MetaTrainingConfig`.
        num_workers (`int`): Processes.
        progress (`Callable[[str, int, int], None]`, *optional*): Told the stage, what is done of it and its total.
        final_lr_ratio (`float`, *optional*), choose_average (`bool`), max_beta1 (`float`, *optional*): Of the [`ALRSConfig`] under which
            the network drives.

    Returns:
        `dict`: As of [`summarize`].
    """
    bank = output_dir / f"bank-v{POPULATION_VERSION}-{num_tasks}-{max_cost}"
    # Outcomes are of this bank's groups, this network and this control law
    folder = bank / f"network-{network.fingerprint()[:12]}-control-v{CONTROL_VERSION}"
    if final_lr_ratio is not None:
        folder = folder.with_name(f"{folder.name}-{final_lr_ratio}")
    if not choose_average:
        folder = folder.with_name(f"{folder.name}-fixed-average")
    if max_beta1 is not None:
        folder = folder.with_name(f"{folder.name}-beta1-{max_beta1}")
    folder.mkdir(parents=True, exist_ok=True)
    network.save_pretrained(folder)
    options = {"final_lr_ratio": final_lr_ratio, "choose_average": choose_average, "max_beta1": max_beta1}
    jobs = [(str(bank), seed, num_tasks, max_cost, str(folder), options) for seed in seeds]
    evaluations = []
    with ProcessPoolExecutor(num_workers, initializer=init_worker) as pool:
        for done, evaluation in enumerate(pool.map(_judge, jobs)):
            evaluations.append(evaluation)
            if progress is not None:
                progress("groups", done + 1, len(jobs))
    return summarize(evaluations)
