"""What `report` does to the store itself: check it, make it anew, take runs in from elsewhere, write them out."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mergectl.errors import UserError, WorkError
from mergectl.lab import Lab

# The newest run that wrote to each place is the one whose model should lie there.
NEWEST = """
SELECT path, digest, run_id, host FROM (
    SELECT a.path, a.digest, a.run_id, e.value AS host,
        row_number() OVER (PARTITION BY a.path ORDER BY r.ended_at DESC, r.run_id) AS place
    FROM artifacts a JOIN runs r ON r.run_id = a.run_id AND r.status = 'finished'
    LEFT JOIN environment e ON e.run_id = a.run_id AND e.key = 'host'
    WHERE a.kind = 'model' AND a.digest IS NOT NULL) ranked
WHERE place = 1 ORDER BY path
"""


class Care(NamedTuple):
    """What is to be done to the store: at most one of these."""

    rebuild: bool = False
    check: bool = False
    merge_store: str | None = None
    import_: Path | None = None
    export: Path | None = None

    def asked(self) -> list[str]:
        """The options that were given."""
        return [f"--{name.strip('_').replace('_', '-')}" for name, value in self._asdict().items() if value]


def take_care(lab: Lab, care: Care) -> None:
    """Do what is asked for and say what came of it."""
    asked = care.asked()
    if len(asked) > 1:
        raise UserError(f"{asked[0]} and {asked[1]} exclude each other.")
    store = lab.store
    if care.check:
        check(lab)
    elif care.rebuild:
        _say(lab, {"runs": store.rebuild()}, f"{{runs}} runs restored into {lab.store_name}")
    elif care.export is not None:
        _say(lab, {"runs": store.export(care.export)}, f"{{runs}} runs written to {care.export}")
    else:
        new, held = store.import_(care.import_) if care.import_ is not None else store.merge(care.merge_store or "")
        facts = {"new": new, "known": held}
        _say(lab, facts, f"{{new}} runs taken into {lab.store_name}; {{known}} were there already")


def _say(lab: Lab, facts: dict[str, int], sentence: str) -> None:
    lab.terminal.give(facts, lambda: print(sentence.format(**facts)))


def check(lab: Lab) -> None:
    """Hold database, archive and models on disk against each other; anything wrong ends with exit code 1."""
    problems = lab.store.check()
    models, gone, odd = _models(lab)
    problems += odd
    orphans = _orphans(lab, models)
    (runs,) = lab.store.query("SELECT count(*) FROM runs").rows[0]
    facts = {"runs": runs, "models": len(models), "gone": gone, "orphans": orphans, "problems": problems}
    lines = [f"{path} is gone." for path in gone]
    lines += [f"{path} holds a model that no run of this store made." for path in orphans]
    lines += [f"problem: {sentence}" for sentence in problems]
    summary = f"{runs} runs and {len(models) - len(gone)} models checked in {lab.store_name}"
    lab.terminal.give(facts, lambda: print("\n".join([*lines, f"{summary}: {_count(problems)}."])))
    if problems:
        raise WorkError(f"The store has {_count(problems)}. `mergectl report --rebuild` makes the database anew.")


def _count(problems: Sequence[str]) -> str:
    return {0: "no problem", 1: "1 problem"}.get(len(problems), f"{len(problems)} problems")


def _models(lab: Lab) -> tuple[list[str], list[str], list[str]]:
    """The models that runs of this machine left: all, those gone, and what is wrong with the others."""
    from mergectl.checkpoints import open_checkpoint

    rows = [row for row in lab.store.query(NEWEST).records() if row["host"] in (None, socket.gethostname())]
    gone, odd = [], []
    for row in rows:
        path = Path(row["path"])
        if not path.is_dir():
            gone.append(str(path))
            continue
        try:
            found: Any = open_checkpoint(str(path)).digest
        except UserError as error:
            odd.append(str(error))
            continue
        if found != row["digest"]:
            odd.append(f"{path} does not hold the weights that run {row['run_id']} wrote.")
    return [row["path"] for row in rows], gone, odd


def _orphans(lab: Lab, models: Sequence[str]) -> list[str]:
    """Model folders in the lab's `runs` that no run made or used."""
    used = [ref for (ref,) in lab.store.query("SELECT DISTINCT ref FROM inputs").rows if ref]
    known = {Path(path).resolve() for path in (*models, *used)}
    found = {
        path.parent for name in ("config.json", "adapter_config.json") for path in lab.folder.glob(f"runs/**/{name}")
    }
    hidden = {path for path in found if any(part.startswith(".") for part in path.relative_to(lab.folder).parts)}
    made = {path for path in found - hidden if path.parent.name != "tasks"}  # a task's own head is part of its model
    return sorted(str(path) for path in made if known.isdisjoint([path.resolve(), *path.resolve().parents]))
