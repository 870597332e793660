"""Text-to-text: tiny T5 models, tied and untied, are trained, merged, reloaded and asked for answers in words."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

from mergectl import merge_weights
from mergectl.answers import greedy_likelihoods, greedy_prob, rank, write
from mergectl.bench import bench_of, logits, make_bench, score_model
from mergectl.benchmarks import _metrics, _rows
from mergectl.benchmarks._contract import BenchmarkError, Part, Take, Template, tune_few
from mergectl.errors import UserError
from mergectl.evaluate import evaluate
from mergectl.families import open_family
from mergectl.finetune import FinetuneConfig, finetune
from mergectl.heads import open_live
from mergectl.merge import MergeJob, merge
from mergectl.models import quiet
from mergectl.plan import recipe_of
from mergectl.tasks import resolve
from mergectl.training import loss
from tests import tiny_models as tiny
from tests.conftest import Cli
from tests.test_finetune import same_weights, stop_at

GOLDEN = Path(__file__).parent / "golden" / "medusa"
SPECIALS = ["<pad>", "</s>", "<unk>"]
WORDS = [*SPECIALS, *tiny.WORDS, "mood", ":", "kind", "unkind", "very"]
V10: dict[str, Any] = {
    "vocab_size": len(WORDS), "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
    "dropout_rate": 0.0,
}  # fmt: skip
V11: dict[str, Any] = {**V10, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
KINDS: dict[str, dict[str, Any]] = {"v1.0": V10, "v1.1": V11}


def plain(row: Mapping[str, Any]) -> tuple[str, list[str]]:
    return f"mood : {row['sentence']}", ["unkind", "kind"]


def wordy(row: Mapping[str, Any]) -> tuple[str, list[str]]:
    return f"is {row['sentence']}", ["very unkind", "kind"]


def empty(row: Mapping[str, Any]) -> tuple[str, list[str]]:
    return row["sentence"], ["unkind", ""]


MOOD = replace(
    tiny.MOOD, name="words", kind="text_to_text", templates=(Template("plain", plain), Template("wordy", wordy))
)


def tokenizer() -> Any:
    """A tokenizer of a few words that ends every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def fresh(kind: str, seed: int) -> Any:
    """A T5 with random weights; the head of v1.1 has some of its own."""
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = T5ForConditionalGeneration(T5Config(**KINDS[kind], decoder_start_token_id=0)).eval()
        if kind == "v1.1":
            model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn_like(model.lm_head.weight))
    return model


def base(folder: Path, kind: str, seed: int = 0) -> Path:
    """A folder with a tiny T5 and its tokenizer."""
    with quiet():
        fresh(kind, seed).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    return folder


def family(folder: Path, kind: str) -> list[Any]:
    """A base and two experts, `one` and `two`, which say which tasks they are for; returns the tasks."""
    for seed, name in enumerate(("base", "one", "two")):
        base(folder / name, kind, seed)
    for name in ("one", "two"):
        record = {"kind": "expert", "task": f"tiny/{name}", "kind_of_task": "text_to_text", "labels": list(MOOD.labels)}
        (folder / name / "mergectl.json").write_text(json.dumps(record))
    return [replace(MOOD, name=name) for name in ("one", "two")]


def reloaded(folder: Path) -> Any:
    """The model as a user's own program loads it, with nothing missing and nothing left over."""
    with quiet():
        model, facts = AutoModelForSeq2SeqLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
    assert not facts["missing_keys"] | facts["unexpected_keys"]
    return model.eval()


def settings(folder: Path, **facts: Any) -> FinetuneConfig:
    usual: dict[str, Any] = {"task": "words", "base": str(folder), "epochs": 1, "lr": 1e-2, "device": "cpu"}
    return FinetuneConfig(**{**usual, "limit_fit": 32, "limit_tune": 16, **facts})


def joined(folder: Path, method: str = "average", refine: tuple[str, ...] = (), **facts: Any) -> Path:
    """Merge the experts `one` and `two` of a folder as the command does."""
    opened = open_family(str(folder / "base"), [(None, str(folder / "one")), (None, str(folder / "two"))])
    job = MergeJob(recipe_of(method, facts, list(refine), 0), (), str(folder / "base"))
    merge(job, opened, folder / "merged", facts={}, force=False, progress=lambda *_: None)
    return folder / "merged"


