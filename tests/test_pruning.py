"""Stopping hopeless candidates: whoever is far behind is stopped, whoever is as good as the best is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mergectl.benchmarks._metrics import METRICS
from mergectl.pruning import Answers, Pruner, Verdict, difference, pack, unpack, variance

ROWS = 512


def answering(rng: np.random.Generator, right: dict[str, float], labels: dict[str, Any]) -> dict[str, Any]:
    """What models answer that are right with these probabilities."""
    return {
        task: np.where(rng.random(len(labels[task])) < share, labels[task], 1 - labels[task])
        for task, share in right.items()
    }


def verdict(found: dict[str, Any], labels: dict[str, Any], seen: int, metric: str = "accuracy") -> Verdict:
    answers = {t: Answers(metric, labels[t][:seen], found[t][:seen], len(labels[t])) for t in found}
    return Verdict({task: 0.5 for task in found}, 0.0, looks=7, answers=answers)


def stopped_at(found: dict[str, Any], best: dict[str, Any], labels: dict[str, Any], metric: str = "accuracy") -> int:
    """After how many rows a candidate is stopped; all of them where it is not."""
    incumbent = verdict(best, labels, ROWS, metric)
    for seen in range(64, ROWS, 64):
        if Pruner().hopeless(verdict(found, labels, seen, metric), incumbent):
            return seen
    return ROWS


def tasks(rng: np.random.Generator, count: int = 3) -> dict[str, Any]:
    return {f"t{n}": rng.integers(0, 2, ROWS) for n in range(count)}


@pytest.mark.parametrize("metric", ["accuracy", "matthews", "f1"])
def test_a_candidate_far_behind_is_stopped_early(metric: str) -> None:
    rng = np.random.default_rng(0)
    labels = tasks(rng)
    best = answering(rng, dict.fromkeys(labels, 0.9), labels)
    worse = answering(rng, dict.fromkeys(labels, 0.6), labels)
    assert stopped_at(worse, best, labels, metric) <= 128


@pytest.mark.parametrize(("metric", "draws"), [("accuracy", 200), ("matthews", 15)])
def test_a_candidate_as_good_as_the_best_is_seldom_stopped(metric: str, draws: int) -> None:
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(draws):
        labels = tasks(rng, 2)
        best, other = (answering(rng, dict.fromkeys(labels, 0.8), labels) for _ in range(2))
        wrong += (
            score(other, labels, metric) >= score(best, labels, metric)
            and stopped_at(other, best, labels, metric) < ROWS
        )
    assert wrong <= 0.04 * draws


def score(found: dict[str, Any], labels: dict[str, Any], metric: str) -> float:
    """The mean over tasks after all rows."""
    return float(np.mean([METRICS[metric](labels[task], found[task]) for task in labels]))


@pytest.mark.parametrize("metric", ["accuracy", "matthews", "f1", "pearson"])
def test_the_same_answers_are_never_stopped(metric: str) -> None:
    rng = np.random.default_rng(2)
    labels = tasks(rng)
    best = answering(rng, dict.fromkeys(labels, 0.7), labels)
    assert stopped_at(best, best, labels, metric) == ROWS


def test_a_few_rows_prove_nothing() -> None:
    labels = {"t": np.zeros(1000, dtype=int)}
    best, worse = {"t": labels["t"]}, {"t": 1 - labels["t"]}
    assert not Pruner().hopeless(verdict(worse, labels, 19), verdict(best, labels, 1000))
    assert Pruner().hopeless(verdict(worse, labels, 64), verdict(best, labels, 1000))


def test_one_task_may_make_up_for_another() -> None:
    rng = np.random.default_rng(3)
    labels = tasks(rng, 2)
    best = answering(rng, {"t0": 0.9, "t1": 0.6}, labels)
    other = answering(rng, {"t0": 0.6, "t1": 0.9}, labels)
    assert stopped_at(other, best, labels) == ROWS


def test_a_higher_significance_stops_sooner() -> None:
    rng = np.random.default_rng(4)
    labels = tasks(rng)
    best, worse = (answering(rng, dict.fromkeys(labels, share), labels) for share in (0.8, 0.765))
    gaps = [
        s for s in (0.001, 0.05, 0.4) if Pruner(s).hopeless(verdict(worse, labels, 256), verdict(best, labels, ROWS))
    ]
    assert gaps == sorted(gaps)
    assert 0.4 in gaps
    assert 0.001 not in gaps


@pytest.mark.parametrize("metric", ["accuracy", "matthews", "pearson"])
def test_nothing_is_uncertain_after_the_last_row(metric: str) -> None:
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 2, 100)
    one, other = rng.integers(0, 2, 100), rng.integers(0, 2, 100)
    answers = Answers(metric, labels, one, 100)
    expected = score({"t": one}, {"t": labels}, metric) - score({"t": other}, {"t": labels}, metric)
    assert difference(answers, other) == pytest.approx(expected)
    assert variance(answers, other) == 0


def test_the_variance_is_that_of_other_draws_of_rows() -> None:
    rng = np.random.default_rng(6)
    labels = rng.integers(0, 2, 4000)
    one, other = (np.where(rng.random(4000) < share, labels, 1 - labels) for share in (0.8, 0.7))
    for metric, draws in (("accuracy", 300), ("pearson", 100)):
        gaps, variances = [], []
        for _ in range(draws):
            rows = rng.permutation(4000)[:400]
            answers = Answers(metric, labels[rows], one[rows], 4000)
            gaps.append(difference(answers, other[rows]))
            variances.append(variance(answers, other[rows]))
        assert np.mean(variances) == pytest.approx(np.var(gaps), rel=0.5)


def test_a_verdict_survives_the_journal() -> None:
    rng = np.random.default_rng(7)
    found = {"ids": rng.integers(-1, 10, 300), "numbers": rng.normal(size=40)}
    labels = {task: np.zeros(len(x)) for task, x in found.items()}
    told = verdict(found, labels, 300)
    again = unpack(told.scores, pack(told))
    assert again.scores == told.scores
    assert all(np.array_equal(again.answers[task].found, found[task]) for task in found)
    assert len(pack(told)) < 1000


def test_without_an_incumbent_nothing_is_stopped_but_all_is_reported() -> None:
    rng = np.random.default_rng(8)
    labels = tasks(rng)
    told: list[tuple[int, float]] = []
    watch = Pruner().watch(None, lambda step, value: told.append((step, value)))
    worst = answering(rng, dict.fromkeys(labels, 0.0), labels)
    assert [watch(step, verdict(worst, labels, 64)) for step in range(3)] == [False] * 3
    assert told == [(0, 0.5), (1, 0.5), (2, 0.5)]


def test_rows_asked_in_another_order_are_compared_row_by_row() -> None:
    rng = np.random.default_rng(0)
    labels, mine, best = (rng.integers(0, 2, 200) for _ in range(3))
    one, other = rng.permutation(200), rng.permutation(200)
    incumbent = Verdict({"a": 0.5}, 0.0, answers={"a": Answers("accuracy", labels[other], best[other], 200, other)})
    for seen in (30, 120):
        rows = one[:seen]
        own = Answers("accuracy", labels[rows], mine[rows], 200, rows)
        for known in (incumbent, unpack(incumbent.scores, pack(incumbent))):
            assert np.array_equal(known.answers["a"].at(own.rows, seen), best[rows])
        candidate = Verdict({"a": 0.5}, 0.0, looks=7, answers={"a": own})
        assert Pruner(0.5).hopeless(candidate, incumbent) == Pruner(0.5).hopeless(
            candidate, unpack(incumbent.scores, pack(incumbent))
        )
