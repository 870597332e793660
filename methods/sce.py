"""Select entries that vary most over the tasks, weigh tasks by energy, erase outvoted signs (SCE, FuseChat).

>>> from mergectl import merge_weights
>>> import torch
>>> base = {"w": torch.zeros(4)}
>>> experts = {"a": {"w": torch.tensor([1.0, 2.0, -3.0, 1.0])}, "b": {"w": torch.tensor([1.0, 0.0, 1.0, 2.0])}}
>>> # variances 0, 1, 4, 1/4; the two largest stay: [2, -3] and [0, 1], energies 13 and 1; signs + and -
>>> # (13 * 2 + 1 * 0) / (13 + 1) is not it: only who has the sign counts, so 2 and -3 alone
>>> merge_weights("sce", base, experts, density=0.5)["w"].tolist()
[0.0, 2.0, -3.0, 0.0]
>>> w = merge_weights("sce", base, experts)["w"]  # energies 15 and 6: 1, 2 alone, -3 alone, (15 * 1 + 6 * 2) / 21
>>> [round(v, 4) for v in w.tolist()]
[1.0, 2.0, -3.0, 1.2857]

mergekit calls `density` select_topk. Unlike there, at least one entry of a tensor is selected and all that vary as
much as the last one; and energies count by their ratio however small they are.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Annotated

import torch

from mergectl.methods import _kernels, _more_kernels
from mergectl.methods._contract import Between, Merged

if TYPE_CHECKING:
    from mergectl.methods._task_vectors import TaskVectors

TITLE = "SCE (select, calculate, erase)"
PAPER = "arXiv:2408.07990"
NEUTRAL = {"density": 1.0}
BLOCKS = True  # a block at a time is enough: the lab may hand over weights in blocks


def merge(
    task_vectors: TaskVectors,
    *,
    density: Annotated[float, Between(0.0, 1.0, search=(0.05, 1.0)), "share of each weight's entries selected"] = 1.0,
) -> Merged:
    """Yield for each weight the mean of agreeing entries, each task weighted by its mean square."""

    def of_weight(part: TaskVectors) -> Merged:
        chosen = part if density >= 1 else select(part, density)
        energies = chosen.square_norms()
        largest = max(energies) or 1.0
        return chosen.each(functools.partial(weighted, [energy / largest for energy in energies]))

    return task_vectors.per_weight(of_weight)


def select(part: TaskVectors, density: float) -> TaskVectors:
    """Zero all but the share of entries with the largest variance over the tasks."""
    count = max(1, _kernels.count_share(density, part.numel)) if density > 0 else 0
    floor = part.row(lambda name, x: variance(x)).kth_largest([[count]])[0][0]
    return part.map(lambda name, x: x * torch.ge(variance(x), floor, out=torch.empty_like(x[0])))


def variance(x: torch.Tensor) -> torch.Tensor:
    """Return the sum of squared distances from the mean over tasks."""
    centre = _kernels.total(x).div_(len(x))
    return _kernels.total((x - centre).square_()).to(x.dtype)


def weighted(weights: list[float], name: str, x: torch.Tensor) -> torch.Tensor:
    """Return the weighted mean of the entries that have the elected sign; a drawn vote counts as +."""
    sign = _kernels.elect_by_mass(x)
    sign += 1 - sign.abs()
    return _more_kernels.weighted_agreeing_mean(x * _kernels.column(weights, x), weights, sign)
