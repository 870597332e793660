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

import numpy as np
import torch

from mergectl.methods import _kernels, _more_kernels
from mergectl.methods._contract import Between, Merged, MethodError, OneOf, PerTask, Weights

if TYPE_CHECKING:
    from mergectl.methods._more_kernels import Array
    from mergectl.methods._task_vectors import TaskVectors

TITLE = "NuSLERP"
PAPER = "github.com/arcee-ai/mergekit"
NEUTRAL: dict[str, float] = {}
EXPERTS = (2, 2)
SHARES = "weight"  # divided by their sum
BLOCKS = {"along": {"tensor": "elements", "last": "rows"}}  # a block of elements, or of rows, is enough


def merge(
    experts: TaskVectors,
    task_vectors: TaskVectors | None = None,
    base: Weights | None = None,
    *,
    weight: Annotated[PerTask, Between(-1e4, 1e4), "weight of each expert"] = 1.0,
    along: Annotated[str, OneOf(["tensor", "last", "first"]), "what turns: a weight, or vectors of a dimension"] = (
        "tensor"
    ),
    on: Annotated[str, OneOf(["weights", "deltas"]), "turn the weights themselves or the task vectors"] = "weights",
) -> Merged:
    """Yield for each weight the point on the arc that the experts' weights select."""
    shares = _more_kernels.shares(_kernels.per_task(weight, 2))
    if on == "deltas" and (task_vectors is None or base is None):
        raise MethodError("nuslerp with on=deltas needs the base the experts came from. Give one, or use on=weights.")
    vectors = experts if on == "weights" or task_vectors is None else task_vectors
    below, t = None if on == "weights" else base, shares[1]
    if along == "tensor" and t not in (0.0, 1.0):
        return _more_kernels.blend(vectors, lambda products: arc(products, t), below)
    dim = -1 if along == "last" else 0

    def placed(name: str, x: torch.Tensor) -> torch.Tensor:
        turned = x[int(t)] if t in (0.0, 1.0) else by_vector(x, t, dim)
        return turned if below is None else below[name] + turned

    return vectors.each(placed)


def arc(products: Array, t: float) -> list[float]:
    """Return the factors of both ends for the point at share t from the first to the second."""
    lengths = np.sqrt(np.diag(products))
    return [float(f) for f in _more_kernels.arc(products[0, 1], lengths[0], lengths[1], t)]


def by_vector(x: torch.Tensor, t: float, dim: int) -> torch.Tensor:
    """Turn every vector along a dimension of [2, *shape] by its own angle."""
    a, b = (
        np.moveaxis(row.cpu().double().numpy(), dim, -1)
        for row in x.reshape(2, -1 if x.dim() < 2 else x.shape[1], *x.shape[2:])
    )
    dot = (a * b).sum(-1, keepdims=True)
    from_a, from_b = _more_kernels.arc(dot, _more_kernels.norm(a), _more_kernels.norm(b), t)
    return torch.from_numpy(np.moveaxis(from_a * a + from_b * b, -1, dim)).to(x).reshape(x.shape[1:])
