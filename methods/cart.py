"""Add to the experts' average the top singular components of their differences from it (CART).

>>> from mergectl import merge_weights
>>> import torch
>>> base = {"w": torch.zeros(2, 2), "b": torch.zeros(1)}
>>> experts = {
...     "a": {"w": torch.diag(torch.tensor([6.0, 4.0])), "b": torch.tensor([2.0])},
...     "b": {"w": torch.diag(torch.tensor([0.0, 2.0])), "b": torch.tensor([4.0])},
... }
>>> # average diag(3, 3); the differences diag(3, 1) and diag(-3, -1) lose their second components, 3 and -3 cancel
>>> merge_weights("cart", base, experts, rank_ratio=0.5, scale=2.0)["w"].round(decimals=4).tolist()
[[3.0, 0.0], [0.0, 3.0]]
>>> # the second factor is a's, the first b's: 3 + 2 * 3 - 1 * 3
>>> merged = merge_weights("cart", base, experts, rank_ratio=0.5, scale={"a": 2.0, "b": 1.0})
>>> merged["w"].round(decimals=4).tolist()
[[6.0, 0.0], [0.0, 3.0]]

W = O + sum_i scale_i * SVD_k(theta_i - O), with the origin O the average of the experts, or as `origin` says: the base
(`pre_cart`), task arithmetic (`ta_cart`), CART itself (`cart_cart`) or TSV-Merge (`tsv_cart`). SVD_k keeps k =
int(rank_ratio * r) of the r components of a matrix; `combine=decorrelate` joins them as TSV-Merge does (`cart_tsv`).
Weights that are not decomposed keep all of theta_i - O, which for the average sums to nothing. A ratio of 0 gives the
origin. The authors' language program leaves embeddings as the base has them: `embeddings=base`, `min_rank=0`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch

from mergectl.methods import _kernels, _linears, _spectral
from mergectl.methods._contract import Beside, Between, Merged, OneOf, PerTask, Remember

if TYPE_CHECKING:
    from mergectl.methods._task_vectors import TaskVectors

TITLE = "CART"
PAPER = "arXiv:2412.12153"
NEUTRAL = {"origin": "average"}  # from other origins the truncated parts of copies add up to several
PRESETS: dict[str, dict[str, Any]] = {
    "pre_cart": {"origin": "base", "scale": 0.3},
    "ta_cart": {"origin": "task_arithmetic", "origin_scale": 0.3, "scale": 1.0},
    "cart_cart": {"origin": "cart", "scale": 1.0},
    "cart_tsv": {"combine": "decorrelate", "scale": 1.0},
    "tsv_cart": {"origin": "tsv", "scale": 1.0},
}


@dataclass(frozen=True)
class Weight:
    """One weight of the task vectors, and how its matrices are truncated."""

    name: str
    tasks: Sequence[str]
    x: torch.Tensor  # [task, *shape]
    is_decomposed: bool
    min_rank: int
    remember: Remember

    def total(self, origin: torch.Tensor, scales: Sequence[float]) -> torch.Tensor:
        """Return the weighted sum over tasks of theta_i - O, whole, in float64; origin is O minus the base."""
        result = -sum(scales) * origin
        for row, scale in zip(self.x, scales, strict=True):
            result.add_(row.double(), alpha=scale)
        return result

    def counts(self, ratio: float | Sequence[float] | None) -> list[int]:
        """Return how many components each task keeps."""
        return _spectral.ranks(ratio, min(self.x.shape[1:]), len(self.tasks), self.min_rank)

    def factors(self, origin: torch.Tensor, of: str) -> list[_spectral.Factors]:
        """Return the decomposition of each theta_i - O; `of` says in words what that is, nothing for task vectors."""
        return _spectral.factors_of_tasks(
            self.remember, self.name, self.tasks, lambda task: self.x[task].double() - origin, of, str(self.x.device)
        )


def add_up(
    weight: Weight, origin: torch.Tensor, of: str, ratio: float | Sequence[float], scales: Sequence[float]
) -> torch.Tensor:
    """Return the weighted sum over tasks of truncated differences from the origin."""
    shares = _kernels.per_task(ratio, len(weight.tasks))
    if weight.is_decomposed and not set(shares) <= {0.0, 1.0}:
        return _spectral.truncated(weight.factors(origin, of), weight.counts(ratio), scales).double()
    return weight.total(origin, [scale if share > 0 else 0.0 for share, scale in zip(shares, scales, strict=True)])


def decorrelate(
    weight: Weight, origin: torch.Tensor, of: str, ratio: float | Sequence[float] | None, scales: Sequence[float]
) -> torch.Tensor:
    """Return the weighted sum over tasks of truncated differences whose singular vectors are made orthonormal."""
    if not weight.is_decomposed:
        return weight.total(origin, scales) / len(weight.tasks)
    return _spectral.decorrelated(weight.factors(origin, of), weight.counts(ratio), scales).double()


COMBINE = {"sum": add_up, "decorrelate": decorrelate}
ORIGINS = ("average", "base", "task_arithmetic", "cart", "tsv")


def origin_of(
    weight: Weight, origin: str, scale: float, ratio: float | None, own_ratio: float | Sequence[float]
) -> tuple[torch.Tensor, str]:
    """Return the origin minus the base, in float64, and words that tell it from others; none for the base."""
    tasks = len(weight.tasks)
    if origin == "base":
        return torch.zeros_like(weight.x[0], dtype=torch.float64), ""
    if origin == "task_arithmetic":
        return scale * _kernels.total(weight.x), f"differences from task arithmetic, {scale}"
    if origin == "tsv":
        start, _ = origin_of(weight, "base", scale, ratio, own_ratio)
        words = f"differences from tsv, {scale}, {ratio}, {weight.min_rank}"
        return decorrelate(weight, start, "", ratio, [scale] * tasks), words
    average = _kernels.total(weight.x) / tasks
    if origin == "average":
        return average, "differences from the average"
    share = own_ratio if ratio is None else ratio
    added = add_up(weight, average, "differences from the average", share, [scale] * tasks)
    return average + added, f"differences from cart, {scale}, {share}, {weight.min_rank}"


def merge(
    task_vectors: TaskVectors,
    linears: Mapping[str, bool] | None = None,
    remember: Remember | None = None,
    *,
    rank_ratio: Annotated[
        PerTask, Between(0.0, 1.0, search=(0.01, 0.5)), "share of singular components kept of each task"
    ] = 0.16,
    scale: Annotated[PerTask, Between(-10.0, 10.0, search=(0.2, 4.0)), "factor on each task's part"] = 2.0,
    origin: Annotated[str, OneOf(ORIGINS), "the model whose differences from the experts are truncated"] = "average",
    combine: Annotated[str, OneOf(COMBINE), "add the tasks' parts up, or make them orthonormal (TSV-Merge)"] = "sum",
    origin_scale: Annotated[
        float,
        Between(-10.0, 10.0),
        Beside("origin", ("task_arithmetic", "cart", "tsv")),
        "the origin's own factor, for task_arithmetic, cart and tsv",
    ] = 1.0,
    origin_rank_ratio: Annotated[
        float | None,
        Between(0.0, 1.0),
        Beside("origin", ("cart", "tsv")),
        "the origin's own rank_ratio, for cart (the same) and tsv (1/K)",
    ] = None,
    min_rank: Annotated[int, Between(0, 64), "least number of components kept per task"] = 1,
    decompose: _spectral.Decompose = "linear",
    embeddings: Annotated[str, OneOf(["merged", "base"]), "merge embeddings, or leave those of the base"] = "merged",
) -> Merged:
    """Yield for each weight the origin and the truncated differences from it, minus the base."""
    names = _spectral.decomposed(decompose, linears, task_vectors)
    scales = _kernels.per_task(scale, len(task_vectors.tasks))

    def combined(name: str, x: torch.Tensor) -> torch.Tensor:
        if embeddings == "base" and _linears.is_table(name):
            return torch.zeros_like(x[0])
        weight = Weight(name, task_vectors.tasks, x, name in names, min_rank, remember or _spectral.plainly)
        start, of = origin_of(weight, origin, origin_scale, origin_rank_ratio, rank_ratio)
        return (start + COMBINE[combine](weight, start, of, rank_ratio, scales)).float()

    yield from task_vectors.each(combined)
