"""Merge weights held in mappings: a stream of merged weights for files, and `merge_weights` for Python."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mergectl import plugins, settings
from mergectl.blocks import Cut
from mergectl.errors import UserError, did_you_mean
from mergectl.inputs import Inputs, Subset, Weights, split_heads
from mergectl.methods._contract import MergeWarning, MethodError
from mergectl.plan import (
    GIVEN,
    Recipe,
    Refinements,
    Step,
    check_experts,
    check_supplies,
    generators,
    groups,
    recipe_of,
    steps_of,
)

if TYPE_CHECKING:
    import torch

    from mergectl.methods._task_vectors import TaskVectors

__all__ = ["MergeWarning", "Merged", "Piece", "Recipe", "Stream", "merge_stream", "merge_weights", "recipe_of"]


@dataclass(frozen=True)
class Piece:
    """One weight of the result."""

    name: str
    weight: torch.Tensor  # base + merged task vector, float32; a weight that is not floating: the base's own
    delta: torch.Tensor | None = None  # the unified task vector, where the method keeps masks
    masks: torch.Tensor | None = None  # [task, *shape], bool
    own: Mapping[str, torch.Tensor] = field(default_factory=dict)  # by task: a non-floating weight unlike the base's


class Stream:
    """A merge under way: iterate over its pieces; afterwards `rescalers` holds what the method kept per task."""

    def __init__(
        self, recipe: Recipe, base: Weights | None, experts: Mapping[str, Weights], supplies: Mapping[str, Any]
    ) -> None:
        """Check everything that can be checked before a weight is merged."""
        self.recipe, self.supplies = recipe, supplies
        self.info = settings.describe(recipe.method)
        self.inputs = Inputs(base, experts)
        self.rescalers: dict[str, float] | None = None
        self.steps = steps_of(recipe, self.inputs.tasks)
        self.wanted = {key: must for step in self.steps for key, must in settings.describe(step.name).supplies.items()}
        check_experts(self.info, len(experts))
        check_supplies(self.info, self.wanted, supplies)
        if base is None and (len(self.steps) > 1 or self.wanted.get("task_vectors") or self.wanted.get("base")):
            raise UserError(f"Method '{self.info.name}' needs the base that the experts came from, and none was given.")

    def __iter__(self) -> Iterator[Piece]:
        """Merge weight by weight."""
        try:
            for names, steps in groups(self.steps, self.inputs.floating):
                yield from self._pieces(names, steps)
        except MethodError as error:
            raise UserError(str(error)) from error
        yield from self._carried()
        for task in sorted(self.inputs.unchanged if self.inputs.base is not None and self.inputs.floating else ()):
            warnings.warn(f"The expert '{task}' equals the base: it adds nothing.", MergeWarning, stacklevel=2)

    def _pieces(self, names: Sequence[str], steps: Sequence[Step]) -> Iterator[Piece]:
        """Run the method on a group of weights that share their settings."""
        *refinements, last = steps
        units = self.inputs.cut(names) if all(settings.in_blocks(step.name, step.settings) for step in steps) else names
        vectors = self._vectors(units, refinements)
        supplied = self._supplied(last, vectors, bool(refinements))
        result = iter(settings.function_of(last.name)(**supplied, **last.settings))
        missing = dict.fromkeys(units)
        whole: Piece | None = None
        while True:
            try:
                name, merged, *masks = next(result)
            except StopIteration as stop:
                self._keep(stop.value)
                break
            except (UserError, MethodError):
                raise
            except Exception as error:
                raise plugins.blamed("methods", last.name, error) from error
            if name not in missing or merged.shape != self.inputs.shapes[name]:
                raise UserError(f"Method '{last.name}' gave an unknown or misshapen weight '{name}': mend its file.")
            del missing[name]
            piece = self._piece(name, merged, masks[0] if masks else None, "experts" in supplied)
            if name not in self.inputs.blocks:
                yield piece
                continue
            whole = self._join(whole, piece)
            if self.inputs.blocks[name].stop == self.inputs.size(name):
                yield whole
                whole = None
        if missing:
            raise UserError(f"Method '{last.name}' gave no weight '{next(iter(missing))}': mend its file.")

    def _piece(self, name: str, merged: torch.Tensor, masks: torch.Tensor | None, is_weight: bool) -> Piece:
        weight = merged if is_weight else self.inputs.base_weight(name) + merged
        return Piece(name, weight, None if masks is None else merged, masks)

    def _join(self, whole: Piece | None, part: Piece) -> Piece:
        """Put a block into its weight; blocks of one weight come one after the other."""
        import torch

        block = self.inputs.blocks[part.name]
        if whole is None or whole.name != block.weight:
            shape = self.inputs.shapes[block.weight]
            masks = None if part.masks is None else torch.empty((len(part.masks), *shape), dtype=torch.bool)
            delta = None if part.delta is None else torch.empty(shape, dtype=part.delta.dtype)
            whole = Piece(block.weight, torch.empty(shape, dtype=part.weight.dtype), delta, masks)
        place = slice(block.start, block.stop)
        whole.weight.view(-1)[place] = part.weight
        if whole.delta is not None and part.delta is not None:
            whole.delta.view(-1)[place] = part.delta
        if whole.masks is not None and part.masks is not None:
            whole.masks.view(len(whole.masks), -1)[:, place] = part.masks
        return whole

    def _keep(self, kept: Mapping[str, Any] | None) -> None:
        if kept and "rescalers" in kept:
            self.rescalers = dict(zip(self.inputs.tasks, (float(r) for r in kept["rescalers"]), strict=True))

    def _carried(self) -> Iterator[Piece]:
        """Pass on the weights that are no floating-point numbers, such as position ids."""
        import torch

        for name in self.inputs.carried:
            weight, own = self.inputs.first[name], {}
            for task, expert in self.inputs.experts.items():
                if self.info.extra_bits and name in expert and not torch.equal(expert[name], weight):
                    own[task] = expert[name]
            yield Piece(name, weight, own=own)

    def _vectors(self, names: Sequence[str], refinements: Sequence[Step]) -> TaskVectors:
        """Return the task vectors of a group of weights after its refinements."""
        from mergectl.methods._task_vectors import TaskVectors

        shapes = {name: self.inputs.shapes[name] for name in names}
        sizes = {name: self.inputs.size(name) for name in names}
        vectors = TaskVectors(self.inputs.tasks, shapes, self.inputs.deltas, sizes)
        for place, step in enumerate(refinements):
            supplied = self._supplied(step, vectors, place > 0, stream=place)
            vectors = settings.function_of(step.name)(**supplied, **step.settings)
        return vectors

    def _supplied(self, step: Step, vectors: TaskVectors, refined: bool, stream: int = -1) -> dict[str, Any]:
        """Return what a step asks for, as far as there is any."""
        inputs, have_base = self.inputs, self.inputs.base is not None
        weights = (lambda name: inputs.base_weight(name) + vectors[name]) if refined else inputs.weights
        experts = type(vectors)(inputs.tasks, vectors.shapes, weights, vectors.sizes)
        base = type(vectors)(("base",), vectors.shapes, inputs.base_weight, vectors.sizes)
        offers: dict[str, Any] = {
            "task_vectors": vectors if have_base else None,
            "experts": experts,
            "base": base if have_base else None,
            "rng": generators(self.recipe.seed, stream),
            **{name: self.supplies.get(name) for name in GIVEN},
        }
        if inputs.blocks and offers["signs"] is not None:
            offers["signs"] = Cut(offers["signs"], inputs.blocks)
        if inputs.blocks and offers["masks"] is not None:
            offers["masks"] = {task: Cut(masks, inputs.blocks) for task, masks in offers["masks"].items()}
        return {name: offers[name] for name in settings.describe(step.name).supplies}


def merge_stream(
    recipe: Recipe,
    base: Weights | None,
    experts: Mapping[str, Weights],
    *,
    supplies: Mapping[str, Any] | None = None,
) -> Stream:
    """Check a merge of weights that all have the same names and shapes, and return it ready to be iterated over."""
    return Stream(recipe, base, experts, supplies or {})


def merge_weights(
    method: str,
    base: Weights | None,
    experts: Mapping[str, Weights],
    *,
    seed: int = 0,
    refine: Refinements = (),
    supplies: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Merged:
    """Merge experts (task -> weights) of one base; heads that differ in shape stay with their tasks.

    Settings are one value each, or {pattern of weight names: value}, or where a method allows it one per task, as a
    sequence or {task: value}.
    """
    if not experts:
        raise UserError("There is no expert to merge. Give at least one.")
    names: Weights = base if base is not None else next(iter(experts.values()))
    shared, alone, heads = split_heads(names, experts)
    stream = merge_stream(
        recipe_of(method, settings, refine, seed),
        None if base is None else Subset(base, shared),
        {task: Subset(expert, shared) for task, expert in experts.items()},
        supplies=supplies,
    )
    result = Merged({task: Subset(experts[task], heads[task]) for task in experts})
    result.fill(stream, names)
    result.carry(Subset(names, alone))
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

    def fill(self, stream: Stream, like: Weights) -> None:
        """Take in all pieces of a merge, each in the type and place of its weight in `like`."""
        unified: dict[str, torch.Tensor] = {}
        masks: dict[str, dict[str, torch.Tensor]] = {task: {} for task in self.tasks}
        for piece in stream:
            model = like[piece.name]
            self._weights[piece.name] = _copy(piece.weight).to(model)
            for task, weight in piece.own.items():
                self._own[task][piece.name] = _copy(weight)
            if piece.delta is not None and piece.masks is not None:
                unified[piece.name] = piece.delta.to(model)
                self._base[piece.name] = _copy(model)
                for task, mask in zip(self.tasks, piece.masks, strict=True):
                    masks[task][piece.name] = mask
        if unified or stream.rescalers is not None:
            self.kept = {"unified": unified, "masks": masks, "rescalers": stream.rescalers}
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
