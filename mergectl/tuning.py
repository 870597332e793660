"""The verb `search`: merge in memory per candidate, score on `tune`, then write the best and score it on `report`."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergectl.board import Board, board
from mergectl.crew import PARENT, LocalCrew, end_with_parent, worker_command
from mergectl.errors import UserError
from mergectl.evaluations import evaluate_model
from mergectl.lab import Lab
from mergectl.search import best_trial, search
from mergectl.search_jobs import Prepared, SearchJob, heard, prepare, told
from mergectl.studies import claim, close, load_study, open_study
from mergectl.trials import Trial, directions, front
from mergectl.verbs import (
    Result,
    merge_models,
    record_calibration,
    record_inputs,
    record_model,
    spare_inputs,
)
from mergectl.workers import Leader, study_facts, work

if TYPE_CHECKING:
    import optuna

    from mergectl.pruning import Verdict
    from mergectl.store import Run

__all__ = ["SearchJob", "join_search", "search_settings"]


def search_settings(lab: Lab, job: SearchJob, out: Path, *, force: bool = False, reuse: bool = False) -> Result:
    """Search a method's settings and write the best merge to `out`, scored once on `report`."""
    from mergectl import artefacts

    prepared = prepare(lab, job)
    config = prepared.config
    if reuse and (done := lab.done("search", config, out=out)):
        return {"run": done["run_id"], "out": str(out), "again": True}
    # An interrupted search may have written its model but not scored it: the same command finishes the work.
    force = force or reuse or _interrupted(lab, config)
    artefacts.check_free(out, force)
    spare_inputs(prepared.family, out)
    with lab.start("search", config, study=prepared.study, name=out.name) as run:
        record_inputs(run, prepared.family)
        if prepared.job.merge.options.get("calibration"):  # here and now: local workers then find it done
            record_calibration(run, prepared.supplies)
        trials, scores = _run_study(prepared, run)
        best = best_trial(trials, prepared.plan)
        final = replace(job.merge, recipe=replace(job.merge.recipe, settings=best.settings))
        merged = merge_models(lab, final, out, force=force)
        record_model(run, out, merged["digest"])
        words = [task.id for task in prepared.tasks]
        scored = evaluate_model(lab, str(out), words, split="report", batch_size=job.batch_size)
        run.metric("best_score", best.score, split=job.split)
        run.metric("report_score", scored["evaluation"].mean, split="report")
        run.note("best_trial", best.number)
        run.note("given", best.settings)
        run.note("settings", best.settings)
        if job.split == "report":
            run.note("searched_on", "report")
    return {
        "run": run.id, "out": str(out), "study": prepared.study, "best": best, "report": scored["evaluation"],
        "objectives": prepared.plan.objectives, "front": front(trials, prepared.plan.objectives), "scores": scores,
        "evaluated": len(trials), "again": False,
    }  # fmt: skip


def _interrupted(lab: Lab, config: Mapping[str, Any]) -> bool:
    """Whether this very search was begun before and never finished."""
    from mergectl.store import digest_of

    if not lab.has_store:
        return False
    rows = lab.store.query(
        "SELECT status FROM runs WHERE kind = 'search' AND config_digest = ?", [digest_of(config)]
    ).rows
    return bool(rows) and not any(status == "finished" for (status,) in rows)


def _run_study(prepared: Prepared, run: Run) -> tuple[list[Trial], dict[str, float]]:
    """Have all candidates scored; return them, and what the best one scored on each task."""
    lab, job, plan = prepared.lab, prepared.job, prepared.plan
    title = f"Searching {job.merge.recipe.method} by {plan.sampler}"
    recorded = _recorded(lab, prepared.study)
    ways = directions(plan.objectives)
    with (
        board(lab.terminal, title, plan, job.workers) as shown,
        open_study(lab.folder / "optuna", prepared.study, where=job.storage, directions=ways) as study,
    ):
        claim(study, prepared.question)
        study.set_user_attr("search", told(prepared))
        study.set_user_attr("objectives", list(plan.objectives))
        study.set_user_attr("searched_on", job.split)
        with _crew(prepared) as crew:
            judge = prepared.judge() if crew is None else None
            seen = _noting(prepared, run, recorded, shown)
            trials = search(study, plan, judge, seen, crew, shown.lose)
        lab.terminal.say(shown.line())
        if plan.prune is not None and shown.total:
            run.metric("evaluated_share", shown.rows / shown.total, split=job.split)
        return trials, shown.scores


