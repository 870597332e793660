"""A search's workers as processes of this machine: started, watched, replaced when killed, ended with the search."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import IO

from mergectl.errors import WorkError

PARENT = "MERGECTL_PARENT"  # tells a worker whose end is its own
GRACE = 10.0  # seconds that a worker gets to end by itself


@dataclass
class Member:
    """One worker and what it says when it fails."""

    process: subprocess.Popen[bytes]
    said: IO[bytes]

    def words(self) -> str:
        """The last line of what it said."""
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"it ended with code {self.process.returncode}"


class LocalCrew:
    """So many processes of one command; use it as a context manager."""

    def __init__(self, command: Sequence[str], count: int, threads: int) -> None:
        self._command, self._count, self._threads = list(command), count, threads
        self._members: list[Member] = []
        self._finished, self._deaths = 0, 0  # deaths since a trial was last finished

    def __enter__(self) -> LocalCrew:
        self._members = [self._start() for _ in range(self._count)]
        return self

    def _start(self) -> Member:
        said = tempfile.TemporaryFile()  # noqa: SIM115  # closed with its member
        threads = {name: str(self._threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        # A session of its own: Ctrl-C is for the leader, which then ends its workers.
        process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True,
            env={**os.environ, **threads, PARENT: str(os.getpid())},
        )  # fmt: skip
        return Member(process, said)

    @property
    def processes(self) -> list[int]:
        """The process ids of those at work."""
        return [member.process.pid for member in self._members]

    def check(self, finished: int) -> None:
        """Replace workers that were killed; raise where one cannot work, or all are killed again and again."""
        if finished > self._finished:
            self._finished, self._deaths = finished, 0
        for place, member in enumerate(self._members):
            code = member.process.poll()
            if code is None:
                continue
            if code > 0:
                raise WorkError(f"A worker of the search failed: {member.words()}")
            self._deaths += code < 0
            if self._deaths > 3 * self._count:
                raise WorkError(
                    f"Workers of the search are killed again and again (signal {-code}) without finishing anything. "
                    "Is there enough memory? Take fewer --workers."
                )
            member.said.close()
            self._members[place] = self._start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the workers see the end of the search, or end them."""
        if kind is not None:
            self._signal(subprocess.Popen.terminate)
        self._wait()
        self._signal(subprocess.Popen.terminate)
        self._wait()
        self._signal(subprocess.Popen.kill)
        for member in self._members:
            member.process.wait()
            member.said.close()

    def _signal(self, send: Callable[[subprocess.Popen[bytes]], None]) -> None:
        for member in self._members:
            if member.process.poll() is None:
                send(member.process)

    def _wait(self) -> None:
        until = time.monotonic() + GRACE
        while any(member.process.poll() is None for member in self._members) and time.monotonic() < until:
            time.sleep(0.02)


def end_with_parent() -> None:
    """End this process, if a crew started it, as soon as the crew's leader is gone."""
    parent = os.environ.get(PARENT)
    if parent is None:
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def worker_command(words: Sequence[str]) -> list[str]:
    """How this program starts itself."""
    return [sys.executable, "-m", "mergectl", *words]
