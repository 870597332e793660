"""What PAVE must do: prune the layers it has moments of, to what their tasks' inputs activate, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from mergectl import merge_weights, settings
from mergectl.errors import UserError
from mergectl.merging import MergeWarning
from mergectl.methods import _directions, _moments, pave
from mergectl.methods._contract import MethodError
from mergectl.methods._moments import Gram
from mergectl.methods._task_vectors import TaskVectors
from tests.methods.families import Weights, assert_close, assert_same, family, supplies_for

LAYERS = {"m.layer.0.weight", "m.layer.1.weight"}
Grams = dict[str, dict[str, Any]]


def small_family(tasks: int = 3) -> tuple[Weights, dict[str, Weights], Grams]:
    base, experts = family(tasks)
    return base, experts, supplies_for("pave_emr", experts)["grams"]


def purified(
    base: Weights,
    experts: dict[str, Weights],
    grams: Grams,
    linears: dict[str, bool] | None = None,
    remember: Any = None,
    **given: Any,
) -> Weights:
    """All purified task vectors, [task, *shape]."""
    shapes = {name: tuple(x.shape) for name, x in base.items()}

    def read(name: str) -> torch.Tensor:
        return torch.stack([expert[name] - base[name] for expert in experts.values()])

    values = settings.check("pave", given, list(experts))
    found = pave.refine(TaskVectors(list(experts), shapes, read), base, grams, linears, remember, **values)
    return {name: found[name] for name in found}


def plain(base: Weights, experts: dict[str, Weights]) -> Weights:
    return {name: torch.stack([expert[name] - x for expert in experts.values()]) for name, x in base.items()}


def rank(x: torch.Tensor) -> int:
    return int(torch.linalg.matrix_rank(x, atol=1e-4, rtol=0))


def ranks(base: Weights, found: Weights, name: str = "m.layer.0.weight") -> list[int]:
    return [rank(base[name] + x) for x in found[name]]


@pytest.mark.parametrize("basis", list(pave.BASES))
@pytest.mark.parametrize("allocation", list(pave.ALLOCATIONS))
def test_keeping_every_rank_changes_no_bit(basis: str, allocation: str) -> None:
    base, experts, grams = small_family()
    found = purified(base, experts, grams, rank_scale=1.0, basis=basis, allocation=allocation)
    assert_same(found, plain(base, experts))


MERGERS = ["task_arithmetic", "ties", "emr", "dare_ties", "dare_task_arithmetic", "average", "medusa"]


@pytest.mark.parametrize("method", MERGERS)
def test_before_any_merger_keeping_every_rank_changes_nothing(method: str) -> None:
    base, experts, grams = small_family()
    drops: dict[str, Any] = {"drop": 0.0} if method.startswith("dare") else {}  # draws depend on the place in line
    refine, supplies = "pave:rank_scale=1", {"grams": grams}
    got = merge_weights(method, base, experts, refine=refine, supplies=supplies, **drops)
    expected = merge_weights(method, base, experts, refine="dare:drop=0", **drops)
    assert_same(got, expected)
    assert got.kept.get("rescalers") == expected.kept.get("rescalers")


def test_a_preset_is_the_refinement_and_the_method() -> None:
    base, experts, grams = small_family()
    presets: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
        ("pave_ta", "task_arithmetic", {"allocation": "none"}, {"scale": 0.3}),
        ("pave_ties", "ties", {}, {"scale": 0.9, "density": 0.2, "round_up": True}),
        ("pave_emr", "emr", {}, {}),
    ]
    supplies: dict[str, Any] = {"grams": grams}
    for preset, method, first, given in presets:
        refine = [("pave", {"rank_scale": 0.6, **first})]
        both = merge_weights(method, base, experts, refine=refine, supplies=supplies, **given)
        assert_same(merge_weights(preset, base, experts, rank_scale=0.6, supplies=supplies), both)


def test_task_arithmetic_ends_at_the_base_and_at_the_expert() -> None:
    base, experts, grams = small_family(1)
    supplies: dict[str, Any] = {"grams": grams}
    assert_same(merge_weights("pave_ta", base, experts, rank_scale=0.5, scale=0.0, supplies=supplies), base)
    whole = merge_weights("pave_ta", base, experts, rank_scale=1.0, scale=1.0, supplies=supplies)
    assert_close(whole, experts["task0"])


def test_equal_experts_are_what_ties_returns_untrimmed() -> None:
    base, experts, grams = small_family(1)
    copies, moments = dict.fromkeys("abc", experts["task0"]), dict.fromkeys("abc", grams["task0"])
    given: dict[str, Any] = {"rank_scale": 1.0, "scale": 1.0, "trim": "none"}
    assert_close(merge_weights("pave_ties", base, copies, supplies={"grams": moments}, **given), experts["task0"])


def test_only_weights_with_moments_change() -> None:
    base, experts, grams = small_family()
    found, before = purified(base, experts, grams, rank_scale=0.5), plain(base, experts)
    assert {name for name in base if not torch.equal(found[name], before[name])} == LAYERS


def test_a_merge_gives_the_same_twice() -> None:
    base, experts, grams = small_family()
    supplies: dict[str, Any] = {"grams": grams}
    first = merge_weights("pave_emr", base, experts, rank_scale=0.6, supplies=supplies)
    assert_same(merge_weights("pave_emr", base, experts, rank_scale=0.6, supplies=supplies), first)


def test_heads_are_left_to_their_tasks_whatever_moments_they_have() -> None:
    base, experts, grams = small_family()
    base["classifier.weight"] = torch.ones(2, 8)
    for task, expert in experts.items():
        expert["classifier.weight"] = torch.full((3, 8), 2.0)
        grams[task]["classifier.weight"] = torch.eye(8)
    got = merge_weights("pave_emr", base, experts, supplies={"grams": grams}, rank_scale=0.5)
    assert "classifier.weight" not in got
    assert "classifier.weight" not in got.kept["unified"]
    assert torch.equal(got.task("task1")["classifier.weight"], torch.full((3, 8), 2.0))


@pytest.mark.parametrize(("share", "rank"), [(0.001, 1), (0.3125, 2), (0.4375, 4), (0.5, 4)])
def test_a_share_is_rounded_to_even_and_to_one_at_least(share: float, rank: int) -> None:
    base, experts, grams = small_family()
    assert ranks(base, purified(base, experts, grams, rank_scale=share, allocation="none")) == [rank] * 3


def test_each_task_may_keep_its_own_share() -> None:
    base, experts, grams = small_family()
    shares = {"task0": 1.0, "task2": 0.25, "task1": 0.5}
    assert ranks(base, purified(base, experts, grams, rank_scale=shares, allocation="none")) == [8, 4, 2]
    text = "pave:rank_scale=1.0,0.5,0.25,allocation=none"
    got = merge_weights("task_arithmetic", base, experts, refine=text, supplies={"grams": grams})
    expected = merge_weights(
        "pave_ta", base, experts, rank_scale=shares, supplies={"grams": grams},
        scale=settings.settings_of("task_arithmetic")["scale"].default,
    )  # fmt: skip
    assert_same(got, expected)


def test_tasks_share_a_budget_by_their_spectra() -> None:
    base, experts, grams = small_family()
    steep = torch.diag(torch.tensor([1e3, *[1.0] * 7]))  # a few inputs matter: the rest is dropped first
    grams["task1"]["m.layer.0.weight"] = steep
    kept = ranks(base, purified(base, experts, grams, rank_scale=0.75))
    assert sum(kept) == 17  # ceil(0.75 * 8 * 3) - 1
    assert kept[1] == min(kept) == 5  # 8 - 1.5 * 2


@pytest.mark.parametrize("allocation", list(pave.ALLOCATIONS))
def test_who_takes_no_part_keeps_every_bit_and_needs_no_moments(allocation: str) -> None:
    base, experts, grams = small_family()
    given: dict[str, Any] = {"rank_scale": 0.6, "allocation": allocation, "participants": ["task1"]}
    found, before = purified(base, experts, {"task1": grams["task1"]}, **given), plain(base, experts)
    for name in base:
        assert torch.equal(found[name][::2], before[name][::2])
        assert torch.equal(found[name][1], before[name][1]) == (name not in LAYERS)


def test_participants_are_read_from_text_and_checked() -> None:
    base, experts, grams = small_family()
    supplies: dict[str, Any] = {"grams": grams}
    texts = "pave:participants=task0,task2,rank_scale=0.5"
    pairs = [("pave", {"participants": ["task0", "task2"], "rank_scale": 0.5})]
    got = merge_weights("emr", base, experts, refine=texts, supplies=supplies)
    assert_same(got, merge_weights("emr", base, experts, refine=pairs, supplies=supplies))
    for wrong, words in (
        (["task9"], "a task 'task9' that is not merged"),
        ([], "must be names of tasks, got"),
        ([1], "must"),
    ):
        with pytest.raises(UserError, match=f"participants .*{words}"):
            merge_weights("pave_emr", base, experts, participants=wrong, supplies=supplies)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    base, experts, grams = small_family()
    with pytest.raises(UserError, match=r"rank_scale must lie between 0\.0 and 1\.0"):
        merge_weights("pave_ta", base, experts, rank_scale=share, supplies={"grams": grams})


def test_a_common_budget_cannot_differ_per_task() -> None:
    base, experts, grams = small_family()
    with pytest.raises(UserError, match=r"one number.* allocation=none"):
        merge_weights("pave_ties", base, experts, rank_scale=[1.0, 0.5, 0.5], supplies={"grams": grams})
    equal = merge_weights("pave_ties", base, experts, rank_scale=[0.5] * 3, supplies={"grams": grams})
    assert_same(equal, merge_weights("pave_ties", base, experts, rank_scale=0.5, supplies={"grams": grams}))


def test_an_expert_equal_to_the_base_is_pruned_too() -> None:
    base, _, grams = small_family()
    found = purified(base, {"task0": base}, grams, rank_scale=0.5)
    assert rank(base["m.layer.0.weight"] + found["m.layer.0.weight"][0]) == 3
    assert bool(found["m.layer.0.weight"].any())
    assert not found["m.embed.weight"].any()


def test_a_weight_of_zeros_stays_one() -> None:
    base, experts, grams = small_family(2)
    experts["task0"]["m.layer.0.weight"] = torch.zeros(8, 8)
    for allocation in pave.ALLOCATIONS:
        found = purified(base, experts, grams, rank_scale=0.5, allocation=allocation)
        assert torch.equal(found["m.layer.0.weight"][0], -base["m.layer.0.weight"])


@pytest.mark.parametrize("basis", list(pave.BASES))
def test_fewer_rows_than_inputs_are_enough(basis: str) -> None:
    base, experts, grams = small_family(1)
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    grams["task0"]["m.layer.0.weight"] = Gram(x.mT @ x / 2, 2)
    found = purified(base, experts, grams, rank_scale=0.5, allocation="none", basis=basis)
    assert ranks(base, found) == [4]


def test_a_layer_without_moments_keeps_its_ranks_with_one_warning() -> None:
    base, experts, grams = small_family()
    del grams["task0"]["m.layer.0.weight"], grams["task1"]["m.layer.1.weight"]
    with pytest.warns(MergeWarning, match=r"2 of 2 linear weights .*: m\.layer\.0\.weight, m") as seen:
        found = purified(base, experts, grams, rank_scale=0.5, allocation="none")
    assert len(seen) == 1
    assert ranks(base, found) == [8, 4, 4]
    assert torch.equal(found["m.layer.0.weight"][0], plain(base, experts)["m.layer.0.weight"][0])


def test_what_the_lab_calls_linear_decides_what_is_missed() -> None:
    base, experts, grams = small_family()
    for moments in grams.values():
        del moments["m.layer.1.weight"]
    found = purified(base, experts, grams, {"m.layer.0.weight": False}, rank_scale=0.5)
    assert torch.equal(found["m.layer.1.weight"], plain(base, experts)["m.layer.1.weight"])
    with pytest.warns(MergeWarning, match="1 of 2 linear weights"):
        purified(base, experts, grams, dict.fromkeys(LAYERS, False), rank_scale=0.5)


def test_a_task_without_any_moments_is_refused() -> None:
    base, experts, grams = small_family()
    del grams["task1"]
    with pytest.raises(UserError, match="no grams for the task 'task1', only for task0, task2"):
        merge_weights("pave_emr", base, experts, supplies={"grams": grams})
    with pytest.raises(UserError, match="needs 'grams'"):
        merge_weights("pave_emr", base, experts)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_moments_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    base, experts, grams = small_family()
    grams["task1"]["m.layer.0.weight"].moment[3, 2] = bad
    with pytest.raises(UserError, match=r"'m\.layer\.0\.weight' for the task 'task1' hold NaN or infinite"):
        merge_weights("pave_emr", base, experts, supplies={"grams": grams})


def test_moments_of_another_width_are_refused_by_name() -> None:
    base, experts, grams = small_family()
    grams["task0"]["m.layer.1.weight"] = torch.eye(5)
    with pytest.raises(UserError, match=r"grams of 'm\.layer\.1\.weight' are of 5 inputs, and the weight .* \[6, 8\]"):
        merge_weights("pave_ta", base, experts, supplies={"grams": grams}, rank_scale=0.5)


@pytest.mark.parametrize("shape", [(8, 8), (6, 8), (8, 6)])
def test_a_weight_stored_the_other_way_round_is_purified_alike(shape: tuple[int, int]) -> None:
    base, experts, grams = small_family(2)
    base, experts = {"m.w": base["m.embed.weight"][: shape[0], : shape[1]].contiguous()}, {
        task: {"m.w": expert["m.embed.weight"][: shape[0], : shape[1]].contiguous()} for task, expert in experts.items()
    }  # fmt: skip
    rows = torch.randn(2, 20, shape[1], generator=torch.Generator().manual_seed(1)) * torch.logspace(0, -1, shape[1])
    grams = {task: {"m.w": x.mT @ x / 20} for task, x in zip(experts, rows, strict=True)}
    found = purified(base, experts, grams, {"m.w": False}, rank_scale=0.5)
    turned = {task: {"m.w": expert["m.w"].mT.contiguous()} for task, expert in experts.items()}
    other = purified({"m.w": base["m.w"].mT.contiguous()}, turned, grams, {"m.w": True}, rank_scale=0.5)
    assert_close({"m.w": other["m.w"].mT}, found, atol=1e-6)
    assert rank(base["m.w"] + found["m.w"][0]) < min(shape)


class Memory:
    """A memory as the lab's, which notes what was made and what was asked for."""

    def __init__(self) -> None:
        self.kept: dict[Any, tuple[torch.Tensor, ...]] = {}
        self.made: list[tuple[str | None, str]] = []

    def __call__(
        self, what: str, task: str | None, weight: str, make: Callable[[], Sequence[torch.Tensor]]
    ) -> tuple[torch.Tensor, ...]:
        if (what, task, weight) not in self.kept:
            self.kept[what, task, weight] = tuple(make())
            self.made.append((task, weight))
        return self.kept[what, task, weight]


