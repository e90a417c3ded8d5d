"""Averaging of the weights: the law by hand, its place in a run, and what Trainer evaluates, saves and leaves."""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import TinyClassifier, network_saying, quiet_settings, tiny_classifier, tiny_dataset
from safetensors.torch import load_file
from test_scheduler import Line, X, loss_of, train
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_alrs import ALRSCallback, ALRSConfig, ALRSScheduler, ALRSTrainer, averaging, callback
from hf_alrs.averaging import (
    GAMMA,
    LONG_SHARES,
    RAW_WEIGHTS,
    WeightAverage,
    choice_size,
    choose,
    update_interval,
    update_share,
)
from hf_alrs.callback import _config_of_run


T, K = 40, 4
Config = Callable[..., ALRSConfig]
Weights = list[torch.Tensor]


@pytest.fixture
def quiet(network_folder: Callable[..., str]) -> Config:
    """A network that always says the same and is never trained; weights are averaged."""

    def make(says: float = 0.0, **changed: Any) -> ALRSConfig:
        return ALRSConfig(**(quiet_settings(K) | {"network": network_folder(network_saying(says))} | changed))

    return make


def take(average: WeightAverage, step: int) -> None:
    if average.is_due(step):
        average.update()


def averaged(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """The average of successive weights as the formula has it: the k-th (from 0) comes in with 17 / (17 + k)."""
    mean = torch.zeros_like(weights[0])
    for k, w in enumerate(weights):
        mean = mean + 17 / (17 + k) * (w - mean)
    return mean


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def shown(scheduler: ALRSScheduler, model: nn.Module) -> torch.Tensor:
    """The averaged weights as they are in the model on request; the raw ones are back afterwards, to the last bit."""
    raw = flat(model)
    scheduler.show_average()
    result = flat(model)
    scheduler.hide_average()
    assert torch.equal(flat(model), raw)
    return result


# The average itself


def test_two_parameters_by_hand() -> None:
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    average = WeightAverage([first, second], None, 10)
    for step, (a, b) in enumerate([(1.0, 10.0), (2.0, 0.0), (4.0, -10.0)]):
        first.data.fill_(a)
        second.data.fill_(b)
        take(average, step)
    average.show()
    # 1, then 1 + 17/18 = 35/18, then 35/18 + 17/19 (4 - 35/18); and 10, 10/18, 10/18 - 17/19 (10 + 10/18)
    assert first.item() == pytest.approx(35 / 18 + 17 / 19 * (4 - 35 / 18))
    assert second.item() == pytest.approx(10 / 18 - 17 / 19 * (10 + 10 / 18))


def test_the_shares_make_weights_count_as_a_power_of_their_number() -> None:
    """The k-th of n weights counts in proportion to k (k + 1) ... (k + 15), which is k^16 for large k."""
    n = 200
    counts = []
    for k in range(n):
        counts = [count * (1 - update_share(k)) for count in counts] + [update_share(k)]
    assert sum(counts) == pytest.approx(1.0)
    rising = [math.prod((k + 1 + i) / n for i in range(GAMMA)) for k in range(n)]
    for k in (50, 120, 170, n - 1):
        assert counts[k] / counts[150] == pytest.approx(rising[k] / rising[150], rel=1e-9)
    assert sum(counts[-n // 17 :]) > 0.6, "about the last seventeenth is what counts"


@pytest.mark.parametrize(
    ("num_training_steps", "interval"),
    [(1, 1), (127, 1), (128, 1), (129, 2), (256, 2), (257, 3), (1280, 10), (100_000, 782)],
)
def test_updates_come_at_intervals(num_training_steps: int, interval: int) -> None:
    assert update_interval(num_training_steps) == interval
    weight = nn.Parameter(torch.zeros(1))
    average = WeightAverage([weight], None, num_training_steps)
    seen = []
    for step in range(3 * interval):
        weight.data.fill_(step + 1.0)
        take(average, step)
        if (step + 1) % interval == 0:
            seen.append(torch.tensor([step + 1.0]))
        average.show()
        expected = averaged(seen) if seen else weight.detach().clone()  # nothing is shown before there is an average
        torch.testing.assert_close(weight.detach(), expected)
        average.hide()
        assert weight.item() == step + 1


def test_the_long_average_by_hand() -> None:
    weights = torch.tensor([6.0, -6.0])
    average = WeightAverage([weights], None, 3, keep_long=True)
    for value in (6.0, 12.0, 0.0):
        weights[0] = value
        average.update()
    # 6; 6 + 2/3 (12 - 6) = 10; 10 + 2/4 (0 - 10) = 5. The short one: 6; 6 + 17/18 6 = 11 2/3; that, less 17/19 of it
    short, long = (6 + 17 / 18 * 6) * (1 - 17 / 19), 5.0
    assert average.has_choice
    for share in LONG_SHARES:
        average.long_share = share
        assert average.show()
        assert not average.show(), "it is there already"
        expected = 0.0 if share == RAW_WEIGHTS else (1 - share) * short + share * long
        assert weights.tolist() == pytest.approx([expected, -6.0])
    average.hide()
    assert weights.tolist() == [0.0, -6.0]
    average.reset()
    assert (average.has_choice, average.long_share) == (False, 0.0)


@pytest.mark.parametrize("best", LONG_SHARES)
def test_the_loss_of_a_held_out_part_chooses_the_average(best: float, quiet: Config) -> None:
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scheduler = ALRSScheduler(optimizer, T, config=quiet(), model=model, can_choose=True)
    assert scheduler.choose_average(lambda: 0.0) is None, "there is no average before the first step"
    train(model, optimizer, scheduler, T - 1)
    trained = flat(model)
    shown: dict[float, torch.Tensor] = {}
    for share in LONG_SHARES:
        with scheduler.showing(share):
            shown[share] = flat(model)
    assert len({tuple(weights.tolist()) for weights in shown.values()}) == len(LONG_SHARES)
    assert torch.equal(shown[RAW_WEIGHTS], trained)

    chosen = scheduler.choose_average(lambda: float((flat(model) - shown[best]).norm()))
    assert chosen == scheduler.long_share == best
    assert torch.equal(flat(model), shown[best])
    scheduler.hide_average()
    assert torch.equal(flat(model), trained), "training goes on from the trained weights"
    optimizer.eval()
    assert torch.equal(flat(model), shown[best]), "the choice stays until the next one"

    kept = io.BytesIO()
    torch.save(scheduler.state_dict(), kept)
    kept.seek(0)
    other = Line()
    other_optimizer = torch.optim.SGD(other.parameters(), lr=0.05)
    other_optimizer.load_state_dict(optimizer.state_dict())
    resumed = ALRSScheduler(other_optimizer, T, config=quiet(), model=other, can_choose=True)
    resumed.load_state_dict(torch.load(kept, weights_only=True))
    assert torch.equal(flat(other), trained)
    resumed.show_average()
    assert torch.equal(flat(other), shown[best])

    resumed.close()
    without = ALRSScheduler(other_optimizer, T, config=quiet(), model=other)
    kept.seek(0)
    without.load_state_dict(torch.load(kept, weights_only=True))
    without.show_average()
    assert torch.equal(flat(other), shown[0.0]), "the one average of a run that cannot choose"


def test_losses_that_are_not_finite_choose_nothing(quiet: Config) -> None:
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scheduler = ALRSScheduler(optimizer, T, config=quiet(), model=model, can_choose=True)
    train(model, optimizer, scheduler, 20)
    losses = iter([math.nan, 3.0, math.inf, math.nan, math.inf, *[math.nan] * 5])
    assert scheduler.choose_average(lambda: next(losses)) == 0.5
    assert scheduler.choose_average(lambda: next(losses)) == 0.0, "the short one, when none can be told apart"


def test_others_than_the_short_average_must_be_better_by_half_the_error_by_hand() -> None:
    first = np.array([1.0, 2.0, 1.0, 2.0])
    # Differences -1, 0, -1, 0: mean -0.5, deviation sqrt(1 / 3), error 0.2887, score -0.3557. Of the second one 2, -3, 2, -3:
    # mean -0.5 as well, error 1.4434, score 0.2217
    better = first - np.array([1.0, 0.0, 1.0, 0.0])
    unsure = first + np.array([2.0, -3.0, 2.0, -3.0])
    assert choose(np.stack([first, better])) == 1
    assert choose(np.stack([first, unsure])) == 0
    assert choose(np.stack([first, unsure, better])) == 2
    assert choose(np.stack([first, better, first - 0.35])) == 1
    assert choose(np.stack([first, better, first - 0.36])) == 2, "without an error"
    assert choose(np.stack([first, first])) == 0, "the first among equals"
    # One part has no error: the least loss
    assert choose(np.array([[1.0], [0.9], [0.95]])) == 1
    members = np.stack([np.stack([first, better]), np.stack([first, unsure])], -1)
    assert choose(members).tolist() == [1, 0]
    broken = np.array([math.inf, 2.0, 1.0, 2.0])
    assert choose(np.stack([broken, first + 9, unsure])) == 2, "anything finite is better, by its mean"
    assert choose(np.stack([first, broken, better * math.nan])) == 0
    unlabelled = np.full((2, 1), math.nan)
    assert choose(np.concatenate([np.stack([first, better]), unlabelled], 1)) == 1, "a part without a loss of any"
    assert choose(np.full((3, 4), math.nan)) == 0


@pytest.mark.parametrize(("can_choose", "changed"), [(False, {}), (True, {"choose_average": False})])
def test_a_second_average_is_kept_for_a_choice_alone(can_choose: bool, changed: dict[str, Any], quiet: Config) -> None:
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scheduler = ALRSScheduler(optimizer, T, config=quiet(**changed), model=model, can_choose=can_choose)
    train(model, optimizer, scheduler, 20)
    assert scheduler.long_share is None
    assert scheduler.choose_average(lambda: pytest.fail("nothing to choose from")) is None
    assert scheduler.state_dict()["average"]["long"] is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_hiding_brings_the_raw_weights_back_to_the_last_bit(dtype: torch.dtype) -> None:
    model = tiny_classifier(batch_norm=True).to(dtype)
    average = WeightAverage(list(model.parameters()), model, 10)
    with torch.no_grad():
        for step in range(5):
            for value in (*model.parameters(), model.norm.running_mean, model.norm.running_var):
                value.add_(torch.randn(value.shape).to(dtype))
            take(average, step)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    average.show()
    average.show()  # showing twice keeps the raw weights
    assert average.in_model
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert sorted(changed) == sorted(name for name in before if name != "norm.num_batches_tracked")
    average.hide()
    average.hide()
    assert not average.in_model
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_averaged_in_single(dtype: torch.dtype) -> None:
    step_up = torch.finfo(dtype).eps  # the next number after 1: nothing of this type lies in between
    weight = nn.Parameter(torch.ones(2, dtype=dtype))
    average = WeightAverage([weight], None, 10)
    for step, value in enumerate((1.0, 1.0 + step_up, 1.0)):
        weight.data.fill_(value)
        take(average, step)
    (kept,) = average.state_dict()["average"]
    assert kept.dtype == torch.float32
    assert kept.tolist() == pytest.approx([1 + step_up * 17 / 18 * (1 - 17 / 19)] * 2, abs=1e-3 * step_up)
    assert kept[0] > 1
    average.show()
    assert weight.dtype == dtype


def test_weights_of_several_types_are_averaged_together() -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    weights = [nn.Parameter(torch.zeros(2, dtype=dtype)) for dtype in dtypes]
    average = WeightAverage(weights, None, 10)
    values = [1.0, 2.0, 4.0]
    for step, value in enumerate(values):
        for weight in weights:
            weight.data.fill_(value)
        take(average, step)
    average.show()
    expected = averaged([torch.tensor([v]) for v in values]).item()
    for weight, tolerance in zip(weights, (1e-6, 1e-2, 1e-12), strict=True):
        assert weight.tolist() == pytest.approx([expected] * 2, rel=max(tolerance, 1e-7))
    assert [weight.dtype for weight in weights] == list(dtypes)


def test_statistics_of_batch_norm_are_averaged_and_counters_are_not() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))
    average = WeightAverage(list(model.parameters()), model, 10)
    means, variances = [], []
    for step in range(4):
        model(torch.randn(8, 2) + step)
        take(average, step)
        means.append(model[1].running_mean.clone())
        variances.append(model[1].running_var.clone())
    average.show()
    torch.testing.assert_close(model[1].running_mean, averaged(means))
    torch.testing.assert_close(model[1].running_var, averaged(variances))
    assert int(model[1].num_batches_tracked) == 4
    average.hide()
    assert torch.equal(model[1].running_mean, means[-1])


def test_buffers_that_a_move_exchanged_are_the_ones_that_count() -> None:
    """A model that goes to its device after the scheduler was made has other buffers there."""
    model = tiny_classifier(batch_norm=True)
    average = WeightAverage(list(model.parameters()), model, 10)
    model.double()
    model.float()
    means = []
    for step in range(3):
        model(torch.randn(8, 6) + step)
        take(average, step)
        means.append(model.norm.running_mean.clone())
    average.show()
    torch.testing.assert_close(model.norm.running_mean, averaged(means))


# Its place in a run


def loop(
    model: Line, optimizer: torch.optim.Optimizer, scheduler: ALRSScheduler, num_steps: int, nan_at: int | None = None
) -> Weights:
    """A plain loop; returns the weights after each optimizer step, before anything goes back."""
    trained: Weights = []
    hook = optimizer.register_step_post_hook(lambda *_: trained.append(flat(model)))
    for step in range(num_steps):
        optimizer.zero_grad()
        loss = loss_of(model, X)
        loss.backward()
        scheduler.observe(loss=loss * (math.nan if step == nan_at else 1.0))
        optimizer.step()
        scheduler.step()
        scheduler.step()  # as accelerate does: one step of the optimizer counts once
    hook.remove()
    return trained


def test_a_plain_loop_ends_with_the_averaged_weights(quiet: Config) -> None:
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = ALRSScheduler(optimizer, T, config=quiet())
    trained = loop(model, optimizer, scheduler, T - 1)
    assert torch.equal(flat(model), trained[-1]), "the raw weights are in the model while it trains"
    torch.testing.assert_close(shown(scheduler, model), averaged(trained))
    trained += loop(model, optimizer, scheduler, 1)
    assert not torch.equal(flat(model), trained[-1])
    torch.testing.assert_close(flat(model), averaged(trained))
    left = flat(model)
    scheduler.close()
    assert torch.equal(flat(model), left), "closing leaves the model as it is"


def test_averaging_changes_nothing_of_the_training(moving_config: Config) -> None:
    """Without averaging and with the same decay and momentum, rates and raw weights are the same to the last bit."""
    runs = []
    for average_weights in (True, False):
        model = Line()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        config = moving_config(
            average_weights=average_weights, final_lr_ratio=0.3, max_beta1=1.0, max_restarts=2, rollback=True
        )
        scheduler = ALRSScheduler(optimizer, T, config=config)
        trained = loop(model, optimizer, scheduler, T, nan_at=20)
        runs.append((trained, scheduler.history))
    assert all(torch.equal(x, y) for x, y in zip(runs[0][0], runs[1][0], strict=True))
    assert str(runs[0][1]) == str(runs[1][1])


def test_an_evaluation_in_a_loop_of_ones_own(quiet: Config) -> None:
    """`optimizer.eval()` and `optimizer.train()` around it, and the run goes on as if there had been none."""
    ends = []
    for evaluated in (False, True):
        model = Line()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scheduler = ALRSScheduler(optimizer, T, config=quiet())
        trained: Weights = []
        for _ in range(T):
            train(model, optimizer, scheduler, 1)
            if len(trained) < T - 1:
                trained.append(flat(model))
            if evaluated and len(trained) < T - 1:
                optimizer.eval()
                torch.testing.assert_close(flat(model), averaged(trained))
                optimizer.train()
        ends.append((flat(model), scheduler.history))
    assert torch.equal(ends[0][0], ends[1][0])
    assert str(ends[0][1]) == str(ends[1][1])


def test_a_forgotten_train_does_not_cost_the_raw_weights(quiet: Config) -> None:
    """The optimizer moves the raw weights, whatever is in the model when it is called."""
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0625)
    scheduler = ALRSScheduler(optimizer, T, config=quiet())
    raw = loop(model, optimizer, scheduler, 3)[-1]
    optimizer.eval()
    assert not torch.equal(flat(model), raw)
    optimizer.zero_grad()
    model.a.grad, model.b.grad = torch.tensor(1.0), torch.tensor(-2.0)
    rate = optimizer.param_groups[0]["lr"]
    optimizer.step()
    torch.testing.assert_close(flat(model), raw - rate * torch.tensor([1.0, -2.0]))


