"""Weights that a model holds or uses more than once, such as an embedding that is its output head, too."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergectl.inputs import shape_of
from mergectl.tokens import TOKENS

if TYPE_CHECKING:
    import torch

HEAD = re.compile(
    r"(^|\.)(lm_head|lm_head\.decoder|embed_out|generator_lm_head|vocab_projector|predictions\.decoder)\."
)
WRITERS = ("CausalLM", "LMHeadModel", "ConditionalGeneration", "MaskedLM")
# In T5 and BART these repeat `shared.weight`; the published programs count it without them.
READ_AGAIN = re.compile(r"(^|\.)(en|de)coder\.embed_tokens\.weight$")


def repeated(models: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, str]:
    """Name -> the earlier name of which it is a copy in every one of the models."""
    import torch

    found: dict[str, str] = {}
    names = [name for name in models[0] if TOKENS.search(name)]
    for first, name in itertools.combinations(names, 2):
        if first in found or name in found or any(shape_of(model, first) != shape_of(model, name) for model in models):
            continue
        if all(torch.equal(model[first], model[name]) for model in models):  # most often the first one says no
            found[name] = first
    return found


def head_notes(base: Collection[str], heads: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Say whose output head over the tokens is no part of the result, as the base has none beside its embedding."""
    for task, names in heads.items():
        for name in names:
            if HEAD.search(name) and TOKENS.search(name) and name not in base:
                yield f"The base has no '{name}', so that of '{task}' is merged with none: kept in tasks/{task} alone."


def uses(names: Collection[str], tied: Mapping[str, str], config: Mapping[str, Any]) -> dict[str, int]:
    """How often a model uses each weight that it uses more than once.

    `names` are those of the merged weights, `tied` other names -> the merged weight they stand for. A file that lacks
    the output head of a model that writes leaves it to the embedding, which is then used once more.
    """
    groups: dict[str, list[str]] = {}
    for name, of in tied.items():
        groups.setdefault(of, [of]).append(name)
    counts = {of: max(1, sum(not READ_AGAIN.search(name) for name in group)) for of, group in groups.items()}
    architecture = (config.get("architectures") or [""])[0]
    if any(word in architecture for word in WRITERS) and not any(HEAD.search(name) for name in [*names, *tied]):
        embeddings = [name for name in names if TOKENS.search(name)]
        for name in sorted(embeddings, key=lambda name: not name.endswith("shared.weight"))[:1]:
            counts[name] = counts.get(name, 1) + 1
    return {name: count for name, count in counts.items() if count > 1}
