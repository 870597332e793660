"""The pipelines of the AdaRank study: its table of settings, where the experts come from, and that they run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mergectl import pipelines
from mergectl.errors import UserError
from mergectl.lab import Lab
from mergectl.settings import settings_of
from mergectl.steps import _expert_for
from tests.conftest import Cli

Capture = pytest.CaptureFixture[str]
# start: share of components kept at first, scale, learning rate, rows per step, steps
TABLE: dict[str, tuple[float, float, float, int, int]] = {
    "roberta-ta": (1.0, 0.3, 5e-5, 8, 5000), "roberta-cart": (0.04, 1.6, 1e-4, 8, 5000),
    "gpt2-ta": (1.0, 0.3, 5e-5, 8, 5000), "gpt2-cart": (0.01, 1.3, 5e-5, 8, 5000),
    "b32-8-ta": (1.0, 0.3, 1e-3, 16, 10000), "b32-8-cart": (0.16, 2.3, 1e-3, 16, 10000),
    "b32-14-ta": (1.0, 0.3, 1e-3, 16, 10000), "b32-14-cart": (0.32, 2.8, 1e-3, 16, 10000),
    "b32-20-ta": (1.0, 0.05, 1e-3, 16, 10000), "b32-20-cart": (0.32, 2.4, 1e-3, 16, 10000),
    "l14-8-ta": (1.0, 0.3, 1e-3, 4, 10000), "l14-8-cart": (0.16, 3.0, 1e-3, 4, 10000),
    "l14-14-ta": (1.0, 0.3, 1e-3, 2, 100000), "l14-14-cart": (0.16, 1.25, 1e-3, 2, 100000),
    "l14-20-ta": (0.3, 1.0, 1e-3, 2, 100000), "l14-20-cart": (0.16, 1.0, 1e-3, 2, 100000),
}  # fmt: skip
every = pytest.mark.parametrize("name", TABLE)


def merges(name: str, **changes: str) -> list[dict[str, Any]]:
    """What the merge steps of a pipeline are told."""
    return [step["merge"] for step in pipelines.load(f"adarank-{name}", changes).steps if "merge" in step]


def test_the_sixteen_pipelines_are_shipped() -> None:
    assert {name.removeprefix("adarank-") for name in pipelines.shipped() if name.startswith("adarank-")} == set(TABLE)


@every
def test_the_settings_are_the_published_ones(name: str) -> None:
    static, learned = merges(name)
    ratio, scale, rate, rows, steps = TABLE[name]
    start = name.rpartition("-")[2]
    expected = {"start": start, "rank_ratio": ratio, "scale": scale, "lr": rate, "steps": steps}
    assert (learned["method"], learned["settings"]) == ("adarank", expected)
    assert learned["options"] == {"adapt": {"on": "report", "batch_size": rows}}
    assert (static["method"], static["settings"]) == (
        ("task_arithmetic", {"scale": scale}) if start == "ta" else ("cart", {"rank_ratio": ratio, "scale": scale})
    )
    assert settings_of("adarank")["temperature"].default == 10.0


@every
def test_every_task_has_its_expert_in_the_studys_order(name: str) -> None:
    pipeline = pipelines.load(f"adarank-{name}", {})
    tasks, experts = pipeline.settings["tasks"], pipeline.settings["experts"]
    assert tasks == [task.id for task in Lab().tasks([tasks[0].split("/")[0]])]
    if isinstance(experts, str):
        assert (experts, pipeline.settings["layout"]) == ("vanillaOVO/roberta_base_glue_ckpts", "merge-lm")
        return
    named = [ref.partition("=")[0] if "=" in ref else f"{tasks[0].split('/')[0]}/{Path(ref).name}" for ref in experts]
    assert named == tasks
    size = {"l14": "large", "b32": "base", "gpt2": "gpt2"}[name.split("-")[0]]
    assert all(size in ref for ref in (*experts, pipeline.settings["base"]) if ref != "@experts/emnist")


def test_settings_can_be_changed(cli: Cli) -> None:
    _, learned = merges("gpt2-ta", adapt_on="tune", steps="7", lr="1e-2")
    assert (learned["options"]["adapt"]["on"], learned["settings"]["steps"], learned["settings"]["lr"]) == (
        "tune", 7, 0.01,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2-ta", "roberta-cart", "b32-8-cart"])
def test_a_pipeline_of_each_family_runs_on_tiny_models(cli: Cli, capsys: Capture, name: str) -> None:
    assert cli("run", f"adarank-{name}", "--smoke", "--quiet") == 0
    capsys.readouterr()
    query = "select kind, count(*) as n from runs where status = 'finished' group by kind"
    assert cli("--store", "lab/smoke/mergectl.duckdb", "--json", "report", "--sql", query) == 0
    assert {row["kind"]: row["n"] for row in json.loads(capsys.readouterr().out)} == {"merge": 2, "eval": 5}


def test_of_a_layout_only_the_experts_asked_for_are_taken() -> None:
    (task,) = Lab().tasks(["glue7/rte"])
    assert _expert_for(task, (("glue/cola", "one"), ("glue/rte", "two"))) == "two"
    with pytest.raises(UserError, match="There is no expert for glue7/rte, which the key 'only' names; there are: g"):
        _expert_for(task, (("glue/cola", "one"), (None, "two")))
