"""Masked training: only owned elements move, whatever the optimiser; all others keep their bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import T5Config, T5ForConditionalGeneration

from mergectl.errors import UserError, WorkError
from mergectl.finetune import FinetuneConfig
from mergectl.masking import Guard, guard_for
from mergectl.models import quiet
from mergectl.ownership import save_masks
from tests import test_text2text as words
from tests import tiny_models as tiny
from tests.test_finetune import config, same_weights, stop_at, train
from tests.test_ownership import FACTS, file, golden, model, part

OWNED = part(file(golden("mask_soft_magnitude_mutual_mask_k80.0_n2")["file"]), "mask0")
OPTIMISERS: dict[str, Callable[..., Any]] = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, amsgrad=True),
}


def t5() -> Any:
    """The base of the golden files, as transformers' own model with a head of its own."""
    facts = FACTS["masked_run"]["model_config"]
    with quiet(), torch.random.fork_rng(devices=[]):
        net = T5ForConditionalGeneration(T5Config(**{k: v for k, v in facts.items() if k != "model_type"}))
    net.lm_head.weight = torch.nn.Parameter(torch.zeros_like(net.lm_head.weight))
    own = dict(net.named_parameters())
    assert sorted(own) == sorted(model("base"))
    with torch.no_grad():
        for name, weight in model("base").items():
            own[name].copy_(weight)
    return net


def guarded(net: Any, optimiser: Any) -> Guard:
    guard = Guard([(weight, OWNED[name].bool()) for name, weight in net.named_parameters()])
    guard.attach(optimiser)
    return guard


def same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.int32), two.contiguous().view(torch.int32))


def assert_unowned_kept(after: dict[str, torch.Tensor], before: dict[str, torch.Tensor], owned: Any) -> None:
    for name, weight in after.items():
        foreign = ~owned[name].bool()
        assert same_bits(weight[foreign], before[name][foreign]), name


def test_masked_adam_steps_are_those_of_the_reference() -> None:
    case, data = FACTS["masked_step"], file(FACTS["masked_step"]["file"])
    given = case["params"]
    expected = part(data, "expected")
    weights = {name: torch.nn.Parameter(model("base")[name].clone()) for name in expected}
    adam = torch.optim.Adam(weights.values(), lr=given["lr"], betas=tuple(given["betas"]), eps=given["eps"])
    Guard([(weight, OWNED[name].bool()) for name, weight in weights.items()]).attach(adam)
    for step in range(given["steps"]):
        for name, weight in weights.items():
            weight.grad = data[f"grad{step}.{name}"].clone()
        adam.step()
    for name, weight in weights.items():
        torch.testing.assert_close(weight.detach(), expected[name], atol=case["atol"], rtol=case["rtol"])
    assert_unowned_kept({n: w.detach() for n, w in weights.items()}, model("base"), OWNED)


def test_a_masked_training_ends_where_that_of_the_reference_does() -> None:
    """The reference divides each micro-batch's mean loss by the full number of micro-batches; so does this loop."""
    case, data, net = FACTS["masked_run"], file(FACTS["masked_run"]["file"]), t5()
    given = case["params"]
    adam = torch.optim.Adam(net.parameters(), lr=given["lr"])
    guarded(net, adam)
    rows = len(data["input_ids"])
    starts = range(0, rows, given["batch_size"])
    for _ in range(given["epochs"]):
        for place, start in enumerate(starts, 1):
            cut = slice(start, start + given["batch_size"])
            labels = data["labels"][cut].masked_fill(data["labels"][cut] == 0, -100)
            batch = {n: data[n][cut] for n in ("input_ids", "attention_mask", "decoder_attention_mask")}
            (net(**batch, labels=labels).loss / given["accumulation"]).backward()
            if place % given["accumulation"] == 0 or place == len(starts):
                adam.step()
                adam.zero_grad()
    after = {name: weight.detach() for name, weight in net.named_parameters()}
    wrong = total = 0
    for name, expected in part(data, "expected").items():
        close = torch.isclose(after[name], expected, atol=case["atol"], rtol=case["rtol"])
        wrong, total = wrong + int((~close).sum()), total + close.numel()
    assert wrong <= case["max_mismatch_fraction"] * total
    assert_unowned_kept(after, model("base"), OWNED)
    assert any(not torch.equal(after[name], model("base")[name]) for name in after)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_no_optimiser_moves_what_is_not_owned(name: str) -> None:
    chance = torch.Generator().manual_seed(0)
    weights = {n: torch.nn.Parameter(model("base")[n].clone()) for n in ("lm_head.weight", "shared.weight")}
    optimiser = OPTIMISERS[name](weights.values())
    Guard([(weight, OWNED[n].bool()) for n, weight in weights.items()]).attach(optimiser)
    for _ in range(4):
        for weight in weights.values():
            weight.grad = torch.randn(weight.shape, generator=chance)
        optimiser.step()
    after = {n: w.detach() for n, w in weights.items()}
    assert_unowned_kept(after, model("base"), OWNED)
    assert all((after[n] != model("base")[n])[OWNED[n].bool()].float().mean() > 0.99 for n in after)


