"""`merge --adapter`: adapters become an adapter that peft loads and that stands for the merged change."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mergectl import merge_weights
from mergectl.adapters import ROOT, AdapterCheckpoint
from mergectl.checkpoints import open_checkpoint
from mergectl.models import quiet
from mergectl.thin import align, cut, cut_dense
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


def test_the_result_names_a_base_in_the_folder_that_one_works_in_by_its_whole_path(lora: Path, cli: Cli) -> None:
    for name in ("one", "two"):
        path = Path(name, "adapter/adapter_config.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "base"}))
    assert cli("merge", "average", *PAIR, "-o", "m", "--adapter") == 0
    told = json.loads(Path("m/adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(told).is_absolute() and Path(told).samefile(lora / "base")


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


@pytest.mark.parametrize("given", [["--adapter-mode", "product"], ["--adapter-rank", "2"]])
def test_vectors_have_neither_rank_nor_mode(ia3: Path, cli: Cli, capsys: Capture, given: list[str]) -> None:
    assert cli("merge", "average", *PAIR, "-o", "m", "--adapter", *given) == 2
    assert f"{given[0]} is for LoRA; IA3 adapters are vectors." in capsys.readouterr().err


def test_the_merged_adapter_is_a_run_and_a_model_of_the_program(kind: str, cli: Cli, capsys: Capture) -> None:
    assert cli("merge", "average", *PAIR, "-o", "m", "--adapter", "--quiet") == 0
    question = "select kind, role, count(*) as n from inputs join runs using (run_id) group by all order by role"
    assert cli("--json", "report", "--sql", question) == 0
    assert [(row["role"], row["n"]) for row in json.loads(capsys.readouterr().out)] == [("base", 1), ("expert", 2)]
    assert cli("merge", "average", "--experts", "one=one", "m=m", "--base", "base", "-o", "again", "--quiet") == 0
    assert cli("merge", "average", *PAIR, "-o", "m", "--adapter", "--force", "--quiet") == 0


def test_the_nearest_product_of_a_rank() -> None:
    matrix = torch.diag(torch.tensor([3.0, 2.0, 0.0]))
    up, down, kept, total = cut_dense(matrix, 1)
    torch.testing.assert_close(up @ down, torch.diag(torch.tensor([3.0, 0.0, 0.0])))
    assert kept == pytest.approx(9)
    assert total == pytest.approx(13)
    up, down, kept, total = cut_dense(matrix, 5)
    torch.testing.assert_close(up @ down, matrix)
    assert (tuple(up.shape), tuple(down.shape)) == ((3, 5), (5, 3))
    assert kept == pytest.approx(total)


SIZES = st.tuples(*[st.integers(1, 7)] * 3, st.integers(0, 99))


def drawn(rows: int, columns: int, *ranks: int, seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Factors of products [rows, columns], one of each rank."""
    chance = torch.Generator().manual_seed(seed)
    ups = [torch.randn(rows, rank, generator=chance) for rank in ranks]
    return ups, [torch.randn(rank, columns, generator=chance) for rank in ranks]


@given(SIZES, st.integers(1, 9))
def test_thin_factors_are_cut_as_their_product_is(sizes: tuple[int, ...], rank: int) -> None:
    rows, columns, inner, seed = sizes
    (up,), (down,) = drawn(rows, columns, inner, seed=seed)
    thin, dense = cut(up, down, rank), cut_dense(up @ down, rank)
    assert (thin.up.shape, thin.down.shape) == (dense.up.shape, dense.down.shape)
    assert thin.kept == pytest.approx(dense.kept, rel=1e-4)
    assert thin.whole == pytest.approx(dense.whole, rel=1e-4)
    if rank >= inner:
        torch.testing.assert_close(thin.up @ thin.down, up @ down, atol=1e-4, rtol=1e-4)


