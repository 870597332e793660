"""Merge adapters into an adapter: IA3 vectors as they are, LoRA by products, by all factors or in a common space."""

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
from mergectl.errors import UserError, did_you_mean
from mergectl.families import Family, open_family
from mergectl.lab import Lab, versions
from mergectl.merge import MergeJob, checked, described
from mergectl.thin import Cut, align, cut, cut_dense
from mergectl.verbs import Result, merge_config, record_inputs, record_model, spare_inputs

if TYPE_CHECKING:
    import torch

# What a merged LoRA adapter says of itself: its factors carry the scale, and nothing differs by module.
PLAIN_LORA: dict[str, Any] = {
    "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "lora_dropout": 0.0, "init_lora_weights": True,
}  # fmt: skip
LINEAR = ("average", "task_arithmetic")  # methods whose result is a weighted sum, of which concatenating is one form
Adapters = Mapping[str, AdapterCheckpoint]


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


def merge_adapters(
    lab: Lab, job: MergeJob, out: Path, rank: int | None, mode: str | None = None, *, force: bool = False
) -> Result:
    """Merge adapters of one base into the adapter folder `out`."""
    family = open_family(job.base, job.experts, lab.find_run)
    recipe = checked(job.recipe, list(family.experts))
    adapters = checked_adapters(family, rank, mode)
    artefacts.check_free(out, force)
    spare_inputs(family, out)
    kind = next(iter(adapters.values())).kind
    mode = (mode or "product") if kind == "LORA" else None
    config = {**merge_config(job, family, recipe), "adapter": kind, "rank": rank, "mode": mode}
    with lab.start("merge", config, seed=recipe.seed, name=out.name) as run:
        record_inputs(run, family)
        lab.terminal.say(f"Merging {len(adapters)} adapters by {recipe.method}")
        weights, settings, kept = _ia3(adapters, recipe) if mode is None else _lora(adapters, recipe, rank, mode)
        run.metric("kept_energy", kept)
        facts = {"run": run.id, "versions": versions(), "kept_energy": kept, "adapter_mode": mode}
        _write(out, replace(job, recipe=recipe), family, weights, settings, facts, force=force)
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
    given = "--adapter-rank" if rank is not None else "--adapter-mode"
    if first.kind == "IA3" and (rank is not None or mode is not None):
        raise UserError(f"{given} is for LoRA; IA3 adapters are vectors.")
    return found


def _merged(
    recipe: Any, start: float, shapes: Mapping[str, tuple[int, ...]], experts: Mapping[str, Changes]
) -> Mapping[str, torch.Tensor]:
    """What the method makes of what adapters do; `start` is what an adapter that changes nothing holds."""
    import torch

    from mergectl.merging import merge_weights

    base = Changes(shapes, lambda name: torch.full(shapes[name], start))
    found = merge_weights(recipe.method, base, experts, seed=recipe.seed, refine=list(recipe.refine), **recipe.settings)
    if found.kept:
        raise UserError(f"{recipe.method} keeps something for each task, which one adapter cannot hold.")
    return found


