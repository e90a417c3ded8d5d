"""Whatever cannot work ends before training, with one message that names the field, the value and the remedy."""

import io
import json
import math
import shutil
import subprocess
import sys
from datetime import datetime
from unittest.mock import MagicMock

import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from PIL import Image

from hf_alrs.experiment import DataArguments, InputError
from tasks import TASKS, get_task
from tasks.sources import class_names, encode_labels, load_source
from tasks.tabular import choose_columns
from tasks.text import PROBLEMS, _text_columns, train_word_tokenizer


def refused(**options) -> InputError:
    arguments = DataArguments(**options)
    with pytest.raises(InputError) as caught:
        TASKS[arguments.task_name].prepare(arguments)
    error = caught.value
    assert error.field and error.rule and error.remedy
    assert "\n" not in str(error)
    return error


def write_csv(folder, train, test=None):
    folder.mkdir(exist_ok=True)
    pd.DataFrame(train).to_csv(folder / "train.csv", index=False)
    if test is not None:
        pd.DataFrame(test).to_csv(folder / "test.csv", index=False)
    return str(folder)


def texts(count, **extra):
    return {"text": [f"some word{n}" for n in range(count)], "label": [n % 2 for n in range(count)], **extra}


def save_encoder(folder, vocab_size=None, positions=16):
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = train_word_tokenizer(["one two three four five six"], 16, for_encoder=True)
    config = BertConfig(
        vocab_size=vocab_size or len(tokenizer),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=positions,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# --- tasks and arguments ---


def test_unknown_task():
    with pytest.raises(InputError, match="did you mean `imdb`") as caught:
        get_task("imbd")
    assert caught.value.field == "task_name" and "sst2" in caught.value.rule
    assert get_task("sst2") is TASKS["sst2"]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_train_samples": 0}, "max_train_samples"),
        ({"max_eval_samples": -1}, "max_eval_samples"),
        ({"max_seq_length": 0}, "max_seq_length"),
        ({"controller_split": 1.0}, "controller_split"),
        ({"controller_split": -0.1}, "controller_split"),
        ({"split_seed": -1}, "split_seed"),
        ({"split_seed": 2**32}, "split_seed"),
        ({"num_folds": 1}, "num_folds"),
        ({"fold": 5}, "fold"),
        ({"model_type": "lstm"}, "model_type"),
        ({"model_type": "bilstm", "model_name_or_path": "some/model"}, "model_type"),
    ],
)
def test_arguments_out_of_range(options, field):
    assert refused(task_name="imdb", dataset_name="sample", **options).field == field


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"augmentation": "cutout"}, "augmentation"),
        ({"model_type": "resnet50"}, "model_type"),
        ({"model_type": "pretrained"}, "model_type"),
    ],
)
def test_vision_arguments(options, field):
    assert refused(task_name="cifar10", dataset_name="sample", **options).field == field


def test_pairs_need_an_encoder_and_have_no_sample(tmp_path):
    assert refused(task_name="mrpc", model_type="bilstm").field == "model_type"
    model = save_encoder(tmp_path / "model")
    error = refused(task_name="mrpc", dataset_name="sample", model_name_or_path=model)
    assert error.field == "dataset_name" and "no built-in sample" in error.rule


# --- sources ---


def test_missing_file_and_folder():
    for name in ("./nowhere", "/nowhere/at/all", "missing.csv", "a/b/c"):
        error = refused(task_name="imdb", dataset_name=name)
        assert (error.field, error.value) == ("dataset_name", name) and "no such file" in error.rule


def test_folder_without_data(tmp_path):
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    assert "no data files" in refused(task_name="imdb", dataset_name=str(tmp_path / "empty")).rule
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thing.xyz").write_text("no data")
    assert "cannot be read" in refused(task_name="imdb", dataset_name=str(tmp_path / "notes")).rule


def test_unreadable_file(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"not parquet at all")
    assert "cannot be read" in refused(task_name="imdb", dataset_name=str(tmp_path / "train.parquet")).rule
    (tmp_path / "train.xyz").write_text("x")
    assert "must end in" in refused(task_name="imdb", dataset_name=str(tmp_path / "train.xyz")).rule


def hub_http_error():
    # Whichever HTTP library the Hub's client uses, its error keeps the response.
    return HfHubHTTPError("503 from the Hub", response=MagicMock(status_code=503, headers={}))


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach the Hub"),
        OfflineModeIsEnabled("offline"),
        LocalEntryNotFoundError("not in the cache"),
        hub_http_error(),
        RuntimeError("Cannot send a request, as the client has been closed."),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("task_name", ["imdb", "cifar10"])
