"""Text-to-text tasks made ready for an encoder-decoder: texts for the encoder, answers for the decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergectl.errors import UserError
from mergectl.preprocess import Example
from mergectl.tokenizer_files import open_tokenizer, save_tokenizer

if TYPE_CHECKING:
    import numpy as np
    import torch

    from mergectl.benchmarks._contract import Task

MAX_LENGTH = 512  # tokens that the encoder reads, where nothing else is said
IGNORED = -100  # stands where an answer has no more tokens; losses and scores leave it out


@dataclass(frozen=True)
class AnswerPreparer:
    """Token ids of a text, cut at `max_length`, and of the answers it may get, each ended by the end token."""

    tokenizer: Any
    max_length: int
    pad: int
    end: int
    start: int  # what the decoder reads first

    def prepare(self, task: Task, columns: Mapping[str, Sequence[Any]]) -> list[Example]:
        """Tokenise all texts at once, and each different answer once."""
        texts, offered = list(columns["text"]), columns["answers"]
        if not texts:
            return []
        encoded = self.tokenizer(texts, truncation=True, max_length=self.max_length, return_attention_mask=False)
        known = {answer: self._answer(answer) for answers in offered for answer in answers}
        return [
            {"input_ids": ids, "answers": [known[answer] for answer in answers]}
            for ids, answers in zip(encoded["input_ids"], offered, strict=True)
        ]

    def _answer(self, text: str) -> list[int]:
        ids = list(self.tokenizer(text_target=text)["input_ids"])
        return ids if ids[-1:] == [self.end] else [*ids, self.end]

    def length(self, example: Example) -> int:
        """The number of tokens of the text."""
        return len(example["input_ids"])

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """A batch to learn from: the right answers are the labels."""
        import torch

        right = [example["answers"][example["labels"]] for example in examples]
        batch = {**self._texts(examples), **self._decoded(right, "labels")}
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def stack(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """A batch to score: all answers of all rows, whose row each one is (`owner`), and the `right` one's place."""
        import numpy as np
        import torch

        answers = [answer for example in examples for answer in example["answers"]]
        counts = [len(example["answers"]) for example in examples]
        batch = {
            **self._texts(examples),
            **self._decoded(answers, "answers"),
            "owner": np.repeat(np.arange(len(examples)), counts),
            "right": np.array([example["labels"] for example in examples]),
        }
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def _texts(self, examples: Sequence[Example]) -> dict[str, np.ndarray[Any, Any]]:
        """Texts padded on the right; an empty one becomes one padding token, so that there is something to read."""
        texts = [example["input_ids"] or [self.pad] for example in examples]
        return {"input_ids": _filled(texts, self.pad), "attention_mask": _filled([[1] * len(ids) for ids in texts], 0)}

    def _decoded(self, answers: Sequence[Sequence[int]], name: str) -> dict[str, np.ndarray[Any, Any]]:
        """Answers under a name, and, one place later, what the decoder reads while it gives them."""
        read = [[self.start, *answer[:-1]] for answer in answers]
        return {name: _filled(answers, IGNORED), "decoder_input_ids": _filled(read, self.pad)}

    def finish(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Nothing is left to do for texts."""
        return dict(batch)

    def decode(self, tokens: torch.Tensor) -> list[str]:
        """Rows of tokens as texts, without padding and marks."""
        known = tokens.where(tokens != IGNORED, self.pad).tolist()
        return [str(text) for text in self.tokenizer.batch_decode(known, skip_special_tokens=True)]

    def save(self, folder: Path) -> None:
        """Save the tokenizer, without the cut-off that training had set on it."""
        save_tokenizer(self.tokenizer, folder)


def _filled(rows: Sequence[Sequence[int]], value: int) -> np.ndarray[Any, Any]:
    """Rows of different length as one array, filled up with a value on the right."""
    import numpy as np

    array = np.full((len(rows), max(map(len, rows))), value)
    for place, row in enumerate(rows):
        array[place, : len(row)] = row
    return array


def answer_preparer(folder: Path | None, ref: str, config: Any, max_length: int | None = None) -> AnswerPreparer:
    """Open the tokenizer of an encoder-decoder's folder and fit it to the model."""
    tokenizer = open_tokenizer(folder, ref)
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{ref}: its tokenizer has {len(tokenizer)} tokens but the model only {config.vocab_size}. Use its own."
        )
    for word in ("pad_token", "eos_token"):
        if getattr(tokenizer, word) is None:
            raise UserError(f"{ref}: its tokenizer has no {word}, which text-to-text needs. Name it beside the others.")
    usual = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    usual["decoder_start_token_id"] = tokenizer.pad_token_id
    for name, token in usual.items():  # where the base's configuration does not even name its padding
        if getattr(config, name, None) is None:
            setattr(config, name, token)
    positions = getattr(config, "max_position_embeddings", None) or 10**9  # T5 has none
    length = min(max_length or MAX_LENGTH, positions)
    return AnswerPreparer(
        tokenizer, length, tokenizer.pad_token_id, tokenizer.eos_token_id, config.decoder_start_token_id
    )
