"""The store on a PostgreSQL server: the same runs, views and questions, for labs on many machines.

Runs are safe in the lab's inbox first, as with a file; this module brings them to the server and asks it. What the two
kinds of SQL say differently stands in `dialect_postgres.sql`; here are only placeholders and types.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergectl.store import migrate
from mergectl.store.documents import COLUMNS, Document, rows_of
from mergectl.store.errors import StoreBusyError, StoreError
from mergectl.store.places import shown_url

if TYPE_CHECKING:
    import psycopg

    Connection = psycopg.Connection[tuple[Any, ...]]

DIALECT = Path(__file__).parent / "dialect_postgres.sql"
SCHEMA = "mergectl"  # a schema of our own: Optuna's tables in the same database have names like ours
LOCK = 0x6D65726765  # of the server's advisory locks, the one that writers take: "merge"
PATIENCE = 10  # seconds to wait for a server
SPECIAL = ("pg_read_server_files", "pg_write_server_files", "pg_execute_server_program")  # superusers have them all
WRITERS = 60_000  # milliseconds to wait for other writers

# A question's pieces: texts and names in quotes and comments stay as they are, a ? or $name becomes the next number.
_PIECES = re.compile(r"'(?:[^']|'')*'|\"[^\"]*\"|--[^\n]*|/\*.*?\*/|\?|\$[A-Za-z_]\w*", re.S)


@contextlib.contextmanager
def writing(url: str) -> Iterator[ServerBook]:
    """Yield the server's book, its schema and views up to date, alone among writers until the block ends."""
    with connected(url) as connection:
        connection.execute(f"SET LOCAL lock_timeout = {WRITERS}")
        connection.execute("SELECT pg_advisory_xact_lock(%s)", [LOCK])
        if not _current(connection, url):
            _migrate(connection)
        connection.execute("SET LOCAL lock_timeout = 0")
        yield ServerBook(connection)
        connection.commit()


class ServerBook:
    """The runs of a server, within one transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def known(self, names: list[str]) -> dict[str, tuple[Any, ...]]:
        """Return status and beginning of those of the runs that are there."""
        asked = "SELECT run_id, status, started_at FROM runs WHERE run_id = ANY(%s)"
        return {row[0]: row[1:] for row in self._connection.execute(asked, [names]).fetchall()}

    def replace(self, documents: list[Document]) -> None:
        """Write the documents' rows in place of what is there under their ids."""
        names = [document["run_id"] for document in documents]
        rows = [rows_of(document) for document in documents]
        with self._connection.cursor() as cursor:
            for table, columns in COLUMNS.items():
                cursor.execute(f"DELETE FROM {table} WHERE run_id = ANY(%s)", [names])
                with cursor.copy(f"COPY {table} ({', '.join(columns)}) FROM STDIN") as copy:
                    for row in (row for found in rows for row in found[table]):
                        copy.write_row(row)

    def lose(self, names: list[str]) -> None:
        """Mark those of the runs that have not ended as lost: their process is gone."""
        self._connection.execute(
            "UPDATE runs SET status = 'lost' WHERE status = 'started' AND run_id = ANY(%s)", [names]
        )

    def count(self) -> int:
        """Return how many runs there are."""
        return int(self._connection.execute("SELECT count(*) FROM runs").fetchall()[0][0])


