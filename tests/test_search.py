"""Searching: the same candidates whatever happens on the way, none twice, and `report` stays closed until the end."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergectl.errors import UserError, WorkError
from mergectl.samplers import SAMPLERS, cmaes
from mergectl.search import Plan, Trial, Verdict, claim, open_study, search
from mergectl.space import Dimension
from tests.conftest import Cli

Capture = pytest.CaptureFixture[str]
X, Y = Dimension("x", "float", 0.0, 1.0, start=0.4), Dimension("y", "float", -2.0, 2.0, start=0.0)
WORD = Dimension("word", "word", words=("a", "b"))


def bowl(settings: Mapping[str, Any]) -> float:
    """One at x = 0.9, y = -1.2, and less everywhere else."""
    return 1.0 - float((settings["x"] - 0.9) ** 2 + (settings.get("y", -1.2) + 1.2) ** 2)


class Asked:
    """A judge that notes what it was asked, and may be stopped at one of its calls."""

    def __init__(self, score: Callable[[Mapping[str, Any]], float] = bowl, stop_at: int | None = None) -> None:
        self.score, self.stop_at = score, stop_at
        self.settings: list[dict[str, Any]] = []

    def __call__(self, settings: dict[str, Any]) -> Verdict:
        if len(self.settings) == self.stop_at:
            raise KeyboardInterrupt
        self.settings.append(settings)
        return Verdict({"task": self.score(settings)}, 0.0)


def plan(sampler: str, trials: int = 16, dimensions: tuple[Dimension, ...] = (X, Y), seed: int = 0) -> Plan:
    return Plan(dimensions, {}, sampler, trials, seed)


def go(folder: Path, what: Plan, judge: Asked) -> tuple[Trial, list[Trial]]:
    """One session of a search: its best trial and all that it saw."""
    seen: list[Trial] = []
    with open_study(folder, "study") as study:
        return search(study, what, judge, lambda trial, verdict: seen.append(trial)), seen


def values(seen: list[Trial]) -> list[tuple[int, dict[str, Any], float]]:
    return [(trial.number, trial.settings, trial.score) for trial in seen]


@pytest.fixture(scope="module")
def in_one_go(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Trial]]:
    """What a sampler tries when nobody interrupts it."""
    return functools.cache(lambda sampler: go(tmp_path_factory.mktemp("whole"), plan(sampler), Asked())[1])


@pytest.mark.parametrize("stop", [1, 13])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_interrupted_search_goes_on_as_if_nothing_had_happened(
    sampler: str, stop: int, tmp_path: Path, in_one_go: Callable[[str], list[Trial]]
) -> None:
    whole = in_one_go(sampler)
    first, second = Asked(stop_at=stop), Asked()
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "halves", plan(sampler), first)
    seen = go(tmp_path / "halves", plan(sampler), second)[1]
    assert values(seen) == values(whole)
    assert first.settings + second.settings == [trial.settings for trial in whole]
    assert [trial.again for trial in seen] == [True] * stop + [False] * (16 - stop)


@pytest.mark.parametrize("sampler", ["random", "tpe", "cmaes"])
def test_more_trials_continue_the_same_path(
    sampler: str, tmp_path: Path, in_one_go: Callable[[str], list[Trial]]
) -> None:
    whole = in_one_go(sampler)
    go(tmp_path / "parts", plan(sampler, trials=7), Asked())
    more = Asked()
    assert values(go(tmp_path / "parts", plan(sampler), more)[1]) == values(whole)
    assert len(more.settings) == 9


@pytest.mark.parametrize("sampler", ["random", "tpe", "cmaes"])
def test_another_seed_takes_another_path(sampler: str, tmp_path: Path) -> None:
    one = go(tmp_path / "one", plan(sampler, 3), Asked())[1]
    two = go(tmp_path / "two", plan(sampler, 3, seed=1), Asked())[1]
    assert all(a.settings != b.settings for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("sampler", ["random", "tpe", "cmaes"])
def test_no_candidate_comes_twice(sampler: str, in_one_go: Callable[[str], list[Trial]]) -> None:
    assert len({tuple(trial.settings.values()) for trial in in_one_go(sampler)}) == 16


def test_trials_left_running_by_a_dead_process_are_failed_and_tried_again(tmp_path: Path) -> None:
    from optuna.trial import TrialState

    with open_study(tmp_path, "study") as study:
        study.ask().set_user_attr("candidate", 0)
    judge = Asked()
    go(tmp_path, plan("random", 3), judge)
    with open_study(tmp_path, "study") as study:
        states = [trial.state for trial in study.get_trials()]
    assert states == [TrialState.FAIL] + [TrialState.COMPLETE] * 3
    assert len(judge.settings) == 3


def test_a_line_cut_short_in_the_journal_harms_nobody(tmp_path: Path) -> None:
    go(tmp_path, plan("random", 2), Asked())
    with (tmp_path / "journal.log").open("ab") as journal:
        journal.write(b'{"op_code":4,"wor')
    judge = Asked()
    go(tmp_path, plan("random", 4), judge)
    assert [trial.again for trial in go(tmp_path, plan("random", 4), judge)[1]] == [True] * 4
    assert len(judge.settings) == 2


def test_the_best_is_the_highest_and_among_equals_the_earliest(tmp_path: Path) -> None:
    scores = iter([0.1, 0.7, 0.3, 0.7, 0.7])
    assert go(tmp_path, plan("random", 5), Asked(lambda settings: next(scores)))[0].number == 1


def test_a_study_is_worked_on_by_one_process_at_a_time(tmp_path: Path) -> None:
    with open_study(tmp_path, "study"), pytest.raises(WorkError, match=r"Another process is working on .* 'study'"):
        go(tmp_path, plan("random"), Asked())


def test_two_studies_share_a_journal(tmp_path: Path) -> None:
    with open_study(tmp_path, "one") as one, open_study(tmp_path, "two") as two:
        for study in (one, two):
            search(study, plan("random", 2), Asked(), lambda trial, verdict: None)
        assert (len(one.get_trials()), len(two.get_trials())) == (2, 2)


def test_a_study_answers_one_question_only(tmp_path: Path) -> None:
    with open_study(tmp_path, "study") as study:
        claim(study, "this")
    with open_study(tmp_path, "study") as study:
        claim(study, "this")
        with pytest.raises(UserError, match="'study' belongs to another search"):
            claim(study, "that")


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden"])
def test_the_name_of_a_study_is_no_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="name"), open_study(tmp_path, name):
        pass


def test_a_grid_tries_every_combination_in_order(tmp_path: Path) -> None:
    steps = Dimension("x", "float", 0.5, 1.0, step=0.25)
    judge = Asked(lambda settings: 0.0)
    go(tmp_path, plan("grid", 9, (WORD, steps)), judge)
    assert judge.settings == [{"word": w, "x": x} for w in "ab" for x in (0.5, 0.75, 1.0)]


def test_a_grid_of_plain_ranges_gets_as_many_points_as_the_trials_allow(tmp_path: Path) -> None:
    judge = Asked()
    go(tmp_path, plan("grid", 11), judge)
    assert judge.settings == [{"x": x, "y": y} for x in (0.0, 0.5, 1.0) for y in (-2.0, 0.0, 2.0)]


def test_a_grid_larger_than_the_trials_is_refused(tmp_path: Path) -> None:
    steps = Dimension("x", "float", 0.0, 1.0, step=0.1)
    with pytest.raises(UserError, match="The grid has 22 points: give --trials 22, or coarser steps"):
        go(tmp_path, plan("grid", 21, (WORD, steps)), Asked())


def test_cmaes_refuses_words(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'word' is a word. Fix it with --fix, or take --sampler tpe"):
        go(tmp_path, plan("cmaes", 5, (X, WORD)), Asked())


def walk(dimensions: tuple[Dimension, ...], trials: int, seed: int = 0) -> list[dict[str, Any]]:
    """The candidates of CMA-ES without a study."""
    made, proposals = [], cmaes(None, dimensions, seed, trials)
    candidate = next(proposals)
    while candidate is not None:
        made.append(candidate)
        try:
            candidate = proposals.send(bowl(candidate))
        except StopIteration:
            break
    return made


def test_cmaes_finds_the_top_of_a_smooth_hill() -> None:
    found = max(bowl(candidate) for candidate in walk((X, Y), 150))
    assert bowl({"x": 0.4, "y": 0.0}) < -0.5
    assert found > 1 - 1e-4


@pytest.mark.parametrize("seed", range(3))
def test_cmaes_works_in_one_dimension(seed: int) -> None:
    assert max(bowl(candidate) for candidate in walk((X,), 40, seed)) > 1 - 1e-3


def test_cmaes_begins_around_the_defaults() -> None:
    first = np.array([list(c.values()) for seed in range(60) for c in walk((X, Y), 6, seed)])
    assert np.abs(first.mean(axis=0) - [0.4, 0.0]).max() < 0.1


def test_cmaes_restarts_when_it_has_settled_and_never_leaves_the_range() -> None:
    xs = [candidate["x"] for candidate in walk((X,), 600)]
    spreads = [float(np.std(xs[start : start + 50])) for start in range(0, 600, 50)]
    settled = next(i for i, spread in enumerate(spreads) if spread < 1e-3)
    assert len(xs) == 600
    assert all(0 <= x <= 1 for x in xs)
    assert max(spreads[settled:]) > 0.02


def test_cmaes_respects_steps_and_whole_numbers() -> None:
    steps, whole = Dimension("x", "float", 0.0, 0.9, step=0.3), Dimension("y", "int", -3, 3)
    for candidate in walk((steps, whole), 30):
        assert min(abs(candidate["x"] - x) for x in (0.0, 0.3, 0.6, 0.9)) < 1e-9
        assert isinstance(candidate["y"], int)
        assert -3 <= candidate["y"] <= 3


# From here on as a user types it.

TRIALS = "select trial, status, study from runs where kind = 'trial' order by trial, status"


TASKS = ("parity", "loop", "digit")
SMALL: list[object] = ["--trials", 4, "--limit", 30, "--per-task", "scale"]


def words(population: Path, *more: object, method: str = "task_arithmetic") -> list[object]:
    experts = [population / task for task in TASKS]
    return ["search", method, "--base", population / "base", "--experts", *experts, "-o", "best", *more]


def asked(cli: Cli, capsys: Capture, sql: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert cli("--json", "report", "--sql", sql) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


@pytest.fixture(scope="module")
def done(population: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a search has ended; `told.json` is what it printed."""
    from mergectl.cli import main

    folder, before = tmp_path_factory.mktemp("done"), Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert main(["--json", *map(str, words(population, *SMALL))]) == 0
    finally:
        os.chdir(before)
    (folder / "told.json").write_text(out.getvalue())
    return folder


