"""No acknowledged run is lost, doubled or halved, whoever dies or takes turns with whom."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mergectl.store import Store, StoreError, StoreWarning, ingest, open_store, segments
from mergectl.store.documents import utc_now
from mergectl.store.lock import hold

Launch = Callable[..., "subprocess.Popen[str]"]

WRITER = """
import sys
from mergectl.store import open_store
store = open_store(sys.argv[1])
for number in range(int(sys.argv[3])):
    with store.start("trial", config={"writer": sys.argv[2], "number": number}) as run:
        for step in range(5):
            run.metric("loss", step / 10, step=step)
    print(run.id, flush=True)
    if sys.argv[4] == "ingest":
        store.ingest()
"""


def told_by(processes: list[subprocess.Popen[str]]) -> list[str]:
    return sorted(word for process in processes for word in process.communicate()[0].split())


def finished_in(store: Store) -> list[str]:
    """Return the finished runs, after checking that each has its five metrics once."""
    rows = store.query(
        "SELECT run_id, status, (SELECT count(*) FROM metrics m WHERE m.run_id = r.run_id) FROM runs r ORDER BY run_id"
    ).rows
    assert all(count == (5 if status == "finished" else 0) for _, status, count in rows)
    return [name for name, status, _ in rows if status == "finished"]


def a_run(store: Store, **config: object) -> str:
    with store.start("merge", config=config) as run:
        for step in range(5):
            run.metric("loss", step, step=step)
    return run.id


@pytest.mark.slow
def test_processes_taking_turns_at_the_file_lose_no_row(store: Store, launch: Launch) -> None:
    told = told_by([launch(WRITER, writer, 6, "ingest") for writer in range(4)])
    assert (len(told), finished_in(store)) == (24, told)


def test_two_processes_writing_while_another_reads_lose_no_row(store: Store, launch: Launch) -> None:
    writers = [launch(WRITER, writer, 40, "wait") for writer in range(2)]
    counts = []
    while any(writer.poll() is None for writer in writers):
        if not store.places.empty():
            counts.append(store.query("SELECT count(*) FROM runs WHERE status = 'finished'").rows[0][0])
    told = told_by(writers)
    assert counts == sorted(counts)
    assert (len(told), finished_in(store)) == (80, told)


@pytest.mark.slow
def test_killed_writers_and_ingesters_lose_no_acknowledged_run(store: Store, launch: Launch) -> None:
    dice = random.Random(0)
    told: set[str] = set()
    for turn in range(5):
        process = launch(WRITER, turn, 500, "ingest")
        assert process.stdout
        told.add(process.stdout.readline().strip())
        time.sleep(dice.uniform(0.0, 0.4))
        process.send_signal(signal.SIGKILL)
        told |= {line for line in process.communicate()[0].split() if len(line) == 12}
    seen = finished_in(store)
    assert told <= set(seen)
    assert len(seen) <= len(told) + 5  # a run may be safe in the moment before it could say so


@pytest.mark.parametrize("point", ["put_rows", "archive", "pack", "_build", "sync_folder"])
def test_dying_at_any_step_of_an_ingest_costs_only_another_turn(
    store: Store, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    names = sorted(a_run(store, x=number) for number in range(3))

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    owner = segments if hasattr(segments, point) else ingest
    fresh = open_store(store.path.with_name("mergectl.duckdb"))
    for path in store.places.archive.glob("*.json"):
        path.rename(store.places.inbox / path.name)
    store.path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(owner, point, die)
        with pytest.raises(KeyboardInterrupt):
            fresh.ingest()
    assert finished_in(fresh) == names


def test_the_end_of_a_run_brings_it_into_the_database(untouched: Store) -> None:
    name = a_run(untouched, x=1)
    assert [path.name for path in untouched.places.archive.iterdir()] == [f"{name}.json"]


def test_an_end_replaces_its_beginning_and_never_the_other_way(store: Store) -> None:
    run = store.start("merge", config={})
    beginning = (store.places.inbox / f"{run.id}.started.json").read_bytes()
    store.ingest()
    run.finish()
    store.ingest()
    (store.places.inbox / f"{run.id}.started.json").write_bytes(beginning)
    store.ingest()
    assert store.query("SELECT run_id, status FROM runs").rows == [(run.id, "finished")]
    assert [path.name for path in store.places.archive.iterdir()] == [f"{run.id}.json"]


def test_a_different_run_with_a_known_id_is_kept_under_another(store: Store, tmp_path: Path) -> None:
    name = a_run(store, x=1)
    store.ingest()
    other = open_store(tmp_path / "elsewhere" / "mergectl.duckdb")
    assert a_run(other, x=1) == name
    document = json.loads(next(other.places.archive.glob("*.json")).read_bytes())
    for _ in range(2):  # the second time as if its ingester had died before putting the segment away
        segments.put(store.places.inbox, document)
        store.ingest()
    assert len(finished_in(store)) == 2
    assert (store.rebuild(), len(finished_in(store))) == (2, 2)


def test_a_broken_segment_is_set_aside_and_hides_no_other(store: Store) -> None:
    name = a_run(store, x=1)
    for number, text in enumerate(
        ('{"run_id": "a', '{"run_id": "b", "format": 1, "kind": "x", "status": "odd"}', "[]")
    ):
        (store.places.inbox / f"broken{number}.json").write_text(text)
    with pytest.warns(StoreWarning, match="holds no run.*renamed") as warned:
        store.ingest()
    assert len(warned) == 3
    assert (finished_in(store), len(list(store.places.inbox.glob("*.broken")))) == ([name], 3)


def test_a_segment_of_a_newer_mergectl_waits_for_one(store: Store) -> None:
    a_run(store, x=1)
    text = json.dumps({"run_id": "abc", "format": 99, "kind": "x", "status": "finished"})
    (store.places.inbox / "abc.json").write_text(text)
    with pytest.warns(StoreWarning, match="newer mergectl"):
        store.ingest()
    assert (store.places.inbox / "abc.json").read_text() == text


def test_many_archived_segments_become_parquet_and_rebuild_brings_all_back(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "PACK_AT", 3)
    names = []
    for number in range(8):
        names.append(a_run(store, x=number))
        store.ingest()
    lost = store.start("merge", config={"lost": True})
    store.ingest()
    packed = len(list(store.places.archive.glob("*.parquet")))
    before = store.query("SELECT * FROM runs ORDER BY run_id").rows
    count = store.rebuild()
    assert (packed, count) == (2, 9)
    assert store.query("SELECT * FROM runs ORDER BY run_id").rows == before
    assert (finished_in(store), lost.id in str(before)) == (sorted(names), True)


def test_a_deleted_database_comes_back_from_the_archive(store: Store) -> None:
    name = a_run(store, x=1)
    store.path.unlink()
    assert finished_in(store) == [name]


def test_rebuilding_keeps_the_old_file(store: Store) -> None:
    a_run(store, x=1)
    before = store.path.read_bytes()
    store.rebuild()
    assert [path.read_bytes() for path in store.folder.glob("*.old")] == [before]


def test_there_is_nothing_to_rebuild_from_nothing(untouched: Store) -> None:
    with pytest.raises(StoreError, match="nothing at"):
        untouched.rebuild()


def test_a_reader_never_blocks_a_run(store: Store) -> None:
    a_run(store, x=1)
    with hold(store.places.lock, exclusive=False):
        began = time.monotonic()
        name = a_run(store, x=2)
        seconds = time.monotonic() - began
    assert seconds < 2
    assert name in finished_in(store)


def test_what_a_killed_writer_left_half_written_is_swept(store: Store) -> None:
    a_run(store, x=1)
    left = store.places.inbox / ".abc.json.1.2.tmp"
    left.write_text("{")
    os.utime(left, (0, 0))
    a_run(store, x=2)
    store.ingest()
    assert not left.exists()


def test_moments_are_told_in_utc(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    before = utc_now()
    a_run(store, x=1)
    monkeypatch.undo()
    time.tzset()
    (began,) = store.query("SELECT started_at FROM runs").rows[0]
    assert before <= began.isoformat(timespec="microseconds") <= utc_now()
