"""Drop both the largest and the smallest entries of each task vector, weight by weight (Model Breadcrumbs).

>>> from mergectl import merge_weights
>>> import torch
>>> base, expert = {"w": torch.zeros(5)}, {"w": torch.tensor([1.0, -9.0, 2.0, -3.0, 4.0])}
>>> # without the largest fifth (-9), the next two fifths: 4 and -3; the smallest two go
>>> merge_weights("breadcrumbs", base, {"a": expert}, keep=0.4, gamma=0.2, scale=0.5)["w"].tolist()
[0.0, 0.0, 0.0, -1.5, 2.0]

mergekit calls `keep` density. As there, `keep` comes first: where it leaves too little room, fewer of the largest go.
Unlike there, a small tensor is never emptied: at least one entry stays, and dropping none of the largest drops none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import torch

from mergectl.methods import _kernels, _more_kernels
from mergectl.methods._contract import Between, PerTask

if TYPE_CHECKING:
    from mergectl.methods._task_vectors import TaskVectors

TITLE = "Model Breadcrumbs"
PAPER = "arXiv:2312.06795"
NEUTRAL = {"keep": 1.0}
PRESETS: dict[str, dict[str, Any]] = {
    "breadcrumbs": {"method": "task_arithmetic"},
    "breadcrumbs_ties": {"method": "ties", "trim": "none", "zero_sign": "zero"},
}


def refine(
    task_vectors: TaskVectors,
    *,
    keep: Annotated[PerTask, Between(0.0, 1.0, search=(0.05, 1.0)), "share of each weight's entries kept"] = 0.15,
    gamma: Annotated[PerTask, Between(0.0, 1.0, search=(0.0, 0.05)), "share of the largest entries dropped"] = 0.01,
    rescale: Annotated[bool, "scale the rest to the weight's own sum of magnitudes"] = False,
) -> TaskVectors:
    """Return task vectors that keep a middle range of magnitudes in every weight."""
    tasks = len(task_vectors.tasks)
    keeps, gammas = _kernels.per_task(keep, tasks), _kernels.per_task(gamma, tasks)

    def middle(row: torch.Tensor, share: float, top: float) -> torch.Tensor:
        count = max(1, _kernels.count_share(share, row.numel())) if share > 0 else 0
        kept = _more_kernels.keep_ranks(row, min(_kernels.count_share(top, row.numel()), row.numel() - count), count)
        return _more_kernels.to_mass(kept, row) if rescale else kept

    return task_vectors.map(
        lambda name, x: torch.stack([middle(*one) for one in zip(x, keeps, gammas, strict=True)]) if x.numel() else x
    )
