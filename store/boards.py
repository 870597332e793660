"""Tables for people: the leaderboard with a column per task, and runs side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from mergectl.store.query import Table

Ask = Callable[..., Table]


def decoded(run: dict[str, Any]) -> dict[str, Any]:
    """Return a run's row with its JSON columns as Python values."""
    return run | {key: json.loads(run[key]) for key in ("config", "command") if run[key] is not None}


def leaderboard(ask: Ask, split: str, suite: str | None, tasks: Sequence[str] | None) -> Table:
    """One row per model, one column per task."""
    return Table([], [])


def compare(ask: Ask, names: Sequence[str]) -> Table:
    """One row per fact, one column per run."""
    return Table([], [])
