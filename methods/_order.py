"""The k-th largest of very many float32 numbers, exactly and without holding them all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from mergectl.methods import _fused

Array: TypeAlias = "np.ndarray[Any, Any]"


class Between(NamedTuple):
    """The entries between two bounds, and how many are at the upper one or above."""

    inside: Array
    above: int


_TOP = 1 << 31
_LOWEST = 0x007FFFFF  # the key of minus infinity


def kth_of(row: Array, ranks: Sequence[int]) -> list[float]:
    """Return the k-th largest of a row (which is put into another order) for each k."""
    places = sorted({len(row) - rank for rank in ranks if 0 < rank <= len(row)})
    if places:
        row.partition(places)
    return [_special(rank, len(row)) or float(row[len(row) - rank]) + 0.0 for rank in ranks]


def _special(rank: int, count: int) -> float | None:
    """Return infinity before the first entry and minus infinity behind the last."""
    return math.inf if rank <= 0 else -math.inf if rank > count else None


def bounds(sample: Array, rank: int, count: int) -> tuple[float, float]:
    """Return bounds that hold the k-th largest of `count` entries almost surely: ten deviations of a sorted sample."""
    share = min(max(rank / count, 0.0), 1.0)
    margin = 10 * math.sqrt(len(sample) * share * (1 - share)) + 8
    place = len(sample) * (1 - share)
    low, high = int(place - margin), int(place + margin)
    return (
        float(sample[low]) if low >= 0 else -math.inf,
        float(sample[high]) if high < len(sample) else math.inf,
    )


def between(row: Array, low: float, high: float, magnitudes: bool) -> Between:
    """Count and collect, of entries or of magnitudes; those at a bound are not collected: there may be very many zeros.

    The bounds are float32 numbers.
    """
    if len(row) >= _fused.LEAST:
        room = np.empty(len(row), np.float32)
        above, inside = _fused.between(row, np.float32(low), np.float32(high), magnitudes, room)
        return Between(room[:inside].copy(), above)
    formed = np.abs(row) if magnitudes else row
    return Between(formed[(formed > low) & (formed < high)], int(np.count_nonzero(formed >= high)))


def kth_between(parts: Sequence[Between], rank: int, count: int) -> float:
    """Return the k-th largest entry if it lies between the bounds, else NaN."""
    special = _special(rank, count)
    if special is not None:
        return special
    inside = np.concatenate([part.inside for part in parts])
    rest = rank - sum(part.above for part in parts)
    return kth_of(inside, [rest])[0] if 0 < rest <= len(inside) else math.nan


def at(row: Array, bound: float) -> tuple[int, int]:
    """Count the entries above a bound, and those that equal it."""
    return int(np.count_nonzero(row > bound)), int(np.count_nonzero(row == bound))


def keys(row: Array) -> Array:
    """Return whole numbers in the order of the entries."""
    bits = (row + np.float32(0)).view(np.uint32)  # + 0 turns -0 into 0
    result: Array = bits ^ ((np.uint32(0) - (bits >> np.uint32(31))) | np.uint32(_TOP))
    return result


def entries(numbers: Array) -> Array:
    """Return the entries that `keys` was made of."""
    bits = np.where(numbers >= _TOP, numbers ^ np.uint32(_TOP), ~numbers)
    return bits.astype(np.uint32).view(np.float32)


def entry_of(key: int) -> float:
    """Return one entry from its key; minus infinity for what is below all entries."""
    return -math.inf if key <= _LOWEST else float(entries(np.array([key], dtype=np.uint32))[0])


def histogram(row: Array, weigh: Callable[[Array], Array] | None, within: int | None) -> Array:
    """Return how many entries there are by the upper half of their keys, or what they weigh.

    With an upper half to look `within`, count by the lower half instead.
    """
    numbers = keys(row)
    slots = numbers >> np.uint32(16)
    if within is not None:
        numbers = numbers[slots == within]
        slots = numbers & np.uint32(0xFFFF)
    weights = None if weigh is None else weigh(entries(numbers).astype(np.float64))
    return np.bincount(slots.astype(np.int64), weights, minlength=1 << 16)


def reach(weights: Array, target: float) -> tuple[int, float]:
    """Return the highest slot at which the weight from the top reaches the target, and what it still has to give."""
    from_top = np.cumsum(weights[::-1])
    place = min(int(np.searchsorted(from_top, target)), len(weights) - 1)
    return len(weights) - 1 - place, target - (float(from_top[place - 1]) if place else 0.0)
