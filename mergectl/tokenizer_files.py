"""The tokenizer beside a model: whether it is there, opened, and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergectl.errors import UserError

FILES = (
    "tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model",
    "spm.model",
)  # fmt: skip


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer without the cut-off and the padding that its last use had set on it."""
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)


def has_tokenizer(folder: Path | None) -> bool:
    """Whether a model's folder holds its tokenizer."""
    return folder is not None and any((folder / name).exists() for name in FILES)


def open_tokenizer(folder: Path | None, ref: str) -> Any:
    """Open the tokenizer of a model folder; a folder without one, or with a broken one, is an error that says so."""
    from transformers import AutoTokenizer

    needed = "Put tokenizer.json and tokenizer_config.json into the model's folder."
    if not has_tokenizer(folder):
        raise UserError(f"{ref} has no tokenizer, and the task is made of texts. {needed}")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises anything for a broken file, Rust errors included
        raise UserError(f"{ref}: its tokenizer cannot be read ({error}). {needed}") from error
