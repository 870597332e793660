"""The diagonal Fisher information of a live model about its weights, on rows of its own task.

`per_example` is the expectation, over the labels as the model sees them, of the squared gradient of a label's log
probability, averaged over examples. `batch_sum` is what the public merging programs compute: the gradient is summed
over a batch and its labels before it is squared, cross terms included. A regression is told the right answers: its
gradient is that of the squared error.

The expectation over C labels is a sum of C - 1 squares: of each label's score against what is expected of the later
ones, the covariance of the labels being a product of triangles. Two labels take one backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mergectl.answers import rank
from mergectl.calibration import Batch
from mergectl.calibration_examples import Squares
from mergectl.errors import UserError

if TYPE_CHECKING:
    import torch


def fishers_of(
    model: Any, batches: Iterable[Batch], mode: str = "per_example", *, limit: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, torch.Tensor], int]:  # fmt: skip
    """Return the information about every parameter, by name, and the number of examples it is of.

    A batch is what the model takes, with `labels` for a regression; none is begun once `limit` examples were seen.
    """
    import torch

    weights = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    found = {name: torch.zeros_like(p, requires_grad=False) for name, p in weights.items()}
    device, examples = next(model.parameters()).device, 0
    squares = Squares(model, weights, found)
    with _differentiable(model), torch.enable_grad():
        for batch in batches:
            given = {name: x.to(device) for name, x in batch.items()}
            together = mode == "per_example" and size_of(given) > 1 and "answers" not in given
            left = squares.add(given, _logits, contrasts) if together else set(weights)
            rest = {name: found[name] for name in weights if name in left}
            for part in (_singles(given) if mode == "per_example" else [given]) if rest else []:
                for loss in MODES[mode](_logits(model, part), part):
                    _add_squares(rest, weights, loss.sum())
            examples += size_of(given)
            if progress is not None:
                progress(examples)
            if limit is not None and examples >= limit:
                break
    for name, total in found.items():
        if not bool(torch.isfinite(total.div_(max(examples, 1))).all()):
            raise UserError(f"The gradients of '{name}' are not finite, so there is no Fisher information about it.")
    return found, examples


def size_of(batch: Batch) -> int:
    """The number of examples in a batch."""
    return len(batch["attention_mask"] if "attention_mask" in batch else next(iter(batch.values())))


def _singles(batch: Batch) -> Iterator[dict[str, torch.Tensor]]:
    """The examples of a batch one by one; one with a list of answers must come alone."""
    count = size_of(batch)
    if count == 1:
        yield dict(batch)
    else:
        yield from ({name: x[row : row + 1] for name, x in batch.items()} for row in range(count))


def _logits(model: Any, batch: Batch) -> torch.Tensor:
    """The scores of the labels, or of the answers that a text offers."""
    if "answers" in batch:
        return rank(model, batch)
    logits: torch.Tensor = model(**{name: x for name, x in batch.items() if name != "labels"}).logits
    return logits.float()


def contrasts(logits: torch.Tensor, batch: Batch) -> list[torch.Tensor]:
    """Of every example what squares, summed, to the expected square of a label's log probability's gradient."""
    if logits.shape[-1] == 1 and "answers" not in batch:
        return [(logits[:, 0] - batch["labels"]).square()]
    offered = logits.isfinite()  # a row may offer fewer answers than others
    scores, logs = logits.where(offered, 0.0), logits.detach().log_softmax(-1)
    found = []
    for label in range(logits.shape[-1] - 1):
        later = logs[:, label + 1 :]
        share = logs[:, label] + later.logsumexp(-1) - logs[:, label:].logsumexp(-1)
        expected = (later.softmax(-1).nan_to_num(0.0) * scores[:, label + 1 :]).sum(-1)
        found.append((share / 2).exp().nan_to_num(0.0) * (scores[:, label] - expected))
    return found


def batch_sum(logits: torch.Tensor, batch: Batch) -> list[torch.Tensor]:
    """The log probabilities by the roots of the labels' chances, summed over labels and examples; or a mean error."""
    if logits.shape[-1] == 1 and "answers" not in batch:
        return [(logits[:, 0] - batch["labels"]).square().mean()]
    logs = logits.log_softmax(-1)
    logs = logs[logs.isfinite()]
    return [((logs / 2).exp().detach() * logs).sum()]


MODES: dict[str, Callable[[Any, Batch], list[Any]]] = {"per_example": contrasts, "batch_sum": batch_sum}


def _add_squares(found: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], loss: torch.Tensor) -> None:
    """Add the squares of a loss's gradient; the rows of a table that were not read have none."""
    import torch

    wanted = [weights[name] for name in found]
    gradients = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
    for total, gradient in zip(found.values(), gradients, strict=True):
        if gradient is None:
            continue
        if gradient.is_sparse:
            rows = gradient.coalesce()
            total.index_add_(0, rows.indices()[0], rows.values().square())
        else:
            total.addcmul_(gradient, gradient)


@contextlib.contextmanager
def _differentiable(model: Any) -> Iterator[None]:
    """Let gradients reach every parameter, those of embeddings as the rows that were read; put all back at the end."""
    from torch import nn

    wanted = [(p, p.requires_grad) for p in model.parameters() if p.is_floating_point()]
    tables = [(m, m.sparse) for m in model.modules() if isinstance(m, nn.Embedding)]
    try:
        for p, _ in wanted:
            p.requires_grad_(True)
        for table, _ in tables:
            table.sparse = True
        yield
    finally:
        for p, before in wanted:
            p.requires_grad_(before)
        for table, dense in tables:
            table.sparse = dense
