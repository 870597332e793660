"""Masks as bits: nothing is lost, whatever the size, in memory and in the files of a merge."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mergectl import merge_weights
from mergectl.bits import pack_bits, packed_size, unpack_bits
from tests.conftest import Cli

# One number, sizes around a byte, and a weight longer than a block: none a multiple of eight but for the norm.
SHAPES = {"m.a.weight": (7, 3), "m.a.bias": (1,), "m.b.weight": (9,), "m.c.weight": (601, 441), "m.norm.weight": (16,)}


@given(shape=st.lists(st.integers(1, 5), max_size=4), seed=st.integers(0, 99))
def test_what_is_packed_comes_back_exactly(shape: list[int], seed: int) -> None:
    mask = torch.rand(tuple(shape), generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_bits(mask)
    assert (packed.dtype, len(packed)) == (torch.uint8, packed_size(shape))
    assert torch.equal(unpack_bits(packed, shape), mask)


def test_the_first_element_is_the_lowest_bit_and_the_last_byte_is_filled_with_zeros() -> None:
    mask = torch.tensor([True, False, False, True, False, False, False, False, True, True])
    assert pack_bits(mask).tolist() == [0b00001001, 0b00000011]


@pytest.fixture
def odd_sizes(tmp_path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """A base and three experts on disk, and their weights."""
    found = {}
    for seed, name in enumerate(("base", "x", "y", "z")):
        chance = torch.Generator().manual_seed(seed)
        found[name] = {key: torch.randn(shape, generator=chance) for key, shape in SHAPES.items()}
        (tmp_path / name).mkdir()
        save_file(found[name], tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "plain"}))
    return found


def test_blocks_of_whole_rows_keep_to_whole_bytes(cli: Cli, odd_sizes: dict[str, dict[str, torch.Tensor]]) -> None:
    words = ["--base", "base", "--experts", "x", "y", "-o", "m", "--quiet"]
    assert cli("merge", "emr", "--refine", "magprune", *words) == 0
    unified = load_file("m/unified.safetensors")["m.c.weight"]
    masks = [load_file(f"m/tasks/{task}/masks.safetensors")["m.c.weight"] for task in "xy"]
    selected = torch.stack([unpack_bits(bits, SHAPES["m.c.weight"]) for bits in masks])
    assert torch.equal(selected.any(dim=0), unified != 0)


def test_the_masks_of_a_merge_on_disk_are_those_of_the_method(
    cli: Cli, odd_sizes: dict[str, dict[str, torch.Tensor]]
) -> None:
    base, experts = odd_sizes["base"], {name: odd_sizes[name] for name in "xyz"}
    assert cli("merge", "emr", "--base", "base", "--experts", *experts, "-o", "m", "--quiet") == 0
    expected = merge_weights("emr", base, experts)
    for task in experts:
        packed = load_file(f"m/tasks/{task}/masks.safetensors")
        assert {name: len(bits) for name, bits in packed.items()} == {
            name: math.ceil(math.prod(shape) / 8) for name, shape in SHAPES.items()
        }
        for name, shape in SHAPES.items():
            assert torch.equal(unpack_bits(packed[name], shape), expected.kept["masks"][task][name]), (task, name)
