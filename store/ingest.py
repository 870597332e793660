"""Bring segments into the database: idempotent, so that a kill at any point costs nothing but another turn.

The order is: commit the rows, then move the segments into the archive. A segment met twice is known by its run id. A
missing database is made from the archive, so whatever was ever archived is there.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mergectl.store import heartbeat, migrate, postgres, segments
from mergectl.store.database import attach, attached, first_line
from mergectl.store.documents import COLUMNS, Document, Row, began, is_final, rows_of
from mergectl.store.errors import StoreError
from mergectl.store.ids import keep, run_id
from mergectl.store.lock import PATIENCE, hold
from mergectl.store.places import Places

if TYPE_CHECKING:
    import duckdb

BATCH = 500  # segments in one transaction
OPEN = ("started", "lost")  # of a run in the database, whose end may still come


class Book(Protocol):
    """A database to put runs into, within one transaction or as if it were one."""

    def known(self, names: list[str]) -> dict[str, tuple[Any, ...]]:
        """Return status and beginning of those of the runs that are there."""

    def replace(self, documents: list[Document]) -> None:
        """Write the documents' rows in place of what is there under their ids."""

    def count(self) -> int:
        """Return how many runs there are."""


def ingest(places: Places, *, wait: float = PATIENCE, most: int | None = None) -> int:
    """Bring waiting segments into the database, all or the first so many, and return how many runs changed."""
    made = places.server is not None or places.database.exists()
    if not segments.waiting(places.inbox) and (made or places.empty()):
        return 0
    places.make()
    with hold(places.lock, exclusive=True, wait=wait), _told(places.database):
        if not made and not places.database.exists():
            _create(places)
        return _take_in(places, most)


def age(places: Places) -> float:
    """Return how many seconds ago some process last wrote to the database file."""
    try:
        return abs(time.time() - places.database.stat().st_mtime)
    except OSError:
        return math.inf


def bury(places: Places) -> None:
    """Mark on the server those of this lab's runs whose process is gone; in a file, readers see that by themselves."""
    if places.server is None or not places.heartbeats.is_dir():
        return
    dead = [path for path in places.heartbeats.iterdir() if not heartbeat.alive(path)]
    if dead:
        with postgres.writing(places.server) as book:
            book.lose([path.name for path in dead])
        for path in dead:
            path.unlink(missing_ok=True)


def upgrade(places: Places) -> None:
    """Bring the database file to this program's schema."""
    with hold(places.lock, exclusive=True), _told(places.database), _opened(places.database):
        pass


def rebuild(places: Places, aside: str) -> int:
    """Make the database anew from archive and inbox, keep the old file under another name, return the runs in it."""
    places.make()
    with hold(places.lock, exclusive=True), _told(places.database):
        if places.server is not None:
            return _send_all(places)
        fresh = _build(places)
        old = places.database.with_name(f"{places.database.name}.{aside}")
        for path, target in ((places.database, old), (_log_of(places.database), _log_of(old))):
            if path.exists():
                path.rename(target)
        fresh.replace(places.database)
        segments.sync_folder(places.database.parent)
        _take_in(places)
        with attached(places.database, write=False) as connection:
            return FileBook(connection).count()


def _send_all(places: Places) -> int:
    """Bring to the server what it lacks of this lab's runs, where others' stay, and return how many it has."""
    _take_in(places)
    with _book(places) as book:
        documents = segments.archived(places)
        while batch := list(islice(documents, BATCH)):
            put_rows(book, batch)
        return book.count()


def _take_in(places: Places, most: int | None = None) -> int:
    """Take the inbox into the database, some hundred segments at a time."""
    changed = 0
    segments.sweep(places.inbox)
    waiting = iter(segments.waiting(places.inbox)[:most])
    while paths := list(islice(waiting, BATCH)):
        found = [(path, document) for path in paths if (document := segments.read(path)) is not None]
        if found:
            with _book(places) as book:
                changed += put_rows(book, [document for _, document in found])
            keep(places)
        for path, document in found:
            _put_away(places, path, document)
    segments.pack(places)
    return changed


def _put_away(places: Places, path: Path, document: Document) -> None:
    """Move a segment into the archive; one that got another id while its rows were written goes there under it."""
    if segments.file_name(document) == path.name:
        segments.archive(places, path)
    else:
        segments.put(places.archive, document)
        path.unlink(missing_ok=True)


