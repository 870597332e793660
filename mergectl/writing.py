"""Write what a merge gives: the shared model with heads and masks beside it, or one task's stand-alone model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergectl import artefacts
from mergectl.artefacts import SafetensorsWriter
from mergectl.bits import pack_bits, packed_size
from mergectl.families import Family, headed_prefix
from mergectl.terminal import Progress

if TYPE_CHECKING:
    import torch

    from mergectl.merging import Stream


def write_shared(family: Family, stream: Stream, folder: Path, dtype: str, progress: Progress) -> None:
    """The shared backbone under the base's names, heads and what is kept per task beside it."""
    base, names = family.base, family.population.base.own_name
    shapes = {own: base.shape(own) for own in _kept_names(family)}
    dtypes = {own: base.dtype(own) for own in shapes} | dict.fromkeys(names.values(), dtype)
    with SafetensorsWriter(folder / "model.safetensors", shapes, dtypes) as writer, _Kept(folder, family) as kept:
        for done, piece in enumerate(stream, 1):
            writer.write(names[piece.name], piece.weight)
            kept.add(piece.name, piece.delta, piece.masks)
            progress(done, len(names), piece.name)
        for own in family.population.carried:
            if own in shapes:
                writer.write(own, base[own])
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


class _Kept:
    """What a method keeps per task, streamed into `unified.safetensors` and `tasks/<task>/masks.safetensors`."""

    def __init__(self, folder: Path, family: Family) -> None:
        self.folder, self.family = folder, family
        self.writers: list[SafetensorsWriter] = []

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
            SafetensorsWriter(self.folder / "unified.safetensors", shapes, dict.fromkeys(shapes, "F32"))
        )
        for task in self.family.experts:
            path = self.folder / "tasks" / task / "masks.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            self.writers.append(SafetensorsWriter(path, packed, dict.fromkeys(packed, "U8")))

    def __enter__(self) -> _Kept:
        return self

    def __exit__(self, *error: Any) -> None:
        for writer in self.writers:
            writer.__exit__(*error)


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


def write_one_task(task: str, family: Family, stream: Stream, folder: Path, dtype: str, progress: Progress) -> None:
    """The merged weights inside one expert's full model: its names, its head, its config."""
    expert, view = family.experts[task], family.population.experts[task]
    index = list(family.experts).index(task)
    shapes = {own: expert.shape(own) for own in expert.names}
    dtypes = {own: expert.dtype(own) for own in expert.names}
    dtypes |= dict.fromkeys(view.own_name.values(), dtype)
    masked = {}
    with SafetensorsWriter(folder / "model.safetensors", shapes, dtypes) as writer:
        for done, piece in enumerate(stream, 1):
            if piece.masks is None or piece.delta is None:
                writer.write(view.own_name[piece.name], piece.weight)
            else:  # the rescaler is known only after the last weight
                masked[piece.name] = (piece.weight - piece.delta, piece.delta * piece.masks[index])
            progress(done, len(shapes), piece.name)
        for name, (start, delta) in masked.items():
            writer.write(view.own_name[name], start + (stream.rescalers or {})[task] * delta)
        for own in set(expert.names) - set(view.own_name.values()):
            writer.write(own, expert[own])
    artefacts.write_json(folder / "config.json", expert.config)
    artefacts.carry_files(expert.folder, folder)


def write_records(
    recipe: Mapping[str, Any], export: str | None, family: Family, folder: Path, facts: Mapping[str, Any]
) -> None:
    """The machine's record and the people's card."""
    record = {
        "kind": "merged" if export is None else "expert",
        "recipe": recipe,
        "inputs": list(family.inputs),
        "tasks": family.task_ids,
        **({} if export is None else _task_record(family, export)),
        **facts,
    }
    artefacts.write_json(folder / "mergectl.json", record)
    artefacts.write_text(folder / "README.md", card(recipe, family))


def _task_record(family: Family, task: str) -> dict[str, Any]:
    meta = family.experts[task].meta
    return {"task": family.task_ids[task], "labels": meta.get("labels"), "base": family.base.ref}


def card(recipe: Mapping[str, Any], family: Family) -> str:
    """The model card: what was merged from what, and how to use it."""
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
