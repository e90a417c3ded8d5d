#!/usr/bin/env python
"""
Publishes the results and the network of a small comparison, deletes everything local, and trains again from the network
by its name.

    python tests/scripts/publish_and_train_again.py [FOLDER]

The Hub is a stand-in on loopback, so that no account is needed and nothing leaves the machine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from hub_server import TOKEN, HubServer  # noqa: E402 the repository has to be on the path first


REPO = "alice/digits"


def say(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def main(folder: Path) -> None:
    with HubServer() as hub:
        # Before the clients are imported, here and in the run script
        os.environ.update(hub.environment(folder / "hf-home") | {"HF_TOKEN": TOKEN})
        from hf_alrs import cli
        from tasks import TASKS

        local = folder / "demo-comparison"
        sample = ["--dataset_name", "sample", "--max_train_samples", "400"]
        quick = ["--eval_strategy", "no", "--save_strategy", "no"]
        say("1. A comparison on the built-in digits")
        matrix = [
            "--schedulers",
            "alrs",
            "linear",
            "--seeds",
            "0",
            "--num_evaluations",
            "2",
            "--num_train_epochs",
            "3",
        ]
        cli.compare([*sample, *matrix, *quick, "--output_dir", str(local)], TASKS, "cifar10")
        stored = {path.name: path.read_bytes() for path in local.glob("*.json")}

        say(f"2. Published as {REPO}: results, report and network")
        sys.argv = ["hf-alrs", "publish", str(local), "--repo", REPO, "--space", "--network", "default"]
        cli.main()
        for (kind, name), repo in hub.repos.items():
            print(f"{kind} {name}: {', '.join(sorted(repo.files)[:6])}, {len(repo.files)} files")

        say("3. Everything local is deleted, the cache of the clients too")
        shutil.rmtree(local)
        shutil.rmtree(folder / "hf-home", ignore_errors=True)
        assert not local.exists()

        say(f"4. A run by the published network: --network {REPO}-network")
        before = len(hub.requests)
        output = folder / "again"
        command = [sys.executable, "run_vision_alrs.py", *sample, *quick, "--num_train_epochs", "5"]
        command += ["--network", f"{REPO}-network", "--output_dir", str(output)]
        subprocess.run(command, cwd=ROOT, check=True)
        weights = ("GET", f"/{REPO}-network/resolve/main/model.safetensors")
        fetched = [request for request in hub.requests[before:] if request[1].endswith("model.safetensors")]
        assert fetched, f"{weights} was never asked for"
        assert (output / "alrs_history.jsonl").is_file() and (output / "model.safetensors").is_file()

        say("5. The results come back as they were")
        sys.argv = ["hf-alrs", "pull", REPO, "--output_dir", str(local)]
        cli.main()
        assert {path.name: path.read_bytes() for path in local.glob("*.json")} == stored
        print(f"\ntrained again from {REPO}-network; {len(stored)} files came back byte for byte")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch))
