"""Turn a recipe of mergekit's into a merge of ours: its parameters weight by weight, then as settings with patterns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergectl import gradients
from mergectl.checkpoints import open_checkpoint
from mergectl.errors import UserError
from mergectl.gradients import Depth
from mergectl.merge import MergeJob
from mergectl.mergekit import MergekitFile, Source, families_of, read
from mergectl.plan import check_experts, recipe_of
from mergectl.settings import describe

FindRun = Callable[[str], Path | None]


@dataclass(frozen=True)
class Here:
    """The parameters of a recipe as they are for one weight."""

    file: MergekitFile
    experts: tuple[Source, ...]
    has_base: bool
    weight: str
    depth: float

    def __call__(self, name: str) -> Any:
        """Return a parameter of the whole merge."""
        return self._value(name, None)

    def each(self, name: str) -> tuple[float, ...]:
        """Return a parameter of every model that is merged, in order."""
        return tuple(float(self._value(name, source)) for source in self.experts)

    def _value(self, name: str, source: Source | None) -> Any:
        """Return the value of the nearest level that has one for this weight, else the default."""
        for level in [*([source.parameters] if source else []), *(level for level, _ in self.file.levels)]:
            value = gradients.evaluate(level[name], self.weight, self.depth) if name in level else None
            if value is not None:
                return value
        default = self.file.method.parameters[name].default
        if default is None:
            who = f"'{source.ref}' has no" if source else f"{self.file.name} needs the parameter"
            where = f" for the weight '{self.weight}'" if self.weight else ""
            raise self.file.error(source.place if source else ("parameters",), f"{who} {name}{where}.")
        return default


def job_of(path: Path, seed: int, find_run: FindRun | None = None) -> MergeJob:
    """Return the merge that a recipe describes; the models' headers are read if it speaks of layers or filters."""
    file = read(path)
    base, experts = families_of(file)
    recipe = _settings(file, experts, base, [""])
    info = describe(file.method.ours)
    try:
        check_experts(info, len(experts))
        recipe_of(info.name, recipe, (), seed)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if file.ranges or any(gradients.is_varied(value) for level in _levels(file) for value in level.values()):
        recipe = _settings(file, experts, base, _weights(file, base, experts, find_run))
    named = zip(_names(experts), (source.ref for source in experts), strict=True)
    return MergeJob(recipe_of(info.name, recipe, (), seed), tuple(named), base, file.dtype)


def _levels(file: MergekitFile) -> Iterator[Mapping[str, Any]]:
    """Go through all sets of parameters in a recipe."""
    yield from (source.parameters for source in file.sources)
    yield from (level for level, _ in file.levels)


def _settings(
    file: MergekitFile, experts: tuple[Source, ...], base: str | None, names: Sequence[str]
) -> dict[str, Any]:
    """Return our settings: one value each, or {pattern of weight names: value}."""
    depth = Depth(names)
    try:
        rows = {
            name: file.method.settings(Here(file, experts, base is not None, name, depth.of(name))) for name in names
        }
    except UserError as error:
        raise error if str(error).startswith(str(file.path)) else UserError(f"{file.path}: {error}") from error
    keys = next(iter(rows.values()))
    return {key: gradients.patterns({name: row[key] for name, row in rows.items()}) for key in keys}


def _weights(file: MergekitFile, base: str | None, experts: tuple[Source, ...], find_run: FindRun | None) -> list[str]:
    """Return the names of the weights that are merged; refuse a layer range that is not the whole model."""
    from mergectl.lineup import line_up

    opened = {
        name: open_checkpoint(source.ref, find_run) for name, source in zip(_names(experts), experts, strict=True)
    }
    first = next(iter(opened.values()))
    origin = base or first.meta.get("base")
    names = list(line_up(open_checkpoint(origin, find_run) if origin else first, opened).base)
    layers = Depth(names).count
    for _, end, place in file.ranges:
        if end != layers:
            raise file.error(
                place,
                f"layer_range [0, {end}] is not the whole model, which has {layers} layers; only those are merged.",
            )
    return names


def _names(experts: Sequence[Source]) -> list[str]:
    """Name the models after their folders or ids, numbered where two have one name."""
    words = [source.ref.rstrip("/").rsplit("/", 1)[-1].partition("@")[0] or "model" for source in experts]
    shared = {word for word, count in Counter(words).items() if count > 1}
    return [f"{word}_{place}" if word in shared else word for place, word in enumerate(words, 1)]
