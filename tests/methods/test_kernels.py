"""Laws of the arithmetic that methods share, on random input."""

from __future__ import annotations

import math
from collections.abc import Callable

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergectl.methods import _kernels as kernels
from mergectl.methods import _more_kernels, _order
from mergectl.methods._task_vectors import TaskVectors

numbers = st.floats(-1e3, 1e3, width=32)
stacks = arrays.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 30)), elements=numbers).map(
    lambda x: torch.from_numpy(x.copy())
)
small = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 4), st.integers(1, 12)), elements=st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0])
).map(lambda x: torch.from_numpy(x.copy()))
ELECT: list[Callable[[torch.Tensor], torch.Tensor]] = [
    kernels.elect_by_mass,
    lambda x: kernels.elect_by_share(x, square_norms(x)),
    lambda x: kernels.elect_by_share_mass(x, square_norms(x)),
]


def square_norms(x: torch.Tensor) -> list[float]:
    return [float(row) for row in x.double().square().sum(dim=1)]


def vectors(x: torch.Tensor, cut: int) -> TaskVectors:
    parts = {"a": x[:, :cut], "b": x[:, cut:]}
    shapes = {name: tuple(part.shape[1:]) for name, part in parts.items()}
    return TaskVectors([str(i) for i in range(len(x))], shapes, parts.__getitem__)


@given(st.integers(1, 10**9), st.integers(0, 100))
def test_a_share_of_so_many_percent_is_rounded_down_exactly(count: int, percent: int) -> None:
    assert kernels.count_share(percent / 100, count) == count * percent // 100


@given(st.integers(1, 10**8), st.data())
def test_a_share_made_from_a_count_gives_the_count_back(count: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(0, count))
    assert kernels.count_share(kept / count, count) == kept
    assert kernels.count_share(1 - (count - kept) / count, count) == kept


def test_one_minus_four_fifths_is_a_fifth() -> None:
    assert kernels.count_share(1 - 0.8, 7600) == 1520


@given(stacks, st.integers(0, 40), st.integers(0, 30))
def test_the_kth_magnitude_is_that_of_sorting(x: torch.Tensor, k: int, cut: int) -> None:
    ordered = x.abs().sort(dim=1, descending=True).values
    expected = [math.inf if k == 0 else 0.0 if k > x.shape[1] else float(row[k - 1]) for row in ordered]
    assert vectors(x, min(cut, x.shape[1])).kth_magnitude([k] * len(x)) == expected
    assert vectors(x, 0).only(["b"]).kth_magnitude([k] * len(x)) == expected


@given(stacks, st.integers(1, 30))
def test_keeping_the_top_keeps_k_entries_and_their_equals(x: torch.Tensor, k: int) -> None:
    floors = vectors(x, 0).kth_magnitude([k] * len(x))
    kept = kernels.keep_top(x, floors)
    for row, new, floor in zip(x, kept, floors, strict=True):
        assert torch.equal(new, torch.where(row.abs() >= floor, row, 0))
        assert int((row.abs() >= floor).sum()) >= min(k, len(row))
        assert int((row.abs() > floor).sum()) < k


@given(stacks, st.integers(0, 30))
def test_a_second_trimming_changes_nothing(x: torch.Tensor, k: int) -> None:
    floors = vectors(x, 0).kth_magnitude([k] * len(x))
    once = kernels.keep_top(x, floors)
    assert torch.equal(kernels.keep_top(once, floors), once)


@given(stacks, st.floats(0.05, 1.0), st.integers(0, 30))
def test_what_is_kept_holds_the_share_of_the_energy_and_no_entry_too_many(
    x: torch.Tensor, share: float, cut: int
) -> None:
    floors = vectors(x, min(cut, x.shape[1])).energy_magnitude([share] * len(x))
    for row, floor in zip(x.double(), floors, strict=True):
        total = float(row.square().sum())
        if total == 0:
            continue
        assert float(row[row.abs() >= floor].square().sum()) >= share * total * (1 - 1e-9)
        if share < 1:
            assert float(row[row.abs() > floor].square().sum()) < share * total * (1 + 1e-9)


