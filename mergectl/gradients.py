"""Settings that change with a weight's name and depth, as mergekit writes them, and as patterns of weight names."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from mergectl.layers import NUMBERED, stacks


class Depth:
    """How deep in its stack of layers a weight lies; a model may have several stacks (encoder and decoder)."""

    def __init__(self, names: Sequence[str]) -> None:
        self.layers = stacks(names)

    @property
    def count(self) -> int:
        """The number of layers of the deepest stack."""
        return max(self.layers.values(), default=0)

    def of(self, name: str) -> float:
        """Return 0 for the first layer to 1 for the last, and 0 outside of layers."""
        match = NUMBERED.match(name)
        if match is None or match[1] not in self.layers:
            return 0.0
        last = self.layers[match[1]] - 1
        return int(match[2]) / last if last else 1.0


def is_varied(setting: Any) -> bool:
    """Say whether a setting may differ between weights."""
    return isinstance(setting, list | Mapping)


def evaluate(setting: Any, name: str, depth: float, read: Callable[[Any], Any] = lambda value: value) -> Any:
    """Return a setting's value for one weight, None where no filter fits: a scalar, a gradient, or conditions.

    `read` makes numbers or flags of scalars as they are written.
    """
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return read(setting)
    if not isinstance(setting[0], Mapping):
        return _on_gradient([read(value) for value in setting], depth)
    for condition in setting:
        wanted = condition.get("filter")
        if wanted in (None, "*") or wanted in name:
            return evaluate(condition["value"], name, depth, read)
    return None


def _on_gradient(values: Sequence[Any], depth: float) -> Any:
    """Return the value at a depth of values spread evenly over the layers: between two numbers, on the line between.

    Flags have nothing between them: there it is the last one that has begun.
    """
    place = depth * (len(values) - 1)
    first = int(place)
    second, share = min(first + 1, len(values) - 1), place - first
    if share == 0 or isinstance(values[first], bool):
        return values[first]
    return (1 - share) * values[first] + share * values[second]


def patterns(values: Mapping[str, Hashable]) -> Any:
    """Return one value if all weights share it, else the fewest {pattern: value} by parts of the names that say it."""
    counts = Counter(values.values())
    if len(counts) == 1:
        return next(iter(counts))
    usual = counts.most_common(1)[0][0]
    found: dict[str, Any] = {}
    _walk("", list(values), values, usual, found)
    return {**found, "*": usual}


def _walk(
    start: str, names: Sequence[str], values: Mapping[str, Hashable], usual: Hashable, found: dict[str, Any]
) -> None:
    """Note a pattern for every branch of the names, from the start on, whose weights share an unusual value."""
    if len({values[name] for name in names}) == 1:
        if values[names[0]] != usual:
            found[glob.escape(names[0]) if len(names) == 1 else f"{glob.escape(start)}*"] = values[names[0]]
        return
    branches: dict[str, list[str]] = {}
    for name in names:
        part, dot, _ = name[len(start) :].partition(".")
        branches.setdefault(start + part + dot, []).append(name)
    for branch, below in branches.items():
        _walk(branch, below, values, usual, found)
