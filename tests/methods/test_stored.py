"""Rows of bfloat16 and float32 numbers that are not copied give what their copies in float32 give."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mergectl import merge_weights
from mergectl.errors import UserError
from mergectl.methods import _fused, _kernels, _order, _stored
from mergectl.tensorfiles import SafetensorsWriter

Change: TypeAlias = "Callable[[torch.Tensor], torch.Tensor]"

SIZES = st.sampled_from([1, _fused.STRETCH, _fused.STRETCH + 7])
SEEDS = st.integers(0, 2**32 - 1)
DTYPES = st.sampled_from([torch.bfloat16, torch.float32])


@pytest.fixture(autouse=True)
def loops_serve_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_fused, "LEAST", 1)
    monkeypatch.setattr(_stored, "MANY", 1)


def rows_of(seed: int, count: int, size: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    magnitudes = torch.randint(-6, 6, (count, size), generator=chance).double().exp2()
    return list((torch.randn(count, size, generator=chance) * magnitudes).to(dtype))


def stored(
    rows: list[torch.Tensor], base: torch.Tensor | None = None, *, looped: bool = True
) -> tuple[_stored.Stored, torch.Tensor]:
    """Rows as they are stored, and their copies in float32."""
    bits = _stored.bits([*rows, *([] if base is None else [base])])
    assert bits is not None
    below = None if base is None else bits[-1]
    lent = _stored.Stored(bits[: len(rows)], rows[0].shape, below, looped=looped)
    return lent, torch.stack([row.float() - (0 if base is None else base.float()) for row in rows])


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.integers(1, 5), SIZES, st.booleans(), DTYPES, st.booleans())
def test_sums_and_means_are_those_of_copies_bit_for_bit(
    seed: int, count: int, size: int, on_base: bool, dtype: torch.dtype, looped: bool
) -> None:
    *rows, base = rows_of(seed, count + 1, size, dtype)
    lent, copies = stored(rows, base if on_base else None, looped=looped)
    before = [row.clone() for row in rows]
    weights = [0.4, -1.5, 1 / 3, 2.0, 0.0][:count]
    assert len(lent) == count and all(torch.equal(lent[i], copies[i]) for i in range(count))
    assert torch.equal(_kernels.weighted_total(lent, weights), _kernels.weighted_total(copies, weights))
    assert torch.equal(_kernels.mean(lent), _kernels.mean(copies))
    alone = _kernels.mean(lent[:1])
    assert torch.equal(alone, copies[0]) and alone.data_ptr() != rows[0].data_ptr()
    assert all(torch.equal(row, kept) for row, kept in zip(rows, before, strict=True))
    exact = copies.double() @ copies.double().T
    size_of = torch.outer(copies.double().norm(dim=1), copies.double().norm(dim=1))
    assert ((torch.tensor(lent.inner(), dtype=torch.float64) - exact).abs() <= 1e-6 * size_of).all()


@settings(deadline=None, max_examples=60)
@given(SEEDS, SIZES, st.booleans(), st.booleans(), DTYPES, st.data())
def test_entries_between_bounds_are_counted_as_those_of_copies(
    seed: int, size: int, on_base: bool, magnitudes: bool, dtype: torch.dtype, data: st.DataObject
) -> None:
    row, base = rows_of(seed, 2, size, dtype)
    row[: size // 3] = base[: size // 3] if on_base else -0.0  # entries that are zero, of both signs
    lent, copies = stored([row], base if on_base else None)
    entries = copies[0].abs() if magnitudes else copies[0]
    ends = st.sampled_from([-math.inf, math.inf, 0.0, -0.0, *entries[:: max(size // 50, 1)].tolist()])
    low, high = sorted((data.draw(ends), data.draw(ends)))
    found = lent.between(0, low, high, magnitudes)
    inside = entries[(entries > low) & (entries < high)]
    assert found.inside.tolist() == inside.tolist()
    counts = [int(part.sum()) for part in (entries > high, entries == high, entries == low)]
    assert [found.above, found.at_high, found.at_low] == counts
    if not on_base and dtype == torch.float32:
        alone = _order.between(row.numpy(), low, high, magnitudes)
        assert alone.inside.tolist() == inside.tolist() and list(alone[1:]) == counts


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.sampled_from([1, 5, 31, 32, 127, 128, 129, 5000]), st.booleans(), DTYPES, st.integers(1, 40))
def test_a_sample_is_that_of_the_copies(seed: int, size: int, on_base: bool, dtype: torch.dtype, step: int) -> None:
    *rows, base = rows_of(seed, 3, size, dtype)
    lent, copies = stored(rows, base if on_base else None)
    assert lent.thinned(step).tolist() == _order.thinned(copies.numpy(), step).tolist()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(width=32), min_size=1, max_size=40))
@example([3.3895313892515355e38, 1.0])  # the last number that is not rounded to infinity
@example([3.3961775292304601e38])
@example([1.00390625, 1.01171875, -0.0, 1e-45, 9.18355e-41])  # halfway between two, zeros, subnormal
def test_numbers_are_rounded_as_torch_rounds_them(numbers: list[float]) -> None:
    x = torch.tensor(numbers, dtype=torch.float32)
    found, finite = _stored.rounded(x)
    wanted = x.bfloat16()
    assert finite == bool(wanted.isfinite().all())
    if finite:
        assert torch.equal(found.view(torch.int16), wanted.view(torch.int16))


def test_only_bfloat16_or_float32_in_main_memory_and_in_one_piece_is_read_where_it_lies() -> None:
    x = torch.zeros(4, 6, dtype=torch.bfloat16)
    assert _stored.bits([x, x]) is not None and _stored.bits([x.float(), x.float()]) is not None
    assert all(_stored.bits([other, other]) is None for other in (x.half(), x.double(), x.int()))
    assert all(_stored.bits([x, other]) is None for other in (x.float(), x.half(), x[:, ::2], x.T, x.to("meta")))


@pytest.mark.parametrize(
    "method", ["average", "task_arithmetic", "slerp", "nuslerp", "model_stock", "ties", "dare_ties"]
)
def test_a_merge_is_the_same_with_and_without_the_loops(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    *rows, base = rows_of(3, 3, 5000)
    experts = {f"t{i}": {"w": row.view(50, 100)} for i, row in enumerate(rows)}

    def merged() -> torch.Tensor:
        return merge_weights(method, {"w": base.view(50, 100)}, experts)["w"]

    looped = merged()
    monkeypatch.setattr(_stored, "MANY", 1 << 40)
    by_tensors = merged()
    monkeypatch.setattr(_fused, "LEAST", 1 << 40)
    for other in (by_tensors, merged()):
        torch.testing.assert_close(looped, other, rtol=1e-6, atol=1e-6)  # angles differ by the order of sums


def test_the_compiler_is_not_started_for_sums_of_few_numbers() -> None:
    code = (
        "import sys, torch\n"
        "from mergectl import merge_weights\n"
        "models = [{'w': torch.full((600, 600), float(i), dtype=torch.bfloat16)} for i in range(3)]\n"
        "experts = dict(zip('ab', models[1:]))\n"
        "for method, base in (('average', None), ('slerp', None), ('task_arithmetic', models[0])):\n"
        "    merge_weights(method, base, experts)\n"
        "assert 'numba' not in sys.modules\n"
        "merge_weights('ties', models[0], experts)\n"
        "assert 'numba' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_found_in_the_model_that_holds_it(bad: float) -> None:
    *rows, base = rows_of(5, 3, 3000)
    rows[1][2999] = bad
    experts = {f"t{i}": {"w": row} for i, row in enumerate(rows)}
    for method in ("average", "task_arithmetic", "ties", "slerp"):
        with pytest.raises(UserError, match="of the expert 't1' holds NaN or infinite"):
            merge_weights(method, {"w": base}, experts)


@pytest.mark.parametrize("change", [lambda x: x * 1e38, lambda x: x / 0])
def test_a_file_takes_no_number_that_bfloat16_cannot_hold(tmp_path: Path, change: Change) -> None:
    with (
        pytest.raises(UserError, match="bfloat16 cannot hold"),
        SafetensorsWriter(tmp_path / "x", {"w": (2,)}, {"w": "BF16"}) as file,
    ):
        file.write("w", change(torch.tensor([1.0, 3.4])))


def test_what_a_file_takes_is_rounded_to_bfloat16(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    x = torch.from_numpy(np.random.Generator(np.random.SFC64(1)).standard_normal(3000, np.float32)).view(30, 100)
    with SafetensorsWriter(tmp_path / "x", {"w": (30, 100)}, {"w": "BF16"}) as file:
        file.write("w", x)
    assert torch.equal(load_file(tmp_path / "x")["w"], x.bfloat16())
