"""Hand on the one model's weights, times a scale: for stacks of layers (frankenmerges, depth up-scaling).

>>> from mergectl import merge_weights
>>> import torch
>>> merge_weights("passthrough", None, {"a": {"w": torch.tensor([2.0, -4.0])}}, scale=0.5)["w"].tolist()
[1.0, -2.0]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from mergectl.methods._contract import Between, Merged

if TYPE_CHECKING:
    from mergectl.methods._task_vectors import TaskVectors

TITLE = "Passthrough"
PAPER = "github.com/arcee-ai/mergekit"
NEUTRAL = {"scale": 1.0}
EXPERTS = (1, 1)
BLOCKS = True  # element by element: the lab may hand over weights in blocks


def merge(
    experts: TaskVectors,
    *,
    scale: Annotated[float, Between(-10.0, 10.0, search=(0.0, 1.0)), "factor of the weights"] = 1.0,
) -> Merged:
    """Yield every weight times the scale, as it is at 1."""
    for name, x in experts.items():
        yield name, x[0] if scale == 1.0 else x[0] * scale
