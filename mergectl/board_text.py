"""The leaderboard for people at a terminal: one table per base, in two forms, wide and narrow."""

from __future__ import annotations

from collections.abc import Sequence

from mergectl.scoreboard import Board, Group, Row, percent
from mergectl.terminal import bar, cell, print_table, width

STYLES = {"base": "dim", "experts": "cyan", "expert": "dim cyan"}
LONGEST_NAME = 24  # in the narrow form
LONGEST_HEAD = 8


def print_board(board: Board) -> None:
    """Per base the base itself, the experts, and the merges, best first; in percent."""
    for group in board.groups:
        if natural_width(group) <= width():
            _wide(board, group)
        else:
            _narrow(board, group)


def title_of(board: Board, group: Group) -> str:
    """What a table shows: the suite if there is but one, the split, the base."""
    suites = {task.partition("/")[0] for task in group.tasks}
    suite = f" of {suites.pop()}" if len(suites) == 1 else ""
    return f"Scores{suite} on '{board.split}' in percent" + (f", merges of {group.base}" if group.base else "")


def natural_width(group: Group) -> int:
    """How wide the wide form is when its settings take a line or two of 24 characters."""
    names = max(len(row.name) for row in group.rows)
    recipes = min(24, max(len(row.recipe) for row in group.rows))
    return names + recipes + sum(max(5, len(head)) + 3 for head in group.heads) + 7 + 12 + 10 + 13 + 11 + 8


def _wide(board: Board, group: Group) -> None:
    judged = any(row.of_expert is not None or row.normalised is not None for row in group.rows)
    columns = ("model", "method", *group.heads, "mean", *(("of expert", "normalised", "") if judged else ()), "run")
    lines = [
        (row.name, row.recipe, *(percent(row.scores[task]) for task in group.tasks), percent(row.average),
         *((percent(row.of_expert), percent(row.normalised), bar(row.normalised)) if judged else ()), row.run_id[:8])
        for row in group.rows
    ]  # fmt: skip
    print_table(title_of(board, group), columns, lines, left=2, marks=[_style(row) for row in group.rows])


def _style(row: Row) -> str:
    return STYLES.get(row.kind, "bold")


def _narrow(board: Board, group: Group) -> None:
    """Settings under the names; as many tasks at a time as fit; the experts only together."""
    rows = [*group.references, *(row for row in group.rows if row.kind in ("model", "merged"))]
    names = min(LONGEST_NAME, max(len(row.name) for row in rows))
    heads = [_cut(head, LONGEST_HEAD) for head in group.heads]
    blocks = _blocks([max(5, len(head)) + 1 for head in heads], width() - names - 20)
    for number, (start, end) in enumerate(blocks):
        first = number == 0
        columns = [*heads[start:end], *(["mean", "norm."] if first else [])]
        lines = [
            [cell(percent(row.scores[task])) for task in group.tasks[start:end]]
            + ([cell(percent(row.average)), cell(percent(row.normalised))] if first else [])
            for row in rows
        ]
        _print(title_of(board, group) if first else "more tasks", columns, names, rows, lines, full=first)


def _print(
    title: str, columns: Sequence[str], names: int, rows: Sequence[Row], lines: Sequence[Sequence[str]], *, full: bool
) -> None:
    """Names, numbers and where these are `full` a bar; under a name, on its own lines, what the model was made by."""
    import textwrap

    from rich.console import Console
    from rich.text import Text

    console = Console(width=width(), highlight=False)
    wide = [max(5, len(column)) for column in columns]
    console.print(Text(title, "italic"))
    console.print(Text(_line("model", names, columns, wide), "bold"))
    console.print("─" * len(_line("", names, columns, wide)))
    for row, values in zip(rows, lines, strict=True):
        share = f"  {bar(row.normalised, 6)}" if full else ""
        console.print(Text(_line(_cut(row.name, names), names, values, wide) + share, _style(row)))
        if full and row.recipe not in ("", row.name):
            told = textwrap.wrap(row.recipe, width() - 4, initial_indent="    ", subsequent_indent="    ")
            console.print(Text("\n".join(told), "dim"))
    console.print()


def _line(name: str, names: int, values: Sequence[str], wide: Sequence[int]) -> str:
    return f"{name:<{names}}" + "".join(f" {value:>{room}}" for value, room in zip(values, wide, strict=True))


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _blocks(widths: Sequence[int], room: int) -> list[tuple[int, int]]:
    """First and last column of each table: as many as there is room for, one at least."""
    found, start, used = [], 0, 0
    for place, wide in enumerate(widths):
        if used + wide > room and place > start:
            found.append((start, place))
            start, used = place, 0
        used += wide
    return [*found, (start, len(widths))]