@pytest.mark.parametrize("allocation", list(pave.ALLOCATIONS))
def test_a_search_over_ranks_decomposes_each_layer_once(allocation: str) -> None:
    base, experts, grams = small_family()
    memory = Memory()
    for share in (0.3, 0.5, 0.4, 0.65):
        got = purified(base, experts, grams, remember=memory, rank_scale=share, allocation=allocation)
        expected = purified(base, experts, grams, rank_scale=share, allocation=allocation)
        assert_close(got, expected, atol=1e-6)
    assert sorted(memory.made) == [(task, name) for task in experts for name in sorted(LAYERS)]


def test_little_pruning_leaves_little_to_remember() -> None:
    draw = torch.Generator().manual_seed(0)
    base = {"m.w.weight": torch.randn(40, 40, generator=draw)}
    experts = {"a": {"m.w.weight": base["m.w.weight"] + 0.1}}
    memory = Memory()
    for share in (0.99, 0.95, 0.9):
        purified(base, experts, {"a": {"m.w.weight": torch.eye(40)}}, remember=memory, rank_scale=share)
    assert [tuple(x.shape) for kept in memory.kept.values() for x in kept] == [(40,), (10, 40)]


def test_other_moments_and_settings_are_decomposed_anew() -> None:
    base, experts, grams = small_family(1)
    memory = Memory()
    for change in ({}, {"damping": 0.5}, {"basis": "asvd"}, {"damping_backoff": True}):
        purified(base, experts, grams, remember=memory, rank_scale=0.5, **change)
    off_diagonal = {"task0": {name: given.moment * 1.0 for name, given in grams["task0"].items()}}
    for moment in off_diagonal["task0"].values():
        moment[0, 1] = moment[1, 0] = 0.0
    purified(base, experts, off_diagonal, remember=memory, rank_scale=0.5)
    assert len(memory.made) == 5 * len(LAYERS)


