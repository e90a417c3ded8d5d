"""The divergence guard: what it calls trouble, how the rate and the weights answer, and what the user is told."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import healthy_signals, network_saying, tiny_classifier
from test_callback import ROUTES, arguments, history_of, make_trainer, weights_of
from test_controller import LN10, K, Run, T, make_controller

from hf_alrs import ALRSConfig
from hf_alrs.controller import ALRSController
from hf_alrs.guard import BOUNDS, NON_FINITE, SPIKE, Guard, robust_z_score
from hf_alrs.scheduler import ALRSScheduler


Config = Callable[..., ALRSConfig]


# The judge


def test_robust_z_score_by_hand() -> None:
    # median 3, absolute deviations 2 1 0 1 2 with median 1: (9 - 3) / 1.4826
    assert robust_z_score(9.0, [1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(6 / 1.4826)
    assert robust_z_score(1e9, [1.0, 2.0, 3.0]) > 1e8
    assert robust_z_score(2.0, [2.0, 2.0]) == 0.0
    assert robust_z_score(1.0, [2.0, 2.0]) == -math.inf


def test_a_long_stretch_is_judged_by_its_end() -> None:
    guard = Guard()
    for level in [1.0] * 12 + [50.0] * 2:
        for _ in range(600):
            guard.observe(1.0)
        for _ in range(1400):
            guard.observe(level)
        verdict = guard.judge(True, 2.0)
    assert verdict == SPIKE


def judged(levels: list[float], initial_loss: float = 2.0) -> list[str | None]:
    guard = Guard()
    verdicts = []
    for level in levels:
        for loss in (level - 0.01, level, level + 0.01):
            guard.observe(loss)
        verdicts.append(guard.judge(True, initial_loss))
    return verdicts


QUIET = [1.0, 1.1, 0.9, 1.0, 0.95, 1.05, 1.0, 0.9, 1.1, 1.0]


def test_two_raised_levels_in_a_row_are_a_spike() -> None:
    assert judged([*QUIET, 5.0, 5.0, 5.0, 5.0])[len(QUIET) :] == [None, SPIKE, None, None]


@pytest.mark.parametrize(
    ("levels", "why"),
    [
        ([*QUIET, 5.0, 1.0, 5.0, 1.0], "one level alone passes by itself"),
        ([*QUIET, 1.3, 1.35, 1.4], "within the noise"),
        ([x / 100 for x in [*QUIET, 20.0, 20.0]], "high beside the noise, nothing beside the initial loss"),
        ([5.0, 0.1, 0.1, 5.0, 5.0], "too few levels to compare with"),
        ([1.0 - 0.05 * i for i in range(20)], "falling"),
    ],
)
def test_what_is_no_spike(levels: list[float], why: str) -> None:
    assert set(judged(levels)) == {None}, why


def test_what_is_not_finite_is_trouble_at_once() -> None:
    guard = Guard()
    guard.observe(math.nan)
    assert guard.judge(False, 2.0) == NON_FINITE


# The controller


@pytest.mark.reliability("loss spike: the rate goes down")
def test_a_spike_lowers_the_rate() -> None:
    def loss(step: int, controller: ALRSController) -> float:
        return 2.0 if step < 8 else (1.0 + 0.01 * (step % 3) if step < 50 else 6.0)

    run = Run(make_controller(network_saying(0.0)), loss).to(T)
    guards = {step: decision.guard for step, decision in run.decisions.items() if decision.guard}
    assert guards == {56: SPIKE}  # raised at 52 for the first time
    assert run.multipliers[-1] == pytest.approx(-math.log(3.0))


@pytest.mark.reliability("repeated trouble: plain decay of the last good rate")
def test_after_repeated_trouble_the_last_good_rate_decays() -> None:
    """Losses are not finite from step 50 on: -ln 10 at each decision until patience ends, and no more."""

    def loss(step: int, controller: ALRSController) -> float:
        return 1.0 if step < 50 else math.nan

    run = Run(make_controller(network_saying(0.4)), loss).to(T)
    good = run.decisions[48].log_multiplier
    assert run.decisions[52].log_multiplier == pytest.approx(good - LN10)
    assert run.decisions[56].log_multiplier == pytest.approx(good - 2 * LN10)
    assert {d.log_multiplier for s, d in run.decisions.items() if s >= 60} == {run.decisions[60].log_multiplier}
    assert run.phases[50:] == ["drive"] * 11 + ["fallback"] * 19
    held = run.rates[62:]
    decay = [math.log(a / b) for a, b in itertools.pairwise(held)]
    end = ALRSConfig().final_ratio(T)
    shares = [end + (1 - end) * (T - s) / T for s in range(62, T)]
    expected = [math.log(a / b) for a, b in itertools.pairwise(shares)]
    assert decay == pytest.approx(expected), "the rate decays linearly"


def test_the_plain_decay_never_rises_above_the_last_good_rate() -> None:
    bad = {50, 51, 60, 61, 70, 71}
    run = Run(make_controller(network_saying(2.0)), lambda step, controller: math.nan if step in bad else 1.0).to(T)
    last = list(run.decisions.values())[-1]
    assert last.phase == "fallback"
    assert last.correction is None, "the network is not asked any more"
    before = run.decisions[68].log_multiplier
    assert last.log_multiplier <= before


def test_without_a_good_rate_the_rate_goes_on_falling() -> None:
    run = Run(make_controller(learning_rate=1.0, max_lr=1e9), lambda step, controller: math.inf).to(T)
    assert run.controller.phase != "fallback"
    assert run.multipliers == pytest.approx([-LN10 * i for i in range(1, 20)])


def test_a_restart_is_no_trouble() -> None:
    run = Run(
        make_controller(max_restarts=1, restart_window=0.2), lambda step, controller: math.nan if step < 3 else 1.0
    ).to(T)
    assert run.actions == {4: "restart"}
    assert run.controller._guard.troubles == 0


def test_bounds_are_told() -> None:
    run = Run(make_controller(network_saying(5.0), max_lr=0.02)).to(12)
    assert [d.guard for d in run.decisions.values()] == [None, BOUNDS]
    assert make_controller(learning_rate=1e3).log_multiplier == pytest.approx(math.log(10.0 / 1e3))


def test_a_rollback_brings_the_statistics_back() -> None:
    def loss(step: int, controller: ALRSController) -> float:
        return math.nan if step == 50 else 1.0

    run = Run(make_controller(rollback=True), loss).to(T)
    assert run.actions == {52: "rollback"}
    assert run.controller.state.loss_slow == pytest.approx(1.0), "no trace of the loss that was not finite"
    assert Run(make_controller(rollback=False), loss).to(T).actions == {}


@pytest.mark.parametrize("at", [48, 52, 56, 57, 70])
@pytest.mark.reliability("guard's state in checkpoints: resumed = uninterrupted")
def test_a_checkpoint_keeps_the_guard(at: int) -> None:
    def loss(step: int, controller: ALRSController) -> float:
        return math.nan if step in (50, 54, 60) else 1.0 + 0.1 * (step % 3)

    whole = Run(make_controller(network_saying(0.3), rollback=True), loss).to(T)
    first = Run(make_controller(network_saying(0.3), rollback=True), loss).to(at)
    second = Run(make_controller(network_saying(0.3), rollback=True), loss)
    second.controller.load_state_dict(first.controller.state_dict())
    second.rates, second.phases = list(first.rates), list(first.phases)
    second.to(T)
    assert second.rates == whole.rates
    assert second.phases == whole.phases


# Weights and messages


def drive(scheduler: ALRSScheduler, optimizer: torch.optim.Optimizer, weight: torch.Tensor, bad: set[int]) -> None:
    for step in range(40):
        loss = (weight**2).sum()
        (loss * (math.nan if step in bad else 1.0)).backward()
        scheduler.observe(loss=math.nan if step in bad else loss.detach())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.reliability("rollback: weights and optimizer state back to the last good ones")
def test_a_rollback_brings_weights_and_optimizer_state_back(
    optimizer_class: type[torch.optim.Optimizer],
    network_folder: Callable[..., str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = ALRSConfig(
        network=network_folder(network_saying(0.0)), decision_interval=4, max_restarts=0, rollback=True
    )
    weight = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = optimizer_class([weight], lr=0.01)
    scheduler = ALRSScheduler(optimizer, 40, config=config)
    with caplog.at_level(logging.WARNING, logger="hf_alrs.scheduler"):
        drive(scheduler, optimizer, weight, bad={21})
    assert torch.isfinite(weight).all()
    assert weight.abs().max() < 3.0
    assert all(torch.isfinite(v).all() for v in optimizer.state[weight].values() if isinstance(v, torch.Tensor))
    assert [e["guard"] for e in scheduler.history if e.get("guard")] == [NON_FINITE]
    assert [e["step"] for e in scheduler.history if e.get("action") == "rollback"] == [25]
    assert len(caplog.records) == 1
    assert "last good" in caplog.text


def test_the_copy_lies_on_the_cpu_and_only_where_it_is_asked_for(network_folder: Callable[..., str]) -> None:
    folder = network_folder(network_saying(0.0))
    for rollback in (False, True):
        weight = torch.nn.Parameter(torch.ones(2))
        optimizer = torch.optim.Adam([weight], lr=0.01)
        config = ALRSConfig(network=folder, decision_interval=4, rollback=rollback)
        scheduler = ALRSScheduler(optimizer, 40, config=config)
        drive(scheduler, optimizer, weight, bad=set())
        assert (scheduler._good is not None) == rollback
    assert all(t.device.type == "cpu" for t in scheduler._good["tensors"])


@pytest.mark.reliability("trouble: the user is told once")
def test_the_user_is_told_once(network_folder: Callable[..., str], caplog: pytest.LogCaptureFixture) -> None:
    config = ALRSConfig(network=network_folder(network_saying(0.0)), decision_interval=4, max_restarts=0)
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.01)
    scheduler = ALRSScheduler(optimizer, 40, config=config)
    with caplog.at_level(logging.WARNING, logger="hf_alrs.scheduler"):
        drive(scheduler, optimizer, weight, bad={13})  # the weights are lost: every decision from here on is trouble
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2, messages
    assert "rollback=True" in messages[0]
    assert "decays linearly" in messages[1]
    assert sum(e.get("guard") == NON_FINITE for e in scheduler.history) > 3
    assert scheduler.history[-1]["phase"] == "fallback"


class PoisonedAt(torch.nn.Module):
    """A classifier whose loss is not finite at one forward pass."""

    def __init__(self, model: torch.nn.Module, call: int):
        super().__init__()
        self.model, self.call, self.calls, self.config = model, call, 0, model.config

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        outputs = self.model(x, labels)
        self.calls += 1
        if self.calls == self.call:
            outputs["loss"] = outputs["loss"] * math.nan
        return outputs


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.reliability("NaN batch in a Trainer: survived with rollback")
def test_a_trainer_survives_a_bad_batch_with_rollback(route: str, tmp_path: Path, moving_config: Config) -> None:
    finite = {}
    for rollback in (True, False):
        model = PoisonedAt(tiny_classifier(batch_norm=True), call=14)
        trainer = make_trainer(route, arguments(tmp_path / str(rollback)), moving_config(rollback=rollback), model)
        trainer.train()
        finite[rollback] = all(bool(torch.isfinite(w).all()) for w in weights_of(model))
    assert finite == {True: True, False: False}
    history = history_of(tmp_path / "True")
    assert [e["action"] for e in history if e.get("guard") == NON_FINITE] == ["rollback"]
    assert math.isfinite(history[-1]["loss"])


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("save_steps", [12, 15, 17])
@pytest.mark.reliability("rollback after a resume: bit-identical to the uninterrupted run")
def test_a_rollback_after_a_resume_is_that_of_the_whole_run(
    route: str, save_steps: int, tmp_path: Path, moving_config: Config
) -> None:
    """The bad batch is the 14th; saved before it, after it and after the rollback at the 16th."""
    results: list[Any] = []
    for resumed in (False, True):
        folder = tmp_path / ("resumed" if resumed else "whole")
        for part in range(1 + resumed):
            done = save_steps if part else 0
            model = PoisonedAt(tiny_classifier(dropout=0.1), call=14 - done)
            args = arguments(folder, save_strategy="steps", save_steps=save_steps, max_steps=24)
            trainer = make_trainer(route, args, moving_config(rollback=True), model)
            trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{save_steps}") if part else None)
        results.append((weights_of(model), [e["learning_rate"] for e in history_of(folder)]))
    assert results[0][1] == results[1][1]
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))


def test_signals_that_are_not_finite_are_trouble() -> None:
    run = Run(
        make_controller(),
        signals=lambda step: healthy_signals(gg=math.nan) if step == 5 * K else healthy_signals(),
    ).to(T)
    assert run.decisions[5 * K].guard == NON_FINITE
