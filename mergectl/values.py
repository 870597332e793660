"""One setting of a method: what it may be, and how a value of it is read and checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mergectl.errors import UserError, did_you_mean
from mergectl.methods._contract import Beside, Between

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclass(frozen=True)
class Setting:
    """One setting, as declared after the star in a method's signature."""

    name: str
    type: Literal["float", "int", "bool", "word", "tasks"]
    default: Any
    help: str
    between: Between | None
    words: tuple[str, ...]
    per_task: bool
    origin: str  # the method or refinement whose setting it is
    beside: Beside | None = None  # the values of another setting without which it means nothing


def check_beside(setting: Setting, found: Mapping[str, Any]) -> None:
    """Refuse a setting that would change nothing for want of another one's value; `found` are all, checked."""
    if setting.beside is None or found[setting.name] == setting.default:
        return
    if not meant(setting.beside, found[setting.beside.setting]):
        words = " or ".join(f"{setting.beside.setting}={_typed(word)}" for word in setting.beside.words)
        raise UserError(f"{setting.name} has a meaning only with {words}. Add that, or leave {setting.name} out.")


def meant(beside: Beside, value: Any) -> bool:
    """Whether a value of the other setting, or one of its values for some weights, gives a meaning."""
    values = value.values() if isinstance(value, Mapping) else (value,)
    return any(part in beside.words for part in values)


def _typed(word: Any) -> str:
    return str(word).lower() if isinstance(word, bool) else str(word)


def parse(setting: Setting, text: str) -> Any:
    """Read a value as typed: `0.3`, per task `0.3,0.5` or `rte=0.5,cola=0.2`, per weights `*.attention.*=0.5`."""
    if setting.type == "tasks":
        return _tasks(setting, [part.strip() for part in text.split(",")], None)
    if "=" in text:
        pairs = [part.rpartition("=") for part in text.split(",")]
        wrong = next((part for part, (key, _, _) in zip(text.split(","), pairs, strict=True) if not key.strip()), None)
        if wrong is not None:
            raise UserError(f"{setting.name} must be one value, or a list of name=value, got '{wrong}' in '{text}'.")
        return {key.strip(): one(setting, value.strip()) for key, _, value in pairs}
    if "," in text:
        if not setting.per_task:
            raise UserError(f"{setting.name} takes one value, not one per task, got '{text}'.")
        return tuple(one(setting, part.strip()) for part in text.split(","))
    return one(setting, text.strip())


def resolve(setting: Setting, value: Any, tasks: Sequence[str] | None) -> Any:
    """Check a value of any form: one value, one per task, or {pattern of weight names: such a value}."""
    if setting.type == "tasks":
        return value if value is None else _tasks(setting, value, tasks)
    if isinstance(value, Mapping):
        if not value:
            raise UserError(f"{setting.name} is an empty list of values. Leave it out to get the default.")
        if setting.per_task and not any(_is_pattern(key) for key in value):
            return _by_task(setting, value, tasks)
        return {str(key): resolve(setting, part, tasks) for key, part in value.items()}
    if setting.per_task and _is_sequence(value):
        parts = tuple(one(setting, part) for part in value)
        if tasks is not None and len(parts) != len(tasks):
            raise UserError(f"{setting.name} has {len(parts)} values for {len(tasks)} tasks ({', '.join(tasks)}).")
        return parts
    return one(setting, value)


def one(setting: Setting, value: Any) -> Any:
    """Check a single value and return it as a plain float, int, bool or word; None where that is the default."""
    if value is None and setting.default is None:
        return None
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:  # a NumPy or torch scalar
        short = "float32" in str(value.dtype) or "float16" in str(value.dtype)
        value = float(f"{value.item():.7g}") if short else value.item()
    if setting.type == "word":
        return _word(setting, value)
    if setting.type == "bool":
        return _bool(setting, value)
    return _number(setting, value)


def _tasks(setting: Setting, value: Any, tasks: Sequence[str] | None) -> tuple[str, ...]:
    """Check names of tasks."""
    names = (value,) if isinstance(value, str) else tuple(value) if _is_sequence(value) else ()
    if not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{setting.name} must be names of tasks, got '{value}'.")
    for name in names if tasks is not None else ():
        if name not in (tasks or ()):
            raise UserError(
                f"{setting.name} names a task '{name}' that is not merged.{did_you_mean(name, tasks or ())}"
            )
    return names


def _is_pattern(key: object) -> bool:
    return any(mark in str(key) for mark in "*?[")


def _is_sequence(value: Any) -> bool:
    if isinstance(value, str | bytes):
        return False
    return isinstance(value, Sequence) or getattr(value, "ndim", 0) == 1


def _by_task(setting: Setting, value: Mapping[Any, Any], tasks: Sequence[str] | None) -> Any:
    """Put values given by task name in task order; a task that is not named has the default."""
    if tasks is None:
        return {str(task): one(setting, part) for task, part in value.items()}
    for task in value:
        if task not in tasks:
            hint = did_you_mean(str(task), tasks)
            raise UserError(f"{setting.name} is given for a task '{task}' that is not merged.{hint}")
    return tuple(one(setting, value.get(task, setting.default)) for task in tasks)


def _word(setting: Setting, value: Any) -> str:
    if value in setting.words and isinstance(value, str):
        return value
    near = did_you_mean(str(value), setting.words)
    hint = near if near.startswith(" Did") else ""
    raise UserError(f"{setting.name} must be one of {', '.join(setting.words)}, got '{value}'.{hint}")


def _bool(setting: Setting, value: Any) -> bool:
    word = str(value).lower()
    if isinstance(value, bool | int | str) and word in _TRUE + _FALSE:
        return word in _TRUE
    raise UserError(f"{setting.name} must be true or false, got '{value}'.")


def _number(setting: Setting, value: Any) -> float | int:
    kind = "a whole number" if setting.type == "int" else "a number"
    try:
        number = float("nan") if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if math.isnan(number) or (setting.type == "int" and number != math.floor(number)):
        raise UserError(f"{setting.name} must be {kind}, got '{value}'.")
    if setting.between is not None:
        _check_range(setting.name, setting.between, number, value)
    return int(number) if setting.type == "int" else number


def _check_range(name: str, between: Between, number: float, shown: Any) -> None:
    low, high = between.low, between.high
    below = number <= low if between.low_open else number < low
    above = number >= high if between.high_open else number > high
    if not below and not above:
        return
    ends = [f"{end} excluded" for end, is_open in ((low, between.low_open), (high, between.high_open)) if is_open]
    note = f" ({', '.join(ends)})" if ends else ""
    hint = " It is a share, not a percentage." if high == 1 and 1 < number <= 100 else ""
    raise UserError(f"{name} must lie between {low} and {high}{note}, got {shown}.{hint}")
