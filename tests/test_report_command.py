"""`mergectl report`: the leaderboard, single runs and questions, in every form that people and programs read."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from mergectl.store import open_store
from tests.conftest import Cli

Capture = pytest.CaptureFixture[str]
Say = Callable[..., str]
TASKS = ("parity", "loop", "digit")
HOW = {"average": (), "ties": ("--refine", "dare:drop=0.5", "--scale", "0.25")}


@pytest.fixture(scope="module")
def store(population: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a base, three experts and two merges, all scored, a failed run and a cancelled one."""
    from mergectl.cli import main

    def do(*words: object) -> int:
        return main([str(word) for word in (*words, "--quiet")])

    folder, before = tmp_path_factory.mktemp("report"), Path.cwd()
    experts = [population / task for task in TASKS]
    os.chdir(folder)
    try:
        for name, more in HOW.items():
            assert do("merge", name, "--base", population / "base", "--experts", *experts, "-o", name, *more) == 0
        for merged in HOW:
            assert do("eval", merged, "--references") == 0
        assert do("eval", "average", "--split", "tune") == 0
        assert do("eval", experts[0], "--on", "digits/loop") == 2
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mergectl.merge.merge", interrupted)
            assert do("merge", "average", "--experts", *experts, "-o", "never") == 130
    finally:
        os.chdir(before)
    return folder / "lab/mergectl.duckdb"


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def say(cli: Cli, capsys: Capture, store: Path) -> Say:
    """Ask for a report and return what is printed."""

    def said(*words: object) -> str:
        capsys.readouterr()
        assert cli("report", "--store", store, *words) == 0
        return capsys.readouterr().out

    return said


@pytest.fixture
def refused(cli: Cli, capsys: Capture, store: Path) -> Say:
    """Ask for a report that there is not and return the last line on stderr."""

    def said(*words: object) -> str:
        capsys.readouterr()
        assert cli("report", "--store", store, *words) == 2
        return capsys.readouterr().err.splitlines()[-1]

    return said


def cells(text: str) -> list[list[str]]:
    """The rows of a table as drawn, without its head; lines that go on in the next one are put together."""
    rows: list[list[str]] = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split("│")[1:-1]]
        if parts and parts[0]:
            rows.append(parts)
        elif parts:
            rows[-1] = [f"{one} {two}".strip() for one, two in zip(rows[-1], parts, strict=True)]
    return rows


def board(say: Say) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(say("--json"))
    return found


def test_the_leaderboard_goes_from_the_base_over_the_experts_to_the_merges(say: Say) -> None:
    rows = board(say)
    kinds = [row["kind"] for row in rows]
    assert kinds == ["base", "experts", "expert", "expert", "expert", "merged", "merged"]
    averages = [row["average"] for row in rows if row["kind"] == "merged"]
    assert averages == sorted(averages, reverse=True)
    shown = [row[0] for row in cells(say())]
    assert shown[:2] == ["base", "experts"]
    assert {"expert digit", "expert loop", "expert parity"} == set(shown[2:5])
    assert set(shown[5:]) == set(HOW)


def test_models_in_folders_of_one_name_are_told_apart(cli: Cli, population: Path, capsys: Capture) -> None:
    from mergectl.lab import Lab
    from mergectl.scoreboard import read_board

    for task in ("parity", "loop"):
        shutil.copytree(population / task, Path(task) / "tiny_lr1e-05")
    experts = [f"{task}/tiny_lr1e-05" for task in ("parity", "loop")]
    for merged, scale in (("all/x/m", 0.4), ("all/y/m", 0.5)):
        how = ("--base", population / "base", "--experts", *experts, "-o", merged, "--scale", scale)
        assert cli("merge", "task_arithmetic", *how) == 0
        assert cli("eval", merged, "--references", "--limit", 20) == 0
    (group,) = read_board(Lab(), "report:20", None).groups
    assert sorted(row.model for row in group.rows if row.kind == "expert") == sorted(experts)
    assert sorted(row.model for row in group.rows if row.kind == "merged") == ["x/m", "y/m"]
    capsys.readouterr()
    assert cli("report") == 0
    assert "There are some: --split report:20" in " ".join(capsys.readouterr().out.split())


