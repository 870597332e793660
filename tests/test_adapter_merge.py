"""`merge --adapter`: adapters become an adapter that peft loads and that stands for the merged change."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mergectl.adapter_merge import factors
from mergectl.checkpoints import open_checkpoint
from mergectl.models import quiet
from tests import test_text2text as words
from tests.conftest import Cli
from tests.test_finetune import train

Capture = pytest.CaptureFixture[str]
PAIR = ["--experts", "one=one/adapter", "two=two/adapter"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each kind of adapter a folder with a T5 base and two adapters, `one` and `two`."""
    folder = tmp_path_factory.mktemp("adapters")
    for peft in ("lora", "ia3"):
        make(folder / peft, peft)
    return folder


@pytest.fixture(params=["lora", "ia3"])
def kind(request: pytest.FixtureRequest, made: Path, tmp_path: Path) -> str:
    """Work in a copy of either."""
    shutil.copytree(made / str(request.param), tmp_path, dirs_exist_ok=True)
    return str(request.param)


@pytest.fixture
def lora(made: Path, tmp_path: Path) -> Path:
    """Work in a copy of the folder with LoRA."""
    shutil.copytree(made / "lora", tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def ia3(made: Path, tmp_path: Path) -> Path:
    """Work in a copy of the folder with IA3."""
    shutil.copytree(made / "ia3", tmp_path, dirs_exist_ok=True)
    return tmp_path


def make(folder: Path, peft: str) -> None:
    base = words.base(folder / "base", "v1.1")
    for seed, name in enumerate(("one", "two")):
        train(words.settings(base, peft=peft, lr=5e-2, seed=seed, rank=2 + seed), folder / name, words.MOOD)


def loaded(folder: Path) -> Any:
    """The base with an adapter on it, as a user's own program loads it."""
    from peft import PeftModel

    with quiet(), warnings.catch_warnings(action="ignore"):
        return PeftModel.from_pretrained(words.reloaded(Path("base")), str(folder)).merge_and_unload()


def whole(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in model.named_parameters()}


def test_peft_loads_the_result_and_reads_the_same_weights_as_we_do(kind: str, cli: Cli) -> None:
    assert cli("merge", "average", *PAIR, "-o", "m", "--adapter") == 0
    theirs, ours = whole(loaded(Path("m"))), open_checkpoint("m")
    for name in ("shared.weight", *(n for n in theirs if "SelfAttention" in n or "wo" in n)):
        assert name in ours
        torch.testing.assert_close(ours[name].float(), theirs[name], atol=1e-5, rtol=1e-5)
    assert any(not torch.equal(weight, whole(words.reloaded(Path("base")))[name]) for name, weight in theirs.items())


@pytest.mark.parametrize("method", ["average", "task_arithmetic", "ties", "medusa"])
def test_a_merged_lora_is_the_merge_of_what_the_adapters_add(lora: Path, cli: Cli, method: str) -> None:
    settings = ["--trim", "none"] if method == "ties" else []
    assert cli("merge", method, *PAIR, *settings, "-o", "m", "--adapter", "--adapter-rank", "16") == 0
    assert cli("merge", method, *PAIR, *settings, "-o", "f") == 0
    merged, folded = open_checkpoint("m"), open_checkpoint("f")
    for name in folded:
        torch.testing.assert_close(merged[name].float(), folded[name].float(), atol=2e-5, rtol=1e-4)


def test_without_a_rank_linear_merges_lose_nothing(lora: Path, cli: Cli, capsys: Capture) -> None:
    assert cli("--json", "merge", "average", *PAIR, "-o", "m", "--adapter") == 0
    assert json.loads(capsys.readouterr().out)["kept_energy"] == pytest.approx(1)
    assert json.loads(Path("m/adapter_config.json").read_text())["r"] == 5  # two and three


def test_a_small_rank_keeps_less_and_says_so(lora: Path, cli: Cli, capsys: Capture) -> None:
    assert cli("--json", "merge", "average", *PAIR, "-o", "m", "--adapter", "--adapter-rank", "1") == 0
    kept = json.loads(capsys.readouterr().out)["kept_energy"]
    assert 0.3 < kept < 0.99999
    assert json.loads(Path("m/mergectl.json").read_text())["kept_energy"] == kept
    assert all(1 in weight.shape for weight in load_file("m/adapter_model.safetensors").values())


def test_ia3_vectors_are_merged_as_vectors(ia3: Path, cli: Cli) -> None:
    assert cli("merge", "task_arithmetic", *PAIR, "--scale", "0.5", "-o", "m", "--adapter") == 0
    one, two, merged = (load_file(f"{name}/adapter_model.safetensors") for name in ("one/adapter", "two/adapter", "m"))
    assert merged.keys() == one.keys()
    for name, vector in merged.items():
        torch.testing.assert_close(vector, 1 + 0.5 * (one[name] - 1) + 0.5 * (two[name] - 1))


def test_the_merged_adapter_is_a_run_and_a_model_of_the_program(kind: str, cli: Cli, capsys: Capture) -> None:
    assert cli("merge", "average", *PAIR, "-o", "m", "--adapter", "--quiet") == 0
    question = "select kind, role, count(*) as n from inputs join runs using (run_id) group by all order by role"
    assert cli("--json", "report", "--sql", question) == 0
    assert [(row["role"], row["n"]) for row in json.loads(capsys.readouterr().out)] == [("base", 1), ("expert", 2)]
    assert cli("merge", "average", "--experts", "one=one", "m=m", "--base", "base", "-o", "again", "--quiet") == 0
    assert cli("merge", "average", *PAIR, "-o", "m", "--adapter", "--force", "--quiet") == 0


def test_the_nearest_product_of_a_rank() -> None:
    matrix = torch.diag(torch.tensor([3.0, 2.0, 0.0]))
    up, down, kept, total = factors(matrix, 1)
    torch.testing.assert_close(up @ down, torch.diag(torch.tensor([3.0, 0.0, 0.0])))
    assert kept == pytest.approx(9)
    assert total == pytest.approx(13)
    up, down, kept, total = factors(matrix, 5)
    torch.testing.assert_close(up @ down, matrix)
    assert (tuple(up.shape), tuple(down.shape)) == ((3, 5), (5, 3))
    assert kept == pytest.approx(total)


WRONG: list[tuple[list[str], str]] = [
    (["--adapter-rank", "2"], "Add --adapter."),
    (["--adapter", "--adapter-rank", "0"], "--adapter-rank must be at least 1"),
    (["--adapter", "--export", "one"], "--export has no meaning for adapters"),
    (["--adapter", "--experts", "three=one"], "is a whole model. --adapter merges adapters only"),
]


@pytest.mark.parametrize(("given", "sentence"), WRONG, ids=[sentence for _, sentence in WRONG])
def test_what_cannot_be_is_one_sentence(lora: Path, cli: Cli, capsys: Capture, given: list[str], sentence: str) -> None:
    assert cli("merge", "average", *PAIR, "-o", "m", *given) == 2
    assert sentence in capsys.readouterr().err
    assert not Path("m").exists()


def test_adapters_with_heads_of_their_own_stay_models(cli: Cli, capsys: Capture, tmp_path: Path) -> None:
    from tests import tiny_models as tiny
    from tests.test_finetune import config

    base = tiny.base(tmp_path / "base", "bert")
    for name in ("one", "two"):
        train(config(base, epochs=1, peft="lora"), tmp_path / name, tiny.MOOD)
    assert cli("merge", "average", *PAIR, "-o", "m", "--adapter") == 2
    assert "holds a trained head" in capsys.readouterr().err


def test_a_method_that_keeps_something_per_task_makes_no_adapter(lora: Path, cli: Cli, capsys: Capture) -> None:
    assert cli("merge", "emr", *PAIR, "-o", "m", "--adapter") == 2
    assert "which one adapter cannot hold" in capsys.readouterr().err


def test_an_adapter_merge_cannot_be_made_again_as_a_model(lora: Path, cli: Cli, capsys: Capture) -> None:
    assert cli("merge", "average", *PAIR, "-o", "m", "--adapter") == 0
    assert cli("merge", "--again", "m") == 2
    assert "m is a merged adapter" in capsys.readouterr().err
