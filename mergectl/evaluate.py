"""Score a model on tasks: an expert, a merged folder, or a base that borrows the experts' heads."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergectl.bench import Bench, bench_of, make_bench, score_model, written
from mergectl.errors import UserError
from mergectl.flops import costs
from mergectl.heads import open_live, own_tasks_of
from mergectl.live import LiveModel
from mergectl.preprocess import with_inputs

if TYPE_CHECKING:
    from mergectl.benchmarks._contract import Task, Use
    from mergectl.checkpoints import Checkpoint

__all__ = ["Bench", "Evaluation", "LiveModel", "bench_of", "evaluate", "make_bench", "open_live", "score_model"]

LENGTH = 32  # tokens that a model may write where its answers are shown
BOOKKEEPING = ("seconds", "examples")
NO_TASKS = "{} does not say for which tasks it has heads. Name experts that lend theirs (--heads), or tasks (--on)."


@dataclass(frozen=True)
class Written:
    """What a model wrote by itself for one row of a text-to-text task, beside the right answer."""

    task: str
    text: str
    written: str
    right: str


@dataclass(frozen=True)
class Evaluation:
    """The scores of one model: `metrics[task]["score"]` is the task's main metric."""

    model: str
    split: str
    metrics: Mapping[str, Mapping[str, float]]
    seconds: Mapping[str, float]
    examples: Mapping[str, int]
    written: tuple[Written, ...] = ()

    @property
    def scores(self) -> dict[str, float]:
        """Task -> main metric."""
        return {task: found["score"] for task, found in self.metrics.items()}

    @property
    def mean(self) -> float:
        """The mean of the tasks' main metrics."""
        return sum(self.scores.values()) / len(self.scores)


def evaluate(
    model_ref: str | Path | Checkpoint,
    tasks: Sequence[str | Task] | str | None = None,
    *,
    split: Use = "report",
    data: Path | str | None = None,
    batch_size: int = 64,
    limit: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
    heads: Mapping[str, str | Path | Checkpoint] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    seed: int = 0,
    answer_metric: str = "rank",
    show: int = 0,
    flops: bool = False,
    inputs: str = "full",
) -> Evaluation:
    """Score a model on tasks (default: those it has heads for); `heads` names an expert per task to borrow from.

    `answer_metric` says how text-to-text tasks choose among answers: `rank` by how likely each is, or `greedy_prob`.
    Of each such task, `show` rows are kept with what the model writes by itself. With `flops` the metrics tell what the
    rows cost (see `mergectl.flops`). `inputs="ids_only"` gives a model token ids alone, as the alpha study did.
    """
    chosen = as_tasks(tasks if tasks is not None else own_tasks_of(model_ref), model_ref)
    check_answers(answer_metric, show, chosen)
    live = open_live(model_ref, chosen, heads=heads, device=device)
    found: dict[str, dict[str, float]] = {}
    shown: list[Written] = []
    for task in chosen:
        preparer, folder = with_inputs(live.preparer_of(task.id), inputs), _data_folder(data)
        bench = make_bench(task, preparer, split=split, data=folder, limit=limit, batch_size=batch_size, seed=seed)
        found[task.id] = score_model(live, bench, dtype=dtype, progress=progress, answer_metric=answer_metric)
        if flops:
            found[task.id] |= costs(live.use(task.id), bench)
        if show:
            shown += [Written(task.id, *row) for row in written(live.use(task.id), bench, show, LENGTH, dtype=dtype)]
    return _evaluation(str(getattr(model_ref, "ref", model_ref)), split, found, shown)


def _evaluation(
    model: str, split: str, found: Mapping[str, Mapping[str, float]], shown: Sequence[Written]
) -> Evaluation:
    """Tell the scores from what they took."""
    return Evaluation(
        model=model,
        split=split,
        metrics={t: {k: v for k, v in m.items() if k not in BOOKKEEPING} for t, m in found.items()},
        seconds={task: metrics["seconds"] for task, metrics in found.items()},
        examples={task: int(metrics["examples"]) for task, metrics in found.items()},
        written=tuple(shown),
    )


def _data_folder(data: Path | str | None) -> Path | None:
    place = data or os.environ.get("MERGECTL_DATA")
    return Path(place) if place else None


def check_answers(metric: str, show: int, tasks: Sequence[Task]) -> None:
    """Refuse an unknown way to choose among answers, and to choose or show them where a task is answered by labels."""
    from mergectl.answers import ANSWER_METRICS

    if metric not in ANSWER_METRICS:
        raise UserError(f"--answer-metric must be {' or '.join(ANSWER_METRICS)}, got '{metric}'.")
    labelled = next((task.id for task in tasks if task.kind != "text_to_text"), None)
    if labelled is not None and (metric != "rank" or show):
        option = "--show" if show else f"--answer-metric {metric}"
        raise UserError(f"{option} is for text-to-text tasks, and {labelled} is answered with a label.")


def as_tasks(tasks: Sequence[str | Task] | str, model: Any = None) -> list[Task]:
    """Task words or tasks to tasks."""
    words = [tasks] if isinstance(tasks, str) else list(tasks)
    if not words:
        raise UserError(NO_TASKS.format(getattr(model, "ref", model)))
    return [found for word in words for found in (_resolved(word) if isinstance(word, str) else [word])]


def _resolved(word: str) -> list[Task]:
    from mergectl.tasks import resolve

    return resolve([word])
