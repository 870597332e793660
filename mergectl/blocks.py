"""Cut weights into blocks that stay near the processor, for methods that work element by element.

A block is known by a name of its own, so that a method sees one more weight. The length is fixed: it is part of what
a random draw means.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergectl.errors import UserError
from mergectl.headers import ITEM_BYTES, WORD_TO_TORCH

if TYPE_CHECKING:
    import torch

LENGTH = 1 << 17  # elements: half a MiB in float32


@dataclass(frozen=True)
class Block:
    """Elements `start` to `stop` of a weight, read as one row."""

    weight: str
    start: int
    stop: int

    @property
    def name(self) -> str:
        """A name that sorts where the weight stands; no weight's own name holds a zero byte."""
        return f"{self.weight}\0{self.start:015d}"


def cut(shapes: Mapping[str, tuple[int, ...]], names: Iterable[str]) -> dict[str, Block]:
    """The blocks of the weights longer than one block, by name, in order."""
    found = {}
    for name in names:
        count = math.prod(shapes[name])
        if count > LENGTH:
            for start in range(0, count, LENGTH):
                block = Block(name, start, min(start + LENGTH, count))
                found[block.name] = block
    return found


def read(weights: Any, block: Block) -> torch.Tensor:
    """Read a block: from the file where the weight stands in one as it is, else from memory."""
    place = _place(weights, block.weight)
    if place is not None:
        return _read_file(place, weights.dtype(block.weight), block)
    whole: torch.Tensor = weights[block.weight]
    return whole.reshape(-1)[block.start : block.stop]


def readable(weights: Any, name: str) -> bool:
    """Say whether reading a weight by blocks costs no more than reading it once."""
    return _place(weights, name) is not None or isinstance(getattr(weights, "weights", weights), dict)


def _place(weights: Any, name: str) -> tuple[Path, int, int] | None:
    """The file, first byte and number of bytes of a weight, from a mapping that can say it."""
    ask = getattr(weights, "where", None)
    found: tuple[Path, int, int] | None = ask(name) if callable(ask) else None
    return found


def _read_file(place: tuple[Path, int, int], word: str, block: Block) -> torch.Tensor:
    import torch

    path, first, _ = place
    item = ITEM_BYTES[word]
    raw = torch.empty((block.stop - block.start) * item, dtype=torch.uint8)
    with path.open("rb", buffering=0) as file:
        if os.preadv(file.fileno(), [raw.numpy().data], first + block.start * item) != len(raw):
            raise UserError(f"{path} became shorter while weight '{block.weight}' was read.")
    return raw.view(getattr(torch, WORD_TO_TORCH[word]))


class Cut(Mapping[str, "torch.Tensor"]):
    """A mapping of weights under their own names and those of their blocks."""

    def __init__(self, weights: Mapping[str, Any], blocks: Mapping[str, Block]) -> None:
        self._weights, self._blocks = weights, blocks

    def __getitem__(self, name: str) -> Any:
        """Read one weight or block."""
        import torch

        if name not in self._blocks:
            return self._weights[name]
        block = self._blocks[name]
        return torch.as_tensor(self._weights[block.weight]).reshape(-1)[block.start : block.stop]

    def __iter__(self) -> Iterator[str]:
        """Go through the weights' own names."""
        return iter(self._weights)

    def __len__(self) -> int:
        """Return the number of weights."""
        return len(self._weights)

    def __contains__(self, name: object) -> bool:
        """Say whether there is such a weight or block."""
        block = self._blocks.get(str(name))
        return (name if block is None else block.weight) in self._weights
