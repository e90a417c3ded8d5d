"""The scheduler in bare loops: one advance for each optimizer step, ratios of groups, restarts, any optimizer."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import schedulefree
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import TinyClassifier, network_saying, quiet_settings, scratch_network, tiny_classifier, tiny_dataset
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR, StepLR
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from transformers import SchedulerType

from hf_alrs import ALRSConfig, ALRSScheduler, InputError, get_scheduler
from hf_alrs.scheduler import _cloned_beside, _moved, _plain, unwrapped_optimizer


T, K = 40, 4
LN10 = math.log(10.0)
Config = Callable[..., ALRSConfig]


class Line(nn.Module):
    """y = a x + b: two parameters, so that every number can be followed."""

    def __init__(self, a: float = 0.0, b: float = 0.0):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(a)), nn.Parameter(torch.tensor(b))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a * x + self.b


def loss_of(model: Line, x: torch.Tensor) -> torch.Tensor:
    return (model(x) - (2 * x + 1)).square().mean()


X = torch.linspace(-1, 1, 8)


@pytest.fixture
def quiet(network_folder: Callable[..., str]) -> Config:
    """A configuration whose network always says the same, and is never trained; the decay ends at 0."""

    def make(says: float = 0.0, **changed: Any) -> ALRSConfig:
        own = {"network": network_folder(network_saying(says)), "average_weights": False}
        return ALRSConfig(**(quiet_settings(K) | own | changed))

    return make


def train(
    model: Line, optimizer: torch.optim.Optimizer, scheduler: ALRSScheduler, num_steps: int, micro_batches: int = 1
) -> list[float]:
    """Trains on the same 8 points at each step, and returns the rate that each step used."""
    rates = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        for part in X.chunk(micro_batches):
            loss = loss_of(model, part)
            scheduler.observe(loss=loss)
            (loss / micro_batches).backward()
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return rates


# get_scheduler


def rates_of(scheduler: Any, optimizer: torch.optim.Optimizer, num_steps: int = 20) -> list[float]:
    rates = []
    for _ in range(num_steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return rates


def sgd(lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=lr)


KWARGS = {
    "cosine_with_min_lr": {"min_lr": 1e-3},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-3},
    "warmup_stable_decay": {"num_decay_steps": 5},
    "polynomial": {"power": 2.0},
}


@pytest.mark.parametrize("as_enum", [False, True])
@pytest.mark.parametrize("name", [m.value for m in SchedulerType if m.value not in ("reduce_lr_on_plateau", "greedy")])
def test_names_of_transformers_are_their_schedulers(name: str, as_enum: bool) -> None:
    ours, theirs = sgd(), sgd()
    arguments: dict[str, Any] = {"num_warmup_steps": 3, "num_training_steps": 20}
    arguments["scheduler_specific_kwargs"] = KWARGS.get(name)
    got = rates_of(get_scheduler(SchedulerType(name) if as_enum else name, ours, **arguments), ours)
    expected = rates_of(transformers.get_scheduler(name, theirs, **arguments), theirs)
    assert got == expected
    assert len(set(got)) > 1 or name == "constant"


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_names_stepped_with_a_metric_are_built(name: str) -> None:
    ours, theirs = get_scheduler(name, sgd()), transformers.get_scheduler(name, sgd())
    assert type(ours) is type(theirs)


def test_own_names_are_torch_schedulers() -> None:
    built = {name: get_scheduler(name, sgd(), num_training_steps=20) for name in ("step", "exponential", "one_cycle")}
    assert {name: type(s) for name, s in built.items()} == {
        "step": StepLR,
        "exponential": ExponentialLR,
        "one_cycle": OneCycleLR,
    }


@pytest.mark.parametrize("name", ["alrs", "step", "one_cycle"])
def test_arguments_that_a_scheduler_does_not_take(name: str) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(InputError, match=rf"scheduler_specific_kwargs=.*modle.*'{name}' scheduler, which takes"):
        get_scheduler(name, optimizer, 0, 10, {"modle": 3})


def test_step_and_exponential_decay_over_the_run() -> None:
    optimizer = sgd()
    got = rates_of(get_scheduler("step", optimizer, num_training_steps=21), optimizer, 21)
    assert got == pytest.approx([0.1] * 7 + [0.01] * 7 + [0.001] * 7)
    optimizer = sgd()
    got = rates_of(get_scheduler("exponential", optimizer, num_training_steps=20), optimizer, 21)
    assert got == pytest.approx([0.1 * 0.01 ** (i / 20) for i in range(21)])
    optimizer = sgd()
    scheduler = get_scheduler(
        "step", optimizer, num_training_steps=9, scheduler_specific_kwargs={"step_size": 2, "gamma": 0.5}
    )
    assert rates_of(scheduler, optimizer, 5) == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025])


def test_one_cycle_rises_to_the_rate_of_the_optimizer() -> None:
    optimizer = sgd()
    got = rates_of(get_scheduler("one_cycle", optimizer, num_training_steps=20), optimizer, 20)
    assert max(got) == pytest.approx(0.1)
    assert got[0] < 0.1 > got[-1]


def test_alrs_by_name(quiet: Config) -> None:
    optimizer = sgd()
    kwargs = {"config": quiet(decision_interval="epoch"), "steps_per_epoch": 5}
    scheduler = get_scheduler("alrs", optimizer, 2, 20, kwargs)
    assert isinstance(scheduler, ALRSScheduler)
    assert isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)
    controller = scheduler.controller
    assert (controller.num_warmup_steps, controller.num_training_steps, controller.decision_interval) == (2, 20, 5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


@pytest.mark.parametrize("name", ["alrs", "step", "exponential", "one_cycle"])
def test_the_length_of_the_run_is_asked_for(name: str) -> None:
    with pytest.raises(InputError, match="num_training_steps"):
        get_scheduler(name, sgd())


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"linaer.*alrs.*linear"):
        get_scheduler("linaer", sgd(), 0, 10)


def test_an_optimizer_with_nothing_to_train_is_refused(quiet: Config) -> None:
    parameter = nn.Parameter(torch.zeros(2), requires_grad=False)
    with pytest.raises(InputError, match="no trainable parameter"):
        ALRSScheduler(torch.optim.SGD([parameter], lr=0.1), 10, config=quiet())


# One optimizer step, one advance


def test_rates_and_history_of_a_quiet_run(quiet: Config) -> None:
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = ALRSScheduler(optimizer, T, config=quiet(says=0.4))
    losses = []
    rates = []
    for step in range(T):
        optimizer.zero_grad()
        loss = loss_of(model, X)
        loss.backward()
        losses.append(loss.item())
        scheduler.observe(loss=loss, grad_norm=torch.tensor(float(step)))
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    scheduler.flush()
    # Decisions after steps 4, 8, ...: a jump by 0.4 at the second, then 0.2 at each
    multipliers = [0.0] * 9 + [0.4 + 0.2 * (step // K - 2) for step in range(8, T - 1)]
    assert rates == pytest.approx([0.1 * math.exp(m) * (1 - i / T) for i, m in enumerate(multipliers)])
    history = scheduler.history
    assert [entry["step"] for entry in history] == list(range(1, T + 1))
    assert [entry["loss"] for entry in history] == pytest.approx(losses)
    assert [entry["grad_norm"] for entry in history] == [float(step) for step in range(T)]
    assert [entry["learning_rate"] for entry in history] == rates
    phases = [entry["phase"] for entry in history]
    assert [phases[i] for i in (0, 7, 8, 12, T - 1)] == ["gather", "gather", "fit", "drive", "drive"]
    assert [entry["step"] for entry in history if "features" in entry] == list(range(K + 1, T + 1, K))
    assert scheduler.drain_history() == history
    assert scheduler.history == []


@pytest.mark.reliability("scheduler stepped without an optimizer step: nothing happens")
def test_step_without_an_optimizer_step_does_nothing(quiet: Config) -> None:
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = ALRSScheduler(optimizer, T, config=quiet())
    for _ in range(3):
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert scheduler.last_epoch == 0
    train(model, optimizer, scheduler, 1)
    for _ in range(3):
        scheduler.step()
    assert scheduler.last_epoch == 1
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * (1 - 1 / T))
    assert scheduler.get_last_lr() == [optimizer.param_groups[0]["lr"]]


def test_zero_grad_before_step_is_fine(moving_config: Config) -> None:
    histories = []
    for zero_first in (False, True):
        model = Line()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        scheduler = ALRSScheduler(optimizer, T, config=moving_config())
        for _ in range(T):
            loss = loss_of(model, X)
            loss.backward()
            scheduler.observe(loss=loss)
            optimizer.step()
            if zero_first:
                optimizer.zero_grad()
                scheduler.step()
            else:
                scheduler.step()
                optimizer.zero_grad()
        histories.append(scheduler.history)
    assert histories[0] == histories[1]


@pytest.mark.reliability("gradient accumulation is one batch")
def test_micro_batches_are_one_batch(moving_config: Config) -> None:
    runs = []
    for micro_batches in (1, 8):
        model = Line()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        scheduler = ALRSScheduler(optimizer, T, config=moving_config())
        rates = train(model, optimizer, scheduler, T, micro_batches)
        scheduler.flush()
        runs.append((rates, [entry["loss"] for entry in scheduler.history]))
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-4)
    assert runs[1][1] == pytest.approx(runs[0][1], rel=1e-4, abs=1e-9)
    assert len(set(runs[0][0])) == T


@pytest.mark.reliability("a skipped optimizer step: no advance, its loss discarded")
def test_skipped_steps_do_not_count(quiet: Config) -> None:
    """Mixed precision leaves the optimizer's step out when a gradient overflows; its metrics are discarded."""
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = ALRSScheduler(optimizer, T, config=quiet())
    for step in range(6):
        loss = loss_of(model, X)
        loss.backward()
        scheduler.observe(loss=loss * (math.inf if step == 3 else 1.0))
        if step != 3:
            optimizer.step()
        scheduler.step()
        scheduler.discard()
        optimizer.zero_grad()
    scheduler.flush()
    assert [entry["step"] for entry in scheduler.history] == [1, 2, 3, 4, 5]
    assert all(math.isfinite(entry["loss"]) for entry in scheduler.history)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * (1 - 5 / T))


