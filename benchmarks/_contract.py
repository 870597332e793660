"""The words a benchmark file is written with: a table of `Task` rows, called `TASKS`.

A benchmark file holds a docstring, TITLE, TASKS and, where they apply, PAPER and DEFAULT (the names of the tasks meant
by the whole suite; all of them if it is missing). Nothing heavy is imported here, so that listing tasks is instant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Use = Literal["fit", "tune", "report"]
Kind = Literal["classification", "regression", "image_classification"]


class BenchmarkError(ValueError):
    """Bad or missing data: one or two sentences for the user, saying where to put it."""


@dataclass(frozen=True)
class Part:
    """A share of one source split: rows `start..stop` (shares of its length) after a permutation by `seed`."""

    split: str
    start: float = 0.0
    stop: float = 1.0
    seed: int | None = None  # None: the rows in their own order; a number: NumPy's RandomState(seed).permutation
    instead: tuple[str, ...] = ()  # splits read, in this order, where the source has no `split`; `Rows.split` tells


@dataclass(frozen=True)
class Task:
    """One task: where its rows come from, what goes in, what is predicted and how it is scored."""

    name: str  # "rte"; the suite's name is the file's: "glue/rte"
    kind: Kind
    inputs: tuple[str, ...]  # columns: one or two texts, or one image
    label: str  # the label column; -1 there means "no label" and the row is skipped
    labels: tuple[str, ...]  # names in the order of their ids; () for regression
    metric: str  # the main one, a name in _metrics.METRICS; bigger is better
    parts: Mapping[Use, Part]
    source: str = ""  # data folder name ("glue")
    config: str = "default"  # the folder below it ("rte")
    hub: str = ""  # hub id ("nyu-mll/glue"); empty: the task has no hub copy
    revision: str | None = None  # pinned hub revision
    metrics: tuple[str, ...] = ()  # further metrics to record
    version: int = 1  # raised whenever a row's meaning changes
    samples: tuple[Mapping[str, Any], ...] = ()  # two rows, so that the task can be tested without a download
    prepare: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None  # only for the odd one
    make: Callable[[str], Mapping[str, Sequence[Any]]] | None = None  # columns of a split made by code (digits)
    head: tuple[str, ...] = ()  # labels of the head that answers, where they are not `labels` (snli/raw)
    files: Mapping[Use, str] = field(default_factory=dict)  # the user's own files (suite `files`)
    suite: str = ""  # filled in by the lab

    @property
    def id(self) -> str:
        """`suite/name`, as the user types it."""
        return f"{self.suite}/{self.name}"


def with_suite(task: Task, suite: str) -> Task:
    """Return the task with its suite's name filled in."""
    return replace(task, suite=suite)


def tune_share(split: str = "train", *, report: str, seed: int = 0, instead: tuple[str, ...] = ()) -> dict[Use, Part]:
    """Return the usual parts: 90 % of `split` to fit, its other 10 % to tune, another split to report."""
    fit, tune = Part(split, 0.0, 0.9, seed), Part(split, 0.9, 1.0, seed)
    return {"fit": fit, "tune": tune, "report": Part(report, instead=instead)}
