"""Breadcrumbs, DELLA, SCE, NearSwap, Arcee Fusion, and weights in TIES and averages: what they must keep and drop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergectl import merge_weights
from mergectl.errors import UserError
from mergectl.methods import _more_kernels
from mergectl.methods._task_vectors import TaskVectors
from tests.methods.families import assert_close, assert_same, family


def merged(method: str, *rows: list[float], **given: Any) -> list[float]:
    base = {"m.w": torch.zeros(len(rows[0]))}
    experts = {f"task{i}": {"m.w": torch.tensor(row)} for i, row in enumerate(rows)}
    result: list[float] = merge_weights(method, base, experts, **given)["m.w"].tolist()
    return result


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=30), st.integers(0, 30), st.integers(0, 30))
def test_a_window_of_ranks_keeps_exactly_its_count_whatever_is_equal(row: list[int], skip: int, count: int) -> None:
    x = torch.tensor(row, dtype=torch.float32) + 10  # no zeros, many equals
    count = min(count, len(row))
    skip = min(skip, len(row) - count)
    half = len(row) // 2
    parts = {"w\0000": x[None, :half], "w\0001": x[None, half:]}  # one weight in two blocks
    vectors = TaskVectors(["a"], {n: p.shape[1:] for n, p in parts.items()}, parts.__getitem__)
    ends = _more_kernels.edges(vectors, [skip], [count])[0]
    kept = torch.cat([_more_kernels.within(n, p[0], ends, skip, count) for n, p in parts.items()])
    order = torch.sort(x.abs(), descending=True, stable=True).indices[skip:][:count]
    expected = torch.zeros_like(x)
    expected[order] = x[order]
    assert torch.equal(kept, expected)


def test_breadcrumbs_drop_both_tails() -> None:
    row = [float(v) for v in range(1, 11)]
    assert merged("breadcrumbs", row, keep=0.5, gamma=0.2, scale=1.0) == [0, 0, 0, 4, 5, 6, 7, 8, 0, 0]


def test_what_is_kept_comes_before_what_is_dropped() -> None:
    row = [1.0, 2.0, 3.0, 4.0]
    assert merged("breadcrumbs", row, keep=0.75, gamma=0.5, scale=1.0) == [1, 2, 3, 0]
    assert merged("breadcrumbs", row, keep=1.0, gamma=0.5, scale=1.0) == row


@pytest.mark.parametrize("size", [1, 2, 7])
def test_a_small_tensor_is_not_emptied(size: int) -> None:
    row = [float(v + 1) for v in range(size)]
    got = merged("breadcrumbs", row, keep=0.01, gamma=0.01, scale=1.0)
    assert got == [0.0] * (size - 1) + [float(size)]
    assert any(merged("ties", row, density=0.01, scope="tensor", exact=True))
    assert any(merged("sce", row, [0.5] * size, density=0.01))


def test_equal_magnitudes_do_not_empty_a_tensor() -> None:
    assert merged("breadcrumbs", [1.0, -1.0, 1.0, -1.0], keep=0.5, gamma=0.25, scale=1.0) == [0, -1, 1, 0]


def test_rescaled_breadcrumbs_have_the_sum_of_magnitudes_of_the_whole() -> None:
    got = merged("breadcrumbs", [1.0, -2.0, 3.0, -4.0], keep=0.5, gamma=0.0, rescale=True, scale=1.0)
    assert sum(abs(v) for v in got) == pytest.approx(10)


def test_without_epsilon_della_is_dare() -> None:
    base, experts = family(3)
    dare = merge_weights("dare_ties", base, experts, drop=0.3, seed=5)
    assert_close(merge_weights("della", base, experts, keep=0.7, epsilon=0.0, seed=5), dare)
    dare = merge_weights("dare_task_arithmetic", base, experts, drop=0.3, seed=5, rescale_to="l1")
    della = merge_weights("della_linear", base, experts, keep=0.7, epsilon=0.0, seed=5, rescale_to="l1")
    assert_close(della, dare)


def test_della_keeps_the_share_asked_for_and_more_of_the_large() -> None:
    x = torch.randn(400, 50, generator=torch.Generator().manual_seed(0))
    base, expert = {"m.w": torch.zeros_like(x)}, {"a": {"m.w": x}}
    kept = merge_weights("della_linear", base, expert, keep=0.4, epsilon=0.3, rescale=False, scale=1.0)["m.w"] != 0
    assert float(kept.float().mean()) == pytest.approx(0.4, abs=0.01)
    small, large = x.abs() < x.abs().median(), x.abs() > x.abs().median()
    assert float(kept[large].float().mean()) > 2 * float(kept[small].float().mean())


def test_della_expects_the_task_vector_itself() -> None:
    x = torch.arange(1.0, 9.0).repeat(4000, 1)
    got = merge_weights("della_linear", {"m.w": torch.zeros_like(x)}, {"a": {"m.w": x}}, scale=1.0, epsilon=0.3)["m.w"]
    torch.testing.assert_close(got.mean(0), x[0], rtol=0.1, atol=0)


def test_l1_rescaling_keeps_the_sum_of_magnitudes() -> None:
    row = [float(v) for v in range(-10, 11)]
    for method, share in (("dare_task_arithmetic", {"drop": 0.5}), ("della_linear", {"keep": 0.5})):
        got = merged(method, row, rescale_to="l1", scale=1.0, **share)
        assert sum(abs(v) for v in got) == pytest.approx(110)


def test_a_single_column_is_kept_by_its_density_and_vectors_are_one_row() -> None:
    x = torch.ones(3000, 1)
    got = merge_weights("della_linear", {"m.w": x * 0}, {"a": {"m.w": x}}, keep=0.6, epsilon=0.3, scale=1.0)["m.w"]
    assert float((got != 0).float().mean()) == pytest.approx(0.6, abs=0.03)


def test_odds_outside_zero_and_one_are_refused() -> None:
    with pytest.raises(UserError, match=r"must lie inside 0 to 1, got 0\.9 and 0\.15"):
        merged("della", [1.0, 2.0], keep=0.9)


def test_sce_weighs_experts_by_their_energy() -> None:
    assert merged("sce", [1.0, 3.0], [1.0, 1.0]) == pytest.approx([1.0, (10 * 3 + 2 * 1) / 12])


def test_sce_does_not_depend_on_how_small_the_changes_are() -> None:
    rows = [1.0, 3.0, -2.0], [1.0, 1.0, 5.0]
    tiny = [[v * 2.0**-30 for v in row] for row in rows]
    assert [v * 2.0**30 for v in merged("sce", *tiny)] == pytest.approx(merged("sce", *rows))


def test_nearswap_stays_within_t_of_the_base_and_takes_what_is_near() -> None:
    base, experts = family(1)
    got = merge_weights("nearswap", base, experts, t=0.03)
    for name, x in base.items():
        target = experts["task0"][name]
        near = (target - x).abs() <= 0.03
        torch.testing.assert_close(got[name][near], target[near])
        torch.testing.assert_close((got[name] - x)[~near].abs(), torch.full_like(x, 0.03)[~near])


def test_fusion_takes_an_outstanding_change_and_leaves_the_rest() -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"m.w": torch.randn(20, 10, generator=generator)}
    change = 0.01 * torch.randn(20, 10, generator=generator)
    change[3, 4] = 2.0
    got = merge_weights("arcee_fusion", base, {"a": {"m.w": base["m.w"] + change}})["m.w"] - base["m.w"]
    assert float(got[3, 4]) == pytest.approx(2.0, abs=1e-6)
    assert 0 < int((got != 0).sum()) < 60


def test_equal_weights_change_nothing_in_ties_and_averages() -> None:
    base, experts = family(3)
    for method in ("ties", "average"):
        assert_close(merge_weights(method, base, experts, weight=0.5), merge_weights(method, base, experts))


def test_a_weight_decides_an_election() -> None:
    rows = [3.0, 1.0], [-2.0, 1.0]
    assert merged("ties", *rows, trim="none") == [3.0, 1.0]
    assert merged("ties", *rows, trim="none", weight=[1.0, 2.0]) == [-2.0, 1.0]
    assert merged("ties", *rows, trim="none", weight=[1.0, 2.0], combine="disjoint_sum") == [-4.0, 3.0]


def test_a_negative_weight_turns_its_task_vector() -> None:
    assert merged("ties", [1.0], [1.0], trim="none", weight=[1.0, -0.5], combine="disjoint_sum") == [1.0]


def test_exact_trimming_keeps_the_floor_of_the_share_and_what_equals_the_last() -> None:
    row = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert merged("ties", row, density=0.5, exact=True, scope="tensor") == [0, 0, 0, 4, 5]
    assert merged("ties", [1.0, 2.0, 2.0, 2.0], density=0.25, exact=True, scope="tensor") == [0, 2, 2, 2]


def test_a_draw_may_count_as_plus() -> None:
    assert merged("ties", [1.0, -2.0], [-1.0, -2.0], trim="none", zero_sign="plus") == [1.0, -2.0]


def test_weights_of_an_average_are_shares_unless_told_otherwise() -> None:
    rows = [1.0, 2.0], [3.0, 6.0]
    assert merged("average", *rows, weight=[1.0, 3.0]) == [2.5, 5.0]
    assert merged("average", *rows, weight=[1.0, 3.0], normalize=False) == [10.0, 20.0]
    with pytest.raises(UserError, match="are for combine=mean"):
        merged("average", *rows, weight=[1.0, 3.0], combine="median")


def test_kept_entries_are_those_of_the_expert() -> None:
    base, experts = family(2)
    one = {"task0": experts["task0"]}
    assert_same(
        merge_weights("breadcrumbs", base, one, keep=1.0, scale=1.0),
        merge_weights("task_arithmetic", base, one, scale=1.0),
    )
