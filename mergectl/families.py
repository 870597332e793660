"""Open the checkpoints of one merge and line them up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergectl.adapters import AdapterCheckpoint
from mergectl.checkpoints import Checkpoint, open_checkpoint
from mergectl.errors import UserError
from mergectl.lineup import Population, headed_prefix, line_up

__all__ = ["Family", "Population", "headed_prefix", "line_up", "named", "open_family", "short_names"]


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
    base_ref = base_ref or _own_base(by_task)
    base = open_checkpoint(base_ref, find_run) if base_ref else opened[0][1]
    population = line_up(base, by_task)
    known = {
        short: task if "/" in task else expert.task or task
        for short, task, (_, expert) in zip(shorts, ids, opened, strict=True)
    }
    return Family(
        base, by_task, known, population, base_ref is not None, _inputs(base if base_ref else None, by_task, known)
    )


def _own_base(experts: Mapping[str, Checkpoint]) -> str | None:
    """The base that the experts say they came from, an adapter by its own file; two different ones are refused."""
    named: dict[str, tuple[str, str]] = {}  # digest of a base -> an expert that came from it, and its name for the base
    refs = []
    for task, expert in experts.items():
        own = expert.base if isinstance(expert, AdapterCheckpoint) else None
        ref = expert.meta.get("base") or (None if own is None else own.ref)
        digest = expert.meta.get("base_digest") or (None if own is None else own.digest)
        refs += [str(ref)] if ref else []
        if ref and digest:
            named.setdefault(digest, (task, str(ref)))
    if len(named) > 1:
        (one, base), (other, another) = list(named.values())[:2]
        raise UserError(
            f"Expert '{one}' was fine-tuned from {base}, '{other}' from another model ({another}). "
            "Their task vectors do not belong together; to merge them all the same, name the base: --base."
        )
    return refs[0] if refs else None


def _inputs(
    base: Checkpoint | None, experts: Mapping[str, Checkpoint], ids: Mapping[str, str]
) -> tuple[dict[str, Any], ...]:
    rows = [] if base is None else [{"role": "base", "task": None, "ref": str(base.ref), "digest": base.digest}]
    return (
        *rows,
        *({"role": "expert", "task": ids[t], "ref": str(e.ref), "digest": e.digest} for t, e in experts.items()),
    )
