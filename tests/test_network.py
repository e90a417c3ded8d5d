"""The network: its shape, its bounded output, and how its weights are found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import network_saying, scratch_network
from torch import nn

from hf_alrs import ALRSConfig, InputError, MetaLRNetwork
from hf_alrs.controller import ALRSController
from hf_alrs.features import FEATURE_NAMES, FEATURE_VERSION
from hf_alrs.network import WEIGHTS_DIR, load_network


def test_layers_of_the_default_network() -> None:
    network = MetaLRNetwork()
    kinds = [type(layer) for layer in network.layers]
    assert kinds == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    shapes = [tuple(p.shape) for p in network.parameters()]
    n = len(FEATURE_NAMES)
    assert shapes == [(64, n), (64,), (32, 64), (32,), (1, 32), (1,)]
    assert MetaLRNetwork((64, 64)).layers[2].weight.shape == (64, 64)


def test_forward_by_hand() -> None:
    network = MetaLRNetwork((2,))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network.layers[0].weight[0, 0], network.layers[0].weight[1, 1] = 2.0, 1.0
        network.layers[2].weight.copy_(torch.tensor([[3.0, 5.0]]))
        network.layers[2].bias.fill_(0.5)
    features = torch.zeros(2, 3, len(FEATURE_NAMES))
    features[0, 0, :2] = torch.tensor([1.0, -1.0])  # hidden (2, 0): 3 * 2 + 0.5
    output = network(features).detach()
    assert output.shape == (2, 3)
    assert output[0, 0] == pytest.approx(6.5)
    assert output[1, 2] == pytest.approx(0.5)


def test_the_correction_saturates_at_six() -> None:
    network = network_saying(0.0)
    features = torch.zeros(len(FEATURE_NAMES))
    for bias, expected in ((0.1, 0.1), (1e4, 6.0), (-1e4, -6.0)):
        with torch.no_grad():
            network.layers[-1].bias.fill_(bias)
        assert network.correction(features).item() == pytest.approx(expected, abs=1e-4)
    assert network_saying(2.5).correction(features).item() == pytest.approx(2.5, abs=1e-5)


def test_the_correction_of_one_vector_is_that_of_many() -> None:
    network = scratch_network(seed=1, hidden_sizes=(16, 8), scale=2.0)
    rows = np.random.default_rng(0).uniform(-4.0, 4.0, size=(20, len(FEATURE_NAMES)))
    expected = network.correction(torch.from_numpy(rows).float()).tolist()
    assert np.ptp(expected) > 0.1
    for row, together in zip(rows, expected, strict=True):
        assert network.correction_of(row) == pytest.approx(together, abs=1e-5)


def test_scratch_networks_depend_on_their_seed_alone() -> None:
    torch.manual_seed(1)
    first = load_network("scratch", (64, 32), 3)
    torch.manual_seed(2)
    second, other = load_network("scratch", (64, 32), 3), load_network("scratch", (64, 32), 4)
    for x, y in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(x, y)
    assert not torch.equal(first.layers[0].weight, other.layers[0].weight)


def test_a_saved_network_comes_back_without_pickle(tmp_path: Path) -> None:
    network = scratch_network(hidden_sizes=(8, 4))
    network.save_pretrained(str(tmp_path))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".md", ".safetensors"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["hidden_sizes"], config["feature_version"]) == ([8, 4], FEATURE_VERSION)
    assert tuple(config["feature_names"]) == FEATURE_NAMES
    loaded = load_network(str(tmp_path), (64, 32), 0)  # its own architecture, whatever is asked for
    for x, y in zip(network.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    "changed", [{"feature_version": FEATURE_VERSION + 1}, {"feature_names": list(FEATURE_NAMES[::-1])}]
)
def test_a_network_for_other_features_is_refused(tmp_path: Path, changed: dict[str, object]) -> None:
    scratch_network().save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changed))
    with pytest.raises(InputError, match="features"):
        load_network(str(tmp_path), (64, 32), 0)


@pytest.mark.parametrize("content", [None, "not json", "{}"])
def test_a_folder_without_a_network_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
        (tmp_path / "model.safetensors").write_bytes(b"\x00" * 16)
    with pytest.raises(InputError, match="network"):
        load_network(str(tmp_path), (64, 32), 0)


def test_a_truncated_network_is_refused(tmp_path: Path) -> None:
    scratch_network().save_pretrained(str(tmp_path))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="network"):
        load_network(str(tmp_path), (64, 32), 0)


def test_sizes_without_shipped_weights_are_refused() -> None:
    with pytest.raises(InputError, match="scratch"):
        load_network("default", (3, 5, 7), 0)


@pytest.mark.parametrize("hidden_sizes", [(64, 32), (64, 64)])
def test_shipped_networks_drive(hidden_sizes: tuple[int, ...]) -> None:
    folder = WEIGHTS_DIR / "-".join(map(str, hidden_sizes))
    if not folder.is_dir():
        pytest.skip(f"no weights are shipped in {folder} yet")
    controller = ALRSController(ALRSConfig(hidden_sizes=hidden_sizes), 100, 1e-3)
    assert controller.network.hidden_sizes == hidden_sizes
    assert controller.config.probes == 0
    assert controller.learning_rate(0) == pytest.approx(1e-3)


def test_loading_a_network_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    scratch_network().save_pretrained(str(tmp_path))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_network(str(tmp_path), (64, 32), 0)
    assert torch.equal(torch.rand(3), expected)


def test_another_default_dtype_does_not_matter() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        controller = ALRSController(ALRSConfig(network="scratch"), 100, 1e-3)
        assert isinstance(controller._ask(torch.zeros(len(FEATURE_NAMES)).double().numpy()), float)
    finally:
        torch.set_default_dtype(torch.float32)


def test_loading_a_network_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scratch_network().save_pretrained(str(tmp_path))
    capsys.readouterr()
    load_network(str(tmp_path), (64, 32), 0)
    assert capsys.readouterr().out == ""