def batch(model: Any, texts: list[str], answers: list[list[str]], right: list[int]) -> dict[str, torch.Tensor]:
    """The texts and their answers as one batch to score."""
    from mergectl.text2text import AnswerPreparer

    preparer = AnswerPreparer(tokenizer(), 32, pad=0, end=1, start=0)
    examples = preparer.prepare(MOOD, {"text": texts, "answers": answers})
    return preparer.stack([{**e, "labels": label} for e, label in zip(examples, right, strict=True)])


TEXTS = ["mood : good warm film", "mood : bad", "a dull cold song was the book"]
ANSWERS = [["unkind", "kind", "very very kind"], ["kind", "very unkind"], ["unkind", "kind"]]


# Answers


@pytest.mark.parametrize("kind", KINDS)
def test_an_answers_score_is_the_log_probability_of_its_tokens_and_its_end(kind: str) -> None:
    model, words = fresh(kind, 1), tokenizer()
    with torch.no_grad():
        found = rank(model, batch(model, TEXTS, ANSWERS, [0, 0, 0]))
        for row, (text, answers) in enumerate(zip(TEXTS, ANSWERS, strict=True)):
            ids = torch.tensor([words(text)["input_ids"]])
            for place, answer in enumerate(answers):
                labels = torch.tensor([words(answer)["input_ids"]])  # ends with the end token
                expected = -model(input_ids=ids, labels=labels).loss * labels.numel()
                assert float(found[row, place]) == pytest.approx(float(expected), abs=1e-4)
    assert torch.isneginf(found[1:, 2]).all()


def test_the_encoder_reads_a_row_once_whatever_the_number_of_answers() -> None:
    model, read = fresh("v1.0", 1), []
    model.get_encoder().register_forward_hook(lambda module, args, out: read.append(len(out[0])))
    with torch.no_grad():
        rank(model, batch(model, TEXTS, [["kind", "unkind", "very kind"]] * 3, [0, 0, 0]))
    assert read == [3]


def test_batches_do_not_change_the_scores() -> None:
    model = fresh("v1.1", 2)
    live = bench_of(MOOD, _preparer(), _rows.load(MOOD, "report").columns, _rows.load(MOOD, "report").labels, 64)
    small = bench_of(MOOD, _preparer(), _rows.load(MOOD, "report").columns, _rows.load(MOOD, "report").labels, 5)
    np.testing.assert_allclose(logits(model, live), logits(model, small), atol=1e-5)


def _preparer() -> Any:
    from mergectl.text2text import AnswerPreparer

    return AnswerPreparer(tokenizer(), 32, pad=0, end=1, start=0)


def test_greedy_likelihoods_are_those_of_the_reference() -> None:
    facts = json.loads((GOLDEN / "manifest.json").read_text())["answer_metric"]
    data = load_file(GOLDEN / facts["file"])
    answers = facts["params"]["answers"]
    padded = torch.tensor([[*a, *[-100] * (7 - len(a))] for a in answers])
    rows, wanted = data["labels"], []
    for row in rows:
        own = [int(token) for token in row if token]
        wanted.append(answers.index(own))
    asked = {
        "answers": padded.repeat(len(rows), 1), "owner": torch.arange(len(rows)).repeat_interleave(2),
        "right": torch.tensor(wanted), "attention_mask": torch.ones(len(rows), 1),
    }  # fmt: skip
    found = greedy_likelihoods(data["scores"], asked).argmax(1)
    correct = found == torch.tensor(wanted)
    assert correct.tolist() == data["expected.correct"].bool().tolist()
    assert float(correct.float().mean()) == facts["expected_accuracy"]


def test_greedy_likelihoods_by_hand() -> None:
    """Tokens 2 and 3 have 0.6 and 0.4 at the first step, 0.1 and 0.9 at the second; the end (1) is not counted."""
    shares = torch.tensor([[[1e-30, 1e-30, 0.6, 0.4], [1e-30, 1e-30, 0.1, 0.9]]])
    asked = {
        "answers": torch.tensor([[2, 1, -100], [2, 3, 1], [3, 3, 1]]), "owner": torch.tensor([0, 0, 0]),
        "right": torch.tensor([1]), "attention_mask": torch.ones(1, 1),
    }  # fmt: skip
    torch.testing.assert_close(greedy_likelihoods(shares.log(), asked), torch.tensor([[0.6, 0.54, 0.36]]))


