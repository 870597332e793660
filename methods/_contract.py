"""The words a method file is written with: what it may ask for, declare and yield.

Nothing heavy is imported here, so that help texts and option checks never load torch.

A method file holds one function, `merge` (task vectors to one) or `refine` (task vectors to better ones). The star
rule: parameters before `*` are supplied by the lab, by name; parameters after it are the user's settings.

Supplies: `task_vectors`, `base`, `experts`, `rng`, `masks`, `signs`. A supply with a default of None is optional.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    import torch


class MethodError(ValueError):
    """Bad input found by a method: one sentence for the user."""


@dataclass(frozen=True)
class Between:
    """The allowed range of a number, ends included unless said otherwise; `search` is the range a search tries."""

    low: float
    high: float
    low_open: bool = False
    high_open: bool = False
    search: tuple[float, float] | None = None


@dataclass(frozen=True)
class OneOf:
    """The allowed words: any collection of names, most often a table {name: function}."""

    words: Sequence[str] | Mapping[str, Any]


# A setting of this type may be given per task: it arrives as one number, or as one number per task in task order.
PerTask: TypeAlias = float | Sequence[float]

Weights: TypeAlias = "Mapping[str, torch.Tensor]"


class Rng(Protocol):
    """`rng(task, weight)`: a seeded CPU generator of its own, whatever the order, shards and threads."""

    def __call__(self, task: str, weight: str) -> torch.Generator: ...


# What `merge` yields for each weight: its name, the merged tensor, and where the method keeps something per task
# the masks [task, *shape]. A method that takes `task_vectors` yields merged task vectors; one that takes `experts`
# (the weights themselves) yields merged weights. A `merge` may end with `return {"rescalers": tensor[task]}`.
Merged: TypeAlias = "Iterator[tuple[str, torch.Tensor] | tuple[str, torch.Tensor, torch.Tensor]]"
