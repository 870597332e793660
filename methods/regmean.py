"""Merge linear layers so that their outputs stay as near as may be to the experts' own (RegMean).

>>> from mergectl import merge_weights
>>> import torch
>>> base = {"w.weight": torch.zeros(1, 2)}
>>> experts = {"a": {"w.weight": torch.tensor([[2.0, 0.0]])}, "b": {"w.weight": torch.tensor([[0.0, 4.0]])}}
>>> moments = {"a": [[3.0, 1.0], [1.0, 1.0]], "b": [[1.0, 0.0], [0.0, 1.0]]}
>>> grams = {"grams": {task: {"w.weight": torch.tensor(moment)} for task, moment in moments.items()}}
>>> w = merge_weights("regmean", base, experts, supplies=grams)["w.weight"]  # solve [[4, 1], [1, 2]] w = [6, 2 + 4]
>>> [round(v, 4) for v in w[0].tolist()]
[0.8571, 2.5714]
>>> w = merge_weights("regmean", base, experts, supplies=grams, off_diagonal=0.0)["w.weight"]  # 3 * 2 / 4, 4 / 2
>>> w[0].tolist()
[1.5, 2.0]

With G the second moment of a layer's inputs on each task, W = (sum G)^-1 sum G W_t, taken as a correction of the mean
of the experts: equal experts, and equal moments, then give the mean to the last digit. Every other weight is averaged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import torch

from mergectl.methods import _kernels
from mergectl.methods._contract import Between, Merged, MethodError
from mergectl.methods._moments import Gram, is_transposed, moment_of

if TYPE_CHECKING:
    from mergectl.methods._task_vectors import TaskVectors

TITLE = "RegMean"
PAPER = "arXiv:2212.09849"
NEUTRAL: dict[str, float] = {}

_RIDGE = 1e-6  # of the mean diagonal entry, added where the moments are singular
_NOISE = 100  # times the precision of the moments: a smaller share of an input that no others explain is rounding


def merge(
    experts: TaskVectors,
    grams: Mapping[str, Mapping[str, Gram | torch.Tensor]],
    linears: Mapping[str, bool] | None = None,
    *,
    off_diagonal: Annotated[float, Between(0.0, 1.0), "factor on the moments' entries off the diagonal"] = 1.0,
) -> Merged:
    """Yield each linear weight solved from the moments, and the mean of any other weight."""
    lacking = [task for task in experts.tasks if task not in grams]
    if lacking:
        raise MethodError(f"There are no grams for the task '{lacking[0]}', only for {', '.join(grams) or 'none'}.")

    def merged(name: str, x: torch.Tensor) -> torch.Tensor:
        if any(name not in grams[task] for task in experts.tasks):
            return _kernels.mean(x)
        moments = [moment_of(grams[task][name]) for task in experts.tasks]
        for task, moment in zip(experts.tasks, moments, strict=True):
            if not math.isfinite(float(moment.sum(dtype=torch.float64))):
                raise MethodError(f"The grams of '{name}' on the task '{task}' hold NaN or infinity.")
        if is_transposed(name, x.shape[1:], len(moments[0]), linears):
            return solved(x, moments, off_diagonal)
        return solved(x.transpose(1, 2), moments, off_diagonal).t()

    return experts.each(merged)


def solved(x: torch.Tensor, moments: Sequence[torch.Tensor], off_diagonal: float) -> torch.Tensor:
    """Return (sum G)^-1 sum G W for weights [task, in, out], as the mean and what it lacks."""
    mean = x.double().mean(0)
    left, right = torch.zeros(len(mean), len(mean)).to(mean), torch.zeros_like(mean)
    for weight, moment in zip(x, moments, strict=True):
        given = moment.to(mean)
        scaled = (given * off_diagonal).diagonal_scatter(given.diagonal())
        left += scaled
        right.addmm_(scaled, weight.double() - mean)
    noise = _NOISE * max(torch.finfo(moment.dtype).eps for moment in moments)
    return mean.add_(solve(left, right, noise)).to(x.dtype)


def solve(left: torch.Tensor, right: torch.Tensor, noise: float) -> torch.Tensor:
    """Solve a positive system, with the least ridge under which it is regular; an empty one by nothing."""
    step = _RIDGE * float(left.diagonal().mean())
    if step <= 0:
        return torch.zeros_like(right)
    while True:
        factor, failed = torch.linalg.cholesky_ex(left)
        if not failed and not bool((factor.diagonal().square() < noise * left.diagonal()).any()):
            return torch.cholesky_solve(right, factor)
        left.diagonal().add_(step)
        step *= 9  # the sum of all ridges grows tenfold