def test_a_restart_begins_the_average_anew(quiet: Config) -> None:
    model = Line(a=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = ALRSScheduler(optimizer, T, config=quiet(says=-3.0, max_restarts=1, restart_window=1.0))
    initial = flat(model)
    loop(model, optimizer, scheduler, 2 * K + 1)
    assert scheduler.last_decision.action == "restart"
    assert torch.equal(flat(model), initial)
    assert torch.equal(shown(scheduler, model), initial), "nothing of before is left"
    since = [initial, *loop(model, optimizer, scheduler, 6)]
    torch.testing.assert_close(shown(scheduler, model), averaged(since))


def test_trouble_begins_the_average_anew(quiet: Config) -> None:
    """A loss that is no number at step 9, noticed at the decision after step 12; the weights stay."""
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = ALRSScheduler(optimizer, T, config=quiet())
    trained = loop(model, optimizer, scheduler, 12, nan_at=9)
    torch.testing.assert_close(shown(scheduler, model), averaged(trained))
    since = loop(model, optimizer, scheduler, 1)
    assert scheduler.last_decision.guard == "non_finite"
    assert torch.equal(shown(scheduler, model), since[0])
    since += loop(model, optimizer, scheduler, 5)
    torch.testing.assert_close(shown(scheduler, model), averaged(since))


def test_weights_that_are_lost_for_a_while_leave_no_trace_in_the_average(quiet: Config) -> None:
    """Weights that are not finite come into the average, and go out of it with the restart."""
    model = Line(a=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = ALRSScheduler(optimizer, T, config=quiet(max_restarts=1, restart_window=1.0))
    loop(model, optimizer, scheduler, K)
    model.a.data.fill_(math.nan)
    loop(model, optimizer, scheduler, K)
    assert scheduler.last_decision.action == "restart"
    assert shown(scheduler, model).isfinite().all()
    loop(model, optimizer, scheduler, T - 2 * K)
    assert flat(model).isfinite().all()


def test_a_rollback_brings_the_average_back(quiet: Config) -> None:
    """Good at the decision after step 8, trouble at 9, noticed after 12: the average goes on from step 8."""
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = ALRSScheduler(optimizer, T, config=quiet(rollback=True))
    trained = loop(model, optimizer, scheduler, 2 * K + 1)
    assert scheduler.last_decision.good
    loop(model, optimizer, scheduler, K, nan_at=0)
    assert scheduler.last_decision.action == "rollback"
    assert torch.equal(flat(model), trained[-1])
    torch.testing.assert_close(shown(scheduler, model), averaged(trained))
    trained += loop(model, optimizer, scheduler, 7)
    torch.testing.assert_close(shown(scheduler, model), averaged(trained))


def test_probes_are_not_averaged() -> None:
    model = Line()
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
    scheduler = ALRSScheduler(optimizer, 80, config=config)
    counted: Weights = []
    probing = 0
    for step in range(79):
        train(model, optimizer, scheduler, 1)
        if scheduler.controller.probing:
            probing += 1
        else:
            counted.append(flat(model))
        if counted:
            torch.testing.assert_close(shown(scheduler, model), averaged(counted), msg=f"after step {step}")
    assert probing == 3 * 8
    assert len(counted) == 79 - 24


def test_nothing_that_is_not_trained_is_averaged(quiet: Config) -> None:
    """Groups of rate 0 and parameters without gradients stay as they are and cost no copy."""
    trained, still, frozen = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    frozen.requires_grad_(False)
    optimizer = torch.optim.SGD(
        [{"params": [trained, frozen], "lr": 0.1}, {"params": [still], "lr": 0.0}], weight_decay=0.1
    )
    scheduler = ALRSScheduler(optimizer, 10, config=quiet())
    seen: Weights = []
    for _ in range(10):
        optimizer.zero_grad()
        (trained.square() + still.square()).sum().backward()
        optimizer.step()
        seen.append(trained.detach().clone())
        scheduler.step()
    torch.testing.assert_close(trained.detach(), averaged(seen))
    assert torch.equal(still, torch.ones(3)) and torch.equal(frozen, torch.ones(3))
    assert len(scheduler.state_dict()["average"]["raw"]) == 1


def test_without_averaging_there_is_nothing_to_show(quiet: Config) -> None:
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = ALRSScheduler(optimizer, T, config=quiet(average_weights=False))
    assert not hasattr(optimizer, "eval") and not hasattr(optimizer, "train")
    trained = loop(model, optimizer, scheduler, T)
    assert torch.equal(shown(scheduler, model), trained[-1])
    assert scheduler.state_dict()["average"] is None


# The optimizer's methods


def test_the_methods_come_with_the_scheduler_and_go_with_it(quiet: Config) -> None:
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert not hasattr(optimizer, "eval")
    scheduler = ALRSScheduler(optimizer, T, config=quiet())
    loop(model, optimizer, scheduler, 5)
    raw = flat(model)
    optimizer.eval()
    assert not torch.equal(flat(model), raw)
    optimizer.train()
    assert torch.equal(flat(model), raw)
    scheduler.close()
    assert not hasattr(optimizer, "eval") and not hasattr(optimizer, "train")
    scheduler.show_average()
    scheduler.close()
    assert torch.equal(flat(model), raw)


def test_accelerates_wrapper_passes_them_on(quiet: Config) -> None:
    model = Line()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        optimizer = Accelerator(cpu=True).prepare(inner)
        scheduler = ALRSScheduler(optimizer, T, config=quiet())
        trained = loop(model, inner, scheduler, 5)
        optimizer.eval()
        torch.testing.assert_close(flat(model), averaged(trained))
        optimizer.train()
        assert torch.equal(flat(model), trained[-1])
    finally:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


def test_schedule_free_keeps_its_own(quiet: Config) -> None:
    schedulefree = pytest.importorskip("schedulefree")
    model = tiny_classifier()
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.01)
    own = optimizer.eval.__func__, optimizer.train.__func__
    optimizer.train()
    scheduler = ALRSScheduler(optimizer, 8, config=quiet())
    assert not scheduler.config.average_weights
    assert scheduler.config.final_ratio(1000) == 0.0
    for batch in DataLoader(tiny_dataset(), batch_size=8):
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()
        scheduler.step()
    assert (optimizer.eval.__func__, optimizer.train.__func__) == own
    assert scheduler.state_dict()["average"] is None
    scheduler.close()
    assert (optimizer.eval.__func__, optimizer.train.__func__) == own
    optimizer.eval()


def test_a_second_scheduler_on_the_same_optimizer_takes_over(quiet: Config) -> None:
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = ALRSScheduler(optimizer, T, config=quiet())
    loop(model, optimizer, first, 6)
    second = ALRSScheduler(optimizer, T, config=quiet())
    assert second.config.average_weights
    first.close()  # which must not take the second one's methods
    trained = loop(model, optimizer, second, 6)
    optimizer.eval()
    torch.testing.assert_close(flat(model), averaged(trained))
    optimizer.train()
    second.close()
    assert not hasattr(optimizer, "eval")


# Checkpoints of plain loops


def classifier_loop(
    config: ALRSConfig, dtype: torch.dtype, num_steps: int, save_at: int, save_shown: bool, resume: bytes | None = None
) -> tuple[dict[str, torch.Tensor], bytes | None]:
    """A loop over a model with batch-norm; returns what it ends with, and the file of a checkpoint on the way."""
    model = tiny_classifier(batch_norm=True).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = ALRSScheduler(optimizer, num_steps, config=config, model=model)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    first, saved = 0, None
    if resume is not None:
        state = torch.load(io.BytesIO(resume), weights_only=True)
        first = save_at
        for name, part in parts.items():
            part.load_state_dict(state[name])
    batches = [batch for _ in range(8) for batch in DataLoader(tiny_dataset(), batch_size=16)]
    for step in range(first, num_steps):
        optimizer.zero_grad()
        loss = model(batches[step]["x"].to(dtype), batches[step]["labels"])["loss"]
        scheduler.observe(loss=loss)
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step + 1 == save_at and resume is None:
            if save_shown:
                optimizer.eval()
            buffer = io.BytesIO()
            torch.save({name: part.state_dict() for name, part in parts.items()}, buffer)
            saved = buffer.getvalue()
            optimizer.train()
    ended = {name: value.clone() for name, value in model.state_dict().items()}
    scheduler.hide_average()
    return ended | {f"raw {name}": value for name, value in model.state_dict().items()}, saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("save_shown", [False, True], ids=["raw in the model", "average in the model"])
@pytest.mark.parametrize("save_at", [3, 8, 19])
@pytest.mark.reliability("resume of a bare loop with averaged weights, saved in either mode: bit-identical")
def test_a_resumed_loop_has_the_same_average(
    save_at: int, save_shown: bool, dtype: torch.dtype, moving_config: Config
) -> None:
    config = moving_config()
    expected, saved = classifier_loop(config, dtype, 20, save_at, save_shown)
    got, _ = classifier_loop(config, dtype, 20, save_at, save_shown, resume=saved)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
    assert any(not torch.equal(got[n], got[f"raw {n}"]) for n in got if f"raw {n}" in got)


def test_the_state_has_the_average_and_the_raw_weights_that_are_not_in_the_model(quiet: Config) -> None:
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = ALRSScheduler(optimizer, T, config=quiet())
    trained = loop(model, optimizer, scheduler, 6)
    state = scheduler.state_dict()["average"]
    assert state["num_updates"] == 6
    assert state["raw"] is None
    torch.testing.assert_close(torch.stack(state["average"]), averaged(trained))
    optimizer.eval()
    state = scheduler.state_dict()["average"]
    torch.testing.assert_close(torch.stack(state["average"]), averaged(trained))
    assert torch.equal(torch.stack(state["raw"]), trained[-1])


def test_a_state_may_be_loaded_twice(quiet: Config) -> None:
    """As Trainer does that tries again with a smaller batch, without loading the model again."""
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = ALRSScheduler(optimizer, T, config=quiet())
    trained = loop(model, optimizer, scheduler, 6)
    optimizer.eval()
    state = copy.deepcopy(scheduler.state_dict())
    for _ in range(2):
        scheduler = ALRSScheduler(torch.optim.SGD(model.parameters(), lr=0.1), T, config=quiet())
        scheduler.load_state_dict(copy.deepcopy(state))
        assert torch.equal(flat(model), trained[-1])
        torch.testing.assert_close(shown(scheduler, model), averaged(trained))


def test_a_finished_state_leaves_the_average_in_the_model(quiet: Config) -> None:
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = ALRSScheduler(optimizer, T, config=quiet())
    trained = loop(model, optimizer, scheduler, T)
    again = Line()
    resumed = ALRSScheduler(torch.optim.SGD(again.parameters(), lr=0.1), T, config=quiet())
    resumed.load_state_dict(scheduler.state_dict())
    torch.testing.assert_close(flat(again), averaged(trained))


def test_an_evaluation_between_the_two_steps_changes_nothing(quiet: Config) -> None:
    """Not even where the schedule's step takes the run back to its initial weights."""
    ends = []
    for between in (False, True):
        model = Line()
        start = flat(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        # A fall by more than 1 at the first decision is a restart
        scheduler = ALRSScheduler(optimizer, T, config=quiet(says=-2.0, max_restarts=1, restart_window=1.0))
        restarts = 0
        for _ in range(T - 4):
            optimizer.zero_grad()
            loss = loss_of(model, X)
            loss.backward()
            scheduler.observe(loss=loss)
            optimizer.step()
            if between:
                optimizer.eval()
            scheduler.step()
            if scheduler.history and scheduler.history[-1].get("action") == "restart":
                restarts += 1
                assert torch.equal(flat(model), start)
            scheduler.drain_history()
            optimizer.train()
        assert restarts == 1
        ends.append((flat(model), shown(scheduler, model)))
    assert torch.equal(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])


def test_layers_that_thaw_are_averaged_with_the_others(quiet: Config) -> None:
    model, late = Line(), nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = ALRSScheduler(optimizer, T, config=quiet())
    loop(model, optimizer, scheduler, 6)
    optimizer.add_param_group({"params": [late], "lr": 0.1})
    values, weights = [], []
    for _ in range(4):  # the first of them begins the average anew
        optimizer.zero_grad()
        (loss_of(model, X) - late.sum()).backward()
        optimizer.step()
        scheduler.step()
        values.append(late.detach().clone())
        weights.append(flat(model))
    optimizer.eval()
    torch.testing.assert_close(late.detach(), averaged(values))
    torch.testing.assert_close(flat(model), averaged(weights))


@pytest.mark.parametrize("in_optimizer", [False, True])
def test_a_run_in_which_layers_thawed_is_resumed_exactly(in_optimizer: bool, quiet: Config) -> None:
    def begin(thawed: bool) -> tuple[Line, nn.Parameter, torch.optim.Optimizer, ALRSScheduler]:
        model, late = Line(), nn.Parameter(torch.zeros(2), requires_grad=thawed)
        optimizer = torch.optim.SGD([*model.parameters(), late] if in_optimizer else model.parameters(), lr=0.1)
        if thawed and not in_optimizer:
            optimizer.add_param_group({"params": [late], "lr": 0.05})
        return model, late, optimizer, ALRSScheduler(optimizer, T, config=quiet(says=0.3))

    def go(
        model: Line, late: nn.Parameter, optimizer: torch.optim.Optimizer, scheduler: ALRSScheduler, n: int
    ) -> None:
        for _ in range(n):
            optimizer.zero_grad()
            loss = loss_of(model, X) - 0.1 * late.sum()
            scheduler.observe(loss=loss)
            loss.backward()
            optimizer.step()
            scheduler.step()

    model, late, optimizer, scheduler = begin(False)
    go(model, late, optimizer, scheduler, 6)
    late.requires_grad_(True)
    if not in_optimizer:
        optimizer.add_param_group({"params": [late], "lr": 0.05})
    go(model, late, optimizer, scheduler, 10)
    kept = io.BytesIO()
    torch.save([model.state_dict(), late.detach(), optimizer.state_dict(), scheduler.state_dict()], kept)
    go(model, late, optimizer, scheduler, T - 16)

    kept.seek(0)
    weights, value, state, own = torch.load(kept, weights_only=True)
    again, late_again, optimizer, resumed = begin(True)
    again.load_state_dict(weights)
    late_again.data.copy_(value)
    optimizer.load_state_dict(state)
    resumed.load_state_dict(own)
    go(again, late_again, optimizer, resumed, T - 16)
    assert resumed.get_last_lr() == scheduler.get_last_lr()
    assert torch.equal(flat(again), flat(model))
    assert torch.equal(late_again, late)


def test_a_loss_in_memory_that_is_written_again_is_read_as_it_was(quiet: Config) -> None:
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = ALRSScheduler(optimizer, T, config=quiet())
    buffer, losses = torch.zeros(()), []
    for _ in range(T):
        optimizer.zero_grad()
        loss = loss_of(model, X)
        loss.backward()
        losses.append(loss.item())
        buffer.copy_(loss.detach())
        scheduler.observe(loss=buffer)
        optimizer.step()
        scheduler.step()
    scheduler.flush()
    assert [entry["loss"] for entry in scheduler.history] == pytest.approx(losses)


@pytest.mark.parametrize("then", [False, True], ids=["turned off", "turned on"])
def test_averaging_may_be_changed_on_resume(then: bool, quiet: Config) -> None:
    """The raw weights are trained on in either case, also those of a file that holds the average."""
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = ALRSScheduler(optimizer, T, config=quiet(average_weights=not then))
    raw = loop(model, optimizer, scheduler, 6)[-1]
    scheduler.show_average()
    again = Line()
    again.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(again.parameters(), lr=0.1)
    resumed = ALRSScheduler(optimizer, T, config=quiet(average_weights=then))
    resumed.load_state_dict(scheduler.state_dict())
    assert torch.equal(flat(again), raw)
    trained = loop(again, optimizer, resumed, 3)
    expected = averaged(trained) if then else trained[-1]
    torch.testing.assert_close(shown(resumed, again), expected)


# Trainer

NUM_STEPS = 24
routes = pytest.mark.parametrize("route", ["callback", "trainer"])


class Watched(TinyClassifier):
    """Keeps the weights that each forward pass was made with, by mode, and those after each optimizer step."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        if self.training or not self.norm.training:  # and not where batch-norm's statistics are taken
            (self.in_training if self.training else self.in_evaluation).append(flat(self))
        return super().forward(x, labels)


def watched() -> Watched:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Watched(batch_norm=True)
    model.in_training, model.in_evaluation, model.trained = [], [], []
    return model


class Watch(TrainerCallback):
    """Lets the model keep its weights after each optimizer step."""

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        inner = getattr(optimizer, "optimizer", optimizer)
        inner.register_step_post_hook(lambda *_: model.trained.append(flat(model)))


class StopAt(TrainerCallback):
    """Ends the training early, as early stopping does."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = control.should_training_stop or state.global_step == self.step


def arguments(output_dir: Path, **changed: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(output_dir),
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
        "learning_rate": 0.02,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return TrainingArguments(**(defaults | changed))


def make_trainer(
    route: str, args: TrainingArguments, config: ALRSConfig, callbacks: Sequence[TrainerCallback] = ()
) -> Trainer:
    set_seed(3)
    kwargs: dict[str, Any] = {
        "model": watched(),
        "args": args,
        "train_dataset": tiny_dataset(),
        "eval_dataset": tiny_dataset(16, seed=9),
        "callbacks": [Watch(), *callbacks],
    }
    if route == "callback":
        kwargs["callbacks"].insert(0, ALRSCallback(config))
        return Trainer(**kwargs)
    return ALRSTrainer(alrs_config=config, **kwargs)


def saved_weights(checkpoint: Path, model: nn.Module) -> torch.Tensor:
    """The parameters of a checkpoint's model file, in the order of the model's."""
    stored = load_file(checkpoint / "model.safetensors")
    return torch.cat([stored[name].flatten() for name, _ in model.named_parameters()])


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@routes
def test_evaluations_see_the_average_and_training_the_raw_weights(
    route: str, tmp_path: Path, moving_config: Config
) -> None:
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=5, save_strategy="steps", save_steps=4)
    trainer = make_trainer(route, args, moving_config())
    model = trainer.model
    trainer.train()
    trained = model.trained
    assert len(trained) == len(model.in_training) == NUM_STEPS
    for before, after in zip(model.in_training[1:], trained[:-1], strict=True):
        assert torch.equal(before, after)
    assert len(model.in_evaluation) == 5
    for seen, step in zip(model.in_evaluation, (5, 10, 15, 20, NUM_STEPS), strict=True):
        torch.testing.assert_close(seen, averaged(trained[:step]))
        assert not torch.equal(seen, trained[step - 1])
    for step in range(4, NUM_STEPS + 1, 4):  # with an evaluation, without one, and at the end
        torch.testing.assert_close(saved_weights(tmp_path / f"checkpoint-{step}", model), averaged(trained[:step]))
    torch.testing.assert_close(flat(model), averaged(trained))
    assert not model.in_training[-1].equal(flat(model))
    left = tensors_of(model)
    trainer.evaluate()
    trainer.save_model(str(tmp_path / "final"))
    assert torch.equal(model.in_evaluation[-1], flat(model))
    assert_equal(tensors_of(model), left)
    assert torch.equal(saved_weights(tmp_path / "final", model), flat(model))


@routes
@pytest.mark.reliability("evaluations and checkpoints every few steps: raw and averaged weights bit-identical")
def test_evaluating_and_saving_change_nothing(route: str, tmp_path: Path, moving_config: Config) -> None:
    runs = []
    for name, changed in {
        "plain": {},
        "both": {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 3},
        "epochs": {"eval_strategy": "epoch", "save_strategy": "epoch"},
    }.items():
        trainer = make_trainer(route, arguments(tmp_path / name, **changed), moving_config(max_restarts=2))
        trainer.train()
        runs.append((trainer.model.trained, tensors_of(trainer.model)))
    for trained, left in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(trained, runs[0][0], strict=True))
        assert_equal(left, runs[0][1])


