"""Keep of the summed task vectors the entries that several tasks need by their own masks (Consensus TA).

>>> from mergectl import merge_weights
>>> import torch
>>> base = {"w": torch.zeros(3)}
>>> experts = {"a": {"w": torch.tensor([1.0, 4.0, 0.0])}, "b": {"w": torch.tensor([3.0, 1.0, 2.0])}}
>>> # a's are the entries above 0.3 times those of the rest: 1 > 0.9, 4 > 0.3; b's: 3 > 0.3, 2 > 0, but not 1 > 1.2
>>> merge_weights("consensus", base, experts, mask_threshold=0.3, min_tasks=2, scale=0.5)["w"].tolist()
[2.0, 0.0, 0.0]

A task's mask is that of TALL-masks (`tall_mask`). With `min_tasks=0` it is task arithmetic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch

from mergectl.methods import _kernels
from mergectl.methods._contract import Between, Merged, PerTask, Split
from mergectl.methods.tall_mask import own_entries

if TYPE_CHECKING:
    from mergectl.methods._task_vectors import TaskVectors

TITLE = "Consensus TA"
PAPER = "arXiv:2405.07813"
NEUTRAL = {"scale": Split(1.0), "min_tasks": 0}
LINEAR = ("scale",)
BLOCKS = True


def merge(
    task_vectors: TaskVectors,
    *,
    scale: Annotated[float, Between(-10.0, 10.0, search=(0.1, 1.0)), "factor on the sum of task vectors"] = 0.3,
    mask_threshold: Annotated[
        PerTask, Between(0.0, 10.0, search=(0.2, 0.6)), "a task's own is what exceeds this times the other tasks' sum"
    ] = 0.4,
    min_tasks: Annotated[int, Between(0, 1000, search=(1, 3)), "least number of tasks that need an entry"] = 2,
) -> Merged:
    """Yield for each weight the sum of task vectors where enough tasks need it."""
    thresholds = _kernels.per_task(mask_threshold, len(task_vectors.tasks))

    def agreed(name: str, x: torch.Tensor) -> torch.Tensor:
        total, masks = own_entries(x, thresholds)
        return torch.where(masks.sum(0) >= min_tasks, scale * total, 0).float()

    yield from task_vectors.each(agreed)
