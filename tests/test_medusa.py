"""`finetune --for medusa`: short trainings, masks and masked trainings, each a run; resumed step by step."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mergectl import medusa, verbs
from mergectl.ownership import Ownership, load_masks
from mergectl.presets import settled
from tests.conftest import Cli
from tests.population import weights

Capture = pytest.CaptureFixture[str]
SHORT = ["--epochs", "2", "--limit-fit", "96", "--limit-tune", "16", "--lr", "1e-3", "--quiet"]
PAIR = ["finetune", "digits/parity", "digits/loop", "--for", "medusa", *SHORT]


@pytest.fixture(scope="module")
def done(population: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which two experts that own disjoint elements were trained."""
    from mergectl.cli import main

    folder, before = tmp_path_factory.mktemp("medusa"), Path.cwd()
    os.chdir(folder)
    try:
        assert main([*PAIR, "--base", str(population / "base")]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def ran(done: Path, tmp_path: Path) -> Path:
    """A copy of that folder to work in."""
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    return tmp_path


def rows(cli: Cli, capsys: Capture, question: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert cli("--json", "report", "--sql", question) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def backbone(folder: Path) -> dict[str, torch.Tensor]:
    return {name.removeprefix("vit."): w for name, w in weights(folder).items() if not name.startswith("classifier")}


def test_the_experts_change_only_what_they_own_and_never_the_same(done: Path, population: Path) -> None:
    base = backbone(population / "base")
    masks = {task: dict(load_masks(done / f"runs/masks/{task}.safetensors")) for task in ("parity", "loop")}
    assert set(masks["parity"]) == set(base)
    changed = {}
    for task, owned in masks.items():
        expert = backbone(done / "runs" / task)
        changed[task] = {name: expert[name] != weight for name, weight in base.items()}
        assert all(not (changed[task][name] & ~owned[name]).any() for name in base)
        assert sum(int(mask.sum()) for mask in changed[task].values()) > 1000
    assert not any((changed["parity"][name] & changed["loop"][name]).any() for name in base)


def test_the_masks_share_out_what_the_short_trainings_wanted(done: Path, population: Path) -> None:
    base = backbone(population / "base")
    short = [backbone(done / "runs/prepass" / task) for task in ("parity", "loop")]
    from mergectl.methods import _ownership

    masks = [dict(load_masks(done / f"runs/masks/{task}.safetensors")) for task in ("parity", "loop")]
    for name, start in base.items():
        wanted = torch.stack([_ownership.trim(expert[name] - start, 87.5) != 0 for expert in short]).any(0)
        assert torch.equal(masks[0][name] | masks[1][name], wanted)


def test_every_step_is_a_run_with_its_lineage(ran: Path, cli: Cli, capsys: Capture) -> None:
    found = rows(cli, capsys, "select kind, count(*) as n from runs group by kind order by kind")
    assert [(row["kind"], row["n"]) for row in found] == [("finetune", 4), ("masks", 1)]
    question = (
        "select r.kind, r.name, i.role, i.task, p.kind as made_by from inputs i join runs r using (run_id) "
        "left join runs p on p.run_id = i.parent_run where i.role <> 'base' order by r.kind, r.name, i.role, i.task"
    )
    assert [tuple(row.values()) for row in rows(cli, capsys, question)] == [
        ("finetune", "loop", "masks", "digits/loop", "masks"),
        ("finetune", "loop", "prepass", "digits/loop", "finetune"),
        ("finetune", "parity", "masks", "digits/parity", "masks"),
        ("finetune", "parity", "prepass", "digits/parity", "finetune"),
        ("masks", "masks-soft", "prepass", "digits/loop", "finetune"),
        ("masks", "masks-soft", "prepass", "digits/parity", "finetune"),
    ]


def test_who_owns_how_much_is_stored(ran: Path, cli: Cli, capsys: Capture) -> None:
    question = "select m.name, task, value from metrics m join runs using (run_id) where kind = 'masks'"
    found = {(row["name"], row["task"]): row["value"] for row in rows(cli, capsys, question)}
    owned = [found["owned_share", task] for task in ("digits/loop", "digits/parity")]
    assert sum(owned) + found["unowned_share", None] == pytest.approx(1)
    assert 0.8 < sum(owned) < 1


def test_the_merge_is_the_sum_of_the_task_vectors(ran: Path, cli: Cli, population: Path) -> None:
    base = str(population / "base")
    for method, settings in (("medusa", []), ("task_arithmetic", ["--scale", "1.0"])):
        words = ["merge", method, "--base", base, "--experts", "runs/parity", "runs/loop", *settings]
        assert cli(*words, "-o", method, "--quiet") == 0
    one, two = backbone(Path("medusa")), backbone(Path("task_arithmetic"))
    for name, weight in one.items():
        torch.testing.assert_close(weight, two[name], atol=1e-7, rtol=1e-6)


def test_nothing_is_done_twice(ran: Path, cli: Cli, capsys: Capture, population: Path) -> None:
    assert cli(*PAIR, "--base", population / "base") == 0
    assert rows(cli, capsys, "select count(*) as n from runs") == [{"n": 5}]


@pytest.mark.slow
def test_after_a_kill_only_what_is_missing_is_done(
    cli: Cli, capsys: Capture, population: Path, monkeypatch: pytest.MonkeyPatch, done: Path
) -> None:
    words = [*PAIR, "--base", str(population / "base")]
    with monkeypatch.context() as patch:
        patch.setattr(medusa, "make_masks", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli(*words) == 130
    question = "select kind, status, count(*) as n from runs group by all order by kind, status"
    assert [tuple(row.values()) for row in rows(cli, capsys, question)] == [
        ("finetune", "finished", 2), ("masks", "cancelled", 1),
    ]  # fmt: skip
    assert not Path("runs/masks").exists()
    shutil.rmtree("runs/prepass/loop")
    assert cli(*words) == 0
    assert [tuple(row.values()) for row in rows(cli, capsys, question)] == [
        ("finetune", "finished", 5), ("masks", "cancelled", 1), ("masks", "finished", 1),
    ]  # fmt: skip
    for name in ("prepass/parity", "prepass/loop", "parity", "loop"):
        one, two = weights(Path("runs") / name), weights(done / "runs" / name)
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_number_of_steps_ends_the_short_trainings_too(cli: Cli, population: Path) -> None:
    words = ["finetune", "digits/parity", "digits/loop", "--base", str(population / "base"), "--for", "medusa", *SHORT]
    for most, expected in ((2, 2), (9, 6)):  # an epoch of 96 rows has six steps
        assert cli(*words, "--max-steps", most, "-o", f"most{most}") == 0
        for name in ("parity", "loop"):
            assert steps(Path(f"most{most}/prepass/{name}")) == expected
            assert steps(Path(f"most{most}/{name}")) == most


def steps(folder: Path) -> int:
    """How many steps a training took."""
    return int(json.loads((folder / "mergectl.json").read_text())["steps"])


def test_masks_that_a_killed_run_wrote_are_taken(
    ran: Path, cli: Cli, capsys: Capture, population: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*PAIR, "--base", str(population / "base"), "--mask", "hard"]
    for name in ("masks", "parity", "loop"):
        shutil.rmtree(Path("runs") / name)
    with monkeypatch.context() as patch:
        patch.setattr(medusa, "_record", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli(*words) == 130
    assert Path("runs/masks/loop.safetensors").exists()
    monkeypatch.setattr(medusa, "finetune_experts", _only_short(verbs.finetune_experts))
    assert cli(*words) == 0
    assert rows(cli, capsys, "select status from runs where name = 'masks-hard' and status = 'finished'")


def _only_short(train: Any) -> Any:
    """The short trainings of a job, without the masked ones."""
    return lambda *words, masked=None, **how: train(*words, **how) if masked is None else []


def test_masks_of_another_plan_do_not_replace_those_that_experts_were_trained_with(
    ran: Path, cli: Cli, capsys: Capture, population: Path
) -> None:
    words = [*PAIR, "--base", str(population / "base"), "--mask", "hard"]
    before = Path("runs/masks/loop.safetensors").read_bytes()
    assert cli(*words) == 2
    assert "runs/masks holds the masks of another job" in capsys.readouterr().err
    assert Path("runs/masks/loop.safetensors").read_bytes() == before
    assert not rows(cli, capsys, "select run_id from runs where status = 'failed'")
    assert cli(*words, "--force") == 0
    assert Path("runs/masks/loop.safetensors").read_bytes() != before


def test_partial_control_does_not_oppose_a_finished_model(ran: Path, cli: Cli, population: Path) -> None:
    base = str(population / "base")
    words = ["finetune", "digits/loop", "--base", base, "--for", "medusa", *SHORT, "-o", "beside"]
    assert cli(*words, "--against", "runs/prepass/parity") == 0
    start, finished = backbone(population / "base"), backbone(Path("runs/prepass/parity"))
    short, after = backbone(Path("beside/prepass/loop")), backbone(Path("beside/loop"))
    from mergectl.methods import _ownership

    for name, mask in load_masks(Path("beside/masks/loop.safetensors")):
        elected = _ownership.trim(finished[name] - start[name], 87.5).sign()
        assert not (((short[name] - start[name]).sign() * elected)[mask] < 0).any()
        assert not ((after[name] != start[name]) & ~mask).any()


def test_adapters_are_divided_only_against_such_as_were_begun_alike(
    cli: Cli, capsys: Capture, population: Path
) -> None:
    base = ["--base", str(population / "base"), "--peft", "lora", *SHORT, "--max-steps", "1"]
    assert cli("--seed", "1", "finetune", "digits/parity", *base, "-o", "first") == 0
    beside = ["finetune", "digits/loop", *base, "--for", "medusa", "-o", "beside", "--against"]
    for model, sentence in (
        ("first/parity", "first/parity was begun from other factors than this training would be."),
        (str(population / "parity"), "holds no adapter, and adapters can be divided only against adapters."),
    ):
        assert cli(*beside, model) == 2
        assert sentence in capsys.readouterr().err
        assert not Path("beside").exists()  # told before any training
    Path("first/parity/adapter/start.safetensors").unlink()
    assert cli("--seed", "1", *beside, "first/parity") == 2
    assert "does not keep the factors that it was begun from" in capsys.readouterr().err


def test_a_reference_mask_says_which_model_it_was_made_against(
    ran: Path, cli: Cli, capsys: Capture, population: Path
) -> None:
    base = str(population / "base")
    words = [
        "finetune",
        "digits/loop",
        "--base",
        base,
        "--for",
        "medusa",
        *SHORT,
        "-o",
        "beside",
        "--mask",
        "reference",
    ]
    assert cli(*words, "--against", "runs/prepass/parity", population / "digit") == 0
    found = rows(cli, capsys, "select task, value from metrics where name = 'sign_conflict' order by value")
    noted = rows(cli, capsys, "select value from environment where key = 'chosen'")
    assert len(found) == 2
    assert noted[0]["value"] == found[0]["task"]


@pytest.mark.slow
@pytest.mark.parametrize(("peft", "part", "start"), [("lora", "lora_B", 0.0), ("ia3", "ia3_l", 1.0)])
def test_adapters_own_their_parts(cli: Cli, population: Path, peft: str, part: str, start: float) -> None:
    words = [*PAIR, "--base", str(population / "base"), "--peft", peft, "--lr", "1e-2"]
    assert cli(*words) == 0
    masks = [dict(load_masks(Path(f"runs/masks/{task}.safetensors"))) for task in ("parity", "loop")]
    files = [load_file(f"runs/{task}/adapter/adapter_model.safetensors") for task in ("parity", "loop")]
    assert masks[0]
    assert all(f".{peft}_" in name for name in masks[0])
    for name, mask in masks[0].items():
        assert not (mask & masks[1][name]).any()
        both = ~mask & ~masks[1][name]
        assert torch.equal(files[0][name][both], files[1][name][both])
        if part in name:  # what begins alike everywhere
            assert all((file[name][~own[name]] == start).all() for file, own in zip(files, masks, strict=True))


@pytest.mark.parametrize("peft", ["none", "lora"])
def test_halves_are_divided_without_short_trainings(
    cli: Cli, capsys: Capture, population: Path, tmp_path: Path, peft: str
) -> None:
    words = [*PAIR, "--base", str(population / "base"), "--mask", "half", "--max-steps", "1", "--peft", peft]
    assert cli(*words) == 0
    assert not Path("runs/prepass").exists()
    found = rows(cli, capsys, "select kind, count(*) as n from runs group by kind order by kind")
    assert [(row["kind"], row["n"]) for row in found] == [("finetune", 2), ("masks", 1)]
    masks = [dict(load_masks(Path(f"runs/masks/{task}.safetensors"))) for task in ("parity", "loop")]
    assert masks[0].keys() == masks[1].keys()
    if peft == "none":
        assert set(masks[0]) == set(backbone(population / "base"))
    assert all((one ^ masks[1][name]).all() for name, one in masks[0].items())  # all is owned, and by one


def test_an_adapter_names_its_base_so_that_it_loads_from_anywhere(cli: Cli, population: Path) -> None:
    base = os.path.relpath(population / "base")
    assert cli("finetune", "digits/parity", "--base", base, "--peft", "lora", "--max-steps", "1", *SHORT) == 0
    told = json.loads(Path("runs/parity/adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(told).is_absolute() and Path(told).samefile(population / "base")


WRONG: list[tuple[list[str], str]] = [
    (["--mask", "hard"], "--mask is for ownership masks. Add --for medusa."),
    (["--for", "medsua"], "got 'medsua'. Did you mean 'medusa'?"),
    (["--for", "medusa", "--grid", "lr=1e-3,1e-4"], "--for medusa trains one expert per task"),
    (["--for", "medusa", "--mask", "reference"], "mask=reference is for one task beside finished models"),
    (["--for", "medusa", "--mask", "hard", "--against", "runs/x"], "mask=hard takes no finished models"),
    (["--for", "medusa", "--top-k", "0"], "top_k must lie above 0"),
    (["--for", "medusa", "--mask", "half", "--top-k", "50"], "so top_k has no meaning beside it"),
    (["--for", "medusa", "--mask", "half", "--unowned", "first"], "so unowned has no meaning beside it"),
    (["--for", "medusa", "--mask", "half", "--prepass-epochs", "2"], "so prepass_epochs has no meaning beside it"),
    (["--for", "medusa", "--mask", "half", "--prepass-percent", "30"], "so prepass_percent has no meaning beside it"),
    (["--for", "medusa", "--prepass-epochs", "0"], "Error: prepass_epochs must be above 0, got 0."),
    (["--for", "medusa", "--prepass-percent", "0"], "prepass_percent must lie above 0"),
    (["--for", "medusa", "--prepass-percent", "30", "--prepass-epochs", "2"], "both say how long the short trainings"),
    (["--for", "medusa", "--unowned", "last"], "unowned must be one of freeze, first, got 'last'"),
    (
        ["--preset", "medusa"],
        "The preset medusa says nothing of digits/parity. Give --epochs and --batch-size with it.",
    ),
    (["--preset", "medsua"], "preset must be one of none, medusa"),
    (["--tiny-sample"], "tiny_sample shortens the trainings of a preset"),
    (["--smaller-batch", "3"], "smaller_batch must divide the batch of 16 rows, got 3."),
    (["--larger-batch", "2"], "batches that are accumulated per step, 1, got 2."),
    (["--select-on", "test"], "select_on must be one of tune, report, got 'test'."),
    (["--keep", "first"], "keep must be one of best, last, got 'first'."),
]


@pytest.mark.parametrize(
    ("words", "sentence"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else None
)
def test_what_cannot_be_is_one_sentence_and_trains_nothing(
    cli: Cli, capsys: Capture, population: Path, words: list[str], sentence: str
) -> None:
    assert cli("finetune", "digits/parity,digits/loop", "--base", population / "base", *words) == 2
    assert sentence in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_base_without_weights_cannot_be_divided(cli: Cli, capsys: Capture, population: Path) -> None:
    Path("bare.json").write_text((population / "base" / "config.json").read_text())
    assert cli(*PAIR, "--base", "bare.json") == 2
    assert "it needs one that has weights" in capsys.readouterr().err


# Published settings


T5 = {"model_type": "t5", "num_layers": 12}
LARGE = {"model_type": "t5", "num_layers": 24}


@pytest.mark.parametrize(
    ("task", "model", "given", "expected"),
    [
        ("cola", T5, {}, (10, 128, 2, 3e-4)),
        ("cola", LARGE, {}, (10, 32, 8, 3e-4)),
        ("sst2", T5, {"bf16": True}, (10, 128, 2, 3e-4)),
        ("qnli", LARGE, {"bf16": True}, (3, 8, 32, 3e-4)),
        ("mnli", T5, {}, (1, 16, 16, 3e-4)),
        ("rte", T5, {}, (20, 16, 1, 3e-4)),
        ("rte", LARGE, {}, (20, 4, 4, 3e-4)),
        ("wnli", T5, {}, (20, 32, 1, 3e-4)),
        ("cola", LARGE, {"peft": "lora"}, (16, 16, 16, 1e-4)),
        ("wnli", LARGE, {"peft": "ia3"}, (32, 2, 16, 1e-4)),
        ("rte", T5, {"smaller_batch": 4}, (20, 4, 4, 3e-4)),
        ("cola", LARGE, {"larger_batch": 4}, (10, 128, 2, 3e-4)),
        ("cola", T5, {"larger_batch": 2, "smaller_batch": 4}, (10, 64, 4, 3e-4)),
        ("cola", T5, {"tiny_sample": True}, (1, 128, 2, 6e-4)),
        ("rte", T5, {"tiny_sample": True}, (2, 16, 1, 6e-4)),
        ("qnli", T5, {"tiny_sample": True}, (1, 16, 16, 6e-4)),
        ("cola", T5, {"lr": 1e-5, "epochs": 2, "batch_size": 64}, (2, 64, 4, 1e-5)),
        ("mrpc", T5, {"epochs": 2, "batch_size": 32}, (2, 32, 8, 3e-4)),
    ],
)
def test_the_preset_is_the_published_table(
    task: str, model: dict[str, Any], given: dict[str, Any], expected: tuple[float, ...]
) -> None:
    found = settled(f"glue-t5/{task}", model, {"preset": "medusa", **given})
    assert tuple(found[key] for key in ("epochs", "batch_size", "accumulation", "lr")) == expected
    quiet = ("weight_decay", "warmup", "max_grad_norm", "model_dropout")
    assert (found["scheduler"], *(found[key] for key in quiet)) == ("constant", 0.0, 0.0, 0.0, 0.0)
    if given.get("peft") == "lora":
        assert (found["rank"], found["alpha"], found["dropout"]) == (16, 16.0, 0.1)


@pytest.mark.parametrize(
    ("task", "epochs"), [("cola", 3), ("rte", 6), ("sst2", 3), ("qnli", 1), ("wnli", 6), ("mnli", 1)]
)
def test_thirty_percent_of_the_epochs_are_the_published_short_trainings(task: str, epochs: int) -> None:
    short = medusa.MedusaJob(prepass_percent=30).short
    assert settled(f"glue-t5/{task}", T5, {"preset": "medusa", **short})["epochs"] == epochs
    assert settled(f"glue-t5/{task}", T5, {"epochs": 12, **short})["epochs"] == 3
    assert settled(f"glue-t5/{task}", T5, short)["epochs"] == 1
    assert settled(f"glue-t5/{task}", T5, {"max_steps": 600, **short})["max_steps"] == 180
    assert medusa.MedusaJob(prepass_epochs=2).short["epochs"] == 2


def test_a_person_is_told_who_owns_what() -> None:
    found = Ownership(shares={"digits/parity": 0.431, "digits/loop": 0.502}, nobody=0.067)
    assert medusa._owners(found) == ["digits/parity owns 43.1 %, digits/loop owns 50.2 %, nobody 6.7 %"]


def test_the_command_line_goes_before_the_preset(cli: Cli, capsys: Capture, population: Path) -> None:
    words = ["finetune", "digits/parity", "--base", str(population / "base"), "--preset", "medusa", "--max-steps", "1"]
    assert cli(*words, "--epochs", "1", "--batch-size", "64", "--smaller-batch", "4", "--quiet") == 0
    recipe = json.loads(Path("runs/parity/mergectl.json").read_text())["recipe"]
    expected = {"batch_size": 16, "accumulation": 16, "lr": 3e-4, "weight_decay": 0.0, "scheduler": "constant"}
    assert expected.items() <= recipe.items()


def test_the_split_that_the_study_chose_on_may_choose_and_is_told(cli: Cli, capsys: Capture, population: Path) -> None:
    words = ["finetune", "digits/parity", "--base", str(population / "base"), "--max-steps", "2", "--limit-fit", "32"]
    assert cli(*words, "--limit-tune", "8", "--select-on", "validation", "--keep", "last", "--quiet") == 0
    recipe = json.loads(Path("runs/parity/mergectl.json").read_text())["recipe"]
    assert (recipe["select_on"], recipe["keep"]) == ("report", "last")
    notes = rows(cli, capsys, "select value from environment where key = 'saw'")
    assert [note["value"].strip('"') for note in notes] == ["labelled report inputs"]
    assert cli("eval", "runs/parity", "--limit", "8", "--quiet") == 0
    assert cli("report", "--split", "report:8") == 0
    assert "saw: labelled report inputs" in " ".join(capsys.readouterr().out.split())


def test_mixed_is_another_word_for_bf16(cli: Cli, population: Path) -> None:
    words = ["finetune", "digits/parity", "--base", str(population / "base"), "--max-steps", "1", "--mixed", "--quiet"]
    assert cli(*words) == 0
    assert json.loads(Path("runs/parity/mergectl.json").read_text())["recipe"]["bf16"] is True


def test_text_models_are_divided_in_the_order_of_their_parameters(tmp_path: Path) -> None:
    """Files are sorted by name; the published program draws in the order in which the model holds its weights."""
    from mergectl.division import divide_models
    from mergectl.models import open_source
    from tests.test_text2text import MOOD, base, fresh

    for seed, name in enumerate(("base", "one")):
        base(tmp_path / name, "v1.1", seed)
    found = divide_models(open_source(tmp_path / "base"), MOOD, {"one": tmp_path / "one"}, [])
    assert found.order == [name for name, _ in fresh("v1.1", 0).named_parameters()]
