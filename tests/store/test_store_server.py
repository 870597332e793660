"""A store on a PostgreSQL server keeps the promises of a file, and those of many machines writing at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mergectl.store import Store, StoreBusyError, StoreError, StoreWarning, digest_of, heartbeat, open_store
from mergectl.store.places import shown_url
from mergectl.store.postgres import numbered
from tests.store.conftest import ROOT, server_store

Launch = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def remote(server: str, tmp_path: Path) -> Store:
    return server_store(server, tmp_path)


def elsewhere(store: Store, folder: Path) -> Store:
    """The same server as a lab on another machine sees it."""
    other = open_store(store.places.server)
    other.places = replace(other.places, database=folder / "lab" / store.places.database.name)
    return other


def a_run(store: Store, name: str = "a", **config: Any) -> str:
    with store.start("eval", config=config, name=name, seed=1) as run:
        run.input("model", "org/m", "d1")
        for step in range(3):
            run.metric("loss", step / 2, task="a/b", split="tune", step=step)
        run.artifact("model", "out", "d2", bytes=5)
        run.note("threads", 2)
    return run.id


def test_a_run_comes_back_from_the_server_as_it_was_told(remote: Store) -> None:
    name = a_run(remote, b=1, a=[0.5, None, {"x": "ü"}])
    found = remote.find(name[:6])
    assert found is not None
    assert (found["config"], found["seed"], found["status"]) == ({"b": 1, "a": [0.5, None, {"x": "ü"}]}, 1, "finished")
    assert found["inputs"] == [{"role": "model", "task": None, "ref": "org/m", "digest": "d1", "run_id": None}]
    assert found["artifacts"] == [{"kind": "model", "path": "out", "digest": "d2", "bytes": 5}]
    assert found["environment"]["threads"] == "2"
    assert remote.query("SELECT step, value FROM metrics ORDER BY step").rows == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert remote.finished(digest_of(found["config"]), kind="eval") == found


def test_labs_on_two_machines_share_a_server_and_their_ids_never_meet(remote: Store, tmp_path: Path) -> None:
    other = elsewhere(remote, tmp_path / "other")
    names = [a_run(store, x=1) for store in (remote, other, remote)]
    other.ingest()
    remote.ingest()
    assert sorted(row[0] for row in other.query("SELECT run_id FROM runs").rows) == sorted(names)
    assert len(set(names)) == 3


def test_a_run_is_on_the_server_as_soon_as_it_begins_and_when_it_ends(remote: Store, tmp_path: Path) -> None:
    other = elsewhere(remote, tmp_path / "other")
    run = other.start("merge", config={})
    statuses = [remote.query("SELECT status FROM runs").rows]
    run.finish()
    assert [*statuses, remote.query("SELECT status FROM runs").rows] == [[("started",)], [("finished",)]]


def test_a_server_that_cannot_be_reached_loses_no_run(remote: Store, tmp_path: Path) -> None:
    away = elsewhere(remote, tmp_path / "away")
    away.places = replace(away.places, server=f"postgresql://lab@/lab?host={tmp_path}")
    with pytest.warns(StoreWarning, match=r"cannot be reached.*wait in the lab"):
        name = a_run(away)
    with pytest.raises(StoreBusyError, match="cannot be reached"):
        away.query("SELECT 1")
    back = elsewhere(remote, tmp_path / "away")
    assert back.query("SELECT run_id, status FROM runs").rows == [(name, "finished")]


def test_a_killed_run_shows_as_lost_on_the_server(remote: Store, tmp_path: Path) -> None:
    run = remote.start("trial", config={}, study="s", trial=0)
    remote.ingest()
    run._heartbeat.stop()
    dead = heartbeat.here() | {"pid": 2**22 + 1}
    (remote.places.heartbeats / run.id).write_text(json.dumps(dead))
    remote.query("SELECT 1")
    seen = elsewhere(remote, tmp_path / "other").query(
        "SELECT r.status, t.status FROM runs r JOIN trials t USING (run_id)"
    )
    assert seen.rows == [("lost", "lost")]


def test_processes_that_write_to_a_server_at_once_lose_and_double_nothing(server: str, tmp_path: Path) -> None:
    store = server_store(server, tmp_path)
    code = """
import os, sys
os.chdir(sys.argv[2])
from mergectl.store import open_store
store = open_store(sys.argv[1])
for number in range(5):
    with store.start("trial", config={"writer": sys.argv[2], "number": number}) as run:
        run.metric("loss", number)
    print(run.id, flush=True)
