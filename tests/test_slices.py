"""Slices: models put together from layers of others are those that one would build by hand."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mergectl import merge_weights
from mergectl.checkpoints import open_checkpoint
from mergectl.errors import UserError
from mergectl.layers import is_front, restacked, stacks
from mergectl.models import quiet
from mergectl.refs import Stack, ref_of
from tests.conftest import Cli
from tests.population import change

Weights = dict[str, torch.Tensor]
LAYERS = 4
SMALL: dict[str, Any] = {
    "vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 16,
}  # fmt: skip
IDS = torch.tensor([[1, 5, 7, 3, 9]])


def make(folder: Path, name: str, kind: str = "Llama", seed: int = 0, **facts: Any) -> Path:
    """Save a tiny language model with weights of its own."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**(facts or SMALL))
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for weight in model.parameters():
            weight.data += 0.3 * torch.randn(weight.shape)
        model.save_pretrained(folder / name)
    return folder / name


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tiny Llamas of four layers: a, b and c."""
    folder = tmp_path_factory.mktemp("llamas")
    for seed, name in enumerate("abc"):
        make(folder, name, seed=seed)
    return folder


@pytest.fixture
def here(llamas: Path) -> Path:
    """Work where `models/...` are the tiny Llamas."""
    Path("models").symlink_to(llamas)
    return llamas


def weights(name: str) -> Weights:
    return dict(load_file(Path("models") / name / "model.safetensors"))


def by_hand(layers: list[tuple[str, int]], front: str, back: str) -> Weights:
    """The weights of a model whose layers are those of others, copied one by one."""
    found = {"model.embed_tokens.weight": weights(front)["model.embed_tokens.weight"]}
    found |= {name: weights(back)[name] for name in ("model.norm.weight", "lm_head.weight")}
    for number, (model, layer) in enumerate(layers):
        own = {n: x for n, x in weights(model).items() if n.startswith(f"model.layers.{layer}.")}
        found |= {n.replace(f"layers.{layer}.", f"layers.{number}."): x for n, x in own.items()}
    return found


def run(cli: Cli, text: str, out: str = "out") -> Weights:
    Path("recipe.yml").write_text(text)
    assert cli("merge", "-c", "recipe.yml", "-o", out) == 0
    return dict(load_file(f"{out}/model.safetensors"))


def logits(folder: str | Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with quiet(), torch.no_grad():
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
        assert not any(info.values()), info
        found: torch.Tensor = model.eval()(IDS).logits
    return found


def assert_same(got: Weights, expected: Weights, atol: float = 0.0) -> None:
    assert set(got) == set(expected)
    for name, x in expected.items():
        torch.testing.assert_close(got[name], x, rtol=0, atol=atol, msg=f"{name} differs")


FRANKEN = """
slices:
  - sources:
    - model: models/a
      layer_range: [0, 3]
  - sources:
    - model: models/b
      layer_range: [1, 4]
merge_method: passthrough
"""


def test_a_frankenmerge_is_the_model_built_by_hand(cli: Cli, here: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    expected = by_hand([("a", 0), ("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b", 3)], front="a", back="b")
    assert_same(run(cli, FRANKEN), expected)
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_hidden_layers": 6})).eval()
    model.load_state_dict(expected)
    with torch.no_grad():
        torch.testing.assert_close(logits("out"), model(IDS).logits, rtol=0, atol=0)


def test_depth_up_scaling_repeats_layers_of_one_model(cli: Cli, here: Path) -> None:
    got = run(cli, FRANKEN.replace("models/b", "models/a") + "dtype: bfloat16\n")
    expected = by_hand([("a", layer) for layer in (0, 1, 2, 1, 2, 3)], front="a", back="a")
    assert_same(got, {name: x.bfloat16() for name, x in expected.items()})
    config = json.loads(Path("out/config.json").read_text())
    assert (config["num_hidden_layers"], config["dtype"]) == (6, "bfloat16")


EXPANDED = """
slices:
  - sources:
    - model: models/a
      layer_range: [0, 2]
  - sources:
    - model: models/a
      layer_range: [1, 2]
      parameters:
        scale:
          - filter: o_proj
            value: 0.0
          - filter: down_proj
            value: 0.0
          - value: 1.0
  - sources:
    - model: models/a
      layer_range: [2, 4]
