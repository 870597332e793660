"""Look at models of the hub by their headers, before their weights are fetched: what does not fit is told at once."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from fnmatch import fnmatch
from pathlib import Path

from mergectl.headers import read_header

WEIGHTS = "*.safetensors"

Peeked = dict[tuple[str, str | None], Path]  # repository and revision -> a folder that stands for it
_now: ContextVar[Peeked | None] = ContextVar("peeked", default=None)


@contextlib.contextmanager
def peeking() -> Iterator[Peeked]:
    """Meanwhile, have models that are not here opened without their numbers; yield those for which that was done.

    Their files have their headers and length, and nothing else in them. They are gone at the end.
    """
    if (outer := _now.get()) is not None:
        yield outer
        return
    peeked: Peeked = {}
    token = _now.set(peeked)
    try:
        yield peeked
    finally:
        _now.reset(token)
        for folder in peeked.values():
            shutil.rmtree(folder, ignore_errors=True)


def look(repo: str, revision: str | None, small: Sequence[str], never: Sequence[str]) -> Path | None:
    """A folder that stands for a model while there is peeking; None for one that is here, or has no such headers.

    `small` are patterns of the files that are fetched at once, `never` of those that are no part of the model.
    """
    peeked = _now.get()
    if peeked is None or (repo, revision) in peeked:
        return None if peeked is None else peeked[repo, revision]
    from huggingface_hub import HfApi, snapshot_download

    here = Path(snapshot_download(repo, revision=revision, allow_patterns=list(small), ignore_patterns=list(never)))
    if any(here.rglob(WEIGHTS)):
        return None
    files = HfApi().list_repo_files(repo, revision=here.name)
    weights = [name for name in files if fnmatch(name, WEIGHTS) and not any(fnmatch(name, part) for part in never)]
    if not weights:
        return None
    folder = Path(tempfile.mkdtemp(prefix="mergectl-headers-"))
    try:
        for name in weights:
            _stand_in(folder / name, repo, here.name, name)
    except Exception:  # what is wrong with the files is told when they are here
        shutil.rmtree(folder, ignore_errors=True)
        return None
    for file in here.rglob("*"):
        if file.is_file():
            (folder / file.relative_to(here)).parent.mkdir(parents=True, exist_ok=True)
            (folder / file.relative_to(here)).symlink_to(file)
    peeked[repo, revision] = folder
    return folder


def _stand_in(path: Path, repo: str, commit: str, name: str) -> None:
    """Make a file with the header and the length of one on the hub."""
    from huggingface_hub import HfApi

    found = HfApi().parse_safetensors_file_metadata(repo, name, revision=commit)
    entries = {
        word: {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": list(one.data_offsets)}
        for word, one in found.tensors.items()
    }
    header = json.dumps({"__metadata__": found.metadata, **entries}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + max((one.data_offsets[1] for one in found.tensors.values()), default=0))
    read_header(path)  # refuses what it would refuse of the file itself
