"""Give every element one owner among branches, by the size of their trimmed task vectors (Medusa).

Everything works on one weight: rows are [branch, *shape] in float32, masks are [branch, *shape] and say who may train.

>>> rows = torch.tensor([[3.0, -1.0, 0.0, 0.0], [1.0, -2.0, 4.0, 0.0]])
>>> hard(rows).int().tolist()
[[1, 0, 0, 0], [0, 1, 1, 0]]
>>> # U = 0.1 of the sums 4, 3, 4 lies below what is left when the first branch has its part: 1, 2, 4, so not its
>>> soft(rows, torch.full((4,), 0.1)).int().tolist()
[[0, 0, 0, 0], [1, 1, 1, 0]]
>>> [mask.tolist() for mask in half((2, 1), 2).int()]
[[[0], [1]], [[1], [0]]]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mergectl.methods import _kernels
from mergectl.methods._contract import MethodError

ALL = 99.0  # from this percentage on everything is kept, as the published program has it


def trim(row: torch.Tensor, top_k: float) -> torch.Tensor:
    """Keep the `top_k` percent largest entries of one weight: those strictly above the rest's largest."""
    if not bool(torch.isfinite(row).all()):
        raise MethodError("A task vector holds entries that are no numbers, so nobody can own them.")
    cut = 0 if top_k >= ALL else _kernels.count_share(1 - top_k / 100, row.numel())
    if cut == 0:
        return row
    size = row.abs()
    return row * (size > size.flatten().kthvalue(cut).values)


def soft(rows: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draw an owner with a probability proportional to the branches' magnitudes.

    Sums and differences go in the order of the branches, as in the published program, so that they round alike.
    """
    sizes = rows.abs()
    rest = sizes[0].clone()
    for size in sizes[1:]:
        rest += size
    point = uniform * rest
    free = torch.ones_like(rest, dtype=torch.bool)
    masks = torch.zeros_like(sizes, dtype=torch.bool)
    for mask, size in zip(masks, sizes, strict=True):
        rest -= size
        mask.copy_(free & (point >= rest) & (size > 0))
        free &= ~mask
    for branch in reversed(range(len(rows))):  # what rounding has left to nobody
        missed = free & (sizes[branch] > 0)
        masks[branch] |= missed
        free &= ~missed
    return masks


def hard(rows: torch.Tensor) -> torch.Tensor:
    """Give each element to the branch with the largest magnitude, on ties to the earliest."""
    sizes = rows.abs()
    owner = sizes.argmax(0)
    return torch.stack([(owner == i) & (size > 0) for i, size in enumerate(sizes)])


def half(shape: Sequence[int], count: int) -> torch.Tensor:
    """Cut the first dimension into one block per branch, in order; of two, the second gets the first block.

    The latter is how the published program gives them to two branches.
    """
    masks = torch.zeros((count, *(shape or (1,))), dtype=torch.bool)
    rows = masks.shape[1]
    for block in range(count):
        branch = 1 - block if count == 2 else block
        masks[branch, rows * block // count : rows * (block + 1) // count] = True
    return masks.reshape((count, *shape))


def competing(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Let branches compete only where they do not oppose the sign that finished models elect (partial control)."""
    if not len(others):
        return rows
    total = others[0].clone()
    for other in others[1:]:
        total += other
    elected = total.sign()
    return rows * ((elected == 0) | (rows.sign() == elected))


def agreeing(row: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Own what has the same sign as in a finished model, and is changed in both."""
    return row.sign() * other.sign() > 0


def opposing(row: torch.Tensor, other: torch.Tensor) -> int:
    """Count the elements of opposite signs."""
    return int((row.sign() * other.sign() < 0).sum())


def with_unowned(masks: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Give the first branch what no branch has changed."""
    masks[0] |= (rows == 0).all(0)
    return masks
