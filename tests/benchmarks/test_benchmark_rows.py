"""Loading rows: choosing a share, reading labels, opening images, and errors that name the place."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mergectl.benchmarks import _rows
from mergectl.benchmarks._contract import BenchmarkError, Part, Task, tune_share

TASK = Task(
    name="mood",
    kind="classification",
    inputs=("text",),
    label="label",
    labels=("sad", "glad"),
    metric="accuracy",
    parts=tune_share(report="test", instead=("validation",)),
    source="mood",
    suite="made",
)
PICTURES = replace(TASK, kind="image_classification", inputs=("image",))


def put(data: Path, split: str, columns: dict[str, Any], metadata: dict[str, Any] | None = None) -> Path:
    path = data / "mood" / "default" / f"{split}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    pq.write_table(table, path)
    return path


def test_the_official_train_set_is_cut_as_the_published_studies_cut_it() -> None:
    order = np.random.RandomState(0).permutation(2490).tolist()
    fit, tune = (_rows.choose(2490, TASK.parts[use], None, 0) for use in ("fit", "tune"))
    assert (fit, tune) == (order[:2241], order[2241:])


def test_a_limit_draws_the_rows_that_a_shuffled_data_set_starts_with() -> None:
    assert _rows.choose(10, Part("test"), 4, 42) == np.random.default_rng(42).permutation(10)[:4].tolist()


@given(st.integers(0, 300), st.floats(0, 1), st.integers(0, 9))
def test_neighbouring_shares_cover_every_row_once(count: int, cut: float, seed: int) -> None:
    left, right = Part("a", 0.0, cut, seed), Part("a", cut, 1.0, seed)
    rows = _rows.choose(count, left, None, 0) + _rows.choose(count, right, None, 0)
    assert sorted(rows) == list(range(count))


@given(st.integers(1, 200), st.integers(1, 300), st.integers(0, 5))
def test_a_limit_keeps_that_many_rows_of_its_part(count: int, limit: int, seed: int) -> None:
    rows = _rows.choose(count, Part("a", 0.0, 0.5, 1), limit, seed)
    assert len(rows) == len(set(rows)) == min(limit, count // 2)
    assert set(rows) <= set(_rows.choose(count, Part("a", 0.0, 0.5, 1), None, 0))


def test_a_limit_below_one_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "test", {"text": ["a"], "label": [0]})
    with pytest.raises(BenchmarkError, match="limit must be at least 1, got 0"):
        _rows.load(TASK, "report", data=tmp_path, limit=0)


@pytest.mark.parametrize("labels", [[0, 1, 1], ["sad", "glad", "glad"], ["0", "1", "1"], [0.0, 1.0, 1.0]])
def test_labels_may_be_ids_or_names(tmp_path: Path, labels: list[Any]) -> None:
    put(tmp_path, "test", {"text": ["a", "b", "c"], "label": labels})
    assert _rows.load(TASK, "report", data=tmp_path).labels == [0, 1, 1]


def test_a_files_own_order_of_the_same_label_names_is_followed(tmp_path: Path) -> None:
    names = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["glad", "sad"]}}}}
    put(tmp_path, "test", {"text": ["a", "b"], "label": [0, 1]}, names)
    assert _rows.load(TASK, "report", data=tmp_path).labels == [1, 0]


def test_rows_without_a_label_are_skipped_and_keep_the_others_ids(tmp_path: Path) -> None:
    put(tmp_path, "test", {"text": ["a", "b", "c"], "label": [0, -1, 1]})
    rows = _rows.load(TASK, "report", data=tmp_path)
    assert (rows.columns, rows.labels, rows.ids) == ({"text": ["a", "c"]}, [0, 1], ["test/0", "test/2"])


def test_a_split_with_hidden_labels_only_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "test", {"text": ["a", "b"], "label": [-1, -1]})
    with pytest.raises(BenchmarkError, match="no labelled rows for made/mood"):
        _rows.load(TASK, "report", data=tmp_path)


def test_an_unknown_label_names_file_row_and_labels(tmp_path: Path) -> None:
    put(tmp_path, "test", {"text": ["a", "b"], "label": ["sad", "bored"]})
    with pytest.raises(BenchmarkError, match=r"test\.parquet, row 1: 'label' is 'bored'.*labels are: sad, glad"):
        _rows.load(TASK, "report", data=tmp_path)


@pytest.mark.parametrize("label", [2, -2, 0.5, None])
def test_an_id_that_no_label_has_is_refused(tmp_path: Path, label: Any) -> None:
    put(tmp_path, "test", {"text": ["a"], "label": [label]})
    with pytest.raises(BenchmarkError, match="no label of made/mood"):
        _rows.load(TASK, "report", data=tmp_path)


@pytest.mark.parametrize("label", ["high", None, float("nan")])
def test_a_regression_label_must_be_a_number(tmp_path: Path, label: Any) -> None:
    put(tmp_path, "test", {"text": ["a"], "label": [label]})
    with pytest.raises(BenchmarkError, match="'label' must be a number"):
        _rows.load(replace(TASK, kind="regression", labels=()), "report", data=tmp_path)


def test_texts_that_look_like_missing_values_stay_texts(tmp_path: Path) -> None:
    texts = ["NA", "None", "null", "nan", "", "N/A"]
    put(tmp_path, "test", {"text": texts, "label": [0] * 6})
    assert _rows.load(TASK, "report", data=tmp_path).columns["text"] == texts


def test_a_missing_text_is_refused_with_its_row(tmp_path: Path) -> None:
    put(tmp_path, "test", {"text": ["a", None], "label": [0, 1]})
    with pytest.raises(BenchmarkError, match="row 1: 'text' must be a text, got None"):
        _rows.load(TASK, "report", data=tmp_path)


def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    put(tmp_path, "test", {"sentence": ["a"], "label": [0]})
    with pytest.raises(BenchmarkError, match=r"test\.parquet has no column 'text'. It has: sentence, label"):
        _rows.load(TASK, "report", data=tmp_path)


def test_a_prepared_task_names_a_missing_column_too(tmp_path: Path) -> None:
    put(tmp_path, "test", {"sentence": ["a"], "label": [0]})
    task = replace(TASK, prepare=lambda row: {"text": row["words"], "label": row["label"]})
    with pytest.raises(BenchmarkError, match=r"no column 'words', which made/mood needs. It has: sentence, label"):
        _rows.load(task, "report", data=tmp_path)


def test_a_prepared_row_may_have_other_columns_and_labels(tmp_path: Path) -> None:
    put(tmp_path, "test", {"a": ["x", "y"], "b": ["1", "2"], "stars": [5, 1]})
    task = replace(TASK, prepare=lambda row: {"text": row["a"] + row["b"], "label": int(row["stars"] > 3)})
    rows = _rows.load(task, "report", data=tmp_path)
    assert (rows.columns, rows.labels) == ({"text": ["x1", "y2"]}, [1, 0])


def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    put(tmp_path, "test", {"text": ["a"], "label": [0]}).write_bytes(b"PAR1 but not really")
    with pytest.raises(BenchmarkError, match=r"test\.parquet is not a readable Parquet file"):
        _rows.load(TASK, "report", data=tmp_path)


def test_rows_tell_which_split_was_read_instead(tmp_path: Path) -> None:
    put(tmp_path, "validation", {"text": ["a"], "label": [0]})
    rows = _rows.load(TASK, "report", data=tmp_path)
    assert (rows.split, rows.ids) == ("validation", ["validation/0"])
    assert rows.place.endswith("validation.parquet")


def test_the_proper_split_comes_before_its_stand_in(tmp_path: Path) -> None:
    for split in ("validation", "test"):
        put(tmp_path, split, {"text": ["a"], "label": [0]})
    assert _rows.load(TASK, "report", data=tmp_path).split == "test"


def test_a_use_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="no rows for 'tune', only for fit"):
        _rows.load(replace(TASK, parts={"fit": Part("train")}), "tune", data=tmp_path)


def png(shade: int) -> bytes:
    out = io.BytesIO()
    Image.new("L", (3, 2), shade).save(out, "PNG")
    return out.getvalue()


def test_images_come_from_bytes_or_from_a_path_beside_the_file(tmp_path: Path) -> None:
    images = [{"bytes": png(10), "path": None}, {"bytes": None, "path": "pictures/b.png"}]
    file = put(tmp_path, "test", {"image": images, "label": [0, 1]})
    (file.parent / "pictures").mkdir()
    (file.parent / "pictures" / "b.png").write_bytes(png(20))
    found = _rows.load(PICTURES, "report", data=tmp_path).columns["image"]
    assert [(image.size, image.getpixel((0, 0))) for image in found] == [((3, 2), 10), ((3, 2), 20)]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"bytes": b"no image", "path": None}, "row 0: the image cannot be decoded"),
        ({"bytes": None, "path": "gone.png"}, "row 0: the image .*gone.png could not be read"),
        ({"bytes": None, "path": "../../../secret.png"}, "leaves the folder"),
        ({"bytes": None, "path": "/etc/hostname"}, "leaves the folder"),
        ({"bytes": None, "path": None}, "no image here"),
    ],
)
def test_an_image_that_cannot_be_had_is_named(tmp_path: Path, value: Any, problem: str) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    put(tmp_path, "test", {"image": pa.array([value], kind), "label": [0]})
    with pytest.raises(BenchmarkError, match=problem):
        _rows.load(PICTURES, "report", data=tmp_path)
