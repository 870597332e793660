"""Open the checkpoints of one merge and line them up."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from mergectl.adapters import AdapterCheckpoint
from mergectl.checkpoints import Checkpoint, open_checkpoint
from mergectl.errors import UserError
from mergectl.lineup import Population, headed_prefix, line_up
from mergectl.open_clip import VisionTower
from mergectl.peeking import peeking
from mergectl.refs import Ref
from mergectl.reheading import HeadedModel
from mergectl.stacking import CutTokens, Stacked
from mergectl.vocabulary import other_tokens

__all__ = ["Family", "Population", "headed_prefix", "line_up", "named", "open_family", "short_names"]

Suits: TypeAlias = Callable[[Sequence[str], Sequence[str]], object]  # told the experts' and the weights' names

LONGEST = 200  # bytes of a name: file systems take 255, and names are added to


def short_names(ids: Sequence[str], complain: Callable[[str], Exception] = UserError) -> list[str]:
    """Task ids to the short names that folders use: `glue/rte` -> `rte`; refuse two of one name."""
    shorts = [task.rsplit("/", 1)[-1] for task in ids]
    for task, short in zip(ids, shorts, strict=True):
        if short in ("", ".", "..") or not _is_name(short):
            raise complain(f"An expert cannot be called {task!a}: a folder gets its name. Name it: --experts NAME=...")
    for short, count in Counter(shorts).items():
        if count > 1:
            raise complain(f"Two experts are called '{short}'. Name them: --experts first={short} second=...")
    return shorts


def check_names(experts: Sequence[tuple[str | None, Ref]], export: str | None) -> None:
    """Refuse what the experts' names tell before a model is opened; a run of a grid may yet get another name."""
    names = [task for task, _ in experts if task]
    shorts = [task.rsplit("/", 1)[-1] for task in names]
    kept = [task for task, ref in experts if task and "/" in str(ref) and f"{task.rsplit('/', 1)[-1]}-" not in str(ref)]
    short_names(kept)
    if export is not None and export not in shorts and len(set(shorts)) == len(experts):
        raise UserError(f"--export {export}: the experts are {', '.join(shorts)}.")


def _is_name(short: str) -> bool:
    """Whether folder names can hold a name; bytes that are not UTF-8 stand for themselves."""
    return os.fsencode(short).decode(errors="replace").isprintable() and len(os.fsencode(short)) <= LONGEST


@dataclass(frozen=True)
class Family:
    """The opened checkpoints of one merge, lined up."""

    base: Checkpoint
    experts: dict[str, Checkpoint]  # short task name -> expert
    task_ids: dict[str, str]  # short task name -> `suite/task` where known
    population: Population
    has_base: bool = True
    inputs: tuple[dict[str, Any], ...] = field(default=())

    @property
    def counted(self) -> str:
        """How many experts there are, for a sentence."""
        return f"{len(self.experts)} expert{'s' * (len(self.experts) != 1)}"

    @property
    def answering(self) -> dict[str, str]:
        """Task id -> the expert whose head answers it: of several experts for one task, the first by name."""
        return _answering(self.task_ids)

    def check_unchanged(self) -> None:
        """Refuse models whose files are others now than when they were opened."""
        for model in (self.base, *self.experts.values()):
            model.check_unchanged()


def named(items: Sequence[str] | Mapping[str, str]) -> tuple[tuple[str | None, str], ...]:
    """Experts as (task or None, model): from a list of `model` or `task=model`, or a mapping."""
    if isinstance(items, Mapping):
        return tuple(items.items())
    return tuple(_split(item) for item in items)


def _split(item: str) -> tuple[str | None, str]:
    task, equals, ref = item.partition("=")
    if not equals or os.path.isdir(item):  # which says no to what cannot be a path
        return None, item
    return task, ref


