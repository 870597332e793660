"""Bad input: one clear sentence on stderr, exit code 2, nothing written."""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from tests import population as tiny
from tests.conftest import Cli

Capture = pytest.CaptureFixture[str]


def refused(cli: Cli, capsys: Capture, *words: object) -> str:
    """Run a command that must fail with exit code 2, one short text and nothing written; return the text."""
    before = {path for path in Path().rglob("*") if "lab" not in path.parts}
    code = cli(*words)
    err = capsys.readouterr().err
    after = {path for path in Path().rglob("*") if "lab" not in path.parts}
    assert (code, after - before) == (2, set()), err
    assert "Traceback" not in err
    return err


def merge_words(population: Path, *experts: object) -> list[object]:
    return ["merge", "task_arithmetic", "--base", population / "base", "--experts", *experts, "-o", "out"]


def test_an_unknown_command(cli: Cli, capsys: Capture) -> None:
    assert "Did you mean 'merge'?" in refused(cli, capsys, "merg")


def test_an_unknown_method(cli: Cli, capsys: Capture, population: Path) -> None:
    err = refused(cli, capsys, "merge", "tiess", "--experts", population / "parity", "-o", "out")
    assert err == "Error: No method 'tiess'. Did you mean 'ties'?\n"


def test_the_list_of_methods_says_which_files_of_the_users_are_none(cli: Cli, capsys: Capture) -> None:
    Path("lab/methods").mkdir(parents=True)
    Path("lab/methods/broken.py").write_text("def merge(:\n")
    Path("lab/methods/ties.py").write_text('"""Mine."""\n')
    assert cli("merge", "--help") == 0
    found = capsys.readouterr()
    assert "broken.py:1: cannot be loaded (SyntaxError" in found.err and "task_arithmetic" in found.out
    assert "ties.py: not used, since 'ties' is already the name of methods/ties.py" in found.err


def test_an_unknown_setting(cli: Cli, capsys: Capture, population: Path) -> None:
    err = refused(cli, capsys, "merge", "ties", "--densty", "1", "--experts", population / "parity", "-o", "out")
    assert "--densty" in err and "--density" in err


def test_an_unknown_task(cli: Cli, capsys: Capture, population: Path) -> None:
    err = refused(cli, capsys, "eval", population / "parity", "--on", "digits/paritty")
    assert err.splitlines()[-1] == "Error: No task 'paritty' in suite 'digits'. Did you mean 'parity'?"


def test_an_unknown_suite(cli: Cli, capsys: Capture, population: Path) -> None:
    assert "Did you mean 'glue'?" in refused(cli, capsys, "eval", population / "parity", "--on", "gleu/rte")


def test_a_value_out_of_range(cli: Cli, capsys: Capture, population: Path) -> None:
    err = refused(cli, capsys, "merge", "ties", "--density", "20", "--experts", population / "parity", "-o", "out")
    assert "density must lie between 0.0 and 1.0" in err and "20" in err


BESIDE = [
    ("adarank", ["--extend-clamp", "true"], "extend_clamp has a meaning only with clamp=true."),
    ("adamerging", ["--density", "0.3"], "density has a meaning only with plus=true."),
    (
        "cart",
        ["--origin-scale", "0.3"],
        "origin_scale has a meaning only with origin=task_arithmetic or origin=cart or",
    ),
    ("cart", ["--origin", "base", "--origin-rank-ratio", "0.3"], "origin_rank_ratio has a meaning only with"),
    ("della_linear", ["--rescale", "false", "--rescale-to", "l1"], "rescale_to has a meaning only with rescale=true."),
]


@pytest.mark.parametrize(("method", "words", "sentence"), BESIDE)
def test_a_setting_that_would_change_nothing_is_refused(
    cli: Cli, capsys: Capture, population: Path, method: str, words: list[str], sentence: str
) -> None:
    start, *rest = merge_words(population, population / "parity")
    err = refused(cli, capsys, start, method, *rest[1:], *words)
    assert sentence in err and f"leave {words[-2].removeprefix('--').replace('-', '_')} out." in err


