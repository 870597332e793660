"""The k-th largest entry of all weights of task vectors, exactly, from a few passes that keep next to nothing.

A sample of all weights says between which bounds an entry must lie; one pass counts what is above them and at them, and
collects what is between. Where the bounds were wrong, two passes count the bit patterns by their halves. Small models
are looked at in one piece.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from mergectl.methods import _order
from mergectl.methods._stored import Stored

if TYPE_CHECKING:
    import torch

    from mergectl.methods._task_vectors import Rows, TaskVectors

Array: TypeAlias = "np.ndarray[Any, Any]"
Form: TypeAlias = "np.ufunc"  # of rows of numbers: makes that of which the order is asked
Counted: TypeAlias = "Callable[[str, Sequence[Sequence[_order.Bounds]]], list[list[_order.Between]]]"

_TOGETHER = 1 << 19  # elements per task that are looked at together
_SAMPLED = 1 << 21  # elements per task that a sample has at most
_STEP = 32  # a sample has no more than one element in so many, but one of every weight
_CHUNK = 1 << 17  # elements counted at once
_PARTS = 8  # of the weights, whose bit patterns are counted by different threads


def largest(
    vectors: TaskVectors, ranks: Sequence[Sequence[int]], *, magnitudes: bool, counted: Counted | None = None
) -> list[list[float]]:
    """Return for each list of ranks (one per task) each task's k-th largest entry, or magnitude, over all weights.

    `counted(name, bounds)` does for a weight what `between` does for its rows, without making all of them.
    """
    form = np.abs if magnitudes else np.positive
    if vectors.numel <= _TOGETHER:
        return _together(vectors, ranks, form)
    bounds = _bounds(vectors, ranks, form)
    tallies = [[_order.Tally(*pair) for pair in pairs] for pairs in bounds]

    def add(found: Sequence[Sequence[_order.Between]]) -> None:
        for tally, part in zip(itertools.chain(*tallies), itertools.chain(*found), strict=True):
            tally.add(part)

    if counted is None:
        vectors.survey_lent(lambda rows: add(between(rows, bounds, magnitudes, vectors.numel)))
    else:
        vectors.spread(lambda name: add(counted(name, bounds)), list(vectors))

    def kth(place: int, task: int) -> float:
        return tallies[task][place].kth(ranks[place][task], vectors.numel)

    result = []
    for place, wanted in enumerate(ranks):
        found = vectors.spread(functools.partial(kth, place), range(len(wanted)))
        if any(math.isnan(value) for value in found):
            exact = reach(vectors, [float(rank) for rank in wanted], None, form)
            found = [other if math.isnan(value) else value for value, other in zip(found, exact, strict=True)]
        result.append(found)
    return result


def between(
    rows: Rows, bounds: Sequence[Sequence[_order.Bounds]], magnitudes: bool, whole: int
) -> list[list[_order.Between]]:
    """Count and collect each task's entries, or magnitudes, between its pairs of bounds: [task][pair]."""
    if isinstance(rows, Stored):
        return [[rows.between(task, *pair, magnitudes) for pair in pairs] for task, pairs in enumerate(bounds)]
    alone = (numbers(row[None])[0] for row in rows)
    return [
        [_order.between(row, *pair, magnitudes, whole) for pair in pairs]
        for row, pairs in zip(alone, bounds, strict=True)
    ]


def reach(
    vectors: TaskVectors, targets: Sequence[float], weigh: Callable[[Array], Array] | None, form: Form
) -> list[float]:
    """Return per task the entry from which on the larger ones weigh the target together (or number it)."""
    upper = _histogram(vectors, weigh, None, form)
    found = [_order.reach(row, target) for row, target in zip(upper, targets, strict=True)]
    lower = _histogram(vectors, weigh, [bucket for bucket, _ in found], form)
    keys = [(bucket << 16) + _order.reach(row, rest)[0] for (bucket, rest), row in zip(found, lower, strict=True)]
    return [_order.entry_of(key) if target > 0 else math.inf for key, target in zip(keys, targets, strict=True)]


def _together(vectors: TaskVectors, ranks: Sequence[Sequence[int]], form: Form) -> list[list[float]]:
    """Find them among all entries, one task after the other."""
    tasks = range(len(vectors.tasks))
    rows, starts = _room(vectors, [math.prod(shape) for shape in vectors.shapes.values()])

    def fill(name: str, x: torch.Tensor) -> None:
        for row, part in zip(rows, numbers(x), strict=True):
            form(part, out=row[starts[name] : starts[name] + len(part)])

    vectors.survey(fill)
    found = vectors.spread(lambda task: _order.kth_of(rows[task], [wanted[task] for wanted in ranks]), tasks)
    return [[found[task][place] for task in tasks] for place in range(len(ranks))]


def _bounds(vectors: TaskVectors, ranks: Sequence[Sequence[int]], form: Form) -> list[list[_order.Bounds]]:
    """Return per task, for each of its ranks, bounds that hold that entry almost surely."""
    step = max(_STEP, vectors.numel // _SAMPLED)
    counts = [_order.thinned_count(math.prod(shape), step) for shape in vectors.shapes.values()]
    samples, starts = _room(vectors, counts)

    def fill(name: str) -> None:
        for sample, part in zip(samples, vectors.sample(name, step), strict=True):
            form(part, out=sample[starts[name] : starts[name] + len(part)])

    vectors.spread(fill, vectors)
    vectors.spread(lambda sample: sample.sort(), samples)
    pairs = enumerate(samples)
    return [[_order.bounds(sample, wanted[task], vectors.numel) for wanted in ranks] for task, sample in pairs]


def _room(vectors: TaskVectors, counts: Sequence[int]) -> tuple[list[Array], dict[str, int]]:
    """Return an array per task for so many entries of every weight, and where each weight's begin.

    Small arrays made between large ones that go would keep the room of these from being used again; and what is larger
    than 32 MiB, as one array for all tasks often is, never is.
    """
    starts = dict(zip(vectors, itertools.accumulate(counts, initial=0), strict=False))
    return [np.empty(sum(counts), dtype=np.float32) for _ in vectors.tasks], starts


def _histogram(
    vectors: TaskVectors, weigh: Callable[[Array], Array] | None, within: Sequence[int] | None, form: Form
) -> Array:
    """Return per task and half of a bit pattern how many entries there are, or what they weigh."""

    def count(names: Sequence[str]) -> Array:
        result = np.zeros((len(vectors.tasks), 1 << 16))
        for name in names:
            for task, row in enumerate(numbers(vectors[name])):
                for start in range(0, len(row), _CHUNK):
                    part = form(row[start : start + _CHUNK])
                    result[task] += _order.histogram(part, weigh, None if within is None else within[task])
        return result

    names = list(vectors)
    size = -(-len(names) // _PARTS)
    parts = vectors.spread(count, [names[start : start + size] for start in range(0, len(names), size)])
    whole: Array = functools.reduce(np.add, parts)
    return whole


def numbers(x: torch.Tensor) -> Array:
    """Return a weight of all tasks as flat float32 numbers: [task, elements]."""
    rows: Array = x.detach().cpu().float().reshape(len(x), -1).numpy()
    return rows
