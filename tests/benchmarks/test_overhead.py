"""
Added time per step as a ratio to the linear scheduler, side by side in one process.

Run with `pytest -m slow -s tests/benchmarks`; it prints what it measured, and pytest-benchmark's table has the time of a
step on each side. No assertion is on a time, and the one on the ratio is for models of 20 million parameters and more: a
step of a small one is hardly longer than a decision.

The smallest is Titanic's network of 3,500 parameters, in whole runs of Trainer with one thread. There the outcome is the
ratio of processor times, which other jobs on the machine change least.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PrinterCallback,
    TrainingArguments,
    default_data_collator,
)

from hf_alrs import get_scheduler
from hf_alrs.experiment import PreparedTask, build_trainer
from tasks.metrics import ClassificationMetrics
from tasks.models import TabularNetConfig, TabularNetForClassification
from tasks.tabular import TabularDataset


# hidden size, layers, vocabulary, steps measured: about 1, 23 (the shape of MiniLM-L6) and 110 million parameters
SIZES = {"1M": (64, 2, 10_000, 160), "23M": (384, 6, 30_522, 48), "110M": (768, 12, 30_522, 24)}
WARMUP_STEPS = 2


class Side:
    """A model with its optimizer and scheduler; both sides get the same batches."""

    def __init__(self, name: str, size: str, num_training_steps: int):
        hidden, layers, vocabulary, _ = SIZES[size]
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=max(2, hidden // 64),
            intermediate_size=4 * hidden,
        )
        self.model = BertForSequenceClassification(config)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        self.scheduler = get_scheduler(name, self.optimizer, 0, num_training_steps)
        self.seconds: list[float] = []

    def step(self, tokens: torch.Tensor, labels: torch.Tensor) -> None:
        start = time.perf_counter()
        loss = self.model(input_ids=tokens, labels=labels).loss
        loss.backward()
        self.optimizer.step()
        if hasattr(self.scheduler, "observe"):
            self.scheduler.observe(loss=loss)
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - start)


@pytest.mark.slow
@pytest.mark.benchmark(group="step")
@pytest.mark.parametrize("length", [225, 1000])
@pytest.mark.parametrize("size", list(SIZES))
def test_added_time_per_step(size: str, length: int, benchmark: Any) -> None:
    vocabulary, num_steps = SIZES[size][2:]
    # Decisions come every 2 % of a run, updates of the average every 0.4 %: in 225 steps, as in one epoch of 7,200
    # sentences, at every fourth step and at every step, in 1,000 steps at every twentieth and at every fourth.
    sides = {name: Side(name, size, num_training_steps=length) for name in ("linear", "alrs")}
    generator = torch.Generator().manual_seed(0)
    rounds = iter(range(num_steps + WARMUP_STEPS))

    def batch() -> tuple[tuple[torch.Tensor, torch.Tensor], dict[str, Any]]:
        """The next batch; the linear side takes its step here, so that neither side's time has the other's in it."""
        i = next(rounds)
        tokens = torch.randint(vocabulary, (32, 24), generator=generator)
        labels = torch.randint(2, (32,), generator=generator)
        # Either side goes first in turn: what the other leaves in the caches is no advantage of one of them.
        if i % 2:
            sides["linear"].step(tokens, labels)
        return (tokens, labels), {}

    def step(tokens: torch.Tensor, labels: torch.Tensor) -> None:
        sides["alrs"].step(tokens, labels)

    def after(tokens: torch.Tensor, labels: torch.Tensor) -> None:
        if len(sides["linear"].seconds) < len(sides["alrs"].seconds):
            sides["linear"].step(tokens, labels)

    benchmark.pedantic(step, setup=batch, teardown=after, rounds=num_steps, warmup_rounds=WARMUP_STEPS)
    scheduler = sides["alrs"].scheduler
    linear, alrs = (sum(sides[name].seconds[WARMUP_STEPS:]) for name in ("linear", "alrs"))
    inside = scheduler.seconds / len(sides["alrs"].seconds) * num_steps / linear
    parameters = sum(p.numel() for p in sides["alrs"].model.parameters())
    benchmark.extra_info |= {
        "parameters": parameters,
        "linear_seconds_per_step": linear / num_steps,
        "added_by_the_controllers_clock": inside,
        "added_by_the_difference": alrs / linear - 1,
    }
    print(
        f"\n{parameters / 1e6:.1f} M parameters, a run of {length} steps, {linear / num_steps * 1e3:.1f} ms a step with linear: the controller's own "
        f"clock says {inside:.2%} more with alrs, the difference of the two sides {alrs / linear - 1:+.2%}"
    )
    if parameters > 20e6:
        assert inside < (0.01 if length >= 1000 else 0.03)


# As Titanic has them: rows of train and of the controller's split, columns after the transform, 50 epochs in batches of 32
TITANIC_ROWS, TITANIC_CONTROLLER_ROWS, TITANIC_COLUMNS, TITANIC_STEPS = 712, 71, 18, 1150
# name: scheduler, and whether the controller's split is there to be evaluated
TITANIC_SIDES = {"constant": ("constant", False), "alrs": ("alrs", False), "with evaluations": ("alrs", True)}
TITANIC_ROUNDS = 7


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def titanic_run(scheduler: str, with_controller: bool, folder: Path) -> tuple[float, float]:
    """Processor seconds of a whole run, and the controller's seconds over the others by its own clock."""
    generator = np.random.default_rng(0)
    table = generator.normal(size=(TITANIC_ROWS + TITANIC_CONTROLLER_ROWS, TITANIC_COLUMNS))
    labels = (table[:, 0] + generator.normal(size=len(table)) > 0).astype(int)
    train, controller = (
        TabularDataset(table[rows], labels[rows]) for rows in (slice(TITANIC_ROWS), slice(TITANIC_ROWS, None))
    )
    task = PreparedTask(
        train_dataset=train,
        controller_dataset=controller if with_controller else None,
        eval_dataset=controller,
        model_init=lambda: TabularNetForClassification(TabularNetConfig(num_features=TITANIC_COLUMNS)),
        data_collator=default_data_collator,
        compute_metrics=ClassificationMetrics(2),
    )
    args = TrainingArguments(
        str(folder),
        learning_rate=1e-3,
        per_device_train_batch_size=32,
        max_steps=TITANIC_STEPS,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    torch.manual_seed(0)
    trainer = build_trainer(task, task.model_init(), args, scheduler)
    trainer.remove_callback(PrinterCallback)
    start, processor_start = time.perf_counter(), time.process_time()
    trainer.train()
    seconds, processor_seconds = time.perf_counter() - start, time.process_time() - processor_start
    clock = getattr(trainer.lr_scheduler, "seconds", 0.0)
    return processor_seconds, clock / (seconds - clock)


@pytest.mark.slow
@pytest.mark.benchmark(group="run")
def test_added_time_of_the_smallest_model(tmp_path: Path, benchmark: Any, one_thread: None) -> None:
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in TITANIC_SIDES}

    def one_round() -> None:
        names = list(TITANIC_SIDES)
        first = len(runs["alrs"]) % len(names)  # each side goes first in turn
        for name in names[first:] + names[:first]:
            runs[name].append(titanic_run(*TITANIC_SIDES[name], tmp_path / name))

    benchmark.pedantic(one_round, rounds=TITANIC_ROUNDS, warmup_rounds=1)
    seconds = {name: [total for total, _ in values[1:]] for name, values in runs.items()}
    plain = statistics.median(seconds["constant"])
    added, evaluations = (
        statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True)) - 1
        for name, base in (("alrs", "constant"), ("with evaluations", "alrs"))
    )
    inside = statistics.median(share for _, share in runs["alrs"][1:])
    benchmark.extra_info |= {
        "constant_seconds_per_step": plain / TITANIC_STEPS,
        "added_by_the_controllers_clock": inside,
        "added_by_the_ratio_of_runs": added,
        "added_by_evaluations": evaluations,
    }
    print(
        f"\nTitanic's network, {plain / TITANIC_STEPS * 1e3:.2f} ms a step with constant: runs with alrs take {added:+.2%}, "
        f"of which the controller's own clock has {inside:.2%}; evaluations of its split add {evaluations:+.2%} to that"
    )
