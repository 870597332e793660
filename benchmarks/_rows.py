"""Load the rows of a task for one use: fit (learn), tune (choose) or report (final scores)."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergectl.benchmarks import _sources
from mergectl.benchmarks._contract import BenchmarkError, Part, Take, Task, Use
from mergectl.benchmarks._tables import Table, label_text


@dataclass(frozen=True)
class Rows:
    """What a task asks (`columns`, by input name) and the answers (`labels`: ids, or numbers for regression).

    A text-to-text task asks in the columns `text` and `answers` (a list of texts each); labels are places in it.
    """

    columns: dict[str, list[Any]]
    labels: list[int] | list[float]
    ids: list[str]  # "<split>/<row in the source>", the same whatever the limit and the place
    split: str  # the split actually read
    place: str  # where it was read: a path, or hub id and revision

    def __len__(self) -> int:
        return len(self.labels)


def load(
    task: Task, use: Use, *, data: Path | None = None, limit: int | None = None, seed: int = 0, template: int = 0
) -> Rows:
    """Load a task's rows for one use from the data folder, the local cache or the hub, in this order.

    `limit` draws that many rows with NumPy's default_rng(seed), as `Dataset.shuffle(seed).select(range(limit))` does.
    Rows without a label (-1) are skipped after the draw. `template` says which of a text-to-text task's templates asks;
    -1 is each in turn, row by row.
    """
    if use not in task.parts:
        raise BenchmarkError(f"{task.id} has no rows for '{use}', only for {', '.join(task.parts)}.")
    split, table = _sources.find(task, use, data)
    part = Part(split) if split.startswith(_sources.LISTED) else task.parts[use]
    chosen = choose(len(table), part, limit, seed)
    columns = table.take(chosen)
    if task.prepare is not None:
        columns = _prepared(task, columns, table.place)
    columns, labels, chosen = _labelled(task, columns, chosen, table)
    if not labels:
        raise BenchmarkError(f"{table.place} has no labelled rows for {task.id} ({use}).")
    if task.kind == "text_to_text":
        places = [f"{table.place}, row {row}" for row in chosen]
        inputs = _asked(task, template, columns, labels, places)
    else:
        inputs = {name: _inputs(task, name, columns[name], chosen, table) for name in task.inputs}
    return Rows(inputs, labels, [f"{split}/{row}" for row in chosen], split, table.place)


def choose(count: int, part: Part, limit: int | None, seed: int) -> list[int]:
    """Return the row numbers of a part of a split with `count` rows: a permutation, a share, then a draw."""
    import numpy as np

    order = np.arange(count) if part.seed is None else np.random.RandomState(part.seed).permutation(count)
    order = order[_cut(part.start, count, part.tail) : _cut(part.stop, count, part.tail)]
    if part.take is not None:
        order = order[_taken(len(order), part.take)]
    if limit is not None and limit < 1:
        raise BenchmarkError(f"limit must be at least 1, got {limit}.")
    if limit is not None and limit < len(order):
        order = order[np.random.default_rng(seed).permutation(len(order))[:limit]]
    return [int(row) for row in order]


def _cut(share: float, count: int, tail: int | None) -> int:
    """Return the row before which a share ends."""
    place = int(share * count)
    return place if tail is None or not 0 < share < 1 else max(place, count - tail)


def _taken(count: int, take: Take) -> list[int]:
    """Return which of `count` rows are taken; a generator of its own shuffles as the seeded global one would."""
    rows = list(range(count))
    random.Random(take.seed).shuffle(rows)
    first = take.rows if count > take.rows else count // 2
    return rows[:first] if take.side == "first" else rows[first:]


def _asked(
    task: Task, template: int, columns: Mapping[str, list[Any]], labels: Sequence[Any], places: Sequence[str]
) -> dict[str, list[Any]]:
    """Put every row into words, and check that the right answer is among those offered."""
    texts, answers = [], []
    turns = task.templates if template == -1 else (task.templates[template],)
    for row, place in enumerate(places):
        used = turns[row % len(turns)]
        text, offered = used.ask({name: columns[name][row] for name in task.inputs})
        if not isinstance(text, str) or not all(isinstance(answer, str) and answer for answer in offered):
            raise BenchmarkError(f"{place}: the template '{used.name}' of {task.id} finds no text or answer here.")
        if labels[row] >= len(offered):
            raise BenchmarkError(
                f"{place}: '{task.label}' is {labels[row]}, but the template '{used.name}' of {task.id} offers only "
                f"{len(offered)} answers."
            )
        texts.append(text)
        answers.append(list(offered))
    return {"text": texts, "answers": answers}


def _prepared(task: Task, columns: Mapping[str, list[Any]], place: str) -> dict[str, list[Any]]:
    assert task.prepare is not None
    try:
        rows = [task.prepare(dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]
        return {name: [row[name] for row in rows] for name in (*task.inputs, task.label)}
    except KeyError as error:
        there = ", ".join(columns)
        raise BenchmarkError(f"{place} has no column {error}, which {task.id} needs. It has: {there}.") from error


def _labelled(
    task: Task, columns: dict[str, list[Any]], rows: Sequence[int], table: Table
) -> tuple[dict[str, list[Any]], list[Any], list[int]]:
    """Turn the label column into ids or numbers and leave out the rows without a label."""
    declared = (table.classes or {}).get(task.label, ())
    names = _own_order(task, declared)
    values = zip(columns[task.label], rows, strict=True)
    labels = [label_id(task, value, row, table.place, names) for value, row in values]
    kept = [i for i, label in enumerate(labels) if task.kind == "regression" or label >= 0]
    if len(kept) == len(labels):
        return columns, labels, list(rows)
    return (
        {name: [column[i] for i in kept] for name, column in columns.items()},
        [labels[i] for i in kept],
        [rows[i] for i in kept],
    )


def _own_order(task: Task, declared: Sequence[str]) -> Sequence[str]:
    """Return the task's labels in the order that a file declares, if those are its labels; spelling matters little."""
    if set(declared) == set(task.labels):
        return declared
    ours = {_plain(name): name for name in task.labels}
    found = tuple(ours.get(_plain(name), "") for name in declared)
    return found if len(found) == len(ours) and set(found) == set(task.labels) else ()


