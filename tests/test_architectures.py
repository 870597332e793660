"""Nothing is lost: tiny models of many architectures are merged, loaded by transformers and compared with the mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mergectl.families import open_family
from mergectl.merge import MergeJob, merge
from mergectl.models import quiet
from mergectl.plan import recipe_of

H: dict[str, Any] = {
    "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12,
}  # fmt: skip
TEXT: dict[str, Any] = {**H, "vocab_size": 13, "max_position_embeddings": 16, "pad_token_id": 0}
LLAMA: dict[str, Any] = {**TEXT, "num_key_value_heads": 1, "head_dim": 4, "bos_token_id": 1, "eos_token_id": 2}
EIGHT: dict[str, Any] = {**H, "image_size": 8, "patch_size": 4, "num_channels": 1}
T5: dict[str, Any] = {
    "vocab_size": 13, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2, "pad_token_id": 0,
    "decoder_start_token_id": 0,
}  # fmt: skip
GPT: dict[str, Any] = {"vocab_size": 13, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16, "n_inner": 12}
BART: dict[str, Any] = {
    "vocab_size": 13, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "max_position_embeddings": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
MOE: dict[str, Any] = {**LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1}

# name -> (model class, model type, configuration)
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertModel", "bert", TEXT),
    "bert-masked-lm": ("BertForMaskedLM", "bert", TEXT),
    "bert-pretraining": ("BertForPreTraining", "bert", TEXT),
    "bert-classifier": ("BertForSequenceClassification", "bert", TEXT),
    "bert-answers": ("BertForQuestionAnswering", "bert", TEXT),
    "roberta": ("RobertaModel", "roberta", TEXT),
    "roberta-masked-lm": ("RobertaForMaskedLM", "roberta", TEXT),
    "xlm-roberta-tagger": ("XLMRobertaForTokenClassification", "xlm-roberta", TEXT),
    "deberta-v2": (
        "DebertaV2ForMaskedLM",
        "deberta-v2",
        {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "electra": ("ElectraForPreTraining", "electra", {**TEXT, "embedding_size": 8}),
    "distilbert": (
        "DistilBertForMaskedLM",
        "distilbert",
        {"vocab_size": 13, "dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 12, "max_position_embeddings": 16},
    ),
    "albert": ("AlbertForMaskedLM", "albert", {**TEXT, "embedding_size": 8}),
    "modernbert": ("ModernBertForMaskedLM", "modernbert", {**TEXT, "cls_token_id": 1, "sep_token_id": 2}),
    "t5-tied": ("T5ForConditionalGeneration", "t5", T5),
    "t5-gated": (
        "T5ForConditionalGeneration",
        "t5",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "bart": ("BartForConditionalGeneration", "bart", BART),
    "gpt2": ("GPT2LMHeadModel", "gpt2", GPT),
    "gpt-neox": ("GPTNeoXForCausalLM", "gpt_neox", TEXT),
    "gptj": ("GPTJForCausalLM", "gptj", {**GPT, "rotary_dim": 2}),
    "opt": ("OPTForCausalLM", "opt", {**TEXT, "ffn_dim": 12, "word_embed_proj_dim": 8}),
    "bloom": ("BloomForCausalLM", "bloom", {"vocab_size": 13, "hidden_size": 8, "n_layer": 2, "n_head": 2}),
    "falcon": ("FalconForCausalLM", "falcon", {**TEXT, "ffn_hidden_size": 12}),
    "llama": ("LlamaForCausalLM", "llama", LLAMA),
    "llama-classifier": ("LlamaForSequenceClassification", "llama", LLAMA),
    "mistral": ("MistralForCausalLM", "mistral", LLAMA),
    "mixtral": ("MixtralForCausalLM", "mixtral", MOE),
    "qwen2": ("Qwen2ForCausalLM", "qwen2", {**LLAMA, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", "qwen3", LLAMA),
    "phi": ("PhiForCausalLM", "phi", TEXT),
    "phi3": ("Phi3ForCausalLM", "phi3", {**TEXT, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}),
    "gemma": ("GemmaForCausalLM", "gemma", LLAMA),
    "gemma2": ("Gemma2ForCausalLM", "gemma2", LLAMA),
    "olmo2": ("Olmo2ForCausalLM", "olmo2", LLAMA),
    "stablelm": ("StableLmForCausalLM", "stablelm", LLAMA),
    "mamba": (
        "MambaForCausalLM",
        "mamba",
        {"vocab_size": 13, "hidden_size": 8, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 2},
    ),
    "vit": ("ViTModel", "vit", EIGHT),
    "vit-classifier": ("ViTForImageClassification", "vit", EIGHT),
    "dinov2": ("Dinov2Model", "dinov2", {**EIGHT, "mlp_ratio": 1}),
    "clip": (
        "CLIPModel",
        "clip",
        {"text_config": TEXT, "vision_config": EIGHT, "projection_dim": 8},
    ),
    "resnet": (
        "ResNetForImageClassification",
        "resnet",
        {"num_channels": 1, "embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"},
    ),
    "convnext": ("ConvNextModel", "convnext", {"num_channels": 1, "hidden_sizes": [4, 8], "depths": [1, 1],
                                               "num_stages": 2}),
    "swin": ("SwinModel", "swin", {"image_size": 8, "patch_size": 2, "num_channels": 1, "embed_dim": 4,
                                   "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}),
    "whisper": (
        "WhisperForConditionalGeneration",
        "whisper",
        {**BART, "num_mel_bins": 4, "max_source_positions": 8, "max_target_positions": 16,
         "suppress_tokens": None, "begin_suppress_tokens": None},
    ),
    "wav2vec2": (
        "Wav2Vec2Model",
        "wav2vec2",
        {**H, "conv_dim": [4, 4], "conv_stride": [2, 2], "conv_kernel": [3, 3], "num_feat_extract_layers": 2,
         "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
    ),
}  # fmt: skip


def fresh(name: str) -> Any:
    """A model with random weights in every parameter and floating buffer."""
    import transformers

    kind, model_type, facts = CASES[name]
    model = getattr(transformers, kind)._from_config(transformers.AutoConfig.for_model(model_type, **facts))
    shake(model)
    return model


def shake(model: Any) -> None:
    for weight in model.state_dict().values():
        if weight.is_floating_point():
            weight += 0.1 * torch.rand(weight.shape)


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def merged(folder: Path) -> tuple[Any, dict[str, tuple[str, ...]]]:
    """Merge the two experts of a folder by `average`, as the command does; return the family's heads, too."""
    family = open_family(str(folder / "base"), [("one", str(folder / "one")), ("two", str(folder / "two"))])
    job = MergeJob(recipe_of("average", {}, [], 0), (), str(folder / "base"))
    merge(job, family, folder / "merged", facts={}, force=False, progress=lambda *_: None)
    return family, family.population.heads


