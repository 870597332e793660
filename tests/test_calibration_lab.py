"""Calibration in the lab: made once, kept by content, shown in the store, said in records, made anew when removed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mergectl import merge_weights
from mergectl.benchmarks._contract import Task
from mergectl.calibration_cache import find, put
from mergectl.calibration_options import settled
from mergectl.calibration_supply import calibrated
from mergectl.checkpoints import open_checkpoint
from mergectl.families import open_family
from mergectl.lab import Lab
from mergectl.linears import linears_of
from mergectl.store import Store
from tests import test_text2text as written
from tests import tiny_models as tiny
from tests.conftest import Cli
from tests.population import change, weights

SMALL = ("--num-ada-examples", "60", "--calibration-batch-size", "8")
CACHE = Path("lab/cache/calibration")


def words(
    population: Path, method: str, out: str, *more: str, tasks: tuple[str, ...] = ("parity", "digit")
) -> list[str]:
    experts = [str(population / task) for task in tasks]
    return ["merge", method, "--base", str(population / "base"), "--experts", *experts, "-o", out, "--quiet", *more]


def calibrations() -> list[dict[str, Any]]:
    store = Store(Path("lab/mergectl.duckdb"))
    rows = store.query("SELECT run_id FROM runs WHERE kind = 'calibration' ORDER BY started_at, run_id").rows
    return [store.find(run) or {} for (run,) in rows]


def record(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(folder, "mergectl.json").read_text())
    return found


def test_a_merge_calibrates_every_expert_once_and_says_so(population: Path, cli: Cli) -> None:
    assert cli(*words(population, "regmean", "one", *SMALL)) == 0
    first, second = calibrations()
    by_name = {run["name"]: run["run_id"] for run in (first, second)}
    assert set(by_name) == {"grams-parity", "grams-digit"}
    config, (expert,) = first["config"], first["inputs"]
    assert (config["what"], config["num_ada_examples"], config["divisor"]) == ("grams", 60, "actual")
    assert expert["role"] == "expert"
    metrics = dict(Store(Path("lab/mergectl.duckdb")).query("SELECT name, value FROM metrics").rows)
    assert metrics["rows"] == 60
    assert metrics["examples"] == 15  # as many as are sure to be enough: an image has four patches and one row more
    assert metrics["seconds"] > 0
    assert cli(*words(population, "regmean", "two", *SMALL, "--off-diagonal", "0.5")) == 0
    assert len(calibrations()) == 2
    assert not torch.equal(*(weights(Path(name))["encoder.layer.0.output.dense.weight"] for name in ("one", "two")))
    run = record("two")["run"]
    asked = "SELECT task, parent_run FROM inputs WHERE role = 'grams' AND run_id = ? ORDER BY task DESC"
    used = Store(Path("lab/mergectl.duckdb")).query(asked, [run]).rows
    assert [tuple(row) for row in used] == [
        ("digits/parity", by_name["grams-parity"]),
        ("digits/digit", by_name["grams-digit"]),
    ]


def test_what_is_stored_is_what_was_merged_with(population: Path, cli: Cli) -> None:
    assert cli(*words(population, "regmean", "out", *SMALL)) == 0
    moments: dict[str, dict[str, torch.Tensor]] = {}
    for path in CACHE.glob("*.safetensors"):
        stored = find(CACHE, path.stem)
        assert stored is not None
        task = str(stored.facts["task"]).removeprefix("digits/")
        moments[task] = {name.removeprefix("vit."): stored[name] for name in stored if name.startswith("vit.")}
    assert len(moments["parity"]) == 2 * 6
    base = open_checkpoint(population / "base")
    experts = {
        task: {name.removeprefix("vit."): x for name, x in open_checkpoint(population / task).items()}
        for task in ("parity", "digit")
    }
    expected = merge_weights("regmean", dict(base), experts, supplies={"grams": moments})
    for name, x in weights(Path("out")).items():
        torch.testing.assert_close(x, expected[name], rtol=0, atol=0, msg=name)


def test_options_are_recorded_and_the_merge_can_be_made_again_without_the_cache(population: Path, cli: Cli) -> None:
    assert cli(*words(population, "regmean", "out", "--num-ada-examples", "parity=40,digit=60", *SMALL[2:])) == 0
    assert record("out")["output"]["options"]["calibration"] == {
        "num_ada_examples": [40, 60], "max_examples": [None, None], "include_padding": False, "divisor": "actual",
        "calibration_batch_size": 8,
    }  # fmt: skip
    assert sorted(c["config"]["num_ada_examples"] for c in calibrations()) == [40, 60]
    shutil.rmtree(CACHE)
    assert cli("merge", "--again", "out", "--quiet") == 0
    assert len(calibrations()) == 4
    assert cli("merge", "--again", "out", "--quiet") == 0
    assert len(calibrations()) == 4


def test_other_options_seeds_and_models_are_calibrated_anew(population: Path, tmp_path: Path) -> None:
    other = change(population / "parity", tmp_path / "parity", lambda w: {k: 1.1 * x for k, x in w.items()})
    cases: list[tuple[Path, int, dict[str, Any]]] = [
        (population / "parity", 0, {}), (population / "parity", 1, {}), (population / "parity", 0, {"max_examples": 4}),
        (population / "parity", 0, {"include_padding": True}), (other, 0, {}),
    ]  # fmt: skip
    seen = []
    for expert, seed, more in [*cases, *cases]:
        family = open_family(str(population / "base"), [(None, str(expert))])
        options = settled({"num_ada_examples": 60, **more}, ["grams"], ["parity"], "any")
        (found,) = calibrated(Lab(), family, seed, "grams", options).values()
        seen.append(found.stored.facts["examples"])
    assert len(calibrations()) == len(cases)
    assert seen == [15, 15, 4, 15, 15] * 2


def test_fishers_are_a_supply_like_grams(population: Path, cli: Cli) -> None:
    few = ("--num-fisher-examples", "6")
    assert cli(*words(population, "fisher", "out", *few)) == 0
    assert cli(*words(population, "fisher", "sums", *few, "--fisher-mode", "batch_sum")) == 0
    assert [c["config"]["fisher_mode"] for c in calibrations()] == ["per_example"] * 2 + ["batch_sum"] * 2
    stored = find(CACHE, next(CACHE.glob("*.safetensors")).stem)
    assert stored is not None
    assert {name.split(".")[0] for name in stored} == {"vit"}  # no heads
    assert all(bool((x >= 0).all()) for x in stored.values())
    assert cli("merge", "--again", "out", "--quiet") == 0


def test_an_option_that_nothing_depends_on_is_refused(
    population: Path, cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(*words(population, "ties", "out", *SMALL)) == 2
    assert "--num-ada-examples is for methods and refinements that look at grams, and 'ties' does not." in (
        capsys.readouterr().err
    )
    assert cli(*words(population, "regmean", "out", "--num-fisher-examples", "8")) == 2
    assert "look at fishers, and 'regmean' does not" in capsys.readouterr().err
    assert cli(*words(population, "regmean", "out", "--num-ada-examples", "0")) == 2
    assert "num_ada_examples must lie between 1" in capsys.readouterr().err
    assert cli(*words(population, "regmean", "out", "--num-ada-examples", "loop=3")) == 2
    assert "'loop' that is not merged" in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_refinement_may_be_what_asks(population: Path, cli: Cli) -> None:
    refined = ("--refine", "pave:rank_scale=0.5")
    assert cli(*words(population, "task_arithmetic", "out", *refined, *SMALL)) == 0
    assert record("out")["output"]["options"]["calibration"]["num_ada_examples"] == [60, 60]
    assert cli(*words(population, "regmean", "other", *SMALL)) == 0
    assert len(calibrations()) == 2  # shared by all methods
    assert cli("merge", "--again", "out", "--quiet") == 0


def test_help_shows_the_options_where_the_method_asks(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    for method, shown in (("regmean", True), ("fisher", False), ("ties", False)):
        assert cli("merge", method, "--help") == 0
        assert ("--num-ada-examples" in capsys.readouterr().out) == shown
    assert cli("search", "regmean", "--help") == 0
    assert "--num-ada-examples" in capsys.readouterr().out


def test_a_recipe_file_says_options_too(population: Path, cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = {
        "method": "regmean", "base": str(population / "base"), "experts": [str(population / "parity")], "out": "out",
        "options": {"calibration": {"num_ada_examples": 40, "divisor": "requested"}},
    }  # fmt: skip
    Path("recipe.yaml").write_text(json.dumps(recipe))
    assert cli("merge", "-c", "recipe.yaml", "-q") == 0
    assert record("out")["output"]["options"]["calibration"]["divisor"] == "requested"
    recipe |= {"out": "other", "options": {"calibration": {"num_ada_example": 40}}}
    Path("recipe.yaml").write_text(json.dumps(recipe))
    assert cli("merge", "-c", "recipe.yaml", "-q") == 2
    assert "no option 'num_ada_example'. Did you mean 'num_ada_examples'?" in capsys.readouterr().err


def test_a_search_calibrates_once_for_all_its_candidates(population: Path, cli: Cli) -> None:
    experts = [str(population / task) for task in ("parity", "digit")]
    space = ("--range", "off_diagonal=0.5:1.0", "--trials", "3", "--limit", "20", *SMALL)
    base = str(population / "base")
    assert cli("search", "regmean", "--base", base, "--experts", *experts, "-o", "best", "-q", *space) == 0
    assert len(calibrations()) == 2
    assert record("best")["output"]["options"]["calibration"]["num_ada_examples"] == [60, 60]


def test_an_expert_of_no_known_task_is_told_how_to_be_named(
    population: Path, cli: Cli, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lost = shutil.copytree(population / "parity", tmp_path / "somebody")
    (lost / "mergectl.json").unlink()
    base = population / "base"
    assert cli("merge", "regmean", "--base", base, "--experts", lost, "-o", "out", "-q", *SMALL) == 2
    assert f"Name it: --experts suite/somebody={lost}" in capsys.readouterr().err
    named = f"digits/parity={lost}"
    assert cli("merge", "regmean", "--base", base, "--experts", named, "-o", "out", "-q", *SMALL) == 0


def test_weights_that_are_not_finite_name_expert_task_and_layer(
    population: Path, cli: Cli, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def spoil(w: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        w["vit.encoder.layer.1.layernorm_before.weight"] *= 3e38
        return w

    bad = change(population / "parity", tmp_path / "parity", spoil)
    base = population / "base"
    assert cli("merge", "regmean", "--base", base, "--experts", bad, "-o", "out", "-q", *SMALL) == 2
    said = capsys.readouterr().err
    assert f"{bad} on digits/parity: The inputs of 'vit." in said
    assert "not finite" in said
    assert calibrations()[0]["status"] == "failed"
    assert not list(CACHE.glob("*"))


def test_a_broken_file_counts_as_none_and_a_whole_one_replaces_it(population: Path, cli: Cli) -> None:
    assert cli(*words(population, "regmean", "one", *SMALL, tasks=("parity",))) == 0
    (path,) = CACHE.glob("*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert cli(*words(population, "regmean", "two", *SMALL, tasks=("parity",))) == 0
    assert path.read_bytes()[-1000:] == whole[-1000:]
    assert [p.name for p in CACHE.iterdir()] == [path.name]


def test_two_that_store_the_same_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    tensors = {"w": torch.arange(6.0).reshape(2, 3)}
    first = put(tmp_path, "key", tensors, {"n": 1})
    second = put(tmp_path, "key", {"w": tensors["w"] + 1}, {"n": 2})
    assert torch.equal(first["w"], second["w"])  # a reader that found the first reads what is there now
    found = find(tmp_path, "key")
    assert found is not None
    assert found.facts == {"n": 2}
    assert find(tmp_path, "other") is None


def test_layers_that_no_row_reaches_are_averaged_with_a_warning(
    population: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mergectl import calibration

    kept = calibration._Watch._see

    def blind(self: Any, name: str, decoding: bool, x: torch.Tensor) -> None:
        if "layer.0." not in name and "layers.0." not in name:
            kept(self, name, decoding, x)

    monkeypatch.setattr(calibration._Watch, "_see", blind)
    for out in ("out", "again"):  # what is found in the cache is as little
        assert cli(*words(population, "regmean", out, *SMALL)) == 0
        said = capsys.readouterr().err
        assert "warning: Calibration of 'parity' never reached encoder.layer.0." in said
        assert "and 3 more: nothing is known of these layers." in said
    name = "encoder.layer.0.output.dense.weight"
    expected = sum(weights(population / task)[f"vit.{name}"] for task in ("parity", "digit")) / 2
    torch.testing.assert_close(weights(Path("out"))[name], expected)


def lined_up(folder: Path, family: str, task: Task, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A base and an expert of a family, whose task is known to the lab."""
    base = tiny.base(folder / "base", family)
    expert = tiny.expert(folder / "expert", family, task)
    monkeypatch.setattr("mergectl.calibration_supply.task_of", lambda lab, family, name: task)
    return open_family(str(base), [(task.id, str(expert))])


