"""AdaMerging and AdaRank learn what the reference programs learn; the manifests say where the numbers come from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.func import functional_call

from mergectl import merge_weights
from mergectl.merging import Merged
from mergectl.models import quiet

HERE = Path(__file__).parent
Weights = dict[str, torch.Tensor]
WORDS = {"ratio": "rank_ratio", "prior": "scale", "init": "scale", "mask_temp": "temperature"}
SAME = ("lr", "steps", "soft_mask", "clamp", "extend_clamp", "granularity")
CONFIGS = {"roberta": "RobertaConfig", "gpt2": "GPT2Config", "clip": "CLIPVisionConfig"}


@cache
def manifest(method: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((HERE / method / "manifest.json").read_text())
    return data


@cache
def inputs(arch: str) -> Weights:
    return dict(load_file(HERE / "adarank" / f"{arch}.inputs.safetensors"))


def part(weights: Weights, prefix: str) -> Weights:
    return {name[len(prefix) + 1 :]: x for name, x in weights.items() if name.startswith(prefix + ".")}


class Teacher:
    """The prediction entropy on the stored batches, and what happened at every step."""

    def __init__(self, arch: str, eps: float) -> None:
        self.model, self.data, self.eps, self.tasks = models(arch), inputs(arch), eps, 3
        self.heads = [part(self.data, f"head{k}") for k in range(self.tasks)]
        self.experts = {f"task{k}": part(self.data, f"expert{k}") for k in range(self.tasks)}
        self.losses: list[list[float]] = []
        self.seen: list[Any] = []

    def logits(self, weights: Mapping[str, torch.Tensor], step: int, k: int) -> torch.Tensor:
        batch = {
            name: x if x.is_floating_point() else x.long()
            for name, x in part(self.data, f"batch.step{step}.task{k}").items()
        }
        own = {n: x for n, x in self.experts[f"task{k}"].items() if n.startswith(("classifier.", "score."))}
        found = functional_call(self.model, {**weights, **own}, kwargs=batch, strict=False)
        if not self.heads[k]:
            logits: torch.Tensor = found.logits
            return logits
        features = found.image_embeds
        products: torch.Tensor = (features / features.norm(dim=-1, keepdim=True)) @ self.heads[k]["weight"].t()
        return products

    def __call__(self, weights: Mapping[str, torch.Tensor], step: int) -> torch.Tensor:
        found = []
        for k in range(self.tasks):
            log = self.logits(weights, step, k).log_softmax(dim=-1)
            found.append(-(log.exp() * ((log.exp() + self.eps).log() if self.eps else log)).sum(dim=-1).mean())
        self.losses.append([float(x.detach()) for x in found])
        return torch.stack(found).sum()

    def watch(self, learned: Any) -> None:
        self.seen.append((learned.coefficients, learned.logits, learned.state["first"] / (1 - 0.9)))


def settings(hyper: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the reference's words."""
    found = {WORDS[key]: value for key, value in hyper.items() if key in WORDS}
    found |= {key: hyper[key] for key in SAME if key in hyper}
    if "start" in hyper:
        found["start"] = hyper["start"].lower()
    return found | ({"parameters": "encoder"} if "parameters" in hyper else {})


@cache
def models(arch: str) -> Any:
    facts = manifest("adarank")["models"][arch]
    config = getattr(transformers, CONFIGS[arch])(**{k: v for k, v in facts.items() if k != "hf_class"})
    with quiet(), torch.random.fork_rng(devices=[]):
        return getattr(transformers, facts["hf_class"])(config).eval()


@cache
def whole(method: str, file: str) -> tuple[Merged, Teacher]:
    """Run a case to its end, once for all tests."""
    return run(method, next(case for case in manifest(method)["cases"] if case["file"] == file))


def run(method: str, case: Mapping[str, Any], **changes: Any) -> tuple[Merged, Teacher]:
    encoder_only = "parameters" in case["hyper"]  # that case comes from AdaRank's program with frozen masks
    teacher = Teacher(case["arch"], 1e-8 if method == "adamerging" and not encoder_only else 0.0)
    base = part(teacher.data, "base")
    supplies = {"entropy": teacher, "watch": teacher.watch}
    return merge_weights(method, base, teacher.experts, supplies=supplies, **settings(case["hyper"]) | changes), teacher


def cases(method: str) -> list[Any]:
    return [pytest.param(method, case, id=case["file"].removesuffix(".expected.safetensors"))
            for case in manifest(method)["cases"]]  # fmt: skip


