r"""Tables for papers: booktabs, the best of a column bold, the second underlined.

>>> print(table(("method", "score"), [("a_b", 0.5)], left=1))
\begin{tabular}{lr}
\toprule
method & score \\
\midrule
a\_b & 0.5 \\
\bottomrule
\end{tabular}
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from mergectl.scoreboard import Board, Group, Row, percent
from mergectl.terminal import cell

SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "\n": " ", "–": "--",
}  # fmt: skip
MARKS = {0: "{}", 1: r"\textbf{{{}}}", 2: r"\underline{{{}}}"}


def escaped(text: str) -> str:
    """Text as LaTeX sets it, whatever stands in it."""
    return "".join(SPECIAL.get(letter, letter) for letter in text)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], left: int | None = None) -> str:
    """Any table; columns that hold numbers only stand to the right, or all but the first `left`."""
    numeric = [
        index >= left
        if left is not None
        else bool(rows) and all(isinstance(row[index], int | float | Decimal | None) for row in rows)
        for index in range(len(columns))
    ]
    lines = [[escaped(cell(value)) for value in row] for row in rows]
    return _tabular("".join("r" if number else "l" for number in numeric), [list(map(escaped, columns))], [lines])


def board(found: Board) -> str:
    """The leaderboard, one table per base: base and experts above, the merges below."""
    return "\n\n".join(_group(group, found.split) for group in found.groups)


def _group(group: Group, split: str) -> str:
    heads = ["Method", *map(escaped, group.heads), "Avg.", "Norm."]
    merges = [*(row for row in group.rows if row.kind == "model"), *reversed(group.merged)]
    parts = [[_line(group, row) for row in rows] for rows in (group.references, merges) if rows]
    suites = ", ".join(dict.fromkeys(task.partition("/")[0] for task in group.tasks))
    told = f"% {suites} on '{split}', in percent" + (f"; merges of {group.base}" if group.base else "")
    body = _tabular("l" + "r" * (len(heads) - 1), [heads], parts)
    return " ".join(told.split()) + "; needs \\usepackage{booktabs}\n" + body


def _line(group: Group, row: Row) -> list[str]:
    """One model: its name, scores, mean and normalised mean, the best marked."""
    names = {"base": "Base", "experts": "Individual experts"}
    columns = (*group.tasks, "average", "normalised")
    values = [percent(row.scores[name] if name in row.scores else getattr(row, name)) for name in columns]
    marked = [
        "--" if value is None else MARKS[group.rank(row, name)].format(value.replace("-", "$-$"))
        for name, value in zip(columns, values, strict=True)
    ]
    return [escaped(names.get(row.kind, row.model)), *marked]


def _tabular(shape: str, heads: list[list[str]], parts: list[list[list[str]]]) -> str:
    lines = [r"\begin{tabular}{" + shape + "}", r"\toprule"]
    for part in (heads, *parts):
        lines += [" & ".join(row) + r" \\" for row in part] + [r"\midrule"]
    return "\n".join([*lines[:-1], r"\bottomrule", r"\end{tabular}"])
