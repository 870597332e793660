"""What a pipeline will take, before it is started: disk and time of every step, roughly.

Time is counted operations (6 per weight and token to learn, 2 to answer) over what this machine shows in a quick
multiplication; disk is that of the models that a step writes. What cannot be known beforehand is assumed, and said.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mergectl.errors import UserError
from mergectl.presets import settled
from mergectl.steps import words_of

# Weights of the models that shipped pipelines begin from; those of a local folder are counted.
WEIGHTS = {
    "google-t5/t5-base": 223e6, "google-t5/t5-large": 738e6, "bigscience/T0_3B": 2850e6,
    "google/t5-v1_1-base": 248e6, "google/t5-v1_1-large": 783e6, "FacebookAI/roberta-base": 125e6,
    "microsoft/deberta-base": 139e6, "openai-community/gpt2": 124e6, "google-bert/bert-base-uncased": 110e6,
    "huawei-noah/TinyBERT_General_6L_768D": 67e6, "openai/clip-vit-base-patch32": 151e6,
    "openai/clip-vit-large-patch14": 428e6,
}  # fmt: skip
ROWS, LENGTH, EPOCH_ROWS = 2000, 128, 20_000  # assumed: rows of a task to answer, tokens of a row, rows to learn from
USED = 0.4  # share of the machine's speed that training and answering reach
DISK_SPEED = 200e6  # bytes a second that a merge goes through
ADAPTER = 0.02  # of a model, what its adapter takes
SIDE = 1024  # of the matrices that are multiplied
ASSUMED = (
    f"Assumed where nothing is said: {ROWS} rows to answer and {EPOCH_ROWS} to learn from per task, "
    f"{LENGTH} tokens a row, {USED:.0%} of {{speed:.0f}} GFLOP/s."
)


class Estimate(NamedTuple):
    """Bytes that a step writes and operations that it needs; NaN where the model's size is not known."""

    disk: float
    flops: float
    seconds: float = 0.0  # besides the operations


def estimate(step: Mapping[str, Any], settings: Mapping[str, Any]) -> Estimate:
    """What one step of a pipeline needs; the pipeline's settings say the base where a step does not."""
    ((verb, what),) = step.items()
    weights = _weights(what.get("base", settings.get("base")))
    size = 4 * weights
    tasks = len(words_of(what, "tasks") or words_of(what, "on") or words_of(settings, "tasks")) or 1
    answer = 2 * weights * LENGTH * min(what.get("limit") or ROWS, ROWS) * tasks
    if verb == "finetune":
        copies = tasks * math.prod(len(values) for values in what.get("grid", {}).values())
        kept = copies * size * (1 + ADAPTER if what.get("peft", "none") != "none" else 1)
        rows = _rows(what)
        if what.get("for") == "medusa" and what.get("mask") != "half":  # the short trainings are models, too
            brief = (what.get("prepass_epochs") or 1) * EPOCH_ROWS
            kept, rows = 2 * kept + copies * size / 32, rows + (min(brief, rows) if what.get("max_steps") else brief)
        return Estimate(kept, 6 * weights * (what.get("max_length") or LENGTH) * rows * copies)
    if verb == "merge":
        models = 2 + (len(words_of(what, "experts")) if isinstance(what["experts"], list) else tasks)
        return Estimate(size, _adapting(what, weights, tasks), models * size / DISK_SPEED)
    if verb == "search":
        return Estimate(size, what.get("trials", 20) * answer)
    if what.get("conflict"):  # nothing is answered: the base and the experts are read
        return Estimate(0.0, 0.0, len(words_of(what, "models")) * (1 + tasks) * size / DISK_SPEED)
    return Estimate(0.0, answer * len(words_of(what, "models")))


def total(found: Sequence[Estimate]) -> Estimate:
    """All steps together."""
    return Estimate(*(sum(column) for column in zip(*found, strict=True)))


def _rows(what: Mapping[str, Any]) -> float:
    """Rows that a fine-tuning reads, of one task; the preset medusa says how many by the task."""
    found = [what]
    if what.get("preset") == "medusa":
        with contextlib.suppress(UserError):  # of a suite, or of a task that it does not know
            found = [settled(task, {}, what) for task in words_of(what, "tasks")] or found
    return sum(map(_rows_of, found)) / len(found)


def _rows_of(what: Mapping[str, Any]) -> float:
    batch = (what.get("batch_size") or 16) * (what.get("accumulation") or 1)
    steps = what.get("max_steps")
    return float(steps * batch if steps else (what.get("epochs") or 3) * EPOCH_ROWS)


def _adapting(what: Mapping[str, Any], weights: float, tasks: int) -> float:
    """Operations of a method that learns as it merges."""
    adapt, steps = what.get("options", {}).get("adapt"), what.get("settings", {}).get("steps")
    if adapt is None or not steps:
        return 0.0
    return float(6 * weights * LENGTH * adapt.get("batch_size", 16) * tasks * steps)


def _weights(base: Any) -> float:
    """How many weights a model has, or NaN: of a folder they are counted, of a shipped pipeline's base known."""
    if isinstance(base, str) and Path(base).is_dir():
        from mergectl.checkpoints import open_checkpoint

        model = open_checkpoint(base)
        return float(sum(math.prod(model.shape(name)) for name in model.names))
    return WEIGHTS.get(str(base).partition("@")[0], math.nan)


@functools.cache
def speed(device: str) -> float:
    """Operations a second of a device: the best of a few multiplications."""
    import torch

    a, best = torch.rand(SIDE, SIDE, device=device), math.inf
    for _ in range(5):
        began = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * SIDE**3 / best


def in_words(found: Sequence[Estimate], flops: float) -> list[tuple[str, str]]:
    """Each step's disk and time for people, a question mark where they are not known."""
    return [(_bytes(one.disk), _seconds(one.flops / (USED * flops) + one.seconds)) for one in found]


def _bytes(count: float) -> str:
    if math.isnan(count):
        return "?"
    return "-" if count == 0 else f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"


def _seconds(count: float) -> str:
    if math.isnan(count):
        return "?"
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if count >= 1.5 * unit:
            return f"{count / unit:.0f} {name}"
    return f"{max(count, 1):.0f} s"
