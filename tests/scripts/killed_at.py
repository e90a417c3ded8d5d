"""
Runs a training script that kills its own process, as a power cut would, when an optimizer step begins.

Usage: `python killed_at.py STEP script.py [arguments of the script]`
"""

import os
import runpy
import signal
import sys
from typing import Any

from transformers import TrainerCallback, TrainerState, trainer


STEP = int(sys.argv[1])


class Killer(TrainerCallback):
    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step == STEP:
            os.kill(os.getpid(), signal.SIGKILL)


trainer.DEFAULT_CALLBACKS.append(Killer)
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
