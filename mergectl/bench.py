"""A task's rows made ready for a model once, and the scoring of a model on them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from mergectl.errors import UserError
from mergectl.live import LiveModel
from mergectl.preprocess import ImagePreparer, Preparer

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

    def __len__(self) -> int:
        return len(self.labels)


def make_bench(
    task: Task,
    preparer: Preparer,
    *,
    split: Use = "report",
    data: Path | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> Bench:
    """Load and tokenise a task's rows for one use."""
    from mergectl.benchmarks import _rows

    rows = _rows.load(task, split, data=data, limit=limit, seed=seed)
    return bench_of(task, preparer, rows.columns, rows.labels, batch_size)


def bench_of(
    task: Task, preparer: Preparer, columns: Mapping[str, Sequence[Any]], labels: Sequence[float], batch_size: int = 64
) -> Bench:
    """Make a bench from columns that are already in memory."""
    examples = preparer.prepare(task, columns)
    order = sorted(range(len(examples)), key=lambda row: -preparer.length(examples[row]))
    stack = preparer.stack if isinstance(preparer, ImagePreparer) else preparer.collate
    cuts = range(0, len(order), batch_size)
    batches = tuple(stack([examples[row] for row in order[start : start + batch_size]]) for start in cuts)
    return Bench(task, tuple(labels), batches, tuple(order), preparer)


def score_model(
    model: Any,
    bench: Bench,
    *,
    dtype: str = "float32",
    order: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Score a model, or a LiveModel with the task's head put on: its metrics, `score`, `seconds` and `examples`."""
    from mergectl.benchmarks import _metrics

    start = time.perf_counter()
    if isinstance(model, LiveModel):
        order = model.order(bench.task.id)
        model = model.use(bench.task.id)
    outputs = logits(model, bench, dtype=dtype, progress=progress)
    if order is not None:
        outputs = outputs[:, list(order)]
    metrics = _metrics.scores(bench.task, list(bench.labels), outputs)
    seconds = time.perf_counter() - start
    return {"score": metrics[bench.task.metric], **metrics, "seconds": seconds, "examples": float(len(bench))}


def logits(model: Any, bench: Bench, *, dtype: str = "float32", progress: Progress | None = None) -> Outputs:
    """The model's outputs [rows, labels] in the rows' own order; the model is left in the mode it was in."""
    import numpy as np
    import torch

    device = next(model.parameters()).device
    training = model.training
    model.eval()
    found = []
    try:
        with torch.inference_mode(), _autocast(device.type, dtype):
            for done, batch in enumerate(bench.batches, 1):
                there = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
                found.append(model(**_finished(bench.preparer, there)).logits.float())
                if progress is not None:
                    progress(done, len(bench.batches), bench.task.id)
    finally:
        model.train(training)
    stacked = torch.cat(found).cpu().numpy()
    outputs = np.empty_like(stacked)
    outputs[list(bench.order)] = stacked
    return outputs


def _finished(preparer: Preparer, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in preparer.finish(batch).items() if name != "labels"}


def _autocast(device: str, dtype: str) -> contextlib.AbstractContextManager[Any]:
    import torch

    if dtype not in AUTOCAST:
        raise UserError(f"--dtype must be float32, bfloat16 or float16, got '{dtype}'.")
    word = AUTOCAST[dtype]
    return contextlib.nullcontext() if word is None else torch.autocast(device, dtype=getattr(torch, word))
