"""Read columns from Parquet, Arrow, CSV and JSONL files; texts stay texts, whatever they say.

No data frame is involved, so that "NA", "null" or "None" never turn into missing values.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergectl.benchmarks._contract import BenchmarkError


@dataclass(frozen=True)
class Table:
    """Columns of equal length, where they were read, and the label names the file itself declares."""

    columns: Mapping[str, Sequence[Any]]
    place: str  # a path or another address, for messages and records
    folder: Path | None = None  # where image paths in the columns start from
    classes: Mapping[str, tuple[str, ...]] | None = None  # column -> names by id, as in Hugging Face files

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def take(self, rows: Sequence[int]) -> dict[str, list[Any]]:
        """Return the given rows as plain Python values."""
        return {name: _take(column, rows) for name, column in self.columns.items()}


def _take(column: Any, rows: Sequence[int]) -> list[Any]:
    if hasattr(column, "to_pylist"):  # pyarrow: take first, convert only what is wanted
        return list(column.take(list(rows)).to_pylist())
    return [column[row] for row in rows]


def label_text(value: Any) -> str:
    """Return how a label is written: 1.0 as "1", true as "true", a text as itself.

    >>> label_text(1.0), label_text(True), label_text("NA")
    ('1', 'true', 'NA')
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "" if value is None else str(value)


def read(path: Path, columns: Sequence[str] | None = None) -> Table:
    """Read a data file by its ending: .parquet, .arrow, .csv, .tsv, .jsonl or .ndjson."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise BenchmarkError(f"{path} has an unknown ending; readable are {', '.join(READERS)}.")
    if not path.is_file():
        raise BenchmarkError(f"There is no data file {path}.")
    try:
        return require(reader(path, columns), columns)
    except UnicodeDecodeError as error:
        raise BenchmarkError(f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    except OSError as error:
        raise BenchmarkError(f"{path} could not be read: {error}.") from error


def require(table: Table, columns: Sequence[str] | None) -> Table:
    """Refuse a table that lacks one of the columns, naming those there are."""
    for name in columns or ():
        if name not in table.columns:
            there = ", ".join(table.columns) or "no columns"
            raise BenchmarkError(f"{table.place} has no column '{name}'. It has: {there}.")
    return table


def _read_csv(path: Path, _: Sequence[str] | None) -> Table:
    """Read separated values with a header line; every value is a text."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            header = next(lines, [])
            rows = [_checked(line, len(header), f"{path}:{lines.line_num}") for line in lines if line]
        except csv.Error as error:
            raise BenchmarkError(f"{path}:{lines.line_num}: {error}. Texts with quotes need them doubled.") from error
    if len(set(header)) < len(header):
        raise BenchmarkError(f"{path} names a column twice: {', '.join(header)}.")
    return Table({name: [row[i] for row in rows] for i, name in enumerate(header)}, str(path), path.parent)


def _checked(line: list[str], width: int, place: str) -> list[str]:
    if len(line) != width:
        raise BenchmarkError(f"{place} has {len(line)} values where the header has {width}. Quote texts with commas.")
    return line


def _read_jsonl(path: Path, columns: Sequence[str] | None) -> Table:
    """Read one JSON object per line; each must hold the wanted columns that the first one has."""
    with path.open(encoding="utf-8-sig") as file:
        rows = list(_objects(file, path))
    first = rows[0][1] if rows else {}
    for number, row in rows:
        for name in columns or ():
            if name in first and name not in row:
                raise BenchmarkError(f"{path}:{number} has no '{name}'. It has: {', '.join(row)}.")
    return Table({name: [row.get(name) for _, row in rows] for name in first}, str(path), path.parent)


def _objects(lines: Iterator[str] | io.TextIOBase, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BenchmarkError(f"{path}:{number} is not JSON: {error}.") from error
        if not isinstance(row, dict):
            raise BenchmarkError(f"{path}:{number} must be a JSON object with the columns as keys.")
        yield number, row


def _read_parquet(path: Path, columns: Sequence[str] | None) -> Table:
    """Read the wanted columns of a Parquet file, all of them if some are missing (to name them)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            there = set(file.schema_arrow.names)
            some = list(columns) if columns is not None and there.issuperset(columns) else None
            return arrow(file.read(some), str(path), path.parent)
    except pa.ArrowException as error:
        raise BenchmarkError(f"{path} is not a readable Parquet file: {error}.") from error


def _read_arrow(path: Path, _: Sequence[str] | None) -> Table:
    """Read an Arrow stream, the format of the local `datasets` cache."""
    import pyarrow as pa

    try:
        with pa.memory_map(os.fspath(path)) as file, pa.ipc.open_stream(file) as stream:
            return arrow(stream.read_all(), str(path), path.parent)
    except pa.ArrowException as error:
        raise BenchmarkError(f"{path} is not a readable Arrow file: {error}.") from error


def arrow(table: Any, place: str, folder: Path | None = None) -> Table:
    """Wrap a pyarrow table, with the label names of its Hugging Face metadata."""
    info = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {})
    features = {name: spec for name, spec in (info.get("features") or {}).items() if isinstance(spec, dict)}
    classes = {name: tuple(spec["names"]) for name, spec in features.items() if spec.get("_type") == "ClassLabel"}
    return Table({name: table.column(name) for name in table.column_names}, place, folder, classes)


def join(tables: Sequence[Table]) -> Table:
    """Return the rows of several tables with the same columns (shards) as one table."""
    if len(tables) == 1:
        return tables[0]
    first = tables[0]
    columns = {name: [x for t in tables for x in t.take(range(len(t)))[name]] for name in first.columns}
    return Table(columns, f"{first.place} and {len(tables) - 1} more", first.folder, first.classes)


READERS: dict[str, Callable[[Path, Sequence[str] | None], Table]] = {
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".arrow": _read_arrow,
}
