"""What the papers and the arithmetic promise of CART, TSV-Merge, Iso-C, Iso-CTS, WUDI, DOGE and Consensus."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given

from mergectl import merge_weights
from mergectl.methods import _kernels, _linears, _spectral, doge_ta, iso_cts
from mergectl.methods._task_vectors import TaskVectors
from mergectl.plan import recipe_of, steps_of
from mergectl.settings import settings_of

W = "layer.weight"
Family = tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]
shapes = st.tuples(st.integers(2, 9), st.integers(2, 9))
seeds = st.integers(0, 10_000)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def one_matrix(*deltas: torch.Tensor) -> Family:
    """A base with one matrix and one bias, and experts that differ by the given matrices."""
    base = {W: normal(*deltas[0].shape, seed=99), "layer.bias": normal(3, seed=98)}
    experts = {f"task{i}": {W: base[W] + delta, "layer.bias": base["layer.bias"] + i} for i, delta in enumerate(deltas)}
    return base, experts


def change(method: str, *deltas: torch.Tensor, **settings: Any) -> torch.Tensor:
    """The merged task vector's matrix."""
    base, experts = one_matrix(*deltas)
    found: torch.Tensor = merge_weights(method, base, experts, **settings)[W].sub(base[W])
    return found


def truncated(x: torch.Tensor, count: int) -> torch.Tensor:
    u, s, vt = torch.linalg.svd(x.double(), full_matrices=False)
    found: torch.Tensor = (u[:, :count] * s[:count]) @ vt[:count]
    return found.float()


