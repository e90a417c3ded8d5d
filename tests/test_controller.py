"""The controller: three phases, bounds, restarts, probes and checkpoints, with plain numbers in and a rate out."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import healthy_signals, network_saying, quiet_settings, scratch_network

from hf_alrs import ALRSConfig, InputError, MetaLRNetwork
from hf_alrs.controller import ALRSController, Decision, control, decision_interval_of
from hf_alrs.features import FEATURE_NAMES


T, K, LR0 = 80, 4, 0.01
LN10 = math.log(10.0)
END = 0.3 + 0.4 * math.log(100 / 80) / math.log(100 / 35)  # of the peak rate, with averaged weights


def decayed(progress: float, end: float = END) -> float:
    """A line from 1 to `end`."""
    return 1 - (1 - end) * progress


def make_controller(
    network: MetaLRNetwork | None = None,
    num_training_steps: int = T,
    learning_rate: float = LR0,
    num_warmup_steps: int = 0,
    steps_per_epoch: int | None = None,
    **changed: Any,
) -> ALRSController:
    """A controller with decisions every 4 steps, the first jump at the second of them, and no training by default."""
    return ALRSController(
        ALRSConfig(**(quiet_settings(K) | changed)),
        num_training_steps,
        learning_rate,
        num_warmup_steps=num_warmup_steps,
        steps_per_epoch=steps_per_epoch,
        network=network if network is not None else network_saying(0.0),
    )


class Run:
    """
    Feeds a controller from step to step, as the scheduler does, and keeps what it said.

    Args:
        controller (`ALRSController`): What is fed.
        loss (`Callable`): The loss of a step, given the step and the controller.
        signals (`Callable`, *optional*): The signals of a step.
    """

    def __init__(
        self,
        controller: ALRSController,
        loss: Callable[[int, ALRSController], float] = lambda step, controller: 1.0 / (1 + 0.1 * step),
        signals: Callable[[int], dict[str, float]] = lambda step: healthy_signals(),
    ):
        self.controller, self.loss, self.signals = controller, loss, signals
        self.rates: list[float] = []
        self.phases: list[str] = []
        self.decisions: dict[int, Decision] = {}

    def to(self, end: int) -> Run:
        for step in range(len(self.rates), end):
            self.rates.append(self.controller.learning_rate(step))
            self.phases.append(self.controller.phase)
            self.controller.observe(self.loss(step, self.controller))
            if self.controller.is_decision(step):
                self.decisions[step] = self.controller.decide(step, self.signals(step))
        return self

    @property
    def multipliers(self) -> list[float]:
        return [decision.log_multiplier for decision in self.decisions.values()]

    @property
    def actions(self) -> dict[int, str]:
        return {step: decision.action for step, decision in self.decisions.items() if decision.action}


def weights_of(controller: ALRSController) -> list[torch.Tensor]:
    return [p.detach().clone() for p in controller.network.parameters()]


# Phases


def test_phases_come_in_order_and_gather_keeps_the_rate() -> None:
    run = Run(make_controller(network_saying(1.0))).to(T)
    assert list(run.decisions) == list(range(K, T, K))
    assert [decision.phase for decision in run.decisions.values()] == ["gather", "fit", *["drive"] * 17]
    # A decision after the step with index 8 is the second one: rates up to that step are the script's own, decayed.
    assert run.rates[: 2 * K + 1] == pytest.approx([LR0 * decayed(step / T) for step in range(2 * K + 1)])
    assert run.rates[2 * K + 1] == pytest.approx(LR0 * math.e * decayed(9 / T))
    assert run.decisions[K].log_multiplier == 0.0
    assert all(len(decision.features) == len(FEATURE_NAMES) for decision in run.decisions.values())


def test_the_network_is_asked_at_every_decision() -> None:
    run = Run(make_controller(network_saying(0.5))).to(T)
    assert [decision.correction for decision in run.decisions.values()] == pytest.approx([0.5] * 19)
    # one jump of 0.5, then half of 0.5 each time
    assert run.multipliers == pytest.approx([0.0, 0.5, *(0.5 + 0.25 * i for i in range(1, 18))])


def test_phase1_counts_in_steps_or_as_a_fraction() -> None:
    for span in (20, 0.25):
        run = Run(make_controller(network_saying(1.0), phase1_steps=span)).to(T)
        first = min(step for step, decision in run.decisions.items() if decision.phase == "fit")
        assert first == 20, f"phase1_steps={span!r}: expected the fit at 20, got {first}"


# Bounds


@pytest.mark.parametrize(("says", "jump", "then"), [(5.9, 5.9, 0.7), (-5.9, -5.9, -0.7), (1.2, 1.2, 0.6)])
def test_changes_are_bounded(says: float, jump: float, then: float) -> None:
    run = Run(make_controller(network_saying(says), max_lr=1e30)).to(20)
    assert run.multipliers == pytest.approx([0.0, jump, jump + then, jump + 2 * then], abs=1e-4)


@pytest.mark.parametrize(("says", "then"), [(5.9, 2.0), (-5.9, -2.0), (1.2, 1.2)])
def test_two_decisions_after_the_jump_make_the_whole_correction(says: float, then: float) -> None:
    run = Run(make_controller(network_saying(says), max_lr=1e30, full_decisions=2)).to(28)
    later = math.copysign(min(abs(says) / 2, 0.7), says)
    changes = np.diff(run.multipliers)
    assert changes == pytest.approx([says, then, then, later, later], abs=1e-4)
    assert ALRSConfig().num_full_decisions == 2
    assert ALRSConfig(network="scratch").num_full_decisions == 0


def test_a_whole_correction_restarts_by_what_a_later_one_would_be() -> None:
    # -1.3 is a fall of more than 1 below the maximum, its half is none
    calls = iter([0.0, 1.0, 1.0, -1.3, 1.3, 0.0])
    controller = make_controller(max_restarts=1, restart_window=1.0, full_decisions=2)
    controller._ask = lambda features: next(calls)
    run = Run(controller).to(5 * K)
    assert run.multipliers == pytest.approx([0.0, 1.0, -0.3, 1.0])
    assert not run.actions


def test_a_whole_correction_that_is_taken_back_restarts_nothing() -> None:
    # Half of 1.9 would end 1.05 below the maximum, the whole of it 0.1
    calls = iter([0.0, 2.0, 2.0, -1.9, 1.9, 0.0])
    controller = make_controller(max_restarts=1, restart_window=1.0, full_decisions=2)
    controller._ask = lambda features: next(calls)
    run = Run(controller).to(5 * K)
    assert run.multipliers == pytest.approx([0.0, 2.0, 0.1, 2.0])
    assert not run.actions


def test_the_bounds_of_a_change_can_be_set() -> None:
    network = network_saying(5.9)
    run = Run(make_controller(network, max_first_rise=2.0, max_log_change=0.1)).to(20)
    assert run.multipliers == pytest.approx([0.0, 2.0, 2.1, 2.2])
    run = Run(make_controller(network_saying(-5.9), max_first_fall=2.5, gain=0.01)).to(16)
    assert run.multipliers == pytest.approx([0.0, -2.5, -2.559], abs=1e-4)


def test_the_rate_stays_below_max_lr() -> None:
    run = Run(make_controller(network_saying(5.9), max_lr=0.02)).to(T)
    assert max(run.rates) <= 0.02
    assert max(run.multipliers) == pytest.approx(math.log(2.0))
    # A peak that was cut does not go on rising unseen: as soon as the network wants less, there is less.
    assert run.controller.last_change == 0.0


def test_the_rate_stays_above_min_lr() -> None:
    run = Run(make_controller(network_saying(-5.9), min_lr=0.004)).to(T)
    assert min(run.rates) >= 0.004
    assert min(run.multipliers) == pytest.approx(math.log(0.4))


def test_an_initial_rate_out_of_bounds_is_cut() -> None:
    assert make_controller(learning_rate=50.0).learning_rate(0) == 10.0
    assert make_controller(learning_rate=1e-6, min_lr=1e-3).learning_rate(0) == 1e-3


# Shape of the rate


@pytest.mark.parametrize(
    ("changed", "end"),
    [
        ({}, END),
        ({"average_weights": False}, 0.0),
        ({"final_lr_ratio": 0.1}, 0.1),
        ({"final_lr_ratio": 0.0}, 0.0),
        ({"average_weights": False, "final_lr_ratio": 0.5}, 0.5),
        ({"final_lr_ratio": 1.0}, 1.0),
    ],
    ids=str,
)
def test_the_rate_decays_along_a_line(changed: dict[str, Any], end: float) -> None:
    """From the peak to `end` times it: the last step is at one step of the line above `end`, and after it the rate is 0."""
    rates = Run(make_controller(network_saying(0.5), **changed)).to(T).rates
    multiplier = 0.5 + 0.25 * 17
    assert rates[-1] == pytest.approx(LR0 * math.exp(multiplier) * (end + (1 - end) / T))
    assert rates[: K + 1] == pytest.approx([LR0 * (1 - (1 - end) * step / T) for step in range(K + 1)])
    assert [make_controller(**changed).learning_rate(step) for step in (T, T + 5)] == [0, 0]


def test_probes_have_more_decisions_to_learn_from() -> None:
    for changed, interval in (({}, 8), ({"network": "scratch"}, 5), ({"network": "scratch", "num_probes": 0}, 8)):
        config = ALRSConfig(**changed)
        assert decision_interval_of(config, 410, None) == interval
        assert config.share_of_correction == (0.5 if interval == 8 else 0.25)
    assert decision_interval_of(ALRSConfig(network="scratch", decision_interval=0.02), 410, None) == 8


def test_warmup_rises_linearly() -> None:
    rates = Run(make_controller(num_warmup_steps=4)).to(6).rates
    warmup = [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert rates == pytest.approx([LR0 * w * decayed(step / T) for step, w in enumerate(warmup)])


@pytest.mark.parametrize(
    ("interval", "steps_per_epoch", "expected"),
    [(5, None, 5), (0.1, None, 20), (0.0125, None, 2), (1e-4, None, 2), ("epoch", 7, 7), ("epoch", 1, 2)],
)
def test_decision_interval(interval: int | float | str, steps_per_epoch: int | None, expected: int) -> None:
    controller = make_controller(
        num_training_steps=200, decision_interval=interval, steps_per_epoch=steps_per_epoch, phase1_steps=1
    )
    steps = [step for step in range(200) if controller.is_decision(step)]
    assert steps == list(range(expected, 200, expected))
    assert [step for step in range(200) if controller.is_before_decision(step)] == [step - 1 for step in steps]


def test_an_interval_of_an_epoch_needs_its_length() -> None:
    with pytest.raises(InputError, match="steps_per_epoch"):
        make_controller(decision_interval="epoch")


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_rates_that_cannot_be_multiplied_are_refused(rate: float) -> None:
    with pytest.raises(InputError, match="learning_rate"):
        make_controller(learning_rate=rate)


@pytest.mark.parametrize("number", [0, 31.5, math.nan, math.inf])
def test_a_run_of_no_whole_number_of_steps_is_refused(number: float) -> None:
    with pytest.raises(InputError, match="num_training_steps"):
        make_controller(num_training_steps=number)


@pytest.mark.parametrize("num_training_steps", [1, 2, 3, 5, 12])
def test_short_runs_end_well(num_training_steps: int) -> None:
    controller = make_controller(
        network_saying(1.0), num_training_steps, decision_interval=0.0125, phase1_steps=0.025, max_restarts=3
    )
    rates = Run(controller).to(num_training_steps).rates
    assert all(math.isfinite(rate) and rate > 0 for rate in rates)


# Restarts


def test_a_far_too_high_rate_restarts_the_run() -> None:
    run = Run(make_controller(network_saying(-3.0), max_restarts=3, restart_window=1.0, gain=0.05)).to(40)
    assert run.actions[2 * K] == "restart"
    assert run.decisions[2 * K].log_multiplier == pytest.approx(-3.0)
    # Then two decisions of waiting at the new rate (the second is followed), and again a jump
    assert run.decisions[3 * K].log_multiplier == pytest.approx(-3.0)
    assert run.decisions[4 * K].log_multiplier == pytest.approx(-6.0)
    assert run.controller.restarts >= 2


def test_a_restart_forgets_the_running_averages_but_not_where_it_began() -> None:
    controller = make_controller(network_saying(-3.0), max_restarts=1)
    Run(controller, loss=lambda step, _: 2.0 if step < 4 else 7.0).to(2 * K + 1)
    state = controller.state
    assert (float(state.initial_loss), float(state.loss_fast), float(state.decision_count)) == (2.0, 0.0, 0.0)
    assert controller.highest == controller.log_multiplier


def test_restarts_are_capped() -> None:
    run = Run(make_controller(network_saying(-3.0), max_restarts=1, restart_window=1.0)).to(T)
    assert list(run.actions.values()) == ["restart"]
    assert run.controller.restarts == 1
    assert not run.controller.restarts_possible


def test_restarts_happen_within_their_window_alone() -> None:
    assert Run(make_controller(network_saying(-3.0), max_restarts=3, restart_window=0.05)).to(T).actions == {}
    controller = make_controller(max_restarts=3, restart_window=0.25)
    assert [controller.restart_window_over(step) for step in (0, 19, 20, 21)] == [False, False, True, True]


def test_no_restarts_where_none_are_allowed() -> None:
    run = Run(make_controller(network_saying(-3.0), restart_window=1.0), loss=lambda step, _: math.nan).to(T)
    assert run.actions == {}


def test_a_slow_fall_far_below_the_maximum_restarts() -> None:
    # A jump by 2, then -0.5 at a time: the fall from the maximum passes 1 at the third decision after the jump.
    # At the jump the network is asked twice, before and after its training.
    calls = iter([0.0, 2.0, 2.0, -1.0, -1.0, -1.0, 0.0, 0.0])
    controller = make_controller(max_restarts=1, restart_window=1.0)
    controller._ask = lambda features: next(calls)
    run = Run(controller).to(7 * K)
    assert run.multipliers[:5] == pytest.approx([0.0, 2.0, 1.5, 1.0, 0.5])
    assert list(run.actions) == [5 * K]


def test_a_loss_that_does_not_fall_restarts() -> None:
    run = Run(make_controller(max_restarts=1, restart_window=1.0), loss=lambda step, _: 1.0).to(T)
    assert list(run.actions) == [6 * K]  # the sixth decision


def test_a_loss_that_falls_does_not_restart() -> None:
    run = Run(make_controller(max_restarts=1, restart_window=1.0), loss=lambda step, _: 1.0 - 0.005 * step).to(T)
    assert run.actions == {}


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e9])
@pytest.mark.parametrize("when", [2, 4, 8, 17])
def test_a_loss_that_is_not_finite_divides_the_rate_by_ten(bad: float, when: int) -> None:
    controller = make_controller(max_restarts=1, restart_window=1.0)
    run = Run(controller, loss=lambda step, _: bad if step == when else 1.0 - 0.005 * step).to(T)
    decision = next(step for step in run.decisions if step >= when)  # in gather too
    assert run.decisions[decision].log_multiplier == pytest.approx(-LN10)
    assert run.actions == {decision: "restart"}
    assert all(math.isfinite(rate) and rate > 0 for rate in run.rates)


def test_weights_that_are_not_finite_count_as_diverged() -> None:
    signals = lambda step: healthy_signals(ww=math.nan if step == 12 else 4.0)  # noqa: E731
    run = Run(make_controller(max_restarts=1, restart_window=1.0), signals=signals).to(16)
    assert run.actions == {12: "restart"}
    assert run.decisions[12].log_multiplier == pytest.approx(-LN10)


def test_a_large_but_falling_loss_is_no_divergence() -> None:
    run = Run(make_controller(max_restarts=3, restart_window=1.0), loss=lambda step, _: 5e3 / (1 + 0.1 * step)).to(T)
    assert run.actions == {}
    assert run.multipliers[-1] == 0.0


@pytest.mark.parametrize("loss", [lambda step: 0.02 * math.sin(step), lambda step: -1.0 + 1.5 * math.sin(step)])
def test_losses_around_zero_are_no_divergence(loss: Callable[[int], float]) -> None:
    """Policy gradients begin at a loss of 0, likelihoods of densities may change their sign."""
    controller = make_controller(max_restarts=3, restart_window=1.0)
    run = Run(controller, loss=lambda step, _: loss(step)).to(T)
    assert run.actions == {}
    assert run.multipliers[-1] == 0.0


def test_control_takes_arrays() -> None:
    change, restart = control(
        ALRSConfig(),
        correction=np.array([2.0, -3.0, 1.0]),
        decision_count=np.array([2.0, 2.0, 1.0]),
        jump_decision=np.array([2, 2, 2]),
        progress=0.05,
        finite=np.array([True, True, False]),
        log_multiplier=np.zeros(3),
        highest=np.zeros(3),
        loss_ratio=np.full(3, 0.5),
        restarts=np.zeros(3),
    )
    np.testing.assert_allclose(change, [2.0, -3.0, -LN10])
    assert restart.tolist() == [False, True, True]


# The network's own training


def test_phase_2_and_feedback_train_the_network() -> None:
    controller = make_controller(scratch_network(scale=4.0), meta_num_epochs=2, feedback_interval=3)
    run = Run(controller)
    before, trained_at = weights_of(controller), []
    for step in range(T):
        run.to(step + 1)
        after = weights_of(controller)
        if any(not torch.equal(x, y) for x, y in zip(before, after, strict=True)):
            trained_at.append(step)
        before = after
    # The fit at the second decision, then every third decision of phase 3 (the third, sixth, ... after the fit)
    assert trained_at == [8, 20, 32, 44, 56, 68], trained_at
    reported = [step for step, decision in run.decisions.items() if decision.network_change is not None]
    assert reported == trained_at
    assert all(run.decisions[step].network_change > 0 for step in trained_at)
    assert all(math.isfinite(run.decisions[step].meta_loss) for step in trained_at)


@pytest.mark.parametrize(("epochs", "feedback", "expected"), [(0, 0, []), (2, 0, [8]), (0, 6, [32, 56])])
def test_training_can_be_turned_off(epochs: int, feedback: int, expected: list[int]) -> None:
    controller = make_controller(scratch_network(), meta_num_epochs=epochs, feedback_interval=feedback)
    before = weights_of(controller)
    run = Run(controller).to(T)
    assert [step for step, d in run.decisions.items() if d.network_change is not None] == expected
    same = all(torch.equal(x, y) for x, y in zip(before, weights_of(controller), strict=True))
    assert same == (not expected)


def test_the_anchor_holds_the_network_near_its_trained_weights() -> None:
    distances = []
    for anchor in (0.0, 10.0):
        controller = make_controller(
            scratch_network(2, scale=4.0),
            meta_num_epochs=20,
            feedback_interval=1,
            anchor=anchor,
            meta_learning_rate=0.01,
        )
        before = weights_of(controller)
        Run(controller).to(T)
        after = weights_of(controller)
        distances.append(sum(float((x - y).square().sum()) for x, y in zip(before, after, strict=True)))
    assert distances[1] < 0.5 * distances[0], f"expected the anchor to hold, got squared distances {distances}"


def test_training_the_network_leaves_the_global_random_state_alone() -> None:
    network = scratch_network()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Run(make_controller(network, meta_num_epochs=2, feedback_interval=1)).to(T)
    ALRSController(ALRSConfig(network="scratch"), T, LR0)
    assert torch.equal(torch.rand(3), expected)


def test_hindsight_weighs_later_estimates_more() -> None:
    controller = make_controller()
    controller._remember(np.zeros(len(FEATURE_NAMES)), 1.0, 1)
    controller._remember(np.zeros(len(FEATURE_NAMES)), 2.0, 3)
    controller._remember(np.zeros(len(FEATURE_NAMES)), math.nan, 9)  # no estimate was made there
    assert controller.hindsight() == pytest.approx((1.0 + 3 * 2.0) / 4)


# Probes


def probing_controller(**changed: Any) -> ALRSController:
    """Five probes of 8 steps, at rates apart by e^3.45; from scratch, as the report has it."""
    config = {"network": "scratch", "hidden_sizes": (16,), "num_probes": 5, "probe_steps": 8, "meta_num_epochs": 10}
    return ALRSController(
        ALRSConfig(phase1_steps=8, decision_interval=K, **(config | changed)),
        num_training_steps=160,
        learning_rate=1e-3,
    )


def curve(best: float) -> Callable[[int, ALRSController], float]:
    """A loss that depends on the rate alone and is lowest at exp(`best`) times the initial one."""
    return lambda step, controller: 1.0 + 0.05 * (controller.log_multiplier - best) ** 2


def test_probes_start_from_one_snapshot_and_anneal() -> None:
    controller = probing_controller()
    run = Run(controller, loss=curve(0.0)).to(160)
    # The snapshot after step 8, then probes of 8 steps each, and back to the snapshot after each
    assert run.actions == {8: "snapshot", 16: "restore", 24: "restore", 32: "restore", 40: "restore", 48: "restore"}
    spread = 3 * LN10
    offsets = [run.decisions[step].log_multiplier for step in (8, 16, 24, 32, 40)]
    assert offsets == pytest.approx([-spread, -spread / 2, 0.0, spread / 2, spread])
    for first, offset in zip((9, 17, 25, 33, 41), offsets, strict=True):
        expected = [1e-3 * math.exp(offset) * (1 - i / 8) for i in range(8)]
        assert run.rates[first : first + 8] == pytest.approx(expected), f"probe that starts at step {first}"
    assert set(run.phases[:49]) == {"gather"}
    assert run.decisions[48].phase == "fit"
    assert run.decisions[48].network_change > 0
    assert run.decisions[52].phase == "drive"
    # After the probes the run's own decay is back
    expected = 1e-3 * math.exp(run.decisions[48].log_multiplier) * decayed(49 / 160, 0.3)
    assert run.rates[49] == pytest.approx(expected)


@pytest.mark.parametrize("best", [-3.45, 3.45])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_verdict_of_the_probes_moves_the_rate(best: float, seed: int) -> None:
    """With either decay; the features of the constant signals here suit the one to 0, which the run follows closer."""
    for average_weights, distance in ((False, 1.2), (True, 1.7)):
        controller = probing_controller(seed=seed, max_restarts=0, average_weights=average_weights)
        run = Run(controller, loss=curve(best)).to(49)
        assert controller._probe_verdict() == pytest.approx(best, abs=0.01)
        assert controller.hindsight() == pytest.approx(best, abs=0.1)
        got = run.decisions[48].log_multiplier
        assert got / best > 0.4, f"the best rate is at {best:+.2f}, the first jump went to {got:+.2f}"
        later = run.to(160).multipliers[-1]
        assert abs(later - best) < distance, f"the best rate is at {best:+.2f}, the run ended at {later:+.2f}"


def test_probes_that_diverge_are_survived() -> None:
    loss = curve(-3.45)
    controller = probing_controller(max_restarts=0)
    run = Run(
        controller,
        loss=lambda step, c: math.nan if c.probing and c.log_multiplier > 1 else loss(step, c),
        signals=lambda step: healthy_signals(ww=math.nan if 33 <= step < 49 else 4.0),
    ).to(160)
    assert controller._probe_verdict() == pytest.approx(-3.45, abs=0.01)
    assert all(math.isfinite(rate) for rate in run.rates)
    assert run.decisions[48].log_multiplier < -0.5


def test_a_run_that_diverges_in_gather_is_not_probed() -> None:
    run = Run(probing_controller(), loss=lambda step, _: math.nan if step == 7 else 1.0).to(20)
    assert run.actions[8] == "restart"


def test_probes_wait_for_a_run_that_is_finite() -> None:
    """The restarted run probes after a gathering phase of its own, as it would have without the bad batch."""
    loss = curve(0.0)
    run = Run(probing_controller(), loss=lambda step, c: math.nan if step == 7 else loss(step, c)).to(60)
    assert run.actions == {8: "restart", 16: "snapshot"} | {16 + 8 * i: "restore" for i in range(1, 6)}
    assert run.decisions[56].phase == "fit"
    # Too late for them: nothing is snapshot, and the network drives
    late = Run(probing_controller(), loss=lambda step, _: math.nan if step < 130 else 1.0).to(160)
    assert "snapshot" not in late.actions.values()
    assert late.decisions[156].phase == "drive"
    # Nor where the guard has taken over
    controller = probing_controller(max_restarts=0)
    troubled = Run(controller, loss=lambda step, c: math.nan if step in (7, 11, 15) else loss(step, c)).to(160)
    assert troubled.decisions[156].phase == "fallback"
    assert "snapshot" not in troubled.actions.values()


def test_a_run_that_is_never_finite_keeps_a_rate_above_0() -> None:
    controller = make_controller(num_training_steps=4000)
    Run(controller, loss=lambda step, _: math.nan).to(4000)
    assert LR0 * math.exp(controller.log_multiplier) == pytest.approx(1e-30)


@pytest.mark.parametrize("num_training_steps", [20, 28])
def test_a_short_run_does_not_end_inside_a_probe(num_training_steps: int) -> None:
    controller = ALRSController(ALRSConfig(network="scratch", hidden_sizes=(8,)), num_training_steps, LR0)
    Run(controller, loss=curve(0.0)).to(num_training_steps)
    assert not controller.probing


def test_probes_are_compared_at_their_full_rates() -> None:
    controller = ALRSController(
        ALRSConfig(
            network="scratch", hidden_sizes=(8,), num_probes=3, probe_steps=8, phase1_steps=8, decision_interval=K
        ),
        num_training_steps=160,
        learning_rate=1e-3,
        num_warmup_steps=32,
    )
    run = Run(controller, loss=curve(0.0)).to(40)
    spread = 3 * LN10
    starts = [step + 1 for step, action in run.actions.items() if action in ("snapshot", "restore")][:3]
    ratios = [run.rates[start] / (1e-3 * math.exp(o)) for start, o in zip(starts, (-spread, 0.0, spread), strict=True)]
    assert ratios == pytest.approx([ratios[0]] * 3)


def test_the_verdict_is_a_rate_that_was_probed() -> None:
    controller = probing_controller(num_probes=3, max_lr=0.1, max_restarts=0)
    run = Run(controller, loss=curve(6.9)).to(60)
    probed = [run.decisions[step].log_multiplier for step, action in run.actions.items()][:3]
    assert max(probed) == pytest.approx(math.log(100.0))
    assert controller._probe_verdict() == pytest.approx(math.log(100.0))


def test_far_too_high_a_rate_that_the_probes_find_restarts_the_run() -> None:
    controller = ALRSController(ALRSConfig(network="scratch", hidden_sizes=(16,)), 400, learning_rate=1.0)
    run = Run(controller, loss=curve(-6.9)).to(120)
    fit = next(decision for decision in run.decisions.values() if decision.phase == "fit")
    assert fit.log_multiplier < -2
    assert fit.action == "restart"


# Checkpoints


def saved(controller: ALRSController) -> dict[str, Any]:
    """The controller's state, through a file that is read without pickle."""
    buffer = io.BytesIO()
    torch.save(controller.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def noisy(step: int, controller: ALRSController) -> float:
    return (1.0 + 0.05 * (controller.log_multiplier - 1.0) ** 2) * (1 + 0.1 * math.sin(7 * step)) / (1 + 0.01 * step)


def noisy_signals(step: int) -> dict[str, float]:
    return healthy_signals(gg=1 + 0.5 * math.sin(step), gh=0.3 * math.cos(3 * step), dd=1e-3 * (2 + math.sin(step)))


# before the first loss, between decisions in gather, at the fit, in a probe, at a probe's end, in drive, at the end
@pytest.mark.parametrize("step", [0, 3, 8, 9, 12, 14, 17, 29, 33, 34, 51, 79])
@pytest.mark.parametrize("num_probes", [0, 3])
def test_a_saved_controller_goes_on_as_if_nothing_had_happened(step: int, num_probes: int) -> None:
    def make(seed: int) -> ALRSController:
        # Another seed gives other weights: they must come from the checkpoint.
        return make_controller(
            scratch_network(seed, scale=3.0),
            num_probes=num_probes,
            probe_steps=8,
            meta_num_epochs=2,
            feedback_interval=2,
            max_restarts=2,
            restart_window=0.6,
        )

    whole = Run(make(0), noisy, noisy_signals).to(T)
    first = Run(make(0), noisy, noisy_signals).to(step)
    first.controller.observe_evaluation(0.9, 0.5)
    whole_with_evaluation = Run(make(0), noisy, noisy_signals).to(step)
    whole_with_evaluation.controller.observe_evaluation(0.9, 0.5)
    second = Run(make(1), noisy, noisy_signals)
    second.controller.load_state_dict(saved(first.controller))
    second.rates, second.phases = first.rates[:], first.phases[:]
    second.to(T)
    whole_with_evaluation.to(T)
    assert second.rates == whole_with_evaluation.rates
    assert second.phases == whole_with_evaluation.phases
    for at, decision in second.decisions.items():
        assert decision == whole_with_evaluation.decisions[at], f"decision at {at}"
    for x, y in zip(weights_of(second.controller), weights_of(whole_with_evaluation.controller), strict=True):
        assert torch.equal(x, y)
    assert len(whole.rates) == T


def test_a_network_of_another_shape_is_refused() -> None:
    state = saved(make_controller(scratch_network(hidden_sizes=(8,))))
    with pytest.raises(InputError, match="another shape"):
        make_controller(scratch_network(hidden_sizes=(8, 8))).load_state_dict(state)


def test_a_refused_state_changes_nothing() -> None:
    first = make_controller(scratch_network(hidden_sizes=(8,)))
    Run(first).to(20)
    controller = make_controller(scratch_network(hidden_sizes=(16,)))
    with pytest.raises(InputError):
        controller.load_state_dict(saved(first))
    assert (controller.log_multiplier, controller.phase, controller._rows) == (0.0, "gather", [])


def test_a_run_that_is_made_longer_goes_on_learning() -> None:
    first = Run(make_controller(network_saying(0.5))).to(60)
    longer = make_controller(network_saying(0.5), num_training_steps=2 * T)
    longer.load_state_dict(saved(first.controller))
    assert longer.learning_rate(T + 10) > 0


def test_an_evaluation_without_an_accuracy_says_nothing_of_it() -> None:
    controller = make_controller()
    controller.observe_evaluation(1.0)
    assert controller.state.eval_accuracy == 0.0
    controller.observe_evaluation(1.0, 0.9)
    controller.observe_evaluation(0.8)
    assert controller.state.eval_accuracy == controller.state.eval_best_accuracy == 0.9


@pytest.mark.parametrize("steps", [-1, math.nan])
def test_a_warmup_that_cannot_be_is_refused(steps: float) -> None:
    with pytest.raises(InputError, match="num_warmup_steps"):
        make_controller(num_warmup_steps=steps)
