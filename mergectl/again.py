"""Make a merge anew from its record, and say whether the weights are the same bit by bit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergectl import artefacts
from mergectl.checkpoints import INDEX, SINGLE, Checkpoint
from mergectl.digests import blake3
from mergectl.errors import UserError, WorkError
from mergectl.families import Family, open_family
from mergectl.jsonfiles import read_json, read_record
from mergectl.lab import Lab, versions
from mergectl.merge import DTYPES, MergeJob, merge
from mergectl.publish import Target
from mergectl.refs import ref_of
from mergectl.supplies import supplies_of
from mergectl.tensorfiles import SHARD_BYTES
from mergectl.verbs import Result, merge_models

PLACES = ("ref", "model", "base", "runs", "front", "back", "frame")  # in what a record says of a model: where it lies
FOR_TASKS = ("unified.safetensors", "tasks/*/*.safetensors", "tasks/*/task.json")


def show_again(lab: Lab, folder: Path, target: Target) -> None:
    """Make a recorded merge anew, push it if asked to, and say that it is the same."""
    target.check()
    result = merge_again(lab, folder, target.out, force=target.force) | target.finish()
    lab.terminal.give(result, lambda: print(f"The weights of {folder}, made anew, are the same bit by bit."))


def merge_again(lab: Lab, folder: Path, out: Path | None, *, force: bool = False) -> Result:
    """Make the merge recorded in `folder` into `out` (without one: beside it, only to compare) and compare."""
    record = record_of(folder)
    odd = remake(lab, record, folder, out, force=force)
    if odd is not None:
        raise WorkError(f"The weights made anew are not those of {folder}: {odd}.{other_versions(record)}")
    return {"folder": str(folder), "out": None if out is None else str(out), "identical": True}


def record_of(folder: Path) -> dict[str, Any]:
    """The record that a merge left beside its weights."""
    if not (folder / "mergectl.json").exists():
        raise UserError(f"{folder} has no mergectl.json, so there is no record of how it was merged.")
    try:
        record = read_record(folder)
    except UserError as error:
        raise UserError(f"{folder / 'mergectl.json'} is no whole record of a merge. {error}") from error
    if kind := (record.get("output") or {}).get("adapter"):
        raise UserError(f"{folder} is a merged adapter ({kind}). Only merged models can be made anew.")
    return dict(record)


def remake(lab: Lab, record: Mapping[str, Any], folder: Path, out: Path | None, *, force: bool = False) -> str | None:
    """Merge as a record says and return what differs from the weights in `folder`; None if nothing."""
    job = job_of(record, folder)
    lab = replace(lab, seed=job.recipe.seed)
    family = open_family(job.base, job.experts, lab.find_run)
    check_inputs(record, family)
    if out is not None:
        merge_models(lab, job, out, force=force)
        return difference(folder, out, record)
    return _compare(lab, job, family, folder, record)


def _compare(lab: Lab, job: MergeJob, family: Family, folder: Path, record: Mapping[str, Any]) -> str | None:
    """Merge into a folder that is removed afterwards."""
    device = lab.merge_device()
    with artefacts.beside(folder) as work:
        made = work / "model"
        supplies = supplies_of(lab, family, job.recipe, job.options)
        with lab.terminal.progress(f"Merging {family.counted} by {job.recipe.method} again") as progress:
            how: dict[str, Any] = {"progress": progress, "device": device, "supplies": supplies}
            merge(job, family, made, facts={"versions": versions()}, force=False, **how)
        return difference(folder, made, record)


def job_of(record: Mapping[str, Any], folder: Path) -> MergeJob:
    """The merge that a record describes."""
    from mergectl.plan import recipe_of

    try:
        recipe, output = record["recipe"], record.get("output") or {}
        there = folder.resolve().parent / record.get("working_folder", ".")
        inputs = [_found(row, there) for row in record["inputs"]]
        base = next((ref_of(row) for row in inputs if row["role"] == "base"), None)
        refs = [ref_of(row) for row in inputs if row["role"] == "expert"]
        refine = [(step["name"], step["settings"]) for step in recipe["refine"]]
        names = [task if task.rsplit("/", 1)[-1] == short else short for short, task in record["tasks"].items()]
        dtype = output.get("dtype") or "auto"
        if dtype != "auto" and dtype not in DTYPES:
            raise ValueError(f"output.dtype {dtype!r}")
        return MergeJob(
            recipe_of(recipe["method"], recipe["settings"], refine, recipe["seed"]),
            tuple(zip(names, refs, strict=True)), base, dtype, output.get("export"),
            output.get("shard_bytes") or SHARD_BYTES, output.get("options") or {},
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / 'mergectl.json'} is no whole record of a merge ({error!r}).") from error


def _found(value: Any, there: Path, *, place: bool = False) -> Any:
    """What a record says of a model, its relative paths that lead nowhere from here as they led from `there`."""
    if isinstance(value, Mapping):
        return {key: _found(part, there, place=key in PLACES) for key, part in value.items()}
    if isinstance(value, list):
        return [_found(part, there, place=place) for part in value]
    if not place or not isinstance(value, str) or os.path.exists(value) or not os.path.exists(there / value):
        return value
    return os.path.normpath(there / value)


def check_inputs(record: Mapping[str, Any], family: Family) -> None:
    """Refuse inputs that are no longer what was merged."""
    for then, now in zip(record["inputs"], family.inputs, strict=True):
        if then["digest"] != now["digest"]:
            who = "the base" if now["role"] == "base" else f"the expert for {now['task']}"
            raise UserError(
                f"{now['ref']}, {who}, has changed since it was merged (digest {str(now['digest'])[:12]}, "
                f"then {str(then['digest'])[:12]}). Bring back what it was, or merge anew."
            )


def difference(old: Path, new: Path, record: Mapping[str, Any]) -> str | None:
    """What is not the same in two models' weights, bit by bit; None if nothing. Shards may be cut differently."""
    made = Checkpoint(new, str(new))
    if not any((old / name).exists() for name in (SINGLE, INDEX)):
        then = record.get("output", {}).get("digest")
        return None if made.digest == then else f"its digest is {made.digest[:12]}, the record says {str(then)[:12]}"
    return _other_weight(Checkpoint(old, str(old)), made) or _other_for_a_task(old, new)


