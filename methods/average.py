"""Average the experts: mean, lower median or entry of largest magnitude, of weights or of task vectors.

>>> from mergectl import merge_weights
>>> import torch
>>> base = {"w": torch.tensor([1.0, 1.0])}
>>> experts = {"a": {"w": torch.tensor([2.0, -4.0])}, "b": {"w": torch.tensor([4.0, 3.0])}}
>>> merge_weights("average", base, experts)["w"].tolist()  # (2 + 4) / 2, (-4 + 3) / 2
[3.0, -0.5]
>>> merge_weights("average", base, experts, combine="magnitude", on="deltas")["w"].tolist()  # 1 + 3, 1 - 5
[4.0, -4.0]
>>> merge_weights("average", base, experts, combine="median")["w"].tolist()  # of two, the lower
[2.0, -4.0]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from mergectl.methods import _kernels
from mergectl.methods._contract import Merged, MethodError, OneOf, Weights

if TYPE_CHECKING:
    from mergectl.methods._task_vectors import TaskVectors

TITLE = "Weight averaging (model soups)"
PAPER = "arXiv:2203.05482"
NEUTRAL = {"combine": "mean"}

COMBINE = {"mean": _kernels.mean, "median": _kernels.lower_median, "magnitude": _kernels.largest}


def merge(
    experts: TaskVectors,
    task_vectors: TaskVectors | None = None,
    base: Weights | None = None,
    *,
    combine: Annotated[str, OneOf(COMBINE), "what is taken over the experts, element by element"] = "mean",
    on: Annotated[str, OneOf(["weights", "deltas"]), "average the weights themselves or the task vectors"] = "weights",
) -> Merged:
    """Yield for each weight the experts' mean, lower median or largest entry."""
    if on == "weights":
        for name, x in experts.items():
            yield name, COMBINE[combine](x)
        return
    if task_vectors is None or base is None:
        raise MethodError("average with on=deltas needs the base the experts came from. Give one, or use on=weights.")
    for name, x in task_vectors.items():
        yield name, base[name] + COMBINE[combine](x)
