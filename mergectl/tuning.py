"""The verb `search`: merge in memory per candidate, score on `tune`, then write the best and score it on `report`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergectl import __version__
from mergectl.errors import UserError, WorkError
from mergectl.families import Family, open_family
from mergectl.lab import Lab
from mergectl.merge import MergeJob
from mergectl.search import Plan, Trial, Verdict, check_sampler, claim, open_study, search
from mergectl.space import Dimension, space
from mergectl.verbs import Result, check_split, evaluate_model, merge_models, record_inputs, spare_inputs, task_version

if TYPE_CHECKING:
    from mergectl.benchmarks._contract import Task
    from mergectl.store import Run


@dataclass(frozen=True)
class SearchJob:
    """All that decides a search."""

    merge: MergeJob
    words: tuple[str, ...] = ()
    sampler: str = "random"
    trials: int = 20
    ranges: Mapping[str, str] = field(default_factory=dict)
    per_task: tuple[str, ...] = ()
    limit: int | None = None
    split: str = "tune"
    study: str | None = None
    batch_size: int = 64


def search_settings(lab: Lab, job: SearchJob, out: Path, *, force: bool = False, reuse: bool = False) -> Result:
    """Search a method's settings and write the best merge to `out`, scored once on `report`."""
    from mergectl import artefacts
    from mergectl.settings import settings_of

    check_sampler(job.sampler)
    if job.split == "report":
        raise UserError("A search may not look at 'report': it is kept for the final score. Search on --split tune.")
    family = open_family(job.merge.base, job.merge.experts, lab.find_run)
    settings = settings_of(job.merge.recipe.method)
    fixed = dict(job.merge.recipe.settings)
    dimensions = space(settings, list(family.experts), ranges=job.ranges, fixed=fixed, per_task=job.per_task)
    tasks = lab.tasks(job.words or [family.task_ids[task] for task in family.experts])
    check_split(tasks, job.split)
    plan = Plan(tuple(dimensions), fixed, job.sampler, job.trials, lab.seed)
    config = _config(lab, job, family, plan, tasks)
    if reuse and (done := lab.done("search", config, out=out)):
        return {"run": done["run_id"], "out": str(out), "again": True}
    # An interrupted search may have written its model but not scored it: the same command finishes the work.
    force = force or reuse or _interrupted(lab, config)
    artefacts.check_free(out, force)
    spare_inputs(family, out)
    question = _question(config, lab.seed)
    study_name = job.study or f"{job.merge.recipe.method}-{job.sampler}-{question[:8]}"
    with lab.start("search", config, study=study_name, name=out.name) as run:
        record_inputs(run, family)
        best = _run_study(lab, job, family, plan, tasks, run, study_name, question)
        final = replace(job.merge, recipe=replace(job.merge.recipe, settings=best.settings))
        merged = merge_models(lab, final, out, force=force)
        run.artifact("model", str(out.absolute()), merged["digest"])
        scored = evaluate_model(lab, str(out), [t.id for t in tasks], split="report", batch_size=job.batch_size)
        run.metric("best_score", best.score, split=job.split)
        run.metric("report_score", scored["evaluation"].mean, split="report")
        run.note("best_trial", best.number)
        run.note("given", best.settings)
        run.note("settings", best.settings)
    return {
        "run": run.id, "out": str(out), "study": study_name, "best": best, "report": scored["evaluation"],
        "again": False,
    }  # fmt: skip


def _interrupted(lab: Lab, config: Mapping[str, Any]) -> bool:
    """Whether this very search was begun before and never finished."""
    from mergectl.store import digest_of

    if not lab.store_path.exists():
        return False
    rows = lab.store.query(
        "SELECT status FROM runs WHERE kind = 'search' AND config_digest = ?", [digest_of(config)]
    ).rows
    return bool(rows) and not any(status == "finished" for (status,) in rows)


def _config(lab: Lab, job: SearchJob, family: Family, plan: Plan, tasks: Sequence[Task]) -> dict[str, Any]:
    return {
        "method": job.merge.recipe.method,
        "refine": [list(pair) for pair in job.merge.recipe.refine],
        "fixed": dict(plan.fixed),
        "space": {d.name: _described(d) for d in plan.dimensions},
        "sampler": plan.sampler,
        "trials": plan.trials,
        "tasks": {task.id: task_version(task) for task in tasks},
        "inputs": [{k: v for k, v in row.items() if k != "ref"} for row in family.inputs],
        "limit": job.limit,
        "split": job.split,
        "dtype": job.merge.dtype,
        "data": None if lab.data is None else str(lab.data.absolute()),
        "version": __version__,
    }


def _described(d: Dimension) -> Any:
    return list(d.words) if d.kind == "word" else [d.low, d.high, d.step]


