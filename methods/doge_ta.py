"""Learn one shared change that lets task vectors conflict less, then add up their largest entries (DOGE TA).

>>> from mergectl import merge_weights
>>> import torch
>>> base = {"w": torch.zeros(2, 2)}
>>> experts = {"a": {"w": torch.tensor([[3.0, 0.0], [0.0, 4.0]])}, "b": {"w": torch.tensor([[0.0, 2.0], [0.0, 0.0]])}}
>>> # lengths 5 and 2, so 0.2 and 0.5 of them are added; nothing is learned yet, and each keeps all of its entries
>>> merged = merge_weights("doge_ta", base, experts, eta=1.0, iterations=0, density=1.0)
>>> merged["w"].round(decimals=4).tolist()
[[0.6000000238418579, 1.0], [0.0, 0.800000011920929]]
>>> # agreeing with its own task grows with every entry that is not zero, so a step of Adam adds 0.5 to all but one
>>> # a keeps two entries (density 1/4 and one more): 0.2 * 3.5, 0.2 * 4.5; b's second is 0, so it keeps all: 0.5 * 0.5
>>> merged = merge_weights("doge_ta", base, experts, eta=1.0, iterations=1, learning_rate=0.5, density=0.25)
>>> merged["w"].round(decimals=4).tolist()
[[0.949999988079071, 1.25], [0.0, 1.149999976158142]]

W = W0 + sum_i l_i mask_i * (tau_i + D) with l_i = eta / ||tau_i||, a number per task and weight; mask_i keeps the
largest entries of each task over all decomposed weights. D minimises sum_i sum_rows (sum_columns tau_i * (tau_i -
sum_j l_j (tau_j + D)))^2 by Adam from 0, its gradient without the part in the subspace that the top singular vectors
of all tasks share: the first r / subspace left singular vectors of r / K of each task. Other weights stay the base's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import torch

from mergectl.methods import _descent, _kernels, _spectral
from mergectl.methods._contract import Between, Merged, Remember

if TYPE_CHECKING:
    from mergectl.methods._task_vectors import TaskVectors

TITLE = "DOGE TA"
PAPER = "arXiv:2501.01230"
NEUTRAL = None  # every task vector is scaled to the length eta


def merge(
    task_vectors: TaskVectors,
    linears: Mapping[str, bool] | None = None,
    remember: Remember | None = None,
    *,
    eta: Annotated[float, Between(0.0, 100.0, search=(0.01, 0.5)), "length to which task vectors are scaled"] = 0.07,
    density: Annotated[float, Between(0.0, 1.0, search=(0.05, 1.0)), "share of largest entries kept per task"] = 0.3,
    subspace: Annotated[int, Between(1, 10_000), "one in so many directions is left unchanged"] = 6,
    iterations: Annotated[int, Between(0, 100_000), "steps of Adam"] = 400,
    learning_rate: Annotated[
        float, Between(0.0, 1.0, low_open=True, search=(1e-5, 1e-3)), "step size, in units of the weights"
    ] = 1e-4,
    decompose: _spectral.Decompose = "linear",
) -> Merged:
    """Yield for each decomposed weight the sum of largest entries with the change; nothing for others."""
    names = _spectral.decomposed(decompose, linears, task_vectors)
    merged = task_vectors.only(names)
    # one more than the share, as the published program keeps them
    floors = merged.kth_magnitude([int(density * merged.numel) + 1] * len(task_vectors.tasks))
    remembered = remember or _spectral.plainly

    def add_up(name: str, x: torch.Tensor) -> torch.Tensor:
        if name not in names:
            return torch.zeros_like(x[0])
        stored = x.mT if names[name] else x  # [task, out, in]
        scales = [eta / length if length > 0 else 0.0 for length in (float(row.double().norm()) for row in x)]
        parts = _spectral.factors_of_tasks(remembered, name, task_vectors.tasks, x.__getitem__, "", str(x.device))
        gradient = slope(stored, scales, shared_directions([p.turned(names[name]) for p in parts], subspace))
        change = _descent.descend(torch.zeros_like(stored[0]), gradient, iterations, learning_rate)
        return total_of_largest(x, scales, floors, change.mT if names[name] else change)

    yield from task_vectors.each(add_up)


def shared_directions(parts: Sequence[_spectral.Factors], subspace: int) -> torch.Tensor:
    """Return the first of `subspace` parts of the directions that the tasks' top components span, [number, out]."""
    full = len(parts[0].values)
    rows = _spectral.joined([_spectral.present(part.top(full // len(parts))) for part in parts]).left.double()
    values, vectors = torch.linalg.eigh(rows @ rows.mT)
    top = values.flip(0)[: full // subspace].clamp(min=torch.finfo(torch.float64).tiny)
    found: torch.Tensor = (vectors.flip(1)[:, : len(top)] * top.rsqrt()).mT @ rows
    return found.float()


def slope(x: torch.Tensor, scales: Sequence[float], shared: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the gradient of the conflict of task vectors [task, out, in] with respect to the change."""
    total, weight = _kernels.weighted_total(x, scales), sum(scales)
    rows = x.transpose(0, 1).contiguous()  # [out, task, in]: per output row a small matrix, read twice in every step
    start = torch.stack([(row * (row - total)).sum(1) for row in x], dim=1).unsqueeze(2)

    def gradient(change: torch.Tensor) -> torch.Tensor:
        residues = torch.baddbmm(start, rows, change.unsqueeze(2), alpha=-weight)
        found = torch.bmm(rows.mT, residues).squeeze(2).mul_(-2 * weight)
        return found.sub_(shared.mT @ (shared @ found))

    return gradient


def total_of_largest(
    x: torch.Tensor, scales: Sequence[float], floors: Sequence[float], change: torch.Tensor
) -> torch.Tensor:
    """Return the weighted sum over tasks of changed task vectors where these were large enough."""
    result = torch.zeros_like(x[0])
    for row, scale, floor in zip(x, scales, floors, strict=True):
        result.add_(torch.where(row.abs() >= floor, row + change, 0), alpha=scale)
    return result
