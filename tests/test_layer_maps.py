"""Layer maps: experts of another depth on the layers of the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergectl import merge_weights
from mergectl.errors import UserError
from mergectl.layer_maps import LayerMap, given, parse
from mergectl.models import quiet
from tests.conftest import Cli

Weights = dict[str, torch.Tensor]
SMALL: dict[str, Any] = {
    "vocab_size": 17, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12, "num_hidden_layers": 6,
    "max_position_embeddings": 16, "pad_token_id": 0,
}  # fmt: skip
MAPS = {"prefix": [0, 1, 2], "uniform": [1, 3, 5], "0:4,1:0,2:3": [4, 0, 3]}


def make(kind: str, folder: str, seed: int, **facts: Any) -> None:
    import transformers

    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = transformers.BertConfig(**{**SMALL, **facts})
        getattr(transformers, kind)(config).save_pretrained(folder)


@pytest.fixture(autouse=True)
def models(own_lab: Path) -> None:
    """A base of six layers, and classifiers of three (`tiny`, `small`) and of six (`whole`) layers."""
    make("BertModel", "base", 0)
    make("BertForSequenceClassification", "tiny", 1, num_hidden_layers=3)
    make("BertForSequenceClassification", "small", 2, num_hidden_layers=3)
    make("BertForSequenceClassification", "whole", 3)


def weights(folder: str) -> Weights:
    return {name.removeprefix("bert."): x for name, x in load_file(f"{folder}/model.safetensors").items()}


def put(folder: str, at: list[int]) -> Weights:
    """A model's weights with its layers under other numbers."""
    found = {}
    for name, x in weights(folder).items():
        parts = name.split(".")
        if name.startswith("encoder.layer."):
            parts[2] = str(at[int(parts[2])])
        found[".".join(parts)] = x
    return found


def merged(cli: Cli, *words: str) -> Weights:
    assert cli("merge", *words, "--base", "base", "-o", "out") == 0
    return dict(load_file("out/model.safetensors"))


@pytest.mark.parametrize("text", MAPS)
def test_layers_with_a_partner_are_merged_and_the_others_are_the_bases(text: str, cli: Cli) -> None:
    got = merged(cli, "interpolate", "--experts", "glue/rte=tiny", "--alpha", "0.3", "--layer-map", text)
    base, tiny = weights("base"), put("tiny", MAPS[text])
    assert set(got) == set(base)
    expected = {n: 0.7 * x + 0.3 * tiny[n] if n in tiny else x for n, x in base.items()}
    for name, x in got.items():
        torch.testing.assert_close(x, expected[name], rtol=0, atol=1e-6 if name in tiny else 0, msg=name)
    # Five embeddings, sixteen weights in each layer, and the pooler; a few are equal from the start (zero biases).
    assert sum(name in tiny for name in got) == 5 + 16 * 3 + 2


def test_both_ends_are_exact(cli: Cli) -> None:
    words = ("interpolate", "--experts", "tiny", "--layer-map", "prefix", "--force", "--alpha")
    base, tiny = weights("base"), weights("tiny")
    assert all(torch.equal(x, base[name]) for name, x in merged(cli, *words, "0").items())
    assert all(torch.equal(x, tiny.get(name, base[name])) for name, x in merged(cli, *words, "1").items())


def test_a_task_vector_is_zero_where_an_expert_has_no_layer(cli: Cli) -> None:
    got = merged(cli, "ties", "--experts", "tiny", "whole", "--layer-map", "tiny=uniform", "--density", "0.4")
    base = weights("base")
    tiny = {**base, **{name: x for name, x in put("tiny", [1, 3, 5]).items() if name in base}}
    expected = merge_weights("ties", base, {"tiny": tiny, "whole": weights("whole")}, density=0.4)
    for name, x in got.items():
        torch.testing.assert_close(x, expected[name], rtol=0, atol=1e-6, msg=name)


def test_a_map_without_a_name_is_that_of_all_experts_of_another_depth(cli: Cli) -> None:
    merged(cli, "average", "--experts", "tiny", "small", "whole", "--layer-map", "uniform")
    refs = [row["ref"] for row in json.loads(Path("out/mergectl.json").read_text())["inputs"]]
    uniform = "base[0:1] + {0}[0:1] + base[2:3] + {0}[1:2] + base[4:5] + {0}[2:3]"
    assert refs == ["base", uniform.format("tiny"), uniform.format("small"), "whole"]


def test_the_result_can_have_the_experts_depth(cli: Cli) -> None:
    from transformers import BertModel

    got = merged(
        cli, "interpolate", "--experts", "tiny", "--alpha", "0.5", "--layer-map", "uniform", "--depth", "small"
    )
    base, tiny = weights("base"), weights("tiny")
    for name, x in got.items():
        parts = name.split(".")
        if name.startswith("encoder.layer."):
            parts[2] = str([1, 3, 5][int(parts[2])])
        torch.testing.assert_close(x, (base[".".join(parts)] + tiny[name]) / 2, rtol=0, atol=1e-6, msg=name)
    with quiet():
        model, info = BertModel.from_pretrained("out", output_loading_info=True)
    assert model.config.num_hidden_layers == 3
    assert not any(info.values()), info


def test_an_expert_goes_out_as_a_classifier_of_the_bases_depth(cli: Cli) -> None:
    from transformers import BertForSequenceClassification

    merged(cli, "interpolate", "--experts", "glue/rte=tiny", "--layer-map", "prefix", "--export", "rte")
    with quiet():
        model, info = BertForSequenceClassification.from_pretrained("out", output_loading_info=True)
    assert model.config.num_hidden_layers == 6
    assert not any(info.values()), info
    torch.testing.assert_close(model.classifier.weight, load_file("tiny/model.safetensors")["classifier.weight"])
    last = model.bert.encoder.layer[5].output.dense.weight
    torch.testing.assert_close(last, weights("base")["encoder.layer.5.output.dense.weight"])


