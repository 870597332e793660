"""`merge --adapter-mode factors`: the factors of LoRA adapters are merged from their common start, as published."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergectl import merge_weights
from mergectl.adapters import START
from mergectl.checkpoints import open_checkpoint
from mergectl.ownership import load_masks
from tests import test_text2text as words
from tests.conftest import Cli
from tests.test_adapter_merge import PAIR, loaded, opened, whole
from tests.test_finetune import train

Capture = pytest.CaptureFixture[str]
FACTORS = ["--adapter", "--adapter-mode", "factors"]
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a T5 base and two LoRA adapters that were begun alike and trained differently."""
    folder = tmp_path_factory.mktemp("factors")
    base = words.base(folder / "base", "v1.1")
    for name, how in (("one", {"epochs": 3}), ("two", {"epochs": 5, "limit_fit": 8})):
        train(words.settings(base, peft="lora", lr=5e-2, rank=3, **how), folder / name, words.MOOD)
    train(words.settings(base, peft="lora", rank=3, seed=7, max_steps=1), folder / "other", words.MOOD)
    return folder


@pytest.fixture
def lora(made: Path, tmp_path: Path) -> Path:
    """Work in a copy of it."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def factors(folder: str) -> Weights:
    found: Weights = load_file(Path(folder) / "adapter_model.safetensors")
    return found


def test_the_start_is_what_training_begins_from(lora: Path) -> None:
    starts = {name: load_file(lora / name / "adapter" / START) for name in ("one", "two", "other")}
    assert starts["one"].keys() == factors("one/adapter").keys()
    for name, start in starts["one"].items():
        assert torch.equal(start, starts["two"][name])
        assert ("lora_B" in name) == (not start.any())
        assert not torch.equal(start, factors("one/adapter")[name])
    assert any(not torch.equal(start, starts["other"][name]) for name, start in starts["one"].items())


def elected_mean(start: torch.Tensor, *experts: torch.Tensor) -> torch.Tensor:
    """Entry by entry as the publication writes it: the mean of the changes that go the way of their sum."""
    found = start.clone().flatten()
    changes = [(expert - start).flatten().tolist() for expert in experts]
    for place, row in enumerate(zip(*changes, strict=True)):
        total = sum(row)
        going = [value for value in row if value * total > 0]
        if going:
            found[place] += sum(going) / len(going)
    return found.view_as(start)


def test_medusa_takes_the_elected_mean_of_the_factors(lora: Path, cli: Cli) -> None:
    assert cli("merge", "medusa", *PAIR, "-o", "m", *FACTORS) == 0
    start, one, two, merged = load_file(f"one/adapter/{START}"), *map(factors, ("one/adapter", "two/adapter", "m"))
    assert merged.keys() == one.keys()
    for name, factor in merged.items():
        torch.testing.assert_close(factor, elected_mean(start[name], one[name], two[name]), atol=1e-6, rtol=1e-5)


SEVEN: list[tuple[str, str, dict[str, Any]]] = [
    ("__SUM", "average", {}),
    ("__TA", "task_arithmetic", {"scale": 0.4}),
    ("TIES_", "ties_tensor", {"density": 0.2}),
    ("__DARE_SUM", "dare_average", {"drop": 0.8}),
    ("__DARE_TA", "dare_task_arithmetic", {"drop": 0.8, "scale": 0.4}),
    ("__DARE_TIES", "dare_ties", {"drop": 0.8}),
    ("_MEDUSA", "medusa", {}),
]


@pytest.mark.parametrize(("word", "method", "settings"), SEVEN, ids=[word for word, _, _ in SEVEN])
def test_all_seven_merges_work_on_factors_as_on_weights(
    lora: Path, cli: Cli, word: str, method: str, settings: dict[str, Any]
) -> None:
    given = [item for name, value in settings.items() for item in (f"--{name}", str(value))]
    assert cli("merge", word, *PAIR, *given, "-o", "m", *FACTORS) == 0
    start, *experts = (
        {name.removeprefix("base_model.model."): factor for name, factor in file.items()}
        for file in (load_file(f"one/adapter/{START}"), factors("one/adapter"), factors("two/adapter"))
    )
    expected = merge_weights(method, start, dict(zip(("one", "two"), experts, strict=True)), seed=0, **settings)
    for name, factor in factors("m").items():
        torch.testing.assert_close(factor, expected[name.removeprefix("base_model.model.")], atol=1e-6, rtol=1e-6)


def test_peft_loads_merged_factors_and_reads_the_same_weights_as_we_do(lora: Path, cli: Cli) -> None:
    assert cli("merge", "medusa", *PAIR, "-o", "m", *FACTORS) == 0
    assert json.loads(Path("m/adapter_config.json").read_text())["r"] == 3
    assert json.loads(Path("m/mergectl.json").read_text())["adapter_mode"] == "factors"
    theirs, ours = whole(loaded(Path("m"))), open_checkpoint("m")
    for name in (n for n in theirs if "SelfAttention" in n):
        torch.testing.assert_close(ours[name].float(), theirs[name], atol=1e-5, rtol=1e-5)
    assert any(not torch.equal(weight, whole(words.reloaded(Path("base")))[name]) for name, weight in theirs.items())


def test_merged_factors_may_be_merged_again(lora: Path, cli: Cli) -> None:
    assert cli("merge", "average", *PAIR, "-o", "m", *FACTORS) == 0
    assert cli("merge", "average", "--experts", "m=m", "one=one/adapter", "-o", "again", *FACTORS) == 0
    one, two, found = (factors(name) for name in ("one/adapter", "two/adapter", "again"))
    for name, factor in found.items():
        torch.testing.assert_close(factor, 0.75 * one[name] + 0.25 * two[name], atol=1e-6, rtol=1e-5)


def told(cli: Cli, capsys: Capture, *given: str) -> dict[str, Any]:
    capsys.readouterr()
    assert cli("--json", "eval", *given) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_conflict_is_told_of_factors_too(lora: Path, cli: Cli, capsys: Capture) -> None:
    found = told(cli, capsys, "base", "--conflict", *PAIR)
    assert cli("merge", "medusa", *PAIR, "-o", "m", *FACTORS) == 0
    assert told(cli, capsys, "m", "--conflict")["factors"] == found["factors"]
    start = load_file(f"one/adapter/{START}")
    changes = [
        torch.cat([(factor - start[name]).flatten() for name, factor in factors(f"{expert}/adapter").items()])
        for expert in ("one", "two")
    ]
    share = float((changes[0] * changes[1] < 0).float().mean())
    assert share > 0.02
    row = next(row for row in found["factors"] if row["name"] == "sign_conflict" and row["of"] is None)
    assert row["share"] == pytest.approx(share)
    capsys.readouterr()
    question = "select value from metrics where name = 'factors/sign_conflict' and task is null"
    assert cli("--json", "report", "--sql", question) == 0
    assert [row["value"] for row in json.loads(capsys.readouterr().out)] == [row["share"]] * 2
    assert {row["stack"] for row in found["factor_layers"]} == {"encoder.block", "decoder.block"}


def test_it_is_printed_for_people(lora: Path, cli: Cli, capsys: Capture) -> None:
    assert cli("eval", "base", "--conflict", *PAIR) == 0
    assert "Of all elements of LoRA factors" in capsys.readouterr().out


def test_adapters_begun_differently_have_no_conflict_of_factors(lora: Path, cli: Cli, capsys: Capture) -> None:
    found = told(cli, capsys, "base", "--conflict", "--experts", "one=one/adapter", "other=other/adapter")
    assert "factors" not in found


def other_seed() -> None:
    shutil.copytree("other/adapter", "two/adapter", dirs_exist_ok=True)


def no_start() -> None:
    Path("two/adapter", START).unlink()


def other_scale() -> None:
    path = Path("two/adapter/adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 99}))


REFUSED = [
    (other_seed, "two/adapter and one/adapter were begun from different factors."),
    (no_start, "two/adapter does not keep the factors that it was begun from (start.safetensors)."),
    (other_scale, "two/adapter and one/adapter multiply their factors by different scales (alpha / rank)."),
]


@pytest.mark.parametrize(("spoil", "sentence"), REFUSED, ids=[spoil.__name__ for spoil, _ in REFUSED])
def test_factors_that_do_not_belong_together_are_refused(
    lora: Path, cli: Cli, capsys: Capture, spoil: Any, sentence: str
) -> None:
    spoil()
    assert cli("merge", "medusa", *PAIR, "-o", "m", *FACTORS) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())
    assert not Path("m").exists()
    assert cli("merge", "medusa", *PAIR, "-o", "m", "--adapter") == 0  # by products they merge all the same


def test_factors_keep_their_rank(lora: Path, cli: Cli, capsys: Capture) -> None:
    assert cli("merge", "average", *PAIR, "-o", "m", *FACTORS, "--adapter-rank", "2") == 2
    assert "--adapter-rank has no meaning for factors" in capsys.readouterr().err


def test_a_start_that_changed_is_another_adapter(lora: Path) -> None:
    before = opened("one/adapter").digest
    path = Path("one/adapter", START)
    save_file({name: factor + 1 for name, factor in load_file(path).items()}, path)
    assert opened("one/adapter").digest != before


def test_divided_factors_never_meet_and_their_merge_is_their_sum(lora: Path, cli: Cli, capsys: Capture) -> None:
    """No conflict by construction, for adapters too: two tasks, one call, masks, factors, one adapter."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"sentence": text, "label": label, "idx": i} for i, (text, label) in
            enumerate([("good warm film", 1), ("dull", 0), ("a warm dull thing", 1), ("bad film", 0)] * 6)]  # fmt: skip
    for task in ("sst2", "cola"):
        Path("data/glue", task).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), Path("data/glue", task, "train.parquet"))
    trained = ["finetune", "glue-t5/sst2", "glue-t5/cola", "--base", "base", "--for", "medusa", "--peft", "lora"]
    assert cli("--data", "data", *trained, "--lr", "5e-2", "--epochs", "2", "--batch-size", "8", "--quiet") == 0
    experts = ["--experts", "sst2=runs/sst2/adapter", "cola=runs/cola/adapter"]
    assert cli("merge", "medusa", *experts, "-o", "m", *FACTORS, "--quiet") == 0
    shares = {row["name"]: row["share"] for row in told(cli, capsys, "m", "--conflict")["factors"] if not row["of"]}
    assert shares["sign_conflict"] == shares["changed_by_several"] == 0
    assert shares["changed_by_one"] > 0.5
    start, one, two = load_file(f"runs/sst2/adapter/{START}"), *map(factors, ("runs/sst2/adapter", "runs/cola/adapter"))
    owned = [dict(load_masks(Path(f"runs/masks/{task}.safetensors"))) for task in ("sst2", "cola")]
    for name, factor in factors("m").items():
        expected = torch.where(owned[0][name], one[name], torch.where(owned[1][name], two[name], start[name]))
        torch.testing.assert_close(factor, expected, atol=1e-7, rtol=1e-6)


