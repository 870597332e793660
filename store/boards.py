"""Tables for people: the leaderboard with a column per task, and runs side by side."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from mergectl.store.errors import StoreError
from mergectl.store.query import Table

Ask = Callable[..., Table]
Cell = dict[str, Any]  # one row of the view `leaderboard`

BEFORE = ["base", "kind", "model", "method", "refine", "settings"]
AFTER = ["average", "relative", "normalised", "run_id"]
ORDER = ["base", "experts", "expert", "model", "merged"]


def leaderboard(ask: Ask, split: str, suite: str | None, tasks: Sequence[str] | None) -> Table:
    """Return one row per model and a column per task, grouped by base; see `Store.leaderboard`."""
    cells = ask("SELECT * FROM leaderboard WHERE split = ? ORDER BY evaluated_at, eval_run", [split]).records()
    cells = [cell for cell in cells if suite in (None, cell["suite"]) and (tasks is None or cell["task"] in tasks)]
    columns = list(tasks) if tasks is not None else sorted({cell["task"] for cell in cells})
    groups: dict[str | None, list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[cell["base_digest"]].append(cell)
    rows = [
        row
        for digest in sorted(groups, key=lambda digest: (digest is None, _size(groups[digest])))
        for row in _group(groups[digest], columns, None if tasks is None else list(tasks))
    ]
    return Table([*BEFORE, *columns, *AFTER], rows)


def compare(ask: Ask, names: Sequence[str]) -> Table:
    """Return one row per fact that any of the runs has: its section, its key, and a column per run."""
    if len(set(names)) < 2:
        raise StoreError(f"Comparing needs two different runs or more, got {len(set(names))}.")
    found = ask("SELECT * FROM compare WHERE run_id IN (SELECT unnest(?)) ORDER BY place, key", [list(names)])
    facts: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for fact in found.records():
        facts[fact["section"], fact["key"]][fact["run_id"]] = fact["value"]
    rows = [(*key, *(values.get(name) for name in names)) for key, values in facts.items()]
    return Table(["section", "key", *names], rows)


def _group(cells: list[Cell], columns: list[str], asked: list[str] | None) -> list[tuple[Any, ...]]:
    """Return the rows of all models on one base: the base, the experts together, each expert, the merges."""
    experts = _experts(cells)
    population = asked or sorted(experts) or sorted({cell["task"] for cell in cells})
    base = next((cell["model"] for cell in reversed(cells) if cell["kind"] == "base"), None)
    models: dict[tuple[Any, ...], dict[str, Cell]] = defaultdict(dict)
    for cell in cells:  # oldest first: a newer score stays, but never in place of one with the right expert's head
        scored = models[_identity(cell)]
        held = scored.get(cell["task"])
        if held is None or held["expert_digest"] != experts.get(cell["task"]) or _fits(cell, experts):
            scored[cell["task"]] = cell
    together = {cell["task"]: _as_experts(cell) for cell in cells if cell["expert_score"] and _fits(cell, experts)}
    if len(together) > 1:
        models["experts",] = together
    rows = [(base, *_row(scored, columns, population)) for scored in models.values()]
    average = len(rows[0]) - len(AFTER)
    return sorted(rows, key=lambda row: (ORDER.index(row[1]), -(row[average] or -1e9), str(row[2:6])))


def _row(scored: dict[str, Cell], columns: list[str], population: list[str]) -> tuple[Any, ...]:
    """Return one model's row; its means stand there only where it has a score on every task of the population."""
    newest = list(scored.values())[-1]
    whole = all(task in scored for task in population)
    means = [
        math.fsum(values) / len(values) if whole and (values := _values(scored, population, key)) else None
        for key in ("score", "relative_to_expert", "normalised")
    ]
    scores = [scored[task]["score"] if task in scored else None for task in columns]
    return (*(newest[name] for name in BEFORE[1:]), *scores, *means, newest["run_id"] or newest["eval_run"])


def _values(scored: dict[str, Cell], population: list[str], key: str) -> list[float]:
    return [scored[task][key] for task in population if scored[task][key] is not None]


def _experts(cells: list[Cell]) -> dict[str, str | None]:
    """Return the expert of each task: those of the newest among the merges of most tasks, else the newest known."""
    merges: dict[tuple[Any, ...], dict[str, str | None]] = defaultdict(dict)
    for cell in cells:
        if cell["kind"] == "merged" and cell["expert_digest"]:
            merges[_identity(cell)][cell["task"]] = cell["expert_digest"]
    if merges:
        most = max(len(experts) for experts in merges.values())
        return [experts for experts in merges.values() if len(experts) == most][-1]
    return {cell["task"]: cell["expert_digest"] for cell in cells if cell["expert_digest"]}


def _fits(cell: Cell, experts: dict[str, str | None]) -> bool:
    return cell["task"] in experts and bool(cell["expert_digest"] == experts[cell["task"]])


def _as_experts(cell: Cell) -> Cell:
    """Return the cell of the row that shows each task's own expert."""
    above = None if cell["base_score"] is None or cell["expert_score"] <= cell["base_score"] else 1.0
    blank: Cell = dict.fromkeys((*BEFORE, "run_id", "eval_run"))
    return blank | {
        "kind": "experts", "model": "each task's own", "score": cell["expert_score"], "normalised": above,
        "relative_to_expert": 1.0 if cell["expert_score"] > 0 else None,
    }  # fmt: skip


def _identity(cell: Cell) -> tuple[Any, ...]:
    if cell["kind"] != "merged":
        return cell["kind"], cell["model_digest"]
    return tuple(cell[key] for key in ("kind", "model_digest", "method", "refine", "settings", "run_id"))


def _size(cells: list[Cell]) -> tuple[int, str]:
    """Order the groups: most models first."""
    return -len({_identity(cell) for cell in cells}), str(cells[0]["base_digest"])
