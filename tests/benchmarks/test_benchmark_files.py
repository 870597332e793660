"""The user's own files: what a recipe may say, and what is answered when it says something wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mergectl.benchmarks import _rows, files
from mergectl.benchmarks._contract import BenchmarkError, Use

USES: tuple[Use, ...] = ("fit", "tune", "report")
TEXTS = ["NA", "None", "a, b", 'say "x"', "two\nlines", "", "null", "nan", "ünï", "j"] * 2
LABELS = ["no", "yes"] * 10


def write(path: Path, columns: dict[str, list[Any]]) -> Path:
    """Write columns in the format of the path's ending."""
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    else:
        mark = "\t" if path.suffix == ".tsv" else ","
        lines = [list(columns), *[list(row.values()) for row in rows]]
        quoted = ['"' + str(value).replace('"', '""') + '"' for line in lines for value in line]
        width = len(columns)
        text = "".join(mark.join(quoted[i : i + width]) + "\r\n" for i in range(0, len(quoted), width))
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())  # as spreadsheets write it
    return path


def spec(folder: Path, **changes: Any) -> dict[str, Any]:
    given = {"name": "mine", "folder": str(folder), "data": "all.csv", "inputs": "text", "label": "y", **changes}
    return {key: value for key, value in given.items() if value is not None}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "all.csv", {"text": TEXTS, "y": LABELS})
    return tmp_path


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    write(tmp_path / f"all.{ending}", {"text": TEXTS, "y": LABELS})
    task = files.declare(spec(tmp_path, data=f"all.{ending}"))
    rows = {use: _rows.load(task, use) for use in USES}
    found = {int(name.split("/")[-1]): (text, label) for use in USES for name, text, label in _flat(rows[use])}
    assert [len(rows[use]) for use in USES] == [16, 2, 2]
    assert [found[i] for i in range(20)] == list(zip(TEXTS, [0, 1] * 10, strict=True))


def _flat(rows: _rows.Rows) -> zip[tuple[Any, ...]]:
    return zip(rows.ids, rows.columns["text"], rows.labels, strict=True)


def test_a_declared_task_is_one_of_the_files_suite(folder: Path) -> None:
    task = files.declare(spec(folder))
    assert (task.id, task.labels, task.metric, task.kind) == ("files/mine", ("no", "yes"), "accuracy", "classification")


def test_named_files_are_used_as_named_and_tune_is_a_tenth_of_fit(folder: Path) -> None:
    write(folder / "test.csv", {"text": ["t"], "y": ["yes"]})
    task = files.declare(spec(folder, data=None, fit="all.csv", report="test.csv"))
    assert [len(_rows.load(task, use)) for use in USES] == [18, 2, 1]
    assert set(_rows.load(task, "tune").ids).isdisjoint(_rows.load(task, "fit").ids)


def test_a_tune_file_leaves_all_of_fit_to_fit(folder: Path) -> None:
    for name in ("dev.csv", "test.csv"):
        write(folder / name, {"text": ["t"], "y": ["yes"]})
    task = files.declare(spec(folder, data=None, fit="all.csv", tune="dev.csv", report="test.csv"))
    assert [len(_rows.load(task, use)) for use in USES] == [20, 1, 1]


def test_two_texts_and_listed_labels_in_their_order(tmp_path: Path) -> None:
    write(tmp_path / "all.csv", {"a": ["x"] * 10, "b": ["z"] * 10, "y": ["low", "high"] * 5})
    task = files.declare(spec(tmp_path, inputs=["a", "b"], labels=["low", "mid", "high"], metrics=["weighted_f1"]))
    rows = _rows.load(task, "fit")
    assert set(rows.labels) == {0, 2}
    assert (list(rows.columns), task.metrics) == (["a", "b"], ("weighted_f1",))


def test_numbers_as_labels_sort_as_numbers(tmp_path: Path) -> None:
    write(tmp_path / "all.jsonl", {"text": ["x"] * 12, "y": list(range(1, 13))})
    assert files.declare(spec(tmp_path, data="all.jsonl")).labels == tuple(str(n) for n in range(1, 13))


def test_numbers_as_labels_are_names_when_they_are_listed(tmp_path: Path) -> None:
    write(tmp_path / "all.csv", {"text": ["x"] * 10, "y": [1, 2] * 5})
    task = files.declare(spec(tmp_path, labels=[1, 2]))
    assert set(_rows.load(task, "fit").labels) == {0, 1}


def test_truth_values_in_json_are_labels(tmp_path: Path) -> None:
    write(tmp_path / "all.jsonl", {"text": ["x"] * 10, "y": [True, False] * 5})
    task = files.declare(spec(tmp_path, data="all.jsonl"))
    assert task.labels == ("false", "true")
    assert set(_rows.load(task, "fit").labels) == {0, 1}


def test_a_row_marked_minus_one_has_no_label(tmp_path: Path) -> None:
    write(tmp_path / "all.csv", {"text": TEXTS, "y": ["no", "-1"] * 5 + ["yes", "-1"] * 5})
    task = files.declare(spec(tmp_path))
    assert task.labels == ("no", "yes")
    assert sum(len(_rows.load(task, use)) for use in USES) == 10


def test_regression_reads_numbers(tmp_path: Path) -> None:
    write(tmp_path / "all.csv", {"text": TEXTS, "y": [n / 2 for n in range(20)]})
    task = files.declare(spec(tmp_path, kind="regression"))
    rows = _rows.load(task, "fit")
    assert (task.labels, task.metric) == ((), "pearson_spearman")
    assert rows.labels == [int(name.split("/")[-1]) / 2 for name in rows.ids]


