"""Plots, fields and graphs as inline SVG: shapes with classes, so that a page's own colours, light or dark, apply.

Every text goes through an XML writer, so that nothing a name holds can become markup.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from xml.etree.ElementTree import Element, SubElement, tostring

from mergectl.charts import Field, Graph, Node, Plot, Point, log_ticks, padded, shade, ticks

WIDTH, HEIGHT = 400, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 44
BOX, GAP, LINE = 190, 70, 17  # of graphs: a box's width, the room between columns, a line's height
MOST = 8  # colours that are told apart; further series begin anew
MARKS = ("circle", "square", "diamond", "triangle")

Scale = Callable[[float], float]


def drawn(chart: Plot | Field | Graph) -> str:
    """A chart as an <svg> element."""
    if isinstance(chart, Graph):
        return _text(_graph(chart))
    return _text(_plot(chart) if isinstance(chart, Plot) else _field(chart))


def number(value: float) -> str:
    """A number on an axis."""
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.4g}"


def _text(element: Element) -> str:
    return tostring(element, encoding="unicode")


def clean(text: str) -> str:
    """Text without the control characters that XML has no way to write."""
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]", "�", text)


def _svg(title: str, width: float, height: float) -> Element:
    svg = Element("svg", viewBox=f"0 0 {width:g} {height:g}", role="img", xmlns="http://www.w3.org/2000/svg")
    svg.set("aria-label", clean(title))
    return svg


def _add(parent: Element, tag: str, text: str = "", /, **attributes: object) -> Element:
    """One more element; `class_` is its class, numbers are cut to a tenth of a pixel."""
    plain = {
        name.rstrip("_").replace("_", "-"): f"{value:.1f}".removesuffix(".0")
        if isinstance(value, float)
        else str(value)
        for name, value in attributes.items()
    }
    child = SubElement(parent, tag, {name: clean(value) for name, value in plain.items()})
    child.text = clean(text) or None
    return child


def _scales(xs: Sequence[float], ys: Sequence[float], log_x: bool) -> tuple[Scale, Scale, list[float], list[float]]:
    """Where values lie on the paper, and the ticks of both axes."""
    (x0, x1), (y0, y1) = padded(xs, log_x), padded(ys)
    across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(value: float) -> float:
        share = math.log(value / x0) / math.log(x1 / x0) if log_x else (value - x0) / (x1 - x0)
        return LEFT + across * share

    def y(value: float) -> float:
        return TOP + down * (1 - (value - y0) / (y1 - y0))

    return x, y, (log_ticks(x0, x1) if log_x else ticks(x0, x1)), ticks(y0, y1)


def _axes(svg: Element, chart: Plot | Field, x: Scale, y: Scale, across: list[float], up: list[float]) -> None:
    bottom = HEIGHT - BOTTOM
    for value in across:
        _add(svg, "line", class_="grid", x1=x(value), x2=x(value), y1=TOP, y2=bottom)
        _add(svg, "text", number(value), class_="tick", x=x(value), y=bottom + 16, text_anchor="middle")
    for value in up:
        _add(svg, "line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y(value), y2=y(value))
        _add(svg, "text", number(value), class_="tick", x=LEFT - 6, y=y(value) + 4, text_anchor="end")
    middle = (LEFT + WIDTH - RIGHT) / 2
    _add(svg, "text", chart.x, class_="axis", x=middle, y=HEIGHT - 6, text_anchor="middle")
    turned = f"rotate(-90 11 {(TOP + bottom) / 2:g})"
    _add(svg, "text", chart.y, class_="axis", x=11, y=(TOP + bottom) / 2, text_anchor="middle", transform=turned)


def _plot(chart: Plot) -> Element:
    svg = _svg(chart.title, WIDTH, HEIGHT)
    points = [point for series in chart.series for point in series.points]
    x, y, across, up = _scales([p.x for p in points], [p.y for p in points], chart.log_x)
    _axes(svg, chart, x, y, across, up)
    for place, series in enumerate(chart.series):
        group = _add(svg, "g", class_=f"series c{place % MOST} {series.shape}")
        if series.shape != "dots":
            _add(group, "path", class_="line", d=_path(series.points, x, y, series.shape == "steps"))
        for point in series.points if series.shape != "steps" else ():
            _mark(group, place, x(point.x), y(point.y), _tip(chart, series.name, point))
    taken = [(x(point.x) - 5, x(point.x) + 5, y(point.y) - 5, y(point.y) + 5) for point in points]
    for point in points:
        if point.named:
            _name(svg, point.label, x(point.x), y(point.y), taken)
    return svg


def _path(points: Sequence[Point], x: Scale, y: Scale, steps: bool) -> str:
    """A line through points; in steps it goes on to the right before it goes up."""
    words, before = [], 0.0
    for index, point in enumerate(points):
        here = (x(point.x), y(point.y))
        if steps and index:
            words.append(f"L{here[0]:.1f} {before:.1f}")
        words.append(f"{'L' if index else 'M'}{here[0]:.1f} {here[1]:.1f}")
        before = here[1]
    return "".join(words)


def _tip(chart: Plot | Field, name: str, point: Point) -> str:
    who = ", ".join(part for part in (point.label, name) if part)
    return f"{who}: {chart.x} {number(point.x)}, {chart.y} {number(point.y)}"


def _mark(group: Element, place: int, x: float, y: float, tip: str) -> None:
    """A mark whose form, not only colour, tells its series."""
    shape, size = MARKS[place % len(MARKS)], 4.0
    if shape == "circle":
        _add(group, "circle", class_="mark", cx=x, cy=y, r=size, data_tip=tip)
        return
    corners = {
        "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        "diamond": ((0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)),
        "triangle": ((0, -1.3), (1.2, 1), (-1.2, 1)),
    }[shape]
    drawn_at = " ".join(f"{x + size * a:.1f},{y + size * b:.1f}" for a, b in corners)
    _add(group, "polygon", class_="mark", points=drawn_at, data_tip=tip)


def _name(svg: Element, label: str, x: float, y: float, taken: list[tuple[float, float, float, float]]) -> None:
    """A label near its mark, where nothing else is; if there is no such place, none: the table has them all."""
    short = label if len(label) <= 22 else label[:21] + "…"
    wide = 6.2 * len(short)
    for down in (-6, 4, 14):
        for left in (x + 7, x - 7 - wide):
            box = (left, left + wide, y + down - 9, y + down + 2)
            inside = left > LEFT and left + wide < WIDTH and y + down - 4 > TOP and y + down < HEIGHT - BOTTOM
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                _add(svg, "text", short, class_="name", x=left, y=y + down)
                return


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    """Whether two boxes (left, right, top, bottom) share room."""
    return one[0] < other[1] and other[0] < one[1] and one[2] < other[3] and other[2] < one[3]


def _field(chart: Field) -> Element:
    svg = _svg(chart.title, WIDTH, HEIGHT)
    xs, ys = [point[0] for point in chart.tried], [point[1] for point in chart.tried]
    x, y, across, up = _scales([*xs, *chart.xs], [*ys, *chart.ys], False)
    low, high = chart.limits()
    wide = abs(x(chart.xs[1]) - x(chart.xs[0])) + 0.6  # a little over the next cell, so that no seam shows
    tall = abs(y(chart.ys[1]) - y(chart.ys[0])) + 0.6
    _axes(svg, chart, x, y, across, up)
    cells = _add(svg, "g", class_="field")
    for row, values in zip(chart.ys, chart.cells, strict=True):
        for column, value in zip(chart.xs, values, strict=True):
            if value is not None:
                place = {"x": x(column) - wide / 2, "y": y(row) - tall / 2, "width": wide, "height": tall}
                _add(cells, "rect", class_=f"q{shade(min(value, high), low, high)}", **place)
    for a, b, value, label in chart.tried:
        tip = f"{label}: {chart.x} {number(a)}, {chart.y} {number(b)}, {chart.z} {number(value)}"
        _add(svg, "circle", class_=f"tried q{shade(value, low, high)}", cx=x(a), cy=y(b), r=4.5, data_tip=tip)
    return svg


def _graph(chart: Graph) -> Element:
    """Boxes in columns, in their order from top to bottom, and curves between them."""
    columns = [[node for node in chart.nodes if node.column == n] for n in range(_columns(chart))]
    tall = max(sum(_height(node) + 14 for node in nodes) for nodes in columns)
    svg = _svg(chart.title, len(columns) * (BOX + GAP) - GAP + 8, tall + 4)
    places: dict[str, tuple[float, float, float]] = {}
    for n, nodes in enumerate(columns):
        top = (tall - sum(_height(node) + 14 for node in nodes)) / 2 + 7
        for node in nodes:
            places[node.key] = (4 + n * (BOX + GAP), top, _height(node))
            top += _height(node) + 14
    for start, end in chart.edges:
        (x0, y0, h0), (x1, y1, h1) = places[start], places[end]
        a, b, bend = (x0 + BOX, y0 + h0 / 2), (x1, y1 + h1 / 2), (x1 - x0 - BOX) / 2
        curve = (
            f"M{a[0]:.1f} {a[1]:.1f}C{a[0] + bend:.1f} {a[1]:.1f} {b[0] - bend:.1f} {b[1]:.1f} {b[0]:.1f} {b[1]:.1f}"
        )
        _add(svg, "path", class_="edge", d=curve)
    for node in chart.nodes:
        _box(svg, node, *places[node.key])
    return svg


def _columns(chart: Graph) -> int:
    return 1 + max(node.column for node in chart.nodes)


def _height(node: Node) -> float:
    return 14.0 + LINE * (1 + len(node.lines))


def _box(svg: Element, node: Node, x: float, y: float, tall: float) -> None:
    group = _add(svg, "g", class_=f"node {node.kind}")
    _add(group, "rect", x=x, y=y, width=BOX, height=tall, rx=6)
    _add(group, "text", _cut(node.title), class_="title", x=x + 10, y=y + 19)
    for row, line in enumerate(node.lines, 1):
        _add(group, "text", _cut(line), class_="fact", x=x + 10, y=y + 19 + LINE * row)


def _cut(text: str) -> str:
    return text if len(text) <= 26 else text[:25] + "…"
