"""What a recipe says, step by step: refinements, the merge, their settings in full, and their random numbers."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from mergectl import plugins, settings
from mergectl.errors import UserError, did_you_mean
from mergectl.methods._contract import SUPPLIES, Rng

if TYPE_CHECKING:
    import torch

# One or several refinements in any form that `parse_refine` reads.
Refinements: TypeAlias = "str | Mapping[str, Any] | Sequence[str | Mapping[str, Any] | tuple[str, Mapping[str, Any]]]"

# Supplies that the caller hands over.
GIVEN = ("masks", "signs", "grams", "fishers", "copies", "linears", "remember", "entropy", "watch")


@dataclass(frozen=True)
class Recipe:
    """What to do: a method, its settings, refinements before it in order, and the seed. Fit for JSON."""

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    refine: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Step:
    """One refinement, or the merge itself, with its settings in full."""

    name: str
    settings: Mapping[str, Any]


def steps_of(recipe: Recipe, tasks: Sequence[str]) -> list[Step]:
    """Return the recipe's refinements and, last, its merge; a preset brings refinements of its own."""
    info = settings.describe(recipe.method)
    if info.kind == "refinement":
        raise UserError(
            f"'{info.name}' refines task vectors and merges nothing. Use it before a method: --refine {info.name}."
        )
    steps = []
    for name, given in parse_refine(recipe.refine):
        steps.append(Step(name, settings.check(name, given, tasks)))
    values = settings.check(recipe.method, recipe.settings, tasks)
    for name in (*info.refine, info.method):
        steps.append(Step(name, {key: value for key, value in values.items() if info.settings[key].origin == name}))
    return steps


def groups(steps: Sequence[Step], names: Sequence[str]) -> list[tuple[list[str], list[Step]]]:
    """Group weights by the settings their names select; each group is then merged as a model of its own."""
    _check_patterns(steps, names)
    found: dict[str, tuple[list[str], list[Step]]] = {}
    for name in names:
        own = [Step(step.name, {key: select(value, name) for key, value in step.settings.items()}) for step in steps]
        found.setdefault(repr(own), ([], own))[0].append(name)
    return list(found.values())


def check_models(recipe: Recipe, tasks: Sequence[str], names: Sequence[str]) -> None:
    """Refuse settings of tasks, or of weights by their names, that the models do not have."""
    _check_patterns(steps_of(recipe, tasks), names)


def _check_patterns(steps: Sequence[Step], names: Sequence[str]) -> None:
    """Refuse a pattern that no weight's name fits: its value would be passed over in silence."""
    given = ((step, key, value) for step in steps for key, value in step.settings.items())
    for step, key, pattern in ((s, k, part) for s, k, value in given if isinstance(value, Mapping) for part in value):
        if pattern != "*" and not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            rule = "" if settings.settings_of(step.name)[key].per_task else f", and {key} cannot differ per task"
            raise UserError(
                f"No weight is called '{pattern}', for which {key} of {step.name} was given. "
                f"Write a pattern of weight names such as '*.attention.*'{rule}."
            )


def select(value: Any, name: str) -> Any:
    """Return a setting's value for one weight: that of the first pattern its name fits, a lone * last of all."""
    if not isinstance(value, Mapping):
        return value
    return next(
        (part for pattern, part in value.items() if pattern != "*" and fnmatch.fnmatchcase(name, pattern)), value["*"]
    )


def check_experts(info: settings.MethodInfo, count: int) -> None:
    """Refuse a number of experts that the method cannot merge."""
    least, most = info.experts
    if count < least or (most is not None and count > most):
        limit = f"exactly {least}" if least == most else f"at least {least}" if count < least else f"at most {most}"
        raise UserError(f"Method '{info.name}' takes {limit} expert{'' if limit.endswith(' 1') else 's'}, got {count}.")


