"""The suite glue7: GLUE's rows in another order, so that heads for GLUE answer it; experts as the hub has them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mergectl import smoke
from mergectl.benchmarks._contract import same_question
from mergectl.errors import UserError
from mergectl.evaluations import evaluate_model, evaluate_references
from mergectl.families import open_family
from mergectl.heads import open_live
from mergectl.lab import Lab
from mergectl.merge import MergeJob
from mergectl.models import model_config, new_model, open_source, quiet
from mergectl.plan import recipe_of
from mergectl.tasks import answers, resolve, suite
from mergectl.verbs import merge_models

ORDER = ["cola", "sst2", "mrpc", "qqp", "mnli", "qnli", "rte"]
SEVEN, GLUE = suite("glue7"), suite("glue")
GPT2 = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 64, "pad_token_id": None}


def test_the_suite_is_seven_tasks_in_the_studys_order() -> None:
    assert [task.id for task in resolve(["glue7"])] == [f"glue7/{name}" for name in ORDER]
    assert [len(SEVEN[name].labels) for name in ORDER] == [2, 2, 2, 2, 3, 2, 2]


def test_cola_is_scored_by_matthews_and_the_others_by_accuracy_and_all_record_accuracy_and_f1() -> None:
    metrics = {name: (task.metric, *task.metrics) for name, task in SEVEN.items()}
    assert {name: found[0] for name, found in metrics.items() if found[0] != "accuracy"} == {"cola": "matthews"}
    assert all("accuracy" in found and {"f1", "weighted_f1"} & set(found) for found in metrics.values())
    assert metrics["mrpc"] == ("accuracy", "f1", "accuracy_f1")


def test_mnli_reports_on_matched_rows_and_on_request_on_mismatched_ones() -> None:
    splits = {name: SEVEN[name].parts["report"].split for name in ("mnli", "mnli_mm")}
    assert splits == {"mnli": "validation_matched", "mnli_mm": "validation_mismatched"}
    assert [task.id for task in resolve(["glue7/mnli_mm"])] == ["glue7/mnli_mm"]


def test_rows_and_cuts_are_those_of_glue() -> None:
    assert all(same_question(SEVEN[name], GLUE[name]) and SEVEN[name].parts == GLUE[name].parts for name in SEVEN)


@pytest.mark.parametrize(("head", "task", "found"), [
    ("glue/rte", SEVEN["rte"], True),
    ("glue7/rte", GLUE["rte"], True),
    ("glue7/mnli", SEVEN["mnli_mm"], True),
    ("rte", SEVEN["rte"], True),
    ("glue/rte", SEVEN["qnli"], False),
    ("glue-t5/rte", SEVEN["rte"], False),
    ("nowhere/rte", SEVEN["rte"], False),
    ("vision8/mnist", suite("vision20")["mnist"], True),
    ("snli/snli", SEVEN["mnli"], False),
])  # fmt: skip
def test_a_head_answers_what_asks_the_same(head: str, task: Any, found: bool) -> None:
    assert answers(head, task) is found


def test_other_prompts_or_words_are_another_question() -> None:
    mnist = suite("vision8")["mnist"]
    assert not same_question(mnist, replace(mnist, prompts=("a {}",)))
    assert not same_question(mnist, replace(mnist, words=mnist.labels))
    assert not same_question(replace(mnist, source=""), replace(mnist, source=""))


def test_a_bare_name_that_suites_share_means_the_one_with_the_shortest_name() -> None:
    assert [task.id for task in resolve(["rte", "mnist"])] == ["glue/rte", "vision8/mnist"]
    own = {"rte": replace(GLUE["rte"], suite="files", source="")}
    with pytest.raises(UserError, match="'rte' names several tasks: glue/rte, glue7/rte, files/rte"):
        resolve(["rte"], own)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sample rows, a tiny GPT-2, and classifiers as the hub has them: no padding, no tokenizer, no record."""
    folder = tmp_path_factory.mktemp("glue7")
    tasks = [SEVEN[name] for name in ("cola", "mnli")]
    smoke.write_rows(folder / "data", [*tasks, SEVEN["mnli_mm"]])
    smoke.make_base(folder / "base", GPT2, tasks, 0)
    for seed, task in enumerate(tasks, 1):
        config = model_config(open_source(folder / "base"), task)
        config.pad_token_id, config.id2label = None, {n: f"LABEL_{n}" for n in range(len(task.labels))}
        with quiet():
            new_model(config, task, seed).save_pretrained(folder / task.name)
    return folder


def test_hub_experts_are_merged_and_scored_with_the_tokenizer_of_their_base(place: Path, tmp_path: Path) -> None:
    lab = Lab(device="cpu", data=place / "data", store_path=tmp_path / "lab" / "store.duckdb")
    experts = tuple((f"glue7/{name}", str(place / name)) for name in ("cola", "mnli"))
    job = MergeJob(recipe_of("average", {}, [], 0), experts, str(place / "base"))
    merge_models(lab, job, tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["pad_token_id"] == 0
    family = open_family(str(place / "base"), experts)
    references = evaluate_references(lab, family, ["glue7/cola", "glue7/mnli", "glue7/mnli_mm"])
    scored = [sorted(found["evaluation"].scores) for found in references]
    every = ["glue7/cola", "glue7/mnli", "glue7/mnli_mm"]
    assert scored == [every, *[[task] for task in every]]
    roles = lab.store.query("select role, count(*) from inputs group by role order by role").rows
    assert [tuple(row) for row in roles if row[0] == "tokenizer"] == [("tokenizer", 3)]


def test_a_merged_model_answers_glue_and_mismatched_mnli_with_its_heads_for_glue7(place: Path, tmp_path: Path) -> None:
    lab = Lab(device="cpu", data=place / "data", store_path=tmp_path / "lab" / "store.duckdb")
    experts = tuple((f"glue7/{name}", str(place / name)) for name in ("cola", "mnli"))
    merge_models(lab, MergeJob(recipe_of("average", {}, [], 0), experts, str(place / "base")), tmp_path / "merged")
    found = evaluate_model(lab, str(tmp_path / "merged"), ["glue/cola", "glue7/mnli_mm"])["evaluation"]
    assert set(found.scores) == {"glue/cola", "glue7/mnli_mm"}
    with pytest.raises(UserError, match="has no head for glue7/rte, only for glue7/cola, glue7/mnli"):
        open_live(tmp_path / "merged", [SEVEN["rte"]], device="cpu")
