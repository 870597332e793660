"""Put experts of another depth onto the layers of the base, or the base's layers onto theirs.

A map says for each layer of an expert which layer of the base it belongs to. Where the base is deeper, the expert
stands for the base itself in the layers that nothing is mapped to: its task vector is zero there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from mergectl.checkpoints import Checkpoint, open_checkpoint
from mergectl.errors import UserError
from mergectl.layer_pairs import LayerMap, Pairs, given, numbers, parse
from mergectl.layers import the_stack
from mergectl.refs import Ref, Reheaded, Stack

__all__ = ["LayerMap", "check_alike", "given", "mapped", "parse"]

# What must be equal beside the weights' shapes; a number of heads shows in no shape.
ALIKE = (
    "model_type", "hidden_size", "dim", "d_model", "n_embd", "num_attention_heads", "n_heads", "n_head",
    "num_key_value_heads", "intermediate_size", "hidden_dim", "hidden_act", "vocab_size", "max_position_embeddings",
)  # fmt: skip

Experts: TypeAlias = "tuple[tuple[str | None, Ref], ...]"


def mapped(
    base: Ref | None, experts: Experts, layer_map: LayerMap, find_run: Callable[[str], Path | None] | None = None
) -> tuple[Ref | None, Experts]:
    """Return base and experts with one depth, those of another one as stacks of layers, under the heads asked for.

    Headers are read, weights are not.
    """
    if layer_map.changes_nothing:
        return base, experts
    if not isinstance(base, str):
        asked = "A layer map puts experts onto a base of another depth." if layer_map.maps else "A head needs a base."
        raise UserError(f"{asked} Name it: --base MODEL")
    origin, models = _same_depth(base, experts, layer_map, find_run) if layer_map.maps else (base, experts)
    return origin, models if layer_map.head == "small" else _reheaded(base, models, layer_map, find_run)


def _reheaded(
    base: str, experts: Experts, layer_map: LayerMap, find_run: Callable[[str], Path | None] | None
) -> Experts:
    """The experts under another head than their own; each keeps its name."""
    lender = base if layer_map.head == "reference" else None
    found: list[tuple[str | None, Ref]] = []
    for task, ref in experts:
        if not isinstance(ref, str | Stack):
            raise UserError(f"{ref} cannot be put under another head. Name a model.")
        opened = open_checkpoint(ref, find_run)
        found.append((task or opened.task or opened.label, Reheaded(ref, layer_map.head, lender, layer_map.seed)))
    return tuple(found)


def _same_depth(
    base: str, experts: Experts, layer_map: LayerMap, find_run: Callable[[str], Path | None] | None
) -> tuple[Ref, Experts]:
    """Base and experts with one number of layers."""
    origin = open_checkpoint(base, find_run)
    opened = [(task, ref, open_checkpoint(ref, find_run)) for task, ref in experts]
    places: list[list[int] | None] = []
    used: set[str | None] = set()
    for task, ref, expert in opened:
        key = _key(layer_map, task or expert.task, str(ref), expert)
        used |= {key}
        pairs = layer_map.maps.get(key)
        same = the_stack(expert.names, expert.ref).count == the_stack(origin.names, base).count
        places.append(None if pairs is None or (key is None and same) else _numbers(pairs, expert, origin))
    if unknown := [str(name) for name in layer_map.maps if name is not None and name not in used]:
        raise UserError(f"There is no expert '{unknown[0]}' for which a layer map was given.")
    if layer_map.depth == "small":
        return _cut(base, places, opened), experts
    count = the_stack(origin.names, base).count
    return base, tuple(
        (task or expert.task or expert.label, ref if map_ is None else _placed(str(ref), map_, base, count))
        for (task, ref, expert), map_ in zip(opened, places, strict=True)
    )


def _key(layer_map: LayerMap, task: str | None, ref: str, expert: Checkpoint) -> str | None:
    """The name under which an expert's map was given."""
    names = [task, (task or "").rsplit("/", 1)[-1], ref, expert.label]
    return next((name for name in names if name and name in layer_map.maps), None)


def _numbers(pairs: Pairs, expert: Checkpoint, base: Checkpoint) -> list[int]:
    """The base's layer for each of the expert's."""
    check_alike(expert, base)
    few, many = the_stack(expert.names, expert.ref).count, the_stack(base.names, base.ref).count
    return numbers(pairs, few, many, expert.ref, base.ref)


def check_alike(expert: Checkpoint, base: Checkpoint) -> None:
    """Refuse models that differ in more than depth, by what their configurations say."""
    for key in ALIKE:
        ours, theirs = base.config.get(key), expert.config.get(key)
        if ours is not None and theirs is not None and ours != theirs:
            raise UserError(
                f"Layers are mapped between models alike in all but depth, but {key} is {theirs} in {expert.ref} "
                f"and {ours} in {base.ref}."
            )


def _placed(expert: str, places: Sequence[int], base: str, count: int) -> Ref:
    """An expert with the base's number of layers."""
    at = {number: layer for layer, number in enumerate(places)}
    layers = tuple((expert, at[n]) if n in at else (base, n) for n in range(count))
    return expert if len(at) == count and list(places) == sorted(places) else Stack(layers, expert, expert, expert)


def _cut(base: str, places: Sequence[list[int] | None], opened: Sequence[tuple[Any, Any, Checkpoint]]) -> Ref:
    """The base with those of its layers alone that the experts are mapped to."""
    odd = next((expert.ref for (*_, expert), found in zip(opened, places, strict=True) if found != places[0]), None)
    if places[0] is None or odd is not None:
        who = odd or opened[0][2].ref
        raise UserError(f"With depth 'small' all experts need one layer map, but {who} has another.")
    return Stack(tuple((base, number) for number in places[0]), base, base, base)
