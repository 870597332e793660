"""What a search is made of: its plan, its trials, and what makes one better than another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergectl.errors import UserError, did_you_mean
from mergectl.pruning import Verdict
from mergectl.space import Dimension

# Objectives beside the tasks' own names; `size` alone is better when it is smaller.
OBJECTIVES = ("mean", "worst", "size", "tasks")


@dataclass(frozen=True)
class Plan:
    """All that decides which candidates a search tries."""

    dimensions: tuple[Dimension, ...]
    fixed: Mapping[str, Any]
    sampler: str
    trials: int
    seed: int
    objectives: tuple[str, ...] = ("mean",)
    start: Mapping[str, float] = field(default_factory=dict)  # where cmaes and cobyla begin, by setting
    sigma: float | None = None  # their first step, in the settings' own units
    population: int | None = None  # candidates of a generation: cmaes, nsga2, nsga3
    prune: float | None = None  # stop candidates that fall behind, at this significance
    endpoints: bool = False  # two of the first candidates are the low and the high end of every range
    default: bool = False  # the very first candidate is the method's default


@dataclass(frozen=True)
class Trial:
    """One finished candidate."""

    number: int
    settings: dict[str, Any]
    score: float  # the mean over tasks; minus infinity where the candidate was refused
    again: bool  # read back from an earlier session
    values: tuple[float, ...] = ()  # the objectives; empty where the candidate was refused
    refused: str | None = None  # why the candidate could not be scored
    pruned: bool = False  # stopped early; its score is of what was evaluated by then

    @property
    def ranked(self) -> bool:
        """Whether the candidate was scored in full, and so may be the best."""
        return self.refused is None and not self.pruned


def read_objectives(text: str, tasks: Sequence[str]) -> tuple[str, ...]:
    """Read `--objective`: mean, worst, size, tasks (each one's score), or names of tasks, joined by commas."""
    found: list[str] = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        if word not in (*OBJECTIVES, *tasks):
            raise UserError(f"No objective '{word}'.{did_you_mean(word, (*OBJECTIVES, *tasks))}")
        found += tasks if word == "tasks" else [word]
    if not found or len(set(found)) < len(found):
        raise UserError(f"--objective {text} must name each objective once, such as mean, tasks or mean,size.")
    return tuple(found)


def directions(objectives: Sequence[str]) -> list[str]:
    """Which way each objective is better, in Optuna's words."""
    return ["minimize" if name == "size" else "maximize" for name in objectives]


def values_of(verdict: Verdict, objectives: Sequence[str]) -> tuple[float, ...]:
    """A verdict's objectives; a task's may be named in full or by its last part."""
    found: dict[str, float] = {**verdict.scores, "mean": verdict.mean, "worst": min(verdict.scores.values())}
    if verdict.size is not None:
        found["size"] = verdict.size
    short = {task.rpartition("/")[2]: score for task, score in verdict.scores.items()}
    return tuple(float({**short, **found}[name]) for name in objectives)


def merit(trial: Trial, objectives: Sequence[str]) -> tuple[float, ...]:
    """A trial's objectives, each turned so that more is better."""
    signs = [-1.0 if way == "minimize" else 1.0 for way in directions(objectives)]
    return tuple(sign * value for sign, value in zip(signs, trial.values, strict=True))


def front(trials: Sequence[Trial], objectives: Sequence[str]) -> list[Trial]:
    """The Pareto front: scored trials that no other one beats in everything, in their order; of equals the earliest."""
    scored = sorted((trial for trial in trials if trial.ranked), key=lambda trial: trial.number)
    merits = {trial.number: merit(trial, objectives) for trial in scored}
    kept: list[Trial] = []
    for trial in scored:
        own = merits[trial.number]
        others = (merits[other.number] for other in scored if other.number != trial.number)
        if own not in (merits[other.number] for other in kept) and not any(
            other != own and all(a >= b for a, b in zip(other, own, strict=True)) for other in others
        ):
            kept.append(trial)
    return kept


def best_of(trials: Sequence[Trial], objectives: Sequence[str]) -> Trial | None:
    """The trial to keep: the highest objective, of several objectives the front's best mean; of equals the earliest."""
    chosen = front(trials, objectives)
    if len(objectives) == 1:
        return max(chosen, key=lambda trial: merit(trial, objectives), default=None)
    return max(chosen, key=lambda trial: trial.score, default=None)