def test_a_pipeline_merges_adapters_as_the_command_does(lora: Path, cli: Cli, capsys: Capture) -> None:
    merge = {
        "method": "medusa",
        "base": str(lora / "base"),
        "experts": [f"{n}={lora / n / 'adapter'}" for n in ("one", "two")],
    }
    steps = [
        {"merge": {**merge, "adapter": True, "adapter_mode": "factors", "out": "factors"}},
        {"merge": {**merge, "adapter": True, "adapter_mode": "product", "adapter_rank": 2, "out": "product"}},
        {"eval": {"models": ["@factors"], "conflict": True}},
    ]
    Path("p.yaml").write_text(json.dumps({"title": "Adapters", "steps": steps}))
    assert cli("run", "p.yaml") == 0
    assert cli("merge", "medusa", *PAIR, "-o", "m", *FACTORS) == 0
    one, two = factors("lab/runs/p/factors"), factors("m")
    assert all(torch.equal(one[name], two[name]) for name in two)
    assert json.loads(Path("lab/runs/p/product/adapter_config.json").read_text())["r"] == 2
    capsys.readouterr()
    assert cli("run", "p.yaml") == 0
    assert capsys.readouterr().err.count("already done") == 3


WRONG_STEPS: list[tuple[dict[str, Any], str]] = [
    ({"adapter_mode": "factors"}, "--adapter-mode is for merged LoRA adapters. Add --adapter."),
    ({"adapter": True, "adapter_mode": "factor"}, "got 'factor'. Did you mean 'factors'?"),
    ({"adapter": True, "adapter_mode": "factors", "adapter_rank": 2}, "--adapter-rank has no meaning for factors"),
]


@pytest.mark.parametrize(("given", "sentence"), WRONG_STEPS, ids=[sentence for _, sentence in WRONG_STEPS])
def test_a_pipeline_is_told_before_its_first_step(
    lora: Path, cli: Cli, capsys: Capture, given: dict[str, Any], sentence: str
) -> None:
    steps = [{"merge": {"method": "medusa", "experts": ["one=one/adapter", "two=two/adapter"], "out": "m", **given}}]
    Path("p.yaml").write_text(json.dumps({"title": "Adapters", "steps": steps}))
    assert cli("run", "p.yaml") == 2
    assert sentence in " ".join(capsys.readouterr().err.split())
    assert not Path("lab/runs").exists()
