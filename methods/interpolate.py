"""Move the base towards one expert by a share alpha.

>>> from mergectl import merge_weights
>>> import torch
>>> base, expert = {"w": torch.tensor([1.0, 4.0])}, {"w": torch.tensor([2.0, 0.0])}
>>> merge_weights("interpolate", base, {"a": expert}, alpha=0.25)["w"].tolist()  # 0.75 * 1 + 0.25 * 2, 0.75 * 4
[1.25, 3.0]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from mergectl.methods._contract import Between, Merged, MethodError, Weights

if TYPE_CHECKING:
    import torch

    from mergectl.methods._task_vectors import TaskVectors

TITLE = "Linear interpolation of base and expert (WiSE-FT)"
PAPER = "arXiv:2109.01903"
NEUTRAL = {"alpha": 1.0}
BLOCKS = True  # element by element: the lab may hand over weights in blocks
LINEAR = ("alpha",)
EXPERTS = (1, 1)


def merge(
    base: Weights,
    experts: TaskVectors,
    *,
    alpha: Annotated[
        float, Between(-10.0, 10.0, search=(0.0, 1.0)), "share of the expert: 0 is the base, 1 the expert"
    ] = 0.5,
    extrapolate: Annotated[bool, "let alpha go beyond base and expert"] = False,
) -> Merged:
    """Yield for each weight the point at share alpha of the line from base to expert, exact at both ends."""
    if not extrapolate and not 0 <= alpha <= 1:
        raise MethodError(f"alpha must lie between 0.0 and 1.0, got {alpha}. To go beyond the models: extrapolate=True")

    def between(name: str, x: torch.Tensor) -> torch.Tensor:
        if alpha in (0.0, 1.0):
            return x[0] if alpha else base[name]
        return (base[name].double() * (1 - alpha)).add_(x[0].double(), alpha=alpha).to(x.dtype)

    return experts.each(between)
