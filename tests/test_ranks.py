"""Several processes at one training, and several trainings at one folder: who writes, who waits, who is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mergectl import ranks
from mergectl.checkpoints import open_checkpoint
from mergectl.claims import claimed
from mergectl.errors import UserError
from mergectl.lab import Lab
from tests.conftest import Cli
from tests.test_medusa import backbone

Capture = pytest.CaptureFixture[str]
KINDS = "select kind, status, count(*) as n from runs group by all order by kind"


def rows(cli: Cli, capsys: Capture, question: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert cli("--json", "report", "--sql", question) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        ({"RANK": "0", "WORLD_SIZE": "2"}, True),
        ({"RANK": "1", "WORLD_SIZE": "2"}, False),
        ({"RANK": "3"}, True),  # of somebody else's launcher
    ],
)
def test_the_first_process_leads(variables: dict[str, str], first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert ranks.leads() is first


def test_the_runs_of_other_processes_are_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lab = Lab(store_path=tmp_path / "lab" / "mergectl.duckdb")
    with lab.start("finetune", {"a": 1}):
        pass
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with Lab(store_path=lab.store_path).start("finetune", {"a": 1}) as run:
        run.metric("score", 1.0)
    assert lab.store.query("select count(*) from runs").rows == [(1,)]


def torchrun(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command of mergectl's in two processes that train together."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "mergectl"]
    free = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    return subprocess.run([*start, *words], cwd=folder, env=free, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_two_processes_train_masked_experts_as_one_command(
    cli: Cli, capsys: Capture, population: Path, tmp_path: Path
) -> None:
    words = ["--device", "cpu", "finetune", "digits/parity", "digits/loop", "--base", str(population / "base")]
    words += ["--for", "medusa", "--max-steps", "2", "--limit-fit", "32", "--limit-tune", "8", "--lr", "1e-3"]
    found = torchrun(tmp_path, *words, "--batch-size", "4")
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("Experts") == 1  # one table, of one process
    assert rows(cli, capsys, KINDS) == [
        {"kind": "finetune", "status": "finished", "n": 4},
        {"kind": "masks", "status": "finished", "n": 1},
    ]
    base, one, two = (backbone(folder) for folder in (population / "base", Path("runs/parity"), Path("runs/loop")))
    changed = [{name: expert[name] != base[name] for name in base} for expert in (one, two)]
    assert all(any(bool(mask.any()) for mask in own.values()) for own in changed)
    assert not any(bool((changed[0][name] & changed[1][name]).any()) for name in base)


@pytest.mark.slow
def test_two_processes_with_half_the_rows_each_train_what_one_does(cli: Cli, population: Path, tmp_path: Path) -> None:
    words = ["--device", "cpu", "finetune", "digits/parity", "--base", str(population / "base"), "--max-steps", "3"]
    words += ["--limit-fit", "64", "--limit-tune", "8", "--lr", "1e-3", "--order", "sequential"]
    assert torchrun(tmp_path, *words, "--batch-size", "8", "-o", "two").returncode == 0
    assert cli(*words, "--batch-size", "16", "-o", "one") == 0
    one, two = (open_checkpoint(f"{name}/parity") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-4, rtol=1e-3)


def test_a_folder_that_somebody_is_making_is_refused_in_one_sentence(
    cli: Cli, capsys: Capture, population: Path
) -> None:
    words = ["finetune", "digits/parity", "--base", str(population / "base"), "--max-steps", "1", "--limit-fit", "8"]
    with claimed(Path("runs/parity"), "fine-tuning into"):
        assert cli(*words, "--limit-tune", "8") == 2
        told = "Another command is fine-tuning into runs/parity just now. Wait for it, or choose another -o."
        assert told in capsys.readouterr().err.replace("\n", " ")
    assert not Path("runs").exists()
    assert cli(*words, "--limit-tune", "8", "--quiet") == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["parity"]


def test_a_claim_ends_with_its_work_or_its_process(tmp_path: Path) -> None:
    for _ in range(2):
        with claimed(tmp_path / "new" / "model", "making"):
            again = claimed(tmp_path / "new" / "model", "making")
            with pytest.raises(UserError, match="Another command is making"), again:
                pass
    assert list(tmp_path.iterdir()) == []
    kill = "import os, sys; from mergectl.claims import claimed; from pathlib import Path\n"
    kill += "with claimed(Path(sys.argv[1]), 'making'): os._exit(0)"
    subprocess.run([sys.executable, "-c", kill, str(tmp_path / "model")], check=True, timeout=60)
    with claimed(tmp_path / "model", "making"):
        pass