@pytest.fixture
def told(done: Path, tmp_path: Path) -> dict[str, Any]:
    """Work in a copy of that folder; what the search printed."""
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    found: dict[str, Any] = json.loads((tmp_path / "told.json").read_text())
    return found


def test_a_search_leaves_a_row_per_trial_and_one_of_its_own(cli: Cli, capsys: Capture, told: dict[str, Any]) -> None:
    (row,) = asked(cli, capsys, "select run_id, study, status, name, seed from runs where kind = 'search'")
    assert row == {"run_id": told["run"], "study": told["study"], "status": "finished", "name": "best", "seed": 0}
    assert asked(cli, capsys, TRIALS) == [{"trial": n, "status": "finished", "study": told["study"]} for n in range(4)]


def test_the_best_trial_is_what_is_written_told_and_scored(cli: Cli, capsys: Capture, told: dict[str, Any]) -> None:
    trials = asked(
        cli, capsys,
        "select r.trial, m.value from runs r join metrics m using (run_id) where m.name = 'mean_score' "
        "and r.kind = 'trial' order by m.value desc, r.trial limit 1",
    )  # fmt: skip
    assert trials == [{"trial": told["trial"], "value": told["tune"]}]
    assert json.loads(Path("best/mergectl.json").read_text())["recipe"]["settings"]["scale"] == [
        told["settings"]["scale"][task] for task in TASKS
    ]
    scored = asked(cli, capsys, "select task, value from metrics where split = 'report' and name = 'score'")
    assert {row["task"]: row["value"] for row in scored} == told["tasks"]


