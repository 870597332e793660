"""What DARE must do: exact zeros, fair and reproducible drops, given masks, and nothing at a drop of zero."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mergectl import merge_weights
from mergectl.errors import UserError
from mergectl.merging import Recipe, merge_stream
from mergectl.plan import generators
from tests.methods.families import assert_close, assert_same, family

MERGERS = ["average", "task_arithmetic", "ties", "ties_tensor", "medusa", "emr"]


@pytest.mark.parametrize("method", MERGERS)
def test_dropping_nothing_changes_nothing(method: str) -> None:
    base, experts = family(3)
    given: dict[str, Any] = {"on": "deltas"} if method == "average" else {}
    plain = merge_weights(method, base, experts, **given)
    assert_same(merge_weights(method, base, experts, refine="dare:drop=0", **given), plain)
    ones = {task: {name: torch.ones_like(x) for name, x in base.items()} for task in experts}
    got = merge_weights(method, base, experts, refine="dare:drop=0", supplies={"masks": ones}, **given)
    assert_same(got, plain)


def test_a_preset_is_the_refinement_and_the_method() -> None:
    base, experts = family(3)
    presets: list[tuple[str, str, dict[str, Any]]] = [
        ("dare_ties", "ties", {"trim": "none", "zero_sign": "zero"}),
        ("dare_task_arithmetic", "task_arithmetic", {}),
        ("dare_average", "average", {"on": "deltas"}),
    ]
    for preset, method, given in presets:
        both = merge_weights(method, base, experts, refine=[("dare", {"drop": 0.4})], seed=3, **given)
        assert_same(merge_weights(preset, base, experts, drop=0.4, seed=3), both)


def test_the_elected_mean_of_dropped_vectors_is_what_dare_ties_gives() -> None:
    base, experts = family(3)
    assert_same(merge_weights("dare_ties", base, experts), merge_weights("medusa", base, experts, refine="dare"))


def test_the_seed_decides_and_nothing_else() -> None:
    base, experts = family(3)
    first = merge_weights("dare_ties", base, experts, seed=1)
    assert_same(merge_weights("dare_ties", base, experts, seed=1), first)
    other = merge_weights("dare_ties", base, experts, seed=2)
    assert any(not torch.equal(other[name], first[name]) for name in base)


def test_a_part_of_the_model_is_dropped_as_in_the_whole() -> None:
    base, experts = family(3)
    names = list(base)[1:3]
    part = merge_weights(
        "dare_task_arithmetic",
        {name: base[name] for name in reversed(names)},
        {task: {name: weights[name] for name in names} for task, weights in experts.items()},
    )
    whole = merge_weights("dare_task_arithmetic", base, experts)
    for name in names:
        assert torch.equal(part[name], whole[name])


def test_tasks_and_weights_of_one_shape_are_dropped_differently() -> None:
    rng = generators(0, 0)
    draws = [torch.rand(8, generator=rng(task, name)).tolist() for task in "ab" for name in ("v", "w")]
    assert len({tuple(draw) for draw in draws}) == 4
    assert torch.rand(8, generator=rng("a", "v")).tolist() == draws[0]


def test_two_drops_in_a_row_are_independent() -> None:
    base = {"m.w": torch.zeros(10_000)}
    experts = {"a": {"m.w": torch.ones(10_000)}}
    twice = merge_weights("task_arithmetic", base, experts, refine=["dare:drop=0.5", "dare:drop=0.5"], scale=1.0)
    kept = int((twice["m.w"] != 0).sum())
    assert abs(kept - 2500) < 4 * math.sqrt(10_000 * 0.25 * 0.75)
    assert set(twice["m.w"].tolist()) == {0.0, 4.0}


def test_dropped_entries_return_to_the_base_exactly() -> None:
    base, experts = family(1, seed=5)
    (piece, *_) = merge_stream(
        Recipe("task_arithmetic", {"scale": 1.0}, (("dare", {"drop": 0.9, "rescale": False}),)), base, experts
    )
    kept = piece.weight != base[piece.name]
    assert 0 < float(kept.float().mean()) < 0.3
    close = torch.isclose(piece.weight, experts["task0"][piece.name], atol=1e-7)
    assert bool(close[kept].all())


def test_over_many_seeds_the_mean_is_the_task_vector() -> None:
    base = {"m.w": torch.zeros(50)}
    experts = {"a": {"m.w": torch.linspace(-1, 1, 50)}}
    runs, drop = 200, 0.5
    total = sum(
        merge_weights("dare_task_arithmetic", base, experts, scale=1.0, drop=drop, seed=seed)["m.w"]
        for seed in range(runs)
    )
    deviation = experts["a"]["m.w"].abs() * math.sqrt(drop / (1 - drop) / runs)
    assert isinstance(total, torch.Tensor)
    assert bool(((total / runs - experts["a"]["m.w"]).abs() <= 4 * deviation + 1e-6).all())


def test_each_task_may_have_its_own_drop() -> None:
    base, experts = family(2)
    got = merge_weights("dare_task_arithmetic", base, experts, scale=1.0, drop={"task0": 0.0, "task1": 0.999999})
    assert_close(got, experts["task0"])


def test_magnitude_drops_the_smallest_of_each_weight() -> None:
    base = {"m.a": torch.zeros(4), "m.b": torch.zeros(4)}
    experts = {"one": {"m.a": torch.tensor([1.0, 2, 3, 4]), "m.b": torch.tensor([10.0, 40, 20, 30])}}
    refine = "dare:drop=0.5,strategy=magnitude,rescale=false"
    got = merge_weights("average", base, experts, refine=refine)
    assert got["m.a"].tolist() == [0, 0, 3, 4]
    assert got["m.b"].tolist() == [0, 40, 0, 30]


def test_a_drop_of_one_is_refused() -> None:
    base, experts = family(2)
    with pytest.raises(UserError, match=r"drop must lie between 0\.0 and 1\.0 \(1\.0 excluded\), got 1"):
        merge_weights("dare_ties", base, experts, drop=1)


def test_wrong_masks_are_refused_by_name() -> None:
    base, experts = family(1)
    with pytest.raises(UserError, match=r"No mask for task 'task0' and weight 'm\.embed\.weight'"):
        merge_weights("dare_ties", base, experts, supplies={"masks": {"task0": {}}})
    masks = {"task0": {name: torch.ones(2) for name in base}}
    with pytest.raises(UserError, match=r"mask of task 'task0' for 'm.embed.weight' has shape \[2\], the weight \[13"):
        merge_weights("dare_ties", base, experts, supplies={"masks": masks})


def test_dare_alone_is_no_method() -> None:
    base, experts = family(2)
    with pytest.raises(UserError, match="'dare' refines task vectors and merges nothing"):
        merge_weights("dare", base, experts)


def test_a_method_is_no_refinement() -> None:
    base, experts = family(2)
    with pytest.raises(UserError, match=r"'ties' is no refinement\. Known: dare"):
        merge_weights("average", base, experts, refine="ties")
