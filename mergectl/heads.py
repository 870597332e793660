"""Open a model for tasks, each with its head: from the model itself, a merged folder's `tasks/`, or an expert."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mergectl import clip
from mergectl.checkpoints import Checkpoint, open_checkpoint, read_json
from mergectl.errors import UserError
from mergectl.live import LiveModel
from mergectl.models import Source, empty_model, fill, model_config, open_source, pick_device, preparer_for, tie
from mergectl.naming import is_backbone, is_writer, live_tensors, match
from mergectl.tasks import answers
from mergectl.tokenizer_files import has_tokenizer

if TYPE_CHECKING:
    import torch

    from mergectl.benchmarks._contract import Task

UNIFIED = "unified.safetensors"
_Found = TypeVar("_Found")


def open_live(
    model: str | Path | Checkpoint,
    tasks: Sequence[Task],
    *,
    heads: Mapping[str, str | Path | Checkpoint] | None = None,
    device: str = "auto",
    max_length: int | None = None,
) -> LiveModel:
    """Load a model once and put on the heads of these tasks: its own, its `tasks/` folder's, or those of experts."""
    source = open_source(model)
    if source.weights is None:
        raise UserError(f"{source.ref} is a bare configuration without weights. Fine-tune it first: mergectl finetune.")
    if not tasks:
        raise UserError("Name at least one task to evaluate on.")
    _one_kind(tasks)
    weights = _completed(source.weights, source.meta, heads or {})
    source = replace(source, weights=weights, config=weights.config)
    config = model_config(source, tasks[0])
    lengths = {task.id: max_length or _length(source, task, heads or {}) for task in tasks}
    own = _with_settings(source, tasks[0], heads or {})
    preparers = {length: preparer_for(own, config, tasks[0], length) for length in set(lengths.values())}
    preparer = preparers[lengths[tasks[0].id]]
    built = empty_model(config, tasks[0])
    if is_writer(built):
        tie(built, source)
    unset = fill(built, weights, source.ref, with_head=is_writer(built))
    prefix = built.base_model_prefix
    live = LiveModel(built, preparer, pick_device(device), pooled={s for s in unset if is_backbone(s, prefix)})
    live.unused = frozenset(match(weights, live_tensors(built), prefix)[1])
    live.preparers = {task: preparers[length] for task, length in lengths.items()}
    add_heads(live, source, tasks, heads or {})
    return live


def _completed(
    weights: Checkpoint, meta: Mapping[str, Any], given: Mapping[str, str | Path | Checkpoint]
) -> Checkpoint:
    """Give a CLIP vision tower what it lacks, from the models that lend heads or from its base."""
    return clip.completed(weights, _donors(meta, given)) if clip.is_zero_shot(weights.config) else weights


def _with_settings(source: Source, task: Task, given: Mapping[str, str | Path | Checkpoint]) -> Source:
    """The source with the folder that says how it reads: its own, or that of a lender where its own says nothing."""
    if isinstance(source.weights, clip.Completed):
        return replace(source, folder=source.weights.settings_folder)
    if task.kind != "image_classification" and not has_tokenizer(source.folder):
        lenders = (lender.folder for lender in _donors(source.meta, given) if has_tokenizer(lender.folder))
        return replace(source, folder=next(lenders, source.folder))
    return source


def _donors(meta: Mapping[str, Any], given: Mapping[str, str | Path | Checkpoint]) -> Iterator[Checkpoint]:
    for ref in given.values():
        if (lender := open_source(ref).weights) is not None:
            yield lender
    if base := meta.get("base"):
        with contextlib.suppress(UserError):  # it may lie elsewhere by now, and most tasks do without it
            yield open_checkpoint(str(base))


def _length(source: Source, task: Task, given: Mapping[str, str | Path | Checkpoint]) -> int | None:
    """The longest text that a task's head was trained on, where that was noted: it is scored on texts cut alike."""
    ref, info = _for(task, given), _for(task, stored_heads(source))
    noted = (
        info if ref is None and info is not None else (source if ref is None else open_source(ref)).meta.get("recipe")
    )
    length = (noted or {}).get("max_length")
    return None if length is None else int(length)


