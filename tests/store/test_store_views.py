"""The views answer with numbers a person can check: base 0.5 0.4 0.3, experts 0.9 0.8 0.5, merges between."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from mergectl.store import Run, Store, StoreError, Table, open_store
from tests.store.conftest import server_store

TASKS = ["s/a", "s/b", "s/c"]
OWN = {"s/a": "Ea", "s/b": "Eb", "s/c": "Ec"}  # the digests of the tasks' experts


def evaluate(
    store: Store, digest: str, scores: Mapping[str, float], *, heads: Mapping[str, str] = {}, split: str = "report",
    ref: str | None = None,
) -> Run:  # fmt: skip
    with store.start("eval", config={"model": digest, "split": split}) as run:
        run.input("model", ref or f"models/{digest}", digest)
        for task, head in heads.items():
            run.input("head", f"runs/{head}", head, task=task)
        for task, score in scores.items():
            run.metric("score", score, task=task, split=split)
    return run


def finetune(store: Store, task: str, digest: str, base: str = "B") -> Run:
    with store.start("finetune", config={"task": task}) as run:
        run.input("base", "org/base", base)
        run.artifact("model", f"runs/{digest}", digest, bytes=100)
    return run


def merge(
    store: Store, digest: str, config: Mapping[str, Any], tasks: Sequence[str] = TASKS, *, kind: str = "merge",
    base: str | None = "B", notes: Mapping[str, Any] = {},
) -> Run:  # fmt: skip
    with store.start(kind, config=config) as run:
        if base:
            run.input("base", "org/base", base)
        for task in tasks:
            run.input("expert", f"runs/{OWN[task]}", OWN[task], task=task)
        run.artifact("model", f"merged/{digest}", digest, bytes=50)
        for key, value in notes.items():
            run.note(key, value)
    return run


def on_tasks(*scores: float) -> dict[str, float]:
    return dict(zip(TASKS, scores, strict=False))


@pytest.fixture(scope="module", params=["file", "server"])
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Three experts of one base; TIES over all, evaluated twice; SLERP of two; an average; a merge that failed."""
    folder = tmp_path_factory.mktemp("lab")
    if request.param == "server":
        store = server_store(request.getfixturevalue("server"), folder, "whole")
    else:
        store = open_store(folder)
    for task, digest in OWN.items():
        finetune(store, task, digest)
    evaluate(store, "B", on_tasks(0.5, 0.4, 0.3), heads=OWN, ref="org/base")
    for (task, digest), score in zip(OWN.items(), (0.9, 0.8, 0.5), strict=True):
        evaluate(store, digest, {task: score})
    settings = {"density": 0.2, "scale": 0.1 + 0.2, "scope": "model", "threshold": None}
    refine = [["dare", {"drop": 0.9}], "pave:rank=2", {"name": "x", "settings": {}}]
    merge(store, "T", {"recipe": {"method": "ties", "settings": settings, "refine": refine}})
    evaluate(store, "T", on_tasks(0.1, 0.1, 0.1))
    evaluate(store, "T", on_tasks(0.7, 0.6, 0.4))
    merge(store, "S", {"method": "slerp", "settings": {"t": 0.5}}, TASKS[:2], base=None)
    evaluate(store, "S", on_tasks(0.8, 0.5))
    merge(store, "A", {"method": "average", "settings": {}}, kind="search", notes={"settings": {"scale": 1}})
    evaluate(store, "A", on_tasks(0.75, 0.65, 0.45))
    evaluate(store, "A", on_tasks(0.6, 0.6, 0.6), split="tune")
    failed = store.start("eval", config={})
    failed.input("model", "models/T", "T")
    failed.metric("score", 1.0, task="s/a", split="report")
    failed.fail("half done")
    return store


