"""The words a benchmark file is written with: a table of `Task` rows, called `TASKS`.

Nothing heavy is imported here, so that listing tasks loads neither datasets nor scikit-learn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Use = Literal["fit", "tune", "report"]
Kind = Literal["classification", "regression", "image_classification"]


class BenchmarkError(ValueError):
    """Bad or missing data: one sentence for the user, saying where to put it."""


@dataclass(frozen=True)
class Part:
    """A share of one source split: rows `start..stop` (shares of its length) after a permutation by `seed`."""

    split: str
    start: float = 0.0
    stop: float = 1.0
    seed: int | None = None  # None: the rows in their own order


@dataclass(frozen=True)
class Task:
    """One task: where its rows come from, what goes in, what is predicted and how it is scored."""

    name: str  # "rte"; the suite's name is the file's: "glue/rte"
    kind: Kind
    inputs: tuple[str, ...]  # columns: one or two texts, or one image
    label: str  # the label column
    labels: tuple[str, ...]  # names in the order of their ids; () for regression
    metric: str  # the main one, a name in _metrics.METRICS; bigger is better
    parts: Mapping[Use, Part]
    source: str = ""  # hub id or data folder name ("glue")
    config: str = "default"  # the folder below it ("rte")
    revision: str | None = None  # pinned hub revision
    metrics: tuple[str, ...] = ()  # further metrics to record
    version: int = 1  # raised whenever a row's meaning changes
    samples: tuple[Mapping[str, Any], ...] = ()  # two rows, so that the task can be tested without a download
    prepare: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None  # only for the odd one
    files: Mapping[Use, str] = field(default_factory=dict)  # the user's own files (suite `files`)
    suite: str = ""  # filled in by the lab

    @property
    def id(self) -> str:
        """`suite/name`, as the user types it."""
        return f"{self.suite}/{self.name}"
