"""A run while it goes on: it collects what happens and writes it down once, at the end, whatever the end is."""

from __future__ import annotations

import contextlib
import math
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from mergectl.store import segments
from mergectl.store.documents import Document, plain, utc_now, whole
from mergectl.store.errors import StoreError
from mergectl.store.heartbeat import Heartbeat
from mergectl.store.places import Places


class Run:
    """One command's row in the store. Use it as a context manager: an exception makes it failed, Ctrl-C cancelled."""

    def __init__(self, places: Places, document: Document, ended: Callable[[], None]) -> None:
        self.id: str = document["run_id"]
        self._places = places
        self._document = document
        self._ended = ended
        self._clock = time.monotonic()
        try:
            self._heartbeat = Heartbeat(places.heartbeats / self.id)
        except OSError as error:
            raise StoreError(f"A run cannot be begun in {places.heartbeats}: {error.strerror}.") from error
        try:
            segments.put(places.inbox, document)
        except BaseException:
            self._heartbeat.stop()
            raise

    @property
    def attempt(self) -> int:
        """Return which run of the same config and seed this is, from 1."""
        return int(self._document["attempt"])

    @property
    def status(self) -> str:
        """Return started, finished, failed or cancelled."""
        return str(self._document["status"])

    @property
    def config_digest(self) -> str:
        """Return the fingerprint of the run's config."""
        return str(self._document["config_digest"])

    def metric(
        self, name: str, value: float, *, task: str | None = None, split: str | None = None, step: int | None = None
    ) -> None:
        """Keep one number; NaN and infinity are kept as missing, with a note saying so."""
        number = float(value)
        if not math.isfinite(number):
            place = ", ".join(str(part) for part in (task, split, None if step is None else f"step {step}") if part)
            notes = self._document["environment"].setdefault("not_finite", [])
            notes.append(f"{name}{f' ({place})' if place else ''} was {number}")
        self._add("metrics", name=name, task=task, split=split, step=whole("step", step),
                  value=number if math.isfinite(number) else None)  # fmt: skip

    def input(
        self, role: str, ref: str | os.PathLike[str], digest: str | None = None, task: str | None = None,
        run_id: str | None = None,
    ) -> None:  # fmt: skip
        """Keep what the run was made from: base, expert (of a task), model, head (of a task)."""
        self._add("inputs", role=role, ref=plain(ref), digest=digest, task=task, parent_run=run_id)

    def artifact(
        self, kind: str, path: str | os.PathLike[str], digest: str | None = None, bytes: int | None = None
    ) -> None:
        """Keep what the run made: a model, a table, ..."""
        self._add("artifacts", kind=kind, path=plain(path), digest=digest, bytes=whole("bytes", bytes))

    def note(self, key: str, value: Any) -> None:
        """Keep one fact about the surroundings, a text or anything JSON can say."""
        self._document["environment"][key] = plain(value)

    def finish(self) -> None:
        """End the run well: returning means it will not be lost."""
        self._end("finished", None)

    def fail(self, error: BaseException | str) -> None:
        """End the run as failed, with the reason; the traceback of an exception is kept as a note."""
        if isinstance(error, BaseException):
            self.note("traceback", "".join(traceback.format_exception(error))[-8000:])
            error = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        self._end("failed", str(plain(error)))

    def cancel(self) -> None:
        """End the run as cancelled by the user."""
        self._end("cancelled", None)

    def _add(self, table: str, **entry: Any) -> None:
        self._document[table].append(entry)

    def _end(self, status: str, error: str | None) -> None:
        if self.status != "started":
            raise StoreError(f"The run {self.id} has already ended as {self.status}.")
        seconds = time.monotonic() - self._clock
        final = self._document | {"status": status, "error": error, "ended_at": utc_now(), "seconds": seconds}
        segments.put(self._places.inbox, final)
        (self._places.inbox / f"{self.id}.started.json").unlink(missing_ok=True)
        self._document = final
        self._heartbeat.stop()
        self._ended()

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.status != "started":
            return
        if error is None:
            self.finish()
            return
        with contextlib.suppress(StoreError):  # the error that ended the work is the one to hear of
            if isinstance(error, (KeyboardInterrupt, GeneratorExit)):
                self.cancel()
            else:
                self.fail(error)

    def __repr__(self) -> str:
        return f"<Run {self.id} {self._document['kind']} {self.status} in {Path(self._places.database).name}>"
