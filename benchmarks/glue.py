"""GLUE: eight tasks on English sentences and pairs, scored on the official validation sets.

The official train set is permuted by NumPy's RandomState(0): the first int(0.9 n) rows fit, the others tune. The test
sets have hidden labels (-1) and are never read. There on request: WNLI, mismatched MNLI (`mnli_mm`), and MRPC as a head
for RTE answers it (`mrpc_rte`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mergectl.benchmarks._contract import Kind, Task, tune_share

TITLE = "GLUE"
PAPER = "arXiv:1804.07461"
DEFAULT = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")

PAIR = ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")
THREE_WAY = ("entailment", "neutral", "contradiction")


def exchanged(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a row of MRPC with the labels of RTE: equivalent is entailment.

    >>> exchanged({"label": 1})["label"], exchanged({"label": "equivalent"})["label"], exchanged({"label": -1})["label"]
    (0, 'entailment', -1)
    """
    label = row["label"]
    if isinstance(label, str):
        return {**row, "label": ENTAILMENT[label != "equivalent"]}
    return {**row, "label": label if label < 0 else 1 - label}


def _row(
    name: str,
    inputs: tuple[str, ...],
    labels: tuple[str, ...],
    metric: str,
    *samples: tuple[Any, ...],
    metrics: tuple[str, ...] = (),
    config: str = "",
    report: str = "validation",
    prepare: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
    answered_by: tuple[str, ...] = (),
) -> Task:
    """Return one row of the table; a sample is its input texts and its label."""
    kind: Kind = "classification" if labels else "regression"
    return Task(
        name=name,
        kind=kind,
        inputs=inputs,
        label="label",
        labels=labels,
        metric=metric,
        metrics=metrics,
        parts=tune_share(report=report),
        source="glue",
        config=config or name,
        hub="nyu-mll/glue",
        prepare=prepare,
        answered_by=answered_by,
        samples=tuple(dict(zip((*inputs, "label"), sample, strict=True)) for sample in samples),
    )


TASKS = (
    _row(
        "cola", ("sentence",), ("unacceptable", "acceptable"), "matthews",
        ("The box was opened by nobody that we know.", 1), ("Opened box the nobody was.", 0), metrics=("accuracy",),
    ),
    _row(
        "sst2", ("sentence",), ("negative", "positive"), "accuracy",
        ("a warm and witty evening", 1), ("dull from its first minute on", 0), metrics=("weighted_f1",),
    ),
    # Published averages use plain accuracy for MRPC and QQP; the mean with F1 is recorded beside it.
    _row(
        "mrpc", PAIR, ("not_equivalent", "equivalent"), "accuracy",
        ("The firm sold its ships.", "Its ships were sold by the firm.", 1),
        ("The firm sold its ships.", "The firm was founded in May.", 0), metrics=("f1", "accuracy_f1"),
    ),
    _row(
        "stsb", PAIR, (), "pearson_spearman",
        ("A man plays a flute.", "A man is playing the flute.", 4.8), ("A dog runs.", "Rice is cooking.", 0.0),
        metrics=("pearson", "spearman"),
    ),
    _row(
        "qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), "accuracy",
        ("How do I learn to swim?", "What is the way to learn swimming?", 1),
        ("How do I learn to swim?", "How deep is this lake?", 0), metrics=("f1", "accuracy_f1"),
    ),
    _row(
        "mnli", ("premise", "hypothesis"), THREE_WAY, "accuracy",
        ("All the lights were on.", "No light was off.", 0), ("All the lights were on.", "It was dark.", 2),
        report="validation_matched",
    ),
    _row(
        "qnli", ("question", "sentence"), ENTAILMENT, "accuracy",
        ("Who built the bridge?", "The bridge was built by monks.", 0),
        ("Who built the bridge?", "The river is wide.", 1),
    ),
    _row(
        "rte", PAIR, ENTAILMENT, "accuracy",
        ("The king died in Paris in 1610.", "The king is dead.", 0), ("The king went to Paris.", "He was ill.", 1),
        metrics=("weighted_f1",),
    ),
    _row(
        "wnli", PAIR, ("not_entailment", "entailment"), "accuracy",
        ("The cup fell off the shelf because it was narrow.", "The shelf was narrow.", 1),
        ("The cup fell off the shelf because it was narrow.", "The cup was narrow.", 0),
    ),
    _row(
        "mnli_mm", ("premise", "hypothesis"), THREE_WAY, "accuracy",
        ("She sings every evening.", "She never sings.", 2), ("She sings every evening.", "She sings opera.", 1),
        config="mnli", report="validation_mismatched",
    ),
    # An expert for RTE answers 0 where one sentence entails the other, which MRPC calls 1, equivalent.
    _row(
        "mrpc_rte", PAIR, ENTAILMENT, "accuracy",
        ("The firm sold its ships.", "Its ships were sold by the firm.", 1),
        ("The firm sold its ships.", "The firm was founded in May.", 0), metrics=("weighted_f1",),
        config="mrpc", prepare=exchanged, answered_by=("glue/rte",),
    ),
)  # fmt: skip
