"""Workers and launched runs end with the process that they work for, however that ends."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil


SCRIPT = """
import os, subprocess, sys, time
from concurrent.futures import ProcessPoolExecutor
from hf_alrs.workers import end_with, end_with_parent

def sleep():
    os.write(1, f"{os.getpid()}\\n".encode())  # at once, as three processes share the pipe
    time.sleep(300)

if __name__ == "__main__":
    if len(sys.argv) > 1:
        end_with(int(sys.argv[1]))
        sleep()
    launched = subprocess.Popen([sys.executable, __file__, str(os.getpid())])
    with ProcessPoolExecutor(2, initializer=end_with_parent) as pool:
        futures = [pool.submit(sleep) for _ in range(2)]
        futures[0].result()
"""


def test_nothing_outlives_the_process_that_it_works_for(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    parent = subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        ids = [int(parent.stdout.readline()) for _ in range(3)]
        others = [psutil.Process(i) for i in ids]
        assert all(other.is_running() for other in others)
        parent.kill()
        parent.wait()
        _, left = psutil.wait_procs(others, timeout=60)
        assert not [other for other in left if other.status() != psutil.STATUS_ZOMBIE]
    finally:
        parent.kill()
        for other in psutil.process_iter(["cmdline"]):
            if str(path) in (other.info["cmdline"] or []):
                with suppress(psutil.NoSuchProcess):
                    other.kill()
