"""Calibration, RegMean and Fisher merging against the numbers of the public programs; the manifests say which."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from mergectl import merge_weights
from mergectl.calibration import Capture, Moments, moments_of
from mergectl.calibration_fishers import fishers_of
from mergectl.models import quiet
from tests.golden.test_golden import Weights, assert_golden, family, manifest, part, tensors

Batches = list[dict[str, torch.Tensor]]
SETS = manifest("moments")["sets"]
PAVE = [(name, task) for name, found in manifest("pave")["sets"].items() for task in range(found["num_experts"])]


def live(architecture: str, config: dict[str, Any], labels: int, weights: Weights) -> Any:
    """The expert as a model that computes."""
    import transformers

    kind = getattr(transformers, architecture)
    with quiet(), torch.random.fork_rng(devices=[]):
        model = kind(kind.config_class(**config, num_labels=labels))
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    return model.eval()


def cut(fields: Weights, size: int, count: int) -> Batches:
    return [{name: x[start : start + size] for name, x in fields.items()} for start in range(0, count, size)]


def batches_of(name: str, task: int, data: Weights) -> Batches:
    if name == "emr":
        return cut(part(data, f"calib.expert{task}"), SETS[name]["batch_size"], SETS[name]["examples"])
    steps = sorted({key.split(".")[1] for key in data if key.startswith("batch.")})
    return [{key: x.long() for key, x in part(data, f"batch.{step}.task{task}").items()} for step in steps]


@cache
def calibrated(name: str, method: str) -> tuple[Weights, dict[str, Weights], dict[str, Any]]:
    """Base, experts, and what the reference knows of them: padding counted, gradients summed over a batch."""
    found = SETS[name]
    data = tensors("moments", found["inputs"])
    if found["beside"]:
        data = {**data, **tensors("moments", found["beside"])}
    base, experts = family(data, len(found["num_labels"]))
    known: dict[str, Any] = {}
    for task, (expert, labels) in enumerate(zip(experts, found["num_labels"], strict=True)):
        model = live("RobertaForSequenceClassification", found["config"], labels, experts[expert])
        batches = batches_of(name, task, data)
        if method == "fisher":
            known[expert], _ = fishers_of(model, batches, "batch_sum")
        else:
            known[expert] = moments_of(model, batches, Capture(10**9, include_padding=True)).grams
    return base, experts, {"fishers" if method == "fisher" else "grams": known}


@pytest.mark.parametrize("case", manifest("moments")["cases"], ids=lambda case: case["id"])
def test_regmean_and_fisher_are_those_of_the_reference(case: dict[str, Any]) -> None:
    base, experts, supplies = calibrated(case["set"], case["method"])
    got = merge_weights(case["method"], base, experts, supplies=supplies, **case["settings"])
    assert_golden(got, part(tensors("moments", case["file"]), SETS[case["set"]]["expected"].rstrip(".")), case["atol"])


def moments_for(name: str, task: int, capture: Capture) -> Moments:
    found = manifest("pave")["sets"][name]
    data, given = tensors("pave", found["inputs"]), found["calibration"][f"expert{task}"]
    model = live(found["architecture"], found["config"], found["num_labels"][task], part(data, f"expert{task}"))
    fields = part(data, f"calib.expert{task}")
    return moments_of(model, cut(fields, given["bs"], len(fields["input_ids"])), capture)


def rows_asked(name: str, task: int) -> int:
    number: int = manifest("pave")["sets"][name]["calibration"][f"expert{task}"]["num"]
    return number


@pytest.mark.parametrize(("name", "task"), PAVE)
def test_in_parity_mode_moments_are_those_of_the_reference(name: str, task: int) -> None:
    found = manifest("pave")["sets"][name]
    expected = part(tensors("pave", found["inputs"]), f"cov.expert{task}")
    got = moments_for(name, task, Capture(rows_asked(name, task), include_padding=True, divisor="requested"))
    assert_golden({key: got.grams[f"{key}.weight"].moment for key in expected}, expected, 1e-4)
    rows = found["covariance"]["rows_used"][f"expert{task}"]
    assert {key: got.grams[f"{key}.weight"].rows for key in rows} == rows


@pytest.mark.parametrize("task", range(3))
def test_by_default_padding_is_left_out_and_the_divisor_is_the_rows_there_are(task: int) -> None:
    expected = part(tensors("pave", "roberta3.cov_default.safetensors"), f"cov_default.expert{task}")
    got = moments_for("roberta3", task, Capture(rows_asked("roberta3", task)))
    assert_golden({key: got.grams[f"{key}.weight"].moment for key in expected}, expected, 1e-4)