def test_gradients_that_are_no_numbers_stay_outside() -> None:
    weight = torch.nn.Parameter(torch.tensor([-0.0, 2.0]))
    adam = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.1)
    Guard([(weight, torch.tensor([False, True]))]).attach(adam)
    weight.grad = torch.tensor([float("nan"), 1.0])
    adam.step()
    assert same_bits(weight.detach()[:1], torch.tensor([-0.0]))
    assert torch.isfinite(weight).all()


# Whole trainings


def random_masks(base: Path, path: Path, seed: int = 5) -> dict[str, torch.Tensor]:
    """Own each element of a base by the toss of a coin."""
    from mergectl.bits import pack_bits

    chance = torch.Generator().manual_seed(seed)
    weights = load_file(base / "model.safetensors")
    masks = {name: torch.rand(weight.shape, generator=chance) < 0.5 for name, weight in weights.items()}
    save_masks(path, {n: pack_bits(m) for n, m in masks.items()}, {n: tuple(m.shape) for n, m in masks.items()})
    return masks


def check_expert(out: Path, base: Path, masks: dict[str, torch.Tensor], prefix: str) -> None:
    """Everything not owned has the base's bits; something owned has not."""
    start, found = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    after = {name: found.get(f"{prefix}.{name}", found.get(name)) for name in start}
    present = {name: weight for name, weight in after.items() if weight is not None}
    assert len(present) > len(start) / 2
    assert_unowned_kept(present, start, masks)
    assert any(not torch.equal(weight, start[name]) for name, weight in present.items())


@pytest.mark.parametrize(
    ("family", "facts"),
    [
        *((family, {}) for family in tiny.FAMILIES),
        *((family, {"bf16": True}) for family in ("roberta", "deberta-v2", "vit")),
        *((family, {"accumulation": 3, "max_grad_norm": 0.0}) for family in ("bert", "gpt2")),
        *((family, {"order": "sequential"}) for family in ("bert", "vit")),
    ],
)
def test_any_architecture_trains_only_what_it_owns(family: str, facts: dict[str, Any], tmp_path: Path) -> None:
    base = tiny.base(tmp_path / "base", family)
    masks = random_masks(base, tmp_path / "masks")
    settings = config(base, epochs=1, weight_decay=0.1, masks=str(tmp_path / "masks"), **facts)
    train(settings, tmp_path / "out", tiny.task_for(family))
    prefix = {"gpt2": "transformer", "deberta-v2": "deberta"}.get(family, family)
    check_expert(tmp_path / "out", base, masks, prefix)


@pytest.mark.parametrize("kind", words.KINDS)
def test_a_model_that_writes_trains_only_what_it_owns(kind: str, tmp_path: Path) -> None:
    base = words.base(tmp_path / "base", kind)
    masks = random_masks(base, tmp_path / "masks")
    settings = words.settings(base, weight_decay=0.1, masks=str(tmp_path / "masks"))
    train(settings, tmp_path / "out", words.MOOD)
    check_expert(tmp_path / "out", base, masks, "none")


