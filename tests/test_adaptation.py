"""Adapting in the lab: which rows are looked at, what is learned from them, what is kept, and going on after a kill."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mergectl import adaptation_watch
from mergectl.adaptation import Draws, LabEntropy, entropy_of, read_options
from mergectl.benchmarks import _rows
from mergectl.benchmarks._contract import Task
from mergectl.errors import UserError
from mergectl.families import Family, open_family
from mergectl.heads import open_live
from mergectl.lab import Lab
from mergectl.merge import MergeJob
from mergectl.merging import MergeWarning
from mergectl.models import quiet
from mergectl.naming import live_tensors, match
from mergectl.plan import recipe_of
from mergectl.scoreboard import read_board
from mergectl.verbs import merge_models
from tests import population as tiny
from tests import tiny_models as models
from tests.conftest import Cli
from tests.test_clip import base, data, experts

__all__ = ["base", "data", "experts"]  # the fixtures of a tiny CLIP

Given = dict[str, Any]


class TinyLab(Lab):
    """A lab that knows the tiny tasks."""

    def tasks(self, words: Sequence[str]) -> list[Task]:
        """Turn their ids into tasks."""
        known = {task.id: task for task in (models.MOOD, models.NUMBER, models.SHADE)}
        return [known[word] for word in words]


def words(population: Path, out: str, method: str = "adarank", *more: object) -> list[object]:
    models_of = [population / "parity", population / "loop"]
    how = [] if "--lr" in more else ["--lr", "0.05"]
    return ["merge", method, "--base", population / "base", "--experts", *models_of, "-o", out, *how, *more]


def store(question: str, *values: Any) -> list[tuple[Any, ...]]:
    return list(Lab().store.query(question, list(values)).rows)


def family(folder: Path, kind: str, tasks: Sequence[Task] = (models.MOOD,)) -> Family:
    start = models.base(folder / "base", kind)
    paths = [models.expert(folder / task.name, kind, task, seed=k + 1) for k, task in enumerate(tasks)]
    return open_family(str(start), [(None, str(path)) for path in paths])


def candidates(opened: Family) -> dict[str, torch.Tensor]:
    view = opened.population.base
    return {name: view[name].float().clone().requires_grad_() for name in view}


@pytest.mark.parametrize("kind", ["roberta", "gpt2", "vit"])
def test_the_entropy_is_that_of_the_experts_head_on_the_merged_body(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

    task = models.task_for(kind)
    opened, lab = family(tmp_path, kind, [task]), TinyLab(device="cpu")
    supply = LabEntropy(lab, opened, read_options({"batch_size": 4}))
    weights = candidates(opened)
    found = supply(weights, 0)
    auto = AutoModelForImageClassification if kind == "vit" else AutoModelForSequenceClassification
    with quiet():
        model = auto.from_pretrained(tmp_path / task.name, dtype=torch.float32)
    if kind == "gpt2":
        model.config.pad_token_id = supply.live.model.config.pad_token_id
    with torch.no_grad():
        slots = live_tensors(model)
        for slot, name in match(weights, slots, model.base_model_prefix)[0].items():
            slots[slot].copy_(weights[name])
    preparer, rows = supply.live.preparer_of(task.id), _rows.load(task, "tune", data=None, seed=0)
    examples = preparer.prepare(task, rows.columns)
    chosen = [examples[row] for row in Draws(task.id, len(examples), 4, 0)(0)]
    logits = model.eval()(**preparer.finish(preparer.stack(chosen))).logits
    expected = entropy_of(logits, supply.options)
    torch.autograd.backward(expected)
    assert found == pytest.approx(float(expected.detach()), abs=1e-5)
    for slot, name in match(weights, slots, model.base_model_prefix)[0].items():
        mine, theirs = weights[name].grad, slots[slot].grad
        if theirs is not None:
            assert mine is not None
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_labels_are_never_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, load = family(tmp_path, "bert"), _rows.load

    def value() -> tuple[float, torch.Tensor | None]:
        weights = candidates(opened)
        found = LabEntropy(TinyLab(device="cpu"), opened, read_options({}))(weights, 3)
        return found, weights["encoder.layer.0.attention.self.query.weight"].grad

    def spoilt(*args: Any, **how: Any) -> Any:
        rows = load(*args, **how)
        rows.labels[:] = [0] * len(rows.labels)
        return rows

    before = value()
    monkeypatch.setattr(_rows, "load", spoilt)
    after = value()
    assert before[0] == after[0]
    assert before[1] is not None
    assert after[1] is not None
    assert torch.equal(before[1], after[1])


def test_batches_go_through_all_rows_before_they_begin_anew() -> None:
    draws = Draws("a/b", 10, 4, seed=1)
    first, second = [draws(step) for step in range(3)], [draws(step) for step in range(3, 6)]
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert sorted(itertools.chain(*first)) == sorted(itertools.chain(*second)) == list(range(10))
    assert first != second
    assert first == [Draws("a/b", 10, 4, seed=1)(step) for step in range(3)]
    assert first != [Draws("a/b", 10, 4, seed=2)(step) for step in range(3)]
    assert first != [Draws("a/c", 10, 4, seed=1)(step) for step in range(3)]


def test_equal_chances_give_the_most_entropy_and_a_shift_of_all_logits_nothing() -> None:
    plain, logits = read_options({}), torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    assert float(entropy_of(torch.zeros(3, 7), plain)) == pytest.approx(float(torch.tensor(7.0).log()))
    assert float(entropy_of(logits + 3, plain)) == pytest.approx(float(entropy_of(logits, plain)), abs=1e-6)
    assert float(entropy_of(torch.zeros(3, 1), plain)) == 0
    torn = torch.tensor([[50.0, 0.0], [0.0, 50.0]])
    assert float(entropy_of(torn, plain)) == pytest.approx(0, abs=1e-6)
    assert float(entropy_of(torn, read_options({"entropy": "batch_mean"}))) == pytest.approx(0.6931, abs=1e-3)


def test_a_head_with_one_output_adds_nothing_and_is_named(tmp_path: Path) -> None:
    both = family(tmp_path, "bert", [models.MOOD, models.NUMBER])
    with pytest.warns(MergeWarning, match="tiny/number contributes no loss: its head has one output"):
        supply = LabEntropy(TinyLab(device="cpu"), both, read_options({}))
    alone = LabEntropy(TinyLab(device="cpu"), family(tmp_path / "x", "bert"), read_options({}))
    supply(candidates(both), 0)
    alone(candidates(both), 0)
    assert supply.by_task == alone.by_task
    with pytest.raises(UserError, match=r"Every head has one output \(tiny/number\)"):
        LabEntropy(TinyLab(device="cpu"), family(tmp_path / "y", "bert", [models.NUMBER]), read_options({}))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"on": "test"}, "on must be one of tune, fit, report, got 'test'"),
        ({"batch-size": "0"}, "batch_size must be at least 1, got 0"),
        ({"batchsize": 3}, "has no 'batchsize'. Did you mean 'batch_size'"),
        ({"limit": "many"}, "wants a number there"),
        ({"eps": 2}, "eps must lie between 0 and 1"),
    ],
)
def test_wrong_options_are_refused(given: Given, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        read_options(given)
    assert sentence in str(error.value)


def test_clip_is_adapted_by_its_zero_shot_heads(
    base: Path,
    data: Path,
    experts: dict[str, Path],
    tmp_path: Path,
) -> None:
    recipe = recipe_of("adarank", {"steps": 3, "lr": 0.05, "start": "cart"}, [], 0)
    job = MergeJob(recipe, tuple((task, str(path)) for task, path in experts.items()), str(base),
                   options={"adapt": {"batch_size": 2, "on": "report"}})  # fmt: skip
    merge_models(Lab(device="cpu", data=data), job, tmp_path / "m")
    table = json.loads((tmp_path / "m" / "adaptation.json").read_text())
    assert table["saw"] == "unlabelled report inputs"
    assert "visual_projection.weight" not in table["kept_rank"]
    assert "vision_model.encoder.layers.0.self_attn.q_proj.weight" in table["kept_rank"]
    assert set(table["coefficients"]) == {n for n in load_file(tmp_path / "m" / "model.safetensors") if "text" not in n
                                          and n != "logit_scale" and "position_ids" not in n}  # fmt: skip


def test_frozen_heads_stay_bit_for_bit_while_adapting_and_in_the_model_that_is_saved(
    base: Path, data: Path, experts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    supplied: list[LabEntropy] = []
    call = LabEntropy.__call__

    def listen(self: LabEntropy, weights: Any, step: int) -> float:
        supplied.append(self)
        return call(self, weights, step)

    monkeypatch.setattr(LabEntropy, "__call__", listen)
    lab, own = (
        Lab(device="cpu", data=data),
        {task: load_file(path / "model.safetensors") for task, path in experts.items()},
    )
    recipe = recipe_of("adarank", {"steps": 4, "lr": 0.05, "start": "cart"}, [], 0)
    job = MergeJob(recipe, tuple((task, str(path)) for task, path in experts.items()), str(base),
                   options={"adapt": {"batch_size": 2, "score_every": 2}})  # fmt: skip
    merge_models(lab, job, tmp_path / "m")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "m" / "model.safetensors")
    assert any(not torch.equal(after[name], before[name]) for name in before)
    saved = open_live(tmp_path / "m", lab.tasks([*experts]), device="cpu")
    for task, weights in own.items():
        for live in (supplied[-1].live, saved):
            head = dict(live.use(task).named_parameters())["classifier.weight"]
            assert torch.equal(head.detach(), weights["classifier.weight"])


def test_trained_heads_and_token_tables_stay_bit_for_bit_while_adapting(tmp_path: Path) -> None:
    opened = family(tmp_path, "roberta", [models.MOOD])
    job = MergeJob(recipe_of("adarank", {"steps": 3, "lr": 0.05}, [], 0), ((None, str(tmp_path / "mood")),),
                   str(tmp_path / "base"), options={"adapt": {"batch_size": 4}})  # fmt: skip
    merge_models(TinyLab(device="cpu"), job, tmp_path / "m")
    head, own = load_file(tmp_path / "m" / "tasks" / "mood" / "head.safetensors"), tiny.weights(tmp_path / "mood")
    assert set(head) == set(opened.population.heads["mood"])
    assert all(torch.equal(x, own[name]) for name, x in head.items())
    before, after = tiny.weights(tmp_path / "base"), tiny.weights(tmp_path / "m")
    tables = [name for name in before if "_embeddings.weight" in name]
    assert tables
    assert all(torch.equal(after[name], before[name]) for name in tables)
    assert not torch.equal(*(x["encoder.layer.0.attention.self.query.weight"] for x in (before, after)))


def test_any_finished_merge_may_be_the_origin_of_the_vectors(cli: Cli, population: Path) -> None:
    two = ["--experts", population / "parity", population / "loop", "--lr", 0.05, "--steps", 4]
    assert cli(*words(population, "there", "adarank", "--start", "tsv", "--steps", 4)) == 0
    assert cli("merge", "tsv_m", "--base", population / "base", *two[:3], "-o", "tsv") == 0
    how = ["--rank-ratio", 0.16, "--scale", 1]
    assert cli("merge", "adarank", "--base", "tsv", *two, "-o", "from", *how) == 0
    one, other, start = (tiny.weights(Path(name)) for name in ("there", "from", "tsv"))
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)
    assert any(not torch.allclose(one[name], start[name], atol=1e-3) for name in one)


def test_the_live_model_computes_with_the_candidate_weights_themselves(tmp_path: Path) -> None:
    opened, lab = family(tmp_path, "roberta"), TinyLab(device="cpu")
    supply, weights = LabEntropy(lab, opened, read_options({"batch_size": 4})), candidates(opened)
    first = supply(weights, 0)
    places = {x.data_ptr() for x in live_tensors(supply.live.model).values()}
    assert all(x.data_ptr() in places for name, x in weights.items() if name not in supply.live.unused)
    before = {name: x.detach().clone() for name, x in weights.items()}
    other = {name: torch.zeros_like(x) for name, x in weights.items()}
    supply.score(other)
    assert all(torch.equal(x, before[name]) for name, x in weights.items())
    assert supply(weights, 0) == first


def test_a_run_keeps_what_was_learned_step_by_step(cli: Cli, population: Path) -> None:
    assert cli(*words(population, "m", "adarank", "--steps", 12, "--adapt", "batch-size=8")) == 0
    weight = "encoder.layer.0.attention.attention.query.weight"
    found = store("SELECT task, step, value FROM metrics WHERE name = ? ORDER BY step, task", f"kept_rank:{weight}")
    assert {task for task, _, _ in found} == {"digits/loop", "digits/parity"}
    assert [step for task, step, _ in found if task == "digits/loop"] == list(range(1, 13))
    numbers = load_file(Path("m/adaptation.safetensors"))
    kept = (numbers[f"logits.{weight}"] > 0).sum(dim=1).tolist()
    assert [value for _, step, value in found if step == 12] == [kept[1], kept[0]]  # by task's name
    shares = store("SELECT value FROM metrics WHERE name = 'kept_share' AND step = 12 AND task = 'digits/parity'")
    rows = [x for name, x in numbers.items() if name.startswith("logits.")]
    assert shares[0][0] == pytest.approx(sum(int((x[0] > 0).sum()) for x in rows) / sum(x.shape[1] for x in rows))
    coefficients = store("SELECT count(*) FROM metrics WHERE name LIKE 'coefficient:%' AND step = 12")
    assert coefficients[0][0] == 2 * len([name for name in numbers if name.startswith("used.")])
    entropies = store("SELECT sum(value) FROM metrics WHERE name = 'adapt_entropy' GROUP BY step ORDER BY step")
    assert len(entropies) == 12
    assert entropies[-1] < entropies[0]
    kinds = store("SELECT path FROM artifacts WHERE kind = 'adaptation' ORDER BY path")
    assert [Path(path).name for (path,) in kinds] == ["adaptation.json", "adaptation.safetensors"]


def test_shares_are_of_all_components_where_only_the_kept_ones_are_held(cli: Cli, population: Path) -> None:
    how = ["--start", "cart", "--rank-ratio", 0.5, "--steps", 2, "--lr", 0.06]  # nothing is pruned in the first step
    for held in ("float32", "kept"):
        assert cli(*words(population, held, "adarank", *how, "--hold", held)) == 0
    first = "SELECT task, value FROM metrics m JOIN runs r USING (run_id) WHERE r.name = ? AND m.name = 'kept_share' " \
            "AND step = 1 ORDER BY 1"  # fmt: skip
    assert store(first, "kept") == store(first, "float32")
    ranks = [json.loads(Path(held, "adaptation.json").read_text())["rank"] for held in ("float32", "kept")]
    assert ranks[0] == ranks[1]


@pytest.mark.parametrize(("room", "said"), [("0", True), ("1", False)])
def test_factors_that_the_disk_does_not_keep_are_said_to_be_made_in_every_step(
    room: str, said: bool, cli: Cli, population: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("MERGECTL_FACTORS_GB", room)
    assert cli(*words(population, "m", "adarank", "--steps", 2, "--hold", "disk")) == 0
    assert ("every step makes them anew" in capsys.readouterr().err) == said


def test_what_was_looked_at_is_recorded(cli: Cli, population: Path) -> None:
    assert cli(*words(population, "plain", "adamerging", "--steps", 1)) == 0
    assert cli(*words(population, "seen", "adamerging", "--steps", 1, "--adapt-on", "report")) == 0
    saw = store(
        "SELECT r.name, r.config->>'$.adapt.on', e.value FROM runs r JOIN environment e USING (run_id) "
        "WHERE e.key = 'saw' ORDER BY 1"
    )
    assert saw == [("plain", "tune", "unlabelled tune inputs"), ("seen", "report", "unlabelled report inputs")]
    for model in ("plain", "seen"):
        assert cli("eval", model) == 0
    rows = [row for group in read_board(Lab(), "report", None).groups for row in group.merged]
    shown = {row.model: row.recipe.partition("(saw")[2] for row in rows}
    assert shown == {"plain": "", "seen": ": unlabelled report inputs)"}
    assert json.loads(Path("seen/mergectl.json").read_text())["output"]["options"] == {"adapt": {"on": "report"}}
    assert cli("merge", "--again", "seen") == 0


def test_another_method_takes_no_options_of_adapting(cli: Cli, population: Path, capsys: Any) -> None:
    assert cli(*words(population, "m", "average", "--lr", "1")) == 2
    two = [population / "parity", population / "loop"]
    assert cli("merge", "average", "--experts", *two, "-o", "m", "--adapt-on", "report") == 2
    assert "'average' does not adapt to unlabelled rows" in capsys.readouterr().err


def test_the_score_on_tune_is_shown_where_asked_for_and_changes_nothing(
    cli: Cli, population: Path, capsys: Any
) -> None:
    assert cli(*words(population, "a", "adamerging", "--steps", 4)) == 0
    more = ["--adapt", "score-every=2", "--adapt", "score-limit=30"]
    assert cli(*words(population, "b", "adamerging", "--steps", 4, *more)) == 0
    lines = re.findall(r"step \d/4: entropy [\d.]+, tune [\d.]+ \(parity [\d.]+ loop [\d.]+\)", capsys.readouterr().err)
    assert len(lines) == 4  # after the first step, too; at the third what is known then
    one, other = tiny.weights(Path("a")), tiny.weights(Path("b"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert store("SELECT count(*) FROM metrics WHERE name = 'adapt_tune_score'") == [(6,)]


def test_an_adaptation_of_some_length_is_scored_on_the_way_unless_it_costs_too_much(
    cli: Cli, population: Path, capsys: Any
) -> None:
    every = [adaptation_watch.score_every(read_options(given), steps) for given, steps in (
        ({}, 10), ({}, 5000), ({"batch_size": 4}, 1000), ({"score_every": 0}, 5000), ({"score_every": 3}, 5000),
    )]  # fmt: skip
    assert every == [42, 500, 167, 0, 3]
    few = ["--adapt", "score-limit=5", "--adapt", "batch-size=8"]  # 5 rows / 3 / 8 / a tenth: every third step
    assert cli(*words(population, "a", "adarank", "--steps", 6, "--lr", 0.01, *few)) == 0
    assert store("SELECT DISTINCT step FROM metrics WHERE name = 'adapt_tune_score' ORDER BY 1") == [(1,), (3,), (6,)]
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"step 6/6: entropy .*, tune .* \(.*\), kept \d+% \(parity \d+% loop \d+%\)", line)


@pytest.mark.parametrize(("last", "warned"), [(0.5, True), (0.79, False), (0.9, False)])
def test_a_score_that_falls_while_the_entropy_does_is_said(
    last: float, warned: bool, cli: Cli, population: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    scores = iter([0.8, 0.85, last])
    monkeypatch.setattr(LabEntropy, "score", lambda self, weights: dict.fromkeys(self.by_task, next(scores)))
    assert cli(*words(population, "a", "adamerging", "--steps", 4, "--adapt", "score-every=2")) == 0
    assert ("the mean score fell from 0.800 to 0.500" in capsys.readouterr().err) == warned


def test_rows_to_score_on_may_be_missing_unless_asked_for(
    cli: Cli, population: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def missing(self: LabEntropy, weights: Any) -> dict[str, float]:
        raise UserError("There are no such rows.")

    monkeypatch.setattr(LabEntropy, "score", missing)
    few = ["--steps", 4, "--adapt", "score-limit=1"]
    assert cli(*words(population, "a", "adamerging", *few)) == 0
    assert capsys.readouterr().err.count("no scores on the way: There are no such rows.") == 1
    assert cli(*words(population, "b", "adamerging", *few, "--adapt", "score-every=2")) == 2


def test_an_adaptation_that_stops_early_says_so_and_is_scored(
    cli: Cli, population: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def level(self: LabEntropy, weights: Any, step: int) -> float:
        self.by_task = {"digits/loop": 0.5, "digits/parity": 0.5}
        return 1.0

    monkeypatch.setattr(LabEntropy, "__call__", level)
    more = ["--patience", 2, "--adapt", "score-every=10", "--adapt", "score-limit=10"]
    assert cli(*words(population, "a", "adamerging", "--steps", 50, *more)) == 0
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"stopped after step 4/50, by --patience: entropy 0\.5000, tune .* \(.*\)", line)
    assert store("SELECT DISTINCT step FROM metrics WHERE name = 'adapt_tune_score' ORDER BY 1") == [(1,), (4,)]


def test_an_adaptation_that_was_killed_goes_on_to_the_same_model(
    cli: Cli, population: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert cli(*words(population, "whole", "adarank", "--steps", 9)) == 0
    first = store("SELECT task, name, step, value FROM metrics ORDER BY ALL")
    call = LabEntropy.__call__

    def dying(self: LabEntropy, weights: Any, step: int) -> float:
        if step == 5:
            raise KeyboardInterrupt
        return call(self, weights, step)

    monkeypatch.setattr(adaptation_watch, "SECONDS", 0.0)
    monkeypatch.setattr(LabEntropy, "__call__", dying)
    assert cli(*words(population, "again", "adarank", "--steps", 9)) == 130
    assert not Path("again").exists()
    monkeypatch.setattr(LabEntropy, "__call__", call)
    assert cli(*words(population, "again", "adarank", "--steps", 9)) == 0
    assert "goes on after step 5" in capsys.readouterr().err
    one, other = tiny.weights(Path("whole")), tiny.weights(Path("again"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    second = store(
        "SELECT task, m.name, step, value FROM metrics m JOIN runs r USING (run_id) "
        "WHERE r.name = 'again' AND status = 'finished' ORDER BY ALL"
    )
    assert second == first
    assert not list(Path("lab/cache/adaptation").glob("*"))


def test_an_adaptation_that_was_killed_after_its_last_step_notes_nothing_twice(
    cli: Cli, population: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = ["--steps", 4, "--adapt", "score-every=2", "--adapt", "score-limit=10"]
    assert cli(*words(population, "whole", "adarank", *how)) == 0
    noted = "SELECT task, m.name, step, value FROM metrics m JOIN runs r USING (run_id) WHERE r.name = ? ORDER BY ALL"
    monkeypatch.setattr(adaptation_watch, "SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(adaptation_watch.LabWatch, "_warn", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli(*words(population, "again", "adarank", *how)) == 130
    assert cli(*words(population, "again", "adarank", *how)) == 0
    assert store(noted, "again") == store(noted, "whole")


@pytest.mark.filterwarnings("ignore:masks cannot change")
def test_learned_numbers_make_the_same_model_again_without_any_data(
    cli: Cli, population: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert cli(*words(population, "m", "adarank", "--steps", 5)) == 0
    monkeypatch.setattr(_rows, "load", None)
    assert cli(*words(population, "again", "adarank", "--steps", 0, "--adapt", "start-from=m")) == 0
    one, other = tiny.weights(Path("m")), tiny.weights(Path("again"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert cli(*words(population, "x", "adarank", "--steps", 0, "--adapt", "start-from=nowhere")) == 2
    assert "there is no adaptation.safetensors" in capsys.readouterr().err
    assert cli(*words(population, "x", "adamerging", "--steps", 0, "--adapt", "start-from=m")) == 2
    assert "numbers to go on from, and" in capsys.readouterr().err


def test_numbers_learned_from_another_start_are_refused(cli: Cli, population: Path, capsys: Any) -> None:
    assert cli(*words(population, "m", "adarank", "--steps", 2, "--start", "cart")) == 0
    more = ["--steps", 0, "--adapt", "start-from=m"]
    assert cli(*words(population, "x", "adarank", *more)) == 2
    assert "was learned with start=cart, and means nothing with start=ta. Give it: --start cart" in (
        capsys.readouterr().err
    )
    assert cli(*words(population, "y", "adarank", *more, "--start", "cart")) == 0


def test_a_spoilt_checkpoint_is_passed_over(population: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    path.write_bytes(b"half a file")
    watch = adaptation_watch.LabWatch({"a": "x/a"}, path, Lab().terminal)
    assert watch.resume() is None


def test_settings_that_differ_between_weights_are_refused(cli: Cli, population: Path, capsys: Any) -> None:
    assert cli(*words(population, "m", "adamerging", "--steps", 1, "--scale", "*.layer.0.*=0.5")) == 2
    assert "learns all weights together" in capsys.readouterr().err


def test_a_search_may_adapt_in_every_trial(cli: Cli, population: Path) -> None:
    two = [population / "parity", population / "loop"]
    how = ["--range", "scale=0.2:0.4", "--fix", "steps=1", "--fix", "lr=0.01", "--trials", "2", "--limit", "20"]
    code = cli("search", "adamerging", "--base", population / "base", "--experts", *two, "-o", "best", *how,
               "--adapt", "batch-size=4")  # fmt: skip
    assert code == 0
    assert Path("best/adaptation.json").exists()


def test_a_search_may_vary_what_a_fixed_setting_needs(cli: Cli, population: Path) -> None:
    two = [population / "parity", population / "loop"]
    how = ["--range", "plus=true,false", "--fix", "density=0.3", "--fix", "steps=1", "--sampler", "grid"]
    how += ["--fix", "scale=0.3", "--fix", "lr=0.01", "--trials", "2", "--limit", "20"]
    assert cli("search", "adamerging", "--base", population / "base", "--experts", *two, "-o", "best", *how,
               "--adapt", "batch-size=4") == 0  # fmt: skip
    found = json.loads(Path("best/mergectl.json").read_text())["recipe"]["settings"]
    assert found["density"] == 0.3 or not found["plus"]
