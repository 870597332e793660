"""The left singular vectors of a matrix, from the symmetric eigen-decomposition of its small side.

That costs a third of a singular value decomposition. A product M M^T squares the singular values, so in float64 those
below 1e-8 of the largest would be lost in its rounding: what is small is looked at again, by itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

_SMALL = 1e-10  # of the largest square: what is smaller is looked at again
_BLOCKS = 4  # of rows in which a symmetric product is computed: ten of sixteen blocks are not above its diagonal
_NOTHING = 1e-12  # of the largest value: a direction in which the matrix does not reach


class Directions(NamedTuple):
    """Singular values, largest first, and the left singular vectors of the smallest ones, the smallest first."""

    values: torch.Tensor  # [r], float64
    rows: torch.Tensor  # [count, d_out]


def smallest_directions(m: torch.Tensor, count: int) -> Directions:
    """Return all singular values of a float64 matrix, and the left singular vectors of the `count` smallest.

    A vector of a matrix with more rows than columns, in whose direction it does not reach, is returned as zero.
    """
    wide = m.shape[0] <= m.shape[1]
    n = m if wide else m.mT
    squares, vectors = squares_and_vectors(n)
    values = squares.clamp_min_(0).sqrt_()
    rows = vectors[:, :count].mT
    if not wide:
        rows = rows @ n
        lengths = rows.norm(dim=1, keepdim=True)
        rows = torch.where(lengths > _NOTHING * values[-1], rows / lengths, 0.0)
    return Directions(values.flip(0), rows.contiguous())


def squares_and_vectors(n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the squared singular values of a wide matrix, smallest first, and its left singular vectors as columns."""
    squares, vectors = torch.linalg.eigh(lower_product(n))
    count = int((squares < _SMALL * squares[-1]).sum())
    if 0 < count < len(squares):
        small, large = vectors[:, :count], vectors[:, count:]
        left = (small.mT @ n) @ n.mT @ large / squares[count:]  # what rounding left of the large ones in the small
        small -= large @ left.mT
        squares[:count], turn = squares_and_vectors(small.mT @ n)
        vectors[:, :count] = small @ turn
    return squares, vectors


def lower_product(n: torch.Tensor) -> torch.Tensor:
    """Return the lower triangle of N N^T, which is all that its eigen-decomposition reads."""
    found = n.new_zeros(len(n), len(n))
    step = -(-len(n) // _BLOCKS)
    for start in range(0, len(n), step):
        part = slice(start, start + step)
        torch.mm(n[part], n[: start + step].mT, out=found[part, : start + step])
    return found


def lost_with_smallest(w: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """Return what a matrix loses when it is projected off the `count` smallest directions.

    Where that is most of all directions (and `rows` holds them all), it is what projecting on the others leaves over.
    """
    if count <= len(rows) - count or len(rows) < min(w.shape):
        return rows[:count].mT @ (rows[:count] @ w)
    return w - rows[count:].mT @ (rows[count:] @ w)
