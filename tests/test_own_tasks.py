"""The user's own tables as tasks: declared in a few lines, then trained, merged, searched and scored like any other."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_models as tiny
from tests.conftest import Cli

Capture = pytest.CaptureFixture[str]

DECLARED = """
tasks:
  mood:
    data: data/mood.csv
    inputs: [text]
    label: verdict
    labels: [no, yes]
  noun:
    fit: data/noun.jsonl
    report: data/noun-report.jsonl
    inputs: [text, same]
    label: what
    metric: weighted_f1
"""


def write_tables(folder: Path) -> None:
    """Sentences with two questions about each: is it kind, and what is it about."""
    (folder / "data").mkdir()
    texts, labels = [], []
    for split in ("train", "validation", "test"):
        found = tiny.sentences(split)
        texts += found["sentence"]
        labels += found["label"]
    with (folder / "data/mood.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "text", "verdict"])
        rows.writerows(
            [n, text, ("no", "yes")[label]] for n, (text, label) in enumerate(zip(texts, labels, strict=True))
        )
    nouns = [{"text": text, "same": text, "what": text.split()[1]} for text in texts]
    for name, part in (("noun", nouns[:200]), ("noun-report", nouns[200:])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"data/{name}.jsonl").write_text(lines)
    (folder / "tasks.yaml").write_text(DECLARED)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tables, a base and two experts that were fine-tuned on the command line."""
    from mergectl.cli import main

    folder, before = tmp_path_factory.mktemp("own"), Path.cwd()
    write_tables(folder)
    tiny.base(folder / "base", "bert")
    os.chdir(folder)
    try:
        words = ["finetune", "files/mood", "files/noun", "--tasks", "tasks.yaml", "--base", "base", "-o", "experts"]
        assert main([*words, "--max-steps", "40", "--lr", "0.01", "--batch-size", "32", "--quiet"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def mine(done: Path, tmp_path: Path) -> Path:
    """A copy to work in."""
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    return tmp_path


def told(cli: Cli, capsys: Capture, *words: object) -> dict[str, Any]:
    capsys.readouterr()
    assert cli("--json", *words) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def scores(cli: Cli, capsys: Capture, *words: object) -> dict[str, float]:
    document = told(cli, capsys, "eval", *words, "--tasks", "tasks.yaml")
    return {row["task"]: row["score"] for row in document["tasks"]}


def test_experts_of_own_tables_learn_them(cli: Cli, capsys: Capture, mine: Path) -> None:
    record = json.loads((mine / "experts/noun/mergectl.json").read_text())
    assert (record["task"], record["labels"]) == ("files/noun", ["book", "film", "song"])
    config = json.loads((mine / "experts/mood/config.json").read_text())
    assert config["id2label"] == {"0": "no", "1": "yes"}
    assert scores(cli, capsys, "experts/mood")["files/mood"] > 0.8
    assert scores(cli, capsys, "experts/noun")["files/noun"] > 0.8


def test_experts_of_own_tables_merge_and_search(cli: Cli, capsys: Capture, mine: Path) -> None:
    experts = ["--base", "base", "--experts", "experts/mood", "experts/noun"]
    assert cli("merge", "emr", *experts, "-o", "m") == 0
    found = scores(cli, capsys, "m", "--references")
    assert set(found) == {"files/mood", "files/noun"}
    assert min(found.values()) > 0.6
    words = ["search", "task_arithmetic", *experts, "-o", "best", "--trials", 2, "--tasks", "tasks.yaml"]
    assert set(told(cli, capsys, *words)["tasks"]) == {"files/mood", "files/noun"}


def test_the_declaration_may_come_from_the_environment(
    cli: Cli, capsys: Capture, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGECTL_TASKS", "tasks.yaml")
    assert [row["task"] for row in told(cli, capsys, "eval", "experts/mood", "--on", "mood")["tasks"]] == ["files/mood"]


def test_paths_start_at_the_declaration(cli: Cli, capsys: Capture, mine: Path) -> None:
    (mine / "elsewhere").mkdir()
    (mine / "elsewhere/mine.yaml").write_text(DECLARED.replace("data/", "../data/"))
    document = told(cli, capsys, "eval", "experts/mood", "--tasks", "elsewhere/mine.yaml")
    assert [row["examples"] for row in document["tasks"]] == [29]  # a tenth of 288


def test_the_shares_of_a_table_have_nothing_in_common(cli: Cli, capsys: Capture, mine: Path) -> None:
    counts = {}
    for split in ("fit", "tune", "report"):
        words = ["eval", "experts/mood", "--split", split, "--tasks", "tasks.yaml"]
        counts[split] = told(cli, capsys, *words)["tasks"][0]["examples"]
    assert counts == {"fit": 230, "tune": 29, "report": 29}


def test_without_the_declaration_own_tasks_are_unknown(cli: Cli, capsys: Capture, mine: Path) -> None:
    assert cli("eval", "experts/mood") == 2
    assert capsys.readouterr().err.endswith(
        "Error: The suite 'files' is empty: declare your tasks in a recipe and name it with --tasks FILE.\n"
    )


DECLARATIONS: dict[str, tuple[str, str]] = {
    "unknown key": ("  mood: {data: data/mood.csv, input: [text], label: verdict}", "no key 'input'. Did you mean"),
    "unknown metric": (
        "  mood: {data: data/mood.csv, inputs: [text], label: verdict, metric: acuracy}",
        "Did you mean 'accuracy'?",
    ),
    "missing file": ("  mood: {data: data/moods.csv, inputs: [text], label: verdict}", "moods.csv"),
    "missing column": ("  mood: {data: data/mood.csv, inputs: [words], label: verdict}", "'words'"),
    "unknown label": (
        "  mood: {data: data/mood.csv, inputs: [text], label: verdict, labels: [no, perhaps]}",
        "yes",
    ),
    "no mapping": ("  mood: data/mood.csv", "'tasks' must hold one mapping per task"),
    "a list": ("  - mood", "'tasks' must hold one mapping per task"),
}


@pytest.mark.parametrize("what", DECLARATIONS)
def test_a_declaration_that_is_wrong_is_told(cli: Cli, capsys: Capture, mine: Path, what: str) -> None:
    text, sentence = DECLARATIONS[what]
    (mine / "tasks.yaml").write_text(f"tasks:\n{text}\n")
    assert cli("eval", "experts/mood", "--on", "files/mood", "--tasks", "tasks.yaml") == 2
    assert sentence in capsys.readouterr().err


def test_a_pipeline_notices_that_a_table_has_changed(cli: Cli, capsys: Capture, mine: Path) -> None:
    steps = [{"eval": {"models": ["experts/mood"]}}]
    Path("mine.yaml").write_text(json.dumps({"title": "Mine", "steps": steps}))
    said = []
    for change in ("", "", "400,a good film,yes\n"):
        with Path("data/mood.csv").open("a") as file:
            file.write(change)
        assert cli("run", "mine.yaml", "--tasks", "tasks.yaml") == 0
        said.append("already done" in capsys.readouterr().err)
    assert said == [False, True, False]
