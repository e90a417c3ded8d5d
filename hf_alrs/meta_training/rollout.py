"""
Runs of a population under the network's control, through the same features and the same control law as the product.

The inner products come from whole flat buffers of many members at once. The network stays as it is (no phase 2, no feedback
loop), there are no probes and no warmup, and no guard beside what the control law says of losses that are not finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..averaging import GAMMA, LONG_GAMMA, update_interval
from ..config import ALRSConfig, steps_of
from ..controller import WARM_DECISIONS, control, decay, decision_interval_of
from ..features import (
    SIGNALS,
    Moment,
    clean_signals,
    feature_vector,
    initial_state,
    loss_cap,
    loss_over_initial,
    restart_state,
    update_decision,
    update_evaluation,
    update_step,
)
from ..network import MetaLRNetwork
from .population import MOMENTUM, Population


@dataclass
class Rollout:
    """
    What a run under control leaves behind.

    Args:
        features (`np.ndarray` of shape `[num_decisions, num_members, num_features]`): Features at each decision.
        log_rates (`np.ndarray` of shape `[num_decisions, num_members]`): ln of the peak rate in force.
        progress (`np.ndarray` of shape `[num_decisions]`): Share of the run that was over.
        loss, error (`Tensor` of shape `[num_members]`): On the eval split at the end, of averaged weights if those are on;
            with `choose_average` of those that the loss on the controller's split chooses.
        restarts (`np.ndarray` of shape `[num_members]`): How often each member went back to its initial weights.
    """

    features: np.ndarray
    log_rates: np.ndarray
    progress: np.ndarray
    loss: Tensor
    error: Tensor
    restarts: np.ndarray


class _Probe:
    """The signals of a population; the counterpart of `hf_alrs.signals.SignalRecorder`."""

    def __init__(self, population: Population):
        self.population = population
        self.gradients, self.updates, self.weights = (torch.zeros_like(population.weights) for _ in range(3))
        self.last_weights = population.initial_weights.clone()
        self.displacement = torch.zeros_like(population.weights)
        self.initial = population.dot(population.initial_weights, population.initial_weights)
        matrices = [i for i, flag in enumerate(population.is_matrix) if flag]
        self._matrices = matrices
        widths = [0.5 * math.log(min(population.fan_in[i], population.fan_out[i])) for i in matrices]
        kernel_widths = [width for i, width in zip(matrices, widths, strict=True) if len(population.shapes[i]) > 2]
        self._constants = {
            "matrix_width": sum(widths) / len(widths),
            "kernel_width": sum(kernel_widths) / len(widths),
            "matrix_count": math.log(len(matrices)),
            "size": 0.5 * math.log(population.num_parameters),
        }

    def record_previous(self) -> None:
        """After the optimizer's step: its gradient, its update, and the weights it led to."""
        self.gradients.copy_(self.population.gradients)
        self.updates.copy_(self.population.updates)
        self.weights.copy_(self.population.weights)

    def measure(self) -> dict[str, np.ndarray]:
        """After the next step: signals at the weights that `record_previous` saw."""
        pop, dot, split = self.population, self.population.dot, self.population.split
        g, h, u, w = pop.gradients, self.gradients, self.updates, self.weights
        x, d = w - pop.initial_weights, w - self.last_weights
        squares_u = [y.square().sum(1) for y in split(u)]
        squares_w = [y.square().sum(1) for y in split(w)]
        ratio = [0.5 * ((squares_u[i] + 1e-20) / (squares_w[i] + 1e-20)).log() for i in self._matrices]
        blocks = split(g)
        zeros = [(blocks[i] == 0).float().mean(1) for i in self._matrices]
        values = {
            "gg": dot(g, g),
            "gh": dot(g, h),
            "hh": dot(h, h),
            "gu": dot(g, u),
            "hu": dot(h, u),
            "uu": sum(squares_u),
            "ww": sum(squares_w),
            "gx": dot(g, x),
            "xx": dot(x, x),
            "initial": self.initial,
            "dd": dot(d, d),
            "de": dot(d, self.displacement),
            "ee": dot(self.displacement, self.displacement),
            "matrix_update_ratio": sum(ratio) / len(ratio),
            "zero_gradient": sum(zeros) / len(zeros),
        }
        self.displacement, self.last_weights = d, w.clone()
        signals = {name: value.double().cpu().numpy() for name, value in values.items()}
        return {
            name: signals[name] if name in signals else np.full(pop.size, self._constants[name]) for name in SIGNALS
        }

    def reset(self, mask: Tensor) -> None:
        split = self.population.split
        for block in split(self.displacement):
            block[mask] = 0
        for block, initial in zip(split(self.last_weights), split(self.population.initial_weights), strict=True):
            block[mask] = initial[mask]


