"""`eval --conflict`: opposite signs between experts, whole and by layer, and who changed what; all stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergectl.conflict import Counts
from tests.conftest import Cli
from tests.population import change, weights

Capture = pytest.CaptureFixture[str]


def told(cli: Cli, capsys: Capture, *words: Any) -> dict[str, Any]:
    capsys.readouterr()
    assert cli("--json", "eval", *words) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def pair(population: Path) -> list[Any]:
    return [population / "base", "--conflict", "--experts", population / "parity", population / "loop"]


def whole(found: dict[str, Any]) -> dict[tuple[str, str | None], float]:
    return {(row["name"], row["of"]): row["share"] for row in found["whole"]}


def test_counts_by_hand() -> None:
    counts = Counts()
    counts.add(["a", "b", "c"], torch.tensor([[1, 1, 0, 1], [-1, 1, 0, 0], [0, -1, 0, 0]]))
    found = {(name, of): share for name, of, share in counts.shares()}
    assert found == {
        ("sign_conflict", None): 0.5,
        ("sign_conflict", "a|b"): 0.25, ("sign_conflict", "a|c"): 0.25, ("sign_conflict", "b|c"): 0.25,
        ("changed_share", "a"): 0.75, ("changed_share", "b"): 0.5, ("changed_share", "c"): 0.25,
        ("changed_by_none", None): 0.25, ("changed_by_one", None): 0.25, ("changed_by_several", None): 0.5,
    }  # fmt: skip


@given(st.integers(2, 5), st.integers(1, 40), st.integers(0, 1000))
def test_shares_keep_their_laws(tasks: int, size: int, seed: int) -> None:
    signs = torch.randint(-1, 2, (tasks, size), generator=torch.Generator().manual_seed(seed))
    counts, turned = Counts(), Counts()
    counts.add([str(i) for i in range(tasks)], signs)
    turned.add([str(i) for i in range(tasks)], -signs)
    assert counts == turned
    assert sum(counts.changed_by.values()) == size
    assert max(counts.opposed.values()) <= counts.any_opposed <= counts.changed_by["several"]


def test_conflict_is_that_of_the_task_vectors(cli: Cli, capsys: Capture, population: Path) -> None:
    found = whole(told(cli, capsys, *pair(population)))
    base, one, two = (weights(population / name) for name in ("base", "parity", "loop"))
    deltas = [torch.cat([(m[f"vit.{n}"] - w).flatten() for n, w in base.items()]) for m in (one, two)]
    assert found["sign_conflict", "parity|loop"] == pytest.approx(float((deltas[0] * deltas[1] < 0).float().mean()))
    assert 0.4 < found["sign_conflict", None] < 0.6


def test_a_merged_model_names_its_experts(cli: Cli, capsys: Capture, population: Path) -> None:
    experts = [population / "parity", population / "loop"]
    assert cli("merge", "average", "--base", population / "base", "--experts", *experts, "-o", "m") == 0
    given = whole(told(cli, capsys, population / "base", "--conflict", "--experts", *experts))
    assert whole(told(cli, capsys, "m", "--conflict")) == given


def test_the_parts_make_up_the_whole_and_can_be_asked_for(cli: Cli, capsys: Capture, population: Path) -> None:
    found = told(cli, capsys, *pair(population))
    assert [(row["stack"], row["layer"]) for row in found["layers"]] == [
        ("encoder.layer", 0), ("encoder.layer", 1), ("other", None),
    ]  # fmt: skip
    question = (
        "select step, value from metrics where name = 'sign_conflict/encoder.layer' and task is null order by step"
    )
    assert cli("--json", "report", "--sql", question) == 0
    stored = [row["value"] for row in json.loads(capsys.readouterr().out)]
    assert stored == [row["sign_conflict"] for row in found["layers"][:2]]


def test_experts_that_changed_disjoint_elements_have_no_conflict(
    cli: Cli, capsys: Capture, population: Path, tmp_path: Path
) -> None:
    base = weights(population / "base")

    def apart(side: int) -> Any:
        def edit(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            for name, start in base.items():
                mine = torch.arange(start.numel()).reshape(start.shape) % 2 == side
                found[f"vit.{name}"] = torch.where(mine, found[f"vit.{name}"], start)
            return found

        return edit

    folders = [change(population / name, tmp_path / name, apart(i)) for i, name in enumerate(("parity", "loop"))]
    found = whole(told(cli, capsys, population / "base", "--conflict", "--experts", *folders))
    assert found["sign_conflict", None] == found["changed_by_several", None] == 0
    assert found["changed_share", "parity"] == pytest.approx(0.5, abs=0.01)


WRONG: list[tuple[list[str], str]] = [
    (["--conflict"], "does not say from which base and experts it was merged"),
    (["--conflict", "--on", "digits/loop"], "--conflict measures weights, not answers"),
    (["--conflict", "--limit", "8"], "not answers. Leave out --limit."),
    (["--conflict", "--flops"], "not answers. Leave out --flops."),
    (["--conflict", "--answer-metric", "greedy_prob"], "not answers. Leave out --answer-metric."),
    (["--experts", "x"], "--experts names models whose conflict is measured. Add --conflict"),
]


@pytest.mark.parametrize(
    ("words", "sentence"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else None
)
def test_what_cannot_be_measured(cli: Cli, capsys: Capture, population: Path, words: list[str], sentence: str) -> None:
    assert cli("eval", population / "base", *words) == 2
    assert sentence in capsys.readouterr().err


def test_one_expert_alone_is_in_nobodys_way(cli: Cli, capsys: Capture, population: Path) -> None:
    assert cli("eval", population / "base", "--conflict", "--experts", population / "loop") == 2
    assert "A conflict takes at least two experts" in capsys.readouterr().err


def test_it_is_printed_for_people(cli: Cli, capsys: Capture, population: Path) -> None:
    assert cli("eval", *pair(population)) == 0
    assert "parity|loop" in capsys.readouterr().out


def test_the_leaderboard_knows_nothing_of_it(cli: Cli, capsys: Capture, population: Path) -> None:
    told(cli, capsys, *pair(population))
    assert cli("--json", "report") == 0
    assert json.loads(capsys.readouterr().out) == []
