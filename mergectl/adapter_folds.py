"""What adapters do to a weight (LoRA, DoRA, IA3; matrices, embeddings, convolutions), and which do something else."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mergectl.errors import UserError

if TYPE_CHECKING:
    import torch

# Kinds of LoRA that mean more than W + s B A; the last word of each is a value of init_lora_weights.
OTHER_LORA = (
    "layer_replication", "target_parameters", "trainable_token_indices", "use_qalora", "use_bdlora", "kasa_config",
    "arrow_config", "monteclora_config", "alora_invocation_tokens",
)  # fmt: skip
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

Shape = tuple[int, ...]


def check_lora(settings: Mapping[str, Any], ref: str) -> None:
    """Refuse the kinds of LoRA that stand for something else than base plus product."""
    odd = [name for name in OTHER_LORA if settings.get(name)]
    if odd:
        raise UserError(f"{ref} is a LoRA adapter with {odd[0]}, which cannot be folded into weights.")
    start = str(settings.get("init_lora_weights")).lower()
    if start.startswith(CHANGES_BASE):
        raise UserError(
            f"{ref} was begun by {start}, which also changes the base. Save it once more as plain LoRA with peft: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )


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
    alpha = 8 if (given := settings.get("lora_alpha")) is None else given  # as in peft
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
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
