"""What ownership masks are made from: a base, its branches after a short training, and finished models beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mergectl.adapters import START
from mergectl.errors import UserError
from mergectl.families import open_family
from mergectl.weights import WeightFile

if TYPE_CHECKING:
    import torch

    from mergectl.benchmarks._contract import Task
    from mergectl.finetune_config import FinetuneConfig
    from mergectl.models import Source

    Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Division:
    """Models under common names, and the order in which their weights are divided."""

    base: Weights
    branches: dict[str, Weights]  # by task id
    references: dict[str, Weights]  # by the word that names the model
    order: list[str]


def divide_models(source: Source, task: Task, folders: Mapping[str, Path], references: Sequence[str]) -> Division:
    """Whole models: all that they share, which is everything but heads."""
    named = [*((task_id, str(folder)) for task_id, folder in folders.items())]
    named += [(f"reference{number}", ref) for number, ref in enumerate(references, 1)]
    population = open_family(str(source.folder), named).population
    views: dict[str, Weights] = dict(zip([*folders, *references], population.experts.values(), strict=True))
    branches = {name: views[name] for name in folders}
    order = _in_model_order(list(population.base), source, task)
    return Division(population.base, branches, {ref: views[ref] for ref in references}, order)


def untrained(source: Source, tasks: Sequence[Task], config: FinetuneConfig) -> Division:
    """The start of all trainings in the place of every branch, for masks that ask only for names and shapes."""
    ids = [task.id for task in tasks]
    if config.peft != "none":
        found = divide_adapters(source, tasks[0], config, {}, [])
    else:
        found = divide_models(source, tasks[0], {ids[0]: Path(str(source.folder))}, [])
    return replace(found, branches=dict.fromkeys(ids, found.base))


def _in_model_order(names: Sequence[str], source: Source, task: Task) -> list[str]:
    """Names as the model's parameters follow each other: files order them otherwise, and the draws depend on it."""
    from mergectl.models import empty_model, model_config
    from mergectl.naming import find_slot, live_tensors

    model = empty_model(model_config(source, task), task, "meta")
    slots = live_tensors(model)
    place = {slot: number for number, slot in enumerate(slots)}
    found = {name: find_slot(name, slots, model.base_model_prefix) for name in names}
    return sorted((name for name in names if found[name]), key=lambda name: place[found[name] or ""])


def divide_adapters(
    source: Source, task: Task, config: FinetuneConfig, folders: Mapping[str, Path], references: Sequence[str]
) -> Division:
    """Adapters: from the seeded start that all branches have in common to what each training made of it."""
    from mergectl import lowrank, models
    from mergectl.masking import trainable

    with models.quiet():
        model = lowrank.put_on(models.build(source, task, seed=config.seed), config)
    start = {name: weight.detach() for name, weight in trainable(model)[0].items()}
    branches: dict[str, Weights] = {name: _Adapter(folder, start) for name, folder in folders.items()}
    found = {ref: _Adapter(Path(ref), start) for ref in references}
    for ref, adapter in found.items():
        adapter.check_start(ref, start)
    others: dict[str, Weights] = dict(found)
    return Division(start, branches, others, list(start))


class _Adapter(Mapping[str, "torch.Tensor"]):
    """The weights of an adapter that `finetune` wrote, or of an adapter folder, if they fit the start."""

    def __init__(self, folder: Path, start: Weights) -> None:
        paths = [place / "adapter_model.safetensors" for place in (folder / "adapter", folder)]
        path = next((path for path in paths if path.exists()), None)
        if path is None:
            raise UserError(f"{folder} holds no adapter, and adapters can be divided only against adapters.")
        self._folder, self._file, self._names = path.parent, WeightFile(path), list(start)
        for name, weight in start.items():
            if name not in self._file.header or self._file.header[name].shape != tuple(weight.shape):
                raise UserError(f"The adapter in {path.parent} is of another kind: it has no '{name}' of this shape.")

    def check_start(self, ref: str, start: Weights) -> None:
        """Refuse LoRA factors that were begun elsewhere: how they differ from `start` says nothing about training."""
        import torch

        factors = [name for name in self._names if ".lora_" in name]
        if not factors:
            return
        if not (self._folder / START).exists():
            raise UserError(f"{ref} does not keep the factors that it was begun from ({START}).")
        begun = WeightFile(self._folder / START)
        if not all(name in begun.header and torch.equal(begun.read(name), start[name]) for name in factors):
            raise UserError(
                f"{ref} was begun from other factors than this training would be. Take its seed (mergectl --seed N "
                "finetune ...), or a model that was trained with this one."
            )

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._file.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def of(
    source: Source, task: Task, config: FinetuneConfig, folders: Mapping[str, Path], references: Sequence[str]
) -> Division:
    """Adapters where a fine-tuning makes adapters, else whole models."""
    if config.peft != "none":
        return divide_adapters(source, task, config, folders, references)
    return divide_models(source, task, folders, references)
