"""Line up checkpoints of one family: which names are the shared backbone, which are a task's head.

No table of architectures: names are compared. An expert saved as a classifier carries its backbone under one
prefix (`bert.`, `vit.`, `transformer.`); everything outside it is the head, and so is what the base does not have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergectl.checkpoints import Checkpoint, open_checkpoint
from mergectl.errors import UserError

if TYPE_CHECKING:
    import torch


HEADED = ("Classification", "QuestionAnswering", "MultipleChoice")


class Renamed(Mapping[str, "torch.Tensor"]):
    """A lazy view of a checkpoint under other names."""

    def __init__(self, source: Checkpoint, names: Mapping[str, str]) -> None:
        self.source, self.own_name = source, names

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight, without reading it."""
        return self.source.shape(self.own_name[name])

    def dtype(self, name: str) -> str:
        """The type of a weight, without reading it."""
        return self.source.dtype(self.own_name[name])

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.source[self.own_name[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.own_name)

    def __len__(self) -> int:
        return len(self.own_name)


@dataclass(frozen=True)
class Population:
    """A base and its experts under common names: `base` and `experts` hold exactly the weights to merge."""

    base: Renamed
    experts: dict[str, Renamed]
    heads: dict[str, tuple[str, ...]]  # task -> the expert's own names of its head
    carried: tuple[str, ...]  # names of the base that no expert has, or that hold no real numbers


def line_up(base: Checkpoint, experts: Mapping[str, Checkpoint]) -> Population:
    """Pair every weight of the base with those of the experts; refuse another architecture or shape."""
    views, heads, strip = {}, {}, ""
    for task, expert in experts.items():
        strip, views[task], heads[task] = _pair(base, expert)
    shared = _shared_names(base, strip, views)
    for task, view in views.items():
        for name in shared:
            _same_shape(base, name, strip, experts[task], view[name], task)
    experts_by_task = {t: Renamed(experts[t], {n: views[t][n] for n in shared}) for t in experts}
    carried = tuple(n for n in base.names if n.removeprefix(strip) not in shared)
    return Population(Renamed(base, shared), experts_by_task, heads, carried)


def _shared_names(base: Checkpoint, strip: str, views: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Common name -> the base's own name, for the floating weights that every expert has."""
    shared = {}
    for own in base.names:
        name = own.removeprefix(strip) if own.startswith(strip) else own
        having = [task for task, view in views.items() if name in view]
        lacking = [task for task in views if task not in having]
        if having and lacking:
            raise UserError(f"Expert '{lacking[0]}' has no weight '{name}', which the base and '{having[0]}' have.")
        if having and base.dtype(own) in ("F16", "BF16", "F32", "F64"):
            shared[name] = own
    return shared


def _pair(base: Checkpoint, expert: Checkpoint) -> tuple[str, dict[str, str], tuple[str, ...]]:
    """Return the base's prefix, common name -> expert's name, and the expert's head names."""
    fixed = headed_prefix(expert)
    choices = [(p, q) for p in _prefixes(base.names) for q in ([fixed] if fixed else _prefixes(expert.names))]
    strip, prefix = max(choices, key=lambda pq: (len(_common(base, pq[0], expert, pq[1])), pq[0] == pq[1]))
    common = _common(base, strip, expert, prefix)
    backbone = [n for n in base.names if n.startswith(strip)]
    if 2 * len(common) < len(backbone):
        missing = next(n for n in backbone if n.removeprefix(strip) not in common)
        raise UserError(
            f"{expert.ref} is no fine-tuned copy of {base.ref}: it has {len(common)} of its {len(backbone)} weights "
            f"(not '{missing}', for example)."
        )
    head = tuple(n for n in expert.names if n not in common.values())
    return strip, common, head


def _common(base: Checkpoint, strip: str, expert: Checkpoint, prefix: str) -> dict[str, str]:
    ours = {n.removeprefix(strip) for n in base.names if n.startswith(strip)}
    theirs = {n.removeprefix(prefix): n for n in expert.names if n.startswith(prefix)}
    return {name: own for name, own in theirs.items() if name in ours}


def _prefixes(names: Sequence[str]) -> list[str]:
    """No prefix, and every first component that holds more than half of the names."""
    counts = Counter(name.split(".", 1)[0] for name in names if "." in name)
    return ["", *(f"{word}." for word, n in counts.items() if 2 * n > len(names))]


def headed_prefix(checkpoint: Checkpoint) -> str:
    """The backbone's prefix in a model saved with a task head, or '' when it has none."""
    classes = checkpoint.config.get("architectures") or [""]
    if not any(word in classes[0] for word in HEADED):
        return ""
    return _prefixes(checkpoint.names)[-1]


def _same_shape(base: Checkpoint, name: str, strip: str, expert: Checkpoint, own: str, task: str) -> None:
    there = base.shape(strip + name if strip + name in base else name)
    if there != expert.shape(own):
        raise UserError(
            f"'{name}' has shape {list(there)} in {base.ref} but {list(expert.shape(own))} in expert '{task}' "
            f"({expert.ref}). Experts must be fine-tuned copies of the base."
        )


def short_names(ids: Sequence[str], complain: Callable[[str], Exception] = UserError) -> list[str]:
    """Task ids to the short names that folders use: `glue/rte` -> `rte`; refuse two of one name."""
    shorts = [task.rsplit("/", 1)[-1] for task in ids]
    for short, count in Counter(shorts).items():
        if count > 1:
            raise complain(f"Two experts are called '{short}'. Name them: --experts first={short} second=...")
    return shorts


@dataclass(frozen=True)
class Family:
    """The opened checkpoints of one merge, lined up."""

    base: Checkpoint
    experts: dict[str, Checkpoint]  # short task name -> expert
    task_ids: dict[str, str]  # short task name -> `suite/task` where known
    population: Population
    has_base: bool = True
    inputs: tuple[dict[str, Any], ...] = field(default=())


def named(items: Sequence[str] | Mapping[str, str]) -> tuple[tuple[str | None, str], ...]:
    """Experts as (task or None, model): from a list of `model` or `task=model`, or a mapping."""
    if isinstance(items, Mapping):
        return tuple(items.items())
    return tuple(_split(item) for item in items)


def _split(item: str) -> tuple[str | None, str]:
    task, equals, ref = item.partition("=")
    if not equals or Path(item).is_dir():
        return None, item
    return task, ref


def open_family(
    base_ref: str | None,
    experts: Sequence[tuple[str | None, str]],
    find_run: Callable[[str], Path | None] | None = None,
) -> Family:
    """Open a base and its experts and line them up; headers are read, weights are not."""
    if not experts:
        raise UserError("Name the models to merge: --experts MODEL MODEL ...")
    opened = [(task, open_checkpoint(ref, find_run)) for task, ref in experts]
    ids = [task or expert.task or expert.label for task, expert in opened]
    shorts = short_names(ids)
    by_task = {short: expert for short, (_, expert) in zip(shorts, opened, strict=True)}
    base_ref = base_ref or opened[0][1].meta.get("base")
    base = open_checkpoint(base_ref, find_run) if base_ref else opened[0][1]
    population = line_up(base, by_task)
    known = {short: expert.task or task for short, task, (_, expert) in zip(shorts, ids, opened, strict=True)}
    return Family(
        base, by_task, known, population, base_ref is not None, _inputs(base if base_ref else None, by_task, known)
    )


def _inputs(
    base: Checkpoint | None, experts: Mapping[str, Checkpoint], ids: Mapping[str, str]
) -> tuple[dict[str, Any], ...]:
    rows = [] if base is None else [{"role": "base", "task": None, "ref": str(base.ref), "digest": base.digest}]
    return (
        *rows,
        *({"role": "expert", "task": ids[t], "ref": str(e.ref), "digest": e.digest} for t, e in experts.items()),
    )