def test_texts_beyond_the_csv_modules_usual_limit_are_read(tmp_path: Path) -> None:
    write(tmp_path / "all.csv", {"text": ["x" * 200_000] * 10, "y": LABELS[:10]})
    assert len(_rows.load(files.declare(spec(tmp_path)), "fit").columns["text"][0]) == 200_000


def test_paths_start_where_the_program_runs_unless_a_folder_is_given(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    given = spec(folder)
    del given["folder"]
    assert len(_rows.load(files.declare(given), "fit")) == 16


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"data": "gone.csv"}, r"There is no data file .*gone\.csv"),
        ({"data": "all.xlsx"}, r"unknown ending; readable are \.parquet, \.csv"),
        ({"inputs": "body"}, r"all\.csv has no column 'body'\. It has: text, y"),
        ({"label": "team"}, r"all\.csv has no column 'team'\. It has: text, y"),
        ({"lable": "y"}, "mine: no key 'lable'. Did you mean 'label'"),
        ({"colour": "y"}, "mine: no key 'colour'. Known: name, folder"),
        ({"label": None}, "mine: the key 'label' is missing"),
        ({"inputs": None}, "mine: the key 'inputs' is missing"),
        ({"data": None}, r"mine: the key 'fit' \(or 'data', one file to be split\) is missing"),
        ({"data": None, "fit": "all.csv"}, "mine: the key 'report' is missing"),
        ({"data": None, "fit": "all.csv", "report": "./all.csv"}, "'fit' and 'report' are one file"),
        ({"fit": "all.csv"}, "either 'data' .* or 'fit', not both"),
        ({"data": 3}, "mine: 'data' must be a text, got 3"),
        ({"inputs": []}, "one or two text columns, got 0"),
        ({"inputs": ["text", "text"]}, "a list of different names"),
        ({"inputs": ["text", 1]}, "a list of different names"),
        ({"inputs": ["a", "b"], "kind": "image_classification"}, "one image column, got 2"),
        ({"inputs": ["text", "y"]}, "gives the answer away"),
        ({"kind": "ranking"}, "'kind' must be one of classification, regression, image_classification, got 'ranking'"),
        ({"metric": "acuracy"}, "mine: no metric 'acuracy' for classification. Did you mean 'accuracy'"),
        ({"metric": "pearson"}, "no metric 'pearson' for classification"),
        ({"metric": "accuracy", "kind": "regression"}, "no metric 'accuracy' for regression"),
        ({"labels": [True, False]}, "put yes, no, true and false into quotes"),
        ({"labels": ["a", "a"]}, "two different names or more"),
        ({"labels": "a"}, "'labels' must be a list"),
        ({"seed": -1}, "'seed' must be a whole number"),
        ({"seed": "x"}, "'seed' must be a whole number"),
        ({"name": "../x"}, "'name' must be a word"),
        ({"name": None}, "'name' must be a word"),
    ],
)
def test_a_wrong_recipe_is_answered_with_the_thing_and_the_way_out(
    folder: Path, changes: dict[str, Any], problem: str
) -> None:
    (folder / "all.xlsx").touch()
    with pytest.raises(BenchmarkError, match=problem):
        files.declare(spec(folder, **changes))


def test_a_recipe_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(BenchmarkError, match="must be a mapping"):
        files.declare(["data.csv"])  # type: ignore[arg-type]


def test_an_unlisted_label_value_is_named_with_its_row(folder: Path) -> None:
    task = files.declare(spec(folder, labels=["no", "maybe"]))
    with pytest.raises(BenchmarkError, match=r"all\.csv, row \d+: 'y' is 'yes', which is no label of files/mine"):
        _rows.load(task, "fit")


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (["yes"] * 20, "must hold two labels or more, got 'yes'"),
        (["yes", ""] * 10, "must hold two labels or more, got '', 'yes'"),
        ([f"v{n}" for n in range(120)], "holds 120 different values. .*kind: regression"),
    ],
)
def test_labels_that_cannot_be_found_in_the_file_are_explained(tmp_path: Path, values: list[str], problem: str) -> None:
    write(tmp_path / "all.csv", {"text": ["x"] * len(values), "y": values})
    with pytest.raises(BenchmarkError, match=problem):
        files.declare(spec(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("all.csv", b"text,y\na,b,yes\n", r"all\.csv:2 has 3 values where the header has 2"),
        ("all.csv", b'text,y\n"a,yes\n', r"all\.csv:\d: .*quotes"),
        ("all.csv", b"text,text,y\na,b,yes\n", "names a column twice"),
        ("all.csv", b"text,y\n\xff\xfe,yes\n", "is not UTF-8 text"),
        ("all.csv", b"", "has no column 'text'. It has: no columns"),
        ("all.jsonl", b'{"text": "a", "y": 1}\n{"text": \n', r"all\.jsonl:2 is not JSON"),
        ("all.jsonl", b'{"text": "a", "y": 1}\n{"text": "b"}\n', r"all\.jsonl:2 has no 'y'. It has: text"),
        ("all.jsonl", b"[1]\n", r"all\.jsonl:1 must be a JSON object"),
        ("all.jsonl", b'{"text": "a"}\n', "has no column 'y'. It has: text"),
        ("all.parquet", b"PAR1", "is not a readable Parquet file"),
    ],
)
def test_a_broken_file_is_named_with_the_line(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BenchmarkError, match=problem):
        files.declare(spec(tmp_path, data=name))
