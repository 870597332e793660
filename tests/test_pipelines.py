"""`mergectl run`: steps in order, nothing twice, and mistakes are told before the first step."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from mergectl import pipelines
from mergectl.errors import UserError
from mergectl.lab import Lab
from mergectl.settings import settings_of
from mergectl.steps import STEPS as WORK
from tests.conftest import Cli

Capture = pytest.CaptureFixture[str]


def recipe(population: Path, **changes: Any) -> dict[str, Any]:
    """A pipeline of all verbs that takes seconds."""
    small = {"limit_fit": 64, "limit_tune": 30}
    experts = ["@experts/parity", "@experts/loop"]
    base = str(population / "base")
    steps: list[dict[str, Any]] = [
        {"finetune": {"tasks": ["digits/parity", "digits/loop"], "base": base, "out": "experts",
                      "max_steps": "${steps}", **small}},
        {"eval": {"models": experts, "limit": 50}},
        {"eval": {"models": [base], "heads": experts, "on": ["digits/parity", "digits/loop"], "limit": 50}},
        {"merge": {"method": "task_arithmetic", "settings": {"scale": "${scale}"}, "base": base,
                   "experts": experts, "out": "merged"}},
        {"eval": {"models": ["@merged"], "on": ["digits/parity", "digits/loop"], "limit": 50}},
        {"search": {"method": "task_arithmetic", "base": base, "experts": experts, "range": {"scale": "0.1:0.9"},
                    "trials": "${trials}", "limit": 30, "out": "found"}},
    ]  # fmt: skip
    settings = {"seed": 3, "threads": 1, "steps": 5, "scale": 0.4, "trials": 3}
    return {"title": "Small", "settings": settings, "steps": steps, "next": ["mergectl report"], **changes}


def write(content: dict[str, Any], name: str = "small.yaml") -> Path:
    Path(name).write_text(json.dumps(content))
    return Path(name)


@pytest.fixture(scope="module")
def done(population: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the pipeline has run once."""
    from mergectl.cli import main

    folder, before = tmp_path_factory.mktemp("done"), Path.cwd()
    os.chdir(folder)
    try:
        write(recipe(population))
        assert main(["run", "small.yaml", "--quiet"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def ran(done: Path, tmp_path: Path) -> Path:
    """A copy of that folder to work in."""
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    return tmp_path


def kinds(cli: Cli, capsys: Capture) -> dict[str, int]:
    """How many runs of each kind the store holds."""
    capsys.readouterr()
    assert cli("--json", "report", "--sql", "select kind, count(*) as n from runs group by kind") == 0
    return {row["kind"]: row["n"] for row in json.loads(capsys.readouterr().out)}


ONCE = {"finetune": 2, "merge": 2, "eval": 5, "search": 1, "trial": 3}  # the search merges and evaluates its best


def more(cli: Cli, capsys: Capture) -> dict[str, int]:
    """What has been done since the first time."""
    found = kinds(cli, capsys)
    return {kind: n - ONCE[kind] for kind, n in found.items() if n != ONCE[kind]}


def test_every_step_leaves_its_runs_and_folders(cli: Cli, capsys: Capture, ran: Path) -> None:
    assert kinds(cli, capsys) == ONCE
    folders = ("experts/parity", "experts/loop", "merged", "found")
    assert all((ran / "lab/runs/small" / name / "config.json").exists() for name in folders)


def test_the_second_time_nothing_is_done_again(cli: Cli, capsys: Capture, ran: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (ran / "lab/runs").rglob("*.safetensors")}
    assert cli("run", "small.yaml") == 0
    said = capsys.readouterr().err.splitlines()
    assert sum(line.endswith(": already done") for line in said) == 6
    assert more(cli, capsys) == {}
    assert {path: path.stat().st_mtime_ns for path in (ran / "lab/runs").rglob("*.safetensors")} == before


def test_a_changed_setting_repeats_only_what_depends_on_it(cli: Cli, capsys: Capture, ran: Path) -> None:
    assert cli("run", "small.yaml", "--set", "scale=0.7") == 0
    assert more(cli, capsys) == {"merge": 1, "eval": 1}


def test_a_setting_changed_back_makes_the_first_model_again(cli: Cli, capsys: Capture, ran: Path) -> None:
    merged = ran / "lab/runs/small/merged/model.safetensors"
    first = merged.read_bytes()
    assert cli("run", "small.yaml", "--set", "scale=0.7") == 0
    assert merged.read_bytes() != first
    assert cli("run", "small.yaml") == 0
    assert merged.read_bytes() == first
    assert more(cli, capsys) == {"merge": 2, "eval": 1}


def test_a_search_with_more_trials_goes_on(cli: Cli, capsys: Capture, ran: Path) -> None:
    assert cli("run", "small.yaml", "--set", "trials=5") == 0
    assert more(cli, capsys) == {"search": 1, "trial": 2, "merge": 1, "eval": 1}


def test_another_seed_on_the_command_line_counts(cli: Cli, capsys: Capture, ran: Path) -> None:
    assert cli("run", "small.yaml", "--seed", 4) == 0
    assert more(cli, capsys) == ONCE
    assert cli("--json", "report", "--sql", "select distinct seed from runs where kind <> 'trial' order by 1") == 0
    assert json.loads(capsys.readouterr().out) == [{"seed": 3}, {"seed": 4}]


def test_a_seed_on_the_command_line_goes_before_the_pipelines_even_if_it_is_0(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, population: Path
) -> None:
    seeds: list[int] = []
    monkeypatch.setitem(WORK, "merge", lambda lab, *_: seeds.append(lab.seed))
    monkeypatch.setattr(pipelines, "_finish", lambda *_: None)  # nothing was stored that it could show
    merge = {"method": "average", "base": str(population / "base"), "experts": [str(population / "loop")], "out": "m"}
    path = write({"title": "Short", "settings": {"seed": 3}, "steps": [{"merge": merge}]}, "short.yaml")
    for words in ([], ["--seed", 0], ["--seed", 4], ["--seed", 4, "--set", "seed=5"]):
        assert cli("run", path, *words) == 0
    assert seeds == [3, 0, 4, 5]


def test_a_model_that_was_deleted_is_made_again(cli: Cli, capsys: Capture, ran: Path) -> None:
    shutil.rmtree(ran / "lab/runs/small/merged")
    assert cli("run", "small.yaml") == 0
    assert more(cli, capsys) == {"merge": 1}


def test_a_pipeline_under_another_name_stands_on_its_own(cli: Cli, capsys: Capture, population: Path) -> None:
    experts = [str(population / task) for task in ("parity", "loop")]
    merge = {"method": "average", "base": str(population / "base"), "experts": experts, "out": "merged"}
    steps = [{"merge": merge}, {"eval": {"models": ["@merged"], "limit": 20}}]
    for name in ("one", "other"):
        assert cli("run", write({"title": "Short", "steps": steps}, f"{name}.yaml")) == 0
        assert Path(f"lab/runs/{name}/merged/config.json").exists()
    assert kinds(cli, capsys) == {"merge": 2, "eval": 1}


def test_a_merge_made_by_hand_does_not_stand_in_for_a_step(
    cli: Cli, capsys: Capture, ran: Path, population: Path
) -> None:
    shutil.rmtree("lab/runs/small/merged")
    experts = [f"lab/runs/small/experts/{task}" for task in ("parity", "loop")]
    words = ["--base", population / "base", "--experts", *experts, "--scale", 0.4, "--seed", 3, "-o", "by_hand"]
    assert cli("merge", "task_arithmetic", *words) == 0
    assert cli("run", "small.yaml") == 0
    assert more(cli, capsys) == {"merge": 2}
    assert (ran / "lab/runs/small/merged/config.json").exists()


def test_the_end_shows_the_leaderboard_and_what_to_try_next(cli: Cli, capsys: Capture, ran: Path) -> None:
    assert cli("run", "small.yaml") == 0
    out, err = capsys.readouterr()
    assert "task_arithmetic" in out
    assert err.endswith("Try next:\n  mergectl report\n")


def test_a_dry_run_shows_the_steps_and_writes_nothing(cli: Cli, capsys: Capture, population: Path) -> None:
    write(recipe(population))
    assert cli("run", "small.yaml", "--dry-run") == 0
    lines = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    shown = [[cell.strip() for cell in line[1:3]] for line in lines]
    steps = ["finetune", "eval", "eval", "merge", "eval", "search"]
    assert shown == [*([str(n), v] for n, v in enumerate(steps, 1)), ["", "all"]]
    assert not Path("lab").exists()


def broken(population: Path, **changes: Any) -> dict[str, Any]:
    """The pipeline with something changed in the steps of these verbs."""
    content = recipe(population)
    for step in content["steps"]:
        for verb, change in changes.items():
            if verb in step:
                step[verb].update(change)
    return content


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"merge": {"method": "tsk_arithmetic"}}, "Did you mean 'task_arithmetic'?"),
    "setting of a method": ({"merge": {"settings": {"skale": 1}}}, "No setting 'skale' in method 'task_arithmetic'"),
    "task": ({"finetune": {"tasks": ["digits/paritty"]}}, "Did you mean 'parity'?"),
    "task to score": ({"eval": {"on": ["digits/lop"]}}, "Did you mean 'loop'?"),
    "sampler": ({"search": {"sampler": "gird"}}, "Did you mean 'grid'?"),
    "key": ({"search": {"trails": 3}}, "Step 6 of the pipeline (search) has no key 'trails'. Did you mean 'trials'?"),
    "key of finetune": ({"finetune": {"epoch": 3}}, "Step 1 of the pipeline (finetune) has no key 'epoch'."),
    "use of a setting": ({"merge": {"out": "${name}"}}, "The pipeline uses ${name}, which it does not set."),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_before_the_first_step(cli: Cli, capsys: Capture, population: Path, mistake: str) -> None:
    changes, sentence = MISTAKES[mistake]
    write(broken(population, **changes))
    assert cli("run", "small.yaml") == 2
    assert sentence in capsys.readouterr().err
    assert not Path("lab").exists()


