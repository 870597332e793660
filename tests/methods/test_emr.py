"""What EMR, SLERP, interpolation, averaging and task arithmetic must do besides matching the references."""

from __future__ import annotations

import pytest
import torch

from mergectl import merge_weights
from mergectl.errors import UserError
from tests.methods.families import assert_close, assert_same, family


def deltas(base: dict[str, torch.Tensor], experts: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([expert[name] - base[name] for expert in experts.values()]) for name in base}


def scaled(
    base: dict[str, torch.Tensor], experts: dict[str, dict[str, torch.Tensor]], factor: float
) -> dict[str, dict[str, torch.Tensor]]:
    return {task: {n: base[n] + factor * (x - base[n]) for n, x in expert.items()} for task, expert in experts.items()}


def zeros_based(tasks: int) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    """Make experts of a base of zeros, so that task vectors are exact."""
    base, experts = family(tasks)
    moved = {task: {name: x - base[name] for name, x in expert.items()} for task, expert in experts.items()}
    return {name: torch.zeros_like(x) for name, x in base.items()}, moved


def test_the_unified_vector_has_the_largest_agreeing_magnitude_and_the_elected_sign() -> None:
    base, experts = family(4)
    unified = merge_weights("emr", base, experts).kept["unified"]
    for name, x in deltas(base, experts).items():
        sign = torch.where(x.double().mean(dim=0) > 0, 1.0, -1.0)
        expected = torch.where(x * sign > 0, x.abs(), 0).amax(dim=0) * sign
        torch.testing.assert_close(unified[name], expected, atol=1e-7, rtol=0)


def test_masked_vectors_are_at_least_as_large_as_the_task_vectors_there() -> None:
    base, experts = family(4)
    kept = merge_weights("emr", base, experts).kept
    for name, x in deltas(base, experts).items():
        for row, task in zip(x, experts, strict=True):
            mask = kept["masks"][task][name]
            assert bool((kept["unified"][name].abs() >= row.abs())[mask].all())


def test_identical_experts_are_reconstructed_exactly() -> None:
    base, experts = zeros_based(1)
    merged = merge_weights("emr", base, {f"task{i}": experts["task0"] for i in range(3)})
    assert_same(merged.kept["unified"], experts["task0"])
    assert set(merged.kept["rescalers"].values()) == {1.0}
    assert_same(merged.task("task2"), experts["task0"])
    for name, x in experts["task0"].items():
        assert torch.equal(merged.kept["masks"]["task1"][name], x != 0)


def test_rescalers_match_the_sizes_of_the_task_vectors() -> None:
    base, experts = family(3)
    for rescaler in ("tensor_mean", "global_sum"):
        kept = merge_weights("emr", base, experts, rescaler=rescaler).kept
        for number, task in enumerate(experts):
            own = left = 0.0
            for name, x in deltas(base, experts).items():
                share = x[number].numel() if rescaler == "tensor_mean" else 1
                own += float(x[number].abs().double().sum()) / share
                left += float((kept["masks"][task][name] * kept["unified"][name]).abs().double().sum()) / share
            assert kept["rescalers"][task] * left == pytest.approx(own, rel=1e-5)


def test_scaling_all_vectors_scales_the_unified_one_alone() -> None:
    base, experts = zeros_based(3)
    kept = merge_weights("emr", base, experts).kept
    double = merge_weights("emr", base, scaled(base, experts, 2.0)).kept
    assert_same(double["unified"], {name: 2 * x for name, x in kept["unified"].items()})
    assert double["rescalers"] == pytest.approx(kept["rescalers"])
    for task in experts:
        assert_same(double["masks"][task], kept["masks"][task])


def test_negating_all_vectors_negates_the_unified_one() -> None:
    base, experts = zeros_based(3)
    kept = merge_weights("emr", base, experts).kept
    turned = merge_weights("emr", base, scaled(base, experts, -1.0)).kept
    for name, x in deltas(base, experts).items():
        decided = x.double().sum(dim=0) != 0
        assert torch.equal(turned["unified"][name][decided], -kept["unified"][name][decided])
        for task in experts:
            assert torch.equal(turned["masks"][task][name][decided], kept["masks"][task][name][decided])


def test_turned_experts_turn_masks_and_rescalers_and_leave_the_unified_vector() -> None:
    base, experts = family(4)
    kept = merge_weights("emr", base, experts).kept
    turned = merge_weights("emr", base, dict(reversed(experts.items()))).kept
    assert_same(turned["unified"], kept["unified"])
    assert turned["rescalers"] == pytest.approx(kept["rescalers"])
    for task in experts:
        assert_same(turned["masks"][task], kept["masks"][task])


def test_a_mean_of_zero_keeps_the_negative_entries() -> None:
    base, experts = (
        {"m.w": torch.zeros(2)},
        {"a": {"m.w": torch.tensor([1.0, 2])}, "b": {"m.w": torch.tensor([-1.0, 2])}},
    )
    kept = merge_weights("emr", base, experts).kept
    assert kept["unified"]["m.w"].tolist() == [-1, 2]
    assert [kept["masks"][task]["m.w"].tolist() for task in experts] == [[False, True], [True, True]]


