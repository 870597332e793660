"""Images that lie as files in folders: one folder per class, or one tree of all with lists that cut it."""

from __future__ import annotations

import os
from pathlib import Path

from mergectl.benchmarks._contract import BenchmarkError, Task, Use
from mergectl.benchmarks._tables import Table

ENDINGS = (".png", ".jpg", ".jpeg", ".ppm", ".bmp", ".webp", ".tif", ".tiff")
TREE = "images"  # the folder, beside where the splits would be, of a data set that is cut by lists


def by_class(folder: Path, task: Task) -> Table:
    """Read `<class>/<file>` below a split's folder, classes and files by the alphabet; deeper folders count too."""
    names = {_plain(label): label for label in task.labels}
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    rows = [
        (str(path.relative_to(folder)), names.get(_plain(name), name))
        for name in classes
        for path in sorted(folder.joinpath(name).rglob("*"))
        if path.suffix.lower() in ENDINGS
    ]
    if not rows:
        raise BenchmarkError(f"{folder} has no images in folders named after the classes of {task.id}.")
    return _table(task, rows, folder)


def listed(task: Task, use: Use, folder: Path) -> Table:
    """Read the files that a data set's own lists name for one use."""
    assert task.lists is not None
    rows, first = task.lists(use), dict[str, str]()
    for file, label in rows:
        first.setdefault(label, file)
    for file in first.values():  # of each class; to look for every image would take long
        if not (folder / file).is_file():
            raise BenchmarkError(
                f"{folder / file} could not be read: there is no such file, and the lists that cut {task.id} name it. "
                f"Save all class folders of the original archive below {folder}, or rename that folder: without it the "
                "split of another copy is taken."
            )
    return _table(task, rows, folder)


def _table(task: Task, rows: list[tuple[str, str]], folder: Path) -> Table:
    image, label = task.inputs[0], task.label
    columns = {image: [file for file, _ in rows], label: [name for _, name in rows]}
    return Table(columns, os.fspath(folder), folder)


def _plain(name: str) -> str:
    return name.lower().replace("_", " ").replace("-", " ")
