"""Where rows come from: the data folder, then the local cache, then the hub at its pinned revision."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mergectl.benchmarks import _rows
from mergectl.benchmarks._contract import BenchmarkError, Task, tune_share

TASK = Task(
    name="mood",
    kind="classification",
    inputs=("text",),
    label="label",
    labels=("sad", "glad"),
    metric="accuracy",
    parts=tune_share(report="test", instead=("validation",)),
    source="mood",
    config="small",
    hub="someone/mood",
    revision="abc123",
    suite="made",
)


class Hub(ModuleType):
    """A stand-in for the `datasets` library that answers or fails, and remembers the calls."""

    def __init__(self, answer: Any) -> None:
        super().__init__("datasets")
        self.answer, self.calls = answer, []  # type: ignore[var-annotated]

    def load_dataset(self, *names: Any, **settings: Any) -> Any:
        """Answer as `datasets.load_dataset` would."""
        self.calls.append((*names, settings))
        if isinstance(self.answer, Exception):
            raise self.answer
        if settings["split"] not in self.answer:
            raise ValueError(f'Unknown split "{settings["split"]}". Should be one of {list(self.answer)}.')
        return Found(pa.table(self.answer[settings["split"]]))


class Found:
    """A data set as the library returns it."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self.features = dict.fromkeys(table.column_names)

    def with_format(self, _: str) -> Found:
        """Return itself: slicing gives the table."""
        return self

    def __getitem__(self, _: slice) -> pa.Table:
        return self.table


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give every test an empty cache and no hub."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    monkeypatch.setitem(sys.modules, "datasets", Hub(ConnectionError("no network here")))
    return tmp_path / "cache"


def hub(monkeypatch: pytest.MonkeyPatch, answer: Any) -> Hub:
    found = Hub(answer)
    monkeypatch.setitem(sys.modules, "datasets", found)
    return found


def rows(text: str) -> dict[str, list[Any]]:
    return {"text": [text], "label": [1]}


def put_in_folder(data: Path, name: str, text: str) -> None:
    path = data / "mood" / "small" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(rows(text)), path)


def put_in_cache(cache: Path, name: str, text: str, revision: str = "abc123") -> None:
    path = cache / "someone___mood" / "small" / "0.0.0" / revision / name
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(rows(text))
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)


def test_the_data_folder_comes_before_cache_and_hub(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = hub(monkeypatch, {"test": rows("hub")})
    put_in_cache(cache, "mood-test.arrow", "cache")
    put_in_folder(tmp_path / "data", "test.parquet", "folder")
    assert _rows.load(TASK, "report", data=tmp_path / "data").columns["text"] == ["folder"]
    assert called.calls == []


def test_the_cache_comes_before_the_hub_and_is_read_without_the_library(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = hub(monkeypatch, {"test": rows("hub")})
    put_in_cache(cache, "mood-test.arrow", "cache")
    assert _rows.load(TASK, "report", data=tmp_path / "empty").columns["text"] == ["cache"]
    assert called.calls == []


def test_a_cached_copy_of_another_revision_is_not_the_pinned_one(cache: Path) -> None:
    put_in_cache(cache, "mood-test.arrow", "other", revision="def456")
    with pytest.raises(BenchmarkError, match="has no someone/mood"):
        _rows.load(TASK, "report")


def test_any_cached_copy_will_do_where_no_revision_is_pinned(cache: Path) -> None:
    put_in_cache(cache, "mood-test.arrow", "other", revision="def456")
    assert _rows.load(replace(TASK, revision=None), "report").columns["text"] == ["other"]


def test_the_newest_cached_copy_is_read(cache: Path) -> None:
    for age, revision in enumerate(("b", "a", "c")):
        put_in_cache(cache, "mood-test.arrow", revision, revision=revision)
        os.utime(cache / "someone___mood" / "small" / "0.0.0" / revision, (10**9 - age, 10**9 - age))
    assert _rows.load(replace(TASK, revision=None), "report").columns["text"] == ["b"]


def test_a_branch_of_the_hub_is_looked_for_in_any_cached_copy(cache: Path) -> None:
    put_in_cache(cache, "mood-test.arrow", "branch", revision="def456")
    assert _rows.load(replace(TASK, revision="refs/convert/parquet"), "report").columns["text"] == ["branch"]


def test_the_hub_is_asked_for_the_pinned_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    called = hub(monkeypatch, {"test": rows("hub")})
    found = _rows.load(TASK, "report")
    assert (found.columns, found.labels, found.place) == ({"text": ["hub"]}, [1], "hub someone/mood@abc123")
    assert called.calls == [("someone/mood", "small", {"split": "test", "revision": "abc123"})]


def test_the_hub_too_may_have_a_stand_in_only(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, {"validation": rows("hub")})
    assert _rows.load(TASK, "report").ids == ["validation/0"]


def test_a_folder_with_a_stand_in_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, {"test": rows("hub")})
    put_in_folder(tmp_path, "validation.parquet", "folder")
    assert _rows.load(TASK, "report", data=tmp_path).columns["text"] == ["folder"]


def test_shards_named_as_on_the_hub_are_joined_in_order(tmp_path: Path) -> None:
    for number in (1, 0, 2):
        put_in_folder(tmp_path, f"test-0000{number}-of-00003.parquet", str(number))
    found = _rows.load(TASK, "report", data=tmp_path)
    assert found.columns["text"] == ["0", "1", "2"]
    assert found.place.endswith("test-00000-of-00003.parquet and 2 more")


def test_cached_shards_are_joined_too(cache: Path) -> None:
    for number in (1, 0):
        put_in_cache(cache, f"mood-test-0000{number}-of-00002.arrow", str(number))
    assert _rows.load(TASK, "report").columns["text"] == ["0", "1"]


def test_nothing_found_tells_every_place_and_where_to_put_the_file(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError) as caught:
        _rows.load(TASK, "report", data=tmp_path)
    wanted = tmp_path / "mood" / "small" / "test.parquet"
    said = str(caught.value)
    assert said.startswith(f"No rows for made/mood (report): there is no {wanted}; ")
    assert "the datasets cache" in said
    assert "no network here" in said
    assert said.endswith(f"Put them at {wanted}.")


def test_without_a_data_folder_the_way_out_is_to_give_one() -> None:
    with pytest.raises(BenchmarkError, match=r"Put them at DIR/mood/small/test\.parquet and pass --data DIR\."):
        _rows.load(TASK, "report")


def test_offline_mode_asks_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    called = hub(monkeypatch, {"test": rows("hub")})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BenchmarkError, match="HF_HUB_OFFLINE is set"):
        _rows.load(TASK, "report")
    assert called.calls == []


def test_a_hub_out_of_reach_is_asked_once_and_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class TransportError(Exception):
        pass

    def ask(_: object, *words: object, **options: object) -> None:
        raise type("ConnectError", (TransportError,), {})("[Errno -2] Name or service not known")

    called = hub(monkeypatch, {"test": rows("hub")})
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", ask)
    with pytest.raises(BenchmarkError, match=r"the hub gave no someone/mood: it cannot be reached from here\. Put"):
        _rows.load(TASK, "report")
    assert called.calls == []


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("scripts are over"), ValueError("bad")])
def test_a_failing_download_is_reported(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    hub(monkeypatch, error)
    with pytest.raises(BenchmarkError, match=str(error)):
        _rows.load(TASK, "report")


def test_a_hub_copy_without_the_column_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, {"test": {"words": ["a"], "label": [0]}})
    with pytest.raises(BenchmarkError, match=r"hub someone/mood@abc123 has no column 'text'. It has: words, label"):
        _rows.load(TASK, "report")
