"""Loops over very many numbers, compiled when they are first used: one pass where tensor operations take ten.

Each gives what tensor operations beside its callers give, which serve small weights and other devices: the same
float32 numbers. Rows are [task, elements] of float32 in main memory. A loop goes through stretches
that stay in the processor's nearest cache, task by task, so that the compiler can use the widest registers.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Collection
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
import torch

Array: TypeAlias = "np.ndarray[Any, Any]"
Loop = TypeVar("Loop", bound=Callable[..., Any])

LEAST = 1 << 18  # elements from which on a loop saves more than the compiler's start costs a whole merge
WHOLE = 1 << 23  # elements of a model from which on it does for all of its blocks together, however small
STRETCH = 1024
_lock = threading.Lock()


def worth(count: int, whole: int = 0) -> bool:
    """Say whether a loop is worth the compiler's start, over so many elements, of so many that it goes through."""
    return count >= LEAST or whole >= WHOLE


def fits(x: torch.Tensor, whole: int = 0) -> bool:
    """Say whether the loops can serve these numbers, and are worth it."""
    return worth(x.numel(), whole) and x.dtype == torch.float32 and x.device.type == "cpu" and x.is_contiguous()


def rows_of(x: torch.Tensor) -> Array:
    """Return the same memory as [task, elements]."""
    rows: Array = x.detach().reshape(len(x), -1).numpy()
    return rows


def compiled(loop: Loop, fastmath: Collection[str] = ()) -> Loop:
    """Return the loop as machine code, made at the first call and kept on disk where that is possible.

    `fastmath` names what the compiler may change about floating-point numbers, in LLVM's words.
    """

    @functools.cache
    def machine_code() -> Callable[..., Any]:
        import numba

        _use_widest_registers()
        how = {"nogil": True, "error_model": "numpy", "fastmath": set(fastmath)}
        try:
            return cast("Callable[..., Any]", numba.njit(loop, cache=True, **how))
        except RuntimeError:  # no folder that may be written
            return cast("Callable[..., Any]", numba.njit(loop, **how))

    @functools.wraps(loop)
    def run(*given: Any) -> Any:
        with _lock:
            code = machine_code()
        try:
            return code(*given)
        except OSError:  # the machine code was made, but could not be kept: that disk is full
            return code(*given)

    return cast("Loop", run)


def started() -> bool:
    """Say whether the compiler has been started, so that a further loop costs little more than its run."""
    return _use_widest_registers.cache_info().currsize > 0


@functools.cache
def _use_widest_registers() -> None:
    """Have the compiler use registers of 512 bits where there are any; left alone it prefers those of 256."""
    import numba

    chosen = numba.config.CPU_FEATURES is not None or numba.config.CPU_NAME is not None
    if not chosen and "+avx512f" in (own := numba.core.codegen.get_host_cpu_features()):
        numba.config.CPU_FEATURES = f"{own},-prefer-256-bit"


@compiled
def elect_by_mass(rows: Array, out: Array) -> None:
    """Give the sign of each sum over rows, taken in float64."""
    sums = np.empty(STRETCH, np.float64)
    for start in range(0, rows.shape[1], STRETCH):
        size = min(STRETCH, rows.shape[1] - start)
        sums[:size] = 0
        for task in range(rows.shape[0]):
            row = rows[task, start : start + size]
            for i in range(size):
                sums[i] += row[i]
        for i in range(size):
            out[start + i] = (np.float32(1) if sums[i] > 0 else np.float32(0)) - (
                np.float32(1) if sums[i] < 0 else np.float32(0)
            )


@compiled
def balance(rows: Array, floors: Array, weights: Array) -> int:
    """Count how many more sums over rows are positive than negative; of entries above a floor, times a weight."""
    sums, found = np.empty(STRETCH, np.float64), 0
    for start in range(0, rows.shape[1], STRETCH):
        size, more = min(STRETCH, rows.shape[1] - start), np.int32(0)
        sums[:size] = 0
        for task in range(rows.shape[0]):
            row, floor, weight = rows[task, start : start + size], floors[task], weights[task]
            for i in range(size):
                sums[i] += row[i] * weight if abs(row[i]) > floor else np.float32(0)
        for i in range(size):
            more = np.int32(more + np.int32(sums[i] > 0) - np.int32(sums[i] < 0))
        found += int(more)
    return found


@compiled
def agreed(rows: Array, floors: Array, weights: Array, instead: np.float32, mean: bool, out: Array) -> None:
    """Give the sum, or the mean, of the entries that have the sign of the sum over rows.

    Of each row count entries above its floor, times its weight; `instead` is the sign of a sum that is zero.
    """
    kept = np.empty((rows.shape[0], STRETCH), np.float32)
    sums, sign, votes = np.empty(STRETCH, np.float64), np.empty(STRETCH, np.float32), np.empty(STRETCH, np.float32)
    for start in range(0, rows.shape[1], STRETCH):
        size = min(STRETCH, rows.shape[1] - start)
        mass = out[start : start + size]
        sums[:size] = 0
        mass[:] = 0
        votes[:size] = 0
        for task in range(rows.shape[0]):
            row, own, floor, weight = rows[task, start : start + size], kept[task], floors[task], weights[task]
            for i in range(size):
                own[i] = row[i] * weight if abs(row[i]) > floor else np.float32(0)
            for i in range(size):
                sums[i] += own[i]
        for i in range(size):
            sign[i] = np.float32(1) if sums[i] > 0 else -np.float32(1) if sums[i] < 0 else instead
        for task in range(rows.shape[0]):
            own, weight = kept[task], weights[task]
            for i in range(size):
                part = own[i] * sign[i]
                mass[i] += part if part > 0 else np.float32(0)
                votes[i] += weight if part > 0 else np.float32(0)
        for i in range(size):
            mass[i] *= sign[i]
            if mean:
                mass[i] /= votes[i] if votes[i] != 0 else np.float32(1)


