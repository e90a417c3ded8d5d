"""
Meta-training and the product are one implementation: the same small task, once as a member of a population and once as
a torch model with a torch optimizer and [`ALRSScheduler`], gives the same features, rates, weights and averaged weights, of which the same are chosen.

A network is only as good as the match between what it was trained on and what it reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import scratch_network
from torch import nn

from hf_alrs import ALRSConfig, ALRSScheduler, MetaLRNetwork
from hf_alrs.averaging import CHOICE_PARTS, LONG_SHARES, RAW_WEIGHTS, choice_size
from hf_alrs.features import FEATURE_NAMES, SIGNALS
from hf_alrs.meta_training.population import Population, TaskSpec
from hf_alrs.meta_training.rollout import Rollout, _Probe, rollout
from hf_alrs.signals import SignalRecorder


T = 160


class MLP(nn.Module):
    """The population's MLP with the usual parameter tensors: matrices with two dimensions, biases with one."""

    def __init__(self, population: Population):
        super().__init__()
        self.activation = {"relu": torch.relu, "tanh": torch.tanh}[population.spec.activation]
        flat = population.split(population.initial_weights)
        for name, shape, weights in zip(population.parameter_names, population.shapes, flat, strict=True):
            shape = shape if name.endswith("weight") else shape[1:]
            self.register_parameter(name.replace(".", "_"), nn.Parameter(weights[0].clone().view(shape)))
        self.depth = population.spec.depth

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in range(self.depth):
            x = self.activation(x @ getattr(self, f"layer{layer}_weight") + getattr(self, f"layer{layer}_bias"))
        return x @ self.head_weight + self.head_bias


def make_optimizer(model: MLP, spec: TaskSpec, rate: float) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": spec.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    if spec.optimizer == "adam":
        return torch.optim.Adam(groups, lr=rate)
    if spec.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=rate)
    return torch.optim.SGD(groups, lr=rate, momentum=0.9 if spec.optimizer == "sgdm" else 0.0)


def flat_weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def product_run(
    population: Population, rate: float, config: ALRSConfig, num_evaluations: int
) -> tuple[list[dict[str, Any]], torch.Tensor, list[torch.Tensor], float]:
    """
    The task as a torch training loop: its history, the weights it trained, the averaged ones for each share of the long
    average, and the loss of those that the controller's split chooses.
    """
    spec, T = population.spec, population.spec.num_training_steps
    model = MLP(population)
    optimizer = make_optimizer(model, spec, rate)
    scheduler = ALRSScheduler(
        optimizer, T, config=config, steps_per_epoch=population.steps_per_epoch, model=model, can_choose=True
    )

    @torch.no_grad()
    def loss_on(split: str) -> float:
        inputs, labels = (x[split][0] for x in (population._inputs, population._labels))
        return float(nn.functional.cross_entropy(model(inputs), labels))

    every = T // num_evaluations if num_evaluations else T + 1
    for step in range(T):
        num_parts = spec.gradient_accumulation_steps
        for inputs, labels in zip(*(x[0].chunk(num_parts) for x in population._batch(step)), strict=True):
            loss = nn.functional.cross_entropy(model(inputs), labels)
            scheduler.observe(loss=loss)
            (loss / num_parts).backward()
        if spec.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), spec.clip_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if (step + 1) % every == 0:
            scheduler.show_average()
            with torch.no_grad():
                logits = model(population._inputs["controller"][0])
            if step + 1 < T:  # as a loop does before it goes on
                scheduler.hide_average()
            labels = population._labels["controller"][0]
            loss = nn.functional.cross_entropy(logits, labels)
            scheduler.observe_evaluation(loss, float((logits.argmax(-1) == labels).float().mean()))
    scheduler.flush()
    averages = []
    for share in LONG_SHARES:
        with scheduler.showing(share):
            averages.append(flat_weights(model))

    @torch.no_grad()
    def losses_of_parts() -> list[float]:
        chosen = (
            x["controller"][0][: choice_size(T * spec.batch_size)] for x in (population._inputs, population._labels)
        )
        parts = zip(*(x.chunk(CHOICE_PARTS) for x in chosen), strict=True)
        return [float(nn.functional.cross_entropy(model(inputs), labels)) for inputs, labels in parts]

    scheduler.choose_average(losses_of_parts)
    loss = loss_on("eval")
    scheduler.hide_average()
    return scheduler.history, flat_weights(model), averages, loss


def rollout_with_average(
    population: Population, rate: float, network: MetaLRNetwork, config: ALRSConfig, num_evaluations: int
) -> tuple[Rollout, list[torch.Tensor]]:
    """A rollout of one member, and its two averages of the weights at the end, the long one last."""
    buffers: dict[int, torch.Tensor] = {}
    update = population.update_average

    def spy(average: torch.Tensor, num_updates: np.ndarray, gamma: int) -> None:
        update(average, num_updates, gamma)
        buffers[gamma] = average

    population.update_average = spy
    result = rollout(population, torch.tensor([math.log(rate)]), network, config, num_evaluations=num_evaluations)
    averages = (buffers[gamma] for gamma in sorted(buffers, reverse=True))
    return result, [torch.cat([x[0] for x in population.split(average)]) for average in averages]


def network_with_a_say() -> MetaLRNetwork:
    """
    Pulls the size of updates towards a usual one, so that far too high a rate is brought down and a low one raised,
    and depends on all other features a little.
    """
    network = scratch_network(seed=3, hidden_sizes=(16,), scale=1.5)
    index = FEATURE_NAMES.index("update_ratio_matrices")
    with torch.no_grad():
        for unit, sign in ((0, 1.0), (1, -1.0)):  # relu(x) - relu(-x) = x
            network.layers[0].weight[unit] = 0.0
            network.layers[0].weight[unit, index] = sign
            network.layers[0].bias[unit] = 0.0
            network.layers[-1].weight[0, unit] = -3.0 * sign
    return network


