"""CLIP as an image classifier: heads from texts, experts that are vision towers, merges that leave the texts alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mergectl import clip, smoke
from mergectl.bench import bench_of, logits
from mergectl.benchmarks import vision20
from mergectl.benchmarks._contract import Task, with_suite
from mergectl.checkpoints import open_checkpoint
from mergectl.errors import UserError
from mergectl.evaluate import evaluate
from mergectl.evaluations import evaluate_model, evaluate_references
from mergectl.families import open_family
from mergectl.finetune import FinetuneConfig, finetune
from mergectl.heads import open_live
from mergectl.lab import Lab
from mergectl.merge import MergeJob
from mergectl.models import quiet
from mergectl.plan import recipe_of
from mergectl.preprocess import ImagePreparer, image_preparer
from mergectl.presets import settled
from mergectl.verbs import merge_models

TASKS = {task.name: with_suite(task, "vision20") for task in vision20.TASKS}
MNIST, LAND, FACES = TASKS["mnist"], TASKS["eurosat"], TASKS["fer2013"]
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIG: dict[str, Any] = {
    "model_type": "clip", "projection_dim": 8, "text_config": {**TOWER, "max_position_embeddings": 32},
    "vision_config": {**TOWER, "image_size": 16, "patch_size": 8, "projection_dim": 8},
}  # fmt: skip
Weights = Mapping[str, torch.Tensor]


def pictures(count: int = 6) -> list[Image.Image]:
    numbers = np.random.RandomState(0)
    return [Image.fromarray(numbers.randint(256, size=(20, 24, 3), dtype=np.uint8)) for _ in range(count)]


def outputs(model: Any, task: Task, **how: Any) -> torch.Tensor:
    """The logits of a model on the pictures."""
    live = open_live(model, [task], device="cpu", **how)
    bench = bench_of(task, live.preparer, {"image": pictures()}, [0] * 6)
    found = torch.from_numpy(logits(live.use(task.id), bench))
    order = live.order(task.id)
    return found if order is None else found[:, list(order)]


def tower_of(weights: Weights) -> dict[str, torch.Tensor]:
    """The weights of the vision tower by themselves."""
    return {name: tensor for name, tensor in weights.items() if name.startswith("vision_model.")}


def moved(weights: Weights, seed: int) -> dict[str, torch.Tensor]:
    """A vision tower and projection a little away from these."""
    chance = torch.Generator().manual_seed(seed)
    own = {name: tensor for name, tensor in weights.items() if name.startswith(("vision_model.", "visual_projection."))}
    return {name: t + 0.05 * torch.randn(t.shape, generator=chance) for name, t in own.items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip") / "base"
    smoke.make_base(folder, CONFIG, [MNIST, LAND, FACES], 0)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    smoke.write_rows(folder, [MNIST, LAND])
    return folder


@pytest.fixture(scope="module")
def experts(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two experts after two steps each."""
    folder = tmp_path_factory.mktemp("experts")
    for task in (MNIST, LAND):
        config = FinetuneConfig(
            task=task.id, base=str(base), max_steps=2, batch_size=4, lr=1e-2, weight_decay=0.1, scheduler="cosine",
            warmup=0.0, eval_every=1, device="cpu",
        )  # fmt: skip
        finetune(config, folder / task.name, data=data)
    return {task.id: folder / task.name for task in (MNIST, LAND)}


def merge(base: Path, experts: Mapping[str, Any], out: Path, method: str = "average", **settings: Any) -> Weights:
    job = MergeJob(recipe_of(method, settings, [], 0), tuple((t, str(ref)) for t, ref in experts.items()), str(base))
    merge_models(Lab(device="cpu"), job, out)
    found: dict[str, torch.Tensor] = load_file(out / "model.safetensors")
    return found


