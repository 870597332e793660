"""Stop candidates that fall behind: what a candidate has answered so far is compared with the best one's answers.

Both were asked the same rows in the same order, so the comparison is paired. Of every task the main metric itself is
taken on the rows seen so far, for the candidate and for the incumbent, and the difference is averaged over tasks as
the search does. How far it may still be off is estimated from the answers:

- accuracy is a mean over rows: the variance of the rows' differences (-1, 0 or 1), to which one row won and one lost
  are added, so that a few rows that all agree prove nothing;
- any other metric (Matthews, F1, correlations) is no mean over rows, and no score of single rows would stand for it:
  it is computed again with each tenth of the rows left out (a delete-a-group jackknife).

Rows not yet seen are all that is uncertain, so the variance shrinks to nothing towards the last row. A candidate stops
when it is behind by more than chance explains, at a significance that is divided by the number of looks.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np

Array: TypeAlias = "np.ndarray[Any, Any]"
Watch: TypeAlias = "Callable[[int, Verdict], bool]"  # called with a round's number and the verdict so far: stop?

_GROUPS = 10  # that a jackknife leaves out in turn
_FEWEST = 20  # rows of a task below which nothing is concluded, unless it has no more


@dataclass(frozen=True)
class Answers:
    """What a model answered to a task's rows, in the order in which they are asked."""

    metric: str
    labels: Array  # of the rows asked so far
    found: Array  # label ids, or numbers for regression
    total: int  # rows of the task
    rows: Array | None = None  # which these are; None where they stand in the task's own order

    def at(self, rows: Array | None, count: int) -> Array:
        """Return the answers to some rows, by default to the first `count`; all rows have been answered."""
        import numpy as np

        own = self.found if self.rows is None else self.found[np.argsort(self.rows)]
        return own[:count] if rows is None else own[rows]


@dataclass(frozen=True)
class Verdict:
    """What a candidate is worth, over the rows seen: each task's score and their mean."""

    scores: Mapping[str, float]
    seconds: float
    rows: int = 0  # evaluated
    total: int = 0  # that a full evaluation has
    looks: int = 1  # how often in all a watch may stop it
    pruned: bool = False
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # all that each task records, by its name
    size: float | None = None  # bytes of the weights that the merge changed, where a search asks for them
    answers: Mapping[str, Answers] = field(default_factory=dict, repr=False)

    @property
    def mean(self) -> float:
        """The mean over tasks: what a search maximises."""
        return sum(self.scores.values()) / len(self.scores)


@dataclass(frozen=True)
class Pruner:
    """Stops hopeless candidates; `significance` is the chance to stop one that is as good as the incumbent."""

    significance: float = 0.05

    def watch(self, incumbent: Verdict | None, report: Callable[[int, float], None] | None = None) -> Watch:
        """Return the watch for one candidate; `report` is told the mean score so far after every round."""

        def look(step: int, so_far: Verdict) -> bool:
            if report is not None:
                report(step, so_far.mean)
            return incumbent is not None and self.hopeless(so_far, incumbent)

        return look

    def hopeless(self, candidate: Verdict, incumbent: Verdict) -> bool:
        """Say whether the candidate is behind by more than the rows that it has not seen can explain."""
        if any(len(own.found) < min(_FEWEST, own.total) for own in candidate.answers.values()):
            return False
        pairs = [(own, incumbent.answers[task].at(own.rows, len(own.found))) for task, own in candidate.answers.items()]
        gap = sum(difference(*pair) for pair in pairs) / len(pairs)
        behind = NormalDist().inv_cdf(1 - self.significance / max(candidate.looks, 1))
        spread = 0.0
        for pair in sorted(pairs, key=lambda pair: pair[0].metric != "accuracy"):  # those that cost little first
            if gap + behind * spread**0.5 / len(pairs) >= 0:
                return False
            spread += variance(*pair)
        return bool(gap + behind * spread**0.5 / len(pairs) < 0)


def difference(own: Answers, other: Array) -> float:
    """Return by how much a task's metric is better than with other answers to the same rows."""
    return _gap(own, other, slice(None))


def variance(own: Answers, other: Array) -> float:
    """Return the variance of that difference as an estimate of what it will be after all rows."""
    import numpy as np

    unseen = 1 - len(own.found) / own.total
    if own.metric == "accuracy":
        better = (own.found == own.labels).astype(np.float64) - (other == own.labels)
        smoothed = np.append(better, (1.0, -1.0))
        return float(smoothed.var(ddof=1) / len(smoothed)) * unseen
    group = np.arange(len(own.found)) % _GROUPS
    parts = np.array([_gap(own, other, group != left_out) for left_out in range(_GROUPS)])
    return float((_GROUPS - 1) / _GROUPS * ((parts - parts.mean()) ** 2).sum()) * unseen


def _gap(own: Answers, other: Array, rows: Any) -> float:
    from mergectl.benchmarks._metrics import METRICS

    labels = own.labels[rows]
    if own.metric == "accuracy":
        return float((own.found[rows] == labels).mean() - (other[rows] == labels).mean())
    return METRICS[own.metric](labels, own.found[rows]) - METRICS[own.metric](labels, other[rows])


def pack(verdict: Verdict) -> str:
    """Return a whole verdict's answers as a short text, for a journal that other processes read.

    They stand in the rows' own order: another machine may make other batches of the rows.
    """
    import numpy as np

    def text(found: Array) -> str:
        small = found.astype(np.int16)
        kept = small if np.array_equal(small, found) else found.astype(np.float64)
        return f"{kept.dtype.str}:{base64.b64encode(zlib.compress(kept.tobytes())).decode()}"

    whole = {task: own.at(None, own.total) for task, own in verdict.answers.items()}
    return json.dumps({task: text(found) for task, found in whole.items()})


def unpack(scores: Mapping[str, float], text: str) -> Verdict:
    """Return a finished verdict from its scores and packed answers: what a pruner compares with."""
    import numpy as np

    answers = {}
    for task, packed in json.loads(text).items():
        kind, _, content = packed.partition(":")
        found = np.frombuffer(zlib.decompress(base64.b64decode(content)), dtype=kind)
        answers[task] = Answers("", np.empty(0), found, len(found))
    rows = sum(len(own.found) for own in answers.values())
    return Verdict(scores, 0.0, rows=rows, total=rows, answers=answers)
