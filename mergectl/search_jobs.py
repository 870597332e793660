"""What decides a search, made ready: models, tasks, plan and config; told to workers that join from elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergectl import __version__
from mergectl.checkpoints import Checkpoint
from mergectl.errors import UserError
from mergectl.families import Family, open_family
from mergectl.judging import Judge, Measured
from mergectl.lab import Lab
from mergectl.merge import MergeJob
from mergectl.plan import Recipe, check_base, check_models, steps_of
from mergectl.preprocess import check_inputs
from mergectl.range_ends import check_ends
from mergectl.refs import Ref, Stack, ref_of
from mergectl.reheading import HeadedModel
from mergectl.samplers import check_plan, check_sampler
from mergectl.settings import MethodInfo, describe, settings_of
from mergectl.space import Dimension, space, standing
from mergectl.stacking import CutTokens, Stacked
from mergectl.supplies import settled_options, supplies_of
from mergectl.tasks import check_split, task_version
from mergectl.trials import Plan, read_objectives
from mergectl.verbs import REFS, check_words, options_config

if TYPE_CHECKING:
    from mergectl.benchmarks._contract import Task


@dataclass(frozen=True)
class SearchJob:
    """All that decides a search, and where and by how many it is done."""

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
    per_layer: tuple[str, ...] = ()  # `4` or `scale=4`
    objective: str = "mean"
    start: Mapping[str, float] = field(default_factory=dict)
    sigma: float | None = None
    population: int | None = None
    allow_report: bool = False
    workers: int = 1
    storage: str | None = None
    prune: float | None = None  # the chance to stop a candidate that is as good as the best
    inputs: str = "full"  # what a model reads of a text: all, or ids_only
    include_endpoints: bool = False  # begin with both ends of every range
    include_default: bool = False  # begin with the method's defaults


@dataclass(frozen=True)
class Prepared:
    """A search that could begin: everything is checked, no weight is read."""

    lab: Lab
    job: SearchJob
    family: Family
    tasks: Sequence[Task]
    plan: Plan

    @property
    def config(self) -> dict[str, Any]:
        """What decides the result, for the store."""
        job, plan = self.job, self.plan
        more = {
            "objectives": list(plan.objectives) if plan.objectives != ("mean",) else None,
            "start": dict(plan.start) or None,
            "sigma": plan.sigma,
            "population": plan.population,
            "allow_report": job.allow_report or None,
            "prune": plan.prune,
            "read": None if job.inputs == "full" else job.inputs,
            "include_endpoints": plan.endpoints or None,
            "include_default": plan.default or None,
        }
        return {
            "method": job.merge.recipe.method,
            "refine": [list(pair) for pair in job.merge.recipe.refine],
            "fixed": dict(plan.fixed),
            "space": {d.name: _described(d) for d in plan.dimensions},
            "sampler": plan.sampler,
            "trials": plan.trials,
            "tasks": {task.id: task_version(task) for task in self.tasks},
            "inputs": [{k: v for k, v in row.items() if k not in REFS} for row in self.family.inputs],
            "limit": job.limit,
            "split": job.split,
            "dtype": job.merge.dtype,
            "data": None if self.lab.data is None else str(self.lab.data.absolute()),
            "version": __version__,
            **options_config(self.lab, _standing(job), self.family),
            **{key: value for key, value in more.items() if value is not None},
        }

    @property
    def question(self) -> str:
        """What a study answers: with more trials it goes on, but a grid's points depend on how many there are."""
        from mergectl.store import digest_of

        config = self.config
        free = ("version",) if config["sampler"] == "grid" else ("version", "trials")
        return digest_of({"seed": self.lab.seed, **{key: value for key, value in config.items() if key not in free}})

    @property
    def study(self) -> str:
        """The study's name."""
        return self.job.study or f"{self.job.merge.recipe.method}-{self.job.sampler}-{self.question[:8]}"

    @property
    def scratch(self) -> Path:
        """Where this machine's workers share what one of them has merged; gone with the search."""
        return self.lab.folder / "optuna" / f"{self.study}.merged"

    @functools.cached_property
    def supplies(self) -> dict[str, Any]:
        """What the lab supplies to every candidate; calibration happens here, if it has not yet."""
        merge = _standing(self.job)
        return supplies_of(self.lab, self.family, merge.recipe, merge.options)

    def judge(self) -> Judge | Measured:
        """Read the models and make ready to score candidates."""
        job = self.job
        how: dict[str, Any] = {"split": job.split, "limit": job.limit, "batch_size": job.batch_size}
        how["inputs"] = job.inputs
        if job.workers > 1:
            how["scratch"] = self.scratch
        how["varying"] = {d.setting for d in self.plan.dimensions}
        free = {d.setting for d in self.plan.dimensions if d.kind == "float" and not d.step}
        how["again"] = self.plan.sampler == "grid" or free <= set(describe(job.merge.recipe.method).linear)
        judge = Judge(self.lab, _standing(job).recipe, self.family, self.tasks, supplies=self.supplies, **how)
        return Measured(judge) if "size" in self.plan.objectives else judge


