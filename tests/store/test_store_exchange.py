"""Runs travel between stores and through Parquet, none is lost, changed or doubled; `check` finds what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergectl.store import Store, StoreError, open_store
from mergectl.store.database import attached
from tests.store.conftest import server_store


def a_run(store: Store, x: int = 0, **more: Any) -> str:
    with store.start("eval", config={"x": x, "nested": [1, {"y": None}]}, seed=1, **more) as run:
        run.input("model", "org/m", "d1", run_id="abc")
        run.metric("score", 0.5 + x, task="a/b", split="report")
        run.metric("loss", float("nan"), step=3)
        run.artifact("model", "out", "d2", bytes=5)
        run.note("given", {"x": x})
    return run.id


def contents(store: Store) -> list[Any]:
    """Everything that the store's tables say, without the order of rows and without ids."""
    tables = ("runs", "inputs", "metrics", "artifacts", "environment")
    return [sorted(map(repr, store.query(f"SELECT * FROM {table}").rows)) for table in tables]


def count(store: Store) -> int:
    return int(store.query("SELECT count(*) FROM runs").rows[0][0])


@pytest.fixture
def other(tmp_path: Path) -> Store:
    return open_store(tmp_path / "other" / "mergectl.duckdb")


def test_another_store_s_runs_are_taken_in_once(store: Store, other: Store) -> None:
    a_run(store, 1)
    for x in (1, 2):
        a_run(other, x)
    assert [store.merge(other.path) for _ in range(2)] == [(2, 0), (0, 2)]
    assert (count(store), count(other), store.check()) == (3, 2, [])


def test_runs_that_come_back_under_another_id_are_known(store: Store, other: Store) -> None:
    assert a_run(store, 1) == a_run(other, 1)  # two runs, one id: in the other's store ours gets another
    assert (other.merge(store.path), store.merge(other.path)) == ((1, 0), (1, 1))
    assert (other.merge(store.path), count(store), count(other)) == ((0, 2), 2, 2)


def test_a_run_that_had_not_ended_is_replaced_by_its_end(store: Store, other: Store) -> None:
    run = other.start("merge", config={})
    assert store.merge(other.path) == (1, 0)
    run.finish()
    assert (store.merge(other.path), store.query("SELECT status FROM runs").rows) == ((1, 0), [("finished",)])


def test_an_id_that_came_from_elsewhere_is_not_given_out(store: Store, other: Store) -> None:
    name = a_run(other, 1)
    store.merge(other.path)
    assert a_run(store, 1) != name


def test_a_store_cannot_be_merged_into_itself_or_with_nothing(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is the store itself"):
        store.merge(store.path)
    with pytest.raises(StoreError, match="There is no store at"):
        store.merge(tmp_path / "nowhere")


@pytest.mark.slow
@settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text(max_size=8), value=st.floats(allow_nan=False, allow_infinity=False), seed=st.integers(0, 2**40))
def test_parquet_brings_every_run_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, database: bytes, name: str, value: float, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("parquet")
    first, second = (open_store(folder / lab / "mergectl.duckdb") for lab in ("a", "b"))
    for store in (first, second):
        store.places.make()
        store.path.write_bytes(database)
    with first.start("eval", config={"key": name, "n": [value]}, seed=seed, name=name) as run:
        run.metric("score", value, task=name, step=seed)
        run.note("text", name)
    assert (first.export(folder / "out"), second.import_(folder / "out")) == (1, (1, 0))
    assert contents(second) == contents(first)
    assert second.import_(folder / "out") == (0, 1)


def test_what_is_no_export_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"is no exported store: runs\.parquet is missing"):
        store.import_(tmp_path)
    a_run(store)
    store.export(tmp_path / "out")
    (tmp_path / "out" / "metrics.parquet").write_bytes(b"broken")
    with pytest.raises(StoreError, match="cannot be used"):
        store.import_(tmp_path / "out")


def test_a_file_and_a_server_exchange_their_runs(store: Store, server: str, tmp_path: Path) -> None:
    for x in range(2):
        a_run(store, x)
    remote = server_store(server, tmp_path / "remote")
    assert (remote.merge(store.path), remote.merge(store.path)) == ((2, 0), (0, 2))
    assert contents(remote) == contents(store)
    assert (remote.export(tmp_path / "out"), store.import_(tmp_path / "out"), remote.check()) == (2, (0, 2), [])


def test_a_sound_store_has_no_problem(store: Store) -> None:
    a_run(store)
    store.start("merge", config={})
    assert store.check() == []


FAULTS = {
    "DELETE FROM runs": "is in the archive and not in the database",
    "UPDATE metrics SET value = 0.75 WHERE name = 'score'": "has other metrics in the database",
    "DELETE FROM inputs": "has other inputs in the database",
    "UPDATE runs SET config = '{}'": "has other runs in the database",
    "INSERT INTO artifacts (run_id, kind) VALUES ('nobody', 'model')": "1 rows of artifacts belong to no run",
    "INSERT INTO runs (run_id, kind, status) VALUES ('abc', 'eval', 'finished')": "abc is in the database and not",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_mended_by_a_rebuild(store: Store, fault: str) -> None:
    a_run(store)
    store.ingest()
    with attached(store.path, write=True) as connection:
        connection.execute(fault)
    assert any(FAULTS[fault] in sentence for sentence in store.check())
    store.rebuild()
    assert store.check() == []


def test_a_broken_archive_is_a_problem_and_no_crash(store: Store) -> None:
    a_run(store)
    store.ingest()
    (store.places.archive / "000001.parquet").write_bytes(b"broken")
    (sentence,) = store.check()
    assert "cannot be read" in sentence
