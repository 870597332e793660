"""Put experts of another depth onto the layers of the base, or the base's layers onto theirs.

A map says for each layer of an expert which layer of the base it belongs to. Where the base is deeper, the expert
stands for the base itself in the layers that nothing is mapped to: its task vector is zero there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from mergectl.checkpoints import Checkpoint, open_checkpoint
from mergectl.errors import UserError, did_you_mean
from mergectl.layers import the_stack
from mergectl.refs import Ref, Stack

WORDS = ("prefix", "uniform")
DEPTHS = ("base", "expert")
# What must be equal beside the weights' shapes; a number of heads shows in no shape.
ALIKE = (
    "model_type", "hidden_size", "dim", "d_model", "n_embd", "num_attention_heads", "n_heads", "n_head",
    "num_key_value_heads", "intermediate_size", "hidden_dim", "hidden_act", "vocab_size", "max_position_embeddings",
)  # fmt: skip

Pairs: TypeAlias = "str | Mapping[int, int]"  # a word, or layer of the expert -> layer of the base
Experts: TypeAlias = "tuple[tuple[str | None, Ref], ...]"


@dataclass(frozen=True)
class LayerMap:
    """Maps by expert (None: of all that have another depth), and whose depth the result has."""

    maps: Mapping[str | None, Pairs]
    depth: str = "base"

    def __post_init__(self) -> None:
        """Refuse a depth that is none."""
        if self.depth not in DEPTHS:
            raise UserError(f"depth must be base or expert, got '{self.depth}'.{did_you_mean(self.depth, DEPTHS)}")
        if self.depth != "base" and not self.maps:
            raise UserError("depth says which layers a layer map keeps. Add the map: --layer-map uniform")


def parse(texts: Sequence[str], depth: str) -> LayerMap:
    """Read maps as typed: `uniform`, `tiny=prefix` or `tiny=0:1,1:3`."""
    maps: dict[str | None, Pairs] = {}
    for text in texts:
        name, equals, pairs = text.rpartition("=")
        maps[name if equals else None] = _pairs(pairs)
    return LayerMap(maps, depth)


def given(value: Any, depth: str) -> LayerMap:
    """Take maps from a recipe file: one map, or {expert: map}; a map is a word, pairs or a mapping."""
    if isinstance(value, Mapping) and not all(isinstance(key, int) for key in value):
        return LayerMap({str(name): _pairs(pairs) for name, pairs in value.items()}, depth)
    return LayerMap({} if value is None else {None: _pairs(value)}, depth)


def _pairs(value: Any) -> Pairs:
    """One map, checked as far as that can be done without the models."""
    if isinstance(value, str) and value in WORDS:
        return value
    if isinstance(value, str) and re.fullmatch(r"\d+:\d+(,\d+:\d+)*", value):
        pairs = [(int(one), int(other)) for one, other in (pair.split(":") for pair in value.split(","))]
        value = dict(pairs) if len(dict(pairs)) == len(pairs) else value
    if not isinstance(value, Mapping) or not value or not all(_is_number(n) for pair in value.items() for n in pair):
        raise UserError(
            f"a layer map is prefix, uniform, or pairs of a layer of the expert and one of the base like 0:1,1:3, "
            f"got {value!r}.{did_you_mean(str(value), WORDS)}"
        )
    return dict(value)


def _is_number(value: Any) -> bool:
    return type(value) is int and value >= 0


def mapped(
    base: Ref | None, experts: Experts, layer_map: LayerMap, find_run: Callable[[str], Path | None] | None = None
) -> tuple[Ref | None, Experts]:
    """Return base and experts with one depth: those of another one as stacks of layers. Headers are read."""
    if not layer_map.maps:
        return base, experts
    if not isinstance(base, str):
        raise UserError("A layer map puts experts onto a base of another depth. Name it: --base MODEL")
    origin = open_checkpoint(base, find_run)
    opened = [(task, ref, open_checkpoint(ref, find_run)) for task, ref in experts]
    numbers: list[list[int] | None] = []
    used: set[str | None] = set()
    for task, ref, expert in opened:
        key = _key(layer_map, task or expert.task, str(ref), expert)
        used |= {key}
        pairs = layer_map.maps.get(key)
        same = the_stack(expert.names, expert.ref).count == the_stack(origin.names, base).count
        numbers.append(None if pairs is None or (key is None and same) else _numbers(pairs, expert, origin))
    if unknown := [str(name) for name in layer_map.maps if name is not None and name not in used]:
        raise UserError(f"There is no expert '{unknown[0]}' for which a layer map was given.")
    if layer_map.depth == "expert":
        return _cut(base, numbers, opened), experts
    count = the_stack(origin.names, base).count
    return base, tuple(
        (task or expert.task or expert.label, ref if map_ is None else _placed(str(ref), map_, base, count))
        for (task, ref, expert), map_ in zip(opened, numbers, strict=True)
    )


def _key(layer_map: LayerMap, task: str | None, ref: str, expert: Checkpoint) -> str | None:
    """The name under which an expert's map was given."""
    names = [task, (task or "").rsplit("/", 1)[-1], ref, expert.label]
    return next((name for name in names if name and name in layer_map.maps), None)


