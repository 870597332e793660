"""Lining up checkpoints: prefixes, heads, poolers and buffers of the model families, however they were saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergectl.errors import UserError
from mergectl.families import Family, named, open_family, short_names
from mergectl.models import quiet
from tests import tiny_models as tiny
from tests.conftest import Cli

# family -> prefix of the backbone in a classifier, first names of the head
FAMILIES = {
    "bert": ("bert.", {"classifier"}),
    "roberta": ("roberta.", {"classifier"}),
    "deberta-v2": ("deberta.", {"pooler", "classifier"}),
    "gpt2": ("transformer.", {"score"}),
    "vit": ("vit.", {"classifier"}),
}


def saved(folder: Path, family: str, kind: str, **facts: Any) -> Path:
    """A model of some auto class with fresh weights of its own, as transformers saves it."""
    import transformers

    config = {key: value for key, value in {**tiny.CONFIGS[family], **facts}.items() if key != "model_type"}
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(str(folder)))
        made = transformers.AutoConfig.for_model(family, **config)
        getattr(transformers, kind).from_config(made).save_pretrained(folder)
    return folder


def change(folder: Path, **weights: torch.Tensor | None) -> Path:
    """Put weights into a model folder, or (None) take them out; `__` in a name stands for a dot."""
    path = folder / "model.safetensors"
    edits = {name.replace("__", "."): weight for name, weight in weights.items()}
    kept = {name: weight for name, weight in {**load_file(path), **edits}.items() if weight is not None}
    save_file(kept, path, metadata={"format": "pt"})
    return folder


def family(base: Path, *experts: Path) -> Family:
    return open_family(str(base), [(expert.name, str(expert)) for expert in experts])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return found


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_bare_base_lines_up_with_classifiers(kind: str, tmp_path: Path) -> None:
    prefix, head = FAMILIES[kind]
    base = tiny.base(tmp_path / "base", kind)
    one, two = (tiny.expert(tmp_path / name, kind, seed=i) for i, name in enumerate(("one", "two")))
    found = family(base, one, two).population
    assert set(found.base) == set(weights(base))
    assert found.carried == ()
    for task, folder in (("one", one), ("two", two)):
        own = weights(folder)
        assert {name.split(".")[0] for name in found.heads[task]} == head
        assert {*found.heads[task], *(prefix + name for name in found.base)} == set(own)
        assert all(torch.equal(found.experts[task][name], own[prefix + name]) for name in found.base)


@pytest.mark.parametrize("kind", FAMILIES)
def test_one_expert_at_full_scale_is_the_expert(cli: Cli, kind: str, tmp_path: Path) -> None:
    prefix, _ = FAMILIES[kind]
    base, expert = tiny.base(tmp_path / "base", kind), tiny.expert(tmp_path / "one", kind)
    words = ["--base", base, "--experts", f"one={expert}", "--scale", 1, "-o", "m"]
    assert cli("merge", "task_arithmetic", *words) == 0
    own = weights(expert)
    for name, weight in weights(Path("m")).items():
        torch.testing.assert_close(weight, own[prefix + name], rtol=0, atol=1e-6)
    head = load_file("m/tasks/one/head.safetensors")
    assert all(torch.equal(head[name], own[name]) for name in head)
    assert {*head, *(prefix + name for name in weights(Path("m")))} == set(own)


LANGUAGE = {"bert": ("AutoModelForMaskedLM", "cls."), "roberta": ("AutoModelForMaskedLM", "lm_head."),
            "gpt2": ("AutoModelForCausalLM", "lm_head.")}  # fmt: skip


@pytest.mark.parametrize("kind", LANGUAGE)
def test_a_base_may_carry_the_head_of_its_pretraining(cli: Cli, kind: str, tmp_path: Path) -> None:
    auto, own_head = LANGUAGE[kind]
    prefix, _ = FAMILIES[kind]
    base, expert = saved(tmp_path / "base", kind, auto), tiny.expert(tmp_path / "one", kind)
    found = family(base, expert).population
    start = weights(base)
    assert {prefix + name for name in found.base} == {name for name in start if name.startswith(prefix)}
    assert all(name.startswith(own_head) for name in found.carried)
    assert not any(name.startswith(own_head) for name in found.heads["one"])
    assert cli("merge", "average", "--base", base, "--experts", f"one={expert}", "-o", "m") == 0
    merged = weights(Path("m"))
    assert set(merged) == set(start)
    assert all(torch.equal(merged[name], start[name]) for name in found.carried)


def test_a_pooler_that_only_the_base_has_is_carried(cli: Cli, tmp_path: Path) -> None:
    base, expert = saved(tmp_path / "base", "roberta", "AutoModel"), tiny.expert(tmp_path / "one", "roberta")
    found = family(base, expert).population
    assert set(found.carried) == {"pooler.dense.weight", "pooler.dense.bias"}
    assert cli("merge", "average", "--base", base, "--experts", f"one={expert}", "-o", "m") == 0
    start, merged = weights(base), weights(Path("m"))
    assert all(torch.equal(merged[name], start[name]) for name in found.carried)


def test_a_pooler_that_only_the_expert_has_belongs_to_its_head(tmp_path: Path) -> None:
    base, expert = saved(tmp_path / "base", "bert", "AutoModelForMaskedLM"), tiny.expert(tmp_path / "one", "bert")
    assert set(family(base, expert).population.heads["one"]) == {
        "bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias",
    }  # fmt: skip


@pytest.mark.parametrize("labels", [2, 3])
def test_the_head_of_a_base_is_never_merged_with_those_of_the_experts(labels: int, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "bert", "AutoModelForSequenceClassification", num_labels=labels)
    found = family(base, tiny.expert(tmp_path / "one", "bert"), tiny.expert(tmp_path / "two", "bert")).population
    assert set(found.carried) == {"classifier.weight", "classifier.bias"}
    assert set(found.heads["one"]) == {"classifier.weight", "classifier.bias"}


def test_experts_may_be_saved_with_and_without_a_head(tmp_path: Path) -> None:
    base = tiny.base(tmp_path / "base", "bert")
    found = family(base, tiny.expert(tmp_path / "one", "bert"), tiny.base(tmp_path / "two", "bert", seed=2))
    assert found.population.heads["two"] == ()
    assert set(found.population.base) == set(weights(base))


@pytest.mark.parametrize("turn", [1, -1])
def test_experts_with_other_heads_share_the_backbone_in_any_order(turn: int, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "bert", "AutoModelForMaskedLM")
    language = saved(tmp_path / "language", "bert", "AutoModelForMaskedLM")
    found = family(base, *[tiny.expert(tmp_path / "one", "bert"), language][::turn]).population
    backbone = {name.removeprefix("bert.") for name in weights(base) if name.startswith("bert.")}
    assert set(found.base) == backbone
    assert all(name.startswith("cls.") for name in found.heads["language"])
    assert torch.equal(
        found.experts["language"]["encoder.layer.0.output.dense.weight"],
        weights(language)["bert.encoder.layer.0.output.dense.weight"],
    )


@pytest.mark.parametrize("twice", ["base", "expert"])
def test_a_second_weight_of_one_name_outside_the_prefix_is_left_alone(twice: str, tmp_path: Path) -> None:
    outer, name = torch.full((3, 3), 7.0), "embeddings.word_embeddings.weight"
    base, bare = tiny.base(tmp_path / "base", "bert"), tiny.base(tmp_path / "bare", "bert")
    prefixed = {f"bert.{own}": weight for own, weight in weights(base).items()} | {name: outer}
    save_file(prefixed, (base if twice == "base" else bare) / "model.safetensors", metadata={"format": "pt"})
    found = family(base, bare).population
    inner = f"bert.{name}" if twice == "base" else name
    assert found.base.own_name[name] == inner and set(found.base) == set(weights(tiny.base(tmp_path / "x", "bert")))
    assert (found.carried, found.heads["bare"]) == (((name,), ()) if twice == "base" else ((), (name,)))


def test_language_models_are_merged_whole(tmp_path: Path) -> None:
    base, *experts = (saved(tmp_path / name, "bert", "AutoModelForMaskedLM") for name in ("base", "one", "two12"))
    found = family(base, *experts).population
    assert set(found.base) == set(weights(base))
    assert found.heads == {"one": (), "two12": ()}


def test_a_weight_that_only_some_experts_have_is_refused(tmp_path: Path) -> None:
    base, one = tiny.base(tmp_path / "base", "bert"), tiny.expert(tmp_path / "one", "bert")
    two = change(tiny.expert(tmp_path / "two", "bert"), bert__embeddings__LayerNorm__bias=None)
    with pytest.raises(UserError) as caught:
        family(base, one, two)
    assert str(caught.value) == (
        "Expert 'two' has no weight 'embeddings.LayerNorm.bias', which the base and 'one' have."
    )


def test_a_weight_that_no_expert_has_is_carried(tmp_path: Path) -> None:
    base = tiny.base(tmp_path / "base", "bert")
    one, two = (
        change(tiny.expert(tmp_path / name, "bert"), bert__embeddings__LayerNorm__bias=None) for name in ("one", "two")
    )
    assert family(base, one, two).population.carried == ("embeddings.LayerNorm.bias",)


@pytest.mark.parametrize(
    ("extra", "noted"),
    [
        ("bert.encoder.layer.0.gate", True),
        ("bert.embeddings.word_embeddings.bias", True),
        ("bert.embeddings.position_ids", False),
        ("classifier.0.weight", False),
    ],
)
def test_what_a_layer_of_the_base_lacks_is_kept_with_the_head_and_said(extra: str, noted: bool, tmp_path: Path) -> None:
    base, one = tiny.base(tmp_path / "base", "bert"), tiny.expert(tmp_path / "one", "bert")
    found = family(base, change(one, **{extra.replace(".", "__"): torch.ones(3)})).population
    notes = [note for note in found.notes if extra in note]
    assert extra in found.heads["one"] and bool(notes) is noted
    assert notes == [note for note in notes if note.endswith("merged with none: kept in tasks/one alone.")]


def test_whole_numbers_are_carried_from_the_base(cli: Cli, tmp_path: Path) -> None:
    places, others = torch.arange(40), torch.arange(40) + 1
    base = change(tiny.base(tmp_path / "base", "bert"), embeddings__position_ids=places)
    one = change(tiny.expert(tmp_path / "one", "bert"), bert__embeddings__position_ids=others)
    assert family(base, one).population.carried == ("embeddings.position_ids",)
    assert cli("merge", "average", "--base", base, "--experts", f"one={one}", "-o", "m") == 0
    assert torch.equal(weights(Path("m"))["embeddings.position_ids"], places)
    assert "bert.embeddings.position_ids" not in load_file("m/tasks/one/head.safetensors")


def test_another_architecture_is_refused_with_an_example(tmp_path: Path) -> None:
    base, other = tiny.base(tmp_path / "base", "bert"), tiny.expert(tmp_path / "one", "gpt2")
    with pytest.raises(UserError, match=r"is no fine-tuned copy of .*: it has 0 of its \d+ weights \(not '.*'"):
        family(base, other)


@pytest.mark.parametrize(("layers", "more"), [(3, "base"), (1, "one")])
def test_another_number_of_layers_is_refused(layers: int, more: str, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "bert", "AutoModel", num_hidden_layers=layers)
    with pytest.raises(UserError, match=rf"{more} has '.*layer\.{max(layers, 2) - 1}\..*', which .* in its other"):
        family(base, tiny.expert(tmp_path / "one", "bert"))


def test_a_layer_that_only_some_experts_lack_is_refused(tmp_path: Path) -> None:
    base, one = tiny.base(tmp_path / "base", "bert"), tiny.expert(tmp_path / "one", "bert")
    two = change(tiny.expert(tmp_path / "two", "bert"), bert__encoder__layer__1__output__dense__bias=None)
    with pytest.raises(UserError, match=r"two has no 'encoder\.layer\.1\.output\.dense\.bias', as .*base has, though"):
        family(base, one, two)


def test_the_experts_record_names_their_base(tmp_path: Path) -> None:
    base = tiny.base(tmp_path / "base", "bert")
    one = tiny.expert(tmp_path / "one", "bert", base=str(base))
    found = open_family(None, [(None, str(one))])
    assert found.has_base
    assert found.base.ref == str(base)
    assert found.task_ids == {"mood": "tiny/mood"}


def test_without_any_base_the_first_expert_lends_its_names(tmp_path: Path) -> None:
    one, two = (tiny.expert(tmp_path / name, "bert", seed=i) for i, name in enumerate(("one", "two")))
    found = open_family(None, [("one", str(one)), ("two", str(two))])
    assert not found.has_base
    assert found.base.ref == str(one)
    assert [row["role"] for row in found.inputs] == ["expert", "expert"]


def test_two_experts_for_one_task_need_names(tmp_path: Path) -> None:
    base = tiny.base(tmp_path / "base", "bert")
    experts = [tiny.expert(tmp_path / name, "bert") for name in ("one", "two")]
    with pytest.raises(UserError, match=r"Two experts are called 'mood'. Name them: --experts first=mood second="):
        open_family(str(base), [(None, str(expert)) for expert in experts])
    found = open_family(str(base), named([f"first={experts[0]}", f"second={experts[1]}"]))
    assert list(found.experts) == ["first", "second"]


def test_short_names_are_the_last_part_of_a_task() -> None:
    assert short_names(["glue/rte", "digits/loop", "mine"]) == ["rte", "loop", "mine"]
    with pytest.raises(UserError, match="Two experts are called 'rte'"):
        short_names(["glue/rte", "other/rte"])


def test_a_folder_with_an_equals_sign_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "lr=3").mkdir()
    assert named([str(tmp_path / "lr=3"), "rte=models/x"]) == ((None, str(tmp_path / "lr=3")), ("rte", "models/x"))
    assert named({"rte": "a", "cola": "b"}) == (("rte", "a"), ("cola", "b"))


def test_nothing_to_merge_is_refused() -> None:
    with pytest.raises(UserError, match="Name the models to merge"):
        open_family(None, [])


def test_the_inputs_of_a_merge_are_told_by_role_task_and_digest(tmp_path: Path) -> None:
    base, one = tiny.base(tmp_path / "base", "bert"), tiny.expert(tmp_path / "one", "bert")
    found = open_family(str(base), [(None, str(one))])
    assert [(row["role"], row["task"], row["ref"]) for row in found.inputs] == [
        ("base", None, str(base)),
        ("expert", "tiny/mood", str(one)),
    ]
    assert [row["digest"] for row in found.inputs] == [found.base.digest, found.experts["mood"].digest]
    assert json.loads(json.dumps(found.inputs)) == list(found.inputs)
