"""The supplies `grams` and `fishers`: every expert calibrated on rows of its own task, once, and kept in the lab."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from mergectl import __version__
from mergectl.calibration_cache import Stored, find, key_of, put
from mergectl.calibration_rows import (
    batches,
    batches_alike,
    digest_of_files,
    digest_of_rows,
    draw,
    tokens_of_image,
)
from mergectl.checkpoints import Checkpoint
from mergectl.errors import UserError
from mergectl.families import Family
from mergectl.lab import Lab
from mergectl.lenders import role_of
from mergectl.methods._contract import MergeWarning
from mergectl.methods._moments import Gram
from mergectl.naming import find_slot, live_tensors
from mergectl.views import Renamed

if TYPE_CHECKING:
    import torch

    from mergectl.benchmarks._contract import Task
    from mergectl.benchmarks._rows import Rows
    from mergectl.live import LiveModel

Tensors: TypeAlias = "dict[str, torch.Tensor]"
Found: TypeAlias = tuple[Tensors, dict[str, Any]]  # tensors by the names of the live model, and facts about them


@dataclass(frozen=True)
class Pupil:
    """An expert to be calibrated: on what, and how."""

    name: str  # short, as the merge calls it
    task: Task
    expert: Checkpoint
    lender: Checkpoint | None  # of texts or a tokenizer that the expert itself lacks
    rows: Rows
    options: Mapping[str, Any]  # this task's own


class Calibrated(dict[str, "Named"]):
    """What calibration found, {task: {weight: it}}, each read from its file when it is asked for."""


class Named(Mapping[str, Any]):
    """What is stored of one expert, under the names that the weights have in a merge."""

    def __init__(self, stored: Stored, view: Renamed, task: str) -> None:
        """Pair the names of the merge with those that the expert's own model writes."""
        self.stored, self.view, self.task = stored, view, task
        same = stored.facts["same"]
        slots = {**{name: name for name in [*stored, *stored.facts["unread"]]}, **same}
        pairs = ((name, find_slot(own, slots, stored.facts["prefix"])) for name, own in view.own_name.items())
        known = {name: slots[slot] for name, slot in pairs if slot is not None}
        self._slots = {name: slot for name, slot in known.items() if slot in stored}
        self.unread = [name for name in known if name not in self._slots]

    def __getitem__(self, name: str) -> Any:
        slot = self._slots[name]
        found = self.stored[slot]
        if self.stored.facts["what"] == "grams":
            return Gram(found, int(self.stored.facts["rows"][slot]))
        cut = self.view.grown.get(name)
        return found if cut is None else found.narrow(cut.dim, 0, cut.common)

    def __contains__(self, name: object) -> bool:
        """Say whether anything is known of a weight, without reading it."""
        return name in self._slots

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)


def calibrated(lab: Lab, family: Family, seed: int, what: str, options: Mapping[str, Any]) -> Calibrated:
    """Return `grams` or `fishers` of all experts; `options` are settled, per-task ones as one number per task."""
    tasks = {name: task_of(lab, family, name) for name in family.experts}
    found = Calibrated()
    for place, (name, expert) in enumerate(family.experts.items()):
        own = {key: value[place] if isinstance(value, Sequence) and not isinstance(value, str) else value
               for key, value in options.items()}  # fmt: skip
        rows = draw(tasks[name], lab.data, _limit(what, own, tasks[name], expert.config), seed)
        lends = family.has_base and role_of(family.base, expert) != "head"
        pupil = Pupil(name, tasks[name], expert, family.base if lends else None, rows, own)
        found[name] = Named(_stored(lab, pupil, what, seed), family.population.experts[name], tasks[name].id)
        _say_unread(found[name], name)
    return found


def task_of(lab: Lab, family: Family, name: str) -> Task:
    """The task that an expert is calibrated on."""
    word = family.task_ids[name]
    try:
        found = lab.tasks([word])
    except UserError:
        found = []
        if "/" in word:
            raise
    if len(found) != 1:
        raise UserError(
            f"The expert '{name}' does not say which task it is for, and calibration shows every expert rows of its "
            f"own task. Name it: --experts suite/{name}={family.experts[name].ref}"
        )
    return found[0]


