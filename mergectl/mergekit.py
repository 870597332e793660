"""mergekit's recipes: YAML with a `merge_method`, checked key by key and turned into a merge of ours.

Recipes that merge whole models are read; those that stack layers of several are refused. Everything that can be said
without the models is said before one is opened; their headers are read only where a parameter differs between weights.
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
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Source:
    """One model of a recipe, with the parameters it has for itself."""

    ref: str
    parameters: Mapping[str, Any]
    place: Place


@dataclass(frozen=True)
class MergekitFile:
    """A recipe as written: its models in order, and its parameters from the nearest to the farthest level."""

    path: Path
    lines: Mapping[Place, int]
    name: str
    base: str | None
    sources: tuple[Source, ...]
    levels: tuple[tuple[Mapping[str, Any], Place], ...]
    ranges: tuple[tuple[int, int, Place], ...]
    dtype: str

    @property
    def method(self) -> Method:
        """What the method is here; it depends on one parameter."""
        given = [level["rescale"] for level, _ in self.levels if "rescale" in level]
        return RESCALED_TIES if self.name == "ties" and any(given) else METHODS[self.name]

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
            raise fail((key,), f"unknown key '{key}'.{did_you_mean(str(key), [*KEYS, *KEYS_NOT_READ])}")
    name = content["merge_method"]
    if name in NOT_READ:
        raise fail(("merge_method",), f"merge_method {name} is not read: {NOT_READ[name]}.")
    if name not in METHODS:
        raise fail(("merge_method",), f"there is no merge_method '{name}'.{did_you_mean(str(name), METHODS)}")
    base = content.get("base_model")
    if base is not None:
        _check_ref(base, ("base_model",), fail)
    sources, ranges, levels = _inputs(content, fail)
    whole = _mapping(content.get("parameters"), ("parameters",), fail)
    file = MergekitFile(
        path, lines, name, base, sources, (*levels, (whole, ("parameters",))), ranges, _dtype(content, fail)
    )
    _check_tokenizer(file, content.get("tokenizer_source"))
    for level, place in file.levels:
        _check_parameters(file, level, place, by_model=False)
    for source in file.sources:
        _check_parameters(file, source.parameters, (*source.place, "parameters"), by_model=True)
    return file


Fail = Callable[[Place, str], UserError]
Inputs = tuple[
    tuple[Source, ...], tuple[tuple[int, int, Place], ...], tuple[tuple[Mapping[str, Any], Place], ...]
]  # models, layer ranges, levels of parameters


def _inputs(content: Mapping[str, Any], fail: Fail) -> Inputs:
    """Return the models, the layer ranges to be checked, and the parameters of the slice if there is one."""
    if ("models" in content) == ("slices" in content):
        raise fail(("slices",), "a recipe lists its inputs either as 'models' or as 'slices'.")
    if "models" in content:
        return tuple(_sources(content["models"], ("models",), ("model", "parameters"), fail)), (), ()
    slices, place = _sequence(content["slices"], ("slices",), fail), ("slices", 0)
    if len(slices) > 1:
        raise fail(("slices", 1), "more than one slice stacks layers anew; only whole models are merged.")
    only = _mapping(slices[0], place, fail)
    _check_keys(only, place, ("sources", "parameters"), fail)
    where = (*place, "sources")
    listed = _sequence(only.get("sources"), where, fail)
    sources = tuple(_sources(listed, where, ("model", "parameters", "layer_range"), fail))
    ranges = []
    for number, entry in enumerate(listed):
        spot = (*where, number, "layer_range")
        ends = entry.get("layer_range", [0, None])
        if not isinstance(ends, list) or len(ends) != 2 or ends[0] != 0:
            raise fail(spot, f"layer_range {ends} is no whole model, [0, number of layers]; only those are merged.")
        if ends[1] is not None:
            ranges.append((0, ends[1], spot))
    parameters = _mapping(only.get("parameters"), (*place, "parameters"), fail)
    return sources, tuple(ranges), ((parameters, (*place, "parameters")),)


def _sources(listed: Any, place: Place, keys: Sequence[str], fail: Fail) -> Iterator[Source]:
    for number, entry in enumerate(_sequence(listed, place, fail)):
        spot = (*place, number)
        source = _mapping(entry, spot, fail)
        _check_keys(source, spot, keys, fail)
        _check_ref(source.get("model"), (*spot, "model"), fail)
        parameters = _mapping(source.get("parameters"), (*spot, "parameters"), fail)
        yield Source(source["model"], parameters, spot)


def _check_ref(ref: Any, place: Place, fail: Fail) -> None:
    if not isinstance(ref, str) or not ref:
        raise fail(place, f"a model is a folder or a hub id, got {ref!r}.")
    if "+" in ref and not Path(ref).is_dir():
        raise fail(place, f"'{ref}': a model with an adapter is not read. Name the adapter's folder alone.")


def _check_keys(found: Mapping[str, Any], place: Place, known: Sequence[str], fail: Fail) -> None:
    for key in found:
        if key not in known:
            raise fail((*place, key), f"unknown key '{key}'.{did_you_mean(str(key), known)}")


def _mapping(value: Any, place: Place, fail: Fail) -> Mapping[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise fail(place, f"'{place[-1]}' must be a mapping of keys to values, got {value!r}.")
    return value or {}


def _sequence(value: Any, place: Place, fail: Fail) -> Sequence[Any]:
    if not isinstance(value, list) or not value:
        raise fail(place, f"'{place[-1]}' must be a list with at least one entry, got {value!r}.")
    return value


def _dtype(content: Mapping[str, Any], fail: Fail) -> str:
    """Return the type of the result; sums are always made in float32 or wider."""
    for key in ("dtype", "out_dtype"):
        if content.get(key, "auto") not in DTYPES:
            raise fail((key,), f"{key} must be one of {', '.join(DTYPES)}, got '{content[key]}'.")
    return str(content.get("out_dtype", content.get("dtype", "auto")))


def _check_tokenizer(file: MergekitFile, source: Any) -> None:
    if source is None:
        return
    if source not in ("base", file.base):
        raise file.error(
            ("tokenizer_source",), f"tokenizer_source '{source}' is not read, only 'base': the tokenizer of base_model."
        )
    if file.base is None:
        raise file.error(("tokenizer_source",), "tokenizer_source 'base' needs a base_model.")


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
        if known[key].idle and value not in (1, False) and key not in ("int8_mask", "eps"):
            warnings.warn(f"{file.path}: '{key}' changes nothing in {file.name}.", MergeWarning, stacklevel=2)


def _check_value(file: MergekitFile, place: Place, parameter: Parameter, value: Any) -> None:
    """Check a scalar, the numbers of a gradient, or the values of conditions."""
    key = next(part for part in reversed(place) if isinstance(part, str) and part != "value")
    if isinstance(value, Mapping):
        _check_keys(value, place, ("filter", "value"), file.error)
        if "value" not in value:
            raise file.error(place, f"a condition of '{key}' needs a value.")
        _check_value(file, (*place, "value"), parameter, value["value"])
    elif isinstance(value, list):
        if not value or len({isinstance(part, Mapping) for part in value}) > 1:
            raise file.error(place, f"'{key}' must be a value, a list of numbers, or a list of filters with values.")
        for number, part in enumerate(value):
            _check_value(file, (*place, number), parameter, part)
    elif parameter.kind == "flag" and not isinstance(value, bool):
        raise file.error(place, f"{key} must be true or false, got {value!r}.")
    elif parameter.kind == "number":
        _check_number(file, place, parameter, key, value)


def _check_number(file: MergekitFile, place: Place, parameter: Parameter, key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise file.error(place, f"{key} must be a number, got {value!r}.")
    if not parameter.low <= value <= parameter.high:
        hint = " It is a share, not a percentage." if parameter.high == 1 and 1 < value <= 100 else ""
        raise file.error(
            place, f"{key} must lie between {parameter.low:g} and {parameter.high:g}, got {value:g}.{hint}"
        )


def families_of(file: MergekitFile) -> tuple[str | None, tuple[Source, ...]]:
    """Return the base and the models to merge, as the method takes them; a base that is merged too comes first."""
    listed = [source for source in file.sources if source.ref == file.base]
    others = tuple(source for source in file.sources if source.ref != file.base)
    role = file.method.base
    if file.base is None:
        if role in ("origin", "first"):
            raise file.error(("merge_method",), f"{file.name} needs a base_model.")
        return None, file.sources
    if role in ("origin", "optional"):
        for source in listed:
            if source.parameters:
                warnings.warn(
                    f"{file.path}: the parameters of base_model change nothing in {file.name}.",
                    MergeWarning,
                    stacklevel=2,
                )
        return file.base, others
    return None, (*(listed or [Source(file.base, {}, ("base_model",))]), *others)
