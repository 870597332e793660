"""What a pipeline is said to take before it starts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from mergectl import estimates
from tests.conftest import Cli

BASE = {"base": "FacebookAI/roberta-base", "tasks": ["glue/rte", "glue/cola"]}


def test_learning_takes_six_operations_per_weight_and_token() -> None:
    step = {"finetune": {"tasks": ["glue/rte"], "base": "FacebookAI/roberta-base", "max_steps": 10, "batch_size": 8}}
    found = estimates.estimate(step, {})
    assert found.flops == 6 * 125e6 * 128 * 10 * 8
    assert found.disk == 4 * 125e6


def test_every_value_of_a_grid_is_a_model() -> None:
    step = {
        "finetune": {
            "tasks": ["glue/rte"],
            "base": "FacebookAI/roberta-base",
            "grid": {"lr": [1, 2], "seed": [0, 1, 2]},
        }
    }
    one = {"finetune": {"tasks": ["glue/rte"], "base": "FacebookAI/roberta-base"}}
    assert estimates.estimate(step, {}).disk == 6 * estimates.estimate(one, {}).disk


def test_short_trainings_and_the_presets_epochs_are_counted() -> None:
    tasks = {"tasks": ["glue-t5/cola", "glue-t5/rte"], "base": "google/t5-v1_1-base"}
    usual, published = ({"finetune": {**tasks, **more}} for more in ({}, {"preset": "medusa"}))
    owned = {"finetune": {**tasks, "preset": "medusa", "for": "medusa"}}
    plain, preset, medusa = (estimates.estimate(step, {}) for step in (usual, published, owned))
    assert preset.flops == pytest.approx(5 * plain.flops)  # 10 and 20 epochs, not 3
    assert medusa.flops == pytest.approx(preset.flops * 16 / 15)
    assert medusa.disk == pytest.approx(preset.disk * (2 + 1 / 32))


def test_measuring_a_conflict_answers_nothing() -> None:
    facts = {"models": ["@merged"], "conflict": True}
    found = estimates.estimate({"eval": facts}, {"base": "google/t5-v1_1-base", "tasks": ["a", "b"]})
    assert found.flops == 0
    assert 0 < found.seconds < 60


def test_a_limit_bounds_what_answering_takes() -> None:
    step = {"eval": {"models": ["@a", "@b"]}}
    few = {"eval": {"models": ["@a", "@b"], "limit": 20}}
    assert estimates.estimate(step, BASE).flops == 100 * estimates.estimate(few, BASE).flops
    assert estimates.estimate(few, BASE).disk == 0


def test_a_method_that_learns_takes_its_steps() -> None:
    step = {"merge": {"method": "adarank", "experts": "x", "settings": {"steps": 10}, "options": {"adapt": {}}}}
    assert estimates.estimate(step, BASE).flops == 6 * 125e6 * 128 * 16 * 2 * 10


def test_a_folder_is_counted_and_an_unknown_model_is_not_guessed(population: Path) -> None:
    step = {"merge": {"method": "average", "experts": ["@a"], "base": str(population / "base")}}
    assert 0 < estimates.estimate(step, {}).disk < 1e7
    unknown = estimates.estimate({"merge": {"method": "average", "experts": ["@a"], "base": "org/unheard"}}, {})
    assert math.isnan(unknown.disk)
    assert estimates.in_words([unknown], 1e9) == [("?", "?")]


def test_a_dry_run_shows_disk_and_time_of_every_step(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("run", "pave-ta-roberta", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "0.5 GB" in shown
    assert "GFLOP/s" in shown
    assert not Path("lab/runs").exists()