@given(SIZES, st.integers(1, 7))
def test_aligned_parts_are_those_of_the_dense_decomposition(sizes: tuple[int, ...], other: int) -> None:
    rows, columns, inner, seed = sizes
    ups, downs = drawn(rows, columns, inner, other, seed=seed)
    shared, parts = align(ups, downs)
    assert shared.shape[1] <= min(rows, inner + other)
    for up, down, part in zip(ups, downs, parts, strict=True):  # each adapter is still there
        torch.testing.assert_close(shared @ part, up @ down, atol=1e-4, rtol=1e-4)
    beside = torch.cat([up @ down for up, down in zip(ups, downs, strict=True)], 1)
    values = torch.linalg.svdvals(beside)[: shared.shape[1]]
    torch.testing.assert_close(shared.norm(dim=0), values, atol=1e-4, rtol=1e-3)
    whole = torch.cat(parts, 1)  # the directions are orthonormal over all adapters together
    torch.testing.assert_close(whole @ whole.T, torch.eye(len(whole)), atol=1e-4, rtol=0)


def test_adapters_that_change_nothing_align_to_nothing() -> None:
    shared, parts = align([torch.zeros(4, 2)] * 2, [torch.ones(2, 3)] * 2)
    assert not any((shared @ part).any() for part in parts)


def dense_alignment(names: list[str], method: str, **settings: Any) -> dict[str, torch.Tensor]:
    """What KnOTS says, with whole matrices: decompose all changes beside each other, merge the parts, multiply."""
    adapters = {name: opened(name) for name in names}
    left, right = {}, {name: dict[str, torch.Tensor]() for name in names}
    for module in adapters[names[0]].modules:
        changes = [adapter.product(module).double() for adapter in adapters.values()]
        u, s, v = torch.linalg.svd(torch.cat(changes, 1), full_matrices=False)
        count = int((s > 1e-5 * s.max()).sum())
        left[module] = u[:, :count] * s[:count]
        for name, part in zip(names, v[:count].chunk(len(names), 1), strict=True):
            right[name][f"{module}.weight"] = part.float()
    nothing = {name: torch.zeros_like(part) for name, part in right[names[0]].items()}
    found = merge_weights(method, nothing, right, **settings)
    return {module: (u @ found[f"{module}.weight"].double()).float() for module, u in left.items()}


def opened(name: str) -> AdapterCheckpoint:
    found = open_checkpoint(name)
    assert isinstance(found, AdapterCheckpoint)
    return found


ALIGNED: list[tuple[str, list[str], dict[str, Any]]] = [
    ("ties", ["--density", "0.4"], {"density": 0.4}),
    ("ties_tensor", ["--density", "0.5", "--scale", "0.7"], {"density": 0.5, "scale": 0.7}),
    ("medusa", [], {}),
    ("task_arithmetic", ["--scale", "0.3"], {"scale": 0.3}),
]


