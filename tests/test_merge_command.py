"""`mergectl merge`: what is written, that plain transformers loads it, and that nothing is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergectl.checkpoints import open_checkpoint
from tests import population as tiny
from tests.conftest import Cli


def test_task_arithmetic_on_disk_is_base_plus_scaled_sum(cli: Cli, population: Path) -> None:
    experts = [population / "parity", population / "loop"]
    assert (
        cli(
            "merge",
            "task_arithmetic",
            "--base",
            population / "base",
            "--experts",
            *experts,
            "-o",
            "m",
            "--scale",
            "0.3",
        )
        == 0
    )
    base, merged = tiny.weights(population / "base"), tiny.weights(Path("m"))
    for name, start in base.items():
        deltas = [tiny.weights(path)[f"vit.{name}"] - start for path in experts]
        torch.testing.assert_close(merged[name], start + 0.3 * sum(deltas), rtol=0, atol=1e-6)


def test_every_weight_of_the_base_is_in_the_result_with_its_shape(cli: Cli, population: Path) -> None:
    assert (
        cli(
            "merge",
            "ties",
            "--base",
            population / "base",
            "--experts",
            population / "parity",
            population / "loop",
            "-o",
            "m",
        )
        == 0
    )
    base, merged = tiny.weights(population / "base"), tiny.weights(Path("m"))
    assert {n: w.shape for n, w in merged.items()} == {n: w.shape for n, w in base.items()}


@pytest.mark.slow
def test_plain_transformers_loads_the_result_without_mergectl(cli: Cli, population: Path, tmp_path: Path) -> None:
    assert cli("merge", "average", "--experts", population / "parity", population / "loop", "-o", "m") == 0
    code = (
        "import sys; sys.modules['mergectl'] = None; import torch; from transformers import AutoModel;"
        "model, info = AutoModel.from_pretrained('m', output_loading_info=True, add_pooling_layer=False);"
        "print(list(info['missing_keys']), list(info['unexpected_keys']), model.num_parameters())"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    count = sum(weight.numel() for weight in tiny.weights(Path("m")).values())
    assert done.stdout.split("\n")[0] == f"[] [] {count}"


@pytest.mark.slow
def test_an_exported_task_loads_as_a_plain_classifier(cli: Cli, population: Path, tmp_path: Path) -> None:
    words = ["--experts", population / "parity", population / "loop", "--export", "loop", "-o", "one"]
    assert cli("merge", "emr", "--base", population / "base", *words) == 0
    code = (
        "import sys; sys.modules['mergectl'] = None; from transformers import AutoModelForImageClassification as Auto;"
        "model, info = Auto.from_pretrained('one', output_loading_info=True);"
        "print(len(info['missing_keys']), len(info['unexpected_keys']), model.config.id2label[1])"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.strip() == "0 0 loop"


def test_the_exported_weights_are_those_of_the_python_api(cli: Cli, population: Path) -> None:
    from mergectl import merge_weights

    tasks = ["parity", "loop"]
    words = ["--experts", *[population / t for t in tasks], "--export", "loop", "-o", "one"]
    assert cli("merge", "emr", "--base", population / "base", *words) == 0
    base = tiny.weights(population / "base")
    experts = {t: {n: tiny.weights(population / t)[f"vit.{n}"] for n in base} for t in tasks}
    expected = merge_weights("emr", base, experts).task("loop")
    found = tiny.weights(Path("one"))
    for name, weight in expected.items():
        torch.testing.assert_close(found[f"vit.{name}"], weight, rtol=0, atol=1e-6)


def test_heads_labels_and_masks_stand_beside_the_shared_model(cli: Cli, population: Path) -> None:
    assert (
        cli(
            "merge",
            "emr",
            "--base",
            population / "base",
            "--experts",
            population / "parity",
            population / "digit",
            "-o",
            "m",
        )
        == 0
    )
    record = json.loads(Path("m/tasks/digit/task.json").read_text())
    head = load_file("m/tasks/digit/head.safetensors")
    masks = load_file("m/tasks/digit/masks.safetensors")
    base = tiny.weights(population / "base")
    assert record["task"] == "digits/digit" and 0.5 < record["rescaler"] < 1.5
    assert set(head) == {"classifier.weight", "classifier.bias"} and head["classifier.bias"].shape == (10,)
    assert {n: len(bits) for n, bits in masks.items()} == {n: -(-w.numel() // 8) for n, w in base.items()}


def test_the_record_names_inputs_by_digest_and_the_recipe_in_full(cli: Cli, population: Path) -> None:
    assert (
        cli(
            "merge",
            "ties",
            "--base",
            population / "base",
            "--experts",
            population / "parity",
            "-o",
            "m",
            "--density",
            "0.3",
        )
        == 0
    )
    record = json.loads(Path("m/mergectl.json").read_text())
    digest = open_checkpoint(population / "parity").digest
    assert {"role": "expert", "task": "digits/parity", "ref": str(population / "parity"), "digest": digest} in record[
        "inputs"
    ]
    assert record["recipe"]["settings"]["density"] == [0.3] or record["recipe"]["settings"]["density"] == 0.3
    assert record["recipe"]["settings"]["elect"] == "mass"


def test_the_same_merge_twice_is_bit_identical(cli: Cli, population: Path) -> None:
    words = ["--base", population / "base", "--experts", population / "parity", population / "loop", "--seed", "7"]
    assert cli("merge", "dare_ties", *words, "-o", "a") == 0
    assert cli("merge", "dare_ties", *words, "-o", "b") == 0
    assert Path("a/model.safetensors").read_bytes() == Path("b/model.safetensors").read_bytes()


def test_another_seed_draws_another_mask(cli: Cli, population: Path) -> None:
    words = ["--base", population / "base", "--experts", population / "parity", population / "loop"]
    cli("merge", "dare_ties", *words, "-o", "a", "--seed", "1")
    cli("merge", "dare_ties", *words, "-o", "b", "--seed", "2")
    assert Path("a/model.safetensors").read_bytes() != Path("b/model.safetensors").read_bytes()


def test_refine_dare_then_a_merger_is_the_preset(cli: Cli, population: Path) -> None:
    words = ["--base", population / "base", "--experts", population / "parity", population / "loop"]
    assert cli("merge", "dare_task_arithmetic", *words, "-o", "a", "--drop", "0.5") == 0
    assert cli("merge", "task_arithmetic", *words, "-o", "b", "--refine", "dare:drop=0.5") == 0
    assert Path("a/model.safetensors").read_bytes() == Path("b/model.safetensors").read_bytes()


def test_settings_per_task_and_per_weight(cli: Cli, population: Path) -> None:
    words = ["--base", population / "base", "--experts", population / "parity", population / "loop"]
    assert cli("merge", "task_arithmetic", *words, "-o", "a", "--scale", "parity=1,loop=0") == 0
    assert cli("merge", "task_arithmetic", *words, "-o", "b", "--scale", "*.attention.*=0", "--scale", "*=1") == 0
    base, parity = tiny.weights(population / "base"), tiny.weights(population / "parity")
    one, grouped = tiny.weights(Path("a")), tiny.weights(Path("b"))
    for name, start in base.items():
        torch.testing.assert_close(one[name], parity[f"vit.{name}"], rtol=0, atol=1e-6)
        assert torch.equal(grouped[name], start) == (".attention." in name)


def test_dtype_and_force(cli: Cli, population: Path) -> None:
    words = ["--experts", population / "parity", population / "loop", "-o", "m"]
    assert cli("merge", "average", *words) == 0
    assert cli("merge", "average", *words, "--force", "--dtype", "bfloat16") == 0
    assert {weight.dtype for weight in tiny.weights(Path("m")).values()} == {torch.bfloat16}


def test_a_recipe_file_merges_as_the_options_do(cli: Cli, population: Path) -> None:
    recipe = {
        "method": "ties", "base": str(population / "base"), "out": "from_file", "settings": {"density": 0.4},
        "experts": {"parity": str(population / "parity"), "loop": str(population / "loop")},
    }  # fmt: skip
    Path("recipe.yaml").write_text(json.dumps(recipe))
    assert cli("merge", "-c", "recipe.yaml") == 0
    words = ["--base", population / "base", "--experts", population / "parity", population / "loop"]
    assert cli("merge", "ties", *words, "--density", "0.4", "-o", "from_words") == 0
    assert Path("from_file/model.safetensors").read_bytes() == Path("from_words/model.safetensors").read_bytes()


def test_options_of_every_command_go_with_a_recipe_and_before_a_method(cli: Cli, population: Path) -> None:
    experts = [str(population / task) for task in ("parity", "loop")]
    recipe = {"method": "dare_ties", "base": str(population / "base"), "experts": experts, "seed": 7}
    Path("recipe.yaml").write_text(json.dumps(recipe))
    words = ["--base", population / "base", "--experts", *experts]
    assert cli("merge", "--quiet", "-c", "recipe.yaml", "-o", "seven", "--device", "cpu", "--threads", "1") == 0
    assert cli("--seed", "0", "merge", "-c", "recipe.yaml", "-o", "zero") == 0
    assert cli("merge", "--seed", "7", "dare_ties", *words, "-o", "by_words") == 0
    seeds = {name: json.loads(Path(name, "mergectl.json").read_text())["recipe"]["seed"] for name in ("seven", "zero")}
    assert seeds == {"seven": 7, "zero": 0}
    assert Path("by_words/model.safetensors").read_bytes() == Path("seven/model.safetensors").read_bytes()


def test_the_result_appears_in_the_store_with_its_parents(
    cli: Cli, population: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli("merge", "average", "--experts", population / "parity", population / "loop", "-o", "m")
    capsys.readouterr()
    assert cli("--json", "report", "--sql", "select role, task from inputs order by role, task") == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows == [
        {"role": "base", "task": None},
        {"role": "expert", "task": "digits/loop"},
        {"role": "expert", "task": "digits/parity"},
    ]


def test_the_base_is_named_by_whichever_expert_knows_it(cli: Cli, population: Path, tmp_path: Path) -> None:
    tiny.change(population / "parity", tmp_path / "stray", lambda w: w)
    (tmp_path / "stray" / "mergectl.json").unlink()
    words = ["--experts", "parity=stray", population / "loop"]
    assert cli("merge", "task_arithmetic", *words, "-o", "found") == 0
    assert cli("merge", "task_arithmetic", *words, "--base", population / "base", "-o", "told") == 0
    assert Path("found/model.safetensors").read_bytes() == Path("told/model.safetensors").read_bytes()


def test_a_merge_without_a_base_needs_none(cli: Cli, population: Path, tmp_path: Path) -> None:
    for task in ("parity", "loop"):
        tiny.change(population / task, tmp_path / "stray" / task, lambda w: w)
        (tmp_path / "stray" / task / "mergectl.json").unlink()
    words = ["--experts", tmp_path / "stray/parity", tmp_path / "stray/loop", "-o", "m"]
    assert cli("merge", "slerp", *words) == 0
    assert not any(name.startswith("classifier") for name in tiny.weights(Path("m")))


@pytest.mark.parametrize("words", [["merge", "adarank"], ["search", "ties"]])
def test_a_missing_base_is_told_before_any_work(
    cli: Cli, population: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    for task in ("parity", "loop"):
        tiny.change(population / task, tmp_path / "stray" / task, lambda w: w)
        (tmp_path / "stray" / task / "mergectl.json").unlink()
    experts = [f"digits/{task}={tmp_path / 'stray' / task}" for task in ("parity", "loop")]
    assert cli(*words, "--experts", *experts, "-o", "m") == 2
    assert "needs the base that the experts came from, and none was given. Add it: --base" in capsys.readouterr().err
    assert not Path("lab/mergectl.duckdb").exists()  # no run was begun


def test_a_killed_merge_leaves_nothing_and_the_next_cleans_up(cli: Cli, population: Path) -> None:
    stale = Path(".m.tmp-999999999")
    stale.mkdir()
    (stale / "model.safetensors").write_bytes(b"half")
    assert cli("merge", "average", "--experts", population / "parity", population / "loop", "-o", "m") == 0
    assert not stale.exists() and Path("m/config.json").exists()


def test_blocks_read_from_files_are_the_weights(cli: Cli, population: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--base", population / "base", "--experts", population / "parity", population / "loop"]
    assert cli("merge", "ties", *words, "-o", "whole") == 0
    monkeypatch.setattr("mergectl.blocks.LENGTH", 60)
    assert cli("merge", "ties", *words, "-o", "parts") == 0
    assert Path("parts/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()


def test_an_option_before_the_method_is_not_passed_over(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("merge", "--push", "me/model", "ties", "--experts", "a", "b", "-o", "m") == 2
    assert "Give --push behind the method: mergectl merge ties" in capsys.readouterr().err


def test_a_merge_may_be_scored_at_once_and_told_in_a_file(
    cli: Cli, population: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("log.txt").write_text("before\n")
    words = ["merge", "__DARE_TIES", "--base", population / "base", "--experts", population / "parity"]
    more = [population / "loop", "-o", "m", "--drop", "0.5", "--eval", "digits/parity", "digits/loop"]
    assert cli("--json", *words, *more, "--out-file", "log.txt") == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["tasks"]) == {"digits/parity", "digits/loop"}
    lines = Path("log.txt").read_text().splitlines()
    assert lines[:4] == [
        "before", f"base: {population / 'base'}", f"expert: {population / 'parity'}", f"expert: {population / 'loop'}",
    ]  # fmt: skip
    assert any(line.startswith("method: dare_ties drop=0.5 ") and "trim=none" in line for line in lines)
    assert f"digits/loop: {100 * found['tasks']['digits/loop']:.2f}" in lines
    assert f"mean: {100 * found['mean']:.2f} (run {found['eval']})" in lines
    question = "select kind, count(*) as n from runs group by kind order by kind"
    assert cli("--json", "report", "--sql", question) == 0
    assert json.loads(capsys.readouterr().out) == [{"kind": "eval", "n": 1}, {"kind": "merge", "n": 1}]


def test_the_scores_of_a_merge_are_printed_with_their_mean_and_their_run() -> None:
    from mergectl.merge_scores import shown

    facts = {"tasks": {"digits/parity": 0.5, "digits/loop": 0.75}, "mean": 0.625, "eval": "e1", "file": "log.txt"}
    lines = ["digits/parity  50.0", "digits/loop    75.0", "mean           62.5  (run e1)", "added to log.txt"]
    assert shown(facts) == lines
    assert shown({"tasks": {"digits/loop": 0.75}, "mean": 0.75, "eval": "e1", "file": None}) == [
        "digits/loop  75.0  (run e1)"
    ]
    assert shown({}) == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--out-file", "log.txt"], "--out-file is for scores. Say of which tasks: --eval suite/task"),
        (["--eval", "digits/loop", "--out-file", "nowhere/log.txt"], "nowhere/log.txt cannot be written"),
        (["--eval", "digits/lop"], "No task 'lop' in suite 'digits'. Did you mean 'loop'?"),
        (["--eval", "glue/rte"], "glue/rte is made of texts, but"),
        (["--eval", "glue-t5/rte"], "glue-t5/rte is answered in words, but"),
        (["--eval", "digits/loop", "glue/rte"], "No model reads both images (digits/loop) and texts (glue/rte)."),
        (["--eval", "digits/digit"], "no head for digits/digit, only for digits/parity, digits/loop. Leave it out"),
        (["--eval", "digits/loop", "--export", "parity"], "no head for digits/loop, only for digits/parity."),
    ],
)
def test_what_cannot_be_scored_is_told_before_the_merge(
    cli: Cli, population: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    experts = ["--experts", population / "parity", population / "loop"]
    assert cli("merge", "average", *experts, "-o", "m", *words) == 2
    assert sentence in capsys.readouterr().err
    assert not Path("m").exists()
    assert not Path("lab/mergectl.duckdb").exists()  # no run was begun


LEGACY = {
    "_SUM": "average", "__SUM": "average", "_TA": "task_arithmetic", "TIES_": "ties_tensor", "__TIES_": "ties_tensor",
    "_TIES": "medusa", "__TIES": "medusa", "TIES_TIES": "ties_tensor", "DARE_SUM": "dare_average",
    "__DARE_TA": "dare_task_arithmetic", "DARE_TIES": "dare_ties", "_MEDUSA": "medusa", "__MEDUSA": "medusa",
}  # fmt: skip


@pytest.mark.parametrize("name", LEGACY)
def test_the_names_of_medusas_program_are_understood(cli: Cli, population: Path, name: str) -> None:
    experts = ["--experts", population / "parity", population / "loop"]
    for out, method in (("theirs", name), ("ours", LEGACY[name])):
        assert cli("merge", method, "--base", population / "base", *experts, "-o", out) == 0
    theirs, ours = tiny.weights(Path("theirs")), tiny.weights(Path("ours"))
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)


def test_another_word_in_capitals_is_no_legacy_name(
    cli: Cli, population: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("merge", "_PCB", "--experts", population / "parity", "-o", "m") == 2
    assert "No method '_PCB'" in capsys.readouterr().err


def test_a_recipe_may_speak_of_the_users_home(cli: Cli, population: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("home/models").mkdir(parents=True)
    for name in ("base", "parity"):
        Path(f"home/models/{name}").symlink_to(population / name)
    (Path("home/models") / "a+b").symlink_to(population / "loop")
    monkeypatch.setenv("HOME", str(Path("home").absolute()))
    models = "{parity: ~/models/parity, loop: ~/models/a+b}"
    Path("own.yaml").write_text(f"method: average\nbase: ~/models/base\nexperts: {models}\nout: ~/merged\n")
    assert cli("merge", "-c", "own.yaml") == 0
    listed = "[{model: ~/models/parity}, {model: ~/models/a+b}]"
    Path("mergekit.yaml").write_text(f"merge_method: linear\nparameters: {{weight: 0.5}}\nmodels: {listed}\n")
    assert cli("merge", "-c", "mergekit.yaml", "-o", "there") == 0
    assert Path("home/merged/model.safetensors").exists() and not Path("~").exists()
