"""Live models and what they read: families, heads, tokenizers, images, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mergectl.errors import UserError
from mergectl.models import build, model_config, open_source, pick_device, preparer_for
from mergectl.naming import live_names, live_tensors, match
from mergectl.preprocess import ImagePreparer, TextPreparer
from tests import tiny_models as tiny

TEXT_FAMILIES = [family for family in tiny.FAMILIES if family != "vit"]


def stored(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return found


def text_of(folder: Path, task: Any = tiny.MOOD, max_length: int | None = None) -> TextPreparer:
    source = open_source(folder)
    found = preparer_for(source, model_config(source, task), task, max_length)
    assert isinstance(found, TextPreparer)
    return found


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_bare_configuration_gives_the_same_fresh_weights_for_the_same_seed(family: str, tmp_path: Path) -> None:
    source, task = open_source(tiny.bare(tmp_path, family)), tiny.task_for(family)
    one, same, other = (live_tensors(build(source, task, seed=seed)) for seed in (3, 3, 4))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_a_lone_json_file_is_a_bare_configuration(tmp_path: Path) -> None:
    tiny.bare(tmp_path, "vit")
    (tmp_path / "config.json").rename(tmp_path / "tiny_vit.json")
    model = build(open_source(tmp_path / "tiny_vit.json"), tiny.SHADE)
    assert model.classifier.weight.shape == (3, 16)


def test_building_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    source = open_source(tiny.bare(tmp_path, "bert"))
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    build(source, tiny.MOOD)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_base_gives_its_backbone_and_gets_a_fresh_head(family: str, tmp_path: Path) -> None:
    folder, task = tiny.base(tmp_path, family), tiny.task_for(family)
    model = build(open_source(folder), task, seed=7)
    slots, prefix = live_tensors(model), model.base_model_prefix
    weights = stored(folder)
    in_model = {name: tensor for name, tensor in weights.items() if f"{prefix}.{name}" in slots}
    assert len(in_model) > 20
    assert all(torch.equal(slots[f"{prefix}.{name}"], tensor) for name, tensor in in_model.items())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_names_are_those_that_transformers_writes(family: str, tmp_path: Path) -> None:
    folder, task = tiny.expert(tmp_path, family), tiny.task_for(family)
    model = build(open_source(folder), task)
    assert set(live_names(model)) == set(stored(folder))


@pytest.mark.parametrize("names", [["bert.norm.bias", "norm.bias"], ["norm.bias", "bert.norm.bias"]])
def test_of_two_spellings_of_one_weight_the_full_one_counts(names: list[str]) -> None:
    assert match(names, {"bert.norm.bias": None}, "bert") == ({"bert.norm.bias": "bert.norm.bias"}, [])


def test_half_precision_weights_are_trained_in_float32(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = tiny.base(tmp_path, "bert")
    save_file({n: w.half() for n, w in stored(folder).items()}, folder / "model.safetensors", {"format": "pt"})
    model = build(open_source(folder), tiny.MOOD)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_an_expert_goes_on_with_its_head_on_its_own_task_only(tmp_path: Path) -> None:
    folder = tiny.expert(tmp_path, "vit", seed=1)
    again = build(open_source(folder), tiny.SHADE, seed=9)
    other = build(open_source(folder), replace(tiny.SHADE, name="other"), seed=9)
    head = stored(folder)["classifier.weight"]
    assert torch.equal(again.classifier.weight, head)
    assert not torch.equal(other.classifier.weight, head)


def test_from_scratch_ignores_the_weights(tmp_path: Path) -> None:
    folder = tiny.base(tmp_path, "vit", seed=1)
    model = build(open_source(folder), tiny.SHADE, seed=2, from_scratch=True)
    assert not torch.equal(model.vit.embeddings.cls_token, stored(folder)["embeddings.cls_token"])


def test_old_layer_norm_spellings_are_understood(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = tiny.base(tmp_path, "bert")
    halves = {name: torch.full_like(weight, 0.5) for name, weight in stored(folder).items()}
    renamed = {n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): w for n, w in halves.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    model = build(open_source(folder), tiny.MOOD)
    assert float(model.bert.embeddings.LayerNorm.bias.detach().min()) == 0.5


def test_a_lost_backbone_weight_is_an_error_not_a_random_weight(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = tiny.base(tmp_path, "bert")
    weights = stored(folder)
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"has no weight 'bert\.encoder\.layer\.1\.output\.dense\.weight'"):
        build(open_source(folder), tiny.MOOD)


def test_a_weight_of_another_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    folder = tiny.base(tmp_path, "bert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(UserError, match=r"intermediate\.dense.*\[32.*\[64"):
        build(open_source(folder), tiny.MOOD)


@pytest.mark.parametrize(
    ("family", "task", "sentence"),
    [
        ("vit", tiny.MOOD, "tiny/mood is made of texts, but .* is a vit model, which reads images"),
        ("bert", tiny.SHADE, "tiny/shade is made of images, but .* is a bert model, which reads texts"),
    ],
)
def test_a_task_that_the_model_cannot_read_is_refused(family: str, task: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        model_config(open_source(tiny.bare(tmp_path, family)), task)


def test_an_unknown_kind_of_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bertt"}')
    with pytest.raises(UserError, match="model_type 'bertt'"):
        model_config(open_source(tmp_path), tiny.MOOD)


def test_a_wrong_value_in_a_configuration_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "hidden_size": "many"}')
    with pytest.raises(UserError, match="no valid bert configuration"):
        model_config(open_source(tmp_path), tiny.MOOD)


def test_a_missing_folder_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no folder"):
        open_source(tmp_path / "nowhere")


def test_a_text_task_needs_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny.CONFIGS["bert"]))
    with pytest.raises(UserError, match="has no tokenizer"):
        text_of(tmp_path)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    tiny.bare(tmp_path, "bert")
    (tmp_path / "config.json").write_text(json.dumps({**tiny.CONFIGS["bert"], "vocab_size": 16}))
    with pytest.raises(UserError, match="17 tokens but the model only 16"):
        text_of(tmp_path)


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_padding_does_not_change_the_answer(family: str, tmp_path: Path) -> None:
    source = open_source(tiny.expert(tmp_path, family))
    model = build(source, tiny.MOOD).eval()
    preparer = preparer_for(source, model.config, tiny.MOOD)
    short, long = preparer.prepare(tiny.MOOD, {"sentence": ["good film", "the book was dull dull dull dull dull"]})
    with torch.no_grad():
        alone = model(**preparer.collate([short])).logits[0]
        beside = model(**preparer.collate([short, long])).logits[0]
    torch.testing.assert_close(alone, beside)


def test_long_pairs_are_cut_and_their_segments_told_apart(tmp_path: Path) -> None:
    preparer = text_of(tiny.bare(tmp_path, "bert"), tiny.NUMBER, max_length=12)
    [example] = preparer.prepare(tiny.NUMBER, {"first": ["good " * 30], "second": ["bad " * 30]})
    assert len(example["input_ids"]) == 12
    assert set(example["token_type_ids"]) == {0, 1}


def test_a_model_with_one_segment_gets_no_segments(tmp_path: Path) -> None:
    preparer = text_of(tiny.bare(tmp_path, "roberta"), tiny.NUMBER)
    [example] = preparer.prepare(tiny.NUMBER, {"first": ["good"], "second": ["bad"]})
    assert list(example) == ["input_ids"]


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_texts_longer_than_the_model_are_cut_to_its_positions(family: str, tmp_path: Path) -> None:
    source = open_source(tiny.bare(tmp_path, family))
    model = build(source, tiny.MOOD).eval()
    preparer = preparer_for(source, model.config, tiny.MOOD)
    with torch.no_grad():
        logits = model(**preparer.collate(preparer.prepare(tiny.MOOD, {"sentence": ["good " * 300]}))).logits
    assert logits.shape == (1, 2)


def test_a_tokenizer_without_padding_gets_one(tmp_path: Path) -> None:
    folder = tiny.bare(tmp_path, "gpt2")
    facts = json.loads((folder / "tokenizer_config.json").read_text())
    facts.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps({**facts, "eos_token": "[SEP]"}))
    source = open_source(folder)
    config = model_config(source, tiny.MOOD)
    preparer_for(source, config, tiny.MOOD)
    assert config.pad_token_id == 3


def test_an_empty_text_is_still_something_to_read(tmp_path: Path) -> None:
    preparer = text_of(tiny.bare(tmp_path, "bert"))
    batch = preparer.collate([{"input_ids": [], "token_type_ids": []}])
    assert batch["attention_mask"].tolist() == [[1]]


def test_a_saved_tokenizer_cuts_nothing(tmp_path: Path) -> None:
    preparer = text_of(tiny.bare(tmp_path / "model", "bert"), max_length=8)
    preparer.prepare(tiny.MOOD, {"sentence": ["good " * 30]})
    preparer.save(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"] is None


def one_image(preparer: ImagePreparer, image: Any) -> torch.Tensor:
    batch = preparer.collate(preparer.prepare(tiny.SHADE, {"image": [image]}))
    return batch["pixel_values"][0]


def test_real_pixels_are_shares_and_whole_ones_are_bytes() -> None:
    preparer = ImagePreparer(8, 8, 1)
    shares = np.linspace(0, 1, 64).reshape(8, 8)
    as_bytes = np.round(shares * 255).astype(np.uint8)
    torch.testing.assert_close(one_image(preparer, shares), one_image(preparer, as_bytes), atol=0.005, rtol=0)


def test_pixels_are_normalised_to_minus_one_and_one() -> None:
    pixels = one_image(ImagePreparer(2, 2, 1), np.array([[0.0, 1.0], [0.5, 0.0]]))
    assert pixels.tolist() == [[[-1.0, 1.0], [0.0, -1.0]]]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1"])
def test_pictures_of_any_kind_get_the_models_size_and_channels(mode: str, channels: int) -> None:
    picture = Image.new("L", (20, 10), color=255).convert(mode)
    pixels = one_image(ImagePreparer(8, 6, channels), picture)
    assert pixels.shape == (channels, 8, 6)
    assert float(pixels.min()) == 1.0


@pytest.mark.parametrize("shape", [(16, 16), (16, 16, 1), (16, 16, 3), (8, 8, 3)])
@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_of_any_shape_get_the_models_size_and_channels(shape: tuple[int, ...], channels: int) -> None:
    pixels = one_image(ImagePreparer(8, 8, channels), np.full(shape, 0.25, np.float32))
    torch.testing.assert_close(pixels, torch.full((channels, 8, 8), -0.5))


def test_normalisation_beside_the_model_is_used_and_kept(tmp_path: Path) -> None:
    folder = tiny.bare(tmp_path, "vit")
    ImagePreparer(8, 8, 1, (0.1,), (0.2,)).save(folder)
    source = open_source(folder)
    preparer = preparer_for(source, model_config(source, tiny.SHADE), tiny.SHADE)
    assert preparer == ImagePreparer(8, 8, 1, (0.1,), (0.2,))


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(UserError, match="There is no device 'gpu'"):
        pick_device("gpu")
