"""What a recipe's steps ask for beside the weights, made by the lab: one row per supply, built only where asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergectl.calibration_options import check_known, for_supplies, settled
from mergectl.errors import UserError, did_you_mean
from mergectl.families import Family
from mergectl.jsonfiles import read_record
from mergectl.lab import Lab
from mergectl.plan import Recipe, steps_of
from mergectl.settings import describe
from mergectl.tied import uses

# Settings that decide what learned numbers are the numbers of.
MEANING = ("start", "decompose", "granularity", "parameters", "plus", "density", "soft_mask")


@dataclass(frozen=True)
class Request:
    """What a supply is made from."""

    lab: Lab
    family: Family
    recipe: Recipe
    options: Mapping[str, Any]  # the user's options for supplies, by name


def _copies(request: Request) -> Any:
    population = request.family.population
    return uses(list(population.base), population.tied, request.family.base.config)


def _grams(request: Request) -> Any:
    return _calibrated(request, "grams")


def _fishers(request: Request) -> Any:
    return _calibrated(request, "fishers")


def _calibrated(request: Request, what: str) -> Any:
    from mergectl.calibration_supply import calibrated

    options = settled_options(request.recipe, request.family, request.options)["calibration"]
    own = {name: options[name] for name in for_supplies([what])}
    return calibrated(request.lab, request.family, request.recipe.seed, what, own)


def _entropy(request: Request) -> Any:
    from mergectl.adaptation import LabEntropy, read_options

    return LabEntropy(request.lab, request.family, read_options(request.options.get("adapt", {})))


def _watch(request: Request) -> Any:
    """Follow an adaptation; the trials of a search, whose digest is not known, have no checkpoints."""
    from mergectl.adaptation import learned_file, read_options
    from mergectl.adaptation_watch import LabWatch

    digest, lab = request.options.get("watched"), request.lab
    start = read_options(request.options.get("adapt", {})).start_from
    begin = None if start is None else learned_file(start)
    if start is not None:
        _check_meaning(start, request.recipe)
    if digest is None and begin is None:
        return None
    path = None if digest is None else lab.folder / "cache" / "adaptation" / f"{digest}.safetensors"
    return LabWatch(request.family.task_ids, path, lab.terminal, begin)


def _check_meaning(start: str, recipe: Recipe) -> None:
    """Refuse numbers that were learned for something else: as many of them would fit, and mean nothing."""
    former = (read_record(Path(start)).get("recipe") or {}).get("settings", {})
    for name in MEANING:
        if name in former and name in recipe.settings and former[name] != recipe.settings[name]:
            raise UserError(
                f"--adapt start_from={start} was learned with {name}={former[name]}, and means nothing with "
                f"{name}={recipe.settings[name]}. Give it: --{name.replace('_', '-')} {former[name]}"
            )


def _linears(request: Request) -> Any:
    from mergectl.linears import known_linears

    found = known_linears(request.family.base, request.lab.folder / "cache" / "linears")
    names = request.family.population.base.own_name
    return None if found is None else {name: found[own] for name, own in names.items() if own in found}


def _remember(request: Request) -> Any:
    from mergectl.factors import Factors

    population = request.family.population
    return Factors(request.lab.folder / "cache" / "factors", population.base, population.experts)


GROUPS = ("calibration", "adapt", "watched")  # of options, by what they say how to make

# A supply that cannot be made is None: the merge then says that a method needs it, or goes without.
BUILDERS: dict[str, Callable[[Request], Any]] = {
    "copies": _copies,
    "linears": _linears,
    "remember": _remember,
    "grams": _grams,
    "fishers": _fishers,
    "entropy": _entropy,
    "watch": _watch,
}


def asked_by(recipe: Recipe, family: Family) -> list[str]:
    """Return the supplies that the recipe's refinements and its method ask for, in order and each once."""
    steps = steps_of(recipe, list(family.experts))
    return list(dict.fromkeys(name for step in steps for name in describe(step.name).supplies))


def settled_options(recipe: Recipe, family: Family, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with those of calibration in full, where a step looks at what it finds; refuse useless ones.

    A per-task one becomes one number per task, in the experts' order.
    """
    check_options(options)
    if options.get("adapt") and "entropy" not in asked_by(recipe, family):
        raise UserError(f"'{recipe.method}' does not adapt to unlabelled rows. Leave out the options of 'adapt'.")
    rest = {name: value for name, value in options.items() if name != "calibration"}
    found = settled(options.get("calibration", {}), asked_by(recipe, family), list(family.experts), recipe.method)
    return {**rest, "calibration": found} if found else rest


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options that there are not, which can be told before a model is opened."""
    from mergectl.adaptation import read_options

    if unknown := [name for name in options if name not in GROUPS]:
        raise UserError(f"There are no options '{unknown[0]}'.{did_you_mean(unknown[0], GROUPS)}")
    check_known(options.get("calibration", {}))
    read_options(options.get("adapt", {}))


def supplies_of(lab: Lab, family: Family, recipe: Recipe, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return every supply that the recipe's method and refinements ask for and that the lab can make."""
    request = Request(lab, family, recipe, options or {})
    made = {name: BUILDERS[name](request) for name in asked_by(recipe, family) if name in BUILDERS}
    return {name: supply for name, supply in made.items() if supply is not None}