merge_method: passthrough
"""


def test_new_layers_scaled_to_nothing_leave_what_the_model_computes(cli: Cli, here: Path) -> None:
    got = run(cli, EXPANDED)
    zero = {name for name, x in got.items() if not x.any()}
    assert zero == {"model.layers.2.self_attn.o_proj.weight", "model.layers.2.mlp.down_proj.weight"}
    torch.testing.assert_close(logits("out"), logits("models/a"), rtol=0, atol=1e-6)


SLERPED = """
slices:
  - sources:
      - {model: models/a, layer_range: [0, 2]}
      - {model: models/b, layer_range: [0, 2]}
    parameters: {t: [0, 1]}
  - sources:
      - {model: models/a, layer_range: [1, 4]}
      - {model: models/c, layer_range: [0, 3]}
    parameters:
      t:
        - filter: mlp
          value: [0.2, 0.4, 0.6]
        - value: 0.5
merge_method: slerp
base_model: models/a
"""


def test_slices_have_their_own_models_and_gradients(cli: Cli, here: Path) -> None:
    got = run(cli, SLERPED)
    one = by_hand([("a", layer) for layer in (0, 1, 1, 2, 3)], "a", "a")
    other = by_hand([("b", 0), ("b", 1), ("c", 0), ("c", 1), ("c", 2)], "b", "c")
    for name, x in got.items():
        layer = int(name.split(".")[2]) if "layers" in name else -1
        t = {0: 0.0, 1: 1.0}.get(layer, [0.2, 0.4, 0.6][layer - 2] if "mlp" in name else 0.5)
        t = 0.0 if name == "model.embed_tokens.weight" else t
        alone = {task: {name: w[name]} for task, w in (("one", one), ("other", other))}
        torch.testing.assert_close(x, merge_weights("slerp", None, alone, t=t)[name], rtol=0, atol=1e-6, msg=name)
    names = [row["task"] for row in json.loads(Path("out/mergectl.json").read_text())["inputs"]]
    assert names == ["a", "stack"]


FILTERED = """
slices:
  - sources:
      - {model: models/a, layer_range: [1, 3], parameters: {weight: [{filter: layers.2., value: 0.9}, {value: 0.2}]}}
      - {model: models/b, layer_range: [0, 2], parameters: {weight: [{filter: layers.0., value: 0.6}, {value: 0.3}]}}
  - sources:
      - {model: models/a, layer_range: [0, 1], parameters: {weight: [{filter: layers.0., value: 0.4}, {value: 0.5}]}}
      - {model: models/b, layer_range: [2, 3], parameters: {weight: 0.1}}
merge_method: linear
parameters:
  normalize: [{filter: layers.0., value: true}, {value: false}]
"""


def test_filters_look_at_the_names_that_a_weight_has_in_each_model_and_in_the_result(cli: Cli, here: Path) -> None:
    got = run(cli, FILTERED)
    a, b = by_hand([("a", 1), ("a", 2), ("a", 0)], "a", "a"), by_hand([("b", 0), ("b", 1), ("b", 2)], "b", "b")
    shares = {0: (0.25, 0.75), 1: (0.9, 0.3), 2: (0.4, 0.1)}  # of the result's first layer, normalised
    for name, x in got.items():
        outer = (0.5, 0.1) if name in ("model.norm.weight", "lm_head.weight") else (0.2, 0.3)
        of_a, of_b = shares[int(name.split(".")[2])] if "layers" in name else outer
        torch.testing.assert_close(x, of_a * a[name] + of_b * b[name], rtol=0, atol=1e-6, msg=name)


TIES = """
slices:
  - sources:
      - {model: models/a, layer_range: [0, 1]}
      - {model: models/b, layer_range: [0, 1], parameters: {weight: 0.7}}
      - {model: models/c, layer_range: [0, 1], parameters: {weight: 0.2, density: 0.5}}
  - sources:
      - {model: models/a, layer_range: [3, 4]}
      - {model: models/c, layer_range: [3, 4]}
    parameters: {weight: 0.4, density: 0.3}
