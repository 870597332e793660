"""A store of its own for every test, and a way to run code in other processes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import mergectl.store
from mergectl.store import Store, migrate, open_store
from mergectl.store.database import attached
from tests.store import postgres

ROOT = Path(mergectl.store.__file__).absolute().parents[2]
Launch = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Make a database without runs once: making one takes a tenth of a second."""
    path = tmp_path_factory.mktemp("database") / "mergectl.duckdb"
    with attached(path, write=True) as connection:
        migrate.migrate(connection)
    return path.read_bytes()


@pytest.fixture
def untouched(tmp_path: Path) -> Store:
    """Return a store that has no file yet."""
    return open_store(tmp_path / "lab" / "mergectl.duckdb")


@pytest.fixture
def store(untouched: Store, database: bytes) -> Store:
    """Return a store without runs, which takes them in when asked, not also at their ends (that costs time)."""
    untouched._next_ingest = math.inf
    untouched.places.make()
    untouched.path.write_bytes(database)
    return untouched


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """Begin a PostgreSQL server, where one is installed, and return the URL of a database on it."""
    if not postgres.installed():
        pytest.skip("no PostgreSQL server or no psycopg is installed")
    with postgres.running() as url:
        yield url


def server_store(url: str, folder: Path, database: str = "lab") -> Store:
    """Return an empty store on the server; its runs go there when asked, not also at their beginnings and ends."""
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        if not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [database]).fetchall():
            connection.execute(f'CREATE DATABASE "{database}"')
    url = url.replace("/lab?", f"/{database}?")
    with psycopg.connect(url) as connection:
        connection.execute("DROP SCHEMA IF EXISTS mergectl CASCADE")
    store = open_store(url)
    store.places = replace(store.places, database=folder / "lab" / store.places.database.name)
    store._ingest_soon = lambda: None  # type: ignore[method-assign]
    return store


@pytest.fixture
def launch(store: Store) -> Iterator[Launch]:
    """Start Python code in another process; it finds the store's path in sys.argv[1], more arguments after it."""
    started: list[subprocess.Popen[str]] = []

    def start(code: str, *arguments: object) -> subprocess.Popen[str]:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        words = [sys.executable, "-c", code, str(store.path), *map(str, arguments)]
        process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout
        process.stdout.close()
