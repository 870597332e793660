"""Weights in blocks give what whole weights give."""

from __future__ import annotations

import math
import os
import tracemalloc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from mergectl import blocks, merge_weights, plugins, settings
from mergectl.checkpoints import open_checkpoint
from mergectl.errors import UserError
from mergectl.methods import _kernels, _kth, _task_vectors
from tests.methods import families


def weights(seed: int) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (7, 9), "b.bias": (5,), "c.weight": (4, 3, 6)}
    return {name: torch.randn(shape, generator=chance) for name, shape in shapes.items()}


BASE = weights(0)
DELTAS = [weights(seed) for seed in (1, 2, 3)]
EXPERTS = {f"t{i}": {n: BASE[n] + 0.1 * d[n] for n in BASE} for i, d in enumerate(DELTAS)}


def ways() -> Iterator[tuple[str, dict[str, Any]]]:
    """Go through all methods, and the values of settings on which their blocks depend."""
    for method in settings.names():
        fact = getattr(plugins.load("methods", settings.describe(method).method), "BLOCKS", False)
        yield method, {}
        for key in fact if isinstance(fact, Mapping) else ():
            yield from ((method, {key: value}) for value in settings.settings_of(method)[key].words or (False, True))


@pytest.mark.parametrize(("method", "given"), list(ways()))
@pytest.mark.parametrize("length", [1, 8, 20])
def test_blocks_change_nothing(
    method: str, given: dict[str, Any], length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # draws belong to blocks of the fixed length: here each chance decides by itself
    monkeypatch.setattr(_kernels, "chosen", lambda _, chance, shape: (torch.as_tensor(chance) > 0.5).expand(shape))
    drop: dict[str, Any] = {"drop": 0.0} if "drop" in settings.describe(method).settings else {}
    experts = dict(list(EXPERTS.items())[: families.expert_count(method)])
    whole = families.merge_weights(method, BASE, experts, **drop, **given)
    monkeypatch.setattr(blocks, "LENGTH", length)
    parts = families.merge_weights(method, BASE, experts, **drop, **given)
    for name in BASE:
        torch.testing.assert_close(parts[name], whole[name], rtol=0, atol=1e-6 if whole.kept else 1e-7)
        for task in experts:
            torch.testing.assert_close(parts.task(task)[name], whole.task(task)[name], rtol=0, atol=1e-6)


def test_blocks_of_rows_are_whole_bytes_of_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "LENGTH", 20)
    found = list(blocks.cut({"w": (99, 9)}, ["w"], in_rows=True).values())
    assert [block.shape for block in found] == [(8, 9)] * 12 + [(3, 9)]
    assert [block.start for block in found] == list(range(0, 99 * 9, 72))


def test_a_turned_weight_is_copied_once_for_all_of_its_blocks() -> None:
    reader = blocks.BlockReader({"w": torch.arange(12.0).reshape(3, 4).T})
    first, last = (reader.read(blocks.Block("w", *ends, (6,))) for ends in ((0, 6), (6, 12)))
    assert [*first.tolist(), *last.tolist()] == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    assert first.untyped_storage().data_ptr() == last.untyped_storage().data_ptr()


def test_given_masks_are_cut_as_the_weights_are(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = {t: {n: (w > 0).int() for n, w in expert.items()} for t, expert in EXPERTS.items()}
    whole = merge_weights("dare_ties", BASE, EXPERTS, supplies={"masks": masks}, drop=0.5)
    monkeypatch.setattr(blocks, "LENGTH", 8)
    parts = merge_weights("dare_ties", BASE, EXPERTS, supplies={"masks": masks}, drop=0.5)
    assert all(torch.equal(parts[name], whole[name]) for name in BASE)


def test_bad_numbers_in_a_block_name_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "LENGTH", 8)
    bad = {**EXPERTS, "t1": {**EXPERTS["t1"], "a.weight": torch.full((7, 9), float("nan"))}}
    with pytest.raises(Exception, match=r"Weight 'a\.weight' of the expert 't1'"):
        merge_weights("ties", BASE, bad)


@pytest.mark.parametrize("shape", ["noise", "sorted", "zeros", "equal"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.2, 0.5, 1.0])
def test_the_sampled_order_statistic_is_exact(shape: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_kth, "_TOGETHER", 1)
    monkeypatch.setattr(_kth, "_SAMPLED", 64)
    noise = torch.randn(3, 4000, generator=torch.Generator().manual_seed(5))
    rows = {"noise": noise, "sorted": noise.sort().values, "zeros": noise.clamp(min=0), "equal": torch.ones(3, 4000)}[
        shape
    ]
    parts = {f"{place:03d}": rows[:, start : start + 100] for place, start in enumerate(range(0, 4000, 100))}
    vectors = _task_vectors.TaskVectors(["a", "b", "c"], {n: (100,) for n in parts}, parts.__getitem__)
    rank = round(share * 4000)
    expected = [float("inf") if rank == 0 else float(row.abs().sort(descending=True).values[rank - 1]) for row in rows]
    assert vectors.kth_magnitude([rank] * 3) == expected


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_an_end_of_the_arc_is_that_expert_in_several_threads(t: float) -> None:
    experts = {name: {"m.w": torch.randn(3_000_000)} for name in ("a", "b")}
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        merged = merge_weights("slerp", None, experts, t=t)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(merged["m.w"], experts["ab"[round(t)]]["m.w"])


