"""Seven tasks of GLUE in the order of the AdaRank study: GLUE without STS-B and WNLI.

Rows and splits are those of `glue`, so that an expert for `glue/rte` answers `glue7/rte`. CoLA is scored by Matthews
correlation and every other task by accuracy; accuracy and F1 are recorded as well. MNLI reports on the matched
validation set; `mnli_mm`, on request, reports on the mismatched one, as that study did for GPT-2.
"""

from __future__ import annotations

from dataclasses import replace

from mergectl.benchmarks import glue
from mergectl.benchmarks._contract import Task

TITLE = "GLUE, seven tasks"
PAPER = "arXiv:2503.22178"
DEFAULT = ("cola", "sst2", "mrpc", "qqp", "mnli", "qnli", "rte")


def _scored(task: Task) -> Task:
    """Return a task of `glue` that records accuracy and F1 besides its own metrics."""
    ours = ("accuracy", "f1" if len(task.labels) == 2 else "weighted_f1", *task.metrics)
    return replace(task, metrics=tuple(name for name in dict.fromkeys(ours) if name != task.metric))


_GLUE = {task.name: task for task in glue.TASKS}
TASKS = tuple(_scored(_GLUE[name]) for name in (*DEFAULT, "mnli_mm"))
