"""Run ids: derived from what is run, and never given out twice."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from mergectl.store.errors import StoreError
from mergectl.store.places import Places
from mergectl.store.segments import archived, write_durably


def run_id(identity: Iterable[object], attempt: int) -> str:
    """Return the 12 hex characters for one attempt at (kind, config digest, seed, study, trial)."""
    text = "\x1f".join(str(part) for part in (*identity, attempt))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def reserve(places: Places, identity: Iterable[object]) -> tuple[str, int]:
    """Return a run id nobody has, and its attempt number; two processes asking at once get different ones.

    The ids given out stand in one file, which also answers while the database is busy or broken. It is synced (`keep`)
    before any segment leaves the inbox; until then a power cut may cost it lines, but not the segments of these runs.
    """
    identity = tuple(identity)
    try:
        handle = _open(places)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            known = os.pread(handle, os.fstat(handle).st_size, 0)
            attempt = 1
            while _taken(places, found := run_id(identity, attempt), known):
                attempt += 1
            os.write(handle, b"\n" + found.encode())
        finally:
            os.close(handle)
    except OSError as error:
        raise StoreError(f"A run cannot be registered in {places.ids}: {error.strerror}.") from error
    return found, attempt


def _taken(places: Places, name: str, known: bytes) -> bool:
    inbox = os.fspath(places.inbox)
    return b"\n" + name.encode() in known or any(
        os.path.exists(f"{inbox}/{name}{stage}.json") for stage in ("", ".started")
    )


def keep(places: Places) -> None:
    """Make the ids given out so far last through a power cut."""
    handle = _open(places)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def note(places: Places, names: Iterable[str]) -> None:
    """Add ids that were given out elsewhere, so that no run begun here gets one of them."""
    handle = _open(places)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        known = set(places.ids.read_bytes().split(b"\n"))
        os.write(handle, b"".join(b"\n" + name.encode() for name in names if name.encode() not in known))
        os.fsync(handle)
    finally:
        os.close(handle)


def known_ids(places: Places) -> list[str]:
    """Return the ids found in the lab's own files."""
    seen = {document["run_id"] for document in archived(places)}
    seen.update(path.name.split(".")[0] for path in places.inbox.glob("*.json"))
    return sorted(seen)


def _open(places: Places) -> int:
    """Open the file of ids for appending; a missing one is first made from the segments there are."""
    path: Path = places.ids
    if not path.exists():
        fresh = path.with_name(f".{path.name}.{os.getpid()}.new")
        write_durably(fresh, b"".join(b"\n" + name.encode() for name in known_ids(places)))
        try:
            os.link(fresh, path)  # fails when another process was faster
        except FileExistsError:
            pass
        finally:
            fresh.unlink()
    return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
