"""Many workers: the same candidates and the same result as one, whoever is killed and whenever."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from mergectl import studies, workers
from mergectl.errors import UserError, WorkError
from mergectl.search import best_trial, read, search
from mergectl.studies import close, load_study, open_study
from mergectl.trials import Plan, Trial
from mergectl.workers import Leader, Watch, attempt, fail_lost, me, take, work
from tests import toy_search
from tests.toy_search import ROOT, Judge, X, Y, plan


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))


def alone(folder: Path, sampler: str, trials: int) -> list[Trial]:
    return toy_search.lead(folder, sampler, trials, 0.0, 0)


def values(trials: list[Trial]) -> list[tuple[int, dict[str, Any], float]]:
    return [(trial.number, trial.settings, trial.score) for trial in trials]


def completed(folder: Path) -> list[int]:
    trials = load_study(folder, "study").get_trials(states=(TrialState.COMPLETE,))
    return sorted(trial.user_attrs["candidate"] for trial in trials)


def kill_now_and_then(crew: Any, done: threading.Event, killed: list[int]) -> None:
    chance = random.Random(0)
    while len(killed) < 5 and not done.wait(chance.uniform(0.1, 0.5)):
        victim = chance.choice(crew.processes)
        killed.append(victim)
        os.kill(victim, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["cmaes", "random"])
def test_four_workers_of_whom_some_are_killed_do_what_one_does(
    sampler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergectl.search.LOSSES", 99)  # chance may kill three workers of one candidate
    trials, killed, done = 36, list[int](), threading.Event()
    with open_study(tmp_path, "study") as study, toy_search.crew(tmp_path, sampler, trials, 4, 0.05) as crew:
        killer = threading.Thread(target=kill_now_and_then, args=(crew, done, killed))
        killer.start()
        found = search(study, plan(sampler, trials), None, lambda trial, verdict: None, crew)
        done.set()
        killer.join()
        assert not study.get_trials(states=(TrialState.RUNNING, TrialState.WAITING))
    assert killed
    assert completed(tmp_path) == list(range(trials))
    assert values(found) == values(alone(tmp_path / "alone", sampler, trials))


def test_a_candidate_that_kills_every_worker_is_given_up(tmp_path: Path) -> None:
    deadly, told = values(alone(tmp_path / "alone", "qmc", 6))[2][1]["x"], list[int]()
    with open_study(tmp_path, "study") as study, toy_search.crew(tmp_path, "qmc", 6, 2, 0, deadly) as crew:
        found = search(study, plan("qmc", 6), None, lambda trial, verdict: None, crew, told.append)
        lost = [t.user_attrs["candidate"] for t in study.get_trials(deepcopy=False) if t.user_attrs.get("lost")]
    assert [trial.refused for trial in found if trial.refused] == ["3 workers died over it (was there enough memory?)."]
    assert lost == [2, 2, 2]
    assert sorted(set(told)) == [0, 1, 2, 3]  # what a live view counts
    assert completed(tmp_path) == [0, 1, 3, 4, 5]


@pytest.mark.parametrize("sampler", ["cmaes", "random"])
def test_a_leader_killed_hard_loses_no_finished_trial_and_repeats_none(sampler: str, tmp_path: Path) -> None:
    words = ["lead", str(tmp_path), sampler, "30", "0.05", "2"]
    process = subprocess.Popen([sys.executable, "-m", "tests.toy_search", *words], stderr=subprocess.DEVNULL)
    evaluated, deadline = tmp_path / "evaluated", time.monotonic() + 60
    while time.monotonic() < deadline and not (evaluated.exists() and len(evaluated.read_text().splitlines()) > 7):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = completed(tmp_path)
    found = toy_search.lead(tmp_path, sampler, 30, 0.0, 0)
    assert len(before) > 3
    assert completed(tmp_path) == list(range(30))
    assert {trial.number for trial in found if trial.again} >= set(before)
    assert values(found) == values(alone(tmp_path / "alone", sampler, 30))
    repeated = [line for line, count in Counter(evaluated.read_text().splitlines()).items() if count > 1]
    assert len(repeated) <= 3  # at most what the leader's two workers and it itself had under way


def queued(folder: Path, count: int = 1) -> Any:
    """A study with queued candidates."""
    import optuna

    with open_study(folder, "study") as study:
        for candidate in range(count):
            trial = optuna.trial.create_trial(
                state=TrialState.WAITING, params={}, distributions={}, user_attrs={"candidate": candidate}
            )
            study.add_trial(trial)
        return study


def test_a_queued_trial_is_taken_once(tmp_path: Path) -> None:
    queued(tmp_path, 3)
    one, other = load_study(tmp_path, "study"), load_study(tmp_path, "study")
    other.get_trials()
    assert [take(one), take(other), take(one), take(other)] == [0, 1, 2, None]


def test_a_worker_of_this_machine_that_is_gone_loses_its_trial_at_once(tmp_path: Path) -> None:
    study = queued(tmp_path, 2)
    take(study)
    take(study)
    process = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    gone = f"{me().rpartition('/')[0]}/{int(process.stdout)}"
    study._storage.set_trial_user_attr(study.trials[1]._trial_id, "worker", gone)
    assert fail_lost(study, Watch()) == 1
    assert [trial.state for trial in study.trials] == [TrialState.RUNNING, TrialState.FAIL]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="this system tells nothing of processes in /proc")
def test_a_killed_worker_that_its_parent_has_not_looked_after_is_gone() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    name = f"{me().rpartition('/')[0]}/{process.pid}"
    assert not workers.is_gone(name)
    process.kill()
    deadline = time.monotonic() + 10
    while not workers.is_gone(name) and time.monotonic() < deadline:
        time.sleep(0.01)
    gone = workers.is_gone(name)
    process.communicate()
    assert gone


def test_a_worker_elsewhere_loses_its_trial_when_its_beats_stop(tmp_path: Path) -> None:
    study = queued(tmp_path)
    number = take(study)
    trial = study.trials[number]._trial_id
    study._storage.set_trial_user_attr(trial, "worker", "elsewhere/1")
    watch = Watch(patience=0.05)
    for beat in range(3):
        study._storage.set_trial_user_attr(trial, "beat", beat)
        assert watch.lost(study) == []
        time.sleep(0.06)
    assert watch.lost(study) == [0]


def test_a_result_that_comes_after_the_trial_was_failed_changes_nothing(tmp_path: Path) -> None:
    study = queued(tmp_path)
    number = take(study)
    assert number is not None

    def late(settings: dict[str, Any]) -> Any:
        study._storage.set_trial_user_attr(study.trials[0]._trial_id, "worker", "")
        fail_lost(study, Watch(), first=True)
        return Judge(tmp_path)(settings)

    attempt(study, plan("tpe", 1), number, late)
    assert study.trials[0].state == TrialState.FAIL
    assert study.trials[0].user_attrs["lost"]


def test_a_long_evaluation_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "BEAT", 0.01)
    study = queued(tmp_path)
    number = take(study)
    assert number is not None
    attempt(study, plan("tpe", 1), number, Judge(tmp_path, 0.2))
    assert study.trials[0].user_attrs["beat"] > 2


def test_workers_join_before_the_search_and_leave_after_it(tmp_path: Path) -> None:
    done: list[int] = []

    def help_out() -> None:
        study = load_study(tmp_path, "study", wait=30)
        done.append(work(study, plan("random", 12), Judge(tmp_path, 0.02), Leader(study, 30).goes_on))

    helper = threading.Thread(target=help_out)
    helper.start()
    toy_search.lead(tmp_path, "random", 12, 0.1, 0)
    helper.join(timeout=30)
    assert not helper.is_alive()
    assert done[0] > 0
    assert completed(tmp_path) == list(range(12))


def test_a_worker_that_nobody_leads_gives_up(tmp_path: Path) -> None:
    with open_study(tmp_path, "study") as study:
        leader = Leader(study, wait=0.05)
        leader.goes_on()
        time.sleep(0.6)
        with pytest.raises(WorkError, match=r"Nobody has led the search 'study' for 0\.05 s\. Start it again"):
            leader.goes_on()


def test_a_worker_that_cannot_work_ends_the_search_with_its_reason(tmp_path: Path) -> None:
    crew = toy_search.crew(tmp_path, "random", 3, 1, "not-a-number")
    with (
        pytest.raises(WorkError, match="A worker of the search failed: ValueError: could not convert"),
        open_study(tmp_path, "study") as study,
        crew,
    ):
        search(study, plan("random", 3), None, lambda trial, verdict: None, crew)


def refusing(settings: dict[str, Any]) -> Any:
    if settings["x"] < 0.5:
        raise UserError("x must be large.")
    return Judge(Path.cwd())(settings)


@pytest.mark.parametrize("sampler", ["random", "cmaes", "cobyla", "tpe"])
def test_refused_candidates_do_not_end_a_search_and_are_not_tried_again(sampler: str, tmp_path: Path) -> None:
    def once() -> list[Trial]:
        with open_study(tmp_path, "study") as study:
            return search(study, plan(sampler, 12), refusing, lambda trial, verdict: None)

    found = once()
    refused = [trial for trial in found if trial.refused]
    assert 0 < len(refused) < 12
    assert {trial.refused for trial in refused} == {"x must be large."}
    assert best_trial(found, plan(sampler, 12)).settings["x"] >= 0.5
    assert values(once()) == values(found)
    states = Counter(trial.state for trial in load_study(tmp_path, "study").trials)
    assert states == {TrialState.COMPLETE: 12 - len(refused), TrialState.FAIL: len(refused)}


def test_a_search_in_which_all_is_refused_says_why(tmp_path: Path) -> None:
    what = Plan((X, Y), {}, "random", 3, 0)

    def never(settings: dict[str, Any]) -> Any:
        raise UserError("Never.")

    with open_study(tmp_path, "study") as study:
        found = search(study, what, never, lambda trial, verdict: None)
    with pytest.raises(WorkError, match=r"No candidate of the search could be evaluated\. Most often: Never\."):
        best_trial(found, what)


def test_what_an_ended_search_left_queued_is_taken_back(tmp_path: Path) -> None:
    def stop(settings: dict[str, Any]) -> Any:
        raise KeyboardInterrupt

    with open_study(tmp_path, "study") as study:
        with pytest.raises(KeyboardInterrupt):
            search(study, plan("random", 9), stop, lambda trial, verdict: None)
        assert read(study).open == set()


@pytest.mark.parametrize(
    ("where", "sentence"),
    [
        ("sqlite:///studies.db", "SQLite may hand one candidate to two workers"),
        ("nonsense://host/db", "--study-storage nonsense://host/db cannot be opened"),
        ("mysql://host/db", "--study-storage mysql://host/db needs a package that is not here: Failed to import DB"),
    ],
)
def test_a_storage_that_cannot_work_is_refused(where: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence), open_study(tmp_path, "study", where=where):
        pass


def test_a_journal_may_lie_in_any_folder(tmp_path: Path) -> None:
    with open_study(tmp_path / "lab", "study", where=str(tmp_path / "shared")) as study:
        study.set_user_attr("a", 1)
    assert load_study(tmp_path / "lab", "study", where=str(tmp_path / "shared" / "journal.log")).user_attrs == {"a": 1}


def test_an_unknown_study_is_named_with_those_that_there_are(tmp_path: Path) -> None:
    with open_study(tmp_path, "mine"), pytest.raises(UserError, match=r"No study 'yours' in .* There are: mine\."):
        load_study(tmp_path, "yours")


def server(tmp_path: Path) -> tuple[subprocess.Popen[bytes], int]:
    """A PostgreSQL server of our own, below the temporary folder; not run as root, which it refuses."""
    import shutil
    import tempfile

    if not (shutil.which("initdb") and shutil.which("postgres")):
        pytest.skip("no PostgreSQL server is installed")
    pytest.importorskip("psycopg", exc_type=ImportError)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    who: dict[str, Any] = {}
    if os.getuid() == 0:
        who = {"user": "nobody"}
        shutil.chown(folder, "nobody")
    database = str(folder / "database")
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder}
    subprocess.run(["initdb", "-A", "trust", "-U", "tester", "-D", database, "--no-sync"], check=True, **quiet, **who)
    words = ["-D", database, "-p", str(port), "-k", str(folder), "-c", "fsync=off", "-h", "127.0.0.1"]
    process = subprocess.Popen(["postgres", *words], **quiet, **who)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    return process, port


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_workers_share_a_study_in_postgresql(tmp_path: Path) -> None:
    process, port = server(tmp_path)
    where = f"postgresql+psycopg://tester@127.0.0.1:{port}/postgres"
    try:
        found = toy_search.lead(tmp_path, "cmaes", 12, 0.05, 2, where)
        study = load_study(tmp_path, "study", where=where)
        trials = study.get_trials(states=(TrialState.COMPLETE,))
        close(study)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()
    assert sorted(trial.user_attrs["candidate"] for trial in trials) == list(range(12))
    assert values(found) == values(alone(tmp_path / "alone", "cmaes", 12))


class _Absent:
    """Finds packages and says that they are not there."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name.partition(".")[0] == "grpc":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