def rollout(
    population: Population,
    log_rates: Tensor,
    network: MetaLRNetwork | None,
    config: ALRSConfig | None = None,
    explore: Callable[[float], np.ndarray] | None = None,
    num_evaluations: int = 0,
    record: bool = True,
) -> Rollout:
    """
    A whole run of every member under the network's control.

    Args:
        population (`Population`): Reset here.
        log_rates (`Tensor` of shape `[num_members]`): ln of each member's initial rate.
        network (`MetaLRNetwork`, *optional*): `None` corrects nothing, apart from what `explore` adds.
        config (`ALRSConfig`, *optional*): The control law's constants.
        explore (`Callable[[float], np.ndarray]`, *optional*): Given the progress, noise to add to the corrections.
        num_evaluations (`int`, *optional*, defaults to 0): How often the controller's split is evaluated.
        record (`bool`, *optional*, defaults to `True`): Whether to keep features and rates.
    """
    config = config or ALRSConfig()
    spec, size = population.spec, population.size
    total = spec.num_training_steps
    interval = decision_interval_of(config, total, population.steps_per_epoch)
    final_ratio = config.final_ratio(total)
    first_jump = max(1, math.ceil(steps_of(config.phase1_steps, total) / interval))
    evaluate_every = max(1, total // num_evaluations) if num_evaluations else total + 1
    population.reset()
    population.beta1 = min(MOMENTUM, config.highest_beta1(total))
    # Each with its gamma
    averages: list[tuple[Tensor, int]] = []
    if config.average_weights:
        gammas = (GAMMA, LONG_GAMMA) if config.choose_average else (GAMMA,)
        averages = [(population.initial_weights.clone(), gamma) for gamma in gammas]
    num_updates = np.zeros(size)
    probe = _Probe(population)
    state = initial_state((size,))
    initial = log_rates.double().cpu().numpy()
    offset, highest, last_change = np.zeros(size), np.zeros(size), np.zeros(size)
    restarts, finite = np.zeros(size), np.ones(size, dtype=bool)
    jumped = np.zeros(size, dtype=bool)
    kept: list[tuple[np.ndarray, np.ndarray, float]] = []
    for step in range(total):
        loss = population.loss_and_gradient(step)
        rate = np.exp(initial + offset) * decay(final_ratio, step, total)
        population.optimizer_step(torch.from_numpy(rate).float().to(population.device))
        values = loss.double().cpu().numpy()
        finite &= np.isfinite(values) & (values <= loss_cap(state))
        state = update_step(state, values, total, interval)
        if 0 < step < total and step % interval == 0:
            signals = probe.measure()
            finite &= np.isfinite(signals["ww"]) & np.isfinite(signals["gg"])
            signals = clean_signals(signals)
            previous = np.maximum(np.exp(initial + offset) * decay(final_ratio, step - 1, total), 1e-30)
            state = update_decision(state, signals, previous, interval)
            features = feature_vector(
                Moment(
                    state=state,
                    signals=signals,
                    step=step,
                    num_training_steps=total,
                    decision_interval=interval,
                    num_epochs=population.num_epochs,
                    adaptive=spec.optimizer.startswith("adam"),
                    learning_rate=previous,
                    peak_learning_rate=np.exp(initial + offset),
                    last_change=last_change,
                )
            )
            if record:
                kept.append((features, initial + offset, step / total))
            correction = np.zeros(size)
            if network is not None:
                with torch.no_grad():
                    correction = network.correction(torch.from_numpy(features).float()).double().numpy()
            if explore is not None:
                correction = correction + explore(step / total)
            change, restart = control(
                config,
                correction,
                state.decision_count,
                np.where(jumped, min(WARM_DECISIONS, first_jump), first_jump),
                step / total,
                finite,
                offset,
                highest,
                loss_over_initial(state),
                restarts,
            )
            jumped |= state.decision_count >= first_jump
            ceiling = np.maximum(math.log(config.max_lr) - initial, 0.0)
            target = np.minimum(offset + change, ceiling)
            last_change, offset = target - offset, target
            highest = np.where(restart, offset, np.maximum(highest, offset))
            restarts += restart
            num_updates[restart | ~finite] = 0
            finite = np.ones(size, dtype=bool)
            if restart.any():
                state = restart_state(state, restart)
                mask = torch.from_numpy(restart).to(population.device)
                population.restart(mask)
                for average, _ in averages:  # until the next update, the weights themselves are evaluated
                    for mean, weight in zip(
                        population.split(average), population.split(population.weights), strict=True
                    ):
                        mean[mask] = weight[mask]
                probe.reset(mask)
        if (step + 1) % interval == 0:
            probe.record_previous()
        if averages and (step + 1) % update_interval(total) == 0:
            for average, gamma in averages:
                population.update_average(average, num_updates, gamma)
            num_updates += 1
        if (step + 1) % evaluate_every == 0:
            eval_loss, eval_error = population.evaluate("controller", averages[0][0] if averages else None)
            state = update_evaluation(state, eval_loss.double().cpu().numpy(), 1.0 - eval_error.double().cpu().numpy())
    loss, error = population.evaluate_chosen([average for average, _ in averages])
    empty = not kept
    return Rollout(
        features=np.zeros((0, size, 0)) if empty else np.stack([k[0] for k in kept]).astype(np.float32),
        log_rates=np.zeros((0, size)) if empty else np.stack([k[1] for k in kept]),
        progress=np.array([k[2] for k in kept]),
        loss=loss,
        error=error,
        restarts=restarts,
    )
