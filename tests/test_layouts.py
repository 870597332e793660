"""Populations as others publish them: which folders are the experts of which tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mergectl import smoke
from mergectl.errors import UserError
from mergectl.lab import Lab
from mergectl.layouts import GLUE, laid_out
from tests.conftest import Cli


def folders(*names: str) -> None:
    for name in names:
        path = Path("root") / name
        path.mkdir(parents=True)
        (path / "config.json").write_text("{}")


def found() -> dict[str | None, str]:
    return {task: str(Path(str(ref)).relative_to("root")) for task, ref in laid_out(((None, "root"),), "merge-lm")}


def test_the_eight_tasks_come_in_the_order_of_the_tables() -> None:
    folders(*(f"{task}/roberta-base_lr1e-05" for task in sorted(GLUE)), "logs/roberta-base_lr1e-05")
    assert found() == {f"glue/{task}": f"{task}/roberta-base_lr1e-05" for task in GLUE}
    assert list(found()) == [f"glue/{task}" for task in GLUE]


def test_of_several_experts_the_published_learning_rate_counts() -> None:
    folders(*(f"{task}/roberta-base_lr{rate}" for task in ("mrpc", "cola") for rate in ("1e-05", "5e-05")))
    assert found() == {"glue/cola": "cola/roberta-base_lr1e-05", "glue/mrpc": "mrpc/roberta-base_lr5e-05"}


def test_a_folder_may_be_the_expert_itself_and_names_are_read_kindly() -> None:
    folders("STS-B", "SST_2/x")
    assert found() == {"glue/sst2": "SST_2/x", "glue/stsb": "STS-B"}


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (("imagenet/vit",), "has no folder of a GLUE task"),
        (("rte/a", "rte/b"), r"holds several experts \(a, b\)\. Name one: --experts glue/rte=root/rte/a"),
    ],
)
def test_what_is_no_such_population_is_refused(names: tuple[str, ...], sentence: str) -> None:
    folders(*names)
    with pytest.raises(UserError, match=sentence):
        found()


def test_an_empty_folder_and_a_named_root_are_refused() -> None:
    Path("root/rte/empty").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no model"):
        found()
    with pytest.raises(UserError, match="name the folder that holds all experts, without a task: got root"):
        laid_out((("rte", "root"),), "merge-lm")


def test_without_a_layout_experts_are_those_named() -> None:
    assert laid_out((("a", "b"), (None, "c"))) == (("a", "b"), (None, "c"))


def test_a_population_is_merged_and_searched_as_one_root(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = Lab().tasks(["glue/mrpc", "glue/cola"])
    config = {"model_type": "roberta", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
              "intermediate_size": 12, "max_position_embeddings": 140}  # fmt: skip
    smoke.make(Path("base"), config, tasks, 0)
    smoke.make(Path("root"), {**config, "layout": "merge-lm"}, tasks, 0)
    smoke.write_rows(Path("data"), tasks)
    words = ("--base", "base", "--experts", "root", "--layout", "merge-lm")
    assert cli("merge", "task_arithmetic", *words, "-o", "out") == 0
    record = json.loads(Path("out/mergectl.json").read_text())
    assert record["tasks"] == {"cola": "glue/cola", "mrpc": "glue/mrpc"}
    capsys.readouterr()
    assert cli("--json", "--data", "data", "search", "task_arithmetic", *words, "--trials", 2, "-o", "best") == 0
    tasks_scored = json.loads(capsys.readouterr().out)["tasks"]
    assert set(tasks_scored) == {"glue/cola", "glue/mrpc"}
    question = "select distinct name from metrics where task = 'glue/mrpc' and name like 'acc%' order by 1"
    assert cli("--json", "report", "--sql", question) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == ["accuracy", "accuracy_f1"]
