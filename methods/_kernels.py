"""Arithmetic shared by the methods: pure functions on one weight, stacked over tasks as [task, *shape].

Sums over tasks run in float64, one task at a time: the result depends neither on threads nor, for float32 input of
ordinary range, on the order of the tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

# A share such as 1 - 0.8 lies a few units of 2**-53 below the number that was meant, and so may its product with a
# count: 7600 * (1 - 0.8) is 1519.9999999999998. That much is forgiven before rounding down.
SLACK = 2.0**-51


def count_share(share: float, count: int) -> int:
    """Return the whole number of elements in a share of `count`, rounded down."""
    return min(count, math.floor((share + SLACK) * count))


def per_task(value: float | Sequence[float], tasks: int) -> list[float]:
    """Return one number per task for a setting that may be shared."""
    return [float(v) for v in value] if isinstance(value, Sequence) else [float(value)] * tasks


def column(values: Sequence[float], x: torch.Tensor) -> torch.Tensor:
    """Return one number per task, shaped so that it spreads over [task, *shape]."""
    return torch.tensor(values, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.dim() - 1))


def total(x: torch.Tensor) -> torch.Tensor:
    """Return the sum over tasks, in float64."""
    return weighted_total(x, [1.0] * len(x))


def weighted_total(x: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """Return the sum over tasks of each task's row times its weight, in float64."""
    result = torch.zeros(x.shape[1:], dtype=torch.float64, device=x.device)
    for row, weight in zip(x, weights, strict=True):
        result += row if weight == 1.0 else row.double().mul_(weight)
    return result


def mean(x: torch.Tensor) -> torch.Tensor:
    """Return the mean over tasks."""
    return (total(x) / len(x)).to(x.dtype)


def plain_sum(x: torch.Tensor) -> torch.Tensor:
    """Return the sum over tasks."""
    return total(x).to(x.dtype)


def lower_median(x: torch.Tensor) -> torch.Tensor:
    """Return the median over tasks; for an even number of tasks the lower of the two middle values."""
    return x.sort(dim=0).values[(len(x) - 1) // 2]


def largest(x: torch.Tensor) -> torch.Tensor:
    """Return the entry of largest magnitude over tasks, the first task's where two are equal."""
    best = x[0].clone()
    for row in x[1:]:
        best = torch.where(row.abs() > best.abs(), row, best)
    return best


def keep_top(x: torch.Tensor, floors: Sequence[float], *, strictly: bool = False) -> torch.Tensor:
    """Keep each task's entries of at least its magnitude floor (or above it), zero the rest."""
    result = torch.empty_like(x)
    for row, kept, floor in zip(x, result, floors, strict=True):
        below = floor if strictly else float(np.nextafter(np.float32(floor), np.float32(-1)))
        if below < 0:
            kept.copy_(row)
        else:
            torch.hardshrink(row, below, out=kept)  # keeps what is strictly larger
    return result


def keep_outliers(x: torch.Tensor, centres: Sequence[float], distances: Sequence[float]) -> torch.Tensor:
    """Keep each task's entries further than a distance from a centre, zero the rest."""
    return torch.where((x - column(centres, x)).abs() > column(distances, x), x, 0)


def elect_by_mass(x: torch.Tensor) -> torch.Tensor:
    """Return the sign of the sum over tasks: -1, 0 or 1."""
    return total(x).sign().to(x.dtype)


def elect_by_share(x: torch.Tensor, square_norms: Sequence[float]) -> torch.Tensor:
    """Return the sign of the entry with the largest share of its task's squared norm; a zero task has no vote."""
    best = torch.zeros(x.shape[1:], dtype=torch.float64, device=x.device)
    sign = torch.zeros_like(x[0])
    for row, norm in zip(x, square_norms, strict=True):
        share = row.double().square_().div_(norm or 1.0)
        sign = torch.where(share > best, row.sign(), sign)
        best = torch.maximum(best, share)
    return sign


def elect_by_share_mass(x: torch.Tensor, square_norms: Sequence[float]) -> torch.Tensor:
    """Return the sign of the sum over tasks of signed shares of the squared norm; a zero task has no vote."""
    mass = torch.zeros(x.shape[1:], dtype=torch.float64, device=x.device)
    for row, norm in zip(x, square_norms, strict=True):
        wide = row.double()
        mass += wide * wide.abs() / (norm or 1.0)
    return mass.sign().to(x.dtype)


def agreeing(row: torch.Tensor, sign: torch.Tensor | None) -> torch.Tensor:
    """Return the magnitudes of one task's entries that have the elected sign, 0 elsewhere; all entries without one."""
    return row if sign is None else (row * sign).clamp_(min=0)


def agreeing_sum(x: torch.Tensor, sign: torch.Tensor | None) -> torch.Tensor:
    """Return the sum over tasks of the entries that agree with the sign."""
    sums, _ = _agreeing_sums(x, sign)
    return sums.to(x.dtype)


def agreeing_mean(x: torch.Tensor, sign: torch.Tensor | None) -> torch.Tensor:
    """Return the mean over tasks of the entries that agree with the sign, 0 where there are none."""
    sums, votes = _agreeing_sums(x, sign)
    return sums.div_(votes.clamp_(min=1)).to(x.dtype)


def _agreeing_sums(x: torch.Tensor, sign: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum over tasks of the entries that agree, in float64, and how many there are."""
    sums = torch.zeros(x.shape[1:], dtype=torch.float64, device=x.device)
    votes = torch.zeros(x.shape[1:], dtype=x.dtype, device=x.device)
    for row in x:
        part = agreeing(row, sign)
        sums += part
        votes += part != 0
    return sums if sign is None else sums.mul_(sign), votes


def agreeing_largest(x: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
    """Return the largest entry over tasks among those that agree with the sign, 0 where there are none."""
    best = torch.zeros_like(x[0])
    for row in x:
        best = torch.maximum(best, agreeing(row, sign))
    return best * sign


def any_left(x: torch.Tensor) -> torch.Tensor:
    """Return where at least one task has a non-zero entry."""
    result = torch.zeros(x.shape[1:], dtype=torch.bool, device=x.device)
    for row in x:
        result |= row != 0
    return result


def majority(signs: torch.Tensor) -> int:
    """Return how many more positive than negative signs there are."""
    return int(torch.count_nonzero(signs > 0)) - int(torch.count_nonzero(signs < 0))
