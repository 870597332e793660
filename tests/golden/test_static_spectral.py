"""CART, TSV-Merge, Iso-C, Iso-CTS, WUDI, DOGE and Consensus give the numbers of the reference programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mergectl import merge_weights

HERE = Path(__file__).parent
Weights = dict[str, torch.Tensor]
CART: dict[str, Any] = json.loads((HERE / "cart" / "manifest.json").read_text())
STATIC: dict[str, Any] = json.loads((HERE / "spectral" / "static.json").read_text())
# The vision program's words: which of ours they are, and what they fix.
VISION: dict[str, tuple[str, dict[str, Any]]] = {
    "CART": ("cart", {}),
    "pre_CART": ("pre_cart", {}),
    "TA_CART": ("ta_cart", {}),
    "CART_CART": ("cart_cart", {}),
    "TSV": ("tsv_m", {}),
    "TSVr": ("tsv_m", {}),
    "CART_TSV": ("cart_tsv", {}),
    "TSV_CART": ("tsv_cart", {}),
}
WORDS = {
    "ratio": "rank_ratio",
    "prior": "scale",
    "coeff": "scale",
    "scaling": "scale",
    "alpha": "scale",
    "initial_merge_coeff": "origin_scale",
    "initial_merge_rank_ratio": "origin_rank_ratio",
    "decompose": "decompose",
    "common_space_fraction": "common_fraction",
    "iterations": "iterations",
    "lr": "learning_rate",
    "tall_lambda": "mask_threshold",
    "k": "min_tasks",
}


def part(path: Path, prefix: str) -> Weights:
    return {name[len(prefix) :]: x for name, x in load_file(path).items() if name.startswith(prefix)}


def family(path: Path) -> tuple[Weights, dict[str, Weights]]:
    return part(path, "base."), {f"expert{i}": part(path, f"expert{i}.") for i in range(3)}


def translated(hyper: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return our method and settings for a case's."""
    given = {WORDS[key]: value for key, value in hyper.items() if key in WORDS}
    method = hyper["method"]
    if method in VISION:
        method, fixed = VISION[method]
        return method, {"decompose": "attn_mlp", **fixed, **given}
    if method == "cart":
        whole = hyper.get("decompose") == "full"
        return "cart", {"decompose": "encoder", "min_rank": 0, "embeddings": "merged" if whole else "base", **given}
    if method == "tsvm":
        return "tsv_m", {"decompose": "encoder" if hyper.get("exclude_embeddings") else "all", "min_rank": 0, **given}
    if method == "doge_ta":
        return method, {"decompose": "attn_mlp", **given}
    return {"consensus_ta": "consensus"}.get(method, method), given


@pytest.mark.parametrize("case", CART["cases"], ids=lambda case: case["file"].split(".expected")[0])
def test_cart_is_that_of_the_reference(case: dict[str, Any]) -> None:
    base, experts = family(HERE / "cart" / CART["inputs"][case["arch"]])
    method, given = translated(case["hyper"])
    got = merge_weights(method, base, experts, **given)
    expected = part(HERE / "cart" / case["file"], "expected.merged.")
    assert expected
    for name, x in expected.items():
        torch.testing.assert_close(got[name], x, rtol=0, atol=CART["atol"], msg=name)
        assert float((got[name] - x).norm() / x.norm()) < 1e-5


@pytest.mark.parametrize("case", STATIC["cases"], ids=lambda case: case["file"].split(".expected")[0])
def test_the_merged_weights_are_those_of_the_reference(case: dict[str, Any]) -> None:
    base, experts = family(HERE / STATIC["inputs"][case["arch"]])
    method, given = translated(case["hyper"])
    got = merge_weights(method, base, experts, **given)
    expected = part(HERE / "spectral" / case["file"], "expected.merged.")
    assert expected
    for name, x in expected.items():
        torch.testing.assert_close(got[name], x, rtol=0, atol=STATIC["atol"], msg=name)