STEPS: list[tuple[Any, str]] = [
    ({"train": {}}, "Step 1 of the pipeline must be one of finetune, merge, eval, search, got train."),
    ({"merge": {}, "eval": {}}, "got merge, eval."),
    ({}, "Step 1 of the pipeline must be one of"),
    ({"merge": {"method": "ties", "out": "m"}}, "Step 1 of the pipeline (merge) needs the key 'experts'."),
    ({"merge": "ties"}, "Step 1 of the pipeline (merge) must be a mapping of keys to values, got 'ties'."),
    ("merge", "line 1, key 'steps.0'"),
]


@pytest.mark.parametrize(("step", "sentence"), STEPS, ids=lambda value: value if isinstance(value, str) else None)
def test_a_step_that_is_none(cli: Cli, capsys: Capture, step: Any, sentence: str) -> None:
    write({"title": "Odd", "steps": [step]})
    assert cli("run", "small.yaml") == 2
    assert sentence in capsys.readouterr().err


WORDS: list[tuple[list[str], str]] = [
    (["digts"], "Error: No pipeline 'digts'. Did you mean 'digits'?"),
    (["digits", "--set", "trails=3"], "Error: The pipeline has no setting 'trails'. Did you mean 'trials'?"),
    (["digits", "--set", "trials"], "Error: --set trials is not NAME=VALUE."),
    (["digits", "--set", "trials=[3"], "Error: '[3' cannot be read as a value."),
    (["digits", "--set", "seed=abc"], "Error: The pipeline's seed must be a whole number of at least 0, got 'abc'."),
]


