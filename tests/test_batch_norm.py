"""Batch-norm's statistics of averaged weights: by hand, in a Trainer, and where they cannot be had."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TinyClassifier, tiny_classifier, tiny_dataset
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainingArguments, default_data_collator, set_seed

from hf_alrs import ALRSCallback, ALRSConfig, ALRSTrainer
from hf_alrs.batch_norm import BatchNormStatistics
from hf_alrs.experiment import DataArguments, build_trainer
from tasks import TASKS


class Scaled(nn.Module):
    """`norm(dropout(scale * x))`: two trained parameters beside those of the norm."""

    def __init__(self, scale: float = 2.0, dropout: float = 0.5):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.BatchNorm1d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.dropout(self.scale * x))


def examples(*values: float) -> list[dict[str, torch.Tensor]]:
    return [{"x": torch.tensor([value])} for value in values]


def loader(dataset: Any, shuffle: bool = False) -> DataLoader:
    return DataLoader(dataset, batch_size=2, shuffle=shuffle, collate_fn=default_data_collator)


def passes_of(batch_size: int) -> TrainingArguments:
    return TrainingArguments(per_device_train_batch_size=1, per_device_eval_batch_size=batch_size, use_cpu=True)


def has_trained(model: nn.Module, x: torch.Tensor) -> None:
    """A forward pass in training mode, which moves the running statistics."""
    model.train()
    model(x=x)


def test_two_batches_by_hand() -> None:
    """Mixed, the four are 3, 6 | 1, 2; twice that is 6, 12 | 2, 4: means 9 and 3, variances (n - 1) 18 and 2; no dropout."""
    model = Scaled()
    statistics = BatchNormStatistics(model, loader(examples(1.0, 3.0, 2.0, 6.0)), passes_of(2), num_samples=512)
    assert [batch["x"].flatten().tolist() for batch in statistics._batches] == [[2.0, 1.0], [3.0, 6.0]]
    has_trained(model, torch.tensor([[1.0], [5.0]]))
    statistics.refresh()
    assert model.norm.running_mean.item() == pytest.approx(6.0)
    assert model.norm.running_var.item() == pytest.approx(10.0)


def test_examples_are_spread_over_the_data_and_mixed() -> None:
    """Of ten, sorted as many datasets are, four: 0, 2, 5, 7, whatever the sampler says; and no pass sees one end alone."""
    model = Scaled(scale=1.0)
    data = loader(examples(*map(float, range(10))), shuffle=True)
    statistics = BatchNormStatistics(model, data, passes_of(4), num_samples=4)
    has_trained(model, torch.tensor([[1.0], [5.0]]))
    statistics.refresh()
    assert model.norm.running_mean.item() == pytest.approx((0 + 2 + 5 + 7) / 4)
    ordered = BatchNormStatistics(model, loader(examples(*map(float, range(1000)))), passes_of(100), num_samples=300)
    batches = [batch["x"] for batch in ordered._batches]
    assert len(batches) == 3 and all(x.min() < 100 and x.max() > 900 for x in batches)


def test_a_rest_is_left_out_and_so_is_a_batch_of_one() -> None:
    model = Scaled(scale=1.0)
    statistics = BatchNormStatistics(model, loader(examples(1.0, 3.0, 1000.0)), passes_of(2), num_samples=512)
    assert [len(batch["x"]) for batch in statistics._batches] == [2]


@pytest.mark.parametrize("training", [True, False])
def test_all_else_stays_as_it_was(training: bool) -> None:
    model = Scaled()
    statistics = BatchNormStatistics(model, loader(examples(1.0, 3.0), shuffle=True), passes_of(2), num_samples=2)
    has_trained(model, torch.tensor([[1.0], [5.0]]))
    model.train(training)
    seeded = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    statistics.refresh()
    assert random.getstate() == seeded[0]
    assert np.random.get_state()[1].tolist() == seeded[1]
    assert torch.equal(torch.get_rng_state(), seeded[2])
    assert all(module.training == training for module in model.modules())
    assert model.norm.momentum == 0.1
    assert int(model.norm.num_batches_tracked) == 1
    assert model.scale.grad is None and not model.norm.running_mean.requires_grad


def test_a_layer_that_is_not_trained_keeps_its_statistics() -> None:
    """As in fine-tuning with frozen statistics, where the layer stays in evaluation mode."""
    model = Scaled(dropout=0.0)
    statistics = BatchNormStatistics(model, loader(examples(1.0, 3.0)), passes_of(2), num_samples=2)
    model.train()
    model.norm.eval()
    model(x=torch.tensor([[1.0], [5.0]]))
    statistics.refresh()
    assert model.norm.running_mean.item() == 0.0
    assert model.norm.running_var.item() == 1.0


def test_a_layer_that_is_frozen_in_mid_run_keeps_what_it_was_trained_with() -> None:
    model = Scaled(dropout=0.0)
    statistics = BatchNormStatistics(model, loader(examples(1.0, 3.0)), passes_of(2), num_samples=2)
    has_trained(model, torch.tensor([[1.0], [5.0]]))
    statistics.look()
    model.norm.eval()
    statistics.look()
    mean = model.norm.running_mean.clone()
    model.eval()
    statistics.refresh()
    assert torch.equal(model.norm.running_mean, mean)


class TwoHeads(Scaled):
    """A layer that training alone calls, as auxiliary heads have, and one that normalises each example."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.auxiliary = nn.BatchNorm1d(1)
        self.instance = nn.InstanceNorm1d(1, track_running_stats=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x) + self.instance(torch.cat([x, 2 * x], 1)[:, None]).mean(-1)
        return y + self.auxiliary(y) if self.training else y


