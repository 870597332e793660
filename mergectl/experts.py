"""Fine-tune experts for a purpose: each alone, a whole population, or such as cannot collide when they are merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergectl.errors import UserError, did_you_mean
from mergectl.grid import Grid, finetune_grid
from mergectl.lab import Lab
from mergectl.medusa import OWN_OPTIONS, MedusaJob, finetune_for_medusa
from mergectl.verbs import Result

PURPOSES = ("none", "medusa")


def owned(what: Mapping[str, Any]) -> list[str]:
    """What a pipeline's step says about ownership."""
    return [name for name in OWN_OPTIONS if name in what]


def job_of(what: Mapping[str, Any]) -> MedusaJob:
    """What a pipeline's step says about ownership, as a job."""
    return MedusaJob(**{name: what[name] for name in owned(what)} | {"against": tuple(what["against"])})


def check_purpose(purpose: str, typed: Sequence[str], grid: Grid, by_task: Mapping[str, Any] | None = None) -> None:
    """Refuse an unknown purpose, and what has no meaning for one."""
    if purpose not in PURPOSES:
        raise UserError(f"Experts are trained for none or medusa, got '{purpose}'.{did_you_mean(purpose, PURPOSES)}")
    if purpose == "none" and typed:
        raise UserError(f"--{typed[0].replace('_', '-')} is for ownership masks. Add --for medusa.")
    if {"prepass_epochs", "prepass_percent"} <= set(typed):
        raise UserError(
            "--prepass-epochs and --prepass-percent both say how long the short trainings are. Leave out one."
        )
    if purpose == "medusa" and grid:
        raise UserError("--for medusa trains one expert per task: leave out --grid.")
    if purpose == "medusa" and by_task:
        raise UserError("A step for medusa trains its tasks together: leave out by_task.")


def train(
    lab: Lab, words: Sequence[str], base: str, out: Path, options: Mapping[str, Any], purpose: str, job: MedusaJob,
    typed: Sequence[str], grid: Grid, *, force: bool = False, reuse: bool = False,
) -> list[Result]:  # fmt: skip
    """Fine-tune experts; `typed` are the words about ownership that were given."""
    check_purpose(purpose, typed, grid)
    if purpose == "medusa":
        return finetune_for_medusa(lab, words, base, out, options, job, force=force, reuse=reuse)
    return finetune_grid(lab, words, base, out, options, grid, force=force, reuse=reuse)
