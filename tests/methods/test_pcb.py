"""What PCB-Merging must do besides matching the references: the method's laws, its edges, and reading in parts."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from mergectl import blocks, merge_weights, settings
from mergectl.errors import UserError
from mergectl.methods import _competition, _kth, pcb
from mergectl.methods._task_vectors import TaskVectors
from tests.methods.families import assert_close, assert_same, family

VARIANTS = list(pcb.VARIANTS)
PROGRAMS = [name for name in VARIANTS if name != "paper"]
each_variant = pytest.mark.parametrize("variant", VARIANTS)
# Multiples of 1/8: sums over tasks are exact, so that laws hold to the bit.
stacks = arrays.arrays(np.int8, st.tuples(st.integers(1, 5), st.integers(1, 40)), elements=st.integers(-32, 32)).map(
    lambda x: torch.from_numpy(x.astype(np.float32) / 8)
)
ratios = st.floats(0.01, 1.0)


def noise(tasks: int, count: int, seed: int = 0) -> torch.Tensor:
    """Make heavy-tailed task vectors, some entries unchanged."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(tasks, count, generator=generator)
    return torch.where(torch.rand(tasks, count, generator=generator) < 0.1, 0, 0.3 * draw * draw.abs())


def vectors(x: torch.Tensor, cuts: tuple[int, ...] = ()) -> TaskVectors:
    parts = dict(zip("abcdefgh", torch.tensor_split(x, list(cuts), dim=1), strict=False))
    shapes = {name: part.shape[1:] for name, part in parts.items()}
    return TaskVectors([f"task{i}" for i in range(len(x))], shapes, parts.__getitem__)


def pieces(model: TaskVectors, **given: Any) -> dict[str, torch.Tensor]:
    return {piece[0]: piece[1] for piece in pcb.merge(model, **given)}


def merged(x: torch.Tensor, **given: Any) -> torch.Tensor:
    """Merge task vectors that are one row each."""
    return pieces(vectors(x), **given)["a"]


