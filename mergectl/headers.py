"""Read a safetensors header, trusting nothing in it: every weight's type, shape and place in the file is checked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr  # cuts what is long
from typing import Any, NamedTuple

from mergectl.errors import UserError

LONGEST = 100_000_000  # bytes of a header; no real one comes near
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
    "U8": 1, "BOOL": 1, "C64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
WORD_TO_TORCH = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
TORCH_TO_WORD = {word: key for key, word in WORD_TO_TORCH.items()}
FLOATING = ("F16", "BF16", "F32", "F64")  # what can be merged


class Entry(NamedTuple):
    """What a header says of one weight; `start` counts from the beginning of the file, -1 where there is no place."""

    shape: tuple[int, ...]
    dtype: str
    start: int
    nbytes: int


class _BrokenError(Exception):
    """What is wrong with a header, as the middle of a sentence."""


def read_header(path: Path) -> dict[str, Entry]:
    """Every weight of a safetensors file by name, in the header's order; anything amiss is a UserError."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            first = file.read(8)
            length = int.from_bytes(first, "little")
            _check_length(first, length, size)
            text = file.read(length)
        return _entries(_parse(text), 8 + length, size)
    except _BrokenError as wrong:
        raise UserError(f"{path} is not a whole safetensors file: {wrong}. Copy or download it again.") from wrong
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error


def _check_length(first: bytes, length: int, size: int) -> None:
    if len(first) < 8:
        raise _BrokenError(f"it has {size} bytes, too few for a header")
    if length > LONGEST:
        raise _BrokenError(f"its header claims {length} bytes, more than the {LONGEST} that are allowed")
    if 8 + length > size:
        raise _BrokenError(f"its header claims {length} bytes, but the file has only {size}")


def _parse(text: bytes) -> list[tuple[str, Any]]:
    """The header's pairs in order; a repeated key of any object in it is refused."""

    def pairs(found: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
        names = [name for name, _ in found]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise _BrokenError(f"{repr(twice)} stands twice in its header")
        return found

    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=lambda got: dict(pairs(got)))
    except (ValueError, RecursionError) as error:
        raise _BrokenError("its header is not JSON") from error
    if not isinstance(found, dict):
        raise _BrokenError("its header is no JSON object")
    return list(found.items())


def _entries(pairs: list[tuple[str, Any]], body: int, size: int) -> dict[str, Entry]:
    found = {name: _entry(name, fact, body, size) for name, fact in pairs if name != "__metadata__"}
    _check_places(found, body, size)
    return found


def _entry(name: str, fact: Any, body: int, size: int) -> Entry:
    """One weight, checked by itself."""
    if not name.isprintable():
        raise _BrokenError(f"a weight is called {repr(name)}, which cannot be printed")
    if not isinstance(fact, Mapping) or not {"dtype", "shape", "data_offsets"} <= fact.keys():
        raise _BrokenError(f"weight '{name}' has no dtype, shape and data_offsets")
    dtype, shape, offsets = fact["dtype"], fact["shape"], fact["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _BrokenError(f"weight '{name}' is of the unknown type {repr(dtype)}")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise _BrokenError(f"weight '{name}' has the shape {repr(shape)} at {repr(offsets)}, which are no counts")
    start, end = offsets
    nbytes = math.prod(shape) * ITEM_BYTES[dtype]
    if end - start != nbytes:
        raise _BrokenError(f"weight '{name}' ({dtype}, {repr(shape)}) needs {nbytes} bytes, but has {end - start}")
    if body + end > size:
        raise _BrokenError(f"weight '{name}' ends at byte {body + end}, but the file has only {size}")
    return Entry(tuple(shape), dtype, body + start, nbytes)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 2**63 for n in values)


def _check_places(found: Mapping[str, Entry], body: int, size: int) -> None:
    """Weights lie one behind the other from the header to the file's end."""
    at, before = body, "the header"
    for name, entry in sorted(found.items(), key=lambda pair: (pair[1].start, pair[1].nbytes)):
        if entry.start < at:
            raise _BrokenError(f"weight '{name}' overlaps {before}")
        if entry.start > at:
            raise _BrokenError(f"{entry.start - at} bytes before weight '{name}' belong to nothing")
        at, before = at + entry.nbytes, f"weight '{name}'"
    if at < size:
        raise _BrokenError(f"{size - at} bytes after {before} belong to nothing")
