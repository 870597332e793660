"""Small random families of base and experts for the tests of methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mergectl import settings
from mergectl.methods._contract import Split

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