IDLE = {
    "finetune digits/parity --base base --rank 16": "--rank has a meaning only with --peft lora.",
    "finetune digits/parity --base base --peft ia3 --dropout 0.1": "--dropout has a meaning only with --peft lora.",
    "finetune digits/parity --base base --grid alpha=1,2": "--alpha has a meaning only with --peft lora.",
    "finetune digits/parity --base base --targets q,v": "--targets has a meaning only with --peft lora or --peft ia3.",
    "finetune digits/parity --base base --warmup 0.1 --warmup-steps 3": "--warmup has a meaning only without",
    "finetune digits/parity --base base --warmup 0.1 --scheduler constant": "with another --scheduler, such as",
    "finetune digits/parity --base base --grid warmup_steps=2,4 --scheduler constant": "--warmup-steps has a meaning",
    "finetune digits/parity --base base --grid warmup_steps=2,4 --warmup 0.1": "--warmup has a meaning only without",
    "finetune digits/parity --base base --preset vision --scheduler constant --grid warmup=0,0.1": "--warmup has",
    "finetune digits/parity --base base --grid peft=none,lora --grid rank=2,4": "--rank has a meaning only with --peft",
    "finetune digits/parity --base base --grid scheduler=constant,linear --grid warmup=0.1,0.2": "--warmup has",
    "eval base --conflict --batch-size 8": "--conflict measures weights, not answers. Leave out --batch-size.",
    "eval base --conflict --dtype bfloat16": "--conflict measures weights, not answers. Leave out --dtype.",
    "report --timeout 3": "--timeout is for --sql. Leave it out.",
    "report a-run --split tune": "--split is for the leaderboard and for pages. Leave it out.",
    "report --study s --suite glue": "--suite is for the leaderboard and for pages. Leave it out.",
    "report --study-storage there": "--study-storage is for --study and for pages. Leave it out.",
    "report --check --csv": "--csv is for answers and tables. Leave it out.",
    "run --list digits": "--list shows all pipelines. Leave out the rest.",
    "run --dry-run": "--dry-run is for one pipeline. Name it: mergectl run NAME",
    "run --set seed=1": "--set is for one pipeline. Name it: mergectl run NAME",
    "run --again a-run --smoke": "--again takes everything from the run. Leave out the rest.",
    "search --wait 3 ties --experts a b -o out": "--wait is for --join. Leave it out.",
    "search --study-storage there ties --experts a b -o out": "Give --study-storage behind the method: mergectl search",
    "search ties --experts a b -o out --allow-report": "--allow-report is for --split report, and this search looks at",
}


@pytest.mark.parametrize("line", IDLE)
def test_an_option_that_would_change_nothing_is_refused(cli: Cli, capsys: Capture, line: str) -> None:
    assert IDLE[line] in refused(cli, capsys, *line.split())


def test_what_gives_an_option_its_meaning_may_stand_in_the_grid(cli: Cli, capsys: Capture) -> None:
    words = ["finetune", "digits/parity", "--base", "nowhere", "--rank", "4", "--grid", "peft=none,lora"]
    assert "nowhere" in refused(cli, capsys, *words)


def test_a_value_of_the_wrong_type(cli: Cli, capsys: Capture, population: Path) -> None:
    err = refused(cli, capsys, "merge", "ties", "--density", "much", "--experts", population / "parity", "-o", "out")
    assert "density" in err and "much" in err


def test_a_missing_folder(cli: Cli, capsys: Capture, population: Path) -> None:
    assert "There is no folder './nowhere'" in refused(cli, capsys, *merge_words(population, "./nowhere"))


def test_a_name_that_is_neither_folder_nor_on_the_hub(cli: Cli, capsys: Capture, population: Path) -> None:
    assert "There is no folder 'models/nowhere'" in refused(cli, capsys, *merge_words(population, "models/nowhere"))


