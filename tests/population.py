"""A population on disk for tests of the command line: a tiny ViT and experts for tasks of the digits suite."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

CONFIG = {
    "model_type": "vit", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_dropout_prob": 0.0,
}  # fmt: skip
LABELS = {"parity": ["even", "odd"], "loop": ["no loop", "loop"], "digit": [str(n) for n in range(10)]}


def make(folder: Path, tasks: tuple[str, ...] = ("parity", "loop", "digit")) -> Path:
    """Write `base` and one folder per task below `folder`."""
    from transformers import AutoModel, AutoModelForImageClassification, ViTConfig

    from mergectl.models import quiet

    facts = {key: value for key, value in CONFIG.items() if key != "model_type"}
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        base = AutoModel.from_config(ViTConfig(**facts), add_pooling_layer=False)
        base.save_pretrained(folder / "base")
        for task in tasks:
            names = dict(enumerate(LABELS[task]))
            config = ViTConfig(
                **facts, num_labels=len(names), id2label=names, label2id={n: i for i, n in names.items()}
            )
            expert = AutoModelForImageClassification.from_config(config)
            expert.vit.load_state_dict(base.state_dict())
            for weight in expert.vit.parameters():
                weight.data += 0.05 * torch.randn(weight.shape)
            expert.save_pretrained(folder / task)
            record = {"kind": "expert", "task": f"digits/{task}", "labels": LABELS[task], "base": str(folder / "base")}
            (folder / task / "mergectl.json").write_text(json.dumps(record))
    return folder


def change(source: Path, target: Path, edit: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]) -> Path:
    """Copy a model folder and edit its weights."""
    shutil.copytree(source, target)
    weights = edit(load_file(target / "model.safetensors"))
    save_file(dict(weights), target / "model.safetensors", metadata={"format": "pt"})
    return target


def weights(folder: Path) -> dict[str, Any]:
    """All weights of a model folder."""
    found: dict[str, Any] = load_file(folder / "model.safetensors")
    return found
