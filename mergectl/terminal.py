"""What a person sees while work goes on: sentences and a progress bar on stderr, results on stdout."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Progress = Callable[[int, int, str], None]


class Terminal:
    """Talks to a person on stderr (unless quiet) and prints results on stdout."""

    def __init__(self, *, quiet: bool = False, as_json: bool = False) -> None:
        self.quiet, self.as_json = quiet, as_json

    def say(self, text: str) -> None:
        """One line on stderr; silent with --quiet."""
        if not self.quiet:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    def warn(self, text: str) -> None:
        """A warning on stderr, also with --quiet."""
        sys.stderr.write(f"warning: {text}\n")

    def give(self, document: Any, show: Callable[[], None]) -> None:
        """The result: one JSON document on stdout with --json, else whatever `show` prints."""
        if self.as_json:
            sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False, default=str) + "\n")
        elif not self.quiet:
            show()

    @contextlib.contextmanager
    def progress(self, title: str) -> Iterator[Progress]:
        """Yield `step(done, total, text)`; draws a bar with rate and ETA when stderr is a terminal."""
        if self.quiet or not sys.stderr.isatty():
            self.say(title)
            yield lambda done, total, text: None
            return
        with _bar() as bar:
            row = bar.add_task(title, total=None, text="", rate="")

            def step(done: int, total: int, text: str) -> None:
                speed = bar.tasks[row].speed
                rate = f"{speed:.1f}/s" if speed else ""
                bar.update(row, completed=done, total=total, text=text, rate=rate)

            yield step


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(compact=True),
        # What is left of the line; cut off rather than squeezing the numbers.
        TextColumn("[dim]{task.fields[text]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
        console=Console(stderr=True),
        transient=True,
        expand=True,
    )


def width() -> int:
    """How many characters a line has; plenty where nobody looks at a terminal."""
    from rich.console import Console

    return Console().width if sys.stdout.isatty() else 160


def bar(share: float | None, length: int = 10) -> str:
    """A share of one as a bar on dots; what is beyond either end is cut off."""
    if share is None:
        return ""
    eighths = round(8 * length * min(max(share, 0.0), 1.0))
    return ("█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()).ljust(length, "·")


def sparkline(values: Sequence[float], length: int = 40) -> str:
    """Numbers in their order as a line of small bars, the lowest to the highest."""
    if len(values) > length:
        values = [values[round(n * (len(values) - 1) / (length - 1))] for n in range(length)]
    low, high = min(values), max(values)
    span = high - low or 1.0
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (value - low) / span)] for value in values)


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, left: int = 1, marks: Sequence[str] = ()
) -> None:
    """Print a Rich table on stdout; the first `left` columns are words, the others numbers.

    `marks` styles whole rows ("bold", "dim", ...), so that groups of rows read apart.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title) or None, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(
            escape(column), justify="left" if index < left else "right", overflow="fold", no_wrap=index == 0
        )
    for index, row in enumerate(rows):
        table.add_row(*(escape(cell(value)) for value in row), style=marks[index] if index < len(marks) else None)
    Console(width=width()).print(table)


def cell(value: Any) -> str:
    """A value as a table shows it: numbers short, nothing as a dash."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return (
            f"{value:.4g}"
            if abs(value) >= 1000 or (value and abs(value) < 0.001)
            else f"{value:.3f}".rstrip("0").rstrip(".")
        )
    return str(value)
