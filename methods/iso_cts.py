"""Join the top directions of the summed task vectors with each task's own, all equally strong (Iso-CTS).

>>> from mergectl import merge_weights
>>> import torch
>>> base = {"w": torch.zeros(4, 4)}
>>> experts = {
...     "a": {"w": torch.diag(torch.tensor([5.0, 3.0, 0.0, 0.0]))},
...     "b": {"w": torch.diag(torch.tensor([5.0, 0.0, 1.0, 4.0]))},
... }
>>> # of four directions two are common: the sum's 10 and 4; of what a and b have besides, 3 and 1 are the strongest
>>> merged = merge_weights("iso_cts", base, experts, common_fraction=0.5, scale=2.0)  # 2 * (10 + 4 + 3 + 1) / 4
>>> merged["w"].diag().round(decimals=4).tolist()
[9.0, 9.0, 9.0, 9.0]

Of r directions int(common_fraction * r) are common, and the rest is dealt out to the tasks in equal numbers, rounded;
what is over or wanting is common. A task's own are the top ones of its task vector without the rows' part in the
common directions. Joined, they are made orthonormal on both sides. `common_fraction=1` is Iso-C.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import torch

from mergectl.methods import _kernels, _spectral
from mergectl.methods._contract import Between, Merged, Remember

if TYPE_CHECKING:
    from mergectl.methods._task_vectors import TaskVectors

TITLE = "Iso-CTS"
PAPER = "arXiv:2502.04959"
NEUTRAL = None  # the singular values of one task vector are made equal, too
LINEAR = ("scale",)


def merge(
    task_vectors: TaskVectors,
    linears: Mapping[str, bool] | None = None,
    remember: Remember | None = None,
    *,
    scale: Annotated[float, Between(-10.0, 10.0, search=(0.5, 2.5)), "factor on the merged task vector"] = 1.0,
    common_fraction: Annotated[
        float, Between(0.0, 1.0, search=(0.5, 1.0)), "share of the directions taken from the sum"
    ] = 0.8,
    decompose: _spectral.Decompose = "linear",
) -> Merged:
    """Yield for each weight equally strong common and own directions, or the mean of task vectors."""
    names = _spectral.decomposed(decompose, linears, task_vectors)
    tasks, remember = task_vectors.tasks, remember or _spectral.plainly

    def join(name: str, x: torch.Tensor) -> torch.Tensor:
        if name not in names:
            return scale * _kernels.mean(x)
        stored = x.mT if names[name] else x  # [task, out, in]: the common directions are those of the outputs
        common, own = divided(min(x.shape[1:]), len(tasks), common_fraction)
        top = _spectral.factors_of_sum(remember, name, x).top(common).turned(names[name])
        parts = own_parts(remember, name, tasks, stored, top.left, own)
        merged = _spectral.isotropic([*parts, top])
        return scale * (merged.mT if names[name] else merged)

    yield from task_vectors.each(join)


def divided(full: int, tasks: int, common_fraction: float) -> tuple[int, int]:
    """Return how many of `full` directions are common, and how many each task has of its own."""
    own = min(round((full - int(full * common_fraction)) / tasks), full // tasks)
    return full - tasks * own, own


def own_parts(
    remember: Remember, name: str, tasks: tuple[str, ...], x: torch.Tensor, common: torch.Tensor, count: int
) -> list[_spectral.Factors]:
    """Return the top components of each task vector outside the common directions [common, out]."""
    basis, words = common.double(), f"[out, in] outside of {len(common)} common directions of outputs, top {count}"

    def rest(number: int) -> torch.Tensor:
        wide = x[number].double()
        return wide - basis.mT @ (basis @ wide)

    return [
        _spectral.factors(remember, name, task, functools.partial(rest, n), words, str(x.device), count)
        for n, task in enumerate(tasks if count else ())
    ]
