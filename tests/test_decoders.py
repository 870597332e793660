"""Decoders as classifiers: padding changes nothing, the last token is the mask's, and merges of them are whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mergectl import decoders
from mergectl.bench import bench_of, logits
from mergectl.evaluate import evaluate
from mergectl.finetune import FinetuneConfig, finetune
from mergectl.heads import open_live
from mergectl.lab import Lab
from mergectl.merge import MergeJob
from mergectl.models import auto_class, build, model_config, new_model, open_source, preparer_for, quiet
from mergectl.plan import recipe_of
from mergectl.verbs import merge_models
from tests import tiny_models as tiny

SIZE = {"vocab_size": 17, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2}
WORDS = {"bos_token_id": 2, "eos_token_id": 3}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {**tiny.CONFIGS["gpt2"], **WORDS},
    "llama": {"model_type": "llama", **SIZE, **WORDS, "intermediate_size": 24, "max_position_embeddings": 40},
    "opt": {"model_type": "opt", **SIZE, **WORDS, "ffn_dim": 24, "max_position_embeddings": 40,
            "word_embed_proj_dim": 16},
    "bloom": {"model_type": "bloom", **SIZE, **WORDS},
}  # fmt: skip
TEXTS = ["good", "a warm film is good good fine", "the bad book", "a dull cold song was bad", "warm warm"]
SHARP = replace(tiny.MOOD, name="sharp", labels=("no", "perhaps", "yes"))
TASKS = [tiny.MOOD, SHARP]

every_kind = pytest.mark.parametrize("kind", CONFIGS)
main_kinds = pytest.mark.parametrize("kind", ["gpt2", "llama"])


def bare(folder: Path, kind: str, **facts: Any) -> Path:
    """A folder with a configuration that names no padding, and a tokenizer without any, as GPT-2's."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIGS[kind], "pad_token_id": None, **facts}))
    tiny.tokenizer().save_pretrained(folder)
    words = json.loads((folder / "tokenizer_config.json").read_text())
    words.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps({**words, "eos_token": "[SEP]", "padding_side": "left"}))
    return folder


def base_of(folder: Path, kind: str) -> Path:
    """A language model of this kind with fresh weights."""
    import transformers

    source = open_source(bare(folder, kind))
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = model_config(source, tiny.MOOD)
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def expert_of(folder: Path, kind: str, task: Any, seed: int) -> Path:
    """A classifier as the hub has them: no padding in its configuration, labels without names, no record."""
    source = open_source(bare(folder, kind))
    config = model_config(source, task)
    config.id2label = {n: f"LABEL_{n}" for n in range(len(task.labels))}
    config.label2id = {name: n for n, name in config.id2label.items()}
    with quiet():
        new_model(config, task, seed).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text()).get("pad_token_id") is None
    return folder


def one_by_one(folder: Path, texts: list[str], task: Any = tiny.MOOD) -> torch.Tensor:
    """What transformers itself gives for each text alone, read at its very last token."""
    model = auto_class(task).from_pretrained(folder, dtype=torch.float32).eval()
    rows = []
    for text in texts:
        ids = torch.tensor([tiny.tokenizer()(text)["input_ids"]])
        with torch.no_grad():
            rows.append(model.score(model.base_model(ids).last_hidden_state[0, -1]))
    return torch.stack(rows)


def together(folder: Path, texts: list[str], task: Any = tiny.MOOD, batch_size: int = 64) -> torch.Tensor:
    live = open_live(folder, [task], device="cpu")
    bench = bench_of(task, live.preparer_of(task.id), {"sentence": texts}, [0] * len(texts), batch_size)
    return torch.from_numpy(logits(live.use(task.id), bench))


@every_kind
def test_padded_texts_score_as_each_does_alone_though_all_end_with_the_padding_token(kind: str, tmp_path: Path) -> None:
    expert = expert_of(tmp_path / "expert", kind, tiny.MOOD, 1)
    live = open_live(expert, [tiny.MOOD], device="cpu")
    batch = live.preparer.collate(live.preparer.prepare(tiny.MOOD, {"sentence": TEXTS}))
    assert live.model.config.pad_token_id == 3
    assert batch["input_ids"][0].tolist()[:4] == [2, 4, 3, 3]  # [CLS] good [SEP], then padding of the same token
    torch.testing.assert_close(together(expert, TEXTS), one_by_one(expert, TEXTS), rtol=0, atol=1e-5)


