"""Operations, parameters, time and memory: the published totals, and every kind of layer by its type."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mergectl.flops import Work, count, parameters
from mergectl.models import quiet
from tests.conftest import Cli

STUDY = json.loads((Path(__file__).parent / "golden" / "alpha" / "manifest.json").read_text())["flops"]


def build(kind: str, config: Any, device: str = "meta") -> Any:
    """A model without weights."""
    import transformers
    from transformers.initialization import no_init_weights

    with quiet(), no_init_weights(), torch.device(device):
        return getattr(transformers, kind)(config).eval()


def read(model: Any, length: int) -> Work:
    text = torch.full((1, length), 1, device=next(model.parameters()).device)
    return count(model, lambda: model(input_ids=text))


def bert(layers: int, hidden: int, intermediate: int, labels: int) -> Any:
    import transformers

    config = transformers.BertConfig(
        num_hidden_layers=layers, hidden_size=hidden, intermediate_size=intermediate, num_labels=labels,
        num_attention_heads=hidden // 16,
    )  # fmt: skip
    return build("BertForSequenceClassification", config)


@pytest.mark.parametrize("case", STUDY["examples"], ids=lambda case: f"{case['layers']} layers")
def test_one_text_costs_what_the_study_says(case: dict[str, int]) -> None:
    found = read(bert(case["layers"], case["hidden"], case["intermediate"], case["labels"]), case["seq_len"])
    linear = case["macs_linear"] + case["macs_pooler"] + case["macs_classifier"]
    assert found == Work(linear, case["macs_layernorm"], case["macs_attention_matmuls"])
    assert (found.reference, found.full) == (case["flops_reference"], case["flops_full"])


def test_the_published_totals_are_those_of_their_numbers_of_rows() -> None:
    each = read(bert(12, 768, 3072, 2), 128)
    rows = {"imdb_5000_examples": 5000, "snli_4912_examples": 4912, "mrpc_1725": 1725, "sst2_test_1821": 1821}
    found = {name: (each * number).reference for name, number in (rows | {"rte_test_3000": 3000}).items()}
    assert found == STUDY["published_totals"]


def config_of(kind: str) -> tuple[str, Any, dict[str, int]]:
    """The class, a tiny configuration, and the multiplications of its linear layers and normalisations in 6 tokens."""
    import transformers as tf

    usual = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 12, "max_position_embeddings": 40, "pad_token_id": 0}  # fmt: skip
    layers = 2 * (4 * 64 + 2 * 96)
    if kind == "gpt2":
        own = tf.GPT2Config(
            n_embd=8, n_layer=2, n_head=2, n_inner=12, vocab_size=20, pad_token_id=0, bos_token_id=1, eos_token_id=1
        )
        return "GPT2ForSequenceClassification", own, {"linear": (layers + 2 * 8) * 6, "norms": 5 * 6 * 8}
    if kind == "roberta":
        return "RobertaForSequenceClassification", tf.RobertaConfig(**usual, bos_token_id=1, eos_token_id=1), {
            "linear": layers * 6 + 64 + 16, "norms": 5 * 6 * 8,
        }  # fmt: skip
    if kind == "deberta":
        disentangled = tf.DebertaConfig(**usual, relative_attention=True, pos_att_type=["c2p", "p2c"])
        # Two more layers read the table of 2 * 40 relative positions; its own normalisation is no LayerNorm of torch.
        return "DebertaForSequenceClassification", disentangled, {"linear": layers * 6 + 2 * 2 * 64 * 12 + 64 + 16}
    llama = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 20,
    }
    own = tf.LlamaConfig(**llama, pad_token_id=0, bos_token_id=1, eos_token_id=1)
    return "LlamaForSequenceClassification", own, {"linear": (2 * (4 * 64 + 3 * 96) + 16) * 6, "norms": 0}


@pytest.mark.parametrize("kind", ["gpt2", "roberta", "deberta", "llama"])
def test_layers_are_found_by_their_type_in_every_model(kind: str) -> None:
    name, config, expected = config_of(kind)
    model = build(name, config, "cpu")
    for weight in model.parameters():
        weight.data.zero_()
    found = read(model, 6)
    assert found._asdict().items() >= expected.items()
    assert found.products >= 2 * 2 * 6 * 6 * 8  # the two products of attention in two layers
    assert model.config._attn_implementation != "eager" or kind == "deberta"


def test_an_image_model_counts_its_patches() -> None:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, image_size=16, patch_size=8,
        num_labels=2,
    )  # fmt: skip
    model = build("ViTForImageClassification", config)
    found = count(model, lambda: model(pixel_values=torch.zeros(1, 3, 16, 16, device="meta")))
    assert found == Work(4 * 3 * 64 * 8 + (4 * 64 + 2 * 96) * 5 + 16, 3 * 5 * 8, 2 * 5 * 5 * 8)


def test_tied_weights_are_one_parameter() -> None:
    import transformers

    config = transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2)
    with quiet():
        model = transformers.T5ForConditionalGeneration(config)
    assert model.lm_head.weight is model.shared.weight
    assert parameters(model) == sum(weight.numel() for weight in model.parameters())
    untied = torch.nn.Parameter(model.shared.weight.clone())
    model.lm_head.weight = untied
    assert parameters(model) == sum(weight.numel() for weight in model.parameters())


def test_a_model_that_writes_counts_reader_and_writer(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    from mergectl import smoke
    from mergectl.evaluate import evaluate
    from mergectl.lab import Lab

    tasks = Lab().tasks(["glue-t5/rte"])
    t5 = {"model_type": "t5", "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    smoke.make_base(Path("t5"), t5, tasks, 0)
    smoke.write_rows(Path("data"), tasks)
    found = evaluate("t5", tasks, data="data", limit=4, flops=True, device="cpu").metrics["glue-t5/rte"]
    assert found["flops_full"] > found["flops_reference"] > found["flops_reference_run"] > 0
