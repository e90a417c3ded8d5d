"""The commands: `hf-alrs`, and the body of the run scripts."""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from .arguments import check_target, installed_tasks, read_recipe
from .comparison import compare
from .config import InputError, check_output_dir, home_expanded
from .evidence.command import evidence_command
from .experiment import Task
from .matrix import environment
from .report import build_report, load_runs
from .report.leaderboard import LEADERBOARD_FILE, build_leaderboard, render_leaderboard
from .run import train
from .sharing import publish_command, pull_command


_COMPARE_OPTIONS = ("--schedulers", "--learning_rates", "--learning-rates", "--seeds")


def run_script(tasks: Mapping[str, Task], default_task: str) -> None:
    """The body of a run script: trains, and turns an input error into one message and exit code 2."""
    _guard(lambda arguments: train_or_compare(arguments, tasks, default_task), sys.argv[1:])


def train_or_compare(arguments: Sequence[str], tasks: Mapping[str, Task], default_task: str) -> None:
    """One run, or a matrix of runs where the command line or the file of `--config` names several."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    file = parser.parse_known_args(arguments)[0].config
    options = [argument.split("=")[0] for argument in arguments]
    recipe = read_recipe(Path(file)) if file else {}
    options += [f"--{name}" for name, value in recipe.items() if value is not None]
    several = any(option in _COMPARE_OPTIONS for option in options)
    (compare if several else train)(arguments, tasks, default_task)


def _guard(command: Callable[[Sequence[str]], object], arguments: Sequence[str]) -> None:
    # A bare --debug shows tracebacks; with a value it is the option of TrainingArguments.
    debug = [
        i
        for i, argument in enumerate(arguments)
        if argument == "--debug" and (i + 1 == len(arguments) or arguments[i + 1].startswith("--"))
    ]
    try:
        command([argument for i, argument in enumerate(arguments) if i not in debug])
    except InputError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if debug or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(
            f"error: {error.filename or 'output_dir'}: {error.strerror}. Make room; the same command goes on from what is stored.",
            file=sys.stderr,
        )
        sys.exit(2)
    except BrokenProcessPool:
        if debug:
            raise
        print(
            "error: a worker process was killed, perhaps for lack of memory. With a smaller num_workers each has more; "
            "the same command goes on from what is stored.",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        if debug:
            raise
        print("\ninterrupted: the same command goes on from what is stored.", file=sys.stderr)
        sys.exit(130)


def _command_train(arguments: Sequence[str]) -> None:
    train(arguments, installed_tasks(), "titanic")


def _command_compare(arguments: Sequence[str]) -> None:
    compare(arguments, installed_tasks(), "titanic")


def _command_tasks(arguments: Sequence[str]) -> None:
    argparse.ArgumentParser(prog="hf-alrs tasks", description="List the installed tasks.").parse_args(arguments)
    for name, task in installed_tasks().items():
        print(f"{name:12} {task.kind:8} {task.description}")


def _command_meta_train(arguments: Sequence[str]) -> None:
    from .meta_training.command import meta_train_command

    meta_train_command(arguments)


def _command_meta_evaluate(arguments: Sequence[str]) -> None:
    from .meta_training.command import meta_evaluate_command

    meta_evaluate_command(arguments, environment)


def _command_report(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="hf-alrs report",
        description="Build the report of stored runs; of several folders, such as those that `hf-alrs pull` wrote, also "
        "one leaderboard.",
    )
    parser.add_argument("results_dir", nargs="+", type=home_expanded, help="Folders of result files.")
    parser.add_argument("--output_dir", type=home_expanded, default=None, help="Default: the first folder.")
    parser.add_argument("--target", type=float, default=None, help="Score to time every run to, such as 0.9.")
    options = parser.parse_args(arguments)
    output_dir = options.output_dir or options.results_dir[0]
    check_target(options.target)
    check_output_dir(output_dir)
    summary = build_report(options.results_dir, output_dir, target=options.target)
    if len(options.results_dir) > 1:
        board = build_leaderboard(load_runs(options.results_dir), [str(folder) for folder in options.results_dir])
        text = render_leaderboard(board, summary["plan"]["checks"])
        (output_dir / LEADERBOARD_FILE).write_text(text, encoding="utf-8")
        print(text)
    print(f"Report: {output_dir / 'report.html'}")


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "train": (_command_train, "train one task"),
    "compare": (_command_compare, "compare schedulers on a task and build the report"),
    "tasks": (_command_tasks, "list the installed tasks"),
    "report": (_command_report, "build the report of stored runs, of several people too"),
    "evidence": (evidence_command, "run the plan of a report, and write what README says of it"),
    "publish": (publish_command, "publish the results of a comparison on the Hub"),
    "pull": (pull_command, "fetch published results from the Hub"),
    "meta-train": (_command_meta_train, "train the network on a population of small tasks"),
    "meta-evaluate": (_command_meta_evaluate, "judge a network on small tasks that it has not seen"),
}


def main() -> None:
    """`hf-alrs COMMAND ...`."""
    lines = "\n".join(f"  {name:12} {help_text}" for name, (_, help_text) in COMMANDS.items())
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(f"usage: hf-alrs COMMAND ...\n\n{lines}\n\n`hf-alrs COMMAND --help` lists the options of a command.")
        sys.exit(0 if len(sys.argv) > 1 else 2)
    if sys.argv[1] not in COMMANDS:
        print(f"error: unknown command {sys.argv[1]!r}; the commands are\n{lines}", file=sys.stderr)
        sys.exit(2)
    _guard(COMMANDS[sys.argv[1]][0], sys.argv[2:])


if __name__ == "__main__":
    main()
