"""Laws of the directions and ranks that PAVE prunes by, on random layers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergectl.methods import _directions, _ranks, pave

sizes = st.tuples(st.integers(2, 12), st.integers(2, 12), st.integers(0, 2**20), st.floats(0.0, 1.0))


def layer(out: int, width: int, seed: int, *, rows: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """A random weight and the moments of inputs of unequal sizes, in float64."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=draw, dtype=torch.float64) * torch.logspace(0, -1, width).double()
    return torch.randn(out, width, generator=draw, dtype=torch.float64), x.mT @ x / rows


def kept_part(w: torch.Tensor, m: torch.Tensor, rank: int) -> torch.Tensor:
    """The weight projected on the largest directions of m."""
    lost = min(w.shape) - rank
    return w - _directions.lost_with_smallest(w, _directions.smallest_directions(m, lost).rows, lost)


def product(w: torch.Tensor, moment: torch.Tensor, damping: float = 0.1) -> torch.Tensor:
    return pave.BASES["co_svd"](w, moment, damping)


@given(sizes)
def test_the_projection_is_the_truncation_times_the_inverse(size: tuple[int, int, int, float]) -> None:
    out, width, seed, share = size
    w, moment = layer(out, width, seed)
    rank = _ranks.rank_of(share, min(w.shape))
    damped = moment + 0.1 * torch.eye(width).double()
    u, s, vt = torch.linalg.svd(w @ damped, full_matrices=False)
    expected = (u[:, :rank] * s[:rank]) @ vt[:rank] @ torch.linalg.inv(damped)
    if rank < len(s) and s[rank - 1] - s[rank] < 1e-4 * s[0]:
        return  # no cut: equal singular values may be told apart in many ways
    got = kept_part(w, product(w, moment), rank)
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)


@given(sizes)
def test_what_is_kept_has_the_rank_and_what_is_lost_is_orthogonal_to_it(size: tuple[int, int, int, float]) -> None:
    out, width, seed, share = size
    w, moment = layer(out, width, seed)
    rank = _ranks.rank_of(share, min(w.shape))
    got = kept_part(w, product(w, moment), rank)
    assert int(torch.linalg.matrix_rank(got, atol=1e-8, rtol=0)) <= rank
    torch.testing.assert_close(got.mT @ (w - got), torch.zeros(width, width).double(), atol=1e-6, rtol=0)


@given(sizes)
def test_the_lost_activated_energy_is_that_of_the_dropped_singular_values(size: tuple[int, int, int, float]) -> None:
    out, width, seed, _ = size
    w, moment = layer(out, width, seed)
    damped, values = (
        moment + 0.1 * torch.eye(width).double(),
        _directions.smallest_directions(product(w, moment), 0).values,
    )
    torch.testing.assert_close(values, torch.linalg.svdvals(w @ damped))
    for rank in range(1, len(values) + 1):
        lost = (w - kept_part(w, product(w, moment), rank)) @ damped
        assert float(lost.square().sum()) == pytest.approx(float(values[rank:].square().sum()), rel=1e-6, abs=1e-12)


@given(sizes, st.floats(0.01, 100))
def test_equal_moments_are_no_moments_and_scaling_all_changes_nothing(
    size: tuple[int, int, int, float], factor: float
) -> None:
    out, width, seed, share = size
    w, moment = layer(out, width, seed)
    rank = _ranks.rank_of(share, min(w.shape))
    values = torch.linalg.svdvals(w)
    if rank < len(values) and values[rank - 1] - values[rank] < 1e-4 * values[0]:
        return
    plain = kept_part(w, pave.BASES["svd"](w, moment, 0.1), rank)
    for damping in (0.0, 0.3):
        torch.testing.assert_close(kept_part(w, product(w, factor * torch.eye(width).double(), damping), rank), plain)
    values = torch.linalg.svdvals(product(w, moment))
    if rank == len(values) or values[rank - 1] - values[rank] > 1e-4 * values[0]:
        scaled = kept_part(w, product(w, factor * moment, factor * 0.1), rank)
        torch.testing.assert_close(scaled, kept_part(w, product(w, moment), rank), atol=1e-8, rtol=0)


