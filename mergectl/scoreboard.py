"""The leaderboard as records: per base its models, what they score, what they store and what they took."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergectl.lab import Lab

if TYPE_CHECKING:
    from mergectl.store import Table

# What a model's making saw of the rows that score it: an adaptation unlabelled ones; a search, or a fine-tuning that
# chose on them, even their labels.
SAW = "SELECT run_id, key, value FROM environment WHERE key IN ('saw', 'searched_on') AND value LIKE '%report%'"
PLACES = """SELECT run_id, path FROM artifacts WHERE kind = 'model'
UNION ALL SELECT run_id, ref FROM inputs WHERE role = 'model'"""  # of what a run made, or evaluated
RELATIVE = "SELECT coalesce(run_id, eval_run) AS run_id, task, relative_to_expert FROM leaderboard WHERE split = ?"


@dataclass(frozen=True)
class Row:
    """One model; all scores are shares of one."""

    kind: str  # base, experts (each on its own task), expert, model, merged
    model: str
    recipe: str  # method, refinements and settings in short
    method: str | None
    scores: Mapping[str, float | None]
    relative: Mapping[str, float | None]  # to each task's expert
    average: float | None
    of_expert: float | None
    normalised: float | None  # 0 as the base, 1 as the experts
    run_id: str
    bytes: float | None = None
    seconds: float | None = None

    @property
    def name(self) -> str:
        """A merge's own name, else what kind of model it is."""
        if self.kind == "merged":
            return self.model
        return {"base": "base", "experts": "experts"}.get(self.kind, f"{self.kind} {self.model}")


@dataclass(frozen=True)
class Group:
    """All models of one base; `tasks` are those that any of them has a score on."""

    base: str | None
    tasks: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def heads(self) -> tuple[str, ...]:
        """The tasks' short names, where these tell them apart."""
        return short_names(self.tasks)

    @property
    def references(self) -> list[Row]:
        """Base and experts: all of these in one row, or where there is no such row, one by one."""
        together = any(row.kind == "experts" for row in self.rows)
        return [row for row in self.rows if row.kind in ("base", "experts" if together else "expert")]

    @property
    def merged(self) -> list[Row]:
        """The merges, best first."""
        return [row for row in self.rows if row.kind == "merged"]

    def rank(self, row: Row, column: str) -> int:
        """1 for the best merge in a column (a task, or average, of_expert, normalised), 2 for the second, else 0.

        Figures that look alike with one decimal share their place.
        """
        if row.kind != "merged" or (own := shown(row, column)) is None:
            return 0
        figures = sorted({v for other in self.merged if (v := shown(other, column)) is not None}, reverse=True)
        return {place: rank for rank, place in enumerate(figures[:2], 1)}.get(own, 0) if len(figures) > 1 else 0


@dataclass(frozen=True)
class Board:
    """The leaderboard of one split."""

    split: str
    groups: tuple[Group, ...]


def read_board(lab: Lab, split: str, suite: str | None) -> Board:
    """Ask the store for the leaderboard, and for what each model stores and took."""
    table = lab.store.leaderboard(split=split, suite=suite)
    if not table.rows:
        return Board(split, ())
    cost = {row["run_id"]: row for row in lab.store.query("SELECT run_id, bytes, seconds FROM cost").records()}
    relative: dict[str, dict[str, float | None]] = {}
    for row in lab.store.query(RELATIVE, [split]).records():
        relative.setdefault(row["run_id"], {})[row["task"]] = row["relative_to_expert"]
    notes = lab.store.query(SAW).rows
    saw = {run: value.strip('"') if key == "saw" else "labelled report inputs" for run, key, value in notes}
    places = {str(run): str(path) for run, path in lab.store.query(PLACES).rows}
    return Board(split, tuple(_told_apart(group, places) for group in groups_of(table, cost, relative, saw)))


def scored_splits(lab: Lab, suite: str | None) -> list[str]:
    """The splits, or parts of them, on which some model has a score."""
    found = lab.store.query(
        "SELECT DISTINCT split FROM leaderboard WHERE ? IS NULL OR suite = ? ORDER BY split", [suite, suite]
    )
    return [str(split) for (split,) in found.rows]


