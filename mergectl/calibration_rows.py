"""The rows of a task that calibration looks at: drawn by a seed, known by their content, made ready batch by batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergectl.errors import UserError
from mergectl.text2text import AnswerPreparer

if TYPE_CHECKING:
    import torch

    from mergectl.benchmarks._contract import Task
    from mergectl.benchmarks._rows import Rows
    from mergectl.preprocess import Example, Preparer

TOKENS = 1024  # of a batch of texts alike in length: more make it no faster
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "spiece.model", "preprocessor_config.json")


def draw(task: Task, data: Path | None, limit: int, seed: int) -> Rows:
    """Draw rows of a task that a model may learn from."""
    from mergectl.benchmarks import _rows

    if "fit" not in task.parts:
        raise UserError(
            f"{task.id} has no rows to learn from, only {', '.join(task.parts)}: an expert cannot be calibrated on it."
        )
    return _rows.load(task, "fit", data=data, limit=limit, seed=seed)


def tokens_of_image(config: Mapping[str, Any]) -> int:
    """How many rows an image is at least, as far as a configuration tells: its patches."""
    vision = config.get("vision_config") or config
    size, patch = vision.get("image_size"), vision.get("patch_size")
    return (size // patch) ** 2 if isinstance(size, int) and isinstance(patch, int) and 0 < patch <= size else 1


def digest_of_rows(rows: Rows) -> str:
    """The digest of what rows hold, wherever they lie."""
    sha = hashlib.sha256()
    for name, column in rows.columns.items():
        sha.update(f"{name} {len(column)};".encode())
        for value in column:
            _feed(sha, value)
    sha.update(repr(list(rows.labels)).encode())
    return sha.hexdigest()


def _feed(sha: Any, value: Any) -> None:
    """Take in a text, a number, a picture, or a list of them."""
    if hasattr(value, "convert") and hasattr(value, "tobytes"):  # Pillow's
        sha.update(f"{value.mode}{value.size}".encode() + value.tobytes())
    elif hasattr(value, "tobytes"):
        sha.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    elif isinstance(value, Mapping):
        _feed(sha, [part for pair in sorted(value.items()) for part in pair])
    elif isinstance(value, list | tuple):
        sha.update(f"list {len(value)};".encode())
        for part in value:
            _feed(sha, part)
    else:
        content = value if isinstance(value, bytes) else repr(value).encode()
        sha.update(f"{type(value).__name__} {len(content)};".encode() + content)


def digest_of_files(*folders: Path) -> str:
    """The digest of what turns rows into numbers, from the first folder that has any of it."""
    sha = hashlib.sha256()
    for folder in folders:
        if found := [folder / name for name in TOKENIZERS if (folder / name).is_file()]:
            for path in found:
                sha.update(path.name.encode() + path.read_bytes())
            break
    return sha.hexdigest()


def batches(
    task: Task, preparer: Preparer, rows: Rows, size: int, *, answers: bool = False
) -> Iterator[dict[str, torch.Tensor]]:
    """Go through the rows in their order, in batches of nearly equal size; the labels come along.

    Of a text-to-text task the decoder reads the right answers, or with `answers` all that are offered.
    """
    for start, stop in cuts(len(rows), size):
        examples = _examples(task, preparer, rows, start, stop)
        yield (
            preparer.stack(examples) if answers and isinstance(preparer, AnswerPreparer) else preparer.collate(examples)
        )


def batches_alike(task: Task, preparer: Preparer, rows: Rows, size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Go through the rows in batches of nearly equal length, of at most `size` rows, long ones of fewer.

    Only as many rows are prepared at a time as make sixteen batches.
    """
    for start, stop in cuts(len(rows), 16 * size):
        examples = sorted(_examples(task, preparer, rows, start, stop), key=preparer.length)
        while examples:
            most = max(1, min(size, TOKENS // max(preparer.length(examples[-1]), 1)))
            yield preparer.collate(examples[-most:])
            del examples[-most:]


def _examples(task: Task, preparer: Preparer, rows: Rows, start: int, stop: int) -> list[Example]:
    """Some of the rows made ready, their labels with them."""
    columns: dict[str, Sequence[Any]] = {name: column[start:stop] for name, column in rows.columns.items()}
    found = preparer.prepare(task, columns)
    return [{**example, "labels": label} for example, label in zip(found, rows.labels[start:stop], strict=True)]


def cuts(count: int, size: int) -> Iterator[tuple[int, int]]:
    """Where batches begin and end: as few as may be, none much smaller than another.

    >>> list(cuts(9, 4))
    [(0, 3), (3, 6), (6, 9)]
    """
    number = -(-count // size)
    return ((count * i // number, count * (i + 1) // number) for i in range(number))
