"""Task vectors read one weight at a time, with figures of the whole model that stream too."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

Array: TypeAlias = "np.ndarray[Any, Any]"
Weigh: TypeAlias = "Callable[[Array], Array]"

_SAMPLED = 1 << 18  # elements per task that a sample has at least
_BLOCK = 1 << 18  # elements counted at once: their temporaries stay small, and near the processor


class TaskVectors(Mapping[str, "torch.Tensor"]):
    """A lazy ordered mapping: weight name -> tensor [task, *shape]. Nothing is kept between two readings.

    >>> x = TaskVectors(["a", "b"], {"w": (3,)}, lambda name: torch.tensor([[1.0, -4.0, 2.0], [0.0, 0.5, -0.5]]))
    >>> x.kth_magnitude([2, 1])
    [2.0, 0.5]
    >>> x.map(lambda name, w: 10 * w)["w"][0].tolist()
    [10.0, -40.0, 20.0]
    """

    def __init__(
        self,
        tasks: Sequence[str],
        shapes: Mapping[str, Sequence[int]],
        read: Callable[[str], torch.Tensor],
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        """Take the tasks in order, the shape of every weight, and a function that reads one weight.

        `sizes` is the number of elements of each weight where a name stands for a block of it.
        """
        self.tasks = tuple(tasks)
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._read = read
        self.sizes = sizes or {name: math.prod(shape) for name, shape in self.shapes.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        """Read one weight."""
        if name not in self.shapes:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        """Go through the names in order."""
        return iter(self.shapes)

    def __len__(self) -> int:
        """Return the number of weights."""
        return len(self.shapes)

    def __contains__(self, name: object) -> bool:
        """Say whether there is such a weight, without reading it."""
        return name in self.shapes

    @property
    def numel(self) -> int:
        """The number of elements of one task, over all weights."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def only(self, names: Iterable[str]) -> TaskVectors:
        """Return the same vectors restricted to some weights."""
        return TaskVectors(self.tasks, {name: self.shapes[name] for name in names}, self._read, self.sizes)

    def map(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> TaskVectors:
        """Return vectors changed weight by weight as they are read."""
        return TaskVectors(self.tasks, self.shapes, lambda name: change(name, self._read(name)), self.sizes)

    def sums(self, term: Callable[[int, Array], Array]) -> list[float]:
        """Return for each task the sum over all elements of `term(task number, elements in float64)`."""
        parts: list[list[float]] = [[] for _ in self.tasks]
        for rows in self._rows():
            for task, row in enumerate(rows):
                parts[task] += [float(term(task, block.astype(np.float64)).sum()) for block in _blocks(row)]
        return [math.fsum(part) for part in parts]  # exactly rounded, so the order of weights does not matter

    def square_norms(self) -> list[float]:
        """Return each task's squared norm over all weights."""
        return self.sums(lambda task, x: x * x)

    def means_and_deviations(self) -> tuple[list[float], list[float]]:
        """Return each task's mean and (unbiased) standard deviation over all elements."""
        means = [total / max(self.numel, 1) for total in self.sums(lambda task, x: x)]
        squares = self.sums(lambda task, x: (x - means[task]) ** 2)
        return means, [math.sqrt(square / max(self.numel - 1, 1)) for square in squares]

    def kth_magnitude(self, ranks: Sequence[int]) -> list[float]:
        """Return each task's k-th largest magnitude over all weights, exactly; infinity for k = 0.

        A sample says between which bounds it must lie; one pass counts what is above them and collects what is
        between. Where a bound was wrong, two passes count the float32 bit patterns by their halves instead.
        """
        if len(self) == 1:
            rows = next(self._rows())
            return [_kth_largest(np.abs(row), rank) for row, rank in zip(rows, ranks, strict=True)]
        found = self._between(ranks, self._bounds(ranks)) if self.numel > _SAMPLED else [None] * len(self.tasks)
        if any(value is None for value in found):
            exact = self._magnitudes([float(rank) for rank in ranks], None)
            return [value if known is None else known for known, value in zip(found, exact, strict=True)]
        return [value for value in found if value is not None]

    def _bounds(self, ranks: Sequence[int]) -> list[tuple[float, float]]:
        """Return per task bounds that hold its k-th largest magnitude almost surely: ten deviations of a sample."""
        some = self.only(list(self)[:: max(1, min(4, len(self) // 16))])
        step = max(1, some.numel // _SAMPLED)
        parts = [[np.abs(row[place % step :: step]) for row in rows] for place, rows in enumerate(some._rows())]
        bounds = []
        for task, rank in enumerate(ranks):
            sample = np.sort(np.concatenate([part[task] for part in parts]))
            share = rank / self.numel
            margin = 10 * math.sqrt(len(sample) * share * max(1 - share, 0)) + 8
            place = len(sample) * (1 - share)
            low, high = int(place - margin), int(place + margin)
            bounds.append((
                float(sample[low]) if low >= 0 else 0.0,
                float(sample[high]) if high < len(sample) else math.inf,
            ))  # fmt: skip
        return bounds

    def _between(self, ranks: Sequence[int], bounds: Sequence[tuple[float, float]]) -> list[float | None]:
        """Return per task the k-th largest magnitude if it lies within the bounds."""
        above = [0] * len(self.tasks)
        kept: list[list[Array]] = [[] for _ in self.tasks]
        for rows in self._rows():
            for task, (row, (low, high)) in enumerate(zip(rows, bounds, strict=True)):
                for block in _blocks(row):
                    size = np.abs(block)
                    over = size > high
                    above[task] += int(np.count_nonzero(over))
                    kept[task].append(size[np.flatnonzero((size >= low) ^ over)])
        found: list[float | None] = []
        for rank, larger, parts in zip(ranks, above, kept, strict=True):
            between = np.concatenate(parts)
            inside = 0 < rank - larger <= len(between)
            found.append(_kth_largest(between, rank - larger) if inside else math.inf if rank <= 0 else None)
        return found

    def energy_magnitude(self, shares: Sequence[float]) -> list[float]:
        """Return each task's largest magnitude down to which its elements hold a share of its squared norm."""
        norms = self.square_norms()
        # The slack keeps a share that is met exactly from being missed by the rounding of the sums.
        targets = [n * s * (1 - 1e-13) if s < 1 else math.inf for s, n in zip(shares, norms, strict=True)]
        return self._magnitudes(targets, np.square)

    def _magnitudes(self, targets: list[float], weigh: Weigh | None) -> list[float]:
        """Return per task the magnitude at which elements that large weigh the target together (or number it)."""
        upper = self._histogram(weigh)
        found = [_reach(row, target) for row, target in zip(upper, targets, strict=True)]
        lower = self._histogram(weigh, [bucket for bucket, _ in found])
        bits = [(bucket << 16) + _reach(row, rest)[0] for (bucket, rest), row in zip(found, lower, strict=True)]
        values = [float(np.uint32(pattern).view(np.float32)) for pattern in bits]
        return [value if target > 0 else math.inf for value, target in zip(values, targets, strict=True)]

    def _histogram(self, weigh: Weigh | None, within: Sequence[int] | None = None) -> Array:
        """Return per task and upper half pattern how many elements there are, or what they weigh.

        With the upper half patterns to look `within`, one per task, count by the lower half instead.
        """
        result = np.zeros((len(self.tasks), 1 << 16))
        for rows in self._rows():
            for task, row in enumerate(rows):
                for block in _blocks(row):
                    bits = np.abs(block).view(np.uint32)
                    slots = bits >> 16
                    if within is not None:
                        bits = bits[slots == within[task]]
                        slots = bits & 0xFFFF
                    weights = None if weigh is None else weigh(bits.view(np.float32).astype(np.float64))
                    result[task] += np.bincount(slots.astype(np.int64), weights, minlength=1 << 16)
        return result

    def _rows(self) -> Iterator[Array]:
        """Read the weights one after the other as flat float32 numbers [task, elements]."""
        for name in self:
            yield self[name].detach().cpu().float().reshape(len(self.tasks), -1).numpy()


def _blocks(row: Array) -> Iterator[Array]:
    """Cut a row into blocks of bounded size."""
    return (row[start : start + _BLOCK] for start in range(0, len(row), _BLOCK))


def _reach(weights: Array, target: float) -> tuple[int, float]:
    """Return the highest slot at which the weight from the top reaches the target, and what it still has to give."""
    from_top = np.cumsum(weights[::-1])
    place = min(int(np.searchsorted(from_top, target)), len(weights) - 1)
    return len(weights) - 1 - place, target - (float(from_top[place - 1]) if place else 0.0)


def _kth_largest(magnitudes: Array, rank: int) -> float:
    """Return the k-th largest number of a row: infinity for k = 0, 0 where there are fewer."""
    if rank <= 0:
        return math.inf
    if rank > len(magnitudes):
        return 0.0
    return float(np.partition(magnitudes, len(magnitudes) - rank)[len(magnitudes) - rank])
