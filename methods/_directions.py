"""The left singular vectors of a matrix, from the symmetric eigen-decomposition of its small side.

That costs a third of a singular value decomposition. A product M M^T squares the singular values, so in float64 those
below 1e-8 of the largest would be lost in its rounding: what is small is looked at again, by itself.

Of an eigen-decomposition the last step, turning the vectors of a tridiagonal matrix back, is as dear as the first. Only
the vectors that are asked for are turned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

_SMALL = 1e-10  # of the largest square: what is smaller is looked at again
_BLOCKS = 6  # of rows in which a symmetric product is computed: 21 of 36 blocks are not below its diagonal
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
    squares, vectors = squares_and_vectors(n, count)
    values = squares.clamp_min_(0).sqrt_()
    rows = vectors.mT
    if not wide:
        rows = rows @ n
        lengths = rows.norm(dim=1, keepdim=True)
        rows = torch.where(lengths > _NOTHING * values[-1], rows / lengths, 0.0)
    return Directions(values.flip(0), rows.contiguous())


def squares_and_vectors(n: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the squared singular values of a wide matrix, smallest first, and as columns its first left vectors."""
    found = eigen(upper_product(n))
    squares = found.values
    few = int((squares < _SMALL * squares[-1]).sum())
    vectors = found.turn(found.vectors[:, : max(few, count)], False)
    if 0 < few < len(squares):
        small, large = vectors[:, :few], found.vectors[:, few:]
        known = found.turn(n @ (n.mT @ small), True)  # what rounding left of the large ones in the small
        small -= found.turn(large @ (large.mT @ known / squares[few:, None]), False)
        squares[:few], turn = squares_and_vectors(small.mT @ n, few)
        vectors[:, :few] = small @ turn
    return squares, vectors[:, :count]


class Eigen(NamedTuple):
    """Eigenvalues of a symmetric matrix, smallest first, and its eigenvectors before they are turned."""

    values: torch.Tensor
    vectors: torch.Tensor
    turn: Callable[[torch.Tensor, bool], torch.Tensor]  # turns columns, or with True turns them back


def eigen(upper: torch.Tensor) -> Eigen:
    """Decompose a symmetric float64 matrix of which the upper triangle is given."""
    if upper.device.type != "cpu" or len(upper) < 3:
        return whole(upper)
    from scipy.linalg import lapack

    matrix = upper.numpy().T  # as Fortran sees it: the lower triangle
    size, _ = lapack.dsytrd_lwork(len(upper), lower=1)
    mirrors, diagonal, beside, scale, _ = lapack.dsytrd(matrix, lower=1, lwork=int(size))
    values, vectors, failed = lapack.dstevd(diagonal, beside)
    if failed:
        return whole(upper)
    below, scales = torch.from_numpy(mirrors)[1:, :-1], torch.from_numpy(scale)

    def turn(x: torch.Tensor, back: bool) -> torch.Tensor:
        return torch.cat([x[:1], torch.ormqr(below, scales, x[1:], transpose=back)])

    return Eigen(torch.from_numpy(values), torch.from_numpy(vectors), turn)


def whole(upper: torch.Tensor) -> Eigen:
    """Decompose it by torch, which turns all vectors."""
    values, vectors = torch.linalg.eigh(upper, UPLO="U")
    return Eigen(values, vectors, lambda x, back: x)


def upper_product(n: torch.Tensor) -> torch.Tensor:
    """Return the upper triangle of N N^T, which is all that its eigen-decomposition reads."""
    found = n.new_zeros(len(n), len(n))
    step = -(-len(n) // _BLOCKS)
    for start in range(0, len(n), step):
        torch.mm(n[start : start + step], n[start:].mT, out=found[start : start + step, start:])
    return found


def lost_with_smallest(w: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """Return what a matrix loses when it is projected off the `count` smallest directions.

    Where that is most of all directions (and `rows` holds them all), it is what projecting on the others leaves over.
    """
    if count <= len(rows) - count or len(rows) < min(w.shape):
        return rows[:count].mT @ (rows[:count] @ w)
    return w - rows[count:].mT @ (rows[count:] @ w)
