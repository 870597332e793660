"""More arithmetic shared by methods: directions, windows of ranks, weighted agreement.

Sums over a weight end in float64, so that they do not depend on the number of threads.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from mergectl.methods import _fused, _kernels
from mergectl.methods._contract import MethodError

if TYPE_CHECKING:
    from mergectl.methods._contract import Weights
    from mergectl.methods._task_vectors import Rows, TaskVectors

Array: TypeAlias = "np.ndarray[Any, Any]"

_TOGETHER = 1 << 22  # elements of weights whose inner products are taken in one go


def norm(row: Array) -> Array:
    """Return the length of each vector along the last axis, that axis kept."""
    length: Array = np.sqrt((row * row).sum(-1, keepdims=True))
    return length


def cosines(products: Array) -> Array:
    """Return the cosines of all pairs of vectors from their inner products; a zero vector has cosine 0 with all."""
    lengths = np.sqrt(np.diag(products))
    unit = np.where(lengths > 0, 1 / np.where(lengths > 0, lengths, 1.0), 0.0)
    result: Array = products * unit[:, None] * unit[None, :]
    return result


def arc(dot: Array, a: Array, b: Array, t: float) -> tuple[Array, Array]:
    """Return the factors of two vectors for the point at share t of the arc between them, of the line if parallel.

    Taken from their inner product and their lengths.
    """
    lengths = a * b
    cosine = (dot / np.where(lengths > 0, lengths, 1.0)).clip(-1, 1)
    angle = np.arccos(cosine)
    parallel = (np.sin(angle) < 1e-8) | (lengths == 0)
    sine = np.where(parallel, 1.0, np.sin(angle))
    from_a = np.where(parallel, 1 - t, np.sin((1 - t) * angle) / sine)
    from_b = np.where(parallel, t, np.sin(t * angle) / sine)
    return from_a, from_b


def blend(
    vectors: TaskVectors, factors: Callable[[Array], Sequence[float]], base: Weights | None = None
) -> Iterator[Any]:
    """Yield for each weight its rows times the factors that a function makes of their inner products, on a base."""

    def of_weights(part: TaskVectors) -> Iterator[Any]:
        made = {weight: factors(products) for weight, products in part.products_by_weight().items()}
        return part.each_sum(functools.partial(_blended, made, part, base))

    return vectors.per_weight(of_weights, _TOGETHER)


def _blended(
    made: Mapping[str, Sequence[float]], part: TaskVectors, base: Weights | None, name: str, rows: Rows
) -> torch.Tensor:
    result = _kernels.weighted_total(rows, made[part.weight_of(name)[0]])
    return result if base is None else base[name] + result


def shares(weights: Sequence[float], called: str = "weights") -> list[float]:
    """Return weights divided by their sum; refuse such as add up to nothing."""
    whole = sum(weights)
    if abs(whole) < 1e-8:
        raise MethodError(
            f"The {called} of the experts add up to zero, so they cannot be divided by their sum. Change one of them."
        )
    return [weight / whole for weight in weights]


@dataclass(frozen=True)
class Edge:
    """A magnitude at which a window of ranks begins or ends: how many are larger, and who equals it how often."""

    value: float
    above: int
    before: Mapping[str, int]  # entries that equal it in the weight's earlier blocks


def edges(part: TaskVectors, skips: Sequence[int], counts: Sequence[int]) -> list[list[Edge]]:
    """Return for each task the smallest and the largest magnitude of a weight's `count` entries after `skip`."""
    ends = [[skip + count for skip, count in zip(skips, counts, strict=True)], [skip + 1 for skip in skips]]
    values = part.kth_magnitudes(ends)
    pairs = [sorted({values[0][task], values[1][task]}) for task in range(len(part.tasks))]

    def count(rows: Array) -> list[list[tuple[int, int]]]:
        sizes = np.abs(rows)
        return [
            [(int(np.count_nonzero(s > v)), int(np.count_nonzero(s == v))) for v in wanted]
            for s, wanted in zip(sizes, pairs, strict=True)
        ]

    found = part.gather(count)
    result = []
    for task, wanted in enumerate(pairs):
        of_task = []
        for place, value in enumerate(wanted):
            equal = [unit[task][place][1] for unit in found]
            before = dict(zip(part, itertools.accumulate(equal, initial=0), strict=False))
            of_task.append(Edge(value, sum(unit[task][place][0] for unit in found), before))
        result.append(of_task)
    return result


def within(name: str, row: torch.Tensor, ends: Sequence[Edge], skip: int, count: int) -> torch.Tensor:
    """Keep the `count` entries after the `skip` largest; of equal ones the earlier count first."""
    sizes = np.abs(row.detach().cpu().float().reshape(-1).numpy())
    kept = (sizes > ends[0].value) & (sizes < ends[-1].value)
    for edge in ends:
        first = skip - edge.above - edge.before[name]
        places = np.flatnonzero(sizes == edge.value)
        kept[places[max(first, 0) : max(first + count, 0)]] = True
    return row * torch.from_numpy(kept).to(row).reshape(row.shape)


def ranks(x: torch.Tensor) -> torch.Tensor:
    """Return each entry's place, from 0, among the magnitudes of its row (the last dimension), the smallest first."""
    order = _order_of(x.abs())
    places = torch.arange(x.shape[-1], device=x.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def _order_of(sizes: torch.Tensor) -> torch.Tensor:
    """Return where each row's smallest entry stands, the next one, and so on; of equal ones the first comes first.

    On the processor magnitudes are sorted with their places as one number: NumPy sorts such six times faster.
    """
    if sizes.dtype != torch.float32 or not sizes.is_cpu:
        return sizes.argsort(dim=-1, stable=True)
    numbers = sizes.contiguous().numpy().view(np.uint32).astype(np.uint64)  # bits of magnitudes are in their order
    numbers <<= np.uint64(32)
    numbers |= np.arange(sizes.shape[-1], dtype=np.uint64)
    numbers.sort(axis=-1)
    numbers &= np.uint64(0xFFFFFFFF)
    return torch.from_numpy(numbers.view(np.int64))


def to_mass(rest: TaskVectors, whole: TaskVectors) -> TaskVectors:
    """Scale what is left of each weight to the weight's own sum of magnitudes."""
    ratios: dict[str, list[float]] = {}
    for part in whole.by_weight():
        pairs = zip(part.sums(_magnitudes), rest.only(part).sums(_magnitudes), strict=True)
        found = [before / after if before > 0 and after > 0 else 1.0 for before, after in pairs]
        ratios.update(dict.fromkeys(part, found))
    return rest.map(lambda name, x: x * _kernels.column(ratios[name], x))


def _magnitudes(task: int, x: Array) -> Array:
    return np.abs(x)


def weighted_agreeing_mean(x: torch.Tensor, weights: Sequence[float], sign: torch.Tensor | None) -> torch.Tensor:
    """Return the sum of weighted entries that agree with the sign, divided by the sum of their weights."""
    if sign is not None and _fused.fits(x):
        signed, votes = _kernels.fused_sums(x, sign, weights)
    else:
        sums, votes = torch.zeros_like(x[0]), torch.zeros_like(x[0])
        for row, weight in zip(x, weights, strict=True):
            part = _kernels.agreeing(row, sign)
            sums += part
            votes.add_(_kernels.nonzero(part), alpha=weight)
        signed = sums if sign is None else sums.mul_(sign)
    return signed.div_(votes.add_(1 - _kernels.nonzero(votes)))  # divided by 1 where nobody votes
