"""Line up weights held in mappings: experts of another depth, and whose head a merge has. Nothing is copied."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mergectl.bodies import head_names
from mergectl.errors import UserError
from mergectl.inputs import Subset, Weights, shape_of
from mergectl.layer_pairs import LayerMap, given, numbers
from mergectl.layers import Numbered, the_stack
from mergectl.methods._contract import MergeWarning
from mergectl.prefixes import DISTILLED, pooler_part
from mergectl.reheading import fresh_head

if TYPE_CHECKING:
    import torch


class Place(NamedTuple):
    """Where a weight is read: under a name of some model, or, with a seed, drawn anew in that weight's shape."""

    weights: Weights
    name: str
    seed: int | None = None


class Lent(Mapping[str, "torch.Tensor"]):
    """Weights under the names of a merge, each read from the model that lends it."""

    def __init__(self, places: Mapping[str, Place]) -> None:
        """Take where each weight is read."""
        self.places = dict(places)

    def __getitem__(self, name: str) -> torch.Tensor:
        """Read one weight."""
        weights, own, seed = self.places[name]
        return weights[own] if seed is None else fresh_head(name, shape_of(weights, own), seed).to(weights[own])

    def __contains__(self, name: object) -> bool:
        """Say whether there is such a weight, without reading it."""
        return name in self.places

    def __iter__(self) -> Iterator[str]:
        """Go through the names in order."""
        return iter(self.places)

    def __len__(self) -> int:
        """Return the number of weights."""
        return len(self.places)


class Aligned(NamedTuple):
    """Models of one depth, and what the base keeps for itself: its own head, where each expert has another."""

    base: Weights | None
    experts: Mapping[str, Weights]
    kept: Weights


def aligned(
    base: Weights | None, experts: Mapping[str, Weights], maps: Any, depth: str, head: str | None, seed: int
) -> Aligned:
    """Give base and experts one depth by layer maps (a map, or {task: map}) and the heads of a policy, if asked to."""
    if maps is None and head is None and depth == "base":
        return Aligned(base, experts, {})
    layer_map = given(maps, depth, head or "small", seed)
    if base is None:
        raise UserError("A layer map puts experts onto a base of another depth. Give the base.")
    models = {task: _without_projections(task, expert) for task, expert in experts.items()}
    if unknown := [str(name) for name in layer_map.maps if name is not None and name not in models]:
        raise UserError(f"There is no expert '{unknown[0]}' for which a layer map was given.")
    origin: Weights = base
    if layer_map.maps:
        origin, models = _same_depth(base, models, layer_map)
    models = {task: _with_pooler(origin, expert) for task, expert in models.items()}
    return _headed(origin, models, layer_map)


def _without_projections(task: str, expert: Weights) -> Weights:
    """An expert without what its distillation left behind; a warning names it."""
    odd = [name for name in expert if DISTILLED.search(name)]
    if not odd:
        return expert
    warnings.warn(f"'{task}' holds projections of its distillation ('{odd[0]}'): left out.", MergeWarning, stacklevel=4)
    return Subset(expert, [name for name in expert if name not in odd])


def _with_pooler(base: Weights, expert: Weights) -> Weights:
    """An expert with the pooler of the base, where it was saved without one."""
    lacking = {name: Place(base, name) for name in base if pooler_part(name) and name not in expert}
    return Lent({name: Place(expert, name) for name in expert} | lacking) if lacking else expert


def _same_depth(
    base: Weights, experts: Mapping[str, Weights], layer_map: LayerMap
) -> tuple[Weights, dict[str, Weights]]:
    """Base and experts with one number of layers: the base's, or that of the experts."""
    ours, found = the_stack(base, "the base"), {}
    maps: dict[str, list[int] | None] = {}
    for task, expert in experts.items():
        theirs = the_stack(expert, f"expert '{task}'")
        pairs = layer_map.maps.get(task, None if theirs.count == ours.count else layer_map.maps.get(None))
        _check_alike(base, expert, task, ours, theirs)
        places = None if pairs is None else numbers(pairs, theirs.count, ours.count, f"expert '{task}'", "the base")
        maps[task] = places
        found[task] = expert if places is None else _spread(base, expert, places, ours, theirs)
    if layer_map.depth == "base":
        return base, found
    first = next(iter(maps.values()))
    if odd := next((task for task, places in maps.items() if places is None or places != first), None):
        raise UserError(f"With depth 'small' all experts need one layer map, but '{odd}' has another.")
    return _cut(base, first or [], ours), dict(experts)


def _check_alike(base: Weights, expert: Weights, task: str, ours: Numbered, theirs: Numbered) -> None:
    """Refuse models that differ in more than depth, by the shape of the first weight that shows it."""
    shapes = {_place(ours, name): shape_of(base, name) for name in base}
    heads = {*head_names(base), *head_names(expert)}
    for name in expert:
        known, shape = shapes.get(_place(theirs, name)), shape_of(expert, name)
        if known is not None and name not in heads and known != shape:
            raise UserError(
                f"Layers are mapped between models alike in all but depth, but '{name}' has shape {list(shape)} in "
                f"expert '{task}' and {list(known)} in the base."
            )


def _place(numbered: Numbered, name: str) -> str:
    """A weight's name without its layer's number."""
    part = numbered.split(name)
    return name if part is None else f"#{part[1]}"


def _spread(base: Weights, expert: Weights, places: Sequence[int], ours: Numbered, theirs: Numbered) -> Weights:
    """An expert on the layers of the base that it is mapped to; the base itself in all others."""
    found = {name: Place(base, name) for name in base if ours.split(name) is not None}
    for name in expert:
        part = theirs.split(name)
        found[name if part is None else f"{ours.prefix}{places[part[0]]}.{part[1]}"] = Place(expert, name)
    return Lent(found)


def _cut(base: Weights, places: Sequence[int], ours: Numbered) -> Weights:
    """The base with those of its layers alone that experts are mapped to, in the experts' order."""
    found = {}
    for name in base:
        part = ours.split(name)
        if part is None:
            found[name] = Place(base, name)
        elif part[0] in places:
            found[f"{ours.prefix}{places.index(part[0])}.{part[1]}"] = Place(base, name)
    return Lent(found)


def _headed(base: Weights, experts: Mapping[str, Weights], layer_map: LayerMap) -> Aligned:
    """Base and experts with the heads that a policy says."""
    own = head_names(base)
    if layer_map.head == "interpolate":
        for task, expert in experts.items():
            theirs = head_names(expert)
            if not theirs or any(name not in base or shape_of(base, name) != shape_of(expert, name) for name in theirs):
                raise UserError(
                    f"A head is interpolated where both models have one of one shape, and the base and '{task}' have "
                    "not. Keep the expert's: head='small'."
                )
        return Aligned(base, experts, {})
    rest = Subset(base, [name for name in base if name not in own])
    if layer_map.head == "reference":
        experts = {task: _drawn(rest, expert, layer_map.seed) for task, expert in experts.items()}
    return Aligned(rest, experts, Subset(base, own))


def _drawn(base: Weights, expert: Weights, seed: int) -> Weights:
    """An expert with the pooler of the base, where that has one, and a head drawn anew."""
    heads = head_names(expert)
    found = {name: Place(expert, name, seed if name in heads else None) for name in expert}
    return Lent(found | {name: Place(base, name) for name in expert if pooler_part(name) and name in base})
