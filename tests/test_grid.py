"""`finetune --grid`: an expert for every task and every value, told apart in name, record and merge."""

from __future__ import annotations

import doctest
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergectl import grid, pipelines
from mergectl.errors import UserError
from mergectl.families import open_family
from mergectl.grid import check_grid, points, read_grid, suffix
from mergectl.heads import open_live
from mergectl.lab import Lab
from tests.conftest import Cli
from tests.population import weights

Capture = pytest.CaptureFixture[str]
SHORT = ["--max-steps", "2", "--limit-fit", "32", "--limit-tune", "16"]
FOLDERS = [f"{task}-lr{lr}-seed{seed}" for lr, seed, task in itertools.product(("0.001", "1e-05"), (0, 1), ("parity",))]


@pytest.fixture(scope="module")
def done(population: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a grid of four experts of one task was trained."""
    from mergectl.cli import main

    folder, before = tmp_path_factory.mktemp("grid"), Path.cwd()
    os.chdir(folder)
    try:
        words = ["finetune", "digits/parity", "--base", str(population / "base"), *SHORT, "--quiet"]
        assert main([*words, "--grid", "lr=1e-3,1e-5", "--grid", "seed=0,1"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def ran(done: Path, tmp_path: Path) -> Path:
    """A copy of that folder to work in."""
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    return tmp_path


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "mergectl.json").read_text())
    return found


def rows(cli: Cli, capsys: Capture, question: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert cli("--json", "report", "--sql", question) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def grid_again(cli: Cli, population: Path, *words: object) -> int:
    given = ["--grid", "lr=1e-3,1e-5", "--grid", "seed=0,1"]
    return cli("finetune", "digits/parity", "--base", population / "base", *SHORT, *given, *words)


def test_every_combination_has_a_folder_that_names_its_values(done: Path) -> None:
    assert sorted(path.name for path in (done / "runs").iterdir()) == sorted(FOLDERS)


def test_each_expert_was_trained_as_its_folder_says(done: Path) -> None:
    recipes = {name: record(done / "runs" / name)["recipe"] for name in FOLDERS}
    assert {name: f"parity-lr{r['lr']}-seed{r['seed']}" for name, r in recipes.items()} == {n: n for n in FOLDERS}
    head = {name: weights(done / "runs" / name)["classifier.weight"] for name in FOLDERS}
    assert not any(head[a].equal(head[b]) for a, b in itertools.combinations(FOLDERS, 2))


def test_each_expert_is_a_run_of_its_own_with_its_seed(cli: Cli, capsys: Capture, ran: Path) -> None:
    found = rows(cli, capsys, "select name, seed from runs where kind = 'finetune' order by name")
    assert found == [{"name": name, "seed": int(name[-1])} for name in sorted(FOLDERS)]


def test_a_grid_that_was_stopped_goes_on_where_it_was(cli: Cli, capsys: Capture, ran: Path, population: Path) -> None:
    gone, kept = FOLDERS[2], [ran / "runs" / name / "model.safetensors" for name in FOLDERS if name != FOLDERS[2]]
    shutil.rmtree(ran / "runs" / gone)
    before = [path.stat().st_mtime_ns for path in kept]
    assert grid_again(cli, population) == 0
    assert [path.stat().st_mtime_ns for path in kept] == before
    counts = rows(cli, capsys, "select name, count(*) as n from runs where kind = 'finetune' group by name")
    assert {row["name"]: row["n"] for row in counts} == {name: 2 if name == gone else 1 for name in FOLDERS}


def test_a_grid_does_not_replace_another_model(cli: Cli, capsys: Capture, ran: Path, population: Path) -> None:
    assert grid_again(cli, population, "--epochs", "9") == 2
    assert f"runs/{FOLDERS[0]}" in capsys.readouterr().err


def test_experts_of_one_task_are_merged_under_their_folders_names(cli: Cli, capsys: Capture, ran: Path) -> None:
    experts = [f"runs/{name}" for name in FOLDERS]
    assert cli("merge", "average", "--experts", *experts, "-o", "soup") == 0
    assert record(ran / "soup")["tasks"] == dict.fromkeys(FOLDERS, "digits/parity")
    first = min(FOLDERS)
    assert f"which the result answers with the head of {first}." in capsys.readouterr().err
    mean = sum(weights(ran / path)["vit.encoder.layer.0.output.dense.weight"] for path in experts) / len(experts)
    name = "encoder.layer.0.output.dense.weight"
    assert weights(ran / "soup")[name].allclose(mean, atol=1e-7)


def test_a_merge_of_one_tasks_experts_wears_the_first_head(cli: Cli, ran: Path) -> None:
    first, other = sorted(FOLDERS)[:2]
    experts = [f"runs/{other}", f"runs/{first}"]
    assert cli("merge", "average", "--experts", *experts, "-o", "soup") == 0
    model = open_live("soup", Lab().tasks(["digits/parity"])).use("digits/parity")
    assert model.classifier.weight.equal(weights(ran / experts[1])["classifier.weight"])


def test_experts_of_one_task_are_scored_beside_their_merge(cli: Cli, capsys: Capture, ran: Path) -> None:
    assert cli("merge", "average", "--experts", *(f"a{n}=runs/{f}" for n, f in enumerate(FOLDERS[:2])), "-o", "m") == 0
    assert cli("eval", "m", "--references", "--limit", "20") == 0
    assert rows(cli, capsys, "select count(*) as n from runs where kind = 'eval'") == [{"n": 4}]


def test_a_search_takes_experts_of_one_task(cli: Cli, ran: Path) -> None:
    words = ["--experts", *(f"runs/{name}" for name in FOLDERS[:2]), "--trials", "2", "--limit", "20", "-o", "found"]
    assert cli("search", "task_arithmetic", *words, "--per-task", "scale") == 0
    assert len(record(ran / "found")["recipe"]["settings"]["scale"]) == 2


def test_experts_of_one_task_in_other_folders_still_need_names(ran: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(ran / "runs" / FOLDERS[0], ran / name)
    with pytest.raises(UserError, match=r"Two experts are called 'parity'\. Name them"):
        open_family(None, [(None, "one"), (None, "two")])


def test_a_grid_of_several_tasks_trains_each_with_each_value(cli: Cli, population: Path) -> None:
    words = ["finetune", "digits/parity", "digits/loop", "--base", population / "base", *SHORT]
    assert cli(*words, "--grid", "weight-decay=0", "-o", "experts") == 0
    names = {f"{task}-weight_decay0.0" for task in ("parity", "loop")}
    assert {path.name for path in Path("experts").iterdir()} == names


def test_several_tasks_without_a_grid_go_on_where_they_were(cli: Cli, capsys: Capture, population: Path) -> None:
    words = ["finetune", "digits/parity", "digits/loop", "--base", population / "base", *SHORT]
    assert cli(*words) == 0
    shutil.rmtree("runs/loop")
    assert cli(*words) == 0
    counts = rows(cli, capsys, "select name, count(*) as n from runs where kind = 'finetune' group by name")
    assert {row["name"]: row["n"] for row in counts} == {"parity": 1, "loop": 2}
    assert cli(*words, "--lr", "1e-4") == 2
    assert "runs/parity exists already" in capsys.readouterr().err


def test_what_a_kill_left_between_its_folder_and_the_runs_end_is_made_again(
    cli: Cli, capsys: Capture, population: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergectl import verbs

    words = ["finetune", "digits/parity", "--base", population / "base", *SHORT]
    with monkeypatch.context() as patch:
        patch.setattr(verbs, "record_model", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli(*words) == 130
    assert Path("runs/parity/config.json").exists()
    assert cli(*words, "--lr", "1e-4") == 2  # another work does not replace it
    assert cli(*words) == 0
    found = rows(cli, capsys, "select status from runs where name = 'parity' order by status")
    assert [row["status"] for row in found][-1] == "finished"


def test_a_grid_may_stand_in_a_pipeline(cli: Cli, population: Path) -> None:
    step = {"tasks": ["digits/parity"], "base": str(population / "base"), "grid": {"lr": [1e-3, 1e-5]},
            "max_steps": 2, "limit_fit": 32, "limit_tune": 16, "out": "experts"}  # fmt: skip
    experts = ["@experts/parity-lr0.001", "@experts/parity-lr1e-05"]
    merge = {"method": "average", "base": str(population / "base"), "experts": experts, "out": "soup"}
    steps = [{"finetune": step}, {"merge": merge}]
    Path("soup.yaml").write_text(json.dumps({"title": "Soup", "steps": steps}))
    assert cli("run", "soup.yaml") == 0
    assert set(record(Path("lab/runs/soup/soup"))["tasks"]) == {"parity-lr0.001", "parity-lr1e-05"}


def test_a_pipelines_grid_is_checked_before_its_first_step() -> None:
    step = {"finetune": {"tasks": ["digits/parity"], "base": "b", "grid": {"lr": ["fast"]}}}
    with pytest.raises(UserError, match="In a grid, 'lr' must be a number, got 'fast'"):
        pipelines.check(Lab(), step, 1)


REFUSED: list[tuple[list[str], str]] = [
    (["lr"], "--grid lr is not NAME=VALUE,VALUE."),
    (["lr="], "--grid lr= is not NAME=VALUE,VALUE."),
    (["epoch=1"], "A grid cannot vary 'epoch'. Did you mean 'epochs'?"),
    (["base=a,b"], "A grid cannot vary 'base'."),
    (["targets=q,v"], "A grid cannot vary 'targets'."),
    (["lr=1e-5,"], "In a grid, 'lr' must be a number, got ''."),
    (["seed=1.5"], "In a grid, 'seed' must be a whole number, got '1.5'."),
    (["bf16=yes"], "In a grid, 'bf16' must be true or false, got 'yes'."),
    (["lr=1e-5,0.00001"], "The grid gives a value of 'lr' twice: 1e-5, 0.00001."),
    (["lr=1e-5", "lr=3e-5"], "--grid names 'lr' twice."),
    (["lr=1e-5,99"], "lr must lie above 0 and at most be 10, got 99.0."),
    (["peft=lora,ia4"], "peft must be one of none, lora, ia3, got 'ia4'."),
    (["epochs=1,2"], "'epochs' is given by --epochs and by --grid. Leave out --epochs."),
]


@pytest.mark.parametrize(("items", "sentence"), REFUSED, ids=lambda value: " ".join(value[:2]))
def test_a_wrong_grid_is_refused_before_any_training(
    items: list[str], sentence: str, cli: Cli, capsys: Capture, population: Path
) -> None:
    words = [word for item in items for word in ("--grid", item)]
    assert cli("finetune", "digits/parity", "--base", population / "base", "--epochs", "1", *words) == 2
    assert sentence in capsys.readouterr().err
    assert not Path("runs").exists()


def test_values_are_read_in_their_settings_own_types() -> None:
    grid = read_grid(["lr=1e-5,3e-5", "batch-size=8", "bf16=true,False", "peft=lora"])
    assert grid == {"lr": (1e-5, 3e-5), "batch_size": (8,), "bf16": (True, False), "peft": ("lora",)}
    assert [type(values[0]) for values in grid.values()] == [float, int, bool, str]
    assert check_grid({"lr": [1]}) == {"lr": (1.0,)}
    with pytest.raises(UserError, match=r"A grid needs a list of values for 'lr', got '0\.1'"):
        check_grid({"lr": 0.1})


def test_without_a_grid_there_is_one_point_and_a_plain_folder() -> None:
    assert [suffix(point) for point in points({})] == [""]


@given(st.lists(st.floats(1e-12, 10), min_size=1, max_size=4, unique=True), st.sets(st.integers(0, 99), min_size=1))
def test_every_point_has_a_folder_of_its_own(rates: list[float], seeds: set[int]) -> None:
    every = points({"lr": tuple(rates), "seed": tuple(seeds)})
    assert len({suffix(point) for point in every}) == len(every) == len(rates) * len(seeds)


def test_the_examples_of_grids_are_true() -> None:
    found = doctest.testmod(grid)
    assert (found.attempted > 0, found.failed) == (True, 0)
