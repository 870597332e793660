"""Interpolate two experts along the arc between their directions, weight by weight.

>>> from mergectl import merge_weights
>>> import torch
>>> experts = {"a": {"w": torch.tensor([2.0, 0.0])}, "b": {"w": torch.tensor([0.0, 2.0])}}
>>> w = merge_weights("slerp", None, experts, t=1 / 3)["w"]  # a third of a right angle: 2 cos 30, 2 sin 30
>>> [round(v, 4) for v in w.tolist()]
[1.7321, 1.0]
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

from mergectl.methods import _more_kernels
from mergectl.methods._contract import Between, Merged

if TYPE_CHECKING:
    from mergectl.methods._more_kernels import Array
    from mergectl.methods._task_vectors import TaskVectors

TITLE = "Spherical linear interpolation (SLERP)"
PAPER = "doi:10.1145/325165.325242"
NEUTRAL: dict[str, float] = {}
EXPERTS = (2, 2)
BLOCKS = True  # a block at a time is enough: the lab may hand over weights in blocks


def merge(
    experts: TaskVectors,
    *,
    t: Annotated[float, Between(0.0, 1.0), "place between the first expert (0) and the second (1)"] = 0.5,
) -> Merged:
    """Yield for each weight the point at share t of the arc from the first expert to the second."""
    if t in (0.0, 1.0):
        return experts.each(lambda name, x: x[round(t)])
    return _more_kernels.blend(experts, lambda products: arc(products, t))


def arc(products: Array, t: float) -> list[float]:
    """Return the factors of both ends; those of the straight line where the angle is too small to divide by."""
    norms = math.sqrt(products[0, 0]), math.sqrt(products[1, 1])
    cosine = float(products[0, 1]) / (norms[0] * norms[1]) if min(norms) >= 1e-8 else 1.0
    if abs(cosine) > 0.9995:
        return [1 - t, t]
    angle = math.acos(cosine)
    return [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]
