"""Task vectors read one weight at a time, with figures of the whole model that stream too.

A name stands for a weight, or for a block of one where the method said that blocks are enough (its fact BLOCKS).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from mergectl.methods import _kth, _order
from mergectl.methods._stored import Stored

Array: TypeAlias = "np.ndarray[Any, Any]"
Rows: TypeAlias = "Sequence[torch.Tensor] | torch.Tensor"  # one per task

_CHUNK = 1 << 17  # elements summed at once: a sum is the same whether weights come whole or in blocks
_RUN = 1 << 10  # elements whose inner products are taken in their own type
_LONG = 1 << 17  # elements from which on they are
_SHARES = 16  # a weight of less than this part of the whole is the work of one thread


class TaskVectors(Mapping[str, "torch.Tensor"]):
    """A lazy ordered mapping: weight name -> tensor [task, *shape]. Nothing is kept between two readings.

    >>> x = TaskVectors(["a", "b"], {"w": (3,)}, lambda name: torch.tensor([[1.0, -4.0, 2.0], [0.0, 0.5, -0.5]]))
    >>> x.kth_magnitude([2, 1])
    [2.0, 0.5]
    >>> x.map(lambda name, w: 10 * w)["w"][0].tolist()
    [10.0, -40.0, 20.0]
    >>> [(name, w.tolist()) for name, w in x.each(lambda name, w: w.sum(0))]
    [('w', [1.0, -3.5, 1.5])]
    """

    def __init__(
        self,
        tasks: Sequence[str],
        shapes: Mapping[str, Sequence[int]],
        read: Callable[[str], torch.Tensor],
        *,
        lend: Callable[[str], Rows] | None = None,
        sample: Callable[[str, int], Array] | None = None,
        wholes: Mapping[str, tuple[str, int]] | None = None,
        spread: Callable[..., Iterable[Any]] = map,
        finish: Callable[[str, Any], Any] | None = None,
    ) -> None:
        """Take the tasks in order, the shape of every weight, and a function that reads one weight.

        From the lab: `lend`, which reads a weight's rows where they lie, unchecked; `sample`, which reads one entry in
        so many; `wholes`, the weight and its number of elements for each name that stands for a block; `spread`, a
        `map` that works in several threads; `finish`, what becomes of a result at once, in the thread it was made in.
        """
        self.tasks = tuple(tasks)
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._read, self._lend, self._sample = read, lend or read, sample
        self._wholes, self._spread, self._finish = wholes or {}, spread, finish

    def __getitem__(self, name: str) -> torch.Tensor:
        """Read one weight."""
        if name not in self.shapes:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        """Go through the names in order."""
        return iter(self.shapes)

    def __len__(self) -> int:
        """Return the number of names."""
        return len(self.shapes)

    def __contains__(self, name: object) -> bool:
        """Say whether there is such a weight, without reading it."""
        return name in self.shapes

    @functools.cached_property
    def numel(self) -> int:
        """The number of elements of one task, over all weights."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def weight_of(self, name: str) -> tuple[str, int]:
        """Return the name and the number of elements of the whole weight that a name belongs to."""
        return self._wholes.get(name) or (name, math.prod(self.shapes[name]))

    def _with(
        self,
        shapes: Mapping[str, Sequence[int]],
        read: Callable[[str], torch.Tensor],
        lend: Callable[[str], Rows] | None = None,
        sample: Callable[[str, int], Array] | None = None,
    ) -> TaskVectors:
        lab = {"wholes": self._wholes, "spread": self._spread, "finish": self._finish}
        return TaskVectors(self.tasks, shapes, read, lend=lend, sample=sample, **lab)  # type: ignore[arg-type]

    def only(self, names: Iterable[str]) -> TaskVectors:
        """Return the same vectors restricted to some weights."""
        return self._with({name: self.shapes[name] for name in names}, self._read, self._lend, self._sample)

    def by_weight(self, together: int = 1) -> Iterator[TaskVectors]:
        """Go through the weights: each as vectors of its own, in its blocks; or as many as have so many elements."""
        names: list[str] = []
        count, last = 0, ""
        for name in self:
            weight, size = self.weight_of(name)
            if weight != last and count >= together:
                yield self.only(names)
                names, count = [], 0
            count += size if weight != last else 0
            names.append(name)
            last = weight
        if names:
            yield self.only(names)

    def per_weight(self, work: Callable[[TaskVectors], Iterable[Any]], together: int = 1) -> Iterator[Any]:
        """Yield all that work on each weight's own vectors gives, in order.

        Each is the work of one thread; but that of a large weight is shared among all, block by block.
        """
        waiting, whole = list[TaskVectors](), self.numel
        for part in self.by_weight(together):
            if part.numel * _SHARES < whole:
                waiting.append(part)
                continue
            yield from self._finished(work, waiting)
            yield from work(part)
            waiting = []
        yield from self._finished(work, waiting)

    def _finished(self, work: Callable[[TaskVectors], Iterable[Any]], parts: Sequence[TaskVectors]) -> Iterator[Any]:
        return itertools.chain.from_iterable(self._spread(lambda part: list(work(part)), parts))

    def map(self, change: Callable[[str, torch.Tensor], torch.Tensor], *, by_entry: bool = False) -> TaskVectors:
        """Return vectors changed weight by weight as they are read.

        `by_entry`: what becomes of an entry depends on those of the same place alone, so some may be read without the
        rest.
        """

        def some(name: str, step: int) -> Array:
            return _kth.numbers(change(name, torch.from_numpy(self.sample(name, step))))

        sample = some if by_entry else None
        return self._with(self.shapes, lambda name: change(name, self._read(name)), sample=sample)

    def sample(self, name: str, step: int) -> Array:
        """Return one entry in `step` of a weight, as `_order.thinned` spreads them, in float32: [task, elements]."""
        return _order.thinned(_kth.numbers(self[name]), step) if self._sample is None else self._sample(name, step)

    def reading(
        self,
        read: Callable[[str], torch.Tensor],
        tasks: Sequence[str] | None = None,
        lend: Callable[[str], Rows] | None = None,
    ) -> TaskVectors:
        """Return vectors of the same names and shapes that are read otherwise."""
        found = self._with(self.shapes, read, lend)
        found.tasks = self.tasks if tasks is None else tuple(tasks)
        return found

    def row(self, function: Callable[[str, torch.Tensor], torch.Tensor]) -> TaskVectors:
        """Return vectors of a single row, which a function makes of every weight's rows."""
        return self.reading(lambda name: function(name, self._read(name))[None], ("all",))

    def each(self, function: Callable[[str, torch.Tensor], Any]) -> Iterator[Any]:
        """Yield every name, in order, with what `function(name, x)` gives (a tuple: with all that is in it).

        Several threads work at once: the function may read what is outside it, but changes nothing there that another
        call reads. What it is given is lent to it: the next weight is read into the same memory.
        """
        return self._each(function, self._read)

    def each_sum(self, function: Callable[[str, Rows], torch.Tensor]) -> Iterator[Any]:
        """Do what `each` does, for a function that adds up the rows: it is given them where they lie, not stacked.

        The lab looks at the sum for what is not finite, instead of at every row.
        """
        return self._each(function, self._lend)

    def _each(self, function: Callable[[str, Any], Any], read: Callable[[str], Any]) -> Iterator[Any]:
        def work(name: str) -> Any:
            result = function(name, read(name))
            return result if self._finish is None else self._finish(name, result)

        names = list(self)
        for name, result in zip(names, self._spread(work, names), strict=True):
            yield (name, *result) if isinstance(result, tuple) else (name, result)

    def survey(self, function: Callable[[str, torch.Tensor], Any]) -> list[Any]:
        """Return what `function(name, x)` says of every weight, in order; it keeps nothing of what it is lent."""
        return list(self._spread(lambda name: function(name, self._read(name)), list(self)))

    def survey_lent(self, function: Callable[[Rows], Any]) -> list[Any]:
        """Return what a function says of every weight's rows as they are lent, unchecked, in order."""
        return list(self._spread(lambda name: function(self._lend(name)), list(self)))

    def gather(self, function: Callable[[Array], Any]) -> list[Any]:
        """Return what a function says of every weight's flat float32 numbers [task, elements], in order."""
        return self.survey(lambda name, x: function(_kth.numbers(x)))

    def spread(self, work: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """Return what work on each item gives, in order; several threads may share it."""
        return list(self._spread(work, items))

    def sums(self, term: Callable[[int, Array], Array]) -> list[float]:
        """Return for each task the sum over all elements of `term(task number, elements in float64)`."""

        def parts(rows: Array) -> list[list[float]]:
            return [[float(term(t, part.astype(np.float64)).sum()) for part in chunks(r)] for t, r in enumerate(rows)]

        found = self.gather(parts)  # fsum is exactly rounded, so the order of weights does not matter
        return [math.fsum(x for unit in found for x in unit[task]) for task in range(len(self.tasks))]

    def square_norms(self) -> list[float]:
        """Return each task's squared norm over all weights."""
        return self.sums(lambda task, x: x * x)

    def products(self) -> Array:
        """Return the inner products of all pairs of tasks over all weights, [task, task] in float64."""
        return _added(list(self._spread(self._products, list(self))), len(self.tasks))

    def products_by_weight(self) -> dict[str, Array]:
        """Return those of each weight."""
        found: dict[str, list[list[list[float]]]] = {}
        for name, part in zip(self, self._spread(self._products, list(self)), strict=True):
            found.setdefault(self.weight_of(name)[0], []).append(part)
        return {weight: _added(parts, len(self.tasks)) for weight, parts in found.items()}

    def _products(self, name: str) -> list[list[float]]:
        """Return the inner products within a weight."""
        lent = self._lend(name)
        found = lent.inner() if isinstance(lent, Stored) and lent.looped else _inner(lent)
        if not np.isfinite(found).all():
            self._read(name)  # says which model holds what is not finite
            found = _inner([row.double() for row in lent])
        return found

    def means_and_deviations(self) -> tuple[list[float], list[float]]:
        """Return each task's mean and (unbiased) standard deviation over all elements."""
        means = [total / max(self.numel, 1) for total in self.sums(lambda task, x: x)]
        squares = self.sums(lambda task, x: (x - means[task]) ** 2)
        return means, [math.sqrt(square / max(self.numel - 1, 1)) for square in squares]

    def kth_magnitude(self, ranks: Sequence[int]) -> list[float]:
        """Return each task's k-th largest magnitude over all weights, exactly; infinity for k = 0."""
        return [max(value, 0.0) for value in self.kth_magnitudes([ranks])[0]]

    def kth_magnitudes(self, ranks: Sequence[Sequence[int]]) -> list[list[float]]:
        """Do what `kth_largest` does, for magnitudes."""
        return _kth.largest(self, ranks, magnitudes=True)

    def kth_largest(self, ranks: Sequence[Sequence[int]], counted: _kth.Counted | None = None) -> list[list[float]]:
        """Return for each list of ranks (one per task) each task's k-th largest entry over all weights, exactly.

        The first is k = 1; k = 0 gives infinity, and k beyond the last entry minus infinity. `counted(name, bounds)`
        may be quicker than reading a weight: for each task it counts and collects entries between pairs of bounds.
        """
        return _kth.largest(self, ranks, magnitudes=False, counted=counted)

    def energy_magnitude(self, shares: Sequence[float]) -> list[float]:
        """Return each task's largest magnitude down to which its elements hold a share of its squared norm."""
        norms = self.square_norms()
        # The slack keeps a share that is met exactly from being missed by the rounding of the sums.
        targets = [n * s * (1 - 1e-13) if s < 1 else math.inf for s, n in zip(shares, norms, strict=True)]
        return [max(value, 0.0) for value in _kth.reach(self, targets, np.square, np.abs)]


def chunks(row: Array) -> Iterator[Array]:
    """Cut the last dimension into parts of bounded size."""
    return (row[..., start : start + _CHUNK] for start in range(0, row.shape[-1], _CHUNK))


def _inner(lent: Rows) -> list[list[float]]:
    """Return the inner products of all pairs of rows: those of short runs in their own type, summed in float64.

    The rounding of very many runs averages out; of few it would not, so these are taken in float64.
    """
    rows = [row if row.dim() == 1 else row.reshape(-1) for row in lent]
    rows = rows if len(rows[0]) >= _LONG else [row.double() for row in rows]
    run = math.gcd(len(rows[0]), _RUN) or 1
    pairs = list(itertools.combinations_with_replacement(range(len(rows)), 2))
    across = [row.view(-1, 1, run) for row in rows]
    down = [row.transpose(1, 2) for row in across]
    sums = torch.stack([torch.bmm(across[i], down[j]) for i, j in pairs]).sum((1, 2, 3), dtype=torch.float64)
    found = dict(zip(pairs, sums.tolist(), strict=True))
    return [[found[min(i, j), max(i, j)] for j in range(len(rows))] for i in range(len(rows))]


def _added(parts: Sequence[Sequence[Sequence[float]]], tasks: int) -> Array:
    """Return the sum of matrices, exactly rounded, so that their order does not matter; the same on both sides."""
    result = np.zeros((tasks, tasks))
    for i in range(tasks):
        for j in range(i, tasks):
            result[i, j] = result[j, i] = math.fsum(part[i][j] for part in parts)
    return result
