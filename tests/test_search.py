"""Searching: the same candidates whatever happens on the way, none twice, and `report` stays closed until the end."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergectl.board import Board
from mergectl.charts import Plot
from mergectl.errors import UserError, WorkError
from mergectl.pruning import Answers, Verdict
from mergectl.samplers import SAMPLERS, check_plan
from mergectl.search import search
from mergectl.space import Dimension
from mergectl.studies import claim, load_study, open_study
from mergectl.study_pictures import pictures
from mergectl.study_text import show
from mergectl.trials import Plan, Trial, best_of, directions, front, read_objectives
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
    with open_study(folder, "study", directions=directions(what.objectives)) as study:
        trials = search(study, what, judge, lambda trial, verdict: seen.append(trial))
    best = best_of(trials, what.objectives)
    assert best is not None
    return best, seen


def values(seen: list[Trial]) -> list[tuple[int, dict[str, Any], float]]:
    return [(trial.number, trial.settings, trial.score) for trial in seen]


@pytest.fixture(scope="module")
def in_one_go(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Trial]]:
    """What a sampler tries when nobody interrupts it."""
    return functools.cache(lambda sampler: go(tmp_path_factory.mktemp("whole"), plan(sampler), Asked())[1])


@pytest.mark.parametrize(
    ("sampler", "stop"), [(name, stop) for name in SAMPLERS for stop in (1, 13) if (name, stop) != ("gp", 1)]
)  # a Gaussian process takes its time
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


@pytest.mark.parametrize("sampler", ["random", "tpe", "cmaes"])
def test_a_candidate_that_comes_again_takes_over_its_scores_unevaluated(sampler: str, tmp_path: Path) -> None:
    what = plan(sampler, 20, (replace(X, step=0.25), replace(Y, low=-1.0, high=1.0, step=1.0)))
    judge = Asked()
    best, seen = go(tmp_path, what, judge)
    tried = [(trial.settings["x"], trial.settings["y"]) for trial in seen]
    assert len(seen) == 20 > len(set(tried)) == len(judge.settings)
    assert all(trial.score == bowl(trial.settings) and trial.ranked for trial in seen)
    assert best.number == next(n for n, place in enumerate(tried) if bowl({"x": place[0], "y": place[1]}) == best.score)
    told = load_study(tmp_path, "study").trials
    assert sum("repeats" in trial.user_attrs for trial in told) == 20 - len(judge.settings)


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


def walk(
    dimensions: tuple[Dimension, ...], trials: int, seed: int = 0, sampler: str = "cmaes", **more: Any
) -> list[dict[str, Any]]:
    """A sampler's candidates without a study."""
    made: list[dict[str, Any]] = []
    proposals = SAMPLERS[sampler].propose(Plan(dimensions, {}, sampler, trials, seed, **more))
    with contextlib.suppress(StopIteration):
        generation = next(proposals)
        while True:
            made += [dict(candidate) for candidate in generation if candidate is not None]
            generation = proposals.send([bowl(candidate) for candidate in generation if candidate is not None])
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


def test_cmaes_begins_where_it_is_told_with_the_step_it_is_told() -> None:
    made = walk((X, Y), 200, start={"x": 0.7, "y": -1.0}, sigma=0.01, population=200)
    found = np.array([list(candidate.values()) for candidate in made])
    assert found.mean(axis=0) == pytest.approx([0.7, -1.0], abs=0.005)
    assert found.std(axis=0) == pytest.approx([0.01, 0.01], rel=0.2)


@pytest.mark.parametrize("sampler", ["random", "qmc", "cmaes"])
def test_a_log_range_has_as_many_candidates_in_each_decade(sampler: str) -> None:
    decades = Dimension("x", "float", 1e-5, 1e-1, start=1e-3, log=True)
    found = np.log10([candidate["x"] for candidate in walk((decades, Y), 400, sampler=sampler, population=None)])
    assert found.min() >= -5 and found.max() <= -1
    if sampler == "cmaes":  # a sixth of four decades around the default
        first = [c["x"] for seed in range(60) for c in walk((decades, Y), 6, seed)]
        assert np.log10(first).mean() == pytest.approx(-3, abs=0.15)
        assert np.log10(first).std() == pytest.approx(4 / 6, rel=0.2)
    else:
        assert np.histogram(found, bins=4, range=(-5, -1))[0] == pytest.approx([100] * 4, abs=30)


