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

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import torch

from mergectl.methods import _kernels, _more_kernels
from mergectl.methods._contract import Beside, Between, MethodError, OneOf, PerTask, Rng, Weights

if TYPE_CHECKING:
    from mergectl.methods._task_vectors import TaskVectors

BLOCKS = True  # a block at a time is enough: the lab may hand over weights in blocks
TITLE = "DARE (drop and rescale)"
PAPER = "arXiv:2311.03099"
NEUTRAL = {"drop": 0.0}
PRESETS: dict[str, dict[str, Any]] = {
    "dare_average": {"method": "average", "on": "deltas"},
    "dare_task_arithmetic": {"method": "task_arithmetic"},
    "dare_ties": {"method": "ties", "trim": "none", "zero_sign": "zero"},
}


# Puts the entries of a task's weight that are kept, times a scale, into other memory, and zeros elsewhere.
Keep: TypeAlias = "Callable[[str, str, torch.Tensor, float, torch.Tensor], Any]"


def randomly(task_vectors: TaskVectors, drops: Mapping[str, float], rng: Rng) -> Keep:
    """Keep each entry with probability 1 - drop."""
    return lambda task, name, row, scale, out: _kernels.keep_chosen(rng(task, name), 1 - drops[task], row, scale, out)


def by_magnitude(task_vectors: TaskVectors, drops: Mapping[str, float], rng: Rng) -> Keep:
    """Drop the share of each weight's entries that are smallest in magnitude (and their equals)."""
    floors: dict[tuple[str, str], float] = {}
    for part in task_vectors.by_weight():
        smallest = [_kernels.count_share(drops[task], part.numel) for task in part.tasks]
        found = part.kth_magnitude([part.numel - count + 1 for count in smallest])
        for task, count, floor in zip(part.tasks, smallest, found, strict=True):
            floors.update({(task, name): floor if count else -1.0 for name in part})

    def keep(task: str, name: str, row: torch.Tensor, scale: float, out: torch.Tensor) -> None:
        out.copy_(_kernels.keep_above(row[None], [floors[task, name]])[0]).mul_(scale)

    return keep


STRATEGIES: dict[str, Callable[[TaskVectors, Mapping[str, float], Rng], Keep]]
STRATEGIES = {"random": randomly, "magnitude": by_magnitude}


def refine(
    task_vectors: TaskVectors,
    rng: Rng,
    masks: Mapping[str, Weights] | None = None,
    *,
    drop: Annotated[PerTask, Between(0.0, 1.0, high_open=True, search=(0.0, 0.95)), "share of entries dropped"] = 0.9,
    rescale: Annotated[bool, "rescale the rest: divide it by 1 - drop, unless rescale_to says otherwise"] = True,
    strategy: Annotated[str, OneOf(STRATEGIES), "drop at random, or the smallest of each weight"] = "random",
    rescale_to: Annotated[
        str, OneOf(["expected", "l1"]), Beside("rescale", (True,)), "keep the expected value, or the sum of magnitudes"
    ] = "expected",
) -> TaskVectors:
    """Return task vectors with entries dropped; given masks are used instead of drawing any."""
    drops = dict(zip(task_vectors.tasks, _kernels.per_task(drop, len(task_vectors.tasks)), strict=True))
    keep = STRATEGIES[strategy](task_vectors, drops, rng) if masks is None else functools.partial(given, masks)
    by_mass = rescale and rescale_to == "l1"
    scales = [1 / (1 - share) if rescale and not by_mass else 1.0 for share in drops.values()]

    def drop_entries(name: str, x: torch.Tensor) -> torch.Tensor:
        rest = torch.empty_like(x)
        for task, row, scale, kept in zip(task_vectors.tasks, x, scales, rest, strict=True):
            keep(task, name, row, scale, kept)
        return rest

    rest = task_vectors.map(drop_entries)
    return _more_kernels.to_mass(rest, task_vectors) if by_mass else rest


def given(
    masks: Mapping[str, Weights], task: str, name: str, row: torch.Tensor, scale: float, out: torch.Tensor
) -> None:
    """Keep what the given mask of one task's weight keeps."""
    try:
        mask = torch.as_tensor(masks[task][name])
    except KeyError:
        raise MethodError(f"No mask for task '{task}' and weight '{name}' among the given masks.") from None
    if mask.shape != row.shape:
        raise MethodError(
            f"The mask of task '{task}' for '{name}' has shape {list(mask.shape)}, the weight {list(row.shape)}."
        )
    torch.mul(row, (mask.to(row.device) != 0).to(row.dtype), out=out).mul_(scale)
