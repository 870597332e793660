"""Fine-tuning: it learns, it is the same for the same seed, it survives a kill, and it writes whole experts only."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mergectl.bench import logits, make_bench
from mergectl.benchmarks._contract import BenchmarkError
from mergectl.errors import UserError, WorkError
from mergectl.evaluate import evaluate
from mergectl.finetune import FinetuneConfig, finetune
from mergectl.heads import open_live
from mergectl.models import auto_class
from tests import tiny_models as tiny

TEXT_FAMILIES = [family for family in tiny.FAMILIES if family != "vit"]


class Run:
    """Collects what a run of the store would be told."""

    id = "0123456789ab"

    def __init__(self) -> None:
        self.metrics: list[tuple[str, float, str | None, str | None, int | None]] = []

    def metric(
        self, name: str, value: float, *, task: str | None = None, split: str | None = None, step: int | None = None
    ) -> None:
        self.metrics.append((name, value, task, split, step))


def config(base: Path, **facts: Any) -> FinetuneConfig:
    plain: dict[str, Any] = {"task": "tiny", "base": str(base), "epochs": 3, "lr": 3e-3, "device": "cpu", **facts}
    return FinetuneConfig(**plain)


def train(settings: FinetuneConfig, out: Path, task: Any = tiny.SHADE, **how: Any) -> dict[str, Any]:
    return finetune(settings, out, task=task, **how)


def same_weights(one: Path, two: Path) -> bool:
    a, b = (load_file(folder / "model.safetensors") for folder in (one, two))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stop_at(step: int) -> Any:
    """A progress callback that is interrupted as if by Ctrl-C."""

    def progress(done: int, total: int, text: str) -> None:
        if done == step:
            raise KeyboardInterrupt

    return progress


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("base"), "vit")


def test_an_expert_learns_its_task(vit: Path, tmp_path: Path) -> None:
    result = train(config(vit, epochs=6), tmp_path / "expert")
    assert result["score"] > 0.9
    assert evaluate(tmp_path / "expert", [tiny.SHADE]).mean > 0.9


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_every_text_family_learns(family: str, tmp_path: Path) -> None:
    base = tiny.base(tmp_path / "base", family)
    result = train(config(base, epochs=6, lr=1e-2), tmp_path / "expert", tiny.MOOD)
    assert result["score"] > 0.85


def test_numbers_are_learned_as_well(tmp_path: Path) -> None:
    base = tiny.base(tmp_path / "base", "bert")
    assert train(config(base, epochs=6, lr=1e-2), tmp_path / "expert", tiny.NUMBER)["score"] > 0.6


@pytest.mark.parametrize("peft", ["none", "lora", "ia3"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_expert_is_a_plain_model_with_the_score_it_was_chosen_for(family: str, peft: str, tmp_path: Path) -> None:
    base, task, out = tiny.base(tmp_path / "base", family), tiny.task_for(family), tmp_path / "expert"
    result = train(config(base, epochs=1, lr=1e-2, peft=peft), out, task)
    assert evaluate(out, [task], split="tune").metrics[task.id] == result["metrics"]
    model, facts = auto_class(task).from_pretrained(out, output_loading_info=True)
    assert not facts["missing_keys"] | facts["unexpected_keys"]
    assert model.config.id2label == dict(enumerate(task.labels))


@pytest.mark.parametrize("peft", ["lora", "ia3"])
@pytest.mark.parametrize("family", ["roberta", "gpt2"])
def test_a_folded_adapter_answers_as_the_adapter_does(family: str, peft: str, tmp_path: Path) -> None:
    from peft import PeftModel

    base, out = tiny.expert(tmp_path / "base", family, tiny.MOOD), tmp_path / "expert"
    train(config(base, epochs=1, lr=1e-2, peft=peft), out, tiny.MOOD)
    live = open_live(out, [tiny.MOOD])
    bench = make_bench(tiny.MOOD, live.preparer)
    start = open_live(base, [tiny.MOOD]).use("tiny/mood")
    with warnings.catch_warnings(action="ignore"):  # of peft, about transformers
        adapted = PeftModel.from_pretrained(start, str(out / "adapter"))
    np.testing.assert_allclose(logits(adapted, bench), logits(live.use("tiny/mood"), bench), atol=1e-5)


@pytest.mark.parametrize("peft", ["lora", "ia3"])
def test_adapters_train_little_but_the_whole_head(peft: str, vit: Path, tmp_path: Path) -> None:
    train(config(vit, epochs=1, peft=peft), tmp_path / "expert")
    start, after = load_file(vit / "model.safetensors"), load_file(tmp_path / "expert" / "model.safetensors")
    changed = {name for name in start if f"vit.{name}" in after and not torch.equal(start[name], after[f"vit.{name}"])}
    assert changed
    assert all(".attention." in name or "output.dense" in name for name in changed)
    assert (tmp_path / "expert" / "adapter" / "adapter_config.json").exists()


def test_the_same_seed_gives_the_same_weights(vit: Path, tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        train(config(vit, epochs=1, seed=seed), tmp_path / name)
    assert same_weights(tmp_path / "one", tmp_path / "same")
    assert not same_weights(tmp_path / "one", tmp_path / "other")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "facts"),
    [
        ("vit", {}),
        ("vit", {"eval_every": 4}),
        ("bert", {"eval_every": 4, "by_length": True}),
        ("bert", {"peft": "lora", "dropout": 0.1}),
        ("gpt2", {"peft": "ia3", "eval_every": 4}),
    ],
)
def test_an_interrupted_training_ends_as_if_it_had_not_been(family: str, facts: dict[str, Any], tmp_path: Path) -> None:
    base, task = tiny.base(tmp_path / "base", family), tiny.task_for(family)
    settings = config(base, **facts)
    straight = train(settings, tmp_path / "straight", task)
    for step in (3, 11):
        with pytest.raises(KeyboardInterrupt):
            train(settings, tmp_path / "expert", task, progress=stop_at(step))
    assert not (tmp_path / "expert").exists()
    run = Run()
    resumed = train(settings, tmp_path / "expert", task, run=run)
    assert resumed["resumed"]
    assert not straight["resumed"]
    assert resumed["curve"] == straight["curve"]
    assert len({(name, step) for name, _, _, _, step in run.metrics}) == len(run.metrics)
    assert same_weights(tmp_path / "straight", tmp_path / "expert")


@pytest.mark.slow
def test_a_half_written_training_checkpoint_is_passed_over(vit: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(config(vit), tmp_path / "expert", progress=stop_at(14))
    work = tmp_path / ".expert.training"
    (work / "checkpoint-12" / "trainer_state.json").write_text('{"epoch":')
    train(config(vit), tmp_path / "expert")
    train(config(vit), tmp_path / "straight")
    assert same_weights(tmp_path / "straight", tmp_path / "expert")


def test_another_job_does_not_go_on_with_a_foreign_training(vit: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(config(vit), tmp_path / "expert", progress=stop_at(14))
    assert not train(config(vit, lr=1e-3), tmp_path / "expert")["resumed"]


def test_nothing_is_left_beside_a_finished_expert(vit: Path, tmp_path: Path) -> None:
    train(config(vit, epochs=1), tmp_path / "expert")
    assert [path.name for path in tmp_path.iterdir()] == ["expert"]


def test_a_training_that_could_not_begin_leaves_nothing(vit: Path, tmp_path: Path) -> None:
    task = replace(tiny.SHADE, parts={"fit": tiny.SHADE.parts["fit"]})
    with pytest.raises(BenchmarkError, match="no rows for 'tune'"):
        train(config(vit, epochs=1), tmp_path / "experts" / "shade", task)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_refused_before_any_training(vit: Path, tmp_path: Path) -> None:
    steps: list[int] = []
    train(config(vit, epochs=1), tmp_path / "expert")
    with pytest.raises(UserError, match="exists already"):
        train(config(vit, epochs=1), tmp_path / "expert", progress=lambda done, *_: steps.append(done))
    assert not steps
    train(config(vit, epochs=1), tmp_path / "expert", force=True)


def train_past_the_best(base: Path, folder: Path, **facts: Any) -> tuple[dict[str, Any], list[float], Path]:
    """Train at rates that rise far too high, by seeds until an evaluation before the last is the best: what comes of
    such a training depends on the processor's roundings.
    """
    for seed in range(20):
        out = folder / str(seed)
        result = train(config(base, epochs=6, lr=1.0, warmup=0.99, seed=seed, **facts), out)
        scores = [row["score"] for row in result["curve"]]
        if scores[-1] < max(scores):
            return result, scores, out
    pytest.fail("of twenty trainings the last evaluation was the best each time")


def test_the_best_evaluation_is_kept_not_the_last(vit: Path, tmp_path: Path) -> None:
    result, scores, out = train_past_the_best(vit, tmp_path)
    assert result["score"] == max(scores)
    assert evaluate(out, [tiny.SHADE], split="tune").mean == result["score"]


def test_the_last_evaluation_is_kept_where_that_is_asked_for(vit: Path, tmp_path: Path) -> None:
    result, scores, out = train_past_the_best(vit, tmp_path, keep="last")
    assert (result["score"], result["best_step"]) == (scores[-1], result["steps"])
    assert evaluate(out, [tiny.SHADE], split="tune").mean == scores[-1]


def test_the_rows_that_report_may_choose_as_well(vit: Path, tmp_path: Path) -> None:
    run = Run()
    result = train(config(vit, epochs=2, select_on="report"), tmp_path / "expert", run=run)
    assert {split for name, _, _, split, _ in run.metrics if name == "score"} == {"report"}
    assert evaluate(tmp_path / "expert", [tiny.SHADE], split="report").metrics["tiny/shade"] == result["metrics"]
    assert json.loads((tmp_path / "expert" / "mergectl.json").read_text())["report"] == result["metrics"]


def test_every_epoch_is_recorded_in_the_run(vit: Path, tmp_path: Path) -> None:
    run = Run()
    train(config(vit, epochs=2), tmp_path / "expert", run=run)
    found = {(name, split, step) for name, _, _, split, step in run.metrics}
    tune = ("score", "accuracy", "weighted_f1")
    assert found == {
        *(("loss", "fit", step) for step in (6, 12)),
        *(("lr", "fit", step) for step in (6, 12)),
        *((name, "tune", step) for step in (6, 12) for name in tune),
    }
    assert {task for _, _, task, _, _ in run.metrics} == {"tiny/shade"}


def test_the_record_says_how_the_expert_was_made(vit: Path, tmp_path: Path) -> None:
    train(config(vit, epochs=1), tmp_path / "expert", run=Run())
    record = json.loads((tmp_path / "expert" / "mergectl.json").read_text())
    assert record["kind"] == "expert"
    assert (record["task"], record["labels"]) == ("tiny/shade", ["dark", "middle", "light"])
    assert (record["base"], record["run"]) == (str(vit), "0123456789ab")
    assert record["recipe"]["lr"] == 3e-3


def test_progress_runs_to_the_end(vit: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    train(config(vit, epochs=2), tmp_path / "expert", progress=lambda done, total, _: seen.append((done, total)))
    assert seen == [(step, 12) for step in range(1, 13)]


def test_nothing_is_printed(vit: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(config(vit, epochs=1), tmp_path / "expert")
    train(config(vit, epochs=1, peft="lora"), tmp_path / "adapted")
    assert tuple(capfd.readouterr()) == ("", "")


def test_steps_may_be_given_instead_of_epochs(vit: Path, tmp_path: Path) -> None:
    result = train(config(vit, max_steps=7, eval_every=3), tmp_path / "expert")
    assert [row["step"] for row in result["curve"] if "score" in row] == [3, 6, 7]


def test_patience_ends_a_training_that_gets_no_better(vit: Path, tmp_path: Path) -> None:
    result = train(config(vit, epochs=20, lr=1e-9, patience=2), tmp_path / "expert")
    assert result["steps"] == 3 * 6


def test_patience_is_not_renewed_by_an_interruption(vit: Path, tmp_path: Path) -> None:
    settings = config(vit, epochs=20, lr=1e-9, patience=2)
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "expert", progress=stop_at(14))
    assert train(settings, tmp_path / "expert")["steps"] == 3 * 6


def test_accumulated_parts_weigh_as_much_as_one_batch(vit: Path, tmp_path: Path) -> None:
    train(config(vit, epochs=1, batch_size=16), tmp_path / "one")
    train(config(vit, epochs=1, batch_size=4, accumulation=4), tmp_path / "parts")
    one, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "parts"))
    # The loss does not depend on a key's bias, so that Adam steps by the sign of rounding errors there.
    for name, weight in ((n, w) for n, w in one.items() if "key.bias" not in n):
        torch.testing.assert_close(parts[name], weight, atol=2e-4, rtol=1e-3)


def test_batches_by_length_hold_every_row_once_in_an_order_of_their_own_each_epoch() -> None:
    from mergectl.training import ByLength

    lengths = [chance % 37 for chance in range(0, 7001, 7)]
    sampler = ByLength(lengths, 8, seed=1)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    spread = [
        max(lengths[i] for i in first[k : k + 8]) - min(lengths[i] for i in first[k : k + 8]) for k in range(0, 800, 8)
    ]
    assert sorted(first) == sorted(second) == list(range(len(lengths)))
    assert first != second
    assert max(spread) <= 3


@pytest.mark.parametrize("task", [tiny.MOOD, tiny.NUMBER], ids=lambda task: task.name)
def test_parts_of_unequal_size_weigh_by_their_rows(task: Any, tmp_path: Path) -> None:
    base = tiny.base(tmp_path / "base", "deberta-v2")  # without dropout, the loss of one step is that of the base
    settings = json.loads((base / "config.json").read_text())
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pooler_dropout": 0.0}
    (base / "config.json").write_text(json.dumps(settings | still))
    facts: dict[str, Any] = {"epochs": 1, "limit_fit": 10}
    whole = train(config(base, **facts, batch_size=16), tmp_path / "one", task)
    parts = train(config(base, **facts, batch_size=4, accumulation=4), tmp_path / "parts", task)
    assert (parts["steps"], parts["curve"][0]["loss"]) == (1, pytest.approx(whole["curve"][0]["loss"], rel=1e-5))


@pytest.mark.parametrize("family", ["gpt2", "vit"])
def test_an_experts_configuration_says_of_the_cache_what_the_base_says(family: str, tmp_path: Path) -> None:
    base = tiny.base(tmp_path / "base", family)
    train(config(base, epochs=1), tmp_path / "expert", tiny.task_for(family))
    start, after = (json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "expert"))
    assert after.get("use_cache") == start.get("use_cache")


def test_limits_cut_the_rows(vit: Path, tmp_path: Path) -> None:
    result = train(config(vit, epochs=1, limit_fit=32, limit_tune=10), tmp_path / "expert")
    assert (result["examples"], result["tune_examples"], result["steps"]) == (32, 10, 2)


def test_a_base_may_be_made_from_a_bare_configuration(tmp_path: Path) -> None:
    bare = tiny.bare(tmp_path / "bare", "vit")
    train(config(bare, epochs=1), tmp_path / "base")
    train(config(tmp_path / "base", epochs=1), tmp_path / "expert", replace(tiny.SHADE, name="other"))
    one, two = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("base", "expert"))
    assert one == two


def test_half_precision_training_runs(vit: Path, tmp_path: Path) -> None:
    train(config(vit, epochs=1, bf16=True), tmp_path / "expert")
    assert {w.dtype for w in load_file(tmp_path / "expert" / "model.safetensors").values()} == {torch.float32}


def test_a_checkpoint_that_does_not_fit_is_an_error_not_a_random_weight(vit: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(KeyboardInterrupt):
        train(config(vit), tmp_path / "expert", progress=stop_at(14))
    path = tmp_path / ".expert.training" / "checkpoint-12" / "model.safetensors"
    weights = load_file(path)
    weights.pop("classifier.bias")
    save_file(weights, path)
    with pytest.raises(WorkError, match="does not fit the model"):
        train(config(vit), tmp_path / "expert")


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        ({"epochs": 0}, "epochs must be above 0, got 0"),
        ({"lr": 50.0}, "lr must lie above 0"),
        ({"warmup": 6}, "warmup must lie between 0 and 0.99: it is a share of all steps, got 6"),
        ({"peft": "lore"}, "peft must be one of none, lora, ia3, got 'lore'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_wrong_settings_are_one_sentence(facts: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        FinetuneConfig(task="tiny", base="base", **facts)


def test_unknown_adapter_targets_are_one_sentence(vit: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        train(config(vit, peft="lora", targets=("nowhere",)), tmp_path / "expert")