def test_a_setting_searched_per_task_differs_per_task(told: dict[str, Any]) -> None:
    scale = told["settings"]["scale"]
    assert tuple(scale) == TASKS
    assert len(set(scale.values())) == 3


def test_more_trials_go_on_in_the_same_study(cli: Cli, capsys: Capture, told: dict[str, Any], population: Path) -> None:
    assert cli(*words(population, *SMALL, "--trials", 6, "--force")) == 0
    rows = asked(cli, capsys, TRIALS)
    assert [row["trial"] for row in rows] == list(range(6))
    assert {row["study"] for row in rows} == {told["study"]}


@pytest.mark.parametrize("more", [["--seed", 1], ["--limit", 21], ["--range", "scale=0:1"]], ids=lambda m: m[0])
def test_another_question_is_another_study(
    cli: Cli, capsys: Capture, told: dict[str, Any], population: Path, more: list[object]
) -> None:
    assert cli(*words(population, *SMALL, "--trials", 1, "--force", *more)) == 0
    rows = asked(cli, capsys, TRIALS)
    assert [row["study"] == told["study"] for row in rows if row["trial"] == 0] in ([True, False], [False, True])


def test_a_named_study_takes_no_other_question(
    cli: Cli, capsys: Capture, told: dict[str, Any], population: Path
) -> None:
    more = ["--study", told["study"], "--range", "scale=0:1", "--force"]
    assert cli(*words(population, *SMALL, *more)) == 2
    assert f"The study '{told['study']}' belongs to another search" in capsys.readouterr().err


