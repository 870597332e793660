"""What a person sees of a search while it goes on: a live view on a terminal, plain lines anywhere else."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mergectl.trials import Plan, Trial, best_of

if TYPE_CHECKING:
    from mergectl.pruning import Verdict
    from mergectl.terminal import Terminal

EVERY = 10.0  # seconds between plain lines


class Board:
    """Counts the finished trials of a search and keeps the best; `lines` says where it stands."""

    def __init__(self, title: str, plan: Plan, workers: int) -> None:
        self.title, self.plan, self.workers = title, plan, workers
        self.began = time.monotonic()
        self.done = self.fresh = self.refused = self.pruned = 0
        self.lost = 0  # trials of workers that were killed
        self.rows = self.total = 0  # evaluated, and what full evaluations would have taken
        self.best: Trial | None = None
        self.scores: dict[str, float] = {}

    def see(self, trial: Trial, verdict: Verdict | None) -> None:
        """Take in a finished trial."""
        self.done += 1
        self.fresh += not trial.again
        self.refused += trial.refused is not None
        self.pruned += trial.pruned
        if verdict is not None:
            self.rows, self.total = self.rows + verdict.rows, self.total + verdict.total
        chosen = best_of([t for t in (self.best, trial) if t is not None], self.plan.objectives)
        if verdict is not None and chosen is trial:
            self.best, self.scores = trial, dict(verdict.scores)

    def lose(self, count: int) -> None:
        """Take in how many trials were lost with their workers by now."""
        self.lost = count

    def rate(self) -> float:
        """Trials of this session per minute."""
        return 60 * self.fresh / max(time.monotonic() - self.began, 1e-9)

    def eta(self) -> str:
        """How long the rest will take, at the rate so far."""
        if not self.fresh:
            return "–"
        seconds = 60 * (self.plan.trials - self.done) / self.rate()
        if seconds < 90:
            return f"{seconds:.0f} s"
        return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

    def stopped(self) -> str:
        """How many candidates were stopped early, and what that saved."""
        return f"{self.pruned} ({self.rows / max(self.total, 1):.0%} of the rows evaluated)" if self.pruned else ""

    def lines(self) -> dict[str, str]:
        """What there is to say, by heading."""
        workers = f"   {self.workers} workers" if self.workers > 1 else ""
        found = {
            "trials": f"{self.done} of {self.plan.trials}   {self.rate():.1f} per minute   {self.eta()} left{workers}",
            "refused": str(self.refused) if self.refused else "",
            "lost": f"{self.lost} with killed workers, queued again" if self.lost else "",
            "stopped early": self.stopped(),
        }
        if self.best is not None:
            found["best mean"] = f"{100 * self.best.score:.2f} % (trial {self.best.number})"
            found["per task"] = "   ".join(f"{task} {100 * score:.2f}" for task, score in self.scores.items())
            found["settings"] = ", ".join(f"{name}={short(value)}" for name, value in self.best.settings.items())
        return {head: text for head, text in found.items() if text}

    def line(self) -> str:
        """All in one line."""
        best = f"best {100 * self.best.score:.2f} % (trial {self.best.number}), " if self.best is not None else ""
        refused = f", {self.refused} refused" if self.refused else ""
        lost = f", {self.lost} lost and queued again" if self.lost else ""
        pruned = f", stopped early {self.stopped()}" if self.pruned else ""
        left = f", {self.eta()} left" if self.done < self.plan.trials else ""
        rate = f"{self.rate():.1f} per minute{left}"
        return f"{self.done}/{self.plan.trials}: {best}{rate}{refused}{lost}{pruned}"


def short(value: Any) -> str:
    """A setting's value as a line shows it."""
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {short(part)}" for key, part in value.items()) + ")"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class _Lines(Board):
    """A board that prints a line now and then."""

    def __init__(self, terminal: Terminal, *facts: Any) -> None:
        super().__init__(*facts)
        self._terminal, self._said = terminal, time.monotonic()

    def see(self, trial: Trial, verdict: Verdict | None) -> None:
        """Take in a finished trial, and say so if it is time."""
        super().see(trial, verdict)
        if self.done < self.plan.trials and time.monotonic() - self._said > EVERY:  # the last line is said in any case
            self._said = time.monotonic()
            self._terminal.say(self.line())


@contextlib.contextmanager
def board(terminal: Terminal, title: str, plan: Plan, workers: int) -> Iterator[Board]:
    """Show a search while it goes on."""
    if terminal.quiet or not sys.stderr.isatty():
        terminal.say(title)
        yield _Lines(terminal, title, plan, workers)
        return
    from rich.console import Console
    from rich.live import Live

    shown = Board(title, plan, workers)
    with Live(get_renderable=lambda: _drawn(shown), console=Console(stderr=True), transient=True, refresh_per_second=2):
        yield shown


def _drawn(shown: Board) -> Any:
    from rich.markup import escape
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    table.add_row(escape(shown.title), ProgressBar(total=shown.plan.trials, completed=shown.done, width=40))
    for head, text in shown.lines().items():
        table.add_row(head, escape(text))
    return table