@given(stacks, st.integers(0, 30))
def test_means_deviations_and_norms_do_not_depend_on_where_the_model_is_cut(x: torch.Tensor, cut: int) -> None:
    parts = vectors(x, min(cut, x.shape[1]))
    means, deviations = parts.means_and_deviations()
    assert means == pytest.approx(x.double().mean(dim=1).tolist(), abs=1e-9)
    if x.shape[1] > 1:
        assert deviations == pytest.approx(x.double().std(dim=1).tolist(), abs=1e-6)
    assert parts.square_norms() == pytest.approx(square_norms(x), rel=1e-12)


@given(small, st.integers(0, 2))
def test_flipping_all_entries_flips_the_elected_sign_and_the_merge(x: torch.Tensor, which: int) -> None:
    sign, flipped = ELECT[which](x), ELECT[which](-x)
    if which != 1:  # of two equal shares the first one counts, which flips too
        assert torch.equal(flipped, -sign)
    for merge in (kernels.agreeing_mean, kernels.agreeing_sum, kernels.agreeing_largest):
        assert torch.equal(merge(-x, -sign), -merge(x, sign))


@given(small, st.integers(0, 2))
def test_nothing_merged_opposes_the_elected_sign(x: torch.Tensor, which: int) -> None:
    sign = ELECT[which](x)
    for merge in (kernels.agreeing_mean, kernels.agreeing_sum, kernels.agreeing_largest):
        assert bool((merge(x, sign) * sign >= 0).all())
        assert bool((merge(x, sign)[sign == 0] == 0).all())


@given(small)
def test_mean_sum_and_largest_of_the_agreeing_keep_their_order(x: torch.Tensor) -> None:
    sign = kernels.elect_by_mass(x)
    mean, total = kernels.agreeing_mean(x, sign), kernels.agreeing_sum(x, sign)
    largest = kernels.agreeing_largest(x, sign)
    assert bool((mean.abs() <= largest.abs() + 1e-6).all())
    assert bool((largest.abs() <= total.abs() + 1e-6).all())
    alone = ((x * sign) > 0).sum(dim=0) == 1
    assert torch.equal(mean[alone], total[alone])


@given(small, st.integers(0, 3), st.floats(0.25, 8.0, width=16))
def test_scaling_one_task_leaves_its_votes_by_share_as_they_were(x: torch.Tensor, task: int, factor: float) -> None:
    scaled = x.clone()
    scaled[task % len(x)] *= 2.0 ** round(math.log2(factor))  # a power of two, so that squares stay exact
    for elect in ELECT[1:]:
        assert torch.equal(elect(scaled), elect(x))


def test_scaling_one_task_changes_the_election_by_mass() -> None:
    x = torch.tensor([[1.0, 1.0], [-2.0, 3.0]])
    assert kernels.elect_by_mass(x).tolist() == [-1.0, 1.0]
    assert kernels.elect_by_mass(x * torch.tensor([[4.0], [1.0]])).tolist() == [1.0, 1.0]


def test_a_zero_task_has_no_vote_by_share() -> None:
    x = torch.tensor([[0.0, 0.0], [-2.0, 0.0]])
    for elect in ELECT[1:]:
        assert elect(x).tolist() == [-1.0, 0.0]


@given(stacks)
def test_the_median_is_the_lower_middle_value(x: torch.Tensor) -> None:
    assert torch.equal(kernels.lower_median(x), x.median(dim=0).values)


def test_the_first_of_two_equal_magnitudes_counts_as_the_largest() -> None:
    assert kernels.largest(torch.tensor([[1.0, -3.0], [-1.0, 3.0]])).tolist() == [1.0, -3.0]


@given(stacks)
def test_the_mean_of_copies_is_the_copy(x: torch.Tensor) -> None:
    for count in (2, 3, 7):
        assert torch.equal(kernels.mean(x[:1].expand(count, -1)), x[0])


@given(stacks, st.floats(-1, 1), st.floats(0, 3))
def test_outliers_are_those_further_than_the_distance(x: torch.Tensor, centre: float, distance: float) -> None:
    kept = kernels.keep_outliers(x, [centre] * len(x), [distance] * len(x))
    assert torch.equal(kept != 0, ((x - centre).abs() > float(np.float32(distance))) & (x != 0))


