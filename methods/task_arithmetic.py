"""Add the task vectors, each times a scaling coefficient, to the base.

>>> from mergectl import merge_weights
>>> import torch
>>> base = {"w": torch.tensor([1.0, 1.0])}
>>> experts = {"a": {"w": torch.tensor([3.0, 1.0])}, "b": {"w": torch.tensor([1.0, -3.0])}}
>>> merge_weights("task_arithmetic", base, experts, scale=0.5)["w"].tolist()  # 1 + 0.5 * 2, 1 - 0.5 * 4
[2.0, -1.0]
>>> merge_weights("task_arithmetic", base, experts, scale={"a": 1.0, "b": 0.25})["w"].tolist()
[3.0, 0.0]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from mergectl.methods import _kernels
from mergectl.methods._contract import Between, Merged, PerTask, Split

if TYPE_CHECKING:
    from mergectl.methods._task_vectors import TaskVectors

TITLE = "Task arithmetic"
PAPER = "arXiv:2212.04089"
NEUTRAL = {"scale": Split(1.0)}
BLOCKS = True  # element by element: the lab may hand over weights in blocks
LINEAR = ("scale",)


def merge(
    task_vectors: TaskVectors,
    *,
    scale: Annotated[PerTask, Between(-10.0, 10.0, search=(0.0, 1.2)), "scaling coefficient of the task vectors"] = 0.4,
) -> Merged:
    """Yield for each weight the scaled sum of the task vectors."""
    scales = _kernels.per_task(scale, len(task_vectors.tasks))
    return task_vectors.each_sum(lambda name, rows: _kernels.weighted_total(rows, scales))