def test_a_right_answer_that_another_equals_has_lost() -> None:
    asked = {
        "answers": torch.tensor([[2, 1], [3, 1]]), "owner": torch.tensor([0, 0]),
        "right": torch.tensor([0]), "attention_mask": torch.ones(1, 1),
    }  # fmt: skip
    assert greedy_likelihoods(torch.zeros(1, 1, 4), asked).tolist() == [[-1.0, 0.25]]


def test_greedy_prob_follows_the_models_own_words_and_never_ends() -> None:
    model = fresh("v1.0", 3)
    asked = batch(model, TEXTS, ANSWERS, [0, 0, 0])
    with torch.no_grad():
        found = greedy_prob(model, asked)
        read, scores = torch.zeros(3, 1, dtype=torch.long), []
        for _ in range(3):
            step = model(input_ids=asked["input_ids"], attention_mask=asked["attention_mask"], decoder_input_ids=read)
            last = step.logits[:, -1].clone()
            last[:, 1] = -torch.inf
            scores.append(last)
            read = torch.cat([read, last.argmax(1, keepdim=True)], 1)
    torch.testing.assert_close(found, greedy_likelihoods(torch.stack(scores, 1), asked))


def test_what_a_model_writes_is_no_longer_than_asked() -> None:
    model = fresh("v1.1", 3)
    written = write(model, batch(model, TEXTS, ANSWERS, [0, 0, 0]), 4).sequences
    assert written.shape[0] == 3
    assert written.shape[1] <= 5  # with the start token


@given(st.lists(st.floats(-50, -0.1), min_size=2, max_size=6), st.integers(0, 3))
def test_places_that_a_row_lacks_never_win(scores: list[float], lacking: int) -> None:
    outputs = np.array([[*scores, *[-np.inf] * lacking]])
    assert _metrics.predictions(MOOD, outputs)[0] == int(np.argmax(scores))


def test_a_row_with_a_score_that_is_no_number_is_wrong() -> None:
    outputs = np.array([[np.nan, 0.0], [-np.inf, -np.inf], [-2.0, -1.0]])
    assert _metrics.predictions(MOOD, outputs).tolist() == [_metrics.NO_ANSWER, _metrics.NO_ANSWER, 1]


# Rows


@given(st.integers(0, 200), st.integers(0, 5))
def test_the_rows_taken_are_those_of_pythons_shuffle(count: int, seed: int) -> None:
    expected = list(range(count))
    random.Random(seed).shuffle(expected)
    first = 32 if count > 32 else count // 2
    sides = [_rows.choose(count, Part("s", take=Take(side, seed=seed)), None, 0) for side in ("first", "rest")]
    assert sides == [expected[:first], expected[first:]]


def test_the_seeded_global_generator_gives_the_same_order() -> None:
    expected = list(range(50))
    state = random.getstate()
    random.seed(42)
    random.shuffle(expected)
    random.setstate(state)
    assert _rows.choose(50, Part("s", take=Take("first")), None, 0) == expected[:32]


def test_few_rows_tune_and_the_rest_or_another_split_reports() -> None:
    rest, other = tune_few("train", cut="dev"), tune_few("train", cut="dev", report="test")
    assert (rest["report"], other["report"]) == (Part("dev", take=Take("rest")), Part("test"))
    assert rest["tune"] == other["tune"] == Part("dev", take=Take("first"))


def test_rows_come_as_texts_answers_and_places() -> None:
    rows, source = _rows.load(MOOD, "fit", template=1), tiny.sentences("train")
    assert rows.columns["text"] == [f"is {text}" for text in source["sentence"]]
    assert rows.columns["answers"] == [["very unkind", "kind"]] * len(rows)
    assert rows.labels == source["label"]


def test_templates_can_take_turns() -> None:
    texts = _rows.load(MOOD, "fit", template=-1).columns["text"]
    assert [text.split()[0] for text in texts[:4]] == ["mood", "is", "mood", "is"]


