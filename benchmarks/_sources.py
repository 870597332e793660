"""Find a task's rows: the data folder first, then the local `datasets` cache, then the hub at its pinned revision."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from mergectl.benchmarks import _folders, _tables
from mergectl.benchmarks._contract import BenchmarkError, Part, Task, Use
from mergectl.benchmarks._tables import Table

LISTED = "listed for"  # begins the name of a split that a data set's own lists make, so that it is not cut again


def find(task: Task, use: Use, data: Path | None) -> tuple[str, Table]:
    """Return the split that was read and its table; say every place tried if there is none."""
    part = task.parts[use]
    if task.make is not None:
        return part.split, Table(task.make(part.split), f"made by {task.name}")
    columns = None if task.prepare else [*task.inputs, task.label]
    if task.files:
        return part.split, _tables.read(Path(task.files[use]), columns)
    tree = None if data is None else Path(data) / task.source / task.config / _folders.TREE
    if task.lists is not None and tree is not None and tree.is_dir():
        return f"{LISTED} {use}", _folders.listed(task, use, tree)
    tried: list[str] = []
    if found := next(_on_disk(task, part, data, tried), None):
        split, files = found
        if files[0].is_dir():
            return split, _folders.by_class(files[0], task)
        return split, _tables.join([_tables.read(file, columns) for file in files])
    return _from_hub(task, use, part, columns, data, tried)


def hub_name(task: Task) -> str:
    """Return the id under which the task's data set is pinned: a branch other than the main one belongs to it."""
    return f"{task.hub}@{task.revision}" if task.revision else task.hub


def from_hub(task: Task, data: Path | None) -> bool:
    """Return whether a task's rows come from the hub or its local cache: nothing else has any of them."""
    if not task.hub or task.make is not None or task.files:
        return False
    if data is not None and (Path(data) / task.source / task.config / _folders.TREE).is_dir():
        return False
    splits = {split for part in task.parts.values() for split in (part.split, *part.instead)}
    return not any(_in_folder(task, split, data, []) for split in splits)


def cached_commit(task: Task) -> str | None:
    """Return the commit of the copy that the local cache would give, the newest one if no commit is named."""
    files = next((found for part in task.parts.values() if (found := _in_cache(task, part.split))), None)
    return files[0].parent.name if files else None


def _on_disk(task: Task, part: Part, data: Path | None, tried: list[str]) -> Iterator[tuple[str, list[Path]]]:
    """Yield the split and files of each place that has them, the data folder before the cache."""
    for split in (part.split, *part.instead):
        if files := _in_folder(task, split, data, tried):
            yield split, files
    for split in (part.split, *part.instead):
        if files := _in_cache(task, split):
            yield split, files


def _in_folder(task: Task, split: str, data: Path | None, tried: list[str]) -> list[Path]:
    """Return `<source>/<config>/<split>.parquet` in the data folder, its shards as the hub names them, or its CSV.

    Images may also lie in a folder `<split>` with one folder for each class.
    """
    if data is None:
        return []
    folder = Path(data) / task.source / task.config
    whole, text = folder / f"{split}.parquet", folder / f"{split}.csv"
    if whole.is_file():
        return [whole]
    tried.append(f"there is no {text if task.obtain else whole}")
    shards = sorted(folder.glob(f"{split}-?????-of-?????.parquet"))
    if shards or text.is_file():
        return shards or [text]
    return [folder / split] if task.kind == "image_classification" and (folder / split).is_dir() else []


def _in_cache(task: Task, split: str) -> list[Path]:
    """Return the newest copy in the cache of the `datasets` library, of the pinned revision if there is one."""
    if not task.hub:
        return []
    owner, _, name = task.hub.rpartition("/")
    folder = _cache_folder() / "___".join(filter(None, [owner, name.lower()])) / task.config
    pinned = task.revision if task.revision and "/" not in task.revision else "*"  # a branch has no folder of its own
    copies = sorted(folder.glob(f"*/{pinned}"), key=lambda copy: copy.stat().st_mtime, reverse=True)
    for copy in copies:
        files = sorted(copy.glob(f"*-{split}.arrow")) or sorted(copy.glob(f"*-{split}-?????-of-?????.arrow"))
        if files:
            return files
    return []


def _cache_folder() -> Path:
    """Return where the `datasets` library keeps its copies, without importing it (that takes seconds)."""
    if given := os.environ.get("HF_DATASETS_CACHE"):
        return Path(given).expanduser()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "datasets"


def _from_hub(
    task: Task, use: Use, part: Part, columns: Sequence[str] | None, data: Path | None, tried: list[str]
) -> tuple[str, Table]:
    """Download the split at the pinned revision, or raise the error that tells all places tried."""
    if task.hub:
        tried.append(f"the datasets cache ({_cache_folder()}) has no {task.hub}, {task.config}")
    for split in (part.split, *part.instead) if task.hub else ():
        try:
            return split, _tables.require(download(task, split), columns)
        except _NoSplitError as error:
            tried.append(f"the hub's {task.hub} {error}")
        except ConnectionError as error:
            tried.append(f"the hub gave no {task.hub}: {error}")
            break
    ending = ".csv" if task.obtain else ".parquet"
    folder = Path(data or "DIR") / task.source / task.config
    classes = f", or the class folders of the original archive below {folder / _folders.TREE}" if task.lists else ""
    where = f"{folder / part.split}{ending}{classes}"
    hint = "" if data else " and pass --data DIR"
    looked = "; ".join(tried) or "no data folder is given and it has no hub copy"
    advice = f" {task.obtain}" if task.obtain else ""
    raise BenchmarkError(f"No rows for {task.id} ({use}): {looked}.{advice} Put them at {where}{hint}.")


class _NoSplitError(LookupError):
    """The hub has the data set, but not this split."""


def reachable(task: Task) -> bool:
    """Return whether the hub answers at all when asked once for a data set."""
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(task.hub or "", revision=task.revision, timeout=20)
    except Exception as error:  # any other is an answer, or the library's own to tell
        return not any(kind.__name__ == "TransportError" for kind in type(error).__mro__)
    return True


def download(task: Task, split: str) -> Table:
    """Load one split from the hub with the `datasets` library."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}:
        raise ConnectionError("HF_HUB_OFFLINE is set")
    if not reachable(task):  # the library would try it five times, and complain each time
        raise ConnectionError("it cannot be reached from here")
    from datasets import load_dataset

    config = None if task.config == "default" else task.config
    try:
        rows = load_dataset(task.hub, config, split=split, revision=task.revision)
    except Exception as error:  # the library passes on those of its HTTP, file system and data formats
        if isinstance(error, ValueError) and "unknown split" in str(error).lower():
            raise _NoSplitError(f"has no split '{split}'") from error
        raise ConnectionError(f"{type(error).__name__}: {error}") from error
    names = {name: tuple(kind.names) for name, kind in rows.features.items() if hasattr(kind, "names")}
    table = rows.with_format("arrow")[:]
    place = f"hub {task.hub}@{task.revision or 'main'}"
    return Table({name: table.column(name) for name in table.column_names}, place, None, names)
