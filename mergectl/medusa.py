"""Fine-tune experts that cannot collide: short trainings, ownership masks, then trainings of what each one owns.

Every step is a run of its own, and one that a finished run already did is not done again: a killed command goes on
where it was.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergectl import __version__
from mergectl.bits import pack_bits
from mergectl.checkpoints import open_checkpoint
from mergectl.digests import blake3
from mergectl.errors import UserError
from mergectl.families import short_names
from mergectl.lab import Lab
from mergectl.ownership import TOP_K, MaskPlan, Ownership, load_masks, make_masks, save_masks
from mergectl.presets import settled
from mergectl.ranks import count, leads, wait_for_all
from mergectl.verbs import Masked, Result, base_source, finetune_experts

if TYPE_CHECKING:
    from mergectl.benchmarks._contract import Task
    from mergectl.division import Division
    from mergectl.finetune_config import FinetuneConfig
    from mergectl.models import Source

Input = dict[str, Any]


@dataclass(frozen=True)
class MedusaJob:
    """What a Medusa fine-tuning is told besides the settings of every fine-tuning."""

    against: tuple[str, ...] = ()  # finished models that the branches must not oppose
    mask: str = "soft"
    top_k: float | None = None  # None: 87.5, with adapters 100
    prepass_epochs: float = 1.0
    prepass_percent: float | None = None  # of each task's own epochs, or steps, in place of a number
    unowned: str = "freeze"

    def __post_init__(self) -> None:
        if self.prepass_percent is not None and not 0 < self.prepass_percent <= 100:
            raise UserError(f"prepass_percent must lie above 0 and at most be 100, got {self.prepass_percent:g}.")
        if not 0 < self.prepass_epochs <= 10**6:
            raise UserError(f"prepass_epochs must be above 0, got {self.prepass_epochs:g}.")
        idle = [
            name
            for name in ("top_k", "unowned", "prepass_epochs", "prepass_percent")
            if getattr(self, name) != getattr(type(self), name)
        ]
        if self.mask == "half" and idle:
            raise UserError(f"mask=half gives away whole rows, so {idle[0]} has no meaning beside it. Leave it out.")

    @property
    def short(self) -> dict[str, Any]:
        """How long the short trainings are."""
        whole = {"patience": None, "eval_every": None}
        if self.prepass_percent is not None:
            return {**whole, "prepass_percent": self.prepass_percent}
        return {**whole, "max_steps": None, "epochs": self.prepass_epochs}

    def plan(self, peft: str, seed: int) -> MaskPlan:
        """How ownership is decided."""
        return MaskPlan(self.mask, TOP_K[peft] if self.top_k is None else self.top_k, self.unowned, seed)


OWN_OPTIONS = tuple(field.name for field in fields(MedusaJob))


@dataclass(frozen=True)
class _Work:
    """One Medusa fine-tuning between its trainings."""

    source: Source
    tasks: list[Task]
    configs: list[FinetuneConfig]  # of each task
    plan: MaskPlan
    references: list[str]
    out: Path

    @property
    def config(self) -> FinetuneConfig:
        """That of the first task: what decides about adapters is the same for all."""
        return self.configs[0]

    @property
    def files(self) -> dict[str, Path]:
        """The masks of each task."""
        ids = [task.id for task in self.tasks]
        names = zip(ids, short_names(ids), strict=True)
        return {task: self.out / "masks" / f"{name}.safetensors" for task, name in names}


def finetune_for_medusa(
    lab: Lab, words: Sequence[str], base: str, out: Path, options: Mapping[str, Any], job: MedusaJob,
    *, force: bool = False, reuse: bool = False,
) -> list[Result]:  # fmt: skip
    """Train `out/prepass/<task>`, make `out/masks/<task>.safetensors`, then train `out/<task>` within the masks.

    Masks that do not depend on what a task would change need no short trainings.
    """
    work = _checked(lab, words, base, out, options, job)
    how: dict[str, Any] = {"force": force, "reuse": reuse, "again": True}
    prepasses = []
    if work.plan.asks_trainings:
        lab.terminal.say("Short trainings, which show what each task would change")
        prepasses = _prepasses(lab, work, base, {**options, **job.short}, job, options.get("max_steps"), how)
    masked = _masks(lab, work, prepasses, force=force or reuse)
    lab.terminal.say("Trainings from the base again, each of what its task owns")
    results = finetune_experts(lab, words, base, out, options, masked=masked, **how)
    return [{**result, "masks": str(masked[result["task"]].file)} for result in results]


def _prepasses(
    lab: Lab, work: _Work, base: str, options: Mapping[str, Any], job: MedusaJob, most: int | None, how: dict[str, Any]
) -> list[Result]:
    """Train each task briefly: as the options say, or for `most` steps where those are fewer."""
    short = [] if most is None or job.prepass_percent is not None else _longer_than(most, lab, work, job.prepass_epochs)
    found: dict[str, Result] = {}
    for own, more in (([task.id for task in work.tasks if task.id not in short], {}), (short, {"max_steps": most})):
        results = finetune_experts(lab, own, base, work.out / "prepass", {**options, **more}, **how) if own else []
        found |= {result["task"]: result for result in results}
    return [found[task.id] for task in work.tasks]


def _longer_than(steps: int, lab: Lab, work: _Work, epochs: float) -> list[str]:
    """The tasks of which so many epochs take more than so many steps."""
    from mergectl.benchmarks import _rows

    found = []
    for task, config in zip(work.tasks, work.configs, strict=True):
        rows = _rows.load(task, "fit", data=lab.data, limit=config.limit_fit, seed=config.seed)
        if steps < epochs * math.ceil(len(rows.labels) / (config.batch_size * config.accumulation * count())):
            found.append(task.id)
    return found


def _checked(lab: Lab, words: Sequence[str], base: str, out: Path, options: Mapping[str, Any], job: MedusaJob) -> _Work:
    """Refuse before any training what could not be done."""
    from mergectl import division
    from mergectl.finetune_config import FinetuneConfig

    tasks, source = lab.tasks(words), base_source(lab, base)
    if source.weights is None or options.get("from_scratch"):
        raise UserError("Medusa divides the weights of a base, so it needs one that has weights. Train one first.")
    settings = [settled(task.id, source.config, options) for task in tasks]
    configs = [FinetuneConfig(task=task.id, base=str(source.folder), seed=lab.seed, **s)
               for task, s in zip(tasks, settings, strict=True)]  # fmt: skip
    plan = job.plan(configs[0].peft, lab.seed)
    plan.check(len(tasks), len(job.against))
    references = [str(open_checkpoint(ref, lab.find_run).folder) for ref in job.against]
    if references:
        division.of(source, tasks[0], configs[0], {}, references)
    return _Work(source, tasks, configs, plan, references, out)


def _masks(lab: Lab, work: _Work, prepasses: Sequence[Result], *, force: bool) -> dict[str, Masked]:
    """Make the masks, as a run of their own, or find them made; by task id, with the lineage of a masked training."""
    inputs: list[Input] = [{"role": "base", "ref": work.source.ref, "digest": _digest(str(work.source.folder))}]
    inputs += [
        {"role": "prepass", "ref": r["out"], "digest": _digest(r["out"]), "task": r["task"], "run_id": r["run"]}
        for r in prepasses
    ]
    inputs += [{"role": "reference", "ref": ref, "digest": _digest(ref)} for ref in work.references]
    made_of = [(entry["role"], entry.get("task"), entry["digest"]) for entry in inputs]
    config = {**asdict(work.plan), "peft": work.config.peft, "inputs": made_of, "version": __version__}
    run_id = _done(lab, config, work.files) if leads() else None
    if run_id is None and leads():
        run_id = _make(lab, work, config, inputs, {r["task"]: Path(r["out"]) for r in prepasses}, force=force)
    wait_for_all()
    found = {}
    for task, file in work.files.items():
        digest = blake3(file).hex()
        own = {"role": "masks", "ref": str(file), "digest": digest, "task": task, "run_id": run_id}
        found[task] = Masked(file, digest, (*(entry for entry in inputs if entry.get("task") == task), own))
    return found


def _digest(ref: str) -> str:
    return open_checkpoint(ref).digest


def _done(lab: Lab, config: Mapping[str, Any], files: Mapping[str, Path]) -> str | None:
    """The finished run that made exactly these masks, if they still lie there as it wrote them."""
    from mergectl.store import digest_of

    run = lab.store.finished(digest_of(dict(config)), kind="masks")
    if run is None or not all(file.exists() for file in files.values()):
        return None
    made = {artifact["digest"] for artifact in run["artifacts"]}
    return str(run["run_id"]) if made == {blake3(file).hex() for file in files.values()} else None


def _make(
    lab: Lab, work: _Work, config: Mapping[str, Any], inputs: Sequence[Input], folders: Mapping[str, Path],
    *, force: bool,
) -> str:  # fmt: skip
    """Decide who owns what and write one file of masks per task; return the run's id.

    What is refused leaves no run: masks that lie there already are compared before one is opened.
    """
    models, place, found = _division(work, folders), work.out / "masks", None
    lab.terminal.say(f"Masks: dividing the model's elements among {', '.join(work.files)}")
    if place.exists() and not force:
        found = make_masks(models.base, models.branches, models.references, work.plan, models.order)
        if not _lie_there(found, work.files):
            raise UserError(f"{place} holds the masks of another job. Choose another -o, or replace them with --force.")
    with lab.start("masks", config, seed=work.plan.seed, name=f"masks-{work.plan.kind}", inputs=inputs) as run:
        found = found or make_masks(models.base, models.branches, models.references, work.plan, models.order)
        if not _lie_there(found, work.files):
            _write(place, found, work.files)
        _record(run, found, work.files)
    for line in _owners(found):
        lab.terminal.say(line)
    return str(run.id)


def _division(work: _Work, folders: Mapping[str, Path]) -> Division:
    """The models that the masks are made from, opened."""
    from mergectl import division

    if folders:
        return division.of(work.source, work.tasks[0], work.config, folders, work.references)
    return division.untrained(work.source, work.tasks, work.config)


def _owners(found: Ownership) -> list[str]:
    """What the masks say, for a person."""
    owned = [f"{task} owns {100 * share:.1f} %" for task, share in found.shares.items()]
    lines = [f"{', '.join(owned)}, nobody {100 * found.nobody:.1f} %"]
    return lines + ([f"taken of the finished models: {found.chosen}"] if found.chosen else [])


def _lie_there(found: Ownership, files: Mapping[str, Path]) -> bool:
    """Whether exactly these masks were written already, by a run that was killed before its end."""
    import torch

    for task, file in files.items():
        there = dict(load_masks(file)) if file.exists() else {}
        if list(there) != list(found.bits[task]):
            return False
        if not all(torch.equal(pack_bits(mask), found.bits[task][name]) for name, mask in there.items()):
            return False
    return True


def _write(place: Path, found: Ownership, files: Mapping[str, Path]) -> None:
    """Write all masks or none."""
    from mergectl import artefacts

    shutil.rmtree(place, ignore_errors=True)
    with artefacts.new_folder(place) as folder:
        for task, file in files.items():
            save_masks(folder / file.name, found.bits[task], found.shapes)


def _record(run: Any, found: Ownership, files: Mapping[str, Path]) -> None:
    """Store the masks, and what they say about the branches."""
    for task, file in files.items():
        run.artifact("masks", str(file.absolute()), blake3(file).hex(), file.stat().st_size)
        run.metric("owned_share", found.shares[task], task=task)
    run.metric("unowned_share", found.nobody)
    for reference, share in found.opposed.items():
        run.metric("sign_conflict", share, task=reference)
    if found.chosen is not None:
        run.note("chosen", found.chosen)