@pytest.fixture(params=["file", "server"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of either kind."""
    if request.param == "server":
        return server_store(request.getfixturevalue("server"), tmp_path)
    store: Store = request.getfixturevalue("store")
    return store


def column(table: Table, name: str, by: str = "model") -> dict[Any, Any]:
    return {row[by]: row[name] for row in table.records()}


def board(store: Store, model: str) -> list[tuple[Any, ...]]:
    asked = "SELECT task, score, relative_to_expert, normalised FROM leaderboard WHERE model = ? AND split = 'report'"
    return store.query(asked + " ORDER BY task", [model]).rows


def test_the_newest_score_counts_and_stands_between_base_and_expert(lab: Store) -> None:
    rows = board(lab, "T")
    assert [row[:2] for row in rows] == [("s/a", 0.7), ("s/b", 0.6), ("s/c", 0.4)]
    assert [row[2] for row in rows] == pytest.approx([0.7 / 0.9, 0.75, 0.8])
    assert [row[3] for row in rows] == pytest.approx([0.5, 0.5, 0.5])


def test_the_base_is_at_zero_and_every_expert_at_one(lab: Store) -> None:
    assert [row[3] for row in board(lab, "base")] == [0.0, 0.0, 0.0]
    assert [board(lab, name) for name in ("Ea", "Ec")] == [[("s/a", 0.9, 1.0, 1.0)], [("s/c", 0.5, 1.0, 1.0)]]


def test_a_merge_without_a_base_is_measured_on_its_experts_base(lab: Store) -> None:
    assert [row[3] for row in board(lab, "S")] == pytest.approx([0.75, 0.25])


def test_a_row_tells_method_refinements_and_settings_in_short(lab: Store) -> None:
    rows = lab.query("SELECT DISTINCT model, method, refine, settings, made_by FROM leaderboard ORDER BY model").rows
    assert [row for row in rows if row[0] in ("A", "T", "base")] == [
        ("A", "average", None, "scale=1", "search"),
        ("T", "ties", "dare(drop=0.9) + pave:rank=2 + x", "density=0.2, scale=0.3, scope=model", "merge"),
        ("base", None, None, None, None),
    ]


def test_the_wide_board_has_a_row_per_model_and_a_column_per_task(lab: Store) -> None:
    table = lab.leaderboard()
    assert table.columns == [
        "base", "kind", "model", "method", "refine", "settings", *TASKS, "average", "relative", "normalised", "run_id",
    ]  # fmt: skip
    assert [(row[1], row[2]) for row in table.rows] == [
        ("base", "base"), ("experts", "each task's own"), ("expert", "Ea"), ("expert", "Eb"), ("expert", "Ec"),
        ("merged", "A"), ("merged", "T"), ("merged", "S"),
    ]  # fmt: skip
    assert column(table, "s/b") == {
        "base": 0.4, "each task's own": 0.8, "Ea": None, "Eb": 0.8, "Ec": None, "A": 0.65, "T": 0.6, "S": 0.5,
    }  # fmt: skip


def test_means_stand_only_where_every_task_has_a_score(lab: Store) -> None:
    averages = column(lab.leaderboard(), "average")
    normalised = column(lab.leaderboard(), "normalised")
    assert averages == {
        "base": pytest.approx(0.4), "each task's own": pytest.approx(2.2 / 3), "Ea": None, "Eb": None, "Ec": None,
        "A": pytest.approx(1.85 / 3), "T": pytest.approx(1.7 / 3), "S": None,
    }  # fmt: skip
    assert (normalised["A"], normalised["T"], normalised["each task's own"]) == pytest.approx((2 / 3, 0.5, 1.0))


def test_asking_for_some_tasks_gives_means_over_those(lab: Store) -> None:
    table = lab.leaderboard(tasks=["s/b", "s/a"])
    assert table.columns[6:8] == ["s/b", "s/a"]
    assert column(table, "average")["S"] == pytest.approx(0.65)


def test_suite_and_split_choose_the_rows(lab: Store) -> None:
    assert lab.leaderboard(suite="other").rows == []
    assert [row[2] for row in lab.leaderboard("tune").rows] == ["A"]


def test_every_row_of_the_wide_board_names_a_run(lab: Store) -> None:
    assert all(lab.find(row[-1]) for row in lab.leaderboard().rows if row[1] != "experts")


def test_best_has_the_highest_score_of_each_method_on_each_task(lab: Store) -> None:
    rows = lab.query("SELECT task, method, score FROM best WHERE split = 'report' ORDER BY task, score DESC").rows
    assert rows[:3] == [("s/a", "slerp", 0.8), ("s/a", "average", 0.75), ("s/a", "ties", 0.7)]


def test_lineage_goes_back_to_the_base(lab: Store) -> None:
    run = lab.leaderboard().records()[-1]["run_id"]
    rows = lab.query(
        "SELECT depth, role, task, ref, parent_kind FROM lineage WHERE run_id = ? ORDER BY depth, task, ref", [run]
    ).rows
    assert rows == [
        (1, "expert", "s/a", "runs/Ea", "finetune"), (1, "expert", "s/b", "runs/Eb", "finetune"),
        (2, "base", None, "org/base", None), (2, "base", None, "org/base", None),
    ]  # fmt: skip


def test_settings_unfold_a_config(lab: Store) -> None:
    rows = lab.query("SELECT key, value, number FROM settings WHERE method = 'ties' ORDER BY key").rows
    assert ("recipe.settings.density", "0.2", 0.2) in rows
    assert ("recipe.refine[0][1].drop", "0.9", 0.9) in rows
    assert ("recipe.settings.scope", "model", None) in rows


def test_cost_sums_what_a_run_took_and_left(empty: Store) -> None:
    with empty.start("eval", config={}) as run:
        for task, examples in (("s/a", 100), ("s/b", 50)):
            run.metric("examples", examples, task=task, split="report")
        run.metric("flops", 2e9)
        run.artifact("table", "t.csv", bytes=7)
    rows = empty.query("SELECT status, examples, flops, peak_memory, bytes FROM cost").rows
    assert rows == [("finished", 150.0, 2e9, None, 7)]


def test_trials_show_value_settings_and_the_best_so_far(empty: Store) -> None:
    for number, scores in enumerate([(0.2, 0.4), (0.1, 0.3), (0.5, 0.7)]):
        config = {"method": "ties", "settings": {"scale": number / 3}}
        with empty.start("trial", config=config, study="ties-1", trial=number) as run:
            for task, score in zip(TASKS, scores, strict=False):
                run.metric("score", score, task=task, split="tune")
    with empty.start("trial", config={}, study="ties-1", trial=3) as run:
        run.metric("objective", 0.9)
        run.metric("score", 0.1, task="s/a", split="tune")
    rows = empty.query("SELECT trial, method, settings, value, best_so_far FROM trials ORDER BY trial").rows
    assert [(*row[:3], round(row[3], 9), round(row[4], 9)) for row in rows] == [
        (0, "ties", "scale=0", 0.3, 0.3), (1, "ties", "scale=0.3333", 0.2, 0.3), (2, "ties", "scale=0.6667", 0.6, 0.6),
        (3, None, None, 0.9, 0.9),
    ]  # fmt: skip


def test_compare_puts_runs_side_by_side(lab: Store) -> None:
    merges = lab.query("SELECT run_id FROM models WHERE kind = 'merged' AND name IN ('T', 'S') ORDER BY name").rows
    names = [row[0] for row in merges]
    table = lab.compare(names[0][:9], names[1])
    assert table.columns == ["section", "key", *names]
    assert ("run", "kind", "merge", "merge") in table.rows
    assert ("setting", "settings.t", "0.5", None) in table.rows
    assert ("input", "expert s/c", None, "runs/Ec") in table.rows
    assert ("result", "score s/a report", "0.8", "0.7") in table.rows


def test_compare_shows_what_a_search_chose(empty: Store) -> None:
    store = empty
    chosen = {"scale": {"s/a": 0.5}, "density": 0.25, "rescale": True, "sign": "majority", "threshold": None}
    config = {"method": "ties", "range": ["density=0:1"]}
    notes = {"settings": chosen, "given": chosen, "method": "ties"}
    searches = [merge(store, "V", config, kind="search", notes=notes), merge(store, "W", config, kind="search")]
    with store.start("merge", config={}) as odd:
        odd.note("settings", "not an object")
    found = {row[1]: row[2:] for row in store.compare(*(run.id for run in searches)).rows if row[0] == "chosen"}
    found["scale"] = tuple(value and "".join(value.split()) for value in found["scale"])
    assert found == {
        "density": ("0.25", None), "rescale": ("true", None), "sign": ("majority", None),
        "scale": ('{"s/a":0.5}', None),
    }  # fmt: skip
    assert store.compare(odd.id, searches[0].id).rows


def test_comparing_needs_known_and_different_runs(lab: Store) -> None:
    with pytest.raises(StoreError, match="No run 'nowhere'"):
        lab.compare("nowhere", "elsewhere")
    name = lab.query("SELECT run_id FROM runs LIMIT 1").rows[0][0]
    with pytest.raises(StoreError, match="two different runs"):
        lab.compare(name, name)


def test_two_recipes_that_give_the_same_weights_both_get_the_score(empty: Store) -> None:
    evaluate(empty, "Ea", {"s/a": 0.8})
    for method in ("average", "interpolate"):
        merge(empty, "M", {"method": method, "settings": {}}, ["s/a"])
    evaluate(empty, "M", {"s/a": 0.4})
    rows = empty.query("SELECT method, relative_to_expert FROM leaderboard WHERE kind = 'merged' ORDER BY method").rows
    assert rows == [("average", 0.5), ("interpolate", 0.5)]


def test_a_recipe_run_twice_has_one_row_the_newest(empty: Store) -> None:
    runs = [merge(empty, "M", {"method": "average", "settings": {}, "out": out}, ["s/a"]) for out in "ab"]
    evaluate(empty, "M", {"s/a": 0.4})
    assert empty.query("SELECT run_id FROM leaderboard").rows == [(runs[1].id,)]


def test_a_merge_that_gives_the_base_back_leaves_the_base_its_row(empty: Store) -> None:
    finetune(empty, "s/a", "Ea")
    evaluate(empty, "Ea", {"s/a": 0.8})
    run = merge(empty, "B", {"method": "task_arithmetic", "settings": {"scale": 0}}, ["s/a"])
    evaluate(empty, "B", {"s/a": 0.4}, heads={"s/a": "Ea"})
    rows = empty.query("SELECT kind, method, normalised FROM leaderboard ORDER BY kind").rows
    assert rows == [("base", None, 0.0), ("expert", None, 1.0), ("merged", "task_arithmetic", 0.0)]
    assert empty.query("SELECT count(*) FROM lineage WHERE parent = ?", [run.id]).rows == [(0,)]


def test_an_expert_no_better_than_its_base_gives_no_normalised_score(empty: Store) -> None:
    finetune(empty, "s/a", "Ea")
    evaluate(empty, "Ea", {"s/a": 0.4})
    evaluate(empty, "B", {"s/a": 0.5}, heads={"s/a": "Ea"})
    merge(empty, "M", {"method": "average", "settings": {}}, ["s/a"])
    evaluate(empty, "M", {"s/a": 0.45})
    rows = empty.query("SELECT normalised, relative_to_expert FROM leaderboard WHERE kind = 'merged'").rows
    assert rows == [(None, pytest.approx(1.125))]


def test_an_expert_is_measured_on_other_tasks_by_their_experts(empty: Store) -> None:
    for task, score in (("s/a", 0.8), ("s/b", 0.5)):
        finetune(empty, task, OWN[task])
        evaluate(empty, OWN[task], {task: score})
    evaluate(empty, "Ea", {"s/b": 0.25}, heads={"s/b": "Eb"})
    rows = empty.query("SELECT task, relative_to_expert FROM leaderboard WHERE model = 'Ea' ORDER BY task").rows
    assert rows == [("s/a", 1.0), ("s/b", 0.5)]


def test_models_that_need_no_heads_are_measured_by_the_merge_s_experts(empty: Store) -> None:
    merge(empty, "M", {"method": "average", "settings": {}}, ["s/a", "s/b"])
    for digest, first, second in (("B", 0.2, 0.2), ("Ea", 0.8, 0.3), ("Eb", 0.3, 0.6), ("M", 0.5, 0.5)):
        evaluate(empty, digest, {"s/a": first, "s/b": second})
    table = empty.leaderboard()
    assert column(table, "normalised") == {
        "B": 0.0, "each task's own": 1.0, "Ea": pytest.approx(0.625), "Eb": pytest.approx((1 / 6 + 1) / 2),
        "M": pytest.approx((0.5 + 0.75) / 2),
    }  # fmt: skip


def test_several_bases_stand_in_groups_of_their_own(empty: Store) -> None:
    for base, expert in (("B", "Ea"), ("C", "Fa")):
        finetune(empty, "s/a", expert, base=base)
        evaluate(empty, base, {"s/a": 0.5}, heads={"s/a": expert})
        evaluate(empty, expert, {"s/a": 0.75 if base == "B" else 1.0})
    rows = empty.leaderboard().rows
    assert [(row[0], row[1], row[-2]) for row in rows] == [
        ("B", "base", 0.0), ("B", "expert", 1.0), ("C", "base", 0.0), ("C", "expert", 1.0),
    ]  # fmt: skip


def test_a_score_of_a_model_nobody_made_here_is_shown_too(empty: Store) -> None:
    evaluate(empty, "X", {"s/a": 0.5}, ref="org/some-model")
    assert [row[1:3] for row in empty.leaderboard().rows] == [("model", "some-model")]


def test_a_note_of_what_was_given_shortens_the_settings(empty: Store) -> None:
    config = {"method": "ties", "settings": {"density": 0.2, "scope": "model"}}
    merge(empty, "M", config, ["s/a"], notes={"given": {"density": 0.2}})
    evaluate(empty, "M", {"s/a": 0.5})
    assert empty.query("SELECT settings FROM leaderboard").rows == [("density=0.2",)]


COOKBOOK = (Path(__file__).parents[2] / "docs" / "sql.md").read_text(encoding="utf-8")
QUESTIONS = [
    q for block in re.findall(r"```sql\n(.*?)```", COOKBOOK, flags=re.S) for q in block.split(";\n") if q.strip()
]
NOTHING_HERE = ("score > expert_score", "FROM trials", "(changed)", "'version.%'", "kind = 'finetune' AND")


@pytest.mark.parametrize("question", QUESTIONS)
def test_every_question_of_the_cookbook_is_answered(lab: Store, question: str) -> None:
    rows = lab.query(question).rows
    assert bool(rows) != any(words in question for words in NOTHING_HERE)


def test_the_cookbook_shows_only_what_differs_between_two_runs(lab: Store) -> None:
    (question,) = [question for question in QUESTIONS if "FROM compare" in question]
    rows = lab.query(question).rows
    assert ("setting", "settings.t", None, "0.5") in rows
    assert ("result", "score s/a report", "0.7", "0.8") in rows
    assert "kind" not in [row[1] for row in rows]
