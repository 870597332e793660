"""Let entries compete within and across task vectors, and average the winners (PCB-Merging).

>>> from mergectl import merge_weights
>>> import torch
>>> base = {"w": torch.zeros(4)}
>>> experts = {"a": {"w": torch.tensor([0.0, 1.0, 2.0, 4.0])}, "b": {"w": torch.tensor([0.0, -4.0, 2.0, 1.0])}}
>>> # tanh(entry * sum over tasks) opposes a's 1 and b's -4 meets 12; exp(2 u^2) with u = |entry| / 4 favours the 4s.
>>> # floor(4 * 0.5) = 2 of each task's scores are dropped, the third is the new zero: only a's 4 and b's -4 are left
>>> merge_weights("pcb", base, experts, ratio=0.5, winsor=0.0, scale=1.5)["w"].tolist()
[0.0, -6.0, 0.0, 6.0]
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch

from mergectl.methods import _competition, _kernels
from mergectl.methods._contract import Between, Merged, OneOf, PerTask

if TYPE_CHECKING:
    from mergectl.methods._task_vectors import TaskVectors

BLOCKS = True
TITLE = "PCB-Merging"
PAPER = "arXiv:2410.02396"
NEUTRAL = {"variant": "paper", "ratio": 1.0, "scale": 1.0}  # the others always drop the smallest entry
LINEAR = ("scale",)


@dataclass(frozen=True)
class Variant:
    """One form of the algorithm, as the released programs or the publication have it."""

    winsor: float  # the share clipped where none is given
    compete: Callable[[TaskVectors, _competition.Rules], _competition.Contest]
    floor: float  # least sum of shares that is divided by


def _program(winsor: float, inter: _competition.Inter) -> Variant:
    return Variant(winsor, functools.partial(_competition.released, inter), 1e-12)


VARIANTS = {
    "nlp": _program(0.01, _competition.with_all),
    "root": _program(0.0001, _competition.with_all),
    "vision": _program(0.01, _competition.with_all_ranked),
    "vision_es": _program(0.01, _competition.with_each_ranked),
    "paper": Variant(0.0, _competition.published, sys.float_info.min),
}


def merge(
    task_vectors: TaskVectors,
    copies: Mapping[str, int] | None = None,
    *,
    ratio: Annotated[
        float, Between(0.0, 1.0, low_open=True, search=(0.02, 0.4)), "share of each task vector kept"
    ] = 0.1,
    scale: Annotated[PerTask, Between(-10.0, 10.0, search=(0.5, 3.0)), "scaling coefficient of each task"] = 1.2,
    variant: Annotated[str, OneOf(VARIANTS), "which program's form; vision_es for task vectors of unlike size"] = "nlp",
    winsor: Annotated[
        float | None, Between(0.0, 0.25), "share of magnitudes clipped at each end; 0.01, root 0.0001, paper 0"
    ] = None,
    premask: Annotated[float, Between(0.0, 1.0), "share of largest magnitudes that compete alone; 0: all do"] = 0.0,
    domain: Annotated[str, OneOf(["all", "changed"]), "count all weights, or those that some expert changed"] = "all",
    count_tied: Annotated[str, OneOf(["once", "each"]), "count a tied weight once, or as often as it is used"] = "once",
) -> Merged:
    """Yield for each weight the average of the entries that hold their own, by their shares."""
    form, scales = VARIANTS[variant], _kernels.per_task(scale, len(task_vectors.tasks))
    part = task_vectors.only([name for name, shape in task_vectors.shapes.items() if math.prod(shape)])
    part = changed(part) if domain == "changed" else part
    counted = repeated(part, copies or {}) if count_tied == "each" else part
    rules = _competition.Rules(form.winsor if winsor is None else winsor, ratio, premask)
    contest = form.compete(counted, rules) if len(part) else None

    def merged(name: str, x: torch.Tensor) -> torch.Tensor:
        if contest is None or name not in part:
            return torch.zeros_like(x[0])
        return contest.average(x, scales, form.floor)

    return task_vectors.each(merged)


def changed(part: TaskVectors) -> TaskVectors:
    """Return the vectors restricted to the weights in which some expert differs from the base."""
    moved = zip(part, part.gather(lambda rows: bool(rows.any())), strict=True)
    weights = {part.weight_of(name)[0] for name, differs in moved if differs}
    return part.only([name for name in part if part.weight_of(name)[0] in weights])


def repeated(part: TaskVectors, copies: Mapping[str, int]) -> TaskVectors:
    """Return the vectors with every weight as often as the model uses it, under names of their own."""
    counts = {name: copies.get(part.weight_of(name)[0], 1) for name in part}
    origin = {f"{name}\0{place}" if place else name: name for name in part for place in range(counts[name])}
    return part._with({name: part.shapes[own] for name, own in origin.items()}, lambda name: part[origin[name]])
