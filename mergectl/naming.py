"""The names of a live model's weights as its checkpoint on disk spells them.

transformers may compute with other names than it stores (a ViT's `attention.q_proj` is `attention.attention.query` on
disk). Everything here speaks the names on disk, with or without the backbone's prefix (`bert.`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergectl.errors import UserError

if TYPE_CHECKING:
    import torch

OLD_SPELLINGS = ((".gamma", ".weight"), (".beta", ".bias"))  # LayerNorm in the first BERT checkpoints


def common_names(names: Sequence[str], prefix: str) -> dict[str, str]:
    """Own name -> the name without the prefix and in today's spelling.

    What lies outside the prefix under the name of something inside it, a second `emb.weight`, has no common name.
    """
    inside = {own: own.removeprefix(prefix) for own in names if own.startswith(prefix)}
    outside = {own: own for own in names if own not in inside}
    within, beside = _in_todays_spelling(inside), _in_todays_spelling(outside)
    taken = set(within.values())
    found = within | {own: name for own, name in beside.items() if name not in taken}
    return {own: found[own] for own in names if own in found}


def _in_todays_spelling(names: Mapping[str, str]) -> dict[str, str]:
    found, taken = dict(names), set(names.values())
    for own, name in names.items():
        for old, new in OLD_SPELLINGS:
            if name.endswith(old) and name.removesuffix(old) + new not in taken:
                found[own] = name.removesuffix(old) + new
    return found


def live_names(model: Any) -> dict[str, str]:
    """Name on disk -> name in the live model, for every weight and stored buffer; tied copies all appear."""
    from transformers.core_model_loading import revert_weight_conversion

    live = model.state_dict(keep_vars=True)
    by_identity = {id(tensor): name for name, tensor in live.items()}
    stored = revert_weight_conversion(model, dict(live))
    for name, tensor in stored.items():
        if id(tensor) not in by_identity:
            raise UserError(
                f"A {model.config.model_type} model stores '{name}' in another layout than it computes with; "
                "weights cannot be swapped into it."
            )
    return {name: by_identity[id(tensor)] for name, tensor in stored.items()}


def stored_modules(config: Mapping[str, Any]) -> dict[str, str]:
    """Module of the live model -> as files spell it, for a `config.json`; nothing where transformers knows no such."""
    import torch
    import transformers

    kind = getattr(transformers, str((config.get("architectures") or [""])[0]), None)
    known = transformers.CONFIG_MAPPING
    if kind is None or config.get("model_type") not in known:
        return {}
    with torch.device("meta"):
        model = kind(known[config["model_type"]].from_dict(dict(config)))
    try:
        pairs = live_names(model).items()
    except UserError:
        return {}
    return {live.rpartition(".")[0]: stored.rpartition(".")[0] for stored, live in pairs}


def as_stored(module: str, stored: Mapping[str, str]) -> str:
    """A module as files spell it, whether its name carries a prefix more than the model's own or not."""
    first, dot, rest = module.partition(".")
    return stored.get(module) or (first + dot + stored[rest] if rest in stored else module)


def live_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Name on disk -> the live tensor itself."""
    state = model.state_dict(keep_vars=True)
    return {name: state[live] for name, live in live_names(model).items()}


def find_slot(name: str, slots: Mapping[str, Any], prefix: str) -> str | None:
    """The slot that a checkpoint's name belongs to, whether it carries the prefix or not; None if there is none."""
    for old, new in (("", ""), *OLD_SPELLINGS):
        if old and not name.endswith(old):
            continue
        spelled = name.removesuffix(old) + new
        for candidate in (spelled, f"{prefix}.{spelled}", spelled.removeprefix(f"{prefix}.")):
            if candidate in slots:
                return candidate
    return None


def match(names: Iterable[str], slots: Mapping[str, Any], prefix: str) -> tuple[dict[str, str], list[str]]:
    """Slot -> the checkpoint's name for it, and the names that have no slot."""
    found: dict[str, str] = {}
    rest = []
    for name in names:
        slot = find_slot(name, slots, prefix)
        if slot is None:
            rest.append(name)
        elif slot not in found or name == slot:
            found[slot] = name
    return found, rest


def is_writer(model: Any) -> bool:
    """Whether a model writes text, so that all of it is shared by its tasks and none of it is a task's head."""
    return bool(model.can_generate())


def is_backbone(slot: str, prefix: str) -> bool:
    """Whether a slot lies inside the base model; the rest is the head."""
    return slot.startswith(f"{prefix}.")
