"""A search's workers: each takes a queued candidate, scores it, and tells the study. One is as good as many.

The study is the only thing that they share. A candidate is queued as a waiting trial; setting it to running succeeds
for one worker alone. A running trial's worker says every few seconds that it lives; who has not for long is taken for
dead, its trial is failed and the candidate queued again.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from mergectl.errors import UserError, WorkError
from mergectl.methods._contract import MethodError
from mergectl.pruning import Pruner, Verdict, pack, unpack
from mergectl.samplers import drawing
from mergectl.space import distributions, to_settings
from mergectl.studies import backing
from mergectl.trials import Plan, values_of

if TYPE_CHECKING:
    import optuna

Judge: TypeAlias = Callable[..., Verdict]  # called with settings and, where candidates may be stopped, a watch
BEAT = 5.0  # seconds between signs of life
PATIENCE = 60.0  # seconds without one after which a worker is taken for dead
RESULT = ("scores", "metrics", "rows", "total", "mean")  # what a finished trial says of its candidate
PAUSE = 0.05  # seconds between looks at an empty queue


def me() -> str:
    """This process, as trials name it: host, process namespace and process."""
    return f"{_here()}/{os.getpid()}"


def _here() -> str:
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{socket.gethostname()}{space}"


def is_gone(worker: str) -> bool:
    """Whether a worker was a process of this machine that no longer runs; of other machines nothing is known."""
    place, _, process = worker.rpartition("/")
    if place != _here():
        return False
    try:
        os.kill(int(process), 0)
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return state == "Z"  # killed, and its parent has not looked yet


def take(study: optuna.Study) -> int | None:
    """Take the next queued trial, by its number; None if nothing is queued."""
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    storage = backing(study)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        with contextlib.suppress(UpdateFinishedTrialError):  # somebody was faster
            if storage.set_trial_state_values(trial._trial_id, state=TrialState.RUNNING):
                storage.set_trial_user_attr(trial._trial_id, "worker", me())
                return int(trial.number)
    return None


def attempt(study: optuna.Study, plan: Plan, number: int, judge: Judge) -> None:
    """Score a trial that this worker has taken. A candidate that the method refuses fails with the reason."""
    from optuna.trial import TrialState

    # Optuna offers no other way to one trial by its number.
    trial = study.get_trials(deepcopy=False)[number]
    with _beats(study, trial._trial_id):
        try:
            params = trial.params or draw(study, plan, trial)
            if repeated(study, number, params):
                return
            settings = to_settings(params, plan.dimensions, plan.fixed)
            if plan.prune is None:
                verdict = judge(settings)
            else:
                verdict = judge(settings, Pruner(plan.prune).watch(incumbent(study)))
        except (UserError, WorkError, MethodError) as refusal:
            finish(study, number, TrialState.FAIL, refused=str(refusal))
            return
        except BaseException:
            finish(study, number, TrialState.FAIL)
            raise
    told(study, plan, number, verdict)


def repeated(study: optuna.Study, number: int, params: Mapping[str, Any]) -> bool:
    """Give a trial the result of an earlier one of the very same candidate, if it was evaluated in full."""
    from optuna.trial import TrialState

    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    first = next((trial for trial in done if trial.params == params), None)
    if first is None:
        return False
    facts = {key: first.user_attrs[key] for key in RESULT if key in first.user_attrs}
    return finish(study, number, TrialState.COMPLETE, first.values, **facts, seconds=0.0, repeats=first.number)


def told(study: optuna.Study, plan: Plan, number: int, verdict: Verdict) -> None:
    """Write a verdict into the study: what it is worth, and what it consists of."""
    from optuna.trial import TrialState

    facts: dict[str, Any] = {"scores": dict(verdict.scores), "seconds": verdict.seconds}
    facts |= {"metrics": {task: dict(own) for task, own in verdict.metrics.items()}} if verdict.metrics else {}
    if plan.prune is not None:
        facts |= {"rows": verdict.rows, "total": verdict.total, "mean": verdict.mean}
        best = best_so_far(study)
        if not verdict.pruned and (best is None or verdict.mean > best.user_attrs["mean"]):
            facts["answers"] = pack(verdict)
    values = values_of(verdict, plan.objectives)
    if not all(value == value for value in values):
        finish(study, number, TrialState.FAIL, refused="It scored not-a-number.")
    elif verdict.pruned:
        finish(study, number, TrialState.PRUNED, so_far=(verdict.rows, verdict.mean), **facts)
    else:
        finish(study, number, TrialState.COMPLETE, values, **facts)


def best_so_far(study: optuna.Study) -> Any:
    """The best trial that was evaluated in full and left its answers; None where there is none yet."""
    from optuna.trial import TrialState

    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return max((t for t in done if "answers" in t.user_attrs), key=lambda t: t.user_attrs["mean"], default=None)


def incumbent(study: optuna.Study) -> Verdict | None:
    """What a candidate is compared with while it is evaluated."""
    best = best_so_far(study)
    return None if best is None else unpack(best.user_attrs["scores"], best.user_attrs["answers"])


def finish(
    study: optuna.Study, number: int, state: Any, values: Collection[float] = (),
    so_far: tuple[int, float] | None = None, **facts: Any,
) -> bool:  # fmt: skip
    """End a trial, its facts first; False where it was ended before: its worker was thought dead."""
    from optuna.exceptions import UpdateFinishedTrialError

    storage, own = backing(study), study.get_trials(deepcopy=False)[number]._trial_id
    try:
        for key, value in facts.items():
            storage.set_trial_user_attr(own, key, value)
        if so_far is not None:  # Optuna takes the last of these for the value of a trial that was stopped
            storage.set_trial_intermediate_value(own, *so_far)
        study.tell(number, list(values) or None, state=state)
    except (UpdateFinishedTrialError, ValueError):
        if not study.get_trials(deepcopy=False)[number].state.is_finished():
            raise
        return False
    return True


def draw(study: optuna.Study, plan: Plan, trial: Any) -> dict[str, Any]:
    """Let Optuna's sampler choose the parameters of a trial queued without any; the first may have the defaults.

    The sampler is asked for those, too, as Optuna does with a trial of the user's own: it takes note of what it tried.
    """
    study.sampler = sampler = drawing(plan, trial.user_attrs["candidate"])
    space = distributions(plan.dimensions)
    sampler.before_trial(study, trial)
    joint = sampler.infer_relative_search_space(study, trial)
    found = dict(sampler.sample_relative(study, trial, joint))
    if plan.default and trial.user_attrs["candidate"] == 0:
        found = {dimension.name: dimension.first for dimension in plan.dimensions}
    for name, kind in space.items():
        if name not in found:
            found[name] = sampler.sample_independent(study, trial, name, kind)
        backing(study).set_trial_param(trial._trial_id, name, kind.to_internal_repr(found[name]), kind)
    return {name: found[name] for name in space}


@contextlib.contextmanager
def _beats(study: optuna.Study, trial_id: int) -> Iterator[None]:
    """Say every few seconds that the trial's worker lives."""
    from optuna.exceptions import UpdateFinishedTrialError

    def beat(count: int) -> bool:
        try:
            backing(study).set_trial_user_attr(trial_id, "beat", count)
        except UpdateFinishedTrialError:
            return False  # taken for dead: the result will come to nothing
        return True

    with meanwhile(BEAT, beat):
        yield