def test_report_stays_closed_until_the_last_trial(cli: Cli, population: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergectl import tuning
    from mergectl.benchmarks import _rows

    events: list[str] = []
    load, judge = _rows.load, tuning.Judge.__call__

    def noting_load(task: Any, use: Any, **how: Any) -> Any:
        events.append(use)
        return load(task, use, **how)

    def noting_judge(self: Any, settings: dict[str, Any]) -> Verdict:
        events.append("trial")
        return judge(self, settings)

    monkeypatch.setattr(_rows, "load", noting_load)
    monkeypatch.setattr(tuning.Judge, "__call__", noting_judge)
    assert cli(*words(population, "--trials", 2, "--limit", 30)) == 0
    assert events == ["tune"] * 3 + ["trial"] * 2 + ["report"] * 3


SEARCHES: dict[str, list[object]] = {
    "ties": ["--trials", 2, "--fix", "scope=tensor", "--sampler", "tpe"],
    "emr": ["--trials", 2, "--range", "rescaler=global_sum,tensor_mean", "--sampler", "grid"],
    "dare_ties": ["--trials", 3, "--range", "drop=0.1:0.5", "--sampler", "cmaes"],
}


@pytest.mark.parametrize("method", SEARCHES)
def test_a_candidate_scores_in_memory_what_its_folder_scores(
    cli: Cli, capsys: Capture, population: Path, method: str
) -> None:
    assert cli("--json", *words(population, *SEARCHES[method], method=method)) == 0
    best = json.loads(capsys.readouterr().out)["trial"]
    trial = asked(
        cli, capsys,
        "select m.task, m.value from metrics m join runs r using (run_id) where r.kind = 'trial' and m.name = 'score' "
        f"and r.trial = {best} order by m.task",
    )  # fmt: skip
    assert cli("--json", "eval", "best", "--split", "tune") == 0
    told = json.loads(capsys.readouterr().out)
    assert [(row["task"], row["score"]) for row in told["tasks"]] == [(row["task"], row["value"]) for row in trial]


def test_emr_may_be_evaluated_with_everything_fixed_but_one(cli: Cli, capsys: Capture, population: Path) -> None:
    more = ["--fix", "rescaler=global_sum", "--trials", 2]
    assert cli(*words(population, *more, method="emr")) == 2
    assert "every setting is fixed" in capsys.readouterr().err


def test_a_grid_of_another_size_is_another_study(cli: Cli, capsys: Capture, population: Path) -> None:
    for trials in (2, 3):
        more = ["--sampler", "grid", "--range", "scale=0:1", "--trials", trials, "--limit", 20, "--force"]
        assert cli(*words(population, *more)) == 0
    scales = asked(cli, capsys, "select config->'$.settings.scale' as scale from runs where kind = 'trial'")
    assert sorted(float(row["scale"]) for row in scales) == [0, 0, 0.5, 1, 1]


def test_a_second_process_on_a_study_is_sent_away(cli: Cli, capsys: Capture, population: Path) -> None:
    with open_study(Path("lab/optuna"), "mine"):
        assert cli(*words(population, "--study", "mine", "--trials", 1, "--limit", 20)) == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert err == "Failed: Another process is working on the study 'mine'. Wait for it, or stop it."
    assert not Path("best").exists()


def test_a_trial_that_only_the_journal_knows_gets_its_row(
    cli: Cli, capsys: Capture, population: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergectl import tuning

    record = tuning._record_trial

    def dying(*facts: Any) -> None:
        if facts[2].number == 1:
            raise KeyboardInterrupt
        record(*facts)

    with monkeypatch.context() as patch:
        patch.setattr(tuning, "_record_trial", dying)
        assert cli(*words(population, "--trials", 3, "--limit", 20)) == 130
    assert cli(*words(population, "--trials", 3, "--limit", 20)) == 0
    assert [row["trial"] for row in asked(cli, capsys, TRIALS)] == [0, 1, 2]


def test_an_unknown_sampler(cli: Cli, capsys: Capture, population: Path) -> None:
    assert cli(*words(population, "--sampler", "cmase")) == 2
    assert capsys.readouterr().err.endswith("Error: No sampler 'cmase'. Did you mean 'cmaes'?\n")


def journal() -> list[dict[str, Any]]:
    path = Path("lab/optuna/journal.log")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_search_killed_hard_finishes_with_every_candidate_once(
    cli: Cli, capsys: Capture, population: Path, tmp_path: Path
) -> None:
    import optuna

    more = ["--trials", 20, "--limit", 30, "--study", "mine"]
    command = [sys.executable, "-m", "mergectl", *map(str, words(population, *more))]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    while sum("values" in entry for entry in journal()) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert cli(*words(population, *more)) == 0
    with open_study(Path("lab/optuna"), "mine") as study:
        trials = study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
        assert not study.get_trials(states=(optuna.trial.TrialState.RUNNING,))
    assert sorted(trial.user_attrs["candidate"] for trial in trials) == list(range(20))
    rows = asked(cli, capsys, TRIALS)
    assert [row["trial"] for row in rows if row["status"] == "finished"] == list(range(20))
    searches = asked(cli, capsys, "select status from runs where kind = 'search' order by started_at")
    assert [row["status"] for row in searches] == ["lost", "finished"]
