"""Move every entry of the base towards one expert's by at most t (NearSwap).

>>> from mergectl import merge_weights
>>> import torch
>>> base, expert = {"w": torch.tensor([1.0, 1.0, 1.0])}, {"w": torch.tensor([1.25, 3.0, -1.0])}
>>> merge_weights("nearswap", base, {"a": expert}, t=0.5)["w"].tolist()  # 0.25 away: taken; 2 away: half a unit on
[1.25, 1.5, 0.5]

As published: weight min(t / |difference|, 1) for the expert, which is the difference cut off at t.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from mergectl.methods._contract import Between, Merged

if TYPE_CHECKING:
    from mergectl.methods._task_vectors import TaskVectors

TITLE = "NearSwap"
PAPER = "huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001"
NEUTRAL = {"t": 10.0}
EXPERTS = (1, 1)
BLOCKS = True  # element by element: the lab may hand over weights in blocks


def merge(
    task_vectors: TaskVectors,
    *,
    t: Annotated[float, Between(0.0, 10.0, search=(1e-5, 0.1)), "largest change of an entry"] = 1e-4,
) -> Merged:
    """Yield for each weight the task vector with its entries cut off at t."""
    return task_vectors.each(lambda name, x: x[0].clamp(-t, t))
