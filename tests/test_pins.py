"""Pins: the commits of the hub's models and data sets that a lab works with, in a lock file."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mergectl import pins
from mergectl.benchmarks import _rows
from mergectl.checkpoints import open_checkpoint
from mergectl.errors import UserError
from mergectl.lab import Lab
from mergectl.pinning import hub_ids, settle
from mergectl.tasks import task_version
from tests import population as made
from tests.conftest import Cli
from tests.hub import Hub

Capture = pytest.CaptureFixture[str]
LOCK = Path("lab/revisions.yaml")
OTHER = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    found = Hub(tmp_path / "hub-cache", monkeypatch)
    yield found
    found.close()


@pytest.fixture
def first(hub: Hub, population: Path) -> dict[str, str]:
    """A base and two experts on the hub, and their commits."""
    return {name: hub.put(f"org/{name}", population / name) for name in ("base", "parity", "loop")}


def second(hub: Hub, population: Path, name: str, folder: Path) -> str:
    """A newer commit of a model, with other weights."""
    return hub.put(f"org/{name}", made.change(population / name, folder, lambda w: {n: 2 * x for n, x in w.items()}))


def pipeline(**changes: Any) -> str:
    """A pipeline file that merges two experts of the hub into their base."""
    experts = ["digits/parity=org/parity", "digits/loop=org/loop"]
    step = {"method": "average", "base": "${base}", "experts": experts, "out": "m", **changes}
    Path("two.yaml").write_text(
        json.dumps({"title": "Two", "settings": {"base": "org/base"}, "steps": [{"merge": step}]})
    )
    return "two.yaml"


def locked() -> dict[str, dict[str, str]]:
    return pins.read(LOCK)


def record() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path("lab/runs/two/m/mergectl.json").read_text())
    return found


def error(capsys: Capture) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_the_first_run_pins_every_hub_id_to_its_present_commit(cli: Cli, first: dict[str, str]) -> None:
    assert cli("run", pipeline()) == 0
    assert locked() == {"models": {f"org/{name}": commit for name, commit in first.items()}, "datasets": {}}


def test_ids_are_pinned_before_the_first_step(cli: Cli, hub: Hub, first: dict[str, str]) -> None:
    Path("lab/runs/two/m").mkdir(parents=True)
    Path("lab/runs/two/m/letter.txt").write_text("not to be replaced")
    assert cli("run", pipeline()) == 2
    assert sorted(locked()["models"]) == ["org/base", "org/loop", "org/parity"]


def test_a_later_run_stays_with_its_pins_when_the_hub_moves_on(
    cli: Cli, capsys: Capture, hub: Hub, first: dict[str, str], population: Path, tmp_path: Path
) -> None:
    assert cli("run", pipeline()) == 0
    before = Path("lab/runs/two/m/model.safetensors").read_bytes()
    second(hub, population, "parity", tmp_path / "newer")
    shutil.rmtree("lab/runs")
    shutil.rmtree(hub.cache)
    capsys.readouterr()
    assert cli("run", pipeline()) == 0
    assert Path("lab/runs/two/m/model.safetensors").read_bytes() == before
    assert "Pinned" not in capsys.readouterr().err
    assert locked()["models"]["org/parity"] == first["parity"]


def test_update_pins_moves_on_and_does_the_work_anew(
    cli: Cli, capsys: Capture, hub: Hub, first: dict[str, str], population: Path, tmp_path: Path
) -> None:
    assert cli("run", pipeline()) == 0
    newer = second(hub, population, "parity", tmp_path / "newer")
    capsys.readouterr()
    assert cli("run", pipeline(), "--update-pins") == 0
    said = capsys.readouterr().err
    assert f"Pinned the model org/parity to {newer[:7]} (was {first['parity'][:7]})." in said
    assert "already done" not in said
    assert locked()["models"] == {"org/base": first["base"], "org/loop": first["loop"], "org/parity": newer}


def test_anothers_lock_file_gives_the_same_weights_elsewhere(
    cli: Cli, hub: Hub, first: dict[str, str], population: Path, tmp_path: Path
) -> None:
    assert cli("run", pipeline()) == 0
    there = Path("lab/runs/two/m/model.safetensors").read_bytes()
    theirs = LOCK.rename("theirs.yaml")
    for name in first:
        second(hub, population, name, tmp_path / f"newer-{name}")
    shutil.rmtree("lab")
    shutil.rmtree(hub.cache)
    assert cli("run", pipeline(), "--pins", theirs) == 0
    assert Path("lab/runs/two/m/model.safetensors").read_bytes() == there
    assert LOCK.read_text() == theirs.read_text()


def test_a_lock_file_that_lacks_an_id_is_completed_by_the_hub(cli: Cli, first: dict[str, str]) -> None:
    Path("theirs.yaml").write_text(f'models:\n  org/base: "{first["base"]}"\n')
    assert cli("run", pipeline(), "--pins", "theirs.yaml") == 0
    assert sorted(locked()["models"]) == ["org/base", "org/loop", "org/parity"]


@pytest.mark.parametrize("how", ["--set", "in the file"])
def test_a_revision_that_is_named_wins_over_the_pin(
    how: str, cli: Cli, hub: Hub, first: dict[str, str], population: Path, tmp_path: Path
) -> None:
    assert cli("run", pipeline()) == 0
    newer = second(hub, population, "base", tmp_path / "newer")
    words = ["--set", f"base=org/base@{newer}"] if how == "--set" else []
    assert cli("run", pipeline(**({} if words else {"base": f"org/base@{newer}"})), *words) == 0
    assert record()["inputs"][0]["ref"] == f"org/base@{newer}"
    assert locked()["models"]["org/base"] == first["base"]


def test_a_named_revision_is_not_written_down(cli: Cli, hub: Hub, first: dict[str, str]) -> None:
    assert cli("run", pipeline(base="org/base@main")) == 0
    assert sorted(locked()["models"]) == ["org/loop", "org/parity"]


def test_record_and_card_name_the_commits(cli: Cli, first: dict[str, str]) -> None:
    assert cli("run", pipeline()) == 0
    assert [row["ref"] for row in record()["inputs"]] == [f"org/{name}@{commit}" for name, commit in first.items()]
    card = Path("lab/runs/two/m/README.md").read_text()
    assert "base_model:\n- org/base\n- org/parity\n- org/loop\n" in card
    assert all(f"`org/{name}@{commit}`" in card for name, commit in first.items())


def test_the_store_lists_the_commits_as_inputs(cli: Cli, capsys: Capture, first: dict[str, str]) -> None:
    assert cli("run", pipeline()) == 0
    capsys.readouterr()
    assert cli("--json", "report", "--sql", "select ref from inputs order by ref") == 0
    refs = [row["ref"] for row in json.loads(capsys.readouterr().out)]
    assert refs == sorted(f"org/{name}@{commit}" for name, commit in first.items())


def test_plain_verbs_use_the_labs_pins(
    cli: Cli, hub: Hub, first: dict[str, str], population: Path, tmp_path: Path
) -> None:
    assert cli("run", pipeline()) == 0
    newer = second(hub, population, "base", tmp_path / "newer")
    words = ["merge", "average", "--experts", "org/parity", "org/loop", "--base", "org/base"]
    assert cli(*words, "-o", "here") == 0
    assert cli("--store", "elsewhere/x.duckdb", *words, "-o", "there") == 0
    refs = [json.loads(Path(f"{out}/mergectl.json").read_text())["inputs"][0]["ref"] for out in ("here", "there")]
    assert refs == [f"org/base@{first['base']}", f"org/base@{newer}"]


def test_an_expert_says_the_commit_that_its_training_began_from(cli: Cli, hub: Hub, first: dict[str, str]) -> None:
    words = ["--max-steps", 1, "--limit-fit", 16, "--limit-tune", 16]
    assert cli("finetune", "digits/parity", "--base", "org/base", *words) == 0
    assert json.loads(Path("runs/parity/mergectl.json").read_text())["base"] == f"org/base@{first['base']}"
    hub.close()
    assert cli("merge", "average", "--experts", "runs/parity", "-o", "m") == 0


def test_offline_the_cached_snapshot_is_pinned(cli: Cli, hub: Hub, first: dict[str, str]) -> None:
    for name in first:
        open_checkpoint(f"org/{name}")
    hub.close()
    assert cli("run", pipeline()) == 0
    assert locked()["models"] == {f"org/{name}": commit for name, commit in first.items()}


def test_without_hub_and_cache_nothing_is_begun(cli: Cli, capsys: Capture, hub: Hub, first: dict[str, str]) -> None:
    hub.close()
    assert cli("run", pipeline()) == 2
    assert error(capsys) == (
        "Error: There is no folder 'org/base', and the hub cannot be reached to look for it; the local cache has no "
        "copy. Name a local folder."
    )
    assert not Path("lab").exists()


def test_pins_are_not_moved_without_the_hub(cli: Cli, capsys: Capture, hub: Hub, first: dict[str, str]) -> None:
    assert cli("run", pipeline()) == 0
    hub.close()
    before = LOCK.read_text()
    assert cli("run", pipeline(), "--update-pins") == 2
    assert error(capsys) == "Error: The hub cannot be reached, so the pin of org/base cannot be moved."
    assert LOCK.read_text() == before


def test_a_pinned_commit_that_is_gone_is_refused_before_the_first_step(
    cli: Cli, capsys: Capture, first: dict[str, str]
) -> None:
    LOCK.parent.mkdir()
    LOCK.write_text(f'models:\n  org/loop: "{OTHER}"\n')
    assert cli("run", pipeline()) == 2
    assert error(capsys) == (
        "Error: The hub has no commit 0123456 of org/loop any more, to which lab/revisions.yaml pins it. Move to its "
        "present one: mergectl run NAME --update-pins."
    )
    assert not Path("lab/runs").exists()


def test_a_plain_verb_refuses_a_pin_that_is_gone(cli: Cli, capsys: Capture, first: dict[str, str]) -> None:
    LOCK.parent.mkdir()
    LOCK.write_text(f'models:\n  org/base: "{OTHER}"\n')
    assert cli("merge", "average", "--experts", "org/parity", "--base", "org/base", "-o", "m") == 2
    assert error(capsys).startswith(f"Error: The hub has no commit {OTHER} of org/base any more")


def test_a_model_that_the_hub_does_not_have_is_refused(cli: Cli, capsys: Capture, first: dict[str, str]) -> None:
    assert cli("run", pipeline(base="org/nobody")) == 2
    assert error(capsys) == (
        "Error: There is no folder 'org/nobody', and the hub has no model of that name, or does not show it to you."
    )


def test_a_dry_run_shows_the_pins_and_asks_no_hub(cli: Cli, capsys: Capture, hub: Hub, first: dict[str, str]) -> None:
    LOCK.parent.mkdir()
    LOCK.write_text(f'models:\n  org/base: "{first["base"]}"\n')
    assert cli("run", pipeline(), "--dry-run") == 0
    said = capsys.readouterr().out
    assert f"model org/base: pinned to {first['base'][:7]}" in said
    assert "model org/loop: will be pinned at the first run" in said
    assert cli("run", pipeline(), "--dry-run", "--update-pins") == 0
    assert "model org/base: will move to the hub's present commit" in capsys.readouterr().out
    assert hub.asked == []


RACE = """
import json, sys
from mergectl.lab import Lab
from mergectl.pinning import settle
settle(Lab(), json.loads(sys.argv[1]), None, renew=False)
"""


def test_two_processes_at_once_pin_the_same_commits(
    hub: Hub, population: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub moves on each time it is asked: who asked again would get another commit."""
    hub.put("org/base", population / "base")
    answer = hub.answer

    def move_on(request: Any) -> None:
        answer(request)
        if "/models/org/base" in request.path:
            hub.put("org/base", population / "base")

    monkeypatch.setattr(hub, "answer", move_on)
    steps = json.dumps([{"eval": {"models": ["org/base"], "on": ["digits/parity"]}}])
    env = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_CACHE": str(hub.cache)}
    both = [subprocess.Popen([sys.executable, "-c", RACE, steps], env=env, cwd=Path.cwd()) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    commits = [commit for commit, _ in hub.repos["models/org/base"]]
    assert locked()["models"]["org/base"] == commits[0]


def test_who_pins_waits_for_another_that_does(first: dict[str, str]) -> None:
    Path("lab").mkdir()
    held = os.open("lab/.revisions.yaml.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX)
    steps = [{"eval": {"models": ["org/base"], "on": ["digits/parity"]}}]
    other = threading.Thread(target=settle, args=(Lab(), steps, None), kwargs={"renew": False})
    other.start()
    time.sleep(0.1)
    assert not LOCK.exists()
    os.close(held)
    other.join(20)
    assert locked()["models"] == {"org/base": first["base"]}


STEPS = [{"eval": {"models": ["org/base"], "on": ["glue/rte", "glue/cola", "sentences/trec", "digits/parity"]}}]
"""Tasks of two data sets of the hub, one of them on a branch, and one task that code makes."""


@pytest.fixture
def sets(hub: Hub, first: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The commits of both data sets."""
    (tmp_path / "empty").mkdir()
    glue = hub.put("nyu-mll/glue", tmp_path / "empty", "datasets")
    trec = hub.put("CogComp/trec", tmp_path / "empty", "datasets")
    hub.branches["refs/convert/parquet"] = trec
    return {"nyu-mll/glue": glue, "CogComp/trec@refs/convert/parquet": trec}


def test_data_sets_of_the_hub_are_pinned_each_once(sets: dict[str, str]) -> None:
    settle(Lab(), STEPS, None, renew=False)
    assert locked()["datasets"] == sets


def test_tasks_read_their_rows_at_the_pin(sets: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    settle(Lab(), STEPS, None, renew=False)
    asked: list[Any] = []

    def load_dataset(*_: Any, revision: str, **__: Any) -> Any:
        asked.append(revision)
        raise ConnectionError("that is enough")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for task in Lab().tasks(["glue/rte", "sentences/trec"]):
        with pytest.raises(ValueError, match="that is enough"):
            _rows.load(task, "report")
    assert asked == list(sets.values())


def test_what_a_run_depends_on_names_the_commit_of_its_rows(sets: dict[str, str]) -> None:
    before = task_version(Lab().tasks(["glue/rte"])[0])
    settle(Lab(), STEPS, None, renew=False)
    assert (before, task_version(Lab().tasks(["glue/rte"])[0])) == (1, f"1, nyu-mll/glue@{sets['nyu-mll/glue']}")


def test_rows_of_the_data_folder_need_no_pin(sets: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "data/glue/rte"
    folder.mkdir(parents=True)
    (folder / "validation.parquet").write_bytes(b"")
    lab = Lab(data=tmp_path / "data")
    assert [task.name for task in hub_ids(lab, STEPS)["datasets"]["nyu-mll/glue"]] == ["cola"]
    settle(lab, STEPS, None, renew=False)
    assert task_version(lab.tasks(["glue/rte"])[0]) == 1


def test_offline_the_cached_data_set_is_pinned(
    hub: Hub, first: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "datasets/nyu-mll___glue/rte/0.0.0" / OTHER
    copy.mkdir(parents=True)
    (copy / "glue-validation.arrow").write_bytes(b"")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    hub.close()
    settle(Lab(), [{"eval": {"models": [], "on": ["glue/rte"]}}], None, renew=False)
    assert locked()["datasets"] == {"nyu-mll/glue": OTHER}


def test_without_hub_and_cache_the_way_out_is_a_data_folder(hub: Hub, first: dict[str, str]) -> None:
    hub.close()
    with pytest.raises(UserError, match=r"the data set nyu-mll/glue \(glue/rte\), and .* --data DIR\.$"):
        settle(Lab(), [{"eval": {"models": [], "on": ["glue/rte"]}}], None, renew=False)


def test_runs_folders_and_what_steps_make_are_no_hub_ids(cli: Cli, first: dict[str, str], population: Path) -> None:
    refs = ["@made", str(population / "base"), "org/base@main", "./x", "a/b/c", "config.json", "org/base", "bert"]
    steps = [{"merge": {"base": {"model_type": "bert"}, "experts": refs}}]
    assert sorted(hub_ids(Lab(), steps)["models"]) == ["bert", "org/base"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: {org/x: main}", "org/x must be pinned to a commit, 40 digits of 0-9 and a-f, got 'main'."),
        ("models: {org/x: 1234567890123456789012345678901234567890}", "org/x must be pinned to a commit"),
        ("models: [org/x]", "'models' must be a mapping of hub ids to commits"),
        ("model: {}", "unknown key 'model'. Pins stand under models and datasets."),
        (f"models: {{a/b/c: {OTHER}}}", "'a/b/c', under models, is no hub id (org/name)."),
    ],
)
def test_a_lock_file_with_a_mistake_is_refused(text: str, said: str, cli: Cli, capsys: Capture, hub: Hub) -> None:
    Path("theirs.yaml").write_text(text)
    assert cli("run", pipeline(), "--pins", "theirs.yaml") == 2
    assert f"theirs.yaml: {said}" in error(capsys)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["two.yaml", "--pins", "nowhere.yaml"], "There is no file nowhere.yaml of pins."),
        (["two.yaml", "--pins", "x.yaml", "--update-pins"], "Leave one of them out."),
        (["--list", "--update-pins"], "are for running a pipeline with models of the hub"),
        (["digits", "--smoke", "--pins", "x.yaml"], "are for running a pipeline with models of the hub"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    words: list[str], said: str, cli: Cli, capsys: Capture, hub: Hub
) -> None:
    pipeline()
    assert cli("run", *words) == 2
    assert said in error(capsys)


def test_an_expert_inside_of_a_repository_is_named_by_commit_and_place(
    cli: Cli, hub: Hub, first: dict[str, str], population: Path, tmp_path: Path
) -> None:
    from tests.hub import nested

    commit = hub.put("someone/ckpts", nested(population, tmp_path / "ckpts"))
    assert cli("run", pipeline(experts="someone/ckpts", layout="merge-lm")) == 0
    card = Path("lab/runs/two/m/README.md").read_text()
    assert f"`someone/ckpts@{commit}: rte/vit_lr1e-05`" in card
    assert "- someone/ckpts\n" in card
