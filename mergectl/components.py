"""Keep large float32 blocks for reuse: in memory, in files shared with other processes, the least used let go first."""

from __future__ import annotations

import fcntl
import hashlib
import math
import re
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Fill = Callable[["torch.Tensor"], None]


class Shelf:
    """Tensors by key, the ones not used for longest let go when there are too many.

    With a `folder` they lie in files there, mapped into memory: processes that name the same folder make each only
    once and share its pages. Without one they lie in the memory of `device` or the main memory; what is larger than
    `share` of what is free there goes into a file below `spill`, which is gone with the process.
    """

    def __init__(
        self, *, device: str = "cpu", folder: Path | None = None, spill: Path | None = None, share: float = 0.5
    ) -> None:
        self.device, self.folder, self.spill = device, folder, spill
        places = (device, "cpu") if folder is None else ()
        self.room = {place: int(share * _free_memory(place)) for place in dict.fromkeys(places)}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self.room["files"] = int(share * shutil.disk_usage(folder).free)
        self._kept: OrderedDict[str, tuple[str, torch.Tensor]] = OrderedDict()  # where each lies, and itself

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: str, shape: tuple[int, int]) -> torch.Tensor | None:
        """Return what is kept under a key, by this process or another one."""
        if key not in self._kept and self.folder is not None:
            try:
                self._kept[key] = ("files", _mapped(self._path(key), shape, "c"))
            except FileNotFoundError:
                return None
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key][1]

    def put(self, key: str, shape: tuple[int, int], fill: Fill) -> torch.Tensor:
        """Make a tensor [rows, columns], let `fill` write it, and keep it."""
        if self.folder is not None:
            made = ("files", self._in_folder(key, shape, fill))
        else:
            made = self._in_memory(shape)
            fill(made[1])
        self._kept[key] = made
        return made[1]

    def _in_memory(self, shape: tuple[int, int]) -> tuple[str, torch.Tensor]:
        import torch

        for place, room in self.room.items():
            if _size(shape) <= room:
                self._make_room(place, _size(shape))
                return place, torch.empty(shape, dtype=torch.float32, device=place)
        with tempfile.TemporaryFile(dir=self.spill) as file:
            file.truncate(_size(shape))
            return "file", _mapped(file, shape, "r+")

    def _in_folder(self, key: str, shape: tuple[int, int], fill: Fill) -> torch.Tensor:
        """Write a file that all processes share; who comes second waits for the first and takes what it made."""
        assert self.folder is not None
        path = self._path(key)
        with (self.folder / "components.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                self._make_room("files", _size(shape))
                unfinished = path.with_suffix(".part")
                with unfinished.open("wb") as file:
                    file.truncate(_size(shape))
                fill(_mapped(unfinished, shape, "r+"))
                unfinished.replace(path)
            return _mapped(path, shape, "c")

    def _make_room(self, place: str, size: int) -> None:
        """Let go of what was not used for longest."""
        for key in [key for key, (where, _) in self._kept.items() if where == place]:
            if size + sum(_size(x.shape) for where, x in self._kept.values() if where == place) <= self.room[place]:
                return
            del self._kept[key]
            if self.folder is not None:
                self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.f32"


def _size(shape: Sequence[int]) -> int:
    """Return the bytes of a tensor in float32."""
    return 4 * math.prod(shape)


def _mapped(file: Path | IO[bytes], shape: tuple[int, int], mode: Literal["c", "r+"]) -> torch.Tensor:
    """Return a file's content as a tensor whose pages all processes share."""
    import numpy as np
    import torch

    return torch.from_numpy(np.memmap(file, dtype=np.float32, mode=mode, shape=shape))


def _free_memory(device: str) -> int:
    """Return the bytes that are free on a device."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    try:
        return int(re.findall(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[0]) * 1024
    except (OSError, IndexError):  # no Linux: a guess that suits a laptop
        return 4 << 30