def check_beforehand(recipe: Recipe, names: Sequence[str | None]) -> None:
    """Refuse what the recipe and the experts' names, None where not given, tell before a model is opened."""
    info = settings.describe(recipe.method)
    check_experts(info, len(names))
    shorts = [name.rsplit("/", 1)[-1] for name in names if name]
    known = shorts if len(set(shorts)) == len(names) else None
    for name, given in [*recipe.refine, (recipe.method, recipe.settings)]:
        settings.check_meant(settings.describe(name), given, settings.check(name, given, known))
        for key, value in given.items():
            counted = isinstance(value, Sequence) and settings.settings_of(name)[key].per_task
            if counted and not isinstance(value, str) and len(value) != len(names):
                raise UserError(f"{key} has {len(value)} values for {len(names)} tasks.")
    values = settings.check(recipe.method, recipe.settings, known)
    weight = values.get(getattr(plugins.load("methods", info.method), "SHARES", ""))
    for part in weight.values() if isinstance(weight, Mapping) and known is not None else [weight]:
        each = part if isinstance(part, Sequence) else (part,) * len(names)
        if all(isinstance(x, float | int) for x in each) and values.get("normalize", True) and abs(sum(each)) < 1e-8:
            raise UserError(
                "The weights of the experts add up to zero, so they cannot be divided by their sum. Change one of them."
            )


def check_supplies(info: settings.MethodInfo, wanted: Mapping[str, bool], given: Mapping[str, Any]) -> None:
    """Refuse a supply that nothing asks for, and a merge that lacks one it must have."""
    for name in given:
        if name not in SUPPLIES:
            raise UserError(f"There is no supply '{name}'.{did_you_mean(name, GIVEN)}")
        if name not in wanted or name not in GIVEN:
            raise UserError(f"Method '{info.name}' does not take the supply '{name}' that was given.")
    for name in GIVEN:
        if wanted.get(name) and given.get(name) is None:
            raise UserError(f"Method '{info.name}' needs '{name}' ({SUPPLIES[name]}), and none was given.")


def check_base(method: str, steps: Sequence[Step], has_base: bool) -> None:
    """Refuse a merge whose steps are about a base, and that has none."""
    wanted = {key for step in steps for key, must in settings.describe(step.name).supplies.items() if must}
    if not has_base and (len(steps) > 1 or wanted & {"task_vectors", "base"}):
        raise UserError(
            f"Method '{method}' needs the base that the experts came from, and none was given. "
            "Add it: --base MODEL, in Python the argument `base`."
        )


def generators(seed: int, stream: int) -> Rng:
    """Return the function that gives each task's weight its own seeded generator."""

    def rng(task: str, weight: str) -> torch.Generator:
        import torch

        digest = hashlib.sha256(repr((seed, stream, task, weight)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    return rng


def recipe_of(
    method: str, given: Mapping[str, Any] | None = None, refine: Refinements | None = None, seed: int = 0
) -> Recipe:
    """Make a recipe of a method, settings (as values or as typed) and refinements, names and values checked."""
    info = settings.describe(method)
    values = _read(info, given or {})
    settings.check(info.name, values, None)
    return Recipe(info.name, values, parse_refine(refine or ()), int(seed))


def parse_refine(refine: Refinements) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    """Read refinements: (name, settings), {name: settings}, or text such as `dare` and `dare:drop=0.9,rescale=no`."""
    steps = []
    for part in [refine] if isinstance(refine, str | Mapping) else refine:
        for name, given in [_parse_text(part)] if isinstance(part, str) else _pairs(part):
            info = settings.describe(name)
            if info.kind != "refinement":
                raise UserError(f"'{name}' is no refinement. Known: {', '.join(settings.refinements())}.")
            values = _read(info, given or {})
            settings.check(info.name, values, None)
            steps.append((info.name, values))
    return tuple(steps)


def _pairs(part: Any) -> list[tuple[str, Mapping[str, Any]]]:
    if isinstance(part, Mapping):
        return list(part.items())
    if isinstance(part, Sequence) and len(part) == 2 and isinstance(part[0], str):
        return [(part[0], part[1])]
    raise UserError(f"Cannot read the refinement {part!r}. Write it as a name with its settings.")


def _parse_text(text: str) -> tuple[str, Mapping[str, Any]]:
    name, _, rest = text.partition(":")
    given: dict[str, str] = {}
    for part in rest.split(",") if rest else []:
        key, sign, value = part.partition("=")
        if not sign and given:  # another number, or task, of the setting before
            given[[*given][-1]] += f",{part}"
            continue
        if not sign:
            raise UserError(f"Cannot read the refinement '{text}'. Write it as {name}:setting=value,setting=value.")
        given[key.strip()] = value
    return name.strip(), given


def _read(info: settings.MethodInfo, given: Mapping[str, Any]) -> dict[str, Any]:
    """Read the values that are given as text."""
    known = info.settings
    return {
        key: settings.parse(known[key], value) if isinstance(value, str) and key in known else value
        for key, value in given.items()
    }
