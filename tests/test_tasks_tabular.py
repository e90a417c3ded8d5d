"""The tabular tasks: the column transform, its saved form, the network, folds, and the breast-cancer sample."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from hf_alrs.experiment import DataArguments
from tasks import TASKS
from tasks.models import TabularNetConfig, TabularNetForClassification
from tasks.tabular import (
    TITANIC_CATEGORICAL,
    TITANIC_NUMERIC,
    TabularProcessor,
    _title,
    category_texts,
    choose_columns,
    column_transformer,
)


DATA = Path(__file__).parents[1].parent / "shared" / "data" / "titanic" / "train.csv"


def prepare(**options):
    return TASKS["titanic"].prepare(DataArguments(task_name="titanic", **options))


@pytest.fixture
def passengers():
    """Invented rows in the shape of Kaggle's table."""
    generator = np.random.default_rng(0)
    count = 60
    titles = ["Mr.", "Mrs.", "Miss.", "Master.", "Dr.", "the Countess."]
    frame = pd.DataFrame(
        {
            "PassengerId": range(1, count + 1),
            "Survived": [number % 2 for number in range(count)],
            "Pclass": generator.integers(1, 4, count),
            "Name": [f"Family{number}, {titles[number % 6]} Given" for number in range(count)],
            "Sex": ["male" if number % 3 else "female" for number in range(count)],
            "Age": generator.uniform(1, 70, count).round(1),
            "SibSp": generator.integers(0, 3, count),
            "Parch": generator.integers(0, 3, count),
            "Ticket": [f"T{number}" for number in range(count)],
            "Fare": generator.uniform(0, 200, count).round(2),
            "Cabin": [None] * count,
            "Embarked": ["S", "C", "Q"] * 20,
        }
    )
    frame.loc[[3, 8, 20], "Age"] = np.nan
    frame.loc[[5], "Embarked"] = None
    return frame


def test_titles():
    assert _title("Braund, Mr. Owen") == "Mr" and _title("Rothes, the Countess. of (Lucy)") == "Rare"
    assert _title("Sagesser, Mlle. Emma") == "Miss" and _title("no title") is None


def test_processor_equals_the_fitted_column_transformer(passengers, tmp_path):
    train, held_out = passengers.iloc[:40], passengers.iloc[40:].copy()
    held_out.loc[held_out.index[0], "Embarked"] = "nowhere"
    held_out.loc[held_out.index[1], "Fare"] = np.nan
    processor = TabularProcessor.fit(train, TITANIC_NUMERIC, TITANIC_CATEGORICAL, titanic=True)
    reference = column_transformer(TITANIC_NUMERIC, TITANIC_CATEGORICAL).fit(processor.prepare(train))
    for frame in (train, held_out):
        expected = reference.transform(processor.prepare(frame))
        np.testing.assert_allclose(processor(frame)["features"], expected, atol=1e-5)
    assert processor.num_features == len(processor.feature_names) == expected.shape[1]

    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["numeric"][0]["column"] == "Age"
    again = TabularProcessor.from_pretrained(tmp_path)
    assert np.array_equal(again(held_out)["features"], processor(held_out)["features"])
    tensors = again(held_out.to_dict("list"), return_tensors="pt")["features"]
    assert tensors.dtype == torch.float32 and tensors.shape == (20, processor.num_features)


