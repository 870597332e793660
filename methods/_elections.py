"""Elections by mass on one weight, stacked over tasks: trim, weigh, elect a sign, take the entries that have it.

Large float32 weights in main memory are gone through once, by a compiled loop that gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from mergectl.methods import _fused, _kernels, _more_kernels

Array: TypeAlias = "np.ndarray[Any, Any]"


@dataclass(frozen=True)
class Voters:
    """Per task the magnitude up to which entries are dropped (below 0: none is), and what the rest is multiplied by."""

    floors: Sequence[float]
    weights: Sequence[float] | None = None

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Return the entries that vote, zero where there is none."""
        kept = x if max(self.floors) < 0 else _kernels.keep_above(x, self.floors)
        return kept if self.weights is None else kept * _kernels.column(self.weights, x)

    def numbers(self, x: torch.Tensor) -> list[Array]:
        """Return what the loops are given of them."""
        weights = [1.0] * len(x) if self.weights is None else self.weights
        return [np.array(self.floors, np.float32), np.array(weights, np.float32)]


def balance(x: torch.Tensor, voters: Voters) -> int:
    """Return how many more positive than negative signs are elected."""
    if _fused.fits(x):
        return int(_fused.balance(_fused.rows_of(x), *voters.numbers(x)))
    return _kernels.balance(_kernels.elect_by_mass(voters.of(x)))


def agreed(x: torch.Tensor, voters: Voters, *, instead: float = 0.0, mean: bool = True) -> torch.Tensor:
    """Return the sum or mean of the entries that have the elected sign, 0 where there are none.

    `instead` is the sign where an election is drawn; a mean is divided by the weights of those who agree.
    """
    if _fused.fits(x):
        floors, weights = voters.numbers(x)
        result = torch.empty_like(x[0])
        _fused.agreed(_fused.rows_of(x), floors, weights, np.float32(instead), mean, result.view(-1).numpy())
        return result
    kept = voters.of(x)
    sign = drawn(_kernels.elect_by_mass(kept), instead)
    if mean and voters.weights is not None:
        return _more_kernels.weighted_agreeing_mean(kept, voters.weights, sign)
    return _kernels.agreeing_mean(kept, sign) if mean else _kernels.agreeing_sum(kept, sign)


def drawn(sign: torch.Tensor, instead: float) -> torch.Tensor:
    """Put a sign where an election is drawn."""
    return sign.add_(1 - sign.abs(), alpha=instead) if instead else sign
