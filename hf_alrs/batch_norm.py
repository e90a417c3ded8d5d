"""
Batch-norm's statistics, taken anew for weights that no training step has seen, such as averaged ones.

Running statistics trail behind the weights, and where dropout comes before a batch-norm layer they are of inputs that vary
more than those of an evaluation ("variance shift", Li et al., 2019). So they are taken from training examples with the model
as it is in an evaluation, batch-norm alone excepted; `torch.optim.swa_utils.update_bn` takes all of the training data, and
leaves dropout on.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers import TrainingArguments


logger = logging.getLogger(__name__)


def tracking_layers(model: torch.nn.Module | None) -> list[_NormBase]:
    """The layers of a model that keep running statistics."""
    layers = (m for m in (model.modules() if model is not None else ()) if isinstance(m, _NormBase))
    return [m for m in layers if m.track_running_stats and m.running_mean is not None and m.running_var is not None]


@contextmanager
def unchanged_random_numbers() -> Iterator[None]:
    """Leaves the random numbers of Python, NumPy and torch (on the CPU) as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


class BatchNormStatistics:
    """
    Takes batch-norm's running statistics anew, from a fixed part of the training data.

    The examples are spread evenly over the dataset, the same ones each time and in every process, so that a run that was
    resumed or is spread over processes has the same statistics. Layers that a run keeps in evaluation mode are left alone, and
    so are all before the first training step.

    Args:
        model (`torch.nn.Module`): Called with each batch as keywords.
        dataloader (`DataLoader`): Of the training data; its dataset and its collator are used, and not its sampler.
        args (`TrainingArguments`): Passes are as large as those of training or of evaluations, whichever are larger.
        num_samples (`int`): Examples in all.
    """

    def __init__(self, model: torch.nn.Module, dataloader: DataLoader, args: TrainingArguments, num_samples: int):
        self._model = model
        self._trained: list[_NormBase] = []
        self._batches: DataLoader | None = None
        dataset = getattr(dataloader, "dataset", None)
        indexed = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        layers = tracking_layers(model)
        if not layers or num_samples == 0 or not indexed or isinstance(dataset, IterableDataset):
            return
        for layer in layers:
            self._await_training(layer)
        size = min(num_samples, len(dataset))
        chosen = [index * len(dataset) // size for index in range(size)]
        # The variance of a rest of few examples says little, and that of a single one is not defined.
        self._batches = DataLoader(
            Subset(dataset, chosen),
            batch_size=min(max(args.train_batch_size, args.eval_batch_size), size),
            collate_fn=dataloader.collate_fn,
            drop_last=True,
        )

    def _await_training(self, layer: _NormBase) -> None:
        """Notices the first batch that moves the layer's statistics."""

        def notice(module: torch.nn.Module, inputs: Any) -> None:
            if module.training and layer not in self._trained:
                self._trained.append(layer)
                hook.remove()

        hook = layer.register_forward_pre_hook(notice)

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes the statistics of the weights that are in the model; keeps those there are where the model cannot be run."""
        layers = self._trained
        if self._batches is None or not layers:
            return
        modes = [(module, module.training) for module in self._model.modules()]
        kept = [(layer.momentum, {k: v.clone() for k, v in layer.named_buffers(recurse=False)}) for layer in layers]
        device = layers[0].running_mean.device
        failed = True
        try:
            self._model.eval()
            for layer in layers:
                layer.train()
                layer.reset_running_stats()
                layer.momentum = None  # a plain mean over the batches
            with unchanged_random_numbers():
                for batch in self._batches:
                    self._model(**send_to_device(batch, device))
            failed = False
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            logger.warning(
                "Batch-norm's statistics are those of training: the model cannot be called with a batch of the training "
                f"data as Trainer calls it ({type(error).__name__}: {error})."
            )
            self._batches = None
        finally:
            for layer, (momentum, buffers) in zip(layers, kept, strict=True):
                layer.momentum = momentum
                for name, value in buffers.items():
                    if failed or name == "num_batches_tracked":
                        getattr(layer, name).copy_(value)
            for module, mode in modes:
                module.training = mode
