"""Keep each task's top singular components and make them orthonormal to those of the other tasks (TSV-Merge).

>>> from mergectl import merge_weights
>>> import torch
>>> base = {"w": torch.zeros(2, 2)}
>>> experts = {"a": {"w": torch.diag(torch.tensor([4.0, 1.0]))}, "b": {"w": torch.diag(torch.tensor([1.0, 2.0]))}}
>>> # of rank 2 each of two tasks keeps one component: 4 at the first place, 2 at the second; they do not meet
>>> merge_weights("tsv_m", base, experts, scale=0.5)["w"].round(decimals=4).abs().tolist()
[[2.0, 0.0], [0.0, 1.0]]

For a weight [rows, columns] of full rank r, task i keeps the first k components of U_i diag(s_i) V_i^T; the result is
polar([U_1 .. U_K]) diag([s_1 .. s_K]) polar([V_1; ..; V_K]), where polar gives the nearest matrix with orthonormal
columns or rows. Weights that are not decomposed get the mean of the task vectors. Components of a task vector of lower
rank that are only rounding are left out, so that their directions, which mean nothing, do not turn those of others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import torch

from mergectl.methods import _kernels, _spectral
from mergectl.methods._contract import Between, Merged, PerTask, Remember

if TYPE_CHECKING:
    from mergectl.methods._task_vectors import TaskVectors

TITLE = "TSV-Merge"
PAPER = "arXiv:2412.00081"
NEUTRAL = {"rank_ratio": 1.0}
LINEAR = ("scale",)


def merge(
    task_vectors: TaskVectors,
    linears: Mapping[str, bool] | None = None,
    remember: Remember | None = None,
    *,
    scale: Annotated[PerTask, Between(-10.0, 10.0, search=(0.2, 2.0)), "factor on each task vector"] = 1.0,
    rank_ratio: Annotated[
        float | None, Between(0.0, 1.0, low_open=True, search=(0.01, 1.0)), "share of components kept per task (1/K)"
    ] = None,
    min_rank: Annotated[int, Between(0, 64), "least number of components kept per task"] = 1,
    decompose: _spectral.Decompose = "linear",
) -> Merged:
    """Yield for each weight the decorrelated sum of truncated task vectors, or the mean of task vectors."""
    tasks, remember = task_vectors.tasks, remember or _spectral.plainly
    names = _spectral.decomposed(decompose, linears, task_vectors)
    scales = _kernels.per_task(scale, len(tasks))

    def combine(name: str, x: torch.Tensor) -> torch.Tensor:
        if name not in names:
            return _kernels.weighted_total(x, [factor / len(tasks) for factor in scales])
        counts = _spectral.ranks(rank_ratio, min(x.shape[1:]), len(tasks), min_rank)
        parts = _spectral.factors_of_tasks(remember, name, tasks, x.__getitem__, "", str(x.device))
        return _spectral.decorrelated(parts, counts, scales)

    yield from task_vectors.each(combine)
