"""Interpolate two experts along the arc between them, by weights instead of a place (NuSLERP).

>>> from mergectl import merge_weights
>>> import torch
>>> experts = {"a": {"w": torch.tensor([2.0, 0.0])}, "b": {"w": torch.tensor([0.0, 2.0])}}
>>> w = merge_weights("nuslerp", None, experts, weight=[1.0, 0.5])["w"]  # t = 0.5 / 1.5: 2 cos 30, 2 sin 30
>>> [round(v, 4) for v in w.tolist()]
[1.7321, 1.0]
>>> base = {"w": torch.tensor([2.0, 2.0])}  # task vectors [0, -2] and [-2, 0]: base + [-sqrt 2, -sqrt 2]
>>> [round(v, 4) for v in merge_weights("nuslerp", base, experts, on="deltas")["w"].tolist()]
[0.5858, 0.5858]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from mergectl.methods import _kernels, _more_kernels
from mergectl.methods._contract import Between, Merged, MethodError, OneOf, PerTask, Weights

if TYPE_CHECKING:
    import torch

    from mergectl.methods._task_vectors import TaskVectors

TITLE = "NuSLERP"
PAPER = "github.com/arcee-ai/mergekit"
NEUTRAL: dict[str, float] = {}
EXPERTS = (2, 2)


def merge(
    experts: TaskVectors,
    task_vectors: TaskVectors | None = None,
    base: Weights | None = None,
    *,
    weight: Annotated[PerTask, Between(-10.0, 10.0), "weight of each expert"] = 1.0,
    along: Annotated[str, OneOf(["tensor", "last", "first"]), "what turns: a weight, or vectors of a dimension"] = (
        "tensor"
    ),
    on: Annotated[str, OneOf(["weights", "deltas"]), "turn the weights themselves or the task vectors"] = "weights",
) -> Merged:
    """Yield for each weight the point on the arc that the experts' weights select."""
    shares = _more_kernels.shares(_kernels.per_task(weight, 2))
    if shares is None:
        raise MethodError("The weights of the two experts add up to zero, which selects no place between them.")
    if on == "weights":
        for name, x in experts.items():
            yield name, turned(x, shares[1], along)
    elif task_vectors is None or base is None:
        raise MethodError("nuslerp with on=deltas needs the base the experts came from. Give one, or use on=weights.")
    else:
        for name, x in task_vectors.items():
            yield name, base[name] + turned(x, shares[1], along)


def turned(x: torch.Tensor, t: float, along: str) -> torch.Tensor:
    """Return the point at share t from the first to the second of [2, *shape]."""
    if t in (0.0, 1.0) or x.numel() == 0:
        return x[int(t)]
    if along == "tensor" or x.dim() < 2:
        return _more_kernels.like(_more_kernels.arc(_more_kernels.flat(x[0]), _more_kernels.flat(x[1]), t), x[0])
    wide = (x if along == "last" else x.transpose(1, -1)).cpu().double().numpy()
    result = _more_kernels.like(
        _more_kernels.arc(wide[0], wide[1], t), x[0] if along == "last" else x[0].transpose(0, -1)
    )
    return result if along == "last" else result.transpose(0, -1)