def test_a_proxy_without_its_package_is_refused_with_the_way_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "grpc"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Absent(), *sys.meta_path])
    with (
        pytest.raises(UserError, match=r"needs a package that is not here: pip install 'mergectl\[grpc\]'"),
        open_study(tmp_path, "study", where="127.0.0.1:1"),
    ):
        pass


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


PROXY = """
import sys, warnings
warnings.simplefilter("ignore")
from optuna.storages import JournalStorage, run_grpc_proxy_server
from optuna.storages.journal import JournalFileBackend
run_grpc_proxy_server(JournalStorage(JournalFileBackend(sys.argv[1])), host="127.0.0.1", port=int(sys.argv[2]))
"""


def test_workers_share_a_study_over_a_grpc_proxy_and_one_that_is_gone_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("grpc")
    port = free_port()
    where = f"grpc://127.0.0.1:{port}"
    command = [sys.executable, "-c", PROXY, str(tmp_path / "proxied.log"), str(port)]
    proxy = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        found = toy_search.lead(tmp_path, "cmaes", 12, 0.05, 2, where)
        study = load_study(tmp_path, "study", where=where)
        trials = study.get_trials(states=(TrialState.COMPLETE,))
        close(study)
    finally:
        proxy.kill()
        proxy.wait()
    assert sorted(trial.user_attrs["candidate"] for trial in trials) == list(range(12))
    assert values(found) == values(alone(tmp_path / "alone", "cmaes", 12))
    monkeypatch.setattr(studies, "ANSWERS", 0.2)
    with pytest.raises(UserError, match=f"No gRPC proxy answers at 127.0.0.1:{port}"):
        load_study(tmp_path, "study", where=where)
