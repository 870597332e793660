"""mergekit's recipes: YAML with a `merge_method`, checked key by key and turned into a merge of ours.

Everything that can be said without the models is said before one is opened; their headers are read only where layers
are chosen, or a parameter differs between weights.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergectl.config import read_lines
from mergectl.errors import UserError, did_you_mean
from mergectl.mergekit_methods import METHODS, NOT_READ, RESCALED_TIES, Method, Parameter
from mergectl.methods._contract import MergeWarning

Place = tuple[Any, ...]

KEYS = (
    "merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
)  # fmt: skip
KEYS_NOT_READ = {
    "modules": "parts of a model cannot have recipes of their own",
    "tokenizer": "the tokenizer is that of base_model; leave it out",
    "chat_template": "the chat template is that of base_model; leave it out",
}
SLICE_KEYS_NOT_READ = {
    "base_model": "all slices have the base_model at the top",
    "residual_weight": "it has no meaning in mergekit either",
}
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Source:
    """One model in a slice: its parameters, and its layers from the first to that after the last (None: all)."""

    ref: str
    parameters: Mapping[str, Any]
    place: Place
    layers: tuple[int, int] | None = None


@dataclass(frozen=True)
class Slice:
    """Layers of the result, each merged of one layer of every source; a recipe of whole models has one slice."""

    sources: tuple[Source, ...]
    parameters: Mapping[str, Any]
    place: Place

    @property
    def length(self) -> int | None:
        """How many layers it makes; None for all that the models have."""
        layers = self.sources[0].layers
        return None if layers is None else layers[1] - layers[0]


FLAGS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@dataclass(frozen=True)
class MergekitFile:
    """A recipe as written: its slices in order, its parameters at the top, and what the result is to be."""

    path: Path
    lines: Mapping[Place, int]
    name: str
    base: str | None
    slices: tuple[Slice, ...]
    whole: bool  # written as a list of models
    parameters: Mapping[str, Any]
    dtype: str
    tokens: str | None  # base or union, where the recipe speaks of the tokenizer

    @property
    def method(self) -> Method:
        """What the method is here; it depends on one parameter."""
        levels = [self.parameters, *(part.parameters for part in self.slices)]
        rescaled = self.name == "ties" and any(flag(x.get("rescale")) is not False for x in levels if "rescale" in x)
        return RESCALED_TIES if rescaled else METHODS[self.name]

    @property
    def levels(self) -> Iterator[tuple[Mapping[str, Any], Place, bool]]:
        """All sets of parameters, where they stand, and whether they are those of one model."""
        yield self.parameters, ("parameters",), False
        for part in self.slices:
            yield part.parameters, (*part.place, "parameters"), False
            yield from ((source.parameters, (*source.place, "parameters"), True) for source in part.sources)

    def error(self, place: Place, sentence: str) -> UserError:
        """Return an error that names the file and the line of a key."""
        return error_at(self.path, self.lines, place, sentence)


def error_at(path: Path, lines: Mapping[Place, int], place: Place, sentence: str) -> UserError:
    """Return an error that names a file and the line of a key in it."""
    line = next((lines[place[:n]] for n in range(len(place), -1, -1) if place[:n] in lines), 1)
    return UserError(f"{path}, line {line}: {sentence}")


def is_mergekit(path: Path) -> bool:
    """Say whether a recipe is one of mergekit's."""
    return "merge_method" in read_lines(path)[0]


def read(path: Path) -> MergekitFile:
    """Read a recipe and check its keys, words and numbers."""
    content, lines = read_lines(path)

    def fail(place: Place, sentence: str) -> UserError:
        return error_at(path, lines, place, sentence)

    for key in content:
        if key in KEYS_NOT_READ:
            raise fail((key,), f"'{key}' is not read: {KEYS_NOT_READ[key]}.")
        if key not in KEYS:
            raise fail((key,), f"unknown key '{key}'.{did_you_mean(str(key), KEYS)}")
    name = content["merge_method"]
    if not isinstance(name, str):
        raise fail(("merge_method",), f"merge_method is the name of a method, got {name!r}.")
    if name in NOT_READ:
        raise fail(("merge_method",), f"merge_method {name} is not read: {NOT_READ[name]}.")
    if name not in METHODS:
        raise fail(("merge_method",), f"there is no merge_method '{name}'.{did_you_mean(str(name), METHODS)}")
    base = content.get("base_model")
    if base is not None:
        base = _ref(base, ("base_model",), fail)
    slices = _slices(content, fail)
    parameters = _mapping(content.get("parameters"), ("parameters",), fail)
    tokens = _tokens(content.get("tokenizer_source"), base, fail)
    dtype = _dtype(content, fail)
    file = MergekitFile(path, lines, name, base, slices, "models" in content, parameters, dtype, tokens)
    for level, place, by_model in file.levels:
        _check_parameters(file, level, place, by_model=by_model)
    return file