def _numbers(pairs: Pairs, expert: Checkpoint, base: Checkpoint) -> list[int]:
    """The base's layer for each of the expert's."""
    check_alike(expert, base)
    few, many = the_stack(expert.names, expert.ref).count, the_stack(base.names, base.ref).count
    if few > many:
        raise UserError(f"{expert.ref} has {few} layers, more than the {many} of {base.ref}. Exchange them.")
    if pairs == "uniform" and many % few:
        raise UserError(f"A uniform layer map needs a multiple of {few} layers, but {base.ref} has {many}: name pairs.")
    if isinstance(pairs, str):
        return [(at + 1) * many // few - 1 if pairs == "uniform" else at for at in range(few)]
    wrong = next((at for at in range(few) if at not in pairs), None)
    if wrong is not None:
        raise UserError(f"The layer map says nothing of layer {wrong} of {expert.ref}, which has {few}.")
    if extra := [at for at in pairs if at >= few] or [at for at in pairs.values() if at >= many]:
        raise UserError(f"The layer map names layer {extra[0]}: {expert.ref} has {few}, {base.ref} has {many}.")
    if len(set(pairs.values())) < few:
        raise UserError("The layer map puts two layers of the expert onto one of the base.")
    return [pairs[at] for at in range(few)]


def check_alike(expert: Checkpoint, base: Checkpoint) -> None:
    """Refuse models that differ in more than depth, by what their configurations say."""
    for key in ALIKE:
        ours, theirs = base.config.get(key), expert.config.get(key)
        if ours is not None and theirs is not None and ours != theirs:
            raise UserError(
                f"Layers are mapped between models alike in all but depth, but {key} is {theirs} in {expert.ref} "
                f"and {ours} in {base.ref}."
            )


def _placed(expert: str, numbers: Sequence[int], base: str, count: int) -> Ref:
    """An expert with the base's number of layers."""
    at = {number: layer for layer, number in enumerate(numbers)}
    layers = tuple((expert, at[n]) if n in at else (base, n) for n in range(count))
    return expert if len(at) == count and list(numbers) == sorted(numbers) else Stack(layers, expert, expert, expert)


def _cut(base: str, numbers: Sequence[list[int] | None], opened: Sequence[tuple[Any, Any, Checkpoint]]) -> Ref:
    """The base with those of its layers alone that the experts are mapped to."""
    odd = next((expert.ref for (*_, expert), found in zip(opened, numbers, strict=True) if found != numbers[0]), None)
    if numbers[0] is None or odd is not None:
        who = odd or opened[0][2].ref
        raise UserError(f"With depth 'expert' all experts need one layer map, but {who} has another.")
    return Stack(tuple((base, number) for number in numbers[0]), base, base, base)
