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

from typing import TYPE_CHECKING, Annotated

import numpy as np

from mergectl.methods import _kernels, _more_kernels
from mergectl.methods._contract import Between, Merged

if TYPE_CHECKING:
    import torch

    from mergectl.methods._task_vectors import TaskVectors

TITLE = "SCE (select, calculate, erase)"
PAPER = "arXiv:2408.07990"
NEUTRAL = {"density": 1.0}


def merge(
    task_vectors: TaskVectors,
    *,
    density: Annotated[float, Between(0.0, 1.0, search=(0.05, 1.0)), "share of each weight's entries selected"] = 1.0,
) -> Merged:
    """Yield for each weight the mean of agreeing entries, each task weighted by its mean square."""
    for name, x in task_vectors.items():
        chosen = x if density >= 1 or x.numel() == 0 else select(x, density)
        energies = [float(np.square(_more_kernels.flat(row)).sum()) for row in chosen]
        largest = max(energies) or 1.0
        weights = [energy / largest for energy in energies]
        sign = _kernels.elect_by_mass(chosen)
        sign = sign.where(sign != 0, 1.0)  # a drawn vote counts as +
        yield name, weighted(chosen, weights, sign)


def select(x: torch.Tensor, density: float) -> torch.Tensor:
    """Zero all but the share of entries with the largest variance over the tasks."""
    centre = _kernels.total(x) / len(x)
    variance = _kernels.total((x - centre) ** 2)
    count = max(1, _kernels.count_share(density, variance.numel())) if density > 0 else 0
    if count == 0:
        return x * 0
    row = _more_kernels.flat(variance)
    floor = float(np.partition(row, len(row) - count)[len(row) - count])
    return x.where(variance >= floor, 0)


def weighted(x: torch.Tensor, weights: list[float], sign: torch.Tensor) -> torch.Tensor:
    """Return the weighted mean of the entries that have the sign."""
    spread = x * _kernels.column(weights, x)
    return _more_kernels.weighted_agreeing_mean(spread, weights, sign)