def test_answers_may_differ_from_row_to_row() -> None:
    def make(split: str) -> Mapping[str, list[Any]]:
        return {"options": [["kind", "very kind"], ["a", "the", "film"]], "label": [1, 2]}

    task = replace(
        MOOD, make=make, inputs=("options",), labels=(), templates=(Template("all", lambda row: ("?", row["options"])),)
    )
    rows = _rows.load(task, "fit")
    assert rows.columns["answers"] == [["kind", "very kind"], ["a", "the", "film"]]
    assert rows.labels == [1, 2]


@pytest.mark.parametrize(
    ("ask", "label", "problem"),
    [
        (empty, 0, "the template 'odd' of tiny/words finds no text or answer here"),
        (plain, 2, "'label' is 2, but the template 'odd' of tiny/words offers only 2 answers"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named(ask: Any, label: int, problem: str) -> None:
    def make(split: str) -> Mapping[str, list[Any]]:
        return {"sentence": ["a film"], "label": [label]}

    with pytest.raises(BenchmarkError, match=problem):
        _rows.load(replace(MOOD, make=make, labels=(), templates=(Template("odd", ask),)), "fit")


def test_the_median_over_templates_counts_and_its_spread_is_told() -> None:
    model = fresh("v1.0", 5)
    alone = [
        score_model(model, make_bench(replace(MOOD, templates=(template,)), _preparer()))["score"]
        for template in MOOD.templates
    ]
    found = score_model(model, make_bench(replace(MOOD, pool="median"), _preparer()))
    assert found["score"] == pytest.approx(np.median(alone))
    assert found["iqr"] == pytest.approx(np.subtract(*np.percentile(alone, [75, 25])))
    assert "iqr" not in score_model(model, make_bench(MOOD, _preparer()))


# Training


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_learns_and_loads_as_it_was_scored(kind: str, tmp_path: Path) -> None:
    start = base(tmp_path / "base", kind)
    how = settings(start, epochs=6, batch_size=8, limit_fit=None, limit_tune=None)
    result = finetune(how, tmp_path / "expert", task=MOOD)
    assert result["score"] > 0.85
    assert evaluate(tmp_path / "expert", [MOOD], split="tune").mean == result["score"]
    model, bench = reloaded(tmp_path / "expert"), make_bench(MOOD, _preparer(), split="tune")
    assert score_model(model, bench)["score"] == result["score"]
    assert (model.lm_head.weight is model.shared.weight) == (kind == "v1.0")


@pytest.mark.parametrize("kind", KINDS)
def test_a_bare_configuration_starts_tied_or_untied_as_it_says(kind: str, tmp_path: Path) -> None:
    start = tmp_path / "bare"
    start.mkdir()
    (start / "config.json").write_text(json.dumps({"model_type": "t5", **KINDS[kind]}))
    tokenizer().save_pretrained(start)
    finetune(settings(start, max_steps=2, eval_every=2), tmp_path / "expert", task=MOOD)
    saved = load_file(tmp_path / "expert" / "model.safetensors")
    assert ("lm_head.weight" in saved) == (kind == "v1.1")
    assert reloaded(tmp_path / "expert").generation_config.decoder_start_token_id == 0
    assert json.loads((tmp_path / "expert" / "config.json").read_text())["tie_word_embeddings"] == (kind == "v1.0")


def test_what_a_configuration_does_not_say_of_its_marks_the_tokenizer_says(tmp_path: Path) -> None:
    path = base(tmp_path / "base", "v1.1") / "config.json"
    marks = dict.fromkeys(("decoder_start_token_id", "pad_token_id", "eos_token_id"))
    path.write_text(json.dumps({**json.loads(path.read_text()), **marks}))
    (tmp_path / "base" / "generation_config.json").unlink()
    finetune(settings(tmp_path / "base", max_steps=2, eval_every=2), tmp_path / "expert", task=MOOD)
    saved = json.loads((tmp_path / "expert" / "config.json").read_text())
    assert [saved[name] for name in marks] == [0, 0, 1]
    assert evaluate(tmp_path / "base", [MOOD], split="tune", limit=4, answer_metric="greedy_prob").mean >= 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_training_goes_on_to_the_same_weights(kind: str, tmp_path: Path) -> None:
    how = settings(base(tmp_path / "base", kind), epochs=2, batch_size=8)
    finetune(how, tmp_path / "whole", task=MOOD)
    with pytest.raises(KeyboardInterrupt):
        finetune(how, tmp_path / "broken", task=MOOD, progress=stop_at(6))
    assert finetune(how, tmp_path / "broken", task=MOOD)["resumed"]
    assert same_weights(tmp_path / "whole", tmp_path / "broken")


def test_how_a_batch_is_cut_for_accumulation_does_not_matter(tmp_path: Path) -> None:
    start, task = base(tmp_path / "base", "v1.1"), replace(MOOD, templates=(MOOD.templates[1],))
    how = settings(start, max_steps=4, eval_every=4, lr=1e-3)
    finetune(replace(how, batch_size=16), tmp_path / "one", task=task)
    finetune(replace(how, batch_size=4, accumulation=4), tmp_path / "four", task=task)
    one, four = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "four"))
    for name, weight in one.items():
        torch.testing.assert_close(weight, four[name], atol=1e-4, rtol=0)


def test_padding_is_no_part_of_the_loss() -> None:
    outputs = torch.randn(2, 3, 5)
    labels = torch.tensor([[1, 2, 3], [4, -100, -100]])
    shares = outputs.log_softmax(-1)
    right = [shares[0, 0, 1], shares[0, 1, 2], shares[0, 2, 3], shares[1, 0, 4]]
    torch.testing.assert_close(loss("text_to_text")({"logits": outputs}, labels), -sum(right) / 4)


def test_texts_are_cut_where_the_settings_say_and_scored_so(tmp_path: Path) -> None:
    start = base(tmp_path / "base", "v1.0")
    for name, length in (("usual", None), ("short", 4)):
        finetune(settings(start, max_steps=1, eval_every=1, max_length=length), tmp_path / name, task=MOOD)
    live = [open_live(tmp_path / name, [MOOD]).preparer_of(MOOD.id) for name in ("usual", "short")]
    assert [getattr(preparer, "max_length", None) for preparer in live] == [512, 4]


@pytest.mark.parametrize(("peft", "targets"), [("lora", {"q", "v"}), ("ia3", {"k", "v", "wo"})])
def test_adapters_sit_where_they_are_usual_in_t5(peft: str, targets: set[str], tmp_path: Path) -> None:
    start, out = base(tmp_path / "base", "v1.1"), tmp_path / "expert"
    result = finetune(settings(start, peft=peft), out, task=MOOD)
    facts = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (facts["task_type"], set(facts["target_modules"])) == ("SEQ_2_SEQ_LM", targets)
    assert not facts["modules_to_save"]
    before, after = load_file(start / "model.safetensors"), load_file(out / "model.safetensors")
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed <= targets
    assert changed
    assert evaluate(out, [MOOD], split="tune", limit=16).mean == result["score"]


# Merging


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_loads_writes_and_computes_what_was_merged(kind: str, tmp_path: Path) -> None:
    family(tmp_path, kind)
    model = reloaded(joined(tmp_path, "ties", density=0.5))
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("base", "one", "two")]
    merged = merge_weights("ties", weights[0], {"one": weights[1], "two": weights[2]}, density=0.5)
    expected = fresh(kind, 9)
    expected.load_state_dict({**merged}, strict=False)
    ids = torch.tensor([tokenizer()("mood : good film")["input_ids"]])
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids, decoder_input_ids=torch.tensor([[0, 5, 6]])).logits for m in (model, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert (model.lm_head.weight is model.shared.weight) == (kind == "v1.0")
    assert model.generate(ids, max_new_tokens=3).shape[0] == 1


def test_a_merged_model_says_which_tasks_there_are_and_needs_no_heads(tmp_path: Path) -> None:
    tasks, merged = family(tmp_path, "v1.1"), joined(tmp_path)
    assert {path.name for path in (merged / "tasks").iterdir()} == {"one", "two"}
    assert load_file(merged / "tasks" / "one" / "head.safetensors") == {}
    found = evaluate(merged, [*tasks, MOOD])
    assert len(set(found.scores.values())) == 1  # one model, the same rows


@pytest.mark.parametrize("method", ["average", "emr"])
def test_a_live_model_takes_merged_weights_as_the_written_one_has_them(method: str, tmp_path: Path) -> None:
    tasks = family(tmp_path, "v1.0")
    live = open_live(joined(tmp_path, method), tasks)
    weights = {name: load_file(tmp_path / name / "model.safetensors") for name in ("base", "one", "two")}
    merged = merge_weights(method, weights.pop("base"), weights)
    for task in tasks:
        expected = merged.task(task.name)["shared.weight"]
        torch.testing.assert_close(live.use(task.id).shared.weight, expected, atol=1e-6, rtol=0)


def test_copies_of_the_embedding_are_merged_once(tmp_path: Path) -> None:
    """Old T5 files hold the embedding four times; a random drop must not make four weights of it."""
    family(tmp_path, "v1.0")
    for name in ("base", "one", "two"):
        file = tmp_path / name / "model.safetensors"
        weights = load_file(file)
        for copy in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
            weights[copy] = weights["shared.weight"].clone()
        save_file(weights, file, metadata={"format": "pt"})
    model = reloaded(joined(tmp_path, "task_arithmetic", refine=("dare:drop=0.5",)))
    assert model.lm_head.weight is model.shared.weight is model.encoder.embed_tokens.weight


# Words


def test_a_suite_is_typed_with_a_hyphen_or_as_its_file_is_called() -> None:
    assert [task.id for task in resolve(["glue-t5/rte", "glue_t5/cola"])] == ["glue-t5/rte", "glue-t5/cola"]
    assert resolve(["glue_t5"]) == resolve(["glue-t5"])
    assert resolve(["rte"])[0].id == "glue/rte"


def test_models_and_tasks_of_different_kinds_are_told_apart(tmp_path: Path, cli: Cli, capsys: Any) -> None:
    base(tmp_path / "t5", "v1.0")
    tiny.expert(tmp_path / "bert", "bert", replace(tiny.MOOD, name="rte", suite="glue"))
    cases = {
        ("t5", "glue/rte"): "glue/rte is answered with a label by a classifier, but t5 is a t5 model",
        ("bert", "glue-t5/rte"): "glue-t5/rte is answered in words, but bert is a bert classifier",
        ("t5", "glue/rte,glue-t5/rte"): "glue-t5/rte is answered in words and glue/rte with a label",
    }
    for (model, task), sentence in cases.items():
        assert cli("eval", model, "--on", task) == 2
        assert sentence in capsys.readouterr().err.replace("\n", " ")
    assert cli("finetune", "glue/rte", "--base", "t5") == 2


def test_an_answer_metric_is_for_answers_in_words(tmp_path: Path) -> None:
    start = base(tmp_path / "base", "v1.0")
    with pytest.raises(UserError, match="must be rank or greedy_prob, got 'best'"):
        evaluate(start, [MOOD], answer_metric="best")
    with pytest.raises(UserError, match="greedy_prob is for text-to-text tasks, and tiny/mood is answered with"):
        evaluate(start, [tiny.MOOD], answer_metric="greedy_prob")
    with pytest.raises(UserError, match="--show is for text-to-text tasks"):
        evaluate(start, [tiny.MOOD], show=1)
    assert evaluate(start, [MOOD], answer_metric="greedy_prob").metrics[MOOD.id].keys() == {"score", "accuracy"}


def test_rows_are_shown_in_their_order_with_what_the_model_writes(tmp_path: Path) -> None:
    start = base(tmp_path / "base", "v1.1")
    found = evaluate(start, [MOOD], show=5, batch_size=7).written
    rows, model, words = _rows.load(MOOD, "report"), reloaded(start), tokenizer()
    assert [row.text for row in found] == rows.columns["text"][:5]
    assert [row.right for row in found] == [rows.columns["answers"][n][int(rows.labels[n])] for n in range(5)]
    for row in found:
        alone = model.generate(torch.tensor([words(row.text)["input_ids"]]), max_new_tokens=32)
        assert row.written == words.decode(alone[0], skip_special_tokens=True)
