"""How entries of task vectors compete for a weight (PCB-Merging): figures of the whole model, then weight by weight.

`released` and `published` read the model for their figures and return a contest: of one weight of all tasks it says the
values that are averaged and each value's share in the average (0: dropped). Sums over tasks run in float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from mergectl.methods import _kernels, _kth
from mergectl.methods._contenders import Edges, Field
from mergectl.methods._order import Between, Bounds
from mergectl.methods._task_vectors import TaskVectors, chunks

Array: TypeAlias = "np.ndarray[Any, Any]"
Inter: TypeAlias = "Callable[[torch.Tensor, torch.Tensor], torch.Tensor]"


@dataclass(frozen=True)
class Rules:
    """The share of magnitudes clipped at each end, of entries kept, and of largest magnitudes that may compete."""

    winsor: float
    ratio: float
    premask: float


@dataclass(frozen=True)
class Contest:
    """A competition whose figures of the whole model are known; magnitudes are clipped to `clip`."""

    score: Callable[[torch.Tensor], torch.Tensor]
    share: Callable[[torch.Tensor], torch.Tensor]  # of scores, which it may overwrite
    clip: tuple[Sequence[float], Sequence[float]]
    field: tuple[Field, Edges] | None = None  # where a share is the score's place between edges, from 0 to 1

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the values of one weight of all tasks, and their shares."""
        return winsorised(x, *self.clip), self.share(self.score(x))

    def average(self, x: torch.Tensor, scales: Sequence[float], floor: float) -> torch.Tensor:
        """Return the sum over tasks of scale * share * value, divided by the sum of shares or, if larger, the floor."""
        if self.field is None or not self.field[0].suits(x):
            return average(*self(x), scales, floor)
        field, edges = self.field
        return field.average(x, edges, scales, floor)


def winsor_ranks(share: float, count: int) -> tuple[int, int]:
    """Return which largest of so many magnitudes are the bounds, truncated as in the released code."""
    return count - int(count * share), count - int(count * (1 - share) - 1)


def drop_rank(ratio: float, count: int) -> int:
    """Return which largest score is the first to be dropped."""
    return count - min(int(count * (1 - ratio)), count - 1)


def premask_rank(share: float, count: int) -> int:
    """Return which largest magnitude is the last that may compete."""
    return count - max(int(count * (1 - share)) - 1, 0)


def normalised(x: torch.Tensor, lows: Sequence[float], highs: Sequence[float]) -> torch.Tensor:
    """Return where each task's entries lie between its bounds, from 0 to 1; all 0 where the bounds are equal."""
    result = torch.zeros_like(x)
    for row, found, low, high in zip(x, result, lows, highs, strict=True):
        if high > low:
            torch.clamp(row, low, high, out=found).sub_(low).div_(high - low)
    return result


def winsorised(x: torch.Tensor, lows: Sequence[float], highs: Sequence[float]) -> torch.Tensor:
    """Return each task's entries with magnitudes clipped to its bounds; what is zero stays zero."""
    result = torch.empty_like(x)
    for row, found, low, high in zip(x, result, lows, highs, strict=True):
        torch.clamp(row.abs(), low, high, out=found).mul_(row.sign())
    return result


def with_all(x: torch.Tensor, ranked: torch.Tensor) -> torch.Tensor:
    """Return tanh of each entry times the sum of all tasks' entries."""
    return torch.tanh(x * _kernels.total(x).to(x.dtype))


def with_all_ranked(x: torch.Tensor, ranked: torch.Tensor) -> torch.Tensor:
    """Return tanh of each entry times the sum of all tasks' normalised entries."""
    return torch.tanh(x * _kernels.total(ranked).to(x.dtype))


def with_each_ranked(x: torch.Tensor, ranked: torch.Tensor) -> torch.Tensor:
    """Return the sum over tasks of tanh of the product of two normalised entries."""
    result = torch.zeros_like(x, dtype=torch.float64)
    for mine, found in zip(ranked, result, strict=True):
        for other in ranked:
            found += torch.tanh(mine * other)
    return result.to(x.dtype)


