"""A run has a row from its first moment, whatever its end, and an id of its own."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergectl.store import Store, StoreError, digest_of, ingest, open_store
from mergectl.store.documents import plain

Launch = Callable[..., "subprocess.Popen[str]"]


def status_of(store: Store, run_id: str) -> Any:
    return store.query("SELECT status, error FROM runs WHERE run_id = ?", [run_id]).rows


def test_making_a_store_and_looking_for_runs_touches_no_file(untouched: Store) -> None:
    assert (untouched.find("ab"), untouched.finished("ab"), untouched.folder.exists()) == (None, None, False)


def test_a_run_has_a_row_before_its_end(store: Store) -> None:
    run = store.start("merge", config={"method": "ties"})
    assert status_of(store, run.id) == [("started", None)]


def test_half_a_letter_does_not_keep_runs_from_the_database(store: Store) -> None:
    half = "m\udcff"
    with store.start("merge", config={"a": half}, command=[half], name=half, environment={half: half}) as run:
        run.input("expert", half, task=half)
        run.artifact("model", half)
    assert status_of(store, run.id) == [("finished", None)]


def test_a_finished_run_keeps_all_it_was_told(store: Store) -> None:
    with store.start("eval", config={"b": 1, "a": [0.5, None]}, seed=7, command=["mergectl", "eval"], name="first",
                     study="s", trial=3, environment={"torch": "2.13"},
                     inputs=[{"role": "model", "ref": "merged", "digest": "d1"}]) as run:  # fmt: skip
        run.metric("score", 0.25, task="digits/parity", split="report", step=2)
        run.input("head", Path("runs/parity"), "d2", task="digits/parity", run_id="abc")
        run.artifact("model", "merged", "d3", bytes=12)
        run.note("threads", 2)
    found = store.find("first")
    metrics = store.query("SELECT task, split, name, step, value FROM metrics").rows
    assert found is not None
    assert metrics == [("digits/parity", "report", "score", 2, 0.25)]
    assert [found[key] for key in ("run_id", "kind", "status", "config", "seed", "study", "trial", "attempt")] == [
        run.id, "eval", "finished", {"b": 1, "a": [0.5, None]}, 7, "s", 3, 1]  # fmt: skip
    assert found["command"] == ["mergectl", "eval"]
    assert found["inputs"] == [
        {"role": "model", "task": None, "ref": "merged", "digest": "d1", "run_id": None},
        {"role": "head", "task": "digits/parity", "ref": "runs/parity", "digest": "d2", "run_id": "abc"},
    ]
    assert found["artifacts"] == [{"kind": "model", "path": "merged", "digest": "d3", "bytes": 12}]
    assert {"torch": "2.13", "threads": "2", "pid": str(os.getpid())}.items() <= found["environment"].items()
    assert found["ended_at"] >= found["started_at"]


def test_an_exception_makes_the_run_failed_and_goes_on(store: Store) -> None:
    run = store.start("merge", config={})
    with pytest.raises(ValueError, match="no such"), run:
        raise ValueError("no such task")
    assert status_of(store, run.id) == [("failed", "ValueError: no such task")]


def test_ctrl_c_makes_the_run_cancelled_and_goes_on(store: Store) -> None:
    run = store.start("merge", config={})
    with pytest.raises(KeyboardInterrupt), run:
        raise KeyboardInterrupt
    assert status_of(store, run.id) == [("cancelled", None)]


def test_a_killed_run_shows_as_lost_in_runs_and_views(store: Store, launch: Launch) -> None:
    code = """
