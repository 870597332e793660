"""Scores as people see them: per task, beside the expert's and the base's where the store knows them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergectl.checkpoints import open_checkpoint
from mergectl.families import open_family
from mergectl.lab import Lab
from mergectl.terminal import print_table
from mergectl.verbs import evaluate_model, evaluate_references

if TYPE_CHECKING:
    from mergectl.tuning import SearchJob

COLUMNS = ("task", "score", "of expert", "base to expert", "examples", "seconds")


def score(
    lab: Lab, model: str, words: Sequence[str], heads: Sequence[tuple[str | None, str]], *, references: bool, **how: Any
) -> None:
    """Evaluate a model and print its scores, normalised where experts and base are scored too."""
    if references:
        _score_references(lab, model, words, **how)
    result = evaluate_model(lab, model, words, heads=heads, **how)
    show_run(lab, result["run"])


def _score_references(lab: Lab, model: str, words: Sequence[str], **how: Any) -> None:
    """Score the experts and the base that a merged folder names as its inputs."""
    inputs = open_checkpoint(model, lab.find_run).meta.get("inputs", [])
    experts = [(row["task"], row["ref"]) for row in inputs if row["role"] == "expert"]
    base = next((row["ref"] for row in inputs if row["role"] == "base"), None)
    if experts:
        evaluate_references(lab, open_family(base, experts, lab.find_run), words, **how)


def show_run(lab: Lab, run_id: str) -> None:
    """Print the scores of an evaluation run from the store, with what they mean beside expert and base."""
    table = lab.store.query(
        "SELECT l.task, l.score, l.relative_to_expert, l.normalised, e.value AS examples, s.value AS seconds "
        "FROM leaderboard l JOIN metrics e ON e.run_id = l.eval_run AND e.task = l.task AND e.name = 'examples' "
        "JOIN metrics s ON s.run_id = l.eval_run AND s.task = l.task AND s.name = 'seconds' "
        "WHERE l.eval_run = ? QUALIFY row_number() OVER (PARTITION BY l.task ORDER BY l.normalised IS NULL, "
        "l.relative_to_expert IS NULL, l.kind, l.run_id) = 1 ORDER BY l.task",  # one model may have several origins
        [run_id],
    )
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    mean = sum(row["score"] for row in rows) / len(rows)
    document = {"run": run_id, "mean": mean, "tasks": rows}
    lab.terminal.give(document, lambda: _print(rows, mean, run_id))


def _print(rows: Sequence[dict[str, Any]], mean: float, run_id: str) -> None:
    shown: list[tuple[Any, ...]] = [
        (
            r["task"],
            _percent(r["score"]),
            _percent(r["relative_to_expert"]),
            _percent(r["normalised"]),
            int(r["examples"]),
            r["seconds"],
        )
        for r in rows
    ]
    shown.append(("mean", _percent(mean), _mean(rows, "relative_to_expert"), _mean(rows, "normalised"), None, None))
    print_table(f"Scores in percent (run {run_id})", COLUMNS, shown)
    if any(r["relative_to_expert"] is None for r in rows):
        print("A dash: the expert or the base is not scored here yet (--references), or the expert is no better.")


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f}"


def _mean(rows: Sequence[dict[str, Any]], key: str) -> str | None:
    values = [r[key] for r in rows]
    return None if any(v is None for v in values) else _percent(sum(values) / len(values))


def search_and_show(lab: Lab, job: SearchJob, out: Path, *, force: bool) -> None:
    """Search, then print the best settings and their score on `report`."""
    from mergectl.tuning import search_settings

    result = search_settings(lab, job, out, force=force)
    best, found = result["best"], result["report"]
    document = {
        "run": result["run"], "study": result["study"], "out": result["out"], "settings": best.settings,
        "trial": best.number, job.split: best.score, "report": found.mean, "tasks": found.scores,
    }  # fmt: skip

    def show() -> None:
        settings = ", ".join(f"{name}={value}" for name, value in best.settings.items())
        rows = [(task, _percent(score)) for task, score in found.scores.items()]
        print_table("Best candidate in percent", ("task", "report"), [*rows, ("mean", _percent(found.mean))])
        print(f"{settings}  (study {result['study']})")
        print(f"{result['out']}  (run {result['run']}, trial {best.number}, {100 * best.score:.1f} on '{job.split}')")

    lab.terminal.give(document, show)
