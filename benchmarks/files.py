"""Your own CSV, TSV, JSONL or Parquet files, declared in a few lines of a recipe.

    tasks:
      tickets:
        data: tickets.csv            # split 80/10/10 into fit, tune and report; or name the files:
        # fit: train.csv
        # tune: dev.csv              # optional: otherwise a tenth of fit
        # report: test.csv
        inputs: [subject, body]      # one or two text columns, or one image column
        label: team
        labels: [billing, support]   # optional: otherwise those found in the file, sorted
        metric: weighted_f1          # optional: accuracy, or pearson_spearman for kind: regression

Further keys: kind (classification, regression, image_classification), metrics (more to record), seed (of the split),
folder (where paths start; otherwise the recipe's). A label may be written by name or by id; -1 means "no label".
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from mergectl.benchmarks import _tables
from mergectl.benchmarks._contract import BenchmarkError, Kind, Part, Task, Use
from mergectl.benchmarks._metrics import FOR_NUMBERS, METRICS

TITLE = "Your own files"
TASKS: tuple[Task, ...] = ()  # declared by the user, see `declare`

KEYS = (
    *("name", "folder", "data", "fit", "tune", "report"),
    *("inputs", "label", "labels", "kind", "metric", "metrics", "seed"),
)
USES: tuple[Use, ...] = ("fit", "tune", "report")
MOST_LABELS = 100  # more are taken for a mistake unless the recipe lists them


def declare(spec: Mapping[str, Any]) -> Task:
    """Return the task that a recipe's mapping describes; `name` and, if need be, `folder` are among its keys."""
    name = _name(spec)
    kind = _kind(spec, name)
    inputs = _texts(spec, "inputs", name)
    if not 1 <= len(inputs) <= (1 if kind == "image_classification" else 2):
        rule = "one image column" if kind == "image_classification" else "one or two text columns"
        raise BenchmarkError(f"{name}: 'inputs' must name {rule}, got {len(inputs)}.")
    label = _text(spec, "label", name)
    if label in inputs:
        raise BenchmarkError(f"{name}: the label column '{label}' is also an input, which gives the answer away.")
    parts, files = _parts(spec, name)
    tables = {path: _tables.read(Path(path), [*inputs, label]) for path in dict.fromkeys(files.values())}
    labels = () if kind == "regression" else _labels(spec, name, label, tables[files["fit"]])
    metric, *more = _metrics(spec, name, kind)
    return Task(
        name=name,
        kind=kind,
        inputs=inputs,
        label=label,
        labels=labels,
        metric=metric,
        metrics=tuple(more),
        parts=parts,
        files=files,
        suite="files",
    )


def _name(spec: Mapping[str, Any]) -> str:
    """Return the task's name after checking that every key is known."""
    if not isinstance(spec, Mapping):
        raise BenchmarkError(f"A task of your own files must be a mapping with the keys {', '.join(KEYS)}.")
    name = spec.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
        raise BenchmarkError(
            f"'name' must be a word of letters, digits, _ . or - for a task of your files, got {name!r}."
        )
    for key in spec:
        if key not in KEYS:
            raise BenchmarkError(f"{name}: no key '{key}'.{_hint(str(key), KEYS)}")
    return name


def _kind(spec: Mapping[str, Any], name: str) -> Kind:
    kinds: list[Kind] = [kind for kind in get_args(Kind) if kind != "text_to_text"]  # its templates are code
    for kind in kinds:
        if spec.get("kind", "classification") == kind:
            return kind
    raise BenchmarkError(f"{name}: 'kind' must be one of {', '.join(kinds)}, got {spec['kind']!r}.")


def _parts(spec: Mapping[str, Any], name: str) -> tuple[dict[Use, Part], dict[Use, str]]:
    """Return the share and the file of each use."""
    seed = spec.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise BenchmarkError(f"{name}: 'seed' must be a whole number of at least 0, got {seed!r}.")
    folder = Path(_text(spec, "folder", name) if "folder" in spec else ".")
    own = [use for use in USES if use in spec]
    parts: dict[Use, Part]
    if "data" in spec:
        if own:
            raise BenchmarkError(f"{name}: give either 'data' (one file, split for you) or '{own[0]}', not both.")
        path = _text(spec, "data", name)
        parts = {
            "fit": Part(path, 0.0, 0.8, seed),
            "tune": Part(path, 0.8, 0.9, seed),
            "report": Part(path, 0.9, 1.0, seed),
        }
    else:
        fit, report = _text(spec, "fit", name), _text(spec, "report", name)
        parts = {"fit": Part(fit, 0.0, 0.9, seed), "tune": Part(fit, 0.9, 1.0, seed), "report": Part(report)}
        if "tune" in spec:
            parts |= {"fit": Part(fit, seed=seed), "tune": Part(_text(spec, "tune", name))}
        _refuse_shared(name, {use: folder / parts[use].split for use in own})
    return parts, {use: str(folder / part.split) for use, part in parts.items()}


