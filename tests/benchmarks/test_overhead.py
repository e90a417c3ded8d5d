"""
Added time per step as a ratio to the linear scheduler, side by side in one process.

Run with `pytest -m slow -s tests/benchmarks`; it prints what it measured, and pytest-benchmark's table has the time of a
step on each side. No assertion is on a time, and the one on the ratio is for models of 20 million parameters and more: a
step of a small one is hardly longer than a decision.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_alrs import get_scheduler


# hidden size, layers, vocabulary, steps measured: about 1, 23 (the shape of MiniLM-L6) and 110 million parameters
SIZES = {"1M": (64, 2, 10_000, 160), "23M": (384, 6, 30_522, 40), "110M": (768, 12, 30_522, 12)}
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
@pytest.mark.parametrize("size", list(SIZES))
def test_added_time_per_step(size: str, benchmark: Any) -> None:
    vocabulary, num_steps = SIZES[size][2:]
    # Decisions come every 1.25 % of a run: 225 steps, as in one epoch of 7,200 sentences, decide at every second one.
    sides = {name: Side(name, size, num_training_steps=225) for name in ("linear", "alrs")}
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
        f"\n{parameters / 1e6:.1f} M parameters, {linear / num_steps * 1e3:.1f} ms a step with linear: the controller's own "
        f"clock says {inside:.2%} more with alrs, the difference of the two sides {alrs / linear - 1:+.2%}"
    )
    if parameters > 20e6:
        assert inside < 0.02
