"""What a model that is named beside another lends it."""

from __future__ import annotations

from mergectl.checkpoints import Checkpoint
from mergectl.clip import HEAD, KINDS, has_texts, is_zero_shot
from mergectl.tokenizer_files import has_tokenizer


def role_of(lender: Checkpoint, model: Checkpoint) -> str:
    """What a model named beside another lends it: the texts of a CLIP model, a tokenizer, or a head."""
    lends_tokenizer = has_tokenizer(lender.folder) and not has_tokenizer(model.folder)
    no_head = "Classification" not in (lender.config.get("architectures") or [""])[0]
    if lends_texts(lender, model):
        return "texts"
    return "tokenizer" if lends_tokenizer and no_head and model.config.get("model_type") not in KINDS else "head"


def lends_texts(lender: Checkpoint, model: Checkpoint) -> bool:
    """Whether one gives a CLIP vision tower without a head or texts the head that is its own."""
    return is_zero_shot(model.config) and not has_texts(model) and HEAD not in model and has_texts(lender)
