"""Second moments of the inputs of a linear layer, as PAVE and RegMean read them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Gram(NamedTuple):
    """The mean of x x^T over the input rows x of one linear layer, and how many rows it is of."""

    moment: torch.Tensor  # [d_in, d_in], float32 or float64
    rows: int


def moment_of(given: Gram | torch.Tensor) -> torch.Tensor:
    """Return the second moment, of a `Gram` or given bare."""
    return given.moment if isinstance(given, Gram) else given
