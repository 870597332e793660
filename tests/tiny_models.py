"""Tiny models, tokenizers and tasks for the tests of fine-tuning and evaluation; nothing is downloaded."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mergectl.benchmarks._contract import Part, Task
from mergectl.models import model_config, new_model, open_source, quiet

WORDS = ["good", "fine", "warm", "bad", "dull", "cold", "film", "book", "song", "the", "a", "was", "is"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
SMALL = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "initializer_range": 0.2,
}  # fmt: skip
TEXT = {**SMALL, "vocab_size": 17, "max_position_embeddings": 40, "pad_token_id": 0}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {"model_type": "bert", **TEXT},
    "roberta": {"model_type": "roberta", **TEXT, "type_vocab_size": 1},
    "deberta-v2": {"model_type": "deberta-v2", **TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "gpt2": {
        "model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 17, "n_positions": 40,
        "initializer_range": 0.2,
        "bos_token_id": None, "eos_token_id": None,
    },
    "vit": {"model_type": "vit", **SMALL, "image_size": 8, "patch_size": 4, "num_channels": 1},
}  # fmt: skip
FAMILIES = list(CONFIGS)


def sentences(split: str) -> Mapping[str, list[Any]]:
    """Ninety-six little sentences; the label says whether their adjectives are kind."""
    chance = random.Random(split)
    texts, labels = [], []
    for _ in range(96):
        kind = chance.randrange(2)
        adjectives = [WORDS[chance.randrange(3) + (0 if kind else 3)] for _ in range(chance.randint(1, 6))]
        texts.append(" ".join([chance.choice(WORDS[9:11]), chance.choice(WORDS[6:9]), *adjectives]))
        labels.append(kind)
    return {"sentence": texts, "label": labels}


def pairs(split: str) -> Mapping[str, list[Any]]:
    """The same sentences beside their reverse; the answer is a number."""
    found = sentences(split)
    turned = [" ".join(reversed(text.split())) for text in found["sentence"]]
    return {"first": found["sentence"], "second": turned, "label": [float(label) for label in found["label"]]}


def shades(split: str) -> Mapping[str, list[Any]]:
    """Grey 8x8 pictures, dark, middling or light."""
    numbers = np.random.RandomState(len(split))
    labels = numbers.randint(3, size=90)
    images = np.clip(labels[:, None, None] / 3 + numbers.uniform(0, 0.3, size=(90, 8, 8)), 0, 1)
    return {"image": [image.astype(np.float32) for image in images], "label": [int(label) for label in labels]}


PARTS: Mapping[Any, Part] = {"fit": Part("train"), "tune": Part("validation"), "report": Part("test")}
MOOD = Task(
    name="mood", kind="classification", inputs=("sentence",), label="label", labels=("unkind", "kind"),
    metric="accuracy", parts=PARTS, make=sentences, suite="tiny",
)  # fmt: skip
NUMBER = Task(
    name="number", kind="regression", inputs=("first", "second"), label="label", labels=(), metric="pearson",
    parts=PARTS, make=pairs, suite="tiny",
)  # fmt: skip
SHADE = Task(
    name="shade", kind="image_classification", inputs=("image",), label="label", labels=("dark", "middle", "light"),
    metric="accuracy", metrics=("weighted_f1",), parts=PARTS, make=shades, suite="tiny",
)  # fmt: skip


def tokenizer() -> Any:
    """A tokenizer that knows seventeen words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=10**6,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def bare(folder: Path, family: str) -> Path:
    """A folder with a configuration (and a tokenizer), but no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[family]))
    if family != "vit":
        tokenizer().save_pretrained(folder)
    return folder


def task_for(family: str) -> Task:
    """The classification task that a family can read."""
    return SHADE if family == "vit" else MOOD


def base(folder: Path, family: str, seed: int = 0) -> Path:
    """A folder with a backbone as `AutoModel` saves it: no head, no prefix."""
    bare(folder, family)
    task = task_for(family)
    model = new_model(model_config(open_source(folder), task), task, seed)
    with quiet():
        getattr(model, model.base_model_prefix).save_pretrained(folder)
    return folder


def expert(folder: Path, family: str, task: Task | None = None, seed: int = 1, **meta: Any) -> Path:
    """A folder with a classifier as `finetune` writes it, untrained."""
    bare(folder, family)
    chosen = task or task_for(family)
    model = new_model(model_config(open_source(folder), chosen), chosen, seed)
    with quiet():
        model.save_pretrained(folder)
    record = {"kind": "expert", "task": chosen.id, "labels": list(chosen.labels), "kind_of_task": chosen.kind, **meta}
    (folder / "mergectl.json").write_text(json.dumps(record))
    return folder
