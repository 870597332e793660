"""One backbone in memory that takes turns at many tasks: heads, masks and whole weights are swapped in place."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mergectl.errors import UserError
from mergectl.models import check_complete, empty_model, head_labels, put
from mergectl.naming import find_slot, is_backbone, is_writer, live_names, live_tensors, match

if TYPE_CHECKING:
    import torch

    from mergectl.benchmarks._contract import Task
    from mergectl.preprocess import Preparer


@dataclass(frozen=True)
class Head:
    """What a task adds to the backbone."""

    task: Task
    weights: Mapping[str, Any]  # slot -> parameter
    order: tuple[int, ...] | None  # where the head's labels stand in another order than the task's: how to permute
    masks: Mapping[str, torch.Tensor] | None = None  # slot -> True where the unified task vector is kept
    rescaler: float = 1.0


@dataclass(frozen=True)
class Kept:
    """Where a method keeps something per task: a task's weight is `base + rescaler * (mask * unified)`."""

    base: Mapping[str, torch.Tensor]
    unified: Mapping[str, torch.Tensor]


class LiveModel:
    """A model whose backbone and heads are exchanged without a reload.

    `use(task)` returns the model ready for that task; whatever was used before, the result is bit for bit the same.
    """

    def __init__(self, model: Any, preparer: Preparer, device: str, *, pooled: Collection[str] = ()) -> None:
        self.model, self.preparer, self.device = model.to(device).eval(), preparer, device
        self.prefix: str = model.base_model_prefix
        slots, whole = live_tensors(self.model), is_writer(model)
        shared = {s for s in slots if whole or (is_backbone(s, self.prefix) and s not in pooled)}
        self.backbone = {s: t.detach() for s, t in slots.items() if s in shared}
        paths = live_names(self.model)
        self._places = {s: _place(self.model, paths[s]) for s in slots if s not in self.backbone}
        self.preparers: dict[str, Preparer] = {}  # by task, where its head was trained on texts of another length
        self._heads: dict[str, Head] = {}
        self._kept: Kept | None = None
        self._masked_for: str | None = None
        self.unused: frozenset[str] = frozenset()  # names of the checkpoint that the model has no place for

    @property
    def tasks(self) -> list[str]:
        """The tasks that have a head here."""
        return list(self._heads)

    @property
    def places(self) -> tuple[str, ...]:
        """The names of what a head consists of."""
        return tuple(self._places)

    def preparer_of(self, task: str) -> Preparer:
        """What makes a task's rows ready for the model."""
        return self.preparers.get(task, self.preparer)

    def slot(self, name: str) -> str | None:
        """The backbone's own name for a weight given with or without prefix; None for anything else."""
        found = find_slot(name, self.backbone, self.prefix)
        return found if found in self.backbone else None

    def load_backbone(self, weights: Mapping[str, torch.Tensor], *, partial: bool = False) -> None:
        """Swap in merged weights by name; every weight of the backbone must be there unless `partial`."""
        found, rest = match(weights, self.backbone, self.prefix)
        unknown = [n for n in rest if n not in self.unused and find_slot(n, self._places, self.prefix) is None]
        if unknown:
            raise UserError(f"The {self.prefix} model has no weight '{unknown[0]}' ({len(unknown)} unknown names).")
        if not partial:
            check_complete(self.backbone, found, self.prefix, "The merged model", with_head=True)
        for slot, name in found.items():
            put(self.backbone[slot], weights[name], name, "the merged model")
        self._kept = self._masked_for = None

    def keep(self, unified: Mapping[str, torch.Tensor], *, base: Mapping[str, torch.Tensor] | None = None) -> None:
        """From now on build each task's weights from its masks; without `base` the backbone holds base + unified."""
        found, unknown = match(unified, self.backbone, self.prefix)
        if unknown:
            raise UserError(f"The {self.prefix} model has no weight '{unknown[0]}' for the unified task vector.")
        shared = {slot: unified[name].to(self.device).float() for slot, name in found.items()}
        if base is None:
            start = {slot: self.backbone[slot] - vector for slot, vector in shared.items()}
        else:
            names, _ = match(base, self.backbone, self.prefix)
            start = {slot: base[names[slot]].to(self.device).float() for slot in shared}
        self._kept, self._masked_for = Kept(start, shared), None

    def add_head(
        self,
        task: Task,
        weights: Mapping[str, torch.Tensor],
        *,
        ref: str = "the expert",
        labels: Sequence[str] | None = None,
    ) -> None:
        """Register a task's head by the names of the full model; `labels` are its label names, in its order."""
        import torch

        expected = self._head_shapes(task)
        found, _ = match(weights, self._places, self.prefix)
        check_complete(expected, found, self.prefix, ref, with_head=True)
        parameters = {}
        for slot, name in found.items():
            tensor = weights[name].detach().to(self.device, torch.float32).clone()
            if tensor.shape != expected[slot].shape:
                raise UserError(
                    f"'{name}' has shape {list(tensor.shape)} in {ref}, but {task.id} with its "
                    f"{len(head_labels(task))} labels needs {list(expected[slot].shape)}."
                )
            parameters[slot] = torch.nn.Parameter(tensor, requires_grad=False)
        self._heads[task.id] = Head(task, parameters, label_order(labels, task))
        self._masked_for = None

    def one_head(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """From now on all tasks share one head for these weights; return it, to be changed in place."""
        found, _ = match(names, self._places, self.prefix)
        shared = {slot: next(head.weights[slot] for head in self._heads.values()) for slot in found}
        for task, head in self._heads.items():
            self._heads[task] = replace(head, weights={**head.weights, **shared})
        return {name: shared[slot].detach() for slot, name in found.items()}

    def set_masks(self, task: str, masks: Mapping[str, torch.Tensor], rescaler: float = 1.0) -> None:
        """Say which part of the unified task vector a task keeps; True is kept."""
        found, unknown = match(masks, self.backbone, self.prefix)
        if unknown:
            raise UserError(f"The {self.prefix} model has no weight '{unknown[0]}' for a mask of {task}.")
        self._heads[task] = replace(self._heads[task], masks=_Renamed(masks, found), rescaler=rescaler)
        self._masked_for = None

    def use(self, task: str) -> Any:
        """Put on a task's head (and its masked weights) and return the model."""
        if task not in self._heads:
            raise UserError(f"No head for {task} is loaded; there are heads for: {', '.join(self._heads) or 'none'}.")
        head = self._heads[task]
        for slot, parameter in head.weights.items():
            module, attribute = self._places[slot]
            setattr(module, attribute, parameter)
        if self._places:
            self.model.num_labels = self.model.config.num_labels = len(head_labels(head.task))
        if self._kept is not None and self._masked_for != task:
            self._apply_masks(head, self._kept)
            self._masked_for = task
        return self.model

    def order(self, task: str) -> tuple[int, ...] | None:
        """How to permute a task's logits into the task's own order of labels, if they stand in another."""
        return self._heads[task].order if task in self._heads else None

    def _apply_masks(self, head: Head, kept: Kept) -> None:
        if head.masks is None:
            raise UserError(f"{head.task.id} has no masks, and this merged model needs them per task.")
        for slot, unified in kept.unified.items():
            masked = unified * head.masks[slot].to(self.device)
            self.backbone[slot].copy_(kept.base[slot] + head.rescaler * masked)

    def _head_shapes(self, task: Task) -> dict[str, torch.Tensor]:
        """The head's slots as a model with this task's labels would have them (no memory is used)."""
        if not self._places:
            return {}
        config = self.model.config
        before = config.num_labels
        config.num_labels = len(head_labels(task))
        try:
            slots = live_tensors(empty_model(config, task, "meta"))
        finally:
            config.num_labels = before
        return {slot: slots[slot] for slot in self._places}


class _Renamed(Mapping[str, "torch.Tensor"]):
    """A lazy view under the slots' names."""

    def __init__(self, source: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> None:
        self._source, self._names = source, names

    def __getitem__(self, slot: str) -> torch.Tensor:
        return self._source[self._names[slot]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _place(model: Any, path: str) -> tuple[Any, str]:
    """The module that holds a parameter, and the attribute's name."""
    owner, _, attribute = path.rpartition(".")
    return model.get_submodule(owner), attribute


def label_order(labels: Sequence[str] | None, task: Task) -> tuple[int, ...] | None:
    """For each label of the task its place in the head; None where the orders agree or the names say nothing."""
    theirs, ours = [str(name).lower() for name in labels or ()], [name.lower() for name in head_labels(task)]
    if theirs == ours or sorted(theirs) != sorted(ours) or len(set(ours)) != len(ours):
        return None
    return tuple(theirs.index(name) for name in ours)