def released(inter: Inter, vectors: TaskVectors, rules: Rules) -> Contest:
    """Compete as in the released code: score exp(n u^2) * inter, u the winsorised magnitude normalised to [0, 1].

    The share is the score, normalised between the first one dropped and the largest.
    """
    n, count = len(vectors.tasks), vectors.numel
    lows, highs, *floors = _magnitudes(vectors, rules)
    alike = inter in (with_all, with_all_ranked)
    field = Field(lows, highs, floors[0] if floors else [0.0] * n, inter is with_all_ranked, count) if alike else None

    def score(x: torch.Tensor) -> torch.Tensor:
        if field is not None and field.suits(x):
            return field.contenders(x, [-math.inf] * n).scores.view_as(x)
        u = normalised(x.abs(), lows, highs)
        intra = u.square().sub_(1).mul_(n).exp_()  # exp(n u^2) up to a constant: that overflows from 89 tasks on
        return _premasked(inter(x, u * x.sign()).mul_(intra), x, floors)

    def counted(name: str, bounds: Sequence[Sequence[Bounds]]) -> list[list[Between]]:
        x = vectors[name]
        if field is None or not field.suits(x):
            return _kth.between(score(x), bounds, False, count)
        return field.between(x, bounds)

    ranks = [[drop_rank(rules.ratio, count)] * n, [1] * n]
    scores = vectors.map(lambda name, x: score(x), by_entry=True)
    dropped, largest = scores.kth_largest(ranks, counted)
    suited = None if field is None else (field, (dropped, largest))
    return Contest(score, lambda found: normalised(found, dropped, largest), (lows, highs), suited)


def published(vectors: TaskVectors, rules: Rules) -> Contest:
    """Compete as printed: score softmax(n N(t t)) * sum over t' of softmax(N(t t')); a score that is kept is the share.

    N normalises to [0, 1] and both run over the whole model: its least and largest products and its sums of
    exponentials are read first. Softmax is taken relative to a mean of 1, so that no score is too small for a float.
    """
    n, count = len(vectors.tasks), vectors.numel
    pairs = list(itertools.combinations_with_replacement(range(n), 2))
    lows, highs, *floors = _magnitudes(vectors, rules)
    clipped = vectors.map(lambda name, x: winsorised(x, lows, highs))
    ends = clipped.gather(lambda rows: [_ends(rows[i], rows[j]) for i, j in pairs])
    bounds = {
        pair: (min(unit[place][0] for unit in ends), max(unit[place][1] for unit in ends))
        for place, pair in enumerate(pairs)
    }

    def heat(x: torch.Tensor, i: int, j: int, power: int) -> torch.Tensor:
        low, high = bounds[i, j]
        return normalised((x[i] * x[j])[None], [low], [high])[0].sub_(1).mul_(power).exp_()

    terms = [*((i, j, 1) for i, j in pairs), *((i, i, n) for i in range(n))]
    sums = clipped.gather(lambda rows: [_sums(heat(torch.from_numpy(rows).double(), *term)) for term in terms])
    means = {term: math.fsum(x for unit in sums for x in unit[place]) / count for place, term in enumerate(terms)}

    def score(x: torch.Tensor) -> torch.Tensor:
        wide = winsorised(x, lows, highs).double()
        inter = torch.zeros_like(wide)
        for i, j in pairs:
            found = heat(wide, i, j, 1).div_(means[i, j, 1])
            inter[i] += found
            if i != j:
                inter[j] += found
        intra = torch.stack([heat(wide, i, i, n).div_(means[i, i, n]) for i in range(n)])
        return _premasked(inter.mul_(intra).to(x.dtype), x, floors)

    (dropped,) = vectors.map(lambda name, x: score(x), by_entry=True).kth_largest([[drop_rank(rules.ratio, count)] * n])

    def share(found: torch.Tensor) -> torch.Tensor:
        return found.mul_(found >= _kernels.column(dropped, found))

    return Contest(score, share, (lows, highs))


def average(values: torch.Tensor, shares: torch.Tensor, scales: Sequence[float], floor: float) -> torch.Tensor:
    """Return the sum over tasks of scale * share * value, divided by the sum of shares or, if larger, the floor."""
    wide = values.double().mul_(shares)
    top = _kernels.total(wide.mul_(_kernels.column(scales, wide)))  # two roundings, as in the compiled loop
    return top.div_(_kernels.total(shares).clamp_(min=floor)).to(values.dtype)


def _magnitudes(vectors: TaskVectors, rules: Rules) -> list[list[float]]:
    """Return per task the bounds of magnitudes and, with a premask, the least that may compete."""
    n, count = len(vectors.tasks), vectors.numel
    ranks = [*winsor_ranks(rules.winsor, count), *([premask_rank(rules.premask, count)] if rules.premask > 0 else [])]
    return vectors.kth_magnitudes([[rank] * n for rank in ranks])


def _premasked(score: torch.Tensor, x: torch.Tensor, floors: Sequence[Sequence[float]]) -> torch.Tensor:
    """Zero the scores of magnitudes that may not compete."""
    return score.mul_(x.abs() >= _kernels.column(floors[0], x)) if floors else score


def _ends(a: Array, b: Array) -> tuple[float, float]:
    """Return the least and the largest product of two rows' entries."""
    products = a.astype(np.float64) * b
    return float(products.min()), float(products.max())


def _sums(x: torch.Tensor) -> list[float]:
    """Return sums over chunks, the same whether a weight comes whole or in blocks."""
    return [float(part.sum()) for part in chunks(x.numpy())]
