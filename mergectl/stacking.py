"""Models put together from layers of others, and models without some tokens, opened as checkpoints like any other.

Depth up-scaling, frankenmerges and experts of another depth are stacks of layers. Nothing is copied: a weight lies
where it lay.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mergectl.errors import UserError
from mergectl.layers import Numbered, is_front, restacked, tells_kinds, the_stack
from mergectl.refs import Cut, Stack
from mergectl.reheading import HeadedModel
from mergectl.tokens import TOKENS, token_dim
from mergectl.weights import Checkpoint, Derived

if TYPE_CHECKING:
    import torch

SPELLINGS = ((".gamma", ".weight"), (".beta", ".bias"))  # LayerNorm in the first BERT checkpoints, and today


def parts_of(checkpoint: Checkpoint) -> list[Checkpoint]:
    """The models on disk that a model is made of: of a stack, its frame first; of any other, itself."""
    if isinstance(checkpoint, CutTokens | HeadedModel):
        return parts_of(checkpoint.model)
    return list(checkpoint.models.values()) if isinstance(checkpoint, Stacked) else [checkpoint]


class Stacked(Checkpoint):
    """A stack, opened: weights under the frame's names, read from the models that lend them."""

    def __init__(self, stack: Stack, open_model: Callable[[str], Checkpoint]) -> None:
        self.stack, self.ref = stack, str(stack)
        self.models = {ref: open_model(ref) for ref in stack.models}
        self.frame = self.models[stack.frame]
        self.folder = self.frame.folder
        # The base that the frame came from is not that of all its layers.
        self.meta = {key: value for key, value in self.frame.meta.items() if key not in ("base", "base_digest")}
        self._numbered = {ref: the_stack(model.names, ref) for ref, model in self.models.items()}
        for ref, start, end in stack.runs:
            if not 0 <= start < end <= self._numbered[ref].count:
                raise UserError(f"{ref} has {self._numbered[ref].count} layers, and no layers {start} to {end - 1}.")
        sources = [(self.models[ref].config, layer) for ref, layer in stack.layers]
        count = self._numbered[stack.frame].count
        self.config = restacked(self.frame.config, sources, count, stack.frame)

    @cached_property
    def _places(self) -> dict[str, tuple[Checkpoint, str]]:
        """Name -> the model that lends the weight, and its name there."""
        outer = self._outer()
        found = {name: place for name, place in outer.items() if is_front(name)}
        prefix, known = self._numbered[self.stack.frame].prefix, self._endings()
        for number, (ref, layer) in enumerate(self.stack.layers):
            for name, ending in _of_layer(self.models[ref], self._numbered[ref], layer):
                found[f"{prefix}{number}.{_as_in(known, ending)}"] = (self.models[ref], name)
        return found | outer

    def _outer(self) -> dict[str, tuple[Checkpoint, str]]:
        """The weights outside of layers, from the models that lend them; those must have the same ones."""
        front, back = ({n for n in self.models[ref].names if self._numbered[ref].split(n) is None}
                       for ref in (self.stack.front, self.stack.back))  # fmt: skip
        if odd := sorted(front ^ back):
            has, lacks = (self.stack.front, self.stack.back) if odd[0] in front else (self.stack.back, self.stack.front)
            raise UserError(f"{has} has '{odd[0]}' and {lacks} has not, so their layers do not go into one model.")
        lenders = {name: self.models[self.stack.front if is_front(name) else self.stack.back] for name in front}
        order = [name for name in self.models[self.stack.front].names if name in front]
        return {name: (lenders[name], name) for name in order}

    def _endings(self) -> set[str]:
        """What follows the number in the names of the frame's layers."""
        numbered = self._numbered[self.stack.frame]
        return {part[1] for name in self.frame.names if (part := numbered.split(name)) is not None}

    def __getitem__(self, name: str) -> torch.Tensor:
        model, own = self._places[name]
        return model[own]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def names(self) -> list[str]:
        """Weight names: embeddings, layer after layer, then what follows them."""
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight, without reading it."""
        model, own = self._places[name]
        return model.shape(own)

    def dtype(self, name: str) -> str:
        """The type of a weight, without reading it."""
        model, own = self._places[name]
        return model.dtype(own)

    def where(self, name: str) -> tuple[Path, int, int] | None:
        """The file, first byte and number of bytes of a weight in the model that lends it."""
        model, own = self._places[name]
        return model.where(own)

    def check_unchanged(self) -> None:
        """Refuse files of weights that are others now than when their headers were read."""
        for model in self.models.values():
            model.check_unchanged()

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the models' digests and which layers are taken, not over where the models lie."""
        place = {ref: self.models[ref].digest for ref in self.stack.models}
        runs = [(place[ref], start, end) for ref, start, end in self.stack.runs]
        outer = [place[ref] for ref in (self.stack.front, self.stack.back, self.stack.frame)]
        return hashlib.sha256(json.dumps([runs, outer]).encode()).hexdigest()

    @property
    def label(self) -> str:
        """The frame's name."""
        return self.frame.label

    def note(self) -> str:
        """What a person should know of it."""
        lenders = " and ".join(dict.fromkeys([self.stack.front, self.stack.back]))
        told = self._out_of_place() or self._lacking()
        return " ".join([f"Made of layers, {self.ref}; the rest is that of {lenders}.", *told])

    def _out_of_place(self) -> list[str]:
        """Say where a layer is not of the kind that its place is to have, as far as the frame's configuration knows."""
        numbered, known = self._numbered[self.stack.frame], self._endings()

        def kind(ref: str, layer: int) -> frozenset[str]:
            found = _of_layer(self.models[ref], self._numbered[ref], layer)
            return frozenset(_as_in(known, ending) for _, ending in found)

        own = [kind(self.stack.frame, number) for number in range(numbered.count)]
        if tells_kinds(self.frame.config, own):
            return []
        for number, (ref, layer) in enumerate(self.stack.layers):
            if number >= numbered.count or kind(ref, layer) != own[number]:
                return [
                    f"The layers of {self.stack.frame} are of several kinds, which its configuration does not list: it "
                    f"may take layer {number} of the result, which is layer {layer} of {ref}, for one of another kind. "
                    "Look at what transformers reports when it loads the result."
                ]
        return []

    def _lacking(self) -> Iterator[str]:
        """Say which layers lack a few weights that others of their model have; layers of another kind lack many."""
        for ref, model in self.models.items():
            numbered, used = self._numbered[ref], {layer for own, layer in self.stack.layers if own == ref}
            endings = [{ending for _, ending in _of_layer(model, numbered, n)} for n in range(numbered.count)]
            for layer in sorted(used):
                lost = sorted(set().union(*endings) - endings[layer])
                if lost and 4 * len(lost) <= len(endings[layer]):
                    yield f"Layer {layer} of {ref} has no '{lost[0]}', which its other layers have."


