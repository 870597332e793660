"""What is read and written: places of weights, shards, types, tied and grown vocabularies, and merging --again."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergectl.checkpoints import open_checkpoint
from mergectl.errors import UserError
from mergectl.families import open_family
from mergectl.models import quiet
from mergectl.tensorfiles import SafetensorsWriter, cut, parse_size
from tests import population as tiny
from tests.conftest import Cli

Capture = pytest.CaptureFixture[str]
LLAMA = {
    "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 13,
    "max_position_embeddings": 16, "num_key_value_heads": 1, "head_dim": 4, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def llama(folder: Path, seed: int, tokens: int = 13, tied: bool = False, dtype: str = "float32") -> Path:
    """A tiny language model; those of different vocabularies agree in nothing."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(**{**LLAMA, "vocab_size": tokens, "tie_word_embeddings": tied, "dtype": dtype})
        LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a folder, in shards or not."""
    return dict(open_checkpoint(folder).items())


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    with quiet():
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


def words(base: Path, *experts: Path, out: str = "m") -> list[object]:
    return ["--base", base, "--experts", *(f"{path.name}={path}" for path in experts), "-o", out]


@pytest.fixture
def trio(tmp_path: Path) -> tuple[Path, Path, Path]:
    base, one, two = (llama(tmp_path / name, seed) for seed, name in enumerate(("base", "one", "two")))
    return base, one, two


@pytest.mark.parametrize("word", ["float32", "float16", "bfloat16", "float64", "int64", "uint8", "bool"])
def test_every_weight_is_where_it_is_said_to_be(tmp_path: Path, word: str) -> None:
    dtype = getattr(torch, word)
    made = {
        "a.b": (torch.randn(3, 5) * 9).to(dtype),
        "one": torch.ones((), dtype=dtype),
        "none": torch.zeros(0, 4, dtype=dtype),
    }
    save_file(made, tmp_path / "model.safetensors")
    opened = open_checkpoint(tmp_path)
    for name, weight in made.items():
        assert torch.equal(opened[name], weight) and opened[name].dtype == dtype
        assert opened.shape(name) == tuple(weight.shape)
        place = opened.where(name)
        assert place is not None
        path, start, nbytes = place
        assert path.read_bytes()[start : start + nbytes] == weight.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_a_weight_read_twice_is_two_tensors(population: Path) -> None:
    opened = open_checkpoint(population / "base")
    name = opened.names[0]
    opened[name].zero_()
    assert opened[name].any()


def test_pickled_weights_have_no_place(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert open_checkpoint(tmp_path).where("a") is None


def test_pickled_shards_merge_like_any(cli: Cli, trio: tuple[Path, Path, Path]) -> None:
    base, one, two = trio
    assert cli("merge", "ties", *words(base, one, two, out="a")) == 0
    for folder in trio:
        own = load_file(folder / "model.safetensors")
        where = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(own)}
        for file in set(where.values()):
            torch.save({name: own[name] for name in own if where[name] == file}, folder / file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
        (folder / "model.safetensors").unlink()
    assert cli("merge", "ties", *words(base, one, two, out="b")) == 0
    a, b = weights(Path("a")), weights(Path("b"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_result_in_shards_is_the_result_in_one_file(cli: Cli, trio: tuple[Path, Path, Path]) -> None:
    assert cli("merge", "ties", *words(*trio, out="whole")) == 0
    assert cli("merge", "ties", *words(*trio, out="cut"), "--shard-size", "2KB") == 0
    index = json.loads(Path("cut/model.safetensors.index.json").read_text())
    files = sorted(path.name for path in Path("cut").glob("*.safetensors"))
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    assert set(index["weight_map"].values()) == set(files) and len(files) > 2
    whole, pieces = weights(Path("whole")), weights(Path("cut"))
    assert index["weight_map"].keys() == whole.keys() == pieces.keys()
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in whole.values())
    assert all(torch.equal(loaded(Path("cut")).state_dict()[name], whole[name]) for name in whole)
    for file in files:
        own = load_file(Path("cut", file))
        assert sum(w.nbytes for w in own.values()) <= 2000 or len(own) == 1


def test_shards_are_cut_in_order_and_never_empty() -> None:
    assert cut({"a": 3, "b": 3, "c": 9, "d": 1, "e": 2}, 6) == [["a", "b"], ["c"], ["d", "e"]]
    assert cut({"a": 9}, 1) == [["a"]]


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("2KiB", 2048), ("77", 77), ("1g", 10**9)]
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5XB", "1e3", "much", "5 I"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=f"--shard-size {text} is not a size"):
        parse_size(text)


def test_the_chosen_type_holds_for_every_weight_and_is_what_loads(cli: Cli, trio: tuple[Path, Path, Path]) -> None:
    base, one, two = trio
    for folder in (one, two):  # now the base has a weight that is only carried
        own = load_file(folder / "model.safetensors")
        del own["lm_head.weight"]
        save_file(own, folder / "model.safetensors", metadata={"format": "pt"})
    assert cli("merge", "average", *words(base, one, two), "--dtype", "bfloat16") == 0
    assert {weight.dtype for weight in weights(Path("m")).values()} == {torch.bfloat16}
    assert loaded(Path("m")).dtype == torch.bfloat16


def test_mixed_types_give_the_widest_and_the_configuration_says_so(cli: Cli, tmp_path: Path) -> None:
    base, one = llama(tmp_path / "base", 0, dtype="bfloat16"), llama(tmp_path / "one", 1, dtype="float32")
    two = llama(tmp_path / "two", 2, dtype="float16")
    assert cli("merge", "average", *words(base, one, two)) == 0
    merged, a, b = loaded(Path("m")), weights(one), weights(two)
    assert merged.dtype == torch.float32
    for name, weight in merged.state_dict().items():
        torch.testing.assert_close(weight, (a[name] + b[name].float()) / 2, rtol=0, atol=1e-7)


@pytest.mark.parametrize("export", [False, True])
def test_a_weight_of_a_wider_type_widens_no_other(cli: Cli, trio: tuple[Path, Path, Path], export: bool) -> None:
    wide = {"model.norm.weight": torch.float32, "model.layers.0.input_layernorm.weight": torch.float64}
    for folder in trio:
        own = {name: weight.to(wide.get(name, torch.bfloat16)) for name, weight in weights(folder).items()}
        save_file(own, folder / "model.safetensors", metadata={"format": "pt"})
    only = ["--export", "one"] if export else []
    assert cli("merge", "average", *words(*trio), *only) == 0
    found = {name: weight.dtype for name, weight in weights(Path("m")).items()}
    assert found == {name: wide.get(name, torch.bfloat16) for name in found}
    assert json.loads(Path("m/config.json").read_text())["dtype"] == "bfloat16"


def test_a_result_that_does_not_fit_its_type_is_refused(
    cli: Cli, capsys: Capture, trio: tuple[Path, Path, Path]
) -> None:
    base, one, two = trio
    own = load_file(one / "model.safetensors")
    own["model.norm.weight"] = torch.full((8,), 1e6)
    save_file(own, one / "model.safetensors", metadata={"format": "pt"})
    assert cli("merge", "average", *words(base, one, two), "--dtype", "float16") == 2
    assert "'model.norm.weight' holds numbers that float16 cannot hold" in capsys.readouterr().err
    assert not Path("m").exists()


@pytest.mark.parametrize(
    ("types", "wanted"), [("eeb", "float32"), ("eee", "float16"), ("bbb", "bfloat16"), ("bef", "float32")]
)
def test_the_result_has_a_type_that_holds_the_numbers_of_all_models(
    cli: Cli, trio: tuple[Path, Path, Path], types: str, wanted: str
) -> None:
    letters = {"e": torch.float16, "b": torch.bfloat16, "f": torch.float32}
    for folder, letter in zip(trio, types, strict=True):
        own = {name: weight.to(letters[letter]) for name, weight in weights(folder).items()}
        save_file(own, folder / "model.safetensors", metadata={"format": "pt"})
    assert cli("merge", "average", *words(*trio)) == 0
    assert {str(weight.dtype) for weight in weights(Path("m")).values()} == {f"torch.{wanted}"}


@pytest.mark.parametrize("dtype", ["auto", "float16", "bfloat16"])
@pytest.mark.parametrize("export", [False, True])
def test_infinities_of_a_weight_that_is_not_merged_stay(
    cli: Cli, trio: tuple[Path, Path, Path], dtype: str, export: bool
) -> None:
    base, one, two = trio
    mask, source = torch.tensor([[0.0, -torch.inf], [torch.nan, 1.5]]), one if export else base
    save_file(weights(source) | {"mask": mask}, source / "model.safetensors", metadata={"format": "pt"})
    assert cli("merge", "average", *words(base, one, two), "--dtype", dtype, *(["--export", "one"] * export)) == 0
    kept = weights(Path("m"))["mask"]
    assert str(kept.dtype) == f"torch.{'float32' if dtype == 'auto' else dtype}"
    assert torch.equal(kept.float().nan_to_num(9.0), mask.nan_to_num(9.0))


def test_a_weight_that_is_not_merged_and_does_not_fit_another_type_is_refused(
    cli: Cli, capsys: Capture, trio: tuple[Path, Path, Path]
) -> None:
    base, one, two = trio
    mask = torch.tensor([-torch.inf, -3e38])
    save_file(weights(base) | {"mask": mask}, base / "model.safetensors", metadata={"format": "pt"})
    assert cli("merge", "average", *words(base, one, two), "--dtype", "float16") == 2
    assert "'mask' holds numbers that float16 cannot hold. Choose another --dtype." in capsys.readouterr().err


def test_tied_weights_stay_tied(cli: Cli, tmp_path: Path) -> None:
    base, one, two = (llama(tmp_path / name, seed, tied=True) for seed, name in enumerate(("base", "one", "two")))
    assert cli("merge", "average", *words(base, one, two)) == 0
    model = loaded(Path("m"))
    assert "lm_head.weight" not in weights(Path("m"))
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("copied", ["base", "one", "both"])
def test_a_stored_copy_of_tied_weights_follows_what_it_copies(
    cli: Cli, capsys: Capture, tmp_path: Path, copied: str
) -> None:
    base, one, two = (llama(tmp_path / name, seed, tied=True) for seed, name in enumerate(("base", "one", "two")))
    for folder in {"base": [base], "one": [one], "both": [base, one, two]}[copied]:
        own = load_file(folder / "model.safetensors")
        torch.save({**own, "lm_head.weight": own["model.embed_tokens.weight"]}, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    assert cli("merge", "average", *words(base, one, two)) == 0
    merged = weights(Path("m"))
    mean = (weights(one)["model.embed_tokens.weight"] + weights(two)["model.embed_tokens.weight"]) / 2
    assert torch.equal(merged["model.embed_tokens.weight"], mean)
    assert torch.equal(merged.get("lm_head.weight", mean), mean)
    assert ("lm_head.weight" in merged) == (copied != "one")
    assert load_file("m/tasks/one/head.safetensors") == {}
    assert torch.equal(loaded(Path("m")).lm_head.weight, mean)
    assert ("repeats" in capsys.readouterr().err) == (copied != "both")
    assert cli("merge", "average", *words(base, one, two, out="x"), "--export", "one") == 0
    assert torch.equal(weights(Path("x")).get("lm_head.weight", mean), mean)


def test_a_copy_that_only_some_files_store_is_no_missing_weight(cli: Cli, capsys: Capture, tmp_path: Path) -> None:
    base, one, two = (llama(tmp_path / name, seed, tied=True) for seed, name in enumerate(("base", "one", "two")))
    for folder in (base, one):
        own = load_file(folder / "model.safetensors")
        save_file({**own, "lm_head.weight": own["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    assert cli("merge", "average", *words(base, one, two)) == 0
    merged = weights(Path("m"))
    mean = (weights(one)["model.embed_tokens.weight"] + weights(two)["model.embed_tokens.weight"]) / 2
    assert torch.equal(merged["model.embed_tokens.weight"], mean) and torch.equal(merged["lm_head.weight"], mean)
    assert "'lm_head.weight' of 'one' only repeats" in capsys.readouterr().err
    own = load_file(one / "model.safetensors")
    save_file({**own, "lm_head.weight": own["lm_head.weight"] + 1}, one / "model.safetensors")
    assert cli("merge", "average", *words(base, one, two, out="x")) == 2
    assert "Expert 'two' has no weight 'lm_head.weight'" in capsys.readouterr().err


def test_old_spellings_of_layer_norm_are_the_same_weights(cli: Cli, population: Path, tmp_path: Path) -> None:
    def old(own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        spelled = {n.replace("layernorm_before.weight", "layernorm_before.gamma"): w for n, w in own.items()}
        return {n.replace("layernorm_before.bias", "layernorm_before.beta"): w for n, w in spelled.items()}

    base = tiny.change(population / "base", tmp_path / "old", old)
    experts = [population / "parity", population / "loop"]
    assert cli("merge", "average", *words(base, *experts, out="a")) == 0
    assert cli("merge", "average", *words(population / "base", *experts, out="b")) == 0
    a, b = tiny.weights(Path("a")), tiny.weights(Path("b"))
    assert a.keys() == tiny.weights(base).keys() != b.keys()
    assert all(torch.equal(weight, a[name]) for name, weight in old(b).items())
    assert not any("layernorm" in name for name in load_file("a/tasks/loop/head.safetensors"))


# rows in base, one, two; then who lends the rows beyond the common ones
VOCABULARIES = {
    "grown in one": ((13, 15, 13), [("one", 13, 15)]),
    "padded base": ((16, 13, 13), [("base", 13, 16)]),
    "grown in both": ((13, 14, 16), [("two", 13, 16)]),
    "grown and padded": ((16, 13, 15), [("two", 13, 15), ("base", 15, 16)]),
    "trimmed in one": ((13, 11, 13), [("two", 11, 13)]),
}


def test_without_a_base_notes_say_which_expert_stands_for_it(cli: Cli, capsys: Capture, tmp_path: Path) -> None:
    made = llama(tmp_path / "made", 0, 13)
    one = tiny.change(made, tmp_path / "one", lambda w: w | {"model.steps": torch.tensor([0])})
    two = tiny.change(made, tmp_path / "two", lambda w: w | {"model.steps": torch.tensor([1])})
    assert cli("merge", "average", "--experts", one, two, "-o", "m") == 0
    notes = capsys.readouterr().err.splitlines()[:2]
    assert notes == [
        "note: No base was given: where notes speak of the base, they mean 'one'.",
        "note: Whole numbers of 'two' differ from the base's, which are kept: 'model.steps'.",
    ]
    assert weights(Path("m"))["model.steps"].tolist() == [0]


def test_a_card_tells_how_to_open_the_model_and_where_heads_are(
    cli: Cli, capsys: Capture, tmp_path: Path, population: Path
) -> None:
    folders = [llama(tmp_path / name, seed, 13) for seed, name in enumerate(("base", "one", "two"))]
    assert cli("merge", "average", *words(*folders)) == 0
    card = Path("m/README.md").read_text()
    assert "`LlamaForCausalLM.from_pretrained(folder)`" in card and "head" not in card
    classifiers = ["--experts", population / "parity", population / "loop"]
    assert cli("merge", "average", *classifiers, "-o", "shared") == 0
    assert "`tasks/<task>/head.safetensors`" in Path("shared/README.md").read_text()
    orphans = [tiny.change(population / task, tmp_path / task, lambda w: w) for task in ("parity", "loop")]
    for folder in orphans:
        (folder / "mergectl.json").unlink(missing_ok=True)
    capsys.readouterr()
    assert cli("merge", "average", "--experts", *orphans, "-o", "orphaned") == 0
    assert "note:" not in capsys.readouterr().err
    assert "`AutoModel.from_pretrained(folder)`" in Path("orphaned/README.md").read_text()
    assert cli("merge", "average", *classifiers, "-o", "alone", "--export", "loop") == 0
    card = Path("alone/README.md").read_text()
    assert "It answers digits/loop with" in card and "tasks/" not in card


@pytest.mark.parametrize("case", VOCABULARIES)
def test_rows_that_not_all_have_come_from_who_has_them(cli: Cli, capsys: Capture, tmp_path: Path, case: str) -> None:
    sizes, lenders = VOCABULARIES[case]
    names = ("base", "one", "two")
    folders = {name: llama(tmp_path / name, i, sizes[i]) for i, name in enumerate(names)}
    (folders["one"] / "tokenizer.json").write_text('"one"')
    (folders["two"] / "tokenizer.json").write_text('"two"')
    assert cli("merge", "task_arithmetic", *words(*folders.values()), "--scale", "0.5") == 0
    err, card = capsys.readouterr().err, Path("m/README.md").read_text()
    merged, own = loaded(Path("m")).state_dict(), {name: weights(folders[name]) for name in names}
    common = min(sizes)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        base, one, two = (own[who][name][:common] for who in names)
        torch.testing.assert_close(merged[name][:common], base + 0.5 * (one - base + two - base), rtol=0, atol=1e-6)
        for who, start, end in lenders:
            assert torch.equal(merged[name][start:end], own[who][name][start:end])
            told = f"{start} to {end - 1} kept from {'the base' if who == 'base' else repr(who)}"
            assert told in err and told in card and name in err
        assert len(merged[name]) == lenders[-1][2] == max(sizes)
    assert ("of 'one' are not used" in err) == (case == "grown in both")
    lender = "two" if lenders[-1][0] == "two" else "one"
    assert json.loads(Path("m/tokenizer.json").read_text()) == lender


def test_an_exported_expert_keeps_its_own_vocabulary(cli: Cli, tmp_path: Path) -> None:
    base, one, two = (llama(tmp_path / name, i, 13 + i) for i, name in enumerate(("base", "one", "two")))
    assert cli("merge", "average", *words(base, one, two), "--export", "one") == 0
    merged, own, other = loaded(Path("m")).state_dict(), weights(one), weights(two)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(merged[name][13:], own[name][13:])
        torch.testing.assert_close(merged[name][:13], (own[name][:13] + other[name][:13]) / 2, rtol=0, atol=1e-7)


def test_masks_cover_the_whole_vocabulary(cli: Cli, tmp_path: Path) -> None:
    base, one, two = (llama(tmp_path / name, i, 13 + i) for i, name in enumerate(("base", "one", "two")))
    assert cli("merge", "emr", *words(base, one, two)) == 0
    unified = load_file("m/unified.safetensors")["model.embed_tokens.weight"]
    masks = load_file("m/tasks/one/masks.safetensors")["model.embed_tokens.weight"]
    assert unified.shape == (15, 8) and unified[:13].any() and not unified[13:].any()
    assert len(masks) == 15 and masks[:13].any() and not masks[13:].any()
    assert torch.equal(
        weights(Path("m"))["model.embed_tokens.weight"][13:], weights(two)["model.embed_tokens.weight"][13:]
    )


def test_the_place_of_a_cut_weight_is_its_common_rows(tmp_path: Path) -> None:
    base, one = llama(tmp_path / "base", 0), llama(tmp_path / "one", 1, 15)
    view = open_family(str(base), [("one", str(one))]).population.experts["one"]
    place = view.where("model.embed_tokens.weight") or view.where("embed_tokens.weight")
    assert place is not None and place[2] == 13 * 8 * 4
    name = next(name for name in view if name.endswith("embed_tokens.weight"))
    path, start, nbytes = place
    assert path.read_bytes()[start : start + nbytes] == view[name].numpy().tobytes()
    assert view.shape(name) == (13, 8)


def shape_error(base: Path, one: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_family(str(base), [("one", str(one))])
    return str(caught.value)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"])
def test_any_other_difference_of_shape_names_weight_and_shapes(tmp_path: Path, name: str) -> None:
    base, one = llama(tmp_path / "base", 0), llama(tmp_path / "one", 1)
    own = load_file(one / "model.safetensors")
    shape, own[name] = list(own[name].shape), own[name][:-1].contiguous()
    save_file(own, one / "model.safetensors")
    said = shape_error(base, one)
    assert f"'{name}'" in said or f"'{name.removeprefix('model.')}'" in said
    assert str(shape) in said and str([shape[0] - 1, *shape[1:]]) in said


def test_embeddings_of_another_width_are_no_vocabulary(tmp_path: Path) -> None:
    base, one = llama(tmp_path / "base", 0), llama(tmp_path / "one", 1)
    own = load_file(one / "model.safetensors")
    own["model.embed_tokens.weight"] = torch.zeros(15, 9)
    save_file(own, one / "model.safetensors")
    assert "[13, 8]" in shape_error(base, one) and "[15, 9]" in shape_error(base, one)


def test_rows_fewer_than_tokens_are_an_error(tmp_path: Path) -> None:
    base, one = llama(tmp_path / "base", 0), llama(tmp_path / "one", 1)
    own = load_file(one / "model.safetensors")
    own["model.embed_tokens.weight"] = own["model.embed_tokens.weight"][:9].contiguous()
    save_file(own, one / "model.safetensors")
    assert "[9, 8]" in shape_error(base, one)


@pytest.mark.parametrize("method", ["dare_ties", "average", "emr"])
def test_the_record_is_enough_to_merge_again_bit_by_bit(
    cli: Cli, capsys: Capture, population: Path, method: str
) -> None:
    experts = ["--base", population / "base", "--experts", population / "parity", f"mine={population / 'loop'}"]
    assert cli("merge", method, *experts, "-o", "m", "--seed", "7", "--shard-size", "3KB") == 0
    assert cli("merge", "--again", "m", "-o", "n") == 0
    assert "the same bit by bit" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in Path("m").glob("*.safetensors")} == {
        p.name: p.read_bytes() for p in Path("n").glob("*.safetensors")
    }
    assert open_checkpoint("m").digest == open_checkpoint("n").digest


def test_settings_per_task_refinements_and_exports_are_made_again(cli: Cli, population: Path) -> None:
    experts = ["--base", population / "base", "--experts", population / "parity", population / "loop"]
    more = ["--scale", "parity=1,loop=0.25", "--refine", "dare:drop=0.5", "--export", "loop", "--dtype", "bfloat16"]
    assert cli("merge", "task_arithmetic", *experts, *more, "-o", "m") == 0
    assert cli("merge", "--again", "m") == 0
    assert sorted(path.name for path in Path().iterdir()) == ["lab", "m"]


@pytest.mark.parametrize(
    "file", ["head.safetensors", "masks.safetensors", "task.json", "../../unified.safetensors", "more.safetensors"]
)
def test_what_is_kept_for_a_task_is_compared_too(cli: Cli, capsys: Capture, population: Path, file: str) -> None:
    experts = ["--base", population / "base", "--experts", population / "parity", population / "loop"]
    assert cli("merge", "emr", *experts, "-o", "m") == 0
    path = Path("m/tasks/loop") / file
    if file == "task.json":
        path.write_text(json.dumps({**json.loads(path.read_text()), "rescaler": 2.0}))
    else:
        own = load_file(path) if path.exists() else {"x": torch.zeros(1)}
        save_file({name: torch.ones_like(x) for name, x in own.items()}, path)
    assert cli("merge", "--again", "m") == 1
    assert f"are not those of m: {path.resolve().relative_to(Path('m').resolve())} " in capsys.readouterr().err


def test_a_merge_is_made_again_from_any_folder(
    cli: Cli, population: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(population, "base")  # a role is no path
    experts = ["--base", "base/base", "--experts", "base/parity", "base/loop"]
    assert cli("merge", "average", *experts, "-o", "deep/m") == 0
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert cli("merge", "--again", "../deep/m") == 0
    monkeypatch.chdir(tmp_path / "deep" / "m")
    assert cli("merge", "--again", ".") == 0
    monkeypatch.chdir(tmp_path)
    shutil.rmtree("base/loop")
    monkeypatch.chdir("elsewhere")
    assert cli("merge", "--again", "../deep/m") == 2


def test_what_a_killed_comparison_left_goes_with_the_next(
    cli: Cli, population: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("merge", "average", "--experts", population / "parity", population / "loop", "-o", "m") == 0
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda *_, **__: None)
        assert cli("merge", "--again", "m") == 0
    assert (left := list(Path().glob(".m.*")))
    assert cli("merge", "--again", "m") == 0
    assert left and not list(Path().glob(".m.*"))


def test_again_without_the_old_weights_trusts_the_record(cli: Cli, capsys: Capture, population: Path) -> None:
    experts = ["--base", population / "base", "--experts", population / "parity", population / "loop"]
    assert cli("merge", "ties", *experts, "-o", "m") == 0
    Path("m/model.safetensors").unlink()
    assert cli("merge", "--again", "m", "-o", "n") == 0
    record = json.loads(Path("m/mergectl.json").read_text())
    record["output"]["digest"] = "0" * 64
    Path("m/mergectl.json").write_text(json.dumps(record))
    assert cli("merge", "--again", "m") == 1
    assert "the record says 000000000000" in capsys.readouterr().err


def test_a_changed_input_is_refused_by_name(cli: Cli, capsys: Capture, population: Path, tmp_path: Path) -> None:
    loop = tiny.change(population / "loop", tmp_path / "loop", lambda own: own)
    experts = ["--base", population / "base", "--experts", population / "parity", loop]
    assert cli("merge", "average", *experts, "-o", "m") == 0
    shutil.rmtree(loop)
    tiny.change(population / "loop", loop, lambda own: {n: w + 1e-3 for n, w in own.items()})
    assert cli("merge", "--again", "m", "-o", "n") == 2
    err = capsys.readouterr().err
    assert f"{loop}, the expert for digits/loop, has changed since" in err and not Path("n").exists()


def test_weights_that_were_tampered_with_are_named(cli: Cli, capsys: Capture, population: Path) -> None:
    experts = ["--base", population / "base", "--experts", population / "parity", population / "loop"]
    assert cli("merge", "average", *experts, "-o", "m") == 0
    own = tiny.weights(Path("m"))
    name = next(n for n in own if n.endswith("cls_token"))
    own[name][0, 0, 0] += 1e-6
    save_file(own, "m/model.safetensors", metadata={"format": "pt"})
    assert cli("merge", "--again", "m") == 1
    assert f"'{name}' differs" in capsys.readouterr().err


OUTPUTS: tuple[Any, ...] = (
    True, {"dtype": "x"}, {"dtype": []}, {"export": []}, {"shard_bytes": []}, {"options": [None]}, {"options": True},
)  # fmt: skip


@pytest.mark.parametrize(
    "spoil",
    [lambda r: {}, lambda r: {**r, "recipe": 3}, lambda r: {**r, "inputs": [{}]}, lambda r: {**r, "tasks": {}},
     *(lambda r, own=own: {**r, "output": own} for own in OUTPUTS)],
    ids=["empty", "recipe", "inputs", "tasks", *map(str, OUTPUTS)],
)  # fmt: skip
def test_a_record_that_is_not_whole_is_refused(cli: Cli, capsys: Capture, population: Path, spoil: Any) -> None:
    assert cli("merge", "average", "--experts", population / "parity", population / "loop", "-o", "m") == 0
    record = json.loads(Path("m/mergectl.json").read_text())
    Path("m/mergectl.json").write_text(json.dumps(spoil(record)))
    assert cli("merge", "--again", "m") == 2
    assert "is no whole record of a merge" in capsys.readouterr().err


def test_again_needs_a_record_and_nothing_else(cli: Cli, capsys: Capture, population: Path) -> None:
    assert cli("merge", "--again", population / "base") == 2
    assert "has no mergectl.json" in capsys.readouterr().err
    assert cli("merge", "--again", "m", "ties", "--experts", "a", "-o", "n") == 2
    assert "--again takes the method" in capsys.readouterr().err


class Hub:
    """Stands in for the model hub's interface."""

    calls: list[tuple[str, dict[str, Any]]]
    error: Exception | None = None

    def create_repo(self, repo: str, **facts: Any) -> str:
        type(self).calls.append(("create", {"repo": repo, **facts}))
        return f"hub/{repo}"

    def upload_folder(self, **facts: Any) -> None:
        if self.error is not None:
            raise self.error
        files = sorted(path.name for path in Path(facts["folder_path"]).iterdir())
        type(self).calls.append(("upload", {**facts, "files": files}))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    Hub.calls, Hub.error = [], None
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    return Hub


