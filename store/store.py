"""The store: every command is a run, safe on disk before anyone is told, and every question is SQL."""

from __future__ import annotations

import json
import os
import platform
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mergectl.store import boards, check, exchange, ingest
from mergectl.store.documents import FORMAT, digest_of, plain, utc_now, whole
from mergectl.store.errors import StoreError, StoreWarning
from mergectl.store.ids import reserve
from mergectl.store.places import Places, locate, shown_url
from mergectl.store.query import Table, asking, query
from mergectl.store.run import Run

PAUSE = 2.0  # seconds at least between ingests by the way, of all processes; the segments are safe meanwhile
SHARE = 10  # so many times as long as an ingest took a process does its own work before the next
FEW = 200  # segments that a process takes in by the way


class Store:
    """A lab's memory. Making one touches no file; the first run makes the folder, the first reading the database."""

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.places: Places = locate(path)
        self._next_ingest = 0.0

    @property
    def path(self) -> Path:
        """Return the database file."""
        return self.places.database

    @property
    def folder(self) -> Path:
        """Return the lab folder the database lies in."""
        return self.places.database.parent

    @property
    def name(self) -> str:
        """Return the file's path, or the server's URL without a password."""
        return self.places.shown

    def start(
        self,
        kind: str,
        *,
        config: Mapping[str, Any],
        seed: int | None = None,
        command: Sequence[str] = (),
        environment: Mapping[str, Any] | None = None,
        study: str | None = None,
        trial: int | None = None,
        name: str | None = None,
        inputs: Iterable[Mapping[str, Any]] = (),
    ) -> Run:
        """Begin a run: once this returns, the run has a row, however it ends."""
        self.places.make()
        digest = digest_of(config)
        identity = (kind, digest, whole("seed", seed), study, whole("trial", trial))
        own = () if self.places.server is None else (platform.node(), self.places.database)  # ids of one lab among many
        run_id, attempt = reserve(self.places, (*identity, *own))
        surroundings = {"host": platform.node(), "pid": str(os.getpid())} | dict(plain(environment or {}))
        document = {
            "format": FORMAT, "run_id": run_id, "kind": kind, "name": name, "status": "started",
            "config": plain(config), "config_digest": digest, "seed": seed, "study": study, "trial": trial,
            "attempt": attempt, "command": [shown_url(plain(word)) for word in command],
            "started_at": utc_now(), "ended_at": None, "seconds": None, "error": None, "environment": surroundings,
            "inputs": [], "metrics": [], "artifacts": [],
        }  # fmt: skip
        document["inputs"] = [_input(entry) for entry in inputs]
        run = Run(self.places, document, self._ingest_soon)
        if self.places.server is not None:  # others look at the server, not at this machine's inbox
            self._ingest_soon()
        return run

    def query(self, sql: str, params: Sequence[Any] | Mapping[str, Any] = (), *, limit: float | None = None) -> Table:
        """Answer one SELECT, of everything up to this moment; `limit` stops it after so many seconds."""
        return query(self.places, sql, params, limit=limit)

    def ingest(self) -> int:
        """Bring every waiting segment into the database and return how many runs changed."""
        return ingest.ingest(self.places)

    def rebuild(self) -> int:
        """Make the database anew from the archive, keep the old file as `*.old`, and return how many runs it holds."""
        if self.places.empty():
            raise StoreError(f"There is nothing at {self.path} to rebuild a store from.")
        return ingest.rebuild(self.places, datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f.old"))

    def check(self) -> list[str]:
        """Return what is wrong between the database and the archive, in sentences."""
        return check.problems(self.places)

    def merge(self, other: str | os.PathLike[str]) -> tuple[int, int]:
        """Take in another store's runs; return how many were new and how many were here already."""
        theirs = locate(other)
        if theirs.shown == self.name or theirs.database.resolve() == self.path.resolve():
            raise StoreError(f"{self.name} is the store itself; there is nothing to take from it.")
        with asking(theirs) as ask:
            return exchange.adopt(self.places, exchange.documents_of(ask))

    def export(self, folder: str | os.PathLike[str]) -> int:
        """Write the tables as Parquet files into a folder and return how many runs they hold."""
        with asking(self.places) as ask:
            return exchange.export(ask, Path(folder))

    def import_(self, folder: str | os.PathLike[str]) -> tuple[int, int]:
        """Take in runs that were exported; return how many were new and how many were here already."""
        with exchange.exported(Path(folder)) as ask:
            return exchange.adopt(self.places, exchange.documents_of(ask))

    def find(self, prefix: str) -> dict[str, Any] | None:
        """Return the run with this id, the newest with this name, or the only one whose id begins so."""
        found = self._runs(
            "run_id = $1 OR name = $1 OR (length($1) >= 2 AND starts_with(run_id, $1)) "
            "ORDER BY run_id = $1 DESC, name = $1 DESC NULLS LAST, started_at DESC", [prefix],
        )  # fmt: skip
        if len(found) > 1 and prefix not in (found[0]["run_id"], found[0]["name"]):
            names = ", ".join(run["run_id"] for run in found[:5]) + (", ..." if len(found) > 5 else "")
            raise StoreError(f"{len(found)} runs begin with {prefix}: {names}. Give more of the id.")
        return found[0] if found else None

    def finished(self, digest: str, *, kind: str | None = None) -> dict[str, Any] | None:
        """Return the newest finished run whose config has this digest (see `digest_of`)."""
        found = self._runs(
            "config_digest = $1 AND status = 'finished' AND kind = coalesce($2, kind) "
            "ORDER BY ended_at DESC, run_id LIMIT 1", [digest, kind],
        )  # fmt: skip
        return found[0] if found else None

    def leaderboard(self, split: str = "report", suite: str | None = None, tasks: Sequence[str] | None = None) -> Table:
        """Return one row per model and one column per task: base, experts and merges (see the view of that name)."""
        return boards.leaderboard(self.query, split, suite, tasks)

    def compare(self, *runs: str) -> Table:
        """Return settings, inputs and scores of several runs side by side: one row per fact, one column per run."""
        return boards.compare(self.query, [self._known(name)["run_id"] for name in runs])

    def _known(self, prefix: str) -> dict[str, Any]:
        run = self.find(prefix)
        if run is None:
            raise StoreError(f"No run '{prefix}' in {self.name}.")
        return run

    def _runs(self, condition: str, params: Sequence[Any]) -> list[dict[str, Any]]:
        """Return the runs that meet a condition, each with its inputs, artifacts and environment."""
        if self.places.empty():
            return []
        return [decoded(run) for run in self.query(f"SELECT * FROM whole_runs WHERE {condition}", params).records()]

    def _ingest_soon(self) -> None:
        """Ingest if the lock is free and the last time is not a moment ago; the run itself is safe already."""
        began = time.monotonic()
        if self.places.server is None and (began < self._next_ingest or ingest.age(self.places) < PAUSE):
            return
        try:
            ingest.ingest(self.places, wait=0.0 if self.places.server is None else 1.0, most=FEW)
        except StoreError as error:  # a broken or busy file is told to whoever reads next
            if self.places.server is not None:
                kept = "Its runs wait in the lab; the next command brings them there."
                warnings.warn(f"{error} {kept}", StoreWarning, stacklevel=4)
        ended = time.monotonic()
        self._next_ingest = ended + max(PAUSE, SHARE * (ended - began))


def open_store(path: str | os.PathLike[str] | None = None) -> Store:
    """Return the store at a path, at MERGECTL_STORE, or at ./lab/mergectl.duckdb."""
    return Store(path)


def decoded(run: dict[str, Any]) -> dict[str, Any]:
    """Return a run's row with its JSON columns as Python values and its environment as a dictionary."""
    hung = {key: json.loads(run[key] or "[]") for key in ("inputs", "artifacts", "environment")}
    values = {key: json.loads(run[key]) for key in ("config", "command") if run[key] is not None}
    return run | values | hung | {"environment": {pair["key"]: pair["value"] for pair in hung["environment"]}}


def _input(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return one input as a document keeps it; `run_id` names the run that made it."""
    unknown = set(entry) - {"role", "ref", "digest", "task", "run_id"}
    if unknown or "role" not in entry:
        raise StoreError(f"An input has role, ref, digest, task and run_id, got {', '.join(sorted(entry))}.")
    return dict(plain({"parent_run": entry.get("run_id")} | {key: entry[key] for key in entry if key != "run_id"}))