"""
    processes = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        words = [sys.executable, "-c", code, str(store.places.server), str(tmp_path / str(number))]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        processes.append(subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True))
    told = sorted(word for process in processes for word in process.communicate()[0].split())
    rows = store.query("SELECT r.run_id, count(*) FROM runs r JOIN metrics USING (run_id) GROUP BY 1 ORDER BY 1").rows
    assert (len(told), rows) == (10, [(name, 1) for name in told])


def test_a_lab_s_archive_brings_its_runs_back_to_an_emptied_server(server: str, tmp_path: Path) -> None:
    store = server_store(server, tmp_path)
    names = sorted(a_run(store, x=x) for x in range(3))
    store.ingest()
    emptied = server_store(server, tmp_path)
    assert (emptied.query("SELECT * FROM runs").rows, emptied.rebuild()) == ([], 3)
    assert sorted(row[0] for row in emptied.query("SELECT run_id FROM runs").rows) == names
    assert (emptied.rebuild(), emptied.check()) == (3, [])


def test_a_newer_server_is_told_and_left_alone(remote: Store) -> None:
    import psycopg

    a_run(remote)
    remote.ingest()
    assert remote.places.server
    with psycopg.connect(remote.places.server) as connection:
        connection.execute("INSERT INTO mergectl.schema_version (version) VALUES (999)")
    a_run(remote)
    for ask in (lambda: remote.query("SELECT 1"), remote.ingest):
        with pytest.raises(StoreError, match="newer mergectl"):
            ask()
    with psycopg.connect(remote.places.server) as connection:
        assert connection.execute("SELECT count(*) FROM mergectl.runs").fetchall() == [(1,)]


@pytest.mark.parametrize(
    ("sql", "sentence"),
    [
        ("INSERT INTO runs (run_id, kind, status) VALUES ('x', 'x', 'x')", "syntax error"),
        ("WITH x AS (DELETE FROM runs RETURNING *) SELECT * FROM x", "data-modifying"),
        ("SELECT 1; DROP TABLE runs", "One SELECT at a time"),
        ("SELECT pg_read_file('/etc/passwd')", "permission denied"),
        ("SELECT query_to_xml('DELETE FROM runs', true, true, '')", "not allowed"),
        ("SELECT set_config('transaction_read_only', 'off', true)", "read-write"),
        ("SELECT nam FROM runs", 'column "nam" does not exist'),
    ],
)
def test_a_question_to_a_server_can_only_ask(remote: Store, sql: str, sentence: str) -> None:
    a_run(remote)
    with pytest.raises(StoreError, match=sentence) as told:
        remote.query(sql)
    assert "\n" not in str(told.value)
    assert remote.query("SELECT count(*) FROM runs").rows == [(1,)]


@pytest.mark.parametrize("login", ["postgres", "nearly"])
def test_a_login_with_special_rights_may_report_but_not_ask(remote: Store, tmp_path: Path, login: str) -> None:
    import psycopg

    a_run(remote)
    remote.ingest()
    url = (remote.places.server or "").replace("lab@", "postgres@")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP ROLE IF EXISTS nearly")
        connection.execute("CREATE ROLE nearly LOGIN")
        connection.execute("GRANT pg_read_all_data, pg_read_server_files TO nearly")
    special = elsewhere(remote, tmp_path / login)
    special.places = replace(special.places, server=url.replace("postgres@", f"{login}@"))
    assert special.query("SELECT count(*) FROM runs").rows == [(1,)]  # the program's own words
    undo = (
        "SELECT set_config('role', 'none', true), query_to_xml($$SELECT pg_read_file('PG_VERSION')$$, true, true, '')"
    )
    with pytest.raises(StoreError, match=rf"The login '{login}' can reach the server's own files, so it may not ask"):
        special.query(undo, limit=60)


def test_a_question_to_a_server_that_takes_too_long_is_stopped(remote: Store) -> None:
    with pytest.raises(StoreError, match=r"longer than 0\.2 seconds"):
        remote.query("SELECT pg_sleep(5)", limit=0.2)


def test_a_missing_driver_is_named_with_the_way_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(StoreError, match=r"pip install 'mergectl\[postgres\]'"):
        open_store("postgresql://host/lab").query("SELECT 1")


def test_no_password_is_shown_or_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    url = "postgresql://me:secret@db:5432/lab?password=hidden&x=1"
    assert shown_url(url) == "postgresql://me:***@db:5432/lab?password=***&x=1"
    run = store.start("eval", config={}, command=["mergectl", "--store", url])
    run.finish()
    assert "secret" not in "".join(path.read_text() for path in store.places.inbox.glob("*"))
    assert open_store(url).places.database.name == "me-db-5432-lab-password-x-1.postgresql"


def test_placeholders_become_numbers_only_outside_of_texts() -> None:
    assert numbered("SELECT '?', \"?\" -- ?\nFROM t WHERE a = ? AND b IN (SELECT unnest(?))", ["x", ["y"]]) == (
        "SELECT '?', \"?\" -- ?\nFROM t WHERE a = $1 AND b IN (SELECT unnest($2::text[]))", ["x", ["y"]],
    )  # fmt: skip
    assert numbered("SELECT $b, $a, $$c$$", {"a": 1, "b": 2}) == ("SELECT $2, $1, $$c$$", [1, 2])
