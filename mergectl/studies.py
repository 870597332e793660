"""Where studies live: Optuna's journal in the lab or a shared folder, a database, or a gRPC proxy."""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import os
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mergectl.errors import UserError, WorkError

if TYPE_CHECKING:
    import optuna

JOURNAL = "journal.log"
PACKAGES = {"grpc": "'mergectl[grpc]'", "google": "'mergectl[grpc]'", "psycopg": "'mergectl[postgres]'"}
ANSWERS = 10.0  # seconds in which a gRPC proxy must answer


class JournalLock:
    """The journal's lock, which the system lifts when its holder dies: Optuna's own lock files outlive a kill."""

    def __init__(self, journal: Path) -> None:
        self._journal, self._path = journal, journal.with_name(f".{journal.stem}.lock")
        self._held: IO[bytes] | None = None

    def acquire(self) -> bool:
        """Wait for the lock, then drop what a killed writer left of a line: no later line could be read otherwise."""
        self._held = self._path.open("ab")
        fcntl.flock(self._held, fcntl.LOCK_EX)
        with self._journal.open("rb+") as file:
            end = file.seek(0, os.SEEK_END)
            if end and _last_byte(file) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        """Let go."""
        if self._held is not None:
            self._held.close()


def _last_byte(file: IO[bytes]) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


def backing(study: optuna.Study) -> Any:
    """The storage of a study, which Optuna keeps to itself."""
    return study._storage


def close(study: optuna.Study) -> None:
    """Give back a database's connections; a journal holds none."""
    storage = backing(study)
    storage = getattr(storage, "_backend", storage)  # Optuna puts a cache before a database
    if hasattr(storage, "engine"):
        storage.remove_session()
        storage.engine.dispose()


def open_storage(folder: Path, where: str | None) -> Any:
    """Open `--study-storage`: a folder or a journal's file, a database's URL, or host:port of a gRPC proxy."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    text = where or ""
    try:
        if text.startswith("sqlite:"):
            raise UserError("SQLite may hand one candidate to two workers. Take a journal on a folder, or PostgreSQL.")
        if match := re.fullmatch(r"(?:grpc://)?([\w.-]+):(\d+)", text):
            return _open_proxy(match[1], int(match[2]))
        if "://" in text:
            return optuna.storages.RDBStorage(text)
    except ImportError as error:
        package = PACKAGES.get(str(error.name).partition(".")[0])
        way = f"pip install {package}" if package else str(error).splitlines()[0]
        raise UserError(f"--study-storage {text} needs a package that is not here: {way}") from error
    except UserError:
        raise
    except Exception as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise UserError(f"--study-storage {text} cannot be opened: {reason}.") from error
    return _open_journal(journal_of(folder, where))


def _open_proxy(host: str, port: int) -> Any:
    """Open a gRPC proxy that answers; alone it would be asked first in the midst of a search."""
    import optuna

    for package in ("grpc", "google.protobuf"):  # of one that is missing Optuna tells no name
        importlib.import_module(package)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage = optuna.storages.GrpcStorageProxy(host=host, port=port)
    try:
        storage.wait_server_ready(timeout=ANSWERS)
    except ConnectionError as error:
        raise UserError(
            f"No gRPC proxy answers at {host}:{port}. Start one there with optuna.storages.run_grpc_proxy_server."
        ) from error
    return storage


def journal_of(folder: Path, where: str | None) -> Path:
    """The journal's file: in the lab, in the folder that is named, or the file that is named."""
    place = folder if where is None else Path(where)
    return place if place.suffix == ".log" else place / JOURNAL


def _open_journal(path: Path) -> Any:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path.parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(str(path), JournalLock(path)))


def is_journal(where: str | None) -> bool:
    """Whether a study lies in a journal, so that a lock beside it tells who works on it."""
    return where is None or ("://" not in where and not re.fullmatch(r"[\w.-]+:\d+", where))


@contextlib.contextmanager
def open_study(
    folder: Path, name: str, *, where: str | None = None, directions: Sequence[str] = ("maximize",)
) -> Iterator[optuna.Study]:
    """Open a study to lead its search; only one process does so at a time, others join."""
    import optuna

    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"A study's name is made of letters, digits, _ . and -, got '{name}'.")
    place = journal_of(folder, where).parent if is_journal(where) else folder
    place.mkdir(parents=True, exist_ok=True)
    with (place / f"{name}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise WorkError(f"Another process is working on the study '{name}'. Wait for it, or stop it.") from error
        storage = open_storage(folder, where)
        study = optuna.create_study(study_name=name, storage=storage, directions=list(directions), load_if_exists=True)
        try:
            yield study
        finally:
            close(study)


def load_study(folder: Path, name: str, *, where: str | None = None, wait: float = 0.0) -> optuna.Study:
    """Open a study that is there, or comes to be there within so many seconds."""
    import optuna

    if is_journal(where) and not wait and not journal_of(folder, where).exists():
        raise UserError(f"No study '{name}': there is no journal at {journal_of(folder, where)}.")
    storage = open_storage(folder, where)
    until = time.monotonic() + wait
    while True:
        names = {study.study_name for study in storage.get_all_studies()}
        if name in names:
            return optuna.load_study(study_name=name, storage=storage)
        if time.monotonic() >= until:
            known = f" There are: {', '.join(sorted(names))}." if names else ""
            raise UserError(f"No study '{name}' in {where or journal_of(folder, None)}.{known}")
        time.sleep(min(1.0, until - time.monotonic()))


def claim(study: optuna.Study, question: str) -> None:
    """Refuse to mix two questions in one study: trials of the one are no answers to the other."""
    if study.user_attrs.get("question", question) != question:
        raise UserError(
            f"The study '{study.study_name}' belongs to another search (other models, tasks, settings or seed). "
            "Choose another --study, or leave it out."
        )
    study.set_user_attr("question", question)