def _told_apart(group: Group, places: Mapping[str, str]) -> Group:
    """Models whose folders have one name, as small/sst2 and whole/sst2, are called by the folders above as well."""
    names = Counter(row.name for row in group.rows)
    alike: dict[str, list[Path]] = {}
    for row in group.rows:
        if names[row.name] > 1 and row.run_id in places:
            alike.setdefault(row.name, []).append(Path(places[row.run_id]))
    depths = {name: _depth(paths) for name, paths in alike.items()}
    rows = tuple(
        replace(row, model="/".join(Path(places[row.run_id]).parts[-depths[row.name] :]))
        if row.name in depths and row.run_id in places else row
        for row in group.rows
    )  # fmt: skip
    return replace(group, rows=rows)


def _depth(paths: Sequence[Path]) -> int:
    """How many last parts of some paths it takes to tell them apart."""
    most = max(len(path.parts) for path in paths)
    return next((n for n in range(2, most) if len({path.parts[-n:] for path in paths}) == len(set(paths))), most)


def groups_of(
    table: Table,
    cost: Mapping[str, Mapping[str, Any]],
    relative: Mapping[str, Mapping[str, float | None]],
    saw: Mapping[str, str],
) -> Iterable[Group]:
    """One group per base; a base that was itself fine-tuned stands with its merges only."""
    rows = table.records()
    tasks = table.columns[table.columns.index("settings") + 1 : table.columns.index("average")]
    seen: set[str | None] = {None}
    for base in dict.fromkeys(row["base"] for row in rows):
        own = [row for row in rows if row["base"] == base]
        if {row["run_id"] for row in own} <= seen:
            continue
        seen |= {row["run_id"] for row in own}
        there = tuple(task for task in tasks if any(row[task] is not None for row in own))
        yield Group(base, there, _rows(own, there, cost, relative, saw))


def _rows(
    own: Sequence[dict[str, Any]], tasks: Sequence[str], cost: Any, relative: Any, saw: Mapping[str, str]
) -> tuple[Row, ...]:
    """The records of one base's models; the experts together store and took what they do one by one."""
    made: list[Row] = []
    for row in own:
        took = cost.get(row["run_id"], {}) if row["kind"] in ("merged", "expert") else {}
        shares = relative.get(row["run_id"], {})
        if row["kind"] == "experts":
            parts = [cost.get(r["run_id"], {}) for r in own if r["kind"] == "expert"]
            took = {key: _sum(part.get(key) for part in parts) for key in ("bytes", "seconds")}
            shares = {task: 1.0 for task in tasks if (row[task] or 0) > 0}
        made_here = row["kind"] in ("merged", "expert")
        seen = f" (saw: {saw[row['run_id']]})" if made_here and row["run_id"] in saw else ""
        scores = {task: row[task] for task in tasks}
        made.append(
            Row(row["kind"], str(row["model"]), recipe_of(row) + seen, row["method"], scores,
                {task: shares.get(task) if row[task] is not None else None for task in tasks}, row["average"],
                row["relative"], row["normalised"], row["run_id"] or "", took.get("bytes"), took.get("seconds"))
        )  # fmt: skip
    return tuple(made)


def _sum(values: Iterable[float | None]) -> float | None:
    """The sum, if all are known."""
    known = list(values)
    return None if None in known or not known else sum(value for value in known if value is not None)


def recipe_of(row: Mapping[str, Any]) -> str:
    """Method, refinements and settings in short; for the experts' row what it means."""
    if row["kind"] == "experts":
        return "each on its own task"
    parts = [row["method"], *(part for part in (row["refine"], row["settings"]) if part)]
    text = ": ".join([str(parts[0]), ", ".join(parts[1:])]) if len(parts) > 1 else str(parts[0] or "")
    text = re.sub(r"\d+\.\d{4,}", lambda match: f"{float(match[0]):.3g}", text)
    return re.sub(r",\s*", ", ", re.sub(r'"', "", text).replace("{", "(").replace("}", ")"))


def shown(row: Row, column: str) -> str | None:
    """A figure of a row as it is shown, padded so that texts sort as numbers; None where there is none."""
    value = row.scores[column] if column in row.scores else getattr(row, column)
    return None if value is None else f"{1e6 + round(100 * value, 1):011.1f}"


def percent(value: float | None) -> str | None:
    """A share of one in percent, with one decimal."""
    return None if value is None else f"{100 * value:.1f}"


def short_names(names: Sequence[str]) -> tuple[str, ...]:
    """The last parts of names like suite/task, if these tell them apart; else the names."""
    short = tuple(name.rpartition("/")[2] for name in names)
    return short if len(set(short)) == len(names) else tuple(names)