@pytest.mark.parametrize("count", [24, 12, 2])
@pytest.mark.parametrize(("out", "width"), [(24, 24), (24, 60), (60, 24)])
def test_singular_values_over_nine_decades_are_told_apart(out: int, width: int, count: int) -> None:
    draw = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(out, out, generator=draw, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(width, width, generator=draw, dtype=torch.float64))
    values = torch.logspace(0, -9, 24, dtype=torch.float64)
    m = (u[:, :24] * values) @ v[:24]
    found = _directions.smallest_directions(m, count)
    torch.testing.assert_close(found.values, values, rtol=1e-5, atol=0)
    cosines = (found.rows.flip(0) * u[:, 24 - count : 24].mT).sum(1).abs()
    torch.testing.assert_close(cosines, torch.ones(count, dtype=torch.float64), atol=1e-8, rtol=0)


def test_vectors_turned_by_torch_are_the_same() -> None:
    _, moment = layer(6, 9, 3)
    one, other = _directions.eigen(moment.triu()), _directions.whole(moment.triu())
    torch.testing.assert_close(one.values, other.values)
    same = (one.turn(one.vectors, False) * other.vectors).sum(0).abs()
    torch.testing.assert_close(same, torch.ones(9, dtype=torch.float64))
    back = one.turn(one.turn(other.vectors, True), False)
    torch.testing.assert_close(back, other.vectors)


@pytest.mark.parametrize(("out", "width"), [(8, 8), (8, 20), (20, 8)])
def test_a_weight_of_low_rank_loses_nothing_while_its_rank_is_kept(out: int, width: int) -> None:
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(out, 3, generator=draw).double() @ torch.randn(3, width, generator=draw).double()
    _, moment = layer(out, width, 1)
    torch.testing.assert_close(kept_part(w, product(w, moment), 3), w, atol=1e-10, rtol=0)
    assert float((kept_part(w, product(w, moment), 2) - w).abs().max()) > 1e-3


@given(
    st.lists(st.lists(st.integers(1, 10**6), min_size=7, max_size=7, unique=True), min_size=1, max_size=5),
    st.floats(0.01, 1.0),
)
def test_an_allocation_keeps_to_its_budget_and_its_floors(spectra: list[list[int]], share: float) -> None:
    ordered: list[list[float]] = [sorted(map(float, values), reverse=True) for values in spectra]
    kept, least = _ranks.allocate(ordered, share), _ranks.least_rank(share, 7)
    assert all(max(least, 0) <= count <= 7 for count in kept)
    if any(count > max(least, 0) for count in kept):
        full = 7 * len(kept)
        wanted = max(count for count in range(full + 1) if count / full < share)  # the most that is less than the share
        assert sum(kept) == (wanted if least < 7 else full)
    assert _ranks.allocate(ordered, 1.0) == [7] * len(kept)
    dropped = [
        values[rank] / values[0] for values, rank in zip(ordered, kept, strict=True) if rank < 7
    ]  # the last one dropped of each expert: what another with room keeps is not smaller
    for values, rank in zip(ordered, kept, strict=True):
        if rank > max(least, 0):
            assert values[rank - 1] / values[0] >= max(dropped, default=0.0)


@given(
    st.lists(st.lists(st.floats(0.1, 1.0), min_size=6, max_size=6, unique=True), min_size=2, max_size=4),
    st.floats(0.3, 1.0),
)
def test_turned_experts_turn_the_allocation(spectra: list[list[float]], share: float) -> None:
    ordered = [sorted(values, reverse=True) for values in spectra]
    measured = [value / values[0] for values in ordered for value in values[1:]]
    if len(set(measured)) == len(measured):
        turned = _ranks.allocate(ordered[::-1], share)
        assert turned[::-1] == _ranks.allocate(ordered, share)


@pytest.mark.parametrize(("share", "full", "rank"), [(0.875, 768, 672), (0.96875, 768, 744), (0.984375, 768, 756)])
def test_ranks_of_the_paper(share: float, full: int, rank: int) -> None:
    assert _ranks.rank_of(share, full) == rank
