"""Sentence classification: question type, subjectivity, review polarity and news topic.

Where there is no official validation set, 90 % of the train set fit and its other 10 % tune. Scores: the test set.
"""

from __future__ import annotations

from collections.abc import Mapping

from mergectl.benchmarks._contract import Part, Task, Use, tune_share

TITLE = "Sentence classification (TREC, Subj, MR, AG News)"


def _row(
    name: str,
    hub: str,
    labels: tuple[str, ...],
    *samples: tuple[str, int],
    label: str = "label",
    revision: str | None = None,
    parts: Mapping[Use, Part] | None = None,
) -> Task:
    """Return one row of the table; a sample is its text and its label."""
    return Task(
        name=name,
        kind="classification",
        inputs=("text",),
        label=label,
        labels=labels,
        metric="accuracy",
        parts=parts or tune_share(report="test"),
        source=name,
        hub=hub,
        revision=revision,
        samples=tuple({"text": text, label: value} for text, value in samples),
    )


TASKS = (
    _row(
        "trec", "CogComp/trec", ("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"),
        ("Where is the longest tunnel ?", 4), ("Who painted the ceiling ?", 3), label="coarse_label",
        revision="refs/convert/parquet",  # the main branch is a loading script, which `datasets` no longer runs
    ),
    _row(
        "subj", "SetFit/subj", ("objective", "subjective"),
        ("two brothers inherit a lighthouse and must share it .", 0), ("a small film with a large heart .", 1),
    ),
    _row(
        "rotten_tomatoes", "cornell-movie-review-data/rotten_tomatoes", ("neg", "pos"),
        ("quiet , patient and beautifully played", 1), ("the jokes arrive late and leave early", 0),
        parts={"fit": Part("train", seed=0), "tune": Part("validation"), "report": Part("test")},
    ),
    _row(
        "ag_news", "fancyzhx/ag_news", ("World", "Sports", "Business", "Sci/Tech"),
        ("The bank raised its forecast for the year.", 2), ("The home side won in extra time.", 1),
    ),
)  # fmt: skip