def test_it_works_without_any_loss_and_says_so_once(moving_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr("hf_alrs.scheduler.logger.warning", warnings.append)
    model = Line()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    scheduler = ALRSScheduler(optimizer, T, config=moving_config())
    for _ in range(T):
        optimizer.zero_grad()
        loss_of(model, X).backward()
        optimizer.step()
        scheduler.step()
    scheduler.flush()
    assert {entry["loss"] for entry in scheduler.history} == {None}
    assert all(math.isfinite(entry["learning_rate"]) for entry in scheduler.history)
    (warning,) = warnings
    assert "no loss has been observed" in warning and "scheduler.observe(loss=loss)" in warning


@pytest.mark.parametrize("optimizer_class", [torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize("keyword", [False, True])
def test_a_closure_is_the_same_run(optimizer_class: type, keyword: bool, moving_config: Config) -> None:
    histories = []
    for with_closure in (False, True):
        model = Line()
        optimizer = optimizer_class(model.parameters(), lr=0.05)
        scheduler = ALRSScheduler(optimizer, T, config=moving_config(), model=model)
        generator = torch.Generator().manual_seed(0)
        for _ in range(T):
            x = torch.randn(8, generator=generator)

            def closure(x: torch.Tensor = x, model: Line = model, optimizer: Any = optimizer) -> torch.Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, x)
                loss.backward()
                return loss

            if with_closure:
                loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
            else:
                loss = closure()
                optimizer.step()
            scheduler.observe(loss=loss)
            scheduler.step()
        histories.append((scheduler.history, model.a.item()))
    assert histories[0] == histories[1]


def test_a_closure_that_is_called_often_is_one_step(moving_config: Config) -> None:
    model = Line()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    scheduler = ALRSScheduler(optimizer, T, config=moving_config())
    for _ in range(T):

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, X)
            loss.backward()
            return loss

        scheduler.observe(loss=optimizer.step(closure))
        scheduler.step()
    scheduler.flush()
    assert [entry["step"] for entry in scheduler.history] == list(range(1, T + 1))
    assert all(math.isfinite(value) for e in scheduler.history for value in e.get("features", {}).values())


def test_the_averaged_weights_stay_after_the_last_step(moving_config: Config) -> None:
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scheduler = ALRSScheduler(optimizer, T, config=moving_config(), model=model)
    train(model, optimizer, scheduler, T - 1)
    optimizer.eval()
    averaged = model.a.item()
    optimizer.train()
    assert model.a.item() != averaged, "in the middle of a run training goes on from the raw weights"
    train(model, optimizer, scheduler, 1)
    optimizer.eval()
    averaged = model.a.item()
    optimizer.train()
    assert model.a.item() == averaged


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_is_no_matter(dtype: torch.dtype, moving_config: Config) -> None:
    torch.set_default_dtype(dtype)
    try:
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        scheduler = ALRSScheduler(optimizer, T, config=moving_config(max_signal_size=1), model=model)
        for _ in range(T):
            optimizer.zero_grad()
            loss = model(torch.ones(4, 1)).square().mean()
            loss.backward()
            optimizer.step()
            scheduler.observe(loss=loss)
            scheduler.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert any(entry.get("network_change") for entry in scheduler.history)


def test_the_mean_is_taken_of_a_loss_for_each_example(moving_config: Config) -> None:
    histories = []
    for reduce in (torch.mean, lambda loss: loss):
        model = Line()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scheduler = ALRSScheduler(optimizer, T, config=moving_config())
        for _ in range(T):
            optimizer.zero_grad()
            losses = (model(X) - 1).square()
            losses.mean().backward()
            optimizer.step()
            scheduler.observe(loss=reduce(losses))
            scheduler.step()
        histories.append(scheduler.history)
    assert histories[0] == histories[1]


def test_a_configuration_of_another_type_is_refused() -> None:
    with pytest.raises(InputError, match=r"config=.*must be an ALRSConfig"):
        get_scheduler("alrs", sgd(), num_training_steps=T, scheduler_specific_kwargs={"config": {"gain": 1.0}})


def test_losses_may_be_plain_numbers(moving_config: Config) -> None:
    histories = []
    for read in (lambda loss: loss, lambda loss: loss.item()):
        model = Line()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        scheduler = ALRSScheduler(optimizer, T, config=moving_config())
        for _ in range(T):
            optimizer.zero_grad()
            loss = loss_of(model, X)
            loss.backward()
            scheduler.observe(loss=read(loss))
            optimizer.step()
            scheduler.step()
        histories.append(scheduler.history)
    assert histories[0] == histories[1]


def test_plain_numbers_keep_double_precision(quiet: Config) -> None:
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    scheduler = ALRSScheduler(optimizer, T, config=quiet())
    loss_of(model, X).backward()
    scheduler.observe(loss=0.1, grad_norm=0.3)
    optimizer.step()
    scheduler.step()
    scheduler.flush()
    assert (scheduler.history[0]["loss"], scheduler.history[0]["grad_norm"]) == (0.1, 0.3)


def test_evaluations_become_features(quiet: Config) -> None:
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scheduler = ALRSScheduler(optimizer, T, config=quiet())
    train(model, optimizer, scheduler, 2 * K)
    scheduler.observe_evaluation(loss=torch.tensor(0.7), accuracy=0.5)
    train(model, optimizer, scheduler, K)
    features = [entry["features"] for entry in scheduler.history if "features" in entry]
    assert [f["evaluated"] for f in features] == [0.0, 1.0]


def test_close_takes_the_hook_away(quiet: Config) -> None:
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = ALRSScheduler(optimizer, T, config=quiet())
    train(model, optimizer, scheduler, 3)
    rate = optimizer.param_groups[0]["lr"]
    scheduler.close()
    train(model, optimizer, scheduler, 3)
    assert optimizer.param_groups[0]["lr"] == rate


def test_no_gradient_is_needed_around_the_step(moving_config: Config) -> None:
    """A loop may well step its scheduler under `torch.no_grad`, and the network trains all the same."""
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    scheduler = ALRSScheduler(optimizer, T, config=moving_config())
    for _ in range(T):
        optimizer.zero_grad()
        loss = loss_of(model, X)
        scheduler.observe(loss=loss)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            scheduler.step()
    assert scheduler.last_meta_loss is not None


# Groups


@pytest.mark.reliability("param groups keep the ratios of their rates, warmup and bounds included")
def test_groups_keep_their_ratios(quiet: Config) -> None:
    first, second, frozen = (nn.Parameter(torch.ones(3)) for _ in range(3))
    optimizer = torch.optim.SGD(
        [{"params": [first], "lr": 0.01}, {"params": [second], "lr": 0.1}, {"params": [frozen], "lr": 0.0}]
    )
    scheduler = ALRSScheduler(optimizer, T, num_warmup_steps=3, config=quiet(says=2.0, max_lr=0.3))
    assert scheduler.controller.initial_learning_rate == 0.1
    seen = []
    for _ in range(T):
        optimizer.zero_grad()
        loss = (first.square() + second.square() + frozen.square()).sum()
        loss.backward()
        scheduler.observe(loss=loss)
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    for low, high, zero in seen:
        assert low == pytest.approx(0.1 * high)
        assert zero == 0.0
    assert max(high for _, high, _ in seen) == pytest.approx(0.3, rel=0.3)
    assert max(high for _, high, _ in seen) <= 0.3  # the bounds speak of the group with the highest rate
    assert torch.equal(frozen, torch.ones(3))
    # Frozen weights are not looked at: 6 weights remain.
    assert len(scheduler._parameters) == 2


def test_the_history_holds_the_rate_of_the_leading_group(quiet: Config) -> None:
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([{"params": [first], "lr": 0.01}, {"params": [second], "lr": 0.1}])
    scheduler = ALRSScheduler(optimizer, T, config=quiet())
    (first.square() + second.square()).sum().backward()
    optimizer.step()
    scheduler.step()
    scheduler.flush()
    assert scheduler.history[0]["learning_rate"] == 0.1


@pytest.mark.parametrize(
    ("make", "max_beta1", "expected", "of_a_later_group"),
    [
        (lambda p: torch.optim.Adam(p), None, (0.7, 0.999), 0.7),
        (lambda p: torch.optim.AdamW(p, betas=(0.95, 0.98)), 0.8, (0.8, 0.98), 0.8),
        (lambda p: torch.optim.AdamW(p, betas=(0.5, 0.98)), 0.7, (0.5, 0.98), 0.7),  # lower ones stay
        (lambda p: torch.optim.NAdam(p), 0.0, (0.0, 0.999), 0.0),
        (lambda p: torch.optim.Adam(p), 1.0, (0.9, 0.999), 0.9),
        (lambda p: Lion(p, lr=0.003), 0.7, (0.9, 0.99), 0.9),  # its first beta is none of a mean of gradients
        (lambda p: schedulefree.AdamWScheduleFree(p), 0.7, (0.9, 0.999), 0.9),  # nor is this one's
        (lambda p: schedulefree.AdamWScheduleFreeClosure(p), 0.7, (0.9, 0.999), 0.9),
    ],
)
def test_beta1_is_lowered(
    make: Any, max_beta1: float | None, expected: tuple[float, float], of_a_later_group: float, quiet: Config
) -> None:
    optimizer = make([nn.Parameter(torch.ones(3))])
    scheduler = ALRSScheduler(optimizer, T, config=quiet(max_beta1=max_beta1, average_weights=True))
    assert optimizer.param_groups[0]["betas"] == expected
    saved = optimizer.state_dict()
    saved["param_groups"][0]["betas"] = (0.9, 0.999)  # of a run without ALRS
    saved["param_groups"][0].pop("initial_beta1", None)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "betas": (0.9, 0.999)})

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum(p.square().sum() for group in optimizer.param_groups for p in group["params"])
        loss.backward()
        return loss

    optimizer.train() if hasattr(optimizer, "train") else None
    optimizer.step(closure)
    scheduler.step()
    assert [group["betas"][0] for group in optimizer.param_groups] == [of_a_later_group] * 2


