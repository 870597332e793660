"""Squares of every example's own gradient, from backward passes that the examples of a batch share.

The gradient of a sum over examples, about what a layer returns, tells them apart: each has its own rows there. From
these and from what the layer read follows each example's gradient about the layer's weights, without a pass of its own.
A weight that is used in any other way (bare, by a layer of another type, or for all examples at once) is left over. Of
such weights torch computes each example's gradient, many at a time, where it can follow the model (`torch.func`).
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from mergectl.calibration_gradients import ADDERS, Rule, rules_of

if TYPE_CHECKING:
    import torch

Batch: TypeAlias = "Mapping[str, torch.Tensor]"
Scores: TypeAlias = "Callable[[Any, Batch], torch.Tensor]"
Losses: TypeAlias = "Callable[[torch.Tensor, Batch], Sequence[torch.Tensor]]"
NUMBERS = 2**26  # in the gradients that are held at a time


@dataclass(frozen=True)
class Call:
    """One pass through a layer: which one of its passes, what it read and what it returned."""

    key: tuple[str, int]
    module: Any
    x: torch.Tensor
    y: torch.Tensor
    version: int  # of what it returned: another one later tells that it was overwritten


Uses: TypeAlias = "dict[str, list[tuple[Call, Rule]]]"  # by weight


class Squares:
    """Adds up the squares of gradients, and remembers which layers keep the examples of a batch apart."""

    def __init__(self, model: Any, weights: Batch, found: Batch) -> None:
        """Take the weights that gradients are about, and their sums, under the same names."""
        self.model, self.weights, self.found = model, weights, found
        self.names = {id(p): name for name, p in weights.items()}
        self.rules = {name: rules for name, module in model.named_modules() if (rules := rules_of(module))}
        self.apart: dict[tuple[str, int], bool] = {}
        self.followed = True  # by torch.func, as far as is known

    def add(self, batch: Batch, scores: Scores, losses: Losses) -> set[str]:
        """Add the squares for each of a batch's losses [examples]; return the weights that need passes per example."""
        left = self.add_shared(batch, scores, losses)
        if left and self.followed:
            try:
                self.add_followed({name: p for name, p in self.weights.items() if name in left}, batch, scores, losses)
            except RuntimeError:  # what a model does may depend on its numbers, or be unknown there
                self.followed = False
        return set() if self.followed else left

    def add_followed(self, weights: Batch, batch: Batch, scores: Scores, losses: Losses) -> None:
        """Add the squares about some of the weights, as `torch.func` computes each example's gradients."""
        import torch
        from torch.func import functional_call, jacrev, vmap

        fixed = {name: p.detach() for name, p in self.weights.items()}

        def losses_of(chosen: Batch, example: Batch) -> torch.Tensor:
            alone = {name: x[None] for name, x in example.items()}
            outcome = scores(lambda **given: functional_call(self.model, {**fixed, **chosen}, kwargs=given), alone)
            return torch.cat(list(losses(outcome, alone)))

        wanted = {name: fixed[name] for name in weights}
        with torch.no_grad():
            labels = len(losses(scores(self.model, batch), batch))
        step = max(1, NUMBERS // (labels * sum(p.numel() for p in wanted.values())))
        sums = {name: torch.zeros_like(p) for name, p in wanted.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")  # it is faster all the same
            for start in range(0, shape_of(batch)[0], step):
                part = {name: x[start : start + step] for name, x in batch.items()}
                for name, slopes in vmap(jacrev(losses_of), in_dims=(None, 0))(wanted, part).items():
                    sums[name] += slopes.flatten(0, 1).square().sum(0)
        for name, total in sums.items():
            self.found[name].add_(total)

    def add_shared(self, batch: Batch, scores: Scores, losses: Losses) -> set[str]:
        """Add the squares about the weights of which the examples share passes; return the names of the others."""
        import torch

        with self._watched(batch) as calls:
            outcome = scores(self.model, batch)
        uses = self._uses(self._separate(calls, outcome, batch), outcome)
        wanted = list({call.key: call for own in uses.values() for call, _ in own}.values())
        for loss in losses(outcome, batch):
            slopes = torch.autograd.grad(loss.sum(), [c.y for c in wanted], retain_graph=True, allow_unused=True)
            known = {call.key: slope for call, slope in zip(wanted, slopes, strict=True) if slope is not None}
            for name, own in uses.items():
                found = [make(c.module, c.x, known[c.key]) for c, (_, make) in own if c.key in known]
                if found:
                    ADDERS[own[0][1][0]](self.found[name], found)
        return set(self.weights) - set(uses)

    @contextlib.contextmanager
    def _watched(self, batch: Batch) -> Iterator[list[Call]]:
        """Note every pass through a layer whose gradients are known; positions are read for each example by itself."""
        from torch import nn

        calls: list[Call] = []
        seen: Counter[str] = Counter()

        def note(name: str) -> Callable[..., None]:
            def hook(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: torch.Tensor) -> None:
                x = args[0] if args else kwargs["input"]
                calls.append(Call((name, seen[name]), module, x.detach(), y, y._version))
                seen[name] += 1

            return hook

        def repeat(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            shared = len(args) == 1 and args[0].shape == (1, width) and width > 1
            return (args[0].expand(size, width),) if shared else None

        size, width = shape_of(batch)
        modules = dict(self.model.named_modules())
        handles = [modules[n].register_forward_hook(note(n), with_kwargs=True) for n in self.rules]
        handles += [m.register_forward_pre_hook(repeat) for m in modules.values() if isinstance(m, nn.Embedding)]
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()

    def _separate(self, calls: Sequence[Call], outcome: torch.Tensor, batch: Batch) -> list[Call]:
        """The passes whose rows belong to the examples one by one: what one answers does not depend on others' rows."""
        import torch

        size, mask = shape_of(batch)[0], batch.get("attention_mask")
        rows = [c for c in calls if c.x.dim() > 1 and len(c.x) == len(c.y) == size and c.y._version == c.version]
        if new := [call for call in rows if call.key not in self.apart and call.y.requires_grad]:
            longest = 0 if mask is None else int(mask.sum(1).argmax())  # the one that reads the most positions
            others = torch.arange(size) != longest
            slopes = torch.autograd.grad(
                outcome[longest].sum(), [c.y for c in new], retain_graph=True, allow_unused=True
            )
            for call, slope in zip(new, slopes, strict=True):
                self.apart[call.key] = slope is None or not bool(slope[others.to(slope.device)].any())
        return [call for call in rows if self.apart.get(call.key, False)]

    def _uses(self, calls: Sequence[Call], outcome: torch.Tensor) -> Uses:
        """The weights that nothing uses but these passes, all in the same way, and by which."""
        uses: Uses = defaultdict(list)
        for call in calls:
            for own, p in call.module.named_parameters(recurse=False):
                if own in (rules := self.rules[call.key[0]]) and id(p) in self.names:
                    uses[self.names[id(p)]].append((call, rules[own]))
        counts = uses_of_weights(outcome)
        return {
            name: uses.get(name, [])
            for name, p in self.weights.items()
            if len(uses.get(name, [])) == counts[id(p)] and len({rule[0] for _, rule in uses.get(name, [])}) < 2
        }


def shape_of(batch: Batch) -> tuple[int, int]:
    """The number of examples, and of places in the longest text; none in images."""
    first = batch["attention_mask"] if "attention_mask" in batch else next(iter(batch.values()))
    return len(first), first.shape[1] if first.dim() == 2 else 0


def uses_of_weights(outcome: torch.Tensor) -> Counter[int]:
    """How often what was computed uses each weight, by the weight's id."""
    counts: Counter[int] = Counter()
    seen: set[Any] = {outcome.grad_fn}
    waiting: list[Any] = [outcome.grad_fn]
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if hasattr(node, "variable"):
                counts[id(node.variable)] += 1
            elif node is not None and node not in seen:
                seen.add(node)
                waiting.append(node)
    return counts
