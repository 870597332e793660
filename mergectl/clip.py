"""What CLIP's text tower gives: a zero-shot head for a task's classes, made once and kept on disk.

A class is put into every prompt of its task; the texts' features are normalised, averaged, normalised again and scaled
by exp(logit_scale). The head is frozen: an expert is a vision tower, and a merge leaves the text tower as it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergectl.checkpoints import Checkpoint
from mergectl.errors import UserError
from mergectl.tokenizer_files import open_tokenizer

if TYPE_CHECKING:
    import torch

    from mergectl.benchmarks._contract import Task

KINDS = ("clip", "clip_vision_model")
HEAD = "classifier.weight"
PROJECTION, SCALE = "visual_projection.weight", "logit_scale"
TEXTS = ("text_model.", "text_projection.")
PROMPTS = ("a photo of a {}.",)  # of tasks that name none
BATCH = 256  # texts read at once


def is_zero_shot(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is of a CLIP model, other than one with a trained classifier."""
    return config.get("model_type") in KINDS and not any(
        "ForImageClassification" in name for name in config.get("architectures") or ()
    )


def has_texts(model: Mapping[str, Any]) -> bool:
    """Whether a model has what heads are made of."""
    return SCALE in model and any(name.startswith(TEXTS) for name in model)


def texts_of(task: Task) -> list[list[str]]:
    """For each class of a task the texts that stand for it: every prompt with every word for the class.

    >>> from mergectl.benchmarks._vision import FOURTEEN
    >>> texts_of(FOURTEEN[-1])[3][:2]
    ['a photo of a happy looking face.', 'a photo of a smiling looking face.']
    """
    prompts = task.prompts or PROMPTS
    words = [text.split("|") for text in task.words] or [[name.replace("_", " ")] for name in task.labels]
    return [[prompt.format(word) for prompt in prompts for word in own] for own in words]


class TextTower:
    """The text side of a CLIP model; it is read only where a head is not on disk yet."""

    def __init__(self, model: Checkpoint) -> None:
        self.source = model.donor if isinstance(model, Completed) else model

    def head(self, task: Task) -> torch.Tensor:
        """The zero-shot head [classes, features] of a task, from the cache if it is there."""
        import torch
        from safetensors.torch import load_file, save_file

        texts = texts_of(task)
        path = _folder() / f"{self._digest_of(texts)}.safetensors"
        if path.exists():
            known: torch.Tensor = load_file(path)[HEAD]
            return known
        with torch.inference_mode():
            found = torch.stack([self._mean(own) for own in texts])
            head: torch.Tensor = _normalised(found) * self.source[SCALE].float().exp()
        path.parent.mkdir(parents=True, exist_ok=True)
        work = path.with_name(f".{path.name}.{os.getpid()}")
        save_file({HEAD: head}, work)
        work.replace(path)
        return head

    def _mean(self, texts: list[str]) -> torch.Tensor:
        """The mean of the normalised features of texts."""
        import torch

        parts = [self._features(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)]
        found: torch.Tensor = torch.cat(parts).mean(dim=0)
        return found

    def _features(self, texts: list[str]) -> torch.Tensor:
        limit = self._model.config.max_position_embeddings
        batch = self._tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        features: torch.Tensor = self._model(batch["input_ids"], batch["attention_mask"]).text_embeds
        return _normalised(features)

    @cached_property
    def _tokenizer(self) -> Any:
        return open_tokenizer(self.source.folder, self.source.ref)

    @cached_property
    def _model(self) -> Any:
        """The tower itself, in float32."""
        import torch
        from transformers import CLIPConfig, CLIPTextModelWithProjection
        from transformers.initialization import no_init_weights

        whole = CLIPConfig.from_dict(dict(self.source.config))
        config = whole.text_config
        config.projection_dim = whole.projection_dim
        with no_init_weights():
            model = CLIPTextModelWithProjection._from_config(config, dtype=torch.float32)
        found = {name: self.source[name].float() for name in self._names}
        lost = [name for name in model.load_state_dict(found, strict=False).missing_keys if "position_ids" not in name]
        if lost:
            raise UserError(f"{self.source.ref} has no weight '{lost[0]}', so its text tower cannot be used.")
        return model.eval()

    @cached_property
    def _names(self) -> list[str]:
        if not has_texts(self.source):
            raise UserError(
                f"{self.source.ref} has no text tower, of which the heads of a CLIP model are made. Name the CLIP "
                "model that it was fine-tuned from: --heads suite/task=openai/clip-vit-base-patch32"
            )
        return sorted(name for name in self.source if name.startswith(TEXTS))

    def _digest_of(self, texts: list[list[str]]) -> str:
        import blake3

        return str(blake3.blake3(json.dumps([self._digest, texts]).encode()).hexdigest())

    @cached_property
    def _digest(self) -> str:
        """Digest of all that decides a text's feature: weights, configuration and tokenizer."""
        import blake3
        import torch

        from mergectl.artefacts import TOKENIZER

        found = blake3.blake3(json.dumps(self.source.config.get("text_config"), sort_keys=True).encode())
        for name in (*self._names, SCALE):
            found.update(name.encode())
            found.update(self.source[name].contiguous().view(-1).view(torch.uint8).numpy().data)
        for path in (self.source.folder / name for name in TOKENIZER):
            found.update(path.read_bytes() if path.exists() else b"-")
        return str(found.hexdigest())


class Completed(Checkpoint):
    """A vision tower with what it lacks, projection and texts, from the CLIP model that it belongs to."""

    def __init__(self, tower: Checkpoint, donor: Checkpoint) -> None:
        self.folder, self.ref, self.meta = tower.folder, tower.ref, tower.meta
        self.config, self.tower, self.donor = donor.config, tower, donor

    def _owner(self, name: str) -> Checkpoint:
        return self.tower if name in self.tower else self.donor

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._owner(name)[name]

    def __contains__(self, name: object) -> bool:
        """Say whether either has such a weight."""
        return name in self.tower or name in self.donor

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def names(self) -> list[str]:
        """The tower's names, then those of the donor's that it lacks."""
        return list(dict.fromkeys([*self.tower, *self.donor]))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight, without reading it."""
        return self._owner(name).shape(name)

    def dtype(self, name: str) -> str:
        """The word for a weight's type, without reading it."""
        return self._owner(name).dtype(name)

    def where(self, name: str) -> tuple[Path, int, int] | None:
        """Where a weight lies in which file."""
        return self._owner(name).where(name)

    @property
    def settings_folder(self) -> Path:
        """The folder that says how images are prepared."""
        own = self.folder / "preprocessor_config.json"
        return self.folder if own.exists() else self.donor.folder


def completed(model: Checkpoint, donors: Iterable[Checkpoint]) -> Checkpoint:
    """Give a vision tower the texts, and if need be the projection, of the first donor that has them."""
    if not is_zero_shot(model.config) or has_texts(model):
        return model
    for donor in donors:
        if has_texts(donor):
            return Completed(model, donor)
    if PROJECTION in model and model.config.get("model_type") == "clip":
        return model
    raise UserError(
        f"{model.ref} is the vision tower of a CLIP model without its projection and texts. Name the model that it was "
        "fine-tuned from: --heads suite/task=openai/clip-vit-base-patch32"
    )


def _normalised(features: torch.Tensor) -> torch.Tensor:
    """Features of length 1 each."""
    length: torch.Tensor = features.norm(dim=-1, keepdim=True)
    return features / length


def _folder() -> Path:
    """Where programs keep what they can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mergectl" / "heads"