def columns(learned: Mapping[str, torch.Tensor], case: Mapping[str, Any]) -> torch.Tensor:
    if "*" in learned:
        return learned["*"]
    return torch.stack([learned[name] for name in case["param_order"]], dim=1)


def comparable(case: Mapping[str, Any], data: Weights) -> torch.Tensor:
    """1 where a coefficient is more than rounding."""
    found = data["stable.coef"].bool().clone()
    for name in case["coef_columns_not_reproducible"]:
        found[..., case["param_order"].index(name)] = False
    return found


@pytest.mark.filterwarnings("ignore:masks cannot change")
@pytest.mark.parametrize(("method", "case"), cases("adarank") + cases("adamerging"))
def test_what_is_learned_is_what_the_reference_learned(method: str, case: dict[str, Any]) -> None:
    data, lr = load_file(HERE / method / case["file"]), case["hyper"]["lr"]
    got, teacher = whole(method, case["file"])
    atol = 2e-5 if method == "adarank" else 1e-5
    torch.testing.assert_close(torch.tensor(teacher.losses), data["expected.loss"], atol=atol, rtol=0)
    coefficients, logits, _ = teacher.seen[-1]
    kept = comparable(case, data)
    found = columns(coefficients, case)
    torch.testing.assert_close(found[kept], data["expected.coef"][kept], atol=0.01 * lr, rtol=0)
    for name, expected in part(data, "expected.mask_logit").items():
        stable = data[f"stable.mask_logit.{name}"].bool()
        assert torch.equal(logits[name] > 0, expected > 0), name
        torch.testing.assert_close(logits[name][stable], expected[stable], atol=0.02 * lr, rtol=0)
    skip = case["coef_columns_not_reproducible"]
    for name, expected in part(data, "expected.merged_final").items():
        if name not in skip:
            torch.testing.assert_close(got[name], expected, atol=5e-5 if method == "adarank" else 1e-5, rtol=0)
    for k in range(teacher.tasks):
        with torch.no_grad():
            now = teacher.logits(dict(got), 0, k)
        torch.testing.assert_close(now, data[f"expected.logits_final.task{k}"], atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:masks cannot change")
@pytest.mark.parametrize(("method", "case"), cases("adarank") + cases("adamerging"))
def test_the_first_step_and_its_gradient_are_those_of_the_reference(method: str, case: dict[str, Any]) -> None:
    data, lr = load_file(HERE / method / case["file"]), case["hyper"]["lr"]
    _, teacher = whole(method, case["file"])
    coefficients, logits, gradient = teacher.seen[0]
    expected = data.get("expected.grad_coef_step1", data.get("expected.grad_step1"))
    assert expected is not None
    kept, size = comparable(case, data), expected.numel()
    order = list(coefficients)  # ours is that of the weights
    found = dict(zip(order, gradient[:size].view(len(expected), -1).unbind(1), strict=True))
    own = columns(found, case)
    torch.testing.assert_close(own, expected, atol=1e-6, rtol=1e-3)
    got = columns(coefficients, case)
    torch.testing.assert_close(got[kept], data["expected.coef_step1"][kept], atol=0.01 * lr, rtol=0)
    place = size
    for name, now in logits.items():
        own = gradient[place : place + now.numel()].view(now.shape)
        place += now.numel()
        if f"expected.grad_mask_step1.{name}" in data:
            torch.testing.assert_close(own, data[f"expected.grad_mask_step1.{name}"], atol=1e-6, rtol=1e-3)
            stable = data[f"stable.mask_logit.{name}"].bool()
            torch.testing.assert_close(
                now[stable], data[f"expected.mask_logit_step1.{name}"][stable], atol=0.02 * lr, rtol=0
            )


@pytest.mark.parametrize(("method", "case"), cases("adarank"))
def test_before_any_step_the_weights_are_those_of_the_reference(method: str, case: dict[str, Any]) -> None:
    data = load_file(HERE / method / case["file"])
    got, teacher = run(method, case, steps=0)
    _, logits, _ = teacher.seen[-1]
    assert sum(int((x > 0).sum()) for x in logits.values()) == case["kept_components_init"]
    assert sorted(logits) == sorted(case["svd_params"])
    for name, expected in part(data, "expected.merged_init").items():
        torch.testing.assert_close(got[name], expected, atol=1e-5, rtol=0)