def test_hub_that_cannot_be_reached(task_name, error, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("datasets.load_dataset", fail)
    caught = refused(task_name=task_name)
    assert caught.field == "dataset_name" and caught.value == {"imdb": "stanfordnlp/imdb"}.get(
        task_name, "uoft-cs/cifar10"
    )
    assert "cannot be reached" in caught.rule and "local folder" in caught.remedy and "`sample`" in caught.remedy


def test_dataset_that_is_not_on_the_hub(monkeypatch):
    def fail(*args, **kwargs):
        raise DatasetNotFoundError("doesn't exist")

    monkeypatch.setattr("datasets.load_dataset", fail)
    assert "nor a dataset on the Hub" in refused(task_name="imdb", dataset_name="some/thing").rule


def test_offline_hub_for_real(tmp_path):
    # In a process of its own, as offline mode is read at import.
    code = (
        "from hf_alrs.experiment import DataArguments, InputError\n"
        "from tasks import get_task\n"
        "for name in ('imdb', 'sst2'):\n"
        "    try:\n"
        "        get_task(name).prepare(DataArguments(task_name=name))\n"
        "    except InputError as error:\n"
        "        print(error.field)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path),
            "PATH": "",
            "PYTHONPATH": str(TASKS["sst2"].recipe.parents[2]),
        },
        capture_output=True,
        text=True,
    )
    # SST-2 looks at its encoder first, IMDB has none.
    assert result.stdout.split() == ["dataset_name", "model_name_or_path"], result.stderr


def test_importing_tasks_loads_no_task_module():
    # What the modules need beyond hf_alrs' own imports is loaded when a task is prepared.
    code = (
        "import sys, tasks; print([n for n in sys.modules if n.startswith('tasks.') or n in ('sklearn', 'evaluate')])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=TASKS["sst2"].recipe.parents[2]
    )
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_titanic_has_no_default_source():
    error = refused(task_name="titanic")
    assert error.field == "dataset_name" and "train.csv" in error.remedy


# --- columns, labels, splits ---


def test_missing_columns(tmp_path):
    folder = write_csv(tmp_path / "data", texts(20), texts(20))
    error = refused(task_name="imdb", dataset_name=folder, text_column="txt")
    assert (error.field, error.value) == ("text_column", "txt") and "nearest is `text`" in error.rule
    assert refused(task_name="imdb", dataset_name=folder, label_column="lable").field == "label_column"
    other = write_csv(tmp_path / "other", {"words": ["a"] * 20, "label": [0, 1] * 10})
    assert refused(task_name="imdb", dataset_name=other).field == "text_column"
    unlabelled = write_csv(tmp_path / "unlabelled", {"text": ["a"] * 20})
    assert refused(task_name="imdb", dataset_name=unlabelled).field == "label_column"
    assert refused(task_name="cifar10", dataset_name=folder).field == "image_column"
    few = write_csv(tmp_path / "few", texts(3), texts(3))  # not for being too few
    error = refused(task_name="cifar10", dataset_name=few, image_column="picture")
    assert (error.field, error.value) == ("image_column", "picture")
    model = save_encoder(tmp_path / "model")
    error = refused(task_name="rte", dataset_name=folder, model_name_or_path=model)
    assert error.field == "text_pair_column"
    # Saved numbers cannot be applied to a table without their columns.
    from tasks.tabular import TabularProcessor

    with pytest.raises(InputError, match="size"):
        TabularProcessor([{"column": "size", "fill": 0, "mean": 0, "scale": 1}])(pd.DataFrame({"other": [1]}))


@pytest.mark.parametrize("wrong", [2, -3, 0.5, None])
def test_label_outside_the_range(wrong, tmp_path):
    data = texts(20)
    data["label"][7] = wrong
    error = refused(task_name="imdb", dataset_name=write_csv(tmp_path / "data", data))
    assert error.field == "label" and "row 7 of the train split" in error.rule


def test_a_text_label_that_is_missing(tmp_path):
    data = texts(40)
    data["label"] = [None if n == 7 else ("bad", "good")[n % 2] for n in range(40)]
    folder = write_csv(tmp_path / "data", data)
    error = refused(task_name="imdb", dataset_name=folder)
    assert error.field == "label" and "row 7 of the train split" in error.rule


