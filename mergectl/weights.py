"""Read a model folder lazily, as a mapping from weight name to tensor.

Nothing is loaded until a weight is asked for; files stay memory-mapped. Pickled `.bin` files are read with
`weights_only=True` alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergectl.errors import UserError

if TYPE_CHECKING:
    import torch

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


class Checkpoint(Mapping[str, "torch.Tensor"]):
    """One model on disk. `ckpt[name]` reads a weight; `shape`, `dtype` and `names` read headers only."""

    def __init__(self, folder: Path, ref: str) -> None:
        self.folder, self.ref = folder, ref
        self.config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
        self.meta = read_json(folder / "mergectl.json") if (folder / "mergectl.json").exists() else {}
        self._files = weight_files(folder, ref)

    @cached_property
    def _where(self) -> dict[str, WeightFile]:
        where: dict[str, WeightFile] = {}
        for path in self._files:
            weights = WeightFile(path)
            for name in weights.header:
                if name in where:
                    raise UserError(
                        f"{self.ref}: weight '{name}' stands in both {where[name].path.name} and {path.name}."
                    )
                where[name] = weights
        if not where:
            raise UserError(f"{self.ref}: {self._files[0].name} holds no weights.")
        return where

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._where[name].read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    @property
    def names(self) -> list[str]:
        """Weight names, in file order."""
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight, without reading it."""
        return self._where[name].header[name][0]

    def dtype(self, name: str) -> str:
        """The safetensors word for a weight's type (`F32`, `BF16`, ...), without reading it."""
        return self._where[name].header[name][1]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that decides what the model computes: weights, heads, masks, config."""
        sha = hashlib.sha256()
        beside = (self.folder / name for name in ("config.json", "unified.safetensors"))
        parts = [*self._files, *beside, *sorted((self.folder / "tasks").glob("*/*"))]
        for path in parts:
            if path.is_file():
                sha.update(path.name.encode())
                with path.open("rb") as file:
                    sha.update(hashlib.file_digest(file, "sha256").digest())
        return sha.hexdigest()

    @property
    def label(self) -> str:
        """A short name for tables: the folder's name, or the hub id."""
        return self.folder.name if self.ref.startswith((".", "/")) or Path(self.ref).exists() else self.ref

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


class WeightFile:
    """One weight file: its header at once, its tensors on demand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        opened = _open_pickled(path) if path.suffix == ".bin" else _open_safetensors(path)
        self.header, self.read = opened


_Header = dict[str, tuple[tuple[int, ...], str]]


def _open_safetensors(path: Path) -> tuple[_Header, Callable[[str], torch.Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        file: Any = safe_open(path, framework="pt")  # the library is untyped
        names = list(file.keys())
        slices = {name: file.get_slice(name) for name in names}
        header = {name: (tuple(s.get_shape()), str(s.get_dtype())) for name, s in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}). Copy or download it again.") from error
    return header, file.get_tensor


_TORCH_TO_WORD = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


def _open_pickled(path: Path) -> tuple[_Header, Callable[[str], torch.Tensor]]:
    weights = _load_pickled(path)
    if not isinstance(weights, dict) or not all(hasattr(w, "dtype") for w in weights.values()):
        raise UserError(f"{path} holds something else than weights by name. Convert it to safetensors.")
    words = {name: str(w.dtype).removeprefix("torch.") for name, w in weights.items()}
    for name, word in words.items():
        if word not in _TORCH_TO_WORD:
            raise UserError(f"{path}: weight '{name}' is of the type {word}, which cannot be merged.")
    header = {name: (tuple(w.shape), _TORCH_TO_WORD[words[name]]) for name, w in weights.items()}
    return header, weights.__getitem__


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


def weight_files(folder: Path, ref: str) -> list[Path]:
    """Find the weight files of a model folder, single or sharded; refuse an index that points outside it."""
    for single, index in ((SINGLE, INDEX), (PICKLED, PICKLED_INDEX)):
        if (folder / single).exists():
            return [folder / single]
        if (folder / index).exists():
            return _shards(folder, index, ref)
    raise UserError(f"{ref} holds no weights: neither {SINGLE} nor {INDEX} is in {folder}.")


def _shards(folder: Path, index: str, ref: str) -> list[Path]:
    """The files that an index names, in its order."""
    where = read_json(folder / index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise UserError(f"{folder / index} names no weights: its 'weight_map' should say in which file each one is.")
    paths = []
    for name in dict.fromkeys(map(str, where.values())):
        if Path(name).name != name or name in ("", ".", ".."):
            raise UserError(f"{folder / index} names '{name}', which lies outside the folder.")
        if not (folder / name).is_file():
            raise UserError(f"{ref}: the shard {name} named in {index} is missing.")
        paths.append(folder / name)
    return paths


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, or say in one sentence what is wrong with the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} should hold a JSON object, not a {type(content).__name__}.")
    return content
