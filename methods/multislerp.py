"""Take the weighted mean of the experts' directions and of their lengths, weight by weight (Multi-SLERP).

>>> from mergectl import merge_weights
>>> import torch
>>> experts = {"a": {"w": torch.tensor([4.0, 0.0])}, "b": {"w": torch.tensor([0.0, 2.0])}}
>>> # directions [3/4, 0] + [0, 1/4], at length 1 [3, 1] / sqrt 10; lengths 3/4 * 4 + 1/4 * 2 = 3.5
>>> w = merge_weights("multislerp", None, experts, weight=[3.0, 1.0])["w"]
>>> [round(v, 4) for v in w.tolist()]
[3.3204, 1.1068]

This is mergekit's merge as its steps are known here, not compared with a run of it: it projects the directions onto the
tangent plane at their weighted mean, adds them there and goes back along the sphere. In that plane they add up to zero
by the very choice of the point, so the mean direction is the result and the detour is left out.
Directions that cancel out have no mean: then the weighted mean of the weights themselves is taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import numpy as np

from mergectl.methods import _kernels, _more_kernels
from mergectl.methods._contract import Between, Merged, MethodError, OneOf, PerTask, Weights

if TYPE_CHECKING:
    from mergectl.methods._more_kernels import Array
    from mergectl.methods._task_vectors import TaskVectors

TITLE = "Multi-SLERP"
PAPER = "goddard.blog/posts/multislerp-wow-what-a-cool-idea"
NEUTRAL: dict[str, bool] = {"normalize": True}
SHARES = "weight"  # divided by their sum
BLOCKS = True  # a block at a time is enough: the lab may hand over weights in blocks


def merge(
    experts: TaskVectors,
    task_vectors: TaskVectors | None = None,
    base: Weights | None = None,
    *,
    weight: Annotated[PerTask, Between(-1e4, 1e4), "weight of each expert"] = 1.0,
    normalize: Annotated[bool, "divide the weights by their sum"] = True,
    on: Annotated[str, OneOf(["weights", "deltas"]), "directions of the weights or of the task vectors"] = "weights",
) -> Merged:
    """Yield for each weight the mean direction at the mean length."""
    given = _kernels.per_task(weight, len(experts.tasks))
    weights = _more_kernels.shares(given) if normalize else given
    if on == "deltas" and (task_vectors is None or base is None):
        raise MethodError(
            "multislerp with on=deltas needs the base the experts came from. Give one, or use on=weights."
        )
    vectors = experts if on == "weights" or task_vectors is None else task_vectors
    return _more_kernels.blend(vectors, lambda products: blended(products, weights), base if on == "deltas" else None)


def blended(products: Array, weights: Sequence[float]) -> list[float]:
    """Return each task's factor in the weighted mean direction at the weighted mean length."""
    lengths = np.sqrt(np.diag(products))
    w = np.asarray(weights, dtype=np.float64)
    length = math.sqrt(max(float(w @ _more_kernels.cosines(products) @ w), 0.0))
    if length < 1e-8:
        return list(weights)
    factors = w * float(w @ lengths) / length
    return [float(f / size) if size > 0 else 0.0 for f, size in zip(factors, lengths, strict=True)]