@routes
@pytest.mark.parametrize("strategy", ["steps", "best"])
@pytest.mark.reliability(
    "resume with averaged weights, from checkpoints with and without an evaluation: bit-identical"
)
def test_a_resumed_run_is_the_uninterrupted_one(
    route: str, strategy: str, tmp_path: Path, moving_config: Config
) -> None:
    def make(folder: str) -> Trainer:
        changed = {"save_steps": 2} if strategy == "steps" else {"metric_for_best_model": "loss"}
        args = arguments(tmp_path / folder, save_strategy=strategy, eval_strategy="steps", eval_steps=4, **changed)
        return make_trainer(route, args, moving_config())

    whole = make("whole")
    whole.train()
    steps = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "whole").glob("checkpoint-*"))
    assert len(steps) >= 3
    # without an evaluation and with one, or the first and the last best one before the end
    chosen = (10, 16) if strategy == "steps" else (steps[0], [s for s in steps if s < NUM_STEPS][-1])
    for step in chosen:
        path = tmp_path / "whole" / f"checkpoint-{step}"
        torch.testing.assert_close(saved_weights(path, whole.model), averaged(whole.model.trained[:step]))
        resumed = make(f"resumed-{step}")
        resumed.train(resume_from_checkpoint=str(path))
        assert len(resumed.model.trained) == NUM_STEPS - step
        for got, expected in zip(resumed.model.trained, whole.model.trained[step:], strict=True):
            assert torch.equal(got, expected)
        assert_equal(tensors_of(resumed.model), tensors_of(whole.model))


