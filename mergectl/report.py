"""The verb `report`: the leaderboard, or any question in SQL, as a table, JSON, CSV, Markdown or LaTeX."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergectl import latex
from mergectl.board_text import print_board
from mergectl.errors import UserError
from mergectl.lab import Lab
from mergectl.scoreboard import read_board, scored_splits
from mergectl.terminal import cell, print_table

if TYPE_CHECKING:
    from mergectl.store import Table

FORMATS = ("table", "json", "csv", "md", "latex")


def as_text(table: Table, form: str) -> str:
    """A table as JSON, CSV, LaTeX or Markdown."""
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
    if form == "latex":
        return latex.table(table.columns, table.rows)
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
    if form in ("json", "csv", "md"):
        print(as_text(lab.store.leaderboard(split=split, suite=suite), form))
        return
    board = read_board(lab, split, suite)
    if not board.groups:
        others = [other for other in scored_splits(lab, suite) if other != split]
        hint = (
            f"There are some: --split {' or '.join(others)}" if others else "Make some: mergectl eval MODEL --on TASKS"
        )
        print(f"No scores on '{split}' in {lab.store_name} yet. {hint}")
    elif form == "latex":
        print(latex.board(board))
    else:
        print_board(board)


def choose_format(as_json: bool, as_csv: bool, as_md: bool, as_latex: bool) -> str:
    """The one form asked for; two at once are refused."""
    asked = (as_json, as_csv, as_md, as_latex)
    chosen: Sequence[str] = [name for name, on in zip(FORMATS[1:], asked, strict=True) if on]
    if len(chosen) > 1:
        raise UserError(f"--{chosen[0]} and --{chosen[1]} exclude each other.")
    return chosen[0] if chosen else "table"
