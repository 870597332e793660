"""What calibration found, on disk: one file per model, task rows and options, named by their digest.

A file is written beside its place and renamed into it, so that processes which make the same one do no harm; a broken
one counts as none. All of it can be made again: removing the folder only costs the time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergectl import artefacts
from mergectl.errors import UserError, WorkError
from mergectl.weights import WeightFile

if TYPE_CHECKING:
    import torch

FORMAT = 1  # raised whenever the same models, rows and options would give other numbers


def key_of(parts: Mapping[str, Any]) -> str:
    """The digest of all that decides what is found."""
    text = json.dumps({"format": FORMAT, **parts}, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Stored(Mapping[str, "torch.Tensor"]):
    """The tensors of a file by name, each read when it is asked for, and the facts beside them."""

    path: Path
    key: str
    facts: Mapping[str, Any]

    @cached_property
    def _file(self) -> WeightFile:
        return WeightFile(self.path)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._file.header:
            raise KeyError(name)
        try:
            return self._file.read(name)
        except FileNotFoundError as error:
            raise WorkError(f"{self.path} was removed while it was read. Do it again.") from error

    def __contains__(self, name: object) -> bool:
        """Say whether there is such a tensor, without reading it."""
        return name in self._file.header

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.header)

    def __len__(self) -> int:
        return len(self._file.header)


def find(folder: Path, key: str) -> Stored | None:
    """What is stored under a key; None if there is nothing, or nothing whole."""
    from safetensors import SafetensorError, safe_open

    path = folder / f"{key}.safetensors"
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
        stored = Stored(path, key, facts)
        len(stored)  # reads the header
    except (SafetensorError, OSError, UserError, KeyError, ValueError):
        return None
    return stored


def put(folder: Path, key: str, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> Stored:
    """Store tensors and facts under a key, whole or not at all."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    artefacts.check_space(folder, sum(x.numel() * x.element_size() for x in tensors.values()))
    path = folder / f"{key}.safetensors"
    work = folder / f".{key}.{os.getpid()}"
    try:
        whole = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
        save_file(whole, work, metadata={"facts": json.dumps(facts)})
        work.chmod(0o644)  # the library writes for its owner alone
        artefacts.sync(work)
        work.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            work.unlink()
    return Stored(path, key, facts)
