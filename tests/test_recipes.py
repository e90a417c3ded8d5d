"""Every recipe parses into the arguments of the command line, and says what the reports said."""

from pathlib import Path

import pytest
import yaml
from transformers import HfArgumentParser, TrainingArguments

from hf_alrs.experiment import DataArguments
from tasks import RECIPES, TASKS


FILES = sorted(RECIPES.glob("*.yaml"))
# task, model, optimizer, rate, batch, epochs
REPORT = {
    "sst2": ("sst2", None, "adamw_torch", 2e-5, 32, 3),
    "imdb": ("imdb", None, "adamw_torch", 1e-3, 32, 50),
    "cifar10-cnn": ("cifar10", None, "adamw_torch", 1e-3, 32, 50),
    "cifar10-resnet18": ("cifar10", "resnet18", "sgd", 1e-2, 64, 50),
    "titanic": ("titanic", "dense", "adamw_torch", 1e-3, 32, 50),
    "sst2-updated": ("sst2", None, "adamw_torch", 5e-4, 64, 3),
    "imdb-updated": ("imdb", None, "adamw_torch", 5e-4, 64, 10),
    "cifar10-cnn-updated": ("cifar10", None, "adamw_torch", 5e-4, 64, 10),
    "cifar10-resnet18-updated": ("cifar10", "resnet18", "sgd", 5e-4, 64, 10),
    "titanic-updated": ("titanic", "dense-128-64", "adamw_torch", 5e-4, 64, 10),
}


def parse(path, tmp_path):
    # An unknown key raises: a recipe holds nothing that the command line would not take.
    values = {"output_dir": str(tmp_path), "use_cpu": True, **yaml.safe_load(path.read_text())}
    return HfArgumentParser([DataArguments, TrainingArguments]).parse_dict(values)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_recipe_parses(path, tmp_path):
    data, training = parse(path, tmp_path)
    assert data.task_name in TASKS
    values = yaml.safe_load(path.read_text())
    # YAML reads 1e-3 as text, and text would slip through dataclasses unnoticed.
    assert isinstance(values["learning_rate"], float) and isinstance(training.weight_decay, float)
    assert training.learning_rate == values["learning_rate"]
    parsed = HfArgumentParser([DataArguments, TrainingArguments]).parse_yaml_file(str(path), allow_extra_keys=True)
    assert parsed[0] == data


@pytest.mark.parametrize("name", REPORT)
def test_recipe_says_what_the_report_said(name, tmp_path):
    data, training = parse(RECIPES / f"{name}.yaml", tmp_path)
    found = (
        data.task_name,
        data.model_type,
        training.optim,
        training.learning_rate,
        training.per_device_train_batch_size,
        training.num_train_epochs,
    )
    assert found == REPORT[name]


def test_there_is_a_recipe_for_every_row_and_every_sample():
    assert {path.stem for path in FILES} == {*REPORT, "glue", "sample-text", "sample-vision", "sample-tabular"}
    for task in TASKS.values():
        assert task.recipe.is_file() and Path(task.recipe).parent == RECIPES


@pytest.mark.parametrize("name", ["text", "vision", "tabular"])
def test_sample_recipes_prepare_with_no_network(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data, _ = parse(RECIPES / f"sample-{name}.yaml", tmp_path)
    task = TASKS[data.task_name].prepare(data)
    assert task.source.startswith("built-in offline sample")
    batch = task.data_collator([task.train_dataset[number] for number in range(3)])
    assert task.model_init().eval()(**batch).loss.isfinite()
