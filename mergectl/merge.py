"""Merge checkpoints on disk: line up, check everything, stream the method's weights into a new model folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergectl import artefacts
from mergectl.bits import pack_bits, packed_size
from mergectl.checkpoints import Checkpoint, open_checkpoint
from mergectl.errors import UserError
from mergectl.families import Population, headed_prefix, line_up, short_names

if TYPE_CHECKING:
    import torch

    from mergectl.merging import Stream
    from mergectl.plan import Recipe

WIDTH = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
Progress = Callable[[int, int, str], None]


def recipe_of(method: str, settings: Mapping[str, Any], refine: Sequence[Any], seed: int) -> Recipe:
    """A recipe from words: refinements are `dare:drop=0.9`, or {name: settings} as recipe files write them."""
    from mergectl.plan import Recipe, parse_refine

    parts = [part if isinstance(part, str) else next(iter(part.items())) for part in refine]
    return Recipe(method.replace("-", "_"), dict(settings), parse_refine(parts), seed)


def described(recipe: Recipe) -> dict[str, Any]:
    """A recipe as the store and `mergectl.json` keep it."""
    refine = [{"name": name, "settings": dict(settings)} for name, settings in recipe.refine]
    return {"method": recipe.method, "settings": dict(recipe.settings), "refine": refine, "seed": recipe.seed}


def checked(recipe: Recipe, tasks: Sequence[str]) -> Recipe:
    """The recipe with every setting checked and filled in, so that the record says what was done."""
    from mergectl.settings import check

    refine = tuple((name, check(name, settings, tasks)) for name, settings in recipe.refine)
    return replace(recipe, settings=check(recipe.method, recipe.settings, tasks), refine=refine)


@dataclass(frozen=True)
class MergeJob:
    """All that decides what a merged model is."""

    recipe: Recipe
    experts: tuple[tuple[str | None, str], ...]  # (task, model); the task may be left to the model's own record
    base: str | None = None
    dtype: str = "auto"
    export: str | None = None  # write one task's dense stand-alone checkpoint instead of the shared model


@dataclass(frozen=True)
class Family:
    """The opened checkpoints of one merge, lined up."""

    base: Checkpoint
    experts: dict[str, Checkpoint]  # short task name -> expert
    task_ids: dict[str, str]  # short task name -> `suite/task` where known
    population: Population
    has_base: bool = True
    inputs: tuple[dict[str, Any], ...] = field(default=())


def named(items: Sequence[str] | Mapping[str, str]) -> tuple[tuple[str | None, str], ...]:
    """Experts as (task or None, model): from a list of `model` or `task=model`, or a mapping."""
    if isinstance(items, Mapping):
        return tuple(items.items())
    return tuple(_split(item) for item in items)


def _split(item: str) -> tuple[str | None, str]:
    task, equals, ref = item.partition("=")
    if not equals or Path(item).is_dir():
        return None, item
    return task, ref


def open_family(
    base_ref: str | None,
    experts: Sequence[tuple[str | None, str]],
    find_run: Callable[[str], Path | None] | None = None,
) -> Family:
    """Open a base and its experts and line them up; headers are read, weights are not."""
    if not experts:
        raise UserError("Name the models to merge: --experts MODEL MODEL ...")
    opened = [(task, open_checkpoint(ref, find_run)) for task, ref in experts]
    ids = [task or expert.task or expert.label for task, expert in opened]
    shorts = short_names(ids)
    by_task = {short: expert for short, (_, expert) in zip(shorts, opened, strict=True)}
    base_ref = base_ref or opened[0][1].meta.get("base")
    base = open_checkpoint(base_ref, find_run) if base_ref else opened[0][1]
    population = line_up(base, by_task)
    known = {short: expert.task or task for short, task, (_, expert) in zip(shorts, ids, opened, strict=True)}
    return Family(
        base, by_task, known, population, base_ref is not None, _inputs(base if base_ref else None, by_task, known)
    )


def _inputs(
    base: Checkpoint | None, experts: Mapping[str, Checkpoint], ids: Mapping[str, str]
) -> tuple[dict[str, Any], ...]:
    rows = [] if base is None else [{"role": "base", "task": None, "ref": str(base.ref), "digest": base.digest}]
    return (
        *rows,
        *({"role": "expert", "task": ids[t], "ref": str(e.ref), "digest": e.digest} for t, e in experts.items()),
    )


def merge(
    job: MergeJob, family: Family, out: Path, *, facts: Mapping[str, Any], force: bool, progress: Progress
) -> str:
    """Merge `family` as `job` says into the folder `out`; return the digest of the result."""
    from mergectl.merging import merge_stream

    if job.export is not None and job.export not in family.experts:
        raise UserError(f"--export {job.export}: the experts are {', '.join(family.experts)}.")
    base = family.population.base if family.has_base else None
    stream = merge_stream(job.recipe, base, family.population.experts)
    with artefacts.new_folder(out, force=force) as folder:
        if job.export is None:
            _write_shared(job, family, stream, folder, progress)
        else:
            _write_one_task(job, family, stream, folder, progress)
        _write_records(job, family, folder, facts)
    return Checkpoint(out, str(out)).digest


def _write_shared(job: MergeJob, family: Family, stream: Stream, folder: Path, progress: Progress) -> None:
    """The shared backbone under the base's names, heads and what is kept per task beside it."""
    base, names = family.base, family.population.base.own_name
    shapes = {own: base.shape(own) for own in _kept_names(family)}
    dtypes = {own: base.dtype(own) for own in shapes} | dict.fromkeys(names.values(), out_dtype(job.dtype, family))
    writer = artefacts.SafetensorsWriter(folder / "model.safetensors", shapes, dtypes)
    kept = _Kept(folder, family)
    for done, piece in enumerate(stream, 1):
        writer.write(names[piece.name], piece.weight)
        kept.add(piece.name, piece.delta, piece.masks)
        progress(done, len(names), piece.name)
    for own in family.population.carried:
        if own in shapes:
            writer.write(own, base[own])
    writer.close()
    kept.close()
    for task in family.experts:
        _write_head(family, task, folder / "tasks" / task, (stream.rescalers or {}).get(task))
    artefacts.write_json(folder / "config.json", _shared_config(family))
    artefacts.carry_files(base.folder, folder)
    if not (folder / "tokenizer.json").exists():
        artefacts.carry_files(next(iter(family.experts.values())).folder, folder)


