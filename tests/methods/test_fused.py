"""The compiled loops give what the tensor operations give, whatever the numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mergectl.methods import _competition, _contenders, _elections, _fused, _kernels, _kth, _more_kernels, _order, emr
from mergectl.methods._task_vectors import TaskVectors

# Longer than a stretch; few values, so that there are draws and zeros, or any.
few = st.sampled_from([-1.5, -1.0, -0.25, 0.0, 0.25, 1.0, 1.5])
any_number = st.floats(-100, 100, width=32)
STACKS = st.tuples(st.integers(1, 5), st.sampled_from([1, _fused.STRETCH, _fused.STRETCH + 7])).flatmap(
    lambda shape: st.sampled_from([few, any_number]).flatmap(
        lambda numbers: arrays.arrays(np.float32, shape, elements=numbers, fill=numbers)
    )
)


DRAWN = np.array([[1.0, 0.0, -2.0, 0.5], [-1.0, 0.0, 2.0, -0.25]], np.float32)  # opposite entries, and zeros


def both(work: Callable[[], object]) -> tuple[object, object]:
    """What a function gives without and with the loops."""
    found = []
    for least in (1 << 62, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_fused, "LEAST", least)
            found.append(work())
    return found[0], found[1]


def assert_same(work: Callable[[], tuple[torch.Tensor, ...]]) -> None:
    plain, fused = both(work)
    assert isinstance(plain, tuple) and isinstance(fused, tuple)
    for a, b in zip(plain, fused, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


@settings(deadline=None, max_examples=20)
@given(STACKS)
@example(DRAWN)
def test_the_elected_sign_is_the_same(x: np.ndarray) -> None:
    assert_same(lambda: (_kernels.elect_by_mass(torch.from_numpy(x)),))


@settings(deadline=None, max_examples=20)
@given(STACKS, st.sampled_from([_kernels.agreeing_mean, _kernels.agreeing_sum]))
def test_agreeing_entries_have_the_same_sum_and_mean(
    x: np.ndarray, combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> None:
    rows = torch.from_numpy(x)
    sign = _kernels.elect_by_mass(rows.flip(1))
    assert_same(lambda: (combine(rows, sign),))


VOTERS = st.tuples(
    st.lists(st.sampled_from([-1.0, 0.0, 0.25, 1.0, math.inf]), min_size=5, max_size=5),
    st.none() | st.lists(st.sampled_from([1.0, 0.4, 2.5, -1.0]), min_size=5, max_size=5),
)


@settings(deadline=None, max_examples=40)
@given(STACKS, VOTERS, st.sampled_from([-1.0, 0.0, 1.0]), st.booleans())
@example(DRAWN, ([-1.0, -1.0], None), 1.0, True)
def test_an_election_and_what_agrees_with_it_are_the_same_in_one_pass(
    x: np.ndarray, given_voters: tuple[list[float], list[float] | None], instead: float, mean: bool
) -> None:
    floors, weights = given_voters
    voters = _elections.Voters(floors[: len(x)], None if weights is None else weights[: len(x)])
    rows = torch.from_numpy(x)
    assert_same(lambda: (_elections.agreed(rows, voters, instead=instead, mean=mean),))
    plain, fused = both(lambda: _elections.balance(rows, voters))
    assert plain == fused


@pytest.mark.parametrize("chance", [0.0, 1e-9, 0.1, 0.5, 1 - 1e-9, 1.0])
def test_what_a_draw_keeps_is_the_same(chance: float) -> None:
    row = torch.randn(200_000, generator=torch.Generator().manual_seed(0))

    def kept() -> tuple[torch.Tensor, ...]:
        out = torch.empty_like(row)
        _kernels.keep_chosen(torch.Generator().manual_seed(5), chance, row, 2.5, out)
        return (out,)

    assert_same(kept)
    taken = _kernels.chosen(torch.Generator().manual_seed(5), chance, row.shape)
    assert torch.equal(kept()[0], row * taken * 2.5)


@settings(deadline=None, max_examples=20)
@given(STACKS, st.lists(st.sampled_from([1.0, 0.4, 2.5, -1.0]), min_size=5, max_size=5))
def test_weighted_entries_that_agree_have_the_same_mean(x: np.ndarray, weights: list[float]) -> None:
    rows = torch.from_numpy(x)
    sign = _kernels.elect_by_mass(rows)
    assert_same(lambda: (_more_kernels.weighted_agreeing_mean(rows, weights[: len(x)], sign),))


@settings(deadline=None, max_examples=20)
@given(STACKS)
@example(DRAWN)
def test_unified_vector_and_masks_are_the_same_and_sums_as_good(x: np.ndarray) -> None:
    rows = torch.from_numpy(x)
    assert_same(lambda: emr.united(rows)[:2])
    plain, fused = both(lambda: emr.united(rows)[2:])
    np.testing.assert_allclose(np.array(fused), np.array(plain), rtol=1e-6)
    np.testing.assert_allclose(fused[0], np.abs(x.astype(np.float64)).sum(axis=1), rtol=1e-12)  # type: ignore[index]


@settings(deadline=None, max_examples=20)
@given(
    STACKS,
    st.sampled_from([_competition.with_all, _competition.with_all_ranked, _competition.with_each_ranked]),
    st.sampled_from([0.0, 0.01, 0.25]),
    st.sampled_from([0.1, 0.5, 1.0]),
    st.sampled_from([0.0, 0.3]),
    st.booleans(),
)
def test_competition_ends_alike(
    x: np.ndarray, inter: _competition.Inter, winsor: float, ratio: float, premask: float, sampled: bool
) -> None:
    rows = torch.from_numpy(x)
    tasks = [str(number) for number in range(len(x))]
    vectors = TaskVectors(tasks, {"w": x.shape[1:]}, {"w": rows}.__getitem__)
    rules = _competition.Rules(winsor, ratio, premask)
    scales = [1.2 - 0.3 * number for number in range(len(x))]
    with pytest.MonkeyPatch.context() as patch:
        if sampled:
            patch.setattr(_kth, "_TOGETHER", 0)
        assert_same(lambda: (_competition.released(inter, vectors, rules).average(rows, scales, 1e-12),))


@pytest.mark.parametrize("inter", [_competition.with_all, _competition.with_all_ranked])
def test_who_is_left_out_of_a_competition_changes_no_threshold(
    inter: _competition.Inter, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = 1e-3 * torch.randn(3, 4, 1 << 15, generator=torch.Generator().manual_seed(4))
    vectors = TaskVectors("abc", {str(i): x.shape[2:] for i in range(4)}, lambda name: x[:, int(name)].contiguous())
    asked = list[float]()
    contenders = _contenders.Field.contenders

    def watched(field: _contenders.Field, x: torch.Tensor, least: list[float]) -> _contenders.Contenders:
        asked.extend(least)
        return contenders(field, x, least)

    monkeypatch.setattr(_contenders.Field, "contenders", watched)
    monkeypatch.setattr(_kth, "_TOGETHER", 0)
    plain, fused = both(lambda: _competition.released(inter, vectors, _competition.Rules(0.01, 0.1, 0.0)).field)
    assert plain == fused
    assert max(asked) > _contenders.TINY
    every = scores_of(vectors, inter).sort(descending=True).values
    assert plain[1] == tuple(every[:, rank - 1].tolist() for rank in (_competition.drop_rank(0.1, every.shape[1]), 1))  # type: ignore[index]


def scores_of(vectors: TaskVectors, inter: _competition.Inter) -> torch.Tensor:
    """All scores of a competition, made with tensor operations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fused, "LEAST", 1 << 62)
        score = _competition.released(inter, vectors, _competition.Rules(0.01, 0.1, 0.0)).score
        return torch.cat([score(vectors[name]) for name in vectors], 1)