def test_sigma_of_a_log_range_is_the_logarithm_of_a_factor() -> None:
    decades = Dimension("x", "float", 1e-5, 1e-1, log=True)
    made = walk((decades, Y), 200, start={"x": 1e-2}, sigma=float(np.log(1.1)), population=200)
    found = np.log([candidate["x"] for candidate in made])
    assert found.mean() == pytest.approx(np.log(1e-2), abs=0.02)
    assert found.std() == pytest.approx(np.log(1.1), rel=0.2)


def test_cmaes_stays_in_a_box_that_it_begins_at_the_edge_of() -> None:
    found = np.array([list(candidate.values()) for candidate in walk((X, Y), 60, start={"x": 1.0, "y": 2.0})])
    assert (found.max(axis=0) <= [1.0, 2.0]).all()
    assert (found.min(axis=0) >= [0.0, -2.0]).all()


def test_cobyla_finds_the_top_of_a_smooth_hill_and_begins_anew_when_settled() -> None:
    made = walk((X, Y), 60, sampler="cobyla")
    assert max(bowl(candidate) for candidate in made) > 1 - 1e-4
    assert made[0] == {"x": 0.4, "y": 0.0}
    assert len(made) == 60


def test_cobyla_leaves_a_region_in_which_all_is_refused() -> None:
    proposals = SAMPLERS["cobyla"].propose(Plan((X, Y), {}, "cobyla", 60, 0))
    made, ((candidate,),) = [], (next(proposals),)
    with contextlib.suppress(StopIteration):
        while candidate is not None:
            made.append(bowl(candidate) if candidate["y"] < 0.5 else float("-inf"))
            (candidate,) = proposals.send([made[-1]])
    assert len(made) == 60
    assert made.count(float("-inf")) > 0
    assert max(made) > 1 - 1e-3


def test_qmc_fills_the_space_evenly() -> None:
    xs = [candidate["x"] for candidate in walk((X, Y), 16, sampler="qmc")]
    assert sorted(int(16 * x) for x in xs) == list(range(16))


@pytest.mark.parametrize("sampler", ["random", "qmc", "tpe", "nsga2"])
def test_a_search_may_begin_with_the_defaults(sampler: str, tmp_path: Path) -> None:
    what = replace(plan(sampler, 3, (X, Y, replace(WORD, start="b"))), default=True)
    first, *rest = go(tmp_path / "told", what, Asked())[1]
    assert first.settings == {"x": 0.4, "y": 0.0, "word": "b"}
    other, *others = go(tmp_path / "untold", replace(what, default=False), Asked())[1]
    assert other.settings != first.settings
    assert sampler not in ("random", "qmc") or [t.settings for t in rest] == [t.settings for t in others]
    with open_study(tmp_path / "told", "study") as study:  # a genetic sampler counts the first to its generation
        assert sampler != "nsga2" or study.trials[0].system_attrs.keys() == study.trials[1].system_attrs.keys() != set()


