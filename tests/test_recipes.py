"""The shipped pipelines: each parses, each can be tried offline, those that share experts agree on them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mergectl import pipelines, smoke, steps
from mergectl.benchmarks import qa7
from mergectl.benchmarks._contract import with_suite
from mergectl.errors import UserError
from mergectl.lab import Lab
from tests.conftest import Cli

Capture = pytest.CaptureFixture[str]
ALL = sorted(pipelines.shipped())
SMALL = [name for name in ALL if pipelines.load(name, {}).smoke]


def shown(text: str) -> list[list[str]]:
    """Number and verb of each step of a dry run's table."""
    lines = [line.split("│") for line in text.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line[1:3]] for line in lines if line[1].strip()]


def test_the_pipelines_of_the_pcb_paper_are_shipped() -> None:
    assert {"pcb-t5-base", "pcb-t5-large", "pcb-t5-search", "pcb-t5-large-search", "pcb-ia3"} <= set(SMALL)


@pytest.mark.parametrize("name", ALL)
def test_a_dry_run_shows_all_steps_and_writes_nothing(cli: Cli, capsys: Capture, name: str) -> None:
    assert cli("run", name, "--dry-run") == 0
    steps = pipelines.load(name, {}).steps
    assert shown(capsys.readouterr().out) == [[str(n), next(iter(step))] for n, step in enumerate(steps, 1)]
    assert not Path("lab").exists()


@pytest.mark.parametrize("name", SMALL)
def test_a_smoke_run_has_the_same_steps_on_a_model_and_tasks_of_its_own(name: str) -> None:
    whole, small = pipelines.load(name, {}), pipelines.load(name, {}, smoke=True)
    made = {key for key, value in whole.smoke.items() if pipelines.made(value)}  # may be what experts are found in
    assert set(whole.smoke) - made <= set(whole.settings)
    assert [next(iter(step)) for step in small.steps] == [next(iter(step)) for step in whole.steps]
    assert small.settings["base"] == "@base"
    assert set(small.settings["tasks"]) <= set(whole.settings["tasks"])
    for number, step in enumerate(small.steps, 1):
        pipelines.check(Lab(), step, number)


@pytest.mark.parametrize("name", [name for name in SMALL if "experts" in pipelines.load(name, {}).settings])
@pytest.mark.parametrize("small", [False, True])
def test_a_pipelines_experts_are_those_of_its_tasks(name: str, small: bool) -> None:
    settings = pipelines.load(name, {}, smoke=small).settings
    experts, tasks = settings["experts"], settings["tasks"]
    if isinstance(experts, str):  # a population, of which steps take these tasks alone
        assert settings["layout"] == "merge-lm"
    elif any("=" in expert for expert in experts):  # published ones, named by their tasks
        own = {f"@experts/{task.split('/')[1]}": task for task in tasks}
        assert [own.get(expert, expert.split("=")[0]) for expert in experts] == tasks
        assert len(set(experts)) == len(tasks)
    else:
        assert experts == [f"@experts/{task.split('/')[1]}" for task in tasks]


def test_pipelines_that_share_a_folder_train_the_same_experts() -> None:
    by_folder: dict[str, list[Any]] = {}
    for name in ALL:
        pipeline = pipelines.load(name, {})
        steps = [step for step in pipeline.steps if "finetune" in step]
        by_folder.setdefault(pipeline.folder or name, []).append((steps, pipeline.settings["seed"]))
    assert len(by_folder["pcb-t5-base"]) == 2
    assert all(steps == first for first, *others in by_folder.values() for steps in others)


def test_a_pipeline_like_another_changes_only_its_own_settings() -> None:
    base, large = pipelines.load("pcb-t5-base", {}), pipelines.load("pcb-t5-large", {})
    changed = {key: large.settings[key] for key in base.settings if large.settings[key] != base.settings[key]}
    assert changed == {"base": "google-t5/t5-large", "batch_size": 64, "accumulation": 16}
    assert (large.smoke, large.paper) == (base.smoke, base.paper)
    assert large.next != base.next


