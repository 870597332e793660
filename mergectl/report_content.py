"""Everything a report shows, read from the lab once, so that page and pictures say the same."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergectl import pictures, study_pictures
from mergectl.charts import Chart, Graph, HeatMap, Plot
from mergectl.lab import Lab
from mergectl.run_report import find
from mergectl.scoreboard import Board, Group, read_board
from mergectl.study_report import documents

if TYPE_CHECKING:
    from mergectl.store import Table

STUDIES = 12  # the newest
RUNS = 300  # with all details
COMPARED = 4
COUNTS = "SELECT kind, status, count(*) AS runs FROM runs GROUP BY kind, status ORDER BY kind, status"
NAMES = "SELECT study FROM runs WHERE study IS NOT NULL GROUP BY study ORDER BY max(started_at) DESC"
FAILED = (
    "SELECT run_id, kind, name, status, started_at, error FROM runs WHERE status NOT IN ('finished', 'started') "
    "AND kind <> 'trial' ORDER BY started_at DESC LIMIT 50"
)
DETAILS = "SELECT * FROM runs WHERE kind <> 'trial' ORDER BY started_at DESC, run_id"
PARTS = {
    "inputs": "SELECT run_id, role, task, ref, digest FROM inputs ORDER BY role, task",
    "artifacts": "SELECT run_id, kind, path, digest, bytes FROM artifacts ORDER BY kind, path",
    "environment": "SELECT run_id, key, value FROM environment ORDER BY key",
}


@dataclass(frozen=True)
class Content:
    """What the sections hold; `studies` are documents with their pictures."""

    split: str
    board: Board
    counts: list[dict[str, Any]]
    groups: list[tuple[Group, HeatMap | None, list[Chart]]]
    studies: list[tuple[dict[str, Any], list[Chart]]]
    more_studies: int
    learned: list[HeatMap]
    curves: list[Plot]
    lineage: Graph | None
    compared: Table | None
    compared_names: list[str]
    failed: list[dict[str, Any]]
    runs: list[dict[str, Any]]
    more_runs: int
    shared: dict[str, str]  # facts about versions and machine that are the same in all runs


def gather(
    lab: Lab, split: str, suite: str | None, study: str | None, storage: str | None, compare: Sequence[str]
) -> Content:
    """Read it all."""
    board = read_board(lab, split, suite)
    known = [study] if study else [row[0] for row in lab.store.query(NAMES).rows]
    found = documents(lab, known[:STUDIES], storage, must=study is not None)
    runs = lab.store.query(DETAILS).records()
    shown, shared = _details(lab, runs[:RUNS])
    chosen = [find(lab, name)["run_id"] for name in compare] or _usual(board)
    table = lab.store.compare(*chosen) if len(set(chosen)) > 1 else None
    names = {run["run_id"]: run["name"] for run in runs}
    heads = table.columns[2:] if table is not None else []
    return Content(
        split=split, board=board, counts=lab.store.query(COUNTS).records(),
        groups=[(group, pictures.heat_map(group), _group_charts(group)) for group in board.groups],
        studies=[(document, study_pictures.pictures(document)) for document in found],
        more_studies=max(0, len(known) - STUDIES), learned=pictures.learned_maps(lab), curves=pictures.curves(lab),
        lineage=pictures.lineage(lab), compared=table,
        compared_names=[f"{names[head]} {head[:8]}" if names.get(head) else head for head in heads],
        failed=lab.store.query(FAILED).records(), runs=shown, more_runs=max(0, len(runs) - RUNS), shared=shared,
    )  # fmt: skip


def _group_charts(group: Group) -> list[Chart]:
    made = [pictures.against_cost(group, what) for what in ("bytes", "seconds")]
    return [chart for chart in made if chart is not None]


def _usual(board: Board) -> list[str]:
    """The best merges of the first base, one per method."""
    best: dict[str, str] = {}
    for row in board.groups[0].merged if board.groups else ():
        best.setdefault(row.method or "", row.run_id)
    return [run_id for run_id in best.values() if run_id][:COMPARED]


def _details(lab: Lab, runs: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The runs with their parts; what all of their environments say alike is taken out and told once."""
    parts = {name: _by_run(lab.store.query(sql).records()) for name, sql in PARTS.items()}
    surroundings = {
        run["run_id"]: {row["key"]: row["value"] for row in parts["environment"].get(run["run_id"], ())} for run in runs
    }
    first, *others = surroundings.values() or ({},)
    shared = {key: text for key, text in first.items() if all(other.get(key) == text for other in others)}
    whole = [
        {
            **run,
            "config": json.dumps(json.loads(run["config"] or "{}"), indent=2, ensure_ascii=False),
            "command": " ".join(json.loads(run["command"] or "[]")),
            "inputs": parts["inputs"].get(run["run_id"], []),
            "artifacts": parts["artifacts"].get(run["run_id"], []),
            "environment": {k: v for k, v in surroundings[run["run_id"]].items() if k not in shared},
        }
        for run in runs
    ]
    return whole, shared


def _by_run(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["run_id"], []).append(row)
    return found