def standing(x: torch.Tensor, variant: str, ratio: float, winsor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the values that compete and their shares."""
    return pcb.VARIANTS[variant].compete(vectors(x), _competition.Rules(winsor, ratio, premask=0.0))(x)


def norm(x: Any) -> Any:
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    return np.where(high > low, (x - low) / np.where(high > low, high - low, 1), 0)


def softmax(x: Any) -> Any:
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def by_sorting(
    rows: torch.Tensor, variant: str, ratio: float, winsor: float, premask: float = 0.0, intra_of: Any = np.exp
) -> Any:
    """Merge with a scale of 1, whole rows in memory, in float64, as the formulas are written."""
    t = rows.double().numpy()
    n, d = t.shape
    sizes = np.sort(abs(t))
    clipped = np.sign(t) * abs(t).clip(sizes[:, [int(d * winsor)]], sizes[:, [int(d * (1 - winsor) - 1)]])
    u = norm(abs(clipped))
    ranked = np.sign(t) * u
    if variant == "paper":
        inter = softmax(norm(clipped[:, None] * clipped[None])).sum(1)
        score = softmax(n * norm(clipped * clipped)) * inter
    else:
        inter = {
            "nlp": np.tanh(t * t.sum(0)),
            "root": np.tanh(t * t.sum(0)),
            "vision": np.tanh(t * ranked.sum(0)),
            "vision_es": np.tanh(ranked[:, None] * ranked[None]).sum(1),
        }[variant]
        score = intra_of(n * u * u) * inter
    if premask:
        score = score * (abs(t) >= sizes[:, [int(d * (1 - premask)) - 1]])
    edge = np.sort(score)[:, [int(d * (1 - ratio))]]
    share = np.where(score >= edge, score, 0) if variant == "paper" else norm(np.maximum(score, edge))
    floor = 1e-300 if variant == "paper" else 1e-12
    return (clipped * share).sum(0) / np.maximum(share.sum(0), floor)


@each_variant
@pytest.mark.parametrize(("ratio", "winsor"), [(0.1, 0.01), (0.3, 0.05), (0.05, 0.0), (1.0, 0.0)])
@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_reading_in_parts_gives_what_sorting_whole_rows_gives(
    variant: str, ratio: float, winsor: float, tasks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = noise(tasks, 600, seed=tasks)
    expected = torch.from_numpy(by_sorting(x, variant, ratio, winsor)).float()
    given: dict[str, Any] = {"variant": variant, "ratio": ratio, "winsor": winsor, "scale": 1.0}
    torch.testing.assert_close(merged(x, **given), expected, atol=1e-6, rtol=1e-5)
    monkeypatch.setattr(_kth, "_TOGETHER", 0)
    monkeypatch.setattr(_kth, "_SAMPLED", 64)
    parts = pieces(vectors(x, (7, 200, 201, 450)), **given)
    torch.testing.assert_close(torch.cat(list(parts.values())), expected, atol=1e-6, rtol=1e-5)


@each_variant
def test_blocks_of_weights_give_what_whole_weights_give(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = family(3)
    for key in base:
        if "layer.0" in key:
            experts = {task: {**weights, key: base[key]} for task, weights in experts.items()}
    tied = {"copies": {"m.embed.weight": 2}}
    forms: list[dict[str, Any]] = [{}, {"domain": "changed"}, {"count_tied": "each"}]
    for more in forms:
        whole = merge_weights("pcb", base, experts, supplies=tied, variant=variant, ratio=0.3, **more)
        with monkeypatch.context() as patch:
            patch.setattr(blocks, "LENGTH", 8)
            parts = merge_weights("pcb", base, experts, supplies=tied, variant=variant, ratio=0.3, **more)
        assert_close(parts, whole, atol=1e-6)


def test_no_more_than_a_few_weights_are_in_memory_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    alive, most = 0, 0

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def read(name: str) -> torch.Tensor:
        nonlocal alive, most
        x = noise(4, 500, seed=int(name))
        alive += 1
        most = max(most, alive)
        weakref.finalize(x, gone)
        return x

    monkeypatch.setattr(_kth, "_TOGETHER", 0)
    monkeypatch.setattr(_kth, "_SAMPLED", 500)
    names = [f"{i:02d}" for i in range(40)]
    model = TaskVectors(["a", "b", "c", "d"], {name: (500,) for name in names}, read)
    for variant in VARIANTS:
        assert list(pieces(model, variant=variant)) == names
    gc.collect()
    assert most <= 4
    assert alive == 0


@pytest.mark.parametrize("variant", PROGRAMS)
def test_a_softmax_within_the_task_gives_what_exp_gives(variant: str) -> None:
    x = noise(3, 500)
    expected = torch.from_numpy(by_sorting(x, variant, 0.2, 0.01, intra_of=softmax)).float()
    got = merged(x, variant=variant, ratio=0.2, winsor=0.01, scale=1.0)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


@given(stacks, ratios, st.sampled_from(VARIANTS), st.floats(-3.0, 3.0))
def test_a_shared_scale_multiplies_the_merged_vector(x: torch.Tensor, ratio: float, variant: str, scale: float) -> None:
    one = merged(x, variant=variant, ratio=ratio, scale=1.0)
    torch.testing.assert_close(merged(x, variant=variant, ratio=ratio, scale=scale), scale * one, atol=1e-6, rtol=1e-6)
    assert torch.equal(merged(x, variant=variant, ratio=ratio, scale=2.0), 2 * one)


@given(stacks, ratios, st.sampled_from(VARIANTS), st.data())
def test_the_merged_vector_is_linear_in_the_scales_of_the_tasks(
    x: torch.Tensor, ratio: float, variant: str, data: st.DataObject
) -> None:
    scales = data.draw(st.lists(st.floats(-2.0, 2.0), min_size=len(x), max_size=len(x)))
    alone = [merged(x, variant=variant, ratio=ratio, scale=row) for row in torch.eye(len(x)).tolist()]
    expected = sum((scale * part for scale, part in zip(scales, alone, strict=True)), torch.zeros_like(x[0]))
    got = merged(x, variant=variant, ratio=ratio, scale=scales)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@given(stacks, ratios, st.sampled_from(VARIANTS), st.randoms())
def test_the_order_of_experts_does_not_matter(x: torch.Tensor, ratio: float, variant: str, chance: Any) -> None:
    order = list(range(len(x)))
    chance.shuffle(order)
    expected = merged(x, variant=variant, ratio=ratio)
    torch.testing.assert_close(merged(x[order], variant=variant, ratio=ratio), expected, atol=1e-5, rtol=1e-5)


@given(stacks, ratios, st.sampled_from(VARIANTS), st.floats(0.0, 0.25))
def test_opposite_task_vectors_give_the_opposite(x: torch.Tensor, ratio: float, variant: str, winsor: float) -> None:
    given: dict[str, Any] = {"variant": variant, "ratio": ratio, "winsor": winsor}
    assert torch.equal(merged(-x, **given), -merged(x, **given))


@given(stacks, ratios, st.sampled_from(VARIANTS), st.floats(0.0, 0.25))
def test_a_merged_entry_lies_among_the_winsorised_ones_or_is_the_bases(
    x: torch.Tensor, ratio: float, variant: str, winsor: float
) -> None:
    values, shares = standing(x, variant, ratio, winsor)
    got = merged(x, variant=variant, ratio=ratio, winsor=winsor, scale=1.0)
    held = shares.double().sum(dim=0) >= pcb.VARIANTS[variant].floor
    assert bool((got >= values.amin(dim=0) - 1e-5)[held].all())
    assert bool((got <= values.amax(dim=0) + 1e-5)[held].all())
    assert bool((got[(shares == 0).all(dim=0)] == 0).all())
    assert bool((got[(x == 0).all(dim=0)] == 0).all())
    assert bool(got.isfinite().all())


@given(stacks, ratios, st.sampled_from(VARIANTS), st.integers(2, 6))
def test_copies_of_one_expert_keep_its_entries_or_drop_them(
    x: torch.Tensor, ratio: float, variant: str, copies: int
) -> None:
    same = x[:1].expand(copies, -1)
    values, shares = standing(same, variant, ratio, winsor=0.0)
    got = merged(same, variant=variant, ratio=ratio, winsor=0.0, scale=1.0)
    kept = shares.double().sum(dim=0) >= 1e-12
    torch.testing.assert_close(got[kept], values[0][kept], atol=1e-6, rtol=1e-6)
    assert bool((got[(shares == 0).all(dim=0)] == 0).all())


# Where two tasks have their largest entry, 1 and -1 cancel; equal scores are no case of the rule.
@given(st.integers(1, 5), st.integers(20, 300), ratios, st.sampled_from(PROGRAMS), st.integers(0, 99))
def test_so_many_entries_of_each_expert_have_a_share(
    tasks: int, count: int, ratio: float, variant: str, seed: int
) -> None:
    x = torch.randn(tasks, count, generator=torch.Generator().manual_seed(seed))
    assume(len(set(x.abs().argmax(dim=1).tolist())) == tasks)
    _, shares = standing(x, variant, ratio, winsor=0.0)
    assert [int((row > 0).sum()) for row in shares] == [count - math.floor(count * (1 - ratio)) - 1] * tasks


@given(stacks, ratios, st.integers(-20, 20))
def test_the_pairwise_variant_does_not_depend_on_the_size_of_the_task_vectors(
    x: torch.Tensor, ratio: float, power: int
) -> None:
    expected = merged(x, variant="vision_es", ratio=ratio) * 2.0**power
    assert torch.equal(merged(x * 2.0**power, variant="vision_es", ratio=ratio), expected)


def test_the_default_variant_does_not_depend_on_the_size_of_small_task_vectors_only() -> None:
    x = noise(3, 400)
    small = merged(x * 1e-3) / 1e-3
    torch.testing.assert_close(merged(x * 1e-4) / 1e-4, small, atol=1e-4, rtol=1e-3)
    assert bool(((merged(x * 10) / 10 - small).abs() > 0.05).any())


@each_variant
def test_an_expert_equal_to_the_base_takes_no_share(variant: str) -> None:
    x = noise(3, 400)
    x[1] = 0
    values, shares = standing(x, variant, ratio=0.2, winsor=0.01)
    assert bool((values[1] == 0).all())
    assert bool(shares.isfinite().all())
    if variant != "paper":  # there softmax gives every entry a positive score
        assert bool((shares[1] == 0).all())
    assert bool(merged(x, variant=variant).isfinite().all())


@each_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_no_expert_changed_stays_to_the_bit(variant: str, dtype: torch.dtype) -> None:
    base, experts = family(3, dtype=dtype)
    still = torch.rand(13, 8, generator=torch.Generator().manual_seed(4)) < 0.4
    for weights in experts.values():
        weights["m.embed.weight"] = torch.where(still, base["m.embed.weight"], weights["m.embed.weight"])
    got = merge_weights("pcb", base, experts, variant=variant, ratio=1.0)["m.embed.weight"]
    assert torch.equal(got[still], base["m.embed.weight"][still])
    assert not torch.equal(got, base["m.embed.weight"])


@each_variant
def test_half_precision_inputs_are_merged_in_single_precision(variant: str) -> None:
    base, experts = family(14, dtype=torch.float16)  # exp(14) is no float16
    wide = {task: {name: x.float() for name, x in weights.items()} for task, weights in experts.items()}
    expected = merge_weights("pcb", {name: x.float() for name, x in base.items()}, wide, variant=variant)
    got = merge_weights("pcb", base, experts, variant=variant)
    assert_same(got, {name: x.half() for name, x in expected.items()})


@each_variant
def test_a_hundred_experts_do_not_overflow(variant: str) -> None:
    x = noise(100, 60)
    got = merged(x, variant=variant, ratio=0.5, scale=1.0)
    assert bool(got.isfinite().all())
    assert bool((got != 0).any())


@each_variant
def test_one_expert_is_gated_only(variant: str) -> None:
    x = noise(1, 200)
    values, shares = standing(x, variant, ratio=0.2, winsor=0.01)
    expected = torch.where(shares[0] > 0, 0.7 * values[0], 0)
    torch.testing.assert_close(merged(x, variant=variant, ratio=0.2, winsor=0.01, scale=0.7), expected)
    assert int((expected != 0).sum()) == (40 if variant == "paper" else 39)


@each_variant
@pytest.mark.parametrize("count", [1, 2, 3])
def test_rows_of_one_value_and_tiny_models_are_finite(variant: str, count: int) -> None:
    x = torch.stack([torch.full((count,), 0.5), torch.arange(count) - 1.0])
    for ratio in (1e-9, 0.4, 1.0):
        assert bool(merged(x, variant=variant, ratio=ratio).isfinite().all())
        assert bool(merged(x[:1], variant=variant, ratio=ratio).isfinite().all())


@pytest.mark.parametrize("ratio", [0, -0.1, 1.1])
def test_a_ratio_of_nothing_or_more_than_all_is_refused(ratio: float) -> None:
    with pytest.raises(UserError, match=r"ratio must lie between 0\.0 and 1\.0 \(0\.0 excluded\)"):
        merge_weights("pcb", *family(2), ratio=ratio)


def test_a_ratio_below_one_entry_leaves_the_base() -> None:
    base, experts = family(3)
    assert_same(merge_weights("pcb", base, experts, ratio=1e-6), base)


def test_an_entry_that_opposes_the_others_is_dropped() -> None:
    x = torch.tensor([[2.0, 0.1, 0.0, -1.0], [-3.0, 0.2, 0.1, -1.5]])
    values, shares = standing(x, "nlp", ratio=0.75, winsor=0.0)
    assert shares[0, 0] == 0  # 2 against -3
    assert shares[1, 0] > 0
    assert merged(x, ratio=0.75, winsor=0.0, scale=1.0)[0] == values[1, 0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_share_that_is_clipped_is_the_variants_own_unless_given(variant: str) -> None:
    base, experts = family(3)
    own = {"nlp": 0.01, "root": 0.0001, "vision": 0.01, "vision_es": 0.01, "paper": 0.0}[variant]
    got = merge_weights("pcb", base, experts, variant=variant)
    assert_same(got, merge_weights("pcb", base, experts, variant=variant, winsor=own))
    assert_same(got, merge_weights("pcb", base, experts, variant=variant, winsor=None))
    other = merge_weights("pcb", base, experts, variant=variant, winsor=0.1)
    assert any(not torch.equal(x, got[name]) for name, x in other.items())


def test_the_clipped_share_has_no_number_as_default_and_is_checked() -> None:
    assert settings.settings_of("pcb")["winsor"].default is None
    assert settings.check("pcb", {}, ["a"])["winsor"] is None
    for wrong in ("none", 0.3, -0.01):
        with pytest.raises(UserError, match="winsor must"):
            merge_weights("pcb", *family(2), winsor=wrong)


@each_variant
@pytest.mark.parametrize("premask", [0.05, 0.5])
def test_only_the_largest_magnitudes_compete_under_a_premask(variant: str, premask: float) -> None:
    x = noise(3, 500)
    given: dict[str, Any] = {"variant": variant, "ratio": 0.2, "winsor": 0.01, "scale": 1.0}
    expected = torch.from_numpy(by_sorting(x, variant, 0.2, 0.01, premask)).float()
    torch.testing.assert_close(merged(x, premask=premask, **given), expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(merged(x, premask=1.0, **given), merged(x, **given))


@each_variant
def test_the_domain_of_changed_weights_leaves_the_others_out_of_the_count(variant: str) -> None:
    base, experts = family(3)
    still = [name for name in base if "layer.0" in name]
    for weights in experts.values():
        weights |= {name: base[name].clone() for name in still}
    given: dict[str, Any] = {"variant": variant, "ratio": 0.3, "winsor": 0.05}
    some = [name for name in base if name not in still]
    alone = merge_weights(
        "pcb", {n: base[n] for n in some}, {t: {n: w[n] for n in some} for t, w in experts.items()}, **given
    )
    got = merge_weights("pcb", base, experts, domain="changed", **given)
    assert_same({name: got[name] for name in some}, alone)
    assert_same({name: got[name] for name in still}, {name: base[name] for name in still})
    every = merge_weights("pcb", base, experts, domain="all", **given)
    assert any(not torch.equal(x, got[name]) for name, x in every.items())


@each_variant
def test_a_tied_weight_may_count_as_often_as_it_is_used(variant: str) -> None:
    base, experts = family(3)
    twice = {**base, "m.head.weight": base["m.embed.weight"]}
    stored = {task: {**weights, "m.head.weight": weights["m.embed.weight"]} for task, weights in experts.items()}
    given: dict[str, Any] = {"variant": variant, "ratio": 0.3}
    expected = merge_weights("pcb", twice, stored, **given)
    assert torch.equal(expected["m.head.weight"], expected["m.embed.weight"])
    tied = {"copies": {"m.embed.weight": 2}}
    got = merge_weights("pcb", base, experts, supplies=tied, count_tied="each", **given)
    assert_close(got, {name: expected[name] for name in base}, atol=1e-6)
    once = merge_weights("pcb", base, experts, supplies=tied, **given)
    assert_same(once, merge_weights("pcb", base, experts, **given))
    assert any(not torch.equal(x, got[name]) for name, x in once.items())
