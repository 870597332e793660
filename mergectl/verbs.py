"""The verbs' common frame: check, open a run, work, record, end the run. The CLI and pipelines call these alike."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from mergectl import __version__
from mergectl.checkpoints import open_checkpoint
from mergectl.claims import claimed
from mergectl.errors import UserError
from mergectl.families import Family, check_names, open_family
from mergectl.lab import Lab, versions
from mergectl.merge import MergeJob, checked, described
from mergectl.open_clip import layout
from mergectl.pins import COMMIT
from mergectl.ranks import leads
from mergectl.stacking import parts_of
from mergectl.supplies import asked_by, check_options, settled_options, supplies_of
from mergectl.tasks import task_version

if TYPE_CHECKING:
    from mergectl.benchmarks._contract import Task
    from mergectl.finetune_config import FinetuneConfig
    from mergectl.models import Source
    from mergectl.store import Run

Result = dict[str, Any]
Check: TypeAlias = Callable[[Family], None]
REFS = ("ref", "layers", "model", "tokens", "head")  # of a model in a record: where it lies, and what its digest says


def merge_models(
    lab: Lab, job: MergeJob, out: Path, *, force: bool = False, reuse: bool = False, check: Check | None = None,
) -> Result:  # fmt: skip
    """Merge experts into the folder `out`; with `reuse`, not again if a finished run did exactly this.

    `check` may refuse the models, once they are opened.
    """
    from mergectl import artefacts
    from mergectl.merge import merge
    from mergectl.plan import check_base, check_beforehand, check_models, steps_of

    check_beforehand(job.recipe, [task for task, _ in job.experts])
    check_words(lab, job)
    artefacts.check_free(out, force or reuse)
    family = open_family(job.base, job.experts, lab.find_run, partial(check_models, job.recipe))
    recipe, given = checked(job.recipe, list(family.experts)), dict(job.recipe.settings)
    check_base(recipe.method, steps_of(recipe, list(family.experts)), family.has_base)
    if check is not None:
        check(family)
    job = replace(job, recipe=recipe, options=settled_options(recipe, family, job.options))
    config = merge_config(job, family, recipe) | options_config(lab, job, family)
    if reuse and (done := lab.done("merge", config, recipe.seed, out)):
        return {"run": done["run_id"], "out": str(out), "again": True}
    artefacts.check_free(out, force or reuse)
    spare_inputs(family, out)
    for note in family.population.notes:
        lab.terminal.say(f"note: {note}")
    device = lab.merge_device()
    with lab.start("merge", config, seed=recipe.seed, name=out.name) as run:
        record_inputs(run, family)
        run.note("given", given)
        supplies = supplies_of(lab, family, recipe, {**job.options, "watched": run.config_digest})
        record_calibration(run, supplies)
        with lab.terminal.progress(f"Merging {family.counted} by {recipe.method}") as progress:
            facts = {
                "run": run.id,
                "versions": versions(),
                "working_folder": os.path.relpath(os.path.realpath("."), os.path.realpath(out.parent)),
            }
            force = force or reuse
            how: dict[str, Any] = {"progress": progress, "device": device, "supplies": supplies}
            watch = supplies.get("watch")
            if watch is not None:
                watch.progress = progress
            digest = merge(job, family, out, facts=facts, force=force, **how)
        if watch is not None:
            watch.record(run, out)
        record_model(run, out, digest)
    return {"run": run.id, "out": str(out), "digest": digest, "again": False}


def check_words(lab: Lab, job: MergeJob) -> None:
    """Refuse names, options and a device that there are not, before a model is looked for."""
    check_names(job.experts, job.export)
    check_options(job.options)
    if lab.device not in ("auto", "cpu"):  # which need no torch to be known
        lab.torch_device()


def options_config(lab: Lab, job: MergeJob, family: Family) -> dict[str, Any]:
    """What a method that adapts, or looks at calibration, depends on besides the models; `job.options` are settled."""
    from mergectl.adaptation import facts, read_options, tasks_of

    found: dict[str, Any] = {}
    if "entropy" in asked_by(job.recipe, family):
        versions_of = {task.id: task_version(task) for task in tasks_of(lab, family)}
        found |= facts(read_options(job.options.get("adapt", {})), versions_of, lab)
    if options := job.options.get("calibration"):
        from mergectl.calibration_supply import task_of

        versions_of = {task.id: task_version(task) for task in (task_of(lab, family, name) for name in family.experts)}
        data = None if lab.data is None else str(lab.data.absolute())
        found["calibration"] = {**options, "tasks": versions_of, "data": data}
    return found


def record_calibration(run: Run, supplies: Mapping[str, Any]) -> None:
    """Note what calibration found, and in which run, as inputs of the run that uses it."""
    for name in ("grams", "fishers"):
        for own in supplies.get(name, {}).values():
            run.input(name, own.stored.path, own.stored.key, task=own.task, run_id=own.stored.facts["run"])


def spare_inputs(family: Family, out: Path) -> None:
    """Refuse to put a merge in the place of what it is made from, whatever `--force` says."""
    models, place = (family.base, *family.experts.values()), out.resolve()
    for part in [part for model in models for part in parts_of(model)]:
        if part.folder.resolve() == place:
            raise UserError(f"{out} is one of the models to merge; the result would replace it. Choose another -o.")
        lost = (path for path in (part.folder, *part.files) if path.resolve().is_relative_to(place))
        if (path := next(lost, None)) is not None:
            raise UserError(f"{path}, of a model to merge, lies in {out}, which the result would replace. "
                            "Choose another -o.")  # fmt: skip


def merge_config(job: MergeJob, family: Family, recipe: Any) -> dict[str, Any]:
    """What decides a merge: recipe and content of the inputs, not where they lie."""
    inputs = [{k: v for k, v in row.items() if k not in REFS} for row in family.inputs]
    output = {"dtype": job.dtype, "export": job.export, "shard_bytes": job.shard_bytes}
    return {**described(recipe), **output, "inputs": inputs, "version": __version__}


def record_inputs(run: Run, family: Family) -> None:
    """Note the base and the experts as inputs of a run; of a stack of layers, the models that it is made of."""
    models = [*([family.base] if family.has_base else []), *family.experts.values()]
    for row, model in zip(family.inputs, models, strict=True):
        for place, part in enumerate(parts_of(model)):
            run.input("layers" if place else row["role"], part.ref, part.digest, task=row["task"])
    layouts = {str(row["task"] or "base"): form for row, model in zip(family.inputs, models, strict=True)
               if (form := layout(model))}  # fmt: skip
    if layouts:
        run.note("query_key_value", {**layouts, "merged": "split"})


def record_model(run: Run, folder: Path, digest: str) -> None:
    """Note a model folder as what the run made."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    run.artifact("model", str(folder.absolute()), digest, size)