def _for(task: Task, found: Mapping[str, _Found]) -> _Found | None:
    """What there is for a task: under its own id or name, else for one that asks the same."""
    exact = found.get(task.id, found.get(task.name))
    return exact if exact is not None else next((found[head] for head in found if answers(head, task)), None)


def _one_kind(tasks: Sequence[Task]) -> None:
    images = [task.id for task in tasks if task.kind == "image_classification"]
    texts = [task.id for task in tasks if task.kind != "image_classification"]
    if images and texts:
        raise UserError(f"No model reads both images ({images[0]}) and texts ({texts[0]}). Evaluate them apart.")
    worded = [task.id for task in tasks if task.kind == "text_to_text"]
    labelled = [task for task in texts if task not in worded]
    if worded and labelled:
        raise UserError(
            f"{worded[0]} is answered in words and {labelled[0]} with a label, which takes two kinds of models. "
            "Evaluate them apart."
        )


def check_answered(model: Source, tasks: Sequence[Task], heads: Sequence[str]) -> None:
    """Refuse tasks that a merge could not answer: in the form of this model, with the heads of these tasks."""
    _one_kind(tasks)
    for task in tasks:
        if task.kind == "image_classification" and clip.is_zero_shot(model.config):
            continue  # its texts make a head of any labels
        model_config(model, task)
        if task.kind != "text_to_text" and not any(answers(head, task) for head in heads):
            others = f"only for {', '.join(heads)}" if heads else "nor for any other task"
            raise UserError(
                f"The merge would have no head for {task.id}, {others}. Leave it out, or add an expert that has one: "
                f"mergectl finetune {task.id}"
            )


def add_heads(
    live: LiveModel, source: Source, tasks: Sequence[Task], given: Mapping[str, str | Path | Checkpoint]
) -> None:
    """Register the head of every task in a live model; a task without one is an error that says what there is."""
    stored = stored_heads(source)
    for task in tasks:
        ref, info = _for(task, given), _for(task, stored)
        if task.kind == "text_to_text":
            live.add_head(task, {})  # the model answers every such task as it is
            _put_masks(live, task, info)
        elif clip.is_zero_shot(source.config) and not _brings_head(source, task, ref, info):
            live.add_head(task, {clip.HEAD: _text_tower(source, ref).head(task)})
            _put_masks(live, task, info)
        elif ref is not None and not _lends_no_head(live, source, task, open_source(ref)):
            _from_expert(live, task, open_source(ref), info)
        elif info is not None:
            _from_folder(live, task, info, source)
        elif _is_own(source, task):
            _from_expert(live, task, source, None)
        else:
            raise UserError(_no_head(source, task, stored))
    if source.folder is not None and (source.folder / UNIFIED).exists():
        live.keep(open_safetensors(source.folder / UNIFIED))


def _lends_no_head(live: LiveModel, source: Source, task: Task, lender: Source) -> bool:
    """Whether an expert for the task has its own head, and the model named beside it only lends its tokenizer."""
    return _is_own(source, task) and not match(lender.weights or (), dict.fromkeys(live.places), live.prefix)[0]


def _brings_head(
    source: Source, task: Task, ref: str | Path | Checkpoint | None, info: Mapping[str, Any] | None
) -> bool:
    """Whether the expert, the merged folder or the CLIP model itself has a head for this task, ready made."""
    if ref is not None:
        return clip.HEAD in (open_source(ref).weights or ())
    if info is not None:
        path = Path(info["folder"]) / "head.safetensors"
        return path.exists() and clip.HEAD in open_safetensors(path)
    return source.weights is not None and clip.HEAD in source.weights and _is_own(source, task)


def _text_tower(source: Source, ref: str | Path | Checkpoint | None) -> clip.TextTower:
    """The text tower of the model that lends a head, if it has one, else of the model itself."""
    lender = None if ref is None else open_source(ref).weights
    if lender is not None and clip.has_texts(lender):
        return clip.TextTower(lender)
    assert source.weights is not None  # a live model has weights
    return clip.TextTower(source.weights)