def test_asking_for_one_task_after_another_accumulates_nothing() -> None:
    merged = merge_weights("emr", *family(3))
    first = merged.task("task0")
    merged.task("task1")
    assert_same(merged.task("task0"), first)


def test_each_task_keeps_its_own_integers() -> None:
    base, experts = family(2)
    base["m.steps"] = torch.tensor([0])
    experts["task0"]["m.steps"], experts["task1"]["m.steps"] = torch.tensor([0]), torch.tensor([7])
    merged = merge_weights("emr", base, experts)
    assert [merged.task(task)["m.steps"].item() for task in experts] == [0, 7]
    assert merged["m.steps"].item() == 0


def test_settings_by_pattern_are_refused_where_something_is_kept_per_task() -> None:
    with pytest.raises(UserError, match="rescaler cannot differ between weights"):
        merge_weights("emr", *family(2), rescaler={"*": "global_sum"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_interpolation_is_exact_at_both_ends(dtype: torch.dtype) -> None:
    base, experts = family(1, dtype=dtype)
    assert_same(merge_weights("interpolate", base, experts, alpha=0), base)
    assert_same(merge_weights("interpolate", base, experts, alpha=1), experts["task0"])


def test_interpolation_lies_on_the_line_and_is_symmetric() -> None:
    base, experts = family(1)
    expert = experts["task0"]
    got = merge_weights("interpolate", base, experts, alpha=0.3)
    assert_close(got, {name: 0.7 * base[name] + 0.3 * expert[name] for name in base})
    assert_same(
        merge_weights("interpolate", base, experts, alpha=0.5),
        merge_weights("interpolate", expert, {"b": base}, alpha=0.5),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_slerp_is_exact_at_both_ends(dtype: torch.dtype) -> None:
    base, experts = family(2, dtype=dtype)
    assert_same(merge_weights("slerp", base, experts, t=0), experts["task0"])
    assert_same(merge_weights("slerp", base, experts, t=1), experts["task1"])


def test_slerp_of_equal_norms_keeps_the_norm() -> None:
    a, b = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    b *= a.norm() / b.norm()
    for t in (0.2, 0.5, 0.9):
        got = merge_weights("slerp", None, {"a": {"m.w": a}, "b": {"m.w": b}}, t=t)["m.w"]
        assert float(got.norm()) == pytest.approx(float(a.norm()), rel=1e-5)


def test_slerp_of_one_direction_or_of_nothing_is_the_straight_line() -> None:
    a = torch.tensor([1.0, 2.0, -3.0])
    for b in (3 * a, -a, torch.zeros(3)):
        got = merge_weights("slerp", None, {"a": {"m.w": a}, "b": {"m.w": b}}, t=0.25)["m.w"]
        torch.testing.assert_close(got, 0.75 * a + 0.25 * b)


def test_slerp_may_have_another_place_for_each_weight() -> None:
    _, experts = family(2)
    got = merge_weights("slerp", None, experts, t={"m.layer.*": 0.0, "*": 1.0})
    assert torch.equal(got["m.layer.0.weight"], experts["task0"]["m.layer.0.weight"])
    assert torch.equal(got["m.embed.weight"], experts["task1"]["m.embed.weight"])


def test_the_average_is_task_arithmetic_with_the_scale_one_over_n() -> None:
    base, experts = family(4)
    average = merge_weights("average", base, experts)
    assert_close(merge_weights("task_arithmetic", base, experts, scale=0.25), average)
    assert_close(merge_weights("average", base, experts, on="deltas"), average)
    assert_close(merge_weights("dare_average", base, experts, drop=0), average)


def test_averaging_deltas_needs_the_base() -> None:
    with pytest.raises(UserError, match="on=deltas needs the base"):
        merge_weights("average", None, family(2)[1], on="deltas")


def test_task_arithmetic_of_scale_zero_and_one_gives_the_ends() -> None:
    base, experts = family(1)
    assert_same(merge_weights("task_arithmetic", base, experts, scale=0), base)
    assert_close(merge_weights("task_arithmetic", base, experts, scale=1), experts["task0"])


def test_task_arithmetic_takes_a_scale_per_task_in_any_form() -> None:
    base, experts = family(3)
    expected = merge_weights("task_arithmetic", base, experts, scale=[0.1, 0.4, 0.3])
    import numpy as np

    for scale in ((0.1, 0.4, 0.3), np.array([0.1, 0.4, 0.3]), {"task2": 0.3, "task0": 0.1}):
        assert_same(merge_weights("task_arithmetic", base, experts, scale=scale), expected)


def test_task_vectors_of_half_precision_are_taken_in_float32() -> None:
    base = {"m.w": torch.tensor([1.0, 1.0], dtype=torch.bfloat16)}
    step = {"m.w": torch.tensor([1.0078125, 0.99609375], dtype=torch.bfloat16)}
    got = merge_weights("task_arithmetic", base, {"a": step, "b": step}, scale=0.5)
    assert_same(got, step)