@main_kinds
@pytest.mark.parametrize("size", [1, 2])
def test_the_size_of_batches_changes_nothing(kind: str, size: int, tmp_path: Path) -> None:
    expert = expert_of(tmp_path / "expert", kind, tiny.MOOD, 1)
    found = together(expert, TEXTS, batch_size=size)
    torch.testing.assert_close(found, together(expert, TEXTS), rtol=0, atol=1e-5)


@main_kinds
def test_hub_experts_merge_and_each_task_is_answered_with_its_own_score(kind: str, tmp_path: Path) -> None:
    base, merged, experts = merged_of(tmp_path, kind)
    folders = dict(zip((task.id for task in TASKS), experts, strict=True))
    by_hand = averaged(experts, tmp_path / "by_hand", base)
    for task in TASKS:
        expected = one_by_one(by_hand[task.id], TEXTS, task)
        torch.testing.assert_close(together(merged, TEXTS, task), expected, rtol=0, atol=1e-5)
    assert set(evaluate(merged, TASKS, device="cpu").scores) == set(folders)


def merged_of(tmp_path: Path, kind: str, **job: Any) -> tuple[Path, Path, list[Path]]:
    """A base, two experts and their average."""
    base = base_of(tmp_path / "base", kind)
    experts = [expert_of(tmp_path / task.name, kind, task, seed) for seed, task in enumerate(TASKS, 1)]
    named = tuple((task.id, str(folder)) for task, folder in zip(TASKS, experts, strict=True))
    merge_models(Lab(device="cpu"), MergeJob(recipe_of("average", {}, [], 0), named, str(base), **job), tmp_path / "m")
    return base, tmp_path / "m", experts


def averaged(experts: list[Path], out: Path, base: Path) -> dict[str, Path]:
    """The same average made by hand: each expert's own score on the mean of the backbones."""
    from safetensors.torch import save_file

    weights = [load_file(folder / "model.safetensors") for folder in experts]
    found = {}
    for task, folder, own in zip(TASKS, experts, weights, strict=True):
        target = out / task.name
        target.mkdir(parents=True)
        (target / "config.json").write_text((folder / "config.json").read_text())
        mean = {name: own[name] if "score" in name else sum(w[name] for w in weights) / 2 for name in own}
        save_file(mean, target / "model.safetensors", {"format": "pt"})
        found[task.id] = target
    return found


