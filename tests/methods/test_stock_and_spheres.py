"""Model Stock and the methods on the sphere: what they must give besides the promises of all methods."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergectl import merge_weights
from mergectl.errors import UserError
from tests.methods.families import assert_close, assert_same, family

Weights = dict[str, torch.Tensor]


def on_axes(*rows: list[float]) -> tuple[Weights, dict[str, Weights]]:
    return {"m.w": torch.zeros(len(rows[0]))}, {f"task{i}": {"m.w": torch.tensor(row)} for i, row in enumerate(rows)}


def merged(method: str, *rows: list[float], **given: Any) -> list[float]:
    result: list[float] = merge_weights(method, *on_axes(*rows), **given)["m.w"].tolist()
    return result


def test_identical_experts_are_their_own_stock() -> None:
    base, experts = family(1)
    copies = {f"task{i}": experts["task0"] for i in range(4)}
    for filter_wise in (False, True):
        assert_close(merge_weights("model_stock", base, copies, filter_wise=filter_wise), experts["task0"])


def test_orthogonal_task_vectors_leave_the_base() -> None:
    assert merged("model_stock", [2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 5.0]) == [0, 0, 0]


def test_two_experts_at_sixty_degrees_go_two_thirds_of_the_way() -> None:
    got = merged("model_stock", [1.0, 0.0], [0.5, math.sqrt(0.75)])
    assert got == pytest.approx([0.5, math.sqrt(0.75) / 3], abs=1e-6)  # t = 2 * 0.5 / 1.5


def test_obtuse_angles_are_cut_off_unless_told_otherwise() -> None:
    rows = [1.0, 0.0], [-0.5, 1.0]
    assert merged("model_stock", *rows) == [0, 0]
    assert merged("model_stock", *rows, clamp=False) != [0, 0]


def test_small_task_vectors_have_angles_too() -> None:
    rows = [1.0, 0.0], [0.5, math.sqrt(0.75)]
    tiny = [[1e-9 * v for v in row] for row in rows]
    assert [1e9 * v for v in merged("model_stock", *tiny)] == pytest.approx(merged("model_stock", *rows), rel=1e-5)


def test_filter_wise_takes_each_row_alone() -> None:
    base, experts = family(3)
    got = merge_weights("model_stock", base, experts, filter_wise=True)["m.layer.1.weight"]
    for row in range(6):
        alone = {t: {"m.w": w["m.layer.1.weight"][row]} for t, w in experts.items()}
        start = {"m.w": base["m.layer.1.weight"][row]}
        torch.testing.assert_close(got[row], merge_weights("model_stock", start, alone)["m.w"])


def test_angles_and_cosines_have_one_mean_for_two_experts() -> None:
    base, experts = family(2)
    assert_close(
        merge_weights("model_stock", base, experts, mean="angles"), merge_weights("model_stock", base, experts)
    )


@pytest.mark.parametrize("method", ["slerp", "nuslerp"])
def test_the_ends_of_the_arc_are_the_experts_bit_by_bit(method: str) -> None:
    base, experts = family(2)
    for place, task in enumerate(experts):
        ends: dict[str, Any] = {"t": float(place)} if method == "slerp" else {"weight": [1.0 - place, float(place)]}
        assert_same(merge_weights(method, base, experts, **ends), experts[task])


@settings(max_examples=30, deadline=None)
@given(st.floats(0.05, 0.95), st.floats(0.1, 3.0))
def test_experts_of_one_length_give_that_length(t: float, angle: float) -> None:
    rows = [3.0, 0.0], [3.0 * math.cos(angle), 3.0 * math.sin(angle)]
    spherical: list[tuple[str, dict[str, Any]]] = [
        ("slerp", {"t": t}), ("nuslerp", {"weight": [1 - t, t]}), ("multislerp", {"weight": [1 - t, t]}),
        ("karcher", {}),
    ]  # fmt: skip
    for method, own in spherical:
        assert math.hypot(*merged(method, *rows, **own)) == pytest.approx(3.0, rel=1e-3)


def test_nuslerp_is_slerp_at_the_place_its_weights_select() -> None:
    base, experts = family(2)
    expected = merge_weights("slerp", base, experts, t=0.75)
    got = merge_weights("nuslerp", base, experts, weight=[0.5, 1.5])
    for name, x in expected.items():
        torch.testing.assert_close(got[name], x, rtol=0, atol=2e-4)  # they part where slerp takes the straight line


def test_vectors_of_a_dimension_turn_alone() -> None:
    base, experts = family(2)
    pair = [w["m.layer.1.weight"] for w in experts.values()]
    for along, rows in (("last", pair), ("first", [x.T for x in pair])):
        got = merge_weights("nuslerp", base, experts, along=along)["m.layer.1.weight"]
        own = got if along == "last" else got.T
        for number, (a, b) in enumerate(zip(*rows, strict=True)):
            alone = merge_weights("nuslerp", None, {"a": {"m.w": a}, "b": {"m.w": b}})["m.w"]
            torch.testing.assert_close(own[number], alone)


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_the_mean_of_two_equal_votes_is_half_way_on_the_arc(method: str) -> None:
    rows = [3.0, 4.0, 0.0], [0.0, -3.0, 4.0]
    assert merged(method, *rows) == pytest.approx(merged("nuslerp", *rows))


def test_directions_that_cancel_out_are_added_as_they_are() -> None:
    assert merged("multislerp", [2.0, 0.0], [-4.0, 0.0]) == [-1, 0]
    assert merged("multislerp", [1.0, 0.0], [-1.0, 0.0], [0.0, 3.0], [0.0, -1.0]) == [0.0, 0.5]


def test_the_karcher_mean_of_three_axes_is_their_diagonal() -> None:
    assert merged("karcher", [3.0, 0, 0], [0, 3.0, 0], [0, 0, 3.0]) == pytest.approx([math.sqrt(3)] * 3)


def test_the_karcher_mean_has_the_least_squared_angle() -> None:
    rows = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.6, 0.0, 0.8]

    def cost(point: torch.Tensor) -> float:
        return sum(float(torch.acos((point / point.norm()).dot(torch.tensor(row)))) ** 2 for row in rows)

    best = torch.tensor(merged("karcher", *rows, max_iter=200, tol=1e-7))
    nearby = [best + 0.01 * torch.eye(3)[axis] * sign for axis in range(3) for sign in (-1, 1)]
    assert all(cost(best) <= cost(point) + 1e-6 for point in nearby)


def test_zero_weights_stay_zero_and_finite() -> None:
    for method in ("multislerp", "karcher", "nuslerp"):
        for other, expected in (([0.0, 0.0], [0, 0]), ([1.0, 2.0], [0.5, 1])):
            _, experts = on_axes([0.0, 0.0], other)
            assert merge_weights(method, None, experts)["m.w"].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("method", ["average", "nuslerp", "multislerp"])
def test_weights_that_add_up_to_zero_are_refused(method: str) -> None:
    with pytest.raises(UserError, match="add up to zero"):
        merged(method, [1.0, 2.0], [3.0, 4.0], weight=[1.0, -1.0])
