"""Move the summed task vectors to where they disturb each task's inputs least, found by descent (WUDI-Merging).

>>> from mergectl import merge_weights
>>> import torch
>>> base = {"w": torch.zeros(1, 2)}
>>> experts = {"a": {"w": torch.tensor([[2.0, 0.0]])}, "b": {"w": torch.tensor([[1.0, 1.0]])}}
>>> # the sum [3, 1] exceeds a by [1, 1], of which a sees the first entry, and b by [2, 0], of which b sees [1, 1]
>>> # the gradient [2, 0] + [2, 2] points up in both entries, so a first step of Adam goes down by 0.1 in both
>>> merged = merge_weights("wudi", base, experts, iterations=1, learning_rate=0.1)
>>> merged["w"].round(decimals=4).tolist()
[[2.9000000953674316, 0.8999999761581421]]

Minimises sum_i ||(x - tau_i) tau_i^T||^2 / ||tau_i||^2 over x, [out, in], from x = sum_i tau_i by Adam: the gradient is
2 (x A - B) with A = sum_i tau_i^T tau_i / ||tau_i||^2 and B = sum_i tau_i tau_i^T tau_i / ||tau_i||^2. The step size is
absolute, so the result depends on the size of the weights. Weights that are not decomposed get the mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import torch

from mergectl.methods import _descent, _kernels, _spectral
from mergectl.methods._contract import Between, Merged

if TYPE_CHECKING:
    from mergectl.methods._task_vectors import TaskVectors

TITLE = "WUDI-Merging"
PAPER = "arXiv:2503.08099"
NEUTRAL = None  # the descent begins at the sum, and its step size does not know how far it has to go


def merge(
    task_vectors: TaskVectors,
    linears: Mapping[str, bool] | None = None,
    *,
    iterations: Annotated[int, Between(0, 100_000, search=(100, 1000)), "steps of Adam"] = 300,
    learning_rate: Annotated[
        float, Between(0.0, 1.0, low_open=True, search=(1e-6, 1e-4)), "step size, in units of the weights"
    ] = 1e-5,
    decompose: _spectral.Decompose = "linear",
) -> Merged:
    """Yield for each weight the sum after its descent, or the mean of task vectors."""
    names = _spectral.decomposed(decompose, linears, task_vectors)

    def settle(name: str, x: torch.Tensor) -> torch.Tensor:
        if name not in names:
            return _kernels.mean(x)
        stored = x.mT if names[name] else x  # [task, out, in]
        inputs, wanted = _inputs(stored)
        start = _kernels.total(stored).float()
        merged = _descent.descend(start, lambda y: (y @ inputs).sub_(wanted).mul_(2), iterations, learning_rate)
        return merged.mT if names[name] else merged

    yield from task_vectors.each(settle)


def _inputs(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what stands for the inputs of all tasks, [in, in], and what the tasks' own weights make of it."""
    inputs, wanted = x.new_zeros(x.shape[-1], x.shape[-1]), torch.zeros_like(x[0])
    for row in x:
        own = row.mT @ row / max(float(row.double().square().sum()), torch.finfo(torch.float32).tiny)
        inputs += own
        wanted += row @ own
    return inputs, wanted
