"""What the pictures of a lab show: models against experts, cost, curves, learned ranks, and where models come from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mergectl.charts import Bars, Graph, HeatMap, Node, Plot, Point, Series
from mergectl.lab import Lab
from mergectl.learned import is_learned, learned_of
from mergectl.scoreboard import Group, Row, short_names

LINES = 8  # in one plot
TALLEST = 60  # rows of a heat map
LEARNERS = 8  # the newest runs that learned something per weight
LISTED = 12  # names in one box of the lineage
CURVES = """
SELECT r.run_id, coalesce(r.name, r.run_id) AS run, m.task, m.split, m.name, m.step, m.value
FROM metrics m JOIN runs r USING (run_id)
WHERE m.step IS NOT NULL AND m.value IS NOT NULL AND r.kind NOT IN ('trial', 'search')
ORDER BY r.started_at, r.run_id, m.name, m.split, m.task, m.step
"""
LEARNED = """
SELECT r.run_id, coalesce(r.name, r.run_id) AS run, m.task, m.name, m.step, m.value
FROM metrics m JOIN runs r USING (run_id)
WHERE (m.name LIKE '%rank_%' OR m.name LIKE 'coefficient_%') AND r.kind <> 'trial' ORDER BY r.started_at DESC, r.run_id
"""
EDGES = """
SELECT l.run_id, l.role, l.task, l.ref, coalesce(l.parent, l.digest, l.ref) AS source,
    r.kind, coalesce(r.name, r.run_id) AS name, l.parent_kind, l.parent_name
FROM lineage l JOIN runs r ON r.run_id = l.run_id
WHERE l.depth = 1 AND r.status = 'finished' AND r.kind IN ('finetune', 'merge', 'search') AND l.role <> 'head'
ORDER BY r.started_at, r.run_id, l.role, l.task
"""


def mean_bars(group: Group) -> Bars | None:
    """The mean of every model that has one, in percent, best first."""
    rows = [row for row in group.rows if row.average is not None and row.kind != "expert"]
    rows.sort(key=lambda row: -(row.average or 0.0))
    if len(rows) < 2:
        return None
    names = distinct([row.name for row in rows], [row.run_id[:6] for row in rows])
    return Bars("Mean score", "model", "mean, %", tuple(zip(names, [_percent(r.average) for r in rows], strict=True)))


def heat_map(group: Group) -> HeatMap | None:
    """Each model's score on each task, in percent of the task's expert."""
    rows = [row for row in group.rows if row.kind in ("base", "merged") and any(_known(row))]
    if not rows:
        return None
    names = distinct([row.name for row in rows], [row.run_id[:6] for row in rows])
    cells = [tuple(_percent(row.relative[task]) for task in group.tasks) for row in rows[:TALLEST]]
    lowest = min(value for row in cells for value in row if value is not None)
    return HeatMap(
        "Score in percent of each task's expert", "model", "% of expert", group.heads,
        tuple(zip(names, cells, strict=False)), max(0.0, 10.0 * math.floor(lowest / 10)), 100.0,
    )  # fmt: skip


def _known(row: Row) -> list[float]:
    return [value for value in row.relative.values() if value is not None]


def against_cost(group: Group, what: str) -> Plot | None:
    """The mean score of merges and experts against the `bytes` they store or the `seconds` they took."""
    axis, unit = {"bytes": ("stored, MB", 1e6), "seconds": ("time to make, s", 1.0)}[what]
    rows = [row for row in group.rows if row.average is not None and (getattr(row, what) or 0) > 0]
    if len(rows) < 2:
        return None
    names = distinct([row.name for row in rows], [row.run_id[:6] for row in rows])
    spots = [
        (getattr(row, what) / unit, 100 * (row.average or 0.0), name, row.kind)
        for row, name in zip(rows, names, strict=True)
    ]
    best = {spot[2] for spot in spots if not any(_beats(other, spot) for other in spots)}
    series = []
    for word, kind in (("merges", "merged"), ("experts together", "experts"), ("one expert", "expert")):
        points = tuple(Point(x, y, name, name in best or kind == "experts") for x, y, name, own in spots if own == kind)
        series += [Series(word, points)] if points else []
    reach = [spot[0] for spot in spots]
    title = f"Mean score against {'storage' if what == 'bytes' else 'time'}"
    return Plot(title, axis, "mean, %", tuple(series), log_x=max(reach) > 10 * min(reach))


def _beats(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether it scores no less and costs no more, to a hundredth, and is better in one of these."""
    cheaper, better = one[0] < 0.99 * other[0], one[1] > other[1]
    return bool((cheaper or better) and one[0] <= 1.01 * other[0] and one[1] >= other[1])


def curves(lab: Lab) -> list[Plot]:
    """Whatever runs measured step by step: one plot per number, a line per run and task."""
    plots: dict[tuple[str, str], dict[tuple[str, str], list[Point]]] = {}
    for row in lab.store.query(CURVES).records():
        if not is_learned(row["name"]):
            lines = plots.setdefault((row["name"], row["split"] or ""), {})
            lines.setdefault((row["run_id"], row["task"] or ""), []).append(
                Point(row["step"], row["value"], row["run"])
            )
    found: list[Plot] = []
    for (name, split), lines in sorted(plots.items(), key=lambda item: _importance(item[0][0])):
        ready = {key: points for key, points in lines.items() if len(points) > 1}
        names = _line_names(ready)
        parts = [list(ready)[start : start + LINES] for start in range(0, len(ready), LINES)]
        for number, part in enumerate(parts, 1):
            title = f"{name} on {split}" if split else name
            series = tuple(Series(names[key], tuple(ready[key]), "line") for key in part)
            found.append(Plot(title + (f" ({number} of {len(parts)})" if len(parts) > 1 else ""), "step", name, series))
    return found