@pytest.mark.parametrize(
    ("labels", "rule"),
    [
        ([datetime(2020, 1, 1), datetime(2021, 1, 1)], "neither"),
        ([b"a", b"b"], "neither"),
        ([0.0, math.inf], "row 1 of the train split"),
    ],
)
def test_labels_of_other_kinds(labels, rule):
    rows = Dataset.from_dict({"label": labels * 10})
    with pytest.raises(InputError, match=rule):
        encode_labels(rows, "label", class_names(rows, "label"), "train")


@pytest.mark.parametrize(
    ("labels", "rule"),
    [
        ([-1, 1], "2 numbers from -1 to 1; whole numbers must be 0 to n - 1, and -1 marks a row without a label"),
        ([1, 2], "2 numbers from 1 to 2; whole numbers must be 0 to n - 1."),
        ([0.25, 1.5, 2.0], "have fractions, such as 0.25 and 1.5"),
        (["None", "toxic"], "holds 1 class, and two are needed; 30 of 60 rows have none"),
        (["NA", "mild", "toxic"], "row 0 of the train split has no label; 20 of 60 rows have none"),
        ([None, None], "holds 0 classes, and two are needed; 60 of 60 rows have none"),
    ],
)
def test_labels_that_are_no_classes_are_told(labels, rule, tmp_path):
    table = {"size": range(60), "label": (labels * 60)[:60]}
    assert rule in refused(task_name="titanic", dataset_name=write_csv(tmp_path / "table", table)).rule


