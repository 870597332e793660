"""Scores as people see them: per task, beside the expert's and the base's where the store knows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergectl.board import short
from mergectl.checkpoints import open_checkpoint
from mergectl.evaluations import evaluate_model, evaluate_references
from mergectl.families import open_family
from mergectl.lab import Lab
from mergectl.refs import ref_of
from mergectl.terminal import print_table

if TYPE_CHECKING:
    from mergectl.evaluate import Written
    from mergectl.tuning import SearchJob

COSTS = (
    "flops_reference", "flops_full", "flops_reference_run", "flops_full_run", "parameters", "measured_latency_ms",
    "measured_peak_memory_mb",
)  # fmt: skip
COLUMNS = ("task", "score", "of expert", "base to expert", "examples", "seconds")


def score(
    lab: Lab, model: str, words: Sequence[str], heads: Sequence[tuple[str | None, str]], *,
    references: bool, show: int, flops: bool = False, **how: Any,
) -> None:  # fmt: skip
    """Evaluate a model and print its scores, normalised where experts and base are scored too."""
    if references:
        _score_references(lab, model, words, **how)
    result = evaluate_model(lab, model, words, heads=heads, show=show, flops=flops, **how)
    found = result["evaluation"]
    costs = {task: {name: metrics[name] for name in COSTS} for task, metrics in found.metrics.items()} if flops else {}
    show_run(lab, result["run"], found.written, costs)


def _score_references(lab: Lab, model: str, words: Sequence[str], **how: Any) -> None:
    """Score the experts and the base that a merged folder names as its inputs."""
    meta = open_checkpoint(model, lab.find_run).meta
    inputs = meta.get("inputs", [])
    rows = [row for row in inputs if row["role"] == "expert"]
    tasks = [row["task"] for row in rows]
    names = list(meta.get("tasks", tasks))  # those under which they were merged tell several of one task apart
    experts = [
        (name if tasks.count(row["task"]) > 1 else row["task"], ref_of(row))
        for name, row in zip(names, rows, strict=True)
    ]
    base = next((ref_of(row) for row in inputs if row["role"] == "base"), None)
    if experts:
        evaluate_references(lab, open_family(base, experts, lab.find_run), words, **how)


def show_run(
    lab: Lab, run_id: str, written: Sequence[Written] = (), costs: Mapping[str, Mapping[str, float]] | None = None
) -> None:
    """Print the scores of an evaluation run from the store, with what they mean beside expert and base."""
    table = lab.store.query(
        "SELECT task, score, relative_to_expert, normalised, examples, seconds FROM ("
        "SELECT l.task, l.score, l.relative_to_expert, l.normalised, e.value AS examples, s.value AS seconds, "
        "row_number() OVER (PARTITION BY l.task ORDER BY l.normalised IS NULL, l.relative_to_expert IS NULL, l.kind, "
        "l.run_id) AS place "
        "FROM leaderboard l JOIN metrics e ON e.run_id = l.eval_run AND e.task = l.task AND e.name = 'examples' "
        "JOIN metrics s ON s.run_id = l.eval_run AND s.task = l.task AND s.name = 'seconds' "
        "WHERE l.eval_run = ?) ranked WHERE place = 1 ORDER BY task",  # one model may have several origins
        [run_id],
    )
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    mean = sum(row["score"] for row in rows) / len(rows)
    document: dict[str, Any] = {"run": run_id, "mean": mean, "tasks": rows}
    if written:
        document["written"] = [asdict(row) for row in written]
    if costs:
        document["costs"] = costs
    lab.terminal.give(document, lambda: _print(rows, mean, run_id, written, costs or {}))


def _print(
    rows: Sequence[dict[str, Any]], mean: float, run_id: str, written: Sequence[Written],
    costs: Mapping[str, Mapping[str, float]],
) -> None:  # fmt: skip
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
    if written:
        texts = [(row.task, row.text, row.written, row.right) for row in written]
        print_table("What the model writes", ("task", "text", "written", "right answer"), texts, left=4)
    _print_costs(costs)


def _print_costs(costs: Mapping[str, Mapping[str, float]]) -> None:
    """The operations of each task, and what was measured."""
    if not costs:
        return
    rows = [
        (task, *(f"{found[name]:,.0f}" for name in COSTS[:5]), *(f"{found[name]:.1f}" for name in COSTS[5:]))
        for task, found in costs.items()
    ]
    print_table("Costs; _run: at the lengths to which batches were padded", ("task", *COSTS), rows)


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
        f"{job.split}_tasks": result["scores"],
    }  # fmt: skip
    if len(result["objectives"]) > 1:
        document["front"] = [
            {"trial": t.number, **dict(zip(result["objectives"], t.values, strict=True)), "settings": t.settings}
            for t in result["front"]
        ]
    if job.split == "report":
        lab.terminal.warn("This search chose by 'report': the scores on it are no fair test of the result.")
    lab.terminal.give(document, lambda: _show_search(job, result))


def _show_search(job: SearchJob, result: dict[str, Any]) -> None:
    best, found, objectives = result["best"], result["report"], result["objectives"]
    if len(objectives) > 1:
        rows = [(t.number, _settings(t.settings), *t.values, 100 * t.score) for t in result["front"]]
        heads = ("trial", "settings", *objectives, "mean in percent")
        print_table(f"Pareto front on '{job.split}'", heads, rows, left=2)
        print(f"Written: trial {best.number}, the best mean of the front.")
    scores = result["scores"]
    rows = [(task, _percent(scores.get(task)), _percent(score)) for task, score in found.scores.items()]
    heads = ("task", f"{job.split} (searched)", "report")
    print_table("Best candidate in percent", heads, [*rows, ("mean", _percent(best.score), _percent(found.mean))])
    print(f"Trial {best.number} of {result['evaluated']}: {_settings(best.settings)}")
    print(f"Written to {result['out']} (run {result['run']}).")
    print(f"What the search found: mergectl report --study {result['study']}")


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={short(value)}" for name, value in settings.items())
