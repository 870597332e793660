"""Pictures as records: what is drawn, apart from how. Each gives its numbers as a table, to stand beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Numbers = tuple[tuple[str, ...], list[tuple[object, ...]]]  # column heads and rows


@dataclass(frozen=True)
class Point:
    """One mark of a plot; `named` marks have their label beside them."""

    x: float
    y: float
    label: str = ""
    named: bool = False


@dataclass(frozen=True)
class Series:
    """Points that belong together, drawn as dots, a line or steps."""

    name: str
    points: tuple[Point, ...]
    shape: str = "dots"


@dataclass(frozen=True)
class Plot:
    """Points or lines over two axes."""

    title: str
    x: str
    y: str
    series: tuple[Series, ...]
    log_x: bool = False

    def numbers(self) -> Numbers:
        """Every point; where all series share their x, one row per x and a column per series."""
        names = [series.name for series in self.series]
        by_x = [{point.x: point.y for point in series.points} for series in self.series]
        if len(self.series) > 1 and all(len(xs) == len(s.points) for xs, s in zip(by_x, self.series, strict=True)):
            values = sorted({x for xs in by_x for x in xs})
            return (self.x, *names), [(x, *(xs.get(x) for xs in by_x)) for x in values]
        several = len(self.series) > 1
        heads = (*(["series"] if several else []), "name", self.x, self.y)
        return heads, [
            (*([series.name] if several else []), point.label, point.x, point.y)
            for series in self.series
            for point in series.points
        ]


@dataclass(frozen=True)
class Bars:
    """One bar per label."""

    title: str
    head: str
    unit: str
    rows: tuple[tuple[str, float | None], ...]

    def numbers(self) -> Numbers:
        """Label and value."""
        return (self.head, self.unit), list(self.rows)

    def share(self, value: float | None) -> float:
        """How long a bar is, of the longest."""
        longest = max((abs(v) for _, v in self.rows if v is not None), default=0.0)
        return 0.0 if value is None or not longest else max(value, 0.0) / longest


@dataclass(frozen=True)
class HeatMap:
    """Numbers in rows and columns, coloured from `low` to `high`."""

    title: str
    corner: str
    unit: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float | None, ...]], ...]
    low: float
    high: float
    digits: int = 1

    def numbers(self) -> Numbers:
        """The map itself."""
        return (self.corner, *self.columns), [(label, *values) for label, values in self.rows]

    def shade(self, value: float) -> int:
        """The step of the colour scale, 0 to 9; 10 is above its end."""
        return shade(value, self.low, self.high)


@dataclass(frozen=True)
class Field:
    """A number over two settings: tried points, and between them what they suggest (empty outside)."""

    title: str
    x: str
    y: str
    z: str
    xs: tuple[float, ...]  # middles of the cells
    ys: tuple[float, ...]
    cells: tuple[tuple[float | None, ...], ...]  # [y][x]
    tried: tuple[tuple[float, float, float, str], ...]  # x, y, z, label

    def numbers(self) -> Numbers:
        """The points that were tried."""
        return ("candidate", self.x, self.y, self.z), [(label, x, y, z) for x, y, z, label in self.tried]

    def limits(self) -> tuple[float, float]:
        """The lowest and highest number."""
        values = [z for *_, z, _ in self.tried]
        return min(values), max(values)


@dataclass(frozen=True)
class Node:
    """A box of a graph: where it stands from left to right, its heading and what is in it."""

    key: str
    column: int
    kind: str
    title: str
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Graph:
    """Boxes and arrows, from left to right."""

    title: str
    nodes: tuple[Node, ...]
    edges: tuple[tuple[str, str], ...]

    def numbers(self) -> Numbers:
        """Every box and what it was made from."""
        titles = {node.key: node.title for node in self.nodes}
        made: dict[str, list[str]] = {}
        for start, end in self.edges:
            made.setdefault(end, []).append(titles[start])
        rows: list[tuple[object, ...]] = [
            (node.kind, node.title, ", ".join(node.lines), ", ".join(made.get(node.key, []))) for node in self.nodes
        ]
        return ("kind", "what", "which", "made from"), rows


Chart = Plot | Bars | HeatMap | Field | Graph


def shade(value: float, low: float, high: float) -> int:
    """The step of a colour scale from low to high, 0 to 9; 10 is above its end."""
    if value > high:
        return 10
    return max(0, min(9, int(10 * (value - low) / (high - low)))) if high > low else 9


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between low and high, some `about` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    found = [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]
    return found or [low]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between low and high; if these are few, 2 and 5 times them, too."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8)):
        found = [f * 10.0**p for p in powers for f in factors if low * 0.999 <= f * 10.0**p <= high * 1.001]
        if len(found) >= 3:
            return found
    return [low, high]


def padded(values: Sequence[float], log: bool = False) -> tuple[float, float]:
    """The limits of an axis: a little beyond the values; something around a single one."""
    low, high = min(values), max(values)
    if log:
        wide = max((high / low) ** 0.06, 1.15)
        return low / wide, high * wide
    wide = 0.06 * (high - low) or max(abs(low) * 0.1, 0.5)
    return low - wide, high + wide
