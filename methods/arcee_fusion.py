"""Take from one expert only the changes of outstanding importance (Arcee Fusion).

>>> from mergectl import merge_weights
>>> import torch
>>> base, expert = {"w": torch.zeros(5)}, {"w": torch.tensor([0.0, 0.25, 0.25, 0.5, 4.0])}
>>> # importances are as 0, 1, 1, 2, 16: median 1, quartiles 1 and 2, so from 1 + 1.5 * (2 - 1) on: the last alone
>>> merge_weights("arcee_fusion", base, {"a": expert})["w"].tolist()
[0.0, 0.0, 0.0, 0.0, 4.0]

An entry's importance is its change times the Kullback-Leibler divergence of its row (the last dimension), read as
logits, from the base's. A tensor's threshold is the median of its importances plus 1.5 times their interquartile range.
Quartiles are those of all entries, where mergekit samples a million of them; not compared with a run of mergekit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch

from mergectl.methods._contract import Between, Merged, Weights

if TYPE_CHECKING:
    from mergectl.methods._more_kernels import Array
    from mergectl.methods._task_vectors import TaskVectors

TITLE = "Arcee Fusion"
PAPER = "github.com/arcee-ai/mergekit"
NEUTRAL = None  # only a part of the expert is ever taken
EXPERTS = (1, 1)
BLOCKS = "rows"  # some rows at a time are enough: the lab may hand over weights in such blocks

_ROWS = 1 << 16  # entries compared at once, so that their float64 copies stay small


def merge(
    task_vectors: TaskVectors,
    base: Weights,
    *,
    spread: Annotated[float, Between(-10.0, 10.0, search=(0.0, 3.0)), "interquartile ranges above the median"] = 1.5,
) -> Merged:
    """Yield for each weight the changes at or above the threshold."""

    def score(name: str, x: torch.Tensor) -> torch.Tensor:
        return importance(x[0], base[name])

    def of_weight(part: TaskVectors) -> Merged:
        return part.each(functools.partial(kept, score, threshold(part.row(score), spread)))

    return task_vectors.per_weight(of_weight)


def kept(score: Callable[[str, torch.Tensor], torch.Tensor], floor: float, name: str, x: torch.Tensor) -> torch.Tensor:
    """Return the changes whose score reaches the threshold."""
    scores = score(name, x)
    return x[0] * torch.ge(scores, floor, out=torch.empty_like(scores)).to(x)


def importance(change: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Return each entry's change in magnitude times the divergence of its row."""
    if change.numel() == 0:
        return torch.zeros_like(change)
    rows = change.detach().cpu().reshape(-1, change.shape[-1] if change.dim() else 1)
    start = base.detach().cpu().reshape(rows.shape)
    scores = torch.empty(rows.shape, dtype=torch.float32)
    size = max(1, _ROWS // rows.shape[1])
    for first in range(0, len(rows), size):
        delta, q = rows[first : first + size].double().numpy(), start[first : first + size].double().numpy()
        scores[first : first + size] = torch.from_numpy(np.abs(delta) * divergence(q + delta, q))
    return scores.reshape(change.shape)


def divergence(p: Array, q: Array) -> Array:
    """Return for each row the divergence of its softmax from another's, a little added to both."""
    p, q = softmax(p) + 1e-8, softmax(q) + 1e-8
    result: Array = (p * np.log(p / q)).sum(-1, keepdims=True)
    return result


def softmax(x: Array) -> Array:
    """Return numbers along the last axis as probabilities."""
    high = np.exp(x - x.max(-1, keepdims=True))
    result: Array = high / high.sum(-1, keepdims=True)
    return result


def threshold(scores: TaskVectors, spread: float) -> float:
    """Return the median plus so many interquartile ranges, each quartile being an entry (the lower neighbour)."""
    places = [int(share * (scores.numel - 1)) for share in (0.25, 0.5, 0.75)]
    low, middle, high = (found[0] for found in scores.kth_largest([[scores.numel - place] for place in places]))
    return middle + spread * (high - low) if scores.numel else 0.0
