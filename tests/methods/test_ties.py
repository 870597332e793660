"""What TIES, the elected mean and their variants must do besides matching the references."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mergectl import merge_weights
from mergectl.errors import UserError
from tests.methods.families import assert_close, assert_same, family

ELECT, COMBINE = ["mass", "normfrac", "normmass", "none"], ["disjoint_mean", "disjoint_sum", "disjoint_max"]
PLAIN = ["mean", "sum", "median", "magnitude"]


def vectors(*rows: list[float]) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    base = {"m.w": torch.zeros(len(rows[0]))}
    return base, {f"task{i}": {"m.w": torch.tensor(row)} for i, row in enumerate(rows)}


def ties(*rows: list[float], **given: Any) -> list[float]:
    result: list[float] = merge_weights("ties", *vectors(*rows), **given)["m.w"].tolist()
    return result


@pytest.mark.parametrize("elect", ELECT)
@pytest.mark.parametrize("combine", [*COMBINE, *PLAIN])
def test_without_trimming_one_expert_is_the_scaled_task_vector(elect: str, combine: str) -> None:
    if (elect, combine) == ("none", "disjoint_max"):
        return
    base, experts = family(1)
    expected = {name: base[name] + 0.7 * (x - base[name]) for name, x in experts["task0"].items()}
    for given in ({"density": 1.0}, {"trim": "none"}, {"trim": "energy", "threshold": 1.0}):
        assert_close(merge_weights("ties", base, experts, scale=0.7, elect=elect, combine=combine, **given), expected)


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_identical_experts_give_the_trimmed_vector_and_its_multiple(scope: str) -> None:
    base, experts = family(1)
    copies = {f"task{i}": experts["task0"] for i in range(3)}
    trimmed = merge_weights("ties", base, experts, scope=scope)
    assert_close(merge_weights("ties", base, copies, scope=scope), trimmed)
    tripled = {name: base[name] + 3 * (x - base[name]) for name, x in trimmed.items()}
    assert_close(merge_weights("ties", base, copies, scope=scope, combine="disjoint_sum"), tripled)


@pytest.mark.parametrize("method", ["ties", "ties_tensor"])
def test_density_zero_keeps_nothing_and_one_everything(method: str) -> None:
    base, experts = family(3)
    assert_same(merge_weights(method, base, experts, density=0), base)
    assert_same(
        merge_weights(method, base, experts, density=1, zero_sign="zero"),
        merge_weights("medusa", base, experts),
    )


def test_a_scale_of_zero_gives_the_base() -> None:
    base, experts = family(3)
    assert_same(merge_weights("ties", base, experts, scale=0), base)


@pytest.mark.parametrize(("scope", "round_up", "kept"), [("model", False, 3), ("model", True, 4), ("tensor", False, 3)])
def test_a_density_of_a_quarter_keeps_so_many_of_ten(scope: str, round_up: bool, kept: int) -> None:
    row = [float(i) for i in range(1, 11)]
    result = ties(row, density=0.25, scope=scope, round_up=round_up)
    assert sum(value != 0 for value in result) == kept


def test_entries_equal_to_the_last_one_kept_stay_in_the_model_and_go_in_a_tensor() -> None:
    row = [1.0, 2.0, 2.0, 2.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert ties(row, density=0.2) == [0, 2, 2, 2, 3, 0, 0, 0, 0, 0]
    assert ties(row, density=0.2, scope="tensor") == [0, 0, 0, 0, 3, 0, 0, 0, 0, 0]


def test_an_exact_draw_goes_to_the_majority() -> None:
    rows = [1.0, 2.0, 3.0, 4.0], [-1.0, 2.0, 3.0, -5.0]
    assert ties(*rows, trim="none") == [1, 2, 3, -5]
    assert ties(*rows, trim="none", zero_sign="zero") == [0, 2, 3, -5]


def test_a_draw_without_a_majority_leaves_the_base() -> None:
    assert ties([1.0, 2.0, -2.0], [-1.0, 2.0, -2.0], trim="none") == [0, 2, -2]


def test_the_majority_is_that_of_the_scope() -> None:
    base = {"m.a": torch.zeros(3), "m.b": torch.zeros(4)}
    experts = {
        "one": {"m.a": torch.tensor([1.0, -1.0, -1.0]), "m.b": torch.tensor([1.0, 1.0, 1.0, 1.0])},
        "two": {"m.a": torch.tensor([-1.0, -1.0, -1.0]), "m.b": torch.tensor([1.0, 1.0, 1.0, 1.0])},
    }
    assert merge_weights("ties", base, experts, trim="none")["m.a"].tolist() == [1, -1, -1]
    assert merge_weights("ties", base, experts, trim="none", scope="tensor")["m.a"].tolist() == [-1, -1, -1]


def test_the_largest_share_elects_where_mass_would_not() -> None:
    rows = [3.0, 4.0, 0.0], [-2.0, 0.0, 0.1]
    assert ties(*rows, trim="none")[0] == 3.0
    assert ties(*rows, trim="none", elect="normfrac")[0] == -2.0
    assert ties(*rows, trim="none", elect="normmass")[0] == -2.0


def test_elected_signs_are_put_on_plain_results() -> None:
    rows = [4.0, 1.0], [-1.0, 1.0], [-1.0, 1.0]
    assert ties(*rows, trim="none", combine="median") == [1.0, 1.0]  # the median is -1, the elected sign +
    assert ties(*rows, trim="none", combine="median", elect="none") == [-1.0, 1.0]


def test_given_signs_replace_the_election() -> None:
    base, experts = vectors([1.0, 2.0], [3.0, -4.0])
    got = merge_weights("ties", base, experts, trim="none", supplies={"signs": {"m.w": torch.tensor([-1.0, 1.0])}})
    assert got["m.w"].tolist() == [0.0, 2.0]


def test_wrong_signs_are_refused_by_name() -> None:
    base, experts = vectors([1.0, 2.0])
    with pytest.raises(UserError, match=r"No signs for weight 'm\.w'"):
        merge_weights("ties", base, experts, supplies={"signs": {}})
    with pytest.raises(UserError, match=r"signs of 'm.w' have shape \[3\], the weight \[2\]"):
        merge_weights("ties", base, experts, supplies={"signs": {"m.w": torch.ones(3)}})


def test_the_largest_agreeing_entry_needs_an_election() -> None:
    with pytest.raises(UserError, match="disjoint_max needs an election"):
        ties([1.0, 2.0], elect="none", combine="disjoint_max")


def test_energy_above_one_is_refused() -> None:
    with pytest.raises(UserError, match="share of the energy"):
        ties([1.0, 2.0], trim="energy", threshold=2)


def test_energy_keeps_the_shortest_prefix() -> None:
    assert ties([3.0, 4.0, 1.0], trim="energy", threshold=0.6) == [0, 4, 0]  # 16 of 26 is more than 0.6
    assert ties([3.0, 4.0, 1.0], trim="energy", threshold=0.7) == [3, 4, 0]
    assert ties([3.0, 4.0, 1.0], trim="energy", threshold=0.6, compat=True) == [0, 4, 1]


def test_deviations_keep_what_is_far_from_the_mean() -> None:
    row = [1.0, 1.0, 1.0, 1.0, 11.0]  # mean 3, deviation 4.47
    assert ties(row, trim="std", threshold=1.0) == [0, 0, 0, 0, 11]
    assert ties(row, trim="std", threshold=0.4) == [1, 1, 1, 1, 11]


def test_each_task_may_have_its_own_density() -> None:
    rows = [1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]
    assert ties(*rows, density=[0.0, 1.0]) == [4, 3, 2, 1]
    assert ties(*rows, density={"task0": 0.25, "task1": 0.0}) == [0, 0, 3, 4]


def test_weights_chosen_by_pattern_are_merged_as_a_model_of_their_own() -> None:
    base, experts = family(3)
    parts = [name for name in base if "layer" in name], [name for name in base if "layer" not in name]
    got = merge_weights("ties", base, experts, density={"*": 0.3, "*.layer.*": 0.8})
    for names, density in zip(parts, (0.8, 0.3), strict=True):
        alone = merge_weights(
            "ties",
            {name: base[name] for name in names},
            {task: {name: weights[name] for name in names} for task, weights in experts.items()},
            density=density,
        )
        assert_same({name: got[name] for name in names}, alone)


def test_disjoint_experts_add_up() -> None:
    base, experts = vectors([1.0, 0.0, -3.0, 0.0], [0.0, -2.0, 0.0, 5.0])
    expected = merge_weights("task_arithmetic", base, experts, scale=1.0)
    assert_same(merge_weights("medusa", base, experts), expected)


def test_medusa_is_ties_of_each_tensor_without_trimming() -> None:
    base, experts = family(4)
    assert_same(merge_weights("medusa", base, experts), merge_weights("ties_tensor", base, experts, trim="none"))


def test_the_whole_model_is_never_joined() -> None:
    from mergectl.merging import Recipe, merge_stream

    reads: list[str] = []

    class Lazy(dict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            reads.append(name)
            return super().__getitem__(name)

    base, experts = family(2)
    stream = iter(merge_stream(Recipe("task_arithmetic"), Lazy(base), {t: Lazy(w) for t, w in experts.items()}))
    reads.clear()
    first = next(stream)
    assert set(reads) == {first.name}
