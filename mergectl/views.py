"""Lazy views of a checkpoint under common names and, where vocabularies differ in size, cut to the common rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mergectl.checkpoints import Checkpoint
from mergectl.tokens import TOKENS, token_dim

if TYPE_CHECKING:
    import torch

__all__ = ["TOKENS", "Grown", "Renamed", "grown"]


Vocabularies = Mapping[str | None, Mapping[int, str] | None]  # row -> token, of experts by task and the base (None)


@dataclass(frozen=True)
class Grown:
    """A weight with one row per token, of which some models have more: rows below `common` are merged."""

    dim: int
    common: int
    parts: tuple[tuple[str | None, int, int], ...]  # (expert or None for the base, first row, row after the last)
    unused: tuple[str, ...]  # experts that have such rows, too, but lend none
    tokens_of: str | None = None  # the expert that lends the last row which is known to stand for a token

    @property
    def total(self) -> int:
        """How many rows the result has."""
        return self.parts[-1][2]

    def cut(self, shape: tuple[int, ...], rows: int | None = None) -> tuple[int, ...]:
        """The shape with the common number of rows, or with `rows`."""
        return (*shape[: self.dim], self.common if rows is None else rows, *shape[self.dim + 1 :])


def grown(
    name: str, base: tuple[int, ...], experts: Mapping[str, tuple[int, ...]], known: Vocabularies | None = None
) -> Grown | None:
    """How weights of these shapes go together if only their numbers of tokens differ; None if they do not.

    Rows that not all models have come from the expert with most tokens there that has one in the row; rows without a
    token (padding) from the expert with most rows; what no expert has, from the base. A model whose vocabulary is not
    known is taken to have a token in each of its rows.
    """
    shapes = [base, *experts.values()]
    dim = token_dim(base)
    others = {(*shape[:dim], *shape[dim + 1 :]) for shape in shapes}
    if not TOKENS.search(name) or not base or {len(shape) for shape in shapes} != {len(base)} or len(others) != 1:
        return None
    rows: dict[str | None, int] = {None: base[dim]}
    rows |= {task: shape[dim] for task, shape in experts.items()}
    common, total = min(rows.values()), max(rows.values())
    told = {who: found for who, found in (known or {}).items() if found is not None}
    used = {who: {row for row in told.get(who, range(end)) if common <= row < end} for who, end in rows.items()}
    by_tokens = [*sorted(experts, key=lambda task: -len(used[task])), None]
    by_rows = [*sorted(experts, key=lambda task: -rows[task]), None]

    def owner(row: int) -> str | None:
        padding = (who for who in by_rows if row < rows[who])
        return next((who for who in by_tokens if row in used[who]), next(padding))

    owners = [owner(row) for row in range(common, total)]
    parts = [(who, len(list(run))) for who, run in itertools.groupby(owners)]
    ends = list(itertools.accumulate((count for _, count in parts), initial=common))
    last = next((who for row, who in zip(range(total, common, -1), owners[::-1], strict=True)
                 if row - 1 in told.get(who, ())), owners[-1])  # fmt: skip
    unused = tuple(task for task in experts if rows[task] > common and task not in owners)
    placed = tuple((who, start, end) for (who, _), start, end in zip(parts, ends, ends[1:], strict=False))
    return Grown(dim, common, placed, unused, last)


@dataclass(frozen=True)
class Renamed(Mapping[str, "torch.Tensor"]):
    """A checkpoint's weights under other names; those in `grown` without the rows that not all models have."""

    source: Checkpoint
    own_name: Mapping[str, str]
    grown: Mapping[str, Grown] = field(default_factory=dict)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight, without reading it."""
        shape = self.source.shape(self.own_name[name])
        return self.grown[name].cut(shape) if name in self.grown else shape

    def dtype(self, name: str) -> str:
        """The type of a weight, without reading it."""
        return self.source.dtype(self.own_name[name])

    def where(self, name: str) -> tuple[Path, int, int] | None:
        """The file, first byte and number of bytes of a weight; None where no file holds it as it is."""
        place = self.source.where(self.own_name[name])
        if place is None or name not in self.grown:
            return place
        rows = self.source.shape(self.own_name[name])[self.grown[name].dim]  # all dimensions before it are 1
        return place[0], place[1], place[2] // max(rows, 1) * self.grown[name].common

    def __getitem__(self, name: str) -> torch.Tensor:
        whole = self.source[self.own_name[name]]
        return whole.narrow(self.grown[name].dim, 0, self.grown[name].common) if name in self.grown else whole

    def rows(self, name: str, start: int, end: int) -> torch.Tensor:
        """Some rows of a weight in `grown`."""
        return self.source[self.own_name[name]].narrow(self.grown[name].dim, start, end - start)

    def __contains__(self, name: object) -> bool:
        """Say whether there is such a weight, without reading it."""
        return name in self.own_name

    def __iter__(self) -> Iterator[str]:
        return iter(self.own_name)

    def __len__(self) -> int:
        return len(self.own_name)
