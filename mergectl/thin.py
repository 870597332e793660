"""Products of thin factors B A, decomposed and cut without ever being multiplied out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Cut(NamedTuple):
    """The nearest product of a rank, its squared norm and that of the whole."""

    up: torch.Tensor
    down: torch.Tensor
    kept: float
    whole: float


def align(ups: Sequence[torch.Tensor], downs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Common directions U S of the products beside each other, [B1 A1, ..., Bn An] = U S [V1, ..., Vn], and the V.

    Each product is U S times its own V, so that the V of all can be compared entry by entry. Only factors are
    decomposed: all B at once, each A alone, and the square of the summed ranks between them.
    """
    import torch

    left, core = torch.linalg.qr(torch.cat([up.double() for up in ups], 1))
    rights, parts = [], []
    for down, block in zip(downs, core.split([len(down) for down in downs], 1), strict=True):
        right, rest = torch.linalg.qr(down.double().T)
        rights.append(right)
        parts.append(block @ rest.T)
    turned, values, among = torch.linalg.svd(torch.cat(parts, 1), full_matrices=False)
    count = _rank(values, max(left.shape))
    own = among[:count].split([right.shape[1] for right in rights], 1)
    shared = left @ (turned[:, :count] * values[:count])
    return shared.float(), [(row @ right.T).float() for row, right in zip(own, rights, strict=True)]


def cut(up: torch.Tensor, down: torch.Tensor, rank: int) -> Cut:
    """The nearest product of a rank to B A, as factors of equal weight that are filled up with zeros."""
    import torch

    left, inner = torch.linalg.qr(up.double())
    right, outer = torch.linalg.qr(down.double().T)
    turned, values, other = torch.linalg.svd(inner @ outer.T, full_matrices=False)
    return filled(left @ turned, values, other @ right.T, rank)


def cut_dense(matrix: torch.Tensor, rank: int) -> Cut:
    """The nearest product of a rank to a matrix, likewise."""
    import torch

    left, values, right = torch.linalg.svd(matrix.float(), full_matrices=False)
    return filled(left, values, right, rank)


def filled(left: torch.Tensor, values: torch.Tensor, right: torch.Tensor, rank: int) -> Cut:
    """The first directions of a decomposition as two factors of a rank, each with the roots of the values."""
    import torch

    count = min(rank, len(values))
    roots = values[:count].sqrt()
    up, down = torch.zeros(len(left), rank), torch.zeros(rank, right.shape[1])
    up[:, :count], down[:count] = left[:, :count] * roots, roots[:, None] * right[:count]
    return Cut(up, down, float((values[:count] ** 2).sum()), float((values**2).sum()))


def _rank(values: torch.Tensor, size: int) -> int:
    """How many values are more than rounding of the largest: what float32 factors can tell apart."""
    import torch

    least = values.max() * size * torch.finfo(torch.float32).eps
    return max(1, int((values > least).sum()))
