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

from mergectl.methods._contract import Between, Merged

if TYPE_CHECKING:
    import torch

    from mergectl.methods._task_vectors import TaskVectors

TITLE = "Spherical linear interpolation (SLERP)"
PAPER = "doi:10.1145/325165.325242"
NEUTRAL: dict[str, float] = {}
EXPERTS = (2, 2)


def merge(
    experts: TaskVectors,
    *,
    t: Annotated[float, Between(0.0, 1.0), "place between the first expert (0) and the second (1)"] = 0.5,
) -> Merged:
    """Yield for each weight the point at share t of the arc from the first expert to the second."""
    for name, x in experts.items():
        yield name, x[round(t)] if t in (0.0, 1.0) else arc(x[0], x[1], t)


def arc(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """Return the point on the arc from a to b; on the straight line where the angle is too small to divide by."""
    p, q = a.double().cpu().numpy(), b.double().cpu().numpy()  # numpy sums do not depend on the number of threads
    norms = math.sqrt((p * p).sum()), math.sqrt((q * q).sum())
    cosine = float((p * q).sum()) / (norms[0] * norms[1]) if min(norms) >= 1e-8 else 1.0
    if abs(cosine) > 0.9995:
        return a.lerp(b, t)
    angle = math.acos(cosine)
    from_a, from_b = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return (a.double() * from_a + b.double() * from_b).to(a.dtype)
