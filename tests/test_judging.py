"""The judge of candidates: its fast way scores what its slow way scores, and no failed candidate harms it."""

from __future__ import annotations

import importlib
import itertools
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergectl import merging
from mergectl.bench import logits, make_bench
from mergectl.components import Shelf
from mergectl.errors import UserError
from mergectl.evaluate import evaluate, score_model
from mergectl.families import open_family
from mergectl.heads import open_live
from mergectl.in_memory import in_memory
from mergectl.judging import Judge, rounds, visits
from mergectl.lab import Lab
from mergectl.merge import MergeJob, merge
from mergectl.methods._contract import MergeWarning
from mergectl.plan import Recipe, recipe_of
from mergectl.pruning import Verdict
from mergectl.recombine import Recombiner, linear_setting
from tests import tiny_models as tiny

TASKS = ("parity", "loop", "digit")
EACH = {"parity": 0.7, "loop": -0.4, "digit": 1.1}


def make(population: Path, method: str, *varying: str, tasks: tuple[str, ...] = TASKS, **more: Any) -> Judge:
    """A judge of a method's candidates on three tiny experts, with batches small enough for several rounds."""
    family = open_family(str(population / "base"), [(None, str(population / task)) for task in tasks])
    lab = Lab(device="cpu")
    found = lab.tasks([f"digits/{task}" for task in tasks])
    how: dict[str, Any] = {"limit": 50, "batch_size": 16, **more}
    return Judge(lab, recipe_of(method, seed=3), family, found, varying=varying or None, **how)


def slowly(judge: Judge) -> Judge:
    """Make a judge merge every candidate anew."""
    judge.recombiner = None
    return judge


def weights(judge: Judge) -> dict[str, torch.Tensor]:
    """A copy of what the judge's live model holds."""
    return {name: weight.clone() for name, weight in judge.live.backbone.items()}


CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "shared": ("task_arithmetic", ("scale",), {"scale": 0.37}),
    "per task": ("task_arithmetic", ("scale",), {"scale": EACH}),
    "per layer": ("task_arithmetic", ("scale",), {"scale": {"encoder.layer.0.*": 0.2, "encoder.layer.1.*": 0.9}}),
    "trimmed per layer": ("ties", ("scale",), {"scale": {"encoder.layer.0.*": 0.2, "*": 0.9}}),
    "trimmed": ("ties", ("scale",), {"scale": 1.7, "density": 0.3}),
    "two settings": ("ties", ("scale", "density"), {"scale": 1.7, "density": 0.45}),
    "pcb": ("pcb", ("scale",), {"scale": EACH}),
    "a refinement before it": ("dare_task_arithmetic", ("scale",), {"scale": EACH, "drop": 0.5}),
    "anything may vary": ("medusa", (), {"scale": 0.8}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_recombined_candidate_is_the_merged_one(population: Path, case: str) -> None:
    method, varying, settings = CASES[case]
    fast, slow = make(population, method, *varying), slowly(make(population, method, *varying))
    quick = fast(settings)
    assert fast.recombiner is not None
    assert fast.recombiner(settings)
    assert quick.scores == slow(settings).scores
    for name, weight in weights(fast).items():
        torch.testing.assert_close(weight, slow.live.backbone[name], rtol=0, atol=1e-6)


def test_a_share_between_base_and_expert_is_recombined_too(population: Path) -> None:
    fast, slow = (make(population, "interpolate", "alpha", tasks=("loop",)) for _ in range(2))
    assert fast({"alpha": 0.3}).scores == slowly(slow)({"alpha": 0.3}).scores
    for name, weight in weights(fast).items():
        torch.testing.assert_close(weight, slow.live.backbone[name], rtol=0, atol=1e-6)


def test_what_is_supplied_reaches_both_ways(population: Path) -> None:
    base = in_memory(open_family(str(population / "base"), [(None, str(population / "loop"))]).population.base)
    signs = {name: torch.ones_like(weight) for name, weight in base.items()}
    fast, slow, plain = (
        make(population, "ties", "scale", supplies=given) for given in ({"signs": signs}, {"signs": signs}, None)
    )
    for judge in (fast, slowly(slow), plain):
        judge.put({"scale": 1.7})
    for name, weight in weights(fast).items():
        torch.testing.assert_close(weight, slow.live.backbone[name], rtol=0, atol=1e-6)
    assert any(not torch.equal(weight, plain.live.backbone[name]) for name, weight in weights(fast).items())


def test_large_weights_lose_no_digit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = {"a.w": 50 + torch.randn(400, 700), "a.b": torch.randn(5)}
    experts = {t: {n: w + 1e-3 * torch.randn(w.shape) for n, w in base.items()} for t in ("one", "two")}
    live = {name: torch.empty_like(weight) for name, weight in base.items()}
    recipe = recipe_of("task_arithmetic", refine="dare:drop=0.7", seed=5)
    fast = Recombiner(recipe, base, experts, live, "scale", alone=True, shelf=Shelf())
    settings: dict[str, Any] = {"scale": {"a.b": 1.5, "*": (0.3, 1.2)}}
    assert fast(settings)
    merged = merging.merge_weights("task_arithmetic", base, experts, refine="dare:drop=0.7", seed=5, **settings)
    for name, weight in merged.items():
        assert bool(((live[name] - weight).abs() <= torch.finfo(torch.float32).eps * weight.abs()).all())


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, Any]]:
    """From now on, the settings of every merge that is begun."""
    seen: list[Mapping[str, Any]] = []
    begin = merging.merge_stream

    def noting(recipe: Recipe, *args: Any, **more: Any) -> Any:
        seen.append(recipe.settings)
        return begin(recipe, *args, **more)

    monkeypatch.setattr(merging, "merge_stream", noting)
    return seen


