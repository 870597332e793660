"""Drop entries of each task vector, at random or the smallest, and rescale the rest (DARE).

>>> from mergectl import merge_weights
>>> import torch
>>> base, expert = {"w": torch.zeros(4)}, {"w": torch.tensor([1.0, -4.0, 2.0, -3.0])}
>>> refine = [("dare", {"drop": 0.5, "strategy": "magnitude"})]
>>> merge_weights("task_arithmetic", base, {"a": expert}, refine=refine, scale=1.0)["w"].tolist()
[0.0, -8.0, 0.0, -6.0]
>>> masks = {"a": {"w": torch.tensor([1, 0, 0, 1])}}
>>> merge_weights("dare_average", base, {"a": expert}, supplies={"masks": masks}, drop=0.75)["w"].tolist()
[4.0, 0.0, 0.0, -12.0]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import torch

from mergectl.methods import _kernels, _more_kernels
from mergectl.methods._contract import Between, MethodError, OneOf, PerTask, Rng, Weights

if TYPE_CHECKING:
    from mergectl.methods._task_vectors import TaskVectors

BLOCKS = {"strategy": ["random"], "rescale_to": ["expected"]}  # the settings under which weights may come in blocks
TITLE = "DARE (drop and rescale)"
PAPER = "arXiv:2311.03099"
NEUTRAL = {"drop": 0.0}
PRESETS: dict[str, dict[str, Any]] = {
    "dare_average": {"method": "average", "on": "deltas"},
    "dare_task_arithmetic": {"method": "task_arithmetic"},
    "dare_ties": {"method": "ties", "trim": "none", "zero_sign": "zero"},
}


def randomly(x: torch.Tensor, drop: float, generator: torch.Generator) -> torch.Tensor:
    """Return a mask that keeps each entry with probability 1 - drop."""
    return torch.rand(x.shape, generator=generator) >= drop


def by_magnitude(x: torch.Tensor, drop: float, generator: torch.Generator) -> torch.Tensor:
    """Return a mask without the share `drop` of the entries that are smallest in magnitude (and their equals)."""
    smallest = _kernels.count_share(drop, x.numel())
    if smallest == 0:
        return torch.ones_like(x, dtype=torch.bool)
    return x.abs() > x.abs().reshape(-1).kthvalue(smallest).values


STRATEGIES: dict[str, Callable[[torch.Tensor, float, torch.Generator], torch.Tensor]]
STRATEGIES = {"random": randomly, "magnitude": by_magnitude}


def refine(
    task_vectors: TaskVectors,
    rng: Rng,
    masks: Mapping[str, Weights] | None = None,
    *,
    drop: Annotated[PerTask, Between(0.0, 1.0, high_open=True, search=(0.0, 0.95)), "share of entries dropped"] = 0.9,
    rescale: Annotated[bool, "rescale the rest: divide it by 1 - drop, unless rescale_to says otherwise"] = True,
    strategy: Annotated[str, OneOf(STRATEGIES), "drop at random, or the smallest of each weight"] = "random",
    rescale_to: Annotated[str, OneOf(["expected", "l1"]), "keep the expected value, or the sum of magnitudes"] = (
        "expected"
    ),
) -> TaskVectors:
    """Return task vectors with entries dropped; given masks are used instead of drawing any."""
    drops = _kernels.per_task(drop, len(task_vectors.tasks))

    def drop_entries(name: str, x: torch.Tensor) -> torch.Tensor:
        rows = []
        for task, row, share in zip(task_vectors.tasks, x, drops, strict=True):
            kept = STRATEGIES[strategy](row, share, rng(task, name)) if masks is None else given(masks, task, name, row)
            rest = torch.where(kept, row, 0)
            by_mass = rescale and rescale_to == "l1"
            rows.append(_more_kernels.to_mass(rest, row) if by_mass else rest / (1 - share if rescale else 1.0))
        return torch.stack(rows)

    return task_vectors.map(drop_entries)


def given(masks: Mapping[str, Weights], task: str, name: str, row: torch.Tensor) -> torch.Tensor:
    """Return the given mask of one task's weight."""
    try:
        mask = torch.as_tensor(masks[task][name])
    except KeyError:
        raise MethodError(f"No mask for task '{task}' and weight '{name}' among the given masks.") from None
    if mask.shape != row.shape:
        raise MethodError(
            f"The mask of task '{task}' for '{name}' has shape {list(mask.shape)}, the weight {list(row.shape)}."
        )
    return mask.to(row.device) != 0
