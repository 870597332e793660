"""Rows of bfloat16 or float32 numbers where they lie: added up, subtracted, or counted, without a copy of each.

A row is given by its bits: those of a bfloat16 are the upper half of a float32's. What comes out is that of the tensor
operations on float32 copies, bit for bit; but for inner products, whose runs are added up in another order. Sums of few
numbers are left to tensor operations, which are slower but need no compiler.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias, overload

import numpy as np
import torch

from mergectl.methods import _fused, _order
from mergectl.methods._fused import STRETCH

Array: TypeAlias = "np.ndarray[Any, Any]"

MANY = 1 << 30  # numbers in all models from which on sums without copies save more than the compiler's start costs


class Stored(Sequence["torch.Tensor"]):
    """Rows as they are stored, less a base if there is one; reading one gives it in float32.

    A row that is read may be the model's own memory: it is not to be changed. A sum or mean never is.
    """

    def __init__(
        self, rows: Sequence[Array], shape: Sequence[int], base: Array | None = None, *, looped: bool = True
    ) -> None:
        """Take the bits of flat rows and of a base, the shape that they stand for, and whether loops add them up."""
        self.rows, self.shape, self.base, self.looped = list(rows), tuple(shape), base, looped

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, place: slice) -> Stored: ...
    def __getitem__(self, place: int | slice) -> torch.Tensor | Stored:
        """Return a row in float32, or some of the rows."""
        if isinstance(place, slice):
            return Stored(self.rows[place], self.shape, self.base, looped=self.looped)
        if not self.looped:
            return self._row(place)
        result = torch.empty(self.shape)
        _scaled(self.rows[place], self.base, np.float32(1), flat(result))
        return result

    def _row(self, place: int, room: torch.Tensor | None = None) -> torch.Tensor:
        """Return a row as tensor operations make it; with a base it is put into the room, if there is one."""
        row = _numbers(self.rows[place]).view(self.shape).float()
        return row if self.base is None else torch.sub(row, _numbers(self.base).view(self.shape), out=room)

    def weighted_total(self, weights: Sequence[float]) -> torch.Tensor:
        """Return the sum over rows of each times its weight."""
        result = torch.empty(self.shape)
        if not self.looped:
            torch.mul(self._row(0, result), weights[0], out=result)
            room = None if self.base is None else torch.empty(self.shape)
            for place, weight in enumerate(weights[1:], 1):
                result.add_(self._row(place, room), alpha=weight)
            return result
        out = flat(result)
        for place, (row, weight) in enumerate(zip(self.rows, weights, strict=True)):
            (_add_scaled if place else _scaled)(row, self.base, np.float32(weight), out)
        return result

    def mean(self) -> torch.Tensor:
        """Return the mean over rows: that of two is rounded once, from each further row a share is taken."""
        if len(self) == 1:
            return self.weighted_total([1.0])
        result = self[:2].weighted_total([1.0, 1.0]).mul_(0.5)
        for place in range(2, len(self)):
            if self.looped:
                _go_towards(self.rows[place], self.base, np.float32(1 / (place + 1)), flat(result))
            else:
                result.lerp_(self[place], 1 / (place + 1))
        return result

    def inner(self) -> list[list[float]]:
        """Return the inner products of all pairs of rows: those of short runs in float32, summed in float64."""
        result = [[0.0] * len(self) for _ in self.rows]
        pairs = itertools.combinations(range(len(self)), 2) if len(self) > 1 else [(0, 0)]
        for i, j in pairs:
            result[i][i], result[i][j], result[j][j] = _inner(self.rows[i], self.rows[j], self.base)
            result[j][i] = result[i][j]
        return result

    def thinned(self, step: int) -> Array:
        """Return one entry in `step`, in runs of neighbours: [task, elements]."""
        result = np.empty((len(self), _order.thinned_count(len(self.rows[0]), step)), np.float32)
        for row, found in zip(self.rows, result, strict=True):
            _thinned(row, self.base, step, _order.NEIGHBOURS, found)
        return result

    def between(self, place: int, low: float, high: float, magnitudes: bool) -> _order.Between:
        """Count and collect a row's entries, or magnitudes, between two bounds."""
        return _order.between_bits(self.rows[place], self.base, low, high, magnitudes)


_contracted = functools.partial(_fused.compiled, fastmath=["contract"])  # sums of products are rounded once


@_contracted
def _scaled(row: Array, base: Array | None, weight: np.float32, out: Array) -> None:
    """Give a row, less the base, times a weight."""
    shift = np.uint32(32 - 8 * row.itemsize)
    for start in range(0, out.shape[0], STRETCH):
        part, to = row[start : start + STRETCH], out[start : start + STRETCH]
        below = part if base is None else base[start : start + STRETCH]
        for i in range(to.shape[0]):
            x = np.uint32(np.uint32(part[i]) << shift).view(np.float32)
            if base is not None:
                x -= np.uint32(np.uint32(below[i]) << shift).view(np.float32)
            to[i] = x * weight


@_contracted
def _add_scaled(row: Array, base: Array | None, weight: np.float32, out: Array) -> None:
    """Add a row, less the base, times a weight."""
    shift = np.uint32(32 - 8 * row.itemsize)
    for start in range(0, out.shape[0], STRETCH):
        part, to = row[start : start + STRETCH], out[start : start + STRETCH]
        below = part if base is None else base[start : start + STRETCH]
        for i in range(to.shape[0]):
            x = np.uint32(np.uint32(part[i]) << shift).view(np.float32)
            if base is not None:
                x -= np.uint32(np.uint32(below[i]) << shift).view(np.float32)
            to[i] += x * weight


