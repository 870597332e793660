"""Ownership masks: those of the published program, and the laws that they keep whatever the models."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from mergectl import merge_weights
from mergectl.errors import UserError, WorkError
from mergectl.methods import _ownership
from mergectl.methods._contract import MethodError
from mergectl.ownership import MaskPlan, Ownership, load_masks, make_masks, save_masks

GOLDEN = Path(__file__).parent / "golden" / "medusa"
FACTS: dict[str, Any] = json.loads((GOLDEN / "manifest.json").read_text())
ORDER: list[str] = FACTS["inputs"]["prepass"]["param_order"]
KINDS = {"soft_magnitude_mutual_mask": "soft", "magnitude_mutual_mask": "hard", "half_mask": "half"}
Weights = dict[str, torch.Tensor]


@cache
def file(name: str) -> Weights:
    return dict(load_file(GOLDEN / name))


def part(weights: Weights, prefix: str) -> Weights:
    return {name[len(prefix) + 1 :]: x for name, x in weights.items() if name.startswith(f"{prefix}.")}


def model(name: str) -> Weights:
    return part(file("inputs_prepass.safetensors"), name)


def models(*numbers: int) -> dict[str, Weights]:
    return {f"expert{i}": model(f"expert{i}") for i in numbers}


def opened(found: Ownership) -> dict[str, Weights]:
    from mergectl.bits import unpack_bits

    return {
        branch: {name: unpack_bits(bits, found.shapes[name]) for name, bits in masks.items()}
        for branch, masks in found.bits.items()
    }


def different(masks: Mapping[str, Weights], case: Mapping[str, Any]) -> float:
    """The share of elements that have another owner than in the golden file."""
    data = file(case["file"])
    wrong = total = 0
    for place, weights in enumerate(masks.values()):
        for name, mask in weights.items():
            wrong += int((mask != data[f"mask{place}.{name}"].bool()).sum())
            total += mask.numel()
    return wrong / total


def plan(**facts: Any) -> MaskPlan:
    return MaskPlan(**{"top_k": 80.0, "seed": 42, **facts})


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c["id"]) for c in FACTS["mask_cases"] if c["method"] == "medusa-mask"]
)
def test_masks_are_those_of_the_reference_element_by_element(case: dict[str, Any]) -> None:
    given = case["params"]
    branches = models(*range(given["num_branches"]))
    how = plan(kind=KINDS[given["kind"]], top_k=given["top_k"])
    found = make_masks(model("base"), branches, {}, how, ORDER)
    assert different(opened(found), case) == 0
    assert list(found.shares.values()) == pytest.approx(case["owned_fraction"])


def golden(name: str) -> dict[str, Any]:
    (found,) = (case for case in FACTS["mask_cases"] if case["id"] == name)
    return dict(found)


def test_the_reference_mask_is_that_of_the_finished_model_which_opposes_least() -> None:
    case = golden("mask_reference")
    found = make_masks(model("base"), models(0), models(1, 2), plan(kind="reference"), ORDER)
    assert found.chosen == case["selected_reference"]
    assert list(found.opposed.values()) == pytest.approx(case["sign_conflict_per_reference"])
    assert different(opened(found), case) == 0


def test_partial_control_is_the_published_algorithm() -> None:
    """Its random numbers are given: the golden file's are no seeded draw of ours."""
    case, base = golden("mask_partial_control"), model("base")
    uniform = part(file(case["file"]), "uniform")
    masks: dict[str, Weights] = {"expert0": {}, "expert1": {}}
    for name in ORDER:
        rows = torch.stack([_ownership.trim(expert[name] - base[name], 80.0) for expert in models(0, 1, 2).values()])
        pair = _ownership.soft(_ownership.competing(rows[:2], rows[2:]), uniform[name])
        masks["expert0"][name], masks["expert1"][name] = pair
    assert different(masks, case) == 0


def test_with_partial_control_nobody_owns_what_opposes_the_finished_models() -> None:
    base, others = model("base"), models(2)
    found = opened(make_masks(base, models(0, 1), others, plan(), ORDER))
    for name in ORDER:
        elected = _ownership.trim(others["expert2"][name] - base[name], 80.0).sign()
        for branch, expert in models(0, 1).items():
            own = _ownership.trim(expert[name] - base[name], 80.0).sign()[found[branch][name]]
            assert not (own * elected[found[branch][name]] < 0).any()
            assert (own != 0).all()


def test_a_finished_model_that_changed_nothing_controls_nothing() -> None:
    alone = make_masks(model("base"), models(0, 1), {}, plan(), ORDER)
    beside = make_masks(model("base"), models(0, 1), {"base": model("base")}, plan(), ORDER)
    assert all(bits.equal(beside.bits[b][name]) for b, masks in alone.bits.items() for name, bits in masks.items())


# Laws

