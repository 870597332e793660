"""Keep two commands from making the same folder or file at the same time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from mergectl.errors import UserError

PAUSE = 0.05  # seconds between two looks at what another process holds


@contextlib.contextmanager
def claimed(out: Path, work: str, *, wait: bool = False) -> Iterator[None]:
    """Be the only process that makes `out`; else refuse, or wait for the other. A killed process holds nothing."""
    path = out.absolute().parent / f".{out.name}.lock"
    made = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = _lock(path)
    while handle is None and wait:
        time.sleep(PAUSE)
        handle = _lock(path)
    if handle is None:
        raise UserError(f"Another command is {work} {out} just now. Wait for it, or choose another -o.")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: who opened it before finds that it is another file now
        os.close(handle)
        for parent in made:  # a command that made nothing leaves no empty folders
            with contextlib.suppress(OSError):
                parent.rmdir()


def _lock(path: Path) -> int | None:
    """Open and lock a file that is still the one of that name; None if somebody else has it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.stat().st_ino == os.fstat(handle).st_ino:
                return handle
        except FileNotFoundError:
            pass
        except BlockingIOError:
            os.close(handle)
            return None
        os.close(handle)
