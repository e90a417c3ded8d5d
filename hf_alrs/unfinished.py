"""
Runs under way: where they stand, and checkpoints from which an interrupted one goes on.

The files of a run lie in a folder of its own, which is deleted when the run is over: `progress.json`, and for a run that
takes long a checkpoint of Trainer's, with what the record of the run holds so far beside it.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from .config import InputError
from .recording import RunRecorder


SECONDS_BETWEEN_CHECKPOINTS = 600.0
_STEPS_BETWEEN_LOOKS = 20
_SECONDS_BETWEEN_REPORTS = 1.0
_PROGRESS, _LOCK = "progress.json", "lock"

logger = logging.getLogger(__name__)


class CheckpointKeeper(TrainerCallback):
    """
    Asks for a checkpoint every ten minutes, and writes the recorder's state into it.

    Between epochs if those are short: in the middle of one, Trainer fetches the first batch before it restores the random
    numbers, which random augmentation draws from. Never at an epoch's last step, whose evaluation is still to come.

    Args:
        recorder (`RunRecorder`): Of the run.
        identity (`str`): What the run is; it goes on from checkpoints of the same identity alone.
    """

    def __init__(self, recorder: RunRecorder, identity: str):
        self._recorder, self._identity = recorder, identity
        self._start = self._last = self._epoch_start = time.monotonic()
        self.earlier_seconds = 0.0  # in the sittings before this one
        self.checkpoint: Path | None = None  # that the run went on from

    @property
    def seconds(self) -> float:
        """Since the run began, without the time between its sittings."""
        return self.earlier_seconds + time.monotonic() - self._start

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._epoch_start = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        last = state.global_step >= state.max_steps or float(state.epoch).is_integer()
        if state.global_step % _STEPS_BETWEEN_LOOKS == 0 and not last:
            due = time.monotonic() - max(self._last, self._epoch_start) >= SECONDS_BETWEEN_CHECKPOINTS
            control.should_save |= _agreed(due, args)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < state.max_steps:
            due = time.monotonic() - self._last >= SECONDS_BETWEEN_CHECKPOINTS
            control.should_save |= _agreed(due, args)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._last = time.monotonic()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        kept = {"identity": self._identity, "seconds": self.seconds, "recorder": self._recorder.state_dict()}
        with suppress(OSError):  # of a full disk, for one; then the checkpoint does not count
            write_whole(json.dumps(kept), folder / _record_name(args.process_index))

    def resume(self, args: Any) -> str | None:
        """Takes over the newest checkpoint in the output folder that is complete and of this run; returns its path."""
        found = Path(args.output_dir).glob("checkpoint-*")
        folders = sorted((f for f in found if _step(f) is not None), key=_step, reverse=True)
        chosen = next((str(f) for f in folders if self._is_complete(f, args.world_size)), None)
        chosen = _agreed(chosen, args)
        if chosen is None:
            if folders and args.process_index == 0:
                logger.warning(
                    f"{folders[0]} is of another version or configuration, or incomplete: the run starts anew."
                )
            return None
        self.checkpoint = Path(chosen)
        own = _read(self.checkpoint / _record_name(args.process_index))
        self._recorder.load_state_dict(own["recorder"])
        self.earlier_seconds = own["seconds"]
        return chosen

    def _is_complete(self, folder: Path, num_processes: int) -> bool:
        records = (_read(folder / _record_name(index)) for index in range(num_processes))
        return all(record is not None and record.get("identity") == self._identity for record in records)

    def give_up(self, state: Any) -> None:
        """After an error: if not a step was made, the checkpoint may be damaged, and the next try takes the one before."""
        if self.checkpoint is not None and state.global_step <= _step(self.checkpoint):
            for record in self.checkpoint.glob(_record_name("*")):
                record.unlink(missing_ok=True)


def _agreed(value: Any, args: Any) -> Any:
    """The first process's value, as the processes act together and their clocks and file systems differ."""
    if args.world_size == 1:
        return value
    return broadcast_object_list([value])[0]


@contextmanager
def claimed(folder: Path) -> Iterator[Path]:
    """A run's folder, made and taken; a temporary one where another process is at work on the same run."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / _LOCK, os.O_CREAT | os.O_WRONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        with tempfile.TemporaryDirectory(prefix="hf-alrs-") as scratch:
            yield Path(scratch)
    else:
        yield folder
    finally:
        os.close(lock)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """
    A run's folder, made and taken until the run is over.

    Raises:
        `InputError`: If another run is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)  # the folder itself, so that no file is left there
    try:
        with suppress(OSError):  # of file systems without locks
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                rule = "another run is at work there."
                raise InputError("output_dir", str(folder), rule, "Wait for its end, or give another one.") from error
        yield
    finally:
        os.close(lock)


class ProgressWriter:
    """
    Writes where a run stands into its folder, at most once a second.

    Args:
        folder (`Path`): Of the run.
    """

    def __init__(self, folder: Path):
        self._path, self._next = folder / _PROGRESS, 0.0
        self._path.unlink(missing_ok=True)  # of an earlier sitting

    def __call__(self, step: int, total: int, loss: float | None) -> None:
        if time.monotonic() >= self._next:
            with suppress(OSError):  # no reason to end a run
                write_whole(json.dumps([step, total, loss]), self._path)
            self._next = time.monotonic() + _SECONDS_BETWEEN_REPORTS


def read_progress(folder: Path) -> tuple[int, int, float] | None:
    """Step, steps in all and loss of the run in `folder`, if it has told any."""
    progress = _read(folder / _PROGRESS)
    return None if progress is None else tuple(progress)


def _record_name(process_index: int | str) -> str:
    return f"record-{process_index}.json"


def _step(folder: Path) -> int | None:
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match[1]) if match else None


def write_whole(text: str, path: Path) -> None:
    """Writes a file so that it is there whole or not at all, also when the process is killed."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    with open(temporary, "x") as file:
        file.write(text)
    temporary.replace(path)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
