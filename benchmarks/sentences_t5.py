"""The sentence tasks as text-to-text: column names and texts go in, words come out.

Written as the Medusa study writes GLUE. The splits are those of the suite `sentences`, and every score is accuracy.
"""

from __future__ import annotations

from mergectl.benchmarks import sentences
from mergectl.benchmarks.glue_t5 import as_text

TITLE = "Sentence classification (TREC, Subj, MR, AG News) as text-to-text"

TASKS = tuple(as_text(task) for task in sentences.TASKS)
