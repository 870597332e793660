"""Merged weights against those of the papers' own programs; each folder's manifest says where its numbers come from."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mergectl import merge_weights
from mergectl.merging import MergeWarning

HERE = Path(__file__).parent
Weights = dict[str, torch.Tensor]
COMBINE = {"dis-mean": "disjoint_mean", "dis-sum": "disjoint_sum", "dis-max": "disjoint_max"}
RESET = {"topk": "topk", "std": "std", "nf": "energy", "none": "none"}
METHODS = {"dare-ties": "dare_ties", "dare-sum": "dare_average", "dare-ta": "dare_task_arithmetic"}


@cache
def manifest(folder: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((HERE / folder / "manifest.json").read_text())
    return data


@cache
def tensors(folder: str, file: str) -> Weights:
    return dict(load_file(HERE / folder / file))


def part(weights: Weights, prefix: str) -> Weights:
    return {name[len(prefix) + 1 :]: x for name, x in weights.items() if name.startswith(prefix + ".")}


def family(weights: Weights, count: int) -> tuple[Weights, dict[str, Weights]]:
    return part(weights, "base"), {f"expert{i}": part(weights, f"expert{i}") for i in range(count)}


def assert_golden(got: Any, expected: Weights, atol: float, rtol: float = 0.0) -> None:
    assert expected
    for name, x in expected.items():
        torch.testing.assert_close(got[name].float(), x.float(), atol=atol, rtol=rtol, msg=f"{name} differs")


def cases(folder: str) -> list[Any]:
    return [pytest.param(case, id=case["id"]) for case in manifest(folder)["cases"]]


def ties_settings(given: dict[str, Any]) -> dict[str, Any]:
    """Translate the legacy words of a whole-model TIES case."""
    found = {"trim": RESET[given["reset"]], "combine": COMBINE.get(given["aggregate"], given["aggregate"])}
    found |= {"elect": given.get("elect", "mass"), "scale": given["lambda"]}
    if given["reset"] == "topk":
        return found | {"density": given["threshold"] / 100 if given["threshold"] > 1 else given["threshold"]}
    return found | ({} if given["reset"] == "none" else {"threshold": given["threshold"], "compat": True})


def translate(case: dict[str, Any], base: Weights, experts: dict[str, Weights], data: Weights) -> dict[str, Any]:
    """Return the arguments of `merge_weights` for a case of ties_dare."""
    kind, given = case["method"], case["params"]
    if kind == "ties-global":
        return {"method": "ties", **ties_settings(given)}
    if kind == "ties-oracle-sign":
        names = sorted(base)
        flat = torch.split(data["aux.oracle_sign_vector"], [base[name].numel() for name in names])
        signs = {name: signs.reshape(base[name].shape) for name, signs in zip(names, flat, strict=True)}
        return {"method": "ties", **ties_settings(given), "supplies": {"signs": signs}}
    if kind == "ties-per-tensor":
        return {"method": "ties_tensor", "density": given["density_percent"] / 100, "scale": given["lambda"]}
    if kind == "task-arithmetic":
        return {"method": "task_arithmetic", "scale": given["lambda"]}
    if kind in ("average", "basic"):
        return {"method": "average", "combine": given.get("aggregate", "mean")}
    masks = {task: part(data, f"mask.{task}") for task in experts}
    return {"method": METHODS[kind], "drop": given["drop_percent"] / 100, "supplies": {"masks": masks}}


@pytest.mark.parametrize("case", cases("ties_dare"))
def test_averages_ties_and_dare_are_those_of_the_references(case: dict[str, Any]) -> None:
    inputs = manifest("ties_dare")["inputs"][case["inputs"]]
    count = case["params"].get("num_experts_used", inputs["num_experts"])
    base, experts = family(tensors("ties_dare", inputs["file"]), count)
    data = tensors("ties_dare", case["file"])
    got = merge_weights(base=base, experts=experts, **translate(case, base, experts, data))
    assert_golden(got, part(data, "expected"), case["atol"], case["rtol"])


@pytest.mark.parametrize("case", [case for case in cases("ties_dare") if "kept_per_expert" in case.values[0]])
def test_as_many_entries_are_kept_as_in_the_reference(case: dict[str, Any]) -> None:
    inputs = manifest("ties_dare")["inputs"][case["inputs"]]
    base, experts = family(tensors("ties_dare", inputs["file"]), inputs["num_experts"])
    given = ties_settings(case["params"]) | {"elect": "none", "combine": "sum", "scale": 1.0}
    kept = [merge_weights("ties", base, {task: expert}, **given) for task, expert in experts.items()]
    counts = [sum(int((x != base[name]).sum()) for name, x in got.items()) for got in kept]
    assert counts == case["kept_per_expert"]


@pytest.mark.parametrize("case", cases("medusa"))
def test_elected_means_are_those_of_the_reference(case: dict[str, Any]) -> None:
    base, experts = family(tensors("medusa", "inputs_prepass.safetensors"), case["params"]["num_experts_used"])
    got = merge_weights("medusa", base, experts)
    assert_golden(got, part(tensors("medusa", case["file"]), "expected"), case["atol"], case["rtol"])


def emr_case(name: str) -> tuple[dict[str, Any], Weights, Weights, dict[str, Weights]]:
    case = manifest("emr")["cases"][name]
    return case, tensors("emr", case["file"]), *family(tensors("emr", manifest("emr")["inputs"]), 3)


def pave_ties(given: dict[str, Any]) -> dict[str, Any]:
    return {"density": 1 - given["param_value_mask_rate"], "scale": given["scaling_coefficient"], "round_up": True}


@pytest.mark.parametrize("name", ["ta_0.3", "ta_1.0", "ties_1.0_0.8", "ties_0.5_0.9", "average"])
def test_companions_of_emr_are_those_of_the_reference_whatever_the_heads(name: str) -> None:
    case, data, base, experts = emr_case(name)
    given: dict[str, Any] = {}
    if case["method"] == "task_arithmetic":
        given = {"scale": case["scaling_coefficient"]}
    elif case["method"] == "ties":
        given = pave_ties(case)
    got = merge_weights(case["method"], base, experts, **given)
    assert_golden(got, part(data, "expected"), 1e-6)
    assert not any(key.startswith("classifier") for key in got)
    assert_golden(got.task("expert2"), {k: x for k, x in experts["expert2"].items() if k.startswith("classifier")}, 0)


@pytest.mark.parametrize("name", ["dare_0.5_rescale", "dare_0.9_rescale", "dare_0.5_droponly"])
def test_dare_before_other_methods_is_that_of_the_reference(name: str) -> None:
    case, data, base, experts = emr_case(name)
    masks = {task: {key: 1 - x for key, x in part(data, f"dropmask.{task}").items()} for task in experts}
    refine = [("dare", {"drop": case["weight_mask_rate"], "rescale": case["use_weight_rescale"]})]
    for method, words in case["then"].items():
        given = pave_ties(words) if method == "ties" else {"scale": words["scaling_coefficient"]}
        got = merge_weights(method, base, experts, refine=refine, supplies={"masks": masks}, **given)
        assert_golden(got, part(data, f"expected.{method}"), 1e-6)


def test_magnitude_pruning_is_that_of_the_reference() -> None:
    _, data, base, experts = emr_case("magnitude_0.5")
    got = merge_weights(
        "average", base, {"expert0": experts["expert0"]}, refine="dare:drop=0.5,rescale=no,strategy=magnitude"
    )
    assert_golden(got, part(data, "expected.expert0"), 1e-6)


def test_emr_is_that_of_the_reference() -> None:
    case, data, base, experts = emr_case("emr")
    got = merge_weights("emr", base, experts)
    assert_golden(got.kept["unified"], part(data, "expected.unified"), 1e-6)
    assert list(got.kept["rescalers"].values()) == pytest.approx(case["rescalers"], rel=1e-5)
    assert got.kept["unified"].keys() == part(data, "expected.unified").keys()
    for task in experts:
        assert_golden(got.kept["masks"][task], part(data, f"expected.mask.{task}"), 0)
        assert_golden(got.task(task), part(data, f"expected.model.{task}"), 1e-6)
    paper = merge_weights("emr", base, experts, rescaler="global_sum")
    assert list(paper.kept["rescalers"].values()) == pytest.approx(case["rescalers_global_sum"], rel=1e-6)


EDGES = ["zero_sum_signs", "all_zero_expert", "outvoted_expert", "single_expert", "ties_magnitude_ties"]


@pytest.mark.filterwarnings("ignore::mergectl.MergeWarning")
@pytest.mark.parametrize("name", EDGES)
def test_edge_cases_of_emr_are_those_of_the_reference_and_finite(name: str) -> None:
    case = manifest("emr")["edge_cases"][name]
    data = tensors("emr", case["file"])
    base, experts = family(data, len(case["reference_rescalers"]))
    got = merge_weights("emr", base, experts)
    assert_golden(got.kept["unified"], part(data, "expected.emr.unified"), 1e-7)
    for task in experts:
        assert_golden(got.kept["masks"][task], part(data, f"expected.emr.mask.{task}"), 0)
        assert all(bool(x.isfinite().all()) for x in got.task(task).values())
    expected = [rescaler if rescaler > 0 else 1.0 for rescaler in data["expected.emr.rescalers"].tolist()]
    assert list(got.kept["rescalers"].values()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.filterwarnings("ignore::mergectl.MergeWarning")
@pytest.mark.parametrize("round_up", [False, True])
@pytest.mark.parametrize("name", [name for name in EDGES if name != "single_expert"])
def test_edge_cases_of_ties_are_those_of_the_reference(name: str, round_up: bool) -> None:
    case = manifest("emr")["edge_cases"][name]
    data = tensors("emr", case["file"])
    base, experts = family(data, len(case["reference_rescalers"]))
    got = merge_weights("ties", base, experts, **pave_ties(case["ties"]) | {"round_up": round_up})
    assert_golden(got, part(data, "expected.ties"), 1e-7)


def test_warnings_name_the_odd_expert() -> None:
    for name, words in (("all_zero_expert", "equals the base"), ("outvoted_expert", "outvoted everywhere")):
        data = tensors("emr", manifest("emr")["edge_cases"][name]["file"])
        with pytest.warns(MergeWarning, match=f"'expert1' .*{words}|'expert1' is {words}"):
            merge_weights("emr", *family(data, 2))