def test_a_later_run_of_the_same_optimizer_finds_its_own_beta1(quiet: Config) -> None:
    weights = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weights], betas=(0.95, 0.98))
    seen = []
    for num_training_steps, average in ((300, True), (500, True), (10_000, True), (300, False)):
        scheduler = ALRSScheduler(optimizer, num_training_steps, config=quiet(average_weights=average))
        seen.append(optimizer.param_groups[0]["betas"])
        scheduler.close()
    assert seen == [(0.7, 0.98), (pytest.approx(0.8), 0.98), (0.95, 0.98), (0.95, 0.98)]


def test_a_step_with_a_lowered_beta1_is_that_of_an_adam_that_was_made_so(quiet: Config) -> None:
    weights = [nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2)]
    driven = torch.optim.Adam([weights[0]], lr=0.1)
    scheduler = ALRSScheduler(driven, T, config=quiet(max_beta1=0.7, final_lr_ratio=1.0))
    made_so = torch.optim.Adam([weights[1]], lr=0.1, betas=(0.7, 0.999))
    for _ in range(T):
        for p, optimizer in zip(weights, (driven, made_so), strict=True):
            optimizer.zero_grad()
            p.pow(4).sum().backward()
            optimizer.step()
        scheduler.step()
    assert torch.equal(*weights)


def test_a_beta1_that_is_a_tensor_is_no_other_optimizers(quiet: Config) -> None:
    beta1 = torch.tensor(0.9)
    optimizer = torch.optim.Adam([nn.Parameter(torch.ones(3))], lr=torch.tensor(0.1), betas=(0.9, 0.999))
    optimizer.param_groups[0]["betas"] = (beta1, torch.tensor(0.999))
    scheduler = ALRSScheduler(optimizer, T, config=quiet(max_beta1=0.7))
    lowered = optimizer.param_groups[0]["betas"][0]
    assert float(lowered) == pytest.approx(0.7)
    assert float(beta1) == pytest.approx(0.9)
    optimizer.param_groups[0]["params"][0].sum().backward()
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["betas"][0] is lowered, "a captured graph reads this one"


# Restarts and probes


def restarted(quiet: Config) -> tuple[dict[str, torch.Tensor], TinyClassifier, torch.optim.Optimizer, ALRSScheduler]:
    """A model with batch-norm on the step of a restart, and its state before training."""
    model = tiny_classifier(batch_norm=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    config = quiet(says=-3.0, max_restarts=1, restart_window=1.0)
    scheduler = ALRSScheduler(optimizer, T, config=config, model=model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_classifier(model, optimizer, scheduler, 2 * K + 1)
    return before, model, optimizer, scheduler


def train_classifier(
    model: TinyClassifier, optimizer: torch.optim.Optimizer, scheduler: ALRSScheduler, num_steps: int
) -> None:
    loader = DataLoader(tiny_dataset(), batch_size=16)
    for batch in [batch for _ in range(5) for batch in loader][:num_steps]:
        optimizer.zero_grad()
        loss = model(**batch)["loss"]
        scheduler.observe(loss=loss)
        loss.backward()
        optimizer.step()
        scheduler.step()


def test_a_restart_brings_back_the_weights_with_a_fresh_optimizer(quiet: Config) -> None:
    before, model, optimizer, scheduler = restarted(quiet)
    assert scheduler.last_decision.action == "restart"
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]), name
    # nearly where it was: the first batch has gone through
    assert (model.norm.running_mean - before["norm.running_mean"]).abs().max() < 0.1
    assert int(model.norm.num_batches_tracked) <= 1
    assert not optimizer.state
    assert scheduler.history[-1]["action"] == "restart"
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * math.exp(-3) * (1 - 9 / T), rel=1e-4)
    train_classifier(model, optimizer, scheduler, 2 * K)
    assert scheduler._steps == 4 * K + 1


def test_a_restart_brings_back_the_buffers(quiet: Config) -> None:
    before, model, _, _ = restarted(quiet)
    for name, value in model.named_buffers():
        assert torch.equal(value, before[name]), name


@pytest.mark.reliability("rate of 200 on a parabola: restarts until it trains")
def test_a_diverged_run_recovers(quiet: Config) -> None:
    model = Line(a=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=200.0)
    config = quiet(max_lr=1000.0, max_restarts=10, restart_window=1.0)
    scheduler = ALRSScheduler(optimizer, 100, config=config)
    train(model, optimizer, scheduler, 100)
    assert math.isfinite(loss_of(model, X).item())
    assert loss_of(model, X).item() < 1.0
    actions = [entry.get("action") for entry in scheduler.history]
    assert actions.count("restart") >= 2


