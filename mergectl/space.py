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
from mergectl.ranges import inside, read_range, steps
from mergectl.values import check_beside, meant

if TYPE_CHECKING:
    from mergectl.methods._contract import Beside
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
    start: Any = None  # the setting's default, a number or a word; None where it has no such
    group: str | None = None  # how the weights are called: a pattern, or `layers 1-4`
    patterns: tuple[str, ...] = ()
    log: bool = False  # equal factors count as equal steps
    beside: Beside | None = None  # the values of another setting without which it means nothing
    gives: tuple[tuple[str, Beside], ...] = ()  # the fixed settings that mean something beside some of its values

    @property
    def name(self) -> str:
        """How the trial's parameter is called: `scale`, `scale[rte]`, `scale@*.attention.*`."""
        where = self.setting if self.group is None else f"{self.setting}@{self.group}"
        return where if self.task is None else f"{where}[{self.task}]"

    def at(self, share: float) -> Any:
        """The value at this share of the range; of words the one in this place."""
        if self.kind == "word":
            return self.words[min(int(share * len(self.words)), len(self.words) - 1)]
        share = min(max(share, 0.0), 1.0)
        value = self.low + share * (self.high - self.low)
        if self.log:
            value = min(max(self.low * (self.high / self.low) ** share, self.low), self.high)
        if self.step:
            value = min(self.high, round(self.low + round((value - self.low) / self.step) * self.step, 10))
        return round(value) if self.kind == "int" else value

    @property
    def first(self) -> Any:
        """The setting's default, or what of the range is nearest to it; where there is none the middle."""
        if self.kind == "word":
            return self.start if self.start in self.words else self.words[0]
        if self.start is None:
            return self.at(0.5)
        value = min(max(self.start, self.low), self.high)
        return value if self.kind == "float" and not self.step else self.at(self.share(value))

    def share(self, value: float) -> float:
        """How far along the range a value of it lies."""
        if self.high <= self.low:
            return 0.5
        if self.log:
            return math.log(value / self.low) / self.width
        return (value - self.low) / self.width

    @property
    def width(self) -> float:
        """How wide the range is; of a range in equal factors the logarithm of its highest by its lowest."""
        return math.log(self.high / self.low) if self.log else self.high - self.low

    def points(self, count: int) -> list[Any]:
        """The values that a grid tries: all words, every step, or `count` evenly spaced numbers."""
        if self.kind == "word":
            return list(self.words)
        if self.log:
            return list(dict.fromkeys(self.at(i / (max(count, 2) - 1)) for i in range(max(count, 2))))
        if self.kind == "int":
            return list(range(int(self.low), int(self.high) + 1, int(self.step or 1)))
        count = steps(self.low, self.high, self.step) + 1 if self.step else max(count, 2)
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
    idle = _idle(settings, (*chosen, *per_task, *layered), fixed)
    chosen += [n for n, s in settings.items() if n not in (*chosen, *fixed, *idle) and _searchable(s)]
    chosen += [name for name in dict.fromkeys((*per_task, *layered)) if name not in chosen]
    if not chosen:
        raise UserError("Nothing is left to search: every setting is fixed. Name one with --range NAME=LOW:HIGH.")
    found: list[Dimension] = []
    for name in chosen:
        own = {pattern: ranges[f"{name}@{pattern}" if pattern else name] for n, pattern in parts if n == name}
        made = _spread(settings[name], own, tasks if name in per_task else (), layered.get(name), names)
        gives = tuple((n, b) for n in fixed if (b := settings[n].beside) is not None and b.setting == name)
        found += [replace(dimension, gives=gives) for dimension in made]
    return found


def standing(settings: Mapping[str, Setting], fixed: Mapping[str, Any], ranged: Mapping[str, str]) -> dict[str, Any]:
    """The fixed settings without those that only some values of a searched one give a meaning."""
    searched = {name.partition("@")[0] for name in ranged}
    waiting = {name for name in fixed if (b := settings[name].beside) is not None and b.setting in searched}
    return {name: value for name, value in fixed.items() if name not in waiting}


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


