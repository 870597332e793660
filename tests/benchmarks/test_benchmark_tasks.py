"""The promises of every registered task, checked on its own samples and on made-up source files."""

from __future__ import annotations

import importlib
import io
import json
import pickle
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mergectl import benchmarks
from mergectl.benchmarks import _metrics, _rows
from mergectl.benchmarks._contract import Task, Use, with_suite

SUITES = [m.name for m in pkgutil.iter_modules(benchmarks.__path__) if not m.name.startswith("_")]
MODULES = {name: importlib.import_module(f"mergectl.benchmarks.{name}") for name in SUITES}
ALL = [with_suite(task, name) for name, module in MODULES.items() for task in module.TASKS]
READ = [task for task in ALL if task.make is None]
MADE = [task for task in ALL if task.make is not None]
USES: tuple[Use, ...] = ("fit", "tune", "report")

every_task = pytest.mark.parametrize("task", ALL, ids=lambda task: task.id)
every_read_task = pytest.mark.parametrize("task", READ, ids=lambda task: task.id)


def write_source(folder: Path, task: Task, rows: int = 40) -> Path:
    """Write every split of a task, each text or image with its split and row so that no two rows are alike."""
    for split in {part.split for part in task.parts.values()}:
        columns = {name: [_marked(task, name, split, row) for row in range(rows)] for name in task.inputs}
        labels = [task.samples[row % 2][task.label] for row in range(rows)]
        path = folder / task.source / task.config / f"{split}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({**columns, task.label: labels}), path)
    return folder


def _marked(task: Task, name: str, split: str, row: int) -> Any:
    sample = task.samples[row % 2][name]
    if task.kind != "image_classification":
        return f"{split} {row}: {sample}"
    from PIL import Image

    picture = Image.open(io.BytesIO(sample["bytes"]))
    for place, letter in enumerate(f"{split[:2]}{row:02}".encode()):
        picture.putpixel((place, 0), letter)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def test_the_first_suites_are_there() -> None:
    assert {"digits", "glue", "imdb", "snli", "sentences", "files"} <= set(SUITES)


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_says_what_it_is(name: str) -> None:
    module = MODULES[name]
    first = (module.__doc__ or "").splitlines()[0]
    names = [task.name for task in module.TASKS]
    assert first.endswith(".")
    assert len(first) < 90
    assert module.TITLE
    assert len(set(names)) == len(names)
    assert set(getattr(module, "DEFAULT", names)) <= set(names)


def test_the_whole_of_glue_is_its_eight_tasks_in_the_fixed_order() -> None:
    assert MODULES["glue"].DEFAULT == ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")


def test_glue_is_scored_as_published_averages_are() -> None:
    tasks = {task.name: (task.metric, task.parts["report"].split) for task in ALL if task.suite == "glue"}
    usual = dict.fromkeys(("sst2", "mrpc", "qqp", "qnli", "rte", "wnli", "mrpc_rte"), ("accuracy", "validation"))
    assert tasks == {
        **usual,
        "cola": ("matthews", "validation"),
        "stsb": ("pearson_spearman", "validation"),
        "mnli": ("accuracy", "validation_matched"),
        "mnli_mm": ("accuracy", "validation_mismatched"),
    }


@every_task
def test_a_task_has_two_samples_with_its_inputs_and_a_label_of_its_own(task: Task) -> None:
    assert len(task.samples) == 2
    for sample in task.samples:
        assert set(sample) == {*task.inputs, task.label}
        label = _rows.label_id(task, sample[task.label], 0, "sample")
        assert label >= 0
        if task.labels:
            assert label < len(task.labels)


@every_task
def test_a_tasks_facts_fit_together(task: Task) -> None:
    assert task.version >= 1
    assert set(task.parts) == set(USES)
    assert {task.metric, *task.metrics} <= set(_metrics.METRICS)
    assert bool(task.labels) == (task.kind != "regression")
    assert len(set(task.labels)) == len(task.labels)
    assert (task.metric in _metrics.FOR_NUMBERS) == (task.kind == "regression")
    assert task.make is not None or (task.source and bool(task.hub) != bool(task.obtain))