def test_the_copy_of_the_weights_is_given_up_after_the_window(quiet: Config) -> None:
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scheduler = ALRSScheduler(optimizer, T, config=quiet(max_restarts=1, restart_window=0.25))
    train(model, optimizer, scheduler, 9)
    assert scheduler._initial is not None
    train(model, optimizer, scheduler, 2)
    assert scheduler._initial is None
    scheduler = ALRSScheduler(torch.optim.SGD(model.parameters(), lr=0.01), T, config=quiet(max_restarts=0))
    assert scheduler._initial is None


def test_probes_return_to_their_snapshot() -> None:
    model = tiny_classifier(batch_norm=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    config = ALRSConfig(
        network="scratch",
        hidden_sizes=(8,),
        num_probes=3,
        probe_steps=8,
        phase1_steps=8,
        decision_interval=K,
        max_restarts=0,
    )
    scheduler = ALRSScheduler(optimizer, 80, config=config, model=model)
    loader = DataLoader(tiny_dataset(), batch_size=16)
    batches = [batch for _ in range(20) for batch in loader]

    def snapshot() -> list[torch.Tensor]:
        state = [v for s in optimizer.state.values() for v in s.values()]
        return [t.detach().clone() for t in (*model.state_dict().values(), *state)]

    kept: list[torch.Tensor] | None = None
    actions = []
    for step in range(80):
        optimizer.zero_grad()
        loss = model(**batches[step])["loss"]
        scheduler.observe(loss=loss)
        loss.backward()
        optimizer.step()
        scheduler.step()
        action = scheduler.last_decision.action if scheduler.last_decision else None
        if scheduler.controller.is_decision(step) and action:
            actions.append((step, action))
            if action == "snapshot":
                kept = snapshot()
            elif action == "restore":
                for x, y in zip(snapshot(), kept, strict=True):
                    assert torch.equal(x, y), f"after the probe that ended at step {step}"
    assert actions == [(8, "snapshot"), (16, "restore"), (24, "restore"), (32, "restore")]
    assert scheduler._snapshot is None  # the copy is given up
    assert all(math.isfinite(p.sum().item()) for p in model.parameters())


@pytest.mark.parametrize(
    "interval",
    [
        2,
        3,
        7,
    ],
)
@pytest.mark.parametrize("num_probes", [0, 3])
def test_updates_are_compared_with_the_rate_that_made_them(
    interval: int, num_probes: int, moving_config: Config
) -> None:
    """Without momentum |u| = lr |g|, so that ln(|u| / (lr |g|)) is 0 throughout: warmup, probes, restarts, drive."""
    model = tiny_classifier(seed=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    config = moving_config(
        decision_interval=interval,
        phase1_steps=2 * interval,
        num_probes=num_probes,
        probe_steps=2 * interval,
        max_restarts=2,
        restart_window=0.9,
    )
    scheduler = ALRSScheduler(optimizer, 100, num_warmup_steps=6, config=config)
    loader = DataLoader(tiny_dataset(), batch_size=16)
    for batch in [batch for _ in range(25) for batch in loader]:
        optimizer.zero_grad()
        loss = model(**batch)["loss"]
        scheduler.observe(loss=loss)
        loss.backward()
        optimizer.step()
        scheduler.step()
    features = {entry["step"]: entry["features"] for entry in scheduler.history if "features" in entry}
    assert len(features) > 10
    for step, row in features.items():
        assert row["update_gain"] == pytest.approx(0.0, abs=2e-3), f"step {step}"


# Any optimizer


class Lion(torch.optim.Optimizer):
    """Sign of an average of gradients: an optimizer that torch does not have, with state of its own."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99)):
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                average = state.setdefault("average", torch.zeros_like(p))
                p.add_(torch.lerp(p.grad, average, group["betas"][0]).sign(), alpha=-group["lr"])
                average.lerp_(p.grad, 1 - group["betas"][1])


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "sgd_foreach": lambda p: torch.optim.SGD(p, lr=0.05, foreach=True),
    "sgd_fused": lambda p: torch.optim.SGD(p, lr=0.05, fused=True),
    "sgd_nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adam_foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "adam_fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "adam_amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adamw_tensor_rate": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), foreach=False),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "adafactor_transformers": lambda p: transformers.Adafactor(
        p, lr=0.01, relative_step=False, scale_parameter=False, warmup_init=False
    ),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "lion": lambda p: Lion(p, lr=0.003),
}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.reliability(
    "any optimizer, with probes and restarts: finite features, at the rates of the history, learning"
)
def test_any_optimizer(name: str, moving_config: Config) -> None:
    """A run with probes and restarts: finite, learning, at the rates of the history, whatever the optimizer keeps."""
    model = tiny_classifier(seed=2)
    optimizer = OPTIMIZERS[name](model.parameters())
    config = moving_config(num_probes=3, probe_steps=6, max_restarts=2, restart_window=0.8)
    scheduler = ALRSScheduler(optimizer, 60, config=config, model=model)
    assert scheduler.controller.adaptive == (name != "momentum" and not name.startswith("sgd"))
    loader = DataLoader(tiny_dataset(), batch_size=16)
    batches = [batch for _ in range(15) for batch in loader]
    with torch.no_grad():
        before = sum(model(**batch)["loss"].item() for batch in batches[:4])
    rates = []
    for batch in batches:
        optimizer.zero_grad()
        loss = model(**batch)["loss"]
        scheduler.observe(loss=loss)
        loss.backward()
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    scheduler.flush()
    assert [entry["learning_rate"] for entry in scheduler.history] == pytest.approx(rates, rel=1e-6)
    features = [entry["features"] for entry in scheduler.history if "features" in entry]
    assert len(features) == 19
    assert all(math.isfinite(value) for row in features for value in row.values())
    assert {entry["phase"] for entry in scheduler.history} == {"gather", "fit", "drive"}
    with torch.no_grad():
        after = sum(model(**batch)["loss"].item() for batch in batches[:4])
    assert after < before, f"loss {before:.3f} -> {after:.3f}"
    if name == "adamw_tensor_rate":
        assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.reliability("any optimizer: groups keep their ratios, groups of rate 0 stay frozen")
def test_groups_of_any_optimizer_keep_their_ratios(name: str, quiet: Config) -> None:
    low, high, frozen = (nn.Parameter(torch.ones(4, 4)) for _ in range(3))
    optimizer = OPTIMIZERS[name]([{"params": [low]}, {"params": [high]}, {"params": [frozen]}])
    rate = float(optimizer.param_groups[1]["lr"])
    for group, factor in zip(optimizer.param_groups, (0.1, 1.0, 0.0), strict=True):
        group["lr"] = torch.tensor(rate * factor) if isinstance(group["lr"], torch.Tensor) else rate * factor
        group["weight_decay"] = 0.0
    scheduler = ALRSScheduler(optimizer, T, config=quiet(says=1.0))
    seen = []
    for _ in range(T):
        optimizer.zero_grad()
        loss = (low.square() + high.square() + frozen.square()).mean()
        loss.backward()
        scheduler.observe(loss=loss)
        seen.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    for first, second, third in seen:
        assert first == pytest.approx(0.1 * second, rel=1e-6)
        assert third == 0.0
    assert seen[2 * K + 1][1] == pytest.approx(rate * math.exp(1.0) * (1 - (2 * K + 1) / T), rel=1e-5)
    assert torch.equal(frozen, torch.ones(4, 4))
    assert not torch.equal(low, torch.ones(4, 4))


class CountReads(TorchDispatchMode):
    """Counts how often a number is read off a tensor, which on a GPU waits for all that is under way."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.equal)
        return func(*args, **(kwargs or {}))


@pytest.mark.reliability("no host-device synchronisation on steps without a decision")
def test_nothing_is_read_between_decisions(moving_config: Config) -> None:
    weight = torch.nn.Parameter(torch.ones(8, 8))
    optimizer = torch.optim.SGD([weight], lr=0.01)
    scheduler = ALRSScheduler(optimizer, 30, config=moving_config())
    read_at = []
    for step in range(30):
        loss = (weight**2).sum()
        optimizer.zero_grad()
        loss.backward()
        written = len(scheduler.history)
        with CountReads() as count:
            scheduler.observe(loss=loss.detach())
            optimizer.step()
            scheduler.step()
        if count.reads or len(scheduler.history) > written:  # what is written has been read, in one piece
            read_at.append(step)
    decisions = [entry["step"] - 1 for entry in scheduler.history if "features" in entry]
    assert set(read_at) <= set(decisions)
    assert decisions == list(range(3, 30, 3))


def test_parameters_exchanged_after_the_scheduler_was_made_are_the_ones_that_count(moving_config: Config) -> None:
    """FSDP2 puts sharded parameters into the optimizer that was made with whole ones."""
    old, new = (torch.nn.Parameter(torch.full((4, 4), value)) for value in (1.0, 2.0))
    optimizer = torch.optim.SGD([old], lr=0.01)
    scheduler = ALRSScheduler(optimizer, 30, config=moving_config())
    optimizer.param_groups[0]["params"] = [new]
    for _ in range(6):
        loss = (new**2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.observe(loss=loss)
        scheduler.step()
    assert scheduler._parameters[0] is new
    assert float(scheduler._recorder.initial.square().sum()) == pytest.approx(64.0)
    assert any("features" in entry for entry in scheduler.history)


def test_parameters_may_move_to_their_device_after_the_scheduler_was_made(moving_config: Config) -> None:
    """A move leaves the parameters the same objects; `meta` stands in for a device that this machine may lack."""
    parameter = nn.Parameter(torch.ones(4, 4))
    optimizer = torch.optim.SGD([parameter], lr=0.01)
    scheduler = ALRSScheduler(optimizer, 30, config=moving_config())
    assert scheduler._recorder.device.type == "cpu"
    moved = nn.Parameter(torch.ones(4, 4, device="meta"))
    torch.utils.swap_tensors(parameter, moved)
    scheduler._find_parameters()
    assert scheduler._recorder.device.type == scheduler._recorder._scale.device.type == "meta"


# Mixed precision

SCALED = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "sgd_fused": lambda p: torch.optim.SGD(p, lr=0.05, fused=True),
}
# Of the steps of a scheduler that decides after steps 4, 7, 10, ...: one before a decision, and two at one
OVERFLOWS = (6, 11, 12)


def train_scaled(
    make: Callable[[Any], torch.optim.Optimizer],
    config: ALRSConfig,
    dtype: torch.dtype,
    overflows: tuple[int, ...],
    unscale: bool = False,
    discard: bool = True,
) -> tuple[ALRSScheduler, list[float], nn.Module]:
    """30 batches in mixed precision; at some of them the scaled gradients overflow. Returns the rates of real steps."""
    model = tiny_classifier(seed=2)
    optimizer = make(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=dtype == torch.float16)
    scheduler = ALRSScheduler(optimizer, 30, config=config, model=model)
    rates = []
    batches = [batch for _ in range(8) for batch in DataLoader(tiny_dataset(), batch_size=16)][:30]
    for i, batch in enumerate(batches):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = model(**batch)["loss"]
        scaler.scale(loss).backward()
        if i in overflows:
            model.first.weight.grad.view(-1)[0] = math.inf
        scheduler.observe(loss=loss.detach() * (math.inf if i in overflows else 1.0))
        if unscale:
            scaler.unscale_(optimizer)
        rate, weights = float(optimizer.param_groups[0]["lr"]), [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        if any(not torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True)):
            rates.append(rate)
        scheduler.step()
        if discard:
            scheduler.discard()
    scheduler.flush()
    return scheduler, rates, model


@pytest.mark.parametrize("discard", [False, True], ids=["kept", "discarded"])
@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "unscaled before"])
@pytest.mark.parametrize("name", list(SCALED))
@pytest.mark.reliability("fp16 with skipped steps (GradScaler): no advance, no trouble, features finite")
def test_a_step_that_the_scaler_skips_is_no_step(
    name: str, unscale: bool, discard: bool, moving_config: Config
) -> None:
    scheduler, rates, model = train_scaled(SCALED[name], moving_config(), torch.float16, OVERFLOWS, unscale, discard)
    history = scheduler.history
    assert len(history) == len(rates) == 30 - len(OVERFLOWS)
    assert [entry["learning_rate"] for entry in history] == pytest.approx(rates)
    decided = [entry for entry in history if "features" in entry]
    assert [entry["step"] for entry in decided] == list(range(4, 28, 3))
    assert all(abs(value) <= 4 for entry in decided for value in entry["features"].values())
    assert {entry["guard"] for entry in decided} <= {None, "bounds"}
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", list(SCALED))
@pytest.mark.reliability("fp16 features are those of fp32: gradients are read without the scaler's factor")
def test_features_do_not_depend_on_the_scale(name: str, moving_config: Config) -> None:
    scaled, _, _ = train_scaled(SCALED[name], moving_config(), torch.float16, ())
    plain, _, _ = train_scaled(SCALED[name], moving_config(), torch.float32, ())
    first, second = (next(entry["features"] for entry in s.history if "features" in entry) for s in (scaled, plain))
    for key, value in second.items():
        assert first[key] == pytest.approx(value, abs=0.1), key


