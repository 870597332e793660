"""Sum the task vectors and keep for each task a mask on the sum: the entries that are its own (TALL-masks).

>>> from mergectl import merge_weights
>>> import torch
>>> base = {"w": torch.zeros(3)}
>>> experts = {"a": {"w": torch.tensor([1.0, 4.0, 0.0])}, "b": {"w": torch.tensor([3.0, 1.0, 2.0])}}
>>> merged = merge_weights("tall_mask", base, experts, mask_threshold=[0.3, 0.5], scale=0.5)
>>> merged.kept["unified"]["w"].tolist()
[2.0, 2.5, 1.0]
>>> merged.kept["masks"]["a"]["w"].tolist()  # 1 > 0.3 * 3, 4 > 0.3 * 1, not 0 > 0.3 * 2
[True, True, False]
>>> merged.task("b")["w"].tolist()  # 3 > 0.5 * 1, not 1 > 0.5 * 4, 2 > 0
[2.0, 0.0, 1.0]

An entry is a task's own where |tau_i| > mask_threshold * |sum - tau_i|; the scale does not change the masks.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import torch

from mergectl.methods import _kernels
from mergectl.methods._contract import Between, PerTask, Split

if TYPE_CHECKING:
    from mergectl.methods._task_vectors import TaskVectors

TITLE = "TALL-masks"
PAPER = "arXiv:2405.07813"
NEUTRAL = {"scale": Split(1.0)}  # three copies exceed 0.4 times the other two, so all is their own
BLOCKS = True
EXTRA_BITS = 1


def merge(
    task_vectors: TaskVectors,
    *,
    scale: Annotated[float, Between(-10.0, 10.0, search=(0.1, 1.5)), "factor on the sum of task vectors"] = 1.0,
    mask_threshold: Annotated[
        PerTask, Between(0.0, 10.0, search=(0.2, 0.6)), "a task's own is what exceeds this times the other tasks' sum"
    ] = 0.4,
) -> Generator[tuple[str, torch.Tensor, torch.Tensor], None, dict[str, Any]]:
    """Yield for each weight the sum of task vectors and the tasks' masks."""
    tasks = len(task_vectors.tasks)
    thresholds = _kernels.per_task(mask_threshold, tasks)

    def mask(name: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total, masks = own_entries(x, thresholds)
        return (scale * total).float(), masks

    yield from task_vectors.each(mask)
    return {"rescalers": torch.ones(tasks, dtype=torch.float64)}


def own_entries(x: torch.Tensor, thresholds: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum over tasks in float64, and where each task's entry is its own, [task, *shape]."""
    total = _kernels.total(x)
    masks = [row.abs() > limit * (total - row).abs() for row, limit in zip(x, thresholds, strict=True)]
    return total, torch.stack(masks)