@pytest.mark.parametrize("public", [False, True])
def test_a_finished_folder_is_pushed(cli: Cli, capsys: Capture, population: Path, hub: type[Hub], public: bool) -> None:
    more = ["--push", "me/merged", *(["--public"] if public else [])]
    experts = [population / "parity", population / "loop"]
    assert cli("--json", "merge", "average", "--experts", *experts, "-o", "m", *more) == 0
    assert json.loads(capsys.readouterr().out)["pushed"] == "hub/me/merged"
    (made, what), (sent, how) = hub.calls
    assert (made, what) == ("create", {"repo": "me/merged", "private": not public, "exist_ok": True})
    assert (sent, how["repo_id"], how["folder_path"]) == ("upload", "me/merged", "m")
    assert {"model.safetensors", "config.json", "README.md", "mergectl.json", "tasks"} <= set(how["files"])


def test_a_recipe_file_is_pushed_too(cli: Cli, population: Path, hub: type[Hub]) -> None:
    recipe = {"method": "average", "experts": [str(population / "parity"), str(population / "loop")]}
    Path("r.yaml").write_text(json.dumps(recipe))
    assert cli("merge", "-c", "r.yaml", "-o", "m", "--push", "me/x", "--shard-size", "3KB") == 0
    assert [name for name, _ in hub.calls] == ["create", "upload"]
    assert len(list(Path("m").glob("model-*.safetensors"))) > 1


