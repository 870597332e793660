"""Classifiers that read their answer off the last token, as GPT-2 and Llama do: where it stands, and their padding.

transformers looks for the last token that is not the padding token, and is wrong where a text itself ends with that
token (GPT-2 pads with its end token). Here the attention mask tells.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

USUAL_LENGTH = 512  # tokens, where nothing else is said: the public GPT-2 experts of GLUE are cut there


def is_decoder(config: Any) -> bool:
    """Whether the classifier of a transformers configuration answers at its last token: it asks for the padding."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as CLASSIFIERS

    if type(config) not in CLASSIFIERS or getattr(config, "is_encoder_decoder", False):
        return False
    return _asks_for_padding(CLASSIFIERS[type(config)])


def _asks_for_padding(kind: type[Any]) -> bool:
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code is not None and "pad_token_id" in code.co_names


def answer_at_last_token(model: Any) -> Any:
    """Let a classifier of this kind find its last token by the attention mask; any other is left as it is."""
    if _asks_for_padding(type(model)) and not getattr(model.config, "is_encoder_decoder", False):
        getattr(model, model.base_model_prefix).register_forward_hook(_spread_last, with_kwargs=True)
    return model


def _spread_last(_: Any, __: Any, given: Mapping[str, Any], output: Any) -> Any:
    """Put the last read token's feature at every position: whichever the classifier picks, it is that one."""
    import torch

    mask = given.get("attention_mask")
    if mask is None or mask.dim() != 2:
        return output
    states = output[0]
    places = torch.arange(mask.shape[1], device=mask.device)
    last = (mask.ne(0) * places).argmax(dim=1).to(states.device)
    rows = torch.arange(len(last), device=states.device)
    spread = states[rows, last].unsqueeze(1).expand_as(states)
    if isinstance(output, tuple):
        return (spread, *output[1:])
    output.last_hidden_state = spread
    return output


def with_padding(
    config: Mapping[str, Any], classifiers: Iterable[Mapping[str, Any]], tokenizer: Path
) -> dict[str, Any]:
    """A configuration that names the padding token of these classifiers, without which they read no batches.

    Where none of them names one, it is that of the tokenizer in a folder, or else the end token, if they answer at
    their last token.
    """
    found = dict(config)
    if found.get("pad_token_id") is not None:
        return found
    headed = [one for one in classifiers if "SequenceClassification" in (one.get("architectures") or [""])[0]]
    named = {one["pad_token_id"] for one in headed if one.get("pad_token_id") is not None}
    if not named and any(map(_is_decoder_file, headed)):
        ends = {one["eos_token_id"] for one in headed if isinstance(one.get("eos_token_id"), int)}
        named = ends if (own := _padding_in(tokenizer)) is None else {own}
    return found | ({"pad_token_id": named.pop()} if len(named) == 1 else {})


def _is_decoder_file(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is of a model that answers at its last token."""
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    return kind in CONFIG_MAPPING and is_decoder(CONFIG_MAPPING[kind]())


def _padding_in(folder: Path) -> int | None:
    """The number of the padding token of the tokenizer in a folder, if it has one."""
    paths = [folder / name for name in ("tokenizer_config.json", "tokenizer.json")]
    if not all(path.exists() for path in paths):
        return None
    facts, content = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
    word = facts.get("pad_token")
    text = word.get("content") if isinstance(word, Mapping) else word
    return next((row["id"] for row in content.get("added_tokens") or () if row["content"] == text), None)