@pytest.mark.parametrize(("words", "sentence"), WORDS, ids=lambda value: value[-1])
def test_words_that_name_nothing(cli: Cli, capsys: Capture, words: list[str], sentence: str) -> None:
    assert cli("run", *words) == 2
    assert capsys.readouterr().err == sentence + "\n"


def test_the_shipped_pipelines_are_listed(cli: Cli, capsys: Capture) -> None:
    assert cli("run", "--list") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in pipelines.shipped())


def test_without_a_name_a_smoke_run_tries_every_pipeline_that_can_be(
    cli: Cli, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[str, dict[str, bool]]] = []
    monkeypatch.setattr(pipelines, "run", lambda _lab, name, _changes, **how: tried.append((name, how)))
    assert cli("run", "--smoke") == 0
    names = [name for name in pipelines.shipped() if pipelines.load(name, {}).smoke]
    assert tried == [(name, {"smoke": True, "finish": False}) for name in names]
    out = capsys.readouterr().out
    assert len(names) > 30 and all(name in out for name in names)


@pytest.mark.parametrize("name", pipelines.shipped())
def test_a_shipped_pipeline_names_only_what_exists(name: str) -> None:
    pipeline = pipelines.load(name, {})
    written: set[str] = set()
    for number, step in enumerate(pipeline.steps, 1):
        pipelines.check(Lab(), step, number)
        (what,) = step.values()
        used = [*what.get("experts", []), *what.get("models", []), *what.get("heads", []), what.get("base")]
        asked = {ref[1:] for ref in used if isinstance(ref, str) and ref.startswith("@")}
        assert asked <= written, f"step {number}"
        tasks = [task.rpartition("/")[2] for task in what.get("tasks", [])]
        written |= {f"{what['out']}/{task}" for task in tasks} if tasks else {what.get("out", "")}
        if "method" in what:
            assert {*what.get("range", {}), *what.get("per_task", [])} <= set(settings_of(what["method"]))


