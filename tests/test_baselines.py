"""Names of baselines and what they become."""

import pytest
import torch
from transformers import TrainingArguments

from hf_alrs.baselines import BASELINES
from hf_alrs.config import ALRSConfig, InputError
from hf_alrs.experiment import DataArguments, build_trainer, find_baseline
from hf_alrs.scheduler import ALRSScheduler
from tasks import TASKS


@pytest.fixture(scope="module")
def prepared():
    return TASKS["titanic"].prepare(DataArguments(task_name="titanic", dataset_name="sample", max_train_samples=200))


@pytest.mark.parametrize("name", [name for name in BASELINES if name != "alrs_64_64"])
def test_every_baseline_trains(name: str, prepared, tmp_path) -> None:
    args = TrainingArguments(
        str(tmp_path),
        max_steps=40,
        learning_rate=1e-3,
        eval_strategy="steps",
        eval_steps=20,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    config = ALRSConfig(network="scratch") if BASELINES[name].alrs_config is not None else None
    torch.manual_seed(0)
    trainer = build_trainer(prepared, prepared.model_init(), args, name, config)
    trainer.train()
    rate = trainer.optimizer.param_groups[0]["lr"]
    assert trainer.state.global_step == 40
    assert 0 <= rate <= ALRSConfig().max_lr  # a network from scratch may go far in so few steps
    assert isinstance(trainer.lr_scheduler, ALRSScheduler) == name.startswith("alrs")
    optimizer = type(trainer.optimizer.optimizer).__name__
    expected = {"prodigy": "Prodigy", "schedule_free": "AdamWScheduleFree"}.get(name, "AdamW")
    assert optimizer == expected
    if BASELINES[name].needs_evaluation:
        assert args.metric_for_best_model == "eval_controller_loss", "the reported split must not drive the rate"


def test_schedule_free_keeps_the_kind_of_optimizer(prepared, tmp_path) -> None:
    args = TrainingArguments(str(tmp_path), max_steps=2, optim="sgd", report_to="none")
    trainer = build_trainer(prepared, prepared.model_init(), args, "schedule_free")
    assert trainer.create_optimizer().__class__.__name__ == "SGDScheduleFree"


def test_plateau_without_a_controller_split_is_refused(tmp_path) -> None:
    data = DataArguments(task_name="titanic", dataset_name="sample", controller_split=0.0, max_train_samples=200)
    prepared = TASKS["titanic"].prepare(data)
    args = TrainingArguments(str(tmp_path), max_steps=2, report_to="none")
    with pytest.raises(InputError, match="controller_split"):
        build_trainer(prepared, prepared.model_init(), args, "reduce_lr_on_plateau")


def test_ablations_differ_from_alrs_in_what_their_names_say() -> None:
    base = ALRSConfig()
    assert find_baseline("alrs_no_feedback").alrs_config == {"feedback_interval": 0}
    assert find_baseline("alrs_phase1_only").alrs_config == {"phase1_steps": 1.0}
    assert base.probes == 0 and ALRSConfig(network="scratch").probes == 7
    assert ALRSConfig(**find_baseline("alrs_frozen_random").alrs_config).probes == 0


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="schedule_free"):
        find_baseline("sgdr")


@pytest.mark.parametrize("scheduler", ["alrs", "linear"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_logged_losses_are_means_of_the_batch(scheduler: str, accumulation: int, tmp_path) -> None:
    """A text classifier begins at ln 2; taken for one that divides by the items of a step it would log a multiple."""
    data = DataArguments(task_name="sst2", dataset_name="sample", model_type="tiny-bert", max_train_samples=200)
    prepared = TASKS["sst2"].prepare(data)
    args = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        learning_rate=1e-6,
        gradient_accumulation_steps=accumulation,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = build_trainer(prepared, prepared.model_init(), args, scheduler, ALRSConfig(network="scratch"))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx([0.693, 0.693], abs=0.1)


@pytest.mark.parametrize("lr_scheduler_type", ["greedy", "reduce_lr_on_plateau"])
def test_the_metric_that_goes_with_a_scheduler_of_transformers_is_not_looked_for(
    lr_scheduler_type: str, prepared, tmp_path
) -> None:
    args = TrainingArguments(
        str(tmp_path), eval_strategy="epoch", lr_scheduler_type=lr_scheduler_type, save_strategy="no", report_to="none"
    )
    assert args.metric_for_best_model is not None
    build_trainer(prepared, prepared.model_init(), args, "alrs", ALRSConfig(network="scratch"))
    assert args.metric_for_best_model is None


@pytest.mark.parametrize(
    ("options", "field"),
    [({"gradient_checkpointing": True}, "gradient_checkpointing"), ({"optim": "galore_adamw"}, "options")],
)
def test_what_trainer_refuses_is_told_before_anything_is_run(options, field, prepared, tmp_path) -> None:
    args = TrainingArguments(str(tmp_path), report_to="none", **options)
    with pytest.raises(InputError) as caught:
        build_trainer(prepared, prepared.model_init(), args, "alrs", ALRSConfig(network="scratch"))
    assert caught.value.field == field
