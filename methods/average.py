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
>>> merge_weights("average", base, experts, weight=[3.0, 1.0])["w"].tolist()  # (3 * 2 + 4) / 4, (3 * -4 + 3) / 4
[2.5, -2.25]
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

from mergectl.methods import _kernels, _more_kernels
from mergectl.methods._contract import Between, Merged, MethodError, OneOf, PerTask, Weights

if TYPE_CHECKING:
    import torch

    from mergectl.methods._task_vectors import Rows, TaskVectors

SHARES = "weight"  # divided by their sum
BLOCKS = True  # element by element: the lab may hand over weights in blocks
TITLE = "Weight averaging (model soups)"
PAPER = "arXiv:2203.05482"
NEUTRAL = {"combine": "mean"}

COMBINE: dict[str, Callable[..., torch.Tensor]] = {
    "mean": _kernels.mean,
    "median": _kernels.lower_median,
    "magnitude": _kernels.largest,
}


def merge(
    experts: TaskVectors,
    task_vectors: TaskVectors | None = None,
    base: Weights | None = None,
    *,
    combine: Annotated[str, OneOf(COMBINE), "what is taken over the experts, element by element"] = "mean",
    on: Annotated[str, OneOf(["weights", "deltas"]), "average the weights themselves or the task vectors"] = "weights",
    weight: Annotated[PerTask, Between(-1e4, 1e4), "weight of each expert in the mean"] = 1.0,
    normalize: Annotated[bool, "divide by the sum of the weights"] = True,
) -> Merged:
    """Yield for each weight the experts' mean, lower median or largest entry."""
    combined = weighted_mean(_kernels.per_task(weight, len(experts.tasks)), normalize, combine)
    if on == "weights":
        over = experts.each_sum if combine == "mean" else experts.each
        return over(lambda name, x: combined(x))
    if task_vectors is None or base is None:
        raise MethodError("average with on=deltas needs the base the experts came from. Give one, or use on=weights.")
    return task_vectors.each(lambda name, x: base[name] + combined(x))


def weighted_mean(weights: Sequence[float], normalize: bool, combine: str) -> Callable[[Rows], torch.Tensor]:
    """Return the function over the experts: one of the table, or for unequal weights the weighted mean."""
    if len(set(weights)) == 1 and weights[0] != 0 and normalize:
        return COMBINE[combine]
    if combine != "mean":
        raise MethodError(f"Weights and normalize are for combine=mean, got combine={combine}.")
    factors = _more_kernels.shares(weights) if normalize else weights
    return functools.partial(_kernels.weighted_total, weights=factors)
