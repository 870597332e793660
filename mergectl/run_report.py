"""`report RUN` and `report --compare`: all that the store knows of one run, and where several differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergectl.errors import UserError
from mergectl.lab import Lab
from mergectl.report import as_text, show
from mergectl.scoreboard import percent, recipe_of
from mergectl.terminal import bar, print_table, sparkline, width

if TYPE_CHECKING:
    from mergectl.store import Table

METRICS = (
    "SELECT task, split, name, step, value FROM metrics WHERE run_id = ? ORDER BY step NULLS FIRST, task, split, name"
)
SCORES = (
    "SELECT task, split, score, relative_to_expert, normalised FROM leaderboard WHERE run_id = ? ORDER BY split, task"
)
PARENTS = "SELECT role, task, ref, digest, parent FROM lineage WHERE run_id = ? AND depth = 1 ORDER BY role, task"
PLAIN = ("kind", "name", "status", "seed", "study", "trial", "attempt", "started_at", "seconds", "error")
ROOMY = 100  # characters that a table of nine columns needs
MANY = 8  # metrics with more names than this stand one below the other


def find(lab: Lab, prefix: str) -> dict[str, Any]:
    """The run with this name or beginning of an id; refuses what is not there."""
    run = lab.store.find(prefix)
    if run is None:
        question = "select run_id, kind, name from runs"
        raise UserError(f"No run '{prefix}' in {lab.store_name}. See all: mergectl report --sql '{question}'")
    return run


def one_run(lab: Lab, prefix: str, form: str) -> None:
    """Print everything that the store knows of one run."""
    from mergectl.store import Table

    run = find(lab, prefix)
    metrics = lab.store.query(METRICS, [run["run_id"]])
    if form == "json":
        print(json.dumps({**run, "metrics": metrics.records()}, indent=2, default=str, ensure_ascii=False))
    elif form in ("csv", "latex"):
        print(as_text(metrics, form))
    elif form == "md":
        print(as_text(Table(["what", "value"], _facts(lab, run)), form))
        if metrics.rows:
            print("\n" + as_text(metrics, form))
    else:
        print_table("", ("what", "value"), _facts(lab, run), left=2)
        _print_parents(lab, run["run_id"])
        _print_scores(lab, run["run_id"])
        _print_metrics(metrics)


def _facts(lab: Lab, run: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What there is to say of a run beside its inputs and metrics, line by line."""
    facts: list[tuple[str, Any]] = [("run_id", run["run_id"])]
    facts += [(key, run[key]) for key in PLAIN if run.get(key) is not None]
    recipe = lab.store.query("SELECT method, refine, shown AS settings FROM recipes WHERE run_id = ?", [run["run_id"]])
    facts += [("recipe", recipe_of({"kind": run["kind"], **row})) for row in recipe.records()]
    if run.get("command"):
        facts.append(("command", " ".join(run["command"])))
    facts += [
        (f"config.{key}", json.dumps(value, default=str))
        for key, value in run["config"].items()
        if key != "inputs"  # they stand below, with what made them
    ]
    environment = run["environment"]
    versions = [f"{key.partition('.')[2]} {environment[key]}" for key in environment if key.startswith("version.")]
    facts += [(key, environment[key]) for key in ("host", "device", "platform") if key in environment]
    if versions:
        facts.append(("versions", ", ".join(versions)))
    return facts + [(f"made {row['kind']}", f"{row['path']}{_size(row['bytes'])}") for row in run["artifacts"]]


def _size(count: float | None) -> str:
    return "" if count is None else f" ({count / 1e6:,.1f} MB)"


def _print_parents(lab: Lab, run_id: str) -> None:
    found = lab.store.query(PARENTS, [run_id])
    rows = [(role, task, ref, (digest or "")[:12], parent) for role, task, ref, digest, parent in found.rows]
    if rows:
        print_table("Made from", ("role", "task", "model", "digest", "run"), rows, left=5)


