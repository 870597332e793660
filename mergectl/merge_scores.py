"""Score a merged model at once, and write down what was merged, how, and how well it does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mergectl.checkpoints import open_checkpoint
from mergectl.errors import UserError
from mergectl.evaluations import evaluate_model
from mergectl.lab import Lab
from mergectl.tasks import check_split

if TYPE_CHECKING:
    from mergectl.evaluate import Evaluation
    from mergectl.families import Family


class Scoring(NamedTuple):
    """What a merge is scored on, and the file that is told."""

    words: tuple[str, ...] = ()
    file: Path | None = None

    def check(self, lab: Lab) -> None:
        """Refuse, before any work, what cannot be scored or written."""
        if self.file is not None and not self.words:
            raise UserError("--out-file is for scores. Say of which tasks: --eval suite/task")
        if self.file is not None and (self.file.is_dir() or not self.file.absolute().parent.is_dir()):
            raise UserError(f"{self.file} cannot be written: it is a folder, or lies in none.")
        check_split(lab.tasks(self.words), "report")

    def check_models(self, lab: Lab, export: str | None, family: Family) -> None:
        """Refuse tasks that a merge of these models could not answer."""
        from mergectl.heads import check_answered
        from mergectl.models import open_source

        if self.words and (export is None or export in family.experts):
            model = family.base if export is None else family.experts[export]
            found = family.population
            brought = [
                name for name in family.task_ids if export in (None, name) and (found.heads[name] or found.blended)
            ]
            heads = [family.task_ids[name] for name in brought]
            check_answered(open_source(model), lab.tasks(self.words), heads)

    def finish(self, lab: Lab, result: Mapping[str, Any]) -> dict[str, Any]:
        """Score the merged folder, if asked to; return what there is to say about it."""
        if not self.words:
            return {}
        found = evaluate_model(lab, result["out"], self.words)
        scores: Evaluation = found["evaluation"]
        if self.file is not None:
            record = open_checkpoint(result["out"]).meta
            with self.file.open("a", encoding="utf-8") as file:
                file.write("\n".join(told(record, result, found["run"], scores)) + "\n\n")
        told_in = None if self.file is None else str(self.file)
        return {"eval": found["run"], "tasks": scores.scores, "mean": scores.mean, "file": told_in}


def told(record: Mapping[str, Any], result: Mapping[str, Any], run: str, scores: Evaluation) -> list[str]:
    """The models, the method with its settings, and the scores in percent, one fact per line."""
    recipe = record["recipe"]
    return [
        *(f"{row['role']}: {row['ref']}" for row in record["inputs"]),
        *(f"refine: {_pairs(step['name'], step['settings'])}" for step in recipe["refine"]),
        f"method: {_pairs(recipe['method'], recipe['settings'])}",
        f"seed: {recipe['seed']}",
        f"merged: {result['out']} (run {result['run']})",
        *(f"{task}: {100 * score:.2f}" for task, score in scores.scores.items()),
        f"mean: {100 * scores.mean:.2f} (run {run})",
    ]


def _pairs(name: str, settings: Mapping[str, Any]) -> str:
    return " ".join([name, *(f"{key}={value}" for key, value in settings.items())])


def shown(facts: Mapping[str, Any]) -> list[str]:
    """A line per task for the terminal, of several their mean, and where all that was written."""
    scores: Mapping[str, float] = facts.get("tasks", {})
    if not scores:
        return []
    lines = {task: f"{100 * score:.1f}" for task, score in scores.items()}
    if len(scores) > 1:
        lines["mean"] = f"{100 * facts['mean']:.1f}"
    wide = max(map(len, lines))
    told = [f"{name:{wide}}  {text}" for name, text in lines.items()]
    told[-1] += f"  (run {facts['eval']})"
    return [*told, *([f"added to {facts['file']}"] if facts["file"] else [])]
