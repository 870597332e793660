"""Write what a merge gives: the shared model with heads and masks beside it, or one task's stand-alone model."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergectl import artefacts
from mergectl.bits import pack_bits, packed_size
from mergectl.checkpoints import Checkpoint
from mergectl.decoders import with_padding
from mergectl.families import Family, headed_prefix
from mergectl.headers import FLOATING, WORD_TO_TORCH
from mergectl.tensorfiles import SHARD_BYTES, ModelWriter, SafetensorsWriter, bytes_of
from mergectl.terminal import Progress
from mergectl.views import Renamed

if TYPE_CHECKING:
    import torch

    from mergectl.merging import Piece, Stream


@dataclass(frozen=True)
class Form:
    """How a result is written: each merged weight's type, that of most, if all others have it, and a file's size."""

    merged: Mapping[str, str]
    dtype: str
    all: bool = False
    shard_bytes: int = SHARD_BYTES

    def dtypes(self, model: Checkpoint, names: Iterable[str], merged: Mapping[str, str]) -> dict[str, str]:
        """The type in which each weight of a model is written; `merged` says which weight of the merge some are."""
        own = {name: model.dtype(name) for name in names}
        chosen = [name for name in own if self.all and own[name] in FLOATING]
        return own | dict.fromkeys(chosen, self.dtype) | {name: self.merged[of] for name, of in merged.items()}


def write_shared(family: Family, stream: Stream, folder: Path, form: Form, progress: Progress) -> None:
    """The shared backbone under the base's names, heads and what is kept per task beside it."""
    base, population = family.base, family.population
    names = population.base.own_name
    shapes = _whole_shapes(family)
    dtypes = form.dtypes(base, shapes, {own: name for name, own in names.items()} | population.tied)
    artefacts.check_space(folder, _needed(family, stream, shapes, dtypes))
    repeats = {of: [own for own, source in population.tied.items() if source == of] for of in population.tied.values()}
    blended: dict[str, torch.Tensor] = {}
    with ModelWriter(folder, shapes, dtypes, form.shard_bytes) as writer, _Kept(folder, family) as kept:

        def put(piece: Piece) -> None:
            if piece.name in population.blended:  # a head is never so large that it comes in blocks
                blended[piece.name] = piece.weight.clone()
            for own in (names[piece.name], *repeats.get(piece.name, ())):
                writer.write(own, piece.weight, piece.start)
                if piece.last:
                    _write_rows(family, piece.name, partial(writer.write, own))
            kept.add(piece)

        for done, name in enumerate(stream.run(put), 1):
            progress(done, len(names), name)
        for own in (name for name in population.carried if name in shapes):
            writer.keep(own, base[own])
    for task in family.experts:
        _write_head(family, task, folder / "tasks" / task, (stream.rescalers or {}).get(task), blended)
    artefacts.carry_files(folder, *_donors(family))
    experts = [expert.config for expert in family.experts.values()]
    artefacts.add_json(folder / "config.json", with_padding(_shared_config(family, form.dtype), experts, folder))


def _whole_shapes(family: Family) -> dict[str, tuple[int, ...]]:
    """Own name -> shape of all weights of the result, with the rows of grown vocabularies."""
    base, view = family.base, family.population.base
    shapes = {own: base.shape(own) for own in _kept_names(family)}
    for name, rows in view.grown.items():
        repeated = [own for own, of in family.population.tied.items() if of == name]
        shapes |= {own: rows.cut(base.shape(own), rows.total) for own in (view.own_name[name], *repeated)}
    return shapes


