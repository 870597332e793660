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

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, TypeAlias

import numpy as np
import torch

from mergectl.methods import _kernels, _more_kernels
from mergectl.methods._contract import Between, Merged, MethodError, OneOf, PerTask, Weights

if TYPE_CHECKING:
    from mergectl.methods._task_vectors import TaskVectors

TITLE = "NuSLERP"
PAPER = "github.com/arcee-ai/mergekit"
NEUTRAL: dict[str, float] = {}
EXPERTS = (2, 2)
BLOCKS = {"along": {"tensor": "elements", "last": "rows"}}  # a block of elements, or of rows, is enough

Turn: TypeAlias = "Callable[[torch.Tensor], torch.Tensor]"


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
    if on == "deltas" and (task_vectors is None or base is None):
        raise MethodError("nuslerp with on=deltas needs the base the experts came from. Give one, or use on=weights.")
    vectors = experts if on == "weights" or task_vectors is None else task_vectors
    for part in vectors.by_weight():
        turn = turned(part, shares[1], along)
        yield from part.each(functools.partial(placed, turn, None if on == "weights" else base))


def placed(turn: Turn, base: Weights | None, name: str, x: torch.Tensor) -> torch.Tensor:
    """Return what was turned, on the base where it is a task vector."""
    return turn(x) if base is None else base[name] + turn(x)


def turned(part: TaskVectors, t: float, along: str) -> Turn:
    """Return the function that gives the point at share t from the first to the second of [2, *shape]."""
    if t in (0.0, 1.0):
        return lambda x: x[int(t)]
    if along != "tensor":
        return functools.partial(by_vector, t=t, dim=-1 if along == "last" else 0)
    products = part.products()
    lengths = np.sqrt(np.diag(products))
    factors = [float(f) for f in _more_kernels.arc(products[0, 1], lengths[0], lengths[1], t)]
    return functools.partial(_kernels.weighted_total, weights=factors)


def by_vector(x: torch.Tensor, t: float, dim: int) -> torch.Tensor:
    """Turn every vector along a dimension of [2, *shape] by its own angle."""
    a, b = (
        np.moveaxis(row.cpu().double().numpy(), dim, -1)
        for row in x.reshape(2, -1 if x.dim() < 2 else x.shape[1], *x.shape[2:])
    )
    dot = (a * b).sum(-1, keepdims=True)
    from_a, from_b = _more_kernels.arc(dot, _more_kernels.norm(a), _more_kernels.norm(b), t)
    return torch.from_numpy(np.moveaxis(from_a * a + from_b * b, -1, dim)).to(x).reshape(x.shape[1:])