def _print_scores(lab: Lab, run_id: str) -> None:
    """What the model that this run made scores, beside its parents."""
    rows = [
        (row["task"], row["split"], percent(row["score"]), percent(row["relative_to_expert"]),
         percent(row["normalised"]), bar(row["normalised"]))
        for row in lab.store.query(SCORES, [run_id]).records()
    ]  # fmt: skip
    if rows:
        heads = ("task", "split", "score", "of expert", "normalised", "")
        print_table("Scores of what it made, in percent", heads, rows, left=2)


def _print_metrics(metrics: Table) -> None:
    """Single numbers in one table, numbers per step as curves, what was learned per weight in short."""
    from mergectl.learned import is_learned

    rows = metrics.records()
    single = [row for row in rows if row["step"] is None and not is_learned(row["name"])]
    names = list(dict.fromkeys(row["name"] for row in single))
    if 0 < len(names) <= MANY:
        places = list(dict.fromkeys((row["task"], row["split"]) for row in single))
        found = {(row["task"], row["split"], row["name"]): row["value"] for row in single}
        lines: list[tuple[Any, ...]] = [(*place, *(found.get((*place, name)) for name in names)) for place in places]
        print_table("Measured", ("task", "split", *names), lines, left=2)
    elif names:
        table = [(row["task"], row["split"], row["name"], row["value"]) for row in single]
        print_table("Measured", ("task", "split", "name", "value"), table, left=3)
    _print_curves([row for row in rows if row["step"] is not None and not is_learned(row["name"])])
    _print_learned(rows)


def _print_curves(rows: Sequence[Mapping[str, Any]]) -> None:
    curves: dict[tuple[str, ...], list[tuple[int, float]]] = {}
    for row in rows:
        if row["value"] is not None:
            key = (row["name"], row["task"] or "", row["split"] or "")
            curves.setdefault(key, []).append((row["step"], row["value"]))
    lines: list[tuple[Any, ...]] = []
    for place, points in curves.items():
        values = [value for _, value in sorted(points)]
        steps = sorted(step for step, _ in points)
        reach = f"{steps[0]}–{steps[-1]}"
        line = (*place, sparkline(values, 24), values[0], values[-1], min(values), max(values), reach)
        lines.append(line)
    if lines:
        heads = ("metric", "task", "split", "curve", "first", "last", "lowest", "highest", "steps")
        shown = range(len(heads)) if width() >= ROOMY else (0, 1, 3, 4, 5)
        print_table(
            "Curves", [heads[n] for n in shown], [[line[n] for n in shown] for line in lines],
            left=4 if width() >= ROOMY else 3,
        )  # fmt: skip


def _print_learned(rows: Sequence[Mapping[str, Any]]) -> None:
    """What was learned per weight, task by task: over all weights in their order, from input to output."""
    from mergectl.learned import learned_of

    for found in learned_of(rows):
        lines: list[tuple[Any, ...]] = []
        for place, task in enumerate(found.tasks):
            values = [value for row in found.values if (value := row[place]) is not None]
            lines.append((task, sparkline(values), sum(values) / len(values), min(values), max(values)))
        heads = ("task", found.kind, "mean", "lowest", "highest")
        print_table(f"Learned {found.kind}, from the first weight to the last", heads, lines, left=2)


def compare_runs(lab: Lab, names: Sequence[str], form: str) -> None:
    """Print two or more runs side by side: at a terminal what differs, in other forms every fact."""
    from mergectl.store import Table

    runs = [find(lab, name) for name in names]
    table = lab.store.compare(*(run["run_id"] for run in runs))
    if form != "table":
        show(table, form)
        return
    heads = {run["run_id"]: f"{run['name']} {run['run_id'][:8]}" if run["name"] else run["run_id"] for run in runs}
    differing = [row for row in table.rows if len(set(row[2:])) > 1]
    alike = len(table.rows) - len(differing)
    shown = Table([*table.columns[:2], *(heads[name] for name in table.columns[2:])], differing)
    print_table("What differs", shown.columns, shown.rows, left=len(shown.columns))
    if alike:
        print(f"{alike} more facts are the same in all of them; see them with --md.")
