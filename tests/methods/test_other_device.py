"""Every method works on a device whose tensors do not meet those of main memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mergectl import settings
from mergectl.merging import merge_stream
from mergectl.plan import recipe_of
from tests.methods.families import expert_count, family, supplies_for
from tests.pretended_device import pretend

ROOT = Path(__file__).parent.parent.parent


class OnDevice:
    """A supply that wants weights on a device."""

    def __init__(self, supply: Any, device: str) -> None:
        self.supply, self.device = supply, device

    def __call__(self, *given: Any) -> Any:
        """Answer as the supply does."""
        return self.supply(*given)


def merge_all(dtype: torch.dtype) -> None:
    """Merge by every method on the device, and compare with main memory; what is read and written is in that."""
    device = pretend()
    for name in settings.names():
        base, experts = family(expert_count(name), dtype=dtype)
        for number, weights in enumerate((base, *experts.values())):  # one weight of several blocks
            weights["m.long"] = torch.randn(300, 900, generator=torch.Generator().manual_seed(number)).to(dtype)
        given = supplies_for(name, experts)
        there = {word: OnDevice(supply, device) if word == "entropy" else supply for word, supply in given.items()}
        wanted = {piece.name: piece.weight for piece in merge_stream(recipe_of(name), base, experts, supplies=given)}
        for supplies in [given] if there == given else [given, there]:
            found = list(merge_stream(recipe_of(name), base, experts, supplies=supplies, device=device))
            assert [piece.name for piece in found] == list(wanted)
            for piece in found:
                assert type(piece.weight) is torch.Tensor
                torch.testing.assert_close(piece.weight, wanted[piece.name], rtol=1e-5, atol=2e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_merge_elsewhere_is_that_of_main_memory(dtype: str) -> None:
    code = f"import torch; from tests.methods.test_other_device import merge_all; merge_all(torch.{dtype})"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-2000:]


@pytest.mark.slow
def test_the_device_is_one_that_refuses() -> None:
    code = """
import torch
from tests.pretended_device import pretend
x = torch.ones(3).to(pretend())
assert (x * 2).cpu().tolist() == [2, 2, 2] and not x.is_cpu
for bad in (lambda: x + torch.ones(3), lambda: x.numpy(), lambda: torch.stack([x, torch.ones(3)])):
    try:
        bad()
    except (RuntimeError, TypeError):
        continue
    raise AssertionError("not refused")
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