def test_eval_label_that_train_does_not_have(tmp_path):
    def named(count):
        return {"text": ["a"] * count, "label": ["cold", "warm"] * (count // 2)}

    test = named(10)
    test["label"][3] = "hot"
    error = refused(task_name="imdb", dataset_name=write_csv(tmp_path / "data", named(20), test))
    assert error.value == "hot" and "row 3 of the test split" in error.rule


def test_regression_target_outside_the_range(tmp_path):
    data = {"sentence1": ["a"] * 20, "sentence2": ["b"] * 20, "label": [2.5] * 19 + [7.0]}
    folder = write_csv(tmp_path / "data", data)
    error = refused(task_name="stsb", dataset_name=folder, model_name_or_path=save_encoder(tmp_path / "model"))
    assert error.value == 7.0 and "outside 0 to 5" in error.rule


def test_row_without_a_text(tmp_path):
    data = texts(20)
    data["text"][4] = None
    error = refused(task_name="imdb", dataset_name=write_csv(tmp_path / "data", data), controller_split=0.0)
    assert error.field == "text_column" and "row 4" in error.rule


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_empty_split(suffix, tmp_path):
    full = pd.DataFrame(texts(20))

    def source(name, **splits):
        (tmp_path / name).mkdir()
        for split, rows in splits.items():
            path = tmp_path / name / f"{split}.{suffix}"
            if suffix == "csv":
                rows.to_csv(path, index=False)
            elif suffix == "jsonl":
                rows.to_json(path, orient="records", lines=True)
            else:
                rows.to_parquet(path)
        return str(tmp_path / name)

    for name, splits in (
        ("no_test", {"train": full, "test": full[:0]}),
        ("no_train", {"train": full[:0], "test": full}),
        ("nothing", {"train": full[:0]}),
    ):
        error = refused(task_name="imdb", dataset_name=source(name, **splits))
        assert error.field == "dataset_name" and "empty" in error.rule


def test_empty_split_of_a_loaded_dataset():
    from datasets import Dataset

    from tasks.sources import Source, split_examples

    rows = Dataset.from_dict(texts(20))
    for splits in ({"train": rows, "test": rows.select([])}, {"train": rows.select([]), "test": rows}):
        with pytest.raises(InputError, match="split is empty"):
            split_examples(DataArguments(), Source(splits, "in memory"))


def test_one_class_only(tmp_path):
    folder = write_csv(tmp_path / "data", {"text": ["a"] * 20, "label": [1] * 20})
    assert refused(task_name="imdb", dataset_name=folder).field == "label_column"
    names = write_csv(tmp_path / "names", {"text": ["a"] * 20, "label": ["same"] * 20})
    assert refused(task_name="imdb", dataset_name=names).field == "label_column"


def test_too_few_examples_to_stratify(tmp_path):
    folder = write_csv(tmp_path / "data", texts(8), texts(8))
    assert refused(task_name="imdb", dataset_name=folder).field == "controller_split"
    assert refused(task_name="imdb", dataset_name=folder, max_train_samples=1).field == "max_train_samples"
    assert refused(task_name="imdb", dataset_name=folder, max_eval_samples=1).field == "max_eval_samples"
    single = write_csv(tmp_path / "single", texts(8))
    assert refused(task_name="imdb", dataset_name=single).field == "num_folds"
    rare = texts(40)
    rare["label"] = [0] * 39 + [1]
    folder = write_csv(tmp_path / "rare", rare, texts(8))
    assert refused(task_name="imdb", dataset_name=folder).field == "controller_split"


def test_table_without_usable_columns(tmp_path):
    names = write_csv(tmp_path / "data", {"name": [f"n{n}" for n in range(40)], "label": [0, 1] * 20})
    assert "no column" in refused(task_name="titanic", dataset_name=names).rule
    assert refused(task_name="titanic", dataset_name="sample", model_name_or_path="x/y").field == "model_name_or_path"
    assert refused(task_name="titanic", dataset_name="sample", label_column="Survive").field == "label_column"


# --- images ---


@pytest.mark.parametrize("damage", ["noise", "cut", "missing"])
@pytest.mark.parametrize("cached", [True, False])
def test_corrupt_image_is_named(damage, cached, tmp_path, monkeypatch):
    if not cached:
        monkeypatch.setattr("tasks.vision.MAX_CACHED_BYTES", 0)
    generator = np.random.default_rng(0)

    def jpeg():
        buffer = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(buffer, "JPEG")
        return buffer.getvalue()

    images = [jpeg() for _ in range(20)]
    images[13] = {"noise": b"no image", "cut": images[13][:-150], "missing": None}[damage]
    (tmp_path / "data").mkdir()
    frame = pd.DataFrame({"img": images, "label": [n % 10 for n in range(20)]})
    frame.to_parquet(tmp_path / "data" / "train.parquet")
    frame.iloc[:10].to_parquet(tmp_path / "data" / "test.parquet")
    error = refused(task_name="cifar10", dataset_name=str(tmp_path / "data"), controller_split=0.0)
    assert error.field == "image_column" and "image 13 of the train split" in error.rule


# --- models ---


def test_tokenizer_and_model_that_do_not_fit(tmp_path):
    folder = save_encoder(tmp_path / "model", vocab_size=5)
    error = refused(task_name="imdb", dataset_name="sample", model_name_or_path=folder)
    assert error.field == "model_name_or_path" and "do not fit" in error.rule and "embedding of 5" in error.rule


def test_text_longer_than_the_model_reads(tmp_path):
    folder = save_encoder(tmp_path / "model")
    error = refused(task_name="imdb", dataset_name="sample", model_name_or_path=folder, max_seq_length=64)
    assert error.field == "max_seq_length" and "16 tokens" in error.rule


def test_folder_without_a_model(tmp_path):
    for task_name in ("imdb", "cifar10"):
        error = refused(task_name=task_name, dataset_name="sample", model_name_or_path=str(tmp_path))
        assert error.field == "model_name_or_path" and "no usable config" in error.rule


def test_folder_without_weights(tmp_path):
    folder = save_encoder(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    arguments = DataArguments(task_name="imdb", dataset_name="sample", model_name_or_path=folder)
    with pytest.raises(InputError, match="no usable model"):
        TASKS["imdb"].prepare(arguments).model_init()


# --- what came as a traceback once ---


@pytest.mark.parametrize(
    ("column", "values", "match"),
    [
        ("label", [2, 4], "its labels are 2 numbers from 2 to 4"),
        ("label", [0, 100_000_000], "must be 0 to n - 1"),
        ("x", [1.0, float("inf")], "holds infinity"),
    ],
)
def test_tables_that_cannot_be_learnt_from(column, values, match, tmp_path):
    table = {"x": list(np.linspace(0, 1, 40)), "label": [n % 2 for n in range(40)]}
    table[column] = [values[n % 2] for n in range(40)]
    folder = write_csv(tmp_path / "table", table)
    assert match in str(refused(task_name="titanic", dataset_name=f"{folder}/train.csv", fold=0))


def titanic(count=40):
    return {
        "Survived": [n % 2 for n in range(count)],
        "Pclass": [1 + n % 3 for n in range(count)],
        "Name": [f"Doe, Mr. John{n}" for n in range(count)],
        "Sex": [("male", "female")[n % 2] for n in range(count)],
        "Age": [20.0 + n for n in range(count)],
        "SibSp": [0] * count,
        "Parch": [n % 2 for n in range(count)],
        "Fare": [5.0 + n for n in range(count)],
        "Embarked": ["S"] * count,
    }


def test_titanics_columns_may_be_wrong_or_empty(tmp_path):
    table = titanic()
    table["SibSp"] = ["1+", *table["SibSp"][1:]]
    folder = write_csv(tmp_path / "wrong", table)
    error = refused(task_name="titanic", dataset_name=f"{folder}/train.csv", fold=0)
    assert (error.field, error.value) == ("dataset_name", "SibSp")
    for number, empty in enumerate(({"Age": [None] * 40}, {"Embarked": [None] * 40}, {"Fare": [-2.0] * 40})):
        folder = write_csv(tmp_path / f"empty{number}", titanic() | empty)
        arguments = DataArguments(task_name="titanic", dataset_name=f"{folder}/train.csv", fold=0)
        prepared = TASKS["titanic"].prepare(arguments)
        assert np.isfinite(prepared.train_dataset.features.numpy()).all()


@pytest.mark.parametrize(("split", "number"), [("train", -1e200), ("test", -1e200), ("test", 1e50)])
def test_numbers_too_large_to_scale(split, number, tmp_path):
    tables = {name: {"size": [float(n) for n in range(40)], "label": [0, 1] * 20} for name in ("train", "test")}
    tables[split]["size"][5] = number
    error = refused(task_name="titanic", dataset_name=write_csv(tmp_path / "table", *tables.values()))
    assert (error.field, error.value) == ("dataset_name", "size") and f"row 5 holds {number:g}" in error.rule


def test_a_boolean_column_with_a_missing_value_is_learnt_from(tmp_path):
    flags = [bool(n % 2) for n in range(40)]
    folder = write_csv(tmp_path / "table", {"flag": [None, *flags[1:]], "label": [n % 2 for n in range(40)]})
    arguments = DataArguments(task_name="titanic", dataset_name=f"{folder}/train.csv", fold=0)
    assert TASKS["titanic"].prepare(arguments).processing_class.feature_names == ["flag"]


def test_a_label_of_several_values_is_refused(tmp_path):
    rows = "".join(f'{{"text": "some words {n}", "label": [{n % 2}]}}\n' for n in range(40))
    (tmp_path / "rows.jsonl").write_text(rows)
    error = refused(task_name="imdb", dataset_name=str(tmp_path / "rows.jsonl"), fold=0)
    assert error.field == "label_column" and "holds several" in error.rule


def test_a_text_encoder_needs_room_for_a_word():
    assert refused(task_name="sst2", dataset_name="sample", max_seq_length=1).field == "max_seq_length"


def save_images(folder, make, count=12):
    for label in range(2):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(count):
            make(label).save(folder / f"class{label}" / f"{number}.png")
    return str(folder)


def test_grey_levels_of_16_bits_are_scaled(tmp_path):
    folder = save_images(
        tmp_path / "images", lambda label: Image.fromarray(np.full((8, 8), 20_000 * (1 + label), dtype=np.uint16))
    )
    prepared = TASKS["cifar10"].prepare(DataArguments(task_name="cifar10", dataset_name=folder, augmentation="none"))
    pixels = prepared.train_dataset.images
    assert sorted(np.unique(pixels)) == [round(20_000 / 257), round(40_000 / 257)]


def test_images_are_turned_as_they_say(tmp_path):
    picture = Image.fromarray(np.repeat(np.arange(8, dtype=np.uint8) * 30, 8).reshape(8, 8)).convert("RGB")
    folder = tmp_path / "images"
    for label in range(2):
        (folder / f"class{label}").mkdir(parents=True)
        exif = Image.Exif()
        exif[0x0112] = (1, 3)[label]  # as it is, and by half a turn
        for number in range(12):
            picture.save(folder / f"class{label}" / f"{number}.png", exif=exif)
    arguments = DataArguments(task_name="cifar10", dataset_name=str(folder), augmentation="none")
    dataset = TASKS["cifar10"].prepare(arguments).train_dataset
    first, second = (dataset.images[int(np.flatnonzero(dataset.labels == label)[0])] for label in range(2))
    assert np.array_equal(first, np.flip(np.asarray(second), (1, 2))) and not np.array_equal(first, second)


def test_images_of_ones_own_have_their_own_classes(tmp_path):
    def encoded():
        file = io.BytesIO()
        Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(file, format="PNG")
        return file.getvalue()

    rows = pd.DataFrame({"image": [{"bytes": encoded()} for _ in range(60)], "label": [n % 3 for n in range(60)]})
    rows.to_parquet(tmp_path / "rows.parquet")
    arguments = DataArguments(task_name="cifar10", dataset_name=str(tmp_path / "rows.parquet"), fold=0)
    assert TASKS["cifar10"].prepare(arguments).label_names == ["0", "1", "2"]


def test_images_too_small_for_the_network(tmp_path):
    folder = save_images(tmp_path / "images", lambda label: Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8)))
    error = refused(task_name="cifar10", dataset_name=folder)
    assert error.field == "model_type" and "4x4" in error.rule


def test_labels_of_a_split_that_was_encoded_by_itself():
    """A validation split without class a numbers b and c from 0."""
    names = ["a", "b", "c"]
    rows = Dataset.from_dict({"label": [0, 1, 0]}, features=Features({"label": ClassLabel(names=["b", "c"])}))
    assert encode_labels(rows, "label", names, "validation").tolist() == [1, 2, 1]
    more = rows.cast_column("label", ClassLabel(names=["b", "new"]))
    assert encode_labels(more.select([0, 2]), "label", names, "validation").tolist() == [1, 1]
    with pytest.raises(InputError, match="row 1 of the validation split has a label outside") as caught:
        encode_labels(more, "label", names, "validation")
    assert caught.value.value == "new"
    others = rows.cast_column("label", ClassLabel(names=["neg", "pos"]))
    assert encode_labels(others, "label", names, "validation").tolist() == [0, 1, 0], (
        "of other names the numbers count"
    )


def test_quotation_marks_in_tables_with_tabs(tmp_path):
    lines = ["sentence\tlabel", *(f"{'' if n % 3 else chr(34)}text {n}\t{n % 2}" for n in range(60))]
    (tmp_path / "bare.tsv").write_text("\n".join(lines) + "\n")
    quoted = [line if n == 0 else '"' + line.replace("\t", '"\t') for n, line in enumerate(lines)]
    (tmp_path / "quoted.tsv").write_text("\n".join(line.replace('""', '"') for line in quoted) + "\n")
    for name, first in (("bare", '"text 0'), ("quoted", "text 0")):
        source = load_source(DataArguments(task_name="sst2", dataset_name=str(tmp_path / f"{name}.tsv")), "")
        assert len(source.splits["train"]) == 60
        assert source.splits["train"][0]["sentence"] == first
        for number, names in enumerate(
            (("train", "dev"), ("rows",))
        ):  # told by their names, and left to `load_dataset`
            folder = tmp_path / f"{name}-{number}"
            folder.mkdir()
            for split in names:
                shutil.copy(tmp_path / f"{name}.tsv", folder / f"{split}.tsv")
            splits = load_source(DataArguments(task_name="sst2", dataset_name=str(folder)), "").splits
            assert all((len(rows), rows[0]["sentence"]) == (60, first) for rows in splits.values())


def test_row_numbers_are_not_learnt_from():
    frame = pd.DataFrame(
        {name: range(5) for name in ("Unnamed: 0", "CustomerId", "row_index", "id", "paid")} | {"y": 0}
    )
    assert choose_columns(frame, "y") == (["paid"], [])


@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification"])
def test_an_encoder_that_was_trained_for_something_else(problem_type, tmp_path):
    folder = save_encoder(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"problem_type": problem_type}))
    arguments = DataArguments(task_name="imdb", dataset_name="sample", model_name_or_path=folder)
    assert TASKS["imdb"].prepare(arguments).model_init().config.problem_type == "single_label_classification"


