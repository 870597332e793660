"""Sum the task vectors and make all singular values of each matrix equal to their mean (Iso-C).

>>> from mergectl import merge_weights
>>> import torch
>>> base = {"w": torch.zeros(2, 2), "b": torch.zeros(1)}
>>> experts = {
...     "a": {"w": torch.diag(torch.tensor([4.0, 1.0])), "b": torch.tensor([1.0])},
...     "b": {"w": torch.diag(torch.tensor([1.0, 2.0])), "b": torch.tensor([4.0])},
... }
>>> merged = merge_weights("iso_c", base, experts, scale=0.5)  # the sum has the singular values 5 and 3
>>> merged["w"].round(decimals=4).tolist(), merged["b"].tolist()
([[2.0, 0.0], [0.0, 2.0]], [1.25])

Of a sum M = U S V^T that is scale * mean(S) * U V^T; a sum of lower rank gets the mean over its own singular values,
and nothing in directions that it does not reach. Weights that are not decomposed get the mean of the task vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import torch

from mergectl.methods import _kernels, _spectral
from mergectl.methods._contract import Between, Merged, Remember

if TYPE_CHECKING:
    from mergectl.methods._task_vectors import TaskVectors

TITLE = "Iso-C"
PAPER = "arXiv:2502.04959"
NEUTRAL = None  # the singular values of one task vector are made equal, too
LINEAR = ("scale",)


def merge(
    task_vectors: TaskVectors,
    linears: Mapping[str, bool] | None = None,
    remember: Remember | None = None,
    *,
    scale: Annotated[float, Between(-10.0, 10.0, search=(0.5, 2.5)), "factor on the merged task vector"] = 1.0,
    decompose: _spectral.Decompose = "linear",
) -> Merged:
    """Yield for each weight the sum with equal singular values, or the mean of task vectors."""
    names = _spectral.decomposed(decompose, linears, task_vectors)

    def flatten(name: str, x: torch.Tensor) -> torch.Tensor:
        if name not in names:
            return scale * _kernels.mean(x)
        return scale * _spectral.isotropic([_spectral.factors_of_sum(remember or _spectral.plainly, name, x)])

    yield from task_vectors.each(flatten)
