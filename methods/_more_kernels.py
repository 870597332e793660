"""More arithmetic shared by methods: directions, windows of ranks, weighted agreement.

Sums over a weight run in NumPy in float64, so that they do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from mergectl.methods import _kernels

Array: TypeAlias = "np.ndarray[Any, Any]"


def flat(x: torch.Tensor) -> Array:
    """Return one weight as a row of float64 numbers."""
    return x.detach().cpu().double().reshape(-1).numpy()


def like(row: Array, x: torch.Tensor) -> torch.Tensor:
    """Return a row of numbers in the shape, type and place of a weight."""
    return torch.from_numpy(np.ascontiguousarray(row)).reshape(x.shape).to(x)


def norm(row: Array) -> Array:
    """Return the length of each vector along the last axis, that axis kept."""
    length: Array = np.sqrt((row * row).sum(-1, keepdims=True))
    return length


def unit(row: Array) -> Array:
    """Return each vector along the last axis at length 1; a zero vector stays zero."""
    length = norm(row)
    result: Array = row / np.where(length > 0, length, 1.0)
    return result


def arc(a: Array, b: Array, t: float) -> Array:
    """Return the point at share t of the arc from a to b along the last axis, of the line where they are parallel."""
    cosine = (unit(a) * unit(b)).sum(-1, keepdims=True).clip(-1, 1)
    angle = np.arccos(cosine)
    parallel = (np.sin(angle) < 1e-8) | (norm(a) == 0) | (norm(b) == 0)
    sine = np.where(parallel, 1.0, np.sin(angle))
    from_a = np.where(parallel, 1 - t, np.sin((1 - t) * angle) / sine)
    from_b = np.where(parallel, t, np.sin(t * angle) / sine)
    result: Array = from_a * a + from_b * b
    return result


def shares(weights: Sequence[float]) -> list[float] | None:
    """Return weights divided by their sum, or None where they add up to nothing."""
    whole = sum(weights)
    return None if abs(whole) < 1e-8 else [weight / whole for weight in weights]


def keep_ranks(x: torch.Tensor, skip: int, count: int) -> torch.Tensor:
    """Keep `count` entries after the `skip` largest in magnitude, zero the rest; of equal ones the earlier count first.

    Two selections find the magnitudes at both ends; only what equals one of them is counted by place.
    """
    magnitudes = np.abs(x.detach().cpu().float().reshape(-1).numpy())
    size = len(magnitudes)
    if count <= 0 or skip + count > size:
        return torch.zeros_like(x) if count <= 0 else keep_ranks(x, size - min(count, size), min(count, size))
    ends = np.partition(magnitudes, sorted({size - skip - count, size - skip - 1}))
    floor, ceiling = ends[size - skip - count], ends[size - skip - 1]
    kept = (magnitudes > floor) & (magnitudes < ceiling)
    for edge in {float(floor), float(ceiling)}:
        places, above = np.flatnonzero(magnitudes == edge), int(np.count_nonzero(magnitudes > edge))
        kept[places[max(skip - above, 0) : max(skip + count - above, 0)]] = True
    return torch.where(torch.from_numpy(kept).to(x.device).reshape(x.shape), x, 0)


def ranks(x: torch.Tensor) -> torch.Tensor:
    """Return each entry's place, from 0, among the magnitudes of its row (the last dimension), the smallest first."""
    order = x.abs().argsort(dim=-1, stable=True)
    places = torch.arange(x.shape[-1], device=x.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def to_mass(kept: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Scale what was kept of a weight to the weight's own sum of magnitudes."""
    before, after = float(np.abs(flat(x)).sum()), float(np.abs(flat(kept)).sum())
    return kept * (before / after) if before > 0 and after > 0 else kept


def weighted_agreeing_mean(x: torch.Tensor, weights: Sequence[float], sign: torch.Tensor | None) -> torch.Tensor:
    """Return the sum of weighted entries that agree with the sign, divided by the sum of their weights."""
    sums = torch.zeros(x.shape[1:], dtype=torch.float64, device=x.device)
    votes = torch.zeros_like(sums)
    for row, weight in zip(x, weights, strict=True):
        part = _kernels.agreeing(row, sign)
        sums += part
        votes += (part != 0) * weight
    signed = sums if sign is None else sums * sign
    return (signed / torch.where(votes == 0, 1.0, votes)).to(x.dtype)
