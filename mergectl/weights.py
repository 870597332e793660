"""Read a model folder lazily, as a mapping from weight name to tensor.

Headers are checked at once, weights are read when asked for, by plain reads of their bytes. Pickled `.bin` files are
read with `weights_only=True` alone.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergectl.digests import blake3
from mergectl.errors import UserError
from mergectl.headers import TORCH_TO_WORD, WORD_TO_TORCH, Entry, read_header
from mergectl.jsonfiles import read_config, read_json, read_record
from mergectl.pins import without_commit

if TYPE_CHECKING:
    import torch

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


class Checkpoint(Mapping[str, "torch.Tensor"]):
    """One model on disk. `ckpt[name]` reads a weight; `shape`, `dtype` and `names` read headers only."""

    def __init__(self, folder: Path, ref: str) -> None:
        self.folder, self.ref = folder, ref
        self.config = read_config(folder / "config.json") if (folder / "config.json").exists() else {}
        self.meta = read_record(folder)
        self._files = weight_files(folder, ref)

    @cached_property
    def _file_of(self) -> dict[str, WeightFile]:
        """Name -> the file that holds it; a name in two files, or not where the index says, is refused."""
        found: dict[str, WeightFile] = {}
        for path, listed in self._files.items():
            weights = WeightFile(path)
            for name in weights.header:
                if name in found:
                    raise UserError(
                        f"{self.ref}: weight '{name}' stands in both {found[name].path.name} and {path.name}."
                    )
                found[name] = weights
            if absent := next((name for name in listed if name not in weights.header), None):
                raise UserError(
                    f"{self.ref}: the index places weight {absent!r} in {shown(path.name)}, which has none such."
                )
        if not found:
            raise UserError(f"{self.ref}: {next(iter(self._files)).name} holds no weights.")
        return found

    @property
    def files(self) -> list[Path]:
        """The files that hold its weights."""
        return list(self._files)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._file_of[name].read(name)

    def __contains__(self, name: object) -> bool:
        """Say whether there is such a weight, without reading it."""
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    @property
    def names(self) -> list[str]:
        """Weight names, in file order."""
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight, without reading it."""
        return self._file_of[name].header[name].shape

    def dtype(self, name: str) -> str:
        """The safetensors word for a weight's type (`F32`, `BF16`, ...), without reading it."""
        return self._file_of[name].header[name].dtype

    def where(self, name: str) -> tuple[Path, int, int] | None:
        """The file, first byte and number of bytes of a weight; None where no file holds it as it is."""
        file = self._file_of[name]
        entry = file.header[name]
        return None if entry.start < 0 else (file.path, entry.start, entry.nbytes)

    def check_unchanged(self) -> None:
        """Refuse files of weights that are others now than when their headers were read."""
        for file in {file.path: file for file in self._file_of.values()}.values():
            file.check_unchanged()

    @cached_property
    def digest(self) -> str:
        """Digest of everything that decides what the model computes: weights, heads, masks, config."""
        sha = hashlib.sha256()
        beside = (self.folder / name for name in ("config.json", "unified.safetensors"))
        parts = [*self._files, *beside, *sorted((self.folder / "tasks").glob("*/*"))]
        for path in parts:
            if path.is_file():
                sha.update(path.name.encode())
                sha.update(blake3(path))
        return sha.hexdigest()

    @property
    def place(self) -> str:
        """Where it can be opened again."""
        return str(self.folder)

    @property
    def label(self) -> str:
        """A short name for tables: the folder's name, or the hub id."""
        local = self.ref.startswith((".", "/")) or Path(self.ref).exists()
        return self.folder.name if local else without_commit(self.ref)

    @property
    def task(self) -> str | None:
        """The task that the model was fine-tuned on, where it says so."""
        return self.meta.get("task")

    @cached_property
    def heads(self) -> dict[str, dict[str, Any]]:
        """For a merged folder: task -> what `tasks/<task>/task.json` says, with its `folder`."""
        found = {}
        for path in sorted((self.folder / "tasks").glob("*/task.json")):
            found[path.parent.name] = {**read_json(path), "folder": path.parent}
        return found


class Derived(Checkpoint):
    """A model made from another one, `model`: whatever it does not say itself is as there."""

    model: Checkpoint

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.model[name]

    def __contains__(self, name: object) -> bool:
        """Say whether there is such a weight, without reading it."""
        return name in self.model

    def __iter__(self) -> Iterator[str]:
        return iter(self.model)

    def __len__(self) -> int:
        return len(self.model)

    @property
    def names(self) -> list[str]:
        """Weight names."""
        return self.model.names

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight, without reading it."""
        return self.model.shape(name)

    def dtype(self, name: str) -> str:
        """The type of a weight, without reading it."""
        return self.model.dtype(name)

    def where(self, name: str) -> tuple[Path, int, int] | None:
        """The file, first byte and number of bytes of a weight; None where no file holds it as it is."""
        return self.model.where(name)

    def check_unchanged(self) -> None:
        """Refuse files of weights that are others now than when their headers were read."""
        self.model.check_unchanged()

    @property
    def label(self) -> str:
        """The model's name."""
        return self.model.label


