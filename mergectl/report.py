"""The verb `report`: the leaderboard, one run, or any question in SQL, as a table, JSON, CSV or Markdown."""

from __future__ import annotations

import csv
import io
import json
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
    """The leaderboard for people: scores in percent, base and experts set apart from merges."""
    hidden = ("run_id", "digest", "suite", "model_digest")
    keep = [i for i, column in enumerate(table.columns) if column not in hidden]
    columns = [table.columns[i] for i in keep]
    kinds = [row[table.columns.index("kind")] for row in table.rows] if "kind" in table.columns else []
    rows = [[_shown(table.columns[i], row[i]) for i in keep] for row in table.rows]
    marks = [{"base": "dim", "expert": "cyan"}.get(kind, "") for kind in kinds]
    words = sum(1 for row in rows[:1] for value in row if isinstance(value, str) and not _is_number(value))
    print_table(f"Scores on '{split}', in percent", columns, rows, left=max(words, 1), marks=marks)


def _shown(column: str, value: Any) -> Any:
    return f"{100 * value:.1f}" if isinstance(value, float) else value


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).replace("-", "", 1).isdigit()


def one_run(lab: Lab, prefix: str, form: str) -> None:
    """Print everything that the store knows of one run."""
    run = lab.store.find(prefix)
    if run is None:
        raise UserError(
            f"No run '{prefix}' in {lab.store_path}. See all: mergectl report --sql 'select run_id, kind, name from runs'"
        )
    if form == "json":
        print(json.dumps(run, indent=2, default=str, ensure_ascii=False))
        return
    facts = [
        (key, run[key])
        for key in ("run_id", "kind", "name", "status", "seed", "started_at", "seconds", "error")
        if run.get(key) is not None
    ]
    facts += [(f"config.{key}", json.dumps(value, default=str)) for key, value in run["config"].items()]
    facts += [(row["role"], f"{row['ref']}" + (f" ({row['task']})" if row["task"] else "")) for row in run["inputs"]]
    facts += [(row["kind"], row["path"]) for row in run["artifacts"]]
    print_table("", ("what", "value"), facts, left=2)
    metrics = lab.store.query(
        "SELECT task, split, name, step, value FROM metrics WHERE run_id = ? ORDER BY step NULLS FIRST, task, split, name",
        [run["run_id"]],
    )
    show(metrics, form, left=3)


def choose_format(as_json: bool, as_csv: bool, as_md: bool) -> str:
    """The one form asked for; two at once are refused."""
    chosen: Sequence[str] = [name for name, on in zip(FORMATS[1:], (as_json, as_csv, as_md), strict=True) if on]
    if len(chosen) > 1:
        raise UserError(f"--{chosen[0]} and --{chosen[1]} exclude each other.")
    return chosen[0] if chosen else "table"