def test_a_validation_split_called_val(tmp_path):
    def split(size):
        return Dataset.from_dict({"text": [f"text {n}" for n in range(size)], "label": [n % 2 for n in range(size)]})

    DatasetDict(train=split(90), val=split(30)).save_to_disk(str(tmp_path / "own"))
    task = TASKS["sst2"].prepare(
        DataArguments(task_name="sst2", dataset_name=str(tmp_path / "own"), model_type="bilstm")
    )
    assert len(task.eval_dataset) == 30


def test_files_with_other_columns_are_told_by_their_columns(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\na,0\nb,1\n")
    (tmp_path / "test.csv").write_text("review,label\nc,0\n")
    assert "columns" in refused(task_name="imdb", dataset_name=str(tmp_path)).rule


def test_images_to_predict_need_no_folder_of_a_class(tmp_path):
    from PIL import Image

    def save(path, shade):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (shade, shade, shade)).save(path)

    for name, shade in (("dark", 20), ("light", 200)):
        for number in range(6):
            save(tmp_path / "train" / name / f"{number}.png", shade)
            save(tmp_path / "validation" / name / f"{number}.png", shade + number)
    save(tmp_path / "test" / "one.png", 30)
    task = TASKS["cifar10"].prepare(DataArguments(task_name="cifar10", dataset_name=str(tmp_path), controller_split=0))
    assert task.label_names == ["dark", "light"]
    assert (len(task.train_dataset), len(task.eval_dataset), len(task.predict_dataset)) == (12, 12, 1)


