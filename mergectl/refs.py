"""What can stand where a model is named: a folder, run or hub id, or a model made of others.

Layers of several models, a model without some tokens, a model under another head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias


@dataclass(frozen=True)
class Stack:
    """Layers in order, each a model's and its number there, and the models that lend what lies outside of layers."""

    layers: tuple[tuple[str, int], ...]
    front: str  # lends what comes before the layers: embeddings
    back: str  # lends what comes after them: last norm and heads
    frame: str  # lends configuration, tokenizer and names

    @property
    def models(self) -> list[str]:
        """The models it is made of, each once, the frame first."""
        return list(dict.fromkeys([self.frame, self.front, self.back, *(model for model, _ in self.layers)]))

    @property
    def runs(self) -> list[tuple[str, int, int]]:
        """Its layers as model, first layer and the layer after the last, as few as possible."""
        found: list[tuple[str, int, int]] = []
        for model, layer in self.layers:
            if found and found[-1][::2] == (model, layer):
                found[-1] = (model, found[-1][1], layer + 1)
            else:
                found.append((model, layer, layer + 1))
        return found

    def __str__(self) -> str:
        """What a person reads: `a[0:24] + b[8:32]`."""
        return " + ".join(f"{model}[{start}:{end}]" for model, start, end in self.runs)

    def record(self) -> dict[str, Any]:
        """What a record keeps, from which `ref_of` makes it again."""
        lenders = {"front": self.front, "back": self.back, "frame": self.frame}
        return {"layers": {"runs": self.runs, **lenders}}


@dataclass(frozen=True)
class Cut:
    """A model without the rows of tokens from a number on."""

    model: str | Stack
    rows: int

    def __str__(self) -> str:
        """What a person reads."""
        return f"{self.model} (tokens 0 to {self.rows - 1})"

    def record(self) -> dict[str, Any]:
        """What a record keeps, from which `ref_of` makes it again."""
        below = self.model.record() if isinstance(self.model, Stack) else {"model": self.model}
        return {**below, "tokens": self.rows}


@dataclass(frozen=True)
class Reheaded:
    """A model whose head is drawn anew on the pooler of `base` (`reference`), or is merged as its other weights are."""

    model: str | Stack
    policy: str  # reference or interpolate
    base: str | None = None  # lends the pooler, where it has one
    seed: int = 0

    def __str__(self) -> str:
        """What a person reads."""
        if self.policy == "interpolate":
            return f"{self.model} (its head is merged)"
        return f"{self.model} (pooler of {self.base}, head drawn by seed {self.seed})"

    def record(self) -> dict[str, Any]:
        """What a record keeps, from which `ref_of` makes it again."""
        below = self.model.record() if isinstance(self.model, Stack) else {"model": self.model}
        return {**below, "head": {"policy": self.policy, "base": self.base, "seed": self.seed}}


Ref: TypeAlias = str | Stack | Cut | Reheaded


def ref_of(row: Mapping[str, Any]) -> Ref:
    """The model that an input's row in a record names."""
    if "head" in row:
        return Reheaded(_whole(row, str(row.get("model"))), **row["head"])
    if "tokens" in row:
        return Cut(_whole(row, str(row.get("model"))), row["tokens"])
    return _whole(row, str(row["ref"]))


def _whole(row: Mapping[str, Any], ref: str) -> str | Stack:
    if "layers" not in row:
        return ref
    found = row["layers"]
    layers = tuple((model, layer) for model, start, end in found["runs"] for layer in range(start, end))
    return Stack(layers, found["front"], found["back"], found["frame"])
