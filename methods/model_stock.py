"""Go from the base towards the experts' mean as far as the task vectors' angles say (Model Stock).

>>> from mergectl import merge_weights
>>> import torch
>>> base = {"w": torch.zeros(2)}
>>> experts = {"a": {"w": torch.tensor([5.0, 0.0])}, "b": {"w": torch.tensor([3.0, 4.0])}}
>>> w = merge_weights("model_stock", base, experts)["w"]  # cosine 0.6, t = 2 * 0.6 / (1 + 0.6) = 0.75, mean [4, 2]
>>> [round(v, 4) for v in w.tolist()]
[3.0, 1.5]

Each tensor has its own angles. The paper gives the formula for a cosine that all pairs share; of others the mean is
taken, or with mean=angles the cosine of the mean angle. A task vector of length zero has cosine 0 with all others.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch

from mergectl.methods import _kernels, _more_kernels
from mergectl.methods._contract import Merged, OneOf

if TYPE_CHECKING:
    from mergectl.methods._more_kernels import Array
    from mergectl.methods._task_vectors import TaskVectors

TITLE = "Model Stock"
PAPER = "arXiv:2403.19522"
NEUTRAL: dict[str, float] = {}
EXPERTS = (2, None)
BLOCKS = {"filter_wise": [False]}  # a filter may be longer than any block


def mean_cosine(cosines: Array) -> Array:
    """Return the mean over pairs of tasks."""
    result: Array = cosines.mean(0)
    return result


def cosine_of_mean_angle(cosines: Array) -> Array:
    """Return the cosine of the mean angle over pairs of tasks."""
    result: Array = np.cos(np.arccos(cosines.clip(-1, 1)).mean(0))
    return result


MEAN = {"cosines": mean_cosine, "angles": cosine_of_mean_angle}


def merge(
    task_vectors: TaskVectors,
    *,
    filter_wise: Annotated[bool, "an angle for each output row of a weight, not one for all of it"] = False,
    mean: Annotated[str, OneOf(MEAN), "what is averaged over pairs of experts"] = "cosines",
    clamp: Annotated[bool, "keep the ratio between 0 (base) and 1 (mean) where angles are obtuse"] = True,
) -> Merged:
    """Yield for each weight the mean task vector times a ratio found from the angles."""
    limit = (0.0, 1.0) if clamp else (-math.inf, math.inf)
    if filter_wise:
        return task_vectors.each(lambda name, x: by_filter(x, mean, limit))
    return _more_kernels.blend(task_vectors, lambda products: by_angles(products, mean, limit))


def by_angles(products: Array, mean: str, limit: tuple[float, float]) -> list[float]:
    """Return each task's factor in the mean task vector times the ratio."""
    count = len(products)
    t = float(ratio(_pairs(_more_kernels.cosines(products)), count, mean).clip(*limit))
    return [t / count] * count


def by_filter(x: torch.Tensor, mean: str, limit: tuple[float, float]) -> torch.Tensor:
    """Return the mean task vector with each output row times its own ratio; one ratio for a weight without rows."""
    rows = x.reshape(len(x), x.shape[1] if x.dim() > 2 else 1, -1)
    wide = rows.cpu().double().numpy()
    products = np.einsum("irk,jrk->rij", wide, wide)
    pairs = np.stack([_pairs(_more_kernels.cosines(one)) for one in products], axis=1)
    t = torch.from_numpy(ratio(pairs, len(x), mean).clip(*limit)).to(x).reshape(-1, 1)
    return (_kernels.mean(rows) * t).reshape(x.shape[1:])


def _pairs(cosines: Array) -> Array:
    """Return the cosine of every pair of tasks."""
    return np.array([cosines[i, j] for i, j in itertools.combinations(range(len(cosines)), 2)])


def ratio(pairs: Array, tasks: int, mean: str) -> Array:
    """Return K cos / (1 + (K - 1) cos) per group; where that has no value, 0."""
    cosine = MEAN[mean](pairs)
    below = 1 + (tasks - 1) * cosine
    return np.where(np.abs(below) > 1e-12, tasks * cosine / np.where(below == 0, 1.0, below), 0.0)
