"""`mergectl run --again RUN`: the same work gives the same bits, and what is not the same is named."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from mergectl.lab import Lab
from mergectl.store import open_store
from tests.conftest import Cli

Capture = pytest.CaptureFixture[str]
TASKS = ("parity", "loop")


def rows(sql: str) -> list[tuple[Any, ...]]:
    return open_store("lab/mergectl.duckdb").query(sql).rows


def newest(kind: str) -> str:
    return str(rows(f"SELECT run_id FROM runs WHERE kind = '{kind}' ORDER BY started_at DESC LIMIT 1")[0][0])


@pytest.fixture
def merged(cli: Cli, population: Path) -> Path:
    """A merge with chance in it, made in the test's folder."""
    shutil.copytree(population, "models")
    experts = [Path("models") / task for task in TASKS]
    words = ["--base", "models/base", "--experts", *experts, "--refine", "dare:drop=0.5", "--seed", "3"]
    assert cli("merge", "ties", *words, "-o", "out/merged") == 0
    return Path("out/merged")


@pytest.mark.parametrize("left", ["there", "gone"])
def test_a_merge_is_the_same_again_also_where_its_model_is_gone(
    cli: Cli, capsys: Capture, merged: Path, left: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if left == "gone":
        shutil.rmtree(merged)
    monkeypatch.setenv("MERGECTL_STORE", str(tmp_path / "lab/mergectl.duckdb"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # the references count from where the merge was made
    capsys.readouterr()
    run = open_store().query("SELECT run_id FROM runs WHERE kind = 'merge'").rows[0][0]
    assert cli("run", "--again", run, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["run"], told["compared"], told["identical"]) == (run, "weights", True)
    metrics = open_store().query("SELECT r.kind, m.name, m.value FROM runs r JOIN metrics m USING (run_id)").rows
    assert ("again", "identical", 1.0) in metrics


def test_a_merge_whose_expert_changed_is_refused(cli: Cli, capsys: Capture, merged: Path) -> None:
    shutil.rmtree("models/parity")
    shutil.copytree("models/loop", "models/parity")
    assert cli("run", "--again", newest("merge")) == 2
    assert "models/parity" in capsys.readouterr().err


def test_a_merge_that_gives_other_weights_is_told_apart(
    cli: Cli, capsys: Capture, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergectl import again, repeat

    record = again.record_of(merged)
    record["recipe"]["seed"] += 1
    monkeypatch.setattr(repeat, "record_of", lambda folder: record)
    assert cli("run", "--again", newest("merge")) == 1
    assert re.search(r"done again, has other weights: '[\w.]+' differs", capsys.readouterr().err)
    assert ("again", "failed") in rows("SELECT kind, status FROM runs")


def test_scores_are_the_same_again_and_leave_one_row(cli: Cli, capsys: Capture, merged: Path) -> None:
    assert cli("eval", merged, "--on", "digits/parity", "--limit", "40") == 0
    before = rows("SELECT count(*) FROM runs WHERE kind = 'eval'")
    assert cli("run", "--again", newest("eval")) == 0
    assert "has the same scores, bit by bit" in capsys.readouterr().out
    assert rows("SELECT count(*) FROM runs WHERE kind = 'eval'") == before


def test_a_score_that_is_another_now_is_named(
    cli: Cli, capsys: Capture, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergectl import repeat

    assert cli("eval", merged, "--on", "digits/parity", "--limit", "40") == 0
    real = repeat._metrics
    seen: list[str] = []

    def told(lab: Lab, run: str) -> dict[tuple[Any, ...], Any]:
        seen.append(run)
        return real(lab, run) if len(seen) > 1 else dict.fromkeys(real(lab, run), -1.0)

    monkeypatch.setattr(repeat, "_metrics", told)
    assert cli("run", "--again", newest("eval")) == 1
    assert "has other scores: digits/parity report:40" in capsys.readouterr().err


def test_an_expert_is_the_same_again(cli: Cli, capsys: Capture, population: Path) -> None:
    words = ["--base", population / "base", "--max-steps", "2", "--limit-fit", "32", "--limit-tune", "32"]
    assert cli("finetune", "digits/parity", *words, "-o", "experts") == 0
    assert cli("run", "--again", newest("finetune")) == 0
    assert "(finetune), done again, has the same weights" in capsys.readouterr().out


def test_a_search_is_the_same_again_trial_by_trial(cli: Cli, capsys: Capture, population: Path) -> None:
    experts = [population / task for task in TASKS]
    words = ["--base", population / "base", "--experts", *experts, "--on", "digits/parity", "digits/loop"]
    assert cli("search", "task_arithmetic", *words, "--trials", "2", "--limit", "40", "-o", "best") == 0
    assert cli("run", "--again", newest("search")) == 0
    assert "has the same trials and weights" in capsys.readouterr().out


def test_what_cannot_be_repeated_is_refused(cli: Cli, capsys: Capture) -> None:
    store = open_store("lab/mergectl.duckdb")
    with store.start("trial", config={}, command=["mergectl", "search", "ties"]) as trial:
        pass
    store.start("merge", config={"x": 1}).fail("broken")
    for words, sentence in (
        (("nobody",), "No run 'nobody'"),
        ((trial.id,), "repeated with what they were part of. It was: mergectl search ties"),
        ((newest("merge"),), "is failed; only finished runs"),
        ((trial.id, "digits"), "Leave out the rest"),
    ):
        assert cli("run", "--again", *words) == 2
        assert sentence in capsys.readouterr().err


def test_plugins_are_recorded_with_digest_and_commit() -> None:
    import subprocess

    from mergectl.provenance import code_facts, git_state

    file = Path("lab/methods/mine.py")
    file.parent.mkdir(parents=True)
    file.write_text("TITLE = 'Mine'\n")
    git_state.cache_clear()
    assert code_facts()["plugin.methods/mine"].endswith(", in no Git checkout")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "a"]):
        subprocess.run(["git", *words], cwd=file.parent, check=True)
    git_state.cache_clear()
    clean = code_facts()["plugin.methods/mine"]
    file.write_text("TITLE = 'Other'\n")
    git_state.cache_clear()
    changed = code_facts()["plugin.methods/mine"]
    assert ("commit" in clean, clean.endswith("(changed)"), changed.endswith("(changed)")) == (True, False, True)
    assert clean.split(",")[0] != changed.split(",")[0]
