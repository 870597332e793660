"""Weights in float32 as pages of files, so that several processes share their memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergectl.components import Shelf

if TYPE_CHECKING:
    import torch

    from mergectl.views import Renamed


def in_memory(weights: Renamed, shelf: Shelf | None = None, key: str = "") -> dict[str, torch.Tensor]:
    """Return all weights in float32: mapped from their file where they stand there so, else read.

    With a shelf what is read lies there under the key: processes on this machine read and convert it once.
    """
    found = {name: mapped(weights, name) for name in weights}
    rest = [name for name, weight in found.items() if weight is None]
    if shelf is None or not rest:
        return {name: weights[name].float() if weight is None else weight for name, weight in found.items()}
    blocks = _shared(weights, rest, shelf, key)
    return {name: blocks[name] if weight is None else weight for name, weight in found.items()}


def _shared(weights: Renamed, names: list[str], shelf: Shelf, key: str) -> dict[str, torch.Tensor]:
    """Read weights into one block of a shelf, unless they lie there."""
    import math

    import torch

    shapes = {name: tuple(weights.shape(name)) for name in names}
    sizes = [math.prod(shape) for shape in shapes.values()]

    def fill(block: torch.Tensor) -> None:
        for name, part in zip(names, torch.split(block[0], sizes), strict=True):
            part.copy_(weights[name].reshape(-1))

    whole = (1, sum(sizes))
    block = shelf.get(key, whole)
    parts = torch.split((shelf.put(key, whole, fill) if block is None else block)[0], sizes)
    return {name: part.reshape(shapes[name]) for name, part in zip(names, parts, strict=True)}


def mapped(weights: Renamed, name: str) -> torch.Tensor | None:
    """Return one weight as pages of its file; None where it does not stand there in float32."""
    import numpy as np
    import torch

    place = weights.where(name) if weights.dtype(name) == "F32" else None
    if place is None or place[2] == 0 or place[1] % 4:
        return None
    path, start, size = place
    # Mode c: a write would go to a copy of the page, never to the file.
    pages = np.memmap(path, dtype=np.float32, mode="c", offset=start, shape=(size // 4,))
    return torch.from_numpy(pages).reshape(weights.shape(name))
