"""Scoring: heads put on, weights swapped in place, the same numbers as transformers itself gives."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergectl.bench import logits, make_bench, score_model
from mergectl.benchmarks import _metrics, _rows
from mergectl.errors import UserError
from mergectl.evaluate import evaluate
from mergectl.heads import open_live
from mergectl.live import LiveModel, label_order
from mergectl.models import auto_class
from mergectl.naming import live_tensors
from tests import tiny_models as tiny

SECOND = replace(tiny.SHADE, name="second", labels=("a", "b", "c"))
TEXT_FAMILIES = [family for family in tiny.FAMILIES if family != "vit"]


def outputs(live: LiveModel, task: Any, batch_size: int = 64) -> Any:
    return logits(live.use(task.id), make_bench(task, live.preparer, batch_size=batch_size))


def merged_folder(folder: Path, base: Path, experts: dict[str, Path], *, masks: bool = False) -> Path:
    """A folder laid out as `merge` writes it: the base's names, heads below `tasks/`, masks where asked for."""
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if (base / name).exists():
            (folder / name).write_text((base / name).read_text())
    weights = load_file(base / "model.safetensors")
    unified = {name: torch.full_like(weight, 0.25) for name, weight in weights.items()}
    shared = {name: weight + unified[name] for name, weight in weights.items()} if masks else weights
    save_file(shared, folder / "model.safetensors", {"format": "pt"})
    for task, expert in experts.items():
        target = folder / "tasks" / task
        target.mkdir(parents=True)
        full = load_file(expert / "model.safetensors")
        head = {name: weight for name, weight in full.items() if name.startswith(("classifier", "score", "pooler"))}
        save_file(head, target / "head.safetensors", {"format": "pt"})
        meta = json.loads((expert / "mergectl.json").read_text())
        record = {"task": meta["task"], "labels": meta["labels"]}
        if masks:
            packed = {n: np.packbits(keep(task, n, w), bitorder="little") for n, w in weights.items()}
            save_file({n: torch.from_numpy(bits) for n, bits in packed.items()}, target / "masks.safetensors")
            record["rescaler"] = 2.0
        (target / "task.json").write_text(json.dumps(record))
    if masks:
        save_file(unified, folder / "unified.safetensors")
    return folder