def _refuse_shared(name: str, paths: Mapping[Use, Path]) -> None:
    seen: dict[Path, str] = {}
    for key, path in paths.items():
        other = seen.setdefault(path.resolve(), key)
        if other != key:
            raise BenchmarkError(f"{name}: '{other}' and '{key}' are one file, {path}. Use 'data' to have it split.")


def _labels(spec: Mapping[str, Any], name: str, label: str, table: _tables.Table) -> tuple[str, ...]:
    """Return the label names: those listed, else those the file declares, else those found in it."""
    if spec.get("labels") is not None:
        return _listed(spec["labels"], name)
    if declared := (table.classes or {}).get(label):
        return declared
    found = {_tables.label_text(value) for value in table.take(range(len(table)))[label]} - {"-1"}
    if len(found) > MOST_LABELS:
        raise BenchmarkError(
            f"{name}: the column '{label}' of {table.place} holds {len(found)} different values. "
            "For numbers say 'kind: regression', for that many labels list them under 'labels'."
        )
    if len(found) < 2 or "" in found:
        values = ", ".join(repr(value) for value in sorted(found)) or "no value"
        raise BenchmarkError(
            f"{name}: the column '{label}' of {table.place} must hold two labels or more, got {values}."
        )
    whole = all(re.fullmatch(r"-?\d+", value) for value in found)
    return tuple(sorted(found, key=int) if whole else sorted(found))


def _listed(labels: Any, name: str) -> tuple[str, ...]:
    if not isinstance(labels, list | tuple):
        raise BenchmarkError(f"{name}: 'labels' must be a list of names in the order of their ids, got {labels!r}.")
    for label in labels:
        if isinstance(label, bool) or not isinstance(label, str | int):
            raise BenchmarkError(
                f"{name}: the label {label!r} must be a text; put yes, no, true and false into quotes."
            )
    names = tuple(str(label) for label in labels)
    if len(set(names)) != len(names) or len(names) < 2:
        raise BenchmarkError(f"{name}: 'labels' must list two different names or more, got {', '.join(names)}.")
    return names


def _metrics(spec: Mapping[str, Any], name: str, kind: Kind) -> tuple[str, ...]:
    """Return the main metric and those to record beside it."""
    numbers = kind == "regression"
    known = [metric for metric in METRICS if (metric in FOR_NUMBERS) == numbers]
    main = _text(spec, "metric", name) if "metric" in spec else "pearson_spearman" if numbers else "accuracy"
    found = (main, *(_texts(spec, "metrics", name) if "metrics" in spec else ()))
    for metric in found:
        if metric not in known:
            raise BenchmarkError(f"{name}: no metric '{metric}' for {kind}.{_hint(metric, known)}")
    return found


def _text(spec: Mapping[str, Any], key: str, name: str) -> str:
    value = spec.get(key)
    if value is None:
        way = " (or 'data', one file to be split)" if key == "fit" else ""
        raise BenchmarkError(f"{name}: the key '{key}'{way} is missing.")
    if not isinstance(value, str) or not value:
        raise BenchmarkError(f"{name}: '{key}' must be a text, got {value!r}.")
    return value


def _texts(spec: Mapping[str, Any], key: str, name: str) -> tuple[str, ...]:
    """Return a list of texts; one text alone is a list of one."""
    value = spec.get(key)
    if not isinstance(value, list | tuple):
        return (_text(spec, key, name),)
    if not all(isinstance(text, str) and text for text in value) or len(set(value)) < len(value):
        raise BenchmarkError(f"{name}: '{key}' must be a list of different names, got {value!r}.")
    return tuple(value)


def _hint(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, known := list(known), n=1)
    return f" Did you mean '{near[0]}'?" if near else f" Known: {', '.join(known)}."