def test_the_leaderboard_shows_the_scores_in_percent(say: Say) -> None:
    shown = {row[0]: row for row in cells(say())}
    for row in board(say):
        if row["kind"] == "merged":
            percent = [f"{100 * row[key]:.1f}" for key in ("digits/digit", "digits/loop", "digits/parity", "average")]
            assert shown[row["model"]][2:6] == percent
            assert shown[row["model"]][-1] == row["run_id"][:8]


def test_the_leaderboards_means_are_right_by_hand(say: Say) -> None:
    rows = {row["model"]: row for row in board(say)}
    names = [f"digits/{task}" for task in TASKS]
    base, own = rows["base"], next(row for row in rows.values() if row["kind"] == "experts")
    for row in (row for row in rows.values() if row["kind"] == "merged"):
        assert row["average"] == pytest.approx(fmean(row[name] for name in names))
        assert row["relative"] == pytest.approx(fmean(row[name] / own[name] for name in names))
        gained = [(row[n] - base[n]) / (own[n] - base[n]) for n in names if own[n] > base[n]]
        assert row["normalised"] == pytest.approx(fmean(gained))


def test_every_score_of_the_leaderboard_is_that_of_an_evaluation(say: Say) -> None:
    sql = (
        "select i.ref, m.task, m.value from metrics m join inputs i using (run_id) "
        "where i.role = 'model' and m.name = 'score' and m.split = 'report'"
    )
    scores = {(Path(row["ref"]).name, row["task"]): row["value"] for row in json.loads(say("--sql", sql, "--json"))}
    for row in board(say):
        if row["kind"] != "experts":
            found = {task: row[task] for task in (f"digits/{t}" for t in TASKS) if row[task] is not None}
            assert found == {task: scores[row["model"], task] for task in found}


def test_settings_and_refinements_stand_beside_the_method(say: Say) -> None:
    how = {row[0]: row[1] for row in cells(say())}
    assert how["ties"].startswith("ties: dare(drop=0.5")
    assert how["ties"].endswith("scale=0.25")
    assert how["average"] == "average"


def test_csv_holds_the_same_as_json(say: Say) -> None:
    rows = list(csv.DictReader(io.StringIO(say("--csv"))))
    expected = [{k: "" if v is None else str(v) for k, v in row.items()} for row in board(say)]
    assert rows == expected


def test_markdown_is_a_table(say: Say) -> None:
    lines = say("--md").splitlines()
    rows = board(say)
    assert {line.count(" | ") for line in lines} == {len(rows[0]) - 1}
    assert set(lines[1]) == set("| -")
    assert len(lines) == len(rows) + 2


def test_bars_in_markdown_are_escaped(say: Say) -> None:
    assert say("--md", "--sql", "select 'a|b' as x").splitlines()[-1] == "| a\\|b |"


def test_brackets_are_printed_as_they_are(say: Say) -> None:
    assert cells(say("--sql", "select '[red]a[/red] [/x]' as \"[b]\""))[0] == ["[red]a[/red] [/x]"]


def test_another_split_has_a_board_of_its_own(say: Say) -> None:
    (row,) = json.loads(say("--split", "tune", "--json"))
    assert (row["model"], row["kind"]) == ("average", "merged")


def test_a_suite_without_scores_is_said_to_have_none(say: Say) -> None:
    assert say("--suite", "glue").startswith("No scores on 'report' in")
    assert json.loads(say("--suite", "glue", "--json")) == []


def test_failed_and_cancelled_runs_are_rows(say: Say) -> None:
    rows = json.loads(say("--sql", "select kind, status, error from runs where status <> 'finished'", "--json"))
    found = {row["status"]: (row["kind"], row["error"]) for row in rows}
    assert set(found) == {"failed", "cancelled"}
    assert found["cancelled"][0] == "merge"
    assert "no head for digits/loop" in found["failed"][1]


def test_a_failed_run_tells_its_error(say: Say) -> None:
    (row,) = json.loads(say("--sql", "select run_id from runs where status = 'failed'", "--json"))
    shown = {row[0]: row[1] for row in cells(say(row["run_id"]))}
    assert shown["status"] == "failed"
    assert "no head for digits/loop" in shown["error"]


