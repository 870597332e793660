"""Singular value decompositions shared by the spectral methods, and what is built from them.

They are computed in float64 and kept in float32, components as rows, so that a prefix of them lies together in memory
and in files. A decomposition is remembered by what was decomposed, so methods and the trials of a search share it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, NamedTuple

import torch

from mergectl.methods import _kernels, _linears
from mergectl.methods._contract import OneOf, Remember

if TYPE_CHECKING:
    from mergectl.methods._task_vectors import TaskVectors

_RANK_TOLERANCE = 1e-6  # directions of a stack of float32 vectors that are shorter than this are rounding
_SQUARED = 1e-6  # of the largest square: below it, squaring costs too many digits


def remembering(remember: Remember | None) -> Remember:
    """Return the lab's memory, or, where there is none, one that lasts as long as it is held."""
    return remember or _InMemory()


def plainly(
    what: str, task: str | None, weight: str, make: Callable[[], Sequence[torch.Tensor]]
) -> tuple[torch.Tensor, ...]:
    """Compute what is asked for and keep nothing: the memory of a method that asks for everything once."""
    return tuple(make())


class _InMemory:
    """What was made, by what it is, its task and its weight."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, str | None, str], tuple[torch.Tensor, ...]] = {}

    def __call__(
        self, what: str, task: str | None, weight: str, make: Callable[[], Sequence[torch.Tensor]]
    ) -> tuple[torch.Tensor, ...]:
        key = what, task, weight
        if key not in self._made:
            self._made[key] = tuple(make())
        return self._made[key]


class Factors(NamedTuple):
    """A thin singular value decomposition: x = left^T diag(values) right, the largest component first."""

    left: torch.Tensor  # [r, rows]
    values: torch.Tensor  # [r]
    right: torch.Tensor  # [r, columns]

    def top(self, count: int) -> Factors:
        """Return the largest components."""
        return Factors(self.left[:count], self.values[:count], self.right[:count])

    def scaled(self, factor: float) -> Factors:
        """Return the decomposition of a multiple; a negative one makes the values negative."""
        return Factors(self.left, self.values * factor, self.right)

    def turned(self, is_turned: bool = True) -> Factors:
        """Return the decomposition of the transposed matrix, or this one: what is kept is of weights as stored."""
        return Factors(self.right, self.values, self.left) if is_turned else self

    def product(self) -> torch.Tensor:
        """Return the matrix."""
        return (self.left.mT * self.values) @ self.right


def decompose(x: torch.Tensor, most: int | None = None) -> Factors:
    """Return the thin singular value decomposition of a matrix, or its largest components."""
    u, s, vt = torch.linalg.svd(x.double(), full_matrices=False)
    return Factors(*(part[:most].float().contiguous().cpu() for part in (u.mT, s, vt)))


def factors_of_sum(remember: Remember, name: str, x: torch.Tensor) -> Factors:
    """Return the decomposition of one weight of the sum of all task vectors."""
    return factors(remember, name, None, lambda: _kernels.total(x), "the sum", str(x.device))


def factors(
    remember: Remember,
    name: str,
    task: str | None,
    make: Callable[[], torch.Tensor],
    of: str = "",
    device: str = "cpu",
    most: int | None = None,
) -> Factors:
    """Return the decomposition of one weight of a task vector, or of the matrix `of` that all task vectors decide."""
    what, models = ("svd", task) if not of else (f"svd of {of}" + (f", {task}" if task else ""), None)
    found = remember(what, models, name, lambda: decompose(make(), most))
    return Factors(*(part.to(device) for part in found))


def factors_of_tasks(
    remember: Remember, name: str, tasks: Sequence[str], row: Callable[[int], torch.Tensor], of: str, device: str
) -> list[Factors]:
    """Return the decompositions of one weight of all task vectors, or of what `row` gives and `of` says in words."""
    makers = [functools.partial(row, number) for number in range(len(tasks))]
    return [factors(remember, name, task, make, of, device) for task, make in zip(tasks, makers, strict=True)]


def joined(parts: Sequence[Factors]) -> Factors:
    """Return all components of several decompositions as one, whose product is the sum of theirs."""
    return Factors(*(torch.cat(part) for part in zip(*parts, strict=True)))


def present(part: Factors) -> Factors:
    """Leave out the components that are nothing but rounding: a matrix of low rank says nothing of their directions."""
    if not len(part.values):
        return part
    floor = part.values[0] * torch.finfo(torch.float32).eps * max(part.left.shape[1], part.right.shape[1])
    return part.top(int((part.values > floor).sum()))


def polar(rows: torch.Tensor) -> torch.Tensor:
    """Return the nearest matrix with orthonormal rows (or columns, if those are fewer), in float64.

    It is P Q^T of the decomposition P S Q^T, without the directions in which the rows do not reach.
    """
    a = rows.double()
    wide = len(a) <= a.shape[1]
    values, vectors = torch.linalg.eigh(a @ a.mT if wide else a.mT @ a)
    reached = values > _RANK_TOLERANCE**2 * values.max() if len(values) else values.bool()
    root = vectors[:, reached] * values[reached].rsqrt() @ vectors[:, reached].mT
    result: torch.Tensor = root @ a if wide else a @ root
    if len(values) and values[reached].min() < _SQUARED * values.max():
        cube = (result @ result.mT) @ result if wide else result @ (result.mT @ result)
        result = 1.5 * result - 0.5 * cube  # a step of Newton and Schulz brings the digits back
    return result


def truncated(parts: Sequence[Factors], counts: Sequence[int], weights: Sequence[float]) -> torch.Tensor:
    """Return the weighted sum of decompositions, of each the largest components."""
    kept = [part.top(count).scaled(weight) for part, count, weight in zip(parts, counts, weights, strict=True)]
    return joined(kept).product()


def decorrelated(parts: Sequence[Factors], counts: Sequence[int], weights: Sequence[float]) -> torch.Tensor:
    """Return such a sum after the singular vectors of all its parts were made orthonormal together (TSV-M)."""
    kept = [present(part.top(count)) for part, count in zip(parts, counts, strict=True)]
    stack = joined([part.scaled(weight) for part, weight in zip(kept, weights, strict=True)])
    return ((polar(stack.left).mT * stack.values.double()) @ polar(stack.right)).float()


def isotropic(parts: Sequence[Factors]) -> torch.Tensor:
    """Return decompositions joined by orthonormal singular vectors, every singular value the mean of theirs (Iso-C)."""
    stack = joined([present(part) for part in parts])
    if not len(stack.values):
        return stack.product()
    return (stack.values.double().mean() * polar(stack.left).mT @ polar(stack.right)).float()


def ranks(ratio: float | Sequence[float] | None, full: int, tasks: int, least: int) -> list[int]:
    """Return how many of `full` components each task keeps: a ratio rounded down as int() does, or an equal share.

    A ratio of 0 keeps none and of 1 all of them, any other at least `least`.
    """
    if ratio is None:
        return [min(full, max(least, full // tasks))] * tasks
    return [
        int(share) * full if share in (0.0, 1.0) else min(full, max(least, int(share * full)))
        for share in _kernels.per_task(ratio, tasks)
    ]


# Which matrices are decomposed: a rule on the name. Linear layers are known from the model, or guessed.
RULES: dict[str, Callable[[str], bool] | None] = {
    "linear": None,
    "encoder": lambda name: not _linears.is_table(name) and not _is_norm(name),
    "full": lambda name: "token_type" not in name and not _is_norm(name),
    "attn_mlp": lambda name: ("attn" in name or "mlp" in name) and "ln" not in name and "bias" not in name,
    "all": lambda name: True,
}
Decompose = Annotated[
    str,
    OneOf(RULES),
    "which matrices are decomposed: of linear layers, all outside embeddings, those and token and position "
    "tables, those of attention and MLP by name, or all",
]


def _is_norm(name: str) -> bool:
    return "norm" in name.lower() or any(part.startswith("ln_") for part in name.split("."))


def decomposed(rule: str, linears: Mapping[str, bool] | None, task_vectors: TaskVectors) -> dict[str, bool]:
    """Return the weights that a rule decomposes, with True where one is stored transposed, [in, out]."""
    known, accepts = _linears.linear_weights(linears, task_vectors), RULES[rule]
    matrices = [name for name, shape in task_vectors.shapes.items() if len(shape) == 2 and min(shape) > 0]
    return {n: known.get(n, False) for n in matrices if (n in known if accepts is None else accepts(n))}
