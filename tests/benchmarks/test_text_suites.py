"""The text-to-text suites: prompts to the byte, splits to the row, labels to the answer."""

from __future__ import annotations

import doctest
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mergectl.benchmarks import _rows, _templates, glue, glue_t5, qa7, sentences, sentences_t5, t0_heldout
from mergectl.benchmarks._contract import BenchmarkError, Task, Template, Use, with_suite
from mergectl.benchmarks._templates import Words, ask

GOLDEN = Path(__file__).parent.parent / "golden" / "medusa" / "prompts.json"
PROMPTS: dict[str, list[dict[str, Any]]] = json.loads(GOLDEN.read_text(encoding="utf-8"))
SUITES = {
    "glue-t5": glue_t5.TASKS,
    "sentences-t5": sentences_t5.TASKS,
    "qa7": qa7.TASKS,
    "t0-heldout": t0_heldout.TASKS,
}
ALL = [with_suite(task, suite) for suite, tasks in SUITES.items() for task in tasks]
QA7 = {task.name: task for task in qa7.TASKS}
HELD_OUT = {task.name: task for task in t0_heldout.TASKS}

every_task = pytest.mark.parametrize("task", ALL, ids=lambda task: task.id)


def save(folder: Path, task: Task, split: str, rows: list[dict[str, Any]]) -> None:
    """Write a split where the lab looks for it."""
    path = folder / task.source / task.config / f"{split}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def asked(task: Task, row: dict[str, Any], folder: Path, template: int = 0) -> tuple[str, list[str], str]:
    """The text, the answers and the right answer of one source row of the split that reports."""
    save(folder, task, task.parts["report"].split, [row] * 2)  # of two rows one tunes and one reports
    rows = _rows.load(task, "report", data=folder, template=template)
    text, answers = rows.columns["text"][0], rows.columns["answers"][0]
    return text, answers, answers[int(rows.labels[0])]


def test_the_tasks_of_each_suite_are_those_of_the_papers() -> None:
    assert {suite: [task.name for task in tasks] for suite, tasks in SUITES.items()} == {
        "glue-t5": ["cola", "sst2", "rte", "wnli", "mrpc", "mnli", "qnli", "qqp"],
        "sentences-t5": ["trec", "subj", "rotten_tomatoes", "ag_news"],
        "qa7": ["paws", "qasc", "quartz", "story_cloze", "wiki_qa", "winogrande", "wsc"],
        "t0-heldout": [
            "rte", "cb", "winogrande", "wic", "wsc", "copa", "h-swag", "story_cloze", "anli-r1", "anli-r2", "anli-r3",
        ],
    }  # fmt: skip


@pytest.mark.parametrize("name", PROMPTS)
def test_glue_prompts_and_targets_are_those_of_the_study_to_the_byte(name: str, tmp_path: Path) -> None:
    task = next(task for task in glue_t5.TASKS if task.name == name)
    for number, case in enumerate(PROMPTS[name]):
        text, _, target = asked(task, case["row"], tmp_path / str(number))
        assert (text, target) == (case["input"], case["target"])


def test_every_glue_target_is_in_its_place() -> None:
    two_way = ["entailment", "not_entailment"]
    assert {task.name: list(task.templates[0].ask(task.samples[0])[1]) for task in glue_t5.TASKS} == {
        "cola": ["unacceptable", "acceptable"],
        "sst2": ["negative", "positive"],
        "rte": two_way,
        "wnli": two_way[::-1],
        "mrpc": ["not_equivalent", "equivalent"],
        "mnli": ["entailment", "neutral", "contradiction"],
        "qnli": two_way,
        "qqp": ["not_duplicate", "duplicate"],
    }


@pytest.mark.parametrize(("own", "plain"), [(glue_t5, glue), (sentences_t5, sentences)], ids=["glue", "sentences"])
def test_a_suite_in_words_reads_the_rows_of_the_plain_one_and_is_scored_by_accuracy(own: Any, plain: Any) -> None:
    tasks = {task.name: task for task in plain.TASKS}
    for task in own.TASKS:
        same = tasks[task.name]
        assert (task.parts, task.source, task.config, task.hub) == (same.parts, same.source, same.config, same.hub)
        assert (task.metric, task.metrics) == ("accuracy", ())


def test_sentences_in_words_are_asked_as_the_study_asks_glue() -> None:
    trec = next(task for task in sentences_t5.TASKS if task.name == "trec")
    text, answers = trec.templates[0].ask({"text": "Where is it ?"})
    assert text == "trec text: Where is it ?"
    assert answers == ("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM")


@every_task
def test_a_template_reads_no_column_that_the_task_does_not_name(task: Task) -> None:
    words = [template.ask for template in task.templates]
    assert all(isinstance(one, Words) and set(one.columns) <= set(task.inputs) for one in words)
    assert {name for one in words if isinstance(one, Words) for name in one.columns} == set(task.inputs)