@pytest.mark.parametrize("tasks", [1, 3, 100])
@pytest.mark.parametrize("size", [1e-18, 1e-3, 1.0, 30.0])
def test_contenders_are_few_and_none_is_missed(tasks: int, size: float) -> None:
    x = size * torch.randn(tasks, 5000, generator=torch.Generator().manual_seed(tasks))
    lows, highs = x.abs().quantile(torch.tensor([0.01, 0.99]), 1).tolist()
    for floors in ([0.0] * tasks, x.abs().median(1).values.tolist()):
        for ranked in (False, True):
            field = _contenders.Field(lows, highs, floors, ranked, x.numel())
            scores = field.contenders(x, [-math.inf] * tasks).scores
            least = scores.quantile(0.9, 1)
            if size == 1.0 and tasks < 100 and not ranked:  # nothing underflows
                assert torch.equal(scores != 0, x.abs() >= torch.tensor(floors)[:, None])
            found = field.contenders(x, least.tolist())
            for row, bound, some, places in zip(scores, least, found.rows(), found.places, strict=True):
                assert torch.equal(row[places[: len(some)]], some)
                assert set((row >= bound).nonzero().flatten().tolist()) <= set(places[: len(some)].tolist())
                assert bound <= _contenders.TINY or 500 <= len(some) < 750


def test_what_the_loops_cannot_serve_is_left_to_tensor_operations() -> None:
    x = torch.zeros(2, _fused.LEAST)
    assert _fused.fits(x)
    assert not any(_fused.fits(other) for other in (x.double(), x.bfloat16(), x.T, x[:, :9], x.to("meta")))


def test_loops_are_kept_in_memory_only_where_no_folder_may_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    numba = pytest.importorskip("numba")
    made = []

    def njit(loop: Callable[..., int], **options: object) -> Callable[..., int]:
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        made.append(options)
        return loop

    monkeypatch.setattr(numba, "njit", njit)
    assert _fused.compiled(lambda: 3)() == 3
    assert len(made) == 1


def test_what_cancels_leaves_the_same_rest() -> None:
    values = torch.linspace(0.1, 3.0, 64).repeat(3, 1) * torch.tensor([[1.0], [1.0], [-2.0]])
    found, scales = torch.empty(64), np.array([0.3, 0.6, 0.45])
    bounds = np.tile(np.array([[0.0], [9.0], [0.0], [1.0]], np.float32), 3)  # nothing is clipped, a score is its share
    places, counts = np.tile(np.arange(64, dtype=np.int32), (3, 1)), np.full(3, 64)
    given_scores = torch.ones_like(values).numpy(), places, counts
    _contenders._average(values.numpy(), *given_scores, bounds, scales, 1e-12, found.numpy())
    assert torch.equal(found, _competition.average(values, torch.ones_like(values), scales.tolist(), 1e-12))
    assert bool((found != 0).any())


@settings(deadline=None, max_examples=20)
@given(STACKS, st.sampled_from([(-1.0, 1.0), (0.25, 1.0), (0.0, 0.0), (1.0, -1.0), (-math.inf, 0.25), (0.0, math.inf)]))
@example(DRAWN, (0.0, 1.0))
def test_what_lies_between_two_bounds_is_the_same(x: np.ndarray, bounds: tuple[float, float]) -> None:
    for row in x:
        for magnitudes in (False, True):
            plain, fused = both(lambda: _order.between(row, *bounds, magnitudes))  # noqa: B023 - called at once
            assert plain[1:] == fused[1:] and plain[0].tolist() == fused[0].tolist()  # type: ignore[index]
