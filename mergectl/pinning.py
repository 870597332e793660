"""Pin the hub ids of a pipeline before its first step: to a lock file's commits, else to those that the hub has now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergectl.artefacts import write_text
from mergectl.claims import claimed
from mergectl.errors import UserError
from mergectl.families import named
from mergectl.lab import Lab
from mergectl.pins import COMMIT, FILE, GONE, KINDS, SHORT, Pins, read
from mergectl.steps import words_of
from mergectl.tasks import own_tasks, resolve

if TYPE_CHECKING:
    from mergectl.benchmarks._contract import Task

HEAD = (
    "# The commits of the hub's models and data sets that this lab works with. `mergectl run` writes those of a\n"
    "# pipeline before its first step; `mergectl run NAME --pins FILE` takes those of another such file, and\n"
    "# `mergectl run NAME --update-pins` the hub's present ones.\n"
)
MODELS, TASKS = ("base", "against", "experts", "models", "heads"), ("tasks", "on", "only")  # keys of a step
OUT_OF_REACH = {
    "models": "There is no folder '{name}', and the hub cannot be reached to look for it; the local cache has no copy. "
    "Name a local folder.",
    "datasets": "The hub cannot be reached for the data set {name} ({task}), and the local cache has no copy. Name a "
    "folder that holds it: --data DIR.",
}
UNKNOWN = {
    "models": "There is no folder '{name}', and the hub has no model of that name, or does not show it to you.",
    "datasets": "The hub has no data set {name}, or does not show it to you.",
}
TIMEOUT = 20  # seconds that the hub gets to answer

Step = Mapping[str, Any]
Wanted = dict[str, dict[str, "list[Task]"]]  # models and datasets: hub id -> the tasks that read it


def settle(lab: Lab, steps: Sequence[Step], given: Path | None, *, renew: bool) -> None:
    """Pin every hub id of the steps that carries no revision; a pin that is there stays, unless all are renewed.

    Pins of the file `given` come before those of the lab. Of several processes one pins, and the others take its pins.
    """
    wanted, path = hub_ids(lab, steps), lab.folder / FILE
    if given is None and not any(wanted.values()):
        return
    with claimed(path, "pinning into", wait=True):
        old = read(path)
        new = _joined(old, given)
        for kind, names in wanted.items():
            for name, tasks in names.items():
                commit = None if renew else new[kind].get(name)
                if commit is None:
                    commit = _present(kind, name, tasks, renew=renew)
                else:
                    _check_there(kind, name, commit, tasks, given or path)
                new[kind][name] = commit
        if new != old:
            write_text(path, _text(new))
    for line in _changes(old, new):
        lab.terminal.say(line)


def shown(lab: Lab, steps: Sequence[Step], given: Path | None, *, renew: bool) -> list[tuple[str, str]]:
    """What a person reads of each hub id of the steps before anything is done."""
    pins = _joined(read(lab.folder / FILE), given)
    rows = []
    for kind, names in hub_ids(lab, steps).items():
        for name in names:
            commit = pins[kind].get(name)
            later = "will be pinned at the first run" if commit is None else "will move to the hub's present commit"
            fixed = commit is not None and not renew
            rows.append((f"{_one(kind)} {name}", f"pinned to {commit[:SHORT]}" if fixed and commit else later))
    return rows


def hub_ids(lab: Lab, steps: Sequence[Step]) -> Wanted:
    """The hub ids that steps name without a revision: models, and the data sets of their tasks."""
    from mergectl.benchmarks import _sources

    found: Wanted = {kind: {} for kind in KINDS}
    words: list[str] = []
    for what in (next(iter(step.values())) for step in steps):
        words += [word for key in TASKS for word in words_of(what, key)]
        for own, ref in _models_of(what):
            words += [own] if own is not None and "/" in own else []
            if _is_hub_id(lab, ref):
                found["models"][ref] = []
    for task in resolve(words, own_tasks(lab.own_tasks)):
        if _sources.from_hub(task, lab.data) and not COMMIT.fullmatch(task.revision or ""):
            found["datasets"].setdefault(_sources.hub_name(task), []).append(task)
    return found


def _models_of(what: Step) -> Iterator[tuple[str | None, str]]:
    """The models that a step names, each with its task where it is said; a bare configuration is none."""
    for key in MODELS:
        items = what.get(key) or []
        if not (isinstance(items, Mapping) and "model_type" in items):
            yield from named([items] if isinstance(items, str) else items)


def _is_hub_id(lab: Lab, ref: str) -> bool:
    """Whether a model is one of the hub without a revision: no folder, file or run, and none that a step makes."""
    path = Path(ref).expanduser()
    if "@" in ref or ref.startswith((".", "/", "~")) or ref.count("/") > 1 or path.suffix == ".json" or path.exists():
        return False
    return "/" in ref or lab.find_run(ref) is None


def _joined(pins: Pins, given: Path | None) -> Pins:
    """The lab's pins and those of a file that somebody handed over, which count more."""
    if given is not None and not given.is_file():
        raise UserError(f"There is no file {given} of pins.")
    more = read(given) if given is not None else {kind: {} for kind in KINDS}
    return {kind: {**pins[kind], **more[kind]} for kind in KINDS}


