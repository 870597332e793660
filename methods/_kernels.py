"""Arithmetic shared by the methods: pure functions on one weight, stacked over tasks as [task, *shape].

Sums over tasks run one task at a time, in task order and in the type of the weights (float32 at least). The sign that
they elect is that of a sum in float64, so that float32 entries of ordinary range elect the same in any order. Masks
are numbers (1 where true) because torch compares into numbers several times faster than into booleans.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from mergectl.methods import _fused
from mergectl.methods._stored import Stored

Array: TypeAlias = "np.ndarray[Any, Any]"

# A share such as 1 - 0.8 lies a few units of 2**-53 below the number that was meant, and so may its product with a
# count: 7600 * (1 - 0.8) is 1519.9999999999998. That much is forgiven before rounding down.
SLACK = 2.0**-51

_RUN = 512  # entries that are added up in their own type


def count_share(share: float, count: int) -> int:
    """Return the whole number of elements in a share of `count`, rounded down."""
    return min(count, math.floor((share + SLACK) * count))


def per_task(value: float | Sequence[float], tasks: int) -> list[float]:
    """Return one number per task for a setting that may be shared."""
    return [float(v) for v in value] if isinstance(value, Sequence) else [float(value)] * tasks


def column(values: Sequence[float], x: torch.Tensor) -> torch.Tensor:
    """Return one number per task, shaped so that it spreads over [task, *shape]."""
    return torch.tensor(values, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.dim() - 1))


def total(x: torch.Tensor) -> torch.Tensor:
    """Return the sum over tasks, in float64."""
    result = x[0].to(torch.float64, copy=True)
    for row in x[1:]:
        result += row.double()
    return result


def weighted_total(x: torch.Tensor | Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Return the sum over tasks of each task's row times its weight."""
    if isinstance(x, Stored):
        return x.weighted_total(weights)
    result = x[0] * weights[0]
    for row, weight in zip(x[1:], weights[1:], strict=True):
        result.add_(row, alpha=weight)
    return result


