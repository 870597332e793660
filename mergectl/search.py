"""Search a method's settings: Optuna asks, a merge in memory answers with its scores, the lab's journal remembers.

A search that is killed and started again goes on: finished trials are read back, never repeated.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mergectl.errors import UserError, WorkError
from mergectl.samplers import SAMPLERS, fixed
from mergectl.space import Dimension, distributions, to_settings

if TYPE_CHECKING:
    import optuna

Judge = Callable[[dict[str, Any]], "Verdict"]


@dataclass(frozen=True)
class Verdict:
    """What a candidate is worth: each task's score and their mean."""

    scores: Mapping[str, float]
    seconds: float

    @property
    def mean(self) -> float:
        """The mean over tasks: what a search maximises."""
        return sum(self.scores.values()) / len(self.scores)


@dataclass(frozen=True)
class Plan:
    """All that decides which candidates a search tries."""

    dimensions: tuple[Dimension, ...]
    fixed: Mapping[str, Any]
    sampler: str
    trials: int
    seed: int


@dataclass(frozen=True)
class Trial:
    """One finished candidate."""

    number: int
    settings: dict[str, Any]
    score: float
    again: bool  # read back from an earlier session


class JournalLock:
    """The journal's lock, which the system lifts when its holder dies: Optuna's own lock files outlive a kill."""

    def __init__(self, journal: Path) -> None:
        self._journal, self._path = journal, journal.with_name(".journal.lock")
        self._held: IO[bytes] | None = None

    def acquire(self) -> bool:
        """Wait for the lock, then drop what a killed writer left of a line: no later line could be read otherwise."""
        self._held = self._path.open("ab")
        fcntl.flock(self._held, fcntl.LOCK_EX)
        with self._journal.open("rb+") as file:
            end = file.seek(0, os.SEEK_END)
            if end and _last_byte(file) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        """Let go."""
        if self._held is not None:
            self._held.close()


def _last_byte(file: IO[bytes]) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


@contextlib.contextmanager
def open_study(folder: Path, name: str) -> Iterator[optuna.Study]:
    """Open a study in the lab's journal; only one process works on it at a time."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"A study's name is made of letters, digits, _ . and -, got '{name}'.")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise WorkError(f"Another process is working on the study '{name}'. Wait for it, or stop it.") from error
        journal = folder / "journal.log"
        storage = JournalStorage(JournalFileBackend(str(journal), JournalLock(journal)))
        yield optuna.create_study(study_name=name, storage=storage, direction="maximize", load_if_exists=True)


def claim(study: optuna.Study, question: str) -> None:
    """Refuse to mix two questions in one study: trials of the one are no answers to the other."""
    if study.user_attrs.get("question", question) != question:
        raise UserError(
            f"The study '{study.study_name}' belongs to another search (other models, tasks, settings or seed). "
            "Choose another --study, or leave it out."
        )
    study.set_user_attr("question", question)


def search(study: optuna.Study, plan: Plan, judge: Judge, seen: Callable[[Trial, Verdict], None]) -> Trial:
    """Try the plan's candidates in order, skipping those already finished; return the best, the earliest of equals."""
    done = _finished(study)
    _fail_stale(study)
    proposals = SAMPLERS[plan.sampler](study, plan.dimensions, plan.seed, plan.trials)
    best: Trial | None = None
    params = next(proposals)
    for candidate in range(plan.trials):
        if candidate in done:
            trial, verdict = done[candidate], _told(done[candidate])
            found = Trial(candidate, to_settings(trial.params, plan.dimensions, plan.fixed), float(trial.value), True)
        else:
            found, verdict = _try(study, plan, candidate, params, judge)
        seen(found, verdict)
        best = found if best is None or found.score > best.score else best
        try:
            params = proposals.send(found.score)
        except StopIteration:
            break
    if best is None or best.score == float("-inf"):
        raise WorkError("No candidate of the search could be evaluated.")
    return best


def _finished(study: optuna.Study) -> dict[int, Any]:
    from optuna.trial import TrialState

    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return {trial.user_attrs["candidate"]: trial for trial in finished if "candidate" in trial.user_attrs}


def _told(trial: Any) -> Verdict:
    """What a finished trial was worth, as the journal keeps it."""
    return Verdict(trial.user_attrs["scores"], trial.user_attrs["seconds"])


def _fail_stale(study: optuna.Study) -> None:
    """Trials still running belong to a process that is gone: we hold the study's lock."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)


def _try(
    study: optuna.Study, plan: Plan, candidate: int, params: dict[str, Any] | None, judge: Judge
) -> tuple[Trial, Verdict]:
    from optuna.trial import TrialState

    if params is not None:
        study.sampler = fixed(params)
    trial = study.ask(distributions(plan.dimensions))
    trial.set_user_attr("candidate", candidate)
    settings = to_settings(trial.params, plan.dimensions, plan.fixed)
    try:
        verdict = judge(settings)
    except BaseException:
        study.tell(trial, state=TrialState.FAIL)
        raise
    trial.set_user_attr("scores", dict(verdict.scores))
    trial.set_user_attr("seconds", verdict.seconds)
    study.tell(trial, verdict.mean)
    return Trial(candidate, settings, verdict.mean, False), verdict


def check_sampler(name: str) -> str:
    """Refuse an unknown sampler."""
    from mergectl.errors import did_you_mean

    if name not in SAMPLERS:
        raise UserError(f"No sampler '{name}'.{did_you_mean(name, SAMPLERS)}")
    return name
