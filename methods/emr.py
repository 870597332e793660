"""Elect one unified task vector and keep for each task a mask on it and a rescaler (EMR-Merging).

>>> from mergectl import merge_weights
>>> import torch
>>> base = {"w": torch.zeros(3)}
>>> experts = {"a": {"w": torch.tensor([1.0, -2.0, 3.0])}, "b": {"w": torch.tensor([3.0, 1.0, -1.0])}}
>>> merged = merge_weights("emr", base, experts)
>>> merged.kept["unified"]["w"].tolist()  # signs of the means + - +, largest agreeing magnitudes
[3.0, -2.0, 3.0]
>>> merged.kept["masks"]["b"]["w"].tolist()
[True, False, False]
>>> [round(rescaler, 4) for rescaler in merged.kept["rescalers"].values()]  # 6 / (3 + 2 + 3), 5 / 3
[0.75, 1.6667]
>>> merged.task("b")["w"].tolist()
[5.0, 0.0, 0.0]
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch

from mergectl.methods import _fused, _kernels
from mergectl.methods._contract import MergeWarning, OneOf

if TYPE_CHECKING:
    from mergectl.methods._task_vectors import TaskVectors

TITLE = "EMR-Merging"
PAPER = "arXiv:2405.17461"
NEUTRAL: dict[str, str] = {}
BLOCKS = True
EXTRA_BITS = 1  # the mask; besides, one more vector and one number per task

# How much one weight counts: every tensor alike (as in all published figures), or every element alike (as printed).
RESCALERS: dict[str, Callable[[int], float]] = {
    "tensor_mean": lambda elements: 1 / elements,
    "global_sum": lambda elements: 1.0,
}


def merge(
    task_vectors: TaskVectors,
    *,
    rescaler: Annotated[str, OneOf(RESCALERS), "over what the size of a task vector is matched"] = "tensor_mean",
) -> Generator[tuple[str, torch.Tensor, torch.Tensor], None, dict[str, Any]]:
    """Yield for each weight the unified vector and the tasks' masks; return the rescalers."""
    sizes: dict[str, list[tuple[float, float]]] = {}

    def unify(name: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        unified, masks, own, left = united(x)
        share = RESCALERS[rescaler](max(task_vectors.weight_of(name)[1], 1))
        sizes[name] = [(share * whole, share * rest) for whole, rest in zip(own, left, strict=True)]
        return unified, masks

    yield from task_vectors.each(unify)
    tasks = range(len(task_vectors.tasks))
    pairs = [[math.fsum(parts[task][which] for parts in sizes.values()) for which in (0, 1)] for task in tasks]
    for task, (own, left) in zip(task_vectors.tasks, pairs, strict=True):
        if own > 0 and left == 0:
            warnings.warn(
                f"Task '{task}' is outvoted everywhere: its masks are empty, so its model is the base.",
                MergeWarning,
                stacklevel=2,
            )
    return {"rescalers": torch.tensor([own / left if left > 0 else 1.0 for own, left in pairs], dtype=torch.float64)}


def united(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[float], list[float]]:
    """Return the unified vector, the masks, and per task the sums of magnitudes of its own and of the masked vector."""
    if _fused.fits(x):
        unified, masks = torch.empty_like(x[0]), torch.empty_like(x, dtype=torch.bool)
        own, left = np.zeros((2, len(x), _fused.STRETCH))
        _fused.unify(_fused.rows_of(x), unified.view(-1).numpy(), _fused.rows_of(masks), own, left)
        return unified, masks, own.sum(axis=1).tolist(), left.sum(axis=1).tolist()
    unified, agreeing = elect(x)
    masks = _kernels.positive(agreeing)
    return unified, masks, _kernels.row_sums(x.abs()), _kernels.row_sums(agreeing.mul_(unified.abs()))


def elect(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the unified vector, and 1 where a task's entries agree with it; a mean of zero elects minus."""
    elected = _kernels.elect_by_mass(x)
    sign = torch.gt(elected, 0, out=elected).mul_(2).sub_(1)
    agreeing = _kernels.agreeing(x, sign)
    largest = agreeing.amax(dim=0)
    return largest.mul_(sign).add_(0.0), torch.gt(agreeing, 0, out=agreeing)  # + 0.0 turns -0.0 into 0.0
