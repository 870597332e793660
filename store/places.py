"""Where a store keeps its files: the database and, beside it, the lab's folders."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mergectl.store.errors import StoreError

USUAL = "mergectl.duckdb"


@dataclass(frozen=True)
class Places:
    """The files of one store. Only `mergectl.duckdb` has plain folder names; any other file's begin with its stem.

    With a server, the runs of this machine still wait in files here, and `database` is only what these are named after.
    """

    database: Path
    server: str | None = None  # the URL of a PostgreSQL server that takes the place of the file

    @property
    def shown(self) -> str:
        """The store as messages name it."""
        return str(self.database) if self.server is None else shown_url(self.server)

    @cached_property
    def inbox(self) -> Path:
        """Segments that are safe on disk and not yet in the database."""
        return self._beside("inbox")

    @cached_property
    def archive(self) -> Path:
        """Segments that are in the database: what it can be rebuilt from."""
        return self._beside("archive")

    @cached_property
    def heartbeats(self) -> Path:
        """One file per living run, touched by it every few seconds."""
        return self._beside("heartbeats")

    @cached_property
    def lock(self) -> Path:
        """Held shared to read the database, exclusive to write it."""
        return self._beside("store.lock")

    @cached_property
    def ids(self) -> Path:
        """Every run id ever given out, one per line, so that no two runs get the same."""
        return self._beside("ids")

    def make(self) -> None:
        """Make the folders that writing needs."""
        try:
            for folder in (self.inbox, self.archive, self.heartbeats):
                if not os.path.isdir(folder):
                    folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"The lab folder {self.database.parent} cannot be written: {error.strerror}.") from error

    def empty(self) -> bool:
        """Return whether there is neither a database nor a segment to make one from."""
        return self.server is None and not (self.database.exists() or holds(self.inbox) or holds(self.archive))

    def _beside(self, name: str) -> Path:
        own = name if self.database.name == USUAL else f"{self.database.stem}.{name}"
        return self.database.parent / own


def holds(folder: Path) -> bool:
    """Return whether the folder holds a segment or an archive file."""
    return folder.is_dir() and any(entry.suffix in (".json", ".parquet") for entry in folder.iterdir())


def locate(path: str | os.PathLike[str] | None) -> Places:
    """Return the places of the store the user means: a file, a folder holding one, MERGECTL_STORE or ./lab."""
    text = os.fspath(path) if path is not None else os.environ.get("MERGECTL_STORE") or f"lab/{USUAL}"
    if "://" in text:
        return _on_server(text)
    database = Path(text).expanduser().absolute()
    if database.is_dir():
        database = database / USUAL
    if database.parent.exists() and not database.parent.is_dir():
        raise StoreError(f"{database.parent} must be a folder to hold the store {database.name}; it is a file.")
    return Places(database)


def _on_server(url: str) -> Places:
    """Return the places of a store on a server: its own, in the lab of the present folder."""
    if not url.startswith(("postgresql://", "postgres://")):
        known = f"a file such as lab/{USUAL} or a server as postgresql://user@host/database"
        raise StoreError(f"A store is {known}, got {shown_url(url)}.")
    name = re.sub(r"[^A-Za-z0-9]+", "-", shown_url(url).partition("://")[2]).strip("-")
    return Places(Path("lab").absolute() / f"{name or 'server'}.postgresql", url)


def shown_url(url: str) -> str:
    """Return a URL without the passwords in it."""
    return re.sub(r"(?<=[?&]password=)[^&]*", "***", re.sub(r"(?<=://)([^:@/?]*):[^@/]*@", r"\1:***@", url))
