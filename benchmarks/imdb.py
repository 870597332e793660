"""IMDb: long film reviews, negative or positive, scored on the official test set.

The train set gives 90 % to fit and 10 % to tune. An expert for `glue/sst2` answers it as it is.
`--limit 5000 --seed 42` draws the sample of the alpha study.
"""

from __future__ import annotations

from mergectl.benchmarks._contract import Task, tune_share

TITLE = "IMDb large movie reviews"
PAPER = "ACL P11-1015"

TASKS = (
    Task(
        name="imdb",
        kind="classification",
        inputs=("text",),
        label="label",
        labels=("neg", "pos"),
        metric="accuracy",
        metrics=("weighted_f1",),
        answered_by=("glue/sst2",),
        parts=tune_share(report="test"),
        source="imdb",
        config="plain_text",
        hub="stanfordnlp/imdb",
        samples=(
            {"text": "I came for the music and stayed for the story. See it twice.", "label": 1},
            {"text": "Two hours of people shouting in corridors. I left before the end.", "label": 0},
        ),
    ),
)
