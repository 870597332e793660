"""Prune each expert's linear weights to the directions that its task's inputs activate most (PAVE).

>>> from mergectl import merge_weights
>>> import torch
>>> base = {"w.weight": torch.zeros(2, 2)}
>>> experts = {"a": {"w.weight": torch.tensor([[3.0, 0.0], [0.0, 1.0]])}}
>>> grams = {"grams": {"a": {"w.weight": torch.tensor([[0.0, 0.0], [0.0, 9.0]])}}}  # the first input is always 0
>>> # the weight times the damped moment is [[3, 0], [0, 10]]: of its two directions the second is kept
>>> merge_weights("pave_ta", base, experts, supplies=grams, rank_scale=0.5, damping=1.0, scale=2.0)["w.weight"].tolist()
[[0.0, 0.0], [0.0, 2.0]]
>>> # without the inputs the larger entry is kept
>>> merge_weights("pave_ta", base, experts, supplies=grams, rank_scale=0.5, basis="svd", scale=2.0)["w.weight"].tolist()
[[6.0, 0.0], [0.0, 0.0]]

With C the second moment of a layer's inputs on its task and Q the left singular vectors of W (C + damping I), a weight
becomes Q_r Q_r^T W: what truncating that product to rank r and multiplying by the inverse gives, without an inverse.
The whole weight is pruned, not its difference from the base. Other weights, and any without moments, stay as they are.
"""

from __future__ import annotations

import functools
import hashlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import torch

from mergectl.methods import _kernels, _linears, _moments, _ranks, _spectral
from mergectl.methods._contract import (
    Beside,
    Between,
    MergeWarning,
    MethodError,
    OneOf,
    PerTask,
    Remember,
    Tasks,
    Weights,
)
from mergectl.methods._directions import Directions, lost_with_smallest, smallest_directions
from mergectl.methods._moments import Gram

if TYPE_CHECKING:
    from mergectl.methods._task_vectors import TaskVectors

TITLE = "PAVE (purified task vectors)"
PAPER = "arXiv:2510.14697"
NEUTRAL = {"rank_scale": 1.0}
PRESETS: dict[str, dict[str, Any]] = {
    "pave_ta": {"method": "task_arithmetic", "rank_scale": 0.96875, "allocation": "none", "scale": 0.3},
    "pave_ties": {"method": "ties", "rank_scale": 0.984375, "density": 0.2, "scale": 0.9, "round_up": True},
    "pave_emr": {"method": "emr", "rank_scale": 0.875},
}


def with_moment(w: torch.Tensor, moment: torch.Tensor, damping: float) -> torch.Tensor:
    """Return W (C + damping I); the product is as exact as the moments, in float32 or in float64."""
    return torch.mm(w.to(moment), moment).to(w).add_(w, alpha=damping)


def with_cholesky(w: torch.Tensor, moment: torch.Tensor, damping: float) -> torch.Tensor:
    """Return W L for the damped moment L L^T."""
    factor, failed = torch.linalg.cholesky_ex(moment.to(w) + damping * torch.eye(len(moment)).to(w))
    if int(failed):
        raise MethodError(f"The moments have no Cholesky factor with a damping of {damping:g}. Raise damping.")
    return torch.mm(w, factor)


def with_row_means(w: torch.Tensor, moment: torch.Tensor, damping: float) -> torch.Tensor:
    """Return W times the diagonal matrix of the damped moment's row means of magnitudes."""
    return w * (moment.to(w) + damping * torch.eye(len(moment)).to(w)).abs().mean(1)