@pytest.mark.parametrize(("method", "words", "settings"), ALIGNED, ids=[method for method, _, _ in ALIGNED])
def test_aligned_adapters_merge_as_by_whole_matrices(
    lora: Path, cli: Cli, method: str, words: list[str], settings: dict[str, Any]
) -> None:
    assert cli("merge", method, *PAIR, *words, "-o", "m", "--adapter", "--adapter-mode", "align") == 0
    expected = dense_alignment(["one/adapter", "two/adapter"], method, **settings)
    merged = opened("m")
    for module, change in expected.items():
        torch.testing.assert_close(merged.product(module), change, atol=2e-5, rtol=1e-3)
    theirs, ours = whole(loaded(Path("m"))), open_checkpoint("m")  # and peft loads it
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    torch.testing.assert_close(ours[name].float(), theirs[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["product", "concatenate", "align"])
def test_weighted_sums_are_the_same_in_every_mode(lora: Path, cli: Cli, mode: str) -> None:
    given = ["--scale", "one=0.2", "--scale", "two=0.7"]
    assert cli("merge", "task_arithmetic", *PAIR, *given, "-o", "m", "--adapter", "--adapter-mode", mode) == 0
    one, two, merged = (opened(name) for name in ("one/adapter", "two/adapter", "m"))
    for module in one.modules:
        expected = 0.2 * one.product(module) + 0.7 * two.product(module)
        torch.testing.assert_close(merged.product(module), expected, atol=1e-5, rtol=1e-4)
    assert json.loads(Path("m/mergectl.json").read_text())["adapter_mode"] == mode


def test_aligned_ties_differ_from_ties_of_products(lora: Path, cli: Cli) -> None:
    for mode in ("product", "align"):
        assert cli("merge", "ties", *PAIR, "-o", mode, "--adapter", "--adapter-mode", mode) == 0
    one, other = load_file("product/adapter_model.safetensors"), load_file("align/adapter_model.safetensors")
    name = f"{ROOT}encoder.block.0.layer.0.SelfAttention.q.lora"
    plain, aligned = (weights[f"{name}_B.weight"] @ weights[f"{name}_A.weight"] for weights in (one, other))
    assert not torch.allclose(plain, aligned, rtol=1e-2)


def test_folding_may_be_asked_for_by_name(lora: Path, cli: Cli) -> None:
    assert cli("merge", "average", *PAIR, "-o", "m", "--fold") == 0
    assert Path("m/config.json").exists()
    assert not Path("m/adapter_config.json").exists()


def test_a_merged_adapter_may_be_scored_at_once(lora: Path, cli: Cli) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"sentence": "good warm film", "label": 1, "idx": 0}, {"sentence": "dull", "label": 0, "idx": 1}]
    place = Path("data/glue/sst2")
    place.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), place / "validation.parquet")
    words = [*PAIR, "-o", "m", "--adapter", "--eval", "glue-t5/sst2", "--out-file", "log.txt"]
    assert cli("--data", "data", "merge", "average", *words) == 0
    lines = Path("log.txt").read_text().splitlines()
    assert [line.partition(": ")[0] for line in lines[:3]] == ["base", "expert", "expert"]
    assert any(line.startswith("glue-t5/sst2: ") for line in lines)


WRONG: list[tuple[list[str], str]] = [
    (["--adapter-rank", "2"], "--adapter-rank is for merged LoRA adapters. Add --adapter."),
    (["--adapter-mode", "align"], "--adapter-mode is for merged LoRA adapters. Add --adapter."),
    (["--adapter", "--adapter-mode", "aligned"], "got 'aligned'. Did you mean 'align'?"),
    (["--adapter", "--adapter-mode", "concatenate", "--combine", "median"], "is for weighted sums"),
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


def test_adapters_without_heads_are_not_scored_on_labels(cli: Cli, capsys: Capture, tmp_path: Path) -> None:
    from tests import tiny_models as tiny
    from tests.test_finetune import config

    train(config(tiny.base(tmp_path / "base", "bert"), epochs=1, peft="lora"), tmp_path / "one", tiny.MOOD)
    file = tmp_path / "one/adapter/adapter_model.safetensors"
    save_file({name: weight for name, weight in load_file(file).items() if ".lora_" in name}, file)
    shutil.copytree("one", "two")
    for more in ([], ["--adapter"]):
        assert cli("merge", "average", *PAIR, "-o", "m", "--eval", "glue/sst2", *more) == 2
        assert "The merge would have no head for glue/sst2, nor for any other task. Leave it" in capsys.readouterr().err
    assert not Path("m").exists() and not Path("lab").exists()


def test_a_method_that_keeps_something_per_task_makes_no_adapter(lora: Path, cli: Cli, capsys: Capture) -> None:
    assert cli("merge", "emr", *PAIR, "-o", "m", "--adapter") == 2
    assert "which one adapter cannot hold" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["fisher", "regmean", "adamerging"])
def test_what_is_measured_on_whole_models_makes_no_adapter(lora: Path, cli: Cli, capsys: Capture, method: str) -> None:
    assert cli("merge", method, *PAIR, "-o", "m", "--adapter") == 2
    assert "is measured on whole models. Leave out --adapter" in capsys.readouterr().err
    assert not Path("lab").exists()


def test_an_adapter_merge_cannot_be_made_again_as_a_model(lora: Path, cli: Cli, capsys: Capture) -> None:
    assert cli("merge", "average", *PAIR, "-o", "m", "--adapter") == 0
    assert cli("merge", "--again", "m") == 2
    assert "m is a merged adapter" in capsys.readouterr().err