def test_a_shape_that_differs_names_the_tensor_and_both_shapes(
    cli: Cli, capsys: Capture, population: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    name = next(
        n for n in tiny.weights(population / "parity") if (n.endswith("weight") and "intermediate" in n) or "fc1" in n
    )

    def shrink(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: w[:8].contiguous() if n == name else w for n, w in weights.items()}

    odd = tiny.change(population / "parity", tmp_path_factory.mktemp("odd") / "parity", shrink)
    err = refused(cli, capsys, *merge_words(population, odd, population / "loop"))
    assert name.removeprefix("vit.") in err and "[32, 16]" in err and "[8, 16]" in err


def test_an_expert_of_another_architecture(
    cli: Cli, capsys: Capture, population: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def rename(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {f"other.{i}.weight": w for i, w in enumerate(weights.values())}

    odd = tiny.change(population / "parity", tmp_path_factory.mktemp("odd") / "parity", rename)
    assert "no fine-tuned copy" in refused(cli, capsys, *merge_words(population, odd))


def test_experts_of_two_bases(
    cli: Cli, capsys: Capture, population: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("two_bases")
    experts = [tiny.change(population / task, folder / task, lambda w: w) for task in ("parity", "loop")]
    for expert, base in zip(experts, ("one", "two"), strict=True):
        record = json.loads((expert / "mergectl.json").read_text())
        (expert / "mergectl.json").write_text(json.dumps({**record, "base": base, "base_digest": f"digest of {base}"}))
    err = refused(cli, capsys, "merge", "task_arithmetic", "--experts", *experts, "-o", "out")
    assert "Expert 'parity' was fine-tuned from one, 'loop' from another model (two)." in err
    assert cli("merge", "task_arithmetic", "--base", population / "base", "--experts", *experts, "-o", "out") == 0


def test_a_truncated_file(
    cli: Cli, capsys: Capture, population: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    odd = tiny.change(population / "parity", tmp_path_factory.mktemp("odd") / "parity", lambda w: w)
    path = odd / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "is not a whole safetensors file" in refused(cli, capsys, *merge_words(population, odd))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_names_model_and_tensor(
    cli: Cli, capsys: Capture, population: Path, tmp_path_factory: pytest.TempPathFactory, value: float
) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weights["vit.embeddings.cls_token"][0, 0, 3] = value
        return weights

    odd = tiny.change(population / "parity", tmp_path_factory.mktemp("odd") / "parity", spoil)
    err = refused(cli, capsys, *merge_words(population, odd, population / "loop"))
    assert "embeddings.cls_token" in err and "parity" in err


def test_an_expert_equal_to_the_base_is_a_warning(
    cli: Cli, capsys: Capture, population: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = tiny.weights(population / "base")

    def undo(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: base.get(n.removeprefix("vit."), w) for n, w in weights.items()}

    same = tiny.change(population / "parity", tmp_path_factory.mktemp("same") / "parity", undo)
    assert cli("merge", "emr", "--base", population / "base", "--experts", same, population / "loop", "-o", "out") == 0
    assert "'parity' equals the base" in capsys.readouterr().err
    assert all(weight.isfinite().all() for weight in tiny.weights(Path("out")).values())


def test_a_single_expert_where_two_are_needed(cli: Cli, capsys: Capture, population: Path) -> None:
    err = refused(cli, capsys, "merge", "slerp", "--experts", population / "parity", "-o", "out")
    assert "slerp" in err and "exactly 2" in err


def test_a_single_expert_is_fine_where_it_makes_sense(cli: Cli, population: Path) -> None:
    assert cli("merge", "ties", "--base", population / "base", "--experts", population / "parity", "-o", "out") == 0


def test_an_output_folder_that_exists(cli: Cli, capsys: Capture, population: Path) -> None:
    Path("out").mkdir()
    assert "--force" in refused(cli, capsys, *merge_words(population, population / "parity"))


@pytest.mark.parametrize("verb", ["merge", "search"])
def test_force_does_not_replace_a_model_that_is_merged(
    cli: Cli, capsys: Capture, population: Path, tmp_path: Path, verb: str
) -> None:
    tiny.change(population / "parity", tmp_path / "mine", lambda w: w)
    words = [verb, "average", "--base", population / "base", "--experts", "mine", population / "loop"]
    words += ["--range", "combine=mean,median"] if verb == "search" else []
    before = Path("mine/model.safetensors").read_bytes()
    err = refused(cli, capsys, *words, "-o", tmp_path / "mine", "--force")
    assert "is one of the models to merge" in err and Path("mine/model.safetensors").read_bytes() == before


def test_a_pattern_that_no_weight_fits(cli: Cli, capsys: Capture, population: Path) -> None:
    words = merge_words(population, population / "parity", population / "loop")
    err = refused(cli, capsys, *words, "--scale", "*.atention.*=0.5")
    assert "No weight is called '*.atention.*'" in err


def test_a_value_per_task_of_a_setting_that_cannot_differ(cli: Cli, capsys: Capture, population: Path) -> None:
    words = ["merge", "ties", "--base", population / "base", "--experts", population / "parity", population / "loop"]
    err = refused(cli, capsys, *words, "-o", "out", "--scale", "parity=0.5")
    assert "No weight is called 'parity'" in err and "scale cannot differ per task" in err


@pytest.mark.parametrize("word", ["", "task="])
def test_a_model_without_a_name(cli: Cli, capsys: Capture, population: Path, word: str) -> None:
    assert "The name of a model is empty." in refused(cli, capsys, *merge_words(population, word))


def test_an_option_of_several_words_with_none(cli: Cli, capsys: Capture, population: Path) -> None:
    err = refused(cli, capsys, "merge", "ties", "--experts", "--base", population / "base", "-o", "out")
    assert err == "Error: --experts takes at least one word, and none stands behind it.\n"


def test_an_unknown_device(cli: Cli, capsys: Capture, population: Path) -> None:
    err = refused(cli, capsys, *merge_words(population, population / "parity"), "--device", "gpu")
    assert "There is no device 'gpu'. Use auto, cpu, cuda, cuda:1 or mps." in err


@pytest.mark.parametrize("verb", ["merge", "finetune"])
def test_an_output_folder_inside_a_file(cli: Cli, capsys: Capture, population: Path, verb: str) -> None:
    Path("file.txt").write_text("text")
    words = ["digits/loop", "--base", population / "base", "-o", "file.txt"]
    if verb == "merge":
        words = ["average", "--experts", population / "loop", "-o", "file.txt/out"]
    assert "file.txt is a file, so nothing can be written in it." in refused(cli, capsys, verb, *words)


def test_a_model_that_is_for_no_task(cli: Cli, capsys: Capture, population: Path) -> None:
    err = refused(cli, capsys, "eval", population / "base")
    assert f"{population / 'base'} does not say for which tasks it has heads." in err and "--heads" in err


def test_the_model_may_stand_behind_the_tasks(cli: Cli, capsys: Capture, population: Path) -> None:
    assert cli("eval", "--on", "digits/parity", population / "parity", "--limit", 5) == 0
    assert "Which model is to be scored?" in refused(cli, capsys, "eval", "--on", "digits/parity")
    assert "Which model is to be scored?" in refused(cli, capsys, "eval", "--on", "digits/parity", "digits/loop")
    assert "no folder './nowhere'" in refused(cli, capsys, "eval", "--on", "digits/parity", "./nowhere")


def test_an_unknown_split(cli: Cli, capsys: Capture, population: Path) -> None:
    err = refused(cli, capsys, "eval", population / "parity", "--split", "repot")
    assert err == "Error: digits/parity has no rows for 'repot', only for fit, tune, report.\n"


def test_a_recipe_beside_a_method(cli: Cli, capsys: Capture, population: Path) -> None:
    Path("recipe.yaml").write_text("method: ties\nexperts: [a, b]\n")
    words = ["ties", "--experts", population / "parity", "-o", "out"]
    assert "Leave out 'ties'" in refused(cli, capsys, "merge", "-c", "recipe.yaml", *words)


def test_force_does_not_replace_what_is_no_model(cli: Cli, capsys: Capture, population: Path) -> None:
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("years of work")
    assert "not a model folder" in refused(cli, capsys, *merge_words(population, population / "parity"), "--force")


# Eight lines that stand for 43 million values: each repeats the one before it nine times.
BOMB = "a: &a [1]\n" + "".join(
    f"{name}: &{name} [{', '.join(9 * [f'*{before}'])}]\n" for before, name in itertools.pairwise("abcdefghi")
)
RECIPES = {
    "method: ties\nexperts: [a]\ndensity: 3\n": "line 3: unknown key 'density'",
    "method: ties\nexpert: [a]\n": "line 2: unknown key 'expert'. Did you mean 'experts'?",
    "method: ties\nexperts: [a\n": "recipe.yaml, line",
    "experts: [a]\n": "the key 'method' is missing",
    "method: ties\nexperts: 3\n": "line 2, key 'experts",
    "- a\n": "line 1",
    "method: ties\nmethod: average\n": "line 2: the key 'method' stands twice",
    "method: \x07\n": "line 1: control characters are not allowed",
    "method: &a [*a]\n": "a part of it contains itself",
    "method: 2026-13-01\n": "line 1: month must be in 1..12",
    BOMB: "its anchors and aliases stand for more than 100,000 values",
    "a: &a {settings: {densty: 1}}\nmethod: ties\nexperts: [a]\n<<: *a\n": "line 1: unknown key 'a'",
    "<<: &a {method: ties}\nexperts: [a]\n<<: {expert: 1}\n": "line 3: unknown key 'expert'",
}


@pytest.mark.parametrize("text", RECIPES, ids=lambda text: text.splitlines()[-1])
def test_an_unreadable_recipe_names_line_and_key(cli: Cli, capsys: Capture, text: str) -> None:
    Path("recipe.yaml").write_text(text)
    assert RECIPES[text] in refused(cli, capsys, "merge", "-c", "recipe.yaml", "-o", "out")


def test_a_wrong_setting_in_a_recipe(cli: Cli, capsys: Capture, population: Path) -> None:
    recipe = {"method": "ties", "experts": [str(population / "parity")], "settings": {"densty": 0.1}}
    Path("recipe.yaml").write_text(json.dumps(recipe))
    assert "Did you mean 'density'?" in refused(cli, capsys, "merge", "-c", "recipe.yaml", "-o", "out")


WRONG_SETTINGS = {
    "settings:\n  densty: 0.3\n": "line 5: No setting 'densty' in method 'ties'. Did you mean 'density'?",
    "settings:\n  scale: 1\n  density: 20\n": "line 6: density must lie between",
    "settings:\n  density: [0.1, 0.2, 0.3]\n": "line 5: density has 3 values for 2 tasks",
    "refine:\n  - dare:\n      drp: 0.5\n": "line 6: No setting 'drp' in refinement 'dare'. Did you mean 'drop'?",
    "refine: [{darr: {}}]\n": "line 4: No method 'darr'.",
}


@pytest.mark.parametrize("text", WRONG_SETTINGS, ids=WRONG_SETTINGS.__getitem__)
def test_a_wrong_setting_of_a_recipe_is_told_with_its_line(cli: Cli, capsys: Capture, text: str) -> None:
    Path("recipe.yaml").write_text(f"method: ties\nbase: b\nexperts: {{x: a, y: c}}\n{text}")
    assert WRONG_SETTINGS[text] in refused(cli, capsys, "merge", "-c", "recipe.yaml", "-o", "out")


def test_a_data_file_without_the_expected_column(cli: Cli, capsys: Capture, population: Path) -> None:
    Path("rows.csv").write_text("text,answer\nfine,yes\nbad,no\n")
    task = {"data": "rows.csv", "inputs": ["sentence"], "label": "answer", "labels": ["no", "yes"]}
    Path("tasks.yaml").write_text(json.dumps({"tasks": {"mood": task}}))
    err = refused(cli, capsys, "eval", population / "parity", "--on", "files/mood", "--tasks", "tasks.yaml")
    assert "sentence" in err and "text" in err and "rows.csv" in err


def test_a_model_without_a_head_for_the_task(cli: Cli, capsys: Capture, population: Path) -> None:
    err = refused(cli, capsys, "eval", population / "parity", "--on", "digits/loop")
    assert "no head for digits/loop" in err and "digits/parity" in err


def test_a_search_may_not_look_at_report(cli: Cli, capsys: Capture, population: Path) -> None:
    words = ["--base", population / "base", "--experts", population / "parity", "-o", "out", "--split", "report"]
    assert "may not look at 'report'" in refused(cli, capsys, "search", "ties", *words)


@pytest.mark.parametrize(
    "sql", ["drop table runs", "insert into runs values (1)", "attach 'x.db'", "select * from nothing"]
)
def test_sql_that_is_no_question(cli: Cli, capsys: Capture, population: Path, sql: str) -> None:
    cli("merge", "average", "--experts", population / "parity", population / "loop", "-o", "m")
    capsys.readouterr()
    assert refused(cli, capsys, "report", "--sql", sql).startswith("Error: ")


def test_pickled_code_is_never_run(
    cli: Cli, capsys: Capture, population: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    odd = tiny.change(population / "parity", tmp_path_factory.mktemp("odd") / "parity", lambda w: w)
    (odd / "model.safetensors").unlink()
    mark = odd / "ran"

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(mark),)

    torch.save({"w": Trap()}, odd / "pytorch_model.bin")
    err = refused(cli, capsys, *merge_words(population, odd))
    assert "never run" in err and not mark.exists()


def test_a_failed_run_keeps_its_row_with_the_error(cli: Cli, capsys: Capture, population: Path) -> None:
    refused(cli, capsys, "eval", population / "parity", "--on", "digits/loop")
    cli("--json", "report", "--sql", "select status, error from runs where kind = 'eval'")
    (row,) = json.loads(capsys.readouterr().out)
    assert row["status"] == "failed" and "no head for digits/loop" in row["error"]


@pytest.mark.slow
def test_ctrl_c_exits_130_and_marks_the_run_cancelled(
    cli: Cli, capsys: Capture, population: Path, tmp_path: Path
) -> None:
    words = ["finetune", "digits/parity", "--base", str(population / "base"), "--epochs", "500", "-o", "runs"]
    # A suite that runs in the background of a shell hands down that Ctrl-C is to be ignored.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command = [sys.executable, "-m", "mergectl", *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    deadline = time.monotonic() + 60
    while not list(Path("runs").glob(".parity.training/**/checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err and not Path("runs/parity").exists()
    cli("--json", "report", "--sql", "select status from runs")
    assert json.loads(capsys.readouterr().out) == [{"status": "cancelled"}]


def test_a_users_method_that_crashes_is_named_by_file_and_line(cli: Cli, capsys: Capture, population: Path) -> None:
    path = Path("lab/methods/crash.py")
    path.parent.mkdir(parents=True)
    lines = ['"""Crash."""', "", "", "def merge(task_vectors):", "    for name, x in task_vectors.items():"]
    path.write_text("\n".join([*lines, "        yield name, x / nothing", ""]))
    words = ["--base", population / "base", "--experts", population / "parity", "-o", "out"]
    err = refused(cli, capsys, "merge", "crash", *words)
    assert "crash.py:6: NameError" in err


EARLY = [
    (["average", "--weight", "1,-1"], "add up to zero"),
    (["average", "--weight", "one=2,two=-2"], "add up to zero"),
    (["multislerp", "--weight", "0"], "add up to zero"),
    (["nuslerp", "--weight", "1,-1"], "add up to zero"),
    (["dare_average", "--weight", "1,-1"], "add up to zero"),
    (["task_arithmetic", "--scale", "1,2,3"], "scale has 3 values for 2 tasks"),
    (["task_arithmetic", "--scale", "onne=1"], "Did you mean 'one'?"),
    (["interpolate"], "takes exactly 1 expert, got 2"),
]


@pytest.mark.parametrize(
    ("words", "sentence"), EARLY, ids=lambda part: " ".join(part) if isinstance(part, list) else ""
)
def test_a_recipe_is_refused_before_a_model_is_looked_for(
    cli: Cli, capsys: Capture, monkeypatch: pytest.MonkeyPatch, words: list[str], sentence: str
) -> None:
    monkeypatch.setattr("mergectl.checkpoints.download", lambda ref: pytest.fail(f"{ref} was looked for"))
    experts = ["one=org/one", "two=org/two"]
    assert sentence in refused(cli, capsys, "merge", *words, "--base", "org/base", "--experts", *experts, "-o", "m")


@pytest.mark.parametrize(
    "words", [["dare_ties", "--density", "0.3"], ["average", "--refine", "dare:rescale=no,rescale_to=l1"]]
)
def test_a_setting_without_a_meaning_is_refused_before_tasks_have_names(
    cli: Cli, capsys: Capture, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.setattr("mergectl.checkpoints.download", lambda ref: pytest.fail(f"{ref} was looked for"))
    given = ["--base", "org/base", "--experts", "org/one", "org/two", "-o", "m"]
    assert "has a meaning only with" in refused(cli, capsys, "merge", *words, *given)


@pytest.mark.parametrize("name", ["x" * 300, f"/tmp/{'x' * 300}", f"~/{'x' * 5000}"])
def test_a_name_longer_than_names_may_be_is_refused(cli: Cli, capsys: Capture, name: str) -> None:
    err = refused(cli, capsys, "merge", "average", "--experts", f"one={name}", "two=org/two", "-o", "m")
    assert "is longer than a name may be" in err and len(err) < 200


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
def test_a_place_that_takes_no_folders_is_refused(cli: Cli, capsys: Capture, population: Path) -> None:
    err = refused(cli, capsys, *merge_words(population, population / "parity")[:-1], "/proc/x/y")
    assert "/proc/x cannot be made" in err


WORDS = [
    ("merge", "--export three", "--export three: the experts are one, two."),
    ("merge", "--device gpu", "There is no device 'gpu'."),
    ("search", "--device gpu", "There is no device 'gpu'."),
    ("merge", "--experts one=org/one a/one=org/two", "Two experts are called 'one'."),
    ("search", "--experts one=org/one a/one=org/two", "Two experts are called 'one'."),
    ("search", "--adapt stps=3", "--adapt has no 'stps'."),
]


@pytest.mark.parametrize(("verb", "words", "sentence"), WORDS)
def test_a_wrong_word_is_told_before_a_model_is_looked_for(
    cli: Cli, capsys: Capture, monkeypatch: pytest.MonkeyPatch, verb: str, words: str, sentence: str
) -> None:
    monkeypatch.setattr("mergectl.checkpoints.download", lambda ref: pytest.fail(f"{ref} was looked for"))
    experts = [] if "--experts" in words else ["--experts", "one=org/one", "two=org/two"]
    assert sentence in refused(
        cli, capsys, verb, "adamerging", "--base", "org/base", *experts, *words.split(), "-o", "m"
    )


OPTIONS = {
    "{calibratoin: {}}": "There are no options 'calibratoin'. Did you mean 'calibration'?",
    "{calibration: {rwos: 3}}": "Calibration has no option 'rwos'.",
    "{adapt: {stps: 3}}": "--adapt has no 'stps'.",
}


@pytest.mark.parametrize("options", OPTIONS)
def test_options_of_a_recipe_are_read_before_a_model_is_looked_for(
    cli: Cli, capsys: Capture, monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    monkeypatch.setattr("mergectl.checkpoints.download", lambda ref: pytest.fail(f"{ref} was looked for"))
    models = "base: org/base\nexperts: {one: org/one, two: org/two}\n"
    Path("recipe.yaml").write_text(f"method: adamerging\n{models}options: {options}\n")
    assert OPTIONS[options] in refused(cli, capsys, "merge", "-c", "recipe.yaml", "-o", "m")


def test_weights_that_add_up_to_zero_may_stay_as_they_are(cli: Cli, population: Path) -> None:
    words = ["average", "--base", population / "base", "--experts", population / "parity", population / "loop"]
    assert cli("merge", *words, "-o", "m", "--weight", "1,-1", "--normalize", "false") == 0


def test_an_output_folder_that_exists_is_told_before_a_model_is_looked_for(
    cli: Cli, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergectl.checkpoints.download", lambda ref: pytest.fail(f"{ref} was looked for"))
    Path("m").mkdir()
    assert "m exists already" in refused(cli, capsys, "merge", "average", "--experts", "org/a", "org/b", "-o", "m")