def test_words_of_a_recipe_are_words_and_numbers_are_numbers(cli: Cli, capsys: Capture) -> None:
    Path("plain.yaml").write_text(
        "title: Plain\nsettings: {lr: 1e-4, seed: 0}\nsteps:\n"
        "  - eval: {models: [m], on: [digits/loop], limit: 10}\n"
        "  - search: {method: ties, experts: [m], out: f, range: {scale: -1:1}, fix: {round_up: no}}\n"
        "  - finetune: {tasks: [digits/loop], base: b, lr: '${lr}'}\n"
    )
    first, second, third = pipelines.load("plain.yaml", {}).steps
    assert first["eval"]["on"] == ["digits/loop"]
    assert (second["search"]["range"], second["search"]["fix"]) == ({"scale": "-1:1"}, {"round_up": "no"})
    assert third["finetune"]["lr"] == 1e-4
    assert pipelines.load("plain.yaml", {"lr": "2e-3"}).steps[2]["finetune"]["lr"] == 2e-3


def test_a_value_may_stand_inside_a_word_and_keeps_its_type_alone(population: Path) -> None:
    content = recipe(population, settings={"n": 3, "list": [1, 2]})
    content["steps"] = [{"merge": {"out": "m${n}-x", "settings": {"scale": "${n}"}, "experts": "${list}"}}]
    (step,) = pipelines.load(str(write(content)), {"n": "4"}).steps
    assert step["merge"] == {"out": "m4-x", "settings": {"scale": 4}, "experts": [1, 2]}


@pytest.mark.parametrize(
    "options",
    [
        {"calibrations": {}},
        {"calibration": {"num_ada_exmples": 5}},
        {"adapt": {"batch_size": 0}},
        {"adapt": {"onn": 1}},
    ],
    ids=str,
)
def test_wrong_options_of_a_late_step_are_refused_before_the_first(options: dict[str, Any]) -> None:
    step = {"merge": {"method": "adamerging", "experts": ["@a"], "out": "m", "options": options}}
    with pytest.raises(UserError, match=r"no options '(calibrations|num_ada_exmples)'|--adapt (has no|batch_size)"):
        pipelines.check(Lab(), step, 7)
