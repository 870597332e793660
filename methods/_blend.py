"""A merge as a function of numbers to learn: coefficients of task vectors, and masks on what they are made of.

The gradient of those numbers follows from that of the merged weights in closed form, weight by weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from mergectl.methods._task_vectors import TaskVectors


class Part(Protocol):
    """How one weight depends on its coefficients [task] and, if it has any, on its mask [task, component]."""

    components: int  # per task; 0: no mask

    def add(self, weight: torch.Tensor, used: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Add what the tasks contribute to the origin, in place."""
        ...

    def slopes(
        self, grad: torch.Tensor, used: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the gradients with respect to the coefficients [task] and to the mask [task, component]."""
        ...


HOLD = ("float32", "bfloat16", "disk")
HOLD_HELP = "how task vectors are held: in memory, there in half, or read from disk in every step"


def held(
    vectors: TaskVectors, name: str, x: torch.Tensor, how: str, device: torch.device
) -> Callable[[], torch.Tensor]:
    """Return what gives one weight's vectors [task, *shape], which are `x` now, in every step."""
    if how == "disk":
        return lambda: vectors[name].to(device)
    rows = x.to(device, getattr(torch, how), copy=True)
    return lambda: rows


class Dense:
    """A weight that is the origin plus each task's vector times its coefficient."""

    components = 0

    def __init__(self, rows: Callable[[], torch.Tensor]) -> None:
        """Take what gives the vectors [task, *shape]: from memory, or reading them anew."""
        self.rows = rows

    def add(self, weight: torch.Tensor, used: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Add the vectors, one task at a time."""
        for row, number in zip(self.rows(), used.tolist(), strict=True):
            weight.add_(row, alpha=number)

    def slopes(
        self, grad: torch.Tensor, used: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return each vector's inner product with the gradient."""
        flat = grad.reshape(-1)
        return torch.stack([row.to(flat.dtype).reshape(-1) @ flat for row in self.rows()]), None


@dataclass(frozen=True)
class Rules:
    """How the stored numbers are used: coefficients clamped or made to sum to one; masks."""

    clamp: tuple[float, float] | None = None
    normalize: bool = False
    temperature: float = 10.0
    soft: bool = False

    def used(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Return the coefficients [task, weight] as they multiply task vectors."""
        found = coefficients if self.clamp is None else coefficients.clamp(*self.clamp)
        return found.softmax(dim=0) if self.normalize else found

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        """Return what is kept of each component: all or nothing by the logit's sign, or the chance itself."""
        return (logits / self.temperature).sigmoid() if self.soft else (logits > 0).to(logits.dtype)

    def passed_on(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the slope of the chance, with which the gradient passes straight through the mask."""
        chance = (logits / self.temperature).sigmoid()
        return chance * (1 - chance) / self.temperature


class Blend:
    """Merged weights as a function of the numbers to learn, which lie in one vector: coefficients, then mask logits."""

    def __init__(
        self, vectors: TaskVectors, origin: Mapping[str, torch.Tensor], parts: Mapping[str, Part], rules: Rules,
        scales: Sequence[float], logits: Mapping[str, torch.Tensor], groups: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        """Take the weights to start from, those that are merged with all coefficients at `scales`, and the logits.

        Weights of one of the `groups` share their coefficients; without groups each has its own.
        """
        self.tasks, self.origin, self.parts, self.rules = vectors.tasks, origin, dict(parts), rules
        self._at_once = vectors.reading(lambda name: torch.empty(0))
        of = {name: name if groups is None else groups[name] for name in self.parts}
        self.groups = list(dict.fromkeys(of.values()))  # whose coefficients they are, in order
        place = {group: number for number, group in enumerate(self.groups)}
        self.column = {name: place[group] for name, group in of.items()}
        start = torch.tensor(scales).reshape(-1, 1).repeat(1, len(self.groups))
        device = next(iter(origin.values())).device if origin else torch.device("cpu")
        self.numbers = torch.cat([start.reshape(-1), *(x.reshape(-1) for x in logits.values())]).to(device)
        self._spans = _spans(start.numel(), logits)
        self.weights = {name: x.clone().requires_grad_() if name in self.parts else x for name, x in origin.items()}

    def coefficients(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the part of a vector that belongs to the coefficients, [task, weight] (or [task, group])."""
        return numbers[: len(self.tasks) * len(self.groups)].view(len(self.tasks), len(self.groups))

    def logits(self, name: str, numbers: torch.Tensor) -> torch.Tensor:
        """Return the part of a vector that belongs to a weight's mask, [task, component]."""
        start, shape = self._spans[name]
        return numbers[start : start + math.prod(shape)].view(shape)

    @property
    def masked(self) -> list[str]:
        """The weights that have masks."""
        return list(self._spans)

    def each(self, work: Callable[[str], Any]) -> None:
        """Do something for every merged weight, in as many threads as there are."""
        self._at_once.only(self.parts).survey(lambda name, _: work(name))

    def build(self) -> dict[str, torch.Tensor]:
        """Put the numbers' meaning into the candidate weights, and return all weights."""
        used = self.rules.used(self.coefficients(self.numbers))

        def put(name: str) -> None:
            with torch.no_grad():
                weight = self.weights[name]
                weight.grad = None
                weight.copy_(self.origin[name])
                self.parts[name].add(weight, used[:, self.column[name]], self._mask(name))

        self.each(put)
        return self.weights

    def gradient(self) -> torch.Tensor:
        """Return the numbers' gradient, from that of the weights."""
        result = torch.zeros_like(self.numbers)
        with torch.enable_grad():
            stored = self.coefficients(self.numbers).clone().requires_grad_()
            used = self.rules.used(stored)
        slopes = torch.zeros((len(self.tasks), len(self.parts)), device=self.numbers.device)
        order = {name: i for i, name in enumerate(self.parts)}

        def put(name: str) -> None:
            if (grad := self.weights[name].grad) is None:
                return
            with torch.no_grad():
                column = used.detach()[:, self.column[name]]
                slopes[:, order[name]], mask = self.parts[name].slopes(grad, column, self._mask(name))
                if mask is not None:
                    self.logits(name, result).copy_(mask * self.rules.passed_on(self.logits(name, self.numbers)))

        self.each(put)
        columns = torch.tensor([*self.column.values()], dtype=torch.long, device=slopes.device)
        own = torch.zeros_like(used).index_add_(1, columns, slopes)
        self.coefficients(result).copy_(torch.autograd.grad(used, stored, own)[0])
        return result

    def changes(self, base: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each weight as it was built last, minus the base's."""
        for name, weight in self.weights.items():
            start = base[name].float()
            yield name, weight.detach().to(start.device) - start

    def _mask(self, name: str) -> torch.Tensor | None:
        return self.rules.mask(self.logits(name, self.numbers)) if name in self._spans else None


def _spans(start: int, logits: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, tuple[int, ...]]]:
    found = {}
    for name, x in logits.items():
        found[name] = (start, tuple(x.shape))
        start += x.numel()
    return found