class CutTokens(Derived):
    """A model without the last rows of its embeddings and heads."""

    def __init__(self, cut: Cut, model: Checkpoint) -> None:
        self.cut, self.model, self.ref = cut, model, str(cut)
        self.folder, self.meta = model.folder, model.meta
        self.config = model.config | ({"vocab_size": cut.rows} if "vocab_size" in model.config else {})

    def _rows(self, name: str) -> int | None:
        """How many rows a weight has in the model; None if all of them stay."""
        shape = self.model.shape(name)
        rows = shape[token_dim(shape)] if TOKENS.search(name) and shape else 0
        return rows if rows > self.cut.rows else None

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight, without reading it."""
        shape, dim = self.model.shape(name), token_dim(self.model.shape(name))
        return shape if self._rows(name) is None else (*shape[:dim], self.cut.rows, *shape[dim + 1 :])

    def where(self, name: str) -> tuple[Path, int, int] | None:
        """The file, first byte and number of bytes of a weight; what is left of it lies at its beginning."""
        place, rows = self.model.where(name), self._rows(name)
        return place if place is None or rows is None else (*place[:2], place[2] // rows * self.cut.rows)

    def __getitem__(self, name: str) -> torch.Tensor:
        whole = self.model[name]
        return whole if self._rows(name) is None else whole.narrow(token_dim(whole.shape), 0, self.cut.rows)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the model's digest and the number of rows."""
        return hashlib.sha256(f"{self.model.digest} {self.cut.rows}".encode()).hexdigest()

    def note(self) -> str:
        """What a person should know of it."""
        return f"{self.model.ref} goes in without its tokens from {self.cut.rows} on."


def _of_layer(model: Checkpoint, numbered: Numbered, layer: int) -> Iterator[tuple[str, str]]:
    """The names of a layer's weights, and what follows the number in them."""
    for name in model.names:
        part = numbered.split(name)
        if part is not None and part[0] == layer:
            yield name, part[1]


def _as_in(known: set[str], ending: str) -> str:
    """An ending as the frame spells it."""
    for one, other in (*SPELLINGS, *((new, old) for old, new in SPELLINGS)):
        if ending not in known and ending.endswith(one) and ending.removesuffix(one) + other in known:
            return ending.removesuffix(one) + other
    return ending
