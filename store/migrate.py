"""Bring a database file to this version's schema: numbered files, each in one transaction with its version row."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from mergectl.store.database import unreadable
from mergectl.store.errors import StoreError

if TYPE_CHECKING:
    import duckdb

SCHEMA = Path(__file__).parent / "schema"
VIEWS = Path(__file__).parent / "views.sql"  # for every kind of server
DIALECT = Path(__file__).parent / "dialect_duckdb.sql"  # the words that they use


def migrations() -> dict[int, Path]:
    """Return the numbered schema files in order."""
    return {int(path.name.split("_")[0]): path for path in sorted(SCHEMA.glob("[0-9][0-9][0-9]_*.sql"))}


def check(connection: duckdb.DuckDBPyConnection, path: Path) -> bool:
    """Return whether the file is up to date; raise when it is not ours, broken, or newer than this program."""
    import duckdb

    latest = max(migrations())
    try:
        found = int(connection.execute("SELECT coalesce(max(version), 0) FROM schema_version").fetchall()[0][0])
        views = connection.execute("SELECT digest FROM views_version").fetchall() if found else []
    except duckdb.CatalogException as error:
        raise StoreError(f"{path} is a DuckDB file but not a mergectl store. Choose another with --store.") from error
    except duckdb.Error as error:
        raise unreadable(path, error) from error
    refuse_newer(found, str(path))
    return found == latest and views == [(views_digest(DIALECT),)]


def refuse_newer(found: int, store: str) -> None:
    """Raise where a newer program made the store."""
    latest = max(migrations())
    if found > latest:
        raise StoreError(
            f"{store} was written by a newer mergectl (schema {found}, this one knows {latest}). "
            "It was left as it is; upgrade mergectl to use it."
        )


def migrate(connection: duckdb.DuckDBPyConnection) -> None:
    """Run the schema files the database has not seen, then make the views anew."""
    tables = connection.execute("SELECT table_name FROM duckdb_tables() WHERE table_name = 'schema_version'").fetchall()
    done = {row[0] for row in connection.execute("SELECT version FROM schema_version").fetchall()} if tables else set()
    for number, path in migrations().items():
        if number in done:
            continue
        connection.begin()
        _drop_views(connection)
        connection.execute(path.read_text(encoding="utf-8"))
        connection.execute("INSERT INTO schema_version (version, name) VALUES (?, ?)", [number, path.stem])
        connection.commit()
    connection.begin()
    _drop_views(connection)
    connection.execute(views_text(DIALECT))
    connection.execute("DELETE FROM views_version")
    connection.execute("INSERT INTO views_version VALUES (?)", [views_digest(DIALECT)])
    connection.commit()


def make_tables(connection: duckdb.DuckDBPyConnection) -> None:
    """Make this program's tables in an empty database, without views."""
    for path in migrations().values():
        connection.execute(path.read_text(encoding="utf-8"))


def views_text(dialect: Path) -> str:
    """Return the words that the views use, and the views."""
    return dialect.read_text(encoding="utf-8") + VIEWS.read_text(encoding="utf-8")


def views_digest(dialect: Path) -> str:
    """Return a fingerprint of what the views are made of, so that a changed file is noticed."""
    return hashlib.sha256(views_text(dialect).encode()).hexdigest()[:16]


def _drop_views(connection: duckdb.DuckDBPyConnection) -> None:
    """Drop all views: an ALTER TABLE must not meet one that needs the old columns."""
    found = "SELECT view_name FROM duckdb_views() WHERE NOT internal AND database_name = current_database()"
    for (name,) in connection.execute(found).fetchall():
        connection.execute(f'DROP VIEW "{name}"')