class SaveAt(TrainerCallback):
    """Asks for a checkpoint after all other callbacks had their turn."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_save or state.global_step == self.step


@routes
def test_a_checkpoint_that_nobody_foresaw_resumes_too(route: str, tmp_path: Path, moving_config: Config) -> None:
    whole = make_trainer(route, arguments(tmp_path / "whole"), moving_config(), [SaveAt(9)])
    whole.train()
    resumed = make_trainer(route, arguments(tmp_path / "resumed"), moving_config())
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-9"))
    for got, expected in zip(resumed.model.trained, whole.model.trained[9:], strict=True):
        assert torch.equal(got, expected)
    assert_equal(tensors_of(resumed.model), tensors_of(whole.model))


@routes
def test_the_best_checkpoint_is_what_is_left(route: str, tmp_path: Path, moving_config: Config) -> None:
    """With `load_best_model_at_end` neither the average nor the raw weights of the end come over it."""
    args = arguments(
        tmp_path,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=4,
        save_steps=4,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # so that the best one is not the last one
    )
    trainer = make_trainer(route, args, moving_config())
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != f"checkpoint-{NUM_STEPS}"
    stored = load_file(best / "model.safetensors")
    assert_equal(tensors_of(trainer.model), {name: stored[name] for name in trainer.model.state_dict()})
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == trainer.state.best_metric
    assert_equal(tensors_of(trainer.model), {name: stored[name] for name in trainer.model.state_dict()})
    trainer.predict(tiny_dataset(16, seed=9))
    assert_equal(tensors_of(trainer.model), {name: stored[name] for name in trainer.model.state_dict()})


@routes
@pytest.mark.parametrize("evaluated", [False, True])
def test_a_run_that_is_stopped_leaves_the_average(
    route: str, evaluated: bool, tmp_path: Path, moving_config: Config
) -> None:
    changed = {"eval_strategy": "steps", "eval_steps": 5} if evaluated else {}
    trainer = make_trainer(route, arguments(tmp_path, **changed), moving_config(), [StopAt(10)])
    trainer.train()
    assert trainer.state.global_step == 10
    torch.testing.assert_close(flat(trainer.model), averaged(trainer.model.trained))
    left = flat(trainer.model)
    trainer.evaluate()
    assert torch.equal(flat(trainer.model), left)


@routes
def test_a_second_training_averages_anew(route: str, tmp_path: Path, moving_config: Config) -> None:
    """It goes on from the averaged weights that the first one left, with an average of its own."""
    trainer = make_trainer(route, arguments(tmp_path), moving_config())
    model = trainer.model
    trainer.train()
    left = flat(model)
    model.trained.clear()
    model.in_training.clear()
    trainer.train()
    assert torch.equal(model.in_training[0], left)
    # Both runs' hooks may be on the same optimizer.
    trained = model.trained[:: len(model.trained) // NUM_STEPS]
    torch.testing.assert_close(flat(model), averaged(trained))


def test_the_controllers_evaluations_see_the_average(tmp_path: Path, moving_config: Config) -> None:
    set_seed(3)
    trainer = ALRSTrainer(
        model=watched(),
        args=arguments(tmp_path),
        train_dataset=tiny_dataset(),
        eval_dataset={"controller": tiny_dataset(16, seed=9)},
        alrs_config=moving_config(controller_evaluations=4, choose_average=False),
        callbacks=[Watch()],
    )
    model = trainer.model
    trainer.train()
    for seen, step in zip(model.in_evaluation, (6, 12, 18), strict=True):
        torch.testing.assert_close(seen, averaged(model.trained[:step]))
    for before, after in zip(model.in_training[1:], model.trained[:-1], strict=True):
        assert torch.equal(before, after)


class Choosing(ALRSTrainer):
    """Keeps what each choice is made from."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.tried: list[tuple[int, torch.Tensor, list[float]]] = []

    def _choice_losses(self, size: int) -> list[float]:
        losses = super()._choice_losses(size)
        self.tried.append((self.state.global_step, flat(self.model), losses))
        return losses