def _importance(name: str) -> tuple[int, str]:
    first = ("score", "loss")
    return (first.index(name) if name in first else len(first) + (name == "lr"), name)


def _line_names(lines: Mapping[tuple[str, str], Sequence[Point]]) -> dict[tuple[str, str], str]:
    """Run and task, each where it is needed to tell lines apart."""
    runs = [points[0].label for points in lines.values()]
    tasks = short_names(list(dict.fromkeys(task for _, task in lines)))
    short = dict(zip(dict.fromkeys(task for _, task in lines), tasks, strict=True))
    plain = [
        run if run == short[key[1]] else f"{run} {short[key[1]]}".strip() for run, key in zip(runs, lines, strict=True)
    ]
    return dict(zip(lines, distinct(plain, [run_id[:6] for run_id, _ in lines]), strict=True))


def learned_maps(lab: Lab) -> list[HeatMap]:
    """Heat maps of learned ranks and coefficients per run that stored some: weights from input to output, tasks."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for row in lab.store.query(LEARNED).records():
        runs.setdefault(row["run_id"], []).append(row)
    maps = []
    for run_id, rows in list(runs.items())[:LEARNERS]:
        for found in learned_of(rows):
            known = [value for row in found.values for value in row if value is not None]
            cells = tuple(zip(found.weights, found.values, strict=True))
            title = f"{found.kind.capitalize()} learned by {rows[0]['run']} ({run_id[:8]})"
            low, digits = (0.0, 0) if found.kind == "ranks" else (min(known), 3)
            maps.append(HeatMap(title, "weight", "", short_names(found.tasks), cells, low, max(known), digits))
    return maps


def lineage(lab: Lab) -> Graph | None:
    """What was made from what; models that were made from the same, and that nothing was made from, share a box."""
    rows = lab.store.query(EDGES).records()
    parents: dict[str, list[str]] = {}
    facts: dict[str, tuple[str, str]] = {}
    for row in rows:
        facts[row["run_id"]] = (row["kind"], row["name"])
        facts.setdefault(row["source"], _source(row))
        if row["source"] != row["run_id"] and row["source"] not in parents.get(row["run_id"], []):
            parents.setdefault(row["run_id"], []).append(row["source"])
    return _boxes(parents, facts) if parents else None


def _source(row: Mapping[str, Any]) -> tuple[str, str]:
    name = str(row["ref"] or "").rstrip("/").rpartition("/")[2]
    if row["parent_kind"] is not None:
        return row["parent_kind"], row["parent_name"] or name
    return ("base" if row["role"] == "base" else "model"), name


def _boxes(parents: Mapping[str, Sequence[str]], facts: Mapping[str, tuple[str, str]]) -> Graph:
    used = {source for sources in parents.values() for source in sources}
    groups: dict[tuple[Any, ...], list[str]] = {}
    for key in facts:
        kind = facts[key][0]
        alone = key in used
        groups.setdefault((key,) if alone else (kind, tuple(sorted(parents.get(key, ())))), []).append(key)
    depths: dict[str, int] = {}
    nodes, edges = [], []
    for members in groups.values():
        first = members[0]
        kind, name = facts[first]
        word = {"base": "base", "finetune": "expert", "model": "model"}.get(kind, "merged")
        lines = _listed([facts[member][1] for member in members]) if len(members) > 1 else [name]
        title = {"base": "base", "expert": "expert", "model": "model"}.get(word, kind)
        head = f"{len(members)} × {title}" if len(members) > 1 else title
        nodes.append(Node(first, _depth(first, parents, depths), word, head, tuple(lines)))
        own = parents.get(first, ())
        implied = {far for source in own for far in parents.get(source, ())}  # an arrow that two others say already
        edges += [(source, first) for source in own if source not in implied]
    return Graph("Lineage", tuple(nodes), tuple(edges))


def _listed(names: Sequence[str]) -> list[str]:
    unique = list(dict.fromkeys(names))
    return [*unique[:LISTED], *([f"and {len(unique) - LISTED} more"] if len(unique) > LISTED else [])]


def _depth(key: str, parents: Mapping[str, Sequence[str]], known: dict[str, int]) -> int:
    """The longest way from a model that was made from nothing here; a ring, which no honest store holds, counts 0."""
    if key not in known:
        known[key] = 0
        known[key] = max((1 + _depth(source, parents, known) for source in parents.get(key, ())), default=0)
    return known[key]


def distinct(names: Sequence[str], more: Iterable[str]) -> list[str]:
    """Names, with something more behind those that occur twice."""
    often = {name for name in names if list(names).count(name) > 1}
    return [f"{name} {extra}" if name in often else name for name, extra in zip(names, more, strict=True)]


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value
