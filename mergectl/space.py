"""The space of a search: which settings vary, over what, and how a trial's numbers become settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergectl.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from mergectl.methods._contract import Between
    from mergectl.settings import Setting


@dataclass(frozen=True)
class Dimension:
    """One number or word that a search varies; `task` is set when a setting is searched per task."""

    setting: str
    kind: str  # float, int or word
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    words: tuple[Any, ...] = ()
    task: str | None = None
    start: float | None = None  # the setting's default, where an evolutionary search begins

    @property
    def name(self) -> str:
        """How the trial's parameter is called: `scale`, or `scale[rte]`."""
        return self.setting if self.task is None else f"{self.setting}[{self.task}]"

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
) -> list[Dimension]:
    """Build the dimensions: what `--range` names, or else every setting that declares a range to search."""
    for name in [*ranges, *fixed, *per_task]:
        if name not in settings:
            raise UserError(f"No setting '{name}' to search or fix.{did_you_mean(name, settings)}")
    if both := sorted({*ranges, *per_task} & set(fixed)):
        how = "given a range" if both[0] in ranges else "searched per task"
        raise UserError(f"'{both[0]}' is both fixed and {how}. Drop one.")
    chosen = list(ranges) + [n for n, s in settings.items() if n not in ranges and n not in fixed and _searchable(s)]
    chosen += [name for name in per_task if name not in chosen]
    if not chosen:
        raise UserError("Nothing is left to search: every setting is fixed. Name one with --range NAME=LOW:HIGH.")
    found: list[Dimension] = []
    for name in chosen:
        found += _dimensions(settings[name], ranges.get(name), tasks if name in per_task else ())
    return found


def _searchable(setting: Setting) -> bool:
    return setting.between is not None and setting.between.search is not None


def _dimensions(setting: Setting, text: str | None, tasks: Sequence[str]) -> list[Dimension]:
    if tasks and not setting.per_task:
        raise UserError(f"'{setting.name}' cannot differ per task. Drop --per-task {setting.name}.")
    one = _words(setting, text) if setting.type in ("word", "bool") else _numbers(setting, text)
    return [Dimension(**{**vars(one), "task": task}) for task in tasks] or [one]


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
    try:
        numbers = [float(part) for part in text.split(":")]
    except ValueError as error:
        raise UserError(f"{wrong}.") from error
    if len(numbers) not in (2, 3) or not -math.inf < numbers[0] < numbers[1] < math.inf:
        raise UserError(f"{wrong} with LOW below HIGH.")
    if len(numbers) == 3 and not 0 < numbers[2] <= (numbers[1] - numbers[0]) * (1 + 1e-9):
        raise UserError(f"{wrong} with a STEP above 0 and no wider than the range.")
    if setting.type == "int" and not all(number.is_integer() for number in numbers):
        raise UserError(f"--range {setting.name}={text}: {setting.name} takes whole numbers only.")
    return numbers[0], numbers[1], numbers[2] if len(numbers) == 3 else None


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
    """A trial's parameters as method settings: per-task ones gathered into {task: value}."""
    settings = dict(fixed)
    for dimension in dimensions:
        value = params[dimension.name]
        if dimension.task is None:
            settings[dimension.setting] = value
        else:
            settings.setdefault(dimension.setting, {})[dimension.task] = value
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