merge_method: ties
base_model: models/a
"""


def test_ties_merges_task_vectors_of_layers_and_a_slice_may_have_fewer_models(cli: Cli, here: Path) -> None:
    got = run(cli, TIES)
    base = by_hand([("a", 0), ("a", 3)], "a", "a")
    first, second = by_hand([("b", 0), ("c", 3)], "b", "c"), by_hand([("c", 0), ("c", 3)], "c", "c")
    given: dict[str, Any] = {"scope": "tensor", "exact": True, "zero_sign": "plus", "combine": "disjoint_mean"}
    for name, x in got.items():
        early = name == "model.embed_tokens.weight" or "layers.0." in name
        models = {"one": {name: first[name]}, **({"two": {name: second[name]}} if early else {})}
        own = {"weight": (0.7, 0.2), "density": (1.0, 0.5)} if early else {"weight": 0.4, "density": 0.3}
        expected = merge_weights("ties", {name: base[name]}, models, **given, **own)
        torch.testing.assert_close(x, expected[name], rtol=0, atol=1e-6, msg=f"{name} differs")


@pytest.mark.parametrize("name", ["linear", "dare_linear", "della", "breadcrumbs_ties", "task_arithmetic"])
def test_a_model_of_weight_zero_stands_where_a_slice_has_fewer(name: str, cli: Cli, here: Path) -> None:
    base = "      - {model: models/a, layer_range: [0, 1]}\n"
    text = f"""
slices:
  - sources:
{base}      - {{model: models/b, layer_range: [0, 1], parameters: {{weight: 1}}}}
  - sources:
{base}      - {{model: models/b, layer_range: [0, 1], parameters: {{weight: 1}}}}
      - {{model: models/c, layer_range: [0, 1], parameters: {{weight: 1}}}}
merge_method: {name}
base_model: models/a
"""
    if name == "linear":
        text = text.replace("{model: models/a, layer_range: [0, 1]}", "{model: models/a, layer_range: [0, 1], %s}")
        text = text.replace("%s", "parameters: {weight: 1}")
    got = run(cli, text)
    expected = by_hand([("b", 0)], "b", "b")
    if name == "linear":
        expected = {key: (x + by_hand([("a", 0)], "a", "a")[key]) / 2 for key, x in expected.items()}
    for key in (key for key in got if "layers.0." in key or "embed" in key):
        torch.testing.assert_close(got[key], expected[key], rtol=0, atol=1e-6, msg=f"{key} differs")


def test_a_slice_of_the_base_alone_stays_the_bases(cli: Cli, here: Path) -> None:
    text = """
merge_method: task_arithmetic
base_model: models/a
slices:
- sources: [{model: models/a, layer_range: [0, 1]}]
- sources:
  - {model: models/a, layer_range: [1, 3]}
  - {model: models/b, layer_range: [1, 3], parameters: {weight: 0.5}}
