"""Lead a search: queue candidates in their order, see them scored by whoever works, remember everything in a study.

The candidates are a function of the seed and of earlier scores, never of who scores them or when; a search that is
killed and started again goes on, and no finished candidate is scored twice.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from mergectl.errors import WorkError
from mergectl.pruning import Verdict
from mergectl.samplers import SAMPLERS, check_sampler
from mergectl.space import distributions, to_settings
from mergectl.studies import backing
from mergectl.trials import Plan, Trial, best_of, merit
from mergectl.workers import PAUSE, Judge, Watch, attempt, fail_lost, finish, meanwhile, study_facts, take

if TYPE_CHECKING:
    import optuna

__all__ = ["Plan", "Trial", "Verdict", "check_sampler", "read_back", "search"]

QUEUED = 32  # candidates that wait in the study for workers to take them
LOSSES = 3  # workers that may die of one candidate before it is given up
LEADS = 5.0  # seconds between a leader's signs of life
Seen = Callable[[Trial, "Verdict | None"], None]
Lost = Callable[[int], None]  # told how many trials were lost with their workers, each time that it is known


class Crew(Protocol):
    """Workers in processes of their own, under the leader's eyes."""

    def check(self, finished: int) -> None:
        """Replace workers that were killed; raise where one cannot work."""


@dataclass
class Ledger:
    """What a study says of each candidate."""

    done: dict[int, Any] = field(default_factory=dict)  # its finished trial
    open: set[int] = field(default_factory=set)  # queued or running
    queued: int = 0
    losses: Counter[int] = field(default_factory=Counter)  # workers that died over it


def read(study: optuna.Study) -> Ledger:
    """Sort a study's trials by candidate."""
    from optuna.trial import TrialState

    ledger = Ledger()
    for trial in study.get_trials(deepcopy=False):
        candidate = trial.user_attrs.get("candidate")
        if candidate is None:
            continue
        if trial.state in (TrialState.WAITING, TrialState.RUNNING):
            ledger.open.add(candidate)
            ledger.queued += trial.state == TrialState.WAITING
        elif trial.state != TrialState.FAIL or "refused" in trial.user_attrs:
            ledger.done.setdefault(candidate, trial)
        else:
            ledger.losses[candidate] += bool(trial.user_attrs.get("lost"))
    return ledger


def search(
    study: optuna.Study,
    plan: Plan,
    judge: Judge | None,
    seen: Seen,
    crew: Crew | None = None,
    lost: Lost = lambda count: None,
) -> list[Trial]:
    """Have the plan's candidates scored, by `judge` here or by a crew; return all trials in their order."""
    proposals = SAMPLERS[plan.sampler].propose(plan)
    batch = next(proposals)
    results: dict[int, Trial] = {}
    with _leading(study):
        watch = Watch()
        fail_lost(study, watch, first=True)
        queue = Queue(study, plan, judge, crew, watch, frozenset(read(study).done), lost)
        with contextlib.suppress(StopIteration):
            while True:
                candidates = range(len(results), len(results) + len(batch))
                queue.settle(dict(zip(candidates, batch, strict=True)), results, seen)
                batch = proposals.send([_score(results[candidate], plan) for candidate in candidates])
    return [results[candidate] for candidate in sorted(results)]


def best_trial(trials: list[Trial], plan: Plan) -> Trial:
    """The trial to keep, or an error that says why there is none."""
    best = best_of(trials, plan.objectives)
    if best is None:
        reasons = Counter(trial.refused for trial in trials if trial.refused)
        why = f" Most often: {reasons.most_common(1)[0][0]}" if reasons else ""
        raise WorkError(f"No candidate of the search could be evaluated.{why}")
    return best


def _score(trial: Trial, plan: Plan) -> float:
    """What a sampler is told of a trial: its first objective, more is better."""
    return trial.score if trial.refused or trial.pruned else merit(trial, plan.objectives)[0]


