"""The seam to transformers, on a real Trainer: the callback alone, and ALRSTrainer."""

from __future__ import annotations

import copy
import io
import json
import logging
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import AnyKeyword, LanguageModelLoss, TinyClassifier, network_saying, tiny_classifier, tiny_dataset
from safetensors.torch import load_file
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_alrs import ALRSCallback, ALRSConfig, ALRSScheduler, ALRSTrainer, InputError, get_scheduler
from hf_alrs.averaging import LONG_SHARES
from hf_alrs.callback import HISTORY_NAME, prepare_again


Config = Callable[..., ALRSConfig]
NUM_STEPS = 24


def arguments(output_dir: Path, **changed: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(output_dir),
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return TrainingArguments(**(defaults | changed))


def rates_used(trainer: Trainer) -> list[float]:
    """A list that fills with the rate of each optimizer step, as the optimizer itself sees it."""
    used: list[float] = []

    class Spy(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            inner = getattr(optimizer, "optimizer", optimizer)
            inner.register_step_pre_hook(lambda o, *_: used.append(o.param_groups[0]["lr"]))

    trainer.add_callback(Spy())
    return used


def logged(trainer: Trainer, key: str = "learning_rate") -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry and "loss" in entry]


def history_of(output_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir / HISTORY_NAME).read_text().splitlines()]


