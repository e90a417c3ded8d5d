"""Tabular tasks: Titanic, and any other table with a label column, with a small dense network."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import BatchFeature, FeatureExtractionMixin, PreTrainedModel, default_data_collator

from hf_alrs.experiment import DataArguments, InputError, PreparedTask

from .metrics import ClassificationMetrics
from .models import TabularNetConfig, TabularNetForClassification
from .sources import SAMPLE, Part, Source, check_arguments, check_choice, find_column, load_source, split_examples
from .text import label_options, load_pretrained


logger = logging.getLogger("hf_alrs.tasks.tabular")  # a level that run scripts show

# The report's network, and that of its code changes.
MODEL_TYPES: dict[str, dict[str, Any]] = {
    "dense": {"hidden_sizes": [64, 32], "dropout": 0.3},
    "dense-128-64": {"hidden_sizes": [128, 64], "dropout": 0.5},
}
LABEL_NAMES = ("died", "survived")
LABEL_COLUMNS = ("Survived", "label", "labels", "target", "class", "y")
TITANIC_COLUMNS = ("Pclass", "Name", "Sex", "Age", "SibSp", "Parch", "Fare", "Embarked")
TITANIC_NUMERIC = ("Age", "LogFare", "SibSp", "Parch", "FamilySize")
TITANIC_CATEGORICAL = ("Pclass", "Sex", "Embarked", "Title")
# A text column with more values than this is a name or a number plate, not a category.
MAX_CATEGORIES = 20
# The deviation of a column is made of squares, which must be finite too.
MAX_MAGNITUDE = 1e100
# What counts the rows: `id`, `row_index`, `CustomerId`, and the index that pandas writes along
_ROW_NUMBER = re.compile(r"(?i:(^|_)(id|idx|index)$|^unnamed: \d+$|^__index_level_\d+__$)|[a-z](Id|ID)$")


# --- columns -----------------------------------------------------------------------------------------------------


def add_titanic_columns(frame: pd.DataFrame) -> pd.DataFrame:
    """
    Adds what the names and counts of Kaggle's table say: the title, the size of the family, and the logarithm of the
    fare, which runs over three decades.
    """
    frame = frame.copy()
    frame["Title"] = [_title(name) for name in frame["Name"]]
    frame["FamilySize"] = numbers(frame, "SibSp") + numbers(frame, "Parch") + 1
    fare = numbers(frame, "Fare")
    frame["LogFare"] = np.log1p(fare.where(fare >= 0))
    return frame


def numbers(frame: pd.DataFrame, column: str) -> pd.Series:
    """
    A column as floats, NaN where missing.

    Raises:
        InputError: If it holds something else, infinity, or a number too large to scale.
    """
    try:
        values = pd.to_numeric(frame[column]).astype(float)
    except (TypeError, ValueError) as error:
        raise InputError(
            "dataset_name", column, f"the column holds something that is no number ({error}).", "Correct it."
        ) from error
    if np.isinf(values).any():
        row = values.index[np.isinf(values)][0]
        raise InputError("dataset_name", column, f"row {row} holds infinity.", "Leave it empty, or correct it.")
    if (values.abs() > MAX_MAGNITUDE).any():
        row = values.index[values.abs() > MAX_MAGNITUDE][0]
        raise InputError(
            "dataset_name",
            column,
            f"row {row} holds {values[row]:g}; magnitudes above {MAX_MAGNITUDE:g} cannot be scaled.",
            "Leave it empty, correct it, or give its logarithm.",
        )
    return values


def _title(name: Any) -> str | None:
    """Returns the title in a name such as `Braund, Mr. Owen Harris`; rare ones count as one."""
    found = re.search(r",\s*(?:the\s+)?([A-Za-z]+)\.", name) if isinstance(name, str) else None
    if found is None:
        return None
    title = {"Mlle": "Miss", "Ms": "Miss", "Mme": "Mrs"}.get(found.group(1), found.group(1))
    return title if title in ("Mr", "Mrs", "Miss", "Master") else "Rare"


def choose_columns(frame: pd.DataFrame, label_column: str) -> tuple[list[str], list[str]]:
    """
    Finds the columns of an unknown table to learn from.

    Args:
        frame (`pd.DataFrame`): The train split.
        label_column (`str`): Left out.

    Returns:
        `tuple[list[str], list[str]]`: Numeric columns, and text columns with few enough values to be categories. Row
        numbers (`id`, `index` and the like) and columns without any value are left out.
    """
    numeric, categorical = [], []
    for name in frame.columns:
        values = frame[name].dropna().infer_objects()  # booleans with missing values come as objects
        if name == label_column or values.empty:
            continue
        if pd.api.types.is_numeric_dtype(values):
            if not (_ROW_NUMBER.search(name) and values.is_unique):
                numeric.append(name)
        elif values.map(lambda value: isinstance(value, str)).all() and values.nunique() <= MAX_CATEGORIES:
            categorical.append(name)
    return numeric, categorical


def category_texts(column: pd.Series) -> pd.Series:
    """Returns categories as text, so that 3, 3.0 and "3" are one; missing ones stay missing."""

    def text(value: Any) -> Any:
        if value is None or (isinstance(value, float) and np.isnan(value)) or value is pd.NA:
            return np.nan
        if isinstance(value, (float, np.floating)) and float(value).is_integer():
            value = int(value)
        return str(value)

    return pd.Series([text(value) for value in column], index=column.index, dtype=object)


def column_transformer(numeric: Sequence[str], categorical: Sequence[str]) -> Any:
    """
    Returns the scikit-learn `ColumnTransformer` of a table, not fitted.

    Numeric columns get the median where missing and are scaled to mean 0 and deviation 1; categories get the most
    frequent where missing and are one-hot, with none hot for one that was not in train.
    """
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    return ColumnTransformer(
        [
            (
                "numeric",
                Pipeline([("fill", SimpleImputer(strategy="median")), ("scale", StandardScaler())]),
                [*numeric],
            ),
            (
                "categorical",
                Pipeline(
                    [
                        ("fill", SimpleImputer(strategy="most_frequent")),
                        ("one_hot", OneHotEncoder(handle_unknown="ignore", sparse_output=False)),
                    ]
                ),
                [*categorical],
            ),
        ],
        sparse_threshold=0.0,
    )


class TabularProcessor(FeatureExtractionMixin):
    """
    A fitted column transform that is saved with the model, as numbers in `preprocessor_config.json`.

    A pickled `ColumnTransformer` would run code when loaded and break with another scikit-learn, so only what it
    learnt is kept: fill value, mean and scale of each numeric column, fill value and categories of each other one.

    Args:
        numeric (`list[dict]`): `column`, `fill`, `mean` and `scale`.
        categorical (`list[dict]`): `column`, `fill` and `categories`.
        titanic (`bool`): Whether [`add_titanic_columns`] comes first.
    """

    model_input_names = ("features",)

    def __init__(
        self,
        numeric: Sequence[Mapping[str, Any]] = (),
        categorical: Sequence[Mapping[str, Any]] = (),
        titanic: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.numeric = [dict(entry) for entry in numeric]
        self.categorical = [dict(entry) for entry in categorical]
        self.titanic = titanic

    @classmethod
    def fit(
        cls, frame: pd.DataFrame, numeric: Sequence[str], categorical: Sequence[str], titanic: bool = False
    ) -> TabularProcessor:
        """
        Fits the [`column_transformer`] on `frame`, the train split alone, and keeps its numbers.

        Args:
            frame (`pd.DataFrame`): The train split.
            numeric (`Sequence[str]`), categorical (`Sequence[str]`): Columns, derived ones included.
            titanic (`bool`): Whether to derive Titanic's columns.
        """
        prepared = cls(
            [{"column": name} for name in numeric], [{"column": name} for name in categorical], titanic=titanic
        ).prepare(frame)
        fitted = column_transformer(numeric, categorical).fit(prepared)
        numbers, categories = [], []
        if numeric:
            steps = fitted.named_transformers_["numeric"].named_steps
            numbers = [
                {"column": name, "fill": float(fill), "mean": float(mean), "scale": float(scale)}
                for name, fill, mean, scale in zip(
                    numeric, steps["fill"].statistics_, steps["scale"].mean_, steps["scale"].scale_, strict=True
                )
            ]
        if categorical:
            steps = fitted.named_transformers_["categorical"].named_steps
            categories = [
                {"column": name, "fill": str(fill), "categories": [str(value) for value in values]}
                for name, fill, values in zip(
                    categorical, steps["fill"].statistics_, steps["one_hot"].categories_, strict=True
                )
            ]
        return cls(numbers, categories, titanic=titanic)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> TabularProcessor:
        """
        Loads what `save_pretrained` wrote.

        Raises:
            InputError: If the folder has no `preprocessor_config.json`, or one that holds no fitted transform.
        """
        name = str(pretrained_model_name_or_path)
        processor = load_pretrained(
            "column transform", name, lambda: super(TabularProcessor, cls).from_pretrained(name, **kwargs)
        )
        processor._check(name)
        return processor

    def _check(self, name: str) -> None:
        def holds(entry: dict[str, Any], numbers: Sequence[str]) -> bool:
            return isinstance(entry.get("column"), str) and all(
                isinstance(entry.get(key), (int, float)) and np.isfinite(entry[key]) for key in numbers
            )

        good = isinstance(self.titanic, bool) and bool(self.numeric or self.categorical)
        good = good and all(holds(entry, ("fill", "mean", "scale")) and entry["scale"] != 0 for entry in self.numeric)
        good = good and all(
            holds(entry, ())
            and isinstance(entry.get("fill"), str)
            and isinstance(entry.get("categories"), list)
            and all(isinstance(value, str) for value in entry["categories"])
            for entry in self.categorical
        )
        if not good:
            raise InputError(
                "model_name_or_path",
                name,
                "its preprocessor_config.json does not hold a fitted column transform.",
                "Give a folder written by save_pretrained of this version.",
            )

    @property
    def num_features(self) -> int:
        """Columns after the transform."""
        return len(self.numeric) + sum(len(entry["categories"]) for entry in self.categorical)

    @property
    def feature_names(self) -> list[str]:
        """Names of the columns after the transform."""
        return [entry["column"] for entry in self.numeric] + [
            f"{entry['column']}={value}" for entry in self.categorical for value in entry["categories"]
        ]

    def prepare(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Returns the columns to transform: derived ones added, numbers as floats, categories as text."""
        if self.titanic:
            frame = add_titanic_columns(frame)
        wanted = [entry["column"] for entry in (*self.numeric, *self.categorical)]
        missing = [name for name in wanted if name not in frame.columns]
        if missing:
            raise InputError(
                "dataset_name",
                ", ".join(missing),
                f"no such column; there are {', '.join(map(str, frame.columns))}.",
                "Give a table with the columns that the transform was fitted on.",
            )
        columns = {}
        for entry in self.numeric:
            column = entry["column"]
            columns[column] = numbers(frame, column)
        for entry in self.categorical:
            columns[entry["column"]] = category_texts(frame[entry["column"]])
        return pd.DataFrame(columns, index=frame.index)

    def __call__(self, frame: pd.DataFrame | Mapping[str, Sequence[Any]], return_tensors: Any = None) -> BatchFeature:
        """
        Transforms rows.

        Args:
            frame (`pd.DataFrame` or mapping of columns): Rows with the columns that were fitted on.
            return_tensors (`str`, *optional*): `"pt"` for tensors; numpy otherwise.

        Returns:
            `BatchFeature`: `features` of shape (rows, `num_features`), float32.
        """
        prepared = self.prepare(frame if isinstance(frame, pd.DataFrame) else pd.DataFrame(dict(frame)))
        blocks = []
        for entry in self.numeric:
            values = prepared[entry["column"]].fillna(entry["fill"]).to_numpy(dtype=np.float64)
            blocks.append(((values - entry["mean"]) / entry["scale"])[:, None])
        for entry in self.categorical:
            values = prepared[entry["column"]].fillna(entry["fill"]).to_numpy(dtype=object)
            blocks.append(
                (values[:, None] == np.asarray(entry["categories"], dtype=object)[None, :]).astype(np.float64)
            )
        features = np.concatenate(blocks, axis=1)
        wide = np.argwhere(np.abs(features) > np.finfo(np.float32).max)
        if len(wide):
            row, number = wide[0]
            column = self.numeric[number]["column"]
            raise InputError(
                "dataset_name",
                column,
                f"row {prepared.index[row]} holds {prepared[column].iloc[row]:g}, too far from those of train to be scaled.",
                "Leave it empty, or correct it.",
            )
        features = features.astype(np.float32)
        return BatchFeature({"features": features}, tensor_type=return_tensors)