def test_the_transform_is_fitted_on_train_alone(passengers, tmp_path):
    path = tmp_path / "train.csv"
    passengers.to_csv(path, index=False)
    task = prepare(dataset_name=str(path))
    assert (len(task.train_dataset), len(task.controller_dataset), len(task.eval_dataset)) == (43, 5, 12)
    assert task.label_names == ["died", "survived"]
    numeric = task.train_dataset.features[:, : len(TITANIC_NUMERIC)]
    torch.testing.assert_close(numeric.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    assert task.eval_dataset.features[:, :5].mean(0).abs().max() > 1e-3


def test_folds_are_stratified_seeded_and_cover_the_table(passengers, tmp_path):
    path = tmp_path / "train.csv"
    passengers.to_csv(path, index=False)
    labels = [prepare(dataset_name=str(path), fold=fold).eval_dataset.labels for fold in range(5)]
    assert [int(part.sum()) for part in labels] == [6] * 5
    first, again = (prepare(dataset_name=str(path), fold=2).eval_dataset.features for _ in range(2))
    assert torch.equal(first, again)
    other = prepare(dataset_name=str(path), fold=2, split_seed=1).eval_dataset.features
    assert other.shape != first.shape or not torch.equal(other, first)


def test_columns_of_an_unknown_table():
    frame = pd.DataFrame(
        {
            "id": range(30),
            "size": np.linspace(0, 1, 30),
            "colour": ["red", "blue", None] * 10,
            "name": [f"n{number}" for number in range(30)],
            "empty": [None] * 30,
            "label": [0, 1] * 15,
        }
    )
    assert choose_columns(frame, "label") == (["size"], ["colour"])
    assert category_texts(pd.Series([3, 3.0, "3", None])).tolist()[:3] == ["3", "3", "3"]


@pytest.mark.parametrize("num_labels", [2, 3])
def test_network_saves_loads_and_trains_on_a_batch_of_one(num_labels, tmp_path):
    torch.manual_seed(0)
    config = TabularNetConfig(num_features=5, hidden_sizes=(8, 4), dropout=0.1, num_labels=num_labels)
    model = TabularNetForClassification(config).train()
    features = torch.randn(6, 5)
    output = model(features=features, labels=torch.tensor([0, 1, 0, 1, 1, 0]))
    assert output.logits.shape == (6, 1 if num_labels == 2 else 3)
    output.loss.backward()
    assert model(features=features[:1], labels=torch.tensor([1])).loss.isfinite()
    model.eval().save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(features=features).logits, model(features=features).logits)


def test_single_logit_loss_is_the_two_class_cross_entropy():
    model = TabularNetForClassification(TabularNetConfig(num_features=3, num_labels=2)).eval()
    features, labels = torch.randn(7, 3), torch.tensor([0, 1, 1, 0, 1, 0, 0])
    output = model(features=features, labels=labels)
    two = torch.cat([torch.zeros_like(output.logits), output.logits], dim=-1)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(two, labels))


def test_the_updated_network_is_wider():
    config = prepare(dataset_name="sample", model_type="dense-128-64").model_init().config
    assert config.hidden_sizes == [128, 64] and config.dropout == 0.5


def fit(task, folder, **options):
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=32,
        per_device_eval_batch_size=256,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        **options,
    )
    run = Trainer(
        model_init=task.model_init,
        args=arguments,
        train_dataset=task.train_dataset,
        eval_dataset=task.eval_dataset,
        data_collator=task.data_collator,
        compute_metrics=task.compute_metrics,
        processing_class=task.processing_class,
    )
    run.train()
    return run


def test_trainer_runs_on_the_breast_cancer_sample(tmp_path):
    task = prepare(dataset_name="sample")
    assert "built-in offline sample" in task.source and task.label_names == ["malignant", "benign"]
    run = fit(task, tmp_path, num_train_epochs=8, learning_rate=3e-3)
    assert run.evaluate()["eval_accuracy"] > 0.9
    run.save_model()
    assert TabularProcessor.from_pretrained(tmp_path).num_features == 30


@pytest.mark.skipif(not DATA.is_file(), reason="the real datasets are not here")
def test_titanic_learns(tmp_path):
    task = prepare(dataset_name=str(DATA))
    assert (len(task.train_dataset), len(task.controller_dataset), len(task.eval_dataset)) == (641, 71, 179)
    assert fit(task, tmp_path, num_train_epochs=10, learning_rate=3e-3).evaluate()["eval_accuracy"] > 0.75
