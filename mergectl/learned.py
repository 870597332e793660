"""What a method learned for each weight and task, among a run's metrics: ranks kept, and coefficients."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

KINDS = {"kept_rank": "ranks", "rank": "ranks", "coefficient": "coefficients"}
NAME = re.compile(rf"(?P<kind>{'|'.join(KINDS)})[./:](?P<weight>.+)")  # kept_rank:<weight>, with or without steps


@dataclass(frozen=True)
class Learned:
    """One kind of numbers, per weight, from input to output, and task; the last where a run kept several."""

    kind: str  # ranks or coefficients
    tasks: tuple[str, ...]
    weights: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]  # [weight][task]


def is_learned(name: str) -> bool:
    """Whether a metric of this name was learned for one weight."""
    return NAME.fullmatch(name) is not None


def learned_of(rows: Iterable[Mapping[str, Any]]) -> list[Learned]:
    """What these metrics hold of each kind."""
    last: dict[str, dict[tuple[str, str], tuple[float, float]]] = {}
    for row in rows:
        match = NAME.fullmatch(row["name"])
        if match is None or row["value"] is None:
            continue
        place = (match["weight"].removesuffix(".weight"), row["task"] or "all tasks")
        step = float("inf") if row["step"] is None else row["step"]  # without a step: what was kept in the end
        own = last.setdefault(KINDS[match["kind"]], {})
        if place not in own or step >= own[place][0]:
            own[place] = (step, row["value"])
    kinds = sorted(last.items(), reverse=True)  # ranks before coefficients
    return [_arranged(kind, {place: value for place, (_, value) in own.items()}) for kind, own in kinds]


def _arranged(kind: str, found: Mapping[tuple[str, str], float]) -> Learned:
    weights = tuple(sorted({weight for weight, _ in found}, key=natural))
    tasks = tuple(sorted({task for _, task in found}))
    values = tuple(tuple(found.get((weight, task)) for task in tasks) for weight in weights)
    return Learned(kind, tasks, _shortened(weights), values)


def _shortened(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names without what all of them begin with, but for its last word: layer.0.query, layer.1.query."""
    parts = [name.split(".") for name in names]
    shared = 0
    while len(names) > 1 and all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    return tuple(".".join(part[max(0, shared - 1) :]) for part in parts)


def natural(name: str) -> tuple[Any, ...]:
    """Sort layer 10 behind layer 9."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name))