class WeightFile:
    """One weight file: its header at once, its tensors on demand."""

    def __init__(self, path: Path) -> None:
        self.path, self._seen = path, _state(path)
        opened = _open_pickled(path) if path.suffix in (".bin", ".pt") else _open_safetensors(path)
        self.header, self.read = opened

    def check_unchanged(self) -> None:
        """Refuse a file that is written to, or another one of the same name, since its header was read."""
        if self._seen != _state(self.path):
            raise UserError(f"{self.path} changed while it was merged. Merge again when nothing writes to it.")


def _state(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file is written to or replaced; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino


_Opened = tuple[dict[str, Entry], "Callable[[str], torch.Tensor]"]


def _open_safetensors(path: Path) -> _Opened:
    header = read_header(path)
    return header, lambda name: _read(path, name, header[name])


def _read(path: Path, name: str, entry: Entry) -> torch.Tensor:
    """Read one weight's bytes into a tensor of its own."""
    import torch

    raw = torch.empty(entry.nbytes, dtype=torch.uint8)
    view, done = raw.numpy().data, 0
    with path.open("rb", buffering=0) as file:
        while done < entry.nbytes:
            got = os.preadv(file.fileno(), [view[done:]], entry.start + done)
            if got == 0:
                raise UserError(f"{path} became shorter while weight '{name}' was read.")
            done += got
    tensor = raw.ne(0) if entry.dtype == "BOOL" else raw.view(getattr(torch, WORD_TO_TORCH[entry.dtype]))
    return tensor.reshape(entry.shape)


def _open_pickled(path: Path) -> _Opened:
    weights = _load_pickled(path)
    if not isinstance(weights, dict) or not all(isinstance(n, str) and _is_tensor(w) for n, w in weights.items()):
        raise UserError(f"{path} holds something else than weights by name. Convert it to safetensors.")
    for name, weight in weights.items():
        if not name.isprintable():
            raise UserError(f"{path}: a weight is called {name!r}, which cannot be printed. Convert it to safetensors.")
        if weight.is_meta or weight.is_nested or str(weight.layout) != "torch.strided":
            kind = "without numbers" if weight.is_meta else "not stored in full"
            raise UserError(f"{path}: weight {name!r} is {kind}, and cannot be merged. Convert it to safetensors.")
    words = {name: str(w.dtype).removeprefix("torch.") for name, w in weights.items()}
    for name, word in words.items():
        if word not in TORCH_TO_WORD or word.startswith("complex"):
            raise UserError(f"{path}: weight '{name}' is of the type {word}, which cannot be merged.")
    header = {n: Entry(tuple(w.shape), TORCH_TO_WORD[words[n]], -1, w.numel() * w.itemsize) for n, w in weights.items()}
    return header, weights.__getitem__


def _is_tensor(found: object) -> bool:
    import torch

    return isinstance(found, torch.Tensor)


def _load_pickled(path: Path) -> Any:
    """Weights and nothing else; files from before torch 1.6 cannot be mapped and are read whole."""
    import pickle
    import zipfile

    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError) as error:
        raise UserError(
            f"{path} could not be read as plain weights; pickled code is never run. Convert it to safetensors."
        ) from error


def weight_files(folder: Path, ref: str) -> dict[Path, list[str]]:
    """Find the weight files of a model folder, single or sharded, with the names that an index places in each."""
    for single, index in ((SINGLE, INDEX), (PICKLED, PICKLED_INDEX)):
        if (folder / single).exists():
            return {folder / single: []}
        if (folder / index).exists():
            return _shards(folder, index, ref)
    raise UserError(f"{ref} holds no weights: neither {SINGLE} nor {INDEX} is in {folder}.")


def shown(name: str) -> str:
    """A name from a file as it may be written to a terminal."""
    return name if name.isprintable() else repr(name)


def _shards(folder: Path, index: str, ref: str) -> dict[Path, list[str]]:
    """The files that an index names, in its order; refuse an index that points outside the folder."""
    where = read_json(folder / index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise UserError(f"{folder / index} names no weights: its 'weight_map' should say in which file each one is.")
    paths: dict[Path, list[str]] = {}
    for weight, name in ((weight, str(name)) for weight, name in where.items()):
        if folder / name in paths:
            paths[folder / name].append(weight)
            continue
        if Path(name).name != name or name in ("", ".", ".."):
            raise UserError(f"{folder / index} names {name!r}, which lies outside the folder.")
        if not (folder / name).is_file():
            raise UserError(f"{ref}: the shard {shown(name)} named in {index} is missing.")
        paths[folder / name] = [weight]
    return paths