ROWS = st.integers(0, 2**32 - 1).map(lambda seed: _rows(seed))


def _rows(seed: int) -> torch.Tensor:
    """Task vectors of two to four branches, some of whose entries are zero or tie."""
    chance = torch.Generator().manual_seed(seed)
    count, size = int(torch.randint(2, 5, (), generator=chance)), int(torch.randint(1, 60, (), generator=chance))
    wide = torch.randn(count, size, generator=chance)
    return (wide * 4).round() / 4 if seed % 2 else wide


@given(ROWS, st.integers(0, 1000))
def test_soft_masks_share_out_all_that_is_wanted_and_nothing_twice(rows: torch.Tensor, seed: int) -> None:
    uniform = torch.rand(rows.shape[1:], generator=torch.Generator().manual_seed(seed))
    masks = _ownership.soft(rows, uniform)
    assert torch.equal(masks.sum(0) == 1, rows.abs().sum(0) > 0)
    assert int(masks.sum(0).max()) <= 1
    assert not masks[rows == 0].any()


@given(ROWS)
def test_a_draw_at_either_end_goes_to_someone_who_wants_it(rows: torch.Tensor) -> None:
    for end in (0.0, 1 - 2**-24):
        masks = _ownership.soft(rows, torch.full(rows.shape[1:], end))
        assert torch.equal(masks.sum(0) == 1, rows.abs().sum(0) > 0)
    exact = (rows * 4).round()  # whole numbers: sums of them do not round
    last = _ownership.soft(exact, torch.zeros(rows.shape[1:]))[-1]
    assert torch.equal(last, exact[-1] != 0)


@given(ROWS, st.floats(0.01, 100))
def test_hard_masks_go_to_the_largest_whatever_the_scale(rows: torch.Tensor, scale: float) -> None:
    masks = _ownership.hard(rows)
    assert torch.equal(masks.sum(0) == 1, rows.abs().amax(0) > 0)
    assert torch.equal((rows.abs() * masks).sum(0), rows.abs().amax(0))
    assert torch.equal(_ownership.hard(rows * 2 ** round(math.log2(scale))), masks)


def test_on_a_tie_the_earliest_branch_owns() -> None:
    assert _ownership.hard(torch.tensor([[1.0], [-1.0], [1.0]])).tolist() == [[True], [False], [False]]


@given(st.integers(1, 6), st.integers(1, 20), st.integers(1, 3))
def test_blocks_cover_every_row_once_and_in_order(count: int, rows: int, columns: int) -> None:
    masks = _ownership.half((rows, columns), count)
    assert (masks.sum(0) == 1).all()
    if count > 2:
        owners = masks[:, :, 0].int().argmax(0)
        assert owners.tolist() == sorted(owners.tolist())


def test_two_branches_get_the_blocks_that_the_published_program_gives_them() -> None:
    assert _ownership.half((3,), 2).tolist() == [[False, True, True], [True, False, False]]


def test_a_single_number_is_a_block_too() -> None:
    assert _ownership.half((), 3).tolist() == [False, False, True]


@given(st.integers(1, 300), st.floats(0.1, 98.9), st.integers(0, 100))
def test_as_many_entries_are_kept_as_the_threshold_says(size: int, top_k: float, seed: int) -> None:
    row = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).float() + 1
    kept = _ownership.trim(row, top_k)
    assert int((kept != 0).sum()) == size - math.floor(size * (1 - top_k / 100) + 1e-6)
    assert torch.equal(kept[kept != 0], row[kept != 0])


def test_what_equals_the_threshold_is_dropped_and_tiny_weights_are_kept_whole() -> None:
    assert _ownership.trim(torch.tensor([1.0, 1.0, -1.0, 2.0]), 50.0).tolist() == [0.0, 0.0, 0.0, 2.0]
    assert _ownership.trim(torch.tensor([0.5, 0.1]), 80.0).tolist() == [0.5, pytest.approx(0.1)]
    assert _ownership.trim(torch.zeros(10), 40.0).tolist() == [0.0] * 10


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_task_vector_that_is_no_number_is_refused(bad: float) -> None:
    with pytest.raises(MethodError, match="no numbers"):
        _ownership.trim(torch.tensor([1.0, bad]), 80.0)


def test_owners_are_drawn_in_proportion_to_magnitude() -> None:
    """A chi-square test: three branches whose magnitudes are as 1 : 2 : 5, at the 0.1 percent point for 2 degrees."""
    rows = torch.tensor([1.0, -2.0, 5.0])[:, None].expand(3, 40000)
    uniform = torch.rand(40000, generator=torch.Generator().manual_seed(7))
    owned = _ownership.soft(rows, uniform).sum(1).double()
    expected = 40000 * torch.tensor([1, 2, 5], dtype=torch.float64) / 8
    assert float(((owned - expected) ** 2 / expected).sum()) < 13.8


