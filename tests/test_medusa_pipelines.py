"""The shipped Medusa pipelines: the study's settings, and all of it tried in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mergectl import pipelines
from mergectl.errors import UserError
from mergectl.lab import Lab
from mergectl.ownership import load_masks
from tests.conftest import Cli

Capture = pytest.CaptureFixture[str]
NAMES = ["medusa-joint", "medusa-merge", "medusa-partial", "medusa-vanilla"]


def test_the_pipelines_of_the_medusa_study_are_shipped() -> None:
    assert set(NAMES) <= set(pipelines.shipped())


@pytest.mark.parametrize("name", NAMES)
def test_every_training_takes_the_published_settings(name: str) -> None:
    pipeline = pipelines.load(name, {})
    trainings = [step["finetune"] for step in pipeline.steps if "finetune" in step]
    assert pipeline.settings["base"] == "google/t5-v1_1-base"
    assert trainings
    assert all(step["preset"] == "medusa" and step["max_steps"] is None for step in trainings)


def test_side_by_side_all_seven_merges_are_made() -> None:
    merges = [step["merge"] for step in pipelines.load("medusa-merge", {}).steps if "merge" in step]
    assert [step["method"] for step in merges] == [
        "average", "task_arithmetic", "ties_tensor", "dare_average", "dare_task_arithmetic", "dare_ties", "medusa",
    ]  # fmt: skip
    assert merges[-1]["experts"] == ["@owned/cola", "@owned/rte"]


@pytest.mark.slow
def test_a_smoke_run_shows_that_owned_experts_do_not_collide(cli: Cli, capsys: Capture) -> None:
    assert cli("run", "medusa-joint", "--smoke") == 0
    folder = Path("lab/smoke/runs/medusa-joint")
    base = load_file(folder / "base" / "model.safetensors")
    experts = {task: load_file(folder / f"experts/{task}/model.safetensors") for task in ("cola", "rte")}
    for task, weights in experts.items():
        masks = dict(load_masks(folder / f"experts/masks/{task}.safetensors"))
        assert all(not ((weights[name] != base[name]) & ~masks[name]).any() for name in masks)
        assert any((weights[name] != base[name]).any() for name in masks)
    capsys.readouterr()
    question = "select distinct value from metrics where name = 'sign_conflict'"
    assert cli("--json", "--store", "lab/smoke/mergectl.duckdb", "report", "--sql", question) == 0
    assert json.loads(capsys.readouterr().out) == [{"value": 0.0}]
    assert cli("run", "medusa-joint", "--smoke") == 0
    assert capsys.readouterr().err.count("already done") == 5


@pytest.mark.slow
def test_a_smoke_run_merges_divided_factors_into_an_adapter(cli: Cli, capsys: Capture) -> None:
    experts = json.dumps([f"glue-t5/{task}=@experts/{task}/adapter" for task in ("cola", "rte")])
    changes = ["peft=lora", "adapter=true", "adapter_mode=factors", f"experts={experts}"]
    assert cli("run", "medusa-joint", "--smoke", *(word for change in changes for word in ("--set", change))) == 0
    assert "start.safetensors" in {path.name for path in Path("lab/smoke/runs/medusa-joint/medusa").iterdir()}
    capsys.readouterr()
    question = "select distinct value from metrics where name = 'factors/sign_conflict'"
    assert cli("--json", "--store", "lab/smoke/mergectl.duckdb", "report", "--sql", question) == 0
    assert json.loads(capsys.readouterr().out) == [{"value": 0.0}]


@pytest.mark.slow
def test_a_smoke_run_beside_a_finished_expert(cli: Cli) -> None:
    assert cli("run", "medusa-partial", "--smoke") == 0
    assert Path("lab/smoke/runs/medusa-partial/experts/masks/rte.safetensors").exists()


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"mask": "hard"}, "--mask is for ownership masks"),
    ({"for": "medusa", "by_task": {"digits/loop": {"epochs": 1}}}, "trains its tasks together: leave out by_task"),
    ({"for": "medusa", "masks": "x"}, "has no key 'masks'"),
]


@pytest.mark.parametrize(("facts", "sentence"), WRONG, ids=[sentence for _, sentence in WRONG])
def test_a_step_that_cannot_be_is_refused(facts: dict[str, Any], sentence: str) -> None:
    step = {"finetune": {"tasks": ["digits/parity", "digits/loop"], "base": "base", **facts}}
    with pytest.raises(UserError, match=sentence):
        pipelines.check(Lab(), step, 1)


def test_the_board_at_the_end_is_of_the_rows_that_were_scored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    splits: list[str] = []
    monkeypatch.setattr("mergectl.report.leaderboard", lambda lab, split, *_: splits.append(split))
    scoring, measuring = {"models": ["m"], "on": ["digits/loop"], "limit": 8}, {"models": ["m"], "conflict": True}
    (tmp_path / "p.yaml").write_text(json.dumps({"title": "P", "steps": [{"eval": scoring}, {"eval": measuring}]}))
    pipelines._finish(Lab(), pipelines.load(str(tmp_path / "p.yaml"), {}))
    assert splits == ["report:8"]