def stored_heads(source: Source) -> dict[str, dict[str, Any]]:
    """Task id (or short name where the id is not known) -> what a merged folder says of its head."""
    if source.weights is None:
        return {}
    found: dict[str, dict[str, Any]] = {}
    for short, info in source.weights.heads.items():
        found.setdefault(str(info.get("task") or short), info)  # of several experts for one task, the first by name
    return found


def own_tasks_of(model: str | Path | Checkpoint) -> list[str]:
    """The tasks that a model brings heads for."""
    source = open_source(model)
    return list(stored_heads(source)) or ([source.trained_on] if source.trained_on else [])


def _is_own(source: Source, task: Task) -> bool:
    """Whether the model is an expert for this task; one of unknown origin is taken at its word."""
    if source.trained_on is not None or source.weights is None:
        return source.trained_on is not None and answers(source.trained_on, task)
    architecture = (source.config.get("architectures") or [""])[0]
    return "Classification" in architecture and not source.weights.heads and source.meta.get("kind") is None


def _from_expert(live: LiveModel, task: Task, expert: Source, info: Mapping[str, Any] | None) -> None:
    if expert.weights is None:
        raise UserError(f"{expert.ref} holds no weights, so it has no head for {task.id}.")
    live.add_head(task, expert.weights, ref=expert.ref, labels=_labels(expert.meta, expert.config))
    _put_masks(live, task, info)


def _from_folder(live: LiveModel, task: Task, info: Mapping[str, Any], model: Source) -> None:
    folder = Path(info["folder"])
    path = folder / "head.safetensors"
    if not path.exists():
        raise UserError(f"{model.ref}: the head of {task.id} is gone; {path} does not exist.")
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    live.add_head(task, open_safetensors(path), ref=str(path), labels=_labels(info, config))
    _put_masks(live, task, info)


def _put_masks(live: LiveModel, task: Task, info: Mapping[str, Any] | None) -> None:
    """Put on the masks and the rescaler stored for a task, where the merge kept some."""
    if info is not None and (path := Path(info["folder"]) / "masks.safetensors").exists():
        masks = PackedMasks(open_safetensors(path), live)
        live.set_masks(task.id, masks, float(info.get("rescaler", 1.0)))


def _labels(meta: Mapping[str, Any], config: Mapping[str, Any]) -> list[str] | None:
    if meta.get("labels"):
        return [str(name) for name in meta["labels"]]
    names = config.get("id2label") or {}
    return [str(names[key]) for key in sorted(names, key=int)] or None


def _no_head(source: Source, task: Task, stored: Mapping[str, Any]) -> str:
    there = list(stored) or ([source.trained_on] if source.trained_on else [])
    has = f"only for {', '.join(map(str, there))}" if there else "nor for any other task"
    return (
        f"{source.ref} has no head for {task.id}, {has}. Name an expert that has one, "
        f"or make it: mergectl finetune {task.id} --base {source.ref}"
    )


class PackedMasks(Mapping[str, "torch.Tensor"]):
    """Masks stored as bits, unpacked one weight at a time."""

    def __init__(self, packed: Mapping[str, torch.Tensor], live: LiveModel) -> None:
        self._packed, self._live = packed, live

    def __getitem__(self, name: str) -> torch.Tensor:
        from mergectl.bits import unpack_bits

        slot = self._live.slot(name)
        if slot is None:
            raise UserError(f"There is a mask for '{name}', which the {self._live.prefix} model does not have.")
        return unpack_bits(self._packed[name], self._live.backbone[slot].shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)


class _File(Mapping[str, "torch.Tensor"]):
    """A safetensors file, read lazily."""

    def __init__(self, file: Any) -> None:
        self._file, self._names = file, list(file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._file.get_tensor(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        """Say whether there is such a tensor, without reading it."""
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def open_safetensors(path: Path) -> Mapping[str, torch.Tensor]:
    """Open a safetensors file as a lazy mapping."""
    from safetensors import SafetensorError, safe_open

    try:
        return _File(safe_open(path, framework="pt"))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}). Merge again.") from error