@dataclass(frozen=True)
class Queue:
    """The way of candidates through the study."""

    study: optuna.Study
    plan: Plan
    judge: Judge | None
    crew: Crew | None
    watch: Watch
    before: frozenset[int]  # candidates that an earlier session finished
    lost: Lost

    def settle(self, wanted: dict[int, Mapping[str, Any] | None], results: dict[int, Trial], seen: Seen) -> None:
        """Have these candidates finished, queueing what is not yet; tell of each as it is."""
        looked = time.monotonic()
        while True:
            ledger = read(self.study)
            self.lost(ledger.losses.total())
            self._collect(ledger, wanted, results, seen)
            if not wanted:
                return
            self._enqueue(ledger, wanted)
            number = take(self.study) if self.judge is not None else None
            if number is not None and self.judge is not None:
                attempt(self.study, self.plan, number, self.judge)
                continue
            if self.crew is not None:
                self.crew.check(len(ledger.done))
            if time.monotonic() - looked > 1.0 or self.crew is not None:
                looked = time.monotonic()
                fail_lost(self.study, self.watch)
            time.sleep(PAUSE)

    def _collect(self, ledger: Ledger, wanted: dict[int, Any], results: dict[int, Trial], seen: Seen) -> None:
        for candidate in sorted(wanted):
            trial = ledger.done.get(candidate)
            if trial is not None:
                found, verdict = read_back(trial, self.plan, again=candidate in self.before)
            elif ledger.losses[candidate] >= LOSSES:
                why = f"{LOSSES} workers died over it (was there enough memory?)."
                found, verdict = Trial(candidate, {}, float("-inf"), False, refused=why), None
            else:
                continue
            results[candidate] = found
            del wanted[candidate]
            seen(found, verdict)

    def _enqueue(self, ledger: Ledger, wanted: Mapping[int, Mapping[str, Any] | None]) -> None:
        import optuna

        missing = [candidate for candidate in sorted(wanted) if candidate not in ledger.open]
        for candidate in missing[: max(0, QUEUED - ledger.queued)]:
            params = wanted[candidate]
            space = distributions(self.plan.dimensions) if params is not None else {}
            self.study.add_trial(
                optuna.trial.create_trial(
                    state=optuna.trial.TrialState.WAITING,
                    params=dict(params or {}),
                    distributions=space,
                    user_attrs={"candidate": candidate},
                )
            )


def read_back(trial: Any, plan: Plan, *, again: bool = False) -> tuple[Trial, Verdict | None]:
    """A finished trial as the study keeps it; no verdict where the candidate was refused."""
    from optuna.trial import TrialState

    facts, candidate = trial.user_attrs, trial.user_attrs["candidate"]
    settings = to_settings(trial.params, plan.dimensions, plan.fixed) if trial.params else {}
    if "refused" in facts:
        return Trial(candidate, settings, float("-inf"), again, refused=facts["refused"]), None
    pruned = trial.state == TrialState.PRUNED
    counts = {"rows": facts.get("rows", 0), "total": facts.get("total", 0)}
    verdict = Verdict(facts["scores"], facts["seconds"], pruned=pruned, metrics=facts.get("metrics", {}), **counts)
    return Trial(candidate, settings, verdict.mean, again, tuple(trial.values or ()), pruned=pruned), verdict


@contextlib.contextmanager
def _leading(study: optuna.Study) -> Iterator[None]:
    """Say in the study that this process leads it, again and again, and that it has ended."""
    token = uuid.uuid4().hex

    def lead(count: int) -> bool:
        study.set_user_attr("leader", [token, count])
        return True

    lead(0)
    study.set_user_attr("ended", False)
    try:
        with meanwhile(LEADS, lead):
            yield
    finally:
        if study_facts(study).get("leader", [token])[0] == token:
            study.set_user_attr("ended", True)
            _withdraw(study)


def _withdraw(study: optuna.Study) -> None:
    """Take back what is still queued: nobody will ask for it before the search goes on."""
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        with contextlib.suppress(UpdateFinishedTrialError):
            if backing(study).set_trial_state_values(trial._trial_id, state=TrialState.RUNNING):
                finish(study, trial.number, TrialState.FAIL)
