"""The verb `report`: the leaderboard, one run, or any question in SQL, as a table, JSON, CSV or Markdown."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mergectl.errors import UserError
from mergectl.lab import Lab
from mergectl.terminal import cell, print_table

if TYPE_CHECKING:
    from mergectl.store import Table

FORMATS = ("table", "json", "csv", "md")


def as_text(table: Table, form: str) -> str:
    """A table as JSON, CSV or Markdown."""
    if form == "json":
        return json.dumps(
            [dict(zip(table.columns, row, strict=True)) for row in table.rows],
            indent=2,
            default=str,
            ensure_ascii=False,
        )
    if form == "csv":
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerows([table.columns, *table.rows])
        return buffer.getvalue().rstrip("\n")
    rows = [[cell(value).replace("|", "\\|") for value in row] for row in table.rows]
    rule = ["---"] * len(table.columns)
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(table.columns), rule, *rows])


def show(table: Table, form: str, title: str = "", left: int = 1) -> None:
    """Print a table on stdout in the form asked for."""
    if form != "table":
        print(as_text(table, form))
    elif table.rows:
        print_table(title, table.columns, table.rows, left=left)
    else:
        print("Nothing yet.")


def leaderboard(lab: Lab, split: str, suite: str | None, form: str) -> None:
    """Print base, experts and merges, one row each, best mean first within the merges."""
    table = lab.store.leaderboard(split=split, suite=suite)
    if form != "table":
        print(as_text(table, form))
    elif not table.rows:
        print(f"No scores on '{split}' in {lab.store_path} yet. Make some: mergectl eval MODEL --on TASKS")
    else:
        print_leaderboard(table, split)


def print_leaderboard(table: Table, split: str) -> None:
    """The leaderboard for people: per base the base itself, the experts, and the merges, best first; in percent."""
    rows = table.records()
    tasks = table.columns[table.columns.index("settings") + 1 : table.columns.index("average")]
    suites = {task.split("/")[0] for task in tasks}
    heads = [task.split("/")[1] if len(suites) == 1 else task for task in tasks]
    columns = ("model", "method", *heads, "mean", "of expert", "base to expert", "run")
    suite = f" of {suites.pop()}" if len(suites) == 1 else ""
    shown: set[str | None] = {None}
    for base in dict.fromkeys(row["base"] for row in rows):
        own = [row for row in rows if row["base"] == base]
        if {row["run_id"] for row in own} <= shown:  # a base that was itself fine-tuned stands with its merges already
            continue
        shown |= {row["run_id"] for row in own}
        lines = [
            (_who(row), _how(row), *(_percent(row[task]) for task in tasks), _percent(row["average"]),
             _percent(row["relative"]), _percent(row["normalised"]), (row["run_id"] or "")[:8])
            for row in own
        ]  # fmt: skip
        marks = [{"base": "dim", "experts": "cyan", "expert": "dim cyan"}.get(row["kind"], "bold") for row in own]
        over = f", merges of {base}" if base else ""
        print_table(f"Scores{suite} on '{split}' in percent{over}", columns, lines, left=2, marks=marks)


def _who(row: dict[str, Any]) -> str:
    """What stands in the first column: a merge's own name, else what kind of model it is."""
    if row["kind"] == "merged":
        return str(row["model"])
    return {"base": "base", "experts": "experts"}.get(row["kind"], f"{row['kind']} {row['model']}")


def _how(row: dict[str, Any]) -> str:
    """Refinements and settings in short; for the experts' row what it means."""
    if row["kind"] == "experts":
        return "each on its own task"
    parts = [row["method"], *(part for part in (row["refine"], row["settings"]) if part)]
    text = ": ".join([str(parts[0]), ", ".join(parts[1:])]) if len(parts) > 1 else str(parts[0] or "")
    text = re.sub(r"\d+\.\d{4,}", lambda match: f"{float(match[0]):.3g}", text)
    return re.sub(r",\s*", ", ", re.sub(r'"', "", text).replace("{", "(").replace("}", ")"))


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f}"


def one_run(lab: Lab, prefix: str, form: str) -> None:
    """Print everything that the store knows of one run."""
    from mergectl.store import Table

    run = lab.store.find(prefix)
    if run is None:
        question = "select run_id, kind, name from runs"
        raise UserError(f"No run '{prefix}' in {lab.store_path}. See all: mergectl report --sql '{question}'")
    metrics = lab.store.query(
        "SELECT task, split, name, step, value FROM metrics WHERE run_id = ? "
        "ORDER BY step NULLS FIRST, task, split, name",
        [run["run_id"]],
    )
    if form == "json":
        print(json.dumps({**run, "metrics": metrics.records()}, indent=2, default=str, ensure_ascii=False))
    elif form == "csv":
        print(as_text(metrics, form))
    else:
        show(Table(["what", "value"], _facts(run)), form, left=2)
        if metrics.rows:
            print()
            show(metrics, form, left=3)


def _facts(run: dict[str, Any]) -> list[tuple[Any, ...]]:
    """What there is to say of a run beside its metrics, line by line."""
    facts: list[tuple[Any, ...]] = [
        (key, run[key])
        for key in ("run_id", "kind", "name", "status", "seed", "study", "trial", "started_at", "seconds", "error")
        if run.get(key) is not None
    ]
    facts += [(f"config.{key}", json.dumps(value, default=str)) for key, value in run["config"].items()]
    facts += [(row["role"], f"{row['ref']}" + (f" ({row['task']})" if row["task"] else "")) for row in run["inputs"]]
    return facts + [(row["kind"], row["path"]) for row in run["artifacts"]]


def choose_format(as_json: bool, as_csv: bool, as_md: bool) -> str:
    """The one form asked for; two at once are refused."""
    chosen: Sequence[str] = [name for name, on in zip(FORMATS[1:], (as_json, as_csv, as_md), strict=True) if on]
    if len(chosen) > 1:
        raise UserError(f"--{chosen[0]} and --{chosen[1]} exclude each other.")
    return chosen[0] if chosen else "table"