def finetune_experts(
    lab: Lab,
    words: Sequence[str],
    base: str,
    out: Path,
    options: Mapping[str, Any],
    *,
    force: bool = False,
    reuse: bool = False,
    again: bool = False,
    suffix: str = "",
    masked: Mapping[str, Masked] | None = None,
) -> list[Result]:
    """Fine-tune one expert per task into `out/<task><suffix>`; `again`: not those that finished runs left there.

    With `masked` (by task id), each trains only what it owns. All settings are checked before the first training.
    """
    from mergectl.families import short_names
    from mergectl.finetune import FinetuneConfig
    from mergectl.presets import settled

    tasks = lab.tasks(words)
    folders = [out / f"{short}{suffix}" for short in short_names([task.id for task in tasks])]
    source = base_source(lab, base)
    if source.weights is None:
        lab.terminal.say(f"note: {base} holds no weights: training starts from fresh ones.")
    where: dict[str, Any] = {"base": _begun_from(source, options), "seed": lab.seed, "device": lab.torch_device()}
    owned = [(masked or {}).get(task.id) for task in tasks]
    configs = [
        FinetuneConfig(
            task=task.id, **where, **settled(task.id, source.config, options),
            masks=str(own.file) if own is not None else None,
        )
        for task, own in zip(tasks, owned, strict=True)
    ]  # fmt: skip
    return [
        finetune_one(lab, task, source, folder, config, own, force or reuse, reuse or again)
        for task, folder, config, own in zip(tasks, folders, configs, owned, strict=True)
    ]


class Masked(NamedTuple):
    """The ownership masks of one task, and the inputs that a training with them has besides its base."""

    file: Path
    digest: str
    inputs: tuple[dict[str, Any], ...]


def base_source(lab: Lab, base: str) -> Source:
    """The model to start from: a folder, a hub id, a configuration, or a run of the store."""
    from mergectl.models import open_source

    return open_source(lab.find_run(base) or base if "/" not in base and not Path(base).exists() else base)


def _begun_from(source: Source, options: Mapping[str, Any]) -> str:
    """The base as an expert's record names it: the folder, or the hub id and commit, which other machines have, too.

    An adapter's own file has no room for a commit in the base's name.
    """
    if source.folder is None or COMMIT.fullmatch(source.ref.rpartition("@")[2]) is None:
        return str(source.folder or source.ref)
    return source.ref if options.get("peft", "none") == "none" else str(source.folder)


def finetune_one(
    lab: Lab, task: Task, source: Source, out: Path, settings: FinetuneConfig, masked: Masked | None, force: bool,
    reuse: bool,
) -> Result:  # fmt: skip
    """Fine-tune one expert into the folder `out` and record it."""
    from mergectl import artefacts
    from mergectl.finetune import finetune

    start = source.weights.digest if source.weights is not None else source.config
    data = None if lab.data is None else str(lab.data.absolute())
    config = {
        **asdict(settings),
        "base": start,
        "masks": None if masked is None else masked.digest,
        "task_version": task_version(task),
        "data": data,
        "version": __version__,
    }
    if reuse and (done := lab.done("finetune", config, out=out)):
        return {"run": done["run_id"], "task": task.id, "out": str(out), "again": True}
    force = force or _cut_short(lab, config, out)
    artefacts.check_free(out, force)
    alone = claimed(out, "fine-tuning into") if leads() else nullcontext()
    with alone, lab.start("finetune", config, name=out.name) as run:
        if settings.select_on == "report":
            run.note("saw", "labelled report inputs")
        run.input("base", source.ref, source.weights.digest if source.weights is not None else None)
        for entry in () if masked is None else masked.inputs:
            run.input(**entry)
        with lab.terminal.progress(f"Fine-tuning {task.id}") as progress:
            result = finetune(settings, out, data=lab.data, run=run, progress=progress, force=force, task=task)
        record_model(run, out, open_checkpoint(out).digest)
    return {"run": run.id, "task": task.id, "out": str(out), "again": False, **result}


def _cut_short(lab: Lab, config: Mapping[str, Any], out: Path) -> bool:
    """Whether `out` was written by a run of exactly this work that was killed before its end, so that nobody has it."""
    from mergectl.artefacts import MODEL
    from mergectl.store import digest_of

    if not any((out / name).exists() for name in MODEL) or not (wrote := open_checkpoint(out).meta.get("run")):
        return False
    run = lab.store.find(wrote)
    return run is not None and run["status"] != "finished" and run["config_digest"] == digest_of(dict(config))
