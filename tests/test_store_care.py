"""`mergectl report` looks after the store: checks it, takes runs in, writes them out; also on a server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mergectl.store import open_store
from tests.conftest import Cli
from tests.store import postgres

Capture = pytest.CaptureFixture[str]
LAB = "lab/mergectl.duckdb"


def a_run(store: str = LAB, x: int = 0) -> None:
    with open_store(store).start("eval", config={"x": x}, name=f"run{x}") as run:
        run.metric("score", 0.5, task="a/b", split="report")


@pytest.fixture
def merged(cli: Cli, population: Path) -> Path:
    words = ["--experts", population / "parity", population / "loop", "-o", "lab/runs/merged"]
    assert cli("merge", "average", *words, "--quiet") == 0
    return Path("lab/runs/merged")


def test_a_sound_lab_passes_its_check(cli: Cli, capsys: Capture, merged: Path) -> None:
    assert cli("report", "--check") == 0
    assert capsys.readouterr().out == f"1 runs and 1 models checked in {LAB}: no problem.\n"


def test_a_model_that_is_another_now_is_a_problem(cli: Cli, capsys: Capture, merged: Path, population: Path) -> None:
    shutil.copyfile(population / "parity" / "model.safetensors", merged / "model.safetensors")
    capsys.readouterr()
    assert cli("report", "--check", "--json") == 1
    told = capsys.readouterr()
    (problem,) = json.loads(told.out)["problems"]
    assert "does not hold the weights that run" in problem
    assert "The store has 1 problem." in told.err


def test_models_gone_and_models_of_no_run_are_told(cli: Cli, capsys: Capture, merged: Path) -> None:
    merged.rename("lab/runs/moved")
    capsys.readouterr()
    assert cli("report", "--check", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["gone"], told["orphans"]) == ([str(merged.absolute())], ["lab/runs/moved"])


def test_a_row_missing_from_the_database_is_a_problem_that_a_rebuild_mends(cli: Cli, capsys: Capture) -> None:
    from mergectl.store.database import attached

    a_run()
    assert cli("report") == 0
    with attached(Path(LAB), write=True) as connection:
        connection.execute("DELETE FROM metrics")
    assert [cli("report", flag) for flag in ("--check", "--rebuild", "--check")] == [1, 0, 0]
    assert "has other metrics in the database" in capsys.readouterr().out


def test_stores_are_merged_and_runs_exported_and_imported_once(cli: Cli, capsys: Capture) -> None:
    a_run(x=1)
    a_run("other/mergectl.duckdb", x=2)
    words = [["--merge-store", "other"], ["--merge-store", "other"], ["--export", "out"], ["--import", "out"]]
    assert [cli("report", *given) for given in words] == [0] * 4
    assert capsys.readouterr().out.splitlines() == [
        f"1 runs taken into {LAB}; 0 were there already", f"0 runs taken into {LAB}; 1 were there already",
        "2 runs written to out", f"0 runs taken into {LAB}; 2 were there already",
    ]  # fmt: skip


def test_only_one_thing_is_done_to_the_store_at_a_time(cli: Cli, capsys: Capture) -> None:
    assert cli("report", "--check", "--rebuild") == 2
    assert "--rebuild and --check exclude each other" in capsys.readouterr().err


def test_a_question_that_takes_too_long_is_stopped(cli: Cli, capsys: Capture) -> None:
    a_run()
    endless = "SELECT count(*) FROM range(100000000) a, range(100000) b WHERE random() < 0.1"
    assert cli("report", "--sql", endless, "--timeout", "0.2") == 2
    assert "longer than 0.2 seconds" in capsys.readouterr().err


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    if not postgres.installed():
        pytest.skip("no PostgreSQL server or no psycopg is installed")
    with postgres.running() as url:
        yield url


@pytest.mark.slow
def test_the_verbs_work_on_a_server(cli: Cli, capsys: Capture, population: Path, server: str) -> None:
    store = ["--store", server, "--quiet"]
    experts = [population / "parity", population / "loop"]
    assert cli("merge", "average", "--base", population / "base", "--experts", *experts, "-o", "merged", *store) == 0
    assert cli("eval", "merged", "--references", "--limit", "40", *store) == 0
    assert cli("search", "task_arithmetic", "--base", population / "base", "--experts", *experts, "--trials", "2",
               "--limit", "40", "-o", "best", *store) == 0  # fmt: skip
    assert not Path(LAB).exists()
    capsys.readouterr()
    for words in ([], ["merged"], ["best"], ["--compare", "merged", "best"], ["--study", "task_arithmetic"]):
        known = words if words[:1] != ["--study"] else ["--study", _study(server)]
        assert cli("report", *known, "--store", server) == 0, words
    assert "merged" in capsys.readouterr().out
    assert cli("report", "--check", "--store", server) == 0
    assert cli("run", "--again", "merged", "--store", server) == 0
    assert cli("report", "--html", "page.html", "--store", server) == 0


def _study(server: str) -> str:
    return str(open_store(server).query("SELECT study FROM runs WHERE kind = 'search'").rows[0][0])
