"""Plans: which studies a report has, and the grids of runs that each of them is made of."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..arguments import recipe_arguments
from ..config import InputError, read_yaml
from ..experiment import find_baseline
from ..matrix import RunSpec, build_matrix, same_setting
from ..report import read_result
from ..report.runs import REPORT_FILE


# The copy of the plan that lies beside the rows of its studies
PLAN_FILE = "plan.yaml"
_PLAN_KEYS = ("title", "idea", "reference", "studies")
_STUDY_KEYS = ("title", "recipe", "updated", "caption", "pretrained", "options", "grids")
_GRID_KEYS = ("schedulers", "learning_rates", "seeds")
# What changes the outcome of a run: rows of another value cannot stay beside new ones
_SETTINGS = ("recipe", "options")
# As well, in the rows themselves
_DATA_SETTINGS = ("dataset_name", "dataset_config_name", "model_name_or_path")


@dataclass(frozen=True)
class Grid:
    """Every scheduler from every rate with every seed."""

    schedulers: tuple[str, ...]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Study:
    """
    One task at one size, under several grids of runs.

    Args:
        name (`str`): Its folder, and its name in the report.
        title (`str`): In words.
        recipe (`Path`): Recipe of the task.
        caption (`str`): Size of its runs beside the recipe's, in words; every table of the study says it.
        grids (`tuple[Grid, ...]`): In the order of work.
        options (`dict`): Options of `hf-alrs compare` over those of the recipe.
        updated (`Path`, *optional*): The recipe with what was changed in the code later, to be shown beside it.
        pretrained (`str`): Name of the recipe's pretrained model, where the study takes `--model_name_or_path`.
    """

    name: str
    title: str
    recipe: Path
    caption: str
    grids: tuple[Grid, ...]
    options: dict[str, Any] = field(default_factory=dict)
    updated: Path | None = None
    pretrained: str = ""

    def specs(self, task: str, schedulers: Sequence[str] | None = None) -> list[RunSpec]:
        """
        The cells of all grids, each once and in the order of work.

        Args:
            task (`str`): Name of the task, for the rows.
            schedulers (`Sequence[str]`, *optional*): Only the cells of these.
        """
        cells = [
            cell
            for grid in self.grids
            for cell in build_matrix(task, grid.schedulers, grid.learning_rates, grid.seeds)
            if schedulers is None or cell.scheduler in schedulers
        ]
        return list(dict.fromkeys(cells))

    def arguments(
        self, output_dir: Path, dataset_name: str | None = None, model_name_or_path: str | None = None
    ) -> list[str]:
        """The study as `hf-alrs compare` takes it, without the grid."""
        arguments = ["--config", str(self.recipe)]
        given = {"dataset_name": dataset_name, "model_name_or_path": model_name_or_path if self.pretrained else None}
        arguments += recipe_arguments(given | self.options)
        return [*arguments, "--output_dir", str(output_dir / self.name)]


@dataclass(frozen=True)
class Plan:
    """
    The studies of one report.

    Args:
        path (`Path`): File that it was read from.
        title (`str`): Of the report.
        idea (`tuple[str, ...]`): What is to be shown, in paragraphs.
        reference (`str`): The scheduler that the others are compared with.
        studies (`dict[str, Study]`): By name, in the order of work.
    """

    path: Path
    title: str
    idea: tuple[str, ...]
    reference: str
    studies: dict[str, Study]

    def select(self, names: Sequence[str] | None, without: Sequence[str] = ()) -> list[Study]:
        """
        The studies of these names, or all, without those of other names.

        Raises:
            `InputError`: If there is none of such a name.
        """
        for name in names or ():
            if name not in self.studies:
                raise InputError("studies", name, f"must be one of {', '.join(self.studies)}.", "Check the spelling.")
        return [s for s in self.studies.values() if (not names or s.name in names) and s.name not in without]

    def check_schedulers(self, names: Sequence[str] | None) -> None:
        """
        Raises:
            `InputError`: If the plan runs no scheduler of one of these names.
        """
        known = {name for study in self.studies.values() for grid in study.grids for name in grid.schedulers}
        for name in names or ():
            if name not in known:
                raise InputError(
                    "schedulers", name, f"must be one of {', '.join(sorted(known))}.", "Check the spelling."
                )

    def check_rows(self, output_dir: Path, data: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """
        Args:
            output_dir (`Path`): Folder with a folder of rows for each study.
            data (`Mapping`, *optional*): Study -> `DataArguments` of the runs that are to be put beside its rows.

        Raises:
            `InputError`: If rows lie there of a study of the same name with other settings, or of other data or another
                model.
        """
        for name, given in (data or {}).items():
            _check_data(name, output_dir / name, given)
        stored = output_dir / PLAN_FILE
        if not stored.is_file():
            return
        before, now = read_yaml(stored)["studies"], read_yaml(self.path)["studies"]
        for name in self.studies:
            has_rows = any((output_dir / name).glob("*.json"))
            if has_rows and name in before and any(before[name].get(key) != now[name].get(key) for key in _SETTINGS):
                raise InputError(
                    "output_dir",
                    str(output_dir),
                    f"holds runs of the study {name} with another recipe or other options.",
                    f"Give another folder, or delete {output_dir / name}.",
                )

    def store(self, output_dir: Path) -> None:
        """Puts a copy of the plan beside its rows."""
        stored = output_dir / PLAN_FILE
        if stored.resolve() != self.path.resolve():
            output_dir.mkdir(parents=True, exist_ok=True)
            partial = stored.with_name(f"{PLAN_FILE}.tmp")
            partial.write_bytes(self.path.read_bytes())
            os.replace(partial, stored)


def _check_data(name: str, folder: Path, given: Mapping[str, Any]) -> None:
    """Refuses rows of other data or of another model, by one of them: all were made alike."""
    path = next((path for path in sorted(folder.glob("*.json")) if path.name != REPORT_FILE), None)
    before = read_result(path)["config"].get("data") if path is not None else None
    for key in [key for key in _DATA_SETTINGS if key in (before or ())]:
        stored, now = before.get(key), given.get(key)
        if same_setting(stored, now):
            continue
        field = "model_name_or_path" if key == "model_name_or_path" else "data_dir"
        raise InputError(
            field,
            now,
            f"the stored runs of the study {name} have {key} {stored!r}.",
            f"Give the same, or another --output_dir, or delete {folder}.",
        )


def find_plan(name: str, folders: Iterable[Path]) -> Path:
    """
    The file of a plan, by its path or by its name in one of the folders.

    Raises:
        `InputError`: If there is none.
    """
    if Path(name).is_file():
        return Path(name)
    known = {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}
    if name not in known:
        raise InputError("plan", name, f"must be a file or one of {', '.join(known)}.", "Check the spelling.")
    return known[name]


def read_plan(path: Path, recipe_folders: Sequence[Path]) -> Plan:
    """
    Reads and checks a plan.

    Args:
        path (`Path`): A YAML file.
        recipe_folders (`Sequence[Path]`): Where its recipes lie, besides the folder of the file.

    Raises:
        `InputError`: Names the place in the file and the rule that is broken.
    """

    def refuse(place: str, value: object, rule: str) -> InputError:
        return InputError("plan", value, f"{path.name}, {place}: {rule}", "Correct the file.")

    def mapping(value: object, place: str, known: Sequence[str], needed: Sequence[str]) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise refuse(place, value, "must be a mapping.")
        for key in value:
            if key not in known:
                raise refuse(place, key, f"is no key of it; there are {', '.join(known)}.")
        for key in needed:
            if not value.get(key):
                raise refuse(place, key, "is missing.")
        return value

    def recipe(name: str, place: str) -> Path:
        found = [file for folder in (path.parent, *recipe_folders) if (file := folder / f"{name}.yaml").is_file()]
        if not found:
            raise refuse(place, name, "there is no recipe of this name.")
        for key in ("task_name", "learning_rate"):
            if key not in read_yaml(found[0]):
                raise refuse(place, name, f"its recipe {found[0].name} has no {key}.")
        return found[0]

    content = mapping(read_yaml(path), "the plan", _PLAN_KEYS, _PLAN_KEYS)
    if not isinstance(content["studies"], dict):
        raise refuse("studies", content["studies"], "must be a mapping.")
    studies = {}
    for name, value in content["studies"].items():
        values = mapping(value, name, _STUDY_KEYS, ("title", "recipe", "caption", "grids"))
        options = values.get("options", {})
        if not isinstance(options, dict) or not isinstance(values["grids"], list):
            raise refuse(name, value, "options must be a mapping, and grids a list.")
        if not isinstance(values.get("pretrained", ""), str):
            raise refuse(name, values["pretrained"], "pretrained must be the name of the recipe's model.")
        studies[name] = Study(
            name=name,
            title=values["title"],
            recipe=recipe(values["recipe"], name),
            caption=values["caption"],
            grids=tuple(_read_grid(mapping(g, name, _GRID_KEYS, _GRID_KEYS), name, refuse) for g in values["grids"]),
            options=options,
            updated=recipe(values["updated"], name) if values.get("updated") else None,
            pretrained=values.get("pretrained", ""),
        )
    for key in ("title", "reference", "idea"):
        if not isinstance(content[key], str):
            raise refuse(key, content[key], "must be text.")
    find_baseline(content["reference"])
    paragraphs = tuple(" ".join(text.split()) for text in content["idea"].strip().split("\n\n"))
    return Plan(path, content["title"], paragraphs, content["reference"], studies)


def _read_grid(values: Mapping[str, Any], name: str, refuse: Any) -> Grid:
    if not all(isinstance(values[key], list) for key in _GRID_KEYS):
        raise refuse(name, dict(values), "a grid is made of lists.")
    for scheduler in values["schedulers"]:
        find_baseline(scheduler)
    for rate in values["learning_rates"]:
        # YAML reads 1e-3, without a point, as text
        if not isinstance(rate, float) or not (0 < rate < math.inf):
            raise refuse(name, rate, "an initial rate must be a number above 0, such as 1.0e-3.")
    for seed in values["seeds"]:
        if type(seed) is not int or not 0 <= seed < 2**32:
            raise refuse(name, seed, "a seed must be a whole number from 0 to 2**32 - 1.")
    return Grid(tuple(values["schedulers"]), tuple(values["learning_rates"]), tuple(values["seeds"]))