# --- the task ----------------------------------------------------------------------------------------------------


class TabularDataset(torch.utils.data.Dataset):
    """
    Rows of numbers with labels; each item is `{"features": ..., "labels": ...}`.

    Args:
        features (`np.ndarray` of shape (rows, columns)): What [`TabularProcessor`] returns.
        labels (`np.ndarray`, *optional*): Class indices.
    """

    def __init__(self, features: np.ndarray, labels: np.ndarray | None):
        self.features = torch.from_numpy(np.asarray(features, dtype=np.float32))
        self.labels = None if labels is None else torch.from_numpy(np.asarray(labels, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = {"features": self.features[index]}
        if self.labels is not None:
            item["labels"] = self.labels[index]
        return item


def breast_cancer_sample() -> Source:
    """Returns scikit-learn's bundled breast-cancer table, 569 rows of 30 numbers: real data, no network needed."""
    from datasets import ClassLabel, Dataset, Features, Value
    from sklearn.datasets import load_breast_cancer

    bunch = load_breast_cancer()
    names = [str(name) for name in bunch.feature_names]
    columns: dict[str, Any] = {name: bunch.data[:, number] for number, name in enumerate(names)}
    features = Features(
        {**{name: Value("float64") for name in names}, "label": ClassLabel(names=[str(n) for n in bunch.target_names])}
    )
    rows = Dataset.from_dict({**columns, "label": bunch.target.tolist()}, features=features)
    return Source(
        splits={"train": rows},
        description="built-in offline sample: scikit-learn's breast_cancer, 569 real rows (not Titanic)",
    )


def prepare_tabular(arguments: DataArguments) -> PreparedTask:
    """
    Loads Titanic or another table, divides it, fits the column transform on train and says how to build the model.

    Raises:
        InputError: If anything given cannot work.
    """
    check_arguments(arguments)
    model_type = check_choice("model_type", arguments.model_type or "dense", list(MODEL_TYPES))
    if arguments.model_name_or_path is not None:
        raise InputError(
            "model_name_or_path",
            arguments.model_name_or_path,
            "tables have no pretrained model here.",
            "Leave it out; --model_type chooses the network.",
        )
    if arguments.dataset_name is None:
        raise InputError(
            "dataset_name",
            None,
            "the table is Kaggle's, which cannot be had without an account, so there is no default.",
            "Give the path of its train.csv, another table, or `sample`.",
        )
    source = load_source(arguments, SAMPLE, sample=breast_cancer_sample)
    train_rows = source.splits.get("train", next(iter(source.splits.values())))
    label_column = find_column(train_rows.column_names, arguments.label_column, LABEL_COLUMNS, "label_column")
    splits = split_examples(
        arguments,
        source,
        label_candidates=(label_column,),
        label_names=LABEL_NAMES if label_column.lower() == "survived" else None,
    )
    train_frame = read_frame(splits.train)
    titanic = set(TITANIC_COLUMNS) <= set(train_frame.columns)
    if titanic:
        known = add_titanic_columns(train_frame)
        numeric, categorical = (
            [name for name in names if known[name].notna().any()] for names in (TITANIC_NUMERIC, TITANIC_CATEGORICAL)
        )
    else:
        numeric, categorical = choose_columns(train_frame, label_column)
    if not numeric and not categorical:
        raise InputError(
            "dataset_name",
            arguments.dataset_name,
            f"no column is a number or a category of at most {MAX_CATEGORIES} values.",
            "Give a table with such columns besides the label.",
        )
    used = {*numeric, *categorical, label_column}
    if not titanic and (unused := [str(name) for name in train_frame.columns if name not in used]):
        logger.info("Columns that are not learnt from: %s.", ", ".join(unused))
    processor = TabularProcessor.fit(train_frame, numeric, categorical, titanic=titanic)

    eval_is_fold = splits.eval.split == splits.train.split

    def dataset(part: Part | None) -> TabularDataset | None:
        return None if part is None else TabularDataset(processor(read_frame(part))["features"], part.labels)

    train, evaluation = dataset(splits.train), dataset(splits.eval)
    return PreparedTask(
        train_dataset=train,
        controller_dataset=dataset(splits.controller),
        eval_dataset=evaluation,
        predict_dataset=dataset(splits.predict),
        model_init=_model_init(model_type, processor.num_features, splits.label_names),
        data_collator=default_data_collator,
        compute_metrics=ClassificationMetrics(len(splits.label_names)),
        processing_class=processor,
        label_names=splits.label_names,
        source=splits.description,
        reference=partial(logistic_regression, train, evaluation, len(splits.label_names)) if eval_is_fold else None,
    )


def logistic_regression(train: TabularDataset, evaluation: TabularDataset, num_classes: int) -> dict[str, float]:
    """Metrics of scikit-learn's logistic regression at its defaults, on the numbers that the network gets too."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, f1_score, log_loss

    model = LogisticRegression(max_iter=1000).fit(train.features.numpy(), train.labels.numpy())
    labels, inputs = evaluation.labels.numpy(), evaluation.features.numpy()
    predicted = model.predict(inputs)
    average = "binary" if num_classes == 2 else "macro"
    return {
        "loss": float(log_loss(labels, model.predict_proba(inputs), labels=model.classes_)),
        "accuracy": float(accuracy_score(labels, predicted)),
        "f1": float(f1_score(labels, predicted, average=average)),
    }


def read_frame(part: Part) -> pd.DataFrame:
    """Returns the rows of `part` as a table, numbered as in the source."""
    frame = part.rows.with_format(None).to_pandas()
    frame.index = part.indices
    return frame


def _model_init(model_type: str, num_features: int, label_names: Sequence[str]) -> Callable[[], PreTrainedModel]:
    def build() -> PreTrainedModel:
        config = TabularNetConfig(num_features=num_features, **MODEL_TYPES[model_type], **label_options(label_names))
        return TabularNetForClassification(config)

    return build