def test_a_tiny_mean_is_not_rounded_to_nothing() -> None:
    x = torch.tensor([[1.0], [2.0**-30], [-1.0]])
    assert kernels.elect_by_mass(x).tolist() == [1.0]


@given(stacks, st.integers(0, 2**31))
def test_the_elected_sign_is_that_of_the_sum_in_float64_however_near_a_draw_it_is(x: torch.Tensor, seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    near = -x.sum(0, keepdim=True) * (1 + 1e-7 * torch.randn(x.shape[1:], generator=chance))
    for rows in (x, torch.cat([x, near]), torch.cat([x, -x]), torch.cat([near, x.flip(0)])):
        assert torch.equal(kernels.elect_by_mass(rows), kernels.total(rows).sign().float())


@given(stacks)
def test_the_mean_is_that_in_float64(x: torch.Tensor) -> None:
    room = 1e-6 * float(x.abs().max()) + 2.0**-149  # float32 has nothing between its smallest number and zero
    torch.testing.assert_close(kernels.mean(x).double(), x.double().mean(0), rtol=1e-6, atol=room)


def test_an_entry_above_the_bounds_is_not_taken_for_the_upper_one() -> None:
    row = np.array([3.0, 2.0, 1.5, 1.0, 1.0, 0.5], dtype=np.float32)
    parts = [_order.between(row[:3], 1.0, 2.0, False), _order.between(row[3:], 1.0, 2.0, False)]
    assert [part[1:] for part in parts] == [(1, 1, 0), (0, 0, 2)]
    tally = _order.Tally(1.0, 2.0)
    for part in parts:
        tally.add(part)
    found = [tally.kth(rank, 6) for rank in (1, 2, 3, 4, 5, 6)]
    assert found[1:5] == [2.0, 1.5, 1.0, 1.0] and all(math.isnan(value) for value in (found[0], found[5]))


@pytest.mark.parametrize("pending", [1, 7, 1 << 19])
@given(arrays.arrays(np.float32, st.integers(1, 60), elements=st.sampled_from([-2.0, -0.5, 0.0, 0.5, 1.0, 3.0])))
def test_entries_told_one_by_one_or_counted_have_the_same_order(pending: int, row: np.ndarray) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_order, "_PENDING", pending)
        tally = _order.Tally(-1.0, 2.0)
    for start in range(0, len(row), 5):
        tally.add(_order.between(row[start : start + 5], -1.0, 2.0, False))
    for rank, entry in enumerate(sorted(row.tolist(), reverse=True), 1):
        found = tally.kth(rank, len(row))
        assert found == entry if -1 < entry < 2 else math.isnan(found)
    assert pending > 60 or len(tally._entries) <= 4  # numbers between the bounds


@given(st.integers(0, 3000), st.integers(1, 50))
def test_a_sample_is_spread_over_all_entries_and_has_its_share_of_them(size: int, step: int) -> None:
    found = _order.thinned(np.arange(2 * size).reshape(2, size), step)
    assert found.shape == (2, _order.thinned_count(size, step))
    assert abs(found.shape[1] - size / step) <= 8
    gaps = np.diff(found[1], prepend=size, append=2 * size - 1)
    assert size == 0 or gaps.max() <= 16 * step
    assert torch.equal(_order.thinned(torch.arange(size), step), torch.from_numpy(found[0]))


@pytest.mark.parametrize("chance", [0.0, 0.4 / 65536, 0.3, 1 - 0.4 / 65536, 1.0])
def test_a_chance_finer_than_sixteen_bits_is_kept(chance: float) -> None:
    count = 1 << 22
    taken = int(kernels.chosen(torch.Generator().manual_seed(7), chance, (count,)).sum(dtype=torch.float64))
    assert abs(taken - chance * count) <= 5 * math.sqrt(count * chance * (1 - chance))


@given(small | stacks, st.sampled_from([torch.float32, torch.float64]))
def test_places_among_magnitudes_are_those_of_a_stable_sort(x: torch.Tensor, dtype: torch.dtype) -> None:
    for rows in (x.to(dtype), x.to(dtype).T, x[0].to(dtype), (-0.0 * x).to(dtype)):
        order = np.argsort(np.abs(rows.numpy()), axis=-1, kind="stable")
        assert _more_kernels.ranks(rows).tolist() == np.argsort(order, axis=-1, kind="stable").tolist()