@_contracted
def _go_towards(row: Array, base: Array | None, share: np.float32, out: Array) -> None:
    """Go a share of the way from what there is so far to a row, less the base."""
    shift = np.uint32(32 - 8 * row.itemsize)
    for start in range(0, out.shape[0], STRETCH):
        part, to = row[start : start + STRETCH], out[start : start + STRETCH]
        below = part if base is None else base[start : start + STRETCH]
        for i in range(to.shape[0]):
            x = np.uint32(np.uint32(part[i]) << shift).view(np.float32)
            if base is not None:
                x -= np.uint32(np.uint32(below[i]) << shift).view(np.float32)
            to[i] += share * (x - to[i])


@_fused.compiled
def _on_top(base: Array, x: Array, out: Array) -> None:
    """Add float32 numbers to a base."""
    shift = np.uint32(32 - 8 * base.itemsize)
    for start in range(0, out.shape[0], STRETCH):
        below, part, to = base[start : start + STRETCH], x[start : start + STRETCH], out[start : start + STRETCH]
        for i in range(to.shape[0]):
            to[i] = np.uint32(np.uint32(below[i]) << shift).view(np.float32) + part[i]


@functools.partial(_fused.compiled, fastmath=["contract", "reassoc"])
def _inner(a: Array, b: Array, base: Array | None) -> tuple[float, float, float]:
    """Give the products a a, a b and b b of two rows, less the base: of each stretch in float32, summed in float64."""
    first, across, second, shift = 0.0, 0.0, 0.0, np.uint32(32 - 8 * a.itemsize)
    for start in range(0, a.shape[0], STRETCH):
        one, other = a[start : start + STRETCH], b[start : start + STRETCH]
        below = one if base is None else base[start : start + STRETCH]
        xx, xy, yy = np.float32(0), np.float32(0), np.float32(0)
        for i in range(one.shape[0]):
            x = np.uint32(np.uint32(one[i]) << shift).view(np.float32)
            y = np.uint32(np.uint32(other[i]) << shift).view(np.float32)
            if base is not None:
                z = np.uint32(np.uint32(below[i]) << shift).view(np.float32)
                x -= z
                y -= z
            xx += x * x
            xy += x * y
            yy += y * y
        first += np.float64(xx)
        across += np.float64(xy)
        second += np.float64(yy)
    return first, across, second


@_fused.compiled
def _thinned(row: Array, base: Array | None, step: int, run: int, out: Array) -> None:
    """Give the first `run` of every `run` * `step` entries, less the base; of a short row one in `step`."""
    shift = np.uint32(32 - 8 * row.itemsize)
    run = run if row.shape[0] >= run * step else 1
    for i in range(out.shape[0]):
        place = i // run * run * step + i % run
        x = np.uint32(np.uint32(row[place]) << shift).view(np.float32)
        if base is not None:
            x -= np.uint32(np.uint32(base[place]) << shift).view(np.float32)
        out[i] = x


@_fused.compiled
def _rounded(x: Array, out: Array) -> bool:
    """Give the nearest bfloat16 numbers, of two the even one; say whether all of them are finite."""
    most = np.uint32(0)
    for i in range(x.shape[0]):
        bits = np.float32(x[i]).view(np.uint32)
        out[i] = np.uint32(bits + np.uint32(0x7FFF) + np.uint32(np.uint32(bits >> 16) & 1)) >> 16
        most = max(most, np.uint32(bits & np.uint32(0x7FFFFFFF)))
    return bool(most < np.uint32(0x7F7F8000))  # from there on the nearest number is infinity


def bits(rows: Iterable[torch.Tensor]) -> list[Array] | None:
    """Return the bits of rows in main memory, if the loops can serve them, and are worth it."""
    return alike(_bits(row) for row in rows)


def _bits(row: torch.Tensor) -> Array | None:
    whole = {torch.bfloat16: torch.int16, torch.float32: torch.int32}.get(row.dtype)  # of as many bits
    if whole is None or not row.is_cpu or not row.is_contiguous() or not _fused.worth(row.numel()):
        return None
    own = row.view(whole).view(-1).numpy()
    return own.view(f"<u{own.itemsize}")


def alike(rows: Iterable[Array | None]) -> list[Array] | None:
    """Return the bits of rows if there are those of all, of one type and long enough for the loops, else None."""
    found = list[Array]()
    for row in rows:
        if row is None or len(row) < _fused.LEAST or (found and row.dtype != found[0].dtype):
            return None
        found.append(row)
    return found


def _numbers(bits: Array) -> torch.Tensor:
    """Return the numbers that bits stand for, in the same memory."""
    dtype = {2: torch.bfloat16, 4: torch.float32}[bits.itemsize]
    return torch.from_numpy(bits.view(f"<i{bits.itemsize}")).view(dtype)


def flat(x: torch.Tensor) -> Array:
    """Return the same memory as a flat array."""
    found: Array = x.view(-1).numpy()
    return found


def subtract(row: Array, base: Array, out: torch.Tensor) -> None:
    """Put a row less the base into float32 memory."""
    _scaled(row, base, np.float32(1), flat(out))


def put_on_top(base: Array, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Put the sum of a base and float32 numbers into float32 memory, and return that."""
    _on_top(base, flat(x), flat(out))
    return out


def rounded(x: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Return a flat float32 row in bfloat16, and whether all of it is finite there."""
    result = np.empty(x.numel(), np.uint16)
    finite = _rounded(flat(x), result)
    return torch.from_numpy(result.view(np.int16)).view(torch.bfloat16).view(x.shape), bool(finite)
