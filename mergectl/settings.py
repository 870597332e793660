"""A method's settings, read once from the signature in its file: options, checks, search spaces and help all use this.

Torch is not loaded here, so that help is instant.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, Literal

from mergectl import plugins, values
from mergectl.errors import UserError, did_you_mean
from mergectl.methods._contract import SUPPLIES, Beside, Between, OneOf, PerTask, Tasks
from mergectl.values import Setting

__all__ = ["MethodInfo", "Setting", "check", "describe", "names", "parse", "problems", "refinements", "settings_of"]

# The method words of the Medusa command line, with any number of leading underscores.
_LEGACY = {
    "SUM": "average",
    "TA": "task_arithmetic",
    "MEDUSA": "medusa",
    "_TIES": "medusa",
    "TIES_": "ties_tensor",
    "TIES_TIES": "ties_tensor",
    "DARE_SUM": "dare_average",
    "DARE_TA": "dare_task_arithmetic",
    "DARE_TIES": "dare_ties",
}
_TYPES: dict[Any, Literal["float", "int", "bool", "word", "tasks"]]
_TYPES = {float: "float", float | None: "float", int: "int", bool: "bool", str: "word", Tasks: "tasks"}


@dataclass(frozen=True)
class MethodInfo:
    """What a method's file says about it; a preset has its method's facts and defaults of its own."""

    name: str
    title: str
    paper: str
    summary: str
    kind: Literal["method", "refinement", "preset"]
    settings: Mapping[str, Setting]
    supplies: Mapping[str, bool]  # what it asks for, and whether it must have it
    linear: tuple[str, ...] = ()  # the merged task vector is linear in these
    experts: tuple[int, int | None] = (1, None)  # least and most experts
    extra_bits: int = 0  # kept per task and weight
    neutral: Mapping[str, Any] | None = None  # settings under which copies of a model merge to it
    method: str = ""  # the file whose `merge` runs
    refine: tuple[str, ...] = ()  # the refinements that come before it
    defaults: Mapping[str, Any] = field(default_factory=dict)  # what a preset sets


def names() -> list[str]:
    """List the methods that can be merged with, presets included, broken ones left out."""
    infos = list(_working())
    return [info.name for info in infos if info.method] + [name for info in infos for name in _presets(info.name)]


def refinements() -> list[str]:
    """List the refinements of task vectors."""
    return [info.name for info in _working() if not info.method]


def problems() -> list[str]:
    """Say in one sentence each what is wrong with method files."""
    sentences = plugins.problems("methods")
    for name in plugins.names("methods"):
        try:
            _describe_file(name)
        except UserError as error:
            sentences += [str(error)] if str(error) not in sentences else []
    return sentences


def describe(name: str) -> MethodInfo:
    """Return all facts about a method, refinement or preset."""
    name = _LEGACY.get(name.lstrip("_") if name != "_TIES" else name, name.replace("-", "_"))
    files = plugins.names("methods")
    if name in files:
        return _describe_file(name)
    for info in _working():
        if name in _presets(info.name):
            return _describe_preset(name, info)
    raise UserError(f"No method '{name}'.{did_you_mean(name, {*files, *names()})}")


def settings_of(name: str) -> Mapping[str, Setting]:
    """Return the settings of a method, refinement or preset."""
    return describe(name).settings


def function_of(name: str) -> Callable[..., Any]:
    """Return the `merge` or `refine` function of a file."""
    return _function(plugins.load("methods", name), name)


def blocks_of(name: str, given: Mapping[str, Any]) -> str:
    """Say in what blocks a file's function may be handed weights (its fact BLOCKS): `elements`, `rows` or none ("")."""
    fact = getattr(plugins.load("methods", name), "BLOCKS", False)
    if not isinstance(fact, Mapping):
        return fact if isinstance(fact, str) else "elements" if fact else ""
    found = [_blocks_for(allowed, given.get(key)) for key, allowed in fact.items()]
    return "" if "" in found else "rows" if "rows" in found else "elements"


def _blocks_for(allowed: Any, value: Any) -> str:
    if isinstance(allowed, Mapping):
        return str(allowed.get(value, ""))
    return "elements" if value in allowed else ""


def check(name: str, given: Mapping[str, Any], tasks: Sequence[str] | None) -> dict[str, Any]:
    """Return all settings of a method, checked, defaults filled in; without tasks, per-task values stay as given."""
    info = describe(name)
    for key in given:
        if key not in info.settings:
            raise UserError(f"No setting '{key}' in {_noun(info)} '{info.name}'.{did_you_mean(key, info.settings)}")
    checked = {}
    for key, setting in info.settings.items():
        checked[key] = values.resolve(setting, given.get(key, setting.default), tasks)
        if tasks is not None and isinstance(checked[key], dict):
            if info.extra_bits:
                raise UserError(f"{key} cannot differ between weights: '{info.name}' keeps one rescaler per task.")
            checked[key].setdefault("*", values.resolve(setting, setting.default, tasks))
    if tasks is not None:  # a search may still vary the other setting
        check_meant(info, given, checked)
    return checked


def check_meant(info: MethodInfo, given: Iterable[str], checked: Mapping[str, Any]) -> None:
    """Refuse settings that would change nothing beside the values of the others."""
    for key in given:
        values.check_beside(info.settings[key], checked)


def parse(setting: Setting, text: str) -> Any:
    """Read a value as typed: `0.3`, per task `0.3,0.5` or `rte=0.5,cola=0.2`, per weights `*.attention.*=0.5`."""
    return values.parse(setting, text)


def _working() -> typing.Iterator[MethodInfo]:
    for name in plugins.names("methods"):
        try:
            yield _describe_file(name)
        except UserError:
            continue  # said by `problems`


