"""Trim small entries, elect a sign for each weight, and merge the entries that agree (TIES-Merging).

>>> from mergectl import merge_weights
>>> import torch
>>> base = {"w": torch.zeros(4)}
>>> experts = {"a": {"w": torch.tensor([1.0, -2.0, 3.0, 4.0])}, "b": {"w": torch.tensor([3.0, 5.0, -1.0, 6.0])}}
>>> # floor(0.25 * 4) + 1 = 2 entries are kept: 3, 4 and 5, 6; signs 0 + + +; the means 5, 3 and (4 + 6) / 2
>>> merge_weights("ties", base, experts, density=0.25, scale=2.0)["w"].tolist()
[0.0, 10.0, 6.0, 10.0]
>>> # per tensor only 4 - floor(4 * 0.75) = 1 entry is kept
>>> merge_weights("ties_tensor", base, experts, density=0.25, scale=2.0)["w"].tolist()
[0.0, 0.0, 0.0, 10.0]
>>> # weighted 2, -4, 6, 8 and 3, 5, -1, 6: signs + + + +; divided by the weights that agree: 3, 1, 2, 3
>>> w = merge_weights("ties", base, experts, trim="none", weight=[2.0, 1.0])["w"]
>>> [round(v, 4) for v in w.tolist()]
[1.6667, 5.0, 3.0, 4.6667]
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import numpy as np
import torch

from mergectl.methods import _elections, _kernels, _more_kernels
from mergectl.methods._contract import Beside, Between, Merged, MethodError, OneOf, PerTask, Weights

if TYPE_CHECKING:
    from mergectl.methods._task_vectors import TaskVectors

BLOCKS = {"compat": [False]}  # the settings under which weights may come in blocks
TITLE = "TIES-Merging"
PAPER = "arXiv:2306.01708"
NEUTRAL = {"trim": "none", "scale": 1.0}
LINEAR = ("scale",)
PRESETS: dict[str, dict[str, Any]] = {"ties_tensor": {"scope": "tensor", "zero_sign": "zero"}}


@dataclass(frozen=True)
class Trimming:
    """How the small entries of a task vector are found."""

    density: list[float]
    threshold: float
    by_tensor: bool
    round_up: bool
    compat: bool
    exact: bool


Trimmed: TypeAlias = "tuple[TaskVectors, list[float]]"  # and per task the magnitude up to which entries are dropped


def top_entries(part: TaskVectors, how: Trimming) -> Trimmed:
    """Keep each task's largest entries, as counted by the two code bases the variants come from.

    With K the density and d the number of elements: the whole model keeps floor(dK) + 1 and all that equal the
    last one; a single tensor keeps what is strictly above the floor(d(1-K))-th smallest, d - floor(d(1-K)) entries.
    With `exact` either keeps floor(dK), at least one, and all that equal the last one.
    """
    d = part.numel
    ranks = [_kernels.count_share(share, d) + 1 if share > 0 else 0 for share in how.density]
    if how.exact:
        ranks = [max(1, _kernels.count_share(share, d)) if share > 0 else 0 for share in how.density]
    elif how.by_tensor or how.round_up:
        ranks = [d - _kernels.count_share(1 - share, d) + 1 if share > 0 else 0 for share in how.density]
    floors = part.kth_magnitude(ranks)
    return part, floors if how.by_tensor and not how.exact else _kernels.just_below(floors)


def outliers(part: TaskVectors, how: Trimming) -> Trimmed:
    """Keep each task's entries further than `threshold` standard deviations from its mean."""
    means, deviations = part.means_and_deviations()
    distances = [how.threshold * deviation for deviation in deviations]
    return everything(part.map(lambda name, x: _kernels.keep_outliers(x, means, distances)), how)


def energetic(part: TaskVectors, how: Trimming) -> Trimmed:
    """Keep each task's largest entries that together hold a share `threshold` of its squared norm."""
    if how.threshold > 1:
        raise MethodError(f"With trim=energy the threshold is a share of the energy, at most 1.0, got {how.threshold}.")
    floors = part.energy_magnitude([how.threshold] * len(part.tasks))
    if not how.compat:
        return part, _kernels.just_below(floors)
    last = max(part, default="")

    def keep(name: str, x: torch.Tensor) -> torch.Tensor:
        kept = _kernels.keep_top(x, floors)
        if name == last:  # an indexing slip of the original code always keeps the last coordinate
            kept.reshape(len(x), -1)[:, -1] = x.reshape(len(x), -1)[:, -1]
        return kept

    return everything(part.map(keep), how)


def everything(part: TaskVectors, how: Trimming) -> Trimmed:
    """Keep all entries."""
    return part, [-1.0] * len(part.tasks)


Vote: TypeAlias = "Callable[[torch.Tensor], torch.Tensor]"
TRIM = {"topk": top_entries, "std": outliers, "energy": energetic, "none": everything}
ELECT: dict[str, Callable[[TaskVectors], Vote]] = {
    "mass": lambda trimmed: _kernels.elect_by_mass,
    "normfrac": lambda trimmed: functools.partial(_kernels.elect_by_share, square_norms=trimmed.square_norms()),
    "normmass": lambda trimmed: functools.partial(_kernels.elect_by_share_mass, square_norms=trimmed.square_norms()),
}
AGREEING: dict[str, Callable[[torch.Tensor, Any], torch.Tensor]] = {
    "disjoint_mean": _kernels.agreeing_mean,
    "disjoint_sum": _kernels.agreeing_sum,
    "disjoint_max": _kernels.agreeing_largest,
}
PLAIN = {
    "mean": _kernels.mean,
    "sum": _kernels.plain_sum,
    "median": _kernels.lower_median,
    "magnitude": _kernels.largest,
}
# The values of other settings beside which alone a setting has a meaning.
TOPK, BY_SIZE = Beside("trim", ("topk",)), Beside("trim", ("std", "energy"))
WHOLE, ELECTED = Beside("scope", ("model",)), Beside("elect", tuple(ELECT))


