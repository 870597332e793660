"""Drop entries of each task vector at random, small ones more often, and rescale the rest (DELLA's MAGPRUNE).

>>> from mergectl import merge_weights
>>> import torch
>>> base, expert = {"w": torch.zeros(2000, 3)}, {"w": torch.tensor([[1.0, -2.0, 3.0]]).repeat(2000, 1)}
>>> # magnitudes ranked within each row are kept with probabilities 0.25, 0.5, 0.75, and then divided by them
>>> w = merge_weights("della_linear", base, {"a": expert}, keep=0.5, epsilon=0.25, scale=1.0)["w"]
>>> [sorted(set(column)) for column in w.T.tolist()]
[[0.0, 4.0], [-4.0, 0.0], [0.0, 4.0]]
>>> [round(20 * float(share)) / 20 for share in (w != 0).float().mean(0)]
[0.25, 0.5, 0.75]

mergekit calls `keep` density. A tensor of one dimension is one row; the only entry of a row is kept by `keep`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import torch

from mergectl.methods import _kernels, _more_kernels
from mergectl.methods._contract import Beside, Between, MethodError, OneOf, PerTask, Rng

if TYPE_CHECKING:
    from mergectl.methods._task_vectors import TaskVectors

BLOCKS = "rows"  # some rows at a time are enough: the lab may hand over weights in such blocks
TITLE = "DELLA-Merging"
PAPER = "arXiv:2406.11617"
NEUTRAL = {"keep": 1.0}
PRESETS: dict[str, dict[str, Any]] = {
    "della": {"method": "ties", "trim": "none", "zero_sign": "zero"},
    "della_linear": {"method": "task_arithmetic"},
}


def refine(
    task_vectors: TaskVectors,
    rng: Rng,
    *,
    keep: Annotated[PerTask, Between(0.0, 1.0, search=(0.2, 0.8)), "mean share of entries kept; 1 keeps all"] = 0.5,
    epsilon: Annotated[PerTask, Between(0.0, 0.5, search=(0.0, 0.19)), "largest entries have keep + this"] = 0.15,
    rescale: Annotated[bool, "rescale what is left"] = True,
    rescale_to: Annotated[
        str, OneOf(["expected", "l1"]), Beside("rescale", (True,)), "keep the expected value, or the sum of magnitudes"
    ] = "expected",
) -> TaskVectors:
    """Return task vectors with entries dropped by a chance that falls with their rank in their row."""
    tasks = len(task_vectors.tasks)
    keeps, widths = _kernels.per_task(keep, tasks), _kernels.per_task(epsilon, tasks)
    for share, width in zip(keeps, widths, strict=True):
        if share not in (0.0, 1.0) and not 0 < share - width <= share + width < 1:
            raise MethodError(f"keep - epsilon and keep + epsilon must lie inside 0 to 1, got {share} and {width}.")

    def drop_entries(name: str, x: torch.Tensor) -> torch.Tensor:
        rows = []
        for task, row, share, width in zip(task_vectors.tasks, x, keeps, widths, strict=True):
            if share in (0.0, 1.0):
                rows.append(row * share)
                continue
            odds = probabilities(row, share, width)
            kept = _kernels.chosen(rng(task, name), odds.cpu(), row.shape).to(row).mul_(row)
            rows.append((kept / odds).to(row.dtype) if rescale and rescale_to == "expected" else kept)
        return torch.stack(rows)

    rest = task_vectors.map(drop_entries)
    return _more_kernels.to_mass(rest, task_vectors) if rescale and rescale_to == "l1" else rest


def probabilities(x: torch.Tensor, keep: float, epsilon: float) -> torch.Tensor:
    """Return each entry's probability to be kept: linear in its rank, keep - epsilon to keep + epsilon."""
    length = x.shape[-1] if x.dim() else 1
    if length == 1:
        return torch.full(x.shape, keep, dtype=torch.float64, device=x.device)
    return keep - epsilon + 2 * epsilon / (length - 1) * _more_kernels.ranks(x).double()