def test_a_push_that_fails_leaves_the_model_and_says_how_to_go_on(
    cli: Cli, capsys: Capture, population: Path, hub: type[Hub]
) -> None:
    hub.error = ConnectionError("no route")
    experts = [population / "parity", population / "loop"]
    assert cli("merge", "average", "--experts", *experts, "-o", "m", "--push", "me/merged") == 1
    err = capsys.readouterr().err
    assert "is complete in m, but was not pushed to me/merged: no route" in err and "hf upload me/merged m" in err
    assert Path("m/model.safetensors").exists()


@pytest.mark.parametrize("repo", ["merged", "a/b/c", "a/..", "a/-b", "", "a/b c", "../x", "ü/x", "a/b.git"])
def test_what_is_no_name_on_the_hub_is_refused_before_any_work(
    cli: Cli, capsys: Capture, population: Path, hub: type[Hub], repo: str
) -> None:
    experts = [population / "parity", population / "loop"]
    assert cli("merge", "average", "--experts", *experts, "-o", "m", "--push", repo) == 2
    assert "is not a name on the hub" in capsys.readouterr().err
    assert hub.calls == [] and not Path("m").exists()


def test_public_alone_is_refused(cli: Cli, capsys: Capture, population: Path) -> None:
    assert cli("merge", "average", "--experts", population / "parity", "-o", "m", "--public") == 2
    assert "Add --push ORG/NAME" in capsys.readouterr().err


