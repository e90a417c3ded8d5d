"""The network that sets the rate: features of the run in, ln(best peak rate / present peak rate) out."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from torch import nn

from .config import MAX_HIDDEN_SIZE, InputError
from .features import FEATURE_NAMES, FEATURE_VERSION
from .hub import fetch_text, hub_errors, prepare_repo


WEIGHTS_DIR = Path(__file__).parent / "weights"

# A correction by more than e^6 at once says no more than "far too low" or "far too high".
_OUTPUT_SCALE = 6.0


_CARD_NAME = "README.md"
_CARD = """---
{{ card_data }}
---

# A network that sets learning rates

It reads scale-free features of a training run and predicts ln(best peak rate / present peak rate). Use it in any
`Trainer` script with hf-alrs:

```python
from hf_alrs import ALRSCallback, ALRSConfig

callback = ALRSCallback(ALRSConfig(network="{{ network | default("the folder of this card", true) }}"))
```

`--network` of the run scripts takes the same name. {{ architecture }}

## Training

{{ training | default("Not described by the one who saved it.", true) }}

## Measured

{{ measured | default("Not measured by the one who saved it.", true) }}

## Limits

It was trained on small models and short runs; larger models and longer runs are extrapolation. The number of steps of a
run must be known in advance: a decay is part of the rate that it drives, and so is the averaging of weights. It fits the
version of the features in `config.json` alone.
"""


class MetaLRNetwork(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="hf-alrs",
    tags=["learning-rate", "meta-learning"],
    license="apache-2.0",
    model_card_template=_CARD,
):
    """
    Feed-forward network with ReLU and one linear output in log space.

    Args:
        hidden_sizes (`Sequence[int]`, *optional*, defaults to `(64, 32)`): Width of each hidden layer.
        num_features (`int`, *optional*): Length of the feature vector; the present version's by default.
        feature_version (`int`, *optional*): Version of the features that the weights were trained on.
        feature_names (`Sequence[str]`, *optional*): Their names, in order.

    Raises:
        `InputError`: If the weights were trained on other features than this package computes.
    """

    def __init__(
        self,
        hidden_sizes: Sequence[int] = (64, 32),
        num_features: int = len(FEATURE_NAMES),
        feature_version: int = FEATURE_VERSION,
        feature_names: Sequence[str] = FEATURE_NAMES,
    ):
        super().__init__()
        if feature_version != FEATURE_VERSION or tuple(feature_names) != FEATURE_NAMES:
            raise InputError(
                "feature_version",
                feature_version,
                f"this network was trained on version {feature_version} of the features, and this version of hf-alrs "
                f"computes version {FEATURE_VERSION}.",
                "Use a network of the same version, or install the hf-alrs release it was made with.",
            )
        if not all(0 < size <= MAX_HIDDEN_SIZE for size in hidden_sizes) or num_features != len(FEATURE_NAMES):
            raise InputError(
                "hidden_sizes",
                tuple(hidden_sizes),
                f"must be whole numbers from 1 to {MAX_HIDDEN_SIZE}, over {len(FEATURE_NAMES)} features.",
                "Correct the network's config.json, or take another network.",
            )
        self.hidden_sizes = tuple(hidden_sizes)
        sizes = [num_features, *self.hidden_sizes, 1]
        layers: list[nn.Module] = []
        for i, (size_in, size_out) in enumerate(itertools.pairwise(sizes)):
            layers.append(nn.Linear(size_in, size_out))
            if i < len(sizes) - 2:
                layers.append(nn.ReLU())
        self.layers = nn.Sequential(*layers)
        # What the card of the loaded network said, and of which weights
        self._described: dict[str, str] = {}
        self._described_weights = ""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> MetaLRNetwork:
        """
        Loads a network from a folder or from the Hub; `kwargs` are those of `PyTorchModelHubMixin.from_pretrained`.

        Raises:
            `InputError`: If the Hub refuses or cannot be reached, or the weights were trained on other features.
        """
        with hub_errors("network", str(pretrained_model_name_or_path), "network"):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **kwargs: Any) -> MetaLRNetwork:
        options = {name: kwargs.get(name) for name in ("revision", "cache_dir", "local_files_only", "token")}
        is_folder = Path(model_id).is_dir()
        if "feature_version" not in kwargs:  # what `config.json` should have given
            if not is_folder:
                fetch_text(model_id, "config.json", **options)  # the mixin does not say why it could not read it
            raise InputError(
                "network",
                model_id,
                "has no config.json that says which features it was trained on.",
                "Save it with `save_pretrained`, or take another network.",
            )
        kwargs["strict"] = True  # weights that are missing would stay random
        try:
            with contextlib.redirect_stdout(None):  # the mixin prints where it loads from
                network = super()._from_pretrained(model_id=model_id, **kwargs)
        except (RuntimeError, InputError) as error:
            if isinstance(error, InputError) and error.field == "feature_version":
                raise
            raise InputError(
                "network", model_id, f"its config.json or weights are wrong ({error}).", "Take another network."
            ) from error
        if not all(bool(p.isfinite().all()) for p in network.parameters()):
            raise InputError("network", model_id, "has weights that are not finite.", "Take another network.")
        if is_folder:
            card = Path(model_id) / _CARD_NAME
            text = card.read_text(encoding="utf-8") if card.is_file() else ""
        else:
            text = fetch_text(model_id, _CARD_NAME, missing="", **options)
        network._described = _card_sections(text)
        network._described_weights = network.fingerprint()
        return network

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """
        Publishes weights, config and card; the card says under which name others load them.

        Args:
            repo_id (`str`): `user/name`, or a name alone for the namespace of the one who is logged in.
            kwargs: Those of `PyTorchModelHubMixin.push_to_hub`; `model_card_kwargs` may hold `training` and `measured`.

        Returns:
            `str`: Address of the commit.

        Raises:
            `InputError`: If the Hub refuses or cannot be reached.
        """
        repo_id = prepare_repo("repo_id", repo_id, kwargs.get("private"), kwargs.get("token"))
        card = {"network": repo_id} | (kwargs.pop("model_card_kwargs", None) or {})
        with hub_errors("repo_id", repo_id):
            return super().push_to_hub(repo_id, model_card_kwargs=card, **kwargs)

    def generate_model_card(self, **kwargs: Any) -> ModelCard:
        """The card; a network that was loaded keeps what its card said, as long as its weights are the same."""
        count = sum(parameter.numel() for parameter in self.parameters())
        sizes = "-".join(map(str, (self.layers[0].in_features, *self.hidden_sizes, 1)))
        told = {"architecture": f"Layers: {sizes}, {count:,} weights; version {FEATURE_VERSION} of the features."}
        if self._described and self.fingerprint() == self._described_weights:
            told |= self._described
        elif self._described:
            told["training"] = (
                "Trained further by the one who saved it. It began as a network of which its card said: "
                + self._described.get("training", "nothing.")
            )
        return super().generate_model_card(**told | kwargs)

    def fingerprint(self) -> str:
        """SHA-256 over the weights."""
        digest = hashlib.sha256()
        for parameter in self.parameters():
            digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """
        Args:
            features (`torch.Tensor` of shape `[..., num_features]`): See `hf_alrs.features.feature_vector`.

        Returns:
            `torch.Tensor` of shape `[...]`: ln(best peak rate / present peak rate).
        """
        return self.layers(features)[..., 0]

    def correction(self, features: torch.Tensor) -> torch.Tensor:
        """`forward`, with values past +-6 saturating softly: 6 tanh(output / 6)."""
        return _OUTPUT_SCALE * torch.tanh(self(features) / _OUTPUT_SCALE)

    def correction_of(self, features: np.ndarray) -> float:
        """
        `correction` of one feature vector, for weights on the CPU.

        In numpy: over so few numbers torch takes ten times as long, which shows next to the step of a small model.
        """
        hidden = features.astype(np.float32)
        *inner, last = (layer for layer in self.layers if isinstance(layer, nn.Linear))
        for layer in inner:
            hidden = np.maximum(layer.weight.detach().numpy() @ hidden + layer.bias.detach().numpy(), 0.0)
        output = float((last.weight.detach().numpy() @ hidden + last.bias.detach().numpy())[0])
        return _OUTPUT_SCALE * math.tanh(output / _OUTPUT_SCALE)


def _card_sections(text: str) -> dict[str, str]:
    """What a card of ours says under the two headings that are not the same for every network."""
    sections = {}
    for heading in ("Training", "Measured"):
        found = re.search(rf"^## {heading}\n+(.+?)\s*(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
        if found and not found[1].startswith("Not "):
            sections[heading.lower()] = found[1]
    return sections


def load_network(name: str, hidden_sizes: Sequence[int], seed: int) -> MetaLRNetwork:
    """
    The network that `ALRSConfig.network` names.

    Args:
        name (`str`): `"default"` (shipped weights), `"scratch"` (random weights), a folder or a Hub id.
        hidden_sizes (`Sequence[int]`): Architecture, for `"default"` and `"scratch"`.
        seed (`int`): Seed of the random weights.

    Raises:
        `InputError`: If no weights are shipped for `hidden_sizes`, or the folder or Hub repository has no network.
    """
    if name == "scratch":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # not those of devices, which nothing puts back
            return MetaLRNetwork(hidden_sizes)
    if name == "default":
        folder = WEIGHTS_DIR / "-".join(str(size) for size in hidden_sizes)
        if not folder.is_dir():
            shipped = sorted(path.name for path in WEIGHTS_DIR.glob("*-*"))
            raise InputError(
                "hidden_sizes",
                tuple(hidden_sizes),
                f"weights are shipped for {', '.join(shipped)} alone.",
                "Take one of these, or set network='scratch', or train one with `hf-alrs meta-train`.",
            )
        return _from_pretrained(str(folder))
    remedy = "Give 'default', 'scratch', a folder with config.json and model.safetensors, or a Hub id: user/name."
    if not Path(name).is_dir() and (name.count("/") != 1 or name.startswith(("/", ".", "~"))):
        raise InputError("network", name, "is no folder here and no name on the Hub.", remedy)
    try:
        return _from_pretrained(name)
    except InputError:
        raise
    except Exception as error:  # files that are no network raise many types
        raise InputError(
            "network",
            name,
            f"no network could be loaded from there ({type(error).__name__}: {error}).",
            remedy,
        ) from error


def _from_pretrained(name: str) -> MetaLRNetwork:
    # The initial weights that loading overwrites must not be drawn from the generator that the run draws from.
    with torch.random.fork_rng(devices=[]):
        return MetaLRNetwork.from_pretrained(name)