@compiled
def agreeing_sums(rows: Array, sign: Array, weights: Array, sums: Array, votes: Array) -> None:
    """Sum the entries that have the elected sign, and the weights of their rows."""
    for start in range(0, rows.shape[1], STRETCH):
        size = min(STRETCH, rows.shape[1] - start)
        elected, mass, count = sign[start : start + size], sums[start : start + size], votes[start : start + size]
        mass[:] = 0
        count[:] = 0
        for task in range(rows.shape[0]):
            row, weight = rows[task, start : start + size], weights[task]
            for i in range(size):
                part = row[i] * elected[i]
                mass[i] += part if part > 0 else np.float32(0)
                count[i] += weight if part > 0 else np.float32(0)
        for i in range(size):
            mass[i] *= elected[i]


@compiled
def unify(rows: Array, unified: Array, masks: Array, own: Array, left: Array) -> None:
    """Give the largest entry that has the sign of the sum over rows (minus for none), and where rows have that sign.

    `own` and `left`, [task, STRETCH], collect each row's magnitudes and those of `unified` where the row agrees.
    """
    sums, sign, most = np.empty(STRETCH, np.float64), np.empty(STRETCH, np.float32), np.empty(STRETCH, np.float32)
    for start in range(0, rows.shape[1], STRETCH):
        size = min(STRETCH, rows.shape[1] - start)
        sums[:size] = 0
        most[:size] = 0
        for task in range(rows.shape[0]):
            row = rows[task, start : start + size]
            for i in range(size):
                sums[i] += row[i]
        for i in range(size):
            sign[i] = np.float32(1) if sums[i] > 0 else -np.float32(1)
        for task in range(rows.shape[0]):
            row, mask = rows[task, start : start + size], masks[task, start : start + size]
            for i in range(size):
                part = row[i] * sign[i]
                mask[i] = part > 0
                most[i] = max(most[i], part)
        for task in range(rows.shape[0]):
            row, mine, rest = rows[task, start : start + size], own[task], left[task]
            for i in range(size):
                mine[i] += abs(row[i])
                rest[i] += most[i] if row[i] * sign[i] > 0 else np.float32(0)
        for i in range(size):
            unified[start + i] = most[i] * sign[i] + np.float32(0)


@compiled
def between(
    row: Array, base: Array | None, low: np.int32, high: np.int32, magnitudes: bool, out: Array
) -> tuple[int, int, int, int]:
    """Collect the keys of entries, less the base, strictly between bounds; count these, those above and at the bounds.

    A key is a whole number: its order is that of the entries, or of their magnitudes.
    """
    shift, first = np.uint32(32 - 8 * row.itemsize), np.uint32(int(low) + 1)
    width = np.uint32(max(int(high) - int(low) - 1, 0))
    keys, mask = np.empty(STRETCH, np.int32), np.zeros(STRETCH, np.uint8)
    words = mask.view(np.uint64)  # eight entries at a time are passed over
    found, above, at_high, at_low = 0, 0, 0, 0
    for start in range(0, row.shape[0], STRETCH):
        part = row[start : start + STRETCH]
        below = part if base is None else base[start : start + STRETCH]
        size = part.shape[0]
        more, highs, lows = np.int32(0), np.int32(0), np.int32(0)  # kept short, so that registers stay full
        for i in range(size):
            x = np.uint32(np.uint32(part[i]) << shift).view(np.float32)
            if base is not None:
                x -= np.uint32(np.uint32(below[i]) << shift).view(np.float32)
            bits = np.float32((abs(x) if magnitudes else x) + np.float32(0)).view(np.int32)  # + 0 turns -0 into 0
            key = np.int32(bits ^ np.int32(np.int32(bits >> 31) & np.int32(0x7FFFFFFF)))
            keys[i] = key
            more = np.int32(more + np.int32(key > high))
            highs = np.int32(highs + np.int32(key == high))
            lows = np.int32(lows + np.int32(key == low))
        above += int(more)
        at_high += int(highs)
        at_low += int(lows)
        mask[size:] = 0
        for i in range(size):
            mask[i] = np.uint32(np.uint32(keys[i]) - first) < width
        for word in range(STRETCH // 8):
            if words[word] != 0:
                for i in range(8 * word, 8 * word + 8):
                    if mask[i] != 0:
                        out[found] = keys[i]
                        found += 1
    return found, above, at_high, at_low


@compiled
def keep_chosen(row: Array, bits: Array, whole: np.uint16, scale: np.float32, out: Array, edge: Array) -> int:
    """Give entries whose random bits are at most `whole`, times a scale; say where and how often they are just that."""
    found = 0
    for start in range(0, row.shape[0], STRETCH):
        part, drawn, kept = row[start : start + STRETCH], bits[start : start + STRETCH], out[start : start + STRETCH]
        equal = np.int32(0)
        for i in range(kept.shape[0]):
            kept[i] = part[i] * scale if drawn[i] <= whole else np.float32(0)
            equal = np.int32(equal + np.int32(drawn[i] == whole))
        if equal > 0:
            for i in range(kept.shape[0]):
                if drawn[i] == whole:
                    edge[found] = start + i
                    found += 1
    return found
