"""
The bank: every group of small tasks, run once over a grid of peak rates.

A run has a *regret*: 0 for the best run of its task's grid with linear decay, 1 for a uniform guess. Regret of averaged runs over
log peak rate is what the network is trained on, because it tells how much a wrong rate costs, which differs widely
between tasks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ALRSConfig, InputError
from .data import make_data
from .population import GRID_SIZE, Population
from .spec import TaskSpec, sample_spec


# Below this share of the loss at chance that the best run wins, a task says nothing about rates.
_MIN_GAIN, _FULL_GAIN = 0.1, 0.4


@dataclass
class Group:
    """
    A group of tasks with the outcome of every run of its grid.

    Args:
        spec (`TaskSpec`): What the tasks share.
        log_rates (`Tensor` of shape `[grid_size]`): Natural logarithms of the peak rates, evenly spaced.
        loss, error (`Tensor` of shape `[num_tasks, grid_size]`): On the eval split, at the end of a linear decay to 0;
            those of averaged weights where no such runs were made.
        averaged_loss, averaged_error (`Tensor` of shape `[num_tasks, grid_size]`): The same of averaged weights as the
            controller's split chooses them, at the end of the decay that goes with averaging (see
            [`ALRSConfig.final_ratio`]), with Adam's beta1 as low as the length of the run has it.
        initial (`list[Tensor]`): Initial weights, `[num_tasks, *shape]` each (pre-training is not run again).
    """

    spec: TaskSpec
    log_rates: Tensor
    loss: Tensor
    error: Tensor
    averaged_loss: Tensor
    averaged_error: Tensor
    initial: list[Tensor]

    @property
    def num_tasks(self) -> int:
        return self.loss.shape[0]

    def regret(self, loss: Tensor, error: Tensor) -> Tensor:
        """
        Regret of runs: the mean of the normalised excess of loss and of error over the best run of the grid.

        Args:
            loss, error (`Tensor` of shape `[num_tasks, n]`): Of `n` runs of each task.
        """
        chance_loss, chance_error = math.log(self.spec.num_classes), 1.0 - 1.0 / self.spec.num_classes

        def excess(values: Tensor, grid: Tensor, chance: float) -> Tensor:
            best = grid.min(1, keepdim=True).values
            return ((values - best) / (chance - best).clamp(min=0.1 * chance)).clamp(-0.3, 1.5)

        cap = 2 * chance_loss + 1
        return 0.5 * excess(loss.clamp(max=cap), self.loss.clamp(max=cap), chance_loss) + 0.5 * excess(
            error, self.error, chance_error
        )

    @property
    def grid_regret(self) -> Tensor:
        """Regret of the averaged runs of the grid, `[num_tasks, grid_size]`; below 0 where averaging beats annealing."""
        return self.regret(self.averaged_loss, self.averaged_error)

    @property
    def curve(self) -> Tensor:
        """`grid_regret`, smoothed by (1, 2, 1) / 4: single runs are noisy."""
        c = self.grid_regret
        padded = torch.cat([c[:, :1], c, c[:, -1:]], 1)
        return 0.25 * padded[:, :-2] + 0.5 * padded[:, 1:-1] + 0.25 * padded[:, 2:]

    @property
    def weight(self) -> Tensor:
        """Weight of each task, `[num_tasks]`: 0 where nothing can be learnt, 1 where much can."""
        chance = math.log(self.spec.num_classes)
        gain = ((chance - self.loss.min(1).values) / chance).clamp(0, 1)
        return (gain > _MIN_GAIN).float() * (gain / _FULL_GAIN).clamp(max=1)

    def population(self, num_members: int) -> Population:
        """The group's tasks with `num_members` runs each, at their initial weights."""
        plain = replace(self.spec, pretrained=False, damaged=False)
        population = Population(plain, self.num_tasks, num_members, data=make_data(self.spec, self.num_tasks))
        population._set_initial(self.initial)
        population.reset()
        return population


