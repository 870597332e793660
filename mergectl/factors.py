"""What methods compute from the weights of models again and again, kept on disk: decompositions, above all.

A file holds what was made of one weight. Its name is a digest of what was made, of the weights that it was made of
(their bytes, so a model that changed is another one), and of this layout. Files appear whole, by renaming; several
processes may write and read at once, and any file may be deleted at any time. What is read is mapped, not loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mergectl.errors import UserError
from mergectl.headers import WORD_TO_TORCH, read_header

if TYPE_CHECKING:
    import torch

LAYOUT = 1  # of the files; also to be raised when the same words begin to mean another computation
LIMIT = "MERGECTL_FACTORS_GB"  # the environment variable that says how many gigabytes may be kept
USUAL_LIMIT = 50.0
STALE = 86_400  # seconds after which nobody writes a file any more
_numbers = itertools.count()

Weights = Mapping[str, "torch.Tensor"]


class Factors:
    """`remember` for the models of one merge: what was made of their weights, from disk or made now."""

    def __init__(self, folder: Path, base: Weights, experts: Mapping[str, Weights]) -> None:
        """Keep files in `folder`, which need not be there yet."""
        self.folder, self.base, self.experts = folder, base, experts
        self._digests: dict[tuple[str | None, str], str] = {}
        self._room = Room(folder, limit())

    def __call__(
        self, what: str, task: str | None, weight: str, make: Callable[[], Sequence[torch.Tensor]]
    ) -> tuple[torch.Tensor, ...]:
        """Return what `make` gave for this task's weight (all tasks', without one) and the base's, now or before."""
        path = self._path(what, task, weight)
        known = _read(path)
        if known is not None:
            return known
        made = tuple(make())
        self._room.keep(path, made, {"what": what, "task": task or "", "weight": weight})
        return made

    def _path(self, what: str, task: str | None, weight: str) -> Path:
        tasks = list(self.experts) if task is None else [task]
        models = [(name if task is None else "", self._digest(name, weight)) for name in tasks]
        key = json.dumps([LAYOUT, what, weight, self._digest(None, weight), models])
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / f"{name[2:]}.safetensors"

    def _digest(self, task: str | None, weight: str) -> str:
        """The digest of one weight of an expert, or of the base: its type, its shape and its numbers."""
        import blake3
        import torch

        if (task, weight) not in self._digests:
            x = (self.base if task is None else self.experts[task])[weight].detach().contiguous().cpu()
            found = blake3.blake3(f"{x.dtype} {tuple(x.shape)}".encode())
            found.update(x.reshape(-1).view(torch.uint8).numpy().data)
            self._digests[task, weight] = found.hexdigest()
        return self._digests[task, weight]


class Room:
    """How much a folder may hold: what was not used for longest goes first. A full disk costs time, nothing else."""

    def __init__(self, folder: Path, most: int) -> None:
        """Take the folder and its largest size in bytes."""
        self.folder, self.most = folder, most
        self._held: int | None = None  # bytes, as far as this process knows
        self._lock = threading.Lock()

    def keep(self, path: Path, tensors: Sequence[torch.Tensor], note: Mapping[str, str]) -> None:
        """Write tensors into a file of their own, if there is room for it."""
        size = sum(x.numel() * x.itemsize for x in tensors)
        if size > self.most:
            return
        with contextlib.suppress(OSError):
            with self._lock:
                self._make_room(size)
            _write(path, tensors, note)

    def _make_room(self, size: int) -> None:
        if self._held is None:
            self._clear_away()
        if self._held is None or self._held + size > self.most:
            files = sorted(self.files(), key=lambda file: file[1])
            self._held = sum(bytes_ for _, _, bytes_ in files)
            for path, _, bytes_ in files:
                if self._held + size <= self.most:
                    break
                path.unlink(missing_ok=True)
                self._held -= bytes_
        self._held += size

    def _clear_away(self) -> None:
        """Remove what processes that were killed left half written."""
        for path in self.folder.glob("*/.*"):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < time.time() - STALE:
                    path.unlink()

    def files(self) -> list[tuple[Path, float, int]]:
        """Every file with the time it was last used at and its size; one that goes meanwhile is left out."""
        found = []
        for path in self.folder.glob("*/*.safetensors"):
            with contextlib.suppress(OSError):
                facts = path.stat()
                found.append((path, facts.st_mtime, facts.st_size))
        return found


def limit() -> int:
    """How many bytes may be kept, as the environment says."""
    text = os.environ.get(LIMIT, "")
    try:
        found = float(text) if text else USUAL_LIMIT
    except ValueError:
        found = -1.0
    if not 0 <= found < float("inf"):
        raise UserError(f"{LIMIT} must be a number of gigabytes, got '{text}'. Write 50, or 0 to keep nothing.")
    return int(found * 1e9)


def _read(path: Path) -> tuple[torch.Tensor, ...] | None:
    """Map a file's tensors, in their order; None if it is not there. One that is not whole is removed."""
    import numpy as np
    import torch

    try:
        header = read_header(path) if path.exists() else None
        if header is None:
            return None
        raw = torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c"))  # changes would stay with this process
    except UserError:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        return None
    except OSError:  # removed meanwhile
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    entries = [header[str(number)] for number in range(len(header))]
    parts = [(raw[e.start : e.start + e.nbytes], e) for e in entries]
    return tuple(part.view(getattr(torch, WORD_TO_TORCH[e.dtype])).reshape(e.shape) for part, e in parts)


def _write(path: Path, tensors: Sequence[torch.Tensor], note: Mapping[str, str]) -> None:
    """Write a file beside its place and rename it."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}.{os.getpid()}.{next(_numbers)}")
    try:
        save_file({str(n): x.detach().cpu().contiguous() for n, x in enumerate(tensors)}, work, metadata=dict(note))
        with work.open("rb") as file:  # a file of the right length that holds nothing would pass for a result
            os.fsync(file.fileno())
        work.replace(path)
    finally:
        work.unlink(missing_ok=True)
