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

BLOCKS = True  # a block at a time is enough: the lab may hand over weights in blocks
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
    windows: dict[str, tuple[list[int], list[int], list[list[_more_kernels.Edge]]]] = {}
    for part in task_vectors.by_weight():
        d = part.numel
        counts = [min(d, max(1, _kernels.count_share(share, d))) if share > 0 else 0 for share in keeps]
        skips = [min(_kernels.count_share(top, d), d - count) for top, count in zip(gammas, counts, strict=True)]
        windows.update(dict.fromkeys(part, (skips, counts, _more_kernels.edges(part, skips, counts))))

    def middle(name: str, x: torch.Tensor) -> torch.Tensor:
        skips, counts, ends = windows[name]
        rows = [_more_kernels.within(name, *one) for one in zip(x, ends, skips, counts, strict=True)]
        return torch.stack(rows)

    rest = task_vectors.map(middle)
    return _more_kernels.to_mass(rest, task_vectors) if rescale else rest