import os, sys
from mergectl.store import open_store
run = open_store(sys.argv[1]).start("trial", config={}, study="s", trial=0)
print(run.id, flush=True)
os.kill(os.getpid(), 9)
"""
    told = launch(code).communicate()[0].strip()
    found = store.find(told)
    assert found is not None
    assert (found["status"], store.query("SELECT status FROM trials").rows) == ("lost", [("lost",)])


def test_a_run_cannot_end_twice(store: Store) -> None:
    run = store.start("merge", config={})
    run.finish()
    with pytest.raises(StoreError, match="has already ended as finished"):
        run.fail("late")


def test_a_number_that_is_not_finite_is_kept_as_missing_with_a_note(store: Store) -> None:
    with store.start("finetune", config={}) as run:
        run.metric("loss", float("nan"), step=4)
        run.metric("loss", float("-inf"), task="a/b")
    found = store.find(run.id)
    assert found is not None
    assert found["environment"]["not_finite"] == '["loss (step 4) was nan", "loss (a/b) was -inf"]'
    assert store.query("SELECT value FROM metrics").rows == [(None,), (None,)]


def test_repeating_a_run_gives_the_next_attempt_and_another_id(store: Store) -> None:
    runs = [store.start("merge", config={"x": 1}, seed=seed) for seed in (0, 0, 1)]
    assert [run.attempt for run in runs] == [1, 2, 1]
    assert len({run.id for run in runs}) == 3


def test_the_first_id_of_a_run_is_the_same_in_every_lab(tmp_path: Path) -> None:
    first, second = (open_store(tmp_path / lab).start("merge", config={"x": 1}, seed=0) for lab in ("a/s", "b/s"))
    assert first.id == second.id


def test_processes_starting_the_same_run_at_once_get_different_attempts(store: Store, launch: Launch) -> None:
    code = """
import pathlib, sys, time
from mergectl.store import open_store
from mergectl.store.ids import reserve
store = open_store(sys.argv[1])
print("ready", flush=True)
while not pathlib.Path(sys.argv[2]).exists():
    time.sleep(0.001)
for _ in range(100):
    print(reserve(store.places, ("merge", "x"))[1])
store.start("merge", config={"x": 1}).finish()
"""
    go = store.folder / "go"
    processes = [launch(code, go) for _ in range(3)]
    for process in processes:
        assert process.stdout
        process.stdout.readline()
    go.touch()
    attempts = sorted(int(word) for process in processes for word in process.communicate()[0].split())
    assert attempts == list(range(1, 301))
    assert store.query("SELECT attempt FROM runs ORDER BY attempt").rows == [(1,), (2,), (3,)]


def test_ids_stay_unique_when_the_list_of_ids_is_lost(store: Store) -> None:
    with store.start("merge", config={"x": 1}) as first:
        pass
    store.ingest()
    store.places.ids.unlink()
    assert store.start("merge", config={"x": 1}).id != first.id


def test_a_power_cut_may_cost_the_list_lines_but_no_run_its_segment(store: Store) -> None:
    with store.start("merge", config={"x": 1}) as first:
        pass
    second = store.start("merge", config={"x": 1})
    store.places.ids.write_bytes(b"")
    third = store.start("merge", config={"x": 1})
    assert [run.attempt for run in (first, second, third)] == [1, 2, 3]


def test_ids_last_before_their_segments_leave_the_inbox(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.start("merge", config={"x": 1}).finish()
    seen: list[object] = []
    monkeypatch.setattr(ingest, "keep", lambda places: seen.append(len(list(places.inbox.glob("*.json")))))
    store.ingest()
    assert (seen, list(store.places.inbox.glob("*.json"))) == ([1], [])


def test_a_run_leaves_the_database_alone_that_another_has_just_written(untouched: Store) -> None:
    untouched.start("merge", config={"x": 1}).finish()
    assert not list(untouched.places.inbox.glob("*.json"))
    other = open_store(untouched.path)
    other.start("merge", config={"x": 2}).finish()
    assert len(list(untouched.places.inbox.glob("*.json"))) == 1
    os.utime(untouched.path, (0, 0))
    other.start("merge", config={"x": 3}).finish()
    assert not list(untouched.places.inbox.glob("*.json"))


def test_a_fork_keeps_its_own_runs_alive_and_not_its_parents(store: Store, launch: Launch) -> None:
    code = """
