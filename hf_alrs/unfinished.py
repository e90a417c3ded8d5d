"""
Runs under way: where they stand, and checkpoints from which an interrupted one goes on.

The files of a run lie in a folder of its own, which is deleted when the run is over: `progress.json`, and for a run that
takes long a checkpoint of Trainer's, with what the record of the run holds so far beside it.
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from .recording import RunRecorder


SECONDS_BETWEEN_CHECKPOINTS = 600.0
_STEPS_BETWEEN_LOOKS = 20
_SECONDS_BETWEEN_REPORTS = 1.0
_PROGRESS = "progress.json"


class CheckpointKeeper(TrainerCallback):
    """
    Asks for a checkpoint every ten minutes, and writes the recorder's state into it.

    Args:
        recorder (`RunRecorder`): Of the run.
        identity (`str`): What the run is; it goes on from checkpoints of the same identity alone.
    """

    def __init__(self, recorder: RunRecorder, identity: str):
        self._recorder, self._identity = recorder, identity
        self._start = self._last = time.monotonic()
        self.earlier_seconds = 0.0  # in the sittings before this one

    @property
    def seconds(self) -> float:
        """Since the run began, without the time between its sittings."""
        return self.earlier_seconds + time.monotonic() - self._start

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % _STEPS_BETWEEN_LOOKS or state.global_step >= state.max_steps:
            return
        due = [time.monotonic() - self._last >= SECONDS_BETWEEN_CHECKPOINTS]
        if args.world_size > 1:  # all processes save together, and their clocks differ
            broadcast_object_list(due)
        control.should_save |= due[0]

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kept = {"identity": self._identity, "seconds": self.seconds, "recorder": self._recorder.state_dict()}
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        _write(kept, folder / _record_name(args.process_index))
        self._last = time.monotonic()

    def resume(self, args: Any) -> str | None:
        """Takes over the newest checkpoint in the output folder that is complete and of this run; returns its path."""
        found = Path(args.output_dir).glob("checkpoint-*")
        for folder in sorted((f for f in found if _step(f) is not None), key=_step, reverse=True):
            records = [_read(folder / _record_name(index)) for index in range(args.world_size)]
            if all(record is not None and record.get("identity") == self._identity for record in records):
                own = records[args.process_index]
                self._recorder.load_state_dict(own["recorder"])
                self.earlier_seconds = own["seconds"]
                return str(folder)
        return None


class ProgressWriter:
    """
    Writes where a run stands into its folder, at most once a second.

    Args:
        folder (`Path`): Of the run.
    """

    def __init__(self, folder: Path):
        self._path, self._next = folder / _PROGRESS, 0.0

    def __call__(self, step: int, total: int, loss: float | None) -> None:
        if time.monotonic() >= self._next:
            _write([step, total, loss], self._path)
            self._next = time.monotonic() + _SECONDS_BETWEEN_REPORTS


def read_progress(folder: Path) -> tuple[int, int, float] | None:
    """Step, steps in all and loss of the run in `folder`, if it has told any."""
    progress = _read(folder / _PROGRESS)
    return None if progress is None else tuple(progress)


def _record_name(process_index: int) -> str:
    return f"record-{process_index}.json"


def _step(folder: Path) -> int | None:
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match[1]) if match else None


def _write(value: Any, path: Path) -> None:
    """So that the file is there whole or not at all."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value))
    temporary.replace(path)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