def merge(
    task_vectors: TaskVectors,
    signs: Weights | None = None,
    *,
    density: Annotated[PerTask, Between(0.0, 1.0, search=(0.05, 1.0)), TOPK, "share of each task vector kept"] = 0.2,
    scale: Annotated[float, Between(-10.0, 10.0, search=(0.3, 2.5)), "scaling coefficient of the merged vector"] = 1.0,
    scope: Annotated[str, OneOf(["model", "tensor"]), "trim and elect over the model or each tensor alone"] = "model",
    trim: Annotated[str, OneOf(TRIM), "which entries stay: density for topk, threshold for std and energy"] = "topk",
    threshold: Annotated[float, Between(0.0, 10.0), BY_SIZE, "standard deviations, or share of energy"] = 0.9,
    elect: Annotated[str, OneOf([*ELECT, "none"]), "how the sign of each weight is elected"] = "mass",
    combine: Annotated[str, OneOf([*AGREEING, *PLAIN]), "what is taken of the entries that are left"] = "disjoint_mean",
    zero_sign: Annotated[str, OneOf(["majority", "zero", "plus"]), ELECTED, "what a drawn election gives"] = "majority",
    round_up: Annotated[bool, WHOLE, "scope model: keep ceil(dK) + 1 entries, not floor(dK) + 1"] = False,
    compat: Annotated[bool, "trim energy: also keep the last coordinate, as the original code does"] = False,
    weight: Annotated[PerTask, Between(-1e4, 1e4), "of each task, before the election"] = 1.0,
    exact: Annotated[bool, TOPK, "trim topk: keep floor(dK) entries, at least one, and what equals the last"] = False,
) -> Merged:
    """Yield for each weight what the trimmed task vectors agree on; given signs are used instead of electing."""
    if elect == "none" and signs is None and combine == "disjoint_max":
        raise MethodError("combine=disjoint_max needs an election. Choose elect=mass, or combine=magnitude.")
    tasks = len(task_vectors.tasks)
    how = Trimming(_kernels.per_task(density, tasks), threshold, scope == "tensor", round_up, compat, exact)
    weights = None if weight == 1.0 else _kernels.per_task(weight, tasks)

    def agreed(part: TaskVectors) -> Merged:
        left, floors = TRIM[trim](part, how)
        voters = _elections.Voters(floors, weights)
        if elect == "mass" and signs is None and combine in ("disjoint_mean", "disjoint_sum"):
            instead = when_drawn(zero_sign, left, lambda name, x: _elections.balance(x, voters))
            take = functools.partial(_elections.agreed, instead=instead, mean=combine == "disjoint_mean")
            return left.each(lambda name, x: take(x, voters).mul_(scale) if scale != 1 else take(x, voters))
        trimmed = left.map(lambda name, x: voters.of(x))
        sign_of = elected(trimmed, elect, zero_sign, signs)
        return trimmed.each(
            lambda name, x: scale * combined(x, combine, None if sign_of is None else sign_of(name, x), weights)
        )

    return task_vectors.per_weight(agreed) if how.by_tensor else agreed(task_vectors)


def when_drawn(zero_sign: str, part: TaskVectors, balance: Callable[[str, torch.Tensor], int]) -> float:
    """Return the sign of a drawn election; `balance` says how many more positive signs a weight has than negative."""
    if zero_sign == "majority":
        return float(np.sign(sum(part.survey(balance))))
    return 1.0 if zero_sign == "plus" else 0.0


def elected(
    trimmed: TaskVectors, elect: str, zero_sign: str, signs: Weights | None
) -> Callable[[str, torch.Tensor], torch.Tensor] | None:
    """Return the function that gives the elected signs of a weight, or None without an election."""
    if elect == "none" and signs is None:
        return None
    vote = ELECT[elect](trimmed) if signs is None else None

    def raw(name: str, x: torch.Tensor) -> torch.Tensor:
        return vote(x) if vote is not None else given(signs or {}, name, x)

    instead = when_drawn(zero_sign, trimmed, lambda name, x: _kernels.balance(raw(name, x)))
    return lambda name, x: _elections.drawn(raw(name, x), instead)


def given(signs: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    """Return the given signs of a weight."""
    if name not in signs:
        raise MethodError(f"No signs for weight '{name}' among the given signs.")
    sign = torch.as_tensor(signs[name]).to(x).sign()
    if sign.shape != x.shape[1:]:
        raise MethodError(f"The signs of '{name}' have shape {list(sign.shape)}, the weight {list(x.shape[1:])}.")
    return sign


def combined(
    x: torch.Tensor, combine: str, sign: torch.Tensor | None, weights: list[float] | None = None
) -> torch.Tensor:
    """Return what the table's function makes of the entries; the plain ones get the elected sign."""
    if combine == "disjoint_mean" and weights is not None:
        return _more_kernels.weighted_agreeing_mean(x, weights, sign)
    if combine in AGREEING:
        return AGREEING[combine](x, sign)
    return PLAIN[combine](x) if sign is None else PLAIN[combine](x).abs() * sign
