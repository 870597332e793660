"""Scores of predictions: from scikit-learn and SciPy, bigger is better, never NaN."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from mergectl.benchmarks._contract import BenchmarkError, Task

NO_ANSWER = -1  # the prediction of a model whose outputs are not finite: always wrong


def accuracy(labels: Any, predictions: Any) -> float:
    """Share of right predictions."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, predictions))


def f1(labels: Any, predictions: Any) -> float:
    """F1 of class 1 against the rest."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels == 1, predictions == 1, zero_division=0))


def weighted_f1(labels: Any, predictions: Any) -> float:
    """F1 of each class, weighted by its rows."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, average="weighted", zero_division=0))


def balanced_accuracy(labels: Any, predictions: Any) -> float:
    """Mean over the classes present of the share found."""
    import numpy as np
    from sklearn.metrics import recall_score

    return float(recall_score(labels, predictions, labels=np.unique(labels), average="macro", zero_division=0))


def majority(labels: Any, predictions: Any) -> float:
    """Share of the most frequent label: the accuracy of always answering it."""
    import numpy as np

    return float(np.unique(labels, return_counts=True)[1].max() / len(labels))


def matthews(labels: Any, predictions: Any) -> float:
    """Matthews correlation; 0 where all predictions, or all labels, are the same."""
    import numpy as np
    from sklearn.metrics import matthews_corrcoef

    if min(len(np.unique(labels)), len(np.unique(predictions))) < 2:
        return 0.0
    return float(matthews_corrcoef(labels, predictions))


def pearson(labels: Any, predictions: Any) -> float:
    """Pearson correlation; 0 where one side is constant or not finite."""
    from scipy.stats import pearsonr

    return _correlation(pearsonr, labels, predictions)


def spearman(labels: Any, predictions: Any) -> float:
    """Spearman rank correlation; 0 where one side is constant or not finite."""
    from scipy.stats import spearmanr

    return _correlation(spearmanr, labels, predictions)


def pearson_spearman(labels: Any, predictions: Any) -> float:
    """Mean of Pearson and Spearman correlation (STS-B)."""
    return (pearson(labels, predictions) + spearman(labels, predictions)) / 2


def accuracy_f1(labels: Any, predictions: Any) -> float:
    """Mean of accuracy and F1 (MRPC and QQP in some papers)."""
    return (accuracy(labels, predictions) + f1(labels, predictions)) / 2


METRICS: dict[str, Callable[[Any, Any], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "weighted_f1": weighted_f1,
    "balanced_accuracy": balanced_accuracy,
    "majority": majority,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
    "pearson_spearman": pearson_spearman,
    "accuracy_f1": accuracy_f1,
}

FOR_NUMBERS = frozenset({"pearson", "spearman", "pearson_spearman"})  # for regression; the others compare label ids


def scores(task: Task, labels: Sequence[int] | Sequence[float], outputs: Any) -> dict[str, float]:
    """Return the task's metrics by name, the main one first, for a model's outputs.

    `outputs` holds logits [n, labels] for classification (or predicted ids [n]), for regression numbers [n] or [n, 1],
    for text-to-text the answers' scores [n, answers], with -inf where a row offers fewer answers than others.
    """
    import numpy as np

    truth, found = np.asarray(labels), predictions(task, outputs)
    if len(truth) == 0:
        raise BenchmarkError(f"{task.id} has no rows to score.")
    if len(truth) != len(found):
        raise BenchmarkError(f"{task.id} has {len(truth)} rows, but there are {len(found)} outputs.")
    return {name: METRICS[name](truth, found) for name in dict.fromkeys((task.metric, *task.metrics))}


def predictions(task: Task, outputs: Any) -> Any:
    """Return what the outputs predict: the label id of the largest score, or the number itself for regression."""
    import numpy as np

    found = np.asarray(outputs)
    if task.kind == "regression":
        return found.astype(np.float64).reshape(-1)
    if found.ndim == 1:
        return found
    if task.kind == "text_to_text":
        usable = ~np.isnan(found).any(axis=1) & np.isfinite(found).any(axis=1)
        return np.where(usable, found.argmax(axis=1), NO_ANSWER)
    return np.where(np.isfinite(found).all(axis=1), found.argmax(axis=1), NO_ANSWER)


def _correlation(measure: Any, labels: Any, predictions: Any) -> float:
    import numpy as np

    if len(labels) < 2 or not np.isfinite(predictions).all():
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SciPy warns of constant input, which is a legal outcome here
        value = float(measure(labels, predictions)[0])
    return value if np.isfinite(value) else 0.0
