"""Recipe and pipeline files: YAML checked against a schema, with the line and key of whatever is wrong."""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mergectl.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import yaml

Model = TypeVar("Model", bound=BaseModel)


class MergeFile(BaseModel):
    """A merge recipe: what `mergectl merge -c FILE` reads."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    experts: list[str] | dict[str, str]
    base: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    refine: list[str | dict[str, dict[str, Any]]] = Field(default_factory=list)
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)  # of what the lab supplies: calibration, adapt
    seed: int = Field(default=0, ge=0)
    dtype: str = "auto"
    out: str | None = None
    export: str | None = None
    shard_size: str | None = None
    layer_map: str | dict[str | int, Any] | None = None  # experts of another depth: one map, or {expert: map}
    depth: str = "base"  # whose number of layers a mapped merge has: base or small
    head: str = "small"  # of whom: the expert's own, interpolate or reference
    layout: str = "none"  # merge-lm: `experts` names one folder that holds all
    tasks: dict[str, dict[str, Any]] = Field(default_factory=dict)


class PipelineFile(BaseModel):
    """A pipeline: steps of verbs that `mergectl run` executes in order."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    paper: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)  # overridable by --set, used as ${name}
    smoke: dict[str, Any] = Field(default_factory=dict)  # the settings under which --smoke tries it in seconds
    like: str | None = None  # a shipped pipeline whose steps these are, with other settings
    folder: str | None = None  # where in the lab's runs/ it works, to share experts; the default is its name
    steps: list[dict[str, Any]] = Field(default_factory=list)
    next: list[str] = Field(default_factory=list)  # commands to try afterwards


# What a plain word means by YAML 1.2. PyYAML reads 1.1, where the key `on` is true, `1e-4` a text and `-1:1` is -61.
WORDS = (
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)$", "-+0123456789"),
    ("float", r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$|[-+]?[0-9]+[eE][-+]?[0-9]+$", "-+.0123456789"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$", "-+."),
)
MERGED = "tag:yaml.org,2002:merge"  # of the key `<<`
MOST_VALUES = 100_000  # a file in which aliases repeat aliases may mean billions


@functools.cache
def _loader() -> Any:
    import yaml

    safe: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C reads ten times as fast

    class Loader(safe):  # type: ignore[misc]
        pass

    Loader.yaml_implicit_resolvers = {
        first: [pair for pair in pairs if pair[0].rpartition(":")[2] not in ("bool", "int", "float")]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for kind, pattern, starts in WORDS:
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(pattern), list(starts))
    return Loader


def read_value(text: str) -> Any:
    """Read one value as a file would: a number, a word, a list."""
    import yaml

    try:
        return yaml.load(text, Loader=_loader())
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"'{text}' cannot be read as a value.") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping, or say which line is wrong."""
    return read_lines(path)[0]


def read_file(path: Path, schema: type[Model]) -> Model:
    """Read a YAML file and check it against `schema`; errors name the line and the key."""
    content, lines = read_lines(path)
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        # A misspelt key also leaves the right one missing: say the misspelling.
        problem = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        raise UserError(_sentence(path, problem, lines, schema)) from error


@contextlib.contextmanager
def naming_lines(path: Path, *parts: str) -> Iterator[None]:
    """Say beside an error in which line of a file it lies: that of the first key below `parts` which it speaks of.

    A key that stands there more than once names no line.
    """
    try:
        yield
    except UserError as error:
        words = re.findall(r"\w+", str(error))
        lines: dict[str, list[int]] = {}
        for place, number in read_lines(path)[1].items():
            if len(place) > 1 and place[0] in parts and isinstance(place[-1], str):
                lines.setdefault(place[-1], []).append(number)
        line = next((f", line {lines[word][0]}" for word in words if len(lines.get(word, ())) == 1), "")
        raise UserError(f"{path}{line}: {error}") from error


def read_lines(path: Path) -> tuple[dict[str, Any], dict[tuple[Any, ...], int]]:
    """Read a YAML mapping, and on which line every key and list item stands."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"{path} cannot be read: {reason}.") from error
    lines: dict[tuple[Any, ...], int] = {}
    try:
        loader = _loader()(text)
        node = loader.get_single_node()
        if isinstance(node, yaml.MappingNode):
            _number(
                node, (), lines, itertools.count()
            )  # first: what `<<` merges is later not to be told from the mapping's own keys
        content = None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError) as error:  # a date that is none is a ValueError
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        problem = problem or getattr(error, "reason", None) or error
        if problem == "but found another document":
            problem = "another document begins here, and only one is read. Put each into a file of its own"
        raise UserError(f"{path}, line {mark.line + 1 if mark else 1}: {problem}.") from error
    except RecursionError as error:
        raise UserError(f"{path}: a part of it contains itself.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}, line 1: a recipe is a mapping of keys to values.")
    return content, lines


def _number(node: yaml.Node, place: tuple[Any, ...], lines: dict[tuple[Any, ...], int], seen: Iterator[int]) -> None:
    """Note the line of every key and list item; of a key that stands twice, only the last value would count."""
    import yaml

    lines.setdefault(place, node.start_mark.line + 1)
    _count(node, seen)
    if isinstance(node, yaml.MappingNode):
        for key, value in _pairs(node, seen):
            if (*place, key.value) in lines:
                raise yaml.MarkedYAMLError(problem=f"the key '{key.value}' stands twice", problem_mark=key.start_mark)
            lines[(*place, key.value)] = key.start_mark.line + 1
            _number(value, (*place, key.value), lines, seen)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _number(value, (*place, index), lines, seen)


def _count(node: yaml.Node, seen: Iterator[int]) -> None:
    """Count a value that is looked at; one and the same may be, through many aliases."""
    import yaml

    if next(seen) >= MOST_VALUES:
        problem = f"its anchors and aliases stand for more than {MOST_VALUES:,} values"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _pairs(node: yaml.MappingNode, seen: Iterator[int]) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
    """A mapping's keys and values, then those that `<<` adds to them; other kinds of keys are refused elsewhere."""
    import yaml

    pairs = [(key, value) for key, value in node.value if isinstance(key, yaml.ScalarNode)]
    own = [(key, value) for key, value in pairs if key.tag != MERGED]
    yield from own
    known = {key.value for key, _ in own}
    for value in (value for key, value in pairs if key.tag == MERGED):
        for part in value.value if isinstance(value, yaml.SequenceNode) else [value]:
            _count(part, seen)
            added = list(_pairs(part, seen)) if isinstance(part, yaml.MappingNode) else []
            yield from ((key, below) for key, below in added if key.value not in known)
            known |= {key.value for key, _ in added}


def _sentence(
    path: Path, problem: Mapping[str, Any], lines: Mapping[tuple[Any, ...], int], schema: type[BaseModel]
) -> str:
    place = tuple(problem["loc"])
    key = ".".join(str(part) for part in place)
    line = next((lines[place[:n]] for n in range(len(place), -1, -1) if place[:n] in lines), 1)
    if problem["type"] == "missing":
        return f"{path}: the key '{key}' is missing."
    if problem["type"] == "extra_forbidden":
        return f"{path}, line {line}: unknown key '{key}'.{did_you_mean(str(place[-1]), schema.model_fields)}"
    return f"{path}, line {line}, key '{key}': {problem['msg']}, got {problem['input']!r}."
