"""`mergectl eval`: whose head answers, what is compared with what, and under which name it is recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests import population as tiny
from tests.conftest import Cli

Capture = pytest.CaptureFixture[str]
TASKS = ("parity", "loop", "digit")


def merged(cli: Cli, population: Path, *more: object, method: str = "average") -> None:
    words = ["--base", population / "base", "--experts", *[population / task for task in TASKS]]
    assert cli("merge", method, *words, "-o", "m", *more) == 0


def told(cli: Cli, capsys: Capture, *words: object) -> dict[str, Any]:
    """Evaluate and return the JSON document, which is all that stands on stdout."""
    capsys.readouterr()
    assert cli("--json", "eval", *words) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def scores(cli: Cli, capsys: Capture, *words: object) -> dict[str, float]:
    return {row["task"]: row["score"] for row in told(cli, capsys, *words)["tasks"]}


def asked(cli: Cli, capsys: Capture, sql: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert cli("--json", "report", "--sql", sql) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("method", ["average", "emr"])
def test_a_merged_model_wears_the_head_of_each_task(cli: Cli, capsys: Capture, population: Path, method: str) -> None:
    merged(cli, population, method=method)
    alone: dict[str, float] = {}
    for task in ("parity", "digit"):
        merged(cli, population, "--export", task, "-o", f"only/{task}", method=method)
        alone |= scores(cli, capsys, f"only/{task}")
    together = scores(cli, capsys, "m")
    assert set(together) == {f"digits/{task}" for task in TASKS}
    assert {task: together[task] for task in alone} == alone


def test_the_base_borrows_the_heads_it_is_given(cli: Cli, capsys: Capture, population: Path) -> None:
    Path("by_hand").mkdir()
    for path in (population / "digit").iterdir():
        Path("by_hand", path.name).write_bytes(path.read_bytes())
    base = {f"vit.{name}": weight for name, weight in tiny.weights(population / "base").items()}
    whole = load_file("by_hand/model.safetensors")
    save_file({name: base.get(name, weight) for name, weight in whole.items()}, "by_hand/model.safetensors")
    heads = ["--heads", population / "digit", population / "loop"]
    found = scores(cli, capsys, population / "base", *heads)
    assert set(found) == {"digits/digit", "digits/loop"}
    assert found["digits/digit"] == scores(cli, capsys, "by_hand")["digits/digit"]


def test_a_head_may_be_given_to_a_task_by_name(cli: Cli, capsys: Capture, population: Path) -> None:
    tiny.change(population / "digit", Path("stray"), lambda weights: weights)
    Path("stray/mergectl.json").unlink()
    found = scores(cli, capsys, population / "base", "--heads", "digits/digit=stray")
    assert found == scores(cli, capsys, population / "base", "--heads", population / "digit")
    assert cli("eval", population / "base", "--heads", "stray") == 2
    assert "stray does not say which task it is for" in capsys.readouterr().err


def test_references_score_the_experts_and_the_base_once(cli: Cli, capsys: Capture, population: Path) -> None:
    merged(cli, population)
    for _ in range(2):
        assert cli("eval", "m", "--references", "--limit", 40) == 0
    rows = asked(cli, capsys, "select name, count(*) as n from runs where kind = 'eval' group by name order by name")
    assert {row["name"]: row["n"] for row in rows} == {
        "base@report": 1, "digit@report": 1, "loop@report": 1, "parity@report": 1, "m@report": 2,
    }  # fmt: skip


def test_the_normalised_columns_are_right_by_hand(cli: Cli, capsys: Capture, population: Path) -> None:
    merged(cli, population)
    document = told(cli, capsys, "m")
    assert all(row["normalised"] is None and row["relative_to_expert"] is None for row in document["tasks"])
    experts = {k: v for task in TASKS for k, v in scores(cli, capsys, population / task).items()}
    base = scores(cli, capsys, population / "base", "--heads", *[population / task for task in TASKS])
    for row in told(cli, capsys, "m")["tasks"]:
        top, bottom = experts[row["task"]], base[row["task"]]
        assert row["relative_to_expert"] == pytest.approx(row["score"] / top)
        normalised = (row["score"] - bottom) / (top - bottom) if top > bottom else None
        assert row["normalised"] == pytest.approx(normalised)
    assert any(experts[task] > base[task] for task in base)


def test_a_limited_score_stands_under_a_name_of_its_own(cli: Cli, capsys: Capture, population: Path) -> None:
    document = told(cli, capsys, population / "digit", "--limit", 30)
    assert [row["examples"] for row in document["tasks"]] == [30]
    rows = asked(cli, capsys, "select distinct split from metrics where task is not null")
    assert rows == [{"split": "report:30"}]
    assert cli("report") == 0
    assert capsys.readouterr().out.startswith("No scores on 'report' in lab/mergectl.duckdb yet.")


def test_the_mean_and_the_run_stand_in_the_document(cli: Cli, capsys: Capture, population: Path) -> None:
    merged(cli, population)
    document = told(cli, capsys, "m", "--split", "tune", "--on", "digits/loop,digits/parity")
    found = [row["score"] for row in document["tasks"]]
    (row,) = asked(cli, capsys, "select m.run_id, m.value, m.split from metrics m where m.name = 'mean_score'")
    assert row == {"run_id": document["run"], "value": document["mean"], "split": "tune"}
    assert document["mean"] == pytest.approx(sum(found) / 2)


def test_the_table_shows_percent(cli: Cli, capsys: Capture, population: Path) -> None:
    (score,) = scores(cli, capsys, population / "digit").values()
    assert cli("eval", population / "digit") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "digits/digit" in line)
    assert f" {100 * score:.1f} " in line


def test_the_batch_size_changes_no_score(cli: Cli, capsys: Capture, population: Path) -> None:
    words = [population / "digit", "--limit", 100]
    assert scores(cli, capsys, *words, "--batch-size", 7) == scores(cli, capsys, *words, "--batch-size", 100)


def test_a_model_made_twice_is_scored_in_one_row_per_task(cli: Cli, capsys: Capture, population: Path) -> None:
    merged(cli, population, method="ties")
    merged(cli, population, "--density", 0.2, "-o", "again", method="ties")
    assert [row["task"] for row in told(cli, capsys, "m")["tasks"]] == sorted(f"digits/{task}" for task in TASKS)


def test_a_run_of_the_store_names_its_model(cli: Cli, capsys: Capture, population: Path) -> None:
    merged(cli, population)
    (run,) = asked(cli, capsys, "select run_id from runs where kind = 'merge'")
    assert scores(cli, capsys, run["run_id"][:8]) == scores(cli, capsys, "m")


def test_a_merged_model_may_borrow_another_head(cli: Cli, capsys: Capture, population: Path) -> None:
    merged(cli, population)
    other = tiny.change(
        population / "digit",
        Path("other"),
        lambda w: {n: -x if n.startswith("classifier") else x for n, x in w.items()},
    )
    own, lent = scores(cli, capsys, "m", "--on", "digits/digit"), scores(cli, capsys, "m", "--heads", other)
    assert set(own) == set(lent)
    assert own != lent


def test_an_unknown_split(cli: Cli, capsys: Capture, population: Path) -> None:
    assert cli("eval", population / "digit", "--split", "test") == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert "'test'" in err
    assert "fit, tune, report" in err


def test_an_unknown_dtype(cli: Cli, capsys: Capture, population: Path) -> None:
    assert cli("eval", population / "digit", "--dtype", "int8") == 2
    assert "--dtype must be float32, bfloat16 or float16, got 'int8'" in capsys.readouterr().err


def test_the_seed_decides_which_rows_a_limit_draws(cli: Cli, capsys: Capture, population: Path) -> None:
    words = [population / "digit", "--limit", 60]
    first, again = scores(cli, capsys, *words), scores(cli, capsys, *words)
    others = [scores(cli, capsys, *words, "--seed", seed) for seed in (1, 2)]
    assert first == again
    assert any(other != first for other in others)