@pytest.mark.parametrize("name", list(SCALED))
@pytest.mark.reliability("bf16 autocast: every step counts, features finite and near those of fp32")
def test_bf16(name: str, moving_config: Config) -> None:
    scheduler, rates, model = train_scaled(SCALED[name], moving_config(), torch.bfloat16, ())
    assert len(scheduler.history) == len(rates) == 30
    plain, _, _ = train_scaled(SCALED[name], moving_config(), torch.float32, ())
    first, second = (next(entry["features"] for entry in s.history if "features" in entry) for s in (scheduler, plain))
    for key, value in second.items():
        assert first[key] == pytest.approx(value, abs=0.25), key
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.reliability(
    "weights themselves in bf16 or fp16: features finite, gradients whose squares overflow included"
)
def test_weights_of_half_precision(dtype: torch.dtype, moving_config: Config) -> None:
    model = tiny_classifier(seed=2).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scheduler = ALRSScheduler(optimizer, 24, config=moving_config(max_lr=2e-3), model=model)
    for batch in [batch for _ in range(6) for batch in DataLoader(tiny_dataset(), batch_size=16)]:
        optimizer.zero_grad()
        loss = model(batch["x"].to(dtype), batch["labels"])["loss"]
        scheduler.observe(loss=loss)
        loss.backward()
        for p in model.parameters():
            p.grad.fill_(1000.0)  # its square is no number of fp16
        optimizer.step()
        scheduler.step()
    scheduler.flush()
    decided = [entry for entry in scheduler.history if "features" in entry]
    assert len(decided) == 7
    assert all(abs(value) <= 4 for entry in decided for value in entry["features"].values())
    assert {entry["guard"] for entry in decided} <= {None, "bounds", "spike"}
    assert {p.dtype for p in model.parameters()} == {dtype}


# accelerate


