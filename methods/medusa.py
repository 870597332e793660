"""Take the mean of the entries that agree with the sign of their sum, without trimming.

>>> from mergectl import merge_weights
>>> import torch
>>> base = {"w": torch.zeros(3)}
>>> experts = {"a": {"w": torch.tensor([1.0, -2.0, 3.0])}, "b": {"w": torch.tensor([3.0, 1.0, -3.0])}}
>>> merge_weights("medusa", base, experts, scale=0.5)["w"].tolist()  # (1 + 3) / 2, -2 alone, a draw
[1.0, -1.0, 0.0]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from mergectl.methods import _elections
from mergectl.methods._contract import Between, Merged

if TYPE_CHECKING:
    from mergectl.methods._task_vectors import TaskVectors

TITLE = "Medusa (elected mean)"
PAPER = "github.com/PKU-ASE-RISE/medusa"
NEUTRAL: dict[str, float] = {"scale": 1.0}
BLOCKS = True  # element by element: the lab may hand over weights in blocks
LINEAR = ("scale",)


def merge(
    task_vectors: TaskVectors,
    *,
    scale: Annotated[float, Between(-10.0, 10.0, search=(0.3, 2.5)), "scaling coefficient of the merged vector"] = 1.0,
) -> Merged:
    """Yield for each weight the mean of the entries that agree with the elected sign."""
    everybody = _elections.Voters([-1.0] * len(task_vectors.tasks))
    return task_vectors.each(lambda name, x: _elections.agreed(x, everybody).mul_(scale))