def save_pictures(folder, classes, count=8, start=0):
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            shade = start + 40 * number + index
            Image.new("RGB", (16, 16), (shade, shade, shade)).save(folder / name / f"{index}.png")


@pytest.mark.parametrize(
    "names", [("train", "test"), ("Training", "Testing"), ("TRAIN", "Val"), ("pets/training_set", "pets/testset")]
)
@pytest.mark.parametrize("classes", [("beaker", "test-tube"), ("bus", "train"), ("dev", "test")])
def test_classes_that_are_named_as_splits(names, classes, tmp_path):
    save_pictures(tmp_path / names[0], classes)
    save_pictures(tmp_path / names[1], classes, count=6, start=100)
    (tmp_path / names[0] / "Thumbs.db").write_bytes(b"not a picture")
    (tmp_path / "README.md").write_text("# Pictures\n")
    task = TASKS["cifar10"].prepare(DataArguments(task_name="cifar10", dataset_name=str(tmp_path), controller_split=0))
    assert task.label_names == list(classes)
    assert (len(task.train_dataset), len(task.eval_dataset)) == (16, 12)
    assert task.train_dataset.images.max() < 100 <= task.eval_dataset.images.min()


@pytest.mark.parametrize("name", ["train", "test", "test-tube"])
def test_a_class_that_is_taken_for_a_split(name, tmp_path):
    save_pictures(tmp_path, ("bus", "car", name))
    error = refused(task_name="cifar10", dataset_name=str(tmp_path))
    assert (
        error.field == "dataset_name"
        and f"taken for a split by its name: images lie in the folder {name}" in error.rule
    )