def test_a_run_is_found_by_name_and_by_the_start_of_its_id(say: Say) -> None:
    by_name = json.loads(say("ties", "--json"))
    assert by_name["kind"] == "merge"
    assert json.loads(say(by_name["run_id"][:9], "--json")) == by_name
    assert by_name["config"]["refine"][0]["name"] == "dare"
    assert [row["role"] for row in by_name["inputs"]].count("expert") == 3


def test_a_run_shows_its_metrics_in_every_form(say: Say) -> None:
    whole = json.loads(say("average@tune", "--json"))
    scores = {row["task"]: row["value"] for row in whole["metrics"] if row["name"] == "score"}
    assert set(scores) == {f"digits/{task}" for task in TASKS}
    rows = list(csv.DictReader(io.StringIO(say("average@tune", "--csv"))))
    assert {row["task"]: float(row["value"]) for row in rows if row["name"] == "score"} == scores
    assert f"| digits/loop | tune | score | – | {scores['digits/loop']:.3f}".rstrip("0") in say("average@tune", "--md")
    assert "digits/loop" in say("average@tune")


def test_a_start_that_fits_several_runs_is_refused(cli: Cli, capsys: Capture) -> None:
    seen: dict[str, str] = {}
    number = 0
    while True:
        number += 1
        with open_store("lab/mergectl.duckdb").start("run", config={"number": number}) as run:
            pass
        if run.id[:2] in seen:
            break
        seen[run.id[:2]] = run.id
    assert cli("report", run.id[:2]) == 2
    err = capsys.readouterr().err
    assert f"2 runs begin with {run.id[:2]}" in err
    assert run.id in err


REFUSED: dict[str, tuple[list[str], str]] = {
    "no such run": (["zzz"], "No run 'zzz' in"),
    "two forms": (["--csv", "--md"], "Error: --csv and --md exclude each other."),
    "two forms more": (["--json", "--csv"], "Error: --json and --csv exclude each other."),
    "no such column": (["--sql", "select colour from runs"], "colour"),
    "two statements": (["--sql", "select 1; select 2"], "One SELECT at a time, got 2 statements."),
    "no statement": (["--sql", ""], "One SELECT at a time, got 0 statements."),
    "other files": (["--sql", "select * from read_csv('/etc/passwd')"], "cannot be answered"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_reported(refused: Say, what: str) -> None:
    words, sentence = REFUSED[what]
    assert sentence in refused(*words)


def test_a_lab_without_a_store_says_so(cli: Cli, capsys: Capture) -> None:
    assert cli("report") == 2
    path = Path("lab/mergectl.duckdb").absolute()
    assert capsys.readouterr().err == f"Error: There is no store at {path} yet; the first run makes it.\n"
    assert not Path("lab").exists()


def test_a_store_may_be_made_anew_from_its_archive(cli: Cli, capsys: Capture) -> None:
    with open_store("lab/mergectl.duckdb").start("run", config={}, name="mine") as run:
        run.metric("score", 0.5)
    assert cli("report") == 0
    Path("lab/mergectl.duckdb").write_bytes(b"broken")
    assert cli("report", "--rebuild") == 0
    assert capsys.readouterr().out.endswith("1 runs restored into lab/mergectl.duckdb\n")
    assert cli("--json", "report", "mine") == 0
    assert json.loads(capsys.readouterr().out)["metrics"][0]["value"] == 0.5


def test_the_end_of_the_pipe_may_close_early(store: Path) -> None:
    import subprocess
    import sys

    line = f"{sys.executable} -m mergectl report --store {store} --sql 'select * from range(200000)' --csv | head -1"
    done = subprocess.run(line, shell=True, capture_output=True, text=True)
    assert done.stdout == "range\n"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["--check", "--sql", "select 1"],
        ["--sql", "select 1", "--study", "s"],
        ["--html", "page.html", "--json"],
        ["some-run", "--html", "page.html"],
    ],
    ids=" ".join,
)
def test_two_questions_at_once_are_refused(words: list[str], cli: Cli, capsys: Capture) -> None:
    assert cli("report", *words) == 2
    assert "Ask for one" in capsys.readouterr().err
    assert not Path("page.html").exists()
