"""Metrics against numbers worked out by hand, and on outputs that would give NaN."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergectl.benchmarks import _metrics, glue
from mergectl.benchmarks._contract import BenchmarkError

TASKS = {task.name: task for task in glue.TASKS}
# Four of six right; class 1: 2 hits, 1 false alarm, 1 miss; class 0: the same the other way round.
TRUTH = [1, 1, 1, 0, 0, 0]
FOUND = [1, 1, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("accuracy", 4 / 6),
        ("f1", 2 / 3),
        ("weighted_f1", 2 / 3),
        ("balanced_accuracy", 2 / 3),
        ("matthews", (2 * 2 - 1 * 1) / math.sqrt(3 * 3 * 3 * 3)),
        ("accuracy_f1", 2 / 3),
        ("majority", 1 / 2),
    ],
)
def test_classification_metrics_match_hand_computed_numbers(name: str, expected: float) -> None:
    assert _metrics.METRICS[name](np.array(TRUTH), np.array(FOUND)) == pytest.approx(expected)


def test_metrics_of_uneven_classes_differ_as_they_should() -> None:
    truth, found = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])
    named = {
        name: _metrics.METRICS[name](truth, found) for name in ("f1", "weighted_f1", "balanced_accuracy", "majority")
    }
    expected = {
        "f1": 2 / 3,
        "weighted_f1": (3 * 0.8 + 2 / 3) / 4,
        "balanced_accuracy": (2 / 3 + 1) / 2,
        "majority": 0.75,
    }
    assert named == pytest.approx(expected)


def test_correlations_match_hand_computed_numbers() -> None:
    truth, found = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 8.0])
    pearson, spearman = 10 / math.sqrt(5 * 29), 0.8
    named = {name: _metrics.METRICS[name](truth, found) for name in ("pearson", "spearman", "pearson_spearman")}
    assert named == pytest.approx(
        {"pearson": pearson, "spearman": spearman, "pearson_spearman": (pearson + spearman) / 2}
    )


def test_f1_counts_class_one_as_the_positive_one() -> None:
    assert _metrics.f1(np.array([1, 0, 0, 0]), np.array([0, 0, 0, 0])) == 0.0


def test_scores_take_the_largest_logit() -> None:
    logits = [[0.1, 2.0], [3.0, -1.0], [0.0, 0.5]]
    assert _metrics.scores(TASKS["qnli"], [1, 0, 0], logits) == {"accuracy": pytest.approx(2 / 3)}


def test_scores_name_the_main_metric_first_and_then_the_others() -> None:
    assert list(_metrics.scores(TASKS["mrpc"], [1, 0], [[0, 1], [1, 0]])) == ["accuracy", "f1", "accuracy_f1"]


def test_regression_takes_one_number_per_row_in_either_shape() -> None:
    labels, numbers = [0.0, 2.5, 5.0], np.array([0.1, 2.0, 4.0])
    assert _metrics.scores(TASKS["stsb"], labels, numbers) == _metrics.scores(TASKS["stsb"], labels, numbers[:, None])


@pytest.mark.parametrize("name", sorted(set(_metrics.METRICS) - _metrics.FOR_NUMBERS))
def test_always_the_same_answer_scores_without_a_warning(name: str) -> None:
    assert math.isfinite(_metrics.METRICS[name](np.array([0, 1, 1, 2]), np.zeros(4, int)))


@pytest.mark.parametrize("name", sorted(_metrics.FOR_NUMBERS))
@pytest.mark.parametrize(
    "found", [[1.0, 1.0, 1.0], [1.0, math.nan, 2.0], [1.0, math.inf, 2.0], [1.0, 1.0, 1.0 + 1e-16]]
)
def test_constant_or_broken_numbers_correlate_with_nothing(name: str, found: list[float]) -> None:
    assert _metrics.METRICS[name](np.array([1.0, 2.0, 3.0]), np.array(found)) == 0.0


@pytest.mark.parametrize("metric", sorted(set(_metrics.METRICS) - _metrics.FOR_NUMBERS - {"majority"}))
def test_a_model_of_nan_is_never_right(metric: str) -> None:
    task = replace(TASKS["rte"], metric=metric)
    assert _metrics.scores(task, [0, 1, 0], np.full((3, 2), np.nan))[metric] <= 0.0


def test_a_two_way_head_may_answer_a_three_way_question() -> None:
    assert _metrics.scores(TASKS["mnli"], [0, 1, 2], [[1, 0], [0, 1], [0, 1]]) == {"accuracy": pytest.approx(2 / 3)}


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=12))
def test_classification_metrics_stay_between_minus_one_and_one(pairs: list[tuple[int, int]]) -> None:
    truth, found = np.array(pairs).T
    values = [_metrics.METRICS[name](truth, found) for name in set(_metrics.METRICS) - _metrics.FOR_NUMBERS]
    assert all(-1.0 <= value <= 1.0 for value in values)


def test_no_rows_cannot_be_scored() -> None:
    with pytest.raises(BenchmarkError, match="no rows to score"):
        _metrics.scores(TASKS["rte"], [], np.zeros((0, 2)))


def test_a_missing_output_is_refused() -> None:
    with pytest.raises(BenchmarkError, match="2 rows, but there are 1 outputs"):
        _metrics.scores(TASKS["rte"], [0, 1], [[0.0, 1.0]])