def test_layers_that_are_not_reached_keep_their_statistics() -> None:
    model = TwoHeads()
    statistics = BatchNormStatistics(model, loader(examples(1.0, 3.0)), passes_of(2), num_samples=2)
    has_trained(model, torch.tensor([[1.0], [5.0]]))
    kept = [x.clone() for layer in (model.auxiliary, model.instance) for x in (layer.running_mean, layer.running_var)]
    statistics.refresh()
    assert model.norm.running_mean.item() == pytest.approx(4.0)
    after = [x for layer in (model.auxiliary, model.instance) for x in (layer.running_mean, layer.running_var)]
    assert all(map(torch.equal, after, kept))
    assert model.instance.momentum == 0.1


class Demanding(Scaled):
    def forward(self, x: torch.Tensor, something: torch.Tensor | None = None) -> torch.Tensor:
        assert something is not None, "something is needed"
        return super().forward(x * something)


def test_a_model_that_is_called_another_way_keeps_what_it_has(caplog: pytest.LogCaptureFixture) -> None:
    model = Demanding()
    statistics = BatchNormStatistics(model, loader(examples(1.0, 3.0)), passes_of(2), num_samples=2)
    model.train()
    model(torch.tensor([[1.0], [5.0]]), torch.tensor(1.0))
    mean = model.norm.running_mean.clone()
    statistics.refresh()
    statistics.refresh()
    assert torch.equal(model.norm.running_mean, mean)
    assert model.norm.momentum == 0.1 and model.training and model.norm.training
    assert len(caplog.records) == 1 and "something" in caplog.text


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(examples(1.0, 3.0))


class Unmeasured(list):
    def __len__(self) -> int:
        raise TypeError("of unknown length")


@pytest.mark.parametrize(
    ("data", "number"),
    [(Stream(), 2), (examples(1.0, 3.0), 0), (Unmeasured(examples(1.0)), 2), (None, 2)],
    ids=["stream", "off", "no length", "no dataset"],
)
def test_without_examples_nothing_changes(data: Any, number: int) -> None:
    model = Scaled(dropout=0.0)
    statistics = BatchNormStatistics(model, SimpleNamespace(dataset=data, collate_fn=list), passes_of(2), number)
    has_trained(model, torch.tensor([[1.0], [5.0]]))
    statistics.refresh()
    assert model.norm.running_mean.item() == pytest.approx(0.1 * 6.0)  # 0.9 x 0 + 0.1 x the mean
    assert int(model.norm.num_batches_tracked) == 1


