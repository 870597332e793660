"""Model Stock and SLERP give the numbers of the reference program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mergectl import merge_weights

HERE = Path(__file__).parent / "spectral"
MANIFEST = json.loads((HERE / "manifest.json").read_text())
OURS: dict[str, dict[str, Any]] = {"model_stock": {"mean": "angles", "clamp": False}, "slerp": {"t": 0.35}}


def part(file: str, prefix: str) -> dict[str, torch.Tensor]:
    return {name[len(prefix) :]: x for name, x in load_file(HERE / file).items() if name.startswith(prefix)}


@pytest.mark.parametrize("case", MANIFEST["cases"], ids=lambda case: case["hyper"]["method"])
def test_the_merged_weights_are_those_of_the_reference(case: dict[str, Any]) -> None:
    method = case["hyper"]["method"]
    count = case["hyper"].get("experts", 2)
    experts = {f"expert{i}": part(MANIFEST["inputs"], f"expert{i}.") for i in range(count)}
    got = merge_weights(method, part(MANIFEST["inputs"], "base."), experts, **OURS[method])
    for name, expected in part(case["file"], "expected.merged.").items():
        torch.testing.assert_close(got[name], expected, rtol=0, atol=MANIFEST["atol"])
