"""Find a model's layers: their numbers in the names of weights, their count and their lists in the configuration.

No table of architectures: a stack of layers is what the names number, and the configuration must say as many.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergectl.errors import UserError

NUMBERED = re.compile(r"((?:[^.]+\.)*?)(\d+)\.")
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# Weights that come before the layers; all others outside of layers come after them.
FRONT = re.compile(
    r"(^|\.)(embed(?!_out)\w*|\w+_embed(ding)?s?(_layernorm)?|wte|wpe|shared|project_in|cls_token)(\.|$)"
)


@dataclass(frozen=True)
class Numbered:
    """The layers of a model: what stands before their number in the names, and how many there are."""

    prefix: str
    count: int

    def split(self, name: str) -> tuple[int, str] | None:
        """The number of the layer that a weight belongs to, and what follows it in the name; None outside of layers."""
        match = NUMBERED.match(name)
        return (int(match[2]), name[match.end() :]) if match and match[1] == self.prefix else None


def stacks(names: Iterable[str]) -> dict[str, int]:
    """Prefix -> number of layers of every stack; a numbered list with few weights beside another is none."""
    found = [match for name in names if (match := NUMBERED.match(name))]
    weights = Counter(match[1] for match in found)
    large = [stack for stack, count in weights.items() if 4 * count >= max(weights.values())]
    return {stack: 1 + max(int(match[2]) for match in found if match[1] == stack) for stack in large}


def the_stack(names: Iterable[str], who: str) -> Numbered:
    """The one stack of layers of a model; a model with none or several is refused."""
    found = stacks(names)
    if len(found) != 1:
        several = " and ".join(f"'{prefix}'" for prefix in found)
        raise UserError(
            f"{who} has {f'several stacks of layers, {several}' if found else 'no numbered layers'}; "
            "layers can be stacked or mapped only in models with one stack of them."
        )
    return Numbered(*next(iter(found.items())))


def is_front(name: str) -> bool:
    """Say whether a weight outside of layers comes before them, as embeddings do, and not after, as heads do."""
    return bool(FRONT.search(name))


def restacked(
    config: Mapping[str, Any], sources: Sequence[tuple[Mapping[str, Any], int]], count: int, who: str
) -> dict[str, Any]:
    """A configuration of `count` layers made one of the layers `sources`: (the layer's configuration, its number)."""
    made = _restacked(config, sources, count)
    if made == config and len(sources) != count:
        raise UserError(f"The configuration of {who} does not say that it has {count} layers, as its weights do.")
    return made


def _restacked(
    config: Mapping[str, Any], sources: Sequence[tuple[Mapping[str, Any], int]], count: int
) -> dict[str, Any]:
    found = dict(config)
    for key, value in config.items():
        if isinstance(value, Mapping):
            below = [(part if isinstance(part := other.get(key), Mapping) else {}, at) for other, at in sources]
            found[key] = _restacked(value, below, count)
        elif key in COUNTS and value == count and not isinstance(value, bool):
            found[key] = len(sources)
        elif isinstance(value, list) and value and re.search("layer|block", key):
            found[key] = _list(key, value, sources, count)
    return found


def _list(key: str, own: list[Any], sources: Sequence[tuple[Mapping[str, Any], int]], count: int) -> list[Any]:
    """A list with an entry per layer, or of layers' numbers, as it is for other layers; any other list as it is."""
    lists = [other.get(key, own) for other, _ in sources]
    numbers = all(type(entry) is int and 0 <= entry < count for entry in own) and len(set(own)) == len(own)
    if numbers and (len(own) < count or own == list(range(count))):
        return [place for place, (listed, (_, at)) in enumerate(zip(lists, sources, strict=True)) if at in listed]
    if len(own) != count:
        return own
    if any(at >= len(listed) for listed, (_, at) in zip(lists, sources, strict=True)):
        raise UserError(f"The configurations disagree on '{key}', which has an entry per layer.")
    return [listed[at] for listed, (_, at) in zip(lists, sources, strict=True)]


def tells_kinds(config: Mapping[str, Any], kinds: Sequence[Hashable]) -> bool:
    """Say whether some list of a configuration tells of which kind each layer is, so that stacking them changes it."""
    for key, value in config.items():
        if isinstance(value, Mapping) and tells_kinds(value, kinds):
            return True
        if isinstance(value, list) and value and re.search("layer|block", key):
            entries = [str(entry) for entry in value]
            values = entries if len(value) == len(kinds) else [str(n in value) for n in range(len(kinds))]
            if len(set(zip(values, kinds, strict=True))) == len(set(values)):
                return True
    return len(set(kinds)) == 1