def _kept_names(family: Family) -> list[str]:
    """The names that the result holds: all of the base's, or, without a base, the experts' backbone."""
    if family.has_base:
        return family.base.names
    heads = {name for names in family.population.heads.values() for name in names}
    prefix = headed_prefix(family.base)
    return [name for name in family.base.names if name not in heads and name.startswith(prefix)]


def _shared_config(family: Family) -> dict[str, Any]:
    return {key: value for key, value in family.base.config.items() if key not in ("_name_or_path",)}


def out_dtype(choice: str, family: Family) -> str:
    """`auto` is the widest type among base and experts, so that a half-precision base loses no task vector."""
    if choice != "auto":
        return DTYPES[choice]
    view = family.population.base
    words = [family.base.dtype(own) for own in view.own_name.values()]
    for expert in family.population.experts.values():
        words += [family.experts[_task_of(family, expert)].dtype(own) for own in expert.own_name.values()]
    return max(sorted(set(words)), key=WIDTH.__getitem__)


def _task_of(family: Family, view: object) -> str:
    return next(task for task, other in family.population.experts.items() if other is view)


class _Kept:
    """What a method keeps per task, streamed into `unified.safetensors` and `tasks/<task>/masks.safetensors`."""

    def __init__(self, folder: Path, family: Family) -> None:
        self.folder, self.family = folder, family
        self.writers: list[artefacts.SafetensorsWriter] = []

    def add(self, name: str, delta: torch.Tensor | None, masks: torch.Tensor | None) -> None:
        if delta is None or masks is None:
            return
        if not self.writers:
            self._open()
        self.writers[0].write(name, delta)
        for writer, mask in zip(self.writers[1:], masks, strict=True):
            writer.write(name, pack_bits(mask))

    def _open(self) -> None:
        view, base = self.family.population.base, self.family.base
        shapes = {name: base.shape(own) for name, own in view.own_name.items()}
        packed = {name: (packed_size(shape),) for name, shape in shapes.items()}
        self.writers.append(
            artefacts.SafetensorsWriter(self.folder / "unified.safetensors", shapes, dict.fromkeys(shapes, "F32"))
        )
        for task in self.family.experts:
            path = self.folder / "tasks" / task / "masks.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            self.writers.append(artefacts.SafetensorsWriter(path, packed, dict.fromkeys(packed, "U8")))

    def close(self) -> None:
        for writer in self.writers:
            writer.close()