def test_the_card_names_its_parents_on_the_hub(cli: Cli, population: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, **_: str(population / repo.split("/")[1]))
    assert (
        cli("merge", "average", "--base", "org/base@v1", "--experts", "org/parity", population / "loop", "-o", "m") == 0
    )
    head = Path("m/README.md").read_text().split("---")[1]
    assert "base_model:\n- org/base\n- org/parity\nbase_model_relation: merge" in head


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSPC])
def test_a_file_system_that_takes_no_room_beforehand_is_written_all_the_same_and_a_full_one_told(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    path, weight = tmp_path / "m.safetensors", torch.arange(6.0)
    if code == errno.ENOSPC:
        with pytest.raises(OSError, match="No space left"):
            SafetensorsWriter(path, {"w": (6,)}, {"w": "F32"})
        return
    with SafetensorsWriter(path, {"w": (6,)}, {"w": "F32"}) as writer:
        writer.write("w", weight)
    assert torch.equal(load_file(path)["w"], weight)


@pytest.mark.parametrize(
    "name",
    ["spm.model", "normalizer.json", "generation_config.json", "chat_template.jinja", "chat_template.json",
     "qwen.tiktoken", "additional_chat_templates/tools.jinja"],
)  # fmt: skip
def test_files_of_tokenizers_and_of_generation_are_carried(name: str, cli: Cli, population: Path) -> None:
    (population / "base" / name).parent.mkdir(exist_ok=True)
    (population / "base" / name).write_text(json.dumps(name))
    experts = [population / "parity", population / "loop"]
    assert cli("merge", "average", "--base", population / "base", "--experts", *experts, "-o", "m") == 0
    assert Path("m", name).read_text() == json.dumps(name)


def test_a_head_that_only_some_have_is_kept_aside_and_told(cli: Cli, capsys: Capture, tmp_path: Path) -> None:
    base, one = llama(tmp_path / "base", 0, tied=True), llama(tmp_path / "one", 1)
    two = llama(tmp_path / "two", 2, tied=True)
    assert cli("merge", "task_arithmetic", *words(base, one, two), "--quiet") == 0
    told = "The base has no 'lm_head.weight', so that of 'one' is merged with none: kept in tasks/one alone."
    assert told in Path("m/README.md").read_text()
    assert "'two' is merged with none" not in Path("m/README.md").read_text()
    assert torch.equal(load_file("m/tasks/one/head.safetensors")["lm_head.weight"], weights(one)["lm_head.weight"])


def test_a_model_that_brings_its_own_code_keeps_it(cli: Cli, tmp_path: Path) -> None:
    base, one, two = (llama(tmp_path / name, seed) for seed, name in enumerate(("base", "one", "two")))
    for folder in (base, one):
        (folder / "configuration_own.py").write_text(
            "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        )
        (folder / "modeling_own.py").write_text(
            "from transformers import LlamaForCausalLM\n\nfrom .configuration_own import OwnConfig\n\n\n"
            "class Own(LlamaForCausalLM):\n    config_class = OwnConfig\n"
        )
    (two / "train.py").write_text("raise SystemExit\n")
    own = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": own}))
    assert cli("merge", "task_arithmetic", *words(base, one, two)) == 0
    assert sorted(path.name for path in Path("m").glob("*.py")) == ["configuration_own.py", "modeling_own.py"]
    from transformers import AutoModelForCausalLM

    with quiet():
        model = AutoModelForCausalLM.from_pretrained("m", trust_remote_code=True)
    assert type(model).__name__ == "Own"
    assert torch.equal(model.model.norm.weight, weights(Path("m"))["model.norm.weight"])
