"""
The metrics of the tasks, as `evaluate.Metric` subclasses over scikit-learn.

`evaluate.load("accuracy")` fetches the metric's code from the Hub at run time; these classes need no network. They
keep predictions in memory, so that nothing is written and any number of processes can compute at once.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np


class OfflineMetric(evaluate.Metric):
    """
    Base of the metrics here: a name, a value type and a function of (references, predictions).

    `evaluate` makes an (empty) folder for each metric even when everything stays in memory; it goes to the system's
    folder for temporary files.
    """

    value_type = "int64"
    summary = ""

    def __init__(self, **kwargs: Any):
        kwargs.setdefault("keep_in_memory", kwargs.get("num_process", 1) == 1)
        # Named for the user: on a shared machine another user's folder may not be writable.
        user = str(os.getuid()) if hasattr(os, "getuid") else "user"
        kwargs.setdefault("cache_dir", os.path.join(tempfile.gettempdir(), f"hf_alrs_metrics_{user}"))
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.summary,
            citation="",
            inputs_description="Args: predictions, references: one number for each example.",
            features=datasets.Features(
                {"predictions": datasets.Value(self.value_type), "references": datasets.Value(self.value_type)}
            ),
        )

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any] | None:
        """
        As `evaluate.Metric.compute`, whose table of the predictions takes three times as long as the metrics of a few
        hundred of them: what is given here and now to one process needs none.

        Raises:
            `ValueError`: If there are not as many predictions as references.
        """
        if predictions is None or references is None or self.num_process > 1 or self.writer is not None:
            return super().compute(predictions=predictions, references=references, **kwargs)
        predictions, references = (np.asarray(values, dtype=self.value_type) for values in (predictions, references))
        return self._compute(predictions=predictions, references=references, **kwargs)


class Accuracy(OfflineMetric):
    """Share of examples whose class is predicted."""

    summary = "Share of examples whose class is predicted."

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        from sklearn.metrics import accuracy_score

        return {"accuracy": float(accuracy_score(references, predictions))}


class F1(OfflineMetric):
    """F1 of the class `pos_label` for two classes (`average="binary"`), the unweighted mean over classes for more (`"macro"`)."""

    summary = "Harmonic mean of precision and recall."

    def _compute(
        self, predictions: Sequence[int], references: Sequence[int], average: str = "binary", pos_label: int = 1
    ) -> dict[str, float]:
        from sklearn.metrics import f1_score

        score = f1_score(references, predictions, average=average, pos_label=pos_label, zero_division=0)
        return {"f1": float(score)}


class MatthewsCorrelation(OfflineMetric):
    """Matthews correlation coefficient, CoLA's metric."""

    summary = "Matthews correlation coefficient."

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        from sklearn.metrics import matthews_corrcoef

        return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}


class Pearson(OfflineMetric):
    """Pearson correlation; 0 where one side is constant and it is not defined."""

    value_type = "float32"
    summary = "Pearson correlation coefficient."

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        from scipy.stats import pearsonr

        return {"pearson": _correlation(pearsonr, predictions, references)}


class Spearman(OfflineMetric):
    """Spearman rank correlation; 0 where one side is constant and it is not defined."""

    value_type = "float32"
    summary = "Spearman rank correlation coefficient."

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        from scipy.stats import spearmanr

        return {"spearmanr": _correlation(spearmanr, predictions, references)}


def _correlation(function: Callable[..., Any], predictions: Sequence[float], references: Sequence[float]) -> float:
    predictions, references = (np.asarray(values, dtype=np.float64) for values in (predictions, references))
    if len(predictions) < 2 or np.ptp(predictions) == 0 or np.ptp(references) == 0:
        return 0.0
    return float(function(predictions, references)[0])


def predicted_classes(logits: Any) -> np.ndarray:
    """
    Turns a model's logits into class indices.

    Args:
        logits (`np.ndarray` or `tuple`): Of shape (n, classes), or (n, 1) or (n,) for a model with one logit, which is
            the log odds of class 1. Of a tuple of outputs the first is taken.
    """
    logits = np.asarray(logits[0] if isinstance(logits, (tuple, list)) else logits)
    if logits.ndim == 1 or logits.shape[-1] == 1:
        return (logits.reshape(-1) > 0).astype(np.int64)
    return logits.argmax(axis=-1)


class ClassificationMetrics:
    """
    `compute_metrics` of a classifier: accuracy, F1, and Matthews correlation where asked.

    Args:
        num_classes (`int`): Two give the binary F1, more the macro F1.
        matthews (`bool`): Whether to add `matthews_correlation`.
        positive (`int`): The class that the binary F1 is of.
    """

    def __init__(self, num_classes: int, matthews: bool = False, positive: int = 1):
        self.f1_options = {"average": "binary", "pos_label": positive} if num_classes == 2 else {"average": "macro"}
        self.metrics: list[OfflineMetric] = [Accuracy(), F1()] + ([MatthewsCorrelation()] if matthews else [])

    def __call__(self, prediction: Any) -> dict[str, float]:
        predictions = predicted_classes(prediction.predictions)
        references = np.asarray(prediction.label_ids).reshape(-1).astype(np.int64)
        results: dict[str, float] = {}
        for metric in self.metrics:
            options = self.f1_options if isinstance(metric, F1) else {}
            results.update(metric.compute(predictions=predictions, references=references, **options))
        return results


class RegressionMetrics:
    """`compute_metrics` of a regressor: Pearson and Spearman correlation."""

    def __init__(self) -> None:
        self.metrics: list[OfflineMetric] = [Pearson(), Spearman()]

    def __call__(self, prediction: Any) -> dict[str, float]:
        outputs = prediction.predictions
        outputs = np.asarray(outputs[0] if isinstance(outputs, (tuple, list)) else outputs).reshape(-1)
        references = np.asarray(prediction.label_ids).reshape(-1)
        results: dict[str, float] = {}
        for metric in self.metrics:
            results.update(metric.compute(predictions=outputs, references=references))
        return results