def test_classes_without_splits(tmp_path):
    save_pictures(tmp_path, ("Train", "bus"), count=20)
    task = TASKS["cifar10"].prepare(DataArguments(task_name="cifar10", dataset_name=str(tmp_path)))
    assert task.label_names == ["Train", "bus"]


def test_pictures_with_a_list_of_labels(tmp_path):
    for split, count in (("Train", 20), ("Test", 8)):
        (tmp_path / split).mkdir()
        for index in range(count):
            Image.new("RGB", (16, 16), (index, index, index)).save(tmp_path / split / f"{index}.png")
        lines = ["file_name,label", *(f"{index}.png,{('cat', 'dog')[index % 2]}" for index in range(count))]
        (tmp_path / split / "metadata.csv").write_text("\n".join(lines) + "\n")
    splits = load_source(DataArguments(task_name="cifar10", dataset_name=str(tmp_path)), "").splits
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 20, "test": 8}
    assert splits["test"].unique("label") == ["cat", "dog"]


@pytest.mark.parametrize(
    ("names", "sizes"),
    [
        (["Train.csv", "Valid.csv", "Test.csv"], {"train": 1, "validation": 2, "test": 3}),
        (["training.csv", "devel.csv", "TESTING.csv"], {"train": 1, "test": 3}),
        (["train/one.csv", "train/test-2.csv", "Dev/train.csv"], {"train": 3, "validation": 3}),
        (["train-00000-of-00002.csv", "train-00001-of-00002.csv", "Test.csv"], {"train": 3, "test": 3}),
        (["train.csv.gz", "dev_matched.csv.gz", "dev_mismatched.csv.gz"],
         {"train": 1, "validation_matched": 2, "validation_mismatched": 3}),
        # What is left to `load_dataset`
        (["train.csv", "train_more.csv", "test.csv"], {"train": 3, "test": 3}),
        (["my-train.csv", "my-test.csv"], {"train": 1, "test": 2}),
        (["data/train-00000-of-00001.csv", "data/other-00000-of-00001.csv"], {"train": 1, "other": 2}),
    ],
)  # fmt: skip
def test_files_and_folders_named_as_splits(names, sizes, tmp_path):
    for number, name in enumerate(names, start=1):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pd.DataFrame(texts(number)).to_csv(tmp_path / name, index=False)
        (tmp_path / name).with_name("notes.txt").write_text("no data")
    splits = load_source(DataArguments(task_name="imdb", dataset_name=str(tmp_path)), "").splits
    assert {split: len(rows) for split, rows in splits.items()} == sizes


