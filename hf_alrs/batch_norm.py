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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers import TrainingArguments
from transformers.trainer_utils import has_length


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


@contextmanager
def unchanged_modes(model: torch.nn.Module) -> Iterator[None]:
    """Leaves every module in training or evaluation as it was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        # By its own method, as some layers take their weights into others in `eval()`, and out in `train()`
        model.train(modes[0][1])
        for module, mode in modes:
            module.training = mode


class BatchNormStatistics:
    """
    Takes batch-norm's running statistics anew, from a fixed part of the training data.

    The examples are spread evenly over the dataset and mixed, the same ones each time and in every process, so that a run that
    was resumed or is spread over processes has the same statistics. Layers that do not move theirs in training keep them, and so
    do those that a pass does not reach.

    Args:
        model (`torch.nn.Module`): Whose layers they are.
        dataloader (`DataLoader`): Of the training data; its dataset and its collator are used, and not its sampler.
        args (`TrainingArguments`): Passes are as large as those of training or of evaluations, whichever are larger.
        num_samples (`int`): Examples in all.
        forward (`Callable[[Any], Any]`, *optional*): Runs the model on a batch of the collator's; default: with its entries as
            keywords.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        dataloader: Any,
        args: TrainingArguments,
        num_samples: int,
        forward: Callable[[Any], Any] | None = None,
    ):
        self._model = model
        self._forward = forward or (lambda batch: model(**send_to_device(batch, args.device)))
        self._batches: DataLoader | None = None
        # Instance norm has running statistics too, which mean something else, and no count of its batches
        self._layers = [
            layer
            for layer in tracking_layers(model)
            if isinstance(layer, _BatchNorm) and layer.num_batches_tracked is not None
        ]
        self._moving: list[_BatchNorm] = []  # those of them that training moves
        dataset, collate = (getattr(dataloader, name, None) for name in ("dataset", "collate_fn"))
        indexed = hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset) and has_length(dataset)
        size = min(num_samples, len(dataset)) if indexed else 0
        if not self._layers or collate is None or size == 0:
            return
        batch_size = min(max(args.train_batch_size, args.eval_batch_size), size)
        # Whole batches alone: the variance of a rest of few examples says little, and that of a single one is not defined.
        size -= size % batch_size
        chosen = np.random.default_rng(0).permutation(size) * len(dataset) // size
        workers = {
            name: getattr(dataloader, name) for name in ("num_workers", "worker_init_fn", "multiprocessing_context")
        }
        self._batches = DataLoader(
            Subset(dataset, chosen.tolist()),
            batch_size=batch_size,
            collate_fn=collate,
            **(workers if workers["num_workers"] else {}),
        )

    def look(self) -> None:
        """Notes which layers move their statistics; to be called while the model is in training mode."""
        if self._model.training:
            self._moving = [layer for layer in self._layers if layer.training]

    @torch.no_grad()
    def refresh(self, roughly: bool = False) -> None:
        """
        Takes the statistics of the weights that are in the model; keeps those there are where the model cannot be run.

        Args:
            roughly (`bool`, *optional*, defaults to `False`): From a quarter of the examples.
        """
        self.look()
        if self._batches is None or not self._moving:
            return
        kept = [
            (layer, layer.momentum, {name: value.clone() for name, value in layer.named_buffers(recurse=False)})
            for layer in self._moving
        ]
        failed = True
        try:
            with unchanged_modes(self._model):
                self._model.eval()
                for layer in self._moving:
                    layer.train()
                    layer.reset_running_stats()
                    layer.momentum = None  # a plain mean over the batches
                # What was compiled for training would be compiled again for this
                with unchanged_random_numbers(), torch.compiler.set_stance("force_eager"):
                    number = len(self._batches)
                    for batch in islice(self._batches, max(1, number // 4) if roughly else number):
                        self._forward(batch)
            failed = False
        except Exception as error:  # whatever a model says to a batch that it is not called with in training
            logger.warning(
                "Batch-norm keeps averages of its running statistics: those of the averaged weights cannot be taken, as the "
                f"model does not take a batch of the collator's as it is ({type(error).__name__}: {error})."
            )
            self._batches = None
        finally:
            for layer, momentum, buffers in kept:
                reached = int(layer.num_batches_tracked) > 0
                layer.momentum = momentum
                for name, value in buffers.items():
                    if failed or not reached or name == "num_batches_tracked":
                        getattr(layer, name).copy_(value)