def test_the_experts_are_trained_as_in_the_paper() -> None:
    (t5,), (ia3,) = (
        [step["finetune"] for step in pipelines.load(name, {}).steps if "finetune" in step]
        for name in ("pcb-t5-large", "pcb-ia3")
    )
    usual = {"lr": 1e-4, "scheduler": "constant", "warmup": 0.0, "weight_decay": 0.0, "bf16": True}
    assert usual.items() <= t5.items() and usual.items() <= ia3.items()
    assert [t5[key] for key in ("max_length", "batch_size", "accumulation", "eval_every", "patience", "max_steps")] == [
        128, 64, 16, 100, 5, 75000,
    ]  # fmt: skip
    assert [ia3[key] for key in ("max_length", "batch_size", "accumulation", "eval_every", "max_steps", "peft")] == [
        512, 8, 16, 1000, 10000, "ia3",
    ]  # fmt: skip
    assert ia3["targets"] == ["k", "v", "wi_1"]


def test_a_smoke_run_works_offline_in_a_lab_of_its_own(cli: Cli, capsys: Capture) -> None:
    assert cli("run", "pcb-t5-search", "--smoke", "--set", "trials=2") == 0
    folder = Path("lab/smoke/runs/pcb-t5-base")
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [
        "base", "data", "experts", "pcb", "pcb_cmaes",
    ]  # fmt: skip
    assert not Path("lab/mergectl.duckdb").exists()
    capsys.readouterr()
    question = "select kind, count(*) as n from runs group by kind order by kind"
    assert cli("--json", "--store", "lab/smoke/mergectl.duckdb", "report", "--sql", question) == 0
    found = {row["kind"]: row["n"] for row in json.loads(capsys.readouterr().out)}
    assert found == {"eval": 2, "finetune": 2, "merge": 2, "search": 1, "trial": 2}


@pytest.mark.slow
def test_adapters_are_tried_too_by_a_smoke_run(cli: Cli) -> None:
    assert cli("run", "pcb-ia3", "--smoke", "--set", "trials=2") == 0
    assert Path("lab/smoke/runs/pcb-ia3/experts/copa/adapter/adapter_config.json").exists()


def test_a_pipeline_without_smoke_settings_says_so(cli: Cli, capsys: Capture) -> None:
    assert cli("run", "digits", "--smoke") == 2
    assert capsys.readouterr().err == "Error: The pipeline 'digits' has no settings for --smoke.\n"


