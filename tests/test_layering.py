"""Imports run strictly downward, so that every module can be read, tested and changed without those above it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_alrs"

# Who may be imported by whom: a room imports from rows above its own alone. A new room needs a row.
ROWS = (
    ("config", "features", "guard", "metrics", "statistics", "baselines", "range_test", "batch_norm", "workers"),
    ("hub",),
    ("network", "signals"),
    ("controller", "averaging"),
    ("scheduler", "meta_training", "report"),
    ("callback", "cards"),
    ("experiment",),
    ("recording",),
    ("unfinished",),
    ("matrix",),
    ("arguments",),
    ("run",),
    ("comparison", "sharing"),
    ("evidence",),
    ("cli",),
)
RANK = {room: rank for rank, row in enumerate(ROWS) for room in row}
ALONE = ("metrics", "statistics", "baselines")


def room_of(path: Path) -> str:
    """The module or package directly under hf_alrs that a file belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_modules(path: Path, package: str) -> list[str]:
    """Absolute names of all that a file imports, imports inside functions included."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join(parts[: len(parts) - node.level + 1] + ([node.module] if node.module else []))
            # `from . import x` names a module
            names += [base] * bool(node.module) + [f"{base}.{alias.name}" for alias in node.names]
    return names


def package_of(path: Path) -> str:
    return ".".join(path.parent.relative_to(ROOT).parts)


def rooms_imported(path: Path) -> set[str]:
    names = imported_modules(path, package_of(path))
    rooms = {name.split(".")[1] for name in names if name.startswith("hf_alrs.")}
    existing = {room_of(other) for other in PACKAGE.rglob("*.py")}
    return rooms & existing


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_every_room_has_a_row() -> None:
    missing = sorted({room_of(path) for path in FILES} - RANK.keys())
    assert not missing, f"say in ROWS where {missing} belong"


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_imports_run_downward(path: Path) -> None:
    room = room_of(path)
    wrong = sorted(other for other in rooms_imported(path) if other != room and RANK[other] >= RANK[room])
    assert not wrong, f"{room} must not import {', '.join(wrong)}"
    names = imported_modules(path, package_of(path))
    # The public names at the top import everything: nothing inside may go through them.
    assert "hf_alrs" not in names, f"{room} imports the package itself"


@pytest.mark.parametrize("room", ALONE)
def test_general_tools_stand_alone(room: str) -> None:
    assert rooms_imported(PACKAGE / f"{room}.py") == set()


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_the_package_knows_no_tasks(path: Path) -> None:
    names = imported_modules(path, package_of(path))
    assert not [name for name in names if name.split(".")[0] == "tasks"]


def test_the_controller_knows_no_trainer() -> None:
    for room in ("config", "features", "network", "controller", "signals"):
        names = imported_modules(PACKAGE / f"{room}.py", "hf_alrs")
        assert not [name for name in names if name.split(".")[0] in ("transformers", "accelerate")], room


TASKS = sorted((ROOT / "tasks").rglob("*.py"))


@pytest.mark.parametrize("path", TASKS, ids=[str(path.relative_to(ROOT)) for path in TASKS])
def test_tasks_know_what_an_experiment_is_and_no_more(path: Path) -> None:
    names = [name for name in imported_modules(path, package_of(path)) if name.split(".")[0] == "hf_alrs"]
    assert all(name.startswith("hf_alrs.experiment") for name in names), names


def test_the_checks_see_what_they_look_for(tmp_path: Path) -> None:
    path = tmp_path / "example.py"
    path.write_text(
        "from . import cli\nfrom .. import up\nfrom .scheduler import x\ndef f():\n    import tasks.text\n"
    )
    names = imported_modules(path, "hf_alrs.report")
    assert {"hf_alrs.report.cli", "hf_alrs.up", "hf_alrs.report.scheduler", "tasks.text"} <= set(names)