def _read(
    adapters: Adapters, recipe: Any, start: float, read: Callable[[AdapterCheckpoint, str], torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """What the method makes of one tensor per module and adapter, under the modules' weights' names."""
    first = next(iter(adapters.values()))
    shapes = {f"{module}.weight": tuple(read(first, module).shape) for module in first.modules}

    def view(adapter: AdapterCheckpoint) -> Changes:
        return Changes(shapes, lambda name: read(adapter, name.removesuffix(".weight")))

    return _merged(recipe, start, shapes, {task: view(adapter) for task, adapter in adapters.items()})


Made = tuple[dict[str, "torch.Tensor"], dict[str, Any], float]


def _ia3(adapters: Adapters, recipe: Any) -> Made:
    """Vectors that multiply: the method works on how far they are from one."""
    found = _read(adapters, recipe, 1.0, lambda adapter, module: adapter.part(module, "ia3_l"))
    weights = {f"{ROOT}{name.removesuffix('.weight')}.ia3_l": vector.contiguous() for name, vector in found.items()}
    return weights, {}, 1.0


def _lora(adapters: Adapters, recipe: Any, rank: int | None, mode: str) -> Made:
    """Factors of what the method makes of the adapters; without a rank, of the largest that some module needs."""
    modules, find = MODES[mode](adapters, recipe)
    size = max(modules.values()) if rank is None else rank
    weights: dict[str, torch.Tensor] = {}
    kept = total = 0.0
    for module in modules:
        found = find(module, size)
        weights |= {f"{ROOT}{module}.lora_A.weight": found.down, f"{ROOT}{module}.lora_B.weight": found.up}
        kept, total = kept + found.kept, total + found.whole
    return weights, {**PLAIN_LORA, "r": size, "lora_alpha": size}, kept / total if total else 1.0


Found = tuple[dict[str, int], Callable[[str, int], Cut]]  # the rank that each module needs; its factors of a rank


def _sums(adapters: Adapters) -> dict[str, int]:
    """For each module the sum of the adapters' ranks."""
    modules = next(iter(adapters.values())).modules
    return {module: sum(len(adapter.part(module, "lora_A")) for adapter in adapters.values()) for module in modules}


def _by_product(adapters: Adapters, recipe: Any) -> Found:
    """The method works on the products B A as on weights."""
    found = _read(adapters, recipe, 0.0, lambda adapter, module: adapter.product(module))
    return _sums(adapters), lambda module, rank: cut_dense(found[f"{module}.weight"], rank)


def _concatenated(adapters: Adapters, recipe: Any) -> Found:
    """All factors beside each other, each B times its adapter's share: a weighted sum of the products."""
    import torch

    linear = recipe.method in LINEAR and not recipe.refine and recipe.settings.get("combine", "mean") == "mean"
    if not linear:
        raise UserError(
            f"--adapter-mode concatenate is for weighted sums ({', '.join(LINEAR)}), which {recipe.method} as it is "
            "given here is not. Take product or align."
        )
    unit = torch.eye(len(adapters))
    shapes = {f"{module}.weight": (len(adapters),) for module in next(iter(adapters.values())).modules}
    ones = {task: dict.fromkeys(shapes, row) for task, row in zip(adapters, unit, strict=True)}
    shares = _merged(recipe, 0.0, shapes, {task: Changes(shapes, own.__getitem__) for task, own in ones.items()})

    def find(module: str, rank: int) -> Cut:
        pairs = [adapter.scaled(module) for adapter in adapters.values()]
        own = shares[f"{module}.weight"]
        up = torch.cat([share * up for share, (up, _) in zip(own, pairs, strict=True)], 1)
        return cut(up, torch.cat([down for _, down in pairs]), rank)

    return _sums(adapters), find


def _aligned(adapters: Adapters, recipe: Any) -> Found:
    """The method works on the adapters' parts V of one decomposition of all products beside each other (KnOTS)."""
    shared: dict[str, torch.Tensor] = {}
    parts: dict[str, dict[str, torch.Tensor]] = {task: {} for task in adapters}
    for module in next(iter(adapters.values())).modules:
        ups, downs = zip(*(adapter.scaled(module) for adapter in adapters.values()), strict=True)
        shared[module], own = align(ups, downs)
        for task, part in zip(adapters, own, strict=True):
            parts[task][f"{module}.weight"] = part
    shapes = {name: tuple(part.shape) for name, part in next(iter(parts.values())).items()}
    found = _merged(recipe, 0.0, shapes, {task: Changes(shapes, own.__getitem__) for task, own in parts.items()})
    ranks = {module: left.shape[1] for module, left in shared.items()}
    return ranks, lambda module, rank: cut(shared[module], found[f"{module}.weight"], rank)


MODES: dict[str, Callable[[Adapters, Any], Found]] = {
    "product": _by_product, "concatenate": _concatenated, "align": _aligned,
}  # fmt: skip


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
    return functools.partial(merge_adapters, rank=rank, mode=mode)