@pytest.mark.parametrize("method", ["ties", "emr", "pcb"])
def test_a_merger_that_reads_again_decomposes_nothing_again(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts, grams = small_family()
    calls: list[int] = []

    def counted(m: torch.Tensor, count: int) -> _directions.Directions:
        calls.append(count)
        return _directions.smallest_directions(m, count)

    monkeypatch.setattr(pave, "smallest_directions", counted)
    merge_weights(method, base, experts, refine="pave:rank_scale=0.5", supplies={"grams": grams})
    assert len(calls) == len(experts) * len(LAYERS)


def test_damping_is_doubled_until_the_inverse_is_one_in_float32() -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    moment = 1e6 * x.mT @ x
    enough = _moments.enough_damping(moment, 0.001)
    assert enough > 0.001
    assert (enough / 0.001) == 2 ** round(torch.tensor(enough / 0.001).log2().item())
    assert _moments.inverse_error(moment, enough) < 0.05 <= _moments.inverse_error(moment, enough / 2)
    assert _moments.enough_damping(torch.eye(3), 0.1) == 0.1
    with pytest.raises(MethodError, match="must be above"):
        _moments.enough_damping(moment, 0.0)


def test_a_doubled_damping_is_the_one_used() -> None:
    base, experts, grams = small_family(1)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    moment = 1e6 * x.mT @ x
    grams["task0"] = dict.fromkeys(LAYERS, moment)
    enough = _moments.enough_damping(moment, 0.001)
    assert enough > 0.001
    found = purified(base, experts, grams, rank_scale=0.5, damping=0.001, damping_backoff=True)
    assert_same(found, purified(base, experts, grams, rank_scale=0.5, damping=enough))


def test_a_moment_without_a_cholesky_factor_is_refused() -> None:
    base, experts, grams = small_family(1)
    grams["task0"] = dict.fromkeys(LAYERS, torch.zeros(8, 8))
    with pytest.raises(UserError, match="no Cholesky factor with a damping of 0"):
        merge_weights(
            "pave_ta", base, experts, supplies={"grams": grams}, rank_scale=0.5, damping=0.0, basis="cholesky"
        )  # fmt: skip
