"""A sign of life per run, and the judgement whether a started run still lives."""

from __future__ import annotations

import contextlib
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
    """A daemon thread that touches a file every few seconds until stopped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stop = threading.Event()
        path.write_text(json.dumps(here()), encoding="utf-8")
        self._thread = threading.Thread(target=self._beat, name=f"heartbeat-{path.name}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop touching the file and remove it."""
        self._stop.set()
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(INTERVAL):
            with contextlib.suppress(OSError):  # a full or missing disk must not stop the work
                os.utime(self.path)


def here() -> dict[str, Any]:
    """Return what identifies this process: its machine, number, and moment of birth where the system tells it."""
    return {"machine": machine(), "pid": os.getpid(), "born": _born(os.getpid())}


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
