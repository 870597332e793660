"""Small random families of base and experts for the tests of methods."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

import mergectl
from mergectl import settings
from mergectl.merging import Merged
from mergectl.methods._contract import Split
from mergectl.methods._moments import Gram

SHAPES: dict[str, tuple[int, ...]] = {
    "m.embed.weight": (13, 8),
    "m.layer.0.weight": (8, 8),
    "m.layer.0.bias": (8,),
    "m.layer.1.weight": (6, 8),
    "m.norm": (1,),
    "m.scale": (),
}
Weights = dict[str, torch.Tensor]


def family(tasks: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Weights, dict[str, Weights]]:
    """Make a base and experts that differ from it by small heavy-tailed noise, some entries unchanged."""
    generator = torch.Generator().manual_seed(seed)

    def noise(shape: tuple[int, ...]) -> torch.Tensor:
        draw = torch.randn(shape, generator=generator)
        return torch.where(torch.rand(shape, generator=generator) < 0.1, 0, 0.05 * draw * draw.abs())

    base = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    experts = {
        f"task{i}": {name: (x.float() + noise(tuple(x.shape))).to(dtype) for name, x in base.items()}
        for i in range(tasks)
    }
    return base, experts


def expert_count(method: str, wish: int = 3) -> int:
    """Return a number of experts the method takes, as near as may be to the wish."""
    least, most = settings.describe(method).experts
    return max(least, min(wish, most or wish))


def _noise(task: str, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Draw numbers that belong to a task's weight, whatever the order of either."""
    seed = int.from_bytes(hashlib.sha256(f"{task} {name}".encode()).digest()[:4], "little")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _grams(task: str, weights: Weights) -> dict[str, Gram]:
    linear = {name: x.shape[1] for name, x in weights.items() if x.dim() == 2 and len(x) and "embed" not in name}
    rows = {name: _noise(task, name, (12, width)) for name, width in linear.items()}
    return {name: Gram(x.t() @ x / 12, 12) for name, x in rows.items()}


def _fishers(task: str, weights: Weights) -> Weights:
    return {name: _noise(task, name, tuple(x.shape)).square() for name, x in weights.items() if x.is_floating_point()}


# What a method may need that only the lab can make: of one task, from its expert's weights.
MAKERS: dict[str, Callable[[str, Weights], Any]] = {"grams": _grams, "fishers": _fishers}


def toy_entropy(weights: Mapping[str, torch.Tensor], step: int) -> torch.Tensor:
    """Fall along fixed directions, which no rounding and no order of weights changes."""
    found = [(x * _noise("entropy", name, tuple(x.shape)).to(x)).sum() for name, x in sorted(weights.items())]
    return torch.stack(found).sum() + 100


def after_two_steps(learned: Any) -> bool:
    """Stop an adaptation early."""
    return bool(learned.step >= 2)


def supplies_for(method: str, experts: Mapping[str, Weights]) -> dict[str, Any]:
    """Make what a method must have beside the weights."""
    needed = settings.describe(method).supplies
    adapting = {"entropy": toy_entropy, "watch": after_two_steps} if needed.get("entropy") else {}
    return adapting | {
        name: {task: make(task, weights) for task, weights in experts.items()}
        for name, make in MAKERS.items()
        if needed.get(name)
    }


def merge_weights(
    method: str, base: Any, experts: Any, *, supplies: Mapping[str, Any] | None = None, **given: Any
) -> Merged:
    """Merge with what the method must have, as the lab would."""
    supplies = {**supplies_for(method, experts), **(supplies or {})}
    return mergectl.merge_weights(method, base, experts, supplies=supplies, **given)


def neutral_settings(neutral: Mapping[str, Any], tasks: int) -> dict[str, Any]:
    """Return the settings under which copies of one model merge to it."""
    return {key: value.total / tasks if isinstance(value, Split) else value for key, value in neutral.items()}


def assert_same(got: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Compare bit by bit."""
    assert list(got) == list(expected)
    for name, x in expected.items():
        assert torch.equal(got[name], x), name


def assert_close(got: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], atol: float = 1e-6) -> None:
    """Compare to a tolerance."""
    assert set(got) == set(expected)
    for name, x in expected.items():
        torch.testing.assert_close(got[name].float(), x.float(), atol=atol, rtol=1e-5, msg=f"{name} differs")