TASKS = [with_suite(task, "qa7") for task in qa7.TASKS]
T5 = {"model_type": "t5", "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}


def test_sample_rows_fill_every_split_of_every_task(tmp_path: Path) -> None:
    from mergectl.benchmarks import _rows

    smoke.write_rows(tmp_path, TASKS)
    for task in TASKS:
        assert len(_rows.load(task, "tune", data=tmp_path)) >= 32
        assert {0, 1} <= {len(set(_rows.load(task, use, data=tmp_path).labels)) - 1 for use in task.parts} | {0}


def test_a_small_base_is_seeded_and_knows_every_word_of_the_samples(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        smoke.make_base(tmp_path / name, T5, TASKS, seed)
    first, same, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "same", "other"))
    assert all(first[name].equal(same[name]) for name in first)
    assert not first["shared.weight"].equal(other["shared.weight"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    texts = [template.ask(task.samples[0])[0] for task in TASKS for template in task.templates]
    assert not any(tokenizer.unk_token_id in ids for ids in tokenizer(texts)["input_ids"])
    assert len(first["shared.weight"]) == len(tokenizer)


VISION = ["sun397", "cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd"]


def test_the_vision_pipelines_of_the_pcb_paper_train_as_its_recipe_says() -> None:
    assert {"pcb-vit-b32", "pcb-vit-l14", "pcb-vit-b32-search", "pcb-vit-l14-search"} <= set(SMALL)
    for name in ("pcb-vit-b32", "pcb-vit-l14"):
        (train,) = (step["finetune"] for step in pipelines.load(name, {}).steps if "finetune" in step)
        usual = {"lr": 1e-5, "weight_decay": 0.1, "scheduler": "cosine", "warmup_steps": 500, "max_steps": None}
        assert usual.items() <= train.items()
        assert train["batch_size"] * train["accumulation"] == 128
        assert train["tasks"] == [f"vision8/{name}" for name in VISION]
        assert [train["by_task"][task]["epochs"] for task in train["tasks"]] == [14, 35, 15, 12, 4, 11, 5, 76]


def test_each_task_is_trained_with_its_own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def train(_lab: Lab, _folder: Path, what: dict[str, Any]) -> bool:
        seen.append(what)
        return True

    monkeypatch.setattr(steps, "_finetune", train)
    step = {"tasks": ["a", "b"], "base": "x", "epochs": 1, "by_task": {"b": {"epochs": 2}, "c": {"epochs": 3}}}
    assert steps.finetune_each(Lab(), Path(), step)
    assert seen == [{"tasks": ["a"], "base": "x", "epochs": 1}, {"tasks": ["b"], "base": "x", "epochs": 2}]


def test_a_wrong_setting_of_one_task_is_refused() -> None:
    step = {"finetune": {"tasks": ["digits/loop"], "base": "x", "by_task": {"digits/loop": {"epoch": 2}}}}
    with pytest.raises(UserError, match=r"has no key 'epoch'\. Did you mean 'epochs'\?"):
        pipelines.check(Lab(), step, 1)


@pytest.mark.slow
def test_a_vision_pipeline_is_tried_on_a_tiny_clip_and_tiny_images(cli: Cli, capsys: Capture) -> None:
    assert cli("run", "pcb-vit-b32-search", "--smoke") == 0
    folder = Path("lab/smoke/runs/pcb-vit-b32")
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [
        "base", "data", "experts", "pcb_cmaes", "pcb_es",
    ]  # fmt: skip
    capsys.readouterr()
    question = "select kind, count(*) as n from runs group by kind order by kind"
    assert cli("--json", "--store", "lab/smoke/mergectl.duckdb", "report", "--sql", question) == 0
    found = {row["kind"]: row["n"] for row in json.loads(capsys.readouterr().out)}
    assert found == {"eval": 2, "finetune": 2, "merge": 2, "search": 1, "trial": 2}
    before, after = (load_file(folder / name / "model.safetensors") for name in ("base", "pcb_cmaes"))
    changed = {name.split(".")[0] for name in before if not before[name].equal(after[name])}
    assert changed == {"vision_model", "visual_projection"}


def test_a_small_base_reads_no_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has a task on images"):
        smoke.make_base(tmp_path / "base", T5, Lab().tasks(["digits/loop"]), 0)


def test_the_docs_pipeline_may_be_run(cli: Cli) -> None:
    page = (Path(__file__).parent.parent / "docs" / "pipelines.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.S)
    Path("mine.yaml").write_text(block)
    assert cli("run", "mine.yaml", "--dry-run", "--smoke") == 0


LIKES: list[tuple[dict[str, Any], str]] = [
    ({"title": "Empty"}, "mine.yaml: the key 'steps' is missing."),
    ({"title": "Alike", "like": "digtis"}, "No pipeline 'digtis'. Did you mean 'digits'?"),
    ({"title": "Odd", "likes": "digits"}, "unknown key 'likes'. Did you mean 'like'?"),
]


@pytest.mark.parametrize(("content", "sentence"), LIKES, ids=lambda value: value if isinstance(value, str) else None)
def test_a_pipeline_without_steps_of_its_own(cli: Cli, capsys: Capture, content: dict[str, Any], sentence: str) -> None:
    Path("mine.yaml").write_text(json.dumps(content))
    assert cli("run", "mine.yaml") == 2
    assert sentence in capsys.readouterr().err
