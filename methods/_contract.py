"""The words a method file is written with: what it may ask for, declare and yield.

Nothing heavy is imported here, so that help texts and option checks never load torch.

A method file holds one function, `merge` (task vectors to one) or `refine` (task vectors to better ones). The star
rule: parameters before `*` are supplied by the lab, by name; parameters after it are the user's settings.

Supplies are listed in `SUPPLIES`. A supply with a default of None is optional.

Facts at the top of a file: TITLE (as in the paper), PAPER, NEUTRAL (settings under which copies of one model merge to
that model, or None with the reason beside it), and where they hold LINEAR (settings in which the merged task vector is
linear), EXPERTS (least and most experts, None for no limit), SHARES (the setting whose values per task are divided by
their sum, which must not be zero; not under normalize=false), EXTRA_BITS (bits kept per task and weight), PRESETS
({name: settings}; a refinement's preset also names its "method"), BLOCKS (True: a method that works element by element,
or takes all it needs of a weight from figures that stream, may be handed long weights in blocks; "rows": in blocks of
whole rows; {setting: allowed values, or {value: "elements" or "rows"}}: under these settings).

`yield` weight by weight, or return `task_vectors.each(function)`: the lab then reads, computes and writes several
weights or blocks at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    import torch

SUPPLIES = {
    "task_vectors": "expert minus base, lazily: weight name -> [task, *shape]",
    "experts": "the experts' weights, lazily: weight name -> [task, *shape]; the method then yields weights",
    "base": "the base's weights, lazily",
    "rng": "rng(task, weight): a seeded generator of its own",
    "masks": "masks drawn elsewhere: {task: {weight: 1 where kept}}",
    "signs": "signs elected elsewhere: {weight: sign}",
    "grams": "second moments of the inputs of linear layers, per task",
    "fishers": "diagonal Fisher information, per task",
    "copies": "how often the model uses each tied weight: {weight: number}; a weight not named is used once",
    "linears": "the weights of linear layers outside embeddings and heads: {weight: True where stored [in, out]}",
    "remember": "remember(what, task, weight, make): what `make` gives, computed once for these models",
    "entropy": "mean prediction entropy on unlabelled inputs, differentiable",
    "watch": "what follows an adaptation step by step: its figures, its checkpoints, when to stop",
}


class MethodError(ValueError):
    """Bad input found by a method: one sentence for the user."""


class MergeWarning(UserWarning):
    """Something odd in the experts that leaves the result finite: one sentence for the user."""


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


@dataclass(frozen=True)
class Split:
    """In NEUTRAL: a number to be divided by the number of tasks."""

    total: float


@dataclass(frozen=True)
class Beside:
    """The values of another setting beside which alone a setting has a meaning: elsewhere it is refused."""

    setting: str
    words: tuple[Any, ...]


# A setting of this type may be given per task: it arrives as one number, or as one number per task in task order.
PerTask: TypeAlias = float | Sequence[float]

# A setting of this type names some of the tasks: it arrives as a tuple of names, or as None for all of them.
Tasks: TypeAlias = Sequence[str] | None

Weights: TypeAlias = "Mapping[str, torch.Tensor]"


class Rng(Protocol):
    """`rng(task, weight)`: a seeded CPU generator of its own, whatever the order, shards and threads."""

    def __call__(self, task: str, weight: str) -> torch.Generator:
        """Return the generator for one task's weight, at its start."""
        ...


class Remember(Protocol):
    """`remember(what, task, weight, make)`: what `make` gives, computed once for these models.

    `what` names the computation and its settings. With a task it is taken to depend on that task's weight and the
    base's alone, with None on those of all tasks. The tensors are on the CPU, may be shared, and are not to be changed.
    """

    def __call__(
        self, what: str, task: str | None, weight: str, make: Callable[[], Sequence[torch.Tensor]]
    ) -> tuple[torch.Tensor, ...]:
        """Return what was kept, or what `make` gives now."""
        ...


# What `merge` yields for each weight: its name, the merged tensor, and where the method keeps something per task
# the masks [task, *shape]. A method that takes `experts` (the weights themselves) yields merged weights, any other
# one merged task vectors. A `merge` may end with `return {"rescalers": tensor[task]}`.
Merged: TypeAlias = "Iterator[tuple[str, torch.Tensor] | tuple[str, torch.Tensor, torch.Tensor]]"
