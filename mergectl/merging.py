"""Merge weights held in mappings: `merge_weights` for Python."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mergectl.aligned import aligned
from mergectl.bodies import split_heads
from mergectl.errors import UserError, did_you_mean
from mergectl.inputs import Subset, Weights
from mergectl.methods._contract import MergeWarning
from mergectl.plan import Recipe, Refinements, recipe_of
from mergectl.settings import describe
from mergectl.stream import Piece, Stream, merge_stream
from mergectl.tensorfiles import is_finite
from mergectl.tied import repeated, uses

if TYPE_CHECKING:
    import torch

__all__ = ["MergeWarning", "Merged", "Piece", "Recipe", "Stream", "merge_stream", "merge_weights", "recipe_of"]


def merge_weights(
    method: str,
    base: Weights | None,
    experts: Mapping[str, Weights],
    *,
    seed: int = 0,
    refine: Refinements = (),
    supplies: Mapping[str, Any] | None = None,
    layer_map: Any = None,
    depth: str = "base",
    head: str | None = None,
    **settings: Any,
) -> Merged:
    """Merge experts (task -> weights) of one base; heads that differ in shape stay with their tasks.

    Experts of another depth need a `layer_map`: `prefix`, `uniform`, {layer of the expert: layer of the base}, or one
    of these per task; the result has the `depth` of the base or of the `small` models. `head` is `small` (each
    expert's own, as under a layer map), `interpolate` (merged with the base's) or `reference` (drawn by `seed`).
    Settings are one value each, or {pattern of weight names: value}, or where a method allows it one per task, as a
    sequence or {task: value}. Tied weights given under several names are merged, and counted, once.
    """
    if not experts:
        raise UserError("There is no expert to merge. Give at least one.")
    if base is not None and not base:
        raise UserError("The base holds no weights. Give its weights, or None where there is no base.")
    base, experts, own = aligned(base, experts, layer_map, depth, head, seed)
    names: Weights = base if base is not None else next(iter(experts.values()))
    shared, alone, heads = split_heads(names, experts)
    supplies, tied = dict(supplies or {}), repeated([Subset(model, shared) for model in (names, *experts.values())])
    if "copies" in describe(method).supplies:
        supplies.setdefault("copies", uses(shared, tied, {}))
    shared = [name for name in shared if name not in tied]
    stream = merge_stream(
        recipe_of(method, settings, refine, seed),
        None if base is None else Subset(base, shared),
        {task: Subset(expert, shared) for task, expert in experts.items()},
        supplies=supplies,
    )
    result = Merged({task: Subset(experts[task], heads[task]) for task in experts})
    result.fill(stream, names, tied)
    result.carry({**Subset(names, alone), **own})
    return result


class Merged(Mapping[str, "torch.Tensor"]):
    """The merged weights that all tasks share, in the base's types; `task` and `kept` give what each task has.

    `kept` is empty, or for a method that keeps something per task: `unified` {name: tensor}, `masks`
    {task: {name: bool tensor}} and `rescalers` {task: number}.
    """

    def __init__(self, heads: Mapping[str, Weights]) -> None:
        """Begin empty, with each task's own head."""
        self.tasks = tuple(heads)
        self.kept: dict[str, Any] = {}
        self._weights: dict[str, torch.Tensor] = {}
        self._base: dict[str, torch.Tensor] = {}
        self._own = {task: {name: _copy(weights[name]) for name in weights} for task, weights in heads.items()}

    def fill(self, stream: Stream, like: Weights, tied: Mapping[str, str]) -> None:
        """Take in all pieces of a merge, each in the type and place of its weight in `like`, and tied ones' copies."""
        unified: dict[str, torch.Tensor] = {}
        masks: dict[str, dict[str, torch.Tensor]] = {task: {} for task in self.tasks}
        for piece in stream:
            model = like[piece.name]
            self._weights[piece.name] = weight = _copy(piece.weight).to(model)
            if weight.is_floating_point() and not is_finite(weight):
                raise UserError(
                    f"The merged '{piece.name}' holds numbers that {weight.dtype} cannot hold. Choose smaller settings."
                )
            for task, weight in piece.own.items():
                self._own[task][piece.name] = _copy(weight)
            if piece.delta is not None and piece.masks is not None:
                unified[piece.name] = piece.delta.to(model)
                self._base[piece.name] = _copy(model)
                for task, mask in zip(self.tasks, piece.masks, strict=True):
                    masks[task][piece.name] = mask
        if unified or stream.rescalers is not None:
            self.kept = {"unified": unified, "masks": masks, "rescalers": stream.rescalers}
        self._weights.update({name: _copy(self._weights[of]).to(like[name]) for name, of in tied.items()})
        self._weights = {name: self._weights[name] for name in like if name in self._weights}

    def carry(self, weights: Weights) -> None:
        """Take in weights that no expert has, as they are."""
        self._weights.update({name: _copy(weights[name]) for name in weights})

    def task(self, name: str) -> dict[str, torch.Tensor]:
        """Return all weights of one task: the shared ones, its own head, its mask and rescaler applied."""
        if name not in self.tasks:
            raise UserError(f"No task '{name}' in this merge.{did_you_mean(name, self.tasks)}")
        weights = {key: _copy(weight) for key, weight in self._weights.items()}
        for key, base in self._base.items():
            delta = self.kept["unified"][key].float() * self.kept["masks"][name][key].to(base.device)
            rescaled = delta.double() * self.kept["rescalers"][name]
            weights[key] = (base.double() + rescaled).to(base)
        weights.update({key: _copy(weight) for key, weight in self._own[name].items()})
        return weights

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return one shared weight."""
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        """Go through the names of the shared weights."""
        return iter(self._weights)

    def __len__(self) -> int:
        """Return the number of shared weights."""
        return len(self._weights)


def _copy(x: torch.Tensor) -> torch.Tensor:
    """Return a copy that shares nothing with the input."""
    return x.detach().clone()