def _noting(prepared: Prepared, run: Run, recorded: set[int], shown: Board) -> Any:
    """What is done with each finished trial: into the search's run, a run of its own, the live view."""

    def seen(trial: Trial, verdict: Verdict | None) -> None:
        if trial.refused is None:
            run.metric("score", trial.score, split=prepared.job.split, step=trial.number)
        if trial.number not in recorded:  # a search killed between journal and store told only the journal
            _record_trial(prepared, trial, verdict)
        shown.see(trial, verdict)

    return seen


@contextlib.contextmanager
def _crew(prepared: Prepared) -> Iterator[LocalCrew | None]:
    """Local workers, where there is to be more than this process."""
    from mergectl.lab import free_cores

    lab, job = prepared.lab, prepared.job
    if job.workers == 1:
        yield None
        return
    threads = lab.threads or max(1, free_cores() // job.workers)
    words = [
        "search",
        "--join",
        prepared.study,
        "--store",
        lab.store_url or str(lab.store_path),
        "--device",
        lab.device,
    ]
    words += ["--threads", str(threads), *(["--study-storage", job.storage] if job.storage else [])]
    try:
        with LocalCrew(worker_command(words), job.workers, threads) as crew:
            yield crew
    finally:
        shutil.rmtree(prepared.scratch, ignore_errors=True)


def _recorded(lab: Lab, study: str) -> set[int]:
    """The trials of a study that have their row in the store."""
    rows = lab.store.query(
        "SELECT trial FROM runs WHERE kind = 'trial' AND status IN ('finished', 'failed') AND study = ?", [study]
    )
    return {int(number) for (number,) in rows.rows}


def _record_trial(prepared: Prepared, trial: Trial, verdict: Verdict | None) -> None:
    lab, job = prepared.lab, prepared.job
    config = {"method": job.merge.recipe.method, "settings": trial.settings, "study": prepared.study}
    with (
        contextlib.suppress(_Refused),
        lab.start("trial", config, study=prepared.study, trial=trial.number) as run,
    ):
        if verdict is None:
            raise _Refused(trial.refused)
        for task, score in verdict.scores.items():
            run.metric("score", score, task=task, split=job.split)
            for name, value in verdict.metrics.get(task, {}).items():
                run.metric(name, value, task=task, split=job.split)
        run.metric("mean_score", verdict.mean, split=job.split)
        run.metric("evaluation_seconds", verdict.seconds, split=job.split)
        for name, value in zip(prepared.plan.objectives, trial.values, strict=False):
            if name in ("worst", "size"):
                run.metric(name, value, split=job.split)


class _Refused(Exception):  # noqa: N818  # makes a trial's run a failed one, with the reason
    pass


def join_search(lab: Lab, name: str, *, storage: str | None = None, wait: float = 60.0) -> int:
    """Work for a search that another process leads, until it ends; return how many candidates were scored here."""
    end_with_parent()
    study = load_study(lab.folder / "optuna", name, where=storage, wait=wait)
    try:
        prepared = heard(lab, _told(study, wait), shared=PARENT in os.environ)
        judge = prepared.judge()
        lab.terminal.say(f"Working for the search '{name}'.")
        return work(study, prepared.plan, judge, Leader(study, wait).goes_on)
    finally:
        close(study)


def _told(study: optuna.Study, wait: float) -> dict[str, Any]:
    """What the study says of its search; it may just have been made."""
    until = time.monotonic() + wait
    while (facts := study_facts(study).get("search")) is None:
        if time.monotonic() > until:
            raise UserError(
                f"The study '{study.study_name}' does not say what it searches: it was not begun by search."
            )
        time.sleep(0.2)
    found: dict[str, Any] = dict(facts)
    return found