@pytest.mark.filterwarnings("ignore")  # of transformers, when it builds old models
@pytest.mark.parametrize("name", CASES)
def test_a_merged_model_loads_whole_and_is_the_mean_of_its_experts(name: str, tmp_path: Path) -> None:
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(name))
        model = fresh(name)
        model.save_pretrained(tmp_path / "base")
        states = [state(model)]
        for word in ("one", "two"):
            shake(model)
            model.save_pretrained(tmp_path / word)
            states.append(state(model))
        family, heads = merged(tmp_path)
        again, info = type(model).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values()), info
    assert family.population.carried == () or set(family.population.carried) <= {*heads["one"], *counters(model)}
    base, one, two = states
    own = {key for key in base if any(key.startswith(head.split(".")[0] + ".") for head in heads["one"])}
    assert bool(own) == name.endswith(("-classifier", "-answers", "-tagger")) or name == "resnet"
    for key, weight in again.state_dict().items():
        mean = (one[key].float() + two[key].float()) / 2
        expected = base[key] if key in own or not weight.is_floating_point() else mean
        torch.testing.assert_close(weight, expected.to(weight.dtype), rtol=1e-6, atol=1e-6, msg=lambda m: f"{key}: {m}")  # noqa: B023
    assert not any(torch.equal(base[key], one[key]) for key in base if base[key].is_floating_point())


def counters(model: Any) -> set[str]:
    return {name for name, value in model.state_dict().items() if not value.is_floating_point()}
