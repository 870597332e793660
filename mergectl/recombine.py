"""Recombine merges in memory: what a method is linear in is merged once, and then only added up, in place.

With a coefficient per task the merged weights are `base + sum_i coefficient_i * component_i`, where component i is the
merged task vector under coefficients that are 1 for task i and 0 for the others; with one coefficient for all tasks
there is one component. Other settings may vary too: components are kept for each of their values, as far as memory
goes, and made when they pay, that is when as many merges would be made without them.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mergectl import settings as methods
from mergectl.components import Shelf
from mergectl.errors import UserError
from mergectl.methods._contract import MergeWarning
from mergectl.plan import Recipe, groups, select, steps_of

if TYPE_CHECKING:
    import torch

Weights = Mapping[str, "torch.Tensor"]

_CHUNK = 1 << 16  # elements summed at once: they stay near the processor
_GOLDEN = 0.6180339887  # its multiples lie evenly in [0, 1): coefficients that no accident makes equal


def linear_setting(recipe: Recipe, tasks: Sequence[str], varying: frozenset[str] | None) -> str | None:
    """Return the setting that recombination may take over, or None; of several that vary together the first."""
    info = methods.describe(recipe.method)
    for name in info.linear if not info.extra_bits else ():
        if varying is None or name in varying:
            units = [1.0] if not info.settings[name].per_task else [1.0, 0.0]
            try:
                for unit in units:
                    methods.check(recipe.method, {name: unit}, tasks)
            except UserError:  # a coefficient of 0 or 1 is out of its range
                continue
            return name
    return None


@dataclass(frozen=True)
class Part:
    """Weights that are merged together, as a model of its own: their settings but the linear one, and its value."""

    names: tuple[str, ...]
    settings: Mapping[str, Any]
    refine: tuple[tuple[str, Mapping[str, Any]], ...]
    coefficients: tuple[float, ...]  # one per component


class Recombiner:
    """Puts merges into live weights by adding up components; `base` and `experts` are float32 mappings in memory."""

    def __init__(
        self,
        recipe: Recipe,
        base: Mapping[str, torch.Tensor],
        experts: Mapping[str, Mapping[str, torch.Tensor]],
        live: Mapping[str, torch.Tensor],
        linear: str,
        *,
        alone: bool,
        again: bool = True,
        shelf: Shelf,
        identity: str = "",
        supplies: Mapping[str, Any] | None = None,
    ) -> None:
        """Take the live tensors by the names of the weights; `alone` says that nothing else varies between calls.

        `again` says that where something else varies, its values may come again: what is made for one then serves more.
        `identity` tells these models from others whose components lie on the same shelf.
        """
        import torch

        self.recipe, self.experts, self.live, self.linear = recipe, experts, live, linear
        self.alone, self.again, self.shelf, self.supplies = alone, again, shelf, supplies or {}
        self.identity = identity
        self.host = base
        device = next(iter(live.values())).device
        self.base = {name: base[name].to(device) for name in live}
        self.lies: str | None = None  # what a method said that is not so
        self._asked: Counter[str] = Counter()
        self._checked = False
        self._sum = torch.empty(_CHUNK, device=device)

    def __call__(self, settings: Mapping[str, Any]) -> bool:
        """Put the merge with these settings into the live weights; False, and nothing done, where that does not pay."""
        if self.lies is not None:
            return False
        parts = self.parts(settings)
        found = [self._components(part) for part in parts]
        if any(components is None for components in found) or self.lies is not None:
            return False
        for part, components in zip(parts, found, strict=True):
            assert components is not None
            self._add_up(part, components)
        return True

    def parts(self, settings: Mapping[str, Any]) -> list[Part]:
        """Return the groups of weights that a merge with these settings makes, each with its own settings."""
        tasks = list(self.experts)
        recipe = replace(self.recipe, settings=settings)
        checked = methods.check(recipe.method, settings, tasks)
        refine = tuple((name, methods.check(name, given, tasks)) for name, given in recipe.refine)
        made = []
        for names, _ in groups(steps_of(recipe, tasks), list(self.host)):
            own = {key: select(value, names[0]) for key, value in checked.items()}
            before = tuple((name, {k: select(v, names[0]) for k, v in given.items()}) for name, given in refine)
            value = own.pop(self.linear)
            coefficients = tuple(value) if isinstance(value, Sequence) else (value,)
            made.append(Part(tuple(names), own, before, coefficients))
        return made

    def _components(self, part: Part) -> torch.Tensor | None:
        """Return a part's components [number, elements], merged now if that pays; None if it does not yet."""
        key = repr(
            (
                self.identity,
                self.recipe.method,
                self.recipe.seed,
                replace(part, coefficients=()),
                len(part.coefficients),
            )
        )
        shape = (len(part.coefficients), sum(self.host[name].numel() for name in part.names))
        found = self.shelf.get(key, shape)
        if found is None:
            self._asked[key] += 1
            costly = len(part.coefficients) > 1 or not self.again
            if not self.alone and costly and self._asked[key] < 2:
                return None
            found = self.shelf.put(key, shape, lambda rows: self._make(part, rows))
        if not self._checked:
            self._checked = True
            self._check(part, found)
        return found

    def _make(self, part: Part, rows: torch.Tensor) -> None:
        """Merge a part once per component, and keep the merged task vectors."""
        count = len(part.coefficients)
        for number, row in enumerate(rows):
            unit = tuple(float(i == number) for i in range(count)) if count > 1 else 1.0
            at = {name: (start, stop) for name, start, stop in self._places(part)}
            for name, weight in self._merged(part, unit):
                start, stop = at[name]
                row[start:stop] = (weight.double() - self.host[name].double()).reshape(-1)

    def _merged(self, part: Part, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """Merge a part with a value of the linear setting; the base is handed over in float64, to lose no digit."""
        from mergectl.merging import merge_stream

        given = {**part.settings, self.linear: value}
        recipe = replace(self.recipe, settings=given, refine=part.refine)
        base = _Exact({name: self.host[name] for name in part.names})
        experts = {task: {name: weights[name] for name in part.names} for task, weights in self.experts.items()}
        with warnings.catch_warnings():
            if len(part.names) < len(self.host):  # of a part nothing can be said that holds for the model
                warnings.simplefilter("ignore", MergeWarning)
            for piece in merge_stream(recipe, base, experts, supplies=self.supplies):
                yield piece.name, piece.weight

    def _check(self, part: Part, components: torch.Tensor) -> None:
        """Compare a recombination with a merge, once: a method of someone else's may say linear what is not."""
        import torch

        limits = methods.settings_of(self.recipe.method)[self.linear].between
        low, high = (0.0, 1.0) if limits is None else limits.search or (max(limits.low, -2.0), min(limits.high, 2.0))
        values = [low + (high - low) * ((i + 1) * _GOLDEN % 1) for i in range(len(components))]
        coefficients = torch.tensor(values, dtype=torch.float64)
        at = {name: (start, stop) for name, start, stop in self._places(part)}

        def differs(name: str, weight: torch.Tensor) -> bool:
            start, stop = at[name]
            delta = components[:, start:stop].cpu().double().t() @ coefficients
            far = (weight.double().reshape(-1) - self.host[name].double().reshape(-1) - delta).abs()
            allowed = 5e-7 * weight.double().reshape(-1).abs() + 1e-9
            return bool((far > allowed + 1e-4 * delta.abs().max()).any()) if len(delta) else False

        if any(differs(*piece) for piece in self._merged(part, tuple(values) if len(values) > 1 else values[0])):
            self.lies = f"Method '{self.recipe.method}' is not linear in {self.linear}, although its file says so"
            warnings.warn(f"{self.lies}: every candidate is merged anew.", MergeWarning, stacklevel=2)

    def _places(self, part: Part) -> Iterator[tuple[str, int, int]]:
        """Go through a part's weights: name, and where it begins and ends in a component."""
        start = 0
        for name in part.names:
            stop = start + self.host[name].numel()
            yield name, start, stop
            start = stop

    def _add_up(self, part: Part, components: torch.Tensor) -> None:
        """Write base + sum of components into the live weights, rounded once."""
        import torch

        device = self._sum.device
        coefficients = torch.tensor(part.coefficients, dtype=torch.float32, device=device)
        for name, first, last in self._places(part):
            if name not in self.live:
                continue
            target, base = self.live[name].view(-1), self.base[name].view(-1)
            for start in range(first, last, _CHUNK):
                stop = min(start + _CHUNK, last)
                total = self._sum[: stop - start]
                torch.mv(components[:, start:stop].to(device).t(), coefficients, out=total)
                place = slice(start - first, stop - first)
                torch.add(base[place], total, out=target[place])


class _Exact(Mapping[str, "torch.Tensor"]):
    """Weights as float64, one converted at a time."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.weights = weights
        self._last: tuple[str, torch.Tensor | None] = ("", None)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a weight's shape."""
        return tuple(self.weights[name].shape)

    def dtype(self, name: str) -> Any:
        """Return the type that weights are given in."""
        import torch

        return torch.float64

    def __getitem__(self, name: str) -> torch.Tensor:
        """Convert one weight."""
        known, weight = self._last
        if known != name or weight is None:
            weight = self.weights[name].double()
            self._last = (name, weight)
        return weight

    def __iter__(self) -> Iterator[str]:
        """Go through the names."""
        return iter(self.weights)

    def __len__(self) -> int:
        """Return the number of weights."""
        return len(self.weights)