def choosing(tmp_path: Path, config: ALRSConfig, batch_norm: bool = False, **options: Any) -> Choosing:
    set_seed(3)
    torch.manual_seed(3)
    return Choosing(
        model=tiny_classifier(batch_norm=batch_norm),
        args=arguments(tmp_path, **options),
        train_dataset=tiny_dataset(),
        eval_dataset={"controller": tiny_dataset(96, seed=9), "held_out": tiny_dataset(16, seed=10)},
        alrs_config=config,
    )


@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_controllers_split_chooses_what_is_evaluated_saved_and_left(
    batch_norm: bool, tmp_path: Path, moving_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callback, "_CHOICES_SHARE", math.inf)
    monkeypatch.setattr(averaging, "_CHOICE_SAMPLES", (96, 96))
    options = {
        "eval_strategy": "steps",
        "eval_steps": 10,
        "save_strategy": "steps",
        "save_steps": 16,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "batch_norm": batch_norm,
    }
    trainer = choosing(tmp_path / "whole", moving_config(), **options)
    trainer.train()
    last = trainer.state.max_steps
    steps = [step for step, _, _ in trainer.tried]
    assert steps == sorted([*range(10, last, 10), *range(16, last, 16), last] * len(LONG_SHARES)), (
        "each where it is looked at"
    )
    of_step = {step: [(losses, w) for at, w, losses in trainer.tried if at == step] for step in steps}
    assert all(len({tuple(losses) for losses, _ in tried}) == len(LONG_SHARES) for tried in of_step.values())
    assert {len(losses) for _, _, losses in trainer.tried} == {averaging.CHOICE_PARTS}

    def chosen(step: int) -> tuple[list[float], torch.Tensor]:
        return of_step[step][choose(np.array([losses for losses, _ in of_step[step]]))]

    assert torch.equal(flat(trainer.model), chosen(last)[1])
    assert torch.equal(saved_weights(tmp_path / "whole" / "checkpoint-16", trainer.model), chosen(16)[1])
    told = {e["step"]: e["eval_controller_loss"] for e in trainer.state.log_history if "eval_controller_loss" in e}
    for step in () if batch_norm else range(10, last, 10):  # the whole split, which is smaller than the sample
        assert told[step] == pytest.approx(np.mean(chosen(step)[0]), rel=1e-5)
    shares = [e["alrs/long_share"] for e in trainer.state.log_history if "alrs/long_share" in e]
    assert shares and set(shares) <= set(LONG_SHARES)

    resumed = choosing(tmp_path / "resumed", moving_config(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-16"))
    assert_equal(tensors_of(resumed.model), tensors_of(trainer.model))
    again = choosing(tmp_path / "whole", moving_config(), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{last // 16 * 16}"))
    assert_equal(tensors_of(again.model), tensors_of(trainer.model))


def test_choices_before_the_last_one_cost_a_share_of_the_run_at_most(
    tmp_path: Path, quiet: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 5}
    monkeypatch.setattr(callback, "_CHOICES_SHARE", 0.084)
    # A twelfth of what 10 steps of 8 are trained on is one choice by 4 examples (five passes, each a third of training on
    # them), of 20 steps two of them
    for size, steps in ((4, [10, 20, 24]), (8, [20, 24]), (64, [24])):
        monkeypatch.setattr(averaging, "_CHOICE_SAMPLES", (size, 256))
        trainer = choosing(tmp_path / str(size), quiet(), **options)
        trainer.train()
        assert [step for step, _, _ in trainer.tried] == sorted(steps * len(LONG_SHARES))


def test_what_a_choice_costs(tmp_path: Path, quiet: Config) -> None:
    """By the shipped shares: a hundredth of 9,600 examples is one choice by 50; batch-norm takes 128 more for each."""
    options = {"eval_strategy": "steps", "eval_steps": 300, "max_steps": 600, "per_device_train_batch_size": 32}
    for name, size, batch_norm, steps in (("plain", 50, False, [300, 600]), ("norm", 50, True, [600])):
        trainer = choosing(tmp_path / name, quiet(), batch_norm=batch_norm, **options)
        trainer.eval_dataset["controller"] = tiny_dataset(size, seed=9)
        trainer.train()
        assert [step for step, _, _ in trainer.tried] == sorted(steps * len(LONG_SHARES))


@pytest.mark.parametrize("split", ["empty", "no labels"])
def test_a_split_that_gives_no_loss_chooses_nothing(
    split: str, tmp_path: Path, quiet: Config, caplog: pytest.LogCaptureFixture
) -> None:
    examples = [{"x": example["x"]} for example in tiny_dataset(16, seed=9)]
    left = []
    for on in (True, False):
        trainer = choosing(tmp_path / str(on), quiet(choose_average=on))
        trainer.eval_dataset["controller"] = [] if split == "empty" else examples
        with caplog.at_level("WARNING"):
            trainer.train()
        left.append(flat(trainer.model))
    assert torch.equal(*left)
    assert ("gives no loss on the controller's split" in caplog.text) == (split == "no labels")


def test_how_many_examples_choose_the_average() -> None:
    # Half a hundredth of what is trained on, from 128 to 256
    sizes = {36 * 64: 128, 12_800: 128, 25_600: 128, 32_000: 160, 51_200: 256, 10**9: 256}
    assert {trained: choice_size(trained) for trained in sizes} == sizes


@pytest.mark.parametrize(
    ("size", "batch_size", "parts"),
    [(100, 8, [8] * 12), (100, 64, [12] * 8), (17, 8, [2] * 8), (5, 8, [2] * 2), (5, 1, [1] * 5)],
)
def test_a_choice_looks_at_equal_parts(
    size: int, batch_size: int, parts: list[int], tmp_path: Path, quiet: Config
) -> None:
    trainer = choosing(tmp_path, quiet(controller_evaluations=4), per_device_eval_batch_size=batch_size)
    trainer.eval_dataset["controller"] = tiny_dataset(size, seed=9)
    seen: list[int] = []
    hook = trainer.model.register_forward_pre_hook(
        lambda model, args, kwargs: None if model.training else seen.append(len(kwargs["x"])), with_kwargs=True
    )
    trainer.train()
    hook.remove()
    assert seen[-len(parts) * len(LONG_SHARES) :] == parts * len(LONG_SHARES)
    assert seen[0] == min(size, batch_size), "other evaluations keep their batches"
    assert trainer.args.per_device_eval_batch_size == batch_size
    assert [len(losses) for _, _, losses in trainer.tried] == [len(parts)] * len(LONG_SHARES)
    # Those of the weights that are left
    losses = next(losses for _, shown, losses in trainer.tried if torch.equal(shown, flat(trainer.model)))
    sample = trainer._controller_sample(sum(parts))
    batch = {name: torch.stack([torch.as_tensor(example[name]) for example in sample]) for name in sample[0]}
    with torch.no_grad():
        trainer.model.eval()
        expected = [
            float(trainer.model(**{name: value[i : i + parts[0]] for name, value in batch.items()})["loss"])
            for i in range(0, sum(parts), parts[0])
        ]
    assert losses == pytest.approx(expected, rel=1e-5)


def test_what_is_chosen_between_is_compared_on_the_same_batches(tmp_path: Path, quiet: Config) -> None:
    """Batches of like lengths, which Trainer draws anew for each evaluation, would differ."""

    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 1)
            self.seen: list[tuple[int, ...]] = []

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            if not self.training:
                self.seen.append(tuple(labels.tolist()))
            return {"loss": (self.embedding(input_ids).mean() - labels.float().mean()).square()}

    examples = [{"input_ids": [1] * (1 + i % 7), "labels": i} for i in range(32)]
    trainer = Choosing(
        model=Text(),
        args=arguments(tmp_path, train_sampling_strategy="group_by_length", per_device_eval_batch_size=4),
        train_dataset=examples,
        eval_dataset={"controller": examples},
        data_collator=lambda batch: {
            "input_ids": nn.utils.rnn.pad_sequence([torch.tensor(e["input_ids"]) for e in batch], batch_first=True),
            "labels": torch.tensor([e["labels"] for e in batch]),
        },
        alrs_config=quiet(),
    )
    trainer.train()
    assert len(trainer.tried) == len(LONG_SHARES)
    seen = trainer.model.seen[-8 * len(LONG_SHARES) :]
    first, *others = (seen[i : i + 8] for i in range(0, len(seen), 8))
    assert sorted(label for batch in first for label in batch) == list(range(32))
    assert all(other == first for other in others)


def test_a_trainers_own_losses_choose_and_an_error_leaves_nothing_behind(tmp_path: Path, quiet: Config) -> None:
    class Doubled(Choosing):
        def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step < 0:
                raise OSError("no more data")
            loss, logits, labels = super().prediction_step(*args, **kwargs)
            return loss * 0 + 7.0, logits, labels

    trainer = Doubled(
        model=tiny_classifier(),
        args=arguments(tmp_path, per_device_eval_batch_size=64),
        train_dataset=tiny_dataset(),
        eval_dataset={"controller": tiny_dataset(96, seed=9)},
        alrs_config=quiet(),
    )
    trainer.train()
    assert [losses for _, _, losses in trainer.tried] == [[7.0] * averaging.CHOICE_PARTS] * len(LONG_SHARES)
    assert "prediction_step" not in trainer.__dict__
    trainer.state.global_step = -1
    with pytest.raises(OSError, match="no more data"):
        trainer._choice_losses(96)
    assert "prediction_step" not in trainer.__dict__
    assert (trainer.args.per_device_eval_batch_size, trainer._keeps_order) == (64, False)


@pytest.mark.parametrize(
    "kind", [list, torch.tensor, lambda parts: torch.tensor(parts, dtype=torch.bfloat16)[0], np.array]
)
def test_losses_of_a_loop_may_come_in_any_form(kind: Callable[[list[float]], Any], quiet: Config) -> None:
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scheduler = ALRSScheduler(optimizer, T, config=quiet(), model=model, can_choose=True)
    train(model, optimizer, scheduler, 20)
    losses = iter([[5.0, 5.0], [3.0, 3.0], [4.0, 4.0], [5.0, 5.0], [6.0, 6.0]])
    assert scheduler.choose_average(lambda: kind(next(losses))) == 0.5


def test_choosing_the_average_changes_nothing_of_the_training(tmp_path: Path, quiet: Config) -> None:
    rates = []
    for on in (True, False):
        trainer = choosing(tmp_path / str(on), quiet(choose_average=on))
        trainer.train()
        lines = (tmp_path / str(on) / "alrs_history.jsonl").read_text().splitlines()
        rates.append([(entry["learning_rate"], entry["loss"]) for entry in map(json.loads, lines)])
        assert len(trainer.tried) == (len(LONG_SHARES) if on else 0)
    assert rates[0] == rates[1]


@routes
def test_weights_of_half_precision_resume_exactly(route: str, tmp_path: Path, moving_config: Config) -> None:
    """The model file rounds the average; what is not rounded is in the scheduler's state."""

    class Half(Watched):
        def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
            return super().forward(x.to(torch.bfloat16), labels)

    def make(folder: str) -> Trainer:
        trainer = make_trainer(route, arguments(tmp_path / folder, **saves), moving_config())
        trainer.model.__class__ = Half
        trainer.model.to(torch.bfloat16)
        return trainer

    saves = {"save_strategy": "steps", "save_steps": 9, "optim": "sgd"}
    whole = make("whole")
    whole.train()
    resumed = make("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-9"))
    for got, expected in zip(resumed.model.trained, whole.model.trained[9:], strict=True):
        assert torch.equal(got, expected)
    assert_equal(tensors_of(resumed.model), tensors_of(whole.model))


@pytest.mark.parametrize("given", [True, False], ids=["configuration", "launcher"])
def test_deepspeed_is_not_averaged(given: bool, tmp_path: Path) -> None:
    """Its engine keeps weights of its own, whether the arguments or accelerate's launcher ask for it."""
    args = SimpleNamespace(deepspeed="ds.json" if given else None, deepspeed_plugin=SimpleNamespace())
    assert not _config_of_run(ALRSConfig(), args).average_weights
    assert _config_of_run(ALRSConfig(), arguments(tmp_path)).average_weights
