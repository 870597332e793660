"""The pictures of a search: its history, what mattered, what each setting gave, and two settings against each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mergectl.charts import Bars, Chart, Field, Plot, Point, Series

CELLS = 24  # of a field, along each side
FEWEST = 6  # trials without which a field would be guessing


def pictures(found: Mapping[str, Any]) -> list[Chart]:
    """All pictures of one study's document (see `study_report.document`)."""
    history = found["history"]
    if not history:
        return []
    first = found["objectives"][0]
    made: list[Chart | None] = [_history(history, first)]
    made += [_importance(name, shares) for name, shares in found["importance"].items() if shares]
    if len(found["objectives"]) > 1:
        made.append(_front(found))
    names = _by_importance(found, first)
    factors = found["log"]
    made += [_contour(history, first, names, factors)]
    made += [_slice(history, first, name, log=name in factors) for name in names]
    return [chart for chart in made if chart is not None]


def scaled(objective: str, value: float) -> float:
    """An objective as it is shown: scores in percent, sizes in MB."""
    return value / 1e6 if objective == "size" else 100 * value


def unit(objective: str) -> str:
    """An objective's name with its unit."""
    return f"{objective}, {'MB' if objective == 'size' else '%'}"


def _history(history: Sequence[Mapping[str, Any]], first: str) -> Plot:
    tried = tuple(Point(row["candidate"], scaled(first, row[first]), _words(row["settings"])) for row in history)
    best = tuple(Point(row["candidate"], scaled(first, row[f"best {first}"])) for row in history)
    return Plot(
        "History", "candidate", unit(first), (Series("candidates", tried), Series("best so far", best, "steps"))
    )


def _importance(name: str, shares: Mapping[str, float]) -> Bars:
    return Bars(f"Importance for {name}", "setting", "share, %", tuple((key, 100 * v) for key, v in shares.items()))


def _front(found: Mapping[str, Any]) -> Plot:
    """All candidates over the first two objectives, and those that no other one beats."""
    x, y = found["objectives"][1], found["objectives"][0]

    def points(rows: Sequence[Mapping[str, Any]]) -> tuple[Point, ...]:
        return tuple(Point(scaled(x, row[x]), scaled(y, row[y]), f"candidate {row['candidate']}") for row in rows)

    others = [row for row in found["history"] if row["candidate"] not in found["front"]]
    best = sorted(
        (row for row in found["history"] if row["candidate"] in found["front"]), key=lambda row: float(row[x])
    )
    series = (Series("beaten", points(others)), Series("Pareto front", points(best), "line"))
    return Plot("Pareto front", unit(x), unit(y), tuple(part for part in series if part.points))


def _by_importance(found: Mapping[str, Any], first: str) -> list[str]:
    """The settings that are numbers and differ, those that mattered most first."""
    shares = found["importance"].get(first) or {}
    names = {name for row in found["history"] for name in row["settings"]}
    numbers = [name for name in sorted(names) if len(set(_values(found["history"], name))) > 1]
    return sorted(numbers, key=lambda name: -shares.get(name, 0.0))


def _values(history: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """A setting's values; none where some are words."""
    values = [row["settings"][name] for row in history if name in row["settings"]]
    return values if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values) else []


def _slice(history: Sequence[Mapping[str, Any]], first: str, name: str, *, log: bool) -> Plot:
    points = tuple(
        Point(row["settings"][name], scaled(first, row[first]), f"candidate {row['candidate']}")
        for row in history
        if name in row["settings"]
    )
    return Plot(f"{unit(first).partition(',')[0]} over {name}", name, unit(first), (Series("candidates", points),), log)


def _contour(
    history: Sequence[Mapping[str, Any]], first: str, names: Sequence[str], factors: Sequence[str]
) -> Field | None:
    """The objective over the two settings that mattered most, linear between the candidates.

    A setting that was searched in equal factors is drawn by its logarithm.
    """
    rows = [row for row in history if all(name in row["settings"] for name in names[:2])]
    if len(names) < 2 or len(rows) < FEWEST:
        return None
    a, b = names[:2]

    def place(row: Mapping[str, Any], name: str) -> float:
        value = float(row["settings"][name])
        return math.log10(value) if name in factors else value

    tried = tuple(
        (place(row, a), place(row, b), scaled(first, row[first]), f"candidate {row['candidate']}") for row in rows
    )
    xs, ys = _middles([point[0] for point in tried]), _middles([point[1] for point in tried])
    cells = _between(tried, xs, ys)
    across, up = (f"log10 of {name}" if name in factors else name for name in (a, b))
    return None if cells is None else Field(f"{first} over {a} and {b}", across, up, unit(first), xs, ys, cells, tried)


def _middles(values: Sequence[float]) -> tuple[float, ...]:
    low, high = min(values), max(values)
    return tuple(low + (high - low) * (n + 0.5) / CELLS for n in range(CELLS))


def _between(
    tried: Sequence[tuple[float, float, float, str]], xs: Sequence[float], ys: Sequence[float]
) -> tuple[tuple[float | None, ...], ...] | None:
    """The number in every cell that candidates surround; None where all of them lie on one line."""
    import numpy
    from scipy.interpolate import griddata
    from scipy.spatial import QhullError

    places = numpy.array([point[:2] for point in tried])
    across, up = numpy.meshgrid(numpy.array(xs), numpy.array(ys))
    try:
        found = griddata(places, numpy.array([point[2] for point in tried]), (across, up), rescale=True)
    except QhullError:
        return None
    return tuple(tuple(None if numpy.isnan(value) else float(value) for value in row) for row in found)


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in settings.items())
