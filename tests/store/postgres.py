"""A PostgreSQL server for tests: begun when one is installed, in a folder of its own, reached by a socket there."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def program(name: str) -> str | None:
    """Where a program of PostgreSQL's lies; Debian keeps the server's apart from those on the path."""
    found = [str(path) for path in sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))]
    return shutil.which(name) or (found[-1] if found else None)


def installed() -> bool:
    """Whether a server can be begun and talked to."""
    return program("initdb") is not None and importlib.util.find_spec("psycopg") is not None


def _owner() -> str | None:
    """The user to run it as: PostgreSQL refuses the superuser."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


@contextmanager
def running() -> Iterator[str]:
    """Begin a server, yield the URL of an empty database of a user without special rights, and end the server."""
    owner = _owner()
    with tempfile.TemporaryDirectory(prefix="pg-", ignore_cleanup_errors=True) as work:
        folder = Path(work) / "server"
        folder.mkdir()
        if owner is not None:
            os.chmod(work, 0o755)
            shutil.chown(folder, owner)
        as_owner = {"user": owner} if owner is not None else {}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder, **as_owner}
        make = [program("initdb") or "", "-D", str(folder / "data"), "-A", "trust", "-U", "postgres", "--no-sync"]
        subprocess.run([*make, "-E", "UTF8", "--locale", "C"], check=True, **quiet)  # type: ignore[call-overload]
        options = ["listen_addresses=", f"unix_socket_directories={folder}", "fsync=off", "max_wal_senders=0"]
        words = [program("postgres") or "", "-D", str(folder / "data"), *(w for o in options for w in ("-c", o))]
        server = subprocess.Popen(words, **quiet)  # type: ignore[call-overload]
        try:
            _prepare(folder)
            yield f"postgresql://lab@/lab?host={folder}"
        finally:
            server.send_signal(signal.SIGINT)  # at once, whoever is connected
            server.wait()


def _prepare(folder: Path) -> None:
    """Wait for the server and make a user and a database."""
    import psycopg

    until = time.monotonic() + 30
    while True:
        try:
            connection = psycopg.connect(f"postgresql://postgres@/postgres?host={folder}", autocommit=True)
            break
        except psycopg.OperationalError:
            if time.monotonic() > until:
                raise
            time.sleep(0.02)
    with connection:
        connection.execute("CREATE ROLE lab LOGIN CREATEDB")
        connection.execute("CREATE DATABASE lab OWNER lab")
