"""The models that a recipe of mergekit's merges, slice by slice, and as models made of their layers."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mergectl.gradients import Depth
from mergectl.layers import NUMBERED, is_front
from mergectl.mergekit import MergekitFile, Slice, Source
from mergectl.methods._contract import MergeWarning
from mergectl.refs import Ref, Stack

# Methods that one more model of weight 0 leaves as they are: in these, slices may have different numbers of models.
PADDED = (
    "linear", "task_arithmetic", "ties", "dare_ties", "dare_linear", "breadcrumbs", "breadcrumbs_ties", "della",
    "della_linear",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What one slice merges, as the method takes it: the base, and the models in order."""

    part: Slice
    base: Source | None
    experts: tuple[Source, ...]


def rows_of(file: MergekitFile) -> tuple[Row, ...]:
    """Return what every slice merges; all have as many models, those of weight 0 filled in."""
    role = file.method.base
    if file.base is None and role in ("origin", "first"):
        raise file.error(("merge_method",), f"{file.name} needs a base_model.")
    rows = [_row(file, part) for part in file.slices]
    count = max(len(row.experts) for row in rows)
    for row in rows:
        if len(row.experts) < count and file.name not in PADDED:
            raise file.error(row.part.place, f"this slice has another number of models, which {file.name} cannot take.")
    if role == "origin" and not count:
        raise file.error(("merge_method",), f"{file.name} needs a model beside base_model.")
    return tuple(_padded(row, count) for row in rows)


def _row(file: MergekitFile, part: Slice) -> Row:
    """What one slice merges; a base that is merged like the others comes first where the method needs that."""
    listed = tuple(source for source in part.sources if source.ref == file.base)
    others = tuple(source for source in part.sources if source.ref != file.base)
    role = file.method.base
    if file.base is None or (role == "input" and not file.whole):
        return Row(part, None, part.sources)
    if role in ("origin", "optional"):
        if any(source.parameters for source in listed):
            sentence = f"{file.path}: the parameters of base_model change nothing in {file.name}."
            warnings.warn(sentence, MergeWarning, stacklevel=2)
        return Row(part, (listed or (_unlisted(file, part),))[0], others)
    if not listed and not file.whole:
        raise file.error(part.place, f"base_model is one of the two models of {file.name}: list it in every slice.")
    return Row(part, None, (*(listed or (_unlisted(file, part),)), *others))


def _unlisted(file: MergekitFile, part: Slice) -> Source:
    """The base in a slice that does not list it: the same layers as of all its models."""
    assert file.base is not None
    layers = {source.layers for source in part.sources}
    if len(layers) > 1:
        raise file.error(part.place, "the layers of base_model are not clear here: list it with its layer_range.")
    return Source(file.base, {}, ("base_model",) if file.whole else part.place, layers.pop())


def _padded(row: Row, count: int) -> Row:
    """Fill in models of weight 0: the base, whose task vector is zero, or without one the first model."""
    missing = count - len(row.experts)
    filling = replace(row.base or row.experts[0], parameters={"weight": 0.0})
    return replace(row, experts=(*row.experts, *[filling] * missing))


class Course:
    """Which slice each weight of the result belongs to, and how deep in that it lies."""

    def __init__(self, rows: Sequence[Row], names: Sequence[str]) -> None:
        self.rows, self.depth = rows, Depth(names)
        self.starts = [sum(row.part.length or 0 for row in rows[:number]) for number in range(len(rows))]

    def of(self, name: str) -> tuple[Row, float]:
        """Return the slice and the depth, 0 for its first layer to 1 for its last, and 0 outside of layers."""
        if len(self.rows) == 1:
            return self.rows[0], self.depth.of(name)
        match = NUMBERED.match(name)
        if match is None or match[1] not in self.depth.layers:
            return self.rows[0 if is_front(name) else -1], 0.0
        number = max(n for n, start in enumerate(self.starts) if start <= int(match[2]))
        row, place = self.rows[number], int(match[2]) - self.starts[number]
        assert row.part.length is not None
        return row, place / (row.part.length - 1) if row.part.length > 1 else 1.0

    def in_source(self, name: str, row: Row, source: Source) -> str:
        """What a weight of the result is called in a source, which may have its layer under another number."""
        match = NUMBERED.match(name)
        if source.layers is None or match is None or match[1] not in self.depth.layers:
            return name
        layer = int(match[2]) - self.starts[self.rows.index(row)] + source.layers[0]
        return f"{match[1]}{layer}.{name[match.end() :]}"


def models_of(
    file: MergekitFile, rows: Sequence[Row], counts: Mapping[str, int]
) -> tuple[Ref | None, tuple[tuple[str, Ref], ...]]:
    """Return the base and the named models to merge; `counts` has the layers of each, where layers are chosen."""
    for source in (source for row in rows for source in (*row.experts, *([row.base] if row.base else []))):
        if source.layers is not None and source.layers[1] > counts[source.ref]:
            raise file.error(
                (*source.place, "layer_range"),
                f"'{source.ref}' has {counts[source.ref]} layers, and none up to {source.layers[1] - 1}.",
            )
    frame = file.base or file.slices[0].sources[0].ref
    bases = [row.base for row in rows if row.base is not None]
    base = _model(bases, counts, bases[0].ref) if bases else None
    columns = list(zip(*(row.experts for row in rows), strict=True))
    first = [frame if base is None and not place else column[0].ref for place, column in enumerate(columns)]
    experts = [_model(column, counts, ref) for column, ref in zip(columns, first, strict=True)]
    return base, tuple(zip(_names(columns), experts, strict=True))


def _model(column: Sequence[Source], counts: Mapping[str, int], frame: str) -> Ref:
    """One source of each slice as a model: named alone if it is just that, else as a stack of layers."""
    if column[0].layers is None:
        return column[0].ref
    layers = tuple((source.ref, layer) for source in column for layer in range(*(source.layers or (0, 0))))
    if layers == tuple((frame, layer) for layer in range(counts[frame])):
        return frame
    return Stack(layers, column[0].ref, column[-1].ref, frame)


def _names(columns: Sequence[Sequence[Source]]) -> Iterator[str]:
    """Name the models after their folders or ids, those of several `stack`, and number what has one name."""
    refs = [{source.ref for source in column} for column in columns]
    words = [_word(next(iter(found))) if len(found) == 1 else "stack" for found in refs]
    shared = {word for word, count in Counter(words).items() if count > 1}
    yield from (f"{word}_{place}" if word in shared else word for place, word in enumerate(words, 1))


def _word(ref: str) -> str:
    return ref.rstrip("/").rsplit("/", 1)[-1].partition("@")[0] or "model"
