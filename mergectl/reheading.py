"""A model under another head than its own, opened as a checkpoint like any other: the head policies of the alpha study.

`reference` draws the head anew and takes the pooler of the base, so that a merge leaves that as it is. `interpolate`
says only that the model's head is to be merged with the base's.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mergectl.errors import UserError
from mergectl.headers import WORD_TO_TORCH
from mergectl.prefixes import headed_prefix_of, pooler_part
from mergectl.refs import Reheaded, Stack
from mergectl.weights import Checkpoint, Derived

if TYPE_CHECKING:
    import torch

SPREAD = 0.02  # standard deviation of fresh heads where a configuration names none
NORM = re.compile(r"(^|[._])(norm|ln|layernorm|layer_norm)\w*\.weight$", re.IGNORECASE)


def fresh_head(name: str, shape: tuple[int, ...], seed: int, spread: float = SPREAD) -> torch.Tensor:
    """A head's weight as a new model has it: normal matrices, biases 0, norms 1; decided by its name and the seed."""
    import torch

    if len(shape) < 2:
        return torch.full(shape, float(bool(NORM.search(name))))
    mixed = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(mixed[:8], "little") >> 1)
    return torch.randn(shape, generator=generator) * spread


class HeadedModel(Derived):
    """A model under a head policy, opened: everything else is read from the models that lend it."""

    def __init__(self, ref: Reheaded, model: Checkpoint, base: Checkpoint | None) -> None:
        self.reheaded, self.model, self.ref = ref, model, str(ref)
        self.folder, self.config, self.meta = model.folder, model.config, model.meta
        drawn = ref.policy == "reference"
        self._pooler = self._poolers(base) if drawn and base is not None else {}
        self._head = frozenset(self._own_head()) if drawn else frozenset[str]()
        self._base = base

    @property
    def blends(self) -> bool:
        """Whether the head is to be merged with the base's."""
        return self.reheaded.policy == "interpolate"

    def _poolers(self, base: Checkpoint) -> dict[str, str]:
        """The model's name of each pooler weight -> the base's, where both have it."""
        theirs = {part: name for name in base.names if (part := pooler_part(name)) is not None}
        ours = {name: part for name in self.model.names if (part := pooler_part(name)) is not None}
        found = {name: theirs[part] for name, part in ours.items() if part in theirs}
        for name, lent in found.items():
            if self.model.shape(name) != base.shape(lent):
                raise UserError(
                    f"'{name}' has shape {list(self.model.shape(name))} in {self.model.ref} but "
                    f"{list(base.shape(lent))} in {base.ref}. Layers are mapped between models alike in all but depth."
                )
        return found

    def _own_head(self) -> list[str]:
        prefix = headed_prefix_of(self.config, self.model.names)
        return [name for name in self.model.names if prefix and not name.startswith(prefix)]

    def __getitem__(self, name: str) -> torch.Tensor:
        import torch

        if name in self._head:
            spread = float(self.config.get("initializer_range") or SPREAD)
            drawn = fresh_head(name, self.model.shape(name), self.reheaded.seed, spread)
            return drawn.to(getattr(torch, WORD_TO_TORCH[self.model.dtype(name)]))
        if name in self._pooler and self._base is not None:
            return self._base[self._pooler[name]]
        return super().__getitem__(name)

    def dtype(self, name: str) -> str:
        """The type of a weight, without reading it."""
        if name in self._pooler and self._base is not None:
            return self._base.dtype(self._pooler[name])
        return super().dtype(name)

    def where(self, name: str) -> tuple[Path, int, int] | None:
        """The file, first byte and number of bytes of a weight; None for what is drawn."""
        if name in self._head:
            return None
        if name in self._pooler and self._base is not None:
            return self._base.where(self._pooler[name])
        return super().where(name)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the digests of the models and the policy, not over where the models lie."""
        lender = self._base.digest if self._pooler and self._base is not None else None
        parts = (self.model.digest, self.reheaded.policy, self.reheaded.seed, lender)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def placed(self, place: Callable[[Checkpoint], str | Stack]) -> Reheaded:
        """Its reference, with the models that it is made of where `place` says."""
        lender = None if self._base is None else str(place(self._base))
        return replace(self.reheaded, model=place(self.model), base=lender)

    def note(self) -> str:
        """What a person should know of it."""
        if self.blends:
            return f"The head of {self.model.ref} is merged with that of the base."
        return f"The head of {self.model.ref} is drawn anew by seed {self.reheaded.seed}, and its pooler is the base's."
