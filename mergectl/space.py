"""The space of a search: which settings vary, over what, and how a trial's numbers become settings."""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mergectl.errors import UserError, did_you_mean
from mergectl.layers import is_front, stacks

if TYPE_CHECKING:
    from mergectl.methods._contract import Between
    from mergectl.settings import Setting


@dataclass(frozen=True)
class Dimension:
    """One number or word that a search varies; `task` is set when a setting is searched per task.

    `group` and `patterns` are set when it holds only for weights whose names fit one of the patterns.
    """

    setting: str
    kind: str  # float, int or word
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    words: tuple[Any, ...] = ()
    task: str | None = None
    start: float | None = None  # the setting's default, where an evolutionary search begins
    group: str | None = None  # how the weights are called: a pattern, or `layers 1-4`
    patterns: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """How the trial's parameter is called: `scale`, `scale[rte]`, `scale@*.attention.*`."""
        where = self.setting if self.group is None else f"{self.setting}@{self.group}"
        return where if self.task is None else f"{where}[{self.task}]"

    def at(self, share: float) -> Any:
        """The value at this share of the range; of words the one in this place."""
        if self.kind == "word":
            return self.words[min(int(share * len(self.words)), len(self.words) - 1)]
        value = self.low + min(max(share, 0.0), 1.0) * (self.high - self.low)
        if self.step:
            value = min(self.high, round(self.low + round((value - self.low) / self.step) * self.step, 10))
        return round(value) if self.kind == "int" else value

    def points(self, count: int) -> list[Any]:
        """The values that a grid tries: all words, every step, or `count` evenly spaced numbers."""
        if self.kind == "word":
            return list(self.words)
        if self.kind == "int":
            return list(range(int(self.low), int(self.high) + 1, int(self.step or 1)))
        count = _steps(self.low, self.high, self.step) + 1 if self.step else max(count, 2)
        gap = self.step or (self.high - self.low) / (count - 1)
        return [round(self.low + i * gap, 10) for i in range(count)]


def space(
    settings: Mapping[str, Setting],
    tasks: Sequence[str],
    *,
    ranges: Mapping[str, str],
    fixed: Mapping[str, Any],
    per_task: Sequence[str] = (),
    per_layer: Mapping[str, int] | None = None,
    names: Sequence[str] = (),
) -> list[Dimension]:
    """Build the dimensions: what `--range` names, or else every setting that declares a range to search.

    `names` are those of the weights, for ranges of some weights only (`scale@*.attention.*`) and for groups of layers.
    """
    layered = dict(per_layer or {})
    parts = [name.partition("@")[::2] for name in ranges]
    _check_names(settings, [name for name, _ in parts], fixed, per_task, layered)
    chosen = list(dict.fromkeys(name for name, _ in parts))
    chosen += [n for n, s in settings.items() if n not in chosen and n not in fixed and _searchable(s)]
    chosen += [name for name in dict.fromkeys((*per_task, *layered)) if name not in chosen]
    if not chosen:
        raise UserError("Nothing is left to search: every setting is fixed. Name one with --range NAME=LOW:HIGH.")
    found: list[Dimension] = []
    for name in chosen:
        own = {pattern: ranges[f"{name}@{pattern}" if pattern else name] for n, pattern in parts if n == name}
        found += _spread(settings[name], own, tasks if name in per_task else (), layered.get(name), names)
    return found


def _check_names(
    settings: Mapping[str, Setting], ranged: Sequence[str], fixed: Mapping[str, Any], per_task: Sequence[str],
    layered: Mapping[str, int],
) -> None:  # fmt: skip
    for name in [*ranged, *fixed, *per_task, *layered]:
        if name not in settings:
            raise UserError(f"No setting '{name}' to search or fix.{did_you_mean(name, settings)}")
    if both := sorted({*ranged, *per_task, *layered} & set(fixed)):
        by = "searched per task" if both[0] in per_task else "searched per group of layers"
        how = "given a range" if both[0] in ranged else by
        raise UserError(f"'{both[0]}' is both fixed and {how}. Drop one.")
    for name in per_task:
        if not settings[name].per_task:
            raise UserError(f"'{name}' cannot differ per task. Drop --per-task {name}.")


