"""ALRS must not end worse than leaving the learning rate alone, on any built-in task, from any sensible rate."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest


SEEDS = ["0", "1", "2", "3", "4"]
# The default of the recipes, and half a decade to each side
RATES = ["3.16e-4", "1e-3", "3.16e-3"]


@pytest.mark.slow
@pytest.mark.reliability("do no harm: final loss at most one sd above a constant rate's, 5 seeds, 3 rates")
@pytest.mark.parametrize("task", ["sst2", "cifar10", "titanic"])
def test_alrs_ends_no_worse_than_a_constant_rate(task: str, tmp_path: Path) -> None:
    """
    Final loss on the reported split, mean over seeds: at most one standard deviation (over seeds, pooled over the two
    schedulers) above that of the constant rate.
    """
    command = [sys.executable, "-m", "hf_alrs.cli", "compare", "--task", task, "--dataset_name", "sample"]
    command += ["--schedulers", "alrs", "constant", "--seeds", *SEEDS, "--learning_rates", *RATES]
    command += ["--num_evaluations", "1", "--output_dir", str(tmp_path)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (summary,) = json.loads((tmp_path / "results.json").read_text())["tasks"].values()
    final = {(c["scheduler"], c["learning_rate"]): c["final"]["eval_loss"] for c in summary["cells"]}
    worse = []
    for rate in map(float, RATES):
        ours, constant = final["alrs", rate], final["constant", rate]
        deviation = math.sqrt((ours["sd"] ** 2 + constant["sd"] ** 2) / 2)
        line = f"{task} {rate:g}: alrs {ours['mean']:.4f}, constant {constant['mean']:.4f}, sd {deviation:.4f}"
        print(line)
        if ours["mean"] > constant["mean"] + deviation:
            worse.append(line)
    assert not worse, worse
