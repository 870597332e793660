"""Open the database file: under our lock, by typed ATTACH on a connection in memory, and never for long."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mergectl.store.errors import StoreBusyError, StoreError

if TYPE_CHECKING:
    import duckdb

ALIAS = "store"


@contextlib.contextmanager
def memory() -> Iterator[duckdb.DuckDBPyConnection]:
    """Yield a connection in memory that never downloads an extension."""
    import duckdb

    connection = duckdb.connect(
        config={"autoinstall_known_extensions": False, "autoload_known_extensions": False, "threads": 2}
    )
    try:
        connection.execute("SET enable_progress_bar=false")
        yield connection
    finally:
        connection.close()  # writes what is still in the log back into the file


@contextlib.contextmanager
def attached(path: Path, *, write: bool) -> Iterator[duckdb.DuckDBPyConnection]:
    """Yield a connection whose default schema is the store's. The caller holds the lock."""
    with memory() as connection:
        attach(connection, path, write=write)
        yield connection


def attach(connection: duckdb.DuckDBPyConnection, path: Path, *, write: bool) -> None:
    """Attach the file, in place of what was attached before, and make it the default."""
    import duckdb

    connection.execute(f"USE memory; DETACH DATABASE IF EXISTS {ALIAS}")
    try:
        connection.execute(f"ATTACH {quoted(path)} AS {ALIAS} (TYPE duckdb{'' if write else ', READ_ONLY'})")
        connection.execute(f"USE {ALIAS}")
    except duckdb.Error as error:
        raise unreadable(path, error) from error


def quoted(path: Path) -> str:
    """Write a path as an SQL text."""
    return "'" + str(path).replace("'", "''") + "'"


def unreadable(path: Path, error: Exception) -> StoreError:
    """Say in one sentence why a database file cannot be opened."""
    said = str(error)
    if "Could not set lock" in said:
        holder = re.search(r"held in (.+?\(PID \d+\))", said)
        who = f" ({holder.group(1)})" if holder else ""
        return StoreBusyError(f"The store {path} is open in another program{who}. Close it there and try again.")
    if "ermission denied" in said or "Read-only file system" in said:
        return StoreError(f"The store {path} may not be opened here: permission denied.")
    return StoreError(
        f"{path} is not a whole DuckDB file ({first_line(said)}). It was left as it is; "
        "`mergectl report --rebuild` sets it aside and makes it anew from the archive."
    )


def first_line(text: str) -> str:
    """Return the first line of DuckDB's message without its class ("IO Error: ")."""
    line = text.strip().splitlines()[0] if text.strip() else "no reason given"
    return re.sub(r"^[A-Z][A-Za-z ]* Error: ", "", line).rstrip(".")