@given(st.integers(0, 10**6), st.lists(st.integers(0, 4100), min_size=1, max_size=3), st.floats(0, 1))
def test_many_equal_entries_are_counted_and_not_collected(seed: int, ranks: list[int], zeros: float) -> None:
    chance = np.random.default_rng(seed)
    rows = chance.normal(size=(2, 8, 512)).astype(np.float32).round(1)
    rows[chance.random(rows.shape) < zeros] = 0
    parts = {f"w{i}": torch.from_numpy(rows[:, i]) for i in range(8)}
    vectors = _task_vectors.TaskVectors(["a", "b"], {name: (512,) for name in parts}, parts.__getitem__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_kth, "_TOGETHER", 1)
        patch.setattr(_kth, "_SAMPLED", 256)
        found = vectors.kth_largest([[rank] * 2 for rank in ranks])
    order = -np.sort(-rows.reshape(2, -1), axis=1)
    for rank, values in zip(ranks, found, strict=True):
        special = math.inf if rank == 0 else -math.inf if rank > 4096 else None
        assert values == [special if special is not None else float(row[rank - 1]) for row in order]


def test_a_bound_that_very_many_entries_share_is_found_without_counting_bit_patterns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = np.zeros((2, 1 << 16), np.float32)
    rows[:, ::50] = np.random.default_rng(0).normal(size=rows[:, ::50].shape)
    vectors = _task_vectors.TaskVectors(["a", "b"], {"w": (1 << 16,)}, {"w": torch.from_numpy(rows)}.__getitem__)
    monkeypatch.setattr(_kth, "_TOGETHER", 1)
    monkeypatch.setattr(_kth, "_SAMPLED", 1 << 12)
    monkeypatch.delattr(_kth, "reach")
    assert vectors.kth_magnitudes([[40_000, 1000]]) == [[0.0, float(np.sort(np.abs(rows[1]))[-1000])]]


@pytest.mark.parametrize("in_files", [False, True])
def test_samples_of_stored_weights_bracket_the_threshold(
    in_files: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = torch.Generator().manual_seed(2)
    base = {"w": 5 * torch.randn(1 << 20, generator=chance)}
    rows = torch.randn(2, 1 << 20, generator=chance) * torch.linspace(0.1, 2, 1 << 20)  # no part is like another
    experts = {f"t{i}": {"w": base["w"] + row} for i, row in enumerate(rows)}
    monkeypatch.delattr(_kth, "reach")
    models: dict[str, Any] = {"base": base, **experts}
    if in_files:
        for name, weights in models.items():
            (tmp_path / name).mkdir()
            (tmp_path / name / "config.json").write_text("{}")
            save_file(weights, tmp_path / name / "model.safetensors")
        models = {name: open_checkpoint(tmp_path / name) for name in models}
    given = {name: model for name, model in models.items() if name != "base"}
    merged = merge_weights("ties", models["base"], given, density=0.2)["w"] - base["w"]
    assert 0.3 < float((merged != 0).float().mean()) < 0.4  # a fifth of each, at places of their own


def test_inner_products_of_a_model_are_the_sums_of_those_of_its_weights() -> None:
    rows = {
        f"w{i}": torch.from_numpy(np.random.default_rng(i).normal(size=(3, 70_000)).astype(np.float32)) for i in (0, 1)
    }
    vectors = _task_vectors.TaskVectors(["a", "b", "c"], {name: (70_000,) for name in rows}, rows.__getitem__)
    by_weight = vectors.products_by_weight()
    for name, x in rows.items():
        np.testing.assert_allclose(by_weight[name], (x.double() @ x.double().T).numpy(), rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(vectors.products(), by_weight["w0"] + by_weight["w1"], rtol=1e-15)


def test_inner_products_of_long_rows_are_as_good_as_cosines_need_and_do_not_overflow() -> None:
    x = torch.from_numpy(np.random.default_rng(3).normal(size=(3, 300_000)).astype(np.float32))
    wide = x.double() @ x.double().T
    lengths = wide.diag().sqrt()
    for scale in (1.0, 2.0**80):  # squares of the latter are beyond float32
        vectors = _task_vectors.TaskVectors(["a", "b", "c"], {"w": (300_000,)}, {"w": x * scale}.__getitem__)
        found = torch.from_numpy(vectors.products_by_weight()["w"]) / scale**2
        assert float(((found - wide) / (lengths[:, None] * lengths)).abs().max()) < 2e-8


class Unaligned(dict[str, torch.Tensor]):
    """A weight whose numbers begin at an odd byte of a file, as some writers leave them."""

    def __init__(self, folder: Path, numbers: torch.Tensor) -> None:
        super().__init__(w=numbers)
        self.path = folder / "odd"
        self.path.write_bytes(b"odd" + numbers.numpy().tobytes())

    def where(self, name: str) -> tuple[Path, int, int]:
        return self.path, 3, 4 * self[name].numel()

    def dtype(self, name: str) -> str:
        return "F32"


def test_a_file_that_became_shorter_is_told_between_two_blocks(tmp_path: Path) -> None:
    weights = Unaligned(tmp_path, torch.arange(float(1 << 20)))
    reader = blocks.BlockReader(weights)
    first, last = (blocks.Block("w", start, start + (1 << 18), (1 << 18,)) for start in (0, 3 << 18))
    assert reader.read(first)[1] == 1
    os.truncate(weights.path, 1 << 20)
    with pytest.raises(UserError, match="became shorter while weight 'w' was read"):
        reader.read(last)


def test_of_an_unaligned_weight_no_more_is_copied_than_a_block(tmp_path: Path) -> None:
    numbers = torch.arange(float(1 << 21))
    weights = Unaligned(tmp_path, numbers)
    reader = blocks.BlockReader(weights)
    block = blocks.Block("w", 1 << 20, (1 << 20) + (1 << 18), (1 << 18,))
    tracemalloc.start()
    try:
        read = reader.read(block)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20  # of 8 MiB
    finally:
        tracemalloc.stop()
    assert torch.equal(read, numbers[block.start : block.stop])
