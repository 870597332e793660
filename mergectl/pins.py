"""The lab's pins: at which commit it takes each model and data set of the hub, in `revisions.yaml` beside the store."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergectl.config import read_yaml
from mergectl.errors import UserError

if TYPE_CHECKING:
    from mergectl.benchmarks._contract import Task

FILE, KINDS = "revisions.yaml", ("models", "datasets")
COMMIT = re.compile(r"[0-9a-f]{40}")
NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")  # a data set may be pinned on a branch: org/name@branch
SHORT = 7  # digits of a commit that people read
GONE = (
    "The hub has no commit {commit} of {name} any more, to which {file} pins it. Move to its present one: "
    "mergectl run NAME --update-pins."
)

Pins = dict[str, dict[str, str]]  # models and datasets: hub id -> commit


def lab_file() -> Path:
    """The pins of the lab that this command works in, found as the lab's own methods are."""
    store = os.environ.get("MERGECTL_STORE", "")
    path = Path(store).expanduser() if store and "://" not in store else Path("lab/mergectl.duckdb")
    return (path if path.is_dir() else path.parent) / FILE


def read(path: Path) -> Pins:
    """Read pins and check them; there are none where there is no file."""
    content: Mapping[str, Any] = read_yaml(path) if path.exists() else {}
    if unknown := [str(key) for key in content if key not in KINDS]:
        raise UserError(f"{path}: unknown key '{unknown[0]}'. Pins stand under {' and '.join(KINDS)}.")
    return {kind: _checked(path, kind, content.get(kind) or {}) for kind in KINDS}


def _checked(path: Path, kind: str, found: Any) -> dict[str, str]:
    if not isinstance(found, Mapping):
        raise UserError(f"{path}: '{kind}' must be a mapping of hub ids to commits, got '{found}'.")
    for name, commit in found.items():
        if not NAME.fullmatch(str(name)):
            raise UserError(f"{path}: '{name}', under {kind}, is no hub id (org/name).")
        if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
            raise UserError(f"{path}: {name} must be pinned to a commit, 40 digits of 0-9 and a-f, got '{commit}'.")
    return {str(name): commit for name, commit in found.items()}


def commit_of(kind: str, name: str) -> str | None:
    """The commit to which the lab pins a hub id, or None."""
    return read(lab_file())[kind].get(name)


def pinned(tasks: Sequence[Task], data: Path | None, path: Path) -> list[Task]:
    """The tasks, those whose rows come from the hub at the commits to which a file pins their data sets."""
    from mergectl.benchmarks import _sources

    commits = read(path)["datasets"]

    def at(task: Task) -> Task:
        commit = commits.get(_sources.hub_name(task)) if _sources.from_hub(task, data) else None
        return task if commit is None else replace(task, revision=commit)

    return [at(task) for task in tasks]


def origin(folder: Path) -> tuple[str, str, str] | None:
    """The hub id and the commit of a folder in the hub's cache, and its place in there; None for any other."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cache, place = Path(HF_HUB_CACHE).absolute(), folder.absolute()
    parts = place.relative_to(cache).parts if place.is_relative_to(cache) else ()
    if len(parts) < 3 or parts[1] != "snapshots" or not COMMIT.fullmatch(parts[2]):
        return None
    kind, *words = parts[0].split("--")
    return ("/".join(words), parts[2], "/".join(parts[3:])) if kind == "models" else None


def exact(ref: str, folder: Path) -> str:
    """A model of the hub by its id and the commit that was fetched; any other by the name that it has."""
    found = origin(folder)
    return ref if found is None or found[2] else f"{found[0]}@{found[1]}"


def without_commit(ref: str) -> str:
    """A hub id as people read it in tables: without the 40 digits of a commit."""
    name, _, revision = ref.partition("@")
    return name if COMMIT.fullmatch(revision) else ref