def put_rows(book: Book, documents: Iterable[Document]) -> int:
    """Write the runs that the database does not know in one transaction; an end replaces its beginning."""
    batch = list(documents)
    new = unknown(book.known([name for document in batch for name in (document["run_id"], other_id(document))]), batch)
    if new:
        book.replace(new)
    return len(new)


def unknown(known: dict[str, tuple[Any, ...]], documents: Iterable[Document]) -> list[Document]:
    """Return the runs that a database lacks which knows these (id -> status, beginning), each under a free id."""
    best: dict[str, Document] = {}
    for document in documents:
        status, since = known.get(document["run_id"], (None, None))
        if is_final(document) and status not in (None, *OPEN) and since != began(document):
            document["run_id"] = other_id(document)  # another lab's run: both stay
            status, since = known.get(document["run_id"], (None, None))
        if status is None or (status in OPEN and is_final(document)):
            best[document["run_id"]] = document
            known[document["run_id"]] = (document["status"], began(document))
    return list(best.values())


def other_id(document: Document) -> str:
    """Return the id for a run whose own id is taken by a different run, the same one each time."""
    return run_id((document["run_id"], document.get("started_at")), 1)


class FileBook:
    """The runs of a database file that is open."""

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        self._connection = connection

    def known(self, names: list[str]) -> dict[str, tuple[Any, ...]]:
        """Return status and beginning of those of the runs that are there."""
        asked = "SELECT run_id, status, started_at FROM runs WHERE run_id IN (SELECT unnest(?))"
        return {row[0]: row[1:] for row in self._connection.execute(asked, [names]).fetchall()}

    def replace(self, documents: list[Document]) -> None:
        """Write the documents' rows in place of what is there under their ids, in one transaction."""
        rows: dict[str, list[Row]] = {table: [] for table in COLUMNS}
        for document in documents:
            for table, found in rows_of(document).items():
                rows[table] += found
        names = [document["run_id"] for document in documents]
        self._connection.begin()
        for table, columns in COLUMNS.items():
            self._connection.execute(f"DELETE FROM {table} WHERE run_id IN (SELECT unnest(?))", [names])
            if rows[table]:
                with self._connection.appender(table, columns=list(columns)) as appender:
                    appender.append_rows(rows[table])
        self._connection.commit()

    def count(self) -> int:
        """Return how many runs there are."""
        return int(self._connection.execute("SELECT count(*) FROM runs").fetchall()[0][0])


@contextlib.contextmanager
def _book(places: Places) -> Iterator[Book]:
    """Open the database to put runs into it."""
    if places.server is not None:
        with postgres.writing(places.server) as book:
            yield book
    else:
        with _opened(places.database) as connection:
            yield FileBook(connection)


def _create(places: Places) -> None:
    """Make the database file beside its place, from the archive if there is one, and rename it there."""
    fresh = _build(places)
    _log_of(places.database).unlink(missing_ok=True)
    fresh.replace(places.database)
    segments.sync_folder(places.database.parent)


def _build(places: Places) -> Path:
    fresh = places.database.with_name(f".{places.database.name}.new")
    for path in (fresh, _log_of(fresh)):
        path.unlink(missing_ok=True)
    with attached(fresh, write=True) as connection:
        migrate.migrate(connection)
        documents = segments.archived(places)
        while batch := list(islice(documents, BATCH)):
            put_rows(FileBook(connection), batch)
    return fresh


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open the database to write, refuse a foreign, broken or newer one, and bring an older one up to date."""
    with attached(path, write=False) as connection:  # a look that changes nothing
        current = migrate.check(connection, path)
        attach(connection, path, write=True)
        if not current:
            migrate.migrate(connection)
        yield connection


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turn DuckDB's and the system's complaints about writing into a sentence."""
    import duckdb

    try:
        yield
    except duckdb.Error as error:
        raise StoreError(f"The store {path} could not be written: {first_line(str(error))}.") from error
    except OSError as error:
        raise StoreError(f"The store {path} could not be written: {error.strerror or error}.") from error


def _log_of(path: Path) -> Path:
    """Return DuckDB's log file beside a database file."""
    return path.with_name(path.name + ".wal")
