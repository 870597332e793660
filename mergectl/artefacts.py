"""Write model folders whole or not at all: a temporary sibling, every file synced, then one rename."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergectl.errors import UserError, WorkError

if TYPE_CHECKING:
    import torch

CARRIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt",
    "spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "preprocessor_config.json",
    "processor_config.json", "generation_config.json", "chat_template.jinja",
)  # fmt: skip
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
WORD_TO_TORCH = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


def check_free(out: Path, force: bool) -> None:
    """Refuse an output folder that exists, unless it may be replaced, and a parent that cannot be written."""
    if out.exists() and not force:
        raise UserError(f"{out} exists already. Choose another -o, or replace it with --force.")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, not a folder. Choose another -o.")
    if out.exists() and any(out.iterdir()) and not (out / "config.json").exists():
        raise UserError(f"{out} is not a model folder, so --force will not replace it.")
    parent = next(p for p in [out.absolute().parent, *out.absolute().parents] if p.exists())
    if not os.access(parent, os.W_OK):
        raise UserError(f"{parent} cannot be written. Choose another -o.")


@contextlib.contextmanager
def new_folder(out: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `out`; when the block ends well it becomes `out`, else it is removed."""
    check_free(out, force)
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(out)
    work = out.parent / f".{out.name}.tmp-{os.getpid()}"
    work.mkdir()
    try:
        yield work
        for path in [p for p in work.rglob("*") if p.is_file()] + [work]:
            sync(path)
        _swap(work, out)
    except OSError as error:
        if error.errno == 28:
            raise WorkError(f"The disk that holds {out.parent} is full. Nothing was written.") from error
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _swap(work: Path, out: Path) -> None:
    old = out.parent / f".{out.name}.old-{os.getpid()}"
    if out.exists():
        out.rename(old)
    try:
        work.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _remove_stale(out: Path) -> None:
    """Remove what a killed process left beside `out`; put back a folder caught in mid-replacement."""
    for path in out.parent.glob(f".{out.name}.*-*"):
        match = re.fullmatch(rf"\.{re.escape(out.name)}\.(tmp|old)-(\d+)", path.name)
        if match and not _alive(int(match[2])):
            if match[1] == "old" and not out.exists():
                path.rename(out)
            else:
                shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def sync(path: Path) -> None:
    """Make a file or folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    work = path.with_name(f".{path.name}.{os.getpid()}")
    work.write_text(text, encoding="utf-8")
    sync(work)
    work.replace(path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a small JSON file whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")


def carry_files(source: Path, target: Path) -> None:
    """Copy the tokenizer, image settings and generation settings of a model folder."""
    for name in CARRIED:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


class SafetensorsWriter:
    """A safetensors file filled weight by weight, in any order: shapes and types are known beforehand."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]) -> None:
        self.dtypes, self.missing = dict(dtypes), set(shapes)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._start: dict[str, int] = {}
        end = 0
        for name, shape in shapes.items():
            size = ITEM_BYTES[dtypes[name]]
            for n in shape:
                size *= n
            header[name] = {"dtype": dtypes[name], "shape": list(shape), "data_offsets": [end, end + size]}
            self._start[name], end = end, end + size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._body = 8 + len(text)
        self._file.truncate(self._body + end)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one weight, cast to the type that was announced for it."""
        import torch

        tensor = tensor.to(getattr(torch, WORD_TO_TORCH[self.dtypes[name]])).contiguous()
        self._file.seek(self._body + self._start[name])
        self._file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        self.missing.remove(name)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the file; every announced weight must have been written."""
        self._file.close()
        if kind is None and self.missing:
            raise WorkError(f"The merge gave no '{min(self.missing)}' ({len(self.missing)} weights missing).")