def prepare(lab: Lab, job: SearchJob) -> Prepared:
    """Open the models' headers and check everything that can be checked before weights are read."""
    check_sampler(job.sampler)
    check_inputs(job.inputs)
    if job.split == "report" and not job.allow_report:
        raise UserError(
            "A search may not look at 'report': it is kept for the final score. Search on --split tune; "
            "--allow-report does it all the same, and the study says so."
        )
    info = describe(job.merge.recipe.method)
    check_words(lab, job.merge)
    family = open_family(job.merge.base, job.merge.experts, lab.find_run, functools.partial(_dimensions, job))
    recipe = _standing(job).recipe
    dimensions = _dimensions(job, list(family.experts), list(family.population.base))
    check_base(info.name, steps_of(recipe, list(family.experts)), family.has_base)
    options = settled_options(recipe, family, job.merge.options)
    job = replace(job, merge=replace(job.merge, options=options))
    fixed = dict(job.merge.recipe.settings)
    check_ends(info, dimensions, recipe.settings, list(family.experts))
    tasks = lab.tasks(job.words or list(dict.fromkeys(family.task_ids[task] for task in family.experts)))
    check_split(tasks, job.split)
    objectives = read_objectives(job.objective, [task.id for task in tasks])
    _check_kept(info, dimensions, objectives, family)
    plan = Plan(
        tuple(dimensions), fixed, job.sampler, job.trials, lab.seed, objectives, dict(job.start), job.sigma,
        job.population, job.prune, job.include_endpoints, job.include_default,
    )  # fmt: skip
    check_plan(plan)
    return Prepared(lab, job, family, tasks, plan)


def _dimensions(job: SearchJob, tasks: Sequence[str], names: Sequence[str]) -> list[Dimension]:
    """Return what is searched; refuse tasks and weights that the models do not have."""
    recipe, info = _standing(job).recipe, describe(job.merge.recipe.method)
    check_models(recipe, tasks, names)
    return space(
        info.settings, tasks, ranges=job.ranges, fixed=job.merge.recipe.settings, per_task=job.per_task,
        per_layer=_layered(job.per_layer, info), names=names,
    )  # fmt: skip


def _standing(job: SearchJob) -> MergeJob:
    """The merge with those fixed settings alone that mean something in every candidate."""
    recipe = job.merge.recipe
    settings = standing(settings_of(recipe.method), recipe.settings, job.ranges)
    return replace(job.merge, recipe=replace(recipe, settings=settings))


def _layered(texts: Sequence[str], info: MethodInfo) -> dict[str, int]:
    """Read `--per-layer`: a number of groups for the method's coefficients, or NAME=NUMBER."""
    found: dict[str, int] = {}
    for text in texts:
        name, _, count = text.rpartition("=")
        if not count.isdecimal():
            raise UserError(f"--per-layer {text} is not a number of groups, or NAME=NUMBER.")
        names = [name.replace("-", "_")] if name else list(info.linear)
        if not names:
            raise UserError(f"{info.name} has no coefficient of its own: name a setting, --per-layer NAME={count}.")
        found |= dict.fromkeys(names, int(count))
    return found