def test_zero_shot_logits_are_those_of_the_clip_model(base: Path) -> None:
    from transformers import AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(base).eval()
    texts = AutoTokenizer.from_pretrained(base)([f'a photo of the number: "{n}".' for n in range(10)], padding=True)
    pixels = torch.stack([_pixels(base, picture) for picture in pictures()])
    with torch.no_grad():
        found = model(pixel_values=pixels, **{name: torch.tensor(ids) for name, ids in texts.items()})
    assert torch.allclose(outputs(base, MNIST), found.logits_per_image, atol=1e-5)


def _pixels(base: Path, picture: Image.Image) -> torch.Tensor:
    """A picture as transformers itself prepares it."""
    from transformers import CLIPImageProcessorPil

    prepare = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    found: torch.Tensor = prepare(picture, return_tensors="pt")["pixel_values"][0]
    return found


def test_prompts_and_synonyms_of_a_class_are_averaged_after_normalising(base: Path) -> None:
    from transformers import AutoTokenizer, CLIPModel

    model, tokenizer = CLIPModel.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    rows = []
    for words in ("angry", "disgusted", "fearful", "happy|smiling"):
        texts = [prompt.format(word) for word in words.split("|") for prompt in FACES.prompts]
        with torch.no_grad():
            found = model.get_text_features(**tokenizer(texts, padding=True, return_tensors="pt")).pooler_output
        mean = (found / found.norm(dim=1, keepdim=True)).mean(dim=0)
        rows.append(mean / mean.norm() * model.logit_scale.exp())
    head = clip.TextTower(open_checkpoint(base)).head(FACES)
    assert head.shape == (7, 8)
    assert torch.allclose(head[:4], torch.stack(rows).detach(), atol=1e-5)


def test_a_task_without_prompts_is_asked_for_photos_of_its_labels() -> None:
    task = replace(MNIST, prompts=(), labels=("traffic_light", "tree"))
    assert clip.texts_of(task) == [["a photo of a traffic light."], ["a photo of a tree."]]


def test_a_head_is_made_once_for_the_same_texts_and_text_tower(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = clip.TextTower(open_checkpoint(base)).head(MNIST)
    other = shutil.copytree(base, tmp_path / "other")
    weights = load_file(base / "model.safetensors")
    save_file({**weights, **moved(weights, 1)}, other / "model.safetensors")
    made: list[list[str]] = []

    def mean(_: clip.TextTower, texts: list[str]) -> torch.Tensor:
        made.append(texts)
        return torch.ones(8)

    monkeypatch.setattr(clip.TextTower, "_mean", mean)
    assert torch.equal(clip.TextTower(open_checkpoint(other)).head(MNIST), first)
    assert made == []
    clip.TextTower(open_checkpoint(base)).head(replace(MNIST, prompts=("the digit {}",)))
    assert [len(made), made[3]] == [10, ["the digit 3"]]
    save_file({**weights, "logit_scale": weights["logit_scale"] + 1}, other / "model.safetensors")
    clip.TextTower(open_checkpoint(other)).head(MNIST)
    assert len(made) == 20


def test_an_expert_is_a_vision_tower_with_a_head_that_was_not_trained(base: Path, experts: dict[str, Path]) -> None:
    before, after = load_file(base / "model.safetensors"), load_file(experts[MNIST.id] / "model.safetensors")
    assert set(after) == {*tower_of(before), clip.PROJECTION, clip.HEAD}
    changed = [name for name, tensor in tower_of(after).items() if not torch.equal(tensor, before[name])]
    assert len(changed) > 30
    assert not torch.equal(after[clip.PROJECTION], before[clip.PROJECTION])
    assert torch.equal(after[clip.HEAD], clip.TextTower(open_checkpoint(base)).head(MNIST))


def test_transformers_opens_an_expert_as_it_is(experts: dict[str, Path]) -> None:
    from transformers import CLIPVisionModelWithProjection

    folder = experts[MNIST.id]
    with quiet():
        model, facts = CLIPVisionModelWithProjection.from_pretrained(folder, output_loading_info=True)
    pixels = torch.stack([_pixels(folder, picture) for picture in pictures()])
    with torch.no_grad():
        found = model.eval()(pixels).image_embeds
    head = load_file(folder / "model.safetensors")[clip.HEAD]
    assert (facts["missing_keys"], facts["unexpected_keys"]) == (set(), {clip.HEAD})
    assert torch.allclose(outputs(folder, MNIST), found / found.norm(dim=1, keepdim=True) @ head.T, atol=1e-5)


def test_training_that_was_stopped_goes_on_to_the_same_expert(
    base: Path, data: Path, experts: dict[str, Path], tmp_path: Path
) -> None:
    recipe = json.loads((experts[MNIST.id] / "mergectl.json").read_text())["recipe"]
    config = FinetuneConfig(**{**recipe, "targets": (), "lr": 1e-2, "max_length": None})
    with pytest.raises(KeyboardInterrupt):
        finetune(config, tmp_path / "again", data=data, progress=lambda step, *_: _interrupt(step))
    result = finetune(config, tmp_path / "again", data=data)
    found = [load_file(folder / "model.safetensors") for folder in (tmp_path / "again", experts[MNIST.id])]
    assert result["resumed"]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])


