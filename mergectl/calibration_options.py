"""The options of calibration: which rows of each task the experts are shown, and what is made of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mergectl.errors import UserError, did_you_mean
from mergectl.methods._contract import Between
from mergectl.values import Setting, parse, resolve

MOST = 1e9
BATCH = Setting(
    "calibration_batch_size", "int", 16, "rows that pass through an expert at once", Between(1, 4096), (), False, ""
)
# By the supply that they are for.
OPTIONS: dict[str, tuple[Setting, ...]] = {
    "grams": (
        Setting(
            "num_ada_examples", "int", 4096, "token rows of each task that calibration looks at", Between(1, MOST), (),
            True, "",
        ),
        Setting("max_examples", "int", None, "most examples of each task for that", Between(1, MOST), (), True, ""),
        Setting(
            "include_padding", "bool", False, "count padding, and what else a layer reads besides tokens", None, (),
            False, "",
        ),
        Setting(
            "divisor", "word", "actual", "divide by the rows that there are, or by those asked for", None,
            ("actual", "requested"), False, "",
        ),
        BATCH,
    ),
    "fishers": (
        Setting(
            "num_fisher_examples", "int", 256, "examples of each task that gradients are taken of", Between(1, MOST),
            (), True, "",
        ),
        Setting(
            "fisher_mode", "word", "per_example", "square the gradient of each example, or of a batch's sum", None,
            ("per_example", "batch_sum"), False, "",
        ),
        BATCH,
    ),
}  # fmt: skip


def every() -> dict[str, Setting]:
    """All options by name."""
    return {setting.name: setting for settings in OPTIONS.values() for setting in settings}


def check_known(given: Mapping[str, Any]) -> None:
    """Refuse options that there are not."""
    for name in given:
        if name not in every():
            raise UserError(f"Calibration has no option '{name}'.{did_you_mean(name, every())}")


def for_supplies(supplies: Collection[str]) -> dict[str, Setting]:
    """The options that say how these supplies are made, by name."""
    return {setting.name: setting for name, settings in OPTIONS.items() if name in supplies for setting in settings}


def settled(given: Mapping[str, Any], supplies: Collection[str], tasks: Sequence[str], method: str) -> dict[str, Any]:
    """Check options, as values or as typed, and fill in the defaults; per-task ones become one number per task.

    An option of which nothing that is asked for depends is refused.
    """
    if not isinstance(given, Mapping):
        raise UserError(f"The options of calibration are a mapping of names to values, got '{given}'.")
    check_known(given)
    known, mine = every(), for_supplies(supplies)
    for name in given:
        if name not in mine:
            needs = next(supply for supply, settings in OPTIONS.items() if known[name] in settings)
            raise UserError(
                f"--{name.replace('_', '-')} is for methods and refinements that look at {needs}, "
                f"and '{method}' does not."
            )
    found = {}
    for name, setting in mine.items():
        value = given.get(name, setting.default)
        value = resolve(setting, parse(setting, value) if isinstance(value, str) else value, tasks)
        if isinstance(value, Mapping):
            raise UserError(f"{name} takes one value{' or one per task' if setting.per_task else ''}, got {value}.")
        if setting.per_task and not isinstance(value, tuple):
            value = (value,) * len(tasks)
        found[name] = list(value) if isinstance(value, tuple) else value
    return found
