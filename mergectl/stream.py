"""A merge under way: methods read task vectors, and every weight they give is finished where it was computed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mergectl import plugins, settings
from mergectl.blocks import Cut
from mergectl.errors import UserError
from mergectl.inputs import Inputs, Weights
from mergectl.methods._contract import MergeWarning, MethodError, Remember
from mergectl.plan import (
    GIVEN,
    Recipe,
    Step,
    check_base,
    check_experts,
    check_supplies,
    generators,
    groups,
    steps_of,
)
from mergectl.pool import Pool

if TYPE_CHECKING:
    import torch

    from mergectl.methods._task_vectors import TaskVectors


# Supplies by which a refinement's result depends on more than the models, its settings and the seed.
DECIDING = frozenset({"masks", "signs", "grams", "fishers", "entropy"})


@dataclass(frozen=True)
class Piece:
    """One weight of the result, or a block of one."""

    name: str
    weight: torch.Tensor  # base + merged task vector, float32; a weight that is not floating: the base's own
    delta: torch.Tensor | None = None  # the unified task vector, where the method keeps masks
    masks: torch.Tensor | None = None  # [task, *shape], bool
    own: Mapping[str, torch.Tensor] = field(default_factory=dict)  # by task: a non-floating weight unlike the base's
    start: int = 0  # a block: the place of its first element in the weight
    last: bool = True  # nothing of the weight comes after it


@dataclass(frozen=True)
class _Finished:
    """What became of a method's result in the thread that computed it."""

    result: Any