def _idle(settings: Mapping[str, Setting], named: Sequence[str], fixed: Mapping[str, Any]) -> list[str]:
    """The settings that mean nothing in any candidate, as another one is never as they need it; none that is named."""
    found = []
    for name, setting in settings.items():
        if (beside := setting.beside) is None or beside.setting in named:
            continue
        if meant(beside, fixed.get(beside.setting, settings[beside.setting].default)):
            continue
        if name in named or name in fixed:
            check_beside(
                setting, {**{n: s.default for n, s in settings.items()}, **fixed, name: fixed.get(name, "searched")}
            )
        found.append(name)
    return found


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
        return Dimension(setting.name, "word", words=known, start=setting.default, beside=setting.beside)
    asked = [{"true": True, "false": False}.get(w, w) if setting.type == "bool" else w for w in text.split(",")]
    for word in asked:
        if word not in known:
            raise UserError(f"{setting.name} is one of {', '.join(map(str, known))}, not '{word}'.")
    found = tuple(dict.fromkeys(asked))
    return Dimension(setting.name, "word", words=found, start=setting.default, beside=setting.beside)


def _numbers(setting: Setting, text: str | None) -> Dimension:
    limits = setting.between
    if text is None:
        if limits is None:
            raise UserError(f"Give '{setting.name}' a range: --range {setting.name}=LOW:HIGH.")
        low, high = limits.search or (limits.low, limits.high)
        return Dimension(setting.name, setting.type, low, high, start=_start(setting), beside=setting.beside)
    low, high, step, log = read_range(setting, text)
    if limits is not None and not inside(limits, low, high):
        borders = f"{limits.low:g} and {'below ' if limits.high_open else ''}{limits.high:g}"
        raise UserError(
            f"{setting.name} must lie between {'above ' if limits.low_open else ''}{borders}; --range asks for {text}."
        )
    if step is not None:  # the last point, where the steps do not end at HIGH
        high = round(low + steps(low, high, step) * step, 10)
    return Dimension(setting.name, setting.type, low, high, step, start=_start(setting), log=log, beside=setting.beside)


def _start(setting: Setting) -> float | None:
    return float(setting.default) if isinstance(setting.default, int | float) else None


def to_settings(params: Mapping[str, Any], dimensions: Sequence[Dimension], fixed: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's parameters as method settings: gathered into {task: value}, {pattern of weights: value} or both."""
    settings = dict(fixed)
    for dimension in dimensions:
        value = params[dimension.name]
        if dimension.kind == "float" and dimension.step:  # Optuna adds steps up: 0.15000000000000002
            value = round(value, 10)
        for pattern in dimension.patterns or (None,):
            place, key = settings, dimension.setting
            if pattern is not None:
                place, key = place.setdefault(key, {}), pattern
            if dimension.task is not None:
                place, key = place.setdefault(key, {}), dimension.task
            place[key] = value
    for dimension in dimensions:  # a candidate leaves out what has no meaning in it
        for name, beside in ((dimension.setting, dimension.beside), *dimension.gives):
            if beside is not None and beside.setting in settings and not meant(beside, settings[beside.setting]):
                settings.pop(name, None)
    return settings


def distributions(dimensions: Sequence[Dimension]) -> dict[str, Any]:
    """The same space as Optuna distributions."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    made: dict[str, Any] = {}
    for d in dimensions:
        if d.kind == "word":
            made[d.name] = CategoricalDistribution(d.words)
        elif d.kind == "int":
            made[d.name] = IntDistribution(int(d.low), int(d.high), step=int(d.step or 1), log=d.log)
        else:
            made[d.name] = FloatDistribution(d.low, d.high, step=d.step, log=d.log)
    return made
