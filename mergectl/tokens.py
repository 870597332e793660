"""Which weights have one row per token, and along which dimension."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Input embeddings and language-model heads.
TOKENS = re.compile(
    r"(^|\.)(word_embeddings?|embed_tokens|tok_embeddings|token_embeddings?|wte|shared|embed_in|embed_out|lm_head"
    r"|lm_head\.decoder|generator_lm_head|vocab_projector|predictions|predictions\.decoder|final_logits_bias"
    r"|(?<!\w)embeddings)(\.(weight|bias))?$"
)


def token_dim(shape: Sequence[int]) -> int:
    """The dimension of the tokens: the second of a bias kept as one row, else the first."""
    return 1 if len(shape) == 2 and shape[0] == 1 else 0