@pytest.mark.slow
@pytest.mark.parametrize("facts", [{}, {"bf16": True, "batch_size": 8, "accumulation": 2}], ids=["plain", "all"])
def test_an_interrupted_masked_training_ends_as_if_it_had_not_been(facts: dict[str, Any], tmp_path: Path) -> None:
    base = tiny.base(tmp_path / "base", "bert")
    masks = random_masks(base, tmp_path / "masks")
    settings = config(base, weight_decay=0.1, masks=str(tmp_path / "masks"), **facts)
    train(settings, tmp_path / "straight", tiny.MOOD)
    for step in (8, 15):
        with pytest.raises(KeyboardInterrupt):
            train(settings, tmp_path / "out", tiny.MOOD, progress=stop_at(step))
    assert train(settings, tmp_path / "out", tiny.MOOD)["resumed"]
    assert same_weights(tmp_path / "straight", tmp_path / "out")
    check_expert(tmp_path / "out", base, masks, "bert")


def test_other_masks_in_the_same_place_begin_another_training(tmp_path: Path) -> None:
    base = tiny.base(tmp_path / "base", "bert")
    settings = config(base, masks=str(tmp_path / "masks"))
    random_masks(base, tmp_path / "masks")
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "out", tiny.MOOD, progress=stop_at(8))
    random_masks(base, tmp_path / "masks", seed=6)
    assert not train(settings, tmp_path / "out", tiny.MOOD)["resumed"]


def test_masks_of_another_model_are_refused(tmp_path: Path) -> None:
    random_masks(tiny.base(tmp_path / "other", "gpt2"), tmp_path / "masks")
    base = tiny.base(tmp_path / "base", "bert")
    with pytest.raises(WorkError, match="are of another model"):
        train(config(base, masks=str(tmp_path / "masks")), tmp_path / "out", tiny.MOOD)


def test_gradients_are_cut_to_length_by_what_is_owned_alone() -> None:
    """Foreign gradients, however long, do not shorten one's own."""
    net = t5()
    guard = guarded(net, torch.optim.SGD(net.parameters(), lr=1.0))
    for name, weight in net.named_parameters():
        weight.grad = torch.where(OWNED[name].bool(), 1e-4, 1e6)
    guard.zero_gradients()
    own = sum(int(mask.sum()) for mask in OWNED.values())
    length = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    assert float(length) == pytest.approx(1e-4 * own**0.5, rel=1e-4)


def test_the_trainer_cuts_gradients_after_masking(tmp_path: Path) -> None:
    """One step of plain descent is no longer than the limit, and owned elements use all of it."""
    base = tiny.base(tmp_path / "base", "deberta-v2")
    random_masks(base, tmp_path / "masks")
    lengths: list[float] = []
    original = torch.nn.utils.clip_grad_norm_

    def measured(parameters: Any, limit: Any, *args: Any, **kwargs: Any) -> Any:
        some = list(parameters)
        lengths.append(sum(int((p.grad == 0).sum()) for p in some) / sum(p.numel() for p in some))
        return original(some, limit, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", measured)
        train(config(base, max_steps=1, masks=str(tmp_path / "masks")), tmp_path / "out", tiny.MOOD)
    assert lengths and lengths[0] > 0.3  # half of the gradient is zero by the time it is measured


# Order, dropout, limits


def test_rows_may_come_in_their_own_order(tmp_path: Path) -> None:
    from mergectl.training import _sampler

    settings = FinetuneConfig(task="tiny", base="base", order="sequential")
    sampler = _sampler(settings, [{"labels": 0}] * 5, None)  # type: ignore[arg-type]
    assert sampler is not None
    assert list(sampler) == [0, 1, 2, 3, 4]
    base = tiny.base(tmp_path / "base", "bert")
    for name, facts in (("one", {"order": "sequential"}), ("same", {"order": "sequential"}), ("other", {})):
        train(config(base, epochs=1, **facts), tmp_path / name, tiny.MOOD)
    assert same_weights(tmp_path / "one", tmp_path / "same")
    assert not same_weights(tmp_path / "one", tmp_path / "other")


def test_an_order_by_length_is_none_of_the_datas(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="order=sequential has no meaning"):
        FinetuneConfig(task="tiny", base="base", order="sequential", by_length=True)


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
def test_dropout_is_off_in_training_but_stays_in_the_experts_configuration(family: str, tmp_path: Path) -> None:
    """Without dropout, the loss of the first step is that of the base whatever the batch is cut into."""
    base, task = tiny.base(tmp_path / "base", family), tiny.task_for(family)
    facts: dict[str, Any] = {"epochs": 1, "limit_fit": 16, "model_dropout": 0.0}
    one = train(config(base, **facts, batch_size=16), tmp_path / "one", task)
    two = train(config(base, **facts, batch_size=4, accumulation=4), tmp_path / "two", task)
    assert two["curve"][0]["loss"] == pytest.approx(one["curve"][0]["loss"], rel=1e-5)
    train(config(base, epochs=1, limit_fit=16), tmp_path / "plain", task)
    settings = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "plain")]
    assert settings[0] == settings[1]


