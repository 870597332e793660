"""Ownership masks of whole models: who may train which element, made one weight at a time and kept as bits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from mergectl.bits import pack_bits, unpack_bits
from mergectl.errors import UserError, WorkError

if TYPE_CHECKING:
    import torch

Weights: TypeAlias = "Mapping[str, torch.Tensor]"
KINDS = ("soft", "hard", "half", "reference")
UNOWNED = ("freeze", "first")
TOP_K = {"none": 87.5, "lora": 100.0, "ia3": 100.0}  # the published percentages: full fine-tuning, adapters


@dataclass(frozen=True)
class MaskPlan:
    """How ownership is decided."""

    kind: str = "soft"
    top_k: float = 87.5  # percent of each weight's entries that may be wanted
    unowned: str = "freeze"  # or `first`: the first branch trains what no branch has changed
    seed: int = 0

    def __post_init__(self) -> None:
        for name, words in (("mask", KINDS), ("unowned", UNOWNED)):
            value = self.kind if name == "mask" else self.unowned
            if value not in words:
                raise UserError(f"{name} must be one of {', '.join(words)}, got '{value}'.")
        if not 0 < self.top_k <= 100:
            raise UserError(f"top_k must lie above 0 and at most be 100, got {self.top_k:g}. It is a percentage kept.")

    @property
    def asks_trainings(self) -> bool:
        """Whether the masks depend on what a short training of each task changes."""
        return self.kind != "half"

    def check(self, branches: int, references: int) -> None:
        """Refuse numbers of branches and finished models that a kind has no use for."""
        if self.kind == "reference" and (branches != 1 or not references):
            raise UserError(
                f"mask=reference is for one task beside finished models (--against), got {branches} tasks and "
                f"{references} models."
            )
        if self.kind in ("hard", "half") and references:
            raise UserError(f"mask={self.kind} takes no finished models (--against); soft and reference do.")


@dataclass
class Ownership:
    """Who owns what: packed bits by branch and weight, and the numbers worth knowing."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    bits: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)  # of all elements, by branch
    nobody: float = 0.0  # share of elements that stay as they are
    chosen: str | None = None  # mask=reference: the finished model with the fewest opposite signs
    opposed: dict[str, float] = field(default_factory=dict)  # mask=reference: share of opposite signs, by model


def make_masks(
    base: Weights, branches: Mapping[str, Weights], references: Mapping[str, Weights], plan: MaskPlan,
    order: Sequence[str],
) -> Ownership:  # fmt: skip
    """Divide a model's elements among branches, given what a short training made of each.

    `order` names all weights; random numbers are drawn for one after the other, on the processor.
    """
    import torch

    plan.check(len(branches), len(references))
    found = Ownership(bits={branch: {} for branch in branches})
    if plan.kind == "reference":
        found.opposed = _opposed(base, branches, references, plan, order)
        found.chosen = min(found.opposed, key=found.opposed.__getitem__)
        references = {found.chosen: references[found.chosen]}
    chance = torch.Generator().manual_seed(plan.seed)
    for name in order:
        masks = _masks(name, base, branches, references, plan, chance)
        found.shapes[name] = tuple(masks.shape[1:])
        for branch, mask in zip(branches, masks, strict=True):
            found.bits[branch][name] = pack_bits(mask)
            found.shares[branch] = found.shares.get(branch, 0.0) + int(mask.sum())
        found.nobody += int((~masks.any(0)).sum())
    total = sum(_count(shape) for shape in found.shapes.values())
    found.shares = {branch: owned / total for branch, owned in found.shares.items()}
    found.nobody /= total
    return found


def _masks(
    name: str, base: Weights, branches: Mapping[str, Weights], references: Mapping[str, Weights], plan: MaskPlan,
    chance: torch.Generator,
) -> torch.Tensor:  # fmt: skip
    """The masks of one weight, [branch, *shape]."""
    import torch

    from mergectl.methods import _ownership

    start = base[name].float()
    if plan.kind == "half":
        return _ownership.half(tuple(start.shape), len(branches))
    rows = _trimmed(name, start, branches, plan)
    if plan.kind == "hard":
        masks = _ownership.hard(rows)
    elif plan.kind == "reference":
        masks = _ownership.agreeing(rows[0], _trimmed(name, start, references, plan)[0])[None]
    else:
        others = _trimmed(name, start, references, plan) if references else rows[:0]
        uniform = torch.rand(start.shape, generator=chance)
        masks = _ownership.soft(_ownership.competing(rows, others), uniform)
    return _ownership.with_unowned(masks, rows) if plan.unowned == "first" else masks


def _trimmed(name: str, start: torch.Tensor, models: Mapping[str, Weights], plan: MaskPlan) -> torch.Tensor:
    """The task vectors of one weight, trimmed: [model, *shape]."""
    import torch

    from mergectl.methods import _ownership

    return torch.stack([_ownership.trim(model[name].float() - start, plan.top_k) for model in models.values()])


def _opposed(
    base: Weights, branches: Mapping[str, Weights], references: Mapping[str, Weights], plan: MaskPlan,
    order: Sequence[str],
) -> dict[str, float]:  # fmt: skip
    """For each finished model the share of elements whose sign opposes the branch's."""
    from mergectl.methods import _ownership

    counts, total = dict.fromkeys(references, 0), 0
    for name in order:
        start = base[name].float()
        own = _trimmed(name, start, branches, plan)[0]
        for reference, row in zip(references, _trimmed(name, start, references, plan), strict=True):
            counts[reference] += _ownership.opposing(own, row)
        total += own.numel()
    return {reference: count / total for reference, count in counts.items()}


def _count(shape: Sequence[int]) -> int:
    import math

    return math.prod(shape)


def save_masks(path: Path, bits: Mapping[str, torch.Tensor], shapes: Mapping[str, Sequence[int]]) -> None:
    """Write one branch's masks as packed bits."""
    from safetensors.torch import save_file

    facts = {"format": "mergectl masks", "shapes": json.dumps({name: list(shapes[name]) for name in bits})}
    save_file(dict(bits), path, metadata=facts)


def load_masks(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Read one branch's masks: name and bool tensor, one at a time."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            shapes = json.loads((file.metadata() or {}).get("shapes", "null"))
            if shapes is None:
                raise WorkError(f"{path} holds no ownership masks.")
            for name, shape in shapes.items():
                yield name, unpack_bits(file.get_tensor(name), shape)
    except (OSError, SafetensorError) as error:
        raise WorkError(f"The ownership masks in {path} cannot be read: {error}.") from error
