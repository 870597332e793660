"""Weights in blocks give what whole weights give."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mergectl import blocks, merge_weights, settings


def weights(seed: int) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (7, 9), "b.bias": (5,), "c.weight": (4, 3, 6)}
    return {name: torch.randn(shape, generator=chance) for name, shape in shapes.items()}


BASE = weights(0)
DELTAS = [weights(seed) for seed in (1, 2, 3)]
EXPERTS = {f"t{i}": {n: BASE[n] + 0.1 * d[n] for n in BASE} for i, d in enumerate(DELTAS)}
ELEMENTWISE = [name for name in settings.names() if settings.describe(name).experts[1] is None]


@pytest.mark.parametrize("method", ELEMENTWISE)
@pytest.mark.parametrize("length", [1, 8, 20])
def test_blocks_change_nothing(method: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    info = settings.describe(method)
    drop: dict[str, Any] = {"drop": 0.0} if "drop" in info.settings else {}
    if "rng" in info.supplies and not drop:
        pytest.skip("its draws belong to blocks of the fixed length")
    whole = merge_weights(method, BASE, EXPERTS, **drop)
    monkeypatch.setattr(blocks, "LENGTH", length)
    parts = merge_weights(method, BASE, EXPERTS, **drop)
    for name in BASE:
        torch.testing.assert_close(parts[name], whole[name], rtol=0, atol=1e-7)
        torch.testing.assert_close(parts.task("t1")[name], whole.task("t1")[name], rtol=0, atol=1e-6)


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
    from mergectl.methods import _task_vectors

    monkeypatch.setattr(_task_vectors, "_SAMPLED", 64)
    noise = torch.randn(3, 4000, generator=torch.Generator().manual_seed(5))
    rows = {"noise": noise, "sorted": noise.sort().values, "zeros": noise.clamp(min=0), "equal": torch.ones(3, 4000)}[
        shape
    ]
    parts = {f"{place:03d}": rows[:, start : start + 100] for place, start in enumerate(range(0, 4000, 100))}
    vectors = _task_vectors.TaskVectors(["a", "b", "c"], {n: (100,) for n in parts}, parts.__getitem__)
    rank = round(share * 4000)
    expected = [float("inf") if rank == 0 else float(row.abs().sort(descending=True).values[rank - 1]) for row in rows]
    assert vectors.kth_magnitude([rank] * 3) == expected