def _present(kind: str, name: str, tasks: Sequence[Task], *, renew: bool) -> str:
    """The commit that the hub has now, or, where it cannot be reached, that of the copy in the local cache."""
    repo, _, branch = name.partition("@")
    try:
        return _ask(kind, repo, branch or None)
    except ConnectionError as error:
        if renew:
            raise UserError(f"The hub cannot be reached, so the pin of {name} cannot be moved.") from error
        if cached := _cached(kind, repo, tasks):
            return cached
        raise UserError(OUT_OF_REACH[kind].format(name=name, task=tasks and tasks[0].id)) from error
    except LookupError as error:
        raise UserError(UNKNOWN[kind].format(name=name)) from error


def _check_there(kind: str, name: str, commit: str, tasks: Sequence[Task], file: Path) -> None:
    """Refuse a pin whose commit is gone; without the hub nobody knows, and a step that needs it will say so."""
    repo = name.partition("@")[0]
    if commit == _cached(kind, repo, tasks, commit):
        return
    try:
        _ask(kind, repo, commit)
    except ConnectionError:
        return
    except LookupError as error:
        raise UserError(GONE.format(commit=commit[:SHORT], name=name, file=file)) from error


def _ask(kind: str, repo: str, revision: str | None) -> str:
    """Ask the hub for the commit of a revision: LookupError where it has none, ConnectionError where it is silent."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    ask = HfApi().model_info if kind == "models" else HfApi().dataset_info
    try:
        found = ask(repo, revision=revision, timeout=TIMEOUT).sha
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise LookupError(str(error)) from error
    except Exception as error:  # of the network below, under several names: out of reach, or a server in trouble
        raise ConnectionError(str(error)) from error
    if found is None:
        raise LookupError(f"{repo} has no commits")
    return str(found)


def _cached(kind: str, repo: str, tasks: Sequence[Task], commit: str | None = None) -> str | None:
    """The commit of a copy in the local cache: the one that is asked for, else the one that was present last."""
    from dataclasses import replace

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    from mergectl.benchmarks import _sources

    if kind == "datasets":
        wanted = tasks if commit is None else [replace(task, revision=commit) for task in tasks]
        return next((found for task in wanted if (found := _sources.cached_commit(task))), None)
    try:
        return Path(snapshot_download(repo, revision=commit, local_files_only=True)).name
    except (LocalEntryNotFoundError, ValueError):
        return None


def _one(kind: str) -> str:
    return "model" if kind == "models" else "data set"


def _text(pins: Pins) -> str:
    """The file as people read it; commits are quoted, since one may look like a number."""
    parts = [
        "\n".join([f"{kind}:", *(f'  {name}: "{commit}"' for name, commit in sorted(pins[kind].items()))])
        for kind in KINDS if pins[kind]
    ]  # fmt: skip
    return "\n".join([HEAD.rstrip(), *parts, ""])


def _changes(old: Pins, new: Pins) -> Iterator[str]:
    """Say what was pinned, and what was moved from where."""
    for kind in KINDS:
        for name, commit in new[kind].items():
            before = old[kind].get(name)
            if before != commit:
                was = f" (was {before[:SHORT]})" if before else ""
                yield f"Pinned the {_one(kind)} {name} to {commit[:SHORT]}{was}."
