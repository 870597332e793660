"""Which weights of a family make up the body that is merged, and which are the heads of its tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping

from mergectl.inputs import Weights, shape_of

# The first part of a name that belongs to the body of a model when its names have no common prefix.
_BODY = ("embed", "encoder", "decoder", "layer", "shared", "wte", "wpe", "blocks", "backbone", "transformer")
_HEAD = ("classif", "head", "score", "cls", "qa_outputs", "regress", "predictions", "logits", "projector", "fc")


def split_heads(base: Weights, experts: Mapping[str, Weights]) -> tuple[list[str], list[str], dict[str, list[str]]]:
    """Return the names that can be merged, those that no expert has, and for each task the names of its own head.

    A head is what the base does not have, and every first part of the names outside the body of the model (such as
    `classifier`) in which some expert's weights are missing or have another shape.
    """
    odd = [
        name
        for name in base
        if any(name not in expert or shape_of(expert, name) != shape_of(base, name) for expert in experts.values())
    ]
    body = _body(base)
    parts = {_part(name) for name in odd if _may_be_head(name, body, base)}
    heads = {
        task: [name for name in expert if _part(name) in parts or name not in base] for task, expert in experts.items()
    }
    alone = [name for name in base if _part(name) in parts and not any(name in expert for expert in experts.values())]
    return [name for name in base if _part(name) not in parts], alone, heads


def head_names(weights: Weights) -> list[str]:
    """Return the names that by their first part belong to a head, as `classifier` and `lm_head` do."""
    body = _body(weights)
    return [n for n in weights if _part(n) != body and any(word in _part(n).lower() for word in _HEAD)]


def _part(name: str) -> str:
    """Return the first part of a name."""
    return name.split(".")[0]


def _body(base: Weights) -> str:
    """Return the first part of the names that holds most of the model."""
    sizes: dict[str, int] = {}
    for name in base:
        sizes[_part(name)] = sizes.get(_part(name), 0) + math.prod(shape_of(base, name))
    return max(sizes, key=lambda part: sizes[part], default="")


def _may_be_head(name: str, body: str, base: Weights) -> bool:
    """Say whether a weight lies outside the body of the model."""
    part, _, rest = name.partition(".")
    if part == body or not rest or any(word in part.lower() for word in _BODY):
        return False
    in_body = sum(_part(other) == body for other in base)
    return any(word in part.lower() for word in _HEAD) or 2 * in_body > len(base)
