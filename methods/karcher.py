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
    from mergectl.methods._more_kernels import Array
    from mergectl.methods._task_vectors import TaskVectors

TITLE = "Karcher mean"
PAPER = "doi:10.1002/cpa.3160300502"
NEUTRAL: dict[str, float] = {}
BLOCKS = True  # a block at a time is enough: the lab may hand over weights in blocks


def merge(
    experts: TaskVectors,
    *,
    max_iter: Annotated[int, Between(1, 1000, search=(1, 20)), "most steps towards the mean"] = 10,
    tol: Annotated[float, Between(0.0, 1.0, search=(1e-8, 1e-3)), "a step this short, or an angle, is the last"] = 1e-5,
) -> Merged:
    """Yield for each weight the mean direction at the mean length."""
    return _more_kernels.blend(experts, lambda products: mean(products, max_iter, tol))


def mean(products: Array, max_iter: int, tol: float) -> list[float]:
    """Return each task's factor in the mean, which lies in their span: the mean direction at the mean length.

    All angles follow from the inner products; the search starts from the plain mean of the directions.
    """
    lengths = np.sqrt(np.diag(products))
    there = [task for task, length in enumerate(lengths) if length > 0]
    if not there or len(lengths) == 1:
        return [1.0, *[0.0] * (len(lengths) - 1)]
    cosines = _more_kernels.cosines(products)[np.ix_(there, there)]

    def size(x: Array) -> float:
        return math.sqrt(max(float(x @ cosines @ x), 0.0))

    middle = np.ones(len(there))
    middle = middle / size(middle) if size(middle) > tol else np.eye(len(there))[0]
    for _ in range(max_iter):
        steps = [towards(middle, one, float((cosines @ middle)[one]), tol) for one in range(len(there))]
        step = np.sum(steps, axis=0) / len(there)
        length = size(step)
        if length <= tol:
            break
        middle = math.cos(length) * middle + math.sin(length) / length * step
        middle = middle / size(middle)
    factors = np.zeros(len(lengths))
    factors[there] = middle * lengths.mean() / lengths[there]
    return [float(factor) for factor in factors]


def towards(middle: Array, one: int, cosine: float, tol: float) -> Array:
    """Return the step along the sphere from the middle to one direction, as long as the angle between them."""
    cosine = min(max(cosine, -1.0), 1.0)
    angle = math.acos(cosine)
    if angle <= tol or math.sin(angle) == 0:
        return np.zeros_like(middle)
    step: Array = -cosine * middle
    step[one] += 1
    return step * (angle / math.sin(angle))