def test_warm_up_may_be_told_in_steps(tmp_path: Path) -> None:
    from mergectl.training import arguments

    config = FinetuneConfig(task=MNIST.id, base="base", warmup=0.06, device="cpu")
    found = [arguments(each, tmp_path, "cpu") for each in (config, replace(config, warmup_steps=500))]
    assert [args.get_warmup_steps(2000) for args in found] == [120, 500]


def _interrupt(step: int) -> None:
    if step == 2:
        raise KeyboardInterrupt


def test_adapters_on_clip_leave_the_head_as_it_is(base: Path, data: Path, tmp_path: Path) -> None:
    config = FinetuneConfig(
        task=MNIST.id, base=str(base), max_steps=2, batch_size=4, peft="lora", rank=2, lr=1e-2,
        warmup=0.0, eval_every=2, device="cpu",
    )  # fmt: skip
    finetune(config, tmp_path / "lora", data=data)
    whole, adapter = load_file(tmp_path / "lora" / "model.safetensors"), open_checkpoint(tmp_path / "lora" / "adapter")
    before = load_file(base / "model.safetensors")
    assert sum(not torch.equal(tensor, before[name]) for name, tensor in tower_of(whole).items()) == 4
    assert torch.equal(whole[clip.HEAD], clip.TextTower(open_checkpoint(base)).head(MNIST))
    assert all(torch.allclose(adapter[f"clip.{name}"], tensor, atol=1e-6) for name, tensor in tower_of(whole).items())


def test_a_merge_changes_the_vision_tower_alone(base: Path, experts: dict[str, Path], tmp_path: Path) -> None:
    before, merged = load_file(base / "model.safetensors"), merge(base, experts, tmp_path / "merged")
    parts = [load_file(folder / "model.safetensors") for folder in experts.values()]
    mean = {name: (parts[0][name] + parts[1][name]) / 2 for name in (*tower_of(before), clip.PROJECTION)}
    assert set(merged) == set(before)
    assert all(torch.allclose(merged[name], tensor, atol=1e-6) for name, tensor in mean.items())
    assert all(torch.equal(merged[name], before[name]) for name in set(before) - set(mean))