def run_group(seed: int, num_tasks: int, max_cost: float | None, annealed: bool = True) -> Group:
    """
    Runs the grid of the group that `seed` draws.

    Args:
        seed (`int`), num_tasks (`int`), max_cost (`float`, *optional*): Which group, see [`sample_spec`].
        annealed (`bool`, *optional*, defaults to `True`): Whether to run the grid with linear decay as well. It only
            sets the origin and the scale of the regret, which judging needs and training does not.
    """
    population = Population(sample_spec(seed, max_cost), num_tasks, GRID_SIZE)
    grid = population.learning_rate_grid
    rates, shape = grid.repeat(num_tasks), (num_tasks, GRID_SIZE)
    final_ratio = ALRSConfig().final_ratio(population.spec.num_training_steps)
    averaged_loss, averaged_error = population.run_fixed(rates, final_ratio, average=True)
    loss, error = population.run_fixed(rates) if annealed else (averaged_loss, averaged_error)
    return Group(
        spec=population.spec,
        log_rates=grid.clone(),
        loss=loss.view(shape).clone(),
        error=error.view(shape).clone(),
        averaged_loss=averaged_loss.view(shape).clone(),
        averaged_error=averaged_error.view(shape).clone(),
        initial=population._get_initial(),
    )


def group_path(folder: Path, seed: int) -> Path:
    return folder / f"group-{seed:06d}.pt"


def save_group(group: Group, path: Path) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    torch.save(
        {
            "spec": group.spec.to_dict(),
            "log_rates": group.log_rates,
            "loss": group.loss,
            "error": group.error,
            "averaged_loss": group.averaged_loss,
            "averaged_error": group.averaged_error,
            "initial": group.initial,
        },
        temporary,
    )
    temporary.replace(path)


def load_stored(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """
    Reads what this package saved with `torch.save`, tensors and plain values alone.

    Args:
        path (`Path`): The file.
        names (`Sequence[str]`): The entries that it must hold, and no others.

    Raises:
        [`InputError`]: Names the file, where it is missing, truncated, of another kind, or holds code.
    """
    remedy = "Delete the file and call the meta-training again: only what is missing is made again."
    try:
        # Mapped, so that a size that the file only claims to have is never allocated
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the unpickler raises whatever the bytes suggest
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise InputError(
            str(path), path.name, f"cannot be read ({type(error).__name__}: {reason}).", remedy
        ) from error
    if not isinstance(stored, dict) or set(stored) != set(names):
        found = sorted(map(str, stored)) if isinstance(stored, dict) else type(stored).__name__
        raise InputError(str(path), found, f"must hold {', '.join(names)}.", remedy)
    return stored


def load_group(path: Path) -> Group:
    """
    Reads a group that [`save_group`] wrote.

    Raises:
        [`InputError`]: Names the file, where it holds no such group.
    """
    stored = load_stored(path, [field.name for field in fields(Group)])
    try:
        group = Group(**{**stored, "spec": TaskSpec(**stored["spec"])})
        shape = (group.loss.shape[0], len(group.log_rates))
        outcomes = (group.loss, group.error, group.averaged_loss, group.averaged_error)
        good = all(x.shape == shape for x in outcomes) and all(len(w) == shape[0] for w in group.initial)
    except (TypeError, AttributeError, IndexError, ValueError) as error:
        raise InputError(str(path), path.name, f"holds no group of tasks ({error}).", "Delete the file.") from error
    if not good:
        raise InputError(str(path), tuple(group.loss.shape), "its tensors do not fit each other.", "Delete the file.")
    return group


def fill_bank(
    folder: Path, seeds: Iterable[int], num_tasks: int, max_cost: float | None, annealed: bool = True
) -> None:
    """Runs every group that the folder does not hold yet; may be interrupted at any time."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        path = group_path(folder, seed)
        if not path.exists():
            save_group(run_group(seed, num_tasks, max_cost, annealed), path)
