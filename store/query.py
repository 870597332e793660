"""Ask the store in SQL: nothing a query says can write, attach a database or read another file."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergectl.store import heartbeat, ingest, migrate, postgres
from mergectl.store.database import attached, first_line
from mergectl.store.errors import StoreBusyError, StoreError
from mergectl.store.lock import hold
from mergectl.store.places import Places

if TYPE_CHECKING:
    import duckdb

NOTHING = "There is no store at {} yet; the first run makes it."


@dataclass(frozen=True)
class Table:
    """The answer to a query: column names and rows."""

    columns: list[str]
    rows: list[tuple[Any, ...]]

    def records(self) -> list[dict[str, Any]]:
        """Return the rows as dictionaries by column name."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


Ask = Callable[..., Table]


def query(
    places: Places, sql: str, params: Sequence[Any] | Mapping[str, Any] = (), *, limit: float | None = None
) -> Table:
    """Run one read-only statement on the whole store, for at most `limit` seconds."""
    with contextlib.suppress(StoreBusyError):  # held open elsewhere: what waits in the inbox can wait longer
        ingest.ingest(places)
    if places.server is not None:
        ingest.bury(places)
        return Table(*postgres.ask(places.server, sql, params, limit))
    if places.empty():
        raise StoreError(NOTHING.format(places.database))
    with reading(places) as connection:
        return _answer(connection, sql, params, limit)


@contextlib.contextmanager
def asking(places: Places) -> Iterator[Ask]:
    """Yield what answers several questions on the store as it is now, a file opened only once."""
    with contextlib.suppress(StoreBusyError):
        ingest.ingest(places)
    if places.server is not None:
        yield functools.partial(query, places)
        return
    if places.empty():
        raise StoreError(NOTHING.format(places.database))
    with reading(places) as connection:
        yield functools.partial(_answer, connection)


@contextlib.contextmanager
def reading(places: Places) -> Iterator[duckdb.DuckDBPyConnection]:
    """Yield a connection that can only read the store, in which runs that died show as lost."""
    with contextlib.ExitStack() as stack:
        connection = _look(places, stack)
        if not migrate.check(connection, places.database):
            stack.close()
            ingest.upgrade(places)
            connection = _look(places, stack)
        _mark_lost(connection, places)
        for setting in ("python_enable_replacements", "enable_external_access"):
            connection.execute(f"SET {setting}=false")
        connection.execute("SET lock_configuration=true")
        yield connection


def _look(places: Places, stack: contextlib.ExitStack) -> duckdb.DuckDBPyConnection:
    """Open the database to read, until the stack is closed."""
    stack.enter_context(hold(places.lock, exclusive=False))
    return stack.enter_context(attached(places.database, write=False))


def _mark_lost(connection: duckdb.DuckDBPyConnection, places: Places) -> None:
    """Put a view over `runs` for this connection in which the dead among the started are lost."""
    started = connection.execute("SELECT run_id FROM runs WHERE status = 'started'").fetchall()
    lost = [name for (name,) in started if not heartbeat.alive(places.heartbeats / name)]
    if not lost:
        return
    connection.execute("CREATE TEMP TABLE lost_runs AS SELECT unnest(?) AS run_id", [lost])
    connection.execute(
        "CREATE TEMP VIEW runs AS SELECT * REPLACE (CASE WHEN status = 'started' AND run_id IN "
        "(SELECT run_id FROM temp.lost_runs) THEN 'lost' ELSE status END AS status) FROM store.main.runs"
    )


def _answer(
    connection: duckdb.DuckDBPyConnection,
    sql: str,
    params: Sequence[Any] | Mapping[str, Any] = (),
    limit: float | None = None,
) -> Table:
    import duckdb

    timer = threading.Timer(limit, connection.interrupt) if limit is not None else None
    try:
        _refuse_all_but_select(connection, sql)
        if timer:
            timer.start()
        connection.execute(sql, params or None)
        columns = [column[0] for column in connection.description or ()]
        return Table(columns, connection.fetchall())
    except duckdb.InterruptException as error:
        raise StoreError(f"The query took longer than {limit:g} seconds and was stopped.") from error
    except duckdb.Error as error:
        raise StoreError(f"The query cannot be answered: {_reason(error)}.") from error
    finally:
        if timer:
            timer.cancel()


def _refuse_all_but_select(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    import duckdb

    statements = connection.extract_statements(sql)
    if len(statements) != 1:
        raise StoreError(f"One SELECT at a time, got {len(statements)} statements.")
    if statements[0].type not in (duckdb.StatementType.SELECT, duckdb.StatementType.MULTI):
        kind = statements[0].type.name.replace("_", " ")
        raise StoreError(f"The store is read-only here: a SELECT can be asked, got {kind}.")


def _reason(error: Exception) -> str:
    """Return the first line of the message, and DuckDB's own hint where it gives one."""
    lines = str(error).strip().splitlines()
    hints = [line.strip().rstrip(".") for line in lines[1:] if line.startswith(("Did you mean", "Candidate"))]
    return "; ".join([first_line(str(error)), *hints[:1]])