def _check_kept(info: MethodInfo, dimensions: Sequence[Dimension], objectives: Sequence[str], family: Family) -> None:
    """Refuse what cannot work with a method that keeps something per task, or without a base."""
    if info.extra_bits and (grouped := next((d for d in dimensions if d.patterns), None)):
        raise UserError(
            f"{grouped.setting} cannot differ between weights: '{info.name}' keeps one rescaler per task. "
            "Drop --per-layer and the pattern."
        )
    if "size" in objectives and (info.extra_bits or not family.has_base):
        why = "keeps masks beside its weights" if info.extra_bits else "is given no base to compare with"
        raise UserError(f"--objective size counts the weights that a merge changes, but '{info.name}' {why}.")


def _described(d: Dimension) -> Any:
    return list(d.words) if d.kind == "word" else [d.low, d.high, d.step, *(["log"] if d.log else [])]


def told(prepared: Prepared) -> dict[str, Any]:
    """A search as a study keeps it, so that any machine with the same folders can join."""
    lab, job, family = prepared.lab, prepared.job, prepared.family
    merge = {**asdict(job.merge), "base": _told(family.base) if family.has_base else None}
    given = [name for name, _ in job.merge.experts]
    merge["experts"] = [[name, _told(expert)] for name, expert in zip(given, family.experts.values(), strict=True)]
    places = {"data": lab.data, "own_tasks": lab.own_tasks}
    where = {key: None if path is None else str(path.absolute()) for key, path in places.items()}
    config = prepared.config
    return {
        "job": {**asdict(job), "merge": merge, "study": prepared.study},
        "seed": lab.seed,
        "models": [config["inputs"], config["tasks"]],
        **where,
    }


def _told(model: Checkpoint) -> str | dict[str, Any]:
    """A model for other processes: where it lies, or what it is made of."""
    ref = _placed(model)
    return ref if isinstance(ref, str) else {"ref": str(ref), **ref.record()}


def _placed(model: Checkpoint) -> Ref:
    """A model's reference, with folders named in full."""
    if isinstance(model, CutTokens):
        return replace(model.cut, model=_whole(model.model))
    if isinstance(model, HeadedModel):
        return model.placed(_whole)
    return _whole(model)


def _whole(model: Checkpoint) -> str | Stack:
    if not isinstance(model, Stacked):
        return _place(model)
    place, stack = {ref: _place(part) for ref, part in model.models.items()}, model.stack
    layers = tuple((place[ref], layer) for ref, layer in stack.layers)
    return Stack(layers, place[stack.front], place[stack.back], place[stack.frame])


def _place(model: Checkpoint) -> str:
    """Where a model lies, for other processes: a folder in full, a hub id as it is."""
    return str(model.folder.absolute()) if Path(model.ref).exists() or "/" not in model.ref else str(model.ref)


def heard(lab: Lab, facts: Mapping[str, Any], *, shared: bool) -> Prepared:
    """Make a search that another process told ready here; other models or rows than there are refused.

    `shared` says that the leader is on this machine and clears away what its workers share.
    """
    job, merge = dict(facts["job"]), dict(facts["job"]["merge"])
    recipe = dict(merge.pop("recipe"))
    recipe["refine"] = tuple((name, given) for name, given in recipe["refine"])
    experts = tuple((task, _heard(ref)) for task, ref in merge.pop("experts"))
    merge["base"] = None if merge["base"] is None else _heard(merge["base"])
    job = {key: tuple(value) if isinstance(value, list) else value for key, value in job.items()}
    job["merge"] = MergeJob(Recipe(**recipe), experts, **merge)
    job["workers"] = job["workers"] if shared else 1
    lab = replace(
        lab,
        seed=facts["seed"],
        data=lab.data or _path(facts["data"]),
        own_tasks=lab.own_tasks or _path(facts["own_tasks"]),
    )
    prepared = prepare(lab, SearchJob(**job))
    config = prepared.config
    if [config["inputs"], config["tasks"]] != facts["models"]:
        raise UserError("The models or tasks of this search are others here than where it was begun.")
    return prepared


def _heard(told: str | Mapping[str, Any]) -> Ref:
    return told if isinstance(told, str) else ref_of(told)


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