@pytest.mark.parametrize("kind", words.KINDS)
def test_smaller_micro_batches_train_the_same_weights(kind: str, tmp_path: Path) -> None:
    """The loss is that of all target tokens of the effective batch, whose last one is short here."""
    base = words.base(tmp_path / "base", kind)
    facts: dict[str, Any] = {"limit_fit": 40, "lr": 1e-3, "epochs": 2, "max_grad_norm": 0.0}
    train(words.settings(base, **facts, batch_size=16), tmp_path / "one", words.MOOD)
    train(words.settings(base, **facts, batch_size=4, accumulation=4), tmp_path / "parts", words.MOOD)
    one, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "parts"))
    for name, weight in one.items():
        torch.testing.assert_close(parts[name], weight, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("peft", ["lora", "ia3"])
def test_adapters_may_be_masked_too(peft: str, tmp_path: Path) -> None:
    from mergectl.bits import pack_bits

    base = words.base(tmp_path / "base", "v1.1")
    plain = words.settings(base, peft=peft, lr=5e-2)
    train(plain, tmp_path / "plain", words.MOOD)
    trained = load_file(tmp_path / "plain" / "adapter" / "adapter_model.safetensors")
    masks = {name: torch.zeros(weight.shape, dtype=torch.bool) for name, weight in trained.items()}
    last = sorted(name for name in masks if "lora_B" in name or "ia3_l" in name)[-1]
    masks[last][0] = True
    save_masks(
        tmp_path / "masks", {n: pack_bits(m) for n, m in masks.items()}, {n: tuple(m.shape) for n, m in masks.items()}
    )
    train(words.settings(base, peft=peft, lr=5e-2, masks=str(tmp_path / "masks")), tmp_path / "out", words.MOOD)
    after = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    start = 1.0 if peft == "ia3" else 0.0  # IA3's vectors begin as ones, LoRA's second factors as zeros
    assert (after[last][0] != start).any()
    assert (after[last][1:] == start).all()
    assert all((after[n] == start).all() for n in after if n != last and "lora_A" not in n)


def test_a_guard_finds_every_weight_of_a_model_by_its_name_on_disk(tmp_path: Path) -> None:
    net = t5()
    from mergectl.bits import pack_bits

    bits = {name: pack_bits(mask.bool()) for name, mask in OWNED.items()}
    save_masks(tmp_path / "masks", bits, {name: tuple(mask.shape) for name, mask in OWNED.items()})
    guard = guard_for(net, tmp_path / "masks")
    for weight in net.parameters():
        weight.grad = torch.ones_like(weight)
    guard.zero_gradients()
    assert all(torch.equal(w.grad.bool(), OWNED[n].bool()) for n, w in net.named_parameters())
