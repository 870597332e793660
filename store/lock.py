"""The lab's own lock around every open and close of the database file.

DuckDB 2.0 reads a file's header before it locks the file, so processes that take turns could overwrite each other's
committed rows. Holding this lock for the whole time the file is open prevents that.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from mergectl.store.errors import StoreBusyError, StoreError

PATIENCE = 60.0  # seconds to wait for others; a turn takes well under one


@contextlib.contextmanager
def hold(path: Path, *, exclusive: bool, wait: float = PATIENCE) -> Iterator[None]:
    """Hold the lock file for a while: alone to write, together with other readers to read."""
    handle = _open(path, needed=exclusive)
    if handle is None:
        yield
        return
    try:
        _acquire(handle, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH, path, time.monotonic() + wait)
        yield
    finally:
        os.close(handle)  # gives the lock back


def _open(path: Path, *, needed: bool) -> int | None:
    """Open the lock file; None where a reader meets a folder that nobody can write."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if needed:
            raise StoreError(f"The store cannot be written: {path}: {error.strerror}.") from error
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def _acquire(handle: int, how: int, path: Path, deadline: float) -> None:
    pause = 0.001
    while True:
        try:
            fcntl.flock(handle, how | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise StoreBusyError(
                    f"The store is busy: another process holds {path}. Try again in a moment."
                ) from None
        time.sleep(pause)
        pause = min(pause * 2, 0.02)
