"""The words a benchmark file is written with: a table of `Task` rows, called `TASKS`.

A benchmark file holds a docstring, TITLE, TASKS and, where they apply, PAPER and DEFAULT (the names of the tasks meant
by the whole suite; all of them if it is missing). Nothing heavy is imported here, so that listing tasks is instant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Use = Literal["fit", "tune", "report"]
Kind = Literal["classification", "regression", "image_classification", "text_to_text"]


class BenchmarkError(ValueError):
    """Bad or missing data: one or two sentences for the user, saying where to put it."""


@dataclass(frozen=True)
class Take:
    """Some rows of a split that Python's `random` shuffles: the `first` few or the `rest`; of few rows, a half each.

    The order is that of `random.seed(seed); random.shuffle(rows)`. A split of at most `rows` rows is cut in the middle.
    """

    side: Literal["first", "rest"]
    rows: int = 32
    seed: int = 42


@dataclass(frozen=True)
class Part:
    """A share of one source split: rows `start..stop` (shares of its length) after a permutation by `seed`.

    With `take`, a number of rows instead of a share: `Part("validation", take=Take("first"))`.
    """

    split: str
    start: float = 0.0
    stop: float = 1.0
    seed: int | None = None  # None: the rows in their own order; a number: NumPy's RandomState(seed).permutation
    instead: tuple[str, ...] = ()  # splits read, in this order, where the source has no `split`; `Rows.split` tells
    take: Take | None = None
    tail: int | None = None  # at most so many rows lie behind a cut inside the split


@dataclass(frozen=True)
class Template:
    """One way to put a row into words: the text the model reads, and the answers it may give.

    `ask` gets a row (the columns of `Task.inputs`) and returns the text and the answers in the order of their ids.
    """

    name: str
    ask: Callable[[Mapping[str, Any]], tuple[str, Sequence[str]]]


@dataclass(frozen=True)
class Task:
    """One task: where its rows come from, what goes in, what is predicted and how it is scored."""

    name: str  # "rte"; the suite's name is the file's: "glue/rte"
    kind: Kind
    inputs: tuple[str, ...]  # columns: one or two texts, or one image; for text_to_text all that the templates read
    label: str  # the label column; -1 there means "no label" and the row is skipped
    labels: tuple[str, ...]  # names in the order of their ids; () for regression and for answers that differ by row
    metric: str  # the main one, a name in _metrics.METRICS; bigger is better
    parts: Mapping[Use, Part]
    source: str = ""  # data folder name ("glue")
    config: str = "default"  # the folder below it ("rte")
    hub: str = ""  # hub id ("nyu-mll/glue"); empty: the task has no hub copy
    revision: str | None = None  # pinned hub revision
    obtain: str = ""  # sentences that say who hands the rows out, as CSV, where no hub may
    metrics: tuple[str, ...] = ()  # further metrics to record
    version: int = 1  # raised whenever a row's meaning changes
    samples: tuple[Mapping[str, Any], ...] = ()  # two rows, so that the task can be tested without a download
    prepare: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None  # only for the odd one
    make: Callable[[str], Mapping[str, Sequence[Any]]] | None = None  # columns of a split made by code (digits)
    head: tuple[str, ...] = ()  # labels of the head that answers, where they are not `labels` (snli/raw)
    answered_by: tuple[str, ...] = ()  # other tasks, by id, whose heads answer this one as they are
    files: Mapping[Use, str] = field(default_factory=dict)  # the user's own files (suite `files`)
    templates: tuple[Template, ...] = ()  # for text_to_text: the first is the usual one
    pool: Literal["first", "median"] = "first"  # scored by the first template, or by all, and the median counts
    prompts: tuple[str, ...] = ()  # for images: what CLIP reads of a class, which stands for {}
    words: tuple[str, ...] = ()  # what stands for {}, label by label, where not the label; "happy|smiling" is both
    lists: Callable[[Use], list[tuple[str, str]]] | None = None  # (file, label): what cuts a folder of all images
    suite: str = ""  # filled in by the lab

    @property
    def id(self) -> str:
        """`suite/name`, as the user types it."""
        return f"{self.suite}/{self.name}"


def with_suite(task: Task, suite: str) -> Task:
    """Return the task with its suite's name filled in."""
    return replace(task, suite=suite)


def same_question(one: Task, other: Task) -> bool:
    """Whether a head for one task answers the other: it asks for the same labels of the same data set.

    Suites may share a data set, and tasks may differ in splits and metrics alone.
    """

    def asked(task: Task) -> tuple[object, ...]:
        return task.kind, task.source, task.config, task.inputs, task.label, task.labels, task.head, task.words

    return bool(one.source) and asked(one) == asked(other) and one.prompts == other.prompts


def tune_few(fit: str, *, cut: str, rows: int = 32, seed: int = 42, report: str = "") -> dict[Use, Part]:
    """Return the parts of few-shot papers: `rows` of the split `cut` tune, its rest (or the split `report`) reports."""
    rest = Part(report) if report else Part(cut, take=Take("rest", rows, seed))
    return {"fit": Part(fit), "tune": Part(cut, take=Take("first", rows, seed)), "report": rest}


def tune_share(
    split: str = "train", *, report: str, seed: int = 0, instead: tuple[str, ...] = (), tail: int | None = None
) -> dict[Use, Part]:
    """Return the usual parts: 90 % of `split` to fit, its other 10 % to tune (at most `tail`), another to report."""
    fit, tune = Part(split, 0.0, 0.9, seed, tail=tail), Part(split, 0.9, 1.0, seed, tail=tail)
    return {"fit": fit, "tune": tune, "report": Part(report, instead=instead)}
