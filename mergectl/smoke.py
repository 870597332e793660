"""Try a pipeline in seconds and offline: a tiny model with fresh weights, and the tasks' own two sample rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergectl.clip import texts_of
from mergectl.errors import UserError

if TYPE_CHECKING:
    from mergectl.benchmarks._contract import Task

ROWS = 64  # per split: enough for a split of which 32 rows tune and the rest reports
SPECIAL = ("<pad>", "</s>", "<unk>")


def write_rows(folder: Path, tasks: Sequence[Task]) -> None:
    """Write every split of the tasks as a data folder, each filled with the task's samples in turn."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for task in tasks:
        for split in {part.split for part in task.parts.values()} if task.make is None else ():
            path = folder / task.source / task.config / f"{split}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist([dict(task.samples[row % 2]) for row in range(ROWS)]), path)


def make(folder: Path, config: Mapping[str, Any], tasks: Sequence[Task], seed: int) -> None:
    """Write what a configuration stands for: a tiny base, or with a `layout` a root that holds an expert per task."""
    if "layout" not in config:
        make_base(folder, config, tasks, seed)
        return
    facts = {key: value for key, value in config.items() if key != "layout"}
    for number, task in enumerate(tasks, 1):
        _make_expert(folder / task.name / f"{facts['model_type']}-base_lr1e-05", facts, task, tasks, number)


def _make_expert(folder: Path, config: Mapping[str, Any], task: Task, tasks: Sequence[Task], number: int) -> None:
    """Write a classifier near the base of the same configuration, as if it were fine-tuned, and nothing about it."""
    import torch

    from mergectl.models import quiet

    model = _fresh(folder, config, task, tasks, seed=0)
    if config["model_type"] == "clip":
        model = model.clip  # as public experts are: a vision tower, whose head is made of texts
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad(), quiet():
        for weight in model.parameters():
            weight.add_(0.01 * torch.randn(weight.shape, generator=generator))
        model.save_pretrained(folder)


def _fresh(folder: Path, config: Mapping[str, Any], task: Task, tasks: Sequence[Task], seed: int) -> Any:
    """A model with seeded fresh weights for a task; its folder gets a tokenizer of the words in the tasks' samples."""
    from mergectl.models import model_config, new_model, open_source

    folder.mkdir(parents=True, exist_ok=True)
    facts = {"pad_token_id": 0, "eos_token_id": 1, **config, "vocab_size": _save_tokenizer(folder, _texts(tasks))}
    (folder / "config.json").write_text(json.dumps(facts), encoding="utf-8")
    return new_model(model_config(open_source(folder), task), task, seed)


def make_base(folder: Path, config: Mapping[str, Any], tasks: Sequence[Task], seed: int) -> None:
    """Write a model of this configuration with seeded fresh weights, and a tokenizer of the words in the samples."""
    from mergectl.models import quiet
    from mergectl.naming import is_writer

    kind = config.get("model_type")
    if kind != "clip" and any(task.kind == "image_classification" for task in tasks):
        raise UserError(
            f"A smoke run reads images with a tiny CLIP, not a {kind} model, and this pipeline has a task on images."
        )
    if kind == "clip":
        folder.mkdir(parents=True, exist_ok=True)
        _make_clip(folder, config, _save_tokenizer(folder, _texts(tasks)), seed)
        return
    model = _fresh(folder, config, tasks[0], tasks, seed)
    with quiet():
        (model if is_writer(model) else getattr(model, model.base_model_prefix)).save_pretrained(folder)


def _make_clip(folder: Path, config: Mapping[str, Any], size: int, seed: int) -> None:
    """Write a whole CLIP model, text tower included, whose texts end with the tokenizer's last token."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    from mergectl.models import quiet

    words = {"vocab_size": size, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    facts = {**config, "text_config": {**config["text_config"], **words}}
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        CLIPModel(CLIPConfig(**facts)).save_pretrained(folder)


def _texts(tasks: Sequence[Task]) -> list[str]:
    """All that the samples say, in the words of all templates."""
    found = []
    for task in tasks:
        if task.kind == "image_classification":
            found += [text for own in texts_of(task) for text in own]
            continue
        for sample in task.samples:
            found += [str(sample[name]) for name in task.inputs]
            for template in task.templates:
                text, answers = template.ask(sample)
                found += [text, *answers]
    return found


def _save_tokenizer(folder: Path, texts: Iterable[str]) -> int:
    """Save a tokenizer that knows the words of these texts; return how many tokens it has."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Whitespace()
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*SPECIAL, *words])}, unk_token=SPECIAL[2]))
    core.pre_tokenizer = split
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    pad, end, unknown = SPECIAL
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=pad, eos_token=end, sep_token=end, unk_token=unknown,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    return len(tokenizer)
