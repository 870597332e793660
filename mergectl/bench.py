"""A task's rows made ready for a model once, and the scoring of a model on them."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from mergectl.answers import ANSWER_METRICS, right_answers, write
from mergectl.errors import UserError
from mergectl.live import LiveModel
from mergectl.packing import cuts
from mergectl.preprocess import Preparer
from mergectl.text2text import AnswerPreparer

if TYPE_CHECKING:
    import numpy as np
    import torch

    from mergectl.benchmarks._contract import Task, Use

AUTOCAST = {"float32": None, "bfloat16": "bfloat16", "float16": "float16", "bf16": "bfloat16", "fp16": "float16"}
Progress: TypeAlias = Callable[[int, int, str], None]
Outputs: TypeAlias = "np.ndarray[Any, Any]"


@dataclass(frozen=True)
class Bench:
    """One task's rows as batches of neighbours in length, kept in memory; `order` leads back to the rows' own order."""

    task: Task
    labels: tuple[float, ...]
    batches: tuple[Mapping[str, torch.Tensor], ...]
    order: tuple[int, ...]  # order[i] is the row that stands at place i of the batches
    preparer: Preparer
    others: tuple[Bench, ...] = ()  # the same rows by a text-to-text task's other templates, where the median counts

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def sizes(self) -> list[int]:
        """The number of rows of each batch."""
        return [len(next(iter(batch.values()))) for batch in self.batches]


def make_bench(
    task: Task,
    preparer: Preparer,
    *,
    split: Use = "report",
    data: Path | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    one_more: int | None = None,
) -> Bench:
    """Load and tokenise a task's rows for one use, by all templates where the task asks for the median of them.

    Batches have `batch_size` rows; with `one_more`, what a batch costs in tokens, at most so many (see `packing`).
    """
    from mergectl.benchmarks import _rows

    templates = range(len(task.templates) if task.pool == "median" else 1)
    found = [_rows.load(task, split, data=data, limit=limit, seed=seed, template=number) for number in templates]
    how: dict[str, Any] = {"batch_size": batch_size, "one_more": one_more}
    first, *others = [bench_of(task, preparer, rows.columns, rows.labels, **how) for rows in found]
    return replace(first, others=tuple(others))


def bench_of(
    task: Task,
    preparer: Preparer,
    columns: Mapping[str, Sequence[Any]],
    labels: Sequence[float],
    batch_size: int = 64,
    one_more: int | None = None,
) -> Bench:
    """Make a bench from columns that are already in memory."""
    examples = preparer.prepare(task, columns)
    if isinstance(preparer, AnswerPreparer):
        examples = [{**example, "labels": label} for example, label in zip(examples, labels, strict=True)]
    lengths = [preparer.length(example) for example in examples]
    order = sorted(range(len(examples)), key=lambda row: -lengths[row])
    if one_more is None:
        places = [(start, start + batch_size) for start in range(0, len(order), batch_size)]
    else:
        places = cuts([lengths[row] for row in order], batch_size, one_more)
    batches = tuple(preparer.stack([examples[row] for row in order[start:end]]) for start, end in places)
    return Bench(task, tuple(labels), batches, tuple(order), preparer)


def score_model(
    model: Any,
    bench: Bench,
    *,
    dtype: str = "float32",
    order: Sequence[int] | None = None,
    progress: Progress | None = None,
    answer_metric: str = "rank",
) -> dict[str, float]:
    """Score a model, or a LiveModel with the task's head put on: its metrics, `score`, `seconds` and `examples`.

    Where the median over several templates counts, `iqr` is the interquartile range of the main metric.
    """
    start = time.perf_counter()
    if isinstance(model, LiveModel):
        order = model.order(bench.task.id)
        model = model.use(bench.task.id)
    metrics = _pooled(
        [_metrics_of(model, each, dtype, order, progress, answer_metric) for each in (bench, *bench.others)], bench.task
    )
    seconds = time.perf_counter() - start
    return {"score": metrics[bench.task.metric], **metrics, "seconds": seconds, "examples": float(len(bench))}


def _metrics_of(
    model: Any, bench: Bench, dtype: str, order: Sequence[int] | None, progress: Progress | None, answer_metric: str
) -> dict[str, float]:
    from mergectl.benchmarks import _metrics

    outputs = logits(model, bench, dtype=dtype, progress=progress, answer_metric=answer_metric)
    if order is not None:
        outputs = outputs[:, list(order)]
    return _metrics.scores(bench.task, list(bench.labels), outputs)


def _pooled(found: Sequence[Mapping[str, float]], task: Task) -> dict[str, float]:
    """The median of each metric over the templates, and how far apart the quarters of the main one lie."""
    import numpy as np

    if len(found) == 1:
        return dict(found[0])
    low, high = np.percentile([metrics[task.metric] for metrics in found], [25, 75])
    medians = {name: float(np.median([metrics[name] for metrics in found])) for name in found[0]}
    return {**medians, "iqr": float(high - low)}


def logits(
    model: Any,
    bench: Bench,
    *,
    dtype: str = "float32",
    progress: Progress | None = None,
    answer_metric: str = "rank",
) -> Outputs:
    """The model's outputs [rows, labels] in the rows' own order; the model is left in the mode it was in.

    For a text-to-text task they are the scores of the answers, -inf where a row offers fewer than others.
    """
    import numpy as np
    import torch

    training = model.training
    model.eval()
    found = []
    try:
        for done in range(1, len(bench.batches) + 1):
            found.append(batch_logits(model, bench, done - 1, dtype=dtype, answer_metric=answer_metric))
            if progress is not None:
                progress(done, len(bench.batches), bench.task.id)
    finally:
        model.train(training)
    stacked = torch.cat(_equally_wide(found)).cpu().numpy()
    outputs = np.empty_like(stacked)
    outputs[list(bench.order)] = stacked
    return outputs


def batch_logits(
    model: Any, bench: Bench, number: int, *, dtype: str = "float32", answer_metric: str = "rank"
) -> torch.Tensor:
    """The outputs [rows, labels] for one batch of a bench, by a model that is in evaluation mode."""
    import torch

    device = next(model.parameters()).device
    with torch.inference_mode(), autocast(device.type, dtype):
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in bench.batches[number].items()}
        if bench.task.kind == "text_to_text":
            return ANSWER_METRICS[answer_metric](model, batch)
        outputs: torch.Tensor = model(**_finished(bench.preparer, batch)).logits.float()
    return outputs


def written(model: Any, bench: Bench, count: int, length: int, *, dtype: str = "float32") -> list[tuple[str, str, str]]:
    """The first rows of a text-to-text bench: the text, what the model writes (at most `length` tokens), the answer."""
    import torch

    assert isinstance(bench.preparer, AnswerPreparer)
    device, rows = next(model.parameters()).device, iter(bench.order)
    found: dict[int, tuple[str, str, str]] = {}
    with torch.inference_mode(), autocast(device.type, dtype):
        for batch in bench.batches:
            own = list(itertools.islice(rows, len(batch["input_ids"])))
            kept = [place for place, row in enumerate(own) if row < count]
            if kept:
                asked = {name: batch[name][kept].to(device) for name in ("input_ids", "attention_mask")}
                said = bench.preparer.decode(write(model, asked, length).sequences)
                texts, answers = bench.preparer.decode(asked["input_ids"]), bench.preparer.decode(right_answers(batch))
                found |= {own[p]: (text, words, answers[p]) for p, text, words in zip(kept, texts, said, strict=True)}
    return [found[row] for row in sorted(found)]


def _equally_wide(found: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs of batches with as many columns as the widest has; only answers to texts ever differ in number."""
    import torch

    widest = max(outputs.shape[1] for outputs in found)
    return [torch.nn.functional.pad(x, (0, widest - x.shape[1]), value=-torch.inf) for x in found]


def _finished(preparer: Preparer, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in preparer.finish(batch).items() if name != "labels"}


def autocast(device: str, dtype: str) -> contextlib.AbstractContextManager[Any]:
    """Let a model compute in another type; its weights stay as they are."""
    """Let a model compute in another type; its weights stay as they are."""
    import torch

    if dtype not in AUTOCAST:
        raise UserError(f"--dtype must be float32, bfloat16 or float16, got '{dtype}'.")
    word = AUTOCAST[dtype]
    return contextlib.nullcontext() if word is None else torch.autocast(device, dtype=getattr(torch, word))
