"""A sign of life per run, and the judgement whether a started run still lives."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import threading
import time
from pathlib import Path
from typing import Any

INTERVAL = 5.0  # seconds between touches
STALE = 60.0  # seconds without a touch after which a run on another machine counts as lost


class Heartbeat:
    """A run's file, which a thread of the process touches every few seconds until the run ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "wb", buffering=0) as handle:
            handle.write(_here(os.getpid()))
        _PULSE.add(path)

    def stop(self) -> None:
        """Stop touching the file and remove it."""
        _PULSE.discard(self.path)
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)


class _Pulse:
    """The files that this process touches, and the daemon thread that does so for all of them."""

    def __init__(self) -> None:
        self._paths: set[Path] = set()
        self._thread: threading.Thread | None = None
        self._guard = threading.Lock()

    def forget(self) -> None:
        """Begin anew in a fork, which has no thread and whose parent's runs are not its own."""
        self._paths, self._thread, self._guard = set(), None, threading.Lock()

    def add(self, path: Path) -> None:
        with self._guard:
            self._paths.add(path)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
                self._thread.start()

    def discard(self, path: Path) -> None:
        with self._guard:
            self._paths.discard(path)

    def _beat(self) -> None:
        while True:
            time.sleep(INTERVAL)
            with self._guard:
                paths = list(self._paths)
            for path in paths:
                with contextlib.suppress(OSError):  # a full or missing disk must not stop the work
                    os.utime(path)


_PULSE = _Pulse()
os.register_at_fork(after_in_child=_PULSE.forget)


@functools.cache
def _here(pid: int) -> bytes:
    """Return what a heartbeat file holds; a fork is another process."""
    return json.dumps({"machine": machine(), "pid": pid, "born": _born(pid)}).encode()


def here() -> dict[str, Any]:
    """Return what identifies this process: its machine, number, and moment of birth where the system tells it."""
    return dict(json.loads(_here(os.getpid())))


def machine() -> str:
    """Return a name for this machine since its last start, and for the container it may be."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def alive(path: Path) -> bool:
    """Return whether the run behind a heartbeat file still lives; on another machine its age decides."""
    try:
        age = time.time() - path.stat().st_mtime
        known = json.loads(path.read_bytes())
        pid, where, born = int(known["pid"]), known["machine"], known["born"]
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError):
        return True  # cannot tell: no reason to call it lost
    if where != machine():
        return age < STALE
    return _exists(pid) and (born is None or born == _born(pid))


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _born(pid: int) -> str | None:
    """Return the process's start tick, which tells it from a later one with the same number."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