def test_a_merged_model_answers_each_task_with_its_own_head(
    base: Path, data: Path, experts: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import CLIPModel

    merge(base, experts, tmp_path / "merged")
    assert evaluate(tmp_path / "merged", data=data, device="cpu").scores.keys() == {MNIST.id, LAND.id}
    with quiet():
        model = CLIPModel.from_pretrained(tmp_path / "merged").eval()
    pixels = torch.stack([_pixels(base, picture) for picture in pictures()])
    for task, folder in experts.items():
        with torch.no_grad():
            found = model.get_image_features(pixels).pooler_output
        head = load_file(folder / "model.safetensors")[clip.HEAD]
        expected = found / found.norm(dim=1, keepdim=True) @ head.T
        assert torch.allclose(outputs(tmp_path / "merged", TASKS[task.split("/")[1]]), expected, atol=1e-5)


def test_whole_clip_models_with_the_same_texts_merge_like_their_vision_towers(
    base: Path, experts: dict[str, Path], tmp_path: Path
) -> None:
    weights = load_file(base / "model.safetensors")
    whole = {}
    for task, folder in experts.items():
        whole[task] = shutil.copytree(base, tmp_path / task)
        save_file({**weights, **_tower_and_projection(folder)}, whole[task] / "model.safetensors")
    settings = {"density": 0.3, "scope": "model"}  # one threshold for all weights: the texts must not be counted
    towers = merge(base, experts, tmp_path / "towers", "ties", **settings)
    models = merge(base, whole, tmp_path / "models", "ties", **settings)
    assert all(torch.equal(models[name], tensor) for name, tensor in towers.items())
    assert any(not torch.equal(models[name], weights[name]) for name in weights)


def _tower_and_projection(folder: Path) -> dict[str, torch.Tensor]:
    found = load_file(folder / "model.safetensors")
    return {name: tensor for name, tensor in found.items() if name != clip.HEAD}


def test_text_towers_that_experts_changed_are_merged_too(base: Path, tmp_path: Path) -> None:
    weights = load_file(base / "model.safetensors")
    experts = {}
    for number, task in enumerate((MNIST.id, LAND.id)):
        experts[task] = shutil.copytree(base, tmp_path / task)
        texts = {name: tensor + number + 1 for name, tensor in weights.items() if name.startswith("text_projection")}
        save_file({**weights, **texts}, experts[task] / "model.safetensors")
    merged = merge(base, experts, tmp_path / "merged")
    name = "text_projection.weight"
    assert torch.allclose(merged[name], weights[name] + 1.5, atol=1e-6)


def test_an_expert_answers_a_suite_that_it_was_not_trained_in_by_the_texts_of_its_base(
    base: Path, experts: dict[str, Path]
) -> None:
    same = with_suite(MNIST, "vision8")
    other = replace(same, prompts=("the digit {}",))
    assert torch.allclose(outputs(experts[MNIST.id], same), outputs(experts[MNIST.id], MNIST), atol=1e-5)
    assert not torch.allclose(outputs(experts[MNIST.id], other), outputs(experts[MNIST.id], MNIST), atol=1e-3)


def hub_tower(base: Path, folder: Path, weights: Weights, prefix: str) -> Path:
    """A folder of a CLIPVisionModel, as transformers 5 saves it (no prefix) or as it did before."""
    folder.mkdir(parents=True)
    vision = {**json.loads((base / "config.json").read_text())["vision_config"], "model_type": "clip_vision_model"}
    (folder / "config.json").write_text(json.dumps({**vision, "architectures": ["CLIPVisionModel"]}))
    own = {prefix + n.removeprefix("vision_model."): t.contiguous() for n, t in tower_of(weights).items()}
    save_file(own, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_vision_towers_from_the_hub_are_experts_as_they_are(
    base: Path, data: Path, experts: dict[str, Path], tmp_path: Path, prefix: str
) -> None:
    parts = {task: load_file(folder / "model.safetensors") for task, folder in experts.items()}
    towers = {task: hub_tower(base, tmp_path / task, parts[task], prefix) for task in experts}
    merged, weights = merge(base, towers, tmp_path / "merged"), load_file(base / "model.safetensors")
    first, second = parts.values()
    for name, tensor in tower_of(weights).items():
        assert torch.allclose(merged[name], (first[name] + second[name]) / 2, atol=1e-6), tensor
    assert torch.equal(merged[clip.PROJECTION], weights[clip.PROJECTION])
    expected = outputs(tmp_path / "merged", LAND)
    assert torch.equal(outputs(tmp_path / "merged", LAND, heads={LAND.id: towers[LAND.id]}), expected)
    family = open_family(str(base), tuple((task, str(ref)) for task, ref in towers.items()))
    scored = evaluate_references(Lab(data=data, device="cpu"), family, [])
    assert [list(row["evaluation"].scores) for row in scored] == [[MNIST.id, LAND.id], [MNIST.id], [LAND.id]]
    lab = Lab(data=data, device="cpu")
    evaluate_model(lab, str(tmp_path / "merged"))
    shares = "SELECT task, expert_score, base_score FROM leaderboard WHERE kind = 'merged' ORDER BY task"
    (base_row, *rows) = [row["evaluation"].scores for row in scored]
    assert lab.store.query(shares).rows == [(t, *_pair(rows, base_row, t)) for t in sorted(experts)]


def _pair(experts: list[dict[str, float]], base: dict[str, float], task: str) -> tuple[float, float]:
    """The scores of the expert and the base on a task."""
    return next(row[task] for row in experts if task in row), base[task]


def test_a_clip_model_with_a_trained_classifier_keeps_it(base: Path, tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPForImageClassification

    torch.manual_seed(0)
    model = CLIPForImageClassification(CLIPConfig(**CONFIG, num_labels=10)).eval()
    with quiet():
        model.save_pretrained(tmp_path / "trained")
    with torch.no_grad():
        found = model(torch.stack([_pixels(base, picture) for picture in pictures()])).logits
    assert torch.allclose(outputs(tmp_path / "trained", MNIST), found, atol=1e-5)


def test_a_vision_tower_by_itself_needs_the_model_it_came_from(base: Path, tmp_path: Path) -> None:
    weights = load_file(base / "model.safetensors")
    tower = hub_tower(base, tmp_path / "tower", weights, "")
    with pytest.raises(UserError, match="Name the model that it was fine-tuned from: --heads"):
        outputs(tower, MNIST)
    assert torch.equal(outputs(tower, MNIST, heads={MNIST.id: base}), outputs(base, MNIST))


def test_a_clip_model_without_texts_cannot_be_fine_tuned(base: Path, experts: dict[str, Path], tmp_path: Path) -> None:
    config = FinetuneConfig(task=LAND.id, base=str(experts[MNIST.id]), device="cpu")
    with pytest.raises(UserError, match="has no text tower, of which the heads of a CLIP model are made"):
        finetune(config, tmp_path / "out", data=tmp_path)
    bare = tmp_path / "bare.json"
    bare.write_text((base / "config.json").read_text())
    with pytest.raises(UserError, match="has no weights, and the heads of a CLIP model are made by its text tower"):
        finetune(replace(config, base=str(bare)), tmp_path / "out", data=tmp_path)


def in_open_clip(weights: Weights) -> dict[str, torch.Tensor]:
    """The same vision tower and projection under open_clip's names, as an image encoder of the collection has them."""
    found = {
        "model.visual.proj": weights["visual_projection.weight"].T,
        "model.visual.class_embedding": weights["vision_model.embeddings.class_embedding"],
        "model.visual.positional_embedding": weights["vision_model.embeddings.position_embedding.weight"],
        "model.visual.conv1.weight": weights["vision_model.embeddings.patch_embedding.weight"],
        "model.token_embedding.weight": torch.zeros(3, 4),
        "model.logit_scale": torch.tensor(1.0),
    }
    for kind in ("weight", "bias"):
        found[f"model.visual.ln_pre.{kind}"] = weights[f"vision_model.pre_layrnorm.{kind}"]
        found[f"model.visual.ln_post.{kind}"] = weights[f"vision_model.post_layernorm.{kind}"]
        for layer in range(2):
            ours, theirs = f"vision_model.encoder.layers.{layer}.", f"model.visual.transformer.resblocks.{layer}."
            thirds = [weights[f"{ours}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            found[f"{theirs}attn.in_proj_{kind}"] = torch.cat(thirds)
            found[f"{theirs}attn.out_proj.{kind}"] = weights[f"{ours}self_attn.out_proj.{kind}"]
            for one, other in (("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1"),
                               ("mlp.c_proj", "mlp.fc2")):  # fmt: skip
                found[f"{theirs}{one}.{kind}"] = weights[f"{ours}{other}.{kind}"]
    return {name: tensor.contiguous() for name, tensor in found.items()}


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_open_clip_weights_are_read_under_transformers_names(base: Path, tmp_path: Path, name: str) -> None:
    weights = moved(load_file(base / "model.safetensors"), 3)
    (torch.save if name.endswith(".pt") else save_file)(in_open_clip(weights), tmp_path / name)
    found = open_checkpoint(tmp_path / name)
    assert set(found) == set(weights)
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    assert all(found.shape(name) == tuple(tensor.shape) for name, tensor in weights.items())
    assert torch.equal(outputs(tmp_path / name, MNIST, heads={MNIST.id: base}), _with(base, weights, tmp_path))


def _with(base: Path, weights: Weights, folder: Path) -> torch.Tensor:
    """The logits of the base with these weights in the place of its own."""
    whole = shutil.copytree(base, folder / "whole")
    save_file({**load_file(base / "model.safetensors"), **weights}, whole / "model.safetensors")
    return outputs(whole, MNIST)


def test_open_clip_attention_computes_the_same(base: Path) -> None:
    """torch's own fused attention, which open_clip uses, is the judge of how its rows are split."""
    from transformers import CLIPVisionModelWithProjection

    with quiet():
        model = CLIPVisionModelWithProjection.from_pretrained(base).eval()
    weights = in_open_clip(load_file(base / "model.safetensors"))
    judge = torch.nn.MultiheadAttention(16, 2, batch_first=True).eval()
    root = "model.visual.transformer.resblocks.1.attn."
    judge.load_state_dict({name.removeprefix(root): t for name, t in weights.items() if name.startswith(root)})
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = dict(model.named_modules())["vision_model.encoder.layers.1.self_attn"](x)[0]
        assert torch.allclose(ours, judge(x, x, x, need_weights=False)[0], atol=1e-5)


def test_open_clip_experts_merge_like_others_and_the_split_is_noted(base: Path, tmp_path: Path) -> None:
    weights, files, folders = load_file(base / "model.safetensors"), {}, {}
    for seed, task in enumerate((MNIST.id, LAND.id), 1):
        own = moved(weights, seed)
        folders[task] = shutil.copytree(base, tmp_path / task)
        save_file({**weights, **own}, folders[task] / "model.safetensors")
        files[task] = tmp_path / task / "finetuned.pt"
        torch.save(in_open_clip(own), files[task])
    notes = open_family(str(base), tuple((task, str(ref)) for task, ref in files.items())).population.notes
    assert sum("its fused query, key and value are merged as three matrices" in note for note in notes) == 2
    found = [merge(base, of, tmp_path / name, "pcb") for name, of in (("files", files), ("folders", folders))]
    assert all(torch.equal(found[0][name], tensor) for name, tensor in found[1].items())


@pytest.mark.parametrize(("name", "layout"), [("mnist.pt", "fused"), ("folder", "split")])
def test_the_store_keeps_how_query_key_and_value_lie_in_each_model(
    base: Path, tmp_path: Path, name: str, layout: str
) -> None:
    weights = load_file(base / "model.safetensors")
    own = moved(weights, 1)
    if layout == "fused":
        torch.save(in_open_clip(own), tmp_path / name)
    else:
        save_file({**weights, **own}, shutil.copytree(base, tmp_path / name) / "model.safetensors")
    lab = Lab(device="cpu", store_path=tmp_path / "lab" / "store.duckdb")
    job = MergeJob(recipe_of("average", {}, [], 0), ((MNIST.id, str(tmp_path / name)),), str(base))
    merge_models(lab, job, tmp_path / "out")
    rows = lab.store.query("select value from environment where key = 'query_key_value'").rows
    assert [json.loads(value) for (value,) in rows] == [{"base": "split", MNIST.id: layout, "merged": "split"}]


@pytest.mark.parametrize(("task", "given", "length"), [
    ("vision8/dtd", {}, {"epochs": 76}),
    ("vision20/kmnist", {}, {"max_steps": 2000}),
    ("vision8/dtd", {"max_steps": 3}, {"max_steps": 3}),
    ("files/mine", {"epochs": 2.0}, {"epochs": 2.0}),
])  # fmt: skip
def test_the_preset_of_the_vision_studies(task: str, given: dict[str, Any], length: dict[str, Any]) -> None:
    usual = {"lr": 1e-5, "weight_decay": 0.1, "scheduler": "cosine", "warmup_steps": 500, "max_grad_norm": 1.0}
    found = settled(task, CONFIG, {"preset": "vision", "smaller_batch": 4, **given})
    assert found == {**usual, "batch_size": 32, "accumulation": 4, **length}


def test_the_preset_of_the_vision_studies_is_for_images() -> None:
    with pytest.raises(UserError, match="The preset vision is for models that read images, and glue/rte is trained"):
        settled("glue/rte", {"model_type": "bert"}, {"preset": "vision"})


class _Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("sprung"),))


@pytest.mark.parametrize("content", [torch.nn.Linear(2, 2), _Trap()], ids=["model", "trap"])
def test_pickled_models_are_refused_unread(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "finetuned.pt")
    with pytest.raises(
        UserError, match=r"no plain state dict; .* never run here\. Where you trust it, save its weights"
    ):
        open_checkpoint(tmp_path / "finetuned.pt")
    assert not Path("sprung").exists()


def test_a_file_of_other_weights_is_no_image_encoder(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="is no state dict of an open_clip image encoder"):
        open_checkpoint(tmp_path / "other.pt")
    torch.save({"visual.conv1.weight": torch.zeros(1), "visual.attnpool.bias": torch.zeros(2)}, tmp_path / "resnet.pt")
    with pytest.raises(UserError, match=r"has the weight 'visual\.attnpool\.bias'"):
        open_checkpoint(tmp_path / "resnet.pt")


@pytest.mark.parametrize("size", [(24, 20), (19, 33), (16, 16), (7, 5)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_images_are_prepared_as_clip_does_it(size: tuple[int, int], mode: str) -> None:
    values = np.random.RandomState(1).randint(256, size=(*size[::-1], 3), dtype=np.uint8)
    picture = Image.fromarray(values).convert(mode)
    config = type("Config", (), {"model_type": "clip", "image_size": 16})
    preparer = image_preparer(None, "", config)
    found = preparer.collate(preparer.prepare(MNIST, {"image": [picture]}))["pixel_values"][0]
    assert torch.allclose(found, _pixels(Path(), picture), atol=1e-6)


def test_image_settings_beside_a_model_win_and_travel_with_it(tmp_path: Path) -> None:
    from transformers import CLIPImageProcessorPil

    config = type("Config", (), {"model_type": "clip", "image_size": 16})
    settings = {
        "do_center_crop": True,
        "size": {"shortest_edge": 20},
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [1.0],
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    preparer = image_preparer(tmp_path, "", config)
    assert preparer == ImagePreparer(16, 16, 3, (0.1, 0.2, 0.3), (1.0,), 20)
    replace(preparer, std=(1.0, 1.0, 1.0)).save(tmp_path)
    theirs = CLIPImageProcessorPil.from_pretrained(tmp_path)(pictures(1)[0], return_tensors="pt")["pixel_values"][0]
    ours = preparer.collate(preparer.prepare(MNIST, {"image": pictures(1)}))["pixel_values"][0]
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_images_wait_as_the_bytes_of_their_files(tmp_path: Path) -> None:
    pictures(1)[0].save(tmp_path / "image.png")
    content = (tmp_path / "image.png").read_bytes()
    from mergectl.benchmarks._rows import _image

    preparer = ImagePreparer(16, 16, 3, edge=16)
    assert preparer.prepare(MNIST, {"image": [_image(content, None, "")]}) == [{"image": {"bytes": content}}]
