"""What a study holds, as tables on a terminal: scores in percent, sizes in MB."""

from __future__ import annotations

from typing import Any

from mergectl.errors import UserError
from mergectl.study_pictures import scaled, unit
from mergectl.terminal import print_table

LONG = 40  # trials in a history beyond which not all are printed
BOUNDS = ("average", "lowest", "highest")


def show(found: dict[str, Any]) -> None:
    """Print a study's document (see `study_report.document`); what matters most comes last."""
    if not found["states"]:
        raise UserError(f"The study '{found['study']}' holds no trial of a search.")
    states = ", ".join(f"{count} {word}" for word, count in found["states"].items())
    print(f"Study {found['study']}: {states}; searched on '{found['searched_on']}'.")
    if found["searched_on"] == "report":
        print("This search chose by 'report': scores on it are no fair test of what it found.")
    _print_history(found)
    for name, shares in found["importance"].items():
        if shares:
            print_table(f"Importance for {name} ({found['importance_by']})", ("setting", "share"), list(shares.items()))
    first = found["objectives"][0]
    for name, rows_of in found["slices"].items():
        rows = [(row["value"], row["trials"], *(_shown(first, row[key]) for key in BOUNDS)) for row in rows_of]
        if rows:
            print_table(f"Values of {name} ({unit(first)})", ("value", "trials", *BOUNDS), rows)
    _print_front(found)
    refused = [(row["candidate"], row["why"], _words(row["settings"])) for row in found["refused"]]
    if refused:
        print_table("Refused", ("trial", "why", "settings"), refused, left=3)


def _print_history(found: dict[str, Any]) -> None:
    """All finished trials; of many those that were the best when they came."""
    objectives, best, history = found["objectives"], f"best {found['objectives'][0]}", found["history"]
    title = "History"
    if len(history) > LONG:
        title = f"History: those of {len(history)} trials that were the best so far (all of them: --csv)"
        before = [None, *(row[best] for row in history)]
        history = [row for row, was in zip(history, before, strict=False) if row[best] != was]
    rows = [
        (row["candidate"], _words(row["settings"]), *(_shown(name, row[name]) for name in objectives),
         _shown(objectives[0], row[best]), row["seconds"])
        for row in history
    ]  # fmt: skip
    heads = ("trial", "settings", *map(unit, objectives), f"best {objectives[0]} so far", "seconds")
    print_table(title, heads, rows, left=2)


def _print_front(found: dict[str, Any]) -> None:
    """The best trial, or the Pareto front, with the scores of each task."""
    objectives = found["objectives"]
    chosen = [row for row in found["history"] if row["candidate"] in found["front"]]
    if not chosen:
        return
    tasks = [task for task in chosen[0]["scores"] if task not in objectives]
    rows = [
        (row["candidate"], _words(row["settings"]), *(_shown(name, row[name]) for name in objectives),
         *(_shown(task, row["scores"].get(task)) for task in tasks))
        for row in chosen
    ]  # fmt: skip
    title = "Best" if len(objectives) == 1 else "Pareto front"
    heads = ("trial", "settings", *map(unit, objectives), *(task.rpartition("/")[2] for task in tasks))
    print_table(title, heads, rows, left=2)


def _shown(objective: str, value: float | None) -> str | None:
    """An objective in the unit it is shown in."""
    return None if value is None else f"{scaled(objective, value):.2f}"


def _words(settings: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in settings.items())