def test_a_compiled_model_is_not_compiled_again() -> None:
    model = Scaled(dropout=0.0)
    graphs = []
    compiled = torch.compile(
        model, backend=lambda graph, inputs: graphs.append(graph) or graph.forward, fullgraph=True
    )
    statistics = BatchNormStatistics(
        model, loader(examples(1.0, 3.0)), passes_of(2), 2, lambda batch: compiled(**batch)
    )
    for _ in range(3):
        compiled(x=torch.tensor([[1.0], [5.0]]))
        statistics.refresh()
        assert model.norm.running_mean.item() == pytest.approx(4.0)
    assert len(graphs) == 1


# In a run

NUM_STEPS = 20
routes = pytest.mark.parametrize("route", ["callback", "trainer"])


def train(route: str, folder: Path, config: ALRSConfig, resume: str | None = None, **changed: Any) -> Trainer:
    args = TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": NUM_STEPS,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 16,
            "learning_rate": 0.05,
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 3,
            **changed,
        }
    )
    set_seed(3)
    data = {"train_dataset": tiny_dataset(), "eval_dataset": tiny_dataset(16, seed=9)}
    model = tiny_classifier(batch_norm=True, dropout=0.3)
    if route == "callback":
        trainer = Trainer(model, args, callbacks=[ALRSCallback(config)], **data)
    else:
        trainer = ALRSTrainer(model, args, alrs_config=config, **data)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def expected_statistics(model: TinyClassifier) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over four batches of sixteen of the mean and of the variance of what the layer is given."""
    with torch.no_grad():
        mixed = np.random.default_rng(0).permutation(64)
        inputs = model.first(torch.stack([row["x"] for row in tiny_dataset()])[mixed]).view(4, 16, -1)
    return inputs.mean(1).mean(0), inputs.var(1).mean(0)


@routes
def test_a_run_leaves_statistics_of_its_averaged_weights(
    route: str, tmp_path: Path, moving_config: Callable[..., ALRSConfig]
) -> None:
    model = train(route, tmp_path, moving_config()).model
    mean, variance = expected_statistics(model)
    torch.testing.assert_close(model.norm.running_mean, mean)
    torch.testing.assert_close(model.norm.running_var, variance)
    other = train(route, tmp_path, moving_config(batch_norm_samples=0)).model
    assert torch.equal(other.first.weight, model.first.weight)
    assert (other.norm.running_mean - mean).abs().max() > 1e-3
    assert int(other.norm.num_batches_tracked) == int(model.norm.num_batches_tracked)


@routes
@pytest.mark.reliability("batch-norm's statistics of averaged weights after a resume: bit-identical")
def test_training_knows_nothing_of_them_and_a_resumed_run_has_the_same(
    route: str, tmp_path: Path, moving_config: Callable[..., ALRSConfig]
) -> None:
    often = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 4}
    watched = train(route, tmp_path / "watched", moving_config(), **often)
    without = train(route, tmp_path / "without", moving_config(batch_norm_samples=0), **often)
    for (name, value), other in zip(watched.model.named_parameters(), without.model.parameters(), strict=True):
        assert torch.equal(value, other), name
    resumed = train(route, tmp_path / "resumed", moving_config(), str(tmp_path / "watched" / "checkpoint-12"), **often)
    for name, value in watched.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    losses = [
        [entry["eval_loss"] for entry in t.state.log_history if "eval_loss" in entry] for t in (watched, resumed)
    ]
    assert losses[0][-3:] == losses[1][-3:] and len(losses[0]) == 7


@routes
def test_a_checkpoint_holds_them(route: str, tmp_path: Path, moving_config: Callable[..., ALRSConfig]) -> None:
    from safetensors.torch import load_file

    train(route, tmp_path, moving_config(), save_strategy="steps", save_steps=8)
    model = tiny_classifier(batch_norm=True)
    model.load_state_dict(load_file(tmp_path / "checkpoint-8" / "model.safetensors"))
    torch.testing.assert_close(model.norm.running_mean, expected_statistics(model)[0])


@routes
def test_a_finished_run_is_resumed_with_them(
    route: str, tmp_path: Path, moving_config: Callable[..., ALRSConfig]
) -> None:
    saved = {"save_strategy": "steps", "save_steps": 16, "max_steps": 16}  # two epochs
    model = train(route, tmp_path, moving_config(), **saved).model
    again = train(route, tmp_path, moving_config(), str(tmp_path / "checkpoint-16"), **saved).model
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_the_controllers_own_evaluations_do_without(
    tmp_path: Path, moving_config: Callable[..., ALRSConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are of a small sample; a checkpoint at the same step has the statistics all the same."""
    refresh, count = BatchNormStatistics.refresh, []
    monkeypatch.setattr(BatchNormStatistics, "refresh", lambda self: (count.append(0), refresh(self))[1])
    args = TrainingArguments(
        str(tmp_path), max_steps=8, per_device_train_batch_size=8, per_device_eval_batch_size=16, learning_rate=0.05,
        save_strategy="steps", save_steps=4, report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = ALRSTrainer(
        tiny_classifier(batch_norm=True), args,
        alrs_config=moving_config(controller_evaluations=8, choose_average=False),
        train_dataset=tiny_dataset(), eval_dataset={"controller": tiny_dataset(16, seed=9)},
    )  # fmt: skip
    trainer.train()
    from safetensors.torch import load_file

    assert len(count) == 2  # the two checkpoints
    model = tiny_classifier(batch_norm=True)
    model.load_state_dict(load_file(tmp_path / "checkpoint-4" / "model.safetensors"))
    torch.testing.assert_close(model.norm.running_mean, expected_statistics(model)[0])


class Preparing(ALRSTrainer):
    """Shifts its inputs on the way to the model."""

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        return {**inputs, "x": inputs["x"] + 100.0}


def test_what_a_trainer_makes_of_a_batch_is_what_counts(
    tmp_path: Path, moving_config: Callable[..., ALRSConfig]
) -> None:
    args = TrainingArguments(
        str(tmp_path), max_steps=8, per_device_train_batch_size=16, learning_rate=0.05, save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = Preparing(
        tiny_classifier(batch_norm=True), args, alrs_config=moving_config(), train_dataset=tiny_dataset()
    )
    trainer.train()
    inputs = torch.stack([row["x"] for row in tiny_dataset()]) + 100.0
    with torch.no_grad():
        torch.testing.assert_close(trainer.model.norm.running_mean, trainer.model.first(inputs).mean(0))


def test_schedule_free_is_given_them_too(tmp_path: Path) -> None:
    pytest.importorskip("schedulefree")
    data = DataArguments(task_name="titanic", dataset_name="sample", max_train_samples=200)
    prepared = TASKS["titanic"].prepare(data)
    args = TrainingArguments(
        str(tmp_path), max_steps=12, per_device_eval_batch_size=32, eval_strategy="steps", eval_steps=6,
        save_strategy="no", report_to="none", disable_tqdm=True, learning_rate=1e-2, use_cpu=True,
    )  # fmt: skip
    torch.manual_seed(0)
    trainer = build_trainer(prepared, prepared.model_init(), args, "schedule_free")
    trainer.train()
    model = trainer.model
    left = {name: value.clone() for name, value in model.named_buffers() if "running" in name}
    statistics = BatchNormStatistics(model, trainer.get_train_dataloader(), args, 512)
    model.train()
    model(**next(iter(trainer.get_train_dataloader())))
    trainer.optimizer.eval()
    statistics.refresh()
    for name, value in left.items():
        torch.testing.assert_close(model.get_buffer(name), value)
