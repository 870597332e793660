"""Adapters whose modules the base spells otherwise, of convolutions, or of several kinds of layers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mergectl.adapters import AdapterCheckpoint
from mergectl.checkpoints import Checkpoint, open_checkpoint
from mergectl.errors import UserError
from mergectl.models import quiet
from tests.conftest import Cli

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
PICTURES = {**SMALL, "image_size": 8, "patch_size": 4}
TEXTS = {**SMALL, "vocab_size": 17, "max_position_embeddings": 40}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 17, "n_positions": 40, "pad_token_id": 0}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
WHISPER = {
    "vocab_size": 17, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_source_positions": 20,
    "max_target_positions": 20, "num_mel_bins": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip
# Base, its configuration, the class it is adapted as, the kind of adapter, its modules and other settings.
Case = tuple[str, dict[str, Any], str, str, list[str], dict[str, Any]]
CASES: dict[str, Case] = {
    "names of today's transformers": (
        "ViTForImageClassification", PICTURES, "ViTForImageClassification", "lora", ["q_proj", "fc1"], {"bias": "all"},
    ),
    "names of today's transformers, on a backbone": (
        "ViTModel", PICTURES, "ViTForImageClassification", "lora", ["q_proj"], {"modules_to_save": ["classifier"]},
    ),
    "a backbone's names on a whole model": ("LlamaForCausalLM", TEXTS, "AutoModel", "lora", ["q_proj", "up_proj"], {}),
    "a backbone's names on a masked language model": ("BertForMaskedLM", TEXTS, "AutoModel", "lora", ["query"], {}),
    "turned and straight squares": (
        "GPT2ForSequenceClassification", GPT2, "GPT2ForSequenceClassification", "lora", ["attn.c_proj", "score"], {},
    ),
    "turned and straight squares in IA3": (
        "GPT2ForSequenceClassification", GPT2, "GPT2ForSequenceClassification", "ia3", ["attn.c_proj", "score"],
        {"feedforward_modules": ["attn.c_proj"]},
    ),
    "patches": ("ViTModel", PICTURES, "ViTModel", "lora", ["projection"], {}),
    "patches with dora": ("ViTModel", PICTURES, "ViTModel", "lora", ["projection"], {"use_dora": True}),
    "convolutions": ("ResNetModel", RESNET, "ResNetModel", "lora", ["convolution"], {"use_rslora": True}),
    "one-dimensional convolutions": (
        "WhisperForConditionalGeneration", WHISPER, "WhisperForConditionalGeneration", "lora", ["conv1", "q_proj"], {},
    ),
    "outputs of convolutions": ("ViTModel", PICTURES, "ViTModel", "ia3", ["projection"], {"feedforward_modules": []}),
    "inputs of convolutions": (
        "ResNetModel", RESNET, "ResNetModel", "ia3", ["convolution"], {"feedforward_modules": ["convolution"]},
    ),
}  # fmt: skip


def make(folder: Path, case: Case) -> dict[str, torch.Tensor]:
    """Save base and adapter below `folder`; return the full weights that peft makes of them."""
    import transformers
    from peft import IA3Config, LoraConfig, get_peft_model

    base, facts, adapted, kind, modules, settings = case
    torch.manual_seed(7)
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what peft advises
        built = getattr(transformers, base)
        built(built.config_class(**facts)).save_pretrained(folder / "base")
        labels = {"num_labels": settings["labels"]} if "labels" in settings else {}
        model = getattr(transformers, adapted).from_pretrained(folder / "base", **labels)
        more = {"r": 2, "lora_alpha": 6} if kind == "lora" else {}
        given = {"target_modules": modules, **more, **{key: settings[key] for key in settings if key != "labels"}}
        wrapped = get_peft_model(model, (LoraConfig if kind == "lora" else IA3Config)(**given))
        for weight in wrapped.parameters():
            if weight.requires_grad:
                weight.data = weight.data * (0.7 + torch.rand(weight.shape)) + 0.1 * torch.randn(weight.shape)
        wrapped.save_pretrained(folder / "adapter")
        wrapped.merge_and_unload().save_pretrained(folder / "full")
    found: dict[str, torch.Tensor] = load_file(folder / "full/model.safetensors")
    return found


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_is_the_model_that_peft_makes_of_it(name: str, tmp_path: Path) -> None:
    expected = {own: w for own, w in make(tmp_path, CASES[name]).items() if not own.startswith("pooler.")}
    opened, base = open_checkpoint(tmp_path / "adapter"), open_checkpoint(tmp_path / "base")
    spelled = {own: own if own in opened else next(n for n in opened if n.endswith(f".{own}")) for own in expected}
    changed = 0
    for own, weight in expected.items():
        assert opened.shape(spelled[own]) == tuple(weight.shape)
        torch.testing.assert_close(opened[spelled[own]], weight, rtol=0, atol=1e-5)
        before = next((base[n] for n in base if n == spelled[own] or spelled[own].endswith(f".{n}")), weight)
        changed += not torch.equal(before, weight)
    assert changed > 0


def test_adapters_with_a_backbones_names_merge_onto_the_whole_model(cli: Cli, tmp_path: Path) -> None:
    expected = make(tmp_path, CASES["a backbone's names on a whole model"])
    assert cli("merge", "task_arithmetic", "--base", "base", "--experts", "one=adapter", "-o", "m", "--scale", "1") == 0
    base, merged = load_file("base/model.safetensors"), load_file("m/model.safetensors")
    assert set(merged) == set(base)
    for name, weight in expected.items():
        torch.testing.assert_close(merged[f"model.{name}"], weight, rtol=0, atol=1e-5)
    assert torch.equal(merged["lm_head.weight"], base["lm_head.weight"])


def test_an_exported_adapter_has_as_many_labels_as_its_head(cli: Cli, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    shape = {"bias": "none", "modules_to_save": ["classifier"]}
    make(tmp_path, ("BertModel", TEXTS, "BertForSequenceClassification", "lora", ["query"], {**shape, "labels": 3}))
    words = ["--base", "base", "--experts", "one=adapter", "-o", "m", "--export", "one"]
    assert cli("merge", "average", *words) == 0
    with quiet():
        model = AutoModelForSequenceClassification.from_pretrained("m")
    assert (model.config.num_labels, model.config.label2id["LABEL_2"]) == (3, 2)
    assert torch.equal(model.classifier.weight, load_file("m/model.safetensors")["classifier.weight"])


def test_adapters_of_convolutions_are_not_merged_as_adapters(
    cli: Cli, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    make(tmp_path, CASES["patches"])
    words = ["--experts", "one=adapter", "two=adapter", "-o", "m", "--adapter"]
    assert cli("merge", "average", *words) == 2
    assert "adapts the convolution 'embeddings.patch_embeddings.projection'" in capsys.readouterr().err


def test_what_an_adapter_adapts_and_its_base_lacks_is_named(tmp_path: Path) -> None:
    make(tmp_path, ("GPT2LMHeadModel", GPT2, "GPT2LMHeadModel", "lora", ["c_attn", "lm_head"], {}))
    with pytest.raises(UserError, match=r"adapts 'lm_head', which its base .* does not have"):
        open_checkpoint(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("base", "asked"), [("org/base", "org/base@abc"), ("org/base@def", "org/base@def"), ("base", "base")]
)
def test_the_base_is_of_the_revision_that_the_adapter_names(
    base: str, asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, CASES["patches"])
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "adapter/adapter_config.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "base_model_name_or_path": base, "revision": "abc"}))
    found: list[str] = []

    def opened(ref: str) -> Checkpoint:
        found.append(ref)
        return open_checkpoint(tmp_path / "base")

    AdapterCheckpoint(tmp_path / "adapter", "adapter", opened)
    assert found == [asked]


def test_an_exported_adapter_has_the_tokenizer_of_its_base(cli: Cli, tmp_path: Path) -> None:
    make(tmp_path, CASES["a backbone's names on a whole model"])
    (tmp_path / "base/tokenizer.json").write_text("{}")
    assert cli("merge", "average", "--base", "base", "--experts", "one=adapter", "-o", "m", "--export", "one") == 0
    assert Path("m/tokenizer.json").exists()
