"""The network that sets the rate: features of the run in, ln(best peak rate / present peak rate) out."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from .config import InputError
from .features import FEATURE_NAMES, FEATURE_VERSION


WEIGHTS_DIR = Path(__file__).parent / "weights"

# A correction by more than e^6 at once says no more than "far too low" or "far too high".
_OUTPUT_SCALE = 6.0


_CARD = """---
{{ card_data }}
---

# A network that sets learning rates

It reads scale-free features of a training run and predicts ln(best peak rate / present peak rate). Use it in any
`Trainer` script with hf-alrs:

```python
from hf_alrs import ALRSCallback, ALRSConfig

callback = ALRSCallback(ALRSConfig(network="this repository or folder"))
```

## Training

{{ training | default("Not described by the one who saved it.", true) }}

## Measured

{{ measured | default("Not measured by the one who saved it.", true) }}

## Limits

It was trained on small models and short runs; a linear decay to zero is part of the rate that it drives. It fits the
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
        self.hidden_sizes = tuple(hidden_sizes)
        sizes = [num_features, *self.hidden_sizes, 1]
        layers: list[nn.Module] = []
        for i, (size_in, size_out) in enumerate(itertools.pairwise(sizes)):
            layers.append(nn.Linear(size_in, size_out))
            if i < len(sizes) - 2:
                layers.append(nn.ReLU())
        self.layers = nn.Sequential(*layers)

    @classmethod
    def _from_pretrained(cls, **kwargs: Any) -> MetaLRNetwork:
        with contextlib.redirect_stdout(None):  # the mixin prints where it loads from
            return super()._from_pretrained(**kwargs)

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
            torch.manual_seed(seed)
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
    try:
        return _from_pretrained(name)
    except InputError:
        raise
    except Exception as error:  # the Hub client raises many types: all mean that there is no network to use
        raise InputError(
            "network",
            name,
            f"no network could be loaded from there ({type(error).__name__}: {error}).",
            "Give 'default', 'scratch', a folder with config.json and model.safetensors, or a Hub id.",
        ) from error


def _from_pretrained(name: str) -> MetaLRNetwork:
    # The initial weights that loading overwrites must not be drawn from the generator that the run draws from.
    with torch.random.fork_rng(devices=[]):
        return MetaLRNetwork.from_pretrained(name)
