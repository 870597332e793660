"""Second moments of the inputs of a linear layer, as PAVE and RegMean read them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from mergectl.methods._contract import MethodError

if TYPE_CHECKING:
    import torch

_INVERSE_ERROR = 0.05  # the Frobenius error of a float32 inverse from which on the original code doubles the damping


class Gram(NamedTuple):
    """The mean of x x^T over the input rows x of one linear layer, and how many rows it is of."""

    moment: torch.Tensor  # [d_in, d_in], float32 or float64
    rows: int


def moment_of(given: Gram | torch.Tensor) -> torch.Tensor:
    """Return the second moment, of a `Gram` or given bare."""
    return given.moment if isinstance(given, Gram) else given


def is_transposed(name: str, shape: Sequence[int], inputs: int, linears: Mapping[str, bool] | None) -> bool:
    """Say whether a weight is stored [in, out]; of a square one only `linears` can say it."""
    if len(shape) != 2 or inputs not in shape:
        raise MethodError(f"The grams of '{name}' are of {inputs} inputs, and the weight has shape {list(shape)}.")
    return shape[0] == inputs if shape[0] != shape[1] else (linears or {}).get(name, False)


def enough_damping(moment: torch.Tensor, damping: float) -> float:
    """Return the damping, doubled until the float32 inverse of the damped moment is one nearly enough."""
    if damping <= 0:
        raise MethodError("With damping_backoff the damping is doubled until it is enough: it must be above 0.0.")
    while not inverse_error(moment, damping) < _INVERSE_ERROR:
        damping *= 2
    return damping


def inverse_error(moment: torch.Tensor, damping: float) -> float:
    """Return how far inverse times matrix is from the identity, all in float32; NaN or infinite without an inverse."""
    import torch

    identity = torch.eye(len(moment), device=moment.device)
    damped = moment.float() + damping * identity
    inverse, failed = torch.linalg.inv_ex(damped)
    return math.inf if int(failed) else float(torch.linalg.matrix_norm(inverse @ damped - identity))
