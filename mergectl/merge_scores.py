"""Score a merged model at once, and write down what was merged, how, and how well it does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mergectl.errors import UserError
from mergectl.lab import Lab
from mergectl.verbs import check_split, evaluate_model

if TYPE_CHECKING:
    from mergectl.evaluate import Evaluation
    from mergectl.merge import MergeJob


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

    def finish(self, lab: Lab, job: MergeJob, result: Mapping[str, Any]) -> dict[str, Any]:
        """Score the merged folder, if asked to; return what there is to say about it."""
        if not self.words:
            return {}
        found = evaluate_model(lab, result["out"], self.words)
        scores: Evaluation = found["evaluation"]
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as file:
                file.write("\n".join(told(job, result, found["run"], scores)) + "\n\n")
        return {"eval": found["run"], "tasks": scores.scores, "mean": scores.mean}


def told(job: MergeJob, result: Mapping[str, Any], run: str, scores: Evaluation) -> list[str]:
    """The models, the method with its settings, and the scores in percent, one fact per line."""
    from mergectl.merge import described

    recipe = described(job.recipe)
    steps = [f"{step['name']} {_pairs(step['settings'])}".strip() for step in recipe["refine"]]
    return [
        *([] if job.base is None else [f"base: {job.base}"]),
        *(f"expert: {ref}" for _, ref in job.experts),
        *(f"refine: {step}" for step in steps),
        f"method: {recipe['method']} {_pairs(recipe['settings'])}".strip(),
        f"seed: {recipe['seed']}",
        f"merged: {result['out']} (run {result['run']})",
        *(f"{task}: {100 * score:.2f}" for task, score in scores.scores.items()),
        f"mean: {100 * scores.mean:.2f} (run {run})",
    ]


def _pairs(settings: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items())

