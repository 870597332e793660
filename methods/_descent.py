"""Adam on a loss whose gradient is known in closed form: no graph, one weight at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

FIRST, SECOND, EPS = 0.9, 0.999, 1e-8  # Adam's usual decays and what is added to its denominator


def descend(
    start: torch.Tensor, gradient: Callable[[torch.Tensor], torch.Tensor], steps: int, rate: float
) -> torch.Tensor:
    """Return where a number of Adam steps lead from a start, which is left as it is."""
    x, mean, square = start.clone(), start.new_zeros(start.shape), start.new_zeros(start.shape)
    for step in range(1, steps + 1):
        slope = gradient(x)
        mean.lerp_(slope, 1 - FIRST)
        square.mul_(SECOND).addcmul_(slope, slope, value=1 - SECOND)
        below = square.sqrt().div_(math.sqrt(1 - SECOND**step)).add_(EPS)
        x.addcdiv_(mean, below, value=-rate / (1 - FIRST**step))
    return x