@every_task
def test_a_task_travels_to_another_process(task: Task) -> None:
    assert repr(pickle.loads(pickle.dumps(task))) == repr(task)


@every_task
def test_perfect_outputs_score_one(task: Task) -> None:
    import numpy as np

    labels = [_rows.label_id(task, sample[task.label], 0, "sample") for sample in task.samples]
    labels = [*labels, labels[0]]
    outputs = (
        np.asarray(labels, float) if task.kind == "regression" else np.eye(len(task.labels))[np.asarray(labels, int)]
    )
    assert _metrics.scores(task, labels, outputs)[task.metric] == pytest.approx(1.0)


@every_read_task
def test_fit_tune_and_report_share_no_row(task: Task, tmp_path: Path) -> None:
    data = write_source(tmp_path, task)
    rows = {use: _rows.load(task, use, data=data) for use in USES}
    texts = [text for use in USES for text in _asked(rows[use])]
    ids = [row for use in USES for row in rows[use].ids]
    assert all(len(rows[use]) for use in USES)
    assert len(set(texts)) == len(texts)
    assert len(set(ids)) == len(ids)


@every_read_task
def test_a_row_keeps_its_id_and_label_whatever_the_limit(task: Task, tmp_path: Path) -> None:
    data = write_source(tmp_path, task)
    whole = _rows.load(task, "fit", data=data)
    some = _rows.load(task, "fit", data=data, limit=7)
    known = {row: (text, label) for row, text, label in zip(*_columns(whole), strict=True)}
    assert len(some) == 7
    assert all(known[row] == (text, label) for row, text, label in zip(*_columns(some), strict=True))


def _columns(rows: _rows.Rows) -> tuple[list[str], list[str], list[int] | list[float]]:
    return rows.ids, _asked(rows), rows.labels


def _asked(rows: _rows.Rows) -> list[str]:
    """The first column of what a task asks: its first input, or the text that a template makes of all of them."""
    found: list[Any] = next(iter(rows.columns.values()))
    return [value if isinstance(value, str) else repr(value.tobytes()) for value in found]


@every_read_task
def test_loading_twice_gives_the_same_rows(task: Task, tmp_path: Path) -> None:
    data = write_source(tmp_path, task)
    assert _rows.load(task, "tune", data=data) == _rows.load(task, "tune", data=data)


def test_snli_with_the_labels_of_rte_joins_neutral_and_contradiction(tmp_path: Path) -> None:
    tasks = {task.name: task for task in ALL if task.suite == "snli"}
    path = tmp_path / "snli" / "plain_text" / "test.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table({"premise": ["a"] * 4, "hypothesis": ["b"] * 4, "label": [0, 1, -1, 2]}), path)
    found = {name: _rows.load(task, "report", data=tmp_path) for name, task in tasks.items()}
    assert {name: rows.labels for name, rows in found.items()} == {
        "snli": [0, 1, 2],
        "collapse": [0, 1, 1],
        "raw": [0, 1, 2],
    }
    assert {rows.ids[-1] for rows in found.values()} == {"test/3"}


@pytest.mark.parametrize("task", MADE, ids=lambda task: task.id)
def test_made_rows_share_nothing_between_uses(task: Task) -> None:
    ids = [row for use in USES for row in _rows.load(task, use).ids]
    assert len(set(ids)) == len(ids)


def test_listing_tasks_loads_nothing_heavy() -> None:
    heavy = ["numpy", "torch", "datasets", "sklearn", "scipy", "pyarrow", "PIL", "pandas"]
    lines = [f"import mergectl.benchmarks.{name}" for name in SUITES]
    code = ";".join([*lines, f"import sys,json;print(json.dumps([m for m in {heavy} if m in sys.modules]))"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