def _spread(
    setting: Setting, ranges: Mapping[str, str], tasks: Sequence[str], layers: int | None, names: Sequence[str]
) -> list[Dimension]:
    """A setting's dimensions: one, or one per task, per group of layers, per pattern of weight names."""
    patterns = [pattern for pattern in ranges if pattern]
    if layers is not None and patterns:
        raise UserError(
            f"{setting.name} is searched per group of layers and for '{patterns[0]}'. Drop --per-layer or the pattern."
        )
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise UserError(
                f"No weight is called '{pattern}', for which --range {setting.name}@{pattern} is given. "
                "Write a pattern of weight names such as '*.attention.*'."
            )
    if layers is not None:
        one = _dimension(setting, ranges.get(""))
        groups = layer_groups(names, layers)
        made = [replace(one, group=group, patterns=tuple(fitting)) for group, fitting in groups.items()]
    else:
        made = [replace(_dimension(setting, ranges[p]), group=p, patterns=(p,)) for p in patterns]
        if "" in ranges or not patterns:
            rest = _dimension(setting, ranges.get(""))
            made.append(replace(rest, group="*", patterns=("*",)) if patterns else rest)
    return [replace(dimension, task=task) for dimension in made for task in tasks] if tasks else made


def layer_groups(names: Sequence[str], count: int) -> dict[str, list[str]]:
    """Split a model's depth into groups: how each is called, and patterns of its weights' names.

    Each stack of layers is split alike. What comes before the layers goes with the first group, what comes after
    them with the last.
    """
    found = stacks(names)
    deepest = max(found.values(), default=0)
    if not 1 < count <= deepest:
        what = f"at least 2 and at most its {deepest} layers" if deepest > 1 else "layers, which this model has not"
        raise UserError(f"--per-layer {count}: a model is split into {what}.")
    groups: list[list[str]] = [[] for _ in range(count)]
    for prefix, layers in found.items():
        for layer in range(layers):
            groups[layer * count // layers].append(f"{prefix}{layer}.*")
    layered = [pattern for group in groups for pattern in group]
    outside = [name for name in names if not any(fnmatch.fnmatchcase(name, pattern) for pattern in layered)]
    groups[0] += [name for name in outside if is_front(name)]
    groups[-1].append("*")
    edges = [-(-group * deepest // count) for group in range(count + 1)]
    called = [
        f"layer {low + 1}" if high - low == 1 else f"layers {low + 1}-{high}" for low, high in itertools.pairwise(edges)
    ]
    return dict(zip(called, groups, strict=True))


def _searchable(setting: Setting) -> bool:
    return setting.between is not None and setting.between.search is not None


def _dimension(setting: Setting, text: str | None) -> Dimension:
    return _words(setting, text) if setting.type in ("word", "bool") else _numbers(setting, text)


def _words(setting: Setting, text: str | None) -> Dimension:
    known = (True, False) if setting.type == "bool" else tuple(setting.words)
    if text is None:
        return Dimension(setting.name, "word", words=known)
    asked = [{"true": True, "false": False}.get(w, w) if setting.type == "bool" else w for w in text.split(",")]
    for word in asked:
        if word not in known:
            raise UserError(f"{setting.name} is one of {', '.join(map(str, known))}, not '{word}'.")
    return Dimension(setting.name, "word", words=tuple(dict.fromkeys(asked)))


def _numbers(setting: Setting, text: str | None) -> Dimension:
    limits = setting.between
    if text is None:
        if limits is None:
            raise UserError(f"Give '{setting.name}' a range: --range {setting.name}=LOW:HIGH.")
        low, high = limits.search or (limits.low, limits.high)
        return Dimension(setting.name, setting.type, low, high, start=_start(setting))
    low, high, step = _read_range(setting, text)
    if limits is not None and not _inside(limits, low, high):
        borders = f"{limits.low:g} and {'below ' if limits.high_open else ''}{limits.high:g}"
        raise UserError(
            f"{setting.name} must lie between {'above ' if limits.low_open else ''}{borders}; --range asks for {text}."
        )
    if step is not None:  # the last point, where the steps do not end at HIGH
        high = round(low + _steps(low, high, step) * step, 10)
    return Dimension(setting.name, setting.type, low, high, step, start=_start(setting))


def _read_range(setting: Setting, text: str) -> tuple[float, float, float | None]:
    wrong = f"--range {setting.name}={text} is not LOW:HIGH or LOW:HIGH:STEP"
    if text.startswith("linear+"):
        legacy = read_legacy(setting.name, text)
        _check_whole(setting, text, legacy)
        return legacy
    try:
        numbers = [float(part) for part in text.split(":")]
    except ValueError as error:
        raise UserError(f"{wrong}.") from error
    if len(numbers) not in (2, 3) or not -math.inf < numbers[0] < numbers[1] < math.inf:
        raise UserError(f"{wrong} with LOW below HIGH.")
    if len(numbers) == 3 and not 0 < numbers[2] <= (numbers[1] - numbers[0]) * (1 + 1e-9):
        raise UserError(f"{wrong} with a STEP above 0 and no wider than the range.")
    _check_whole(setting, text, numbers)
    return numbers[0], numbers[1], numbers[2] if len(numbers) == 3 else None


def _check_whole(setting: Setting, text: str, numbers: Sequence[float]) -> None:
    if setting.type == "int" and not all(number.is_integer() for number in numbers):
        raise UserError(f"--range {setting.name}={text}: {setting.name} takes whole numbers only.")


def read_legacy(name: str, text: str) -> tuple[float, float, float]:
    """Read `linear+0.8+2.21+0.1`, the older grids: from the first to below the second, rounded to one decimal."""
    import numpy as np

    try:
        low, end, step = (float(part) for part in text.split("+")[1:])
        values = sorted({round(float(value), 1) for value in np.arange(low, end, step)})
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"--range {name}={text} is not linear+START+END+STEP.") from error
    gaps = {round(b - a, 1) for a, b in itertools.pairwise(values)}
    if not values or len(gaps) > 1:
        raise UserError(
            f"--range {name}={text} holds no even steps once its values are rounded to one decimal, as this form does. "
            f"Write it as {name}=LOW:HIGH:STEP."
        )
    return values[0], values[-1], gaps.pop() if gaps else 0.1


def _inside(limits: Between, low: float, high: float) -> bool:
    above = low > limits.low if limits.low_open else low >= limits.low
    below = high < limits.high if limits.high_open else high <= limits.high
    return above and below


def _steps(low: float, high: float, step: float) -> int:
    """How many whole steps fit, rounding errors forgiven."""
    return math.floor((high - low) / step + 1e-9)


def _start(setting: Setting) -> float | None:
    return float(setting.default) if isinstance(setting.default, int | float) else None


def to_settings(params: Mapping[str, Any], dimensions: Sequence[Dimension], fixed: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's parameters as method settings: gathered into {task: value}, {pattern of weights: value} or both."""
    settings = dict(fixed)
    for dimension in dimensions:
        value = params[dimension.name]
        for pattern in dimension.patterns or (None,):
            place, key = settings, dimension.setting
            if pattern is not None:
                place, key = place.setdefault(key, {}), pattern
            if dimension.task is not None:
                place, key = place.setdefault(key, {}), dimension.task
            place[key] = value
    return settings


def distributions(dimensions: Sequence[Dimension]) -> dict[str, Any]:
    """The same space as Optuna distributions."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    made: dict[str, Any] = {}
    for d in dimensions:
        if d.kind == "word":
            made[d.name] = CategoricalDistribution(d.words)
        elif d.kind == "int":
            made[d.name] = IntDistribution(int(d.low), int(d.high), step=int(d.step or 1))
        else:
            made[d.name] = FloatDistribution(d.low, d.high, step=d.step)
    return made