@every_task
def test_every_template_offers_different_answers_one_for_each_label(task: Task) -> None:
    for template in task.templates:
        for sample in task.samples:
            text, answers = template.ask(sample)
            assert text.strip() == text
            assert len(set(answers)) == len(answers) == len(task.labels)


@every_task
def test_no_two_templates_of_a_task_ask_alike(task: Task) -> None:
    texts = [template.ask(task.samples[0])[0] for template in task.templates]
    assert len(set(texts)) == len(texts)
    assert len({template.name for template in task.templates}) == len(texts)


@pytest.mark.parametrize("task", [*qa7.TASKS, *t0_heldout.TASKS], ids=lambda task: f"{task.name}-{task.pool}")
def test_a_task_can_be_asked_in_three_ways_or_more(task: Task) -> None:
    assert len(task.templates) >= 3


def test_held_out_tasks_count_by_the_median_and_the_others_by_their_first_template() -> None:
    assert {suite: {task.pool for task in tasks} for suite, tasks in SUITES.items()} == {
        "glue-t5": {"first"},
        "sentences-t5": {"first"},
        "qa7": {"first"},
        "t0-heldout": {"median"},
    }


def split_ids(task: Task, use: Use, folder: Path) -> list[str]:
    return _rows.load(task, use, data=folder).ids


CUT = [task for task in [*qa7.TASKS, *t0_heldout.TASKS] if task.parts["tune"].take is not None]


@pytest.mark.parametrize("task", CUT, ids=lambda task: f"{task.name}-{task.pool}")
def test_the_first_32_of_pythons_shuffle_tune_and_the_rest_report(task: Task, tmp_path: Path) -> None:
    parts = task.parts
    for split in {part.split for part in parts.values()}:
        save(tmp_path, task, split, [{**task.samples[row % 2]} for row in range(50)])
    order = list(range(50))
    random.seed(42)
    random.shuffle(order)
    cut = parts["tune"].split
    assert split_ids(task, "tune", tmp_path) == [f"{cut}/{row}" for row in order[:32]]
    if parts["report"].split == cut:
        assert split_ids(task, "report", tmp_path) == [f"{cut}/{row}" for row in order[32:]]
    else:
        assert split_ids(task, "report", tmp_path) == [f"{parts['report'].split}/{row}" for row in range(50)]


def test_which_split_serves_which_use() -> None:
    found = {task.name: [task.parts[use].split for use in ("fit", "tune", "report")] for task in [*qa7.TASKS]}
    usual, official = ["train", "validation", "validation"], ["train", "validation", "test"]
    assert found == {
        "paws": official,
        "qasc": usual,
        "quartz": official,
        "story_cloze": ["validation", "test", "test"],
        "wiki_qa": official,
        "winogrande": usual,
        "wsc": usual,
    }
    uncut = [task.name for task in qa7.TASKS if task.parts["tune"].take is None]
    assert uncut == ["paws", "quartz", "wiki_qa"]
    anli = [[HELD_OUT[f"anli-r{n}"].parts[use].split for use in ("fit", "tune", "report")] for n in (1, 2, 3)]
    assert anli == [[f"train_r{n}", f"dev_r{n}", f"test_r{n}"] for n in (1, 2, 3)]


CHOICES = {"text": ["sand", "nectar", "iron", "smoke", "salt", "oil", "snow", "glass"], "label": list("ABCDEFGH")}
ENDINGS = {f"InputSentence{n}": f"S{n}." for n in (1, 2, 3, 4)} | {
    "RandomFifthSentenceQuiz1": "One.",
    "RandomFifthSentenceQuiz2": "Two.",
}
INFERENCE = {"premise": "It rained.", "hypothesis": "It was wet."}
# Rows as the sources hold them, and the right answer under the first template.
ROWS: list[tuple[Task, dict[str, Any], str]] = [
    (QA7["paws"], {"sentence1": "a", "sentence2": "b", "label": 1}, "yes"),
    (QA7["qasc"], {"question": "q", "choices": CHOICES, "answerKey": "B"}, "nectar"),
    (QA7["qasc"], {"question": "q", "choices": CHOICES, "answerKey": "H"}, "glass"),
    (QA7["quartz"], {"para": "p", "question": "q", "choices": {"text": ["up", "down"], "label": ["A", "B"]},
                     "answerKey": "B"}, "down"),
    (QA7["story_cloze"], {**ENDINGS, "AnswerRightEnding": 1}, "One."),
    (QA7["story_cloze"], {**ENDINGS, "AnswerRightEnding": 2}, "Two."),
    (QA7["wiki_qa"], {"question": "q", "answer": "a", "label": 0}, "no"),
    (QA7["winogrande"], {"sentence": "the _ is", "option1": "cup", "option2": "box", "answer": "2"}, "box"),
    (QA7["wsc"], {"text": "t", "span1_text": "Eve", "span2_text": "she", "label": 1}, "yes"),
    (HELD_OUT["rte"], {**INFERENCE, "label": 1}, "no"),
    (HELD_OUT["cb"], {**INFERENCE, "label": 0}, "yes"),
    (HELD_OUT["cb"], {**INFERENCE, "label": 1}, "no"),
    (HELD_OUT["cb"], {**INFERENCE, "label": 2}, "maybe"),
    (HELD_OUT["anli-r1"], {**INFERENCE, "label": 1}, "maybe"),
    (HELD_OUT["anli-r1"], {**INFERENCE, "label": 2}, "no"),
    (HELD_OUT["wic"], {"word": "w", "sentence1": "a", "sentence2": "b", "label": 0}, "no"),
    (HELD_OUT["copa"], {"premise": "p", "choice1": "x", "choice2": "y", "question": "cause", "label": 1}, "y"),
    (HELD_OUT["h-swag"], {"activity_label": "a", "ctx": "c", "endings": list("wxyz"), "label": "2"}, "y"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "row", "answer"), ROWS, ids=lambda value: getattr(value, "name", None))