def close(got: torch.Tensor, expected: torch.Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


# ---- kernels


@given(shapes, seeds)
@example((5, 5), 187)  # nearly singular
def test_polar_has_orthonormal_rows_or_columns_and_a_second_pass_changes_nothing(
    shape: tuple[int, int], seed: int
) -> None:
    found = _spectral.polar(normal(*shape, seed=seed))
    gram = found @ found.mT if shape[0] <= shape[1] else found.mT @ found
    close(gram, torch.eye(min(shape), dtype=torch.float64), 1e-6)
    close(_spectral.polar(found), found, 1e-9)


def test_polar_leaves_out_directions_that_the_rows_do_not_reach() -> None:
    row = torch.tensor([[3.0, 4.0]])
    close(_spectral.polar(torch.cat([row, row])).float(), torch.tensor([[0.6, 0.8], [0.6, 0.8]]) / 2**0.5)


@given(shapes, seeds)
def test_a_decomposition_multiplies_to_the_matrix_and_its_prefix_is_the_nearest_of_its_rank(
    shape: tuple[int, int], seed: int
) -> None:
    x = normal(*shape, seed=seed)
    found = _spectral.decompose(x)
    close(found.product(), x, 1e-5)
    residue = float((found.top(1).product() - x).double().square().sum())
    assert residue == pytest.approx(float(found.values[1:].double().square().sum()), abs=1e-4)


@pytest.mark.parametrize(
    ("ratio", "full", "least", "expected"),
    [(0.29, 100, 0, 28), (0.04, 24, 0, 0), (0.04, 24, 1, 1), (1.0, 7, 1, 7), (0.0, 7, 1, 0), (0.5, 3, 8, 3)],
)
def test_a_ratio_is_rounded_down_as_the_programs_do(ratio: float, full: int, least: int, expected: int) -> None:
    assert _spectral.ranks(ratio, full, 2, least) == [expected, expected]


def test_without_a_ratio_tasks_share_the_components_equally() -> None:
    assert _spectral.ranks(None, 10, 3, 1) == [3, 3, 3]
    assert _spectral.ranks(None, 2, 3, 1) == [1, 1, 1]
    assert _spectral.ranks(None, 2, 3, 0) == [0, 0, 0]


def test_linear_layers_are_guessed_by_name_where_nobody_knows() -> None:
    names = ["e.word_embeddings.weight", "h.0.attn.c_attn.weight", "transformer.wte.weight", "x.LayerNorm.weight"]
    names += [
        "visual_projection.weight",
        "lm_head.weight",
        "classifier.out_proj.weight",
        "shared.weight",
        "h.ln_1.weight",
        "pos_embed",
    ]
    names += ["layer.0.attention.self.query.weight", "rel.relative_attention_bias.weight", "mlp.heading.weight"]
    names += ["self.pos_key_proj.weight"]
    vectors = TaskVectors(["a"], {name: (4, 4) for name in names} | {"conv.weight": (4, 4, 1)}, lambda name: None)  # type: ignore[arg-type, return-value]
    found = _linears.linear_weights(None, vectors)
    wanted = ["h.0.attn.c_attn.weight", "layer.0.attention.self.query.weight", "mlp.heading.weight"]
    assert found == dict.fromkeys([*wanted, "self.pos_key_proj.weight"], False)
    assert _linears.linear_weights({"lm_head.weight": True, "gone": False}, vectors) == {"lm_head.weight": True}


def test_what_is_decomposed_can_be_chosen() -> None:
    names = ["embeddings.word.weight", "embeddings.token_type_embeddings.weight", "self_attn.q.weight", "dense.weight"]
    vectors = TaskVectors(["a"], {name: (4, 4) for name in [*names, "embeddings.LayerNorm.weight"]}, dict.__getitem__)  # type: ignore[arg-type]
    wanted = {"linear": names[2:], "encoder": names[2:], "full": [names[0], *names[2:]], "attn_mlp": [names[2]]}
    assert {rule: list(_spectral.decomposed(rule, None, vectors)) for rule in wanted} == wanted
    assert len(_spectral.decomposed("all", None, vectors)) == 5
    assert _spectral.decomposed("all", {"dense.weight": True}, vectors)["dense.weight"]


# ---- CART


def test_cart_with_all_components_or_none_is_the_average_for_every_scale() -> None:
    base, experts = one_matrix(normal(6, 4, seed=1), normal(6, 4, seed=2), normal(6, 4, seed=3))
    average = merge_weights("average", base, experts)
    for ratio in (0.0, 1.0):
        for scale in (-3.0, 0.7, 10.0):
            got = merge_weights("cart", base, experts, rank_ratio=ratio, scale=scale)
            close(got[W], average[W], 2e-6)
    got = merge_weights("cart", base, experts, rank_ratio=0.9, min_rank=0, scale=0.0)
    close(got[W], average[W], 2e-6)
    close(merge_weights("cart", base, experts)["layer.bias"], average["layer.bias"], 1e-6)


def test_cart_adds_the_top_components_of_the_differences_from_the_average() -> None:
    deltas = [normal(6, 5, seed=seed) for seed in range(3)]
    average = sum(deltas) / 3
    expected = average + 1.7 * sum(truncated(delta - average, 2) for delta in deltas)
    close(change("cart", *deltas, rank_ratio=0.5, scale=1.7), torch.as_tensor(expected))


def test_cart_of_a_ratio_too_small_for_any_component_keeps_one_unless_told_otherwise() -> None:
    deltas = [normal(6, 5, seed=seed) for seed in range(3)]
    average = torch.as_tensor(sum(deltas) / 3)
    close(change("cart", *deltas, rank_ratio=0.01, min_rank=0), average)
    one = average + 2 * torch.as_tensor(sum(truncated(delta - average, 1) for delta in deltas))
    close(change("cart", *deltas, rank_ratio=0.01), one)


def test_cart_of_one_expert_is_the_expert() -> None:
    x = normal(6, 5)
    close(change("cart", x), x, 1e-6)


def test_every_origin_of_cart_is_that_of_the_table() -> None:
    deltas = [normal(6, 5, seed=seed) for seed in range(2)]
    both = torch.as_tensor(sum(deltas))

    def top(origin: torch.Tensor, count: int) -> torch.Tensor:
        return torch.as_tensor(sum(truncated(delta - origin, count) for delta in deltas))

    given: dict[str, Any] = {"rank_ratio": 0.4, "scale": 0.6}
    close(change("pre_cart", *deltas, **given), 0.6 * top(torch.zeros(6, 5), 2))
    close(change("ta_cart", *deltas, origin_scale=0.3, **given), 0.3 * both + 0.6 * top(0.3 * both, 2))
    start = both / 2 + 0.8 * top(both / 2, 1)
    got = change("cart_cart", *deltas, origin_scale=0.8, origin_rank_ratio=0.2, **given)
    close(got, start + 0.6 * top(start, 2))
    same = both / 2 + 0.8 * top(both / 2, 2)  # without a ratio of its own the origin has that of the merge
    close(change("cart_cart", *deltas, origin_scale=0.8, **given), same + 0.6 * top(same, 2))
    tsv = change("tsv_m", *deltas)
    close(change("tsv_cart", *deltas, **given), tsv + 0.6 * top(tsv, 2))


def test_cart_tsv_decorrelates_differences_from_the_average() -> None:
    deltas = [normal(6, 5, seed=seed) for seed in range(3)]
    average = torch.as_tensor(sum(deltas) / 3)
    centred = change("tsv_m", *(delta - average for delta in deltas), rank_ratio=0.4)
    close(change("cart_tsv", *deltas, rank_ratio=0.4, scale=1.2), average + 1.2 * centred)


def test_weights_that_are_not_decomposed_get_the_sum_of_differences_and_decorrelated_the_mean() -> None:
    base, experts = one_matrix(*(normal(6, 5, seed=seed) for seed in range(3)))  # biases differ by 0, 1 and 2

    def bias(method: str, **settings: Any) -> torch.Tensor:
        found: torch.Tensor = merge_weights(method, base, experts, **settings)["layer.bias"] - base["layer.bias"]
        return found

    close(bias("pre_cart", scale=0.5), torch.full((3,), 0.5 * 3.0), 1e-6)
    close(bias("pre_cart", scale=[1.0, 0.5, 2.0]), torch.full((3,), 0.5 * 1 + 2.0 * 2), 1e-6)
    close(bias("pre_cart", combine="decorrelate", scale=0.5), torch.full((3,), 0.5 * 1.0), 1e-6)
    close(bias("ta_cart", origin_scale=0.2, scale=0.5), torch.full((3,), 0.6 + 0.5 * (3 - 3 * 0.6)), 1e-6)
    close(bias("tsv_cart", origin_scale=0.5, scale=0.3), torch.full((3,), 0.5 + 0.3 * (3 - 3 * 0.5)), 1e-6)
    close(bias("pre_cart", rank_ratio=0.0), torch.zeros(3), 1e-6)


def test_embeddings_stay_with_the_base_on_request() -> None:
    base = {"m.word_embeddings.weight": normal(5, 4), "m.dense.weight": normal(4, 4, seed=1)}
    experts = {f"task{i}": {n: x + normal(*x.shape, seed=5 + i) for n, x in base.items()} for i in range(2)}
    average = merge_weights("average", base, experts)
    kept, merged = (merge_weights("cart", base, experts, embeddings=word) for word in ("base", "merged"))
    assert torch.equal(kept["m.word_embeddings.weight"], base["m.word_embeddings.weight"])
    close(merged["m.word_embeddings.weight"], average["m.word_embeddings.weight"], 1e-6)
    assert torch.equal(kept["m.dense.weight"], merged["m.dense.weight"])


def test_scale_and_ratio_of_cart_may_differ_per_task_and_per_weight() -> None:
    deltas = [normal(6, 5, seed=seed) for seed in range(2)]
    average = torch.as_tensor(sum(deltas) / 2)
    expected = average + 0.5 * truncated(deltas[0] - average, 1) + 2 * truncated(deltas[1] - average, 3)
    close(change("cart", *deltas, scale=[0.5, 2.0], rank_ratio={"task0": 0.2, "task1": 0.6}), expected)
    close(change("cart", *deltas, rank_ratio={"*": 0.2, "layer.*": 1.0}), average)


# ---- TSV-Merge


def test_tsv_of_one_expert_is_the_expert() -> None:
    x = normal(6, 5)
    close(change("tsv_m", x), x)


def test_tsv_of_task_vectors_in_orthogonal_spaces_is_the_sum_of_the_truncated_ones() -> None:
    left, right = torch.linalg.qr(normal(6, 6))[0], torch.linalg.qr(normal(6, 6, seed=1))[0]
    a = left[:, :3] @ torch.diag(torch.tensor([5.0, 3.0, 1.0])) @ right[:3]
    b = left[:, 3:] @ torch.diag(torch.tensor([4.0, 2.0, 0.5])) @ right[3:]
    close(change("tsv_m", a, b, rank_ratio=0.4), truncated(a, 2) + truncated(b, 2))


def test_tsv_scales_each_task_before_its_decomposition() -> None:
    deltas = [normal(6, 5, seed=seed) for seed in range(3)]
    scaled = [factor * delta for factor, delta in zip((0.5, 2.0, -1.0), deltas, strict=True)]
    close(change("tsv_m", *deltas, scale=[0.5, 2.0, -1.0]), change("tsv_m", *scaled))
    base, experts = one_matrix(*deltas)
    bias = merge_weights("tsv_m", base, experts, scale=[0.5, 2.0, -1.0])["layer.bias"] - base["layer.bias"]
    close(bias, torch.full((3,), (0.5 * 0 + 2.0 * 1 - 1.0 * 2) / 3), 1e-6)


def test_an_expert_that_equals_the_base_does_not_turn_the_others() -> None:
    x = normal(6, 5)
    base, experts = one_matrix(x, torch.zeros(6, 5))
    experts["task1"] = dict(base)
    with pytest.warns(UserWarning, match="equals the base"):
        got = merge_weights("tsv_m", base, experts, rank_ratio=0.4)
    close(got[W] - base[W], truncated(x, 2))


def test_tsv_keeps_a_component_of_each_task_where_there_are_fewer_than_tasks() -> None:
    deltas = [normal(2, 5, seed=seed) for seed in range(3)]
    assert float(change("tsv_m", *deltas).norm()) > 0.1
    close(change("tsv_m", *deltas, min_rank=0), torch.zeros(2, 5))


# ---- Iso-C and Iso-CTS


@given(shapes, seeds)
def test_iso_c_makes_singular_values_equal_and_keeps_their_sum(shape: tuple[int, int], seed: int) -> None:
    deltas = [normal(*shape, seed=seed), normal(*shape, seed=seed + 1)]
    before = torch.linalg.svdvals(torch.as_tensor(sum(deltas)).double())
    after = torch.linalg.svdvals(change("iso_c", *deltas).double())
    close(after, before.mean().expand(len(before)), 1e-4)
    assert float(after.sum()) == pytest.approx(float(before.sum()), rel=1e-4)


def test_iso_c_of_one_expert_with_equal_singular_values_is_the_expert() -> None:
    x = 3 * torch.linalg.qr(normal(6, 5))[0]
    close(change("iso_c", x), x)


def test_iso_cts_with_common_directions_alone_is_iso_c() -> None:
    deltas = [normal(6, 5, seed=seed) for seed in range(3)]
    close(change("iso_cts", *deltas, common_fraction=1.0, scale=1.5), change("iso_c", *deltas, scale=1.5), 1e-6)


@given(st.integers(1, 64), st.integers(1, 12), st.floats(0, 1))
def test_common_and_own_directions_of_iso_cts_add_up_to_the_rank(full: int, tasks: int, fraction: float) -> None:
    common, own = iso_cts.divided(full, tasks, fraction)
    assert common + tasks * own == full
    assert min(common, own) >= 0


def test_iso_cts_takes_the_common_directions_on_the_outputs_side_of_a_transposed_weight() -> None:
    deltas = [normal(6, 4, seed=seed) for seed in range(2)]
    plain = change("iso_cts", *deltas, common_fraction=0.5)
    turned = change("iso_cts", *(delta.mT for delta in deltas), common_fraction=0.5, supplies={"linears": {W: True}})
    close(turned.mT, plain)
    other = change("iso_cts", *(delta.mT for delta in deltas), common_fraction=0.5)
    assert float((other.mT - plain).abs().max()) > 1e-3


# ---- WUDI and DOGE


def conflict(x: torch.Tensor, deltas: list[torch.Tensor]) -> float:
    return sum(float(((x - d) @ d.mT).square().sum() / d.square().sum()) for d in deltas)


def test_wudi_ends_with_less_conflict_than_the_sum_has() -> None:
    deltas = [0.05 * normal(6, 5, seed=seed) for seed in range(3)]
    ends = [conflict(change("wudi", *deltas, iterations=count, learning_rate=1e-4), deltas) for count in (0, 50, 200)]
    assert ends[0] == pytest.approx(conflict(torch.as_tensor(sum(deltas)), deltas), rel=1e-4)
    assert ends[0] > ends[1] > ends[2]


def test_wudi_of_one_expert_is_the_expert() -> None:
    x = normal(6, 5)
    assert torch.equal(change("wudi", x), change("wudi", x, iterations=0))
    close(change("wudi", x), x, 1e-6)


def test_wudi_follows_the_gradient_of_its_loss_as_torch_computes_it() -> None:
    deltas = [0.1 * normal(6, 5, seed=seed) for seed in range(3)]
    x = torch.as_tensor(sum(deltas)).double().requires_grad_()
    adam = torch.optim.Adam([x], lr=1e-3)
    for _ in range(20):
        adam.zero_grad()
        wide = [delta.double() for delta in deltas]
        torch.stack([((x - d) @ d.mT).square().sum() / d.square().sum() for d in wide]).sum().backward()  # type: ignore[no-untyped-call]
        adam.step()
    close(change("wudi", *deltas, iterations=20, learning_rate=1e-3), x.detach().float(), 2e-6)


@pytest.mark.parametrize("method", ["wudi", "doge_ta"])
def test_descent_reads_a_transposed_weight_the_right_way_round(method: str) -> None:
    deltas = [0.1 * normal(6, 9, seed=seed) for seed in range(2)]
    given: dict[str, Any] = {"iterations": 30, "learning_rate": 1e-3}
    turned = change(method, *(d.mT for d in deltas), supplies={"linears": {W: True}}, **given)
    close(turned.mT, change(method, *deltas, **given), 1e-5)


def test_doge_ends_with_a_smaller_loss_and_leaves_the_shared_directions_alone() -> None:
    deltas = torch.stack([normal(12, 10, seed=seed) for seed in range(3)])
    scales = [0.07 / float(d.norm()) for d in deltas]
    parts = [_spectral.decompose(d) for d in deltas]
    shared = doge_ta.shared_directions(parts, 5)
    assert shared.shape == (2, 12)
    close(shared @ shared.mT, torch.eye(2))
    gradient = doge_ta.slope(deltas, scales, shared)
    close(shared @ gradient(torch.zeros(12, 10)), torch.zeros(2, 10), 1e-4)

    def loss(x: torch.Tensor) -> torch.Tensor:
        merged = _kernels.weighted_total(deltas, scales) + sum(scales) * x
        return torch.stack([(d * (d - merged)).sum(1).square().sum() for d in deltas]).sum()

    x = torch.zeros(12, 10, requires_grad=True)
    (expected,) = torch.autograd.grad(loss(x), x)
    free = doge_ta.slope(deltas, scales, torch.zeros(0, 12))(x.detach())
    torch.testing.assert_close(free, expected, rtol=1e-4, atol=1e-4)
    from mergectl.methods._descent import descend

    end = descend(torch.zeros(12, 10), gradient, 50, 1e-3)
    assert float(loss(end)) < float(loss(torch.zeros(12, 10)))


def test_doge_leaves_weights_that_are_not_decomposed_as_the_base_has_them() -> None:
    base, experts = one_matrix(normal(6, 5), normal(6, 5, seed=1))
    got = merge_weights("doge_ta", base, experts)
    assert torch.equal(got["layer.bias"], base["layer.bias"])
    assert not torch.equal(got[W], base[W])


# ---- Consensus and TALL-masks


def test_consensus_of_no_task_is_task_arithmetic_and_of_too_many_the_base() -> None:
    base, experts = one_matrix(*(normal(6, 5, seed=seed) for seed in range(3)))
    ta = merge_weights("task_arithmetic", base, experts, scale=0.3)
    close(merge_weights("consensus", base, experts, min_tasks=0)[W], ta[W], 1e-6)
    assert torch.equal(merge_weights("consensus", base, experts, min_tasks=4)[W], base[W])


def test_tall_masks_of_threshold_zero_keep_every_entry_that_is_not_zero() -> None:
    deltas = [normal(6, 5, seed=seed) for seed in range(2)]
    deltas[0][2] = 0
    base, experts = one_matrix(*deltas)
    masks = merge_weights("tall_mask", base, experts, mask_threshold=0.0).kept["masks"]
    assert torch.equal(masks["task0"][W], experts["task0"][W] != base[W])


def test_tall_masks_are_kept_per_task_and_counted_by_consensus() -> None:
    base, experts = one_matrix(*(normal(6, 5, seed=seed) for seed in range(3)))
    merged = merge_weights("tall_mask", base, experts, mask_threshold=[0.2, 0.4, 0.6])
    total = sum(expert[W] - base[W] for expert in experts.values())
    votes = torch.zeros(6, 5)
    for (task, expert), limit in zip(experts.items(), (0.2, 0.4, 0.6), strict=True):
        own = expert[W] - base[W]
        assert torch.equal(merged.kept["masks"][task][W], own.abs() > limit * (total - own).abs())
        close(merged.task(task)[W], base[W] + total * merged.kept["masks"][task][W], 1e-6)
        votes += merged.kept["masks"][task][W]
    got = merge_weights("consensus", base, experts, mask_threshold=[0.2, 0.4, 0.6], min_tasks=2, scale=0.5)
    close(got[W], base[W] + 0.5 * total * (votes >= 2), 1e-6)
    assert set(merged.kept["rescalers"].values()) == {1.0}


# ---- one decomposition for all


class Counting:
    """A memory that says how often it computed something, and what."""

    def __init__(self) -> None:
        self.made: list[tuple[str, str | None, str]] = []
        self._memory = _spectral.remembering(None)

    def __call__(self, what: str, task: str | None, weight: str, make: Any) -> tuple[torch.Tensor, ...]:
        def counted() -> Any:
            self.made.append((what, task, weight))
            return make()

        return self._memory(what, task, weight, counted)


def test_methods_and_settings_share_decompositions(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, real = list[Any](), torch.linalg.svd

    def counted(x: torch.Tensor, **how: Any) -> Any:
        calls.append(x.shape)
        return real(x, **how)

    monkeypatch.setattr(torch.linalg, "svd", counted)
    deltas = [normal(12, 10, seed=seed) for seed in range(3)]
    memory = Counting()
    for method in ("tsv_m", "pre_cart", "doge_ta"):  # of each task vector
        change(method, *deltas, supplies={"remember": memory})
    assert len(calls) == 3
    for ratio in (0.1, 0.3, 0.5):  # a search of the rank: of each difference from the average
        change("cart", *deltas, rank_ratio=ratio, supplies={"remember": memory})
        change("cart_tsv", *deltas, rank_ratio=ratio, supplies={"remember": memory})
    assert len(calls) == 6
    for scale in (0.5, 1.0):  # of the sum, once for both, and of what each task has outside of it
        change("iso_c", *deltas, scale=scale, supplies={"remember": memory})
        change("iso_cts", *deltas, scale=scale, supplies={"remember": memory})
    assert len(calls) == 10
    assert len(set(memory.made)) == len(memory.made) == 10
    assert [task for what, task, _ in memory.made if what == "svd"] == ["task0", "task1", "task2"]
    assert all(task is None for what, task, _ in memory.made if what != "svd")


def test_remembered_factors_give_the_same_merge_bit_by_bit() -> None:
    deltas = [normal(12, 10, seed=seed) for seed in range(3)]
    memory = Counting()
    for method in ("cart", "tsv_m", "iso_cts", "doge_ta", "cart_cart", "tsv_cart"):
        alone = change(method, *deltas)
        assert all(torch.equal(change(method, *deltas, supplies={"remember": memory}), alone) for _ in range(2))


@pytest.mark.parametrize(("first", "then"), [("iso_c", "iso_cts"), ("tsv_m", "doge_ta"), ("iso_cts", "iso_c")])
def test_methods_share_decompositions_of_transposed_weights_the_right_way_round(first: str, then: str) -> None:
    deltas = [normal(12, 10, seed=seed) for seed in range(3)]
    memory, linears = Counting(), {W: True}
    alone = change(then, *deltas, supplies={"linears": linears})
    change(first, *deltas, supplies={"linears": linears, "remember": memory})
    assert torch.equal(change(then, *deltas, supplies={"linears": linears, "remember": memory}), alone)


def test_what_is_made_of_refined_task_vectors_is_remembered_as_such() -> None:
    deltas = [normal(12, 10, seed=seed) for seed in range(2)]
    memory = Counting()

    def merged(**how: Any) -> torch.Tensor:
        base, experts = one_matrix(*deltas)
        return merge_weights("tsv_m", base, experts, supplies={"remember": memory}, **how)[W]

    plain = merged()
    for how in ({"refine": "dare:drop=0.5"}, {"refine": "dare:drop=0.7"}, {"refine": "dare:drop=0.5", "seed": 1}):
        before = len(memory.made)
        assert not torch.equal(merged(**how), plain)
        assert len(memory.made) == before + 2
    assert torch.equal(merged(), plain)


def test_what_depends_on_a_given_supply_is_not_remembered() -> None:
    deltas = [normal(12, 10, seed=seed) for seed in range(2)]
    base, experts = one_matrix(*deltas)
    memory, halves = Counting(), []
    for keep in (0, 1):
        masks = {task: {n: torch.ones_like(x) for n, x in base.items()} for task in experts}
        for mask in masks.values():
            mask[W][keep::2] = 0
        given = {"remember": memory, "masks": masks}
        halves.append(merge_weights("tsv_m", base, experts, refine="dare:drop=0.5", supplies=given)[W])
    assert not torch.equal(*halves)
    assert memory.made == []


@pytest.mark.parametrize("preset", ["pre_cart", "ta_cart", "cart_cart", "cart_tsv", "tsv_cart"])
def test_presets_of_cart_are_settings_of_cart(preset: str) -> None:
    (step,) = steps_of(recipe_of(preset), ["a", "b"])
    assert step.name == "cart"


def test_a_search_of_cart_varies_rank_ratio_and_scale_alone() -> None:
    from mergectl.space import space

    found = space(settings_of("cart"), ["a", "b"], ranges={}, fixed={})
    assert [dimension.setting for dimension in found] == ["rank_ratio", "scale"]