def _write_head(family: Family, task: str, folder: Path, rescaler: float | None) -> None:
    from safetensors.torch import save_file

    expert = family.experts[task]
    folder.mkdir(parents=True, exist_ok=True)
    head = {name: expert[name].contiguous() for name in family.population.heads[task]}
    save_file(head, folder / "head.safetensors", metadata={"format": "pt"})
    record = {
        "task": family.task_ids[task],
        "labels": expert.meta.get("labels"),
        "kind": expert.meta.get("kind_of_task"),
        "prefix": headed_prefix(expert),
        "expert": str(expert.ref),
        "expert_digest": expert.digest,
    }
    artefacts.write_json(folder / "task.json", record | ({} if rescaler is None else {"rescaler": rescaler}))
    artefacts.write_json(folder / "config.json", expert.config)


def _write_one_task(job: MergeJob, family: Family, stream: Stream, folder: Path, progress: Progress) -> None:
    """The merged weights inside one expert's full model: its names, its head, its config."""
    task = str(job.export)
    expert, view = family.experts[task], family.population.experts[task]
    index = list(family.experts).index(task)
    shapes = {own: expert.shape(own) for own in expert.names}
    dtypes = {own: expert.dtype(own) for own in expert.names}
    dtypes |= dict.fromkeys(view.own_name.values(), out_dtype(job.dtype, family))
    pieces = {}
    writer = artefacts.SafetensorsWriter(folder / "model.safetensors", shapes, dtypes)
    for done, piece in enumerate(stream, 1):
        if piece.masks is None:
            writer.write(view.own_name[piece.name], piece.weight)
        else:
            pieces[piece.name] = (piece.weight - piece.delta, piece.delta * piece.masks[index])
        progress(done, len(shapes), piece.name)
    for name, (start, masked) in pieces.items():
        writer.write(view.own_name[name], start + (stream.rescalers or {})[task] * masked)
    for own in set(expert.names) - set(view.own_name.values()):
        writer.write(own, expert[own])
    writer.close()
    artefacts.write_json(folder / "config.json", expert.config)
    artefacts.carry_files(expert.folder, folder)


def _write_records(job: MergeJob, family: Family, folder: Path, facts: Mapping[str, Any]) -> None:
    record = {
        "kind": "merged" if job.export is None else "expert",
        "recipe": described(job.recipe),
        "inputs": list(family.inputs),
        "tasks": family.task_ids,
        **({} if job.export is None else _task_record(family, job.export)),
        **facts,
    }
    artefacts.write_json(folder / "mergectl.json", record)
    artefacts.write_text(folder / "README.md", card(job, family))


def _task_record(family: Family, task: str) -> dict[str, Any]:
    meta = family.experts[task].meta
    return {"task": family.task_ids[task], "labels": meta.get("labels"), "base": family.base.ref}


def card(job: MergeJob, family: Family) -> str:
    """The model card: what was merged from what, and how to use it."""
    recipe = described(job.recipe)
    lines = [
        "---", "library_name: transformers", "tags: [merge, mergectl]", "---", "",
        f"# Merged with `{recipe['method']}`", "",
        f"Base: `{family.base.ref if family.has_base else 'none'}`", "", "| task | expert |", "| --- | --- |",
        *(f"| {family.task_ids[task]} | `{expert.ref}` |" for task, expert in family.experts.items()), "",
        "Recipe:", "", "```json", json.dumps(recipe, indent=2, default=str), "```", "",
        "The folder is a plain transformers checkpoint: `AutoModel.from_pretrained(folder)`. Each task's head is in",
        "`tasks/<task>/head.safetensors`; `mergectl eval` puts it on by itself, and `mergectl merge ... --export TASK`",
        "writes one stand-alone classifier.", "",
    ]  # fmt: skip
    return "\n".join(lines)
