"""Turn a recipe of mergekit's into a merge of ours: its parameters weight by weight, then as settings with patterns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergectl import gradients, vocabulary
from mergectl.checkpoints import open_checkpoint
from mergectl.errors import UserError
from mergectl.layers import the_stack
from mergectl.merge import MergeJob
from mergectl.mergekit import READ, MergekitFile, Place, Source, read
from mergectl.mergekit_slices import Course, Row, models_of, rows_of
from mergectl.peeking import peeking
from mergectl.plan import check_experts, recipe_of
from mergectl.refs import Ref
from mergectl.settings import describe

FindRun = Callable[[str], Path | None]


@dataclass(frozen=True)
class Here:
    """The parameters of a recipe as they are for one weight."""

    file: MergekitFile
    course: Course
    row: Row
    weight: str
    depth: float

    @property
    def has_base(self) -> bool:
        """Say whether task vectors are taken from a base."""
        return self.row.base is not None

    def __call__(self, name: str) -> Any:
        """Return a parameter of the whole merge."""
        return self._value(name, None)

    def each(self, name: str) -> tuple[float, ...]:
        """Return a parameter of every model that is merged, in order."""
        return tuple(float(self._value(name, source)) for source in self.row.experts)

    def _value(self, name: str, source: Source | None) -> Any:
        """Return the value of the nearest level that has one for this weight, else the default.

        Filters of what every model has its own of look at the weight's name in that model.
        """
        kind = self.file.method.parameters[name].kind
        weight = self.weight if source is None else self.course.in_source(self.weight, self.row, source)
        for level in (source.parameters if source else {}, self.row.part.parameters, self.file.parameters):
            value = gradients.evaluate(level[name], weight, self.depth, READ[kind]) if name in level else None
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
    rows = rows_of(file)
    info = describe(file.method.ours)
    _check_weights(file, rows)
    for row in rows:
        recipe = _settings(file, [row], [""])
        try:
            check_experts(info, len(row.experts))
            recipe_of(info.name, recipe, (), seed)
        except UserError as error:
            raise file.error(_written(file, row, str(error)), str(error)) from error
    with peeking():
        base, experts = models_of(file, rows, _counts(file, rows, find_run))
        base, experts = _with_tokens(file, base, experts, find_run)
        if not file.whole or any(gradients.is_varied(value) for level, *_ in file.levels for value in level.values()):
            recipe = _settings(file, rows, _weights(base, experts, find_run))
    return MergeJob(recipe_of(info.name, recipe, (), seed), experts, base, file.dtype)


def _written(file: MergekitFile, row: Row, sentence: str) -> Place:
    """Return where the parameter stands that a sentence speaks of, else the row's place."""
    named = [name for name in file.method.parameters if name in sentence]
    levels = [(source.parameters, source.place) for source in row.experts]
    levels += [(row.part.parameters, row.part.place), (file.parameters, ())]
    found = ((*place, "parameters", name) for level, place in levels for name in named if name in level)
    return next(found, row.part.place)


def _check_weights(file: MergekitFile, rows: Sequence[Row]) -> None:
    """Refuse a recipe in which every model has the weight 0 in every slice; one slice may be the base's."""
    if "weight" not in file.method.parameters:
        return
    sources = [source for row in rows for source in row.experts]
    levels = [file.parameters, *(row.part.parameters for row in rows), *(source.parameters for source in sources)]
    if any(gradients.is_varied(level.get("weight")) for level in levels):
        return
    if not any(any(Here(file, Course([row], [""]), row, "", 0.0).each("weight")) for row in rows):
        first = sources[0]
        place = (*(first.place if "weight" in first.parameters else ()), "parameters", "weight")
        raise file.error(place, "all weights are 0, so nothing would be merged. Change one of them.")


def _counts(file: MergekitFile, rows: Sequence[Row], find_run: FindRun | None) -> dict[str, int]:
    """Return how many layers each model has, if the recipe chooses layers."""
    sources = [source for row in rows for source in (*row.experts, *([row.base] if row.base else []))]
    if all(source.layers is None for source in sources):
        return {}
    refs = dict.fromkeys([*([file.base] if file.base else []), *(source.ref for source in sources)])
    return {ref: the_stack(open_checkpoint(ref, find_run).names, ref).count for ref in refs}


def _with_tokens(
    file: MergekitFile, base: Ref | None, experts: tuple[tuple[str, Ref], ...], find_run: FindRun | None
) -> tuple[Ref | None, tuple[tuple[str, Ref], ...]]:
    """Return base and experts with the vocabulary that the recipe asks for; what is not well defined is refused."""
    if file.tokens is None:
        return base, experts
    opened = [open_checkpoint(ref, find_run) for _, ref in experts]
    origin = None if base is None else open_checkpoint(base, find_run)
    try:
        if file.tokens == "union":
            vocabulary.check_union(origin, opened)
            return base, experts
        assert file.base is not None
        lender = open_checkpoint(file.base, find_run)
        vocabulary.check_rows([lender, *opened], "base")
    except UserError as error:
        raise file.error(("tokenizer_source",), str(error)) from error
    pairs = zip(experts, opened, strict=True)
    return base, tuple((name, vocabulary.with_base_tokens(ref, model, lender)) for (name, ref), model in pairs)


def _settings(file: MergekitFile, rows: Sequence[Row], names: Sequence[str]) -> dict[str, Any]:
    """Return our settings: one value each, or {pattern of weight names: value}."""
    course = Course(rows, names)
    try:
        found = {
            name: file.method.settings(Here(file, course, row, name, depth))
            for name in names for row, depth in [course.of(name)]
        }  # fmt: skip
    except UserError as error:
        if str(error).startswith(str(file.path)):
            raise
        raise file.error(_written(file, rows[0], str(error)), str(error)) from error
    keys = next(iter(found.values()))
    return {key: gradients.patterns({name: row[key] for name, row in found.items()}) for key in keys}


def _weights(base: Ref | None, experts: Sequence[tuple[str, Ref]], find_run: FindRun | None) -> list[str]:
    """Return the names of the weights that are merged."""
    from mergectl.families import line_up, opened

    found, by_task, *_ = opened(base, experts, find_run)
    return list(line_up(found, by_task).base)
