"""Under which prefix a model's names hold its backbone, what is its head, and what is its pooler."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

HEADED = ("Classification", "QuestionAnswering", "MultipleChoice")
POOLER = re.compile(r"(^|\.)(pooler\..*)")
LAYER = re.compile(r"(?:^|.*?\.)\d+\.")  # up to the first number
DISTILLED = re.compile(r"(^|\.)fit_denses?\.")  # projections that TinyBERT learnt its teacher's states with


def prefixes(names: Sequence[str]) -> list[str]:
    """No prefix, and every first component that holds more than half of the names."""
    counts = Counter(name.split(".", 1)[0] for name in names if "." in name)
    return ["", *(f"{word}." for word, n in counts.items() if 2 * n > len(names))]


def headed_prefix_of(config: Mapping[str, Any], names: Sequence[str]) -> str:
    """The backbone's prefix in a model saved with a task head, or '' when it has none."""
    classes = config.get("architectures") or [""]
    if not any(word in classes[0] for word in HEADED):
        return ""
    return prefixes(names)[-1]


def pooler_part(name: str) -> str | None:
    """What a pooler's weight is called in any model, `pooler.dense.weight`; None for all other weights."""
    found = POOLER.search(name)
    return None if found is None else found[2]


def within_modules(names: Iterable[str], shared: Iterable[str]) -> list[str]:
    """Those of the names that lie in a numbered layer, or in a module, of which another weight is shared."""
    layers, modules = set(), set()
    for name in shared:
        modules.add(name.rpartition(".")[0])
        layers |= {found[0] for found in [LAYER.match(name)] if found}
    return [
        name
        for name in names
        if ((found := LAYER.match(name)) and found[0] in layers) or name.rpartition(".")[0] in modules - {""}
    ]
