"""Faults put into real Trainer runs: the run ends, the history says what happened, and the model is none the worse."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyClassifier, network_saying, scratch_network, tiny_classifier, tiny_dataset
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

from hf_alrs import ALRSCallback, ALRSConfig, ALRSScheduler, ALRSTrainer, InputError
from hf_alrs.callback import HISTORY_NAME


NUM_STEPS = 60
# Decisions come after steps 4, 7, 10, ...: phase 1 ends at the second one.
PHASES = {"gather": range(1, 7), "fit": range(7, 10), "drive": range(10, 50)}
ROUTES = ["callback", "trainer"]
routes = pytest.mark.parametrize("route", ROUTES)


@pytest.fixture
def config(network_folder: Callable[..., str]) -> Callable[..., ALRSConfig]:
    """A network that leaves the rate alone, so that every change is the guard's."""

    def make(**changed: Any) -> ALRSConfig:
        defaults: dict[str, Any] = {
            "network": network_folder(network_saying(0.0)),
            "phase1_steps": 6,
            "decision_interval": 3,
            "meta_num_epochs": 0,
            "feedback_interval": 0,
        }
        return ALRSConfig(**(defaults | changed))

    return make


def arguments(folder: Path, **changed: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.01,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return TrainingArguments(**(defaults | changed))


def make_trainer(route: str, args: TrainingArguments, config: ALRSConfig, **changed: Any) -> Trainer:
    common: dict[str, Any] = {"model": tiny_classifier(), "train_dataset": tiny_dataset()} | changed
    if route == "callback":
        return Trainer(args=args, callbacks=[ALRSCallback(config)], **common)
    return ALRSTrainer(args=args, alrs_config=config, **common)


def decayed(progress: Any) -> Any:
    """The share of the peak rate at a progress: a line from 1 to 0.3."""
    return 0.3 + 0.7 * (1 - progress)


def collated(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


class Faulty:
    """A collator that spoils the batches of some steps (1 for the first)."""

    def __init__(self, spoil: Callable[[int, dict[str, torch.Tensor]], None]):
        self.spoil, self.step = spoil, 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        self.step += 1
        batch = collated(rows)
        self.spoil(self.step, batch)
        return batch


def nan_at(*steps: int, value: float = math.nan) -> Faulty:
    def spoil(step: int, batch: dict[str, torch.Tensor]) -> None:
        if step in steps:
            batch["x"][0, 0] = value

    return Faulty(spoil)


def history_of(folder: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / HISTORY_NAME).read_text().splitlines()]


def decisions_of(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for entry in history if "features" in entry]


def is_finite(model: torch.nn.Module) -> bool:
    return all(bool(p.isfinite().all()) for p in model.parameters())


@torch.no_grad()
def loss_of(model: torch.nn.Module, data: list[dict[str, Any]] | None = None) -> float:
    was, batch = model.training, collated(data or tiny_dataset())
    loss = model.eval()(**batch)["loss"].item()
    model.train(was)
    return loss


def check_run(folder: Path, num_steps: int = NUM_STEPS) -> list[dict[str, Any]]:
    """What holds for every run, whatever happened in it: all steps, finite rates above zero, finite features."""
    history = history_of(folder)
    assert [entry["step"] for entry in history] == list(range(1, num_steps + 1))
    assert all(0 < entry["learning_rate"] < math.inf for entry in history)
    for entry in decisions_of(history):
        assert all(abs(value) <= 4 for value in entry["features"].values())
    return history


# Losses and gradients that are no numbers


@routes
@pytest.mark.parametrize("phase", list(PHASES))
@pytest.mark.parametrize("value", [math.nan, pytest.param(math.inf, marks=pytest.mark.slow)])
@pytest.mark.reliability("NaN or infinite batch at a random step of each phase, rollback or restart: model recovers")
def test_a_nan_batch_is_undone(
    route: str, phase: str, value: float, tmp_path: Path, config: Callable[..., ALRSConfig]
) -> None:
    step = random.Random(f"{route} {phase} {value}").choice(PHASES[phase])
    trainer = make_trainer(
        route, arguments(tmp_path), config(rollback=True, max_restarts=1), data_collator=nan_at(step, value=value)
    )
    before = loss_of(trainer.model)
    trainer.train()
    history = check_run(tmp_path)
    assert history[step - 1]["loss"] is None, "the history shows the loss that was not finite"
    assert next(entry["step"] for entry in history if entry["loss"] is None) == step
    found = [entry for entry in decisions_of(history) if entry["guard"] == "non_finite"]
    # At the step itself where it is that of a decision, else at the next one
    assert found and 0 <= found[0]["step"] - step <= 3
    assert found[0]["action"] in ("restart", "rollback")
    multipliers = [0.0] + [entry["log_multiplier"] for entry in decisions_of(history)]
    at = 1 + decisions_of(history).index(found[0])
    assert multipliers[at] <= multipliers[at - 1] - 1.0
    assert is_finite(trainer.model)
    assert loss_of(trainer.model) < before


@routes
@pytest.mark.parametrize("phase", list(PHASES))
@pytest.mark.reliability("NaN batch without any copy of the weights: the run ends, rate lowered, history says so")
def test_a_nan_batch_without_copies_ends_with_a_lowered_rate(
    route: str, phase: str, tmp_path: Path, config: Callable[..., ALRSConfig]
) -> None:
    step = random.Random(f"no copy {route} {phase}").choice(PHASES[phase])
    trainer = make_trainer(route, arguments(tmp_path), config(max_restarts=0), data_collator=nan_at(step))
    trainer.train()
    history = check_run(tmp_path)
    found = [entry for entry in decisions_of(history) if entry["guard"] == "non_finite"]
    assert 0 <= found[0]["step"] - step <= 3
    assert history[-1]["learning_rate"] < 0.01 * decayed((NUM_STEPS - 1) / NUM_STEPS)
    assert trainer.state.global_step == NUM_STEPS


@routes
@pytest.mark.reliability("three NaN batches: plain decay from the last good rate, said once, model finite")
def test_repeated_trouble_ends_in_a_plain_decay(
    route: str, tmp_path: Path, config: Callable[..., ALRSConfig], caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(
        route,
        arguments(tmp_path),
        config(rollback=True, max_restarts=0, guard_patience=3, final_lr_ratio=0.3),
        data_collator=nan_at(12, 20, 29),
    )
    before = loss_of(trainer.model)
    with caplog.at_level("WARNING", logger="hf_alrs"):
        trainer.train()
    history = check_run(tmp_path)
    phases = [entry["phase"] for entry in history]
    assert phases[-1] == "fallback"
    first = phases.index("fallback")
    assert set(phases[first:]) == {"fallback"}
    rates = [entry["learning_rate"] for entry in history][first + 1 :]
    shares = decayed(torch.arange(first + 1, NUM_STEPS) / NUM_STEPS)
    assert rates == pytest.approx((rates[0] / shares[0] * shares).tolist(), rel=1e-5)
    told = [record.getMessage() for record in caplog.records if record.name.startswith("hf_alrs")]
    assert len(told) == 2, "trouble and the plain decay, once each"
    assert is_finite(trainer.model)
    assert loss_of(trainer.model) < before


@routes
@pytest.mark.reliability("gradients that are not finite under a finite loss: noticed, undone by rollback")
def test_a_gradient_that_is_no_number_is_undone(route: str, tmp_path: Path, config: Callable[..., ALRSConfig]) -> None:
    model, passes = tiny_classifier(), []

    def spoil(grad: torch.Tensor) -> torch.Tensor:
        passes.append(1)
        return grad * math.nan if len(passes) == 23 else grad

    model.first.weight.register_hook(spoil)
    trainer = make_trainer(route, arguments(tmp_path), config(rollback=True, max_restarts=0), model=model)
    before = loss_of(model)
    trainer.train()
    found = [entry for entry in decisions_of(check_run(tmp_path)) if entry["guard"] == "non_finite"]
    assert found and 0 <= found[0]["step"] - 23 < 3
    assert is_finite(trainer.model)
    assert loss_of(trainer.model) < before


class Wide(TinyClassifier):
    """A matrix of which every second weight is looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(6, 401), torch.nn.Linear(401, 3)


@pytest.mark.parametrize("at", [21, 22, 23], ids=["before a decision", "at a decision", "after a decision"])
@pytest.mark.reliability("bare loop, NaN in one gradient entry that is not looked at: undone by rollback")
def test_a_gradient_out_of_sight_is_undone(at: int, config: Callable[..., ALRSConfig]) -> None:
    """Trainer's clipping spreads it over all gradients; a loop without clipping does not."""
    torch.manual_seed(0)
    model, batch = Wide(), collated(tiny_dataset())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    options = config(rollback=True, max_restarts=0, max_signal_size=1024)
    scheduler = ALRSScheduler(optimizer, NUM_STEPS, config=options, model=model)
    assert scheduler._recorder._strides[0] == 5
    before = loss_of(model)
    for step in range(1, NUM_STEPS + 1):
        optimizer.zero_grad()
        loss = model(**batch)["loss"]
        loss.backward()
        if step == at:
            model.first.weight.grad[0, 1] = math.nan
        scheduler.observe(loss=loss)
        optimizer.step()
        scheduler.step()
    scheduler.flush()
    assert "rollback" in [entry.get("action") for entry in scheduler.history]
    assert is_finite(model)
    assert loss_of(model) < before


@routes
@pytest.mark.reliability("an overflowing loss that is finite again at the next batch: no copy needed, no trouble left")
def test_one_huge_loss_does_no_lasting_harm(route: str, tmp_path: Path, config: Callable[..., ALRSConfig]) -> None:
    trainer = make_trainer(route, arguments(tmp_path), config(rollback=True), data_collator=nan_at(24, value=1e6))
    before = loss_of(trainer.model)
    trainer.train()
    check_run(tmp_path)
    assert is_finite(trainer.model)
    assert loss_of(trainer.model) < before


# Data that change


@routes
@pytest.mark.reliability("labels shuffled in the middle: spike noticed, rate lowered, the new labels are learnt")
def test_labels_that_change_in_the_middle(route: str, tmp_path: Path, config: Callable[..., ALRSConfig]) -> None:
    changed = copy.deepcopy(tiny_dataset())
    for row in changed:
        row["labels"] = (row["labels"] + 1) % 3

    def relabel(step: int, batch: dict[str, torch.Tensor]) -> None:
        if step > 120:
            batch["labels"] = (batch["labels"] + 1) % 3

    trainer = make_trainer(route, arguments(tmp_path, max_steps=240), config(), data_collator=Faulty(relabel))
    trainer.train()
    history = check_run(tmp_path, 240)
    spikes = [entry for entry in decisions_of(history) if entry["guard"] == "spike"]
    assert spikes and 120 < spikes[0]["step"] <= 132
    before = next(e for e in reversed(decisions_of(history)) if e["step"] < spikes[0]["step"])
    assert spikes[0]["log_multiplier"] <= before["log_multiplier"] - 1.0
    assert is_finite(trainer.model)
    shocked = sum(entry["loss"] for entry in history[120:130]) / 10
    assert loss_of(trainer.model, changed) < 0.7 * shocked


# Rates and gradients at the edges


@routes
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
@pytest.mark.reliability("initial rate of 1e3, shipped network: weights finite, loss below the initial one")
def test_a_rate_of_a_thousand(route: str, optim: str, tmp_path: Path) -> None:
    args = arguments(tmp_path, learning_rate=1e3, optim=optim, max_steps=120)
    trainer = make_trainer(route, args, ALRSConfig())
    before = loss_of(trainer.model)
    trainer.train()
    history = check_run(tmp_path, 120)
    assert max(entry["learning_rate"] for entry in history) <= 10.0, "max_lr holds from the first step on"
    assert decisions_of(history)[-1]["log_multiplier"] < 0
    assert is_finite(trainer.model)
    assert loss_of(trainer.model) < before


@routes
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
@pytest.mark.reliability("initial rate of 1e3 that max_lr allows: weights finite, loss below the initial one")
def test_a_rate_of_a_thousand_that_is_allowed(route: str, optim: str, tmp_path: Path) -> None:
    args = arguments(tmp_path, learning_rate=1e3, optim=optim, max_steps=120)
    trainer = make_trainer(route, args, ALRSConfig(max_lr=1e4))
    before = loss_of(trainer.model)
    trainer.train()
    history = check_run(tmp_path, 120)
    assert decisions_of(history)[-1]["log_multiplier"] < 0
    assert is_finite(trainer.model)
    assert loss_of(trainer.model) < before


class Still(TinyClassifier):
    """A loss that depends on no weight, and gradients that are exactly zero."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        output = super().forward(x, labels)
        if labels is not None:
            output["loss"] = 1.0 + 0.0 * output["logits"].sum()
        return output


@routes
@pytest.mark.parametrize("network", ["default", "scratch"])
@pytest.mark.reliability("model whose gradients are all zero: weights untouched, features and rates finite")
def test_gradients_of_zero(route: str, network: str, tmp_path: Path) -> None:
    model = Still()
    weights = copy.deepcopy(model.state_dict())
    make_trainer(route, arguments(tmp_path), ALRSConfig(network=network), model=model).train()
    history = check_run(tmp_path)
    assert {entry["loss"] for entry in history} == {1.0}
    assert decisions_of(history)[-1]["features"]["dead_gradients"] == 2.0
    assert not [entry for entry in decisions_of(history) if entry["guard"] in ("non_finite", "spike")]
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name


@routes
@pytest.mark.reliability("frozen parameters: untouched, also by restart and rollback")
def test_frozen_parameters_stay(route: str, tmp_path: Path, config: Callable[..., ALRSConfig]) -> None:
    model = tiny_classifier(batch_norm=True)
    for parameter in model.first.parameters():
        parameter.requires_grad_(False)
    frozen, free = model.first.weight.clone(), model.last.weight.clone()
    trainer = make_trainer(
        route, arguments(tmp_path), config(rollback=True), model=model, data_collator=nan_at(2, 30, value=math.nan)
    )
    before = loss_of(model)
    trainer.train()
    history = check_run(tmp_path)
    assert {entry["action"] for entry in decisions_of(history)} >= {"restart", "rollback"}
    assert torch.equal(model.first.weight, frozen)
    assert not torch.equal(model.last.weight, free)
    assert is_finite(model) and all(bool(b.isfinite().all()) for b in model.buffers())
    assert loss_of(model) < before


# Data at the edges


@routes
@pytest.mark.parametrize("interval", [0.0125, "epoch"])
@pytest.mark.reliability("dataset of a single batch: an epoch is one step")
def test_one_batch(route: str, interval: Any, tmp_path: Path, moving_config: Callable[..., ALRSConfig]) -> None:
    data = tiny_dataset(8)
    args = arguments(tmp_path, max_steps=-1, num_train_epochs=40)
    trainer = make_trainer(route, args, moving_config(decision_interval=interval), train_dataset=data)
    before = loss_of(trainer.model, data)
    trainer.train()
    history = check_run(tmp_path, 40)
    assert len(decisions_of(history)) >= 10
    assert is_finite(trainer.model)
    assert loss_of(trainer.model, data) < before


@pytest.mark.parametrize("num_epochs", [1, 2])
@routes
@pytest.mark.reliability("runs of one and two steps: no decision, the run ends")
def test_a_run_of_one_step(route: str, num_epochs: int, tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=-1, num_train_epochs=num_epochs)
    trainer = make_trainer(route, args, ALRSConfig(), train_dataset=tiny_dataset(8))
    trainer.train()
    check_run(tmp_path, num_epochs)
    assert is_finite(trainer.model)


class Stream(IterableDataset):
    """Data without a length."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(tiny_dataset(NUM_STEPS * 8))


@routes
@pytest.mark.reliability("IterableDataset without length, with a NaN batch")
def test_data_without_length_survive_a_fault(route: str, tmp_path: Path, config: Callable[..., ALRSConfig]) -> None:
    trainer = make_trainer(
        route, arguments(tmp_path), config(rollback=True), train_dataset=Stream(), data_collator=nan_at(31)
    )
    before = loss_of(trainer.model)
    trainer.train()
    history = check_run(tmp_path)
    assert "rollback" in [entry["action"] for entry in decisions_of(history)]
    assert is_finite(trainer.model)
    assert loss_of(trainer.model) < before


@routes
@pytest.mark.reliability("IterableDataset without length and decisions once an epoch: refused with the remedy")
def test_epochs_of_data_without_length_are_refused(
    route: str, tmp_path: Path, config: Callable[..., ALRSConfig]
) -> None:
    trainer = make_trainer(route, arguments(tmp_path), config(decision_interval="epoch"), train_dataset=Stream())
    with pytest.raises(InputError, match="decision_interval"):
        trainer.train()


# Resuming into another length


@pytest.mark.parametrize("route", ["callback", pytest.param("trainer", marks=pytest.mark.slow)])
@pytest.mark.parametrize("changed", [30, 90])
@pytest.mark.parametrize("at", [6, 7, 12], ids=["gather", "fit", "drive"])
@pytest.mark.reliability("max_steps changed on resume, shorter and longer, in each phase")
def test_another_number_of_steps_on_resume(
    route: str, changed: int, at: int, tmp_path: Path, network_folder: Callable[..., str]
) -> None:
    folder = network_folder(scratch_network(scale=2.0))
    config = ALRSConfig(
        network=folder,
        phase1_steps=6,
        decision_interval=3,
        max_first_rise=1.0,
        max_first_fall=0.8,
        max_restarts=0,
        final_lr_ratio=0.3,
    )
    args = arguments(tmp_path, save_strategy="steps", save_steps=at)
    first = make_trainer(route, args, config)
    before = loss_of(first.model)
    first.train()
    written = history_of(tmp_path)[:at]
    trainer = make_trainer(route, arguments(tmp_path, max_steps=changed), config)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    history = check_run(tmp_path, changed)
    assert history[:at] == written
    rates = [entry["learning_rate"] for entry in history]
    # No jump but that of the decay, which is that of step `at` of the new length
    decay = decayed(at / changed)
    if "log_multiplier" in written[-1]:  # the step of a decision, which the next rate is the first to follow
        expected = 0.01 * math.exp(written[-1]["log_multiplier"]) * decay
    else:
        expected = rates[at - 1] / decayed((at - 1) / NUM_STEPS) * decay
    assert rates[at] == pytest.approx(expected)
    last = decisions_of(history)[-1]["log_multiplier"]
    assert rates[-1] == pytest.approx(0.01 * math.exp(last) * decayed((changed - 1) / changed)), (
        "the rate ends where the new length does"
    )
    assert len(decisions_of(history)) > len(decisions_of(written)) + 4
    assert is_finite(trainer.model)
    assert loss_of(trainer.model) < before