MLP_SPEC = {"seed": 3, "kind": "mlp", "data": "teacher", "hidden": 12, "depth": 2, "num_classes": 3}
MLP_SPEC |= {"num_training_steps": T, "batch_size": 16, "num_examples": 300, "activation": "tanh"}
CASES = {
    # optimizer and its options, initial rate, evaluations
    "adam": ({"optimizer": "adam"}, 1e-3, 8),
    "adamw with decay": ({"optimizer": "adamw", "weight_decay": 0.05}, 1e-3, 0),
    "momentum with clipping": ({"optimizer": "sgdm", "weight_decay": 1e-3, "clip_norm": 0.5}, 3e-3, 8),
    "sgd": ({"optimizer": "sgd"}, 1e-2, 0),
    "sgd, accumulated": ({"optimizer": "sgd", "gradient_accumulation_steps": 4, "weight_decay": 1e-3}, 1e-2, 0),
    "adam, far too high": ({"optimizer": "adam"}, 0.5, 8),
    "momentum, far too high": ({"optimizer": "sgdm", "activation": "relu"}, 0.6, 0),
    # less momentum than 0.9, more than in a short run
    "adam, long": ({"optimizer": "adam", "num_training_steps": 500}, 1e-3, 0),
    # five steps for each update of the average
    "sgd, long": ({"optimizer": "sgd", "num_training_steps": 600}, 1e-2, 8),
}
RUNS = [(case, True) for case in CASES] + [("adam", False), ("momentum, far too high", False)]


@pytest.mark.parametrize(
    ("case", "average"), RUNS, ids=[case + ("" if average else ", not averaged") for case, average in RUNS]
)
def test_population_and_product_agree(case: str, average: bool, network_folder: Callable[..., str]) -> None:
    options, rate, num_evaluations = CASES[case]
    population = Population(TaskSpec(**(MLP_SPEC | options)), 1, 1)
    T = population.spec.num_training_steps
    network = network_with_a_say()
    config = ALRSConfig(
        network=network_folder(network),
        num_probes=0,
        meta_num_epochs=0,
        feedback_interval=0,
        average_weights=average,
        choose_average=average,
    )
    expected, two = rollout_with_average(population, rate, network, config, num_evaluations)
    weights = torch.cat([x[0] for x in population.split(population.weights)])
    history, trained, averages, loss = product_run(population, rate, config, num_evaluations)

    decisions = [entry for entry in history if "features" in entry]
    assert len(decisions) == len(expected.features)
    restarts = [entry["step"] for entry in decisions if entry["action"] == "restart"]
    assert len(restarts) == expected.restarts[0]
    assert restarts or not case.endswith("high")

    in_force = 0.0
    for i, entry in enumerate(decisions):
        for j, name in enumerate(FEATURE_NAMES):
            got, want = entry["features"][name], float(expected.features[i, 0, j])
            assert got == pytest.approx(want, rel=1e-3, abs=1e-3), f"{name} at step {entry['step']}"
        assert math.log(rate) + in_force == pytest.approx(expected.log_rates[i, 0], abs=1e-3)
        in_force = entry["log_multiplier"]
    changes = np.abs(np.diff(expected.log_rates[:, 0]))
    assert (changes > 1e-3).sum() > 20, "the rate must move, or agreement means little"

    # The rate of each step: the log rate that the last decision before it left, with the decay
    interval = T // len(decisions) if T % len(decisions) == 0 else decisions[1]["step"] - decisions[0]["step"]
    for step in range(T):
        if (step - 1) // interval < len(expected.log_rates):
            peak = expected.log_rates[max(0, math.ceil(step / interval) - 1), 0]
            want = math.exp(peak) * (0.3 + 0.7 * (1 - step / T) if average else 1 - step / T)
            assert history[step]["learning_rate"] == pytest.approx(want, rel=2e-3), f"rate of step {step}"

    torch.testing.assert_close(trained, weights, rtol=2e-3, atol=2e-3)
    if average:
        for share, left in zip(LONG_SHARES, averages, strict=True):
            mixed = trained if share == RAW_WEIGHTS else torch.lerp(*two, share)
            torch.testing.assert_close(left, mixed, rtol=2e-3, atol=2e-3)
        for left in two:
            assert (left - trained).abs().max() > 1e-3, "the two must differ, or agreement means little"
        assert (two[0] - two[1]).abs().max() > 1e-3
    else:
        assert two == []
        assert all(torch.equal(left, trained) for left in averages)
    assert loss == pytest.approx(float(expected.loss[0]), rel=2e-3)


def test_widths_of_a_conv_net_agree() -> None:
    spec = {"kind": "conv", "data": "digits", "hidden": 8, "depth": 3, "optimizer": "sgd", "num_classes": 10}
    population = Population(TaskSpec(**(MLP_SPEC | spec)), 1, 1)
    probe = _Probe(population)
    recorder = SignalRecorder(
        [
            nn.Parameter(torch.ones(shape if matrix else (math.prod(shape),)))
            for shape, matrix in zip(population.shapes, population.is_matrix, strict=True)
        ],
        100,
    )
    recorder.start()
    recorder.record_previous()
    measured = dict(zip(SIGNALS, recorder.measure().tolist(), strict=True))
    for name in ("matrix_width", "kernel_width", "matrix_count"):
        assert probe._constants[name] == pytest.approx(measured[name]), name
    assert 0 < measured["kernel_width"] < measured["matrix_width"]
