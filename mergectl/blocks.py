"""Cut weights into blocks that stay near the processor, for methods that need no more than a block at a time.

A block is known by a name of its own, so that a method sees one more weight. Its length is fixed: it is part of what
a random draw means, and of the order in which sums are taken.
"""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from mergectl.errors import UserError
from mergectl.headers import WORD_TO_TORCH

if TYPE_CHECKING:
    import numpy as np
    import torch

    Array: TypeAlias = "np.ndarray[Any, Any]"

LENGTH = 1 << 18  # elements: a MiB in float32
NUMBERS = {"F16": "<f2", "BF16": "<i2", "F32": "<f4", "F64": "<f8"}  # NumPy's types; it has no bfloat16


@dataclass(frozen=True)
class Block:
    """Elements `start` to `stop` of a weight: a row of numbers, or whole rows of the weight."""

    weight: str
    start: int
    stop: int
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """A name that sorts where the weight stands; no weight's own name holds a zero byte."""
        return f"{self.weight}\0{self.start:015d}"


def cut(shapes: Mapping[str, tuple[int, ...]], names: Iterable[str], *, in_rows: bool = False) -> dict[str, Block]:
    """The blocks of the weights longer than one block, by name, in order; with `in_rows` of whole rows."""
    found = {}
    for name in names:
        count, width = math.prod(shapes[name]), shapes[name][-1] if shapes[name] else 1
        if count <= LENGTH or (in_rows and width == count):
            continue
        rows = max(1, LENGTH // width)
        rows = rows if rows * width % 8 == 0 else -(-rows // 8) * 8  # masks of a block are whole bytes
        step = rows * width if in_rows else LENGTH
        for start in range(0, count, step):
            stop = min(start + step, count)
            block = Block(name, start, stop, ((stop - start) // width, width) if in_rows else (stop - start,))
            found[block.name] = block
    return found


def readable(weights: Any, name: str) -> bool:
    """Say whether reading a weight by blocks costs no more than reading it once."""
    return place(weights, name) is not None or isinstance(getattr(weights, "weights", weights), dict)


def place(weights: Any, name: str) -> tuple[Path, int, int] | None:
    """The file, first byte and number of bytes of a weight, from a mapping that can say it."""
    ask = getattr(weights, "where", None)
    found: tuple[Path, int, int] | None = ask(name) if callable(ask) else None
    return found


class Flat:
    """Weights as rows of numbers; of one that is stored in another order, a copy is kept for its next block."""

    def __init__(self, read: Callable[[str], torch.Tensor]) -> None:
        self._read, self._lock = read, threading.Lock()
        self._copies: dict[str, torch.Tensor] = {}

    def __getitem__(self, weight: str) -> torch.Tensor:
        """All numbers of a weight; they belong to it."""
        whole = self._read(weight)
        if whole.is_contiguous():
            return whole.view(-1)
        with self._lock:
            if weight not in self._copies:
                self._copies = {weight: whole.reshape(-1)}
            return self._copies[weight]

    def forget(self) -> None:
        """Keep no copy."""
        self._copies = {}


class BlockReader:
    """Lends blocks of one model's weights: of files mapped into memory where they stand in one as they are.

    Several threads may read at once. What `read` returns belongs to the model: it is not to be changed.
    """

    def __init__(self, weights: Any) -> None:
        self.weights = weights
        self._files: dict[Path, mmap.mmap] = {}
        self._found: dict[str, tuple[Array, torch.dtype, Path, int] | None] = {}
        self._lock = threading.Lock()
        self._flat = Flat(lambda weight: weights[weight].detach())

    def read(self, block: Block) -> torch.Tensor:
        """A block as it is stored, in the block's shape."""
        import torch

        found = self._place(block)
        if found is None:
            return self._flat[block.weight][block.start : block.stop].view(block.shape)
        part, dtype = found
        lent = torch.from_numpy((part if part.flags.aligned else part.copy()).reshape(block.shape))
        return lent if lent.dtype == dtype else lent.view(dtype)

    def bits(self, block: Block) -> Array | None:
        """The bits of a block of bfloat16 or float32 numbers, where it stands in a file as it is; else None."""
        found = self._place(block)
        if found is None or not found[0].flags.aligned or str(found[1]) not in ("torch.bfloat16", "torch.float32"):
            return None
        part = found[0]
        return part.view(f"<u{part.itemsize}")

    def _place(self, block: Block) -> tuple[Array, torch.dtype] | None:
        if block.weight not in self._found:
            with self._lock:
                self._found[block.weight] = self._find(block.weight)
        found = self._found[block.weight]
        if found is None:
            return None
        numbers, dtype, path, end = found
        self._check_length(path, end, block.weight)  # what is not there any more ends the process when it is touched
        # Cut by NumPy: every operation of torch hands the interpreter to the other threads, and waits to have it back.
        return numbers[block.start : block.stop], dtype

    def _check_length(self, path: Path, end: int, weight: str) -> None:
        """Refuse a file that ends before the weight does; its mapping can tell the size of the file now."""
        if end > self._files[path].size():
            raise UserError(f"{path} became shorter while weight '{weight}' was read.")

    def _find(self, weight: str) -> tuple[Array, torch.dtype, Path, int] | None:
        import numpy as np
        import torch

        found = place(self.weights, weight)
        if found is None:
            return None
        path, first, nbytes = found
        if path not in self._files:
            with path.open("rb") as file:  # a private mapping, which torch takes for one that could be written
                self._files[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if first + nbytes > len(self._files[path]):
            raise UserError(f"{path} became shorter while weight '{weight}' was read.")
        word = self.weights.dtype(weight)
        raw = np.frombuffer(self._files[path], np.uint8, nbytes, first)
        return raw.view(NUMBERS[word]), getattr(torch, WORD_TO_TORCH[word]), path, first + nbytes

    def close(self) -> None:
        """Forget the files; they are closed with the last block that was lent."""
        self._found.clear()
        self._files.clear()
        self._flat.forget()


class Cut(Mapping[str, "torch.Tensor"]):
    """A mapping of weights under their own names and those of their blocks."""

    def __init__(self, weights: Mapping[str, Any], blocks: Mapping[str, Block]) -> None:
        import torch

        self._weights, self._blocks = weights, blocks
        self._flat = Flat(lambda weight: torch.as_tensor(weights[weight]))

    def __getitem__(self, name: str) -> Any:
        """Read one weight or block."""
        if name not in self._blocks:
            return self._weights[name]
        block = self._blocks[name]
        return self._flat[block.weight][block.start : block.stop].view(block.shape)

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
