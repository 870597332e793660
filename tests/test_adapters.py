"""Adapters made by peft open as the full models that peft itself makes of them."""

from __future__ import annotations

import copy
import json
import math
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergectl.adapters import AdapterCheckpoint
from mergectl.checkpoints import open_checkpoint
from mergectl.errors import UserError
from mergectl.models import quiet
from tests import tiny_models as tiny
from tests.conftest import Cli

Capture = pytest.CaptureFixture[str]

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["query", "value"]}
IA3: dict[str, Any] = {"target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]}
TURNED: dict[str, Any] = {**LORA, "target_modules": ["c_attn"], "fan_in_fan_out": True}  # GPT-2's Conv1D
TURNED_IA3: dict[str, Any] = {
    "target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"], "fan_in_fan_out": True,
}  # fmt: skip
PATTERNS = {"alpha_pattern": {"layer.1.attention.self.query": 16, "value": 2}, "rank_pattern": {"value": 2}}
EMBEDDINGS = {"target_modules": ["word_embeddings", "query"]}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora": ("bert", "lora", LORA),
    "rslora": ("bert", "lora", {**LORA, "use_rslora": True}),
    "patterns": ("bert", "lora", {**LORA, **PATTERNS}),
    "rslora with patterns": ("bert", "lora", {**LORA, **PATTERNS, "use_rslora": True}),
    "dora": ("bert", "lora", {**LORA, "use_dora": True}),
    "trained biases": ("bert", "lora", {**LORA, "bias": "all"}),
    "biases of adapted layers": ("bert", "lora", {**LORA, "bias": "lora_only"}),
    "bias in the adapter": ("bert", "lora", {**LORA, "lora_bias": True}),
    "embeddings": ("bert", "lora", {**LORA, **EMBEDDINGS}),
    "embeddings with dora": ("bert", "lora", {**LORA, **EMBEDDINGS, "use_dora": True}),
    "ia3": ("bert", "ia3", IA3),
    "roberta": ("roberta", "lora", LORA),
    "gpt2": ("gpt2", "lora", TURNED),
    "gpt2 with rslora": ("gpt2", "lora", {**TURNED, "use_rslora": True}),
    "gpt2 with dora": ("gpt2", "lora", {**TURNED, "use_dora": True}),
    "gpt2 with ia3": ("gpt2", "ia3", TURNED_IA3),
}


