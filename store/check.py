"""Hold the database against the archive: every run here and there, with the same rows, and no row without its run."""

from __future__ import annotations

import datetime
import json
from collections import Counter
from itertools import islice
from typing import Any

from mergectl.store import segments
from mergectl.store.documents import COLUMNS, Document, Row, is_final, rows_of
from mergectl.store.errors import StoreError
from mergectl.store.places import Places
from mergectl.store.query import Ask, asking

PAGE = 500  # runs compared at once


def problems(places: Places) -> list[str]:
    """Return what is wrong between the archive and the database, in sentences; the inbox is taken in first."""
    with asking(places) as ask:
        return _problems(places, ask)


def _problems(places: Places, ask: Ask) -> list[str]:
    found = [f"{path} holds no run and was set aside." for path in sorted(places.inbox.glob("*.broken"))]
    archived: set[str] = set()
    try:
        documents = iter(sorted(_last(places).items()))
        while page := dict(islice(documents, PAGE)):
            archived |= set(page)
            found += _compare(ask, page)
    except StoreError as error:
        return [*found, str(error)]
    if places.server is None:  # a server also holds the runs of others
        there = {row[0] for row in ask("SELECT run_id FROM runs").rows}
        found += [f"The run {name} is in the database and not in the archive." for name in sorted(there - archived)]
    return found + _orphans(ask)


def _last(places: Places) -> dict[str, Document]:
    """Return what the archive says of each run: its end where there is one."""
    found: dict[str, Document] = {}
    for document in segments.archived(places):
        if document["run_id"] not in found or is_final(document):
            found[document["run_id"]] = document
    return found


def _compare(ask: Ask, documents: dict[str, Document]) -> list[str]:
    """Return which of the archived runs the database does not have, or has otherwise."""
    rows: dict[str, dict[str, list[Row]]] = {name: {table: [] for table in COLUMNS} for name in documents}
    for table, columns in COLUMNS.items():
        asked = f"SELECT {', '.join(columns)} FROM {table} WHERE run_id IN (SELECT unnest(?))"
        for row in ask(asked, [list(documents)]).rows:
            rows[row[columns.index("run_id")]][table].append(row)
    found = []
    for name, document in documents.items():
        if not rows[name]["runs"]:
            found.append(f"The run {name} is in the archive and not in the database.")
            continue
        wanted = rows_of(document)
        odd = [table for table in COLUMNS if _counted(rows[name][table]) != _counted(wanted[table])]
        if odd:
            found.append(f"The run {name} has other {' and '.join(odd)} in the database than in the archive.")
    return found


def _counted(rows: list[Row]) -> Counter[Any]:
    return Counter(tuple(_plain(value) for value in row) for row in rows)


def _plain(value: Any) -> Any:
    """Return a cell as both sides tell it: times as text, JSON without its spaces, a lost run as begun."""
    if isinstance(value, datetime.datetime):
        return value.isoformat()
    if isinstance(value, str) and value[:1] in ("{", "["):
        try:
            return json.dumps(json.loads(value), sort_keys=True)
        except ValueError:
            return value
    return "started" if value == "lost" else value


def _orphans(ask: Ask) -> list[str]:
    """Return rows that hang on no run."""
    found = []
    for table in COLUMNS:
        asked = f"SELECT count(*) FROM {table} x WHERE NOT EXISTS (SELECT 1 FROM runs r WHERE r.run_id = x.run_id)"
        if table != "runs" and (count := ask(asked).rows[0][0]):
            found.append(f"{count} rows of {table} belong to no run.")
    return found
