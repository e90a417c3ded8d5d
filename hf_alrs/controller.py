"""
The three phases and the feedback loop: plain numbers in, a rate out.

Gather: a static rate, metrics recorded. Fit: the network is trained on what was gathered. Drive: at each decision the
network reads the features and predicts `u = ln(best peak rate / present peak rate)`, of which a bounded share is made;
every so many decisions the network is trained again on all the run has shown (the feedback loop).

The target is *hindsight regression of the best rate*. A one-step or hypergradient target decays the rate far too early
(short-horizon bias, Wu et al. 2018), so a row of the training set is a feature vector, the rate in force, and the best
rate of this run as known by hindsight: from probes where there are any, and from the later, better informed estimates.

This module knows no Trainer and no torch optimizer: `hf_alrs.scheduler` feeds it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from .config import ALRSConfig, InputError, steps_of
from .features import (
    FEATURE_NAMES,
    Array,
    Moment,
    RunState,
    capped_loss,
    clean_signals,
    clip,
    feature_vector,
    initial_state,
    loss_cap,
    loss_over_initial,
    restart_state,
    update_decision,
    update_evaluation,
    update_step,
    where,
)
from .guard import BOUNDS, NON_FINITE, SPIKE, Guard
from .network import MetaLRNetwork, load_network


# Runs that were driven by another version of the control law and its defaults have other outcomes.
CONTROL_VERSION = 8

# The last one is not part of a healthy run: a plain linear decay after repeated trouble.
GATHER, FIT, DRIVE, FALLBACK = "gather", "fit", "drive", "fallback"

# A regret curve needs a middle and two sides.
MIN_PROBES = 3
# Fewer steps of a rate show nothing but the noise of the loss
_MIN_PROBE_STEPS = 4
# Decisions at a static rate before the network is asked, after a restart
WARM_DECISIONS = 2
# The jump is made from little, and may fall short or go too far: the decisions next after it make whole corrections too, up to
# this change of ln(rate). A run of a few dozen steps has few others.
_MAX_FULL_CHANGE = 2.0
# Fall of ln(rate) below its maximum that shows that the weights were trained at a far too high rate
_RESTART_FALL = 1.0
# A loss that is still this share of the initial one after `_NO_PROGRESS_DECISIONS` shows that training has not begun
_NO_PROGRESS, _NO_PROGRESS_DECISIONS = 0.97, 6
_DIVERGED_CHANGE = -math.log(10.0)
# Below it a rate would be 0 before long, as in a run that is never finite
_LEAST_RATE = 1e-30
_SPIKE_CHANGE = -math.log(3.0)
# Standard deviation of the noise added to features when the network is trained on the few rows of one run
_JITTER = 0.05
# Adam's epsilon for trained weights. At the usual 1e-8 every step moves every weight by the full rate however small the
# error is, and the jitter of ten such steps outweighs what a handful of rows can teach: the rates get worse.
_FINE_TUNING_EPSILON = 1.0
# Rows that one run's training set is blown up to, in batches, by jitter
_BATCHES_FROM_SCRATCH = 16
# Rows kept; a run has about 50 decisions unless it asks for more
_MAX_ROWS = 1024
# Share of the run by which probes are over
_LATEST_PROBES = 0.75
# Weight of the probes' verdict in the hindsight estimate, in decisions
_PROBE_WEIGHT = 200.0
# ln of the factor between the lowest and the highest probe and the initial rate
_PROBE_SPREAD = 3.0 * math.log(10.0)


@dataclass(frozen=True)
class Decision:
    """
    What was decided after a step.

    Args:
        phase (`str`): Phase that the run is in from here on.
        log_multiplier (`float`): ln(peak rate / initial rate) from here on.
        correction (`float`, *optional*): The network's output; `None` where it was not asked.
        action (`str`, *optional*): What is to happen to the weights: `"restart"` (back to the initial ones),
            `"snapshot"` (keep these and the optimizer's state), `"restore"` (back to the snapshot), `"rollback"` (back
            to the last good ones).
        guard (`str`, *optional*): What the divergence guard found: `"non_finite"`, `"spike"`, or `"bounds"` where the
            rate was kept from leaving `min_lr` and `max_lr`.
        good (`bool`): Whether the weights of this moment are worth going back to.
        features (`list[float]`): The feature vector, in the order of `FEATURE_NAMES`.
        meta_loss (`float`, *optional*): Last loss of the network's own training, where it was trained.
        network_change (`float`, *optional*): Norm of the change of the network's weights by that training.
    """

    phase: str
    log_multiplier: float
    correction: float | None
    action: str | None
    features: list[float]
    meta_loss: float | None = None
    network_change: float | None = None
    guard: str | None = None
    good: bool = False


def control(
    config: ALRSConfig,
    correction: Array,
    decision_count: Array,
    jump_decision: Array,
    progress: float,
    finite: Array,
    log_multiplier: Array,
    highest: Array,
    loss_ratio: Array,
    restarts: Array,
) -> tuple[Array, Array]:
    """
    The control law: how far ln(rate) moves at a decision, and whether the run goes back to its initial weights.

    Args:
        config (`ALRSConfig`): Bounds and gain.
        correction: The network's output, ln(best peak rate / present peak rate).
        decision_count: Decisions since the last restart, this one included.
        jump_decision: The decision since the last restart at which the network is first followed, in one jump.
        progress (`float`): Share of the run that is over, probes left out.
        finite: Whether losses and weights are finite.
        log_multiplier, highest: ln(peak rate / initial rate), now and its maximum since the last restart.
        loss_ratio: Fast loss average over the initial loss.
        restarts: Restarts so far.

    Returns:
        `tuple`: Change of ln(rate), and a boolean restart mask, both of the shape of the arguments.
    """
    jump = decision_count == jump_decision
    waiting = decision_count < jump_decision
    step = clip(config.share_of_correction * correction, -config.max_log_change, config.max_log_change)
    full = clip(correction, -_MAX_FULL_CHANGE, _MAX_FULL_CHANGE)
    change = where(decision_count <= jump_decision + config.num_full_decisions, full, step)
    change = where(jump, clip(correction, -config.max_first_fall, config.max_first_rise), change)
    change = where(waiting, 0.0, change)
    change = where(finite, change, _DIVERGED_CHANGE)
    # A whole correction down may be too much, of which the next decision tells: so down by the smaller step
    risen = where(change > step, change, step)
    fell = where(jump, change < -_RESTART_FALL, highest - (log_multiplier + risen) > _RESTART_FALL)
    stuck = (loss_ratio > _NO_PROGRESS) & (decision_count >= _NO_PROGRESS_DECISIONS)
    allowed = (progress < config.restart_window) & (restarts < config.max_restarts)
    # `~` is not "not" for Python's own booleans
    return change, allowed & ((fell & where(waiting, False, True)) | stuck | where(finite, False, True))


def decay(final_ratio: float, step: int, num_training_steps: int) -> float:
    """Share of the peak rate after `step` steps: a line from 1 to `final_ratio`."""
    return final_ratio + (1.0 - final_ratio) * max(0.0, 1.0 - step / num_training_steps)


def decision_interval_of(config: ALRSConfig, num_training_steps: int, steps_per_epoch: int | None) -> int:
    """Optimizer steps between decisions, at least 2: signals come from two successive steps at one rate."""
    interval = config.time_between_decisions
    if interval == "epoch":
        return max(2, int(steps_per_epoch))
    return interval if isinstance(interval, int) else max(2, steps_of(interval, num_training_steps))


class ALRSController:
    """
    Sets the learning rate of one run.

    Args:
        config (`ALRSConfig`): How.
        num_training_steps (`int`): Length of the run in optimizer steps.
        learning_rate (`float`): The initial rate.
        adaptive (`bool`, *optional*, defaults to `True`): Whether the optimizer rescales gradients, as Adam does.
        num_warmup_steps (`int`, *optional*, defaults to 0): Steps over which the rate rises linearly.
        steps_per_epoch (`int`, *optional*): Needed for `decision_interval="epoch"`; a feature otherwise.
        network (`MetaLRNetwork`, *optional*): In place of the one that `config.network` names.
    """

    def __init__(
        self,
        config: ALRSConfig,
        num_training_steps: int,
        learning_rate: float,
        adaptive: bool = True,
        num_warmup_steps: int = 0,
        steps_per_epoch: int | None = None,
        network: MetaLRNetwork | None = None,
    ):
        if not 1 <= num_training_steps < math.inf or num_training_steps != int(num_training_steps):
            raise InputError(
                "num_training_steps",
                num_training_steps,
                "must be a whole number of at least 1.",
                "Set max_steps or num_train_epochs; in a loop of your own, count the optimizer steps that it makes.",
            )
        if not (math.isfinite(learning_rate) and learning_rate > 0):
            raise InputError(
                "learning_rate",
                learning_rate,
                "must be a finite number above 0: the rate is multiplied, and 0 stays 0.",
                "Give any positive rate, for example 1e-4.",
            )
        if not num_warmup_steps >= 0:
            raise InputError("num_warmup_steps", num_warmup_steps, "must be at least 0.", "Leave it out.")
        if config.decision_interval == "epoch" and not steps_per_epoch:
            raise InputError(
                "decision_interval",
                "epoch",
                "needs the number of optimizer steps in an epoch.",
                "Pass steps_per_epoch, or give the interval in steps.",
            )
        self.config = config
        # Numbers of NumPy would make a checkpoint that `torch.load` takes for code
        self.num_training_steps = num_training_steps = int(num_training_steps)
        self._final_ratio = config.final_ratio(num_training_steps)
        self.initial_learning_rate = float(learning_rate)
        self.adaptive = adaptive
        self.num_warmup_steps = int(num_warmup_steps)
        self.num_epochs = float(num_training_steps / steps_per_epoch) if steps_per_epoch else 3.0
        self.decision_interval = decision_interval_of(config, num_training_steps, steps_per_epoch)
        network = network if network is not None else load_network(config.network, config.hidden_sizes, config.seed)
        self.network = network.to("cpu", torch.float32)
        self._trained = [p.detach().clone() for p in self.network.parameters()]
        phase1 = steps_of(config.phase1_steps, num_training_steps)
        self._first_jump = max(1, math.ceil(phase1 / self.decision_interval))
        probe_steps = steps_of(config.probe_steps, num_training_steps)
        self._probe_decisions = math.ceil(max(probe_steps, _MIN_PROBE_STEPS) / self.decision_interval)
        # A short run keeps at least half of its steps for phase 3.
        room = num_training_steps / 2 - self._first_jump * self.decision_interval
        fitting = int(room / (self._probe_decisions * self.decision_interval))
        self._num_probes = 0 if min(config.probes, fitting) < MIN_PROBES else min(config.probes, fitting)

        self.phase = GATHER
        self.state: RunState = initial_state()
        self._good_state: RunState | None = None  # of the moment that a rollback goes back to
        self._guard = Guard()
        # A rate outside its bounds is brought inside at once.
        self.log_multiplier = self._within_bounds(0.0)
        self.highest = self.log_multiplier
        self.last_change = 0.0
        self.restarts = 0
        self.jumped = False
        self.diverged = False
        self._drive_decisions = 0
        self._fits = 0
        # One row a decision: features, ln(peak rate / initial rate), hindsight estimate of the best, its weight.
        self._rows: list[list[float]] = []
        self._probe = -1  # which probe is running; -1 before the first
        self._probe_start = 0
        self._probe_losses: list[float] = []
        self._probe_outcomes: list[float] = []
        self._probe_multipliers: list[float] = []
        self._before_probes: tuple[RunState, float, list[float]] | None = None

    # What the scheduler asks

    def is_decision(self, step: int) -> bool:
        """Whether signals are wanted at the `step`-th optimizer step (counted from 0) and a decision after it."""
        return 0 < step < self.num_training_steps and step % self.decision_interval == 0

    def is_before_decision(self, step: int) -> bool:
        """Whether the gradient and the weights at this step are wanted for the next one's signals."""
        return self.is_decision(step + 1)

    @property
    def restarts_possible(self) -> bool:
        """Whether a later decision can still ask for a restart."""
        return self.restarts < self.config.max_restarts

    def restart_window_over(self, step: int) -> bool:
        return self._progress_of_restarts(step) >= self.config.restart_window

    def _progress_of_restarts(self, step: int) -> float:
        """Share of the run that is over, the probes left out: they go back to their snapshot, and can do no damage."""
        probing = self._num_probes * self._probe_decisions * self.decision_interval
        return max(0, step - probing) / self.num_training_steps

    def learning_rate(self, step: int) -> float:
        """The rate for the `step`-th optimizer step (counted from 0), under what has been decided so far; 0 after the last."""
        if step >= self.num_training_steps:  # as after a decay to 0, and because the model holds the averaged weights
            return 0.0
        warmup = min(1.0, (step + 1) / self.num_warmup_steps) if self.num_warmup_steps else 1.0
        share = decay(self._final_ratio, step, self.num_training_steps)
        if self.probing:  # on a schedule of their own, so that they can be compared
            warmup = 1.0
            share = max(0.0, 1.0 - (step - self._probe_start) / (self._probe_decisions * self.decision_interval))
        rate = self.initial_learning_rate * math.exp(self.log_multiplier) * warmup * share
        return min(max(rate, self.config.min_lr), self.config.max_lr)

    # What the scheduler tells

    def observe(self, loss: float) -> None:
        """Takes the training loss of one optimizer step."""
        if not math.isfinite(loss) or loss > loss_cap(self.state):
            self.diverged = True
        if not self.probing:
            self._guard.observe(loss)
        self.state = update_step(self.state, loss, self.num_training_steps, self.decision_interval)
        if self.probing:
            self._probe_losses.append(float(capped_loss(loss, self.state)))

    def observe_evaluation(self, loss: float, accuracy: float | None = None) -> None:
        """Takes the mean loss on the controller's split, and the accuracy (0 to 1) where the task has one."""
        known = float(self.state.eval_accuracy)  # 0 where none has been told
        self.state = update_evaluation(self.state, loss, known if accuracy is None else float(accuracy))

    def decide(self, step: int, signals: Mapping[str, float]) -> Decision:
        """
        Decides after the `step`-th optimizer step (counted from 0), whose loss has been observed.

        Args:
            step (`int`): Optimizer steps done before this one.
            signals (`Mapping[str, float]`): See `hf_alrs.features.SIGNALS`.
        """
        finite = not self.diverged and all(math.isfinite(signals[name]) for name in ("ww", "gg"))
        self.diverged = False
        signals = clean_signals(signals)
        rate = max(self.learning_rate(step - 1), 1e-30)
        self.state = update_decision(self.state, signals, rate, self.decision_interval)
        moment = Moment(
            state=self.state,
            signals=signals,
            step=step,
            num_training_steps=self.num_training_steps,
            decision_interval=self.decision_interval,
            num_epochs=self.num_epochs,
            adaptive=self.adaptive,
            learning_rate=rate,
            peak_learning_rate=self.initial_learning_rate * math.exp(self.log_multiplier),
            last_change=self.last_change,
        )
        features = feature_vector(moment)
        count = int(self.state.decision_count)

        if self.probing:
            return self._decide_probe(step, features, count)
        if count >= self._first_jump and self._probes_pending(step) and finite:
            self._remember(features, math.nan, count)
            self._before_probes = (self.state, self.log_multiplier, features.tolist())
            self._guard.forget()
            return self._start_probe(step, features, "snapshot")

        trouble = self._guard.judge(finite, float(self.state.initial_loss))
        if self.phase == FALLBACK:
            return self._hold(features, trouble)
        correction = self._ask(features)
        self._remember(features, self.log_multiplier + correction, count)
        meta_loss = network_change = None
        jump_decision = self._first_jump if not self.jumped else min(WARM_DECISIONS, self._first_jump)
        if self._is_fitting(step, count):
            meta_loss, network_change = self._train(self.config.meta_num_epochs)
            correction = self._ask(features)
        elif self._feedback_due(count > jump_decision):
            meta_loss, network_change = self._train(1)
            correction = self._ask(features)
        return self._act(step, features, correction, count, jump_decision, trouble, meta_loss, network_change)

    def _probes_pending(self, step: int) -> bool:
        """Whether probes are still to come: those of a run that was not finite when they were due are made later."""
        length = self._num_probes * self._probe_decisions * self.decision_interval
        in_time = 0 < length <= _LATEST_PROBES * self.num_training_steps - step
        return in_time and self._probe < 0 and self.phase != FALLBACK

    def _is_fitting(self, step: int, count: int) -> bool:
        return not self.jumped and count >= self._first_jump and not self._probes_pending(step)

    def _feedback_due(self, driving: bool) -> bool:
        if not driving:
            return False
        self._drive_decisions += 1
        return self.config.feedback_interval > 0 and self._drive_decisions % self.config.feedback_interval == 0

    def _act(
        self,
        step: int,
        features: np.ndarray,
        correction: float,
        count: int,
        jump_decision: int,
        trouble: str | None,
        meta_loss: float | None,
        network_change: float | None,
    ) -> Decision:
        state = self.state
        change, restart = control(
            self.config,
            correction,
            count,
            jump_decision,
            self._progress_of_restarts(step),
            trouble != NON_FINITE,
            self.log_multiplier,
            self.highest,
            loss_over_initial(state),
            self.restarts,
        )
        if trouble == SPIKE and not restart:
            change = min(float(change), _SPIKE_CHANGE)
        fitting = self._is_fitting(step, count)
        kept_inside = self._move(float(change))
        self.jumped = self.jumped or fitting
        self.phase = FIT if fitting else (DRIVE if self.jumped else GATHER)
        self.highest = self.log_multiplier if restart else max(self.highest, self.log_multiplier)
        if restart:
            self.restarts += 1
            self.state = restart_state(state, True)
            self._guard.forget()
        good = trouble is None and not restart and not self._guard.suspicious
        action = "restart" if restart else self._answer(trouble, good)
        if trouble is not None and not restart and self._fall_back():
            self.phase = FALLBACK
        return Decision(
            phase=self.phase,
            log_multiplier=self.log_multiplier,
            correction=correction,
            action=action,
            features=features.tolist(),
            meta_loss=meta_loss,
            network_change=network_change,
            guard=trouble or (BOUNDS if kept_inside else None),
            good=good,
        )

    def _answer(self, trouble: str | None, good: bool) -> str | None:
        """Keeps the statistics of a good moment, or brings them back; returns what is to happen to the weights."""
        if trouble is None:
            if good:
                self._guard.good = self.log_multiplier
                self._good_state = self.state if self.config.rollback else None
            return None
        self._guard.troubles += 1
        if self._good_state is None:
            return None
        self.state = self._good_state
        return "rollback"

    def _fall_back(self) -> bool:
        """Whether it is time for the plain decay; sets its rate."""
        if self._guard.troubles < self.config.guard_patience or self._guard.good is None:
            return False
        # Trouble may have lowered the rate below the last good one already.
        self.log_multiplier = min(self.log_multiplier, self._guard.good)
        self.last_change = 0.0
        return True

    def _hold(self, features: np.ndarray, trouble: str | None) -> Decision:
        """A decision of the plain decay: the rate is left alone, the weights are still guarded."""
        self.last_change = 0.0
        good = trouble is None and not self._guard.suspicious
        action = self._answer(trouble, good)
        return Decision(FALLBACK, self.log_multiplier, None, action, features.tolist(), guard=trouble, good=good)

    def _within_bounds(self, log_multiplier: float) -> float:
        """The nearest multiplier that keeps the peak rate inside `min_lr` and `max_lr`."""
        start = math.log(self.initial_learning_rate)
        lowest = max(self.config.min_lr, _LEAST_RATE)
        return max(min(log_multiplier, math.log(self.config.max_lr) - start), math.log(lowest) - start)

    def _move(self, change: float) -> bool:
        """Changes `log_multiplier` within bounds; returns whether a bound stood in the way."""
        wanted = self.log_multiplier + change
        target = self._within_bounds(wanted)
        self.last_change = target - self.log_multiplier
        self.log_multiplier = target
        return target != wanted

    # Probes: a small regret curve of this very run

    @property
    def probing(self) -> bool:
        """Whether a probe is running, whose weights are given up."""
        return 0 <= self._probe < self._num_probes

    def _start_probe(self, step: int, features: np.ndarray, action: str) -> Decision:
        self._probe += 1
        self._probe_losses = []
        self._probe_start = step + 1
        self.state, log_multiplier, _ = self._before_probes
        offsets = np.linspace(-_PROBE_SPREAD, _PROBE_SPREAD, self._num_probes)
        self.log_multiplier = log_multiplier
        self._move(float(offsets[self._probe]))
        self._probe_multipliers.append(self.log_multiplier)
        return Decision(GATHER, self.log_multiplier, None, action, features.tolist())

    def _decide_probe(self, step: int, features: np.ndarray, count: int) -> Decision:
        self._remember(features, math.nan, count)
        if step + 1 - self._probe_start < self._probe_decisions * self.decision_interval:
            return Decision(GATHER, self.log_multiplier, None, None, features.tolist())
        tail = self._probe_losses[len(self._probe_losses) // 2 :]
        self._probe_outcomes.append(float(np.mean(tail)))
        if self._probe + 1 < self._num_probes:
            return self._start_probe(step, features, "restore")
        self._probe += 1
        self.state, self.log_multiplier, first = self._before_probes
        self.last_change = 0.0
        self._before_probes = None
        meta_loss, network_change = self._train(self.config.meta_num_epochs)
        features = np.asarray(first)
        decision = self._act(
            step, features, self._ask(features), self._first_jump, self._first_jump, None, meta_loss, network_change
        )
        return replace(decision, action=decision.action or "restore")

    def _probe_verdict(self) -> float | None:
        """ln(best probed rate / initial rate): the minimum of the smoothed curve of losses over rates."""
        if self._probe < self._num_probes or not self._probe_outcomes:
            return None
        curve = np.log(np.maximum(self._probe_outcomes, 1e-6))
        padded = np.concatenate([curve[:1], curve, curve[-1:]])
        smooth = 0.25 * padded[:-2] + 0.5 * padded[1:-1] + 0.25 * padded[2:]
        return self._probe_multipliers[int(np.argmin(smooth))]

    # The network's own training

    def _ask(self, features: np.ndarray) -> float:
        return self.network.correction_of(features)

    def _remember(self, features: np.ndarray, estimate: float, weight: int) -> None:
        self._rows.append([*features.tolist(), self.log_multiplier, estimate, float(weight)])
        del self._rows[:-_MAX_ROWS]

    def hindsight(self) -> float | None:
        """
        Best ln(peak rate / initial rate) of this run as known so far.

        The mean of the estimates made at each decision, weighted by how many decisions stood behind each (later ones
        have seen more), and of the probes' verdict.
        """
        rows = np.asarray(self._rows)
        estimates, weights = rows[:, -2], rows[:, -1]
        known = np.isfinite(estimates)
        total, weight = float((estimates[known] * weights[known]).sum()), float(weights[known].sum())
        verdict = self._probe_verdict()
        if verdict is not None:
            total, weight = total + _PROBE_WEIGHT * verdict, weight + _PROBE_WEIGHT
        return total / weight if weight > 0 else None

    def _train(self, num_epochs: int) -> tuple[float | None, float | None]:
        """Trains the network on all rows with Adam; returns the last loss and the norm of the weights' change."""
        best = self.hindsight()
        if num_epochs == 0 or best is None:
            return None, None
        # Whatever the training loop has switched on around the scheduler's step
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
            return self._fit_to(best, num_epochs)

    def _fit_to(self, best: float, num_epochs: int) -> tuple[float, float]:
        """Trains the network to find ln(peak rate / initial rate) = `best` from every row."""
        rows = torch.from_numpy(np.asarray(self._rows, dtype=np.float32))  # from lists, torch is slow
        features, rates = rows[:, : len(FEATURE_NAMES)], rows[:, len(FEATURE_NAMES)]
        targets = (best - rates).clamp(-6.0, 6.0)
        scratch = self.config.network == "scratch"
        batches = _BATCHES_FROM_SCRATCH if scratch else 1
        generator = torch.Generator().manual_seed(self.config.seed * 100_003 + self._fits)
        parameters = list(self.network.parameters())
        before = [p.detach().clone() for p in parameters]
        epsilon = 1e-8 if scratch else _FINE_TUNING_EPSILON
        optimizer = torch.optim.Adam(parameters, lr=self.config.meta_learning_rate, eps=epsilon, fused=True)
        loss = torch.zeros(())
        for _ in range(num_epochs * max(batches, len(rows) // self.config.meta_batch_size)):
            chosen = torch.randint(len(rows), (self.config.meta_batch_size,), generator=generator, device="cpu")
            noise = torch.randn(
                (len(chosen), features.shape[1]), generator=generator, dtype=torch.float32, device="cpu"
            )
            output = self.network.correction(features[chosen] + _JITTER * noise)
            loss = F.smooth_l1_loss(output, targets[chosen])
            for p in parameters:
                p.grad = None
            loss.backward()
            if not scratch:
                # L2-SP (Li et al., 2018): few rows of one run must not undo the meta-training. The gradient of
                # anchor * |p - q|^2 by hand: autograd would take longer over it than over all the rest.
                with torch.no_grad():
                    pull = torch._foreach_sub(parameters, self._trained)
                    torch._foreach_add_([p.grad for p in parameters], pull, alpha=2.0 * self.config.anchor)
            optimizer.step()
        self._fits += 1
        change = math.sqrt(
            sum(float((p.detach() - q).square().sum()) for p, q in zip(parameters, before, strict=True))
        )
        return float(loss.detach()), change

    # Checkpoints

    _SCALARS = (
        "phase",
        "log_multiplier",
        "highest",
        "last_change",
        "restarts",
        "jumped",
        "diverged",
        "_drive_decisions",
        "_fits",
        "_probe",
        "_probe_start",
        "_probe_losses",
        "_probe_outcomes",
        "_probe_multipliers",
        "_num_probes",
        "_probe_decisions",
        "initial_learning_rate",
    )

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the rest of the run, as tensors and plain Python values (`weights_only=True`)."""
        state: dict[str, Any] = {name: getattr(self, name) for name in self._SCALARS}
        state["state"] = _state_to_dict(self.state)
        state["good_state"] = None if self._good_state is None else _state_to_dict(self._good_state)
        state["guard"] = self._guard.state_dict()
        state["before_probes"] = (
            None if self._before_probes is None else [_state_to_dict(self._before_probes[0]), *self._before_probes[1:]]
        )
        state["rows"] = torch.tensor(self._rows, dtype=torch.float64)
        state["network"] = {name: value.clone() for name, value in self.network.state_dict().items()}
        state["trained"] = [value.clone() for value in self._trained]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Takes the run up where `state_dict` left it.

        Raises:
            `InputError`: If the state was made by a network of another shape.
            `ValueError`: If it is damaged.
        """
        shapes = {name: tuple(value.shape) for name, value in self.network.state_dict().items()}
        saved = {name: tuple(value.shape) for name, value in state["network"].items()}
        if shapes != saved:
            raise InputError(
                "checkpoint",
                saved,
                f"it holds a network of another shape than this run's {shapes}.",
                "Resume with the hidden_sizes and the hf-alrs version that made the checkpoint.",
            )
        rows = state["rows"].tolist()
        if any(len(row) != len(FEATURE_NAMES) + 3 for row in rows):
            raise ValueError("rows of another width")
        if [value.shape for value in state["trained"]] != [p.shape for p in self.network.parameters()]:
            raise ValueError("trained weights of another shape")
        for name in ("log_multiplier", "highest", "last_change", "initial_learning_rate"):
            if not math.isfinite(state[name]):
                raise ValueError(f"{name} is not finite")
        for name in self._SCALARS:
            value = state[name]
            setattr(self, name, list(value) if isinstance(value, (list, tuple)) else value)
        self.state = _state_from_dict(state["state"])
        good = state["good_state"]
        self._good_state = None if good is None else _state_from_dict(good)
        self._guard.load_state_dict(state["guard"])
        before = state["before_probes"]
        self._before_probes = None if before is None else (_state_from_dict(before[0]), before[1], before[2])
        self._rows = rows
        self.network.load_state_dict(state["network"])
        self._trained = [value.clone() for value in state["trained"]]


def _state_to_dict(state: RunState) -> dict[str, float]:
    return {name: float(value) for name, value in asdict(state).items()}


def _state_from_dict(values: Mapping[str, float]) -> RunState:
    return RunState(**{name: float(value) for name, value in values.items()})