def keep(task: str, name: str, weight: torch.Tensor) -> Any:
    numbers = np.random.RandomState(len(task + name))
    return numbers.randint(2, size=weight.numel()).astype(bool)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_an_expert_scores_as_transformers_computes_it(family: str, tmp_path: Path) -> None:
    folder, task = tiny.expert(tmp_path, family), tiny.task_for(family)
    model = auto_class(task).from_pretrained(folder, dtype=torch.float32).eval()
    live = open_live(folder, [task])
    rows = _rows.load(task, "report")
    batch = live.preparer.collate(live.preparer.prepare(task, rows.columns))
    model.config.pad_token_id = 0  # the GPT-2 of the tests has none, and needs one to find the last word
    with torch.no_grad():
        expected = model(**batch).logits.numpy()
    found = evaluate(folder, [task]).metrics[task.id]
    assert found["score"] == _metrics.scores(task, rows.labels, expected)[task.metric]
    np.testing.assert_allclose(outputs(live, task), expected, atol=2e-5)


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_the_size_of_batches_changes_nothing_and_order_comes_back(family: str, tmp_path: Path) -> None:
    live = open_live(tiny.expert(tmp_path, family), [tiny.MOOD])
    np.testing.assert_allclose(outputs(live, tiny.MOOD, 5), outputs(live, tiny.MOOD, 64), atol=2e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_base_is_scored_with_borrowed_heads(family: str, tmp_path: Path) -> None:
    task = tiny.task_for(family)
    base, expert = tiny.base(tmp_path / "base", family), tiny.expert(tmp_path / "expert", family)
    found = evaluate(base, [task], heads={task.id: expert}).scores[task.id]
    full = auto_class(task).from_pretrained(expert, dtype=torch.float32)
    backbone, start = live_tensors(full), load_file(base / "model.safetensors")
    with torch.no_grad():
        for name, weight in start.items():
            if (slot := f"{full.base_model_prefix}.{name}") in backbone:
                backbone[slot].copy_(weight)
    bench = make_bench(task, open_live(expert, [task]).preparer)
    full.config.pad_token_id = 0
    assert found == score_model(full, bench)["score"]


def test_a_merged_folder_puts_its_heads_on_by_itself(tmp_path: Path) -> None:
    base = tiny.base(tmp_path / "base", "vit")
    experts = {
        "shade": tiny.expert(tmp_path / "one", "vit", seed=1),
        "second": tiny.expert(tmp_path / "two", "vit", SECOND, seed=2),
    }
    merged = merged_folder(tmp_path / "merged", base, experts)
    by_itself = evaluate(merged, [tiny.SHADE, SECOND])
    borrowed = evaluate(base, [tiny.SHADE, SECOND], heads={"tiny/shade": experts["shade"], "second": experts["second"]})
    assert by_itself.metrics == borrowed.metrics


def test_tasks_taken_in_turn_give_bit_for_bit_the_same(tmp_path: Path) -> None:
    base = tiny.base(tmp_path / "base", "bert")
    one, two = tiny.expert(tmp_path / "one", "bert"), tiny.expert(tmp_path / "two", "bert", tiny.NUMBER)
    live = open_live(base, [tiny.MOOD, tiny.NUMBER], heads={"tiny/mood": one, "tiny/number": two})
    first = outputs(live, tiny.MOOD)
    assert outputs(live, tiny.NUMBER).shape == (96, 1)
    assert np.array_equal(outputs(live, tiny.MOOD), first)


def test_masked_weights_are_base_plus_rescaled_masked_vector(tmp_path: Path) -> None:
    base = tiny.base(tmp_path / "base", "vit")
    experts = {"shade": tiny.expert(tmp_path / "one", "vit"), "second": tiny.expert(tmp_path / "two", "vit", SECOND)}
    live = open_live(merged_folder(tmp_path / "merged", base, experts, masks=True), [tiny.SHADE, SECOND])
    for task in ("shade", "second", "shade"):
        live.use(f"tiny/{task}")
        for name, weight in load_file(base / "model.safetensors").items():
            slot = live.slot(name)
            if slot is not None:
                mask = torch.from_numpy(keep(task, name, weight)).reshape(weight.shape)
                torch.testing.assert_close(live.backbone[slot], weight + 2.0 * mask * 0.25)


def test_masked_tasks_taken_in_turn_give_bit_for_bit_the_same(tmp_path: Path) -> None:
    base = tiny.base(tmp_path / "base", "vit")
    experts = {"shade": tiny.expert(tmp_path / "one", "vit"), "second": tiny.expert(tmp_path / "two", "vit", SECOND)}
    live = open_live(merged_folder(tmp_path / "merged", base, experts, masks=True), [tiny.SHADE, SECOND])
    first, other = outputs(live, tiny.SHADE), outputs(live, SECOND)
    assert np.array_equal(outputs(live, tiny.SHADE), first)
    assert np.array_equal(outputs(live, SECOND), other)


def test_masks_may_change_between_two_uses(tmp_path: Path) -> None:
    live = open_live(tiny.expert(tmp_path, "vit"), [tiny.SHADE])
    base = {name: weight.clone() for name, weight in live.backbone.items()}
    ones = {name: torch.ones_like(weight) for name, weight in base.items()}
    for share in (True, False):
        live.load_backbone({name: weight + 1 for name, weight in base.items()})
        live.keep(ones, base=base)
        live.set_masks("tiny/shade", {name: torch.full(w.shape, share) for name, w in base.items()}, 3.0)
        live.use("tiny/shade")
        name = "vit.embeddings.cls_token"
        torch.testing.assert_close(live.backbone[name], base[name] + (3.0 if share else 0.0))


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("prefixed", [True, False])
def test_weights_are_swapped_in_by_name_with_or_without_prefix(family: str, prefixed: bool, tmp_path: Path) -> None:
    task = tiny.task_for(family)
    one, two = tiny.expert(tmp_path / "one", family, seed=1), tiny.expert(tmp_path / "two", family, seed=2)
    live = open_live(one, [task], heads={task.id: two})
    before = outputs(live, task)
    cut = "" if prefixed else f"{live.prefix}."
    weights = load_file(two / "model.safetensors")
    live.load_backbone({name.removeprefix(cut): weight for name, weight in weights.items() if live.slot(name)})
    assert not np.array_equal(outputs(live, task), before)
    assert np.array_equal(outputs(live, task), outputs(open_live(two, [task]), task))


def test_a_lost_weight_is_an_error_when_weights_are_swapped(tmp_path: Path) -> None:
    live = open_live(tiny.expert(tmp_path, "bert"), [tiny.MOOD])
    weights = dict(live.backbone)
    del weights["bert.encoder.layer.0.output.dense.bias"]
    with pytest.raises(UserError, match=r"no weight 'bert\.encoder\.layer\.0\.output\.dense\.bias'"):
        live.load_backbone(weights)
    live.load_backbone(weights, partial=True)


def test_an_unknown_weight_is_an_error_when_weights_are_swapped(tmp_path: Path) -> None:
    live = open_live(tiny.expert(tmp_path, "bert"), [tiny.MOOD])
    with pytest.raises(UserError, match=r"no weight 'encoder\.layer\.9\.bias'"):
        live.load_backbone({**live.backbone, "encoder.layer.9.bias": torch.zeros(1)})


def test_a_weight_of_another_shape_is_an_error_when_weights_are_swapped(tmp_path: Path) -> None:
    live = open_live(tiny.expert(tmp_path, "bert"), [tiny.MOOD])
    with pytest.raises(UserError, match=r"LayerNorm\.bias' has shape \[3\] .* needs \[16\]"):
        live.load_backbone({"embeddings.LayerNorm.bias": torch.zeros(3)}, partial=True)


def test_weights_that_the_model_never_used_are_no_error(tmp_path: Path) -> None:
    base = tiny.base(tmp_path / "base", "roberta")
    weights = {**load_file(base / "model.safetensors"), "lm_head.bias": torch.zeros(17)}
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    live = open_live(base, [tiny.MOOD], heads={"mood": tiny.expert(tmp_path / "one", "roberta")})
    live.load_backbone(weights)
    assert "lm_head.bias" in live.unused


def test_a_task_without_a_head_is_told_which_heads_there_are(tmp_path: Path) -> None:
    expert = tiny.expert(tmp_path, "vit")
    with pytest.raises(UserError, match=r"has no head for tiny/second, only for tiny/shade\..*finetune tiny/second"):
        evaluate(expert, [SECOND])


def test_a_head_of_the_wrong_size_is_refused(tmp_path: Path) -> None:
    base, expert = tiny.base(tmp_path / "base", "vit"), tiny.expert(tmp_path / "one", "vit")
    two = replace(tiny.SHADE, name="two", labels=("dark", "light"))
    with pytest.raises(UserError, match=r"shape \[3.* tiny/two with its 2 labels"):
        evaluate(base, [two], heads={"two": expert})


def test_a_model_without_any_record_is_taken_as_an_expert(tmp_path: Path) -> None:
    expert = tiny.expert(tmp_path, "vit")
    before = evaluate(expert, [tiny.SHADE])
    (expert / "mergectl.json").unlink()
    assert evaluate(expert, [tiny.SHADE]).metrics == before.metrics


def test_a_head_with_its_labels_in_another_order_is_read_by_name(tmp_path: Path) -> None:
    expert = tiny.expert(tmp_path, "vit")
    before = evaluate(expert, [tiny.SHADE]).metrics
    weights = load_file(expert / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = weights[name][[2, 0, 1]].contiguous()
    save_file(weights, expert / "model.safetensors", {"format": "pt"})
    record = json.loads((expert / "mergectl.json").read_text())
    (expert / "mergectl.json").write_text(json.dumps({**record, "labels": ["Light", "dark", "middle"]}))
    assert evaluate(expert, [tiny.SHADE]).metrics == before


@pytest.mark.parametrize("labels", [None, ["LABEL_0", "LABEL_1", "LABEL_2"], ["dark", "middle", "light"]])
def test_labels_in_order_or_without_meaning_are_left_alone(labels: list[str] | None) -> None:
    assert label_order(labels, tiny.SHADE) is None


def test_a_number_is_scored_by_correlation(tmp_path: Path) -> None:
    found = evaluate(tiny.expert(tmp_path, "bert", tiny.NUMBER), [tiny.NUMBER]).metrics["tiny/number"]
    assert found["score"] == found["pearson"]
    assert -1 <= found["score"] <= 1


def test_a_task_may_be_answered_by_the_head_of_another(tmp_path: Path) -> None:
    three = replace(tiny.SHADE, name="three", head=("no", "yes"))
    two = replace(tiny.SHADE, name="two", labels=("no", "yes"))
    expert = tiny.expert(tmp_path, "vit", two)
    assert 0 <= evaluate(expert, [three], heads={"three": expert}).mean <= 1


def test_limit_and_split_choose_the_rows(tmp_path: Path) -> None:
    expert = tiny.expert(tmp_path, "vit")
    found = evaluate(expert, [tiny.SHADE], split="tune", limit=10, seed=3)
    assert found.split == "tune"
    assert found.examples == {"tiny/shade": 10}


def test_the_mean_is_over_tasks(tmp_path: Path) -> None:
    base, expert = tiny.base(tmp_path / "base", "vit"), tiny.expert(tmp_path / "one", "vit")
    found = evaluate(base, [tiny.SHADE, SECOND], heads={"shade": expert, "second": expert})
    assert found.mean == pytest.approx(sum(found.scores.values()) / 2)


def test_half_precision_gives_nearly_the_same_logits(tmp_path: Path) -> None:
    live = open_live(tiny.expert(tmp_path, "bert"), [tiny.MOOD])
    bench = make_bench(tiny.MOOD, live.preparer)
    half = logits(live.use("tiny/mood"), bench, dtype="bfloat16")
    np.testing.assert_allclose(half, logits(live.use("tiny/mood"), bench), atol=0.1)


def test_an_unknown_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="got 'int8'"):
        evaluate(tiny.expert(tmp_path, "vit"), [tiny.SHADE], dtype="int8")


def test_scoring_leaves_a_model_in_training_as_it_was(tmp_path: Path) -> None:
    live = open_live(tiny.expert(tmp_path, "vit"), [tiny.SHADE])
    live.model.train()
    score_model(live.model, make_bench(tiny.SHADE, live.preparer))
    assert live.model.training


def test_texts_and_images_at_once_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No model reads both images"):
        evaluate(tiny.expert(tmp_path, "vit"), [tiny.SHADE, tiny.MOOD])


def test_a_bare_configuration_cannot_be_scored(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="bare configuration"):
        evaluate(tiny.bare(tmp_path, "vit"), [tiny.SHADE])


def test_progress_counts_batches(tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    evaluate(tiny.expert(tmp_path, "vit"), [tiny.SHADE], batch_size=40, progress=lambda *facts: seen.append(facts))
    assert seen == [(1, 3, "tiny/shade"), (2, 3, "tiny/shade"), (3, 3, "tiny/shade")]
