"""Take the direction of least squared angle to all experts, weight by weight (Karcher mean).

>>> from mergectl import merge_weights
>>> import torch
>>> experts = {"a": {"w": torch.tensor([4.0, 0.0])}, "b": {"w": torch.tensor([0.0, 2.0])}}
>>> w = merge_weights("karcher", None, experts)["w"]  # the direction half way, 45 degrees, at length (4 + 2) / 2
>>> [round(v, 4) for v in w.tolist()]
[2.1213, 2.1213]

All experts count alike. A zero weight has no direction, but its length 0 counts in the mean length.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import numpy as np

from mergectl.methods import _more_kernels
from mergectl.methods._contract import Between, Merged

if TYPE_CHECKING:
    import torch

    from mergectl.methods._more_kernels import Array
    from mergectl.methods._task_vectors import TaskVectors

TITLE = "Karcher mean"
PAPER = "doi:10.1002/cpa.3160300502"
NEUTRAL: dict[str, float] = {}


def merge(
    experts: TaskVectors,
    *,
    max_iter: Annotated[int, Between(1, 1000, search=(1, 20)), "most steps towards the mean"] = 10,
    tol: Annotated[float, Between(0.0, 1.0, search=(1e-8, 1e-3)), "a step this short, or an angle, is the last"] = 1e-5,
) -> Merged:
    """Yield for each weight the mean direction at the mean length."""
    for name, x in experts.items():
        yield name, x[0] if len(x) == 1 or x.numel() == 0 else mean(x, max_iter, tol)


def mean(x: torch.Tensor, max_iter: int, tol: float) -> torch.Tensor:
    """Return the mean of [task, *shape], starting from the plain mean of the directions."""
    rows = [_more_kernels.flat(row) for row in x]
    lengths = [float(_more_kernels.norm(row)[0]) for row in rows]
    units = [row / length for row, length in zip(rows, lengths, strict=True) if length > 0]
    if not units:
        return x[0]
    middle = np.sum(units, axis=0)
    middle = _more_kernels.unit(middle) if float(_more_kernels.norm(middle)[0]) > tol else units[0]
    for _ in range(max_iter):
        step = np.sum([towards(middle, one, tol) for one in units], axis=0) / len(units)
        length = float(_more_kernels.norm(step)[0])
        if length <= tol:
            break
        middle = _more_kernels.unit(math.cos(length) * middle + math.sin(length) / length * step)
    return _more_kernels.like(middle * (sum(lengths) / len(lengths)), x[0])


def towards(middle: Array, one: Array, tol: float) -> Array:
    """Return the step along the sphere from the middle to one direction, as long as the angle between them."""
    cosine = float((middle * one).sum().clip(-1, 1))
    angle = math.acos(cosine)
    if angle <= tol or math.sin(angle) == 0:
        return np.zeros_like(middle)
    step: Array = angle / math.sin(angle) * (one - cosine * middle)
    return step
