"""The k-th largest of very many float32 numbers, exactly and without holding them all."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from mergectl.methods import _fused

Array: TypeAlias = "np.ndarray[Any, Any]"
Bounds: TypeAlias = tuple[float, float]


class Between(NamedTuple):
    """The entries between two bounds, and how many are above the upper one, at it, and at the lower one."""

    inside: Array
    above: int
    at_high: int
    at_low: int


_PENDING = 1 << 19  # entries that a tally keeps one by one
_TOP = 1 << 31
NEIGHBOURS = 4  # entries of a sample that lie side by side
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


def bounds(sample: Array, rank: int, count: int) -> Bounds:
    """Return bounds that hold the k-th largest of `count` entries almost surely, from a sorted sample.

    They lie twelve deviations apart from what the sample says: its runs of neighbours say less than single entries.
    """
    share = min(max(rank / count, 0.0), 1.0)
    margin = 12 * math.sqrt(len(sample) * share * (1 - share)) + 8
    place = len(sample) * (1 - share)
    low, high = int(place - margin), int(place + margin)
    return (
        float(sample[low]) if low >= 0 else -math.inf,
        float(sample[high]) if high < len(sample) else math.inf,
    )


def between(row: Array, low: float, high: float, magnitudes: bool, whole: int = 0) -> Between:
    """Count and collect, of entries or of magnitudes; those at a bound are not collected: there may be very many zeros.

    The bounds are float32 numbers; the row is one of so many elements as a `whole`.
    """
    if _fused.worth(len(row), whole):
        return between_bits(row.view(np.uint32), None, low, high, magnitudes)
    formed = np.abs(row) if magnitudes else row
    counts = [int(np.count_nonzero(part)) for part in (formed > high, formed == high, formed == low)]
    return Between(formed[(formed > low) & (formed < high)], *counts)


def between_bits(row: Array, base: Array | None, low: float, high: float, magnitudes: bool) -> Between:
    """Do that for a row, less a base, of which the bits are given."""
    room = np.empty(len(row), np.int32)
    inside, *counts = _fused.between(row, base, *_ends(low, high, magnitudes), magnitudes, room)
    return Between(_folded(room[:inside].view(np.float32)).view(np.float32), *counts)


@functools.lru_cache
def _ends(low: float, high: float, magnitudes: bool) -> tuple[np.int32, np.int32]:
    """Return bounds as such whole numbers; no magnitude is below 0."""
    ends = np.array([low, high], np.float32) + np.float32(0)
    first, last = np.where(magnitudes & (ends < 0), np.int32(-1), _folded(ends))
    return first, last


def _folded(numbers: Array) -> Array:
    """Return the bits of float32 numbers as whole numbers of their order, and such numbers as those bits."""
    bits = numbers.view(np.int32)
    result: Array = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return result


class Tally:
    """Entries between two bounds, from parts that several threads count. Of many, equal ones are kept once.

    So there are never more than float32 numbers between the bounds. Parts are copied to one array: many small ones that
    stay would keep the room between them from being used again.
    """

    def __init__(self, low: float, high: float) -> None:
        """Begin with none."""
        self._ends, self._lock = (low, high), threading.Lock()
        self._above = self._at_high = self._at_low = self._size = 0
        self._pending, self._entries = np.empty(_PENDING, np.float32), np.empty(0, np.float32)
        self._numbers = np.empty(0, np.int64)

    def add(self, part: Between) -> None:
        """Add what was found in a part of a row."""
        with self._lock:
            self._above += part.above
            self._at_high += part.at_high
            self._at_low += part.at_low
            size = self._size + len(part.inside)
            if size > len(self._pending):
                self._condense(part.inside)
            else:
                self._pending[self._size : size] = part.inside
                self._size = size

    def kth(self, rank: int, count: int) -> float:
        """Return the k-th largest of so many entries if it lies between the bounds or is one of them, else NaN."""
        special, (low, high) = _special(rank, count), self._ends
        if special is not None:
            return special
        rest = rank - self._above
        if 0 < rest <= self._at_high:
            return high + 0.0
        rest -= self._at_high
        inside = self._size + int(self._numbers.sum())
        if 0 < rest <= inside:
            return self._inside(rest)
        return low + 0.0 if 0 < rest - inside <= self._at_low else math.nan

    def _inside(self, rank: int) -> float:
        if not len(self._entries):
            return kth_of(self._pending[: self._size], [rank])[0]
        self._condense(np.empty(0, np.float32))
        place = int(np.searchsorted(np.cumsum(self._numbers[::-1]), rank))
        return float(self._entries[len(self._entries) - 1 - place]) + 0.0

    def _condense(self, more: Array) -> None:
        """Keep each number once, with how many entries have it."""
        fresh = np.concatenate([self._pending[: self._size], more])
        counted = (self._entries, self._numbers), np.unique(fresh, return_counts=True)
        self._size, self._entries = 0, np.union1d(counted[0][0], counted[1][0])
        self._numbers = np.zeros(len(self._entries), np.int64)
        for entries, numbers in counted:
            self._numbers[np.searchsorted(self._entries, entries)] += numbers


def thinned(x: Any, step: int) -> Any:
    """Return one entry in `step` of the last dimension: runs of neighbours, which are quicker to read."""
    count = thinned_count(x.shape[-1], step)
    if x.shape[-1] < NEIGHBOURS * step:
        return x[..., ::step]
    even = x[..., : count * step].reshape((*x.shape[:-1], -1, NEIGHBOURS * step))
    return even[..., :NEIGHBOURS].reshape((*x.shape[:-1], count))


def thinned_count(size: int, step: int) -> int:
    """Return how many entries that are."""
    runs = size // (NEIGHBOURS * step)
    return NEIGHBOURS * runs if runs else -(-size // step)


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
