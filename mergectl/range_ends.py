"""Try a method at the ends of the ranges that a search recombines: its own refusals then come before the search."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from mergectl.errors import UserError
from mergectl.methods._contract import MergeWarning, MethodError
from mergectl.settings import MethodInfo
from mergectl.space import Dimension

COMBINATIONS = 64  # of searched words with which an end is tried


def check_ends(
    info: MethodInfo, dimensions: Sequence[Dimension], fixed: Mapping[str, Any], tasks: Sequence[str]
) -> None:
    """Refuse a range of a setting that the method is linear in, where the method refuses one of its ends.

    Such a setting is recombined, so that the method sees no candidate but the winner, when it is written.
    """
    tried = [d for d in dimensions if d.setting in info.linear and d.kind != "word"]
    # What is refused anyway, as for want of supplies, tells nothing about a range.
    if not tried or _refusal(info, fixed, tasks) is not None:
        return
    words = {d.setting: d.words for d in dimensions if d.kind == "word" and not d.patterns}
    chosen = [dict(zip(words, values, strict=True)) for values in itertools.product(*words.values())][:COMBINATIONS]
    for dimension, end, more in itertools.product(tried, ("low", "high"), chosen):
        reason = _refusal(info, {**fixed, **more, dimension.setting: getattr(dimension, end)}, tasks)
        if reason is not None:
            asked = f"{dimension.low:g}:{dimension.high:g}"
            raise UserError(f"--range {dimension.name}={asked} goes too far for '{info.name}': {reason}")


def _refusal(info: MethodInfo, settings: Mapping[str, Any], tasks: Sequence[str]) -> str | None:
    """Why the method does not merge two numbers with these settings; None if it does."""
    import torch

    from mergectl.merging import merge_weights

    experts = {task: {"w": torch.tensor([number + 1.0, -1.0])} for number, task in enumerate(tasks)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MergeWarning)
        try:
            merge_weights(info.name, {"w": torch.zeros(2)}, experts, **settings)
        except (MethodError, UserError) as error:
            return str(error)
    return None