def ask(
    url: str, sql: str, params: Sequence[Any] | Mapping[str, Any], limit: float | None
) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Answer one SELECT in a transaction that may only read, as a role that reads tables and no files.

    Questions with a limit are the user's own words, which a login with special rights may not ask: a function could
    give it these rights back while the question is answered.
    """
    psycopg = driver()
    text, values = numbered(sql, params)
    with reading(url, limit) as connection, _as_table(connection) as cursor:
        if limit is not None:
            _refuse_special(connection)
        try:
            cursor.execute(f"DECLARE answer NO SCROLL CURSOR FOR {text}", values, prepare=True)
            cursor.execute("FETCH ALL FROM answer")
            return [column.name for column in cursor.description or ()], cursor.fetchall()
        except psycopg.errors.QueryCanceled as error:
            raise StoreError(f"The query took longer than {limit:g} seconds and was stopped.") from error
        except psycopg.Error as error:
            raise StoreError(_refused(error)) from error


@contextlib.contextmanager
def reading(url: str, limit: float | None) -> Iterator[Connection]:
    """Yield a connection that can only read the store, whose views are brought up to date before if need be."""
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(connected(url, read_only=True))
        if not _current(connection, url):
            stack.close()
            with writing(url):
                pass
            connection = stack.enter_context(connected(url, read_only=True))
        if connection.execute("SELECT rolsuper FROM pg_roles WHERE rolname = current_user").fetchall() == [(True,)]:
            connection.execute("SET LOCAL ROLE pg_read_all_data")
        if limit is not None:
            connection.execute(f"SET LOCAL statement_timeout = {max(1, round(1000 * limit))}")
        yield connection


@contextlib.contextmanager
def connected(url: str, *, read_only: bool = False) -> Iterator[Connection]:
    """Yield a connection in a transaction of its own, in our schema and in UTC; it is undone unless committed."""
    psycopg = driver()
    try:
        connection = psycopg.connect(url, connect_timeout=PATIENCE)
    except (psycopg.Error, UnicodeError) as error:
        reason = _first(error).removeprefix("connection failed: ")
        raise StoreBusyError(f"The server {shown_url(url)} cannot be reached: {reason}.") from error
    try:
        connection.read_only = read_only
        connection.execute(
            f"SET TIME ZONE 'UTC'; SET search_path TO {SCHEMA}; SET jit = off"
        )  # a view compiles for seconds
        yield connection
    except psycopg.errors.LockNotAvailable as error:
        raise StoreBusyError(f"The server {shown_url(url)} is busy: another program writes. Try again.") from error
    except psycopg.Error as error:
        raise StoreError(f"The server {shown_url(url)} refused: {_first(error)}.") from error
    finally:
        connection.close()


def driver() -> Any:
    """Return psycopg, or say how to get it."""
    try:
        import psycopg
    except ImportError as error:
        raise StoreError("A store on a PostgreSQL server needs psycopg: pip install 'mergectl[postgres]'.") from error
    return psycopg


def numbered(sql: str, params: Sequence[Any] | Mapping[str, Any]) -> tuple[str, list[Any]]:
    """Return a question with $1, $2, ... in place of ? and $name, and the values in that order."""
    if not params:
        return sql, []
    named = isinstance(params, Mapping)
    order = list(params) if named else []
    seen = 0

    values = [params[name] for name in order] if isinstance(params, Mapping) else list(params)

    def place(match: re.Match[str]) -> str:
        nonlocal seen
        if match[0] == "?" and not named:
            seen += 1
            number = seen
        elif match[0][0] == "$" and match[0][1:] in order:
            number = order.index(match[0][1:]) + 1
        else:
            return match[0]
        return f"${number}" + ("::text[]" if isinstance(values[number - 1], list) else "")  # the server cannot guess

    return _PIECES.sub(place, sql), values


def _current(connection: Connection, url: str) -> bool:
    """Return whether schema and views are this program's; raise where a newer one made them."""
    tables = "SELECT to_regclass('schema_version') IS NOT NULL AND to_regclass('views_version') IS NOT NULL"
    if connection.execute(tables).fetchall() != [(True,)]:
        return False
    version = connection.execute("SELECT coalesce(max(version), 0) FROM schema_version").fetchall()[0][0]
    migrate.refuse_newer(version, shown_url(url))
    digest = connection.execute("SELECT digest FROM views_version").fetchall()
    return version == max(migrate.migrations()) and digest == [(migrate.views_digest(DIALECT),)]


def _migrate(connection: Connection) -> None:
    """Run the schema files that the server has not seen, and make the views anew, all or nothing."""
    connection.execute(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
    views = connection.execute("SELECT viewname FROM pg_views WHERE schemaname = current_schema()").fetchall()
    for (view,) in views:
        connection.execute(f'DROP VIEW IF EXISTS "{view}" CASCADE')
    there = connection.execute("SELECT to_regclass('schema_version') IS NOT NULL").fetchall() == [(True,)]
    done = {row[0] for row in connection.execute("SELECT version FROM schema_version").fetchall()} if there else set()
    for number, path in migrate.migrations().items():
        if number not in done:
            connection.execute(path.read_text(encoding="utf-8"))
            connection.execute("INSERT INTO schema_version (version, name) VALUES (%s, %s)", [number, path.stem])
    connection.execute(migrate.views_text(DIALECT))
    connection.execute("DELETE FROM views_version")
    connection.execute("INSERT INTO views_version VALUES (%s)", [migrate.views_digest(DIALECT)])


def _refuse_special(connection: Connection) -> None:
    """Raise where the login may read or write files of the server or begin programs there, as a superuser may."""
    member = "SELECT session_user::text FROM unnest(%s::text[]) AS role WHERE pg_has_role(session_user, role, 'MEMBER')"
    if found := connection.execute(member, [list(SPECIAL)]).fetchall():
        raise StoreError(
            f"The login '{found[0][0]}' can reach the server's own files, so it may not ask questions in SQL. "
            "Log in as a role without special rights, such as CREATE ROLE lab LOGIN makes."
        )


def _as_table(connection: Connection) -> psycopg.RawCursor[tuple[Any, ...]]:
    """Return a cursor that takes $1 as it stands and gives DuckDB's types: JSON as text, every number plain."""
    import psycopg
    from psycopg.adapt import Loader

    class Text(Loader):
        def load(self, data: Any) -> str:
            return bytes(data).decode()

    class Number(Loader):
        def load(self, data: Any) -> float:
            text = bytes(data).decode()
            return int(text) if text.lstrip("-").isdigit() else float(text)

    for kind in ("json", "jsonb"):
        connection.adapters.register_loader(kind, Text)
    connection.adapters.register_loader("numeric", Number)
    return psycopg.RawCursor(connection)


def _refused(error: Exception) -> str:
    """Say in one line why a question was not answered."""
    reason = _first(error)
    if "multiple commands" in reason:
        return "One SELECT at a time, got several statements."
    return f"The query cannot be answered: {reason}."


def _first(error: Exception) -> str:
    """Return the first line of the server's message, and its hint."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    hint = getattr(getattr(error, "diag", None), "message_hint", None)
    return "; ".join([lines[0].rstrip("."), *([hint.rstrip(".")] if hint else [])])
