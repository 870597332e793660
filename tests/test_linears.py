"""Which weights are those of linear layers, for one tiny model of each kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mergectl import linears
from mergectl.checkpoints import open_checkpoint
from mergectl.lab import Lab
from mergectl.linears import known_linears, linears_of
from mergectl.models import quiet
from mergectl.plan import Recipe
from mergectl.supplies import supplies_of

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
TEXT = {**SMALL, "vocab_size": 11, "max_position_embeddings": 14}
TOWER = {**SMALL, "image_size": 8, "patch_size": 4}
# Class, configuration, the names of the linear layers' weights, and whether they are stored [in, out].
BERT = (
    "encoder.layer.0.attention.self.{query,key,value}",
    "encoder.layer.0.{attention.output,intermediate,output}.dense",
)
KINDS: dict[str, tuple[str, dict[str, Any], tuple[str, ...], bool]] = {
    "bert": ("BertForSequenceClassification", TEXT, (*(f"bert.{n}" for n in BERT), "bert.pooler.dense"), False),
    "roberta": (
        "RobertaForSequenceClassification", {**TEXT, "pad_token_id": 1}, tuple(f"roberta.{n}" for n in BERT), False,
    ),
    "deberta-v2": (
        "DebertaV2ForSequenceClassification",
        {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": False},
        (
            "deberta.encoder.layer.0.attention.self.{query,key,value}_proj",
            "deberta.encoder.layer.0.attention.self.pos_{key,query}_proj",
            f"deberta.{BERT[1]}",
        ),
        False,
    ),
    "gpt2": (
        "GPT2ForSequenceClassification",
        {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 11, "n_positions": 14, "bos_token_id": 0}
        | {"eos_token_id": 0},
        ("transformer.h.0.attn.c_{attn,proj}", "transformer.h.0.mlp.c_{fc,proj}"),
        True,
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2, "vocab_size": 11},
        (
            "encoder.block.0.layer.0.SelfAttention.{q,k,v,o}",
            "encoder.block.0.layer.1.DenseReluDense.{wi,wo}",
            "decoder.block.0.layer.{0.SelfAttention,1.EncDecAttention}.{q,k,v,o}",
            "decoder.block.0.layer.2.DenseReluDense.{wi,wo}",
        ),
        False,
    ),
    "vit": (
        "ViTForImageClassification",
        {**TOWER, "num_channels": 1},
        (
            "vit.encoder.layer.0.attention.attention.{query,key,value}",
            "vit.encoder.layer.0.{attention.output,intermediate,output}.dense",
        ),
        False,
    ),
    "clip_vision_model": (
        "CLIPVisionModelWithProjection",
        {**TOWER, "projection_dim": 6},
        (
            "vision_model.encoder.layers.0.self_attn.{q,k,v,out}_proj",
            "vision_model.encoder.layers.0.mlp.fc{1,2}",
        ),
        False,
    ),
    "llama": (
        "LlamaForCausalLM",
        {**TEXT, "num_key_value_heads": 1, "tie_word_embeddings": False},
        ("model.layers.0.self_attn.{q,k,v,o}_proj", "model.layers.0.mlp.{gate,up,down}_proj"),
        False,
    ),
}  # fmt: skip


def spread(pattern: str) -> list[str]:
    """Write out braces as a shell does."""
    start, brace, rest = pattern.partition("{")
    if not brace:
        return [pattern]
    middle, _, end = rest.partition("}")
    return [start + word + tail for word in middle.split(",") for tail in spread(end)]


def saved(kind: str, folder: Path) -> Path:
    import transformers

    name, config, _, _ = KINDS[kind]
    with quiet(), torch.random.fork_rng():
        model = getattr(transformers, name)(transformers.CONFIG_MAPPING[kind](**config))
        model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_linear_layers_are_found_outside_embeddings_and_heads(kind: str, tmp_path: Path) -> None:
    _, _, patterns, turned = KINDS[kind]
    found = linears_of(open_checkpoint(saved(kind, tmp_path / kind)))
    assert found == {f"{name}.weight": turned for pattern in patterns for name in spread(pattern)}


def test_a_whole_clip_model_has_the_linear_layers_of_both_towers_and_not_their_projections(tmp_path: Path) -> None:
    import transformers

    config = transformers.CLIPConfig(text_config=TEXT, vision_config=TOWER, projection_dim=6)
    with quiet(), torch.random.fork_rng():
        transformers.CLIPModel(config).save_pretrained(tmp_path / "clip")
    found = linears_of(open_checkpoint(tmp_path / "clip"))
    assert found is not None
    assert [name.partition(".")[0] for name in found] == ["text_model"] * 6 + ["vision_model"] * 6


def test_a_bare_backbone_has_the_same_linear_layers_under_its_own_names(tmp_path: Path) -> None:
    import transformers

    with quiet(), torch.random.fork_rng():
        transformers.GPT2Model(transformers.GPT2Config(**KINDS["gpt2"][1])).save_pretrained(tmp_path / "bare")
    found = linears_of(open_checkpoint(tmp_path / "bare"))
    assert found == {f"h.0.{name}.weight": True for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}


def other(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"net.dense.weight": torch.zeros(4, 4)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("config", [{}, {"model_type": "my-own"}, {"model_type": "bert", "hidden_size": "wide"}])
def test_of_an_architecture_that_nobody_knows_nothing_is_said(config: dict[str, Any], tmp_path: Path) -> None:
    assert linears_of(open_checkpoint(other(tmp_path / "odd", config))) is None


def test_what_is_known_is_not_asked_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache"
    checkpoint = open_checkpoint(saved("gpt2", tmp_path / "gpt2"))
    unknown = open_checkpoint(other(tmp_path / "odd", {"model_type": "my-own"}))
    first = known_linears(checkpoint, folder), known_linears(unknown, folder)
    monkeypatch.setattr(linears, "linears_of", lambda checkpoint: pytest.fail("asked twice"))
    assert (known_linears(checkpoint, folder), known_linears(unknown, folder)) == first == (first[0], None)
    monkeypatch.undo()
    (note,) = [path for path in folder.iterdir() if path.read_text() != "null"]
    note.write_text("{")
    assert known_linears(checkpoint, folder) == first[0]


def test_the_lab_names_linear_layers_as_the_merge_does(population: Path, tmp_path: Path) -> None:
    from mergectl.families import open_family

    experts = [(None, str(path)) for path in sorted(population.iterdir()) if path.name != "base"]
    family = open_family(str(population / "base"), experts)
    made = supplies_of(Lab(store_path=tmp_path / "lab" / "x.duckdb"), family, Recipe("iso_c"))
    assert set(made) == {"linears", "remember"}
    assert set(made["linears"]) < set(family.population.base)
    assert len(made["linears"]) > 2
