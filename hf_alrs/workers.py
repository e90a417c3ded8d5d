"""Processes that end with the one they work for, as they would go on unseen, beside the runs of the next command."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from contextlib import suppress


_SECONDS_BETWEEN_SIGNS_OF_LIFE = 2.0


def end_with_parent() -> None:
    """Ends this worker when its parent is killed, and without a traceback when both are interrupted from the keyboard."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(1))

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def end_with(process_id: int) -> None:
    """Ends this process when that of another program on this machine is over, which is not its parent."""

    def watch() -> None:
        with suppress(ProcessLookupError):
            while True:
                os.kill(process_id, 0)
                time.sleep(_SECONDS_BETWEEN_SIGNS_OF_LIFE)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