def test_a_search_over_coefficients_merges_once_per_task(population: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, judge = counted(monkeypatch), make(population, "task_arithmetic", "scale")
    for scale in (0.1, 0.2, 0.3, 0.4):
        judge({"scale": {**EACH, "loop": scale}})
    assert len(seen) == len(TASKS) + 1  # and one to see that the method is linear indeed


def test_a_grid_merges_anew_only_when_the_other_setting_changes(
    population: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, judge = counted(monkeypatch), make(population, "ties", "scale", "density")
    for scale in (0.5, 1.0, 1.5):
        for density in (0.2, 0.6):
            judge({"scale": scale, "density": density})
    assert [merge["density"] for merge in seen] == [0.2, 0.2, 0.6]


def test_components_are_not_made_for_a_candidate_that_comes_but_once(
    population: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, judge = counted(monkeypatch), make(population, "pcb", "scale", "ratio")
    for ratio in (0.1, 0.2, 0.3):
        judge({"scale": EACH, "ratio": ratio})
    assert len(seen) == 3


def test_one_component_is_kept_only_where_its_setting_may_come_again(
    population: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = counted(monkeypatch)
    for again, merges in ((True, 2 + 1), (False, 2)):  # and one to see that the method is linear indeed
        judge = make(population, "ties", "scale", "density", again=again)
        seen.clear()
        verdicts = [judge({"scale": 0.7, "density": density}).scores for density in (0.2, 0.6)]
        assert len(seen) == merges
        assert verdicts == [slowly(judge)({"scale": 0.7, "density": density}).scores for density in (0.2, 0.6)]


LIAR = '''"""Add the task vectors times the square of what is called their scale."""

from typing import Annotated

from mergectl.methods._contract import Between

TITLE = "Liar"
PAPER = "none"
NEUTRAL = None  # it squares
LINEAR = ("scale",)


def merge(task_vectors, *, scale: Annotated[float, Between(-10.0, 10.0), "its square counts"] = 1.0):
    """Yield the scaled sum."""
    for name, x in task_vectors.items():
        yield name, scale**2 * x.sum(dim=0)
'''


@pytest.fixture
def liar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A method of the user's that says it is linear in its scale, and squares it."""
    folder = tmp_path / "plugins" / "methods"
    folder.mkdir(parents=True)
    (folder / "liar.py").write_text(LIAR, encoding="utf-8")
    monkeypatch.setenv("MERGECTL_PLUGINS", str(tmp_path / "plugins"))
    return "liar"


def test_a_method_that_is_not_linear_as_it_says_is_merged_anew(population: Path, liar: str) -> None:
    judge = make(population, liar, "scale")
    with pytest.warns(MergeWarning, match="'liar' is not linear in scale, although its file says so"):
        judge({"scale": 2.0})
    expected = slowly(make(population, "task_arithmetic", "scale"))({"scale": 4.0})
    assert judge({"scale": 2.0}).scores == expected.scores


def test_a_linear_setting_that_is_fixed_or_not_there_is_not_recombined(population: Path) -> None:
    ties = recipe_of("ties")
    assert linear_setting(ties, TASKS, frozenset({"density"})) is None
    assert linear_setting(ties, TASKS, None) == "scale"
    assert linear_setting(recipe_of("emr"), TASKS, None) is None
    assert make(population, "sce").recombiner is None


DEATHS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str, str]] = {
    "in a recombination": ("task_arithmetic", {"scale": EACH}, {"scale": 0.9}, "torch", "mv"),
    "while it is evaluated": ("task_arithmetic", {"scale": EACH}, {"scale": 0.9}, "mergectl.bench", "batch_logits"),
    "while its weights are put in": ("sce", {}, {"density": 0.2}, "mergectl.live", "put"),
    "under masks": ("emr", {}, {"rescaler": "global_sum"}, "mergectl.bench", "batch_logits"),
}


@pytest.mark.parametrize("case", DEATHS)
def test_a_candidate_that_dies_leaves_the_judge_as_it_was(
    population: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, settings, others, module, function = DEATHS[case]
    judge = make(population, method)
    before, place, calls = judge(settings), importlib.import_module(module), itertools.count()
    real = getattr(place, function)

    def dying(*args: Any, **more: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(place, function, dying)
        with pytest.raises(KeyboardInterrupt):
            judge(others)
    assert judge(settings).scores == before.scores


def test_a_refused_candidate_leaves_the_judge_as_it_was(population: Path) -> None:
    judge = make(population, "ties", "scale")
    before = judge({"scale": 0.8})
    with pytest.raises(UserError, match="density must lie"):
        judge({"scale": 0.8, "density": 7.0})
    assert judge({"scale": 0.8}).scores == before.scores


@pytest.mark.parametrize("method", ["task_arithmetic", "emr"])
def test_turns_and_batches_change_no_score(population: Path, method: str) -> None:
    judge = make(population, method, limit=70)
    verdict = judge({})
    assert verdict.scores == {bench.task.id: score_model(judge.live, bench)["score"] for bench in judge.benches}


def test_texts_are_scored_in_packed_batches_as_evaluate_scores_them(tmp_path: Path) -> None:
    tasks = [tiny.MOOD, replace(tiny.MOOD, name="second", labels=("b", "a"))]
    base = tiny.base(tmp_path / "base", "bert")
    experts = [tiny.expert(tmp_path / task.name, "bert", task, seed) for seed, task in enumerate(tasks, 1)]
    family = open_family(str(base), [(None, str(expert)) for expert in experts])
    judge = Judge(Lab(device="cpu"), recipe_of("task_arithmetic"), family, tasks, varying=["scale"], batch_size=16)
    verdict = judge({"scale": 0.3})
    folder, out = [(None, str(expert)) for expert in experts], tmp_path / "merged"
    job = MergeJob(replace(recipe_of("task_arithmetic"), settings={"scale": 0.3}), tuple(folder), str(base))
    merge(job, family, out, facts={}, force=False, progress=lambda *_: None)
    plain = evaluate(out, tasks, split="tune", batch_size=16, device="cpu")
    assert verdict.scores == plain.scores
    for task in tasks:
        answers = verdict.answers[task.id]
        bench = make_bench(task, judge.live.preparer, split="tune", batch_size=16)
        assert answers.rows is not None
        assert np.array_equal(np.asarray(bench.labels)[answers.rows], answers.labels)
        found = logits(open_live(out, tasks, device="cpu").use(task.id), bench).argmax(1)
        assert np.array_equal(found[answers.rows], answers.found)


def test_masked_candidates_follow_each_other(population: Path) -> None:
    judge, other = make(population, "emr"), make(population, "emr")
    judge({"rescaler": "global_sum"})
    assert judge({"rescaler": "tensor_mean"}).scores == other({"rescaler": "tensor_mean"}).scores


class Watching:
    """A watch that notes what it is shown, and stops at one of its steps."""

    def __init__(self, stop_at: int = -1) -> None:
        self.stop_at, self.seen = stop_at, list[Verdict]()

    def __call__(self, step: int, so_far: Verdict) -> bool:
        assert step == len(self.seen)
        self.seen.append(so_far)
        return step == self.stop_at


def test_a_verdict_is_the_same_whether_it_is_watched_or_not(population: Path) -> None:
    judge, watch = make(population, "task_arithmetic"), Watching()
    plain, watched = judge({"scale": EACH}), judge({"scale": EACH}, watch)
    assert (watched.scores, watched.rows, watched.pruned) == (plain.scores, 150, False)
    assert [so_far.rows for so_far in watch.seen] == [48, 96, 144] or len(watch.seen) == plain.looks == 3


def test_a_candidate_is_stopped_where_the_watch_says(population: Path) -> None:
    judge, watch = make(population, "task_arithmetic"), Watching(stop_at=1)
    stopped = judge({"scale": EACH}, watch)
    assert stopped.pruned
    assert stopped.scores == watch.seen[1].scores
    assert stopped.rows < stopped.total == 150
    assert not judge({"scale": EACH}).pruned


def test_what_is_seen_so_far_is_scored_on_the_rows_seen(population: Path) -> None:
    judge, watch = make(population, "task_arithmetic"), Watching()
    full = judge({"scale": EACH}, watch)
    for so_far in watch.seen:
        for task, answers in so_far.answers.items():
            count = len(answers.found)
            assert np.array_equal(answers.found, full.answers[task].found[:count])
            assert so_far.scores[task] == pytest.approx(float(np.mean(answers.found == answers.labels)))


def test_candidates_are_asked_the_same_rows_in_the_same_order(population: Path) -> None:
    one, other = make(population, "task_arithmetic")({"scale": 0.1}), make(population, "emr")({})
    for task in one.answers:
        assert np.array_equal(one.answers[task].labels, other.answers[task].labels)


def test_batches_are_visited_once_each_and_span_all_lengths_early() -> None:
    for count in range(1, 70):
        assert sorted(visits(count)) == list(range(count))
    assert visits(8)[:4] == (0, 4, 2, 6)


@pytest.mark.parametrize("most", [None, 1, 3, 9])
def test_rounds_give_every_task_all_its_batches(most: int | None) -> None:
    batches = [5, 1, 17]
    turns = [turn for row in rounds(batches, most) for turn in row]
    assert [sum(count for n, count in turns if n == number) for number in range(3)] == batches
    assert {number for number, _ in rounds(batches, most)[0]} == {0, 1, 2}
    assert len(rounds(batches, most)) <= (most or 17)


def test_experts_are_pages_of_their_files_and_writing_leaves_the_files_alone(population: Path) -> None:
    family = open_family(str(population / "base"), [(None, str(population / "loop"))])
    view = family.population.experts["loop"]
    found = in_memory(view)
    maps = Path("/proc/self/maps")
    if maps.exists():
        lines = [line.split() for line in maps.read_text().splitlines() if "loop/model.safetensors" in line]
        pages = [tuple(int(end, 16) for end in words[0].split("-")) for words in lines]
        assert all(any(start <= x.data_ptr() < stop for start, stop in pages) for x in found.values())
    name = next(iter(found))
    before = view[name].clone()
    assert torch.equal(found[name], before)
    found[name].zero_()
    assert torch.equal(view[name], before)


def test_experts_in_half_precision_are_read_as_float32(population: Path, tmp_path: Path) -> None:
    from tests.population import change

    half = change(population / "loop", tmp_path / "half", lambda w: {name: x.half() for name, x in w.items()})
    family = open_family(str(population / "base"), [("digits/loop", str(half))])
    found = in_memory(family.population.experts["loop"])
    assert {weight.dtype for weight in found.values()} == {torch.float32}


# The shelf on which components lie.


def filling(value: float) -> Callable[[torch.Tensor], None]:
    """What writes one number everywhere."""

    def fill(rows: torch.Tensor) -> None:
        rows.fill_(value)

    return fill


def test_a_shelf_lets_go_of_what_was_not_used_for_longest() -> None:
    shelf = Shelf()
    shelf.room = {"cpu": 4 * 25}
    for key in "ab":
        shelf.put(key, (2, 5), filling(1.0))
    shelf.get("a", (2, 5))
    shelf.put("c", (2, 5), filling(1.0))
    assert [shelf.get(key, (2, 5)) is not None for key in "abc"] == [True, False, True]


def test_what_is_too_large_for_memory_goes_to_a_file_without_a_name(tmp_path: Path) -> None:
    shelf = Shelf(spill=tmp_path)
    shelf.room = {"cpu": 10}
    shelf.put("a", (3, 7), filling(2.5))
    found = shelf.get("a", (3, 7))
    assert found is not None
    assert found.tolist() == [[2.5] * 7] * 3
    assert list(tmp_path.iterdir()) == []


def test_processes_share_what_one_of_them_made(tmp_path: Path) -> None:
    first, second = Shelf(folder=tmp_path), Shelf(folder=tmp_path)
    assert second.get("a", (2, 3)) is None
    first.put("a", (2, 3), filling(4.0))

    def never(rows: torch.Tensor) -> None:
        raise AssertionError("made twice")

    assert second.put("a", (2, 3), never).tolist() == [[4.0] * 3] * 2


def test_a_file_that_was_never_finished_is_made_again(tmp_path: Path) -> None:
    shelf = Shelf(folder=tmp_path)

    def dying(rows: torch.Tensor) -> None:
        rows.fill_(1.0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shelf.put("a", (2, 3), dying)
    assert shelf.get("a", (2, 3)) is None
    assert shelf.put("a", (2, 3), filling(7.0)).tolist() == [[7.0] * 3] * 2


def test_judges_that_share_a_folder_agree_with_one_that_does_not(population: Path, tmp_path: Path) -> None:
    alone = make(population, "task_arithmetic", "scale")({"scale": EACH})
    for _ in range(2):
        assert make(population, "task_arithmetic", "scale", scratch=tmp_path)({"scale": EACH}).scores == alone.scores
    assert len(list(tmp_path.glob("*.f32"))) == 1


def test_no_warning_is_made_of_parts_and_units(population: Path) -> None:
    judge = make(population, "task_arithmetic", "scale")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judge({"scale": {"encoder.layer.0.*": 0.2, "*": 0.9}})


def test_weights_of_another_type_are_converted_once_for_all_processes(tmp_path: Path, population: Path) -> None:
    half = {n: w.half() for n, w in load_file(population / "loop" / "model.safetensors").items()}
    shutil.copytree(population / "loop", tmp_path / "loop")
    save_file(half, tmp_path / "loop" / "model.safetensors", {"format": "pt"})
    view = open_family(str(population / "base"), [(None, str(tmp_path / "loop"))]).population.experts["loop"]
    first, second = (in_memory(view, Shelf(folder=tmp_path / "shared"), "loop") for _ in range(2))
    assert len(list((tmp_path / "shared").glob("*.f32"))) == 1
    for name, weight in in_memory(view).items():
        assert weight.dtype == torch.float32
        assert torch.equal(first[name], weight)
        assert torch.equal(second[name], weight)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "/shared/" in line]
    pages = [tuple(int(end, 16) for end in words[0].split("-")) for words in lines]
    assert all(any(start <= x.data_ptr() < stop for start, stop in pages) for x in second.values())
    next(iter(first.values())).zero_()
    assert torch.equal(second[name], in_memory(view)[name])
    assert len(list((tmp_path / "shared").glob("*.part"))) == 0
