"""FER2013 in the words of the published zero-shot heads.

Their prompts hold the synonyms of each class as a printed list; `vision14/fer2013` averages over the synonyms. Ask this
one where scores are to be compared with published ones.
"""

from __future__ import annotations

from dataclasses import replace

from mergectl.benchmarks._contract import Task
from mergectl.benchmarks._vision import FOURTEEN

TITLE = "FER2013 with the published prompts, such as \"a photo of a ['happy', 'smiling'] looking face.\""
PAPER = "arXiv:2405.07813"


def _literal(task: Task) -> Task:
    """Return a task in which a class's synonyms are one word, written as Python prints their list."""
    return replace(task, words=tuple(str(words.split("|")) for words in task.words))


TASKS = (_literal(FOURTEEN[-1]),)
