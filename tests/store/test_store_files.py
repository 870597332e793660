"""Old, new, foreign, broken and busy database files: one clear sentence, and never a byte lost."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from mergectl.store import Store, StoreBusyError, StoreError, migrate, open_store
from mergectl.store.database import attached

Launch = Callable[..., "subprocess.Popen[str]"]


def change(store: Store, *statements: str) -> None:
    store.folder.mkdir(parents=True, exist_ok=True)
    with attached(store.path, write=True) as connection:
        for statement in statements:
            connection.execute(statement)


BREAK: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "a hundred bytes": lambda data: data[:100],
    "half": lambda data: data[: len(data) // 2],
    "text": lambda data: b"run_id,kind\n" * 1000,
    "flipped bits": lambda data: data[:12288] + bytes(255 - byte for byte in data[12288:]),
}


@pytest.mark.parametrize("how", BREAK)
def test_a_broken_file_is_told_left_alone_and_made_anew_from_the_archive(store: Store, how: str) -> None:
    store.start("merge", config={"x": 1}).finish()
    store.ingest()
    broken = BREAK[how](store.path.read_bytes())
    store.path.write_bytes(broken)
    run = store.start("merge", config={"x": 2})
    run.finish()  # the file's state is no matter of a run's
    for ask in (lambda: store.query("SELECT * FROM runs"), store.ingest):
        with pytest.raises(StoreError, match=r"not a whole DuckDB file.*left as it is.*--rebuild"):
            ask()
    assert store.path.read_bytes() == broken
    assert (store.rebuild(), store.query("SELECT count(*) FROM runs").rows) == (2, [(2,)])


def test_a_newer_file_is_told_and_left_alone(store: Store) -> None:
    store.start("merge", config={}).finish()
    change(store, "INSERT INTO schema_version (version) VALUES (999)")
    before = store.path.read_bytes()
    store.start("merge", config={}).finish()
    for ask in (lambda: store.query("SELECT * FROM runs"), store.ingest):
        with pytest.raises(StoreError, match=r"newer mergectl \(schema 999, this one knows \d+\).*upgrade"):
            ask()
    assert store.path.read_bytes() == before


def test_another_program_s_database_is_told_and_left_alone(untouched: Store) -> None:
    change(untouched, "CREATE TABLE theirs (x INTEGER)")
    before = untouched.path.read_bytes()
    untouched.start("merge", config={}).finish()
    with pytest.raises(StoreError, match="not a mergectl store"):
        untouched.query("SELECT 1")
    assert untouched.path.read_bytes() == before


def test_a_file_open_elsewhere_is_busy_and_loses_nothing(store: Store, launch: Launch) -> None:
    store.start("merge", config={"x": 1}).finish()
    shell = launch("""
import duckdb, sys, time
connection = duckdb.connect(sys.argv[1])
print("open", flush=True)
time.sleep(60)
""")
    assert shell.stdout
    shell.stdout.readline()
    store.start("merge", config={"x": 2}).finish()
    with pytest.raises(StoreBusyError, match=r"open in another program \(.*PID"):
        store.query("SELECT 1")
    shell.kill()
    shell.wait()
    assert store.query("SELECT count(*) FROM runs").rows == [(2,)]


def test_a_folder_in_the_way_is_told(tmp_path: Path) -> None:
    (tmp_path / "lab").write_text("a file")
    with pytest.raises(StoreError, match="must be a folder"):
        open_store(tmp_path / "lab" / "mergectl.duckdb")


@pytest.mark.parametrize("number", [number for number in migrate.migrations()])
def test_every_older_schema_opens_with_its_row(untouched: Store, number: int) -> None:
    older = [path.read_text() for known, path in migrate.migrations().items() if known <= number]
    versions = [f"INSERT INTO schema_version (version) VALUES ({known})" for known in range(1, number + 1)]
    row = "INSERT INTO runs (run_id, kind, status, config) VALUES ('abc', 'merge', 'finished', '{\"x\": 1}')"
    change(untouched, *older, *versions, row)
    found = untouched.find("abc")
    assert found is not None
    assert (found["kind"], found["config"]) == ("merge", {"x": 1})
    latest = untouched.query("SELECT max(version) FROM schema_version").rows[0][0]
    assert latest == max(migrate.migrations())


def with_a_second_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    schema = tmp_path / "schema"
    shutil.copytree(migrate.SCHEMA, schema)
    (schema / "900_second.sql").write_text(text)
    monkeypatch.setattr(migrate, "SCHEMA", schema)


def test_a_new_schema_file_changes_an_old_store_and_keeps_its_rows(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.start("merge", config={}, name="old").finish()
    with_a_second_schema(tmp_path, monkeypatch, "ALTER TABLE runs ADD COLUMN place VARCHAR DEFAULT 'here';")
    assert store.query("SELECT name, place FROM runs").rows == [("old", "here")]


def test_a_schema_file_that_fails_changes_nothing(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.start("merge", config={}).finish()
    with monkeypatch.context() as patch:
        with_a_second_schema(
            tmp_path, patch, "ALTER TABLE runs ADD COLUMN place VARCHAR; ALTER TABLE nowhere RENAME TO x;"
        )
        with pytest.raises(StoreError, match="could not be written"):
            store.query("SELECT 1")
    assert "place" not in store.query("SELECT * FROM runs").columns
    assert store.query("SELECT count(*) FROM leaderboard").rows == [(0,)]


def test_changed_views_are_made_anew(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.start("merge", config={}).finish()
    views = tmp_path / "views.sql"
    views.write_text(migrate.VIEWS.read_text() + "CREATE VIEW names AS SELECT kind FROM runs;")
    monkeypatch.setattr(migrate, "VIEWS", views)
    assert store.query("SELECT * FROM names").rows == [("merge",)]


def test_a_log_left_by_a_killed_writer_is_read(store: Store, launch: Launch) -> None:
    store.start("merge", config={}).finish()
    store.ingest()
    launch("""
import os, pathlib, sys
from mergectl.store.database import attached
with attached(pathlib.Path(sys.argv[1]), write=True) as connection:
    connection.execute("INSERT INTO runs (run_id, kind, status) VALUES ('abc', 'merge', 'failed')")
    os.kill(os.getpid(), 9)
""").wait()
    log = store.path.with_name(store.path.name + ".wal")
    assert log.exists()
    assert store.query("SELECT count(*) FROM runs").rows == [(2,)]


def test_a_folder_nobody_may_write_can_still_be_read(store: Store) -> None:
    if os.geteuid() == 0:
        pytest.skip("the superuser may write everywhere")
    store.start("merge", config={}).finish()
    store.ingest()
    store.folder.chmod(0o500)
    try:
        assert store.query("SELECT count(*) FROM runs").rows == [(1,)]
    finally:
        store.folder.chmod(0o700)
