"""Merge adapters into an adapter: IA3 vectors as they are, LoRA by its products, cut back to factors by an SVD."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergectl import artefacts
from mergectl.adapters import ROOT, AdapterCheckpoint
from mergectl.checkpoints import open_checkpoint
from mergectl.errors import UserError
from mergectl.families import Family, open_family
from mergectl.lab import Lab, versions
from mergectl.merge import MergeJob, checked, described
from mergectl.verbs import Result, merge_config, record_inputs, record_model, spare_inputs

if TYPE_CHECKING:
    import torch

# What a merged LoRA adapter says of itself: its factors carry the scale, and nothing differs by module.
PLAIN_LORA: dict[str, Any] = {
    "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "lora_dropout": 0.0, "init_lora_weights": True,
}  # fmt: skip


class Changes(Mapping[str, "torch.Tensor"]):
    """What an adapter does to each module, computed when it is asked for."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], torch.Tensor]) -> None:
        self._shapes, self._read = shapes, read

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a change, without computing it."""
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        """Always float32."""
        return "F32"


def merge_adapters(lab: Lab, job: MergeJob, out: Path, rank: int | None, *, force: bool = False) -> Result:
    """Merge adapters of one base into the adapter folder `out`."""
    family = open_family(job.base, job.experts, lab.find_run)
    recipe = checked(job.recipe, list(family.experts))
    adapters = checked_adapters(family, rank)
    artefacts.check_free(out, force)
    spare_inputs(family, out)
    kind = next(iter(adapters.values())).kind
    config = {**merge_config(job, family, recipe), "adapter": kind, "rank": rank}
    with lab.start("merge", config, seed=recipe.seed, name=out.name) as run:
        record_inputs(run, family)
        lab.terminal.say(f"Merging {len(adapters)} adapters by {recipe.method}")
        weights, settings, kept = _ia3(adapters, recipe) if kind == "IA3" else _lora(adapters, recipe, rank)
        run.metric("kept_energy", kept)
        facts = {"run": run.id, "versions": versions(), "kept_energy": kept}
        _write(out, replace(job, recipe=recipe), family, weights, settings, facts, force=force)
        digest = open_checkpoint(out).digest
        record_model(run, out, digest)
    return {"run": run.id, "out": str(out), "digest": digest, "kept_energy": kept, "again": False}


def checked_adapters(family: Family, rank: int | None) -> dict[str, AdapterCheckpoint]:
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
    if rank is not None and first.kind == "IA3":
        raise UserError("--adapter-rank is for LoRA; IA3 adapters are vectors.")
    return found


def _merged(
    adapters: Mapping[str, AdapterCheckpoint], recipe: Any, start: float,
    read: Callable[[AdapterCheckpoint, str], torch.Tensor],
) -> Mapping[str, torch.Tensor]:  # fmt: skip
    """What the method makes of the adapters' changes; `start` is what an adapter that changes nothing holds."""
    import torch

    from mergectl.merging import merge_weights

    first = next(iter(adapters.values()))
    shapes = {f"{module}.weight": tuple(read(first, module).shape) for module in first.modules}

    def view(adapter: AdapterCheckpoint) -> Changes:
        return Changes(shapes, lambda name: read(adapter, name.removesuffix(".weight")))

    base = Changes(shapes, lambda name: torch.full(shapes[name], start))
    experts = {task: view(adapter) for task, adapter in adapters.items()}
    found = merge_weights(recipe.method, base, experts, seed=recipe.seed, refine=list(recipe.refine), **recipe.settings)
    if found.kept:
        raise UserError(f"{recipe.method} keeps something for each task, which one adapter cannot hold.")
    return found


Made = tuple[dict[str, "torch.Tensor"], dict[str, Any], float]


def _ia3(adapters: Mapping[str, AdapterCheckpoint], recipe: Any) -> Made:
    """Vectors that multiply: the method works on how far they are from one."""
    found = _merged(adapters, recipe, 1.0, lambda adapter, module: adapter.part(module, "ia3_l"))
    weights = {f"{ROOT}{name.removesuffix('.weight')}.ia3_l": vector.contiguous() for name, vector in found.items()}
    return weights, {}, 1.0


def _lora(adapters: Mapping[str, AdapterCheckpoint], recipe: Any, rank: int | None) -> Made:
    """Products of factors: the method works on them as on weights; the result is the nearest product of a rank."""
    found = _merged(adapters, recipe, 0.0, lambda adapter, module: adapter.product(module))
    modules = {name: name.removesuffix(".weight") for name in found}
    sums = {n: sum(len(adapter.part(m, "lora_A")) for adapter in adapters.values()) for n, m in modules.items()}
    size = max(sums.values()) if rank is None else rank
    weights: dict[str, torch.Tensor] = {}
    kept = total = 0.0
    for name, module in modules.items():
        up, down, energy, whole = factors(found[name], size)
        weights |= {f"{ROOT}{module}.lora_A.weight": down, f"{ROOT}{module}.lora_B.weight": up}
        kept, total = kept + energy, total + whole
    return weights, {**PLAIN_LORA, "r": size, "lora_alpha": size}, kept / total if total else 1.0


def factors(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """The nearest product B A of a rank, its squared norm, and that of the matrix."""
    import torch

    left, values, right = torch.linalg.svd(matrix.float(), full_matrices=False)
    count = min(rank, len(values))
    roots = values[:count].sqrt()
    up, down = torch.zeros(len(matrix), rank), torch.zeros(rank, matrix.shape[1])
    up[:, :count], down[:count] = left[:, :count] * roots, roots[:, None] * right[:count]
    return up, down, float((values[:count] ** 2).sum()), float((values**2).sum())


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
        told = {**first.settings, **settings, "base_model_name_or_path": str(first.base.folder)}
        (folder / "adapter_config.json").write_text(json.dumps(told, indent=2), encoding="utf-8")
        artefacts.carry_files(folder, first.folder, first.base.folder)
        output = {"dtype": job.dtype, "export": None, "shard_bytes": job.shard_bytes, "adapter": told["peft_type"]}
        write_records(described(job.recipe), output, family, folder, facts)


def making(adapter: bool, rank: int | None, others: Sequence[str]) -> Callable[..., Result] | None:
    """What merges if adapters are asked for; refuse words that have no meaning for them, and a rank without them."""
    if not adapter and rank is not None:
        raise UserError("--adapter-rank is the rank of a merged adapter. Add --adapter.")
    if not adapter:
        return None
    if others:
        raise UserError(f"--{others[0]} has no meaning for adapters. Leave it out, or --adapter.")
    if rank is not None and rank < 1:
        raise UserError(f"--adapter-rank must be at least 1, got {rank}.")
    return functools.partial(merge_adapters, rank=rank)