def _noun(info: MethodInfo) -> str:
    return "refinement" if info.kind == "refinement" else "method"


def _presets(file: str) -> Mapping[str, Mapping[str, Any]]:
    presets: Mapping[str, Mapping[str, Any]] = getattr(plugins.load("methods", file), "PRESETS", {})
    return presets


def _describe_file(name: str) -> MethodInfo:
    return _describe_module(name, plugins.load("methods", name))


@functools.cache
def _describe_module(name: str, module: ModuleType) -> MethodInfo:
    function = _function(module, name)
    parameters = inspect.signature(function).parameters.values()
    try:
        settings = {p.name: _setting(p, function, name) for p in parameters if p.kind is p.KEYWORD_ONLY}
        supplies = {p.name: _supply(p) for p in parameters if p.kind is not p.KEYWORD_ONLY}
        beside = {key: setting.beside.setting for key, setting in settings.items() if setting.beside is not None}
        for key in (key for key, other in beside.items() if other not in settings):
            raise TypeError(f"setting '{key}' stands beside '{beside[key]}', which is no setting of this file.")
        if not (module.__doc__ or "").strip():
            raise TypeError("the file must begin with a sentence that says what it does.")
    except TypeError as error:
        raise UserError(f"{_place(function, name)}: {error}") from error
    is_method = function.__name__ == "merge"
    return MethodInfo(
        name=name,
        title=getattr(module, "TITLE", name),
        paper=getattr(module, "PAPER", ""),
        summary=(module.__doc__ or "").strip().splitlines()[0],
        kind="method" if is_method else "refinement",
        settings=settings,
        supplies=supplies,
        linear=tuple(getattr(module, "LINEAR", ())),
        experts=tuple(getattr(module, "EXPERTS", (1, None))),
        extra_bits=getattr(module, "EXTRA_BITS", 0),
        neutral=getattr(module, "NEUTRAL", None),
        method=name if is_method else "",
    )


def _describe_preset(name: str, info: MethodInfo) -> MethodInfo:
    """Join a preset's method and refinement: the union of their settings, with the preset's defaults."""
    defaults = dict(_presets(info.name)[name])
    method = info if info.method else _describe_file(str(defaults.pop("method", "")))
    parts = [method] if info.method else [info, method]
    settings = {key: setting for part in parts for key, setting in part.settings.items()}
    wrong = [key for key in defaults if key not in settings]
    if wrong or len(settings) < sum(len(part.settings) for part in parts):
        place = plugins.where("methods", info.name)
        raise UserError(f"{place}: preset '{name}' names a setting that is unknown or that two of its parts have.")
    chosen = {key: replace(settings[key], default=value) for key, value in defaults.items()}
    words = ", ".join(f"{key}={value}" for key, value in defaults.items())
    return replace(
        method,
        name=name,
        title=" + ".join(part.title for part in parts),
        paper=info.paper,
        summary=f"{' then '.join(part.name for part in parts)}{f' with {words}' if words else ''}.",
        kind="preset",
        settings={**settings, **chosen},
        supplies={key: any(part.supplies.get(key, False) for part in parts) for part in parts for key in part.supplies},
        neutral=None if method.neutral is None else {**method.neutral, **(info.neutral or {})},
        refine=() if info.method else (info.name,),
        defaults=defaults,
    )


def _function(module: ModuleType, name: str) -> Callable[..., Any]:
    found = [getattr(module, word) for word in ("merge", "refine") if callable(getattr(module, word, None))]
    if len(found) != 1:
        place = plugins.where("methods", name)
        raise UserError(f"{place}: it must hold one function, `merge` or `refine`, got {len(found)}.")
    function: Callable[..., Any] = found[0]
    return function


def _place(function: Callable[..., Any], name: str) -> str:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return plugins.where("methods", name) + (f":{code.co_firstlineno}" if code else "")


def _supply(parameter: inspect.Parameter) -> bool:
    """Say whether a supply must be there."""
    if parameter.name not in SUPPLIES or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        raise TypeError(
            f"the lab cannot supply '{parameter.name}', only {', '.join(SUPPLIES)}. "
            "To make it a setting, move it after the *."
        )
    return parameter.default is parameter.empty


def _setting(parameter: inspect.Parameter, function: Callable[..., Any], origin: str) -> Setting:
    name, hint = parameter.name, parameter.annotation
    if isinstance(hint, str):
        try:
            hint = eval(hint, inspect.unwrap(function).__globals__)  # written in the method's own file
        except Exception as error:
            raise TypeError(f"the type of setting '{name}' cannot be read ({error}).") from error
    kind, *notes = typing.get_args(hint) if typing.get_origin(hint) is typing.Annotated else (hint,)
    between = next((note for note in notes if isinstance(note, Between)), None)
    beside = next((note for note in notes if isinstance(note, Beside)), None)
    words = tuple(word for note in notes if isinstance(note, OneOf) for word in note.words)
    help_text = next((note for note in notes if isinstance(note, str)), "")
    if (kind != PerTask and kind not in _TYPES) or (kind is str) != bool(words) or not help_text:
        raise TypeError(
            f"setting '{name}' must say type, range and help on one line, like "
            'Annotated[float, Between(0, 1), "share kept"]; '
            "types are float, float | None, int, bool, PerTask, Tasks and str with OneOf."
        )
    if parameter.default is parameter.empty:
        raise TypeError(f"setting '{name}' must have a default.")
    per_task = bool(kind == PerTask)
    type_ = "float" if per_task else _TYPES[kind]
    return Setting(name, type_, parameter.default, help_text, between, words, per_task, origin, beside)
