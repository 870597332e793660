"""Purified task vectors against those of the paper's own program; pave/manifest.json says where they come from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mergectl import merge_weights, settings
from mergectl.methods import _spectral, pave
from mergectl.methods._task_vectors import TaskVectors
from tests.golden.test_golden import Weights, assert_golden, family, manifest, part, tensors

CASES = [(arch, name) for arch, given in manifest("pave")["sets"].items() for name in given["cases"]]
Grams = dict[str, Weights]


def case_of(arch: str, name: str) -> tuple[dict[str, Any], Weights, dict[str, Weights], Grams]:
    """The case, base, experts, and the moments by the names of the weights."""
    found = manifest("pave")["sets"][arch]
    data = tensors("pave", found["inputs"])
    base, experts = family(data, found["num_experts"])
    grams = {task: {f"{layer}.weight": x for layer, x in part(data, f"cov.{task}").items()} for task in experts}
    return found["cases"][name], base, experts, grams


def of_kinds(*kinds: str) -> pytest.MarkDecorator:
    chosen = [(arch, n) for arch, n in CASES if manifest("pave")["sets"][arch]["cases"][n]["kind"] in kinds]
    return pytest.mark.parametrize(("arch", "name"), chosen)


def settings_of(case: dict[str, Any], tasks: list[str]) -> dict[str, Any]:
    """Translate a case: `rank_scale` begins with the base's share; without a target a case has its own per task."""
    if case["kind"] == "purify":
        return {"allocation": "none", "rank_scale": case["rank_scale"], "basis": case.get("basis", "co_svd")}
    if case["kind"] == "pave_ta":
        return {"allocation": "none", "rank_scale": case["rank_scale"][1:]}
    chosen = case.get("ids", case.get("allocated_experts"))
    found = {"allocation": case.get("mode", "collapsed"), "participants": chosen and [tasks[i] for i in chosen]}
    return found | {"rank_scale": case["rank_ratio"] if "rank_ratio" in case else case["rank_scale"][1]}


def vectors_of(base: Weights, experts: dict[str, Weights]) -> TaskVectors:
    names = [key for key in base if all(key in x and x[key].shape == base[key].shape for x in experts.values())]

    def read(key: str) -> torch.Tensor:
        return torch.stack([expert[key] - base[key] for expert in experts.values()])

    return TaskVectors(list(experts), {key: tuple(base[key].shape) for key in names}, read)


@of_kinds("purify", "purify_alloc")
def test_purified_vectors_are_those_of_the_reference(arch: str, name: str) -> None:
    case, base, experts, grams = case_of(arch, name)
    data, vectors = tensors("pave", case["file"]), vectors_of(base, experts)
    defaults = {key: setting.default for key, setting in settings.settings_of("pave").items()}
    found = pave.refine(vectors, base, grams, **{**defaults, **settings_of(case, list(experts))})
    for place, task in enumerate(experts):
        if expected := part(data, f"expected.{task}"):
            assert_golden({key: found[key][place] for key in expected}, expected, case["suggested_atol"])


@of_kinds("purify")
def test_one_purified_expert_is_that_of_the_reference(arch: str, name: str) -> None:
    case, base, experts, grams = case_of(arch, name)
    refine, data = [("pave", settings_of(case, list(experts)))], tensors("pave", case["file"])
    for task in [task for task in experts if part(data, f"expected.{task}")]:
        supplies = {"grams": {task: grams[task]}}
        got = merge_weights("average", base, {task: experts[task]}, refine=refine, supplies=supplies)
        expected = {key: base[key] + x for key, x in part(data, f"expected.{task}").items() if key in got}
        assert_golden(got, expected, case["suggested_atol"])


def spectral(case: dict[str, Any], base: Weights, experts: dict[str, Weights], grams: Grams) -> pave.Pruning:
    """What a spectral allocation of this case starts from."""
    found = settings_of(case, list(experts))
    shares, tasks = [found["rank_scale"]] * len(experts), found["participants"] or list(experts)
    memory = _spectral.remembering(None)
    return pave.Pruning(
        vectors_of(base, experts), base, grams, None, None, memory, shares, tasks, 0.1, False, "co_svd"
    )  # fmt: skip


@of_kinds("allocate", "purify_alloc")
def test_allocated_ranks_and_shares_are_exactly_those_of_the_reference(arch: str, name: str) -> None:
    case, base, experts, grams = case_of(arch, name)
    p = spectral(case, base, experts, grams)
    ranks = {key: pave.per_layer(p)(key, p.task_vectors[key]) for key in p.layers()}
    for number, expected in enumerate(case["expected_layer_ranks"]):
        assert {key: ranks[f"{key}.weight"].get(number, case["full_rank"][key]) for key in expected} == expected
    assert pave.collapsed_shares(p) == case["expected_collapsed_ratio"]


@of_kinds("pave_ta", "pave_ties")
def test_merges_of_purified_vectors_are_those_of_the_reference(arch: str, name: str) -> None:
    case, base, experts, grams = case_of(arch, name)
    given = settings_of(case, list(experts)) | {"scale": case["scaling"]}
    if case["kind"] == "pave_ties":
        given["density"] = 1 - case["mask_rate"]
    got = merge_weights(case["kind"], base, experts, supplies={"grams": grams}, **given)
    assert_golden(got, part(tensors("pave", case["file"]), "expected"), case["suggested_atol"])
    assert not any(key.startswith("classifier") for key in got)


@of_kinds("pave_emr")
def test_emr_of_purified_vectors_is_that_of_the_reference(arch: str, name: str) -> None:
    case, base, experts, grams = case_of(arch, name)
    data, given = tensors("pave", case["file"]), settings_of(case, list(experts))
    got = merge_weights("pave_emr", base, experts, supplies={"grams": grams}, **given)
    unified = part(data, "expected.unified")
    assert_golden(got.kept["unified"], unified, case["suggested_atol"])
    assert got.kept["unified"].keys() == unified.keys()
    rescalers = torch.tensor(list(got.kept["rescalers"].values()))
    expected = data["expected.rescalers"].float()
    torch.testing.assert_close(rescalers, expected, atol=case["suggested_rescaler_atol"], rtol=0)
    for task in experts:
        pairs = [(got.kept["masks"][task][key], x != 0) for key, x in part(data, f"expected.mask.{task}").items()]
        differing = sum(int((ours != theirs).sum()) for ours, theirs in pairs)
        assert differing <= case["suggested_max_mask_mismatch_fraction"] * sum(x.numel() for x, _ in pairs)


def test_every_case_of_the_reference_is_looked_at() -> None:
    kinds = {given["cases"][name]["kind"] for given in manifest("pave")["sets"].values() for name in given["cases"]}
    assert kinds == {"purify", "purify_alloc", "allocate", "pave_ta", "pave_ties", "pave_emr"}
