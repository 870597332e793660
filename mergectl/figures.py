"""`report --png`, `--svg`: the same pictures for papers, drawn by matplotlib."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mergectl.charts import Bars, Chart, Field, HeatMap, Plot
from mergectl.errors import UserError
from mergectl.pictures import mean_bars
from mergectl.report_content import Content

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6d31")  # Okabe and Ito
MARKS = "osD^vP*X"
DASHES = ("-", "--", ":", "-.")
LOOK = {
    "font.size": 8, "axes.titlesize": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
    "figure.dpi": 300, "savefig.bbox": "tight", "svg.fonttype": "none", "svg.hashsalt": "mergectl",
    "text.parse_math": False,
}  # fmt: skip
WIDE = 3.4  # inches: a column of a paper


def write_figures(content: Content, folder: Path, form: str) -> list[Path]:
    """Draw every picture of a report into a folder and return the files."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            f"--{form} draws with matplotlib, which is not installed: pip install 'mergectl[plots]'"
        ) from error
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--{form} {folder} must name a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    with matplotlib.rc_context(LOOK):
        for name, chart in named_charts(content):
            figure = Figure()
            DRAWERS[type(chart)](figure, chart)
            path = folder / f"{name}.{form}"
            work = folder / f".{name}.{form}"
            # No date within, so that the same store gives the same file.
            figure.savefig(work, format=form, metadata={"Date": None} if form == "svg" else None)
            made.append(work.replace(path))
    if not made:
        raise UserError("There is nothing to draw yet: no scores, searches or curves in this store.")
    return made


def named_charts(content: Content) -> Iterator[tuple[str, Chart]]:
    """All pictures but the lineage, each with the name of its file."""
    used: set[str] = set()
    for name, chart in _charts(content):
        plain = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")[:80] or "picture"
        while plain in used:
            plain += "-2"
        used.add(plain)
        yield plain, chart


def _charts(content: Content) -> Iterator[tuple[str, Chart]]:
    for group, heat, charts in content.groups:
        base = f"{group.base or 'unknown base'} " if len(content.groups) > 1 else ""
        named: list[tuple[str, Chart | None]] = [("mean score", mean_bars(group)), ("heat map", heat)]
        yield from ((f"{base}{name}", chart) for name, chart in named if chart is not None)
        yield from ((f"{base}{chart.title}", chart) for chart in charts)
    for study, charts in content.studies:
        yield from ((f"{study['study']} {chart.title}", chart) for chart in charts)
    rest: list[Chart] = [*content.learned, *content.curves]
    yield from ((chart.title, chart) for chart in rest)


def _plot(figure: Any, chart: Plot) -> None:
    figure.set_size_inches(WIDE, 2.3)
    axes = figure.add_subplot()
    for place, series in enumerate(chart.series):
        xs, ys = [point.x for point in series.points], [point.y for point in series.points]
        colour, mark = COLOURS[place % len(COLOURS)], MARKS[place % len(MARKS)]
        if series.shape == "dots":
            axes.scatter(xs, ys, s=12, color=colour, marker=mark, label=series.name, alpha=0.8, linewidths=0)
        elif series.shape == "steps":
            axes.step(xs, ys, where="post", color=colour, linewidth=1, label=series.name)
        else:
            axes.plot(xs, ys, color=colour, marker=mark, markersize=3, linewidth=1,
                      linestyle=DASHES[place % len(DASHES)], label=series.name)  # fmt: skip
        for point in (point for point in series.points if point.named):
            axes.annotate(point.label, (point.x, point.y), (3, 3), textcoords="offset points", fontsize=6)
    if chart.log_x:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")  # the usual one writes mathematics, which names must not be read as
    axes.set(xlabel=chart.x, ylabel=chart.y)
    axes.grid(linewidth=0.3)
    if len(chart.series) > 1:
        axes.legend(frameon=False, fontsize=6)


def _bars(figure: Any, chart: Bars) -> None:
    rows = [(label, value) for label, value in chart.rows if value is not None]
    figure.set_size_inches(WIDE, 0.5 + 0.17 * len(rows))
    axes = figure.add_subplot()
    drawn = axes.barh(range(len(rows)), [value for _, value in rows], color=COLOURS[0], height=0.7)
    axes.bar_label(drawn, fmt="%.1f", padding=2, fontsize=6)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.invert_yaxis()
    axes.set(xlabel=chart.unit)


def _map(figure: Any, chart: HeatMap) -> None:
    wide = max(WIDE, 1.3 + 0.42 * len(chart.columns))
    figure.set_size_inches(wide, 0.9 + 0.17 * len(chart.rows))
    axes = figure.add_subplot()
    cells = [[float("nan") if value is None else value for value in values] for _, values in chart.rows]
    shown = axes.imshow(cells, cmap="Blues", vmin=chart.low, vmax=chart.high, aspect="auto")
    for y, row in enumerate(cells):
        for x, value in enumerate(row):
            text = "–" if value != value else f"{value:.{chart.digits}f}"
            dark = value > chart.low + 0.6 * (chart.high - chart.low)
            axes.text(x, y, text, ha="center", va="center", fontsize=5.5, color="white" if dark else "black")
    axes.set_xticks(range(len(chart.columns)), chart.columns, rotation=45, ha="right")
    axes.set_yticks(range(len(chart.rows)), [label for label, _ in chart.rows])
    axes.tick_params(length=0)
    figure.colorbar(shown, ax=axes, label=chart.unit)


def _field(figure: Any, chart: Field) -> None:
    figure.set_size_inches(WIDE, 2.5)
    axes = figure.add_subplot()
    cells = [[float("nan") if value is None else value for value in row] for row in chart.cells]
    low, high = chart.limits()
    shown = axes.pcolormesh(chart.xs, chart.ys, cells, cmap="Blues", vmin=low, vmax=high, rasterized=True)
    axes.scatter([p[0] for p in chart.tried], [p[1] for p in chart.tried], c=[p[2] for p in chart.tried], cmap="Blues",
                 vmin=low, vmax=high, s=14, edgecolors="black", linewidths=0.5)  # fmt: skip
    axes.use_sticky_edges = False  # room around the outermost candidates
    axes.margins(0.05)
    axes.set(xlabel=chart.x, ylabel=chart.y)
    figure.colorbar(shown, ax=axes, label=chart.z)


DRAWERS: dict[type[Any], Callable[[Any, Any], None]] = {Plot: _plot, Bars: _bars, HeatMap: _map, Field: _field}