def open_family(
    base_ref: Ref | None,
    experts: Sequence[tuple[str | None, Ref]],
    find_run: Callable[[str], Path | None] | None = None,
    suits: Suits | None = None,
) -> Family:
    """Open a base and its experts and line them up; headers are read, weights are not.

    Models on the hub are lined up by their headers alone, before they are fetched. `suits` may refuse the models.
    """
    if not experts:
        raise UserError("Name the models to merge: --experts MODEL MODEL ...")
    with peeking() as peeked:
        base, by_task, ids, has_base = opened(base_ref, experts, find_run)
        if peeked:
            _lined_up(base, by_task, suits)
    if peeked:
        base, by_task, ids, has_base = opened(base_ref, experts, find_run)
    with _digesting([base, *by_task.values()]):
        population = _lined_up(base, by_task, suits)
    stacked = {note: None for model in (base, *by_task.values()) for note in _made_of(model)}
    fused = [model.note() for model in (base, *by_task.values()) if isinstance(model, VisionTower) and model.fused]
    population = replace(population, notes=(*stacked, *fused, *population.notes))
    known = {
        short: task if "/" in task else expert.task or task
        for task, (short, expert) in zip(ids, by_task.items(), strict=True)
    }
    alone = {} if any(base is expert for expert in by_task.values()) else {"the base": base}
    mixed = other_tokens(alone | {f"'{short}'": expert for short, expert in by_task.items()})
    notes = (*population.notes, *_shared_heads(known, population), *mixed)
    if not has_base and any("the base" in note.lower() for note in notes):
        notes = (f"No base was given: where notes speak of the base, they mean '{next(iter(by_task))}'.", *notes)
    population = replace(population, notes=notes)
    return Family(base, by_task, known, population, has_base, _inputs(base if has_base else None, by_task, known))


def _lined_up(base: Checkpoint, experts: Mapping[str, Checkpoint], suits: Suits | None) -> Population:
    population = line_up(base, experts)
    if suits is not None:
        suits(list(experts), list(population.base))
    return population


def opened(
    base_ref: Ref | None, experts: Sequence[tuple[str | None, Ref]], find_run: Callable[[str], Path | None] | None
) -> tuple[Checkpoint, dict[str, Checkpoint], list[str], bool]:
    """Open a base, the experts by short name, with their tasks' ids; without a base the first expert stands for it."""
    found = [(task, open_checkpoint(ref, find_run)) for task, ref in experts]
    ids = [task or expert.task or expert.label for task, expert in found]
    shorts = short_names([_told_apart(task, ids, expert) for task, (_, expert) in zip(ids, found, strict=True)])
    by_task = {short: expert for short, (_, expert) in zip(shorts, found, strict=True)}
    base_ref = base_ref or _own_base(by_task)
    return (open_checkpoint(base_ref, find_run) if base_ref else found[0][1]), by_task, ids, bool(base_ref)


@contextlib.contextmanager
def _digesting(models: Sequence[Checkpoint]) -> Iterator[None]:
    """Have the models' digests taken meanwhile: importing torch keeps one processor busy for longer than that."""

    def digest() -> None:
        with contextlib.suppress(Exception):  # told where the digest is needed
            for model in models:
                _ = model.digest

    worker = threading.Thread(target=digest, name="digests", daemon=True)
    worker.start()
    yield
    worker.join()


def _made_of(model: Checkpoint) -> Iterator[str]:
    """What a person should know of a model that is made of others."""
    if isinstance(model, HeadedModel):
        yield from _made_of(model.model)
    if isinstance(model, Stacked | CutTokens | HeadedModel):
        yield model.note()


def _told_apart(task: str, ids: Sequence[str], expert: Checkpoint) -> str:
    """The name of an expert: its task's, or, of several for one task, that of the folder which a grid gave it."""
    short = task.rsplit("/", 1)[-1]
    return expert.label if ids.count(task) > 1 and expert.label.startswith(f"{short}-") else task


def _answering(task_ids: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in sorted(task_ids):
        found.setdefault(task_ids[name], name)
    return found


def _shared_heads(task_ids: Mapping[str, str], population: Population) -> Iterator[str]:
    """Say whose head answers a task for which there are several experts."""
    for task, first in _answering(task_ids).items():
        names = [name for name, own in task_ids.items() if own == task]
        if len(names) > 1 and population.heads[first]:
            yield f"{', '.join(names)} are all for {task}, which the result answers with the head of {first}."


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
    return (
        *([] if base is None else [_input("base", None, base)]),
        *(_input("expert", ids[task], expert) for task, expert in experts.items()),
    )


def _input(role: str, task: str | None, model: Checkpoint) -> dict[str, Any]:
    """What a record says of one model that goes into a merge."""
    row = {"role": role, "task": task, "ref": str(model.ref), "digest": model.digest}
    if isinstance(model, CutTokens):
        return row | model.cut.record()
    if isinstance(model, HeadedModel):
        return row | model.reheaded.record()
    return row | (model.stack.record() if isinstance(model, Stacked) else {})
