"""What a layer map says: for each layer of an expert the layer of the base that it belongs to; whose depth and head."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from mergectl.errors import UserError, did_you_mean

WORDS = ("prefix", "uniform")
DEPTHS = ("base", "small")
HEADS = ("small", "reference", "interpolate")

Pairs: TypeAlias = "str | Mapping[int, int]"  # a word, or layer of the expert -> layer of the base


@dataclass(frozen=True)
class LayerMap:
    """Maps by expert (None: of all that have another depth), and whose depth and head the result has.

    `head` is `small` (the expert's own), `interpolate` (merged like any weight, where the base has one, too), or
    `reference` (drawn anew with `seed`, on the base's pooler, as the alpha study did).
    """

    maps: Mapping[str | None, Pairs]
    depth: str = "base"
    head: str = "small"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a depth or a head policy that is none; `expert` is the older word for `small`."""
        if self.depth == "expert":
            object.__setattr__(self, "depth", "small")
        if self.depth not in DEPTHS:
            raise UserError(f"depth must be base or small, got '{self.depth}'.{did_you_mean(self.depth, DEPTHS)}")
        if self.depth != "base" and not self.maps:
            raise UserError("depth says which layers a layer map keeps. Add the map: --layer-map uniform")
        if self.head not in HEADS:
            raise UserError(f"head must be {', '.join(HEADS)}, got '{self.head}'.{did_you_mean(self.head, HEADS)}")

    @property
    def changes_nothing(self) -> bool:
        """Whether models are merged as they are."""
        return not self.maps and self.head == "small"


def parse(texts: Sequence[str], depth: str = "base", head: str = "small", seed: int = 0) -> LayerMap:
    """Read maps as typed: `uniform`, `tiny=prefix` or `tiny=0:1,1:3`."""
    maps: dict[str | None, Pairs] = {}
    for text in texts:
        name, equals, pairs = text.rpartition("=")
        maps[name if equals else None] = _pairs(pairs)
    return LayerMap(maps, depth, head, seed)


def given(value: Any, depth: str = "base", head: str = "small", seed: int = 0) -> LayerMap:
    """Take maps from a recipe file: one map, or {expert: map}; a map is a word, pairs or a mapping."""
    if isinstance(value, Mapping) and not all(isinstance(key, int) for key in value):
        return LayerMap({str(name): _pairs(pairs) for name, pairs in value.items()}, depth, head, seed)
    return LayerMap({} if value is None else {None: _pairs(value)}, depth, head, seed)


def _pairs(value: Any) -> Pairs:
    """One map, checked as far as that can be done without the models."""
    if isinstance(value, str) and value in WORDS:
        return value
    if isinstance(value, str) and re.fullmatch(r"\d+:\d+(,\d+:\d+)*", value):
        pairs = [(int(one), int(other)) for one, other in (pair.split(":") for pair in value.split(","))]
        value = dict(pairs) if len(dict(pairs)) == len(pairs) else value
    if isinstance(value, Sequence) and not isinstance(value, str):  # the layers of the base, in the expert's order
        value = dict(enumerate(value))
    if not isinstance(value, Mapping) or not value or not all(_is_number(n) for pair in value.items() for n in pair):
        raise UserError(
            f"a layer map is prefix, uniform, or pairs of a layer of the expert and one of the base like 0:1,1:3, "
            f"got {value!r}.{did_you_mean(str(value), WORDS)}"
        )
    return dict(value)


def _is_number(value: Any) -> bool:
    return type(value) is int and value >= 0


def numbers(pairs: Pairs, few: int, many: int, expert: str, base: str) -> list[int]:
    """The layer of the base, which has `many`, for each of the `few` layers of the expert."""
    if few > many:
        raise UserError(f"{expert} has {few} layers, more than the {many} of {base}. Exchange them.")
    if pairs == "uniform" and many % few:
        raise UserError(f"A uniform layer map needs a multiple of {few} layers, but {base} has {many}: name pairs.")
    if isinstance(pairs, str):
        return [(at + 1) * many // few - 1 if pairs == "uniform" else at for at in range(few)]
    wrong = next((at for at in range(few) if at not in pairs), None)
    if wrong is not None:
        raise UserError(f"The layer map says nothing of layer {wrong} of {expert}, which has {few}.")
    if extra := [at for at in pairs if at >= few] or [at for at in pairs.values() if at >= many]:
        raise UserError(f"The layer map names layer {extra[0]}: {expert} has {few}, {base} has {many}.")
    if len(set(pairs.values())) < few:
        raise UserError("The layer map puts two layers of the expert onto one of the base.")
    return [pairs[at] for at in range(few)]