def _question(config: Mapping[str, Any], seed: int) -> str:
    """What a study answers: the same search with more trials goes on in it, but a grid's points depend on how many."""
    from mergectl.store import digest_of

    free = ("version",) if config["sampler"] == "grid" else ("version", "trials")
    return digest_of({"seed": seed, **{key: value for key, value in config.items() if key not in free}})


def _run_study(
    lab: Lab, job: SearchJob, family: Family, plan: Plan, tasks: Sequence[Task], run: Run, name: str, question: str
) -> Trial:
    with lab.terminal.progress(f"Searching {job.merge.recipe.method} by {plan.sampler}") as progress:
        judge = Judge(lab, job, family, tasks)
        best: list[Trial] = []
        recorded = _recorded(lab, name)

        def seen(trial: Trial, verdict: Verdict) -> None:
            if not best or trial.score > best[0].score:
                best[:] = [trial]
            run.metric("score", trial.score, split=job.split, step=trial.number)
            if trial.number not in recorded:  # a search killed between journal and store told only the journal
                _record_trial(lab, job, trial, verdict, name)
            progress(trial.number + 1, plan.trials, f"best {best[0].score:.4f} (trial {best[0].number})")

        with open_study(lab.folder / "optuna", name) as study:
            claim(study, question)
            return search(study, plan, judge, seen)


def _recorded(lab: Lab, study: str) -> set[int]:
    """The trials of a study that have their row in the store."""
    rows = lab.store.query("SELECT trial FROM runs WHERE kind = 'trial' AND status = 'finished' AND study = ?", [study])
    return {int(number) for (number,) in rows.rows}


def _record_trial(lab: Lab, job: SearchJob, trial: Trial, verdict: Verdict, study: str) -> None:
    config = {"method": job.merge.recipe.method, "settings": trial.settings, "study": study}
    with lab.start("trial", config, study=study, trial=trial.number) as run:
        for task, score in verdict.scores.items():
            run.metric("score", score, task=task, split=job.split)
        run.metric("mean_score", verdict.mean, split=job.split)
        run.metric("evaluation_seconds", verdict.seconds, split=job.split)


class Judge:
    """Scores settings: merges in memory, swaps the weights into one live model, evaluates every task."""

    def __init__(self, lab: Lab, job: SearchJob, family: Family, tasks: Sequence[Task]) -> None:
        from mergectl.bench import make_bench
        from mergectl.heads import open_live

        self.job, self.population = job, family.population
        heads = {family.task_ids[task]: expert for task, expert in family.experts.items()}
        self.live = open_live(family.base, tasks, heads=heads, device=lab.torch_device())
        how: dict[str, Any] = {"split": job.split, "data": lab.data, "limit": job.limit, "batch_size": job.batch_size}
        self.benches = [make_bench(task, self.live.preparer_of(task.id), seed=lab.seed, **how) for task in tasks]
        self.task_of = {family.task_ids[task]: task for task in family.experts}
        # Everything is read once; a trial then works in memory alone.
        self.base = (
            {name: self.population.base[name].float() for name in self.population.base} if family.has_base else None
        )
        self.experts = {
            task: {name: weights[name].float() for name in weights} for task, weights in self.population.experts.items()
        }

    def __call__(self, settings: dict[str, Any]) -> Verdict:
        """Merge with these settings and score the result on every task."""
        import time

        from mergectl.evaluate import score_model
        from mergectl.merging import merge_stream

        recipe = replace(self.job.merge.recipe, settings=settings)
        stream = merge_stream(recipe, self.base, self.experts)
        weights, unified, masks = {}, {}, {}
        for piece in stream:
            weights[piece.name] = piece.weight
            if piece.masks is not None:
                unified[piece.name], masks[piece.name] = piece.delta, piece.masks
        self.live.load_backbone(weights, partial=True)
        if unified:
            self._keep(unified, masks, stream.rescalers or {})
        started = time.perf_counter()
        scores = {bench.task.id: score_model(self.live, bench)["score"] for bench in self.benches}
        if not all(score == score for score in scores.values()):
            raise WorkError(f"A candidate of the search scored not-a-number with {settings}.")
        return Verdict(scores, time.perf_counter() - started)

    def _keep(self, unified: Mapping[str, Any], masks: Mapping[str, Any], rescalers: Mapping[str, float]) -> None:
        self.live.keep(unified, base=self.base)
        order = list(self.experts)
        for bench in self.benches:
            task = self.task_of[bench.task.id]
            own = {name: rows[order.index(task)] for name, rows in masks.items()}
            self.live.set_masks(bench.task.id, own, rescalers.get(task, 1.0))