def _write_rows(family: Family, name: str, write: Callable[[torch.Tensor, int], None]) -> None:
    """Put the rows that only some models have behind the merged ones; all dimensions before the rows' are 1."""
    population = family.population
    rows = population.base.grown.get(name)
    if rows is None:
        return
    for task, start, end in rows.parts:
        owner = population.base if task is None else population.experts[task]
        kept = owner.rows(name, start, end)
        write(kept, start * (kept.numel() // max(end - start, 1)))


def _needed(family: Family, stream: Stream, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]) -> int:
    """How many bytes the result takes on disk."""
    weights = sum(bytes_of(shape, dtypes[name]) for name, shape in shapes.items())
    heads = sum(
        bytes_of(family.experts[task].shape(name), family.experts[task].dtype(name))
        for task, names in family.population.heads.items()
        for name in names
    )
    merged = [shapes[own] for own in family.population.base.own_name.values()]
    masked = stream.info.extra_bits > 0
    kept = sum(bytes_of(x, "F32") + len(family.experts) * packed_size(x) for x in merged) if masked else 0
    return weights + heads + kept


def _donors(family: Family) -> list[Path]:
    """Folders that may lend a tokenizer: the expert whose tokens the result has, the base, the other experts."""
    lender = next(
        (rows.tokens_of for rows in family.population.base.grown.values() if rows.tokens_of is not None), None
    )
    first = [] if lender is None else [family.experts[lender].folder]
    return [*first, family.base.folder, *(expert.folder for expert in family.experts.values())]


def _kept_names(family: Family) -> list[str]:
    """The names that the result holds: all of the base's, or, without a base, the experts' backbone."""
    if family.has_base:
        return family.base.names
    heads = {name for names in family.population.heads.values() for name in names}
    prefix = headed_prefix(family.base)
    return [name for name in family.base.names if name not in heads and name.startswith(prefix)]


def _shared_config(family: Family, dtype: str) -> dict[str, Any]:
    """The base's configuration with the result's type and vocabulary."""
    config = typed({key: value for key, value in family.base.config.items() if key != "_name_or_path"}, dtype)
    for rows in family.population.base.grown.values():
        owner = config if "vocab_size" in config else config.get("text_config", {})
        config = {**config, "vocab_size": rows.total} if owner is config else {
            **config, "text_config": {**owner, "vocab_size": rows.total}
        }  # fmt: skip
    return config


def typed(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A configuration that says in which type its weights are, so that transformers loads them in it."""
    word = WORD_TO_TORCH[dtype]
    found = {key: typed(value, dtype) if isinstance(value, dict) and _has_type(value) else value
             for key, value in config.items()}  # fmt: skip
    return {**found, "torch_dtype" if "torch_dtype" in config else "dtype": word}


def _has_type(config: Mapping[str, Any]) -> bool:
    return config.get("dtype") is not None or config.get("torch_dtype") is not None


class _Kept:
    """What a method keeps per task, streamed into `unified.safetensors` and `tasks/<task>/masks.safetensors`."""

    def __init__(self, folder: Path, family: Family) -> None:
        self.folder, self.family = folder, family
        shapes = _whole_shapes(family)
        self.shapes_of = {name: shapes[own] for name, own in family.population.base.own_name.items()}
        self._lock = threading.Lock()
        self.writers: list[SafetensorsWriter] = []

    def add(self, piece: Piece) -> None:
        """Write the unified task vector and the masks of a weight, or of a block of one."""
        if piece.delta is None or piece.masks is None:
            return
        with self._lock:
            if not self.writers:
                self._open()
        self.writers[0].write(piece.name, piece.delta, piece.start)
        for writer, mask in zip(self.writers[1:], piece.masks, strict=True):
            writer.write(piece.name, pack_bits(mask), piece.start // 8)
        rows = self.family.population.base.grown.get(piece.name)
        if piece.last and rows is not None:
            self._fill(piece.name, math.prod(rows.cut(self.shapes_of[piece.name])))

    def _fill(self, name: str, merged: int) -> None:
        """Nothing is kept in rows that are not merged."""
        import torch

        rest = math.prod(self.shapes_of[name]) - merged
        self.writers[0].write(name, torch.zeros(rest), merged)
        start = packed_size((merged,))
        for writer in self.writers[1:]:
            writer.write(name, torch.zeros(packed_size(self.shapes_of[name]) - start, dtype=torch.uint8), start)

    def _open(self) -> None:
        shapes = self.shapes_of
        packed = {name: (packed_size(shape),) for name, shape in shapes.items()}
        writers = [SafetensorsWriter(self.folder / "unified.safetensors", shapes, dict.fromkeys(shapes, "F32"))]
        for task in self.family.experts:
            path = self.folder / "tasks" / task / "masks.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            writers.append(SafetensorsWriter(path, packed, dict.fromkeys(packed, "U8")))
        self.writers = writers

    def __enter__(self) -> _Kept:
        return self

    def __exit__(self, *error: Any) -> None:
        for writer in self.writers:
            writer.__exit__(*error)


def _write_head(
    family: Family, task: str, folder: Path, rescaler: float | None, blended: Mapping[str, torch.Tensor]
) -> None:
    from safetensors.torch import save_file

    expert = family.experts[task]
    folder.mkdir(parents=True, exist_ok=True)
    head = {name: expert[name].contiguous() for name in family.population.heads[task]}
    own = family.population.experts[task].own_name
    head |= {own[name]: weight.contiguous() for name, weight in blended.items()}
    save_file(head, folder / "head.safetensors", metadata={"format": "pt"})
    record = {
        "task": family.task_ids[task],
        "labels": expert.meta.get("labels"),
        "kind": expert.meta.get("kind_of_task"),
        "prefix": headed_prefix(expert),
        "expert": str(expert.ref),
        "expert_digest": expert.digest,
        "max_length": (expert.meta.get("recipe") or {}).get("max_length"),
    }
    artefacts.add_json(folder / "task.json", record | ({} if rescaler is None else {"rescaler": rescaler}))
    artefacts.add_json(folder / "config.json", expert.config)


def write_one_task(task: str, family: Family, stream: Stream, folder: Path, form: Form, progress: Progress) -> None:
    """The merged weights inside one expert's full model: its names, its head, its config."""
    expert, view = family.experts[task], family.population.experts[task]
    index = list(family.experts).index(task)
    shapes = {own: expert.shape(own) for own in expert.names}
    copies = family.population.copies.get(task, {})
    dtypes = form.dtypes(expert, shapes, {own: name for name, own in view.own_name.items()} | copies)
    artefacts.check_space(folder, sum(bytes_of(shape, dtypes[name]) for name, shape in shapes.items()))
    rest = set(expert.names)
    owns = {name: [own, *(copy for copy, of in copies.items() if of == name)] for name, own in view.own_name.items()}
    if stream.info.extra_bits:  # the rescalers are known only at the end, so the merge is made twice
        for _ in stream.run(lambda piece: None):
            pass
    with ModelWriter(folder, shapes, dtypes, form.shard_bytes) as writer:

        def put(piece: Piece) -> None:
            weight = piece.weight
            if piece.masks is not None and piece.delta is not None:
                factor = (stream.rescalers or {})[task]
                weight = weight.sub(piece.delta).add_(piece.delta * piece.masks[index], alpha=factor)
            for own in owns[piece.name]:
                writer.write(own, weight, piece.start)
                if piece.last:
                    _write_own_rows(view, piece.name, partial(writer.write, own))

        for done, name in enumerate(stream.run(put), 1):
            rest.difference_update(owns[name])
            progress(done, len(shapes), name)
        for own in sorted(rest):
            writer.keep(own, expert[own])
    artefacts.carry_files(folder, expert.folder, family.base.folder)
    config = with_padding(typed(expert.config, form.dtype), [expert.config], folder)
    artefacts.add_json(folder / "config.json", config)


def _write_own_rows(view: Renamed, name: str, write: Callable[[torch.Tensor, int], None]) -> None:
    """Put the rows that an expert has behind the common ones."""
    rows = view.grown.get(name)
    if rows is None:
        return
    end = view.source.shape(view.own_name[name])[rows.dim]
    kept = view.rows(name, rows.common, end)
    write(kept, rows.common * (kept.numel() // max(end - rows.common, 1)))
