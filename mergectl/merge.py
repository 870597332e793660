"""Merge checkpoints on disk: line up, check everything, stream the method's weights into a new model folder."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergectl import artefacts
from mergectl.checkpoints import Checkpoint
from mergectl.errors import UserError
from mergectl.families import Family
from mergectl.pool import keep_freed_memory
from mergectl.refs import Ref
from mergectl.tensorfiles import SHARD_BYTES
from mergectl.terminal import Progress

if TYPE_CHECKING:
    from mergectl.plan import Recipe

WIDTH = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


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
    experts: tuple[tuple[str | None, Ref], ...]  # (task, model); the task may be left to the model's own record
    base: Ref | None = None
    dtype: str = "auto"
    export: str | None = None  # write one task's dense stand-alone checkpoint instead of the shared model
    shard_bytes: int = SHARD_BYTES  # a model file grows no larger than this
    options: Mapping[str, Any] = field(default_factory=dict)  # for what the lab supplies to the method, by name


def merge(
    job: MergeJob, family: Family, out: Path, *, facts: Mapping[str, Any], force: bool, progress: Progress,
    device: str = "cpu", supplies: Mapping[str, Any] | None = None,
) -> str:  # fmt: skip
    """Merge `family` as `job` says, with what the lab supplies, into the folder `out`; return the result's digest."""
    from mergectl.merging import merge_stream
    from mergectl.records import write_records
    from mergectl.writing import Form, write_one_task, write_shared

    keep_freed_memory()
    if job.export is not None and job.export not in family.experts:
        raise UserError(f"--export {job.export}: the experts are {', '.join(family.experts)}.")
    base = family.population.base if family.has_base else None
    dtypes = out_dtypes(job.dtype, family)
    form = Form(dtypes, most_common(dtypes, family), job.dtype != "auto", job.shard_bytes)
    stream = merge_stream(job.recipe, base, family.population.experts, supplies=supplies, device=device)
    with artefacts.new_folder(out, force=force) as folder:
        with artefacts.saving(folder):
            if job.export is None:
                write_shared(family, stream, folder, form, progress)
            else:
                write_one_task(job.export, family, stream, folder, form, progress)
            family.check_unchanged()
        with ThreadPoolExecutor(1) as disk:  # the disk takes the weights while their digest is computed
            saved = disk.submit(artefacts.sync_all, folder)
            digest = Checkpoint(folder, str(out)).digest
            saved.result()
        output: dict[str, Any] = {"dtype": job.dtype, "export": job.export, "shard_bytes": job.shard_bytes}
        output |= {"digest": digest, "options": dict(job.options)}
        write_records(described(job.recipe), output, family, folder, facts)
    return digest


def out_dtypes(choice: str, family: Family) -> dict[str, str]:
    """Per weight: `auto` is the narrowest type that holds those of base and experts, so that no task vector is lost."""
    models = [family.population.base, *family.population.experts.values()]
    if choice != "auto":
        return dict.fromkeys(models[0], DTYPES[choice])
    words = {name: {model.dtype(name) for model in models} for name in models[0]}
    # Neither of the types of 16 bits holds the other's numbers.
    return {n: "F32" if found == {"F16", "BF16"} else max(found, key=WIDTH.__getitem__) for n, found in words.items()}


def most_common(dtypes: Mapping[str, str], family: Family) -> str:
    """Return the type of most of the numbers."""
    found = Counter[str]()
    for name, dtype in dtypes.items():
        found[dtype] += math.prod(family.population.base.shape(name))
    return found.most_common(1)[0][0]
