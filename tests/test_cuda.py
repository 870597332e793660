"""On a CUDA device a merge gives what it gives on the processor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mergectl import settings
from mergectl.merging import merge_stream
from mergectl.plan import recipe_of
from tests.conftest import Cli
from tests.methods.families import expert_count, family, supplies_for


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_merge_on_the_device_is_that_of_the_processor(dtype: torch.dtype) -> None:
    for name in settings.names():
        base, experts = family(expert_count(name), dtype=dtype)
        for number, weights in enumerate((base, *experts.values())):  # one weight of several blocks
            weights["m.long"] = torch.randn(700, 900, generator=torch.Generator().manual_seed(number)).to(dtype)
        given = supplies_for(name, experts)
        wanted = {piece.name: piece.weight for piece in merge_stream(recipe_of(name), base, experts, supplies=given)}
        for piece in merge_stream(recipe_of(name), base, experts, supplies=given, device="cuda"):
            assert piece.weight.device.type == "cpu"
            torch.testing.assert_close(piece.weight, wanted[piece.name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("hold", ["float32", "bfloat16", "disk", "kept"])
def test_an_adaptation_on_the_device_is_that_of_the_processor(cli: Cli, population: Path, hold: str) -> None:
    how = ["--experts", population / "parity", population / "loop", "--steps", 3, "--lr", 0.05, "--start", "cart"]
    for device in ("cpu", "cuda"):
        words = [
            "--device",
            device,
            "merge",
            "adarank",
            "--base",
            population / "base",
            *how,
            "--hold",
            hold,
            "-o",
            device,
        ]
        assert cli(*words) == 0
    one, other = (json.loads(Path(device, "adaptation.json").read_text()) for device in ("cpu", "cuda"))
    assert other["entropy"] == pytest.approx(one["entropy"], abs=1e-3)
    kept = [sum(sum(ranks) for ranks in found["kept_rank"].values()) for found in (one, other)]
    assert kept[1] == pytest.approx(kept[0], rel=0.05)  # of components that are nothing rounding decides


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(cli: Cli, population: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experts = [population / "parity", population / "loop"]
    assert cli("--device", "cuda", "merge", "average", "--experts", *experts, "-o", "m") == 2
    assert "this machine has no usable CUDA device" in capsys.readouterr().err
    assert not Path("m").exists()