class Stream:
    """A merge under way: iterate over its pieces; afterwards `rescalers` holds what the method kept per task."""

    def __init__(
        self, recipe: Recipe, base: Weights | None, experts: Mapping[str, Weights], supplies: Mapping[str, Any],
        device: str = "cpu",
    ) -> None:  # fmt: skip
        """Check everything that can be checked before a weight is merged."""
        self.recipe, self.supplies, self.device = recipe, supplies, device
        self.info = settings.describe(recipe.method)
        self.inputs = Inputs(base, experts, device)
        self.rescalers: dict[str, float] | None = None
        self._lends = False  # pieces are looked at where they are made, so that their memory may serve again
        self.steps = steps_of(recipe, self.inputs.tasks)
        self.wanted = {key: must for step in self.steps for key, must in settings.describe(step.name).supplies.items()}
        check_experts(self.info, len(experts))
        check_supplies(self.info, self.wanted, supplies)
        check_base(self.info.name, self.steps, base is not None)

    def __iter__(self) -> Iterator[Piece]:
        """Merge weight by weight; every piece is a whole weight, and its own."""
        self._lends = False
        whole: Piece | None = None
        for piece in self._results(lambda piece: piece):
            if piece.start == 0 and piece.last:
                yield piece
                continue
            whole = self._join(whole, piece)
            if piece.last:
                yield whole

    def run(self, take: Callable[[Piece], None]) -> Iterator[str]:
        """Merge, lending every piece or block to `take` in the thread that made it; yield the names of weights done.

        `take` refuses with a UserError what is not finite.
        """

        def taken(piece: Piece) -> str | None:
            take(piece)
            return piece.name if piece.last else None

        self._lends = True
        return (name for name in self._results(taken) if name is not None)

    def _results(self, take: Callable[[Piece], Any]) -> Iterator[Any]:
        """What `take` makes of all pieces, in order."""
        try:
            with Pool(self.device) as pool:
                self.inputs.room = pool.room
                for names, steps in groups(self.steps, self.inputs.floating):
                    yield from self._group(names, steps, take, pool)
        except MethodError as error:
            raise UserError(str(error)) from error
        finally:
            self.inputs.close()
        for piece in self._carried():
            yield take(piece)
        for task in sorted(self.inputs.unchanged if self.inputs.base is not None and self.inputs.floating else ()):
            warnings.warn(f"The expert '{task}' equals the base: it adds nothing.", MergeWarning, stacklevel=2)

    def _group(
        self, names: Sequence[str], steps: Sequence[Step], take: Callable[[Piece], Any], pool: Pool
    ) -> Iterator[Any]:
        """Run the method on a group of weights that share their settings."""
        *refinements, last = steps
        forms = {settings.blocks_of(step.name, step.settings) for step in steps}
        units = names if "" in forms else self.inputs.cut(names, in_rows="rows" in forms)
        is_weight = "experts" in settings.describe(last.name).supplies

        def finish(name: str, result: Any) -> _Finished:
            piece = self._piece(name, result, is_weight, last.name)
            try:
                return _Finished(take(piece))
            except UserError:
                self.inputs.check_result(name, piece.weight)  # the fault may be a model's
                raise

        vectors = self._vectors(units, refinements, pool, finish)
        result = iter(settings.function_of(last.name)(**self._supplied(last, vectors, refinements), **last.settings))
        missing = dict.fromkeys(units)
        while True:
            try:
                name, *given = next(result)
            except StopIteration as stop:
                self._keep(stop.value)
                break
            except (UserError, MethodError):
                raise
            except Exception as error:
                raise plugins.blamed("methods", last.name, error) from error
            if name not in missing:
                raise UserError(f"Method '{last.name}' gave an unknown or misshapen weight '{name}': mend its file.")
            del missing[name]
            done = given[0] if isinstance(given[0], _Finished) else finish(name, tuple(given))
            yield done.result
        if missing:
            raise UserError(f"Method '{last.name}' gave no weight '{next(iter(missing))}': mend its file.")

    def _piece(self, name: str, result: Any, is_weight: bool, method: str) -> Piece:
        """What a method gave for a name (a tensor, or one with masks) as a piece of the result."""
        merged, *masks = result if isinstance(result, tuple) else (result,)
        if merged.shape != self.inputs.shapes.get(name):
            raise UserError(f"Method '{method}' gave an unknown or misshapen weight '{name}': mend its file.")
        if (is_weight or masks) and merged._is_view():  # perhaps of memory that the next weight is read into
            merged = merged.clone()
        weight = merged if is_weight else self.inputs.on_base(name, merged, lent=self._lends)
        if not self._lends:
            self.inputs.check_result(name, weight)
        weight = weight if weight.is_cpu else weight.cpu()
        delta, kept = (merged.cpu(), masks[0].cpu()) if masks else (None, None)
        if name not in self.inputs.blocks:
            return Piece(name, weight, delta, kept)
        block = self.inputs.blocks[name]
        last = block.stop == math.prod(self.inputs.shapes[block.weight])
        return Piece(block.weight, weight, delta, kept, start=block.start, last=last)

    def _join(self, whole: Piece | None, part: Piece) -> Piece:
        """Put a block into its weight; blocks of one weight come one after the other."""
        import torch

        if whole is None or whole.name != part.name:
            shape = self.inputs.shapes[part.name]
            masks = None if part.masks is None else torch.empty((len(part.masks), *shape), dtype=torch.bool)
            delta = None if part.delta is None else torch.empty(shape, dtype=part.delta.dtype)
            whole = Piece(part.name, torch.empty(shape, dtype=part.weight.dtype), delta, masks)
        place = slice(part.start, part.start + part.weight.numel())
        whole.weight.view(-1)[place] = part.weight.reshape(-1)
        if whole.delta is not None and part.delta is not None:
            whole.delta.view(-1)[place] = part.delta.reshape(-1)
        if whole.masks is not None and part.masks is not None:
            whole.masks.view(len(whole.masks), -1)[:, place] = part.masks.reshape(len(part.masks), -1)
        return whole

    def _keep(self, kept: Mapping[str, Any] | None) -> None:
        if self.info.extra_bits:
            rescalers = (kept or {}).get("rescalers", [1.0] * len(self.inputs.tasks))
            self.rescalers = dict(zip(self.inputs.tasks, map(float, rescalers), strict=True))

    def _carried(self) -> Iterator[Piece]:
        """Pass on the weights that are no floating-point numbers, such as position ids."""
        import torch

        for name in self.inputs.carried:
            weight, own = self.inputs.first[name], {}
            for task, expert in self.inputs.experts.items():
                if self.info.extra_bits and name in expert and not torch.equal(expert[name], weight):
                    own[task] = expert[name]
            yield Piece(name, weight, own=own)

    def _vectors(self, names: Sequence[str], refinements: Sequence[Step], pool: Pool, finish: Any) -> TaskVectors:
        """Return the task vectors of a group of weights after its refinements."""
        from mergectl.methods._task_vectors import TaskVectors

        shapes = {name: self.inputs.shapes[name] for name in names}
        lab = {"wholes": self.inputs.wholes(names), "spread": pool.map, "finish": finish}
        lab |= {"lend": self.inputs.lent_deltas, "sample": self.inputs.some_deltas}
        vectors = TaskVectors(self.inputs.tasks, shapes, self.inputs.deltas, **lab)
        for place, step in enumerate(refinements):
            supplied = self._supplied(step, vectors, refinements[:place], stream=place)
            vectors = settings.function_of(step.name)(**supplied, **step.settings)
        return vectors

    def _supplied(self, step: Step, vectors: TaskVectors, before: Sequence[Step], stream: int = -1) -> dict[str, Any]:
        """Return what a step asks for, as far as there is any; the steps before it have refined the vectors."""
        inputs, have_base = self.inputs, self.inputs.base is not None
        weights = (lambda name: inputs.base_weight(name) + vectors[name]) if before else inputs.weights
        lend = None if before else inputs.lent_weights
        offers: dict[str, Any] = {
            "task_vectors": vectors if have_base else None,
            "experts": vectors.reading(weights, lend=lend),
            "base": vectors.reading(inputs.base_weight, ("base",)) if have_base else None,
            "rng": generators(self.recipe.seed, stream),
            **{name: self.supplies.get(name) for name in GIVEN},
        }
        if before and offers["remember"] is not None:
            asked = {name for step in before for name in settings.describe(step.name).supplies}
            own = not any(self.supplies.get(name) for name in asked & DECIDING)
            offers["remember"] = _remembered_after(before, self.recipe.seed, offers["remember"]) if own else None
        if inputs.blocks and offers["signs"] is not None:
            offers["signs"] = Cut(offers["signs"], inputs.blocks)
        if inputs.blocks and offers["masks"] is not None:
            offers["masks"] = {task: Cut(masks, inputs.blocks) for task, masks in offers["masks"].items()}
        return {name: offers[name] for name in settings.describe(step.name).supplies}


def _remembered_after(before: Sequence[Step], seed: int, remember: Remember) -> Remember:
    """What is made of refined task vectors is another thing than what is made of the models' own."""
    words = ", ".join(f"{step.name} {dict(sorted(step.settings.items()))}" for step in before)
    return lambda what, *given: remember(f"{what} after {words}, seed {seed}", *given)


def merge_stream(
    recipe: Recipe,
    base: Weights | None,
    experts: Mapping[str, Weights],
    *,
    supplies: Mapping[str, Any] | None = None,
    device: str = "cpu",
) -> Stream:
    """Check a merge of weights that all have the same names and shapes, and return it ready to be iterated over.

    With a CUDA device the blocks are computed there: each thread has a stream of its own, so that one copies while
    another computes. What comes out is in main memory.
    """
    return Stream(recipe, base, experts, supplies or {}, device)