def test_a_base_with_the_old_names_of_layer_norm_lends_its_layers(cli: Cli) -> None:
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
        for name, x in weights("base").items()
    }
    save_file(old, "base/model.safetensors", metadata={"format": "pt"})
    got = merged(cli, "interpolate", "--experts", "tiny", "--alpha", "1", "--layer-map", "prefix")
    tiny = weights("tiny")
    assert set(got) == set(old)
    for name, x in got.items():
        new = name.replace("gamma", "weight").replace("beta", "bias")
        assert torch.equal(x, tiny.get(new, old[name])), name


def test_a_mapped_merge_is_made_again_bit_by_bit(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    merged(cli, "ties", "--experts", "tiny", "whole", "--layer-map", "tiny=0:5,1:0,2:2")
    assert cli("merge", "--again", "out") == 0
    merged(cli, "average", "--experts", "tiny", "--layer-map", "uniform", "--depth", "small", "--force")
    assert cli("merge", "--again", "out") == 0
    assert capsys.readouterr().out.count("are the same bit by bit") == 2


def test_a_recipe_file_says_the_same(cli: Cli) -> None:
    text = "method: interpolate\nbase: base\nexperts: {rte: tiny}\nsettings: {alpha: 0.4}\n"
    Path("recipe.yml").write_text(f"{text}layer_map: {{rte: {{0: 1, 1: 3, 2: 5}}}}\ndepth: base\n")
    assert cli("merge", "-c", "recipe.yml", "-o", "filed") == 0
    got = merged(cli, "interpolate", "--experts", "rte=tiny", "--alpha", "0.4", "--layer-map", "uniform")
    filed = load_file("filed/model.safetensors")
    assert all(torch.equal(x, filed[name]) for name, x in got.items())


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, {}), ("uniform", {None: "uniform"}), ({0: 1, 1: 3}, {None: {0: 1, 1: 3}}),
     ({"a": "prefix", "b": {0: 2}}, {"a": "prefix", "b": {0: 2}})],
)  # fmt: skip
def test_maps_in_a_file(value: Any, expected: Any) -> None:
    assert given(value, "base") == LayerMap(expected)


def test_maps_as_typed() -> None:
    assert parse(["a=0:1,1:3", "uniform"], "small") == LayerMap({"a": {0: 1, 1: 3}, None: "uniform"}, "expert")


WRONG: dict[tuple[str, ...], str] = {
    ("--layer-map", "unifrom"): "got 'unifrom'. Did you mean 'uniform'?",
    ("--layer-map", "0:1,0:2"): "got '0:1,0:2'.",
    ("--layer-map", "0:1,1:2"): "The layer map says nothing of layer 2 of tiny, which has 3.",
    ("--layer-map", "0:1,1:2,2:6"): "The layer map names layer 6: tiny has 3, base has 6.",
    ("--layer-map", "0:1,1:2,2:2"): "The layer map puts two layers of the expert onto one of the base.",
    ("--layer-map", "0:1,1:2,2:3,3:4"): "The layer map names layer 3: tiny has 3, base has 6.",
    ("--layer-map", "teeny=uniform"): "There is no expert 'teeny' for which a layer map was given.",
    ("--depth", "small"): "depth says which layers a layer map keeps.",
    ("--depth", "half", "--layer-map", "uniform"): "depth must be base or small, got 'half'.",
}  # fmt: skip


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_a_wrong_map_is_refused(words: tuple[str, ...], cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("merge", "interpolate", "--experts", "tiny", "--base", "base", "-o", "out", *words) == 2
    assert WRONG[words] in capsys.readouterr().err


ALIKE = ["hidden_size", "num_attention_heads", "intermediate_size", "vocab_size", "max_position_embeddings"]


@pytest.mark.parametrize("key", ALIKE)
def test_models_that_differ_in_more_than_depth_are_refused(
    key: str, cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    make("BertForSequenceClassification", "odd", 4, num_hidden_layers=3, **{key: 4})
    words = ("--experts", "odd", "--base", "base", "-o", "out", "--layer-map", "prefix")
    assert cli("merge", "interpolate", *words) == 2
    assert f"alike in all but depth, but {key} is 4 in odd and {SMALL[key]} in base." in capsys.readouterr().err


def test_what_a_map_cannot_do_is_said(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    make("BertModel", "five", 5, num_hidden_layers=5)
    out = ("-o", "out", "--layer-map")
    assert cli("merge", "interpolate", "--experts", "tiny", "--base", "five", *out, "uniform") == 2
    assert cli("merge", "interpolate", "--experts", "whole", "--base", "five", *out, "prefix") == 2
    assert cli("merge", "average", "--experts", "tiny", *out, "prefix") == 2
    words = ("--experts", "tiny", "whole", "--base", "base", "--depth", "small")
    assert cli("merge", "average", *words, *out, "uniform") == 2
    said = capsys.readouterr().err
    assert "A uniform layer map needs a multiple of 3 layers, but five has 5: name pairs." in said
    assert "whole has 6 layers, more than the 5 of five. Exchange them." in said
    assert "Name it: --base MODEL" in said
    assert "all experts need one layer map, but whole has another." in said


def test_no_map_changes_nothing() -> None:
    from mergectl.layer_maps import mapped

    assert mapped(None, (("a", "b"),), LayerMap({})) == (None, (("a", "b"),))
    with pytest.raises(UserError, match="A layer map puts experts onto a base of another depth"):
        mapped(None, (("a", "b"),), LayerMap({None: "prefix"}))