def _plain(name: str) -> str:
    return name.lower().replace("_", " ").replace("-", " ")


def label_id(task: Task, value: Any, row: int, place: str, names: Sequence[str] = ()) -> int | float:
    """Return a label value's id: a label's name is that label, else a whole number is an id (-1: no label)."""
    if task.kind == "regression":
        return _number(task, value, row, place)
    if names and isinstance(value, int) and 0 <= value < len(names):
        value = names[value]
    text = label_text(value)
    if text in task.labels:
        return task.labels.index(text)
    try:
        number = int(text)
    except ValueError:
        number = -2
    own_answers = task.kind == "text_to_text" and not task.labels  # the row itself says how many
    if number < -1 or (number >= len(task.labels) and not own_answers):
        known = ", ".join(task.labels) or "whole numbers from 0"
        raise BenchmarkError(
            f"{place}, row {row}: '{task.label}' is {value!r}, which is no label of {task.id}. Its labels are: {known}."
        )
    return number


def _number(task: Task, value: Any, row: int, place: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise BenchmarkError(f"{place}, row {row}: '{task.label}' must be a number for {task.id}, got {value!r}.")
    return number


def _inputs(task: Task, name: str, values: list[Any], rows: Sequence[int], table: Table) -> list[Any]:
    """Return an input column ready for use: texts checked, images opened."""
    if task.kind == "image_classification":
        places = (f"{table.place}, row {row}" for row in rows)
        return [_image(value, table.folder, place) for value, place in zip(values, places, strict=True)]
    for value, row in zip(values, rows, strict=True):
        if not isinstance(value, str):
            raise BenchmarkError(f"{table.place}, row {row}: '{name}' must be a text, got {value!r}.")
    return values


def _image(value: Any, folder: Path | None, place: str) -> Any:
    """Open an image given as bytes, as a path beside its file, or as both (`{bytes, path}`); arrays stay arrays.

    Pillow decodes the pixels at their first use, so a large set stays as small as its files.
    """
    import io

    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and folder is not None:
        value = _bytes_beside(folder, value, place)
    if not isinstance(value, bytes):
        if hasattr(value, "shape") or hasattr(value, "getbands"):
            return value
        raise BenchmarkError(f"{place}: no image here, neither bytes nor a path.")
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(io.BytesIO(value))
    except UnidentifiedImageError as error:
        raise BenchmarkError(f"{place}: the image cannot be decoded by Pillow.") from error


def _bytes_beside(folder: Path, name: str, place: str) -> bytes:
    path = Path(os.path.normpath(folder / name))
    if not path.is_relative_to(os.path.normpath(folder)):
        raise BenchmarkError(f"{place}: the image path '{name}' leaves the folder {folder}; keep images below it.")
    try:
        return path.read_bytes()
    except OSError as error:
        raise BenchmarkError(f"{place}: the image {path} could not be read ({error.strerror}).") from error
