"""GLUE as text-to-text: the task's name and its columns go in, the label's name comes out.

Inputs and targets are those of the Medusa study, to the byte; every task is scored by accuracy, CoLA too. The splits
are those of the suite `glue`: a tenth of the train set chooses, and the official validation set only reports.
"""

from __future__ import annotations

from dataclasses import replace

from mergectl.benchmarks import glue
from mergectl.benchmarks._contract import Task
from mergectl.benchmarks._templates import ask

TITLE = "GLUE as text-to-text"
PAPER = "github.com/PKU-ASE-RISE/medusa"
NAMES = ("cola", "sst2", "rte", "wnli", "mrpc", "mnli", "qnli", "qqp")


def as_text(task: Task) -> Task:
    """Return a task of `glue` that is answered in words.

    >>> rte = as_text(next(task for task in glue.TASKS if task.name == "rte"))
    >>> rte.templates[0].ask({"sentence1": "It rained.", "sentence2": "It was wet."})
    ('rte sentence1: It rained. sentence2: It was wet.', ('entailment', 'not_entailment'))
    """
    text = " ".join([task.name, *(f"{column}: {{{column}}}" for column in task.inputs)])
    template = ask("columns", text, *task.labels)
    return replace(task, kind="text_to_text", metric="accuracy", metrics=(), templates=(template,))


_GLUE = {task.name: task for task in glue.TASKS}

TASKS = tuple(as_text(_GLUE[name]) for name in NAMES)
