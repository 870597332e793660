"""What adapters do to a weight: the arithmetic of LoRA, DoRA and IA3 for matrices, embeddings and convolutions."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]


def factors(parts: Mapping[str, Any]) -> tuple[Any, Any]:
    """A and B of LoRA, or what stands for them, by the names that linear modules or embeddings have for them."""
    down, up = (parts.get(f"lora_{x}", parts.get(f"lora_embedding_{x}")) for x in "AB")
    return down, up


def fits(weight: Shape, parts: Mapping[str, Shape], *, turned: bool) -> bool:
    """Whether parts of these shapes belong to a weight; one that is turned is kept as [in, out]."""
    if len(weight) < 2:
        return False
    outer, inner, *kernel = (*weight[:2][::-1], *weight[2:]) if turned else weight
    if (vector := parts.get("ia3_l")) is not None:
        sides = ((1, inner), (1, outer)) if kernel else ((1, inner), (outer, 1), (1, outer), (inner, 1))
        return vector in [(*side, *(1 for _ in kernel)) for side in sides]
    down, up = factors(parts)
    if down is None or up is None or len(down) != len(weight) or len(up) != len(weight):
        return False
    return (up[0], *down[1:]) == (outer, inner, *kernel) and up[1:] == (down[0], *(1 for _ in kernel))


def fold_lora(weight: torch.Tensor, parts: Mapping[str, torch.Tensor], scale: float, *, turned: bool) -> torch.Tensor:
    """W + s B A; DoRA then gives every output its learned length."""
    down, up = factors(parts)
    product = (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])
    whole: torch.Tensor = (weight.T if turned else weight) + scale * product
    if "lora_magnitude_vector" in parts:
        factor = parts["lora_magnitude_vector"].reshape(-1) / whole.flatten(1).norm(dim=1)
        whole = whole * factor.reshape(-1, *(1 for _ in whole.shape[1:]))
    return whole.T.contiguous() if turned else whole


def lora_scale(module: str, rank: int, settings: Mapping[str, Any]) -> float:
    """s = alpha / r, or alpha / sqrt(r); alpha may differ between modules."""
    alpha = float(settings["lora_alpha"])
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = float(value)
            break
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def fold_ia3(weight: torch.Tensor, vector: torch.Tensor, module: str, settings: Mapping[str, Any], *,
             turned: bool) -> torch.Tensor:  # fmt: skip
    """Scale what the vector scales: inputs of feed-forward modules (1 x in), outputs of the others (out x 1)."""
    if weight.dim() == 2:
        return (weight.T * vector).T if turned else weight * vector
    return weight * (vector if _feeds_forward(module, settings) else vector.transpose(0, 1))


def fold_ia3_bias(bias: torch.Tensor, vector: torch.Tensor, module: str, settings: Mapping[str, Any]) -> torch.Tensor:
    """Scale a bias as the outputs that it is added to."""
    outputs = not _feeds_forward(module, settings) if vector.dim() > 2 else vector.shape[1] == 1
    return bias * vector.reshape(-1) if outputs and vector.numel() == len(bias) else bias


def _feeds_forward(module: str, settings: Mapping[str, Any]) -> bool:
    """Whether a vector scales a module's inputs; convolutions do not show it in the vector's shape."""
    said = settings.get("feedforward_modules") or ()
    return bool(re.fullmatch(said, module)) if isinstance(said, str) else any(module.endswith(end) for end in said)