def adapter(
    folder: Path, family: str, kind: str, facts: Mapping[str, Any], *, whole: bool = False, seed: int = 5
) -> dict[str, torch.Tensor]:
    """Save base and adapter below `folder`; return the full weights that peft makes of them.

    The base is a bare backbone, or a `whole` classifier with its own head.
    """
    from peft import IA3Config, LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForSequenceClassification

    base = folder / "base"
    if not base.exists():
        tiny.expert(base, family) if whole else tiny.base(base, family)
        (base / "mergectl.json").unlink(missing_ok=True)
    with quiet(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what peft advises
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
        model.config.pad_token_id = 0
        config = (LoraConfig if kind == "lora" else IA3Config)(task_type=TaskType.SEQ_CLS, **copy.deepcopy(dict(facts)))
        wrapped = get_peft_model(model, config)
        for name, weight in wrapped.named_parameters():
            if "lora_magnitude" in name or "ia3_" in name:
                weight.data *= 0.5 + torch.rand(weight.shape)
            elif weight.requires_grad:
                weight.data += 0.2 * torch.randn(weight.shape)
        wrapped.save_pretrained(folder / "adapter")
        wrapped.merge_and_unload().save_pretrained(folder / "full")
    found: dict[str, torch.Tensor] = load_file(folder / "full/model.safetensors")
    return found


@pytest.mark.parametrize("whole", [False, True], ids=["backbone", "classifier"])
@pytest.mark.parametrize("case", CASES)
def test_an_adapter_is_the_model_that_peft_makes_of_it(case: str, whole: bool, tmp_path: Path) -> None:
    expected = adapter(tmp_path, *CASES[case], whole=whole)
    opened = open_checkpoint(tmp_path / "adapter")
    assert isinstance(opened, AdapterCheckpoint)
    assert set(opened.names) == set(expected)
    for name, weight in expected.items():
        assert opened.shape(name) == tuple(weight.shape)
        torch.testing.assert_close(opened[name], weight, rtol=0, atol=1e-6)
    base = open_checkpoint(tmp_path / "base")
    assert any(not torch.equal(opened[opened.prefix + name], base[name]) for name in base)


def test_half_precision_adapters_fold_in_full_precision(tmp_path: Path) -> None:
    adapter(tmp_path, *CASES["lora"])
    for path in (tmp_path / "base/model.safetensors", tmp_path / "adapter/adapter_model.safetensors"):
        save_file({n: w.bfloat16() for n, w in load_file(path).items()}, path, metadata={"format": "pt"})
    opened = open_checkpoint(tmp_path / "adapter")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert (opened.dtype(name), opened[name].dtype) == ("F32", torch.float32)
    assert not torch.equal(opened[name], opened[name].bfloat16().float())


def test_the_head_that_was_trained_beside_it_is_the_adapters_own(tmp_path: Path) -> None:
    adapter(tmp_path, *CASES["lora"], whole=True)
    opened = open_checkpoint(tmp_path / "adapter")
    assert isinstance(opened, AdapterCheckpoint)
    assert set(opened.head_names) == {"classifier.weight", "classifier.bias"}
    own, base = opened["classifier.weight"], open_checkpoint(tmp_path / "base")["classifier.weight"]
    assert own.shape == base.shape
    assert not torch.equal(own, base)


def test_an_adapter_has_another_digest_when_adapter_or_base_change(tmp_path: Path) -> None:
    adapter(tmp_path, *CASES["lora"])
    digests = [open_checkpoint(tmp_path / "adapter").digest]
    for path in (tmp_path / "adapter/adapter_model.safetensors", tmp_path / "base/model.safetensors"):
        save_file({n: w + 1 for n, w in load_file(path).items()}, path, metadata={"format": "pt"})
        digests.append(open_checkpoint(tmp_path / "adapter").digest)
    assert len(set(digests)) == 3
    assert open_checkpoint(tmp_path / "adapter").digest == digests[-1]


def test_adapters_are_experts_like_any_other(cli: Cli, tmp_path: Path) -> None:
    from mergectl import merge_weights

    full = {}
    for seed, case in enumerate(("lora", "ia3")):
        folder = tmp_path / case
        folder.mkdir()
        shutil.copytree(tiny.base(tmp_path / f"made{seed}", "bert"), folder / "base")
        full[case] = adapter(folder, *CASES[case], seed=seed)
    words = ["--base", "lora/base", "--experts", "lora=lora/adapter", "ia3=ia3/adapter", "-o", "m"]
    assert cli("merge", "task_arithmetic", *words, "--scale", "0.7") == 0
    base = load_file("lora/base/model.safetensors")
    experts = {case: {name: full[case][f"bert.{name}"] for name in base} for case in full}
    expected, merged = merge_weights("task_arithmetic", base, experts, scale=0.7), load_file("m/model.safetensors")
    assert set(merged) == set(base)
    for name in base:
        torch.testing.assert_close(merged[name], expected[name], rtol=0, atol=1e-6)
    for case in full:
        head = load_file(f"m/tasks/{case}/head.safetensors")
        assert set(head) == {"classifier.weight", "classifier.bias"}
        torch.testing.assert_close(head["classifier.weight"], full[case]["classifier.weight"], rtol=0, atol=0)


def test_an_adapter_finds_its_base_by_itself(cli: Cli, tmp_path: Path) -> None:
    adapter(tmp_path, *CASES["lora"])
    assert cli("merge", "average", "--base", "base", "--experts", "one=adapter", "two=full", "-o", "m") == 0
    full, merged = load_file("full/model.safetensors"), load_file("m/model.safetensors")
    for name, weight in merged.items():
        torch.testing.assert_close(weight, full[f"bert.{name}"], rtol=0, atol=1e-6)


def edited(folder: Path, **settings: Any) -> Path:
    """Change what an adapter's configuration says."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"peft_type": "LOHA"}, "is a LOHA adapter; only LoRA, DoRA and IA3 can be folded into weights"),
    "no kind": ({"peft_type": None}, "only LoRA, DoRA and IA3"),
    "no base": ({"base_model_name_or_path": None}, "does not name its base model"),
    "base is gone": ({"base_model_name_or_path": "./gone"}, "is an adapter of ./gone: There is no folder './gone'"),
    "repeated layers": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    "a changed base": ({"init_lora_weights": "pissa_niter_16"}, "pissa"),
    "its own base": ({"base_model_name_or_path": "adapter"}, "is an adapter of itself"),
    "alpha is text": ({"lora_alpha": "x"}, "'lora_alpha' should be a number, not 'x'"),
    "alpha is endless": ({"lora_alpha": math.inf}, "'lora_alpha' should be a number, not inf"),
    "a list of alphas": ({"alpha_pattern": [1]}, "'alpha_pattern' should be an object, not [1]"),
    "no pattern": ({"alpha_pattern": {"(": 1}}, "'alpha_pattern.(' is no pattern of module names"),
    "a pattern of text": ({"alpha_pattern": {"query": "z"}}, "'alpha_pattern.query' should be a number, not 'z'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_folded_is_refused(what: str, tmp_path: Path) -> None:
    settings, sentence = REFUSED[what]
    adapter(tmp_path, *CASES["lora"])
    with pytest.raises(UserError) as caught:
        open_checkpoint(edited(tmp_path / "adapter", **settings))
    assert sentence in str(caught.value)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    adapter(tmp_path, *CASES["lora"])
    other = tiny.base(tmp_path / "other", "gpt2")
    with pytest.raises(UserError, match=r"adapts 'bert\..*', which its base .* does not have"):
        open_checkpoint(edited(tmp_path / "adapter", base_model_name_or_path=str(other)))


def test_factors_of_rank_zero_are_refused(tmp_path: Path) -> None:
    adapter(tmp_path, *CASES["lora"])
    path = tmp_path / "adapter/adapter_model.safetensors"
    weights = load_file(path)
    empty = {"lora_A": lambda x: x[:0], "lora_B": lambda x: x[:, :0].contiguous()}
    shrink = {name: next((f for part, f in empty.items() if part in name), torch.clone) for name in weights}
    save_file({name: shrink[name](x) for name, x in weights.items()}, path)
    with pytest.raises(UserError, match="do not fit its base's weight"):
        open_checkpoint(tmp_path / "adapter")


def test_an_adapter_that_names_no_alpha_has_that_of_peft(tmp_path: Path) -> None:
    adapter(tmp_path, *CASES["lora"])
    eight = open_checkpoint(edited(tmp_path / "adapter", lora_alpha=8))
    expected = {name: eight[name] for name in eight.names}
    unnamed = open_checkpoint(edited(tmp_path / "adapter", lora_alpha=None))
    assert all(torch.equal(unnamed[name], x) for name, x in expected.items())


@pytest.mark.parametrize(("part", "other"), [("lora_A", "lora_B"), ("lora_B", "lora_A")])
def test_half_a_pair_of_factors_is_refused(tmp_path: Path, part: str, other: str) -> None:
    adapter(tmp_path, *CASES["lora"])
    path = tmp_path / "adapter/adapter_model.safetensors"
    weights = load_file(path)
    lost = next(name for name in weights if name.endswith(f"{other}.weight"))
    save_file({name: x for name, x in weights.items() if name != lost}, path)
    with pytest.raises(UserError, match=f"has {part} of '.*', but not {other}"):
        open_checkpoint(tmp_path / "adapter")


def test_parts_of_an_adapter_that_nobody_knows_are_refused(tmp_path: Path) -> None:
    adapter(tmp_path, *CASES["lora"])
    path = tmp_path / "adapter/adapter_model.safetensors"
    weights = load_file(path)
    name = next(n for n in weights if n.endswith("lora_A.weight"))
    save_file({**weights, name.replace("lora_A.weight", "lora_C.weight"): torch.ones(2)}, path)
    with pytest.raises(UserError, match=r"query\.lora_C\.weight"):
        open_checkpoint(tmp_path / "adapter")


def test_an_adapter_of_another_width_is_refused(cli: Cli, capsys: Capture, tmp_path: Path) -> None:
    adapter(tmp_path, *CASES["lora"])
    path = tmp_path / "adapter/adapter_model.safetensors"
    narrow = {n: w[:, :8].contiguous() if "lora_A" in n else w for n, w in load_file(path).items()}
    save_file(narrow, path)
    assert cli("merge", "average", "--base", "base", "--experts", "one=adapter", "two=full", "-o", "m") == 2
    err = capsys.readouterr().err
    assert "lora" in err.lower()
    assert "[4, 8]" in err
    assert not Path("m").exists()


def test_an_adapter_without_weights_is_refused(tmp_path: Path) -> None:
    adapter(tmp_path, *CASES["lora"])
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has adapter_config.json but no adapter_model.safetensors"):
        open_checkpoint(tmp_path / "adapter")
