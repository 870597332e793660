"""Train only what a branch owns: foreign gradients are zeroed, and every foreign element keeps its very bits."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergectl.errors import WorkError
from mergectl.naming import find_slot, live_tensors
from mergectl.ownership import load_masks

if TYPE_CHECKING:
    import torch

ADAPTED = re.compile(r"\.default(?=\.|$)")  # peft's name of the one adapter, which it leaves out on disk


class Guard:
    """Keeps an optimiser to a branch's own elements, whatever optimiser that is.

    Before each step the gradients elsewhere become zero, so that no moments grow there; after it those elements get
    back the values they had at first, which undoes weight decay and whatever else moves weights without a gradient.
    """

    def __init__(self, owned: Iterable[tuple[torch.nn.Parameter, torch.Tensor]]) -> None:
        self._owned = [(weight, ~mask) for weight, mask in owned]
        self._start: list[torch.Tensor] = []

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Stand before and behind every step of an optimiser."""
        optimizer.register_step_pre_hook(lambda *_: self._before())
        optimizer.register_step_post_hook(lambda *_: self._after())

    def zero_gradients(self) -> None:
        """Set the gradients of foreign elements to zero, even those that are no numbers."""
        for weight, foreign in self._owned:
            if weight.grad is not None:
                weight.grad.masked_fill_(foreign.to(weight.device), 0)

    def _before(self) -> None:
        if not self._start:  # by now the weights are where they are trained
            self._owned = [(weight, foreign.to(weight.device)) for weight, foreign in self._owned]
            self._start = [weight.detach().clone() for weight, _ in self._owned]
        self.zero_gradients()

    def _after(self) -> None:
        import torch

        with torch.no_grad():
            for (weight, foreign), start in zip(self._owned, self._start, strict=True):
                weight.copy_(torch.where(foreign, start, weight))


def guard_for(model: Any, path: Path) -> Guard:
    """A guard for a model's trainable weights by a file of masks; weights without a mask (heads) train in full."""
    slots, prefix = trainable(model)
    owned: list[tuple[Any, Any]] = []
    for name, mask in load_masks(path):
        slot = find_slot(name, slots, prefix)
        weight = None if slot is None else slots[slot]
        if weight is None or weight.shape != mask.shape:
            raise WorkError(f"The ownership masks in {path} are of another model: '{name}' is not in this one.")
        owned.append((weight, mask))
    return Guard(owned)


def trainable(model: Any) -> tuple[dict[str, Any], str]:
    """The trainable weights by the names they have on disk, and the prefix of the backbone."""
    import torch
    from peft import PeftModel

    if isinstance(model, PeftModel):
        found = {ADAPTED.sub("", name): weight for name, weight in model.named_parameters()}
        return {n: w for n, w in found.items() if w.requires_grad and ".modules_to_save." not in n}, ""
    found = {n: w for n, w in live_tensors(model).items() if isinstance(w, torch.nn.Parameter)}
    return found, model.base_model_prefix
