"""Merge adapters into an adapter that `PeftModel.from_pretrained` loads."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergectl import artefacts
from mergectl.adapter_modes import FACTORS, MODES, apart, merge_ia3, merge_lora
from mergectl.adapters import START, AdapterCheckpoint
from mergectl.checkpoints import open_checkpoint
from mergectl.errors import UserError, did_you_mean
from mergectl.families import Family, open_family
from mergectl.lab import Lab, versions
from mergectl.merge import MergeJob, checked, described
from mergectl.supplies import asked_by
from mergectl.verbs import Check, Result, merge_config, record_inputs, record_model, spare_inputs

if TYPE_CHECKING:
    import torch

# What the lab measures of whole models on rows, for methods that ask for it.
MEASURED = {"fishers": "Fisher information", "grams": "second moments of inputs", "entropy": "prediction entropy"}


def merge_adapters(
    lab: Lab, job: MergeJob, out: Path, rank: int | None, mode: str | None = None,
    *, force: bool = False, reuse: bool = False, check: Check | None = None,
) -> Result:  # fmt: skip
    """Merge adapters of one base into the adapter folder `out`; with `reuse`, not again if a finished run did this."""
    family = open_family(job.base, job.experts, lab.find_run)
    if check is not None:
        check(family)
    recipe = checked(job.recipe, list(family.experts))
    if measured := [name for name in asked_by(recipe, family) if name in MEASURED]:
        raise UserError(
            f"{recipe.method} needs {MEASURED[measured[0]]}, which is measured on whole models. Leave out --adapter to "
            "merge the models that the adapters stand for."
        )
    adapters = checked_adapters(family, rank, mode)
    kind = next(iter(adapters.values())).kind
    mode = (mode or "product") if kind == "LORA" else None
    config = {**merge_config(job, family, recipe), "adapter": kind, "rank": rank, "mode": mode}
    if reuse and (done := lab.done("merge", config, recipe.seed, out)):
        return {"run": done["run_id"], "out": str(out), "again": True}
    artefacts.check_free(out, force or reuse)
    spare_inputs(family, out)
    with lab.start("merge", config, seed=recipe.seed, name=out.name) as run:
        record_inputs(run, family)
        lab.terminal.say(f"Merging {len(adapters)} adapters by {recipe.method}")
        weights, settings, kept = _made(adapters, recipe, rank, mode)
        run.metric("kept_energy", kept)
        facts = {"run": run.id, "versions": versions(), "kept_energy": kept, "adapter_mode": mode}
        _write(out, replace(job, recipe=recipe), family, weights, settings, facts, force=force or reuse)
        digest = open_checkpoint(out).digest
        record_model(run, out, digest)
    return {"run": run.id, "out": str(out), "digest": digest, "kept_energy": kept, "again": False}


def checked_adapters(family: Family, rank: int | None, mode: str | None) -> dict[str, AdapterCheckpoint]:
    """The experts as adapters; refuse what cannot become one adapter."""
    found = {task: expert for task, expert in family.experts.items() if isinstance(expert, AdapterCheckpoint)}
    lacking = [family.experts[task].ref for task in family.experts if task not in found]
    if lacking:
        raise UserError(f"{lacking[0]} is a whole model. --adapter merges adapters only; leave it out to merge models.")
    first = next(iter(found.values()))
    for expert in found.values():
        if expert.head_names:
            raise UserError(
                f"{expert.ref} holds a trained head ('{expert.head_names[0]}'), and one adapter cannot hold several. "
                "Leave out --adapter to merge the models that the adapters stand for."
            )
        if (expert.kind, set(expert.modules)) != (first.kind, set(first.modules)):
            raise UserError(f"{expert.ref} and {first.ref} adapt different modules, or in different ways.")
        odd = {part for parts in expert.modules.values() for part in parts} - {"lora_A", "lora_B", "ia3_l"}
        if odd:
            raise UserError(
                f"{expert.ref} has '{min(odd)}' besides plain factors. Leave out --adapter to merge models."
            )
        if kernel := next((m for m in expert.modules if len(expert.part_shape(m)) > 2), None):
            raise UserError(
                f"{expert.ref} adapts the convolution '{kernel}', and only adapters of matrices are merged as such. "
                "Leave out --adapter to merge the models that the adapters stand for."
            )
    given = "--adapter-rank" if rank is not None else "--adapter-mode"
    if first.kind == "IA3" and (rank is not None or mode is not None):
        raise UserError(f"{given} is for LoRA; IA3 adapters are vectors.")
    if mode == FACTORS and (reason := apart(found)):
        raise UserError(f"{reason} Take another --adapter-mode, or adapters that one `finetune` began alike.")
    return found


def _made(
    adapters: Mapping[str, AdapterCheckpoint], recipe: Any, rank: int | None, mode: str | None
) -> tuple[dict[str, torch.Tensor], dict[str, Any], float]:
    """The merged adapter's weights, what its settings change, and the share of the squared norm that is kept."""
    if mode is None:
        return merge_ia3(adapters, recipe), {}, 1.0
    return merge_lora(adapters, recipe, rank, mode)


def _write(
    out: Path, job: MergeJob, family: Family, weights: Mapping[str, torch.Tensor], settings: Mapping[str, Any],
    facts: Mapping[str, Any], *, force: bool,
) -> None:  # fmt: skip
    """Write what `PeftModel.from_pretrained` loads, the tokenizer, and the record."""
    from safetensors.torch import save_file

    from mergectl.records import write_records

    first = next(iter(family.experts.values()))
    assert isinstance(first, AdapterCheckpoint)
    with artefacts.new_folder(out, force=force) as folder:
        save_file(dict(weights), folder / "adapter_model.safetensors", metadata={"format": "pt"})
        told = {**first.settings, **settings, "base_model_name_or_path": str(first.base.folder.absolute())}
        (folder / "adapter_config.json").write_text(json.dumps(told, indent=2), encoding="utf-8")
        artefacts.carry_files(folder, first.folder, first.base.folder)
        if facts["adapter_mode"] == FACTORS:
            shutil.copyfile(first.folder / START, folder / START)  # so that the result may be merged in its turn
        output = {"dtype": job.dtype, "export": None, "shard_bytes": job.shard_bytes, "adapter": told["peft_type"]}
        write_records(described(job.recipe), output, family, folder, facts)
        family.check_unchanged()


def making(adapter: bool, rank: int | None, mode: str | None, others: Sequence[str]) -> Callable[..., Result] | None:
    """What merges if adapters are asked for; refuse words that have no meaning for them, and their own without them."""
    given = [name for name, value in (("rank", rank), ("mode", mode)) if value is not None]
    if not adapter and given:
        raise UserError(f"--adapter-{given[0]} is for merged LoRA adapters. Add --adapter.")
    if not adapter:
        return None
    if others:
        raise UserError(f"--{others[0]} has no meaning for adapters. Leave it out, or --adapter.")
    if rank is not None and rank < 1:
        raise UserError(f"--adapter-rank must be at least 1, got {rank}.")
    if mode is not None and mode not in MODES:
        raise UserError(f"--adapter-mode must be one of {', '.join(MODES)}, got '{mode}'.{did_you_mean(mode, MODES)}")
    if mode == FACTORS and rank is not None:
        raise UserError(f"--adapter-rank has no meaning for {FACTORS}, which keep their rank. Leave it out.")
    return functools.partial(merge_adapters, rank=rank, mode=mode)
