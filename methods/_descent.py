"""Adam on losses whose gradients are known in closed form: no graph."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BETAS, EPS = (0.9, 0.999), 1e-8  # the usual decays, and what is added to the denominator


class Adam:
    """Adam without decay, as torch computes it, on one tensor."""

    def __init__(self, like: torch.Tensor, rate: float) -> None:
        """Begin with moments of zero."""
        self.rate, self.steps = rate, 0
        self.first, self.second = like.new_zeros(like.shape), like.new_zeros(like.shape)

    def step(self, x: torch.Tensor, slope: torch.Tensor) -> None:
        """Move the numbers against their gradient, in place."""
        self.steps += 1
        self.first.lerp_(slope, 1 - BETAS[0])
        self.second.mul_(BETAS[1]).addcmul_(slope, slope, value=1 - BETAS[1])
        below = self.second.sqrt().div_(math.sqrt(1 - BETAS[1] ** self.steps)).add_(EPS)
        x.addcdiv_(self.first, below, value=-self.rate / (1 - BETAS[0] ** self.steps))


def descend(
    start: torch.Tensor, gradient: Callable[[torch.Tensor], torch.Tensor], steps: int, rate: float
) -> torch.Tensor:
    """Return where a number of Adam steps lead from a start, which is left as it is."""
    x, adam = start.clone(), Adam(start, rate)
    for _ in range(steps):
        adam.step(x, gradient(x))
    return x