def mean(x: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the mean over tasks; that of copies is the copy bit for bit, that of two is rounded once."""
    if isinstance(x, Stored):
        return x.mean()
    if len(x) == 1:
        return x[0].clone()
    result = (x[0] + x[1]).mul_(0.5)
    for number, row in enumerate(x[2:], 3):
        result.lerp_(row, 1 / number)
    return result


def plain_sum(x: torch.Tensor) -> torch.Tensor:
    """Return the sum over tasks."""
    if len(x) == 1:
        return x[0].clone()
    result = x[0] + x[1]
    for row in x[2:]:
        result += row
    return result


def lower_median(x: torch.Tensor) -> torch.Tensor:
    """Return the median over tasks; for an even number of tasks the lower of the two middle values."""
    return x.sort(dim=0).values[(len(x) - 1) // 2]


def largest(x: torch.Tensor) -> torch.Tensor:
    """Return the entry of largest magnitude over tasks, the first task's where two are equal."""
    best = x[0].clone()
    for row in x[1:]:
        best = torch.where(row.abs() > best.abs(), row, best)
    return best


def just_below(floors: Sequence[float]) -> list[float]:
    """Return for each magnitude the next smaller one: what is above that is not below the magnitude."""
    return [float(np.nextafter(np.float32(floor), np.float32(-1))) for floor in floors]


def keep_top(x: torch.Tensor, floors: Sequence[float], *, strictly: bool = False) -> torch.Tensor:
    """Keep each task's entries of at least its magnitude floor (or above it), zero the rest."""
    return keep_above(x, floors if strictly else just_below(floors))


def keep_above(x: torch.Tensor, floors: Sequence[float]) -> torch.Tensor:
    """Keep each task's entries of a magnitude above its floor, zero the rest."""
    result = torch.empty_like(x)
    for row, kept, floor in zip(x, result, floors, strict=True):
        if floor < 0:
            kept.copy_(row)
        else:
            torch.hardshrink(row, floor, out=kept)
    return result


def keep_outliers(x: torch.Tensor, centres: Sequence[float], distances: Sequence[float]) -> torch.Tensor:
    """Keep each task's entries further than a distance from a centre, zero the rest."""
    return torch.where((x - column(centres, x)).abs() > column(distances, x), x, 0)


def elect_by_mass(x: torch.Tensor) -> torch.Tensor:
    """Return the sign of the sum over tasks: -1, 0 or 1.

    It is that of the sum in float64, which is taken only where rounding could change the sign of one in float32.
    """
    if _fused.fits(x):
        _fused.elect_by_mass(_fused.rows_of(x), (sign := torch.empty_like(x[0])).view(-1).numpy())
        return sign
    if x.dtype != torch.float32:
        return total(x).sign_().to(x.dtype)
    sums, mass, size = plain_sum(x), x[0].abs(), torch.empty_like(x[0])
    for row in x[1:]:
        mass += torch.abs(row, out=size)
    unsure = torch.lt(torch.abs(sums, out=size), mass.mul_(len(x) * 2.0**-23), out=mass)
    sign = sums.sign_()
    if float(unsure.sum()) > 0:
        places = unsure.reshape(-1).nonzero().reshape(-1)
        sign.view(-1)[places] = total(x.reshape(len(x), -1)[:, places]).sign_().to(x.dtype)
    return sign


def elect_by_share(x: torch.Tensor, square_norms: Sequence[float]) -> torch.Tensor:
    """Return the sign of the entry with the largest share of its task's squared norm; a zero task has no vote."""
    best = torch.zeros(x.shape[1:], dtype=torch.float64, device=x.device)
    sign = torch.zeros_like(x[0])
    for row, norm in zip(x, square_norms, strict=True):
        share = row.double().square_().div_(norm or 1.0)
        sign = torch.where(share > best, row.sign(), sign)
        best = torch.maximum(best, share)
    return sign


def elect_by_share_mass(x: torch.Tensor, square_norms: Sequence[float]) -> torch.Tensor:
    """Return the sign of the sum over tasks of signed shares of the squared norm; a zero task has no vote."""
    mass = torch.zeros(x.shape[1:], dtype=torch.float64, device=x.device)
    for row, norm in zip(x, square_norms, strict=True):
        wide = row.double()
        mass += wide * wide.abs() / (norm or 1.0)
    return mass.sign().to(x.dtype)


def agreeing(x: torch.Tensor, sign: torch.Tensor | None, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return the magnitudes of entries that have the elected sign, 0 elsewhere; all entries without one."""
    if sign is None:
        return x if out is None else out.copy_(x)
    return torch.mul(x, sign, out=out).clamp_(min=0)


def nonzero(x: torch.Tensor) -> torch.Tensor:
    """Return 1 where an entry is not zero, else 0."""
    return torch.ne(x, 0, out=torch.empty_like(x))


def positive(x: torch.Tensor) -> torch.Tensor:
    """Return where entries are above zero, as booleans."""
    return torch.from_numpy(x.numpy() > 0) if x.device.type == "cpu" else x > 0


def chosen(generator: torch.Generator, chance: float | torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return 1 where a draw chooses, each time with the given chance, or each entry with its own, else 0.

    Sixteen random bits decide all but one draw in 65536, which looks at 53 more. NumPy's SFC64 gives them, seeded by
    the generator: it is several times faster than torch's own, and its stream will not change with a version.
    """
    bits, stream = _bits(generator, math.prod(shape))
    exact = np.asarray(chance, dtype=np.float64).reshape(-1) * 65536
    whole = np.minimum(np.floor(exact), 65535).astype(np.uint16)
    edge = np.flatnonzero(bits == whole)
    picked = np.less(bits, whole)
    picked[edge] = np.random.Generator(stream).random(len(edge)) < np.broadcast_to(exact - whole, bits.shape)[edge]
    return torch.from_numpy(picked.astype(np.float32)).reshape(tuple(shape))


def keep_chosen(generator: torch.Generator, chance: float, row: torch.Tensor, scale: float, out: torch.Tensor) -> None:
    """Put a row's entries that `chosen` would choose, times a scale, into other memory, and zeros elsewhere."""
    if not (_fused.fits(row) and _fused.fits(out)):
        torch.mul(row, chosen(generator, chance, row.shape).to(row.device), out=out).mul_(scale)
        return
    bits, stream = _bits(generator, row.numel())
    whole, entries, kept = min(math.floor(chance * 65536), 65535), row.reshape(-1).numpy(), out.view(-1).numpy()
    room = np.empty(len(entries), np.int64)
    edge = room[: _fused.keep_chosen(entries, bits, np.uint16(whole), np.float32(scale), kept, room)]
    kept[edge] *= np.random.Generator(stream).random(len(edge)) < chance * 65536 - whole


def _bits(generator: torch.Generator, count: int) -> tuple[Array, np.random.BitGenerator]:
    """Return sixteen random bits for each of so many draws, and the stream that gives more."""
    stream = np.random.SFC64(generator.initial_seed())
    return stream.random_raw(-(-count // 4)).astype("<u8", copy=False).view("<u2")[:count], stream


def agreeing_sum(x: torch.Tensor, sign: torch.Tensor | None) -> torch.Tensor:
    """Return the sum over tasks of the entries that agree with the sign."""
    sums, _ = _agreeing_sums(x, sign)
    return sums


def agreeing_mean(x: torch.Tensor, sign: torch.Tensor | None) -> torch.Tensor:
    """Return the mean over tasks of the entries that agree with the sign, 0 where there are none."""
    sums, votes = _agreeing_sums(x, sign)
    return sums.div_(votes.clamp_(min=1))


def _agreeing_sums(x: torch.Tensor, sign: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum over tasks of the entries that agree, and how many there are."""
    if sign is not None and _fused.fits(x):
        return fused_sums(x, sign, [1.0] * len(x))
    sums, votes = torch.zeros_like(x[0]), torch.zeros_like(x[0])
    part = torch.empty_like(x[0])
    for row in x:
        sums += agreeing(row, sign, part)
        votes += part.sign_() if sign is not None else part.abs_().sign_()
    return sums if sign is None else sums.mul_(sign), votes


def fused_sums(x: torch.Tensor, sign: torch.Tensor, weights: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum over tasks of the entries that agree, and of the tasks' weights, in one pass."""
    sums, votes = torch.empty_like(x[0]), torch.empty_like(x[0])
    flat = [row.reshape(-1).numpy() for row in (sign, sums, votes)]
    _fused.agreeing_sums(_fused.rows_of(x), flat[0], np.array(weights, np.float32), *flat[1:])
    return sums, votes


def agreeing_largest(x: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
    """Return the largest entry over tasks among those that agree with the sign, 0 where there are none."""
    return agreeing(x, sign).amax(dim=0).mul_(sign)


def row_sums(x: torch.Tensor) -> list[float]:
    """Return each row's sum, in float64 from sums of runs that are short enough for the type of the entries."""
    rows = x.reshape(len(x), -1)
    even = rows.shape[1] - rows.shape[1] % _RUN
    runs = rows[:, :even].view(len(x), -1, _RUN).sum(dim=2).sum(dim=1, dtype=torch.float64)
    return [float(total) for total in runs + rows[:, even:].sum(dim=1, dtype=torch.float64)]


def balance(signs: torch.Tensor) -> int:
    """Return how many more positive than negative signs there are."""
    return int(signs.double().sum())