Fail = Callable[[Place, str], UserError]


def _slices(content: Mapping[str, Any], fail: Fail) -> tuple[Slice, ...]:
    """Return the slices; a list of models is one slice of all their layers."""
    if ("models" in content) == ("slices" in content):
        raise fail(("slices",), "a recipe lists its inputs either as 'models' or as 'slices'.")
    if "models" in content:
        return (Slice(tuple(_sources(content["models"], ("models",), ("model", "parameters"), fail)), {}, ("models",)),)
    found = []
    for number, written in enumerate(_sequence(content["slices"], ("slices",), fail)):
        place = ("slices", number)
        entry = _mapping(written, place, fail)
        for key in SLICE_KEYS_NOT_READ:
            if key in entry:
                raise fail((*place, key), f"'{key}' of a slice is not read: {SLICE_KEYS_NOT_READ[key]}.")
        _check_keys(entry, place, ("sources", "parameters"), fail)
        listed = _sequence(entry.get("sources"), (*place, "sources"), fail)
        sources = tuple(_sources(listed, (*place, "sources"), ("model", "parameters", "layer_range"), fail))
        found.append(Slice(sources, _mapping(entry.get("parameters"), (*place, "parameters"), fail), place))
    for part in found:
        _check_ranges(part, len(found), fail)
    return tuple(found)


def _check_ranges(part: Slice, count: int, fail: Fail) -> None:
    """Refuse a slice whose sources have different numbers of layers, and one of several without a range."""
    for source in part.sources:
        if source.layers is None and count > 1:
            raise fail(source.place, f"'{source.ref}' needs a layer_range, as the recipe has several slices.")
        ends = [None if one.layers is None else one.layers[1] - one.layers[0] for one in (part.sources[0], source)]
        if None not in ends and ends[0] != ends[1]:
            raise fail(
                (*source.place, "layer_range"),
                f"'{source.ref}' has {ends[1]} layers in this slice and '{part.sources[0].ref}' {ends[0]}: "
                "all sources of a slice need as many.",
            )


def _sources(listed: Any, place: Place, keys: Sequence[str], fail: Fail) -> Iterator[Source]:
    for number, entry in enumerate(_sequence(listed, place, fail)):
        spot = (*place, number)
        source = _mapping(entry, spot, fail)
        _check_keys(source, spot, keys, fail)
        ref = _ref(source.get("model"), (*spot, "model"), fail)
        parameters = _mapping(source.get("parameters"), (*spot, "parameters"), fail)
        yield Source(ref, parameters, spot, _range(source, spot, fail))


def _range(source: Mapping[str, Any], place: Place, fail: Fail) -> tuple[int, int] | None:
    written = source.get("layer_range")
    if written is None:
        return None
    ends = [end for part in written if (end := whole(part)) is not None] if isinstance(written, list) else []
    if len(ends) == 2 == len(written) and 0 <= ends[0] < ends[1]:
        return ends[0], ends[1]
    raise fail(
        (*place, "layer_range"), f"layer_range is the first layer, from 0, and that after the last, got {written!r}."
    )


def _ref(written: Any, place: Place, fail: Fail) -> str:
    """Return a model as one word; older recipes on model cards spell it as {model: {path: ..., revision: ...}}."""
    adapter, ref = None, written
    if isinstance(ref, Mapping):
        _check_keys(ref, place, ("model", "lora"), fail)
        adapter, ref = ref.get("lora"), ref.get("model")
    if isinstance(ref, Mapping):
        _check_keys(ref, (*place, "model"), ("path", "revision"), fail)
        ref = f"{ref['path']}@{ref['revision']}" if ref.get("revision") and ref.get("path") else ref.get("path")
    if not isinstance(ref, str) or not ref:
        raise fail(place, f"a model is a folder or a hub id, got {written!r}.")
    if adapter is not None or ("+" in ref and not Path(ref).expanduser().is_dir()):
        raise fail(place, f"'{ref}': a model with an adapter is not read. Name the adapter's folder alone.")
    return ref


def _check_keys(found: Mapping[str, Any], place: Place, known: Sequence[str], fail: Fail) -> None:
    for key in found:
        if key not in known:
            raise fail((*place, key), f"unknown key '{key}'.{did_you_mean(str(key), known)}")


