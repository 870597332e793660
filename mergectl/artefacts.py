"""Write model folders whole or not at all: a temporary sibling, every file synced, then one rename."""

from __future__ import annotations

import contextlib
import errno
import glob
import itertools
import json
import os
import re
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mergectl.errors import UserError, WorkError
from mergectl.jsonfiles import read_json

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "spm.model",
    "spm_char.model", "sentencepiece.model", "source.spm", "target.spm", "target_vocab.json", "bpe.codes", "dict.txt",
    "entity_vocab.json", "normalizer.json", "tekken.json", "emoji.json", "*.tiktoken",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
CARRIED = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "generation_config.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
MODEL = ("config.json", "adapter_config.json")  # a folder that holds one of them and weights may be replaced
WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth)$")
THERE = "{out} exists already. Choose another -o, or replace it with --force."
LONGEST_PATH = 3800  # bytes: systems take 4095, and what lies in the folder is named, too
LONGEST = 220  # bytes of a folder's name: file systems take 255, and its temporary sibling's is longer
SAVING = 0.2  # seconds between two times that the disk is told to take what is there
FULL = (errno.ENOSPC, errno.EDQUOT)


def check_free(out: Path, force: bool) -> None:
    """Refuse an output folder that exists, unless it may be replaced, and a parent that cannot be written."""
    parts = [len(os.fsencode(part)) for part in out.absolute().parts]
    if parts[-1] > LONGEST or max(parts) > 255 or sum(parts) + len(parts) > LONGEST_PATH:
        raise UserError(f"{str(out)[:20]}... has a name in it that is too long for a folder. Choose a shorter -o.")
    if out.is_symlink():
        raise UserError(f"{out} is a link, which a folder does not replace. Name the folder itself, or another -o.")
    if out.exists() and not force:
        raise UserError(THERE.format(out=out))
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, not a folder. Choose another -o.")
    if out.exists() and any(out.iterdir()) and not _is_model(out):
        raise UserError(f"{out} is not a model folder, so --force will not replace it.")
    parent = next(p for p in out.absolute().parents if p.exists() or p.is_symlink())
    if not parent.exists():
        raise UserError(f"{parent} is a link that leads nowhere. Choose another -o.")
    if not parent.is_dir():
        raise UserError(f"{parent} is a file, so nothing can be written in it. Choose another -o.")
    if not os.access(parent, os.W_OK):
        raise UserError(f"{parent} cannot be written. Choose another -o.")


def _is_model(folder: Path) -> bool:
    """Whether a folder holds a model or its record; many a project keeps a `config.json`, too."""
    names = {path.name for path in folder.iterdir()}
    return not names.isdisjoint(MODEL) and ("mergectl.json" in names or any(WEIGHTS.search(name) for name in names))


@contextlib.contextmanager
def new_folder(out: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `out`; when the block ends well it becomes `out`, else it is removed."""
    check_free(out, force)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if _is_full(error):
            raise
        raise UserError(f"{out.parent} cannot be made: {error.strerror}. Choose another -o.") from error
    _remove_stale(out)
    check_free(out, force)  # a folder caught in mid-replacement may be back
    work = out.parent / f".{out.name}.tmp-{os.getpid()}"
    work.mkdir()
    try:
        yield work
        sync_all(work)
        _swap(work, out, force)
    except Exception as error:
        if _is_full(error):
            raise WorkError(f"The disk that holds {out.absolute().parent} is full. Nothing was written.") from error
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """Yield a temporary sibling of a model, in which it is made once more; it is removed in any case."""
    folder = folder.absolute()
    if not os.access(folder.parent, os.W_OK):
        raise UserError(f"{folder.parent}, where {folder.name} would be made anew, cannot be written. Add -o FOLDER.")
    _remove_stale(folder)
    work = folder.parent / f".{folder.name}.again-{os.getpid()}"
    work.mkdir()
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _is_full(error: Exception) -> bool:
    """Whether the disk had no room; the safetensors library says so in its text alone."""
    if isinstance(error, OSError):
        return error.errno in FULL
    return type(error).__name__ == "SafetensorError" and any(f"(os error {code})" in str(error) for code in FULL)


def _swap(work: Path, out: Path, force: bool) -> None:
    if out.exists() and not force:  # another command was faster
        raise UserError(THERE.format(out=out))
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
    for path in out.parent.glob(f".{glob.escape(out.name)}.*-*"):
        match = re.fullmatch(rf"\.{re.escape(out.name)}\.(tmp|old|again)-(\d+)", path.name)
        if match and not _alive(int(match[2])):
            if match[1] == "old" and not out.exists():
                path.rename(out)
            else:
                shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    """Whether another process has this number; what bears our own was left by a process of another container."""
    if pid == os.getpid():
        return False
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


def sync_all(folder: Path) -> None:
    """Make a folder and all that is in it durable, to be read by whom the folder is."""
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        path.chmod(folder.stat().st_mode & 0o666)  # safetensors makes files for their owner alone
        sync(path)
    sync(folder)


@contextlib.contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Let the disk take what is written into a folder meanwhile, so that little is left for the end."""
    done = threading.Event()

    def save() -> None:
        while not done.wait(SAVING):
            for path in [*folder.glob("*.safetensors"), *folder.glob("tasks/*/*.safetensors")]:
                with contextlib.suppress(OSError):  # what does not reach the disk is told at the end
                    sync(path)

    with ThreadPoolExecutor(1) as disk:
        running = disk.submit(save)
        try:
            yield
        finally:
            done.set()
            running.result()


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    work = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        work.write_text(text, encoding="utf-8")
        sync(work)
        work.replace(path)
    finally:
        work.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a small JSON file whole or not at all."""
    write_text(path, _json(content))


def add_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file into a new folder, which is made durable as a whole."""
    path.write_text(_json(content), encoding="utf-8")


def _json(content: Mapping[str, Any]) -> str:
    """JSON as people read it; what is no whole letter, as in the name of a file that is not UTF-8, as a number."""
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n"
    return re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text)


def carry_files(target: Path, *donors: Path) -> None:
    """Copy tokenizer, image settings and generation settings: the tokenizer as a whole from the first that has one.

    Where a configuration names Python files of the model's own folder, these are copied, too.
    """
    tokenizer = next((found for donor in donors if (found := _found(donor, TOKENIZER))), [])
    others = (_found(donor, [name]) for name in CARRIED for donor in donors)
    code = (donor.glob("*.py") for donor in donors if _has_code(donor))
    for source, name in itertools.chain(tokenizer, *others, *([(path, path.name) for path in paths] for paths in code)):
        if not (target / name).exists():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source, target / name)


def _found(folder: Path, names: Iterable[str]) -> list[tuple[Path, str]]:
    """Files of a folder by names or patterns, each with its place in the folder."""
    return [(path, str(path.relative_to(folder))) for name in names for path in sorted(folder.glob(name))]


def _has_code(folder: Path) -> bool:
    """Whether the classes of a model or its tokenizer are written in Python files beside it."""
    files = (folder / name for name in ("config.json", "tokenizer_config.json"))
    return any("auto_map" in read_json(path) for path in files if path.exists())


def check_space(folder: Path, needed: int) -> None:
    """Refuse to begin what the disk cannot hold."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise WorkError(
            f"The result needs {needed / 1e9:.3g} GB, but the disk that holds {folder.absolute().parent} has only "
            f"{free / 1e9:.3g} GB free. Nothing was written."
        )
