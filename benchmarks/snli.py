"""SNLI: does one sentence follow from another? Three ways, or two by a head for RTE.

`snli/collapse` and `snli/raw` are answered by an expert for `glue/rte`: one joins neutral and contradiction, the other
compares two-way answers with the three-way ids as they are, so that a contradiction is never found.

Rows on which the annotators did not agree (-1) are skipped. The train set gives 90 % to fit and 10 % to tune; scores
come from the official test set, or from `validation` where a source has no test set (the rows say which was read).
`--limit 5000 --seed 42` draws the sample of the alpha study: 4912 rows with a label.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mergectl.benchmarks._contract import Task, tune_share

TITLE = "SNLI"
PAPER = "arXiv:1508.05326"
TWO_WAY = ("entailment", "not_entailment")
DEFAULT = ("snli",)


def collapse(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the row with RTE's labels: neutral and contradiction are both not_entailment.

    >>> collapse({"label": 2})["label"], collapse({"label": "neutral"})["label"], collapse({"label": -1})["label"]
    (1, 'not_entailment', -1)
    """
    label = row["label"]
    if isinstance(label, str):
        return {**row, "label": label if label == "entailment" else "not_entailment"}
    return {**row, "label": min(label, 1)}


SNLI = Task(
    name="snli",
    kind="classification",
    inputs=("premise", "hypothesis"),
    label="label",
    labels=("entailment", "neutral", "contradiction"),
    metric="accuracy",
    parts=tune_share(report="test", instead=("validation",)),
    source="snli",
    config="plain_text",
    hub="stanfordnlp/snli",
    samples=(
        {"premise": "A girl feeds two goats.", "hypothesis": "Somebody feeds animals.", "label": 0},
        {"premise": "A girl feeds two goats.", "hypothesis": "The girl is asleep.", "label": 2},
    ),
)

TASKS = (
    SNLI,
    replace(
        SNLI,
        name="collapse",
        labels=TWO_WAY,
        prepare=collapse,
        metrics=("balanced_accuracy", "weighted_f1", "majority"),
        answered_by=("glue/rte",),
        samples=tuple(collapse(row) for row in SNLI.samples),
    ),
    # The alpha study compares the answer of a two-way head with the three-way id, so contradiction is never right.
    replace(SNLI, name="raw", head=TWO_WAY, metrics=("weighted_f1",), answered_by=("glue/rte",)),
)
