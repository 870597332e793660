"""Masks as bits: eight to a byte, little-endian within the byte, padded with zeros to whole bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def packed_size(shape: Sequence[int]) -> int:
    """How many bytes a mask of this shape takes."""
    return -(-math.prod(shape) // 8)


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """One bit per element."""
    import numpy as np
    import torch

    return torch.from_numpy(np.packbits(mask.reshape(-1).numpy(), bitorder="little"))


def unpack_bits(packed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The inverse of `pack_bits`."""
    import numpy as np
    import torch

    bits = np.unpackbits(packed.numpy(), count=math.prod(shape), bitorder="little")
    return torch.from_numpy(bits).bool().reshape(tuple(shape))