def _limit(what: str, options: Mapping[str, Any], task: Task, config: Mapping[str, Any]) -> int:
    """How many rows to draw: as many as can be looked at."""
    if what == "fishers":
        return int(options["num_fisher_examples"])
    tokens = tokens_of_image(config) if task.kind == "image_classification" else 1
    wanted = int(options["num_ada_examples"])
    return min(-(-wanted // tokens), options["max_examples"] or wanted)


def _say_unread(found: Named, name: str) -> None:
    """Warn of linear layers that no row reached."""
    if found.unread:
        layers = [weight.rpartition(".")[0] for weight in found.unread]
        more = f" and {len(layers) - 3} more" if len(layers) > 3 else ""
        warnings.warn(
            f"Calibration of '{name}' never reached {', '.join(layers[:3])}{more}: nothing is known of these layers.",
            MergeWarning, stacklevel=4,
        )  # fmt: skip


def _stored(lab: Lab, pupil: Pupil, what: str, seed: int) -> Stored:
    """What is known of an expert: from the cache, else found now, in a run of its own."""
    folder, key = lab.folder / "cache" / "calibration", key_of(_identity(pupil, what))
    if (stored := find(folder, key)) is not None:
        return stored
    task, expert = pupil.task, pupil.expert
    config = {
        "what": what, "task": task.id, "model": expert.digest, **pupil.options, "key": key, "version": __version__
    }  # fmt: skip
    with lab.start("calibration", config, seed=seed, name=f"{what}-{pupil.name}") as run:
        run.input("expert", expert.ref, expert.digest, task=task.id)
        started = time.perf_counter()
        with lab.terminal.progress(f"Calibrating {task.id}") as progress:
            tensors, facts = _found(lab, pupil, what, progress)
        stored = put(folder, key, tensors, {**facts, "what": what, "task": task.id, "run": run.id})
        run.metric("seconds", time.perf_counter() - started, task=task.id, split="fit")
        run.metric("examples", facts["examples"], task=task.id, split="fit")
        if facts["rows"]:
            run.metric("rows", max(facts["rows"].values()), task=task.id, split="fit")
        run.note("unread", facts["unread"])
        run.artifact("calibration", str(stored.path.absolute()), key, stored.path.stat().st_size)
    return stored


def _identity(pupil: Pupil, what: str) -> dict[str, Any]:
    """What decides the numbers: the model, what it reads and how, and the options."""
    folders = [model.folder for model in (pupil.expert, pupil.lender) if model is not None]
    return {
        "what": what,
        "model": pupil.expert.digest,
        "lender": None if pupil.lender is None else pupil.lender.digest,
        "task": [pupil.task.id, pupil.task.kind, list(pupil.task.labels), list(pupil.task.prompts)],
        "rows": digest_of_rows(pupil.rows),
        "reading": digest_of_files(*folders),
        "length": (pupil.expert.meta.get("recipe") or {}).get("max_length"),
        "options": dict(pupil.options),
    }


def _found(lab: Lab, pupil: Pupil, what: str, progress: Callable[[int, int, str], None]) -> Found:
    """Load the expert, and let its rows pass."""
    from mergectl.heads import open_live

    heads = {} if pupil.lender is None else {pupil.task.id: pupil.lender}
    live = open_live(pupil.expert, [pupil.task], heads=heads, device=lab.torch_device())
    live.use(pupil.task.id)
    try:
        return FINDERS[what](live, pupil, progress)
    except UserError as error:
        raise UserError(f"{pupil.expert.ref} on {pupil.task.id}: {error}") from error


def _grams(live: LiveModel, pupil: Pupil, progress: Callable[[int, int, str], None]) -> Found:
    from mergectl.calibration import Capture, moments_of

    options = pupil.options
    capture = Capture(options["num_ada_examples"], options["include_padding"], options["divisor"])
    preparer, size = live.preparer_of(pupil.task.id), options["calibration_batch_size"]

    def step(rows: int) -> None:
        progress(min(rows, capture.max_tokens), capture.max_tokens, pupil.task.id)

    found = moments_of(live.model, batches(pupil.task, preparer, pupil.rows, size), capture, step)
    own, same = _on_disk(live)
    grams = {own[name]: gram for name, gram in found.grams.items()}
    rows, unread = {name: gram.rows for name, gram in grams.items()}, [own[name] for name in found.unread]
    facts = {"rows": rows, "unread": unread, "examples": found.examples, "prefix": live.prefix, "same": same}
    return {name: gram.moment for name, gram in grams.items()}, facts


def _fishers(live: LiveModel, pupil: Pupil, progress: Callable[[int, int, str], None]) -> Found:
    from mergectl.calibration_fishers import fishers_of

    options, preparer = pupil.options, live.preparer_of(pupil.task.id)
    mode, limit = options["fisher_mode"], options["num_fisher_examples"]
    size, total = options["calibration_batch_size"], min(limit, len(pupil.rows))
    alone = pupil.task.kind == "text_to_text"  # a row and all its answers are a batch
    if mode == "per_example" and not alone:
        read = batches_alike(pupil.task, preparer, pupil.rows, size)
    else:
        read = batches(pupil.task, preparer, pupil.rows, 1 if mode == "per_example" else size, answers=True)
    found, examples = fishers_of(
        live.model, read, mode, progress=lambda seen: progress(seen, total, pupil.task.id)
    )  # fmt: skip
    own, same = _on_disk(live)
    shared = {own[name]: x for name, x in found.items() if own[name] in live.backbone}
    return shared, {"rows": {}, "unread": [], "examples": examples, "prefix": live.prefix, "same": same}


FINDERS: dict[str, Callable[[Any, Pupil, Callable[[int, int, str], None]], Found]]
FINDERS = {"grams": _grams, "fishers": _fishers}


def _on_disk(live: LiveModel) -> tuple[dict[str, str], dict[str, str]]:
    """Name of a live parameter -> its name on disk; and of tied weights, each other name on disk -> that one."""
    names: dict[int, list[str]] = {}
    for name, tensor in live_tensors(live.model).items():
        names.setdefault(id(tensor), []).append(name)
    own = {name: names[id(p)][0] for name, p in live.model.named_parameters() if id(p) in names}
    return own, {other: first for first, *others in names.values() for other in others}
