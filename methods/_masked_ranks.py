"""A weight made of the singular components of all tasks, of which a mask keeps some: its value and its gradient.

All tasks' components lie under each other, so that one product makes the weight and one gives all gradients.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mergectl.methods import _spectral
from mergectl.methods._blend import Dense, Part, held
from mergectl.methods._contract import MergeWarning, Remember
from mergectl.methods._spectral import Factors

if TYPE_CHECKING:
    from mergectl.methods._task_vectors import TaskVectors

HOLD = ("float32", "bfloat16", "disk", "kept")
HOLD_HELP = "how factors are held: in memory, there in half, in the lab's cache on disk, or only those kept at first"
NOT_KEPT = (
    "hold=disk: not all decompositions of this merge are kept on disk, so that every step makes them anew. Allow more "
    "room (MERGECTL_FACTORS_GB, and on the disk), or hold them in memory: hold=bfloat16."
)
_AT_ONCE = 1 << 22  # numbers of an intermediate product


class _LostError(Exception):
    """A decomposition is not remembered."""


class Ranks:
    """A weight [m, n] that is the origin plus U diag(coefficient * mask * s) V^T of every task."""

    def __init__(
        self, tasks: int, components: int, load: Callable[[], Factors], whole: Callable[[], torch.Tensor] | None = None
    ) -> None:
        """Take what gives the components of all tasks, and what reads the vectors themselves [task, m, n] cheaply."""
        self.tasks, self.components, self.load, self.whole = tasks, components, load, whole

    def add(self, weight: torch.Tensor, used: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Add the components that are kept; of a task that keeps most, its vector without those that are pruned."""
        assert mask is not None
        parts = self.load()
        if self.whole is not None and bool((whole := _mostly_kept(mask)).any()):
            for row, number in zip(self.whole(), (used * whole).tolist(), strict=True):
                weight.add_(row, alpha=number) if number else None
            mask = mask - whole.to(mask).unsqueeze(1)
        amounts = (used.unsqueeze(1) * parts.values.view(self.tasks, -1) * mask).reshape(-1)
        chosen = amounts.nonzero().reshape(-1)
        for rows in torch.split(chosen, max(1, _AT_ONCE // max(weight.shape))):
            every = len(rows) == len(amounts)
            left, right = (x.float() if every else x[rows].float() for x in (parts.left, parts.right))
            scales = amounts[rows].unsqueeze(1)
            if len(weight) < weight.shape[1]:
                weight.addmm_((left * scales).mT, right)
            else:
                weight.addmm_(left.mT, right * scales)

    def slopes(
        self, grad: torch.Tensor, used: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return, with q = u^T G v, the sums of mask * s * q, and coefficient * s * q of kept and pruned components."""
        assert mask is not None
        left, values, right = self.load()
        found = []
        for start in range(0, len(values), size := max(1, _AT_ONCE // max(1, min(grad.shape)))):
            rows = slice(start, start + size)
            if len(grad) >= grad.shape[1]:
                found.append((left[rows].float() @ grad).mul_(right[rows]).sum(dim=1))
            else:
                found.append((right[rows].float() @ grad.mT).mul_(left[rows]).sum(dim=1))
        moved = (torch.cat(found) * values).view(self.tasks, -1) if found else values.view(self.tasks, -1)
        return (moved * mask).sum(dim=1), moved * used.unsqueeze(1)


def _mostly_kept(mask: torch.Tensor) -> torch.Tensor:
    """Say which tasks keep more than half of their components, each of them whole or not at all."""
    return (mask.sum(dim=1) * 2 > mask.shape[1]) & ((mask == 0) | (mask == 1)).all(dim=1)


@dataclass(frozen=True)
class Kit:
    """What the weights of a merge are made from, and how their factors are held."""

    vectors: TaskVectors  # of the tasks, from the origin
    remember: Remember
    of: str  # what the vectors are where all experts decide them; nothing for task vectors
    hold: str
    device: torch.device
    ratio: float  # of the components, how many are kept at first

    def parts(self, names: Iterable[str], masked: Iterable[str]) -> dict[str, Part]:
        """Return how each weight depends on what is learned; several are decomposed at a time."""
        chosen, with_mask = self.vectors.only(names), set(masked)

        def make(name: str, x: torch.Tensor) -> Part:
            if name in with_mask:
                return self._ranks(name, x)
            return Dense(held(self.vectors, name, x, "disk" if self.hold == "disk" else "float32", self.device))

        parts = dict(zip(chosen, chosen.survey(make), strict=True))
        if self.hold == "disk" and not self._are_kept([name for name in chosen if name in with_mask]):
            warnings.warn(NOT_KEPT, MergeWarning, stacklevel=2)
        return parts

    def _are_kept(self, names: Iterable[str]) -> bool:
        """Say whether all decompositions are remembered, so that no step has to make them anew."""

        def lost() -> torch.Tensor:
            raise _LostError

        try:
            for name in names:
                for task in self.vectors.tasks:
                    _spectral.factors(self.remember, name, task, lost, self.of)
        except _LostError:
            return False
        return True

    def logits(self, name: str, ranks: Ranks, kept: float, pruned: float) -> torch.Tensor:
        """Return the logits to begin with, [task, component]: the largest components are kept."""
        row = torch.full((ranks.components,), pruned)
        row[: self._kept(name)] = kept
        return row.repeat(ranks.tasks, 1)

    def _kept(self, name: str) -> int:
        """Return how many components are kept at first: rounded down as int() does, perhaps none."""
        full = min(self.vectors.shapes[name])
        return full if self.ratio == 1 else int(full * self.ratio)

    def _ranks(self, name: str, x: torch.Tensor) -> Ranks:
        count = self._kept(name) if self.hold == "kept" else min(x.shape[1:])
        load = functools.partial(self._load, name, count)
        if self.hold == "disk":
            load(x)
            return Ranks(len(x), count, load, self._whole(name))
        left, values, right = load(x)
        half = torch.bfloat16 if self.hold == "bfloat16" else torch.float32
        factors = Factors(left.to(half), values, right.to(half))
        return Ranks(len(x), count, lambda: factors, self._whole(name))

    def _load(self, name: str, count: int, x: torch.Tensor | None = None) -> Factors:
        """Return the components of all tasks, as they are remembered, else of the vectors given or read."""
        parts = []
        for number, task in enumerate(self.vectors.tasks):
            make = functools.partial(self._row, name, number, x)
            found = _spectral.factors(self.remember, name, task, make, self.of)
            parts.append(found.top(count))
        return Factors(*(part.to(self.device) for part in _spectral.joined(parts)))

    def _row(self, name: str, number: int, x: torch.Tensor | None) -> torch.Tensor:
        return (self.vectors[name] if x is None else x)[number]

    def _whole(self, name: str) -> Callable[[], torch.Tensor] | None:
        """Return what reads the vectors; on a device a product is faster than sending them there."""
        if self.device.type != "cpu" or self.hold == "kept":
            return None
        return lambda: self.vectors[name].to(self.device, torch.float32)