def test_a_row_of_the_source_has_the_right_answer(task: Task, row: dict[str, Any], answer: str, tmp_path: Path) -> None:
    assert asked(task, row, tmp_path)[2] == answer


def test_copa_asks_for_cause_and_effect_in_words(tmp_path: Path) -> None:
    row = {"premise": "It fell.", "choice1": "x", "choice2": "y", "label": 0}
    texts = [
        asked(HELD_OUT["copa"], {**row, "question": kind}, tmp_path / kind, template=1)[0]
        for kind in ("cause", "effect")
    ]
    assert texts == ["It fell. This came about because:", "It fell. As a result:"]


def test_hidden_labels_of_choices_are_told_by_their_row(tmp_path: Path) -> None:
    row = {"question": "q", "choices": CHOICES, "answerKey": ""}
    with pytest.raises(BenchmarkError, match=r"row \d: 'answerKey' is '', which is no label of qa7/qasc"):
        asked(with_suite(QA7["qasc"], "qa7"), row, tmp_path)


STORY = with_suite(QA7["story_cloze"], "qa7")


def test_story_cloze_says_who_hands_it_out_and_where_its_file_goes(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError) as refused:
        _rows.load(STORY, "fit", data=tmp_path)
    sentence = str(refused.value)
    assert "its authors hand it out (https://cs.rochester.edu/nlp/rocstories)" in sentence
    assert sentence.endswith(f"Put them at {tmp_path}/story_cloze/2016/validation.csv.")


def test_story_cloze_without_a_data_folder_asks_for_one() -> None:
    with pytest.raises(BenchmarkError, match=r"DIR/story_cloze/2016/test\.csv and pass --data DIR\.$"):
        _rows.load(STORY, "report")


def test_story_cloze_is_read_from_the_csv_of_its_authors(tmp_path: Path) -> None:
    folder = tmp_path / "story_cloze" / "2016"
    folder.mkdir(parents=True)
    header = ["InputStoryid", *STORY.inputs, STORY.label]
    lines = [",".join(header)]
    lines += [f'{n}-id,"Ann, {n}.",Two.,"She said ""no"".",Four.,Yes {n}.,No {n}.,{1 + n % 2}' for n in range(3)]
    (folder / "validation.csv").write_text("\r\n".join(lines) + "\r\n", encoding="utf-8")
    rows = _rows.load(STORY, "fit", data=tmp_path)
    assert rows.labels == [0, 1, 0]
    assert rows.columns["answers"][1] == ["Yes 1.", "No 1."]
    assert rows.columns["text"][0].startswith('Ann, 0. Two. She said "no". Four.\n')


def test_a_parquet_file_comes_before_a_csv_of_the_same_split(tmp_path: Path) -> None:
    task = QA7["wiki_qa"]
    save(tmp_path, task, "test", [{"question": "parquet", "answer": "a", "label": 0}])
    (tmp_path / "wiki_qa" / "default" / "test.csv").write_text("question,answer,label\ncsv,a,0\n")
    assert "parquet" in _rows.load(task, "report", data=tmp_path).columns["text"][0]


def test_braces_in_a_row_are_only_text() -> None:
    template: Template = ask("echo", "Say {a}", "{b}", "no")
    assert template.ask({"a": "{b} {0} {", "b": "}"}) == ("Say {b} {0} {", ("}", "no"))


def test_a_row_without_text_is_no_question() -> None:
    with pytest.raises(BenchmarkError, match="The column 'a' must hold texts, got None"):
        ask("echo", "Say {a}", "yes", "no").ask({"a": None})


@pytest.mark.parametrize("module", [glue_t5, qa7, t0_heldout, _templates], ids=lambda module: module.__name__)
def test_the_examples_in_the_text_suites_are_true(module: Any) -> None:
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0