def _mapping(value: Any, place: Place, fail: Fail) -> Mapping[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        what = place[-1] if isinstance(place[-1], str) else f"{place[-2]}, entry {int(place[-1]) + 1}"
        raise fail(place, f"'{what}' must be a mapping of keys to values, got {value!r}.")
    return value or {}


def _sequence(value: Any, place: Place, fail: Fail) -> Sequence[Any]:
    if not isinstance(value, list) or not value:
        raise fail(place, f"'{place[-1]}' must be a list with at least one entry, got {value!r}.")
    return value


def _dtype(content: Mapping[str, Any], fail: Fail) -> str:
    """Return the type of the result; sums are always made in float32 or wider."""
    found = {key: content[key] for key in ("out_dtype", "dtype") if content.get(key) is not None}
    words = {key: str(value).removeprefix("torch.") for key, value in found.items()}
    for key, word in words.items():
        if word not in DTYPES:
            raise fail((key,), f"{key} must be one of {', '.join(DTYPES)}, got '{found[key]}'.")
    return next(iter(words.values()), "auto")


def _tokens(source: Any, base: str | None, fail: Fail) -> str | None:
    """Return whose vocabulary the result is to have: the base's, or that of all models."""
    if source in (None, "union"):
        return None if source is None else "union"
    if source not in ("base", base):
        raise fail(("tokenizer_source",), f"tokenizer_source '{source}' is not read, only 'base' and 'union'.")
    if base is None:
        raise fail(("tokenizer_source",), "tokenizer_source 'base' needs a base_model.")
    return "base"


def _check_parameters(file: MergekitFile, level: Mapping[str, Any], place: Place, *, by_model: bool) -> None:
    """Refuse parameters that the method has not, and values out of range; warn of those that change nothing."""
    known = file.method.parameters
    for key, value in level.items():
        spot = (*place, key)
        if key not in known:
            raise file.error(spot, f"unknown parameter '{key}' in {file.name}.{did_you_mean(str(key), known)}")
        if by_model and not known[key].by_model:
            raise file.error(spot, f"'{key}' holds for the whole merge: move it to the parameters at the top.")
        _check_value(file, spot, known[key], value)
        plain = flag(value) if known[key].kind == "flag" else value
        if known[key].idle and plain not in (1, False) and key not in ("int8_mask", "eps"):
            warnings.warn(f"{file.path}: '{key}' changes nothing in {file.name}.", MergeWarning, stacklevel=2)


def _check_value(file: MergekitFile, place: Place, parameter: Parameter, value: Any) -> None:
    """Check a scalar, the numbers of a gradient, or the values of conditions."""
    key = next(part for part in reversed(place) if isinstance(part, str) and part != "value")
    if isinstance(value, Mapping):
        _check_keys(value, place, ("filter", "value"), file.error)
        if "value" not in value:
            raise file.error(place, f"a condition of '{key}' needs a value.")
        if not isinstance(wanted := value.get("filter"), str | None):
            raise file.error((*place, "filter"), f"a filter is a part of weights' names, got {wanted!r}.")
        _check_value(file, (*place, "value"), parameter, value["value"])
    elif isinstance(value, list):
        if not value or len({isinstance(part, Mapping) for part in value}) > 1 or list in map(type, value):
            raise file.error(place, f"'{key}' must be a value, a list of numbers, or a list of filters with values.")
        if parameter.kind == "whole" and not isinstance(value[0], Mapping):
            raise file.error(place, f"{key} is a whole number, and those have no gradient. Name one, or use filters.")
        for number, part in enumerate(value):
            _check_value(file, (*place, number), parameter, part)
    elif parameter.kind == "flag":
        if flag(value) is None:
            raise file.error(place, f"{key} must be true or false, got {value!r}.")
    else:
        _check_number(file, place, parameter, key, value)


def flag(value: Any) -> bool | None:
    """Return what mergekit takes for true or false: YAML's words of both versions, 1 and 0; else None."""
    if isinstance(value, bool | int | float):
        return bool(value) if value in (0, 1) else None
    return FLAGS.get(value.lower()) if isinstance(value, str) else None


def number(value: Any) -> float | None:
    """Return what mergekit takes for a number: one that may be written as text; else None."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return (found if isinstance(value, str) else value) if math.isfinite(found) else None


def whole(value: Any) -> int | None:
    """Return a whole number; None for others."""
    found = number(value)
    return int(found) if found is not None and found == int(found) else None


READ: dict[str, Callable[[Any], Any]] = {"flag": flag, "number": number, "whole": whole}


def _check_number(file: MergekitFile, place: Place, parameter: Parameter, key: str, value: Any) -> None:
    found = READ[parameter.kind](value)
    if found is None:
        what = "a number" if parameter.kind == "number" else "a whole number"
        raise file.error(place, f"{key} must be {what}, got {value!r}.")
    if not parameter.low <= found <= parameter.high:
        hint = " It is a share, not a percentage." if parameter.high == 1 and 1 < found <= 100 else ""
        raise file.error(
            place, f"{key} must lie between {parameter.low:g} and {parameter.high:g}, got {found:g}.{hint}"
        )
