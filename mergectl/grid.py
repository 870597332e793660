"""A population of experts: one fine-tuning for every task and every combination of some settings' values."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from mergectl.errors import UserError, did_you_mean
from mergectl.finetune_config import FinetuneConfig
from mergectl.lab import Lab
from mergectl.presets import plain
from mergectl.verbs import Result, finetune_experts

Grid = Mapping[str, Sequence[Any]]
FIXED = ("task", "base", "device", "masks")  # what a population has in common, or names otherwise


def read_grid(items: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """Read what the command line says: `lr=1e-5,3e-5`, one item per setting."""
    found: dict[str, list[str]] = {}
    for item in items:
        name, _, values = item.partition("=")
        name = name.replace("-", "_")
        if not values:
            raise UserError(f"--grid {item} is not NAME=VALUE,VALUE.")
        if name in found:
            raise UserError(f"--grid names '{name}' twice. Write its values together: --grid {name}=VALUE,VALUE")
        found[name] = values.split(",")
    return check_grid(found)


def check_grid(given: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Return each setting's values in their own type; refuse what fine-tuning does not have."""
    if not isinstance(given, Mapping):
        raise UserError(f"A grid is a mapping of settings to lists of values, got '{given}'.")
    kinds = _kinds()
    grid = {}
    for name, values in given.items():
        if name not in kinds:
            raise UserError(f"A grid cannot vary '{name}'.{did_you_mean(name, kinds)}")
        if not isinstance(values, list | tuple) or not values:
            raise UserError(f"A grid needs a list of values for '{name}', got '{values}'.")
        grid[name] = tuple(_value(name, kinds[name], value) for value in values)
        if len(set(grid[name])) < len(grid[name]):
            raise UserError(f"The grid gives a value of '{name}' twice: {', '.join(map(str, values))}.")
    return grid


def _kinds() -> dict[str, type]:
    """The settings of fine-tuning that are one number or word, and its type."""
    found = {}
    for name, hint in get_type_hints(FinetuneConfig).items():
        kinds = [kind for kind in (get_args(hint) or (hint,)) if kind in (bool, int, float, str)]
        if name not in FIXED and kinds and get_args(hint)[1:] != (...,):
            found[name] = kinds[0]
    return found


def _value(name: str, kind: type, given: Any) -> Any:
    """Turn a value into its setting's type, or say which type that is."""
    text = str(given).strip()
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        if kind is not bool and not isinstance(given, bool) and text:
            return kind(text)
    except ValueError:
        pass
    word = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}[kind]
    raise UserError(f"In a grid, '{name}' must be {word}, got '{given}'.")


def points(grid: Grid) -> list[dict[str, Any]]:
    """Every combination of the settings' values, the last setting changing fastest.

    >>> points({"lr": (1e-5, 3e-5), "seed": (0,)})
    [{'lr': 1e-05, 'seed': 0}, {'lr': 3e-05, 'seed': 0}]
    """
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def suffix(point: Mapping[str, Any]) -> str:
    """What tells a point's folder from the others.

    >>> suffix({"lr": 1e-5, "seed": 1, "bf16": True})
    '-lr1e-05-seed1-bf16true'
    """
    words = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in point.items()}
    return "".join(f"-{name}{word}" for name, word in words.items())


def finetune_grid(
    lab: Lab,
    words: Sequence[str],
    base: str,
    out: Path,
    options: Mapping[str, Any],
    grid: Grid,
    *,
    force: bool = False,
    reuse: bool = False,
) -> list[Result]:
    """Fine-tune one expert per task and point of the grid into `out/<task>-<values>`; without a grid, one per task.

    Every combination is checked before the first training; those already finished are not done again (without a
    grid: unless `force` is given).
    """
    every = points(grid)
    for point in every:
        FinetuneConfig(task="", base="", **{"seed": lab.seed, **plain(options), **point})
    results: list[Result] = []
    again = len(every) > 1 or not force
    for point in every:
        varied = {name: value for name, value in point.items() if name != "seed"}
        results += finetune_experts(
            replace(lab, seed=point.get("seed", lab.seed)),
            words, base, out, {**options, **varied}, force=force, reuse=reuse, again=again,
            suffix=suffix(point),
        )  # fmt: skip
    return results
