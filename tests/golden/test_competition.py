"""PCB-Merging against the paper's own programs; the folder's manifest says where each number comes from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mergectl import merge_weights
from mergectl.methods import _competition, pcb
from mergectl.methods._task_vectors import TaskVectors
from tests.golden.test_golden import Weights, cases, family, manifest, part, tensors

CASES = [case for case in cases("pcb") if case.values[0]["inputs"]]
COUNTED = [case for case in CASES if "nonzero_scale_per_expert" in case.values[0] and not case.id.startswith("t5tied")]


def settings_of(case: dict[str, Any]) -> dict[str, Any]:
    given = {name: case["params"][name] for name in ("variant", "ratio", "winsor")}
    return given | {"scale": case["params"].get("task_lambdas", case["params"].get("lambda"))}


def inputs_of(case: dict[str, Any]) -> tuple[Weights, dict[str, Weights]]:
    inputs = manifest("pcb")["inputs"][case["inputs"]]
    return family(tensors("pcb", inputs["file"]), inputs["num_experts"])


def share_that_differs(got: Any, expected: Weights, atol: float, rtol: float) -> float:
    wrong = sum(int(((got[n].float() - x).abs() > atol + rtol * x.abs()).sum()) for n, x in expected.items())
    return wrong / sum(x.numel() for x in expected.values())


@pytest.mark.filterwarnings("ignore:The expert 'expert1' equals the base")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("how", ["given", "default"])
def test_pcb_is_that_of_the_reference(case: dict[str, Any], how: str) -> None:
    base, experts = inputs_of(case)
    expected = part(tensors("pcb", case["file"]), "expected")
    given, supplies = settings_of(case), {}
    if how == "default":
        del given["winsor"]  # every case has its variant's own share
    if "tied" in case["id"]:
        for weights in (base, *experts.values(), expected):
            assert torch.equal(weights.pop("lm_head.weight"), weights["shared.weight"])
        given["count_tied"] = "each" if case["id"].endswith("twice") else "once"
        supplies = {"copies": {"shared.weight": 2}}
    got = merge_weights("pcb", base, experts, supplies=supplies, **given)
    assert set(got) == set(expected)
    assert share_that_differs(got, expected, case["atol"], case["rtol"]) <= case.get("max_mismatch_fraction", 0)


@pytest.mark.parametrize("case", [case for case in CASES if case.id.startswith("t5tied")])
def test_a_tied_weight_given_under_both_names_is_counted_as_asked(case: dict[str, Any]) -> None:
    base, experts = inputs_of(case)
    expected = part(tensors("pcb", case["file"]), "expected")
    for count, name in (("once", "once"), ("each", "twice")):
        got = merge_weights("pcb", base, experts, count_tied=count, **settings_of(case))
        same = share_that_differs(got, expected, case["atol"], case["rtol"]) == 0
        assert set(got) == set(expected) and same == case["id"].endswith(name)


def standing(case: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the winsorised task vectors and the shares of a case, the model in one row per expert."""
    base, experts = inputs_of(case)
    rows = [torch.cat([(expert[n] - base[n]).flatten() for n in sorted(base)]) for expert in experts.values()]
    x, given = torch.stack(rows), settings_of(case)
    vectors = TaskVectors(list(experts), {"all": x.shape[1:]}, {"all": x}.__getitem__)
    rules = _competition.Rules(given["winsor"], given["ratio"], premask=0.0)
    return pcb.VARIANTS[given["variant"]].compete(vectors, rules)(x)


@pytest.mark.parametrize("case", COUNTED)
def test_as_many_entries_win_as_in_the_reference(case: dict[str, Any]) -> None:
    _, shares = standing(case)
    assert [int((row > 0).sum()) for row in shares] == case["nonzero_scale_per_expert"]


def test_shares_and_winsorised_vectors_are_those_of_the_reference() -> None:
    (case,) = [case.values[0] for case in CASES if case.id == "ia3_nlp_r0.2_l1.0"]
    data = tensors("pcb", case["file"])
    values, shares = standing(case)
    torch.testing.assert_close(values, data["aux.winsorised_task_vectors"], atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(shares, data["aux.scale"], atol=2e-6, rtol=2e-5)


def test_helpers_are_those_of_the_reference() -> None:
    (case,) = [case.values[0] for case in cases("pcb") if case.id == "helpers"]
    data = tensors("pcb", case["file"])
    x = data["x"]
    ordered, count = x.sort(dim=1).values, x.shape[1]
    for low, high in case["params"]["clamps"]:
        lows = ordered[:, [count - _competition.winsor_ranks(low, count)[0]]]
        highs = ordered[:, [count - _competition.winsor_ranks(high, count)[1]]]
        torch.testing.assert_close(x.clamp(lows, highs), data[f"expected.clamp_{low}_{high}"], atol=1e-7, rtol=1e-6)
    got = _competition.normalised(x, ordered[:, 0].tolist(), ordered[:, -1].tolist())
    torch.testing.assert_close(got, data["expected.minmax_rows"], atol=1e-7, rtol=1e-6)