import os, sys, time
from mergectl.store import heartbeat, open_store
heartbeat.INTERVAL = 0.02
store = open_store(sys.argv[1])
mine = store.start("merge", config={"x": 1})
if os.fork() == 0:
    own = store.start("merge", config={"x": 2})
    files = [store.places.heartbeats / run.id for run in (mine, own)]
    for path in files:
        os.utime(path, (0, 0))
    heartbeat._PULSE.discard(files[0])
    until = time.monotonic() + 20
    while files[1].stat().st_mtime == 0 and time.monotonic() < until:
        time.sleep(0.01)
    print(files[1].stat().st_mtime > 0, len(heartbeat._PULSE._paths), flush=True)
    os._exit(0)
os.wait()
"""
    assert launch(code).communicate()[0].split() == ["True", "1"]


def test_a_run_is_found_by_id_prefix_and_by_name_newest_first(store: Store) -> None:
    runs = []
    for number in range(2):
        with store.start("merge", config={"x": number}, name="best") as run:
            runs.append(run.id)
    found = [store.find(word) for word in (runs[0], runs[0][:8], "best", "zz")]
    assert [run and run["run_id"] for run in found] == [runs[0], runs[0], runs[1], None]


def test_an_ambiguous_prefix_lists_the_runs_it_may_mean(store: Store) -> None:
    ids = [store.start("merge", config={"x": number}).id for number in range(100)]
    shared = next(name[:2] for name in ids if sum(other[:2] == name[:2] for other in ids) > 1)
    with pytest.raises(StoreError, match=rf"runs begin with {shared}: {shared}.*, {shared}.* Give more of the id"):
        store.find(shared)


def test_only_a_finished_run_of_the_same_config_counts_as_done(store: Store) -> None:
    with pytest.raises(ValueError, match="x"), store.start("merge", config={"x": 1}):
        raise ValueError("x")
    before = store.finished(digest_of({"x": 1}))
    with store.start("merge", config={"x": 1}) as run:
        pass
    after = store.finished(run.config_digest, kind="merge")
    assert (before, after and after["run_id"], store.finished(run.config_digest, kind="eval")) == (None, run.id, None)


def test_a_full_disk_is_told_in_a_sentence_and_leaves_nothing_half_written(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = store.start("merge", config={})
    before = sorted(store.places.inbox.iterdir())

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=rf"The run {run.id} cannot be kept in .*: No space left on device"):
        run.finish()
    assert sorted(store.places.inbox.iterdir()) == before


def test_a_seed_that_no_column_can_hold_is_refused(store: Store) -> None:
    with pytest.raises(StoreError, match="seed must fit 64 bits"):
        store.start("merge", config={}, seed=2**63)


def test_two_stores_in_one_folder_do_not_mix(tmp_path: Path) -> None:
    stores = [open_store(tmp_path / name) for name in ("mergectl.duckdb", "other.duckdb")]
    for number, store in enumerate(stores):
        for _ in range(number + 1):
            store.start("merge", config={}).finish()
    assert [store.query("SELECT count(*) FROM runs").rows for store in stores] == [[(1,)], [(2,)]]


def test_the_store_is_where_the_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGECTL_STORE", str(tmp_path / "x.duckdb"))
    assert open_store().path == tmp_path / "x.duckdb"


def test_a_url_of_another_server_is_refused_as_a_store() -> None:
    with pytest.raises(StoreError, match=r"A store is a file .* got mysql://me:\*\*\*@host/lab"):
        open_store("mysql://me:secret@host/lab")


def test_importing_the_store_loads_no_database() -> None:
    code = "import sys, mergectl.store; print(sorted({'duckdb', 'torch', 'numpy', 'pandas'} & set(sys.modules)))"
    root = Path(__file__).absolute().parents[2]
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert told.stdout.strip() == "[]"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(config=st.dictionaries(st.text(max_size=5), JSON, max_size=4))
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_config_comes_back_as_it_was(store: Store, config: dict[str, Any]) -> None:
    run = store.start("merge", config=config)
    run.finish()
    found = store.find(run.id)
    assert found is not None
    assert found["config"] == plain(config)


@given(config=st.dictionaries(st.text(max_size=5), JSON, max_size=4))
def test_the_digest_of_a_config_knows_no_order_of_keys(config: dict[str, Any]) -> None:
    assert digest_of(config) == digest_of(dict(reversed(config.items())))
