"""A search without models, for tests of workers and kills: a process of it leads, or works for a leader.

python -m tests.toy_search lead|work PLACE SAMPLER TRIALS [PAUSE] [DEADLY]: every evaluation is a line in the file
`evaluated` beside the journal; the candidate whose number is DEADLY kills its worker each time.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergectl.crew import LocalCrew, end_with_parent
from mergectl.pruning import Verdict
from mergectl.search import search
from mergectl.space import Dimension
from mergectl.studies import load_study, open_study
from mergectl.trials import Plan, Trial
from mergectl.workers import Leader, work

X, Y = Dimension("x", "float", 0.0, 1.0, start=0.4), Dimension("y", "float", -2.0, 2.0, start=0.0)
ROOT = Path(__file__).parent.parent


def bowl(settings: Mapping[str, Any]) -> float:
    """One at x = 0.9, y = -1.2, and less everywhere else."""
    return 1.0 - float((settings["x"] - 0.9) ** 2 + (settings.get("y", -1.2) + 1.2) ** 2)


def plan(sampler: str, trials: int) -> Plan:
    return Plan((X, Y), {}, sampler, trials, 0, population=6 if sampler == "cmaes" else None)


class Judge:
    """Notes each evaluation in a file, takes its time, and dies of one candidate if it is to."""

    def __init__(self, folder: Path, pause: float = 0.0, deadly: float | None = None) -> None:
        self.path, self.pause, self.deadly = folder / "evaluated", pause, deadly

    def __call__(self, settings: dict[str, Any]) -> Verdict:
        if self.deadly is not None and settings["x"] == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.pause)
        with self.path.open("a") as file:
            file.write(f"{settings['x']!r} {settings['y']!r}\n")
        return Verdict({"a": bowl(settings), "b": -settings["x"]}, self.pause)


def crew(folder: Path, sampler: str, trials: int, count: int, *more: object, where: str | None = None) -> LocalCrew:
    """Processes that work for a search of this folder."""
    words = ["work", str(where or folder), sampler, str(trials), *map(str, more)]
    return LocalCrew([sys.executable, "-m", "tests.toy_search", *words], count, 1)


def lead(folder: Path, sampler: str, trials: int, pause: float, count: int, where: str | None = None) -> list[Trial]:
    """Lead a search with so many processes beside this one, or alone."""
    what = plan(sampler, trials)
    with open_study(folder, "study", where=where) as study:
        if not count:
            return search(study, what, Judge(folder, pause), lambda trial, verdict: None)
        with crew(folder, sampler, trials, count, pause, where=where) as others:
            return search(study, what, None, lambda trial, verdict: None, others)


def main(role: str, place: str, sampler: str, trials: str, pause: str = "0", last: str = "") -> None:
    if role == "lead":
        lead(Path(place), sampler, int(trials), float(pause), int(last or 0))
        return
    end_with_parent()
    where = place if "://" in place else None
    study = load_study(Path(place), "study", where=where, wait=60)
    folder = Path.cwd() if where else Path(place)
    judge = Judge(folder, float(pause), float(last) if last else None)
    work(study, plan(sampler, int(trials)), judge, Leader(study, 60).goes_on)


if __name__ == "__main__":
    main(*sys.argv[1:])
