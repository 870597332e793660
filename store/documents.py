"""A run as a JSON document: what a segment holds, and how it becomes rows."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from mergectl.store.errors import StoreError

FORMAT = 1
Document: TypeAlias = dict[str, Any]
Row: TypeAlias = tuple[Any, ...]

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "runs": (
        "run_id", "kind", "name", "status", "config", "config_digest", "seed", "study", "trial", "attempt",
        "command", "started_at", "ended_at", "seconds", "error",
    ),
    "inputs": ("run_id", "role", "task", "ref", "digest", "parent_run"),
    "metrics": ("run_id", "task", "split", "name", "step", "value"),
    "artifacts": ("run_id", "kind", "path", "digest", "bytes"),
    "environment": ("run_id", "key", "value"),
}  # fmt: skip
_WHOLE = {"seed", "trial", "attempt", "step", "bytes"}
_NUMBERS = {"seconds", "value"}
_TIMES = {"started_at", "ended_at"}
_JSON = {"config", "command"}
_STATUSES = {"started", "finished", "failed", "cancelled"}


class DocumentError(ValueError):
    """A segment that is not a run as this program writes it."""


class NewerDocumentError(DocumentError):
    """A segment of a newer program: not for this one to judge."""


def plain(value: Any) -> Any:
    """Return the value in JSON's own types: paths and other numbers become plain, NaN and inf become words."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8").replace("\0", " ")
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {plain(str(key)): plain(inner) for key, inner in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((plain(inner) for inner in value), key=str)
    if isinstance(value, os.PathLike):
        return plain(os.fspath(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    for convert in ("tolist", "isoformat"):  # arrays, tensors and their scalars; dates
        if hasattr(value, convert):
            return plain(getattr(value, convert)())
    if isinstance(value, Iterable):
        return [plain(inner) for inner in value]
    return plain(str(value))


def digest_of(config: Any) -> str:
    """Return the fingerprint of a config: equal for equal values, whatever the order of its keys."""
    text = json.dumps(plain(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def whole(name: str, value: Any) -> int | None:
    """Return a whole number that fits a BIGINT column, or None."""
    if value is None:
        return None
    number = int(value)
    if not -(2**63) <= number < 2**63:
        raise StoreError(f"{name} must fit 64 bits with a sign, got {number}.")
    return number


def utc_now() -> str:
    """Return the present moment as ISO text in UTC, without a zone."""
    return datetime.datetime.now(datetime.UTC).replace(tzinfo=None).isoformat(timespec="microseconds")


def began(document: Document) -> datetime.datetime | None:
    """Return when the run began, as the database tells it."""
    return None if document.get("started_at") is None else datetime.datetime.fromisoformat(document["started_at"])


def is_final(document: Document) -> bool:
    """Return whether the document tells of a run's end."""
    return bool(document["status"] != "started")


def checked(document: Any) -> Document:
    """Return the document when every row can be made of it; raise DocumentError otherwise."""
    if not isinstance(document, dict) or not isinstance(document.get("run_id"), str) or not document["run_id"]:
        raise DocumentError("it has no run_id")
    if document.get("format") != FORMAT:
        newer = isinstance(document.get("format"), int) and document["format"] > FORMAT
        kind = NewerDocumentError if newer else DocumentError
        raise kind(f"its format is {document.get('format')!r}, this mergectl knows {FORMAT}")
    if not isinstance(document.get("kind"), str) or document.get("status") not in _STATUSES:
        raise DocumentError("its kind or status is missing")
    try:
        rows_of(document)
    except (StoreError, TypeError, ValueError, AttributeError) as error:
        raise DocumentError(str(error)) from error
    return document


def rows_of(document: Document) -> dict[str, list[Row]]:
    """Return the rows of one document, table by table."""
    found: dict[str, list[Row]] = {"runs": _rows("runs", [document], document["run_id"])}
    for table in ("inputs", "metrics", "artifacts"):
        found[table] = _rows(table, document.get(table) or (), document["run_id"])
    environment: Mapping[str, Any] = document.get("environment") or {}
    found["environment"] = [
        (
            document["run_id"],
            plain(name),
            plain(value) if value is None or isinstance(value, str) else json.dumps(value),
        )
        for name, value in environment.items()
    ]
    return found


def _rows(table: str, entries: Iterable[Mapping[str, Any]], name: str) -> list[Row]:
    """Return a row of one run for each entry; the first column is the run's id."""
    columns = _CONVERTERS[table]
    return [
        (name, *[None if (value := entry.get(column)) is None else convert(value) for column, convert in columns])
        for entry in entries
    ]


def _converter(column: str) -> Callable[[Any], Any]:
    """Return what makes a column's value of what a document holds."""
    if column in _JSON:
        return lambda value: json.dumps(plain(value))
    if column in _WHOLE:
        return lambda value: whole(column, value)
    if column in _NUMBERS:
        return lambda value: number if math.isfinite(number := float(value)) else None
    return datetime.datetime.fromisoformat if column in _TIMES else _text


def _text(value: Any) -> str:
    """A text as a database takes it: file names that are not UTF-8 have halves of letters."""
    return str(plain(str(value)))


_CONVERTERS = {table: [(column, _converter(column)) for column in columns[1:]] for table, columns in COLUMNS.items()}