@pytest.mark.parametrize(
    ("name", "what"), [*((name, "grams") for name in [*tiny.FAMILIES, "deberta"]), ("gpt2", "fishers")]
)
def test_names_are_those_of_the_merge_for_every_architecture(
    name: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tiny.CONFIGS, "deberta", {**tiny.CONFIGS["deberta-v2"], "model_type": "deberta"})
    family = lined_up(tmp_path, name, tiny.task_for(name), monkeypatch)
    few = {"grams": {"num_ada_examples": 50}, "fishers": {"num_fisher_examples": 4}}[what]
    options = settled(few, [what], list(family.experts), "any")
    (found,) = calibrated(Lab(), family, 0, what, options).values()
    view = family.population.base
    if what == "grams":
        assert set(found) == set(linears_of(family.base) or {})
        assert all(len(found[key].moment) in view.shape(key) for key in found)
    else:
        assert set(found) == set(view)
        assert all(found[key].shape == view.shape(key) for key in found)


def test_a_regression_and_a_text_to_text_task_are_calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = lined_up(tmp_path / "number", "bert", tiny.NUMBER, monkeypatch)
    (found,) = calibrated(
        Lab(), family, 0, "fishers", settled({"num_fisher_examples": 4}, ["fishers"], ["number"], "any")
    ).values()
    assert float(found["encoder.layer.1.output.dense.weight"].sum()) > 0
    (task, _), folder = written.family(tmp_path / "mood", "v1.1"), tmp_path / "mood"
    monkeypatch.setattr("mergectl.calibration_supply.task_of", lambda lab, family, name: task)
    worded = open_family(str(folder / "base"), [(task.id, str(folder / "one"))])
    for what, few in (("grams", {"num_ada_examples": 90}), ("fishers", {"num_fisher_examples": 4})):
        (found,) = calibrated(Lab(), worded, 0, what, settled(few, [what], ["one"], "any")).values()
        assert "decoder.block.1.layer.1.EncDecAttention.k.weight" in found
        assert ("lm_head.weight" in found) == (what == "fishers")


def test_each_expert_may_keep_its_own_share_of_ranks_in_the_order_of_the_line(population: Path, cli: Cli) -> None:
    assert cli(*words(population, "pave_ta", "listed", *SMALL, "--rank-scale", "1.0,0.5")) == 0
    assert cli(*words(population, "pave_ta", "named", *SMALL, "--rank-scale", "digit=0.5,parity=1.0")) == 0
    assert cli(*words(population, "pave_ta", "other", *SMALL, "--rank-scale", "0.5,1.0")) == 0
    listed, named, other = (weights(Path(name)) for name in ("listed", "named", "other"))
    assert all(torch.equal(x, named[name]) for name, x in listed.items())
    assert any(not torch.equal(x, other[name]) for name, x in listed.items())
