"""Rows of bfloat16 numbers where they lie: added up, or subtracted, without a copy of each in float32.

What comes out is that of the tensor operations on float32 copies, bit for bit; but for inner products, whose runs are
added up in another order.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias, overload

import numpy as np
import torch

from mergectl.methods import _fused

Array: TypeAlias = "np.ndarray[Any, Any]"


class Stored(Sequence["torch.Tensor"]):
    """Rows as they are stored, less a base if there is one; reading one gives it in float32."""

    def __init__(self, rows: Sequence[Array], shape: Sequence[int], base: Array | None = None) -> None:
        """Take the bits of flat rows and of a base, and the shape that they stand for."""
        self.rows, self.shape, self.base = list(rows), tuple(shape), base

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
            return Stored(self.rows[place], self.shape, self.base)
        result = torch.empty(self.shape)
        _scaled(self.rows[place], self.base, np.float32(1), flat(result))
        return result

    def weighted_total(self, weights: Sequence[float]) -> torch.Tensor:
        """Return the sum over rows of each times its weight."""
        result = torch.empty(self.shape)
        out = flat(result)
        for place, (row, weight) in enumerate(zip(self.rows, weights, strict=True)):
            (_add_scaled if place else _scaled)(row, self.base, np.float32(weight), out)
        return result

    def mean(self) -> torch.Tensor:
        """Return the mean over rows: that of two is rounded once, from each further row a share is taken."""
        if len(self) == 1:
            return self[0]
        result = self[:2].weighted_total([1.0, 1.0]).mul_(0.5)
        for number, row in enumerate(self.rows[2:], 3):
            _go_towards(row, self.base, np.float32(1 / number), flat(result))
        return result

    def inner(self) -> list[list[float]]:
        """Return the inner products of all pairs of rows: those of short runs in float32, summed in float64."""
        found = {}
        for i, j in itertools.combinations_with_replacement(range(len(self)), 2):
            found[i, j] = found[j, i] = _inner(self.rows[i], self.rows[j], self.base)
        return [[found[i, j] for j in range(len(self))] for i in range(len(self))]


STRETCH = 1024  # elements that are gone through together

_contracted = functools.partial(_fused.compiled, fastmath=["contract"])  # sums of products are rounded once


@_contracted
def _scaled(row: Array, base: Array | None, weight: np.float32, out: Array) -> None:
    """Give a row, less the base, times a weight. The bits of a bfloat16 are the upper half of a float32's."""
    for start in range(0, out.shape[0], STRETCH):
        part, to = row[start : start + STRETCH], out[start : start + STRETCH]
        below = part if base is None else base[start : start + STRETCH]
        for i in range(to.shape[0]):
            x = np.uint32(np.uint32(part[i]) << 16).view(np.float32)
            if base is not None:
                x -= np.uint32(np.uint32(below[i]) << 16).view(np.float32)
            to[i] = x * weight


@_contracted
def _add_scaled(row: Array, base: Array | None, weight: np.float32, out: Array) -> None:
    """Add a row, less the base, times a weight."""
    for start in range(0, out.shape[0], STRETCH):
        part, to = row[start : start + STRETCH], out[start : start + STRETCH]
        below = part if base is None else base[start : start + STRETCH]
        for i in range(to.shape[0]):
            x = np.uint32(np.uint32(part[i]) << 16).view(np.float32)
            if base is not None:
                x -= np.uint32(np.uint32(below[i]) << 16).view(np.float32)
            to[i] += x * weight


@_contracted
def _go_towards(row: Array, base: Array | None, share: np.float32, out: Array) -> None:
    """Go a share of the way from what there is so far to a row, less the base."""
    for start in range(0, out.shape[0], STRETCH):
        part, to = row[start : start + STRETCH], out[start : start + STRETCH]
        below = part if base is None else base[start : start + STRETCH]
        for i in range(to.shape[0]):
            x = np.uint32(np.uint32(part[i]) << 16).view(np.float32)
            if base is not None:
                x -= np.uint32(np.uint32(below[i]) << 16).view(np.float32)
            to[i] += share * (x - to[i])


@_fused.compiled
def _on_top(base: Array, x: Array, out: Array) -> None:
    """Add float32 numbers to a base."""
    for start in range(0, out.shape[0], STRETCH):
        below, part, to = base[start : start + STRETCH], x[start : start + STRETCH], out[start : start + STRETCH]
        for i in range(to.shape[0]):
            to[i] = np.uint32(np.uint32(below[i]) << 16).view(np.float32) + part[i]


@functools.partial(_fused.compiled, fastmath=["contract", "reassoc"])
def _inner(a: Array, b: Array, base: Array | None) -> float:
    """Give the inner product of two rows, less the base: of each stretch in float32, summed in float64."""
    total = 0.0
    for start in range(0, a.shape[0], STRETCH):
        one, other = a[start : start + STRETCH], b[start : start + STRETCH]
        below, part = one if base is None else base[start : start + STRETCH], np.float32(0)
        for i in range(one.shape[0]):
            x = np.uint32(np.uint32(one[i]) << 16).view(np.float32)
            y = np.uint32(np.uint32(other[i]) << 16).view(np.float32)
            if base is not None:
                z = np.uint32(np.uint32(below[i]) << 16).view(np.float32)
                x -= z
                y -= z
            part += x * y
        total += np.float64(part)
    return total


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
    """Return the bits of flat bfloat16 rows in main memory that are long enough for the loops, else None."""
    found: list[Array] = []
    for row in rows:
        if row.dtype != torch.bfloat16 or not row.is_cpu or not row.is_contiguous() or not is_long(row):
            return None
        found.append(row.view(torch.int16).view(-1).numpy().view(np.uint16))
    return found


def is_long(x: torch.Tensor) -> bool:
    """Say whether the loops are worth the compiler's start."""
    return x.numel() >= _fused.LEAST


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