# What is decomposed of a weight W [d_out, d_in] in float64 and the moment C of its inputs.
BASES: dict[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {
    "co_svd": with_moment,
    "svd": lambda w, moment, damping: w,
    "cholesky": with_cholesky,
    "asvd": with_row_means,
}
DAMPED = tuple(name for name in BASES if name != "svd")


@dataclass(frozen=True)
class Pruning:
    """All that decides how the layers of a family are pruned."""

    task_vectors: TaskVectors
    base: Weights
    grams: Mapping[str, Mapping[str, Gram | torch.Tensor]]
    linears: Mapping[str, bool] | None
    remember: Remember | None  # the lab's memory
    memory: Remember  # the same, or one that lasts as long as the merge
    shares: Sequence[float]
    participants: Sequence[str]
    damping: float
    backoff: bool
    basis: str

    def experts(self, name: str) -> list[int]:
        """Return the experts whose weight of this name is pruned."""
        tasks = enumerate(self.task_vectors.tasks)
        return [number for number, task in tasks if task in self.participants and name in self.grams[task]]

    def full(self, name: str) -> int:
        """Return a layer's full rank."""
        return min(self.task_vectors.shapes[name])

    def layers(self) -> list[str]:
        """Return the weights that are pruned."""
        return [name for name in self.task_vectors if self.experts(name)]


Ranks: TypeAlias = "Callable[[str, torch.Tensor], dict[int, int]]"  # of a layer: {expert: directions kept}


def own_share(p: Pruning) -> Ranks:
    """Give each expert its own share of every layer's full rank."""
    return lambda name, x: {number: _ranks.rank_of(p.shares[number], p.full(name)) for number in p.experts(name)}


def per_layer(p: Pruning) -> Ranks:
    """Let the experts share each layer's budget by their singular values."""
    share = target(p)

    def ranks(name: str, x: torch.Tensor) -> dict[int, int]:
        full, experts = p.full(name), p.experts(name)
        if _ranks.least_rank(share, full) >= full:
            return dict.fromkeys(experts, full)
        spectra = [decomposed(p, number, name, x[number]).values.tolist() for number in experts]
        return dict(zip(experts, _ranks.allocate(spectra, share), strict=True))

    return ranks


def collapsed_shares(p: Pruning) -> list[float]:
    """Return what each expert keeps of all layers' ranks together under `per_layer`; 1 where it takes no part."""
    layers = p.task_vectors.only(p.layers())
    found = dict(zip(layers, layers.survey(per_layer(p)), strict=True))
    shares = []
    for number in range(len(p.task_vectors.tasks)):
        own = [(ranks[number], p.full(name)) for name, ranks in found.items() if number in ranks]
        shares.append(sum(kept for kept, _ in own) / sum(full for _, full in own) if own else 1.0)
    return shares


def collapsed(p: Pruning) -> Ranks:
    """Give each expert one share of every layer's full rank: that of `collapsed_shares`."""
    shares = collapsed_shares(p)
    return lambda name, x: {number: _ranks.rank_of(shares[number], p.full(name)) for number in p.experts(name)}


ALLOCATIONS: dict[str, Callable[[Pruning], Ranks]]
ALLOCATIONS = {"none": own_share, "per_layer": per_layer, "collapsed": collapsed}


def refine(
    task_vectors: TaskVectors,
    base: Weights,
    grams: Mapping[str, Mapping[str, Gram | torch.Tensor]],
    linears: Mapping[str, bool] | None = None,
    remember: Remember | None = None,
    *,
    rank_scale: Annotated[
        PerTask, Between(0.0, 1.0, low_open=True, search=(0.75, 1.0)), "share of each layer's rank kept"
    ] = 0.96875,
    damping: Annotated[float, Between(0.0, 1000.0), Beside("basis", DAMPED), "added to the moments' diagonal"] = 0.1,
    damping_backoff: Annotated[
        bool, Beside("basis", DAMPED), "double damping until moments invert well in float32"
    ] = False,
    basis: Annotated[str, OneOf(BASES), "what the weight is multiplied by: the moment, nothing, or its stand-ins"] = (
        "co_svd"
    ),
    allocation: Annotated[str, OneOf(ALLOCATIONS), "how tasks share the ranks; none: each keeps its rank_scale"] = (
        "per_layer"
    ),
    participants: Annotated[Tasks, "the tasks that are pruned; the others keep every rank (default: all)"] = None,
) -> TaskVectors:
    """Return task vectors from which each expert's least activated directions are gone."""
    tasks = task_vectors.tasks
    p = Pruning(
        task_vectors, base, grams, linears, remember, _spectral.remembering(remember),
        _kernels.per_task(rank_scale, len(tasks)), participants or tasks, damping, damping_backoff, basis,
    )  # fmt: skip
    check_grams(p)
    ranks = ALLOCATIONS[allocation](p)
    return task_vectors.map(lambda name, x: pruned(p, name, x, ranks(name, x)) if p.experts(name) else x)


def check_grams(p: Pruning) -> None:
    """Refuse a task without any moments; warn of linear weights that lack them."""
    for task in p.participants:
        if task not in p.grams:
            raise MethodError(f"There are no grams for the task '{task}', only for {', '.join(p.grams) or 'none'}.")
    shapes = p.task_vectors.shapes
    linear = [name for name in _linears.linear_weights(p.linears, p.task_vectors) if math.prod(shapes[name])]
    lacking = [name for name in linear if len(p.experts(name)) < len(p.participants)]
    if lacking:
        warnings.warn(
            f"{len(lacking)} of {len(linear)} linear weights keep every rank where moments of their inputs are "
            f"missing: {', '.join(lacking[:3])}{', ...' if len(lacking) > 3 else ''}.",
            MergeWarning,
            stacklevel=2,
        )


def target(p: Pruning) -> float:
    """Return the share that the experts keep together."""
    shares = {p.shares[p.task_vectors.tasks.index(task)] for task in p.participants}
    if len(shares) > 1:
        raise MethodError("rank_scale is what all tasks keep together, one number. For one per task: allocation=none.")
    return shares.pop()


def pruned(p: Pruning, name: str, x: torch.Tensor, ranks: Mapping[int, int]) -> torch.Tensor:
    """Return a layer's task vectors with each expert pruned to its rank, at least 1."""
    result, full = x.clone(), p.full(name)
    for number, rank in ranks.items():
        if (lost := full - max(rank, 1)) > 0:
            found = decomposed(p, number, name, x[number], lost)
            w = upright(p, number, name, (p.base[name] + x[number]).float())
            result[number] -= upright(p, number, name, lost_with_smallest(w, found.rows, lost))
    return result


def upright(p: Pruning, number: int, name: str, w: torch.Tensor) -> torch.Tensor:
    """Turn a weight to [d_out, d_in], or back, where it is stored the other way round."""
    given = _moments.moment_of(p.grams[p.task_vectors.tasks[number]][name])
    shape = p.task_vectors.shapes[name]
    return w.mT if _moments.is_transposed(name, shape, len(given), p.linears) else w


def decomposed(p: Pruning, number: int, name: str, delta: torch.Tensor, least: int = 0) -> Directions:
    """Return an expert's layer decomposed: all singular values, and the directions that it may lose.

    These are one and a half times its share, and one for shares that are rounded twice. For later merges with other
    shares the lab keeps a quarter of all directions, or where that is not enough all of them.
    """
    task, full = p.task_vectors.tasks[number], p.full(name)
    count = max(least, min(full, full - _ranks.least_rank(p.shares[number], full) + 1))
    what = f"pave {p.basis} {p.damping!r}{' or more' if p.backoff else ''}"
    if p.remember is not None:
        count = full // 4 if count <= full // 4 else full
        what += f" {fingerprint(p.grams[task][name])}"
    make = functools.partial(decompose, p, number, name, delta, count)
    found = Directions(*p.memory(f"{what} {count}", task, name, make))
    return Directions(found.values, found.rows.to(delta.device))


def decompose(p: Pruning, number: int, name: str, delta: torch.Tensor, count: int) -> Directions:
    """Compute what is to be remembered: the values in float64, the directions in float32."""
    task = p.task_vectors.tasks[number]
    w = upright(p, number, name, p.base[name].double() + delta)
    moment = _moments.moment_of(p.grams[task][name]).to(w.device)
    damping = _moments.enough_damping(moment, p.damping) if p.backoff else p.damping
    m = BASES[p.basis](w, moment, damping)
    if not math.isfinite(float(moment.diagonal().sum() + m.sum())):
        raise MethodError(f"The moments of '{name}' for the task '{task}' hold NaN or infinite numbers.")
    found = smallest_directions(m, count)
    return Directions(found.values.cpu(), found.rows.float().cpu())


def fingerprint(given: Gram | torch.Tensor) -> str:
    """Return what tells these moments from others."""
    moment, found = _moments.moment_of(given), hashlib.blake2b(digest_size=12)
    for part in (moment.diagonal(), moment.sum(0)):
        found.update(part.contiguous().cpu().numpy().tobytes())
    return found.hexdigest()
