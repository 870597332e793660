"""Write safetensors files weight by weight, in any order: one file, or a model's weights cut into shards."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergectl.artefacts import FULL, add_json
from mergectl.errors import UserError, WorkError
from mergectl.headers import ITEM_BYTES, WORD_TO_TORCH
from mergectl.weights import INDEX, SINGLE

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 5_000_000_000
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_size(text: str | None) -> int:
    """`5GB`, `200MiB` or a plain number of bytes; the usual size where none is given."""
    if text is None:
        return SHARD_BYTES
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    size = int(float(match[1]) * UNITS.get(match[2], 0)) if match else 0
    if not 1 <= size < 2**62:
        raise UserError(f"--shard-size {text} is not a size. Write 5GB, 500MB or a number of bytes.")
    return size


def bytes_of(shape: tuple[int, ...], dtype: str) -> int:
    """How many bytes a weight takes in a file."""
    return math.prod(shape) * ITEM_BYTES[dtype]


class SafetensorsWriter:
    """A safetensors file filled weight by weight, or block by block: shapes and types are known beforehand.

    Several threads may write at once.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]) -> None:
        self.path, self.shapes, self.dtypes = path, dict(shapes), dict(dtypes)
        self.missing = {name: math.prod(shape) for name, shape in shapes.items()}  # elements yet to be written
        self._lock = threading.Lock()
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        places: dict[str, tuple[int, int]] = {}
        end = 0
        for name, shape in shapes.items():
            size = bytes_of(shape, dtypes[name])
            header[name] = {"dtype": dtypes[name], "shape": list(shape), "data_offsets": [end, end + size]}
            places[name], end = (end, size), end + size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        body = 8 + len(text)
        self._places = {name: (body + start, size) for name, (start, size) in places.items()}
        self._file = path.open("wb", buffering=0)
        try:
            write_all(self._file.fileno(), len(text).to_bytes(8, "little") + text, 0)
            _allocate(self._file.fileno(), body + end)
        except (OSError, WorkError):
            self._file.close()
            raise

    def where(self, name: str) -> tuple[Path, int, int]:
        """The file, first byte and number of bytes in which a weight belongs."""
        return (self.path, *self._places[name])

    def write(self, name: str, tensor: torch.Tensor, start: int | None = None) -> None:
        """Write one weight, or its elements from `start` on, cast to the announced type; it must fit and be finite."""
        dtype = self._announced(name, tensor, start)
        tensor, finite = _cast(tensor, dtype)
        if not finite:
            raise UserError(
                f"The merged '{name}' holds numbers that {WORD_TO_TORCH[self.dtypes[name]]} cannot hold. "
                "Choose smaller settings or another --dtype."
            )
        self._put(name, tensor, start or 0)

    def keep(self, name: str, tensor: torch.Tensor) -> None:
        """Write a weight that no merge has made: what is infinite may be so, but nothing becomes so in another type."""
        dtype = self._announced(name, tensor)
        kept = tensor.detach().to("cpu", dtype).contiguous()
        if kept.dtype != tensor.dtype and not is_finite(kept) and bool((tensor.isfinite() & kept.isinf()).any()):
            raise UserError(
                f"'{name}' holds numbers that {WORD_TO_TORCH[self.dtypes[name]]} cannot hold. Choose another --dtype."
            )
        self._put(name, kept, 0)

    def _announced(self, name: str, tensor: torch.Tensor, start: int | None = None) -> torch.dtype:
        """The type in which a weight is to be written; one that is not awaited, or not so, is refused."""
        import torch

        with self._lock:
            left = self.missing.get(name, -1)
            fits = tensor.numel() <= left if start is not None else tuple(tensor.shape) == self.shapes.get(name)
            if not fits or (start is None and left != tensor.numel()):
                raise WorkError(f"The merge gave '{name}' twice, unasked, or in the shape {list(tensor.shape)}.")
            self.missing[name] = left - tensor.numel()
            if self.missing[name] == 0:
                del self.missing[name]
        dtype: torch.dtype = getattr(torch, WORD_TO_TORCH[self.dtypes[name]])
        return dtype

    def _put(self, name: str, tensor: torch.Tensor, start: int) -> None:
        import torch

        data = (tensor if tensor.dim() == 1 else tensor.reshape(-1)).view(torch.uint8).numpy().data
        write_all(self._file.fileno(), data, self._places[name][0] + start * tensor.itemsize)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the file; every announced weight must have been written."""
        self._file.close()
        if kind is None and self.missing:
            raise WorkError(f"The merge gave no '{min(self.missing)}' ({len(self.missing)} weights missing).")


def _cast(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, bool]:
    """Return numbers in a type, in one piece in main memory, and whether all of them are finite there."""
    import torch

    from mergectl.methods import _fused, _stored

    plain = x.is_cpu and x.is_contiguous() and not x.requires_grad
    looped = _fused.started() and _fused.worth(x.numel())
    if plain and looped and x.dtype == torch.float32 and dtype == torch.bfloat16:
        return _stored.rounded(x)
    if x.dtype != dtype or not plain:
        x = x.detach().to("cpu", dtype).contiguous()
    return x, not x.is_floating_point() or is_finite(x)


def is_finite(x: torch.Tensor) -> bool:
    """Say whether there is no NaN and no infinity: either makes the sum so, which finite numbers seldom do."""
    import torch

    if x.itemsize > 1 and x.dtype != torch.float16 and math.isfinite(float(x.sum())):
        return True
    return x.numel() == 0 or x.itemsize == 1 or all(bool(end.isfinite()) for end in x.aminmax())


def write_all(handle: int, data: bytes | memoryview, offset: int) -> None:
    """Write all bytes at a place of an open file."""
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(handle, view[done:], offset + done)


def _allocate(handle: int, size: int) -> None:
    """Give an open file its size: with its room on the disk, if the system can, which makes writing faster."""
    try:
        os.ftruncate(handle, size)
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        raise WorkError(
            f"No file of {size} bytes may be written here (ulimit -f?). Try a smaller --shard-size."
        ) from error
    try:
        os.posix_fallocate(handle, 0, size)
    except AttributeError:  # the system knows no such thing
        pass
    except OSError as error:  # nor do all file systems
        if error.errno in FULL:
            raise


class ModelWriter:
    """The weights of a model folder, in one file or, where that grows beyond `shard_bytes`, in several and an index."""

    def __init__(
        self, folder: Path, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str], shard_bytes: int
    ) -> None:
        sizes = {name: bytes_of(shape, dtypes[name]) for name, shape in shapes.items()}
        shards = cut(sizes, shard_bytes)
        count = len(shards)
        names = [SINGLE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        self._of: dict[str, SafetensorsWriter] = {}
        with ExitStack() as opened:
            for file, shard in zip(names, shards, strict=True):
                writer = SafetensorsWriter(folder / file, {n: shapes[n] for n in shard}, {n: dtypes[n] for n in shard})
                opened.push(writer)
                self._of.update(dict.fromkeys(shard, writer))
            self._opened = opened.pop_all()
        if count > 1:
            where = {name: writer.path.name for name, writer in self._of.items()}
            add_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where})

    def where(self, name: str) -> tuple[Path, int, int]:
        """The file, first byte and number of bytes in which a weight belongs."""
        return self._of[name].where(name)

    def write(self, name: str, tensor: torch.Tensor, start: int | None = None) -> None:
        """Write one weight, or its elements from `start` on, into its shard."""
        self._of[name].write(name, tensor, start)

    def keep(self, name: str, tensor: torch.Tensor) -> None:
        """Write one weight that no merge has made into its shard."""
        self._of[name].keep(name, tensor)

    def __enter__(self) -> ModelWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)


def cut(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Put names into shards, in order; none is larger than `most` bytes, unless one weight alone is."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