def weights_of(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def make_trainer(
    route: str,
    args: TrainingArguments,
    config: ALRSConfig,
    model: torch.nn.Module | None = None,
    **kwargs: Any,
) -> Trainer:
    """A Trainer by either route."""
    if "model_init" not in kwargs:
        kwargs["model"] = model if model is not None else tiny_classifier()
    kwargs.setdefault("train_dataset", tiny_dataset())
    if route == "callback":
        return Trainer(args=args, callbacks=[ALRSCallback(config)], **kwargs)
    return ALRSTrainer(args=args, alrs_config=config, **kwargs)


ROUTES = ["callback", "trainer"]
routes = pytest.mark.parametrize("route", ROUTES)


def test_the_length_of_an_epoch_is_that_of_the_loader(tmp_path: Path, moving_config: Config) -> None:
    def with_loader(cls: type) -> type:
        class OwnLoader(cls):
            def get_train_dataloader(self) -> Any:
                loader = torch.utils.data.DataLoader(self.train_dataset, 4, collate_fn=self.data_collator)
                return self.accelerator.prepare(loader)

        return OwnLoader

    args = {"per_device_train_batch_size": 16, "num_train_epochs": 2.0, "max_steps": -1}
    config = moving_config(decision_interval="epoch")
    callback = ALRSCallback(config)
    plain = with_loader(Trainer)(
        tiny_classifier(), arguments(tmp_path, **args), train_dataset=tiny_dataset(64), callbacks=[callback]
    )
    own = with_loader(ALRSTrainer)(
        tiny_classifier(), arguments(tmp_path, **args), train_dataset=tiny_dataset(64), alrs_config=config
    )
    plain.train()
    own.train()
    for scheduler in (callback.scheduler, own.alrs_callback.scheduler):
        assert scheduler.controller.num_training_steps == 32
        assert scheduler.controller.num_epochs == 2.0
        assert scheduler.controller.decision_interval == 16


def test_alrs_trainer_sees_all_with_a_schedule_of_the_script_too(tmp_path: Path, moving_config: Config) -> None:
    model = tiny_classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = make_trainer("trainer", arguments(tmp_path), moving_config(), model, optimizers=(optimizer, schedule))
    trainer.train()
    history = history_of(tmp_path)
    assert len(history) == NUM_STEPS
    assert [entry["loss"] for entry in history] == pytest.approx(logged(trainer, "loss"), rel=1e-3)
    assert all(entry["grad_norm"] > 0 for entry in history)
    assert logged(trainer, "alrs/log_multiplier")


def test_the_replicas_of_data_parallel_tell_nothing(tmp_path: Path, moving_config: Config) -> None:
    callback = ALRSCallback(moving_config())
    callback.scheduler = SimpleNamespace(observe=lambda **kwargs: told.append(kwargs["loss"]))
    told: list[torch.Tensor] = []
    model = tiny_classifier()
    model.register_forward_hook(callback._after_forward, with_kwargs=True)
    replica = model._replicate_for_data_parallel()
    replica.forward = lambda **_: {"loss": torch.tensor(1.0)}
    replica(x=torch.zeros(1, 6))
    assert not told
    model(x=torch.zeros(1, 6), labels=torch.zeros(1, dtype=torch.long))
    assert len(told) == 1


def test_a_callback_that_is_added_to_alrs_trainer_is_refused(tmp_path: Path, moving_config: Config) -> None:
    trainer = make_trainer("trainer", arguments(tmp_path), moving_config())
    trainer.add_callback(ALRSCallback())
    with pytest.raises(InputError, match="must not be given to ALRSTrainer"):
        trainer.train()


# Rates and history


@routes
@pytest.mark.parametrize("schedule", [{}, {"warmup_steps": 5}, {"lr_scheduler_type": "constant"}])
def test_the_logged_rate_is_the_one_in_use(
    route: str, schedule: dict[str, Any], tmp_path: Path, moving_config: Config
) -> None:
    trainer = make_trainer(route, arguments(tmp_path, **schedule), moving_config(average_weights=False))
    used = rates_used(trainer)
    trainer.train()
    history = history_of(tmp_path)
    assert len(used) == NUM_STEPS
    assert [entry["step"] for entry in history] == list(range(1, NUM_STEPS + 1))
    assert [entry["learning_rate"] for entry in history] == used
    assert logged(trainer) == used
    multipliers = [entry["log_multiplier"] for entry in history if "features" in entry]
    assert len(multipliers) == 7
    assert len(set(multipliers)) > 4, f"the network must move the rate, got {multipliers}"
    if "warmup_steps" in schedule:
        assert used[:3] == pytest.approx([0.01 * (i + 1) / 5 * (1 - i / NUM_STEPS) for i in range(3)])


@routes
def test_the_history_shows_the_three_phases(route: str, tmp_path: Path, moving_config: Config) -> None:
    trainer = make_trainer(route, arguments(tmp_path), moving_config())
    trainer.train()
    history = history_of(tmp_path)
    phases = [entry["phase"] for entry in history]
    assert sorted(set(phases), key=phases.index) == ["gather", "fit", "drive"]
    decisions = [entry for entry in history if "features" in entry]
    assert [entry["step"] for entry in decisions] == [4, 7, 10, 13, 16, 19, 22]
    fit = next(entry for entry in decisions if entry["phase"] == "fit")
    assert fit["network_change"] > 0
    assert any(entry["network_change"] for entry in decisions if entry["phase"] == "drive")
    assert all(math.isfinite(entry["loss"]) for entry in history)


@routes
def test_both_routes_agree(route: str, tmp_path: Path, moving_config: Config) -> None:
    """On a plain run the callback sees what ALRSTrainer sees, so the rates are the same."""
    rates = []
    for other in ROUTES:
        trainer = make_trainer(other, arguments(tmp_path / other), moving_config())
        used = rates_used(trainer)
        trainer.train()
        rates.append(used)
    assert rates[0] == rates[1]


def test_the_loss_of_the_history_is_the_logged_one(tmp_path: Path, moving_config: Config) -> None:
    trainer = make_trainer("trainer", arguments(tmp_path), moving_config())
    trainer.train()
    got = [entry["loss"] for entry in history_of(tmp_path)]
    assert got == pytest.approx(logged(trainer, "loss"), abs=1e-4)  # Trainer rounds
    assert logged(trainer, "alrs/phase")[-1] == 3
    assert isinstance(logged(trainer, "alrs/log_multiplier")[-1], float)


def test_no_history_where_none_is_wanted(tmp_path: Path, moving_config: Config) -> None:
    callback = ALRSCallback(moving_config(), write_history=False)
    trainer = Trainer(tiny_classifier(), arguments(tmp_path), train_dataset=tiny_dataset(), callbacks=[callback])
    trainer.train()
    assert not (tmp_path / HISTORY_NAME).exists()
    assert callback.scheduler.history == []  # and nothing piles up


@routes
def test_the_history_is_strict_json(route: str, tmp_path: Path, moving_config: Config) -> None:
    class Broken(TinyClassifier):
        def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
            output = super().forward(x, labels)
            return output | ({"loss": output["loss"] * math.nan} if labels is not None else {})

    args = arguments(tmp_path, max_steps=8, max_grad_norm=0.0)
    make_trainer(route, args, moving_config(max_restarts=1), model=Broken()).train()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    lines = (tmp_path / HISTORY_NAME).read_text().splitlines()
    entries = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [entry["loss"] for entry in entries] == [None] * 8
    assert all(math.isfinite(entry["learning_rate"]) for entry in entries)


@routes
def test_a_second_training_starts_anew(route: str, tmp_path: Path, moving_config: Config) -> None:
    trainer = make_trainer(route, arguments(tmp_path), moving_config())
    used = rates_used(trainer)
    trainer.train()
    first = len(used)
    trainer.callback_handler.pop_callback(trainer.callback_handler.callbacks[-1])
    second = rates_used(trainer)
    trainer.train()
    assert first == NUM_STEPS
    # Rates are counted by the hooks of both runs where the optimizer is the same object.
    assert len(second) == NUM_STEPS
    assert second[0] == pytest.approx(0.01)
    history = history_of(tmp_path)
    assert [entry["step"] for entry in history] == list(range(1, NUM_STEPS + 1))
    assert [entry["learning_rate"] for entry in history] == second
    assert logged(trainer) == second


def test_the_users_own_scheduler_is_taken_over(tmp_path: Path, moving_config: Config) -> None:
    model = tiny_classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    trainer = Trainer(
        model,
        arguments(tmp_path),
        train_dataset=tiny_dataset(),
        callbacks=[ALRSCallback(moving_config(average_weights=False))],
        optimizers=(optimizer, scheduler),
    )
    used = rates_used(trainer)
    trainer.train()
    assert used[:7] == pytest.approx([0.02 * (1 - i / NUM_STEPS) for i in range(7)])
    assert logged(trainer) == used


def test_optimizers_with_an_alrs_scheduler(tmp_path: Path, moving_config: Config) -> None:
    model = tiny_classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    scheduler = get_scheduler("alrs", optimizer, 0, NUM_STEPS, {"config": moving_config()})
    trainer = ALRSTrainer(
        model=model, args=arguments(tmp_path), train_dataset=tiny_dataset(), optimizers=(optimizer, scheduler)
    )
    used = rates_used(trainer)
    trainer.train()
    assert logged(trainer) == used
    assert [entry["learning_rate"] for entry in history_of(tmp_path)] == used


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_schedulers_stepped_with_a_metric_are_refused(name: str, tmp_path: Path, moving_config: Config) -> None:
    args = arguments(tmp_path, lr_scheduler_type=name, eval_strategy="steps", eval_steps=10)
    trainer = make_trainer("callback", args, moving_config(), eval_dataset=tiny_dataset(16))
    with pytest.raises(InputError, match="lr_scheduler_type"):
        trainer.train()


@routes
@pytest.mark.reliability("DeepSpeed configuration with a scheduler of its own: refused with the remedy")
def test_a_scheduler_of_deepspeed_is_refused(route: str, tmp_path: Path, moving_config: Config) -> None:
    args = arguments(tmp_path)
    args.hf_deepspeed_config = SimpleNamespace(config={"scheduler": {"type": "WarmupLR"}}, is_zero3=lambda: False)
    with pytest.raises(InputError, match="Take the `scheduler` section out of it"):
        make_trainer(route, args, moving_config()).train()


@routes
def test_model_init(route: str, tmp_path: Path, moving_config: Config) -> None:
    args = arguments(tmp_path)
    trainer = make_trainer(route, args, moving_config(), model_init=lambda: tiny_classifier())
    used = rates_used(trainer)
    trainer.train()
    assert logged(trainer) == used
    assert len(history_of(tmp_path)) == NUM_STEPS


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(tiny_dataset(400))


@routes
def test_data_without_length(route: str, tmp_path: Path, moving_config: Config) -> None:
    trainer = make_trainer(route, arguments(tmp_path), moving_config(), train_dataset=Stream())
    trainer.train()
    assert len(history_of(tmp_path)) == NUM_STEPS


@routes
@pytest.mark.parametrize("drop_last", [False, True])
def test_an_epoch_is_as_long_as_trainers(route: str, drop_last: bool, tmp_path: Path, moving_config: Config) -> None:
    args = arguments(tmp_path, dataloader_drop_last=drop_last, gradient_accumulation_steps=2, max_steps=12)
    # 68 examples: 8 or 9 batches, so 4 or 5 optimizer steps
    trainer = make_trainer(
        route, args, moving_config(decision_interval="epoch", phase1_steps=1), train_dataset=tiny_dataset(68)
    )
    trainer.train()
    decisions = [entry["step"] for entry in history_of(tmp_path) if "features" in entry]
    length = 4 if drop_last else 5
    assert decisions == [1 + length * i for i in range(1, 11 // length + 1)]


# Losses


class Recorded(TinyClassifier):
    """Keeps the logits and labels of every forward pass in training."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        output = super().forward(x, labels)
        if self.training:
            self.seen.append((output["logits"].detach().clone(), labels))
        return output


def recorded() -> Recorded:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Recorded()
    model.seen = []
    return model


@pytest.mark.parametrize("accumulation", [1, 8])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_exact_mean_loss_is_observed(
    accumulation: int, smoothing: float, tmp_path: Path, moving_config: Config
) -> None:
    model = recorded()
    args = arguments(
        tmp_path,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        label_smoothing_factor=smoothing,
        max_steps=10,
    )
    labels_seen: list[torch.Tensor] = []  # with label smoothing the model gets none

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        labels_seen.append(torch.stack([row["labels"] for row in rows]))
        return {"x": torch.stack([row["x"] for row in rows]), "labels": labels_seen[-1]}

    trainer = make_trainer("trainer", args, moving_config(), model=model, data_collator=collate)
    trainer.train()
    logits = [logits for logits, _ in model.seen]
    expected = []
    for step in range(10):
        at = slice(step * accumulation, (step + 1) * accumulation)
        loss = torch.nn.functional.cross_entropy(
            torch.cat(logits[at]), torch.cat(labels_seen[at]), label_smoothing=smoothing
        )
        expected.append(loss.item())
    got = [entry["loss"] for entry in history_of(tmp_path)]
    assert got == pytest.approx(expected, rel=1e-5)


def trained_with_accumulation(
    route: str, folder: Path, config: ALRSConfig, make_model: Callable[[], torch.nn.Module]
) -> list[Trainer]:
    """A batch of eight as it is, and one example at a time: both runs, after the same numbers and weights were found."""
    trainers, runs = [], []
    for batch_size, accumulation in ((8, 1), (1, 8)):
        args = arguments(
            folder / str(accumulation),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=0.05,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            trainers.append(make_trainer(route, args, config, model=make_model()))
        trainers[-1].train()
        runs.append(history_of(Path(args.output_dir)))
    for key in ("loss", "learning_rate"):
        first, second = ([entry[key] for entry in run] for run in runs)
        assert second == pytest.approx(first, rel=2e-3), key
    for x, y in zip(*(weights_of(trainer.model) for trainer in trainers), strict=True):  # the averaged ones
        torch.testing.assert_close(x, y, rtol=2e-3, atol=1e-4)
    return trainers


@routes
def test_accumulation_changes_nothing(route: str, tmp_path: Path, moving_config: Config) -> None:
    trained_with_accumulation(route, tmp_path, moving_config(), tiny_classifier)


@routes
def test_a_partial_last_accumulation_is_a_mean_too(route: str, tmp_path: Path, moving_config: Config) -> None:
    # 20 examples by 4 in threes: the second step of each epoch has two micro-batches
    args = arguments(
        tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=3, max_steps=8, learning_rate=1e-9
    )
    model = recorded()
    make_trainer(route, args, moving_config(), model=model, train_dataset=tiny_dataset(20)).train()
    losses = [torch.nn.functional.cross_entropy(logits, labels).item() for logits, labels in model.seen]
    expected = []
    for epoch in range(4):
        expected += [np.mean(losses[5 * epoch : 5 * epoch + 3]), np.mean(losses[5 * epoch + 3 : 5 * epoch + 5])]
    assert [entry["loss"] for entry in history_of(tmp_path)] == pytest.approx(expected, rel=1e-5)


@routes
def test_losses_normalised_by_the_whole_step(route: str, tmp_path: Path, moving_config: Config) -> None:
    runs = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        args = arguments(
            tmp_path / str(accumulation),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=4,
            optim="sgd",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = LanguageModelLoss()
        make_trainer(route, args, moving_config(), model=model).train()
        runs.append([entry["loss"] for entry in history_of(Path(args.output_dir))])
    assert runs[1] == pytest.approx(runs[0], rel=1e-3)


class TupleOutput(TinyClassifier):
    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        return tuple(super().forward(x, labels).values())


def test_the_loss_of_a_tuple_is_seen(tmp_path: Path, moving_config: Config) -> None:
    trainer = make_trainer("callback", arguments(tmp_path), moving_config(), model=TupleOutput())
    trainer.train()
    assert [entry["loss"] for entry in history_of(tmp_path)] == pytest.approx(logged(trainer, "loss"), abs=1e-4)


@routes
def test_evaluation_losses_are_not_training_losses(route: str, tmp_path: Path, moving_config: Config) -> None:
    plain = make_trainer(route, arguments(tmp_path / "plain"), moving_config())
    plain.train()
    args = arguments(tmp_path / "evaluated", eval_strategy="steps", eval_steps=2)
    evaluated = make_trainer(route, args, moving_config(), eval_dataset=tiny_dataset(16, seed=9))
    evaluated.train()
    assert history_of(tmp_path / "plain") == history_of(tmp_path / "evaluated")


def test_the_callback_says_when_it_sees_no_loss(
    tmp_path: Path, moving_config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    args = arguments(tmp_path, label_smoothing_factor=0.1)
    trainer = make_trainer("callback", args, moving_config())
    with caplog.at_level(logging.WARNING, logger="hf_alrs"):
        trainer.train()
    (warning,) = [record.message for record in caplog.records if "no loss" in record.message]
    assert "use ALRSTrainer" in warning and "scheduler.observe" not in warning
    history = history_of(tmp_path)
    assert {entry["loss"] for entry in history} == {None}
    assert len({entry["log_multiplier"] for entry in history if "features" in entry}) > 2  # it drives all the same


@routes
def test_no_warning_where_losses_are_seen(
    route: str, tmp_path: Path, moving_config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="hf_alrs"):
        make_trainer(route, arguments(tmp_path), moving_config()).train()
    assert [record.message for record in caplog.records if record.name.startswith("hf_alrs")] == []


def test_the_gradient_norm_is_that_before_clipping(tmp_path: Path, moving_config: Config) -> None:
    norms: list[float] = []

    class Spy(ALRSTrainer):
        def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
            total = torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt()
            norms.append(float(total))
            return super()._get_grad_norm(model, grad_norm)

    class Before(TrainerCallback):
        def __init__(self) -> None:
            self.clipped: list[float] = []

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kw: Any) -> None:
            total = torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt()
            self.clipped.append(float(total))

    spy = Before()
    trainer = Spy(
        model=tiny_classifier(),
        args=arguments(tmp_path, max_grad_norm=0.05),
        train_dataset=tiny_dataset(),
        alrs_config=moving_config(),
        callbacks=[spy],
    )
    trainer.train()
    got = [entry["grad_norm"] for entry in history_of(tmp_path)]
    assert spy.clipped == pytest.approx([0.05] * NUM_STEPS, rel=1e-3)
    assert min(got) > 0.06, f"expected norms before clipping, got {got}"
    assert got == pytest.approx(logged(trainer, "grad_norm"), rel=1e-3)


# Evaluation


def features_of(output_dir: Path) -> list[dict[str, float]]:
    return [entry["features"] for entry in history_of(output_dir) if "features" in entry]


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


@routes
def test_the_controllers_split_is_seen(route: str, tmp_path: Path, moving_config: Config) -> None:
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=5)
    trainer = make_trainer(
        route,
        args,
        moving_config(controller_evaluations=0),
        eval_dataset={"controller": tiny_dataset(16, seed=9), "held_out": tiny_dataset(16, seed=10)},
        compute_metrics=accuracy,
    )
    trainer.train()
    features = features_of(tmp_path)
    # Evaluations after steps 5, 10, ...; decisions after steps 4, 7, ...
    assert [f["evaluated"] for f in features] == [0.0] + [1.0] * 6
    losses = [entry["eval_controller_loss"] for entry in trainer.state.log_history if "eval_controller_loss" in entry]
    scheduler = trainer.callback_handler.lr_scheduler
    if not isinstance(scheduler, ALRSScheduler):
        scheduler = next(c for c in trainer.callback_handler.callbacks if isinstance(c, ALRSCallback)).scheduler
    assert float(scheduler.controller.state.eval_loss) == pytest.approx(losses[-1])
    assert float(scheduler.controller.state.eval_best_accuracy) > 0


class EvaluationCounter(TrainerCallback):
    """How many evaluations the controller had seen after each step; fails when an evaluation is announced."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.counts: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.counts.append(float(self.trainer.lr_scheduler.controller.state.eval_count))

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("no callback is told")


def test_the_controllers_split_is_evaluated_during_training(
    tmp_path: Path, network_folder: Callable[..., str]
) -> None:
    """24 steps, 4 evaluations: after steps 6, 12 and 18; the last one would decide nothing."""
    still = {"meta_num_epochs": 0, "feedback_interval": 0, "max_restarts": 0, "choose_average": False}
    folder = network_folder(network_saying(0.0))
    counts, weights = {}, []
    for number in (4, 0):
        counter = EvaluationCounter()
        trainer = counter.trainer = make_trainer(
            "trainer",
            arguments(tmp_path / str(number)),
            ALRSConfig(network=folder, controller_evaluations=number, **still),
            model=tiny_classifier(dropout=0.3),
            eval_dataset={"controller": tiny_dataset(100, seed=9), "held_out": tiny_dataset(16, seed=10)},
            compute_metrics=accuracy,
            callbacks=[counter],
        )
        trainer.train()
        counts[number] = counter.counts
        weights.append(weights_of(trainer.model))
        assert not any("eval_controller_loss" in entry for entry in trainer.state.log_history)
        # 24 steps of 8 are few: the least sample
        assert [size for size, *_ in trainer._controller_loaders] == ([64] if number else [])
    # The counter runs before the callback that evaluates: it sees an evaluation one step later.
    assert counts[4] == [0.0] * 6 + [1.0] * 6 + [2.0] * 6 + [3.0] * 6
    assert set(counts[0]) == {0.0}
    # The network says nothing, so evaluations must leave no trace, on dropout neither.
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


class Noisy(torch.utils.data.Dataset):
    """Examples under noise of Python's and numpy's generators, as augmentations draw it."""

    def __init__(self, size: int, seed: int = 1):
        self.examples = tiny_dataset(size, seed=seed)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.examples[index]
        return example | {"x": example["x"] + 0.1 * random.gauss(0, 1) + 0.1 * float(np.random.normal())}


def test_evaluations_of_the_controllers_split_draw_no_random_number_of_the_training(
    tmp_path: Path, network_folder: Callable[..., str]
) -> None:
    weights = []
    for number in (4, 0):
        config = ALRSConfig(
            network=network_folder(network_saying(0.0)),
            controller_evaluations=number,
            meta_num_epochs=0,
            feedback_interval=0,
            max_restarts=0,
        )
        splits = {"controller": Noisy(70, seed=9)}
        args = arguments(tmp_path / str(number))
        trainer = make_trainer("trainer", args, config, train_dataset=Noisy(64), eval_dataset=splits)
        trainer.train()
        weights.append(weights_of(trainer.model))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_persistent_workers_keep_the_splits_apart(tmp_path: Path, moving_config: Config) -> None:
    """Trainer keeps one loader for all datasets without a name, where its workers are persistent."""
    args = arguments(tmp_path, dataloader_num_workers=1, dataloader_persistent_workers=True)
    sizes = []

    def count(prediction: Any) -> dict[str, float]:
        sizes.append(len(prediction.label_ids))
        return {"accuracy": 0.5}

    splits = {"controller": tiny_dataset(100, seed=9), "held_out": tiny_dataset(16, seed=10)}
    config = moving_config(controller_evaluations=2)
    trainer = make_trainer("trainer", args, config, eval_dataset=splits, compute_metrics=count)
    test = tiny_dataset(40, seed=11)
    trainer.evaluate(test)
    trainer.train()
    trainer.evaluate(test)
    assert sizes == [40, 64, 40]


class Indexless(IterableDataset):
    def __len__(self) -> int:
        return 16

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(tiny_dataset(16))


def test_a_second_training_is_steered_by_the_split_it_is_given(tmp_path: Path, moving_config: Config) -> None:
    """As in cross-validation with one Trainer, where the first fold's split is training data of the next one."""
    seen: list[Any] = []

    class Watched(ALRSTrainer):
        def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(dataloader.dataset.dataset)
            return super().evaluation_loop(dataloader, *args, **kwargs)

    splits = [tiny_dataset(70, seed=seed) for seed in (9, 10)]
    trainer = Watched(
        model_init=lambda: tiny_classifier(),
        args=arguments(tmp_path),
        alrs_config=moving_config(controller_evaluations=2),
        train_dataset=tiny_dataset(),
    )
    # Once on the way, and once for each average that there is to choose
    once = 1 + len(LONG_SHARES)
    for evaluated, split in ((0, None), (once, splits[0]), (once, splits[1])):
        trainer.eval_dataset = None if split is None else {"controller": split}
        seen.clear()
        trainer.train()
        assert len(seen) == evaluated
        assert all(dataset is split for dataset in seen)


class Merging(torch.nn.Linear):
    """Takes its low-rank weights into the frozen ones in `eval()` and out of them in `train()`, as loralib's layers do."""

    def __init__(self, size: int):
        super().__init__(size, size)
        self.down, self.up = torch.nn.Parameter(0.1 * torch.ones(2, size)), torch.nn.Parameter(torch.zeros(size, 2))
        self.weight.requires_grad = False
        self.merged = False

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * (self.up @ self.down).detach()
            self.merged = not mode
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + (0 if self.merged else x @ self.down.T @ self.up.T)


@routes
@pytest.mark.parametrize("batch_norm", [False, True])
def test_layers_that_merge_their_weights_for_an_evaluation(
    route: str, batch_norm: bool, tmp_path: Path, moving_config: Config
) -> None:
    model = tiny_classifier(batch_norm=batch_norm)
    first = next(name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    merging = Merging(model.get_submodule(first).in_features)
    frozen = merging.weight.clone()
    model.set_submodule(first, torch.nn.Sequential(merging, model.get_submodule(first)))
    splits = {"controller": tiny_dataset(70, seed=9), "held_out": tiny_dataset(16, seed=10)}
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=5, save_strategy="steps", save_steps=12)
    trainer = make_trainer(route, args, moving_config(average_weights=True), model, eval_dataset=splits)
    unmerged: list[bool] = []

    class Watching(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            unmerged.append(model.training and not merging.merged)

    trainer.add_callback(Watching())
    trainer.train()
    assert all(unmerged)
    saved = load_file(tmp_path / "checkpoint-12" / "model.safetensors")[f"{first}.0.weight"]
    torch.testing.assert_close(saved, frozen, rtol=0, atol=1e-6)
    model.train()
    assert merging.up.abs().max() > 1e-3
    torch.testing.assert_close(merging.weight, frozen, rtol=0, atol=1e-6)


def test_a_controllers_split_without_index_is_left_to_the_scripts_evaluations(
    tmp_path: Path, moving_config: Config
) -> None:
    trainer = make_trainer("trainer", arguments(tmp_path), moving_config(), eval_dataset={"controller": Indexless()})
    trainer.train()
    assert {f["evaluated"] for f in features_of(tmp_path)} == {0.0}


@routes
def test_the_reported_split_never_drives(route: str, tmp_path: Path, moving_config: Config) -> None:
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=5)
    trainer = make_trainer(route, args, moving_config(), eval_dataset=tiny_dataset(16, seed=9))
    trainer.train()
    assert [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert {f["evaluated"] for f in features_of(tmp_path)} == {0.0}


def test_the_prefix_of_the_controllers_split_can_be_set(tmp_path: Path, moving_config: Config) -> None:
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=5)
    config = moving_config(controller_metric_prefix="eval_dev")
    trainer = make_trainer("callback", args, config, eval_dataset={"dev": tiny_dataset(16), "test": tiny_dataset(16)})
    trainer.train()
    assert features_of(tmp_path)[-1]["evaluated"] == 1.0


@routes
def test_evaluating_outside_training_is_harmless(route: str, tmp_path: Path, moving_config: Config) -> None:
    trainer = make_trainer(
        route, arguments(tmp_path), moving_config(), eval_dataset={"controller": tiny_dataset(16, seed=9)}
    )
    assert "eval_controller_loss" in trainer.evaluate()
    trainer.train()
    assert "eval_controller_loss" in trainer.evaluate()
    assert len(history_of(tmp_path)) == NUM_STEPS


@routes
def test_evaluation_and_saving_together(route: str, tmp_path: Path, moving_config: Config) -> None:
    args = arguments(
        tmp_path,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=6,
        save_steps=6,
        load_best_model_at_end=True,
        metric_for_best_model="eval_held_out_loss",
        save_total_limit=2,
    )
    trainer = make_trainer(
        route,
        args,
        moving_config(),
        eval_dataset={"controller": tiny_dataset(16, seed=9), "held_out": tiny_dataset(16, seed=10)},
    )
    trainer.train()
    assert [entry["step"] for entry in history_of(tmp_path)] == list(range(1, NUM_STEPS + 1))
    assert list(tmp_path.glob("checkpoint-*/scheduler.pt"))
    state = torch.load(next(tmp_path.glob("checkpoint-*/scheduler.pt")), weights_only=True)
    assert ("alrs_state" in state) == (route == "callback")


# What changes nothing


@routes
def test_a_network_that_changes_nothing_trains_as_the_linear_schedule(
    route: str, tmp_path: Path, network_folder: Callable[..., str]
) -> None:
    config = ALRSConfig(
        network=network_folder(network_saying(0.0)),
        meta_num_epochs=0,
        feedback_interval=0,
        max_restarts=0,
        average_weights=False,
    )
    plain = Trainer(tiny_classifier(), arguments(tmp_path / "plain"), train_dataset=tiny_dataset())
    plain.train()
    ours = make_trainer(route, arguments(tmp_path / "ours"), config)
    ours.train()
    assert logged(ours) == pytest.approx(logged(plain))
    for x, y in zip(weights_of(plain.model), weights_of(ours.model), strict=True):
        assert torch.allclose(x, y, atol=1e-6)


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Without the settings that the first Accelerator of the process has made for all."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_a_model_that_was_evaluated_first_is_prepared_anew_for_several_processes(mixed_precision: str) -> None:
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=True)
    model = tiny_classifier()
    batch = {key: value[None] for key, value in tiny_dataset()[0].items()}
    forward = model.forward
    accelerator.prepare_model(model, evaluation_mode=True)
    assert model._is_accelerate_prepared, "accelerate would hand it back as it is"
    trainer = SimpleNamespace(
        args=SimpleNamespace(world_size=2),
        is_fsdp_enabled=False,
        is_deepspeed_enabled=False,
        accelerator=accelerator,
        model=model,
        model_wrapped=torch.nn.Sequential(model),  # as torch.compile leaves it
    )
    expected = model(**batch)["logits"]
    prepare_again(trainer)
    assert trainer.model_wrapped is model
    assert not model._is_accelerate_prepared
    assert model.forward == forward
    accelerator.prepare_model(model, evaluation_mode=True)
    torch.testing.assert_close(model(**batch)["logits"], expected)


# Several runs, other people's saves


@routes
def test_a_finished_run_that_is_started_again_keeps_its_model(
    route: str, tmp_path: Path, moving_config: Config
) -> None:
    """Trainer makes one more step where the last epoch was not over."""
    ends = []
    for again in (False, True, True):
        args = arguments(tmp_path, max_steps=13, save_strategy="steps", save_steps=13)
        trainer = make_trainer(route, args, moving_config(average_weights=True))
        trainer.train(resume_from_checkpoint=again)
        ends.append(weights_of(trainer.model))
    assert trainer.state.global_step > 13
    for end in ends[1:]:
        assert all(map(torch.equal, end, ends[0]))


@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_model_can_be_copied_and_saved_whole_during_a_run(
    batch_norm: bool, tmp_path: Path, moving_config: Config
) -> None:
    copies = []

    class Copy(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 7:
                kept = io.BytesIO()
                torch.save(model, kept)
                kept.seek(0)
                copies.extend([copy.deepcopy(model), torch.load(kept, weights_only=False)])
                for one in copies:
                    one.train()(
                        **{
                            key: value[None].repeat(2, 1) if value.dim() else value[None].repeat(2)
                            for key, value in tiny_dataset()[0].items()
                        }
                    )

    model = tiny_classifier(batch_norm=batch_norm)
    trainer = make_trainer("callback", arguments(tmp_path), moving_config(), model)
    trainer.add_callback(Copy())
    trainer.train()
    assert len(copies) == 2 and trainer.state.global_step == NUM_STEPS
    assert [entry["loss"] for entry in history_of(tmp_path)] == pytest.approx(logged(trainer, "loss"), abs=1e-4)
    for one in copies:
        assert [vars(hook) for hook in one._forward_hooks.values()] == [{"_show": None}]


def test_a_configuration_of_another_type_is_refused() -> None:
    with pytest.raises(InputError, match="must be an ALRSConfig"):
        ALRSCallback({"average_weights": False})


def test_a_second_callback_is_refused(tmp_path: Path, moving_config: Config) -> None:
    with pytest.raises(InputError, match=r"callbacks='ALRSCallback'.*alrs_config"):
        make_trainer("trainer", arguments(tmp_path), moving_config(), callbacks=[ALRSCallback()])


def own_scheduler(output_dir: Path, config: ALRSConfig, *callbacks: TrainerCallback) -> Trainer:
    model = tiny_classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = ALRSScheduler(optimizer, NUM_STEPS, config=config, model=model)
    return Trainer(
        model=model,
        args=arguments(output_dir, save_strategy="steps", save_steps=8),
        train_dataset=tiny_dataset(),
        optimizers=(optimizer, scheduler),
        callbacks=[ALRSCallback(config), *callbacks],
    )


class Interrupt(TrainerCallback):
    def __init__(self) -> None:
        self.due = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.due and state.global_step == 11:
            self.due = False
            raise KeyboardInterrupt


def test_an_own_scheduler_goes_on_after_an_interruption_and_ends_once(tmp_path: Path, moving_config: Config) -> None:
    whole = own_scheduler(tmp_path / "whole", moving_config())
    whole.train()
    trainer = own_scheduler(tmp_path / "parts", moving_config(), Interrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train(resume_from_checkpoint=True)
    assert all(torch.equal(a, b) for a, b in zip(weights_of(whole.model), weights_of(trainer.model), strict=True))
    histories = [history_of(tmp_path / name) for name in ("whole", "parts")]
    losses = [[entry["loss"] for entry in history] for history in histories]
    assert losses[1] == losses[0] == pytest.approx(logged(whole, "loss"), abs=1e-4)
    with pytest.raises(InputError, match="driven a run to its end"):
        trainer.train()


def test_a_checkpoint_of_the_callback_is_resumed_by_the_trainer(tmp_path: Path, moving_config: Config) -> None:
    args = arguments(tmp_path, save_strategy="steps", save_steps=8)
    make_trainer("callback", args, moving_config()).train()
    trainer = make_trainer("trainer", args, moving_config())
    whole = history_of(tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    rates = [[entry["learning_rate"] for entry in history] for history in (whole, history_of(tmp_path))]
    assert rates[1] == pytest.approx(rates[0], rel=1e-3)


class SaveAt(TrainerCallback):
    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.average: list[torch.Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 12:
            self.average = [value.clone() for value in self.trainer.lr_scheduler._average._average]
            self.trainer.save_model(str(Path(args.output_dir) / "middle"))


def test_a_model_saved_in_the_middle_is_the_average(tmp_path: Path, moving_config: Config) -> None:
    saver = SaveAt()
    trainer = saver.trainer = make_trainer(
        "trainer", arguments(tmp_path / "saved"), moving_config(), callbacks=[saver]
    )
    trainer.train()
    saved = load_file(tmp_path / "saved" / "middle" / "model.safetensors")
    names = [name for name, _ in trainer.model.named_parameters()]
    by_name = {name: next(v for v in saver.average if torch.equal(v, saved[name])) for name in names}
    assert len(by_name) == len(saver.average)
    plain = make_trainer("trainer", arguments(tmp_path / "plain"), moving_config())
    plain.train()
    assert all(torch.equal(a, b) for a, b in zip(weights_of(plain.model), weights_of(trainer.model), strict=True))


# What scripts bring along


def test_accumulation_changes_nothing_where_any_keyword_is_taken(
    tmp_path: Path, moving_config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    whole, accumulated = trained_with_accumulation("trainer", tmp_path, moving_config(), AnyKeyword)
    assert whole.model_accepts_loss_kwargs and not accumulated.model_accepts_loss_kwargs
    assert caplog.text.count("does not heed `num_items_in_batch`") == 1


def test_a_look_at_the_loss_leaves_no_trace(tmp_path: Path, moving_config: Config) -> None:
    """Of a model that heeds the items of a step nothing is changed: no random number, no statistic, no mode."""
    states = []
    for looks in (True, False):
        args = arguments(tmp_path / str(looks), gradient_accumulation_steps=2, max_steps=4)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = LanguageModelLoss(dropout=0.5, batch_norm=True)
        trainer = make_trainer("trainer", args, moving_config(), model=model, train_dataset=Noisy(64))
        if not looks:
            trainer._may_take_mean = lambda num_items_in_batch: False
        trainer.train()
        assert trainer.model_accepts_loss_kwargs and trainer._knows_loss
        states.append(trainer.model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


class ScaledByItself(ALRSTrainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) / self.args.gradient_accumulation_steps


def test_a_loss_of_the_scripts_own_is_left_as_it_is(tmp_path: Path, moving_config: Config) -> None:
    trainer = ScaledByItself(
        model=AnyKeyword(), args=arguments(tmp_path, gradient_accumulation_steps=4, max_steps=2),
        alrs_config=moving_config(), train_dataset=tiny_dataset(),
    )  # fmt: skip
    trainer.train()
    assert trainer.model_accepts_loss_kwargs


def test_metrics_that_fail_on_a_sample_do_not_end_the_run(
    tmp_path: Path, moving_config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    def whole_split_alone(prediction: Any) -> dict[str, float]:
        if len(prediction.label_ids) != 100:
            raise ValueError("29 classes, not 30")
        return accuracy(prediction)

    trainer = make_trainer(
        "trainer",
        arguments(tmp_path, eval_strategy="steps", eval_steps=16),
        moving_config(controller_evaluations=4),
        eval_dataset={"controller": tiny_dataset(100, seed=9)},
        compute_metrics=whole_split_alone,
    )
    trainer.train()
    # After steps 6, 12 and 18, and by the script after 16 and 24
    assert float(trainer.lr_scheduler.controller.state.eval_count) == 5.0
    assert float(trainer.lr_scheduler.controller.state.eval_best_accuracy) > 0
    assert "29 classes, not 30" in caplog.text and caplog.text.count("compute_metrics") == 1


@routes
def test_an_accuracy_for_each_class_is_no_accuracy(route: str, tmp_path: Path, moving_config: Config) -> None:
    def by_class(prediction: Any) -> dict[str, Any]:
        return {"accuracy": {"first": 0.5, "second": 0.25}}

    trainer = make_trainer(
        route,
        arguments(tmp_path, eval_strategy="steps", eval_steps=6, logging_strategy="no"),
        moving_config(controller_evaluations=4),
        eval_dataset={"controller": tiny_dataset(80, seed=9)},
        compute_metrics=by_class,
    )
    trainer.train()
    assert features_of(tmp_path)[-1]["evaluated"] == 1.0


def test_a_sample_smaller_than_a_batch_is_evaluated_where_the_last_batch_is_dropped(
    tmp_path: Path, moving_config: Config
) -> None:
    trainer = make_trainer(
        "trainer",
        arguments(
            tmp_path,
            per_device_eval_batch_size=128,
            dataloader_drop_last=True,
            dataloader_num_workers=1,
            dataloader_persistent_workers=True,
        ),
        moving_config(controller_evaluations=4),
        eval_dataset={"controller": tiny_dataset(300, seed=9)},
    )
    trainer.train()
    assert features_of(tmp_path)[-1]["evaluated"] == 1.0
    loaders = trainer._controller_loaders.values()
    assert not any(getattr(loader, "base_dataloader", loader).persistent_workers for loader in loaders)
    assert trainer.args.dataloader_drop_last and trainer.args.dataloader_persistent_workers


class StepOfItsOwn(ALRSTrainer):
    """As for adversarial training: neither `super().training_step` nor `optimizer.train()`."""

    def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        model.train()
        self.averaged.append(self.lr_scheduler.shows_average)
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss)
        self.lr_scheduler.observe(loss=loss)
        return loss.detach()


class ZeroBias(TrainerCallback):
    """Holds a parameter at 0, as pruning does."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        with torch.no_grad():
            model.last.bias.zero_()


def test_gradients_are_those_of_the_trained_weights(tmp_path: Path, moving_config: Config) -> None:
    trainer = StepOfItsOwn(
        model=tiny_classifier(),
        args=arguments(tmp_path, eval_strategy="steps", eval_steps=5, save_strategy="steps", save_steps=3),
        alrs_config=moving_config(controller_evaluations=6),
        train_dataset=tiny_dataset(),
        eval_dataset={"controller": tiny_dataset(80, seed=9)},
    )
    trainer.averaged = []
    trainer.train()
    assert trainer.averaged == [False] * NUM_STEPS


def test_callbacks_that_come_later_change_the_trained_weights(tmp_path: Path, moving_config: Config) -> None:
    trainer = make_trainer(
        "trainer",
        arguments(tmp_path),
        moving_config(controller_evaluations=6),
        eval_dataset={"controller": tiny_dataset(80, seed=9)},
    )
    trainer.add_callback(ZeroBias())
    biases = []
    trainer.model.register_forward_pre_hook(
        lambda model, inputs: biases.append(model.last.bias.detach().abs().max().item()) if model.training else None
    )
    trainer.train()
    assert biases[1:] == [0.0] * (NUM_STEPS - 1)


def test_trials_of_a_search_have_a_history_each(
    tmp_path: Path, moving_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As a backend does, none of which is needed for this
    monkeypatch.setattr(Trainer, "_hp_search_setup", lambda self, trial: None)
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial)
    folder = tmp_path / "run-1"
    monkeypatch.setattr(Trainer, "_get_output_dir", lambda self, trial: str(tmp_path if trial is None else folder))
    trainer = make_trainer("trainer", arguments(tmp_path), moving_config())
    trainer.train(trial={"learning_rate": 0.01})
    assert len(history_of(folder)) == NUM_STEPS and not (tmp_path / HISTORY_NAME).exists()
    trainer.train()
    assert len(history_of(tmp_path)) == NUM_STEPS