def test_a_folder_may_be_given_from_here_and_its_files_have_brackets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_pictures(tmp_path / "pictures" / "Train", ("cat [1]", "dog"))
    save_pictures(tmp_path / "pictures" / "Test", ("cat [1]", "dog"), count=3)
    write_csv(tmp_path / "tables", texts(4), texts(3))
    (tmp_path / "tables" / "train").mkdir()
    (tmp_path / "tables" / "train.csv").rename(tmp_path / "tables" / "train" / "part [1].csv")
    for name, sizes in (("pictures", {"train": 16, "test": 6}), ("tables", {"train": 4})):
        splits = load_source(DataArguments(task_name="imdb", dataset_name=name), "").splits
        assert {split: len(rows) for split, rows in splits.items()} == sizes


def test_a_readme_that_tells_the_splits(tmp_path):
    for number, name in enumerate(("train.csv", "test.csv", "rest.csv"), start=1):
        pd.DataFrame(texts(number)).to_csv(tmp_path / name, index=False)
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: rest.csv\n---\n"
    )
    splits = load_source(DataArguments(task_name="imdb", dataset_name=str(tmp_path)), "").splits
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 3}


def test_both_evaluations_of_mnli(tmp_path):
    sizes = {"train": 30, "validation_matched": 6, "validation_mismatched": 9, "test_matched": 4, "test_mismatched": 5}
    for split, size in sizes.items():
        rows = {"premise": ["a"] * size, "hypothesis": ["b"] * size, "label": [n % 3 for n in range(size)]}
        if split.startswith("test"):
            rows["label"] = [-1] * size
        pd.DataFrame(rows).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    task = TASKS["mnli"].prepare(
        DataArguments(
            task_name="mnli",
            dataset_name=str(tmp_path),
            model_name_or_path=save_encoder(tmp_path.parent / "mnli-model"),
        )
    )
    assert (len(task.eval_dataset), len(task.predict_dataset)) == (6, 4)


@pytest.mark.parametrize(
    ("task", "names", "given", "columns"),
    [
        ("qnli", ["sentence", "sentence2"], {}, ["sentence", "sentence2"]),
        ("qnli", ["text", "Sentence"], {}, ["text", "Sentence"]),
        ("qnli", ["sentence", "question"], {}, ["question", "sentence"]),
        ("qnli", ["sentence", "text"], {"text_column": "sentence", "text_pair_column": "text"}, ["sentence", "text"]),
        ("sst2", ["text", "review"], {"text_pair_column": "text"}, ["review", "text"]),
    ],
)
def test_a_text_is_no_pair_with_itself(task, names, given, columns):
    rows = Dataset.from_dict({name: ["a"] for name in names})
    arguments = DataArguments(task_name=task, dataset_name="own.csv", **given)
    assert _text_columns(arguments, PROBLEMS[task], rows, is_own=True) == columns


def test_columns_that_are_missing_are_named_once():
    rows = Dataset.from_dict({"sentence1": ["a"], "other": ["b"]})
    with pytest.raises(InputError, match="no column is called sentence2 or text_pair;"):
        _text_columns(DataArguments(task_name="rte"), PROBLEMS["rte"], rows, is_own=True)


@pytest.mark.parametrize("kind", ["Roberta", "XLMRoberta", "MPNet"])
def test_positions_that_begin_after_that_of_padding(kind, tmp_path):
    import torch
    import transformers

    folder = save_encoder(tmp_path / "model")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=50,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=10,
        pad_token_id=0 if kind == "MPNet" else 1,
    )
    getattr(transformers, f"{kind}ForSequenceClassification")(config).save_pretrained(folder)
    table = {"text": ["one two three four five six one two three"] * 40, "label": [0, 1] * 20}
    options = {"task_name": "imdb", "dataset_name": write_csv(tmp_path / "data", table), "model_name_or_path": folder}
    assert "reads at most 8 tokens" in refused(**options, max_seq_length=9).rule
    task = TASKS["imdb"].prepare(DataArguments(**options))
    batch = task.data_collator([task.train_dataset[0], task.train_dataset[1]])
    assert batch["input_ids"].shape == (2, 8)
    assert torch.isfinite(task.model_init()(**batch).loss)
