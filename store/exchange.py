"""Runs that come from elsewhere and go there: another store, or a folder of Parquet files. None is ever doubled."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from mergectl.store import ids, ingest, migrate, segments
from mergectl.store.database import first_line, memory, quoted
from mergectl.store.documents import COLUMNS, FORMAT, Document, DocumentError, began, checked
from mergectl.store.errors import StoreError
from mergectl.store.places import Places
from mergectl.store.query import Ask, Table, query

PAGE = 500  # runs read at once
SAME = ("kind", "config_digest", "seed", "study", "trial")  # and the moment of its beginning: what makes it one run


def adopt(places: Places, documents: Iterable[Document]) -> tuple[int, int]:
    """Take in those of the runs that the store does not hold; return how many were new and how many it held."""
    new = held = 0
    places.make()
    ingest.ingest(places)
    source = iter(documents)
    while page := list(islice(source, PAGE)):
        chosen = ingest.unknown(_known(places, page), page)
        for document in chosen:
            segments.put(places.inbox, document)
        ids.note(places, [document["run_id"] for document in chosen])
        new, held = new + len(chosen), held + len(page) - len(chosen)
        ingest.ingest(places)
    return new, held


def _known(places: Places, page: list[Document]) -> dict[str, tuple[Any, ...]]:
    """Return status and beginning of those of the runs that the store holds; where under another id, they get that."""
    if places.empty():
        return {}
    moments = [moment for document in page if (moment := began(document)) is not None]
    if moments:
        asked = f"SELECT run_id, {', '.join(SAME)}, started_at FROM runs WHERE started_at BETWEEN ? AND ?"
        held = {row[1:]: row[0] for row in query(places, asked, [min(moments), max(moments)]).rows}
        for document in page:
            same = (*(document.get(column) for column in SAME), began(document))
            document["run_id"] = held.get(same, document["run_id"])
    names = [name for document in page for name in (document["run_id"], ingest.other_id(document))]
    asked = "SELECT run_id, status, started_at FROM runs WHERE run_id IN (SELECT unnest(?))"
    return {row[0]: row[1:] for row in query(places, asked, [names]).rows}


def documents_of(ask: Ask) -> Iterator[Document]:
    """Yield every run that the questions are answered about, as a document, oldest first."""
    names = [row[0] for row in ask("SELECT run_id FROM runs ORDER BY started_at, run_id").rows]
    for start in range(0, len(names), PAGE):
        page = names[start : start + PAGE]
        tables = {table: _hung(ask, table, page) for table in COLUMNS if table != "runs"}
        for row in ask(_select("runs"), [page]).records():
            yield _document(row, {table: found.get(row["run_id"], []) for table, found in tables.items()})


def _select(table: str) -> str:
    order = " ORDER BY started_at, run_id" if table == "runs" else ""
    return f"SELECT {', '.join(COLUMNS[table])} FROM {table} WHERE run_id IN (SELECT unnest(?)){order}"


def _hung(ask: Ask, table: str, page: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of a table by their run."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in ask(_select(table), [page]).records():
        found.setdefault(row.pop("run_id"), []).append(row)
    return found


def _document(run: Mapping[str, Any], hung: Mapping[str, list[dict[str, Any]]]) -> Document:
    """Return a run's rows as the document they were made of; one whose process is gone has begun and not ended."""
    whole = dict(run) | {table: rows for table, rows in hung.items() if table != "environment"}
    whole["environment"] = {row["key"]: row["value"] for row in hung["environment"]}
    for key in ("config", "command"):
        whole[key] = None if run[key] is None else json.loads(run[key])
    for key in ("started_at", "ended_at"):
        whole[key] = None if run[key] is None else run[key].isoformat(timespec="microseconds")
    whole["status"] = "started" if run["status"] == "lost" else run["status"]
    try:
        return checked({"format": FORMAT, **whole})
    except DocumentError as error:
        raise StoreError(f"The run {run['run_id']} cannot be taken over: {error}.") from error


def export(ask: Ask, folder: Path) -> int:
    """Write the store's tables as `<table>.parquet` into a folder and return how many runs they hold."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with memory() as connection, _told(folder):
            migrate.make_tables(connection)
            book, documents, count = ingest.FileBook(connection), documents_of(ask), 0
            while page := list(islice(documents, PAGE)):
                book.replace(page)
                count += len(page)
            for table, columns in COLUMNS.items():
                beside = folder / f".{table}.parquet.tmp"
                rows = f"SELECT {', '.join(columns)} FROM {table} ORDER BY run_id"
                connection.execute(f"COPY ({rows}) TO {quoted(beside)} (FORMAT parquet, COMPRESSION zstd)")
                beside.replace(folder / f"{table}.parquet")
    except OSError as error:
        raise StoreError(f"{folder} cannot be written: {error.strerror or error}.") from error
    return count


@contextlib.contextmanager
def exported(folder: Path) -> Iterator[Ask]:
    """Yield what answers questions about a folder that `export` wrote."""
    missing = [table for table in COLUMNS if not (folder / f"{table}.parquet").is_file()]
    if missing:
        raise StoreError(f"{folder} is no exported store: {missing[0]}.parquet is missing.")
    with memory() as connection, _told(folder):
        for table, columns in COLUMNS.items():
            rows = f"SELECT {', '.join(columns)} FROM read_parquet({quoted(folder / f'{table}.parquet')})"
            connection.execute(f"CREATE VIEW {table} AS {rows}")

        def ask(sql: str, params: Any = ()) -> Table:
            connection.execute(sql, params or None)
            return Table([column[0] for column in connection.description or ()], connection.fetchall())

        yield ask


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Turn DuckDB's complaints about the files into a sentence."""
    import duckdb

    try:
        yield
    except duckdb.Error as error:
        raise StoreError(f"The Parquet files in {folder} cannot be used: {first_line(str(error))}.") from error
