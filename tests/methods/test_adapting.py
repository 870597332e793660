"""The laws of methods that learn from the entropy: where they begin, their gradients and steps, how they are held."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from mergectl import merge_weights
from mergectl.errors import UserError
from mergectl.merging import MergeWarning
from mergectl.methods import _blend, _masked_ranks, _spectral, adamerging, adarank
from mergectl.methods._task_vectors import TaskVectors
from tests.methods.families import assert_close, assert_same

SHAPES = {
    "embeddings.word.weight": (11, 6), "layer.0.query.weight": (6, 6), "layer.0.up.weight": (9, 6),
    "layer.0.down.weight": (6, 9), "layer.0.down.bias": (6,), "layer.0.norm.weight": (6,),
}  # fmt: skip
MASKED = [name for name in SHAPES if name.startswith("layer") and len(SHAPES[name]) == 2]
Weights = dict[str, torch.Tensor]
LR = 0.03


def noise(seed: int, scale: float = 1.0) -> Weights:
    chance = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=chance) for name, shape in SHAPES.items()}


BASE = noise(0)
EXPERTS = {f"t{k}": {name: BASE[name] + x for name, x in noise(k + 1, 0.3).items()} for k in range(3)}
PULL = noise(9)


def entropy(weights: Mapping[str, torch.Tensor], step: int) -> torch.Tensor:
    """A smooth function that is not linear in the weights, another one in every step."""
    found = [((x * PULL[name]).sum() / 3 + step).sin() + (x * x).mean() for name, x in weights.items()]
    return torch.stack(found).sum()


def merged(method: str, experts: Mapping[str, Weights] | None = None, how: Any = entropy, **given: Any) -> Any:
    seen: list[Any] = []

    def watch(learned: Any) -> None:
        seen.append((learned.coefficients, learned.logits, learned.state))

    supplies = {"entropy": how, "watch": watch}
    got = merge_weights(method, BASE, experts or EXPERTS, supplies=supplies, **given)
    return got, seen


def vectors(experts: Mapping[str, Weights] = EXPERTS) -> tuple[TaskVectors, TaskVectors]:
    stacked = {name: torch.stack([own[name] - BASE[name] for own in experts.values()]) for name in BASE}
    return TaskVectors(list(experts), SHAPES, stacked.__getitem__), TaskVectors(["base"], SHAPES, BASE.__getitem__)


def begun(start: str = "ta", soft: bool = False, **rules: Any) -> _blend.Blend:
    """Return an AdaRank merge whose numbers can be set at will."""
    outset = adarank.Outset(start, 0.5, 0.7, "auto", "float32")
    return outset.blend(*vectors(), None, None, _blend.Rules(soft=soft, **rules), torch.device("cpu"))


def gradient(blend: _blend.Blend) -> torch.Tensor:
    entropy(blend.build(), 0).backward()  # type: ignore[no-untyped-call]
    return blend.gradient()


def mean(name: str) -> torch.Tensor:
    return torch.stack([own[name] for own in EXPERTS.values()]).mean(dim=0)


def is_table(name: str) -> bool:
    return name.startswith("embeddings")


def test_before_any_step_a_full_start_from_the_base_is_task_arithmetic() -> None:
    got, _ = merged("adarank", steps=0, start="ta", scale=0.4)
    expected = merge_weights("task_arithmetic", BASE, EXPERTS, scale=0.4)
    assert torch.equal(got["embeddings.word.weight"], BASE["embeddings.word.weight"])
    assert_close({n: got[n] for n in SHAPES if not is_table(n)}, {n: expected[n] for n in SHAPES if not is_table(n)})


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_a_full_start_from_the_mean_is_the_mean_whatever_the_scale(scale: float) -> None:
    got, _ = merged("adarank", steps=0, start="cart", rank_ratio=1.0, scale=scale)
    assert_close(got, {name: mean(name) for name in SHAPES}, atol=1e-5)


def test_before_any_step_a_start_from_the_mean_is_cart() -> None:
    got, _ = merged("adarank", steps=0, start="cart", rank_ratio=0.4, scale=1.7)
    assert_close(got, merge_weights("cart", BASE, EXPERTS, rank_ratio=0.4, scale=1.7), atol=1e-5)


@pytest.mark.parametrize(("start", "given"), [("tsv", {}), ("ta_cart", {}), ("cart_cart", {"origin_rank_ratio": 0.16})])
def test_before_any_step_a_start_from_a_merge_is_cart_from_there(start: str, given: dict[str, Any]) -> None:
    got, _ = merged("adarank", steps=0, start=start, rank_ratio=0.4, scale=0.8)
    preset = "tsv_cart" if start == "tsv" else start
    expected = merge_weights(preset, BASE, EXPERTS, rank_ratio=0.4, scale=0.8, **given)
    assert_close({n: got[n] for n in SHAPES if not is_table(n)}, {n: expected[n] for n in SHAPES if not is_table(n)})


@pytest.mark.parametrize(
    ("start", "method"), [("ta", "tsv_m"), ("cart", "cart"), ("tsv", "tsv_cart"), ("cart_cart", "cart_cart")]
)
def test_decompositions_are_shared_with_the_method_that_begins_there(start: str, method: str) -> None:
    memory, made = _spectral.remembering(None), list[str]()

    def remember(what: str, task: str | None, weight: str, make: Any) -> tuple[torch.Tensor, ...]:
        def counted() -> Any:
            made.append(weight)
            return make()

        return memory(what, task, weight, counted)

    given: dict[str, Any] = {"origin_rank_ratio": 0.16} if method == "cart_cart" else {}
    merge_weights(method, BASE, EXPERTS, supplies={"remember": remember}, **given)
    assert made
    made.clear()
    merge_weights("adarank", BASE, EXPERTS, supplies={"remember": remember, "entropy": entropy}, steps=0, start=start)
    assert not made


def test_a_start_that_keeps_nothing_is_its_origin_and_can_still_learn() -> None:
    got, _ = merged("adarank", steps=0, start="tsv", rank_ratio=0.0)
    assert_close(got, merge_weights("tsv_m", BASE, EXPERTS), atol=1e-5)
    _, seen = merged("adarank", steps=5, lr=LR, start="tsv", rank_ratio=0.0)
    assert any(bool((x > 0).any()) for x in seen[-1][1].values())


def test_a_share_of_components_is_rounded_down_perhaps_to_none() -> None:
    for ratio, kept in ((0.1, 0), (0.2, 1), (0.99, 5), (1.0, 6)):
        _, seen = merged("adarank", steps=0, rank_ratio=ratio)
        assert {int((row > 0).sum()) for x in seen[-1][1].values() for row in x} == {kept}


def test_masks_that_cannot_change_are_said_to_and_do_not() -> None:
    with pytest.warns(MergeWarning, match="masks cannot change in 3 steps at lr 0.03"):
        _, seen = merged("adarank", steps=3, lr=LR, rank_ratio=0.5)
    bits = [{name: x > 0 for name, x in logits.items()} for _, logits, _ in (seen[0], seen[-1])]
    assert all(torch.equal(bits[0][name], bits[1][name]) for name in MASKED)


def test_masks_that_what_was_learned_before_brought_near_their_border_may_change() -> None:
    class Watch:
        def __init__(self, state: Any) -> None:
            self.state = state

        def resume(self) -> Any:
            return None if self.state is None else {**self.state, "losses": torch.zeros(0)}

        def __call__(self, learned: Any) -> None:
            self.state, self.bits = learned.state, {name: x > 0 for name, x in learned.logits.items()}

    def run(watch: Watch, steps: int) -> Watch:
        given: dict[str, Any] = {"steps": steps, "lr": LR, "rank_ratio": 0.5}
        merge_weights("adarank", BASE, EXPERTS, supplies={"entropy": entropy, "watch": watch}, **given)
        return watch

    with pytest.warns(MergeWarning, match="masks cannot change"):
        first = run(Watch(None), 3)
    before = first.bits
    after = run(Watch(first.state), 3).bits  # a warning would be an error
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_mask_depends_on_the_signs_of_its_logits_alone_and_zero_is_pruned() -> None:
    blend = begun()
    before = {name: x.detach().clone() for name, x in blend.build().items()}
    for name in MASKED:
        blend.logits(name, blend.numbers).mul_(7.5)
    assert_same({name: x.detach() for name, x in blend.build().items()}, before)
    for name in MASKED:
        blend.logits(name, blend.numbers).zero_()
    assert all(torch.equal(blend.build()[name].detach(), BASE[name]) for name in MASKED)


@pytest.mark.parametrize("start", ["ta", "cart", "tsv"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("rules", [{}, {"clamp": (0.0, 0.6)}, {"normalize": True}, {"temperature": 0.5}])
def test_closed_form_gradients_are_those_of_autograd(start: str, soft: bool, rules: dict[str, Any]) -> None:
    blend = begun(start, soft, **rules)
    chance = torch.Generator().manual_seed(3)
    blend.numbers += 0.3 * torch.randn(blend.numbers.shape, generator=chance)
    ours = gradient(blend)
    numbers = blend.numbers.clone().requires_grad_()
    used = blend.rules.used(blend.coefficients(numbers))
    weights = {}
    for place, (name, part) in enumerate(blend.parts.items()):
        weights[name] = blend.origin[name].clone()
        logits = blend.logits(name, numbers) if name in MASKED else None
        for task in range(3):
            if logits is None:
                assert isinstance(part, _blend.Dense)
                weights[name] = weights[name] + used[task, place] * part.rows()[task]
                continue
            assert isinstance(part, _masked_ranks.Ranks)
            left, values, right = (x.view(3, -1, *x.shape[1:])[task] for x in part.load())
            p = (logits[task] / blend.rules.temperature).sigmoid()
            mask = p if soft else p + ((logits[task] > 0).float() - p).detach()
            weights[name] = weights[name] + used[task, place] * (left.mT * (mask * values)) @ right
    theirs = torch.autograd.grad(entropy({**blend.origin, **weights}, 0), numbers)[0]
    torch.testing.assert_close(ours, theirs, atol=1e-6 * float(theirs.abs().max()), rtol=1e-5)
    for name, x in blend.build().items():
        torch.testing.assert_close(x.detach(), {**blend.origin, **weights}[name].detach(), atol=1e-5, rtol=0)


def test_a_pruned_component_has_a_gradient_and_its_own_bit_does_not_matter() -> None:
    blend = begun()
    direction = noise(5)
    for name in MASKED:
        blend.weights[name].grad = direction[name]
    before = {name: blend.logits(name, blend.gradient()).clone() for name in MASKED}
    blend.logits(MASKED[0], blend.numbers).neg_()  # every bit turns, every chance is mirrored: p (1 - p) stays
    after = blend.logits(MASKED[0], blend.gradient())
    assert bool((before[MASKED[0]] != 0).all())
    torch.testing.assert_close(after, before[MASKED[0]])


def test_a_coefficient_of_zero_stills_the_mask_and_an_empty_mask_stills_the_coefficient() -> None:
    blend = begun()
    order, name = list(blend.parts), MASKED[1]
    blend.coefficients(blend.numbers)[1, order.index(name)] = 0.0
    blend.logits(name, blend.numbers)[2] = -1.0
    found = gradient(blend)
    masks, slopes = blend.logits(name, found), blend.coefficients(found)[:, order.index(name)]
    assert not bool(masks[1].any())
    assert bool(masks[2].any())
    assert slopes[2] == 0
    assert slopes[1] != 0


def test_signs_of_singular_vectors_and_the_side_on_which_a_weight_lies_do_not_matter() -> None:
    name, used, mask = "layer.0.up.weight", torch.tensor([0.3, 1.0, -0.5]), torch.ones(3, 6)
    mask[:, 3:] = 0
    x, grad = vectors()[0][name], noise(4)[name]
    parts = [_spectral.decompose(row) for row in x]
    joined = _spectral.joined(parts)
    flips = torch.tensor([1.0, -1.0]).repeat(9).unsqueeze(1)
    turned = _spectral.Factors(joined.left * flips, joined.values, joined.right * flips)
    across = _spectral.Factors(joined.right, joined.values, joined.left)
    results = []
    for factors, side in ((joined, grad), (turned, grad), (across, grad.mT.contiguous())):
        ranks = _masked_ranks.Ranks(3, 6, lambda own=factors: own)  # type: ignore[misc]
        weight = torch.zeros_like(side)
        ranks.add(weight, used, mask)
        slopes, masks = ranks.slopes(side, used, mask)
        assert masks is not None
        results.append((weight if side is grad else weight.mT, slopes, masks))
    for other in results[1:]:
        for ours, theirs in zip(other, results[0], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        results[0][0], sum(u * p.top(3).product() for u, p in zip(used, parts, strict=True)), atol=1e-5, rtol=0
    )


def test_what_cart_leaves_out_of_a_difference_weighs_the_sum_of_its_squared_values() -> None:
    experts, name = {"t0": EXPERTS["t0"], "t1": EXPERTS["t1"]}, "layer.0.up.weight"
    average = torch.stack([own[name] for own in experts.values()]).mean(dim=0)
    got = merge_weights("cart", BASE, experts, rank_ratio=0.5, scale={"t0": 1.0, "t1": 0.0})[name]
    left, values = experts["t0"][name] - got, torch.linalg.svdvals(experts["t0"][name] - average)
    assert float(left.square().sum()) == pytest.approx(float(values[3:].square().sum()), rel=1e-4)


def test_a_start_from_the_mean_of_one_expert_is_that_expert_and_has_nothing_to_mask() -> None:
    got, seen = merged("adarank", experts={"t0": EXPERTS["t0"]}, steps=6, lr=LR, start="cart", rank_ratio=0.5)
    assert_close(got, EXPERTS["t0"], atol=1e-6)
    before = adarank.LOGITS[False]
    assert all(bool(torch.isin(x, torch.tensor(before)).all()) for x in seen[-1][1].values())


def test_an_expert_that_equals_the_base_changes_nothing_for_the_others() -> None:
    alone, _ = merged("adarank", experts={"t0": EXPERTS["t0"]}, steps=5, lr=LR)
    with pytest.warns(MergeWarning, match="'same' equals the base"):
        beside, seen = merged("adarank", experts={"t0": EXPERTS["t0"], "same": BASE}, steps=5, lr=LR)
    assert_close(beside, alone, atol=1e-6)
    assert all(float(x[1]) == pytest.approx(0.3) for x in seen[-1][0].values())


@pytest.mark.parametrize("start", ["ta", "cart"])
def test_a_number_that_is_none_is_refused_before_any_decomposition(start: str) -> None:
    broken = {name: x.clone() for name, x in EXPERTS["t1"].items()}
    broken["layer.0.up.weight"][2, 3] = float("nan")
    with pytest.raises(UserError, match=r"layer\.0\.up\.weight"):
        merged("adarank", experts={"t0": EXPERTS["t0"], "t1": broken}, steps=1, start=start)


def test_other_batches_teach_something_else() -> None:
    got, _ = merged("adarank", steps=5, lr=LR)
    other, _ = merged("adarank", how=lambda weights, step: entropy(weights, 4 - step), steps=5, lr=LR)
    assert not all(torch.equal(got[name], other[name]) for name in MASKED)


def test_the_squared_norm_of_what_is_kept_is_the_sum_of_its_squared_values() -> None:
    x = vectors()[0]["layer.0.down.weight"][:1]
    factors = _spectral.decompose(x[0])
    mask = torch.tensor([[1.0, 0, 1, 1, 0, 0]])
    weight = torch.zeros(6, 9)
    _masked_ranks.Ranks(1, 6, lambda: factors).add(weight, torch.ones(1), mask)
    assert float(weight.square().sum()) == pytest.approx(float((mask[0] * factors.values.square()).sum()), rel=1e-5)


def test_the_order_of_experts_only_orders_what_is_learned() -> None:
    turned = dict(reversed(EXPERTS.items()))
    first, seen = merged("adarank", steps=5, lr=LR, rank_ratio=0.5)
    second, other = merged("adarank", experts=turned, steps=5, lr=LR, rank_ratio=0.5)
    assert_close(second, first, atol=1e-5)
    for name in MASKED:
        torch.testing.assert_close(other[-1][1][name].flip(0), seen[-1][1][name], atol=1e-4, rtol=0)


def test_a_factor_on_the_loss_only_matters_beside_adams_eps() -> None:
    got, _ = merged("adarank", steps=6, lr=LR)
    scaled, _ = merged("adarank", how=lambda weights, step: entropy(weights, step) / 3, steps=6, lr=LR)
    assert_close(scaled, got, atol=1e-4)


@pytest.mark.parametrize("method", ["adarank", "adamerging", "adamerging_taskwise", "adamerging_plus"])
def test_two_runs_are_alike_bit_by_bit(method: str) -> None:
    assert_same(merged(method, steps=5, lr=LR)[0], merged(method, steps=5, lr=LR)[0])


def test_gradients_that_the_entropy_adds_itself_count_as_those_it_leaves_to_autograd() -> None:
    def by_itself(weights: Mapping[str, torch.Tensor], step: int) -> float:
        loss = entropy(weights, step)
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    for method in ("adarank", "adamerging"):
        assert_same(merged(method, how=by_itself, steps=4, lr=LR)[0], merged(method, steps=4, lr=LR)[0])


@pytest.mark.parametrize("clamp", [False, True])
def test_adamerging_begins_with_task_arithmetic(clamp: bool) -> None:
    got, _ = merged("adamerging", steps=0, clamp=clamp)
    assert_close(got, merge_weights("task_arithmetic", BASE, EXPERTS, scale=0.3))


def test_the_gradient_of_a_shared_coefficient_is_the_sum_of_all_layers() -> None:
    by_layer = merged("adamerging", steps=1)[1][0][2]["first"].view(3, -1).sum(dim=1)
    torch.testing.assert_close(merged("adamerging_taskwise", steps=1)[1][0][2]["first"], by_layer)


def test_the_gradient_of_a_blocks_coefficient_is_the_sum_of_its_layers() -> None:
    by_layer, by_block = (merged("adamerging", steps=1, granularity=word)[1][0] for word in ("layer", "block"))
    assert list(by_block[0]) == ["outside of blocks", "layer.0"]
    slopes = by_layer[2]["first"].view(3, -1)
    expected = torch.stack([slopes[:, 0], slopes[:, 1:].sum(dim=1)], dim=1)
    torch.testing.assert_close(by_block[2]["first"].view(3, 2), expected)


def test_blocks_of_any_architecture_are_known_by_their_number() -> None:
    names = ["embeddings.word.weight", "h.11.mlp.c_fc.weight", "encoder.layer.3.output.dense.bias", "norm.weight"]
    found = [adamerging.GROUPS["block"](name) for name in names]
    assert found == ["outside of blocks", "h.11", "encoder.layer.3", "outside of blocks"]


def test_one_task_at_one_gives_its_expert() -> None:
    got, _ = merged("adamerging", steps=0, scale={"t0": 0.0, "t1": 1.0, "t2": 0.0})
    assert_close(got, EXPERTS["t1"])


@pytest.mark.parametrize("granularity", ["layer", "block", "task"])
def test_the_first_step_has_the_length_of_the_rate(granularity: str) -> None:
    _, seen = merged("adamerging", steps=1, lr=0.01, granularity=granularity)
    found = torch.stack([x - 0.3 for x in seen[0][0].values()], dim=1)
    slopes = seen[0][2]["first"].view(3, -1) / 0.1
    torch.testing.assert_close(found, -0.01 * slopes / (slopes.abs() + 1e-8), atol=1e-6, rtol=1e-4)


def test_adarank_whose_masks_keep_all_is_adamerging() -> None:
    with pytest.warns(MergeWarning, match="masks cannot change"):
        rank, _ = merged("adarank", steps=3, lr=LR, scale=0.3)
    plain, _ = merged("adamerging", steps=3, lr=LR, parameters="encoder")
    assert_close(rank, plain, atol=1e-5)


def test_coefficients_stay_free_where_their_use_is_clamped() -> None:
    def falling(weights: Mapping[str, torch.Tensor], step: int) -> torch.Tensor:
        return torch.stack([(x * PULL[name]).sum() for name, x in weights.items()]).sum()

    got, seen = merged("adamerging", how=falling, steps=30, lr=0.1, clamp=True)
    stored = torch.stack(list(seen[-1][0].values()))
    assert float(stored.min()) < 0 < 1 < float(stored.max())
    for name, x in got.items():
        numbers = seen[-1][0][name].clamp(0, 1)
        own = [n * (EXPERTS[task][name] - BASE[name]) for n, task in zip(numbers, EXPERTS, strict=True)]
        torch.testing.assert_close(x, BASE[name] + sum(own), atol=1e-5, rtol=0)


def test_plus_keeps_what_agrees_and_leaves_it_as_it_is() -> None:
    task_vectors, _ = vectors()
    count = sum(x.numel() for x in BASE.values())
    for density in (0.2, 1.0):
        kept = adamerging.agreeing(task_vectors, density)
        sizes = torch.zeros(3)
        for name in SHAPES:
            x, own = task_vectors[name], kept[name]
            assert torch.equal(own[own != 0], x[own != 0])
            signs = own.sign()
            assert not bool(((signs.max(dim=0).values > 0) & (signs.min(dim=0).values < 0)).any())
            if density == 1.0:
                assert torch.equal(own != 0, x.sign() == x.sum(dim=0).sign())
            sizes += (own != 0).reshape(3, -1).sum(dim=1)
        assert float(sizes.max()) <= int(density * count) + 1


def test_parameters_say_what_is_merged() -> None:
    names = {**SHAPES, "visual_projection.weight": (4, 6)}
    base = {name: torch.zeros(shape) for name, shape in names.items()}
    expert = {"a": {name: x + 1 for name, x in base.items()}}
    still = {}
    for word in adamerging.PARAMETERS:
        got = merge_weights("adamerging", base, expert, supplies={"entropy": entropy}, steps=0, parameters=word)
        still[word] = {name for name, x in got.items() if not bool(x.any())}
    tables, projection = {"embeddings.word.weight"}, {"visual_projection.weight"}
    assert still == {"backbone": projection, "encoder": projection | tables, "all": set()}


def test_no_lower_entropy_for_so_long_is_enough() -> None:
    _, seen = merged("adamerging", how=lambda w, step: 0 * entropy(w, 0) + 1.0, steps=100, patience=4)
    assert len(seen) - 1 == 8
    _, seen = merged("adamerging", how=lambda w, step: 0 * entropy(w, 0) - step, steps=20, patience=4)
    assert len(seen) - 1 == 20


def test_an_entropy_that_is_not_a_number_stops_the_work() -> None:
    with pytest.raises(UserError, match="The entropy is nan at step 0"):
        merged("adamerging", how=lambda w, step: entropy(w, step) * float("nan"), steps=2)


@pytest.mark.parametrize("method", ["adarank", "adamerging"])
def test_an_adaptation_cut_short_goes_on_as_if_nothing_had_been(method: str) -> None:
    class Watch:
        def __init__(self, state: Any, stop: int | None) -> None:
            self.state, self.stop, self.steps = state, stop, 0

        def resume(self) -> Any:
            return self.state

        def __call__(self, learned: Any) -> bool:
            self.state, self.steps = learned.state, self.steps + (not learned.done)
            return bool(learned.step == self.stop)

    def run(watch: Watch) -> Any:
        given: dict[str, Any] = {"steps": 9, "lr": LR}
        return merge_weights(method, BASE, EXPERTS, supplies={"entropy": entropy, "watch": watch}, **given)

    first = Watch(None, 4)
    run(first)
    rest = Watch(first.state, None)
    assert_same(run(rest), run(Watch(None, None)))
    assert rest.steps == 5


@pytest.mark.parametrize("hold", ["disk", "bfloat16", "kept"])
def test_factors_held_otherwise_give_the_same_as_far_as_they_can(hold: str) -> None:
    given: dict[str, Any] = {"steps": 5, "lr": LR, "start": "cart", "rank_ratio": 0.5}
    plain, seen = merged("adarank", **given)
    got, other = merged("adarank", hold=hold, **given)
    if hold == "disk":
        assert_close(got, plain, atol=1e-6)
    if hold == "bfloat16":
        assert_close(got, plain, atol=3e-2)
        assert not all(torch.equal(got[name], plain[name]) for name in MASKED)
    if hold == "kept":
        assert all(x.shape == (3, 3) for x in other[-1][1].values())
        before = merged("adarank", hold=hold, **given | {"steps": 0})[0]
        assert_close(before, merged("adarank", **given | {"steps": 0})[0], atol=1e-5)
    assert all(x.shape == (3, 6) for x in seen[-1][1].values())


@pytest.mark.parametrize("hold", ["disk", "bfloat16"])
def test_task_vectors_held_otherwise_give_the_same_as_far_as_they_can(hold: str) -> None:
    plain, _ = merged("adamerging", steps=4, lr=LR)
    got, _ = merged("adamerging", hold=hold, steps=4, lr=LR)
    assert_close(got, plain, atol=1e-2 if hold == "bfloat16" else 0.0)


def test_tables_are_merged_and_decomposed_where_that_is_asked_for() -> None:
    _, seen = merged("adarank", steps=0, decompose="full")
    assert sorted(seen[-1][1]) == sorted([*MASKED, "embeddings.word.weight"])


def test_image_models_take_part_as_a_whole_and_learn_faster() -> None:
    shapes = {**SHAPES, "embeddings.patch_embeddings.weight": (6, 1, 2, 2), "visual_projection.weight": (4, 6)}
    base = {name: torch.zeros(shape) for name, shape in shapes.items()}
    chance = torch.Generator().manual_seed(2)
    experts = {k: {n: torch.randn(x.shape, generator=chance) for n, x in base.items()} for k in "ab"}
    seen: list[Any] = []
    supplies = {"entropy": lambda w, step: sum(x.sum() for x in w.values()), "watch": seen.append}
    with pytest.warns(MergeWarning, match=r"in 1 steps at lr 0\.001"):
        merge_weights("adarank", base, experts, supplies=supplies, steps=1, rank_ratio=0.0)
    learned = seen[-1]
    assert set(learned.coefficients) == set(shapes)
    assert "visual_projection.weight" not in learned.logits
    assert {int((row > 0).sum()) for row in learned.logits["layer.0.query.weight"]} == {3}  # of 6, for two tasks