def test_more_points_of_qmc_begin_with_the_same() -> None:
    assert walk((X, WORD), 20, sampler="qmc")[:7] == walk((X, WORD), 7, sampler="qmc")


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        ({"sampler": "cmaes", "objectives": ("mean", "size")}, "cmaes takes one objective, and mean, size are 2"),
        ({"sampler": "random", "sigma": 0.1}, "--sigma is for cmaes, cobyla, not for random."),
        ({"sampler": "cmaes", "default": True}, "--include-default is for samplers that draw their first candidate"),
        ({"sampler": "cobyla", "population": 8}, "--population is for cmaes, nsga2, nsga3, not for cobyla."),
        ({"sampler": "cmaes", "start": {"z": 1.0}}, "--start z: this is not searched. Searched: x, y."),
        ({"sampler": "cmaes", "start": {"x": 1.5}}, "--start x=1.5 lies outside its range, 0 to 1."),
        ({"sampler": "random", "prune": 0.1, "objectives": ("worst",)}, "--prune compares means"),
        ({"sampler": "simplex"}, "No sampler 'simplex'."),
    ],
)
def test_what_a_sampler_cannot_do_is_refused(facts: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        check_plan(Plan((X, Y), {}, trials=4, seed=0, **facts))


def test_objectives_are_read_in_their_order_and_tasks_stands_for_all() -> None:
    tasks = ["glue/rte", "glue/cola"]
    assert read_objectives("size, tasks", tasks) == ("size", "glue/rte", "glue/cola")
    for text, sentence in (("mean,mean", "name each objective once"), ("", "name each"), ("sise", "mean 'size'")):
        with pytest.raises(UserError, match=sentence):
            read_objectives(text, tasks)


class Two:
    """A judge of two tasks that want opposite ends."""

    def __call__(self, settings: dict[str, Any]) -> Verdict:
        return Verdict({"a": settings["x"], "b": 1 - settings["x"] ** 2}, 0.0, size=100 * settings["x"])


@pytest.mark.parametrize("sampler", ["random", "qmc", "grid", "tpe", "nsga2", "nsga3"])
def test_the_front_holds_what_nothing_beats_and_the_best_mean_is_kept(sampler: str, tmp_path: Path) -> None:
    what = Plan((X,), {}, sampler, 12, 0, ("a", "size"))
    with open_study(tmp_path, "study", directions=directions(what.objectives)) as study:
        trials = search(study, what, Two(), lambda trial, verdict: None)
        kept = [trial.user_attrs["candidate"] for trial in study.best_trials]
    found = front(trials, what.objectives)
    assert sorted(kept) == [trial.number for trial in found]
    assert [trial.values for trial in found] == [(t.settings["x"], 100 * t.settings["x"]) for t in found]
    best = best_of(trials, what.objectives)
    assert best is not None
    assert best.score == max((x["x"] + 1 - x["x"] ** 2) / 2 for x in (trial.settings for trial in found))


def test_of_trials_alike_the_front_keeps_the_earliest() -> None:
    def scored(number: int, *values: float) -> Trial:
        return Trial(number, {}, sum(values) / 2, False, values)

    trials = [scored(2, 1, 0), scored(1, 1, 0), scored(3, 0, 1), scored(4, 0, 0)]
    refused = Trial(5, {}, float("-inf"), False, refused="no")
    assert [trial.number for trial in front([*trials, refused], ("a", "b"))] == [1, 3]


def test_the_lowest_task_may_be_the_objective(tmp_path: Path) -> None:
    what = Plan((X,), {}, "grid", 11, 0, ("worst",))
    with open_study(tmp_path, "study") as study:
        best = best_of(search(study, what, Two(), lambda trial, verdict: None), what.objectives)
    assert best is not None
    assert best.settings["x"] == pytest.approx(0.6)


class Halting:
    """A judge whose candidates below a half are stopped by the watch, if there is one."""

    def __init__(self) -> None:
        self.stopped = 0

    def __call__(self, settings: dict[str, Any], watch: Any = None) -> Verdict:
        labels = np.ones(100)
        right = np.arange(100) < 100 * settings["x"]
        so_far = Answers("accuracy", labels[::2], np.where(right[::2], 1.0, 0.0), 100)
        verdict = Verdict({"a": float(right[::2].mean())}, 0.0, rows=50, total=100, answers={"a": so_far})
        if watch is not None and watch(0, verdict):
            self.stopped += 1
            return replace(verdict, pruned=True)
        whole = Answers("accuracy", labels, np.where(right, 1.0, 0.0), 100)
        return Verdict({"a": float(right.mean())}, 0.0, rows=100, total=100, answers={"a": whole})


def test_candidates_that_fall_behind_are_stopped_and_the_best_is_the_same(tmp_path: Path) -> None:
    exact, pruned = (Plan((X,), {}, "random", 20, 0, prune=chance) for chance in (None, 0.05))
    judge, verdicts = Halting(), list[Verdict]()
    with open_study(tmp_path, "exact") as study:
        whole = best_of(search(study, exact, Halting(), lambda trial, verdict: None), ("mean",))
    for _ in range(2):  # the second time all is read back
        verdicts.clear()
        with open_study(tmp_path, "pruned") as study:
            trials = search(study, pruned, judge, lambda t, v: None if v is None else verdicts.append(v))
        best = best_of(trials, ("mean",))
        assert best is not None
        assert whole is not None
        assert (best.number, best.score) == (whole.number, whole.score)
        assert [trial.pruned for trial in trials].count(True) == judge.stopped > 5
        assert sum(v.rows for v in verdicts) == 100 * 20 - 50 * judge.stopped


@pytest.mark.filterwarnings("error")
def test_the_board_says_where_a_search_stands() -> None:
    shown = Board("Searching", Plan((X, Y), {}, "random", 8, 0), 2)
    assert shown.eta() == "–"
    shown.see(Trial(0, {"x": 0.25, "y": {"a": 1.0}}, 0.5, False, (0.5,)), Verdict({"a": 0.5}, 0.0))
    shown.see(Trial(1, {}, float("-inf"), False, refused="no"), None)
    shown.see(Trial(2, {}, 0.7, False, (0.7,), pruned=True), Verdict({"a": 0.7}, 0.0, rows=5, total=10))
    lines = shown.lines()
    assert lines["trials"].startswith("3 of 8")
    assert (lines["best mean"], lines["per task"]) == ("50.00 % (trial 0)", "a 50.00")
    assert (lines["refused"], lines["settings"]) == ("1", "x=0.25, y=(a 1)")
    assert "best 50.00 % (trial 0)" in shown.line()
    assert "left" in shown.line()
    assert "stopped early 1 (50% of the rows evaluated)" in shown.line()
    assert "lost" not in shown.line() + "".join(lines)
    shown.lose(2)
    assert shown.lines()["lost"] == "2 with killed workers, queued again"
    assert ", 2 lost and queued again, stopped early" in shown.line()
    for number in range(3, 8):
        shown.see(Trial(number, {}, 0.1, False, (0.1,)), Verdict({"a": 0.1}, 0.0))
    assert "left" not in shown.line()


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


def test_the_model_that_a_search_wrote_stands_in_the_store_with_its_size(
    cli: Cli, capsys: Capture, told: dict[str, Any]
) -> None:
    (row,) = asked(cli, capsys, f"select kind, bytes from artifacts where run_id = '{told['run']}'")
    assert row == {
        "kind": "model",
        "bytes": sum(file.stat().st_size for file in Path("best").rglob("*") if file.is_file()),
    }


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
    from mergectl.benchmarks import _rows
    from mergectl.judging import Judge

    events: list[str] = []
    load, judge = _rows.load, Judge.__call__

    def noting_load(task: Any, use: Any, **how: Any) -> Any:
        events.append(use)
        return load(task, use, **how)

    def noting_judge(self: Any, *settings: Any, **more: Any) -> Verdict:
        events.append("trial")
        return judge(self, *settings, **more)

    monkeypatch.setattr(_rows, "load", noting_load)
    monkeypatch.setattr(Judge, "__call__", noting_judge)
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
        if facts[1].number == 1:
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


@pytest.mark.slow
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


SHAPES: dict[str, list[object]] = {
    "per layer": ["--per-layer", 2],
    "per layer and task": ["--per-layer", "scale=2", "--per-task", "scale"],
    "per pattern": ["--range", "scale@*.attention.*=0:1", "--sampler", "cmaes"],
}
BEST = (
    "select m.value from metrics m join runs r using (run_id) where r.kind = 'search' and m.name = 'best_score' "
    "and r.status = 'finished'"
)


@pytest.mark.parametrize("shape", SHAPES)
def test_settings_that_differ_between_weights_score_in_memory_what_their_folder_scores(
    cli: Cli, capsys: Capture, population: Path, shape: str
) -> None:
    assert cli(*words(population, "--trials", 3, *SHAPES[shape])) == 0
    (best,) = asked(cli, capsys, BEST)
    assert cli("--json", "eval", "best", "--split", "tune") == 0
    assert json.loads(capsys.readouterr().out)["mean"] == pytest.approx(best["value"], abs=1e-12)
    scale = json.loads(Path("best/mergectl.json").read_text())["recipe"]["settings"]["scale"]
    assert len({str(value) for value in scale.values()}) == 2


@pytest.mark.parametrize(
    ("method", "more", "sentence"),
    [
        ("emr", ["--range", "rescaler=global_sum,tensor_mean", "--objective", "mean,size"], "keeps masks beside"),
        ("ties", ["--per-layer", "x"], "--per-layer x is not a number of groups, or NAME=NUMBER."),
        ("average", ["--per-layer", 2], "average has no coefficient of its own: name a setting, --per-layer NAME=2."),
        ("ties", ["--per-layer", 3], "--per-layer 3: a model is split into at least 2 and at most its 2 layers."),
        ("ties", ["--start", "scale=high"], "--start scale=high is not a number."),
        ("ties", ["--split", "report"], "A search may not look at 'report'"),
        ("ties", ["--search-split", "report"], "A search may not look at 'report'"),
        ("ties", ["--objective", "accuracy"], "No objective 'accuracy'."),
    ],
)
def test_what_cannot_be_searched_is_refused_in_a_sentence(
    cli: Cli, capsys: Capture, population: Path, method: str, more: list[object], sentence: str
) -> None:
    assert cli(*words(population, *more, method=method)) == 2
    assert sentence in capsys.readouterr().err
    assert not Path("best").exists()


def test_the_rank_of_a_refinement_is_searched_like_any_other_setting(
    cli: Cli, capsys: Capture, population: Path
) -> None:
    more = ["--trials", 2, "--limit", 20, "--range", "rank_scale=0.5:0.9", "--fix", "scale=0.3"]
    assert cli("--json", *words(population, *more, method="pave_ta")) == 0
    told = json.loads(capsys.readouterr().out)
    assert 0.5 <= told["settings"]["rank_scale"] <= 0.9
    made = json.loads(Path("best/mergectl.json").read_text())["recipe"]["settings"]
    assert made["rank_scale"] == told["settings"]["rank_scale"]


@pytest.mark.parametrize("more", [[], ["--range", "extrapolate=true,false"], ["--fix", "extrapolate=true"]])
def test_a_range_beyond_what_the_method_takes_is_refused_before_the_first_candidate(
    cli: Cli, capsys: Capture, population: Path, more: list[object]
) -> None:
    model = ["--base", population / "base", "--experts", population / "digit", "-o", "best"]
    code = cli("search", "interpolate", *model, "--trials", 2, "--limit", 20, "--range", "alpha=0:1.5", *more)
    if "--fix" in more:
        assert code == 0
        return
    assert code == 2
    error = capsys.readouterr().err
    assert "--range alpha=0:1.5 goes too far for 'interpolate': alpha must lie between 0.0 and 1.0, got 1.5" in error
    assert not Path("best").exists()


def test_a_log_range_is_searched_and_shown_in_equal_factors(cli: Cli, capsys: Capture, population: Path) -> None:
    more = ["--range", "scale=0.01:1:log", "--trials", 6, "--limit", 20, "--study", "factors"]
    assert cli(*words(population, *more)) == 0
    capsys.readouterr()
    assert cli("--json", "report", "--study", "factors") == 0
    study = json.loads(capsys.readouterr().out)
    assert study["log"] == ["scale"]
    edges = [float(row["value"].partition(" to ")[2]) for row in study["slices"]["scale"]]
    assert {round(float(np.log10(edge)), 3) for edge in edges} <= {-1.6, -1.2, -0.8, -0.4, 0.0}
    assert sum(row["trials"] for row in study["slices"]["scale"]) == 6
    (plot,) = (chart for chart in pictures(study) if isinstance(chart, Plot) and chart.x == "scale")
    assert plot.log_x
    assert cli(*words(population, *more, "--trials", 7, "--force")) == 0  # it goes on; with equal steps it may not
    assert cli(*words(population, *more, "--range", "scale=0.01:1", "--trials", 7, "--force")) == 2
    assert "belongs to another search" in capsys.readouterr().err


def test_a_search_on_report_is_marked_wherever_it_is_shown(cli: Cli, capsys: Capture, population: Path) -> None:
    more = ["--split", "report", "--allow-report", "--study", "peeking", "--trials", 2, "--limit", 20]
    assert cli(*words(population, *more)) == 0
    assert "This search chose by 'report'" in capsys.readouterr().err
    (row,) = asked(cli, capsys, "select config from runs where kind = 'search'")
    assert json.loads(row["config"])["allow_report"] is True
    assert cli("report", "--study", "peeking") == 0
    assert "This search chose by 'report'" in capsys.readouterr().out


def test_scores_and_size_are_searched_together_and_the_front_is_shown(
    cli: Cli, capsys: Capture, population: Path
) -> None:
    more = ["--objective", "mean,size", "--sampler", "nsga2", "--population", 4, "--trials", 6, "--limit", 30]
    more += ["--range", "density=0.1:1", "--fix", "scale=1", "--study", "two"]
    assert cli("--json", *words(population, *more, method="ties")) == 0
    told = json.loads(capsys.readouterr().out)
    sizes = {entry["settings"]["density"]: entry["size"] for entry in told["front"]}
    assert [size for _, size in sorted(sizes.items())] == sorted(sizes.values())
    assert told["trial"] in [entry["trial"] for entry in told["front"]]
    assert cli("--json", "report", "--study", "two") == 0
    study = json.loads(capsys.readouterr().out)
    assert study["front"] == [entry["trial"] for entry in told["front"]]
    assert (study["objectives"], len(study["history"])) == (["mean", "size"], 6)
    assert study["history"][0]["size"] > 0
    assert cli(*words(population, *more, "--force", method="ties")) == 0
    assert "the best mean of the front" in capsys.readouterr().out


def test_a_study_is_shown_with_what_mattered_and_what_was_refused(cli: Cli, capsys: Capture, population: Path) -> None:
    more = ["--range", "keep=0:1", "--fix", "epsilon=0.3", "--fix", "scale=1", "--trials", 6, "--limit", 20]
    assert cli(*words(population, *more, "--study", "mine", method="della_linear")) == 0
    capsys.readouterr()
    assert cli("--json", "report", "--study", "mine") == 0
    study = json.loads(capsys.readouterr().out)
    refused = [entry["candidate"] for entry in study["refused"]]
    assert refused
    assert study["states"] == {"finished": 6 - len(refused), "refused": len(refused)}
    assert list(study["importance"]["mean"]) == ["keep"]
    assert sum(row["trials"] for row in study["slices"]["keep"]) == 6 - len(refused)
    bests = [row["best mean"] for row in study["history"]]
    assert bests == sorted(bests)
    assert study["front"] == [next(row["candidate"] for row in study["history"] if row["mean"] == bests[-1])]
    rows = asked(cli, capsys, "select trial, status, error from runs where kind = 'trial' order by trial")
    assert [row["trial"] for row in rows if row["status"] == "failed"] == refused
    assert all("keep" in row["error"] for row in rows if row["status"] == "failed")
    for form in ((), ("--csv",), ("--md",)):
        assert cli("report", "--study", "mine", *form) == 0
    shown = capsys.readouterr().out
    assert "Values of keep (mean, %)" in shown
    assert f"{100 * study['history'][0]['mean']:.2f}" in shown


def test_of_a_long_history_the_steps_upwards_are_printed(capsys: Capture) -> None:
    means = [0.1, 0.05, *[0.2 + n / 1000 for n in range(3)], *[0.15] * 60]
    best = [max(means[: n + 1]) for n in range(len(means))]
    history = [
        {"candidate": n, "mean": mean, "best mean": top, "seconds": 1.0, "scores": {"s/a": mean}, "settings": {"x": n}}
        for n, (mean, top) in enumerate(zip(means, best, strict=True))
    ]
    found: dict[str, Any] = {
        "study": "long", "searched_on": "tune", "objectives": ["mean"], "states": {"finished": 65}, "history": history,
        "importance": {"mean": None}, "importance_by": "", "slices": {}, "front": [4], "refused": [], "log": [],
    }  # fmt: skip
    show(found)
    table, _, front = capsys.readouterr().out.partition("Best ")
    assert "History: those of 65 trials" in table
    assert re.findall(r"^│ (\d+) ", table, re.M) == ["0", "2", "3", "4"]
    assert re.findall(r"^│ (\d+) +│ x=4 +│ +20.20 │ +20.20 │", front, re.M) == ["4"]


def test_a_search_ends_with_its_best_settings_and_the_way_to_look_at_it(
    cli: Cli, capsys: Capture, told: dict[str, Any], population: Path
) -> None:
    assert cli(*words(population, *SMALL, "--force")) == 0  # all its candidates are read back
    out = capsys.readouterr().out
    assert f"mergectl report --study {told['study']}" in out
    assert f"Trial {told['trial']} of 4: scale=(parity " in out
    assert told["tune_tasks"].keys() == told["tasks"].keys()
    for task, score in told["tune_tasks"].items():
        line = rf"{task} +│ +{100 * score:.1f} │ +{100 * told['tasks'][task]:.1f} │"
        assert re.search(line, out)
    assert sum(told["tune_tasks"].values()) / 3 == pytest.approx(told["tune"])


def test_a_study_that_is_not_there(cli: Cli, capsys: Capture) -> None:
    assert cli("report", "--study", "none") == 2
    assert "No study 'none': there is no journal at lab/optuna/journal.log." in capsys.readouterr().err


def test_joining_takes_no_method(cli: Cli, capsys: Capture, population: Path) -> None:
    assert cli("search", "--join", "mine", *words(population)[1:]) == 2
    assert "--join takes everything from the study. Leave out 'task_arithmetic'" in capsys.readouterr().err


def test_joining_a_study_that_never_begins(cli: Cli, capsys: Capture) -> None:
    assert cli("search", "--join", "mine", "--wait", 0.1) == 2
    assert "No study 'mine'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.slow
def test_two_workers_and_one_that_joins_write_what_one_process_writes(
    cli: Cli, capsys: Capture, population: Path
) -> None:
    more = ["--trials", 14, "--sampler", "cmaes", "--per-task", "scale", "--limit", 40, "--study", "mine"]
    join = [sys.executable, "-m", "mergectl", "--json", "search", "--join", "mine", "--wait", "120"]
    process = subprocess.Popen(join, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert cli("--json", *words(population, *more, "--workers", 2)) == 0
    told = json.loads(capsys.readouterr().out)
    assert json.loads(process.communicate(timeout=120)[0])["study"] == "mine"
    assert cli("--json", "--store", "other/s.duckdb", *words(population, *more, "-o", "alone")) == 0
    alone = json.loads(capsys.readouterr().out)
    assert {key: told[key] for key in ("settings", "trial", "tune", "tasks")} == {
        key: alone[key] for key in ("settings", "trial", "tune", "tasks")
    }
    assert not list(Path("lab/optuna").glob("*.merged"))
