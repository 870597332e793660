"""Average the experts element by element, each weighted by its diagonal Fisher information.

>>> from mergectl import merge_weights
>>> import torch
>>> base = {"w": torch.zeros(2)}
>>> experts = {"a": {"w": torch.tensor([2.0, 1.0])}, "b": {"w": torch.tensor([4.0, 5.0])}}
>>> fishers = {"fishers": {"a": {"w": torch.tensor([3.0, 0.0])}, "b": {"w": torch.tensor([1.0, 0.0])}}}
>>> w = merge_weights("fisher", base, experts, supplies=fishers, normalize=False)["w"]  # (3 * 2 + 4) / 4, (1 + 5) / 2
>>> [round(v, 4) for v in w.tolist()]
[2.5, 3.0]
>>> given = {"coefficient": [1.0, 2.0], "epsilon": 0.5}  # the norms are 3 and 1: a counts 1 / 3.5, b 2 / 1.5
>>> w = merge_weights("fisher", base, experts, supplies=fishers, **given)["w"]  # (1 * 2 + 2 * 4) / (1 + 2), ...
>>> [round(v, 4) for v in w.tolist()]
[3.3333, 4.2941]

With F the information of a task about each element: the sum of a (F + epsilon) W over tasks, divided by the sum of
a (F + epsilon). Where nothing is known of a weight, its F is 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import torch

from mergectl.methods import _kernels, _more_kernels
from mergectl.methods._contract import Between, Merged, MethodError, PerTask, Weights

if TYPE_CHECKING:
    from mergectl.methods._task_vectors import TaskVectors

TITLE = "Fisher merging"
PAPER = "arXiv:2111.09832"
NEUTRAL: dict[str, float] = {}


def merge(
    experts: TaskVectors,
    fishers: Mapping[str, Weights],
    *,
    coefficient: Annotated[PerTask, Between(0.0, 100.0, search=(0.1, 1.0)), "weight of each expert"] = 1.0,
    normalize: Annotated[bool, "divide each expert's weight by the norm of its information"] = True,
    epsilon: Annotated[float, Between(0.0, 1.0, low_open=True), "least information about an element"] = 1e-6,
) -> Merged:
    """Yield for each weight the experts' mean, weighted by their information."""
    lacking = [task for task in experts.tasks if task not in fishers]
    if lacking:
        raise MethodError(f"There are no fishers for the task '{lacking[0]}', only for {', '.join(fishers) or 'none'}.")
    given = [fishers[task] for task in experts.tasks]
    factors = _kernels.per_task(coefficient, len(given))
    if normalize:
        norms = [norm + epsilon for norm in norms_of(experts, given)]
        factors = [a * min(norms) / norm for a, norm in zip(factors, norms, strict=True)]
    parts = _more_kernels.shares(factors, "coefficients")
    return experts.each(lambda name, x: weighted_mean(x, [of_task(own, name, x) for own in given], parts, epsilon))


def of_task(own: Weights, name: str, x: torch.Tensor) -> torch.Tensor | None:
    """Return one task's information about a weight, None if there is none; that of another shape is refused."""
    if name not in own:
        return None
    found = own[name]
    if found.shape != x.shape[1:]:
        raise MethodError(f"The fishers of '{name}' have shape {list(found.shape)}, the weight {list(x.shape[1:])}.")
    return found


def norms_of(experts: TaskVectors, fishers: Sequence[Weights]) -> list[float]:
    """Return the norm of each task's information about all weights that are merged."""
    squares = ([float(own[name].double().square().sum()) for name in experts if name in own] for own in fishers)
    return [math.sqrt(math.fsum(found)) for found in squares]


def weighted_mean(
    x: torch.Tensor, fishers: Sequence[torch.Tensor | None], factors: Sequence[float], epsilon: float
) -> torch.Tensor:
    """Return the sum of factor (F + epsilon) x over tasks, divided by that of factor (F + epsilon)."""
    above = torch.zeros(x.shape[1:], dtype=torch.float64, device=x.device)
    below = torch.zeros_like(above)
    for row, known, factor in zip(x, fishers, factors, strict=True):
        weight = torch.full_like(above, epsilon) if known is None else known.to(above) + epsilon
        below.add_(weight, alpha=factor)
        above.addcmul_(weight, row.double(), value=factor)
    return above.div_(below).to(x.dtype)