@contextlib.contextmanager
def meanwhile(seconds: float, call: Callable[[int], bool]) -> Iterator[None]:
    """Call with 1, 2, 3, ... in a thread, each time after so many seconds, for as long as that returns true."""
    done = threading.Event()

    def go_on() -> None:
        count = 1
        while not done.wait(seconds) and call(count):
            count += 1

    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class Watch:
    """Notices running trials whose worker is gone: at once on this machine, elsewhere when its beats stop."""

    def __init__(self, patience: float = PATIENCE) -> None:
        self._patience = patience
        self._last: dict[int, tuple[Any, float]] = {}

    def lost(self, study: optuna.Study, *, first: bool = False) -> list[int]:
        """Numbers of the trials whose worker is gone; on the `first` look also those that no worker calls its own."""
        from optuna.trial import TrialState

        now, found = time.monotonic(), []
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            worker, beat = trial.user_attrs.get("worker"), trial.user_attrs.get("beat", 0)
            known, since = self._last.get(trial.number, (None, now))
            self._last[trial.number] = (beat, since if known == beat else now)
            silent = known == beat and now - since > self._patience
            if silent or (is_gone(worker) if worker else first):
                found.append(trial.number)
        return found


def fail_lost(study: optuna.Study, watch: Watch, *, first: bool = False) -> int:
    """Fail the trials whose worker is gone, so that their candidates are queued again; return how many there were."""
    from optuna.trial import TrialState

    return sum(finish(study, n, TrialState.FAIL, lost=True) for n in watch.lost(study, first=first))


def work(study: optuna.Study, plan: Plan, judge: Judge, going: Callable[[], bool]) -> int:
    """Score queued trials as long as the search is `going`; return how many."""
    count = 0
    while going():
        number = take(study)
        if number is None:
            time.sleep(PAUSE)
            continue
        attempt(study, plan, number, judge)
        count += 1
    return count


class Leader:
    """Whether the process that leads a search is there: it counts in the study, and workers look."""

    def __init__(self, study: optuna.Study, wait: float) -> None:
        self._study, self._wait = study, wait
        self._known: Any = None
        self._since, self._next = time.monotonic(), 0.0

    def goes_on(self) -> bool:
        """Whether there may be work; no once the search has ended, an error when its leader has gone silent."""
        now = time.monotonic()
        if now < self._next:
            return True
        self._next = now + 10 * PAUSE
        facts = study_facts(self._study)
        if facts.get("leader") != self._known:
            self._known, self._since = facts.get("leader"), now
        if facts.get("ended"):
            return False
        if now - self._since > self._wait:
            raise WorkError(
                f"Nobody has led the search '{self._study.study_name}' for {self._wait:g} s. "
                "Start it again with the command that began it; finished candidates are kept."
            )
        return True


def study_facts(study: optuna.Study) -> dict[str, Any]:
    """What a study says of itself, without a deep copy of everything."""
    storage = backing(study)
    facts: dict[str, Any] = storage.get_study_user_attrs(storage.get_study_id_from_name(study.study_name))
    return facts
