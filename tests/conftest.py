"""What several test files share: exact arithmetic on one thread, networks with a known output, small models."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import hub  # noqa: F401 a fixture
from torch import nn
from transformers import PreTrainedConfig

from hf_alrs import ALRSConfig, MetaLRNetwork
from hf_alrs.features import SIGNALS


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


# The table of fault and equivalence cases: `pytest -m reliability` ends with it.

_ROWS = pytest.StashKey[dict[str, list[str]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = {}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Notes the outcome of each test that is marked `reliability("what it shows")`."""
    outcome = yield
    report = outcome.get_result()
    marker = item.get_closest_marker("reliability")
    if marker is None or not (report.when == "call" or report.outcome != "passed"):
        return
    case = marker.args[0] if marker.args else item.originalname.removeprefix("test_").replace("_", " ")
    said = report.outcome
    if hasattr(report, "wasxfail"):
        said = "known failure" if report.skipped else "unexpectedly passed"
    item.config.stash[_ROWS].setdefault(case, []).append(said)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Prints `case | outcome` for the marked tests, where they were asked for by their mark."""
    rows = config.stash[_ROWS]
    if not rows or "reliability" not in (config.getoption("-m") or ""):
        return
    width = max(map(len, rows))
    terminalreporter.section("reliability")
    terminalreporter.write_line(f"{'case':{width}} | outcome")
    terminalreporter.write_line(f"{'-' * width}-|--------")
    for case, outcomes in rows.items():
        counts = [f"{outcomes.count(kind)} {kind}" for kind in dict.fromkeys(outcomes)]
        terminalreporter.write_line(f"{case:{width}} | {', '.join(counts)}")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums over several threads differ in the last bit, and bit-exactness is what many tests are about."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network_saying(correction: float) -> MetaLRNetwork:
    """A network whose correction is `correction`, whatever the features are."""
    network = MetaLRNetwork((4,))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        # The correction is 6 tanh(output / 6), and the output is the last bias.
        network.layers[-1].bias.fill_(6.0 * math.atanh(correction / 6.0))
    return network


def scratch_network(seed: int = 0, hidden_sizes: tuple[int, ...] = (8,), scale: float = 1.0) -> MetaLRNetwork:
    """A random network; `scale` makes its corrections larger, so that rates really move."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = MetaLRNetwork(hidden_sizes)
    with torch.no_grad():
        network.layers[-1].weight.mul_(scale)
    return network


def healthy_signals(**changed: float) -> dict[str, float]:
    """Signals of an uneventful run, apart from what is given."""
    signals = dict.fromkeys(SIGNALS, 0.0)
    signals |= {"gg": 1.0, "gh": 0.5, "hh": 1.0, "gu": -0.001, "hu": -0.002, "uu": 1e-4, "ww": 4.0, "gx": -0.01}
    signals |= {"xx": 0.04, "initial": 4.0, "dd": 1e-3, "de": 5e-4, "ee": 1e-3, "matrix_update_ratio": -5.0}
    signals |= {"matrix_width": 1.0, "matrix_count": 0.7, "zero_gradient": 0.1, "size": 2.0}
    return signals | changed


class TinyClassifier(nn.Module):
    """
    What a Trainer needs and no more: a dictionary with `loss` and `logits` comes out.

    Args:
        dropout (`float`): Makes the run depend on the state of the random number generator.
        batch_norm (`bool`): Adds buffers.
    """

    def __init__(self, dropout: float = 0.0, batch_norm: bool = False, num_inputs: int = 6, num_classes: int = 3):
        super().__init__()
        self.config = PreTrainedConfig()  # Trainer asks for it where labels are smoothed
        self.first = nn.Linear(num_inputs, 12)
        self.norm = nn.BatchNorm1d(12) if batch_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(12, num_classes)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.last(self.dropout(torch.relu(self.norm(self.first(x)))))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def tiny_classifier(seed: int = 0, **kwargs: Any) -> TinyClassifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TinyClassifier(**kwargs)


class LanguageModelLoss(TinyClassifier):
    """Normalises by the examples of the whole step when Trainer says how many, as language models do."""

    accepts_loss_kwargs = True

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any) -> dict[str, torch.Tensor]:
        output = super().forward(x, labels)
        count = kwargs.get("num_items_in_batch")
        if count is not None and labels is not None:
            output["loss"] = output["loss"] * len(labels) / count
        return output


class AnyKeyword(TinyClassifier):
    """A loss that is the mean over a batch, whatever keywords come with it: as of many classifiers of transformers."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any) -> dict[str, torch.Tensor]:
        return super().forward(x, labels)


def tiny_dataset(size: int = 64, seed: int = 1, num_inputs: int = 6, num_classes: int = 3) -> list[dict[str, Any]]:
    """Examples whose label a linear model can nearly learn."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, num_inputs, generator=generator)
    teacher = torch.randn(num_inputs, num_classes, generator=torch.Generator().manual_seed(7))
    labels = (x @ teacher + 0.5 * torch.randn(size, num_classes, generator=generator)).argmax(-1)
    return [{"x": row, "labels": label} for row, label in zip(x, labels, strict=True)]


@pytest.fixture
def network_folder(tmp_path: Path) -> Callable[..., str]:
    """Saves a network and returns the folder, to be given as `ALRSConfig.network`."""

    def save(network: MetaLRNetwork, name: str = "network") -> str:
        network.save_pretrained(str(tmp_path / name))
        return str(tmp_path / name)

    return save


def quiet_settings(interval: int) -> dict[str, Any]:
    """Decisions every `interval` steps, the first jump at the second of them, no training of the network, no restarts."""
    return {
        "phase1_steps": 2 * interval,
        "full_decisions": 0,
        "decision_interval": interval,
        "num_probes": 0,
        "meta_num_epochs": 0,
        "feedback_interval": 0,
        "max_restarts": 0,
    }


@pytest.fixture
def moving_config(network_folder: Callable[..., str]) -> Callable[..., ALRSConfig]:
    """A configuration whose network has random weights and a say: rates rise and fall within a few decisions."""

    def make(**changed: Any) -> ALRSConfig:
        defaults: dict[str, Any] = {
            "network": network_folder(scratch_network(scale=2.0)),
            "num_probes": 0,
            "phase1_steps": 6,
            "decision_interval": 3,
            "meta_num_epochs": 3,
            "feedback_interval": 2,
            "max_first_rise": 1.0,
            "max_first_fall": 0.8,
            "max_restarts": 0,
        }
        return ALRSConfig(**(defaults | changed))

    return make