@main_kinds
def test_what_a_merge_writes_names_the_padding_and_transformers_reads_batches_of_it(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    _, alone, _ = merged_of(tmp_path, kind, export=tiny.MOOD.name)
    assert json.loads((alone / "config.json").read_text())["pad_token_id"] == 3
    model = auto_class(tiny.MOOD).from_pretrained(alone, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(alone, pad_token="[SEP]", padding_side="right")
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False, add_special_tokens=False)
    with torch.no_grad():
        found = model(**batch).logits
        single = [model(input_ids=batch["input_ids"][row, : int(n)][None]).logits[0]
                  for row, n in enumerate(batch["attention_mask"].sum(1))]  # fmt: skip
    torch.testing.assert_close(found, torch.stack(single), rtol=0, atol=1e-5)


def test_a_merged_base_names_the_padding_of_its_experts(tmp_path: Path) -> None:
    _, merged, _ = merged_of(tmp_path, "gpt2")
    assert json.loads((merged / "config.json").read_text())["pad_token_id"] == 3


def test_weights_that_are_stored_transposed_are_merged_as_they_lie(tmp_path: Path) -> None:
    _, merged, experts = merged_of(tmp_path, "gpt2")
    name = "h.0.attn.c_attn.weight"
    found = load_file(merged / "model.safetensors")[f"transformer.{name}"]
    own = [load_file(folder / "model.safetensors")[f"transformer.{name}"] for folder in experts]
    assert found.shape == (16, 48)
    torch.testing.assert_close(found, (own[0] + own[1]) / 2, rtol=0, atol=1e-6)


def test_an_expert_without_a_tokenizer_is_scored_with_that_of_its_base(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "gpt2")
    expert = expert_of(tmp_path / "expert", "gpt2", tiny.MOOD, 1)
    whole = evaluate(expert, [tiny.MOOD], device="cpu").scores
    for path in expert.glob("tokenizer*"):
        path.unlink()
    assert evaluate(expert, [tiny.MOOD], heads={tiny.MOOD.id: base}, device="cpu").scores == whole


@pytest.mark.parametrize(("positions", "asked", "found"), [(40, None, 40), (900, None, 512), (900, 700, 700)])
def test_texts_are_cut_at_512_tokens_or_the_models_positions(
    positions: int, asked: int | None, found: int, tmp_path: Path
) -> None:
    source = open_source(bare(tmp_path / "gpt2", "gpt2", n_positions=positions))
    preparer = preparer_for(source, model_config(source, tiny.MOOD), tiny.MOOD, asked)
    [example] = preparer.prepare(tiny.MOOD, {"sentence": ["good " * 1000]})
    assert len(example["input_ids"]) == found


@main_kinds
def test_a_fine_tuned_expert_says_how_it_pads(kind: str, tmp_path: Path) -> None:
    config = FinetuneConfig(task="tiny/mood", base=str(base_of(tmp_path / "base", kind)), max_steps=2, batch_size=8,
                            limit_fit=16, limit_tune=16, device="cpu")  # fmt: skip
    finetune(config, tmp_path / "expert", task=tiny.MOOD)
    words = json.loads((tmp_path / "expert" / "tokenizer_config.json").read_text())
    assert json.loads((tmp_path / "expert" / "config.json").read_text())["pad_token_id"] == 3
    assert (words["pad_token"], words["padding_side"]) == ("[SEP]", "right")
    torch.testing.assert_close(
        together(tmp_path / "expert", TEXTS), one_by_one(tmp_path / "expert", TEXTS), rtol=0, atol=1e-5
    )


def test_training_reads_the_answer_where_scoring_does(tmp_path: Path) -> None:
    source = open_source(base_of(tmp_path / "base", "gpt2"))
    model = build(source, tiny.MOOD).train()
    preparer = preparer_for(source, model.config, tiny.MOOD)
    batch = preparer.collate(preparer.prepare(tiny.MOOD, {"sentence": TEXTS}))
    states = model.transformer(batch["input_ids"][:, :3], attention_mask=torch.ones(5, 3)).last_hidden_state
    assert torch.equal(states[:, 0], states[:, 2])
    model(**batch).logits.sum().backward()
    assert model.score.weight.grad is not None


@pytest.mark.parametrize("kind", ["bert", "roberta", "deberta-v2"])
def test_encoders_are_left_as_they_are(kind: str, tmp_path: Path) -> None:
    source = open_source(tiny.bare(tmp_path, kind))
    config = model_config(source, tiny.MOOD)
    assert not decoders.is_decoder(config)
    assert not new_model(config, tiny.MOOD, 0).base_model._forward_hooks


@pytest.mark.parametrize(("configs", "found"), [
    ([{"architectures": ["GPT2ForSequenceClassification"], "model_type": "gpt2", "eos_token_id": 7}], 7),
    ([{"architectures": ["GPT2ForSequenceClassification"], "model_type": "gpt2", "eos_token_id": 7,
       "pad_token_id": 5}], 5),
    ([{"architectures": ["BertForSequenceClassification"], "model_type": "bert", "eos_token_id": 7}], None),
    ([{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "eos_token_id": 7}], None),
    ([{"architectures": ["LlamaForSequenceClassification"], "model_type": "llama", "eos_token_id": [1, 2]}], None),
])  # fmt: skip
def test_the_padding_token_is_that_of_the_classifiers(
    configs: list[dict[str, Any]], found: int | None, tmp_path: Path
) -> None:
    assert decoders.with_padding({"n": 1}, configs, tmp_path).get("pad_token_id") == found
    assert decoders.with_padding({"pad_token_id": 0}, configs, tmp_path) == {"pad_token_id": 0}


def test_a_tokenizer_that_pads_names_the_token_where_no_configuration_does(tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path)
    config = {"architectures": ["GPT2ForSequenceClassification"], "model_type": "gpt2", "eos_token_id": 7}
    assert decoders.with_padding({}, [config], tmp_path) == {"pad_token_id": 0}
