"""Segments: one JSON file per run and stage, durable the moment `put` returns.

A run has a `started` segment (`<id>.started.json`) and at its end the whole run (`<id>.json`). They wait in the inbox
until they are in the database, then stand in the archive; many archived ones are packed into one Parquet file.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from mergectl.store.database import memory, quoted
from mergectl.store.documents import Document, DocumentError, NewerDocumentError, checked, is_final
from mergectl.store.errors import StoreError, StoreWarning
from mergectl.store.places import Places

PACK_AT = 256  # archived segments beyond this many become one Parquet file


def file_name(document: Document) -> str:
    """Return the name of the document's segment."""
    return f"{document['run_id']}{'' if is_final(document) else '.started'}.json"


def put(folder: Path, document: Document) -> Path:
    """Write one segment durably: once this returns, neither a crash nor a power cut loses it."""
    path = folder / file_name(document)
    try:
        write_durably(path, json.dumps(document, allow_nan=False).encode())
    except OSError as error:
        raise StoreError(f"The run {document['run_id']} cannot be kept in {folder}: {error.strerror}.") from error
    return path


def write_durably(path: Path, data: bytes) -> None:
    """Write a file beside its place, sync it, rename it, and sync the folder."""
    beside = path.parent / f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp"
    try:
        with open(beside, "wb", buffering=0) as handle:
            rest = memoryview(data)
            while rest:
                rest = rest[handle.write(rest) :]
            os.fsync(handle.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a power cut, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def waiting(folder: Path) -> list[Path]:
    """Return the segments in a folder by name; a file being written is not one yet."""
    names = os.listdir(folder) if folder.is_dir() else []
    return [folder / name for name in sorted(names) if name.endswith(".json") and not name.startswith(".")]


def read(path: Path) -> Document | None:
    """Read one segment; a broken one is set aside under another name, with a warning, and None returned."""
    try:
        return checked(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"The segment {path} cannot be read: {error.strerror}.") from error
    except NewerDocumentError:
        warnings.warn(f"{path} is of a newer mergectl and waits for it.", StoreWarning, stacklevel=2)
        return None
    except ValueError as error:
        aside = path.with_name(path.name + ".broken")
        path.replace(aside)
        reason = error if isinstance(error, DocumentError) else "it is not JSON"
        warnings.warn(f"{path} holds no run: {reason}. It was renamed to {aside.name}.", StoreWarning, stacklevel=2)
        return None


def archive(places: Places, path: Path) -> None:
    """Move a segment whose rows are committed from the inbox into the archive; an end makes its beginning needless."""
    name = path.name.split(".")[0]
    final, started = places.archive / f"{name}.json", places.archive / f"{name}.started.json"
    with contextlib.suppress(FileNotFoundError):
        path.replace(places.archive / path.name)
    if final.exists():
        started.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what a killed writer left half-written more than an hour ago."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > 3600:
                path.unlink()


def pack(places: Places) -> None:
    """Pack the archive's finished segments into one Parquet file once there are many. The caller holds the lock."""
    paths = [path for path in waiting(places.archive) if not path.name.endswith(".started.json")]
    if len(paths) < PACK_AT:
        return
    numbers = [int(path.stem) for path in places.archive.glob("*.parquet") if path.stem.isdigit()]
    target = places.archive / f"{max(numbers, default=0) + 1:06d}.parquet"
    beside = target.with_name(f".{target.name}.tmp")
    with memory() as connection:
        connection.execute("CREATE TABLE packed (run_id VARCHAR, status VARCHAR, segment VARCHAR)")
        with connection.appender("packed") as rows:
            for path in paths:
                text = path.read_text(encoding="utf-8")  # looked at when its rows were written
                document = json.loads(text)
                rows.append_row(document["run_id"], document["status"], text)
        connection.execute(f"COPY packed TO {quoted(beside)} (FORMAT parquet, COMPRESSION zstd)")
    _sync(beside)
    beside.replace(target)
    sync_folder(places.archive)
    for path in paths:
        path.unlink(missing_ok=True)


def archived(places: Places) -> Iterator[Document]:
    """Yield every archived document, packed ones first; a run may come twice (started, then final)."""
    packed = sorted(path for path in places.archive.glob("*.parquet")) if places.archive.is_dir() else []
    for path in packed:
        yield from _unpack(path)
    for path in waiting(places.archive):
        document = read(path)
        if document is not None:
            yield document


def _unpack(path: Path) -> Iterator[Document]:
    import duckdb

    with memory() as connection:
        try:
            connection.execute(f"SELECT segment FROM read_parquet({quoted(path)})")
            while rows := connection.fetchmany(500):
                for (text,) in rows:
                    yield checked(json.loads(text))
        except (duckdb.Error, ValueError) as error:
            raise StoreError(f"The archive file {path} cannot be read. Put it right or move it away.") from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
