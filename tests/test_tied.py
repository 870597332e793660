"""Weights that a model uses more than once: found in files that hold them once, twice or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from mergectl import tied
from mergectl.families import open_family

SMALL = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
LLAMA = {
    "vocab_size": 13, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2
}  # fmt: skip


def t5(folder: Path, seed: int, names: tuple[str, ...] = ()) -> Path:
    """Save a small T5, its embedding under further names, too."""
    torch.manual_seed(seed)
    model: PreTrainedModel = T5ForConditionalGeneration(T5Config(**SMALL))
    model.save_pretrained(folder)
    if names:
        own = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save({**own, **dict.fromkeys(names, own["shared.weight"])}, folder / "pytorch_model.bin")
    return folder


def population(base: Path, *experts: Path) -> Any:
    return open_family(str(base), [(path.name, str(path)) for path in experts]).population


def counted(found: Any) -> dict[str, int]:
    return tied.uses(list(found.base), found.tied, found.base.source.config)


@pytest.mark.parametrize(
    "names",
    [
        (),
        ("lm_head.weight",),
        ("lm_head.weight", "decoder.embed_tokens.weight", "encoder.embed_tokens.weight"),
    ],
)
def test_the_embedding_of_a_tied_t5_is_used_twice_however_it_is_stored(tmp_path: Path, names: tuple[str, ...]) -> None:
    models = [t5(tmp_path / name, seed, names) for seed, name in enumerate(("base", "one", "two"))]
    found = population(*models)
    (embedding,) = (name for name in found.base if name.endswith(("shared.weight", "embed_tokens.weight")))
    assert not any(name.endswith("lm_head.weight") for name in found.base)
    assert counted(found) == {embedding: 2}
    assert set(found.tied) | {found.base.own_name[embedding]} == {"shared.weight", *names}
    assert all({*copies, found.experts[t].own_name[embedding]} == {"shared.weight", *names}
               for t, copies in found.copies.items())  # fmt: skip


def test_an_output_head_of_its_own_is_merged_and_counted_as_itself(tmp_path: Path) -> None:
    for name in ("base", "one"):
        LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=False)).save_pretrained(tmp_path / name)
    found = population(tmp_path / "base", tmp_path / "one")
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(found.base)
    assert counted(found) == {}


def test_what_is_a_copy_in_some_models_only_is_merged_as_two(tmp_path: Path) -> None:
    base, one = (t5(tmp_path / name, seed, ("lm_head.weight",)) for seed, name in enumerate(("base", "one")))
    own = torch.load(one / "pytorch_model.bin")
    torch.save({**own, "lm_head.weight": own["lm_head.weight"] + 1}, one / "pytorch_model.bin")
    found = population(base, one)
    assert {"shared.weight", "lm_head.weight"} <= set(found.base)
    assert counted(found) == {}


def test_a_model_that_writes_nothing_uses_its_embedding_once() -> None:
    assert tied.uses(["embeddings.word_embeddings.weight"], {}, {"architectures": ["BertModel"]}) == {}
    assert tied.uses(["embeddings.word_embeddings.weight"], {}, {}) == {}
    masked = tied.uses(["embeddings.word_embeddings.weight"], {}, {"architectures": ["BertForMaskedLM"]})
    assert masked == {"embeddings.word_embeddings.weight": 2}