def test_one_branch_alone_owns_what_it_changed() -> None:
    base, expert = model("base"), model("expert0")
    masks = opened(make_masks(base, {"a": expert}, {}, plan(top_k=100.0), ORDER))["a"]
    assert all(torch.equal(masks[name], expert[name] != base[name]) for name in ORDER)


def test_the_same_seed_gives_the_same_masks_whatever_the_threads() -> None:
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            found.append(make_masks(model("base"), models(0, 1), {}, plan(), ORDER).bits)
        finally:
            torch.set_num_threads(1)
    other = make_masks(model("base"), models(0, 1), {}, plan(seed=1), ORDER).bits
    names = [(branch, name) for branch in found[0] for name in ORDER]
    assert all(found[0][b][n].equal(found[1][b][n]) for b, n in names)
    assert not all(found[0][b][n].equal(other[b][n]) for b, n in names)


def test_what_nobody_wants_stays_frozen_or_goes_to_the_first() -> None:
    frozen = make_masks(model("base"), models(0, 1), {}, plan(), ORDER)
    first = make_masks(model("base"), models(0, 1), {}, plan(unowned="first"), ORDER)
    assert 0 < frozen.nobody < 0.2
    assert first.nobody == 0
    assert first.shares["expert0"] == pytest.approx(frozen.shares["expert0"] + frozen.nobody)
    assert first.shares["expert1"] == frozen.shares["expert1"]


# Merging what was trained apart


def apart() -> tuple[Weights, dict[str, Weights]]:
    """The base and two experts that changed only what they own."""
    base, data = model("base"), file(golden("mask_soft_magnitude_mutual_mask_k80.0_n2")["file"])
    experts = {
        name: {n: torch.where(data[f"mask{i}.{n}"].bool(), w, base[n]) for n, w in expert.items()}
        for i, (name, expert) in enumerate(models(0, 1).items())
    }
    return base, experts


def test_disjoint_experts_merge_to_the_sum_of_their_task_vectors() -> None:
    base, experts = apart()
    case = FACTS["disjoint_merge"]
    got, sums = merge_weights("medusa", base, experts), merge_weights("task_arithmetic", base, experts, scale=1.0)
    for name, expected in part(file(case["file"]), "expected").items():
        torch.testing.assert_close(got[name], expected, atol=1e-6, rtol=case["rtol"])
        torch.testing.assert_close(got[name], sums[name], atol=1e-6, rtol=0)
    assert not any(((experts["expert0"][n] - base[n]) * (experts["expert1"][n] - base[n]) < 0).any() for n in base)


def test_the_merge_is_ties_per_tensor_without_trimming_in_any_order() -> None:
    base, experts = model("base"), models(0, 1, 2)
    got = merge_weights("medusa", base, experts)
    ties = merge_weights("ties_tensor", base, experts, trim="none", scale=1.0)
    turned = merge_weights("medusa", base, dict(reversed(experts.items())))
    for name in base:
        torch.testing.assert_close(got[name], ties[name], atol=1e-7, rtol=0)
        torch.testing.assert_close(got[name], turned[name], atol=1e-6, rtol=0)


# Files and words


def test_masks_survive_the_disk(tmp_path: Path) -> None:
    found = make_masks(model("base"), models(0, 1), {}, plan(), ORDER)
    save_masks(tmp_path / "a.safetensors", found.bits["expert0"], found.shapes)
    read = dict(load_masks(tmp_path / "a.safetensors"))
    assert list(read) == ORDER
    assert all(torch.equal(mask, opened(found)["expert0"][name]) for name, mask in read.items())
    assert (tmp_path / "a.safetensors").stat().st_size < 7600 / 8 + 8000  # a bit per element, and a header


def test_a_file_without_masks_is_refused() -> None:
    with pytest.raises(WorkError, match="holds no ownership masks"):
        dict(load_masks(GOLDEN / "inputs_prepass.safetensors"))


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        ({"kind": "sort"}, "mask must be one of soft, hard, half, reference, got 'sort'"),
        ({"unowned": "last"}, "unowned must be one of freeze, first, got 'last'"),
        ({"top_k": 0}, "top_k must lie above 0 and at most be 100, got 0. It is a percentage kept."),
        ({"top_k": 120}, "top_k must lie above 0"),
    ],
)
def test_wrong_plans_are_one_sentence(facts: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        MaskPlan(**facts)


@pytest.mark.parametrize(
    ("kind", "branches", "references", "sentence"),
    [
        ("reference", 2, 1, "for one task beside finished models"),
        ("reference", 1, 0, "for one task beside finished models"),
        ("hard", 2, 1, "mask=hard takes no finished models"),
        ("half", 2, 1, "mask=half takes no finished models"),
    ],
)
def test_kinds_say_what_they_need(kind: str, branches: int, references: int, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        MaskPlan(kind=kind).check(branches, references)