@pytest.fixture
def accelerator() -> Any:
    def make(**kwargs: Any) -> Accelerator:
        return Accelerator(cpu=True, **kwargs)

    yield make
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.mark.reliability("accelerate loop, scheduler prepared or not, with accumulation: one advance a step")
@pytest.mark.parametrize("prepare_scheduler", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_accelerate_loop(
    accelerator: Callable[..., Accelerator], moving_config: Config, prepare_scheduler: bool, accumulation: int
) -> None:
    accelerate = accelerator(gradient_accumulation_steps=accumulation)
    model = tiny_classifier(seed=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loader = DataLoader(tiny_dataset(), batch_size=16 // accumulation)
    used: list[float] = []
    optimizer.register_step_pre_hook(lambda o, *_: used.append(o.param_groups[0]["lr"]))
    alrs = get_scheduler("alrs", optimizer, 0, 20, {"config": moving_config()})
    scheduler: Any = alrs  # what `prepare` returns has no `observe`: the one from before it is fed
    model, optimizer, loader = accelerate.prepare(model, optimizer, loader)
    if prepare_scheduler:
        scheduler = accelerate.prepare(alrs)
    for _ in range(5):
        for batch in loader:
            with accelerate.accumulate(model):
                loss = model(**batch)["loss"]
                alrs.observe(loss=loss)
                accelerate.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    alrs.flush()
    rates = [entry["learning_rate"] for entry in alrs.history]
    assert len(rates) == 20
    assert rates == used
    assert {entry["phase"] for entry in alrs.history} == {"gather", "fit", "drive"}

    # the same without accelerate
    model = tiny_classifier(seed=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = get_scheduler("alrs", optimizer, 0, 20, {"config": moving_config()})
    for _ in range(5):
        for batch in DataLoader(tiny_dataset(), batch_size=16):
            loss = model(**batch)["loss"]
            scheduler.observe(loss=loss)
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    scheduler.flush()
    expected = [entry["learning_rate"] for entry in scheduler.history]
    assert rates == pytest.approx(expected, rel=1e-3)


def test_a_scheduler_made_after_prepare_sees_through_the_wrapper(
    accelerator: Callable[..., Accelerator], moving_config: Config
) -> None:
    accelerate = accelerator()
    model = tiny_classifier(seed=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerate.prepare(model, optimizer)
    scheduler = ALRSScheduler(optimizer, 20, config=moving_config())
    assert not scheduler.controller.adaptive
    for batch in DataLoader(tiny_dataset(), batch_size=16):
        loss = model(**batch)["loss"]
        scheduler.observe(loss=loss)
        accelerate.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    scheduler.flush()
    assert len(scheduler.history) == 4


# Checkpoints that cannot be used


@pytest.mark.reliability("state of another version, network or model: refused")
class GrowingBuffer(TinyClassifier):
    """Makes one buffer in its first forward pass and exchanges another one for a larger one, as caches are."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("made", None)
        self.register_buffer("grown", torch.zeros(1))

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        self.made, self.grown = torch.zeros(3), torch.zeros(len(x))
        return super().forward(x, labels)


def test_a_restart_leaves_buffers_alone_that_the_forward_pass_made(quiet: Config) -> None:
    model = GrowingBuffer()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    config = quiet(says=-3.0, max_restarts=1, restart_window=1.0)
    scheduler = ALRSScheduler(optimizer, T, config=config, model=model)
    train_classifier(model, optimizer, scheduler, 2 * K + 1)
    assert scheduler.last_decision.action == "restart"
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.reliability("a batch of NaN after layers have thawed: all weights go back, the thawed ones too")
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("in_optimizer", [False, True])
@pytest.mark.parametrize(
    "thaw", [None, 10, 21]
)  # 21: the last decision before the batch that is NaN has not seen them
def test_a_rollback_brings_back_layers_that_thawed(
    thaw: int | None, in_optimizer: bool, average: bool, quiet: Config
) -> None:
    model = tiny_classifier()
    model.first.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if in_optimizer or p.requires_grad], lr=0.01)
    config = quiet(rollback=True, average_weights=average)
    scheduler = ALRSScheduler(optimizer, 40, config=config, model=model)
    batch = next(iter(DataLoader(tiny_dataset(), batch_size=64)))
    for step in range(40):
        if step == thaw:
            model.first.requires_grad_(True)
            if not in_optimizer:
                optimizer.add_param_group({"params": list(model.first.parameters()), "lr": 0.01})
        optimizer.zero_grad()
        loss = model(**batch)["loss"] * (math.nan if step == 22 else 1)
        scheduler.observe(loss=loss)
        loss.backward()
        optimizer.step()
        scheduler.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert model(**batch)["loss"] < 1.1


@pytest.mark.parametrize("in_optimizer", [False, True])
def test_layers_may_thaw_before_a_restart(in_optimizer: bool, quiet: Config) -> None:
    model = tiny_classifier(batch_norm=True)
    model.first.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if in_optimizer or p.requires_grad], lr=0.05)
    config = quiet(says=-3.0, max_restarts=1, restart_window=1.0)
    scheduler = ALRSScheduler(optimizer, T, config=config, model=model)
    train_classifier(model, optimizer, scheduler, 2)
    model.first.requires_grad_(True)
    if not in_optimizer:
        optimizer.add_param_group({"params": list(model.first.parameters()), "lr": 0.05})
    before = [p.detach().clone() for p in model.first.parameters()]
    train_classifier(model, optimizer, scheduler, 2 * K - 1)
    assert scheduler.last_decision.action == "restart"
    assert all(torch.equal(a, b) for a, b in zip(before, model.first.parameters(), strict=True))


class StateFromTheStart(torch.optim.SGD):
    """As Adagrad of torch 2.6: its state is made with it, and looked up at every step."""

    def __init__(self, params: Any, lr: float):
        super().__init__(params, lr=lr)
        for p in self.param_groups[0]["params"]:
            self.state[p]["sum"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p]["sum"] += p.grad.square()
            p -= self.param_groups[0]["lr"] * p.grad


def test_a_restart_brings_back_the_state_that_the_optimizer_began_with(quiet: Config) -> None:
    model = tiny_classifier()
    optimizer = StateFromTheStart(model.parameters(), lr=0.05)
    config = quiet(says=-3.0, max_restarts=1, restart_window=1.0)
    scheduler = ALRSScheduler(optimizer, T, config=config, model=model)
    train_classifier(model, optimizer, scheduler, 2 * K + 1)
    assert scheduler.last_decision.action == "restart"
    assert all(bool((optimizer.state[p]["sum"] == 0).all()) for p in model.parameters())


def test_lists_in_the_state_of_an_optimizer_are_copied_and_brought_back() -> None:
    model = Line()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, X)
        loss.backward()
        return loss

    optimizer.step(closure)
    scheduler = ALRSScheduler(optimizer, T)
    kept = scheduler._keep(None)
    (state,) = (values for values in optimizer.state.values() if values)
    before = [t.clone() for t in state["old_dirs"]]
    for _ in range(3):
        optimizer.step(closure)
    assert len(state["old_dirs"]) > len(before)
    for _ in range(2):  # what was brought back once is not what is trained on
        scheduler._load(kept)
        (state,) = (values for values in optimizer.state.values() if values)
        assert all(map(torch.equal, state["old_dirs"], before)) and len(state["old_dirs"]) == len(before)
        optimizer.step(closure)


class Quantised(TinyClassifier):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(100, 100, dtype=torch.int32))
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("count", torch.tensor(0))


def test_quantised_weights_are_not_copied(quiet: Config) -> None:
    model = Quantised()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scheduler = ALRSScheduler(optimizer, T, config=quiet(max_restarts=1), model=model)
    assert scheduler._buffer_names == ["scale", "count"] and len(scheduler._initial_buffers) == 2
    without = ALRSScheduler(optimizer, T, config=quiet(max_restarts=0), model=model)
    assert without._initial_buffers == []


def test_a_restart_resets_what_the_optimizer_counts_in_its_groups(quiet: Config) -> None:
    model = tiny_classifier()
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.05)
    optimizer.train()
    config = quiet(says=-3.0, max_restarts=1, restart_window=1.0)
    scheduler = ALRSScheduler(optimizer, T, config=config, model=model)
    train_classifier(model, optimizer, scheduler, 2 * K + 1)
    assert scheduler.last_decision.action == "restart"
    (group,) = optimizer.param_groups
    assert (group["k"], group["weight_sum"], group["lr_max"]) == (0, 0.0, -1.0)
    assert group["lr"] == pytest.approx(0.05 * math.exp(-3) * (1 - 9 / T), rel=1e-4)


def test_step_counters_go_where_the_optimizer_has_them() -> None:
    with FakeTensorMode():
        parameter = nn.Parameter(torch.empty(3, 4, device="cuda:0"))
        step, beside = torch.tensor(1.0), torch.tensor(1.0, device="cuda:0")
        assert _cloned_beside(step, parameter, {"fused": True}).device.type == "cuda"
        assert _cloned_beside(step, parameter, {"capturable": True}).device.type == "cuda"
        assert _cloned_beside(step, parameter, {"fused": None}).device.type == "cpu"
        assert _cloned_beside(beside, parameter, {}).device.type == "cuda"
        state = {"a": [beside, {"b": parameter.detach()}], "c": 3}
        moved = _moved(state, torch.device("cpu"), scalars=True)
        assert moved["a"][0].device.type == moved["a"][1]["b"].device.type == "cpu" and moved["c"] == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_micro_batches_of_half_precision_are_added_in_single(dtype: torch.dtype, quiet: Config) -> None:
    scheduler = ALRSScheduler(sgd(), T, config=quiet())
    losses = [torch.tensor(1.0 + i / 256, dtype=dtype) for i in range(64)]
    for loss in losses:
        scheduler.observe(loss=loss)
    assert float(scheduler._loss) == pytest.approx(sum(map(float, losses)), rel=1e-6)


@pytest.mark.parametrize("tensors", ["neither", "both", "total", "loss"])
@pytest.mark.parametrize(
    ("losses", "mean"),
    [
        ([1.0, 2.0, 6.0], 3.0),
        ([1.0, math.inf, 3.0], 2.0),
        ([math.nan, 4.0], 4.0),
        ([math.inf, math.nan, 5.0, 7.0], 6.0),
        ([math.inf, math.nan], None),
    ],
)
def test_the_mean_of_micro_batches_is_that_of_the_finite_ones(
    losses: list[float], mean: float | None, tensors: str, quiet: Config
) -> None:
    scheduler = ALRSScheduler(sgd(), T, config=quiet())
    for place, loss in enumerate(losses):
        as_tensor = tensors == "both" or tensors == ("loss" if place else "total")
        scheduler.observe(loss=torch.tensor(loss) if as_tensor else loss)
    scheduler._inner.step()
    scheduler.step()
    scheduler.flush()
    (entry,) = scheduler.history
    assert not math.isfinite(entry["loss"]) if mean is None else entry["loss"] == pytest.approx(mean)


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation as the common implementation has it: its own `step` need not be called."""

    def __init__(self, params: Any, lr: float):
        super().__init__(params, {"lr": lr})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=lr)
        self.param_groups = self.base_optimizer.param_groups

    def second_step(self) -> None:
        self.base_optimizer.step()


@pytest.mark.parametrize("average", [False, True])
def test_an_optimizer_around_another_is_driven_by_the_inner_ones_steps(average: bool, quiet: Config) -> None:
    model = Line()
    optimizer = SAM(model.parameters(), 0.1)
    scheduler = ALRSScheduler(optimizer, T, config=quiet(average_weights=average))
    for _ in range(T):
        optimizer.zero_grad()
        loss_of(model, X).backward()
        optimizer.second_step()
        scheduler.step()
    assert scheduler.last_epoch == T and hasattr(optimizer, "eval") == average
    scheduler.close()
    assert not hasattr(optimizer, "eval") and not hasattr(optimizer.base_optimizer, "eval")


class OwnAdam(torch.optim.Adam):
    fails = False

    def step(self, closure: Any = None) -> Any:
        if self.fails:
            raise RuntimeError("no step")
        return super().step(closure)


def test_a_step_within_the_step_of_a_subclass_is_not_another(quiet: Config) -> None:
    torch.optim.Adam([nn.Parameter(torch.zeros(1))])  # from here on torch calls hooks around Adam's own step too
    model = Line()
    optimizer = OwnAdam(model.parameters(), 0.1)
    scheduler = ALRSScheduler(optimizer, T, config=quiet())
    train(model, optimizer, scheduler, 5)
    assert scheduler.last_epoch == 5
    optimizer.fails = True
    with pytest.raises(RuntimeError):
        optimizer.step()
    optimizer.fails = False
    scheduler.step()
    train(model, optimizer, scheduler, 5)
    scheduler.flush()
    assert scheduler.last_epoch == len(scheduler.history) == 11  # the failed one was begun


def test_steps_that_are_never_seen_are_told_once(caplog: pytest.LogCaptureFixture, quiet: Config) -> None:
    scheduler = ALRSScheduler(sgd(), T, config=quiet())
    for _ in range(300):
        scheduler.step()
    assert [record.message for record in caplog.records if "SGD has made no step" in record.message] != []
    assert len(caplog.records) == 1


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), torch.optim.AdamW])
def test_after_the_last_step_nothing_moves(
    make: Callable[[Any], torch.optim.Optimizer], average: bool, caplog: pytest.LogCaptureFixture, quiet: Config
) -> None:
    model = Line()
    optimizer = make(model.parameters())
    scheduler = ALRSScheduler(optimizer, T, config=quiet(average_weights=average, min_lr=1e-3))
    rates = train(model, optimizer, scheduler, T)
    end = [p.detach().clone() for p in model.parameters()]
    assert rates[-1] > 0 and scheduler.get_last_lr() == [0.0] and not caplog.records
    train(model, optimizer, scheduler, 10)
    assert all(map(torch.equal, model.parameters(), end))
    assert [f"num_training_steps={T} are over" in record.message for record in caplog.records] == [True]


def test_an_optimizer_without_a_rate_is_refused(quiet: Config) -> None:
    optimizer = transformers.Adafactor(tiny_classifier().parameters())
    with pytest.raises(InputError, match=r"lr=None.*Adafactor"):
        ALRSScheduler(optimizer, T, config=quiet())


def test_states_that_do_not_fit_are_refused(quiet: Config, network_folder: Callable[..., str]) -> None:
    def make(model: nn.Module, **changed: Any) -> ALRSScheduler:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = ALRSScheduler(optimizer, T, config=quiet(**changed))
        sum(p.square().sum() for p in model.parameters()).backward()
        optimizer.step()
        scheduler.step()
        return scheduler

    state = make(tiny_classifier()).state_dict()
    linear = get_scheduler("linear", sgd(), 0, 10).state_dict()
    with pytest.raises(InputError, match="not written by ALRS"):
        make(tiny_classifier()).load_state_dict(linear)
    for key in ("alrs_state_version", "feature_version"):
        with pytest.raises(InputError, match="version"):
            make(tiny_classifier()).load_state_dict(state | {key: 99})
    with pytest.raises(InputError, match="more parameters than this optimizer's 2"):
        make(Line()).load_state_dict(state)
    with pytest.raises(InputError, match="other parameters"):
        make(TinyClassifier(num_inputs=7)).load_state_dict(state)
    with pytest.raises(InputError, match="another shape"):
        other = network_folder(scratch_network(hidden_sizes=(16,)), "other")
        make(tiny_classifier(), network=other).load_state_dict(state)
    make(TinyClassifier()).load_state_dict(state)


# After the last step


@pytest.mark.parametrize("what", ["another scheduler", "alrs again", "other weights"])
def test_what_comes_after_the_last_step_finds_the_weights_as_they_are(network_folder: Any, what: str) -> None:
    """The finished scheduler's hooks are on the optimizer still; its raw weights are gone for good."""
    config = ALRSConfig(**quiet_settings(K) | {"network": network_folder(network_saying(0.0))})
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    first = ALRSScheduler(optimizer, T, config=config, model=model)
    train(model, optimizer, first, T)
    if what == "other weights":
        model.load_state_dict({"a": torch.tensor(7.0), "b": torch.tensor(8.0)})
    left = [p.detach().clone() for p in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = 1e-12
    if what == "alrs again":
        ALRSScheduler(optimizer, T, config=config, model=model)
        assert first._closed
    loss_of(model, X).backward()
    optimizer.step()
    for got, expected in zip(model.parameters(), left, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


# Buffers


class LineWithBuffers(Line):
    """With a mask's infinities, a view that shows one number three times, and a sparse matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))
        self.register_buffer("shown", torch.ones(1).expand(3))
        self.register_buffer("count", torch.zeros(2))
        self.register_buffer("edges", torch.eye(3).to_sparse_csr())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return super().forward(x)


def test_a_rollback_does_not_mind_the_infinities_of_a_mask(quiet: Config) -> None:
    model = LineWithBuffers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scheduler = ALRSScheduler(optimizer, T, config=quiet(rollback=True, max_restarts=0), model=model)
    train(model, optimizer, scheduler, 3 * K)
    with torch.no_grad():
        model.a.fill_(math.nan)
    train(model, optimizer, scheduler, 2 * K)
    assert all(p.isfinite() for p in model.parameters())


@pytest.mark.parametrize("saved_at_the_start", [False, True])
def test_a_restart_brings_back_buffers(quiet: Config, saved_at_the_start: bool) -> None:
    model = LineWithBuffers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scheduler = ALRSScheduler(optimizer, T, config=quiet(max_restarts=1), model=model)
    if saved_at_the_start:
        scheduler.load_state_dict(scheduler.state_dict())
    train(model, optimizer, scheduler, 2)
    with torch.no_grad():
        model.a.fill_(math.nan)
    train(model, optimizer, scheduler, K - 1)
    assert scheduler.controller.restarts == 1
    assert model.count.tolist() == [0.0, 0.0]
    assert model.a.item() == 0.0


class CountsFromItsFirstStep(torch.optim.SGD):
    """Has its step counter in the groups, from the first step on."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
        return super().step(closure)


def test_a_restart_takes_away_counters_that_began_with_the_first_step(quiet: Config) -> None:
    model = tiny_classifier()
    optimizer = CountsFromItsFirstStep(model.parameters(), lr=0.05)
    scheduler = ALRSScheduler(optimizer, T, config=quiet(says=-3.0, max_restarts=1, restart_window=1.0), model=model)
    train_classifier(model, optimizer, scheduler, 2 * K + 1)
    assert scheduler.last_decision.action == "restart"
    assert "step" not in optimizer.param_groups[0]


def test_a_rate_that_is_a_tensor_belongs_to_one_group(quiet: Config) -> None:
    model = Line()
    optimizer = torch.optim.Adam([model.a], torch.tensor(0.01))
    scheduler = ALRSScheduler(optimizer, T, config=quiet(says=1.0))
    train(model, optimizer, scheduler, 3 * K)
    optimizer.add_param_group({"params": [model.b]})
    train(model, optimizer, scheduler, 1)
    first, second = (float(group["lr"]) for group in optimizer.param_groups)
    assert first > 0.02 and second == first == pytest.approx(scheduler.get_last_lr()[1])
    assert [float(group["initial_lr"]) for group in optimizer.param_groups] == pytest.approx([0.01, 0.01])


@pytest.mark.parametrize("way", [copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))], ids=["copy", "pickle"])
def test_a_copy_of_a_run_goes_on_as_the_run(way: Callable[[Any], Any], quiet: Config) -> None:
    model = Line()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    scheduler = ALRSScheduler(optimizer, T, config=quiet(says=0.3, average_weights=True), model=model)
    train(model, optimizer, scheduler, 10)
    other = way((model, optimizer, scheduler))
    for each in ((model, optimizer, scheduler), other):
        each[1].train()
        train(*each, T - 10)
    assert other[2].last_epoch == T and other[1].param_groups[0]["lr"] == 0
    assert (other[0].a, other[0].b) == (model.a, model.b) and model.a != 0


def test_a_resumed_run_that_has_nothing_to_go_back_to_is_not_restarted(quiet: Config) -> None:
    def begin(max_restarts: int) -> tuple[nn.Module, torch.optim.Optimizer, ALRSScheduler]:
        model = tiny_classifier()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        config = quiet(says=-3.0, max_restarts=max_restarts, restart_window=1.0)
        return model, optimizer, ALRSScheduler(optimizer, T, config=config, model=model)

    model, optimizer, scheduler = begin(0)
    train_classifier(model, optimizer, scheduler, K)
    state = scheduler.state_dict()
    model, optimizer, scheduler = begin(1)
    scheduler.load_state_dict(state)
    train_classifier(model, optimizer, scheduler, K + 1)
    assert scheduler.last_decision.log_multiplier == pytest.approx(-3.0)
    assert scheduler.last_decision.action != "restart"


def test_numbers_of_numpy_are_numbers_of_a_checkpoint(quiet: Config) -> None:
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = ALRSScheduler(optimizer, T, config=quiet())
    loss_of(model, X).backward()
    optimizer.step()
    scheduler.observe(loss=np.float32(0.5), grad_norm=np.float64(2.0))
    scheduler.step()
    file = io.BytesIO()
    torch.save(scheduler.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["pending"][0][2:] == [0.5, 2.0]


def test_what_a_closure_raises_does_not_hide_the_next_step(quiet: Config) -> None:
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = ALRSScheduler(optimizer, T, config=quiet())

    def out_of_memory() -> torch.Tensor:
        raise MemoryError

    for closure in (out_of_memory, lambda: loss_of(model, X)):
        with contextlib.suppress(MemoryError):
            optimizer.step(closure)
            scheduler.step()
    assert scheduler.last_epoch == 1


class TakesALoss(torch.optim.SGD):
    def step(self, loss: Any = None) -> None:
        self.seen = loss
        super().step()


def test_what_is_no_closure_reaches_the_optimizer(quiet: Config) -> None:
    model = Line()
    optimizer = TakesALoss(model.parameters(), lr=0.1)
    scheduler = ALRSScheduler(optimizer, T, config=quiet())
    loss = loss_of(model, X)
    loss.backward()
    optimizer.step(loss)
    scheduler.step()
    assert optimizer.seen is loss and scheduler.last_epoch == 1


def test_several_optimizer_steps_for_a_call_leave_the_average_its_own(quiet: Config) -> None:
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = ALRSScheduler(optimizer, 512, config=quiet(average_weights=True), model=model)  # due at every fourth
    for _ in range(8):
        loss_of(model, X).backward()
        optimizer.step()
        optimizer.step()
        scheduler.step()
    assert scheduler.state_dict()["average"]["num_updates"] == 4


class Counting(torch.optim.SGD):
    """Counts its steps for all parameters together, as some optimizers do."""

    def step(self, closure: Any = None) -> Any:
        self.state["k"] = self.state.get("k", 0) + 1
        return super().step(closure)


def test_a_rollback_brings_back_what_an_optimizer_keeps_for_all_parameters(quiet: Config) -> None:
    model = Line()
    optimizer = Counting(model.parameters(), lr=0.01)
    scheduler = ALRSScheduler(optimizer, 100, config=quiet(rollback=True), model=model)
    counts = []
    for step in range(60):
        optimizer.zero_grad()
        loss = loss_of(model, X) * (math.nan if step == 41 else 1.0)
        scheduler.observe(loss=loss)
        loss.backward()
        optimizer.step()
        scheduler.step()
        counts.append(optimizer.state["k"])
    scheduler.flush()
    (back,) = [entry["step"] for entry in scheduler.drain_history() if entry.get("action") == "rollback"]
    assert counts[back - 2] == back - 1
    assert counts[back - 1] <= 41, "that of the last good moment"
    assert counts[-1] == counts[back - 1] + 60 - back


def test_wrappers_that_are_no_optimizers_are_seen_through() -> None:
    inner = torch.optim.Adam(Line().parameters())

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer, name: str):
            setattr(self, name, optimizer)

    assert all(unwrapped_optimizer(Wrapper(inner, name)) is inner for name in ("original_optimizer", "optim"))


def test_a_state_stays_as_it_was_taken(quiet: Config) -> None:
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scheduler = ALRSScheduler(optimizer, T, config=quiet(average_weights=True), model=model)
    train(model, optimizer, scheduler, 20)
    kept = scheduler.state_dict()["average"]["average"]
    before = [average.clone() for average in kept]
    train(model, optimizer, scheduler, 10)
    assert all(map(torch.equal, kept, before))


def test_names_of_a_compiled_model_are_those_of_the_plain_one() -> None:
    names = ("_orig_mod.net.1.running_mean", "module.net.1.running_mean", "net.1.running_mean")
    assert {_plain(name) for name in names} == {"net.1.running_mean"}


def test_state_of_a_run_with_other_weights_is_cast_beside_them() -> None:
    parameter = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    moment, counter = torch.ones(3), torch.tensor(5.0)
    assert _cloned_beside(moment, parameter, {}).dtype == torch.float32, (
        "as optimizers that keep it in single precision"
    )
    assert _cloned_beside(moment, parameter, {}, cast=True).dtype == torch.bfloat16
    assert _cloned_beside(counter, parameter, {}, cast=True).dtype == torch.float32


@pytest.mark.parametrize("number", [float(T), np.int64(T), np.ceil(T - 0.5)])
def test_whole_numbers_of_other_types_count_steps(number: Any, quiet: Config, tmp_path: Path) -> None:
    """As they come from divisions, and from NumPy; a checkpoint is plain numbers all the same."""
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = ALRSScheduler(optimizer, number, np.int64(3), config=quiet(), steps_per_epoch=np.float64(10))
    train(model, optimizer, scheduler, T // 2)
    torch.save(scheduler.state_dict(), tmp_path / "scheduler.pt")
    other = Line()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    resumed = ALRSScheduler(optimizer, T, 3, config=quiet(), steps_per_epoch=10)
    resumed.load_state_dict(torch.load(tmp_path / "scheduler.pt", weights_only=True))
    assert len(train(other, optimizer, resumed, T - T // 2)) == T - T // 2
    assert optimizer.param_groups[0]["lr"] == 0.0