"""
    got, base, one = run(cli, text), weights("a"), weights("b")
    for name in (name for name in got if ".layers." in name):
        share = 0.0 if ".layers.0." in name else 0.5
        torch.testing.assert_close(got[name], base[name] + share * (one[name] - base[name]), atol=1e-6, rtol=1e-6)


def test_such_merges_are_made_again_bit_by_bit(cli: Cli, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(cli, FRANKEN, "franken")
    run(cli, SLERPED, "slerped")
    run(cli, TIES.replace("ties", "dare_ties"), "dare")
    assert [cli("merge", "--again", folder) for folder in ("franken", "slerped", "dare")] == [0, 0, 0]
    assert capsys.readouterr().out.count("are the same bit by bit") == 3


def test_the_record_says_which_layers_came_from_where(cli: Cli, here: Path) -> None:
    run(cli, FRANKEN)
    record = json.loads(Path("out/mergectl.json").read_text())
    (row,) = record["inputs"]
    assert row["ref"] == "models/a[0:3] + models/b[1:4]"
    layers = (*(("models/a", n) for n in (0, 1, 2)), *(("models/b", n) for n in (1, 2, 3)))
    assert ref_of(row) == Stack(layers, "models/a", "models/b", "models/a")
    assert record["notes"][0].startswith("Made of layers, models/a[0:3] + models/b[1:4]; the rest is that of models/a")


def test_a_model_that_changed_is_noticed(cli: Cli, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    Path("models").unlink()
    shutil.copytree(here, "models")
    run(cli, FRANKEN)
    shutil.copyfile("models/c/model.safetensors", "models/b/model.safetensors")
    assert cli("merge", "--again", "out") == 2
    assert "has changed since it was merged" in capsys.readouterr().err


def test_a_source_is_never_replaced_by_the_result(cli: Cli, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.yml").write_text(FRANKEN)
    assert cli("merge", "-c", "recipe.yml", "-o", "models/b", "--force") == 2
    assert "models/b is one of the models to merge" in capsys.readouterr().err


def test_tied_heads_stay_tied(cli: Cli, tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        make(Path("models"), name, seed=seed, **SMALL, tie_word_embeddings=True)
    got = run(cli, FRANKEN)
    assert "lm_head.weight" not in got
    torch.testing.assert_close(got["model.embed_tokens.weight"], weights("a")["model.embed_tokens.weight"])
    assert logits("out").isfinite().all()


def test_a_model_with_a_head_and_one_without_do_not_go_together(
    cli: Cli, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(Path(), "tied", **SMALL, tie_word_embeddings=True)
    Path("recipe.yml").write_text(FRANKEN.replace("models/b", "tied"))
    assert cli("merge", "-c", "recipe.yml", "-o", "out") == 2
    assert "models/a has 'lm_head.weight' and tied has not, so their layers" in capsys.readouterr().err


GPT: dict[str, Any] = {
    "vocab_size": 20, "n_embd": 8, "n_layer": LAYERS, "n_head": 2, "n_positions": 16, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
BARE: dict[str, Any] = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
LISTED = {**SMALL, "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]}
FAMILIES: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], Any], Any]] = {
    "GPT2": (GPT, lambda config: config["n_layer"], 6),
    "GPTNeoX": (BARE, lambda config: config["num_hidden_layers"], 6),
    "Bloom": ({"vocab_size": 20, "hidden_size": 8, "n_layer": LAYERS, "n_head": 2}, lambda c: c["n_layer"], 6),
    "OPT": ({**BARE, "ffn_dim": 12, "word_embed_proj_dim": 8}, lambda config: config["num_hidden_layers"], 6),
    "Mixtral": ({**SMALL, "num_local_experts": 2}, lambda config: config["num_hidden_layers"], 6),
    "Gemma2": (
        {**LISTED, "head_dim": 4}, lambda config: "".join(word[0] for word in config["layer_types"]), "sfs" + "fsf",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAMILIES)
def test_layers_are_found_in_every_family_and_counted_in_its_own_words(kind: str, cli: Cli) -> None:
    facts, ask, expected = FAMILIES[kind]
    for seed, name in enumerate("ab"):
        make(Path("models"), name, kind, seed, **facts)
    run(cli, FRANKEN)
    assert ask(json.loads(Path("out/config.json").read_text())) == expected
    a, b = logits("models/a"), logits("models/b")
    assert logits("out").shape == a.shape
    assert not torch.equal(logits("out"), a) and not torch.equal(logits("out"), b)


def test_a_model_with_two_stacks_of_layers_is_refused(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import T5Config, T5Model

    config = T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    T5Model(config).save_pretrained("models/t5")
    text = FRANKEN.replace("models/b", "models/t5").replace("models/a", "models/t5")
    Path("recipe.yml").write_text(text.replace("[0, 3]", "[0, 1]").replace("[1, 4]", "[1, 2]"))
    assert cli("merge", "-c", "recipe.yml", "-o", "out") == 2
    assert "several stacks of layers, 'decoder.block.' and 'encoder.block.'" in capsys.readouterr().err


def test_a_configuration_that_counts_otherwise_is_refused(here: Path) -> None:
    import shutil

    shutil.copytree(here / "a", "odd")
    config = json.loads(Path("odd/config.json").read_text())
    Path("odd/config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(UserError, match="odd does not say that it has 4 layers, as its weights do"):
        open_checkpoint(Stack((("odd", 0),), "odd", "odd", "odd"))


def test_lists_of_layers_follow_the_layers() -> None:
    config = {"num_layers": 3, "layer_types": ["a", "b", "c"], "mlp_only_layers": [1], "eos_token_id": [1, 2, 3]}
    found = restacked(config, [(config, n) for n in (0, 1, 1, 2)], 3, "x")
    assert found == {
        "num_layers": 4, "layer_types": ["a", "b", "b", "c"], "mlp_only_layers": [1, 2], "eos_token_id": [1, 2, 3],
    }  # fmt: skip


def test_a_list_that_another_model_has_shorter_is_refused() -> None:
    config = {"num_layers": 2, "layer_types": ["a", "b"]}
    with pytest.raises(UserError, match="disagree on 'layer_types'"):
        restacked(config, [(config, 0), ({"layer_types": ["a"]}, 1), (config, 1)], 2, "x")


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "transformer.wte.weight", "gpt_neox.embed_in.weight", "embeddings.LayerNorm.bias",
     "transformer.word_embeddings_layernorm.weight", "bert.embeddings.word_embeddings.weight",
     "model.decoder.embed_positions.weight", "backbone.embeddings.weight"],
)  # fmt: skip
def test_embeddings_come_before_the_layers(name: str) -> None:
    assert is_front(name)


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "lm_head.weight", "embed_out.weight", "transformer.ln_f.bias", "pooler.dense.weight"]
)
def test_norms_and_heads_come_after_the_layers(name: str) -> None:
    assert not is_front(name)


def test_a_short_numbered_list_is_no_stack_of_layers() -> None:
    names = [f"h.{n}.{part}" for n in range(3) for part in "abcd"]
    assert stacks([*names, "head.0.weight", "head.1.weight"]) == {"h.": 3}


def without(source: Path, target: Path, name: str) -> Path:
    """Copy a model, but for one weight."""
    return change(source, target, lambda found: {own: x for own, x in found.items() if own != name})


def test_a_layer_that_lacks_what_others_of_its_model_have_is_told(
    cli: Cli, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without(here / "a", tmp_path / "lame", "model.layers.1.mlp.up_proj.weight")
    text = f"merge_method: passthrough\nslices:\n  - sources: [{{model: {tmp_path}/lame, layer_range: [0, 2]}}]\n"
    run(cli, f"{text}  - sources: [{{model: models/b, layer_range: [0, 1]}}]\n", "told")
    told = "Layer 1 of {}/lame has no 'mlp.up_proj.weight', which its other layers have."
    assert told.format(tmp_path) in capsys.readouterr().err.replace("\n", " ")
    assert "has no 'mlp.up_proj.weight'" in Path("told/README.md").read_text()


@pytest.mark.parametrize("base", [True, False])
def test_weights_that_only_experts_have_are_told(
    base: bool, cli: Cli, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"vision_tower.layers.0.q.weight": torch.ones(2, 2), "projector.weight": torch.ones(2)}
    for name in "bc":
        change(here / name, tmp_path / name, lambda found: found | more)
    experts = [tmp_path / "b", tmp_path / "c"] if base else [here / "a", tmp_path / "b", tmp_path / "c"]
    given = ["--base", here / "a"] if base else []
    assert cli("merge", "average", *given, "--experts", *experts, "-o", "seen") == 0
    told = " ".join(capsys.readouterr().err.split())
    for name in "bc":
        assert "The base has no 'vision_tower.layers.0.q.weight', 'projector.weight'" in told or (
            "The base has no 'projector.weight', 'vision_tower.layers.0.q.weight'" in told
        )
        assert f"'{name}' has them merged with none: kept in tasks/{name} alone." in told
        assert set(load_file(f"seen/tasks/{name}/head.safetensors")) == set(more)
        assert Path(f"seen/tasks/{name}/head.safetensors").stat().st_mode & 0o777 == 0o666 & ~_umask()
    assert "vision_tower" in Path("seen/README.md").read_text()


def _umask() -> int:
    Path("plain").touch()
    return 0o666 & ~Path("plain").stat().st_mode


def test_a_limit_on_the_size_of_files_is_told(
    cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def limited(handle: int, size: int) -> None:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr("os.ftruncate", limited)
    assert cli("merge", "average", "--experts", here / "a", here / "b", "-o", "big") == 1
    assert "Try a smaller --shard-size" in capsys.readouterr().err
    assert not Path("big").exists()


@pytest.mark.parametrize(
    ("listed", "slices", "told"),
    [
        ({}, ([0, 1], [0, 2]), "layer 1 of the result, which is layer 0 of {}/mixed"),
        ({}, ([0, 2], [2, 3]), ""),
        ({}, ([0, 2], [0, 2]), "layer 3 of the result, which is layer 1 of {}/mixed"),
        ({"mlp_layer_types": ["dense", "sparse", "dense", "dense"]}, ([0, 1], [0, 2]), ""),
        ({"sparse_layers": [1]}, ([0, 1], [0, 2]), ""),
        ({"layer_types": ["full"] * 4}, ([0, 1], [0, 2]), "layer 1 of the result"),
    ],
)
def test_a_layer_of_another_kind_than_its_place_is_told(
    listed: dict[str, Any], slices: tuple[list[int], ...], told: str, cli: Cli, here: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    mixed = change(
        here / "a", tmp_path / "mixed",
        lambda found: {name.replace("layers.1.mlp.", "layers.1.moe."): x for name, x in found.items()},
    )  # fmt: skip
    config = json.loads((mixed / "config.json").read_text())
    (mixed / "config.json").write_text(json.dumps(config | listed))
    lines = [f"  - sources: [{{model: {mixed}, layer_range: {part}}}]\n" for part in slices]
    run(cli, f"merge_method: passthrough\nslices:\n{''.join(lines)}", "made")
    said = capsys.readouterr().err.replace("\n", " ")
    assert ("may take" in said) == bool(told)
    assert told.format(tmp_path) in said