def _other_weight(kept: Checkpoint, made: Checkpoint) -> str | None:
    import torch

    if odd := sorted(set(kept) ^ set(made)):
        return f"'{odd[0]}' is in one of them only"
    for name in kept:
        ours, theirs = made[name], kept[name]
        same = (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        if not same or not torch.equal(ours.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8)):
            return f"'{name}' differs"
    return None


def _other_for_a_task(old: Path, new: Path) -> str | None:
    """What differs of that which is kept for the tasks: heads, masks, what the masks are put on, and rescalers."""
    files = [{str(path.relative_to(folder)) for pattern in FOR_TASKS for path in folder.glob(pattern)}
             for folder in (old, new)]  # fmt: skip
    if odd := sorted(files[0] ^ files[1]):
        return f"{odd[0]} is in one of them only"
    for name in sorted(files[0]):
        one, other = old / name, new / name
        if name.endswith(".json"):
            same = read_json(one).get("rescaler") == read_json(other).get("rescaler")
        else:
            same = blake3(one) == blake3(other)
        if not same:
            return f"{name} differs"
    return None


def other_versions(record: Mapping[str, Any]) -> str:
    """The versions that differ from those of the first time."""
    then, now = record.get("versions", {}), versions()
    odd = [f"{name} {then[name]} then, {now.get(name)} now" for name in then if then[name] != now.get(name)]
    return f" Versions differ: {'; '.join(odd)}." if odd else ""
