"""What the lab remembers of models on disk: computed once, whole, keyed by content, and within its limit."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from mergectl.errors import UserError
from mergectl.factors import LIMIT, Factors, limit
from mergectl.lab import Lab
from mergectl.plan import Recipe
from mergectl.supplies import supplies_of

Weights = dict[str, torch.Tensor]


def models(change: float = 0.0) -> tuple[Weights, dict[str, Weights]]:
    base = {"w": torch.arange(6.0).reshape(2, 3), "v": torch.ones(2)}
    experts = {task: {name: x + number for name, x in base.items()} for number, task in enumerate(("a", "b"), 1)}
    experts["b"]["w"] = experts["b"]["w"] + change
    return base, experts


class Making:
    """Makes a tensor, and counts how often."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.tensors, self.count = tensors, 0

    def __call__(self) -> tuple[torch.Tensor, ...]:
        self.count += 1
        return self.tensors


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def test_what_was_made_is_read_again_by_anyone_with_the_same_weights(tmp_path: Path) -> None:
    make = Making(torch.randn(3, 2), torch.ones(2, dtype=torch.float64), torch.zeros(1, dtype=torch.bfloat16))
    for _ in range(2):
        factors = Factors(tmp_path, *models())
        for _ in range(2):
            found = factors("svd", "a", "w", make)
            assert [x.dtype for x in found] == [x.dtype for x in make.tensors]
            assert all(torch.equal(x, y) for x, y in zip(found, make.tensors, strict=True))
    assert make.count == 1


def test_other_words_weights_and_tasks_are_other_things(tmp_path: Path) -> None:
    factors, make = Factors(tmp_path, *models()), Making(torch.zeros(1))
    asked = [("svd", "a", "w"), ("svd", "a", "v"), ("svd", "b", "w"), ("svd", None, "w"), ("svd of the sum", None, "w")]
    for what in asked:
        factors(*what, make)
    assert make.count == len(files(tmp_path)) == len(asked)


def test_a_task_depends_on_its_own_weights_alone_and_none_on_those_of_all(tmp_path: Path) -> None:
    make = Making(torch.zeros(1))
    for change, expected in ((0.0, 2), (0.5, 3)):  # of a changed b, only what depends on b is made anew
        factors = Factors(tmp_path, *models(change))
        factors("svd", "a", "w", make)
        factors("svd of the sum", None, "w", make)
        assert make.count == expected
    base, experts = models()
    base["w"] = base["w"] + 1
    Factors(tmp_path, base, experts)("svd", "a", "w", make)
    assert make.count == 4
    only = {"a": models()[1]["a"]}
    Factors(tmp_path, models()[0], only)("svd of the sum", None, "w", make)
    assert make.count == 5


def test_the_name_of_a_task_does_not_decide_what_its_own_weights_give(tmp_path: Path) -> None:
    make, (base, experts) = Making(torch.zeros(1)), models()
    Factors(tmp_path, base, experts)("svd", "a", "w", make)
    Factors(tmp_path, base, {"other": experts["a"]})("svd", "other", "w", make)
    assert make.count == 1


def test_what_is_read_is_mapped_and_changing_it_does_not_reach_the_disk(tmp_path: Path) -> None:
    make = Making(torch.ones(1000))
    Factors(tmp_path, *models())("svd", "a", "w", make)
    (found,) = Factors(tmp_path, *models())("svd", "a", "w", make)
    (path,) = files(tmp_path)
    assert str(path) in Path("/proc/self/maps").read_text()
    found.zero_()
    assert torch.equal(Factors(tmp_path, *models())("svd", "a", "w", make)[0], torch.ones(1000))


@pytest.mark.parametrize("spoil", [lambda data: data[:-3], lambda data: b"", lambda data: b"\xff" * len(data)])
def test_a_file_that_is_not_whole_is_made_anew(spoil: Callable[[bytes], bytes], tmp_path: Path) -> None:
    make = Making(torch.ones(10))
    Factors(tmp_path, *models())("svd", "a", "w", make)
    (path,) = files(tmp_path)
    path.write_bytes(spoil(path.read_bytes()))
    for _ in range(2):
        (found,) = Factors(tmp_path, *models())("svd", "a", "w", make)
        assert torch.equal(found, torch.ones(10))
    assert make.count == 2


def test_a_deleted_folder_costs_time_and_nothing_else(tmp_path: Path) -> None:
    factors, make = Factors(tmp_path / "cache", *models()), Making(torch.ones(10))
    factors("svd", "a", "w", make)
    for path in files(tmp_path):
        path.unlink()
    assert torch.equal(factors("svd", "a", "w", make)[0], torch.ones(10))
    assert make.count == 2


def test_a_folder_that_cannot_be_written_costs_time_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("no folder")
    make = Making(torch.ones(10))
    for count in (1, 2):
        (found,) = Factors(tmp_path / "cache", *models())("svd", "a", "w", make)
        assert torch.equal(found, torch.ones(10)) and make.count == count


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, "0.0000150")  # 15,000 bytes: three of 4,000 and their headers
    factors, make = Factors(tmp_path, *models()), Making(torch.ones(1000))
    for number, what in enumerate(("first", "second", "third")):
        factors(what, "a", "w", make)
        (new,) = [path for path in files(tmp_path) if path.stat().st_mtime > 1e9]
        os.utime(new, (1000 + number, 1000 + number))
    factors("first", "a", "w", make)  # used again
    Factors(tmp_path, *models())("fourth", "a", "w", make)
    assert make.count == 4 and len(files(tmp_path)) == 3
    for what in ("first", "third", "fourth"):
        factors(what, "a", "w", make)
    assert make.count == 4
    factors("second", "a", "w", make)
    assert make.count == 5


def test_what_a_killed_process_left_goes_when_it_is_old(tmp_path: Path) -> None:
    (tmp_path / "ab").mkdir()
    old, new = tmp_path / "ab" / ".old.safetensors.7.0", tmp_path / "ab" / ".new.safetensors.8.0"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1000, 1000))
    Factors(tmp_path, *models())("svd", "a", "w", Making(torch.ones(10)))
    assert new.exists() and not old.exists()


def test_nothing_is_kept_where_nothing_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, "0")
    Factors(tmp_path / "cache", *models())("svd", "a", "w", Making(torch.ones(10)))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("text", ["many", "-1", "inf", "nan"])
def test_a_limit_that_is_no_size_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, text)
    with pytest.raises(UserError, match="MERGECTL_FACTORS_GB must be a number of gigabytes"):
        limit()


def ask(folder: str, wait: Any) -> None:
    wait.wait()
    for number in range(20):
        (found,) = Factors(Path(folder), *models())(f"svd {number}", "a", "w", lambda: (torch.ones(300, 30),))
        assert torch.equal(found, torch.ones(300, 30))


def test_several_processes_and_threads_may_read_and_write_at_once(tmp_path: Path) -> None:
    context = get_context("spawn")
    barrier = context.Barrier(2)
    others = [context.Process(target=ask, args=(str(tmp_path), barrier))]
    for process in others:
        process.start()
    barrier.wait()
    threads = [threading.Thread(target=ask, args=(str(tmp_path), threading.Barrier(1))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for process in others:
        process.join()
    assert [process.exitcode for process in others] == [0]
    assert len(files(tmp_path)) == 20
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.name.startswith(".")] == []


def test_two_merges_of_the_lab_share_decompositions(
    cli: Callable[..., int], population: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, real = list[Any](), torch.linalg.svd

    def counted(x: torch.Tensor, **how: Any) -> Any:
        calls.append(x.shape)
        return real(x, **how)

    monkeypatch.setattr(torch.linalg, "svd", counted)
    experts = [population / task for task in ("parity", "loop", "digit")]
    models = ["--base", population / "base", "--experts", *experts]
    store = ["--store", tmp_path / "lab" / "x.duckdb"]
    for number, words in enumerate((["tsv_m"], ["pre_cart"], ["pre_cart", "--rank-ratio", "0.5"])):
        assert cli("merge", *words, *models, "-o", tmp_path / str(number), *store) == 0
    linear = len(json.loads(next((tmp_path / "lab" / "cache" / "linears").iterdir()).read_text()))
    assert len(calls) == 3 * linear  # of three experts, once for three merges
    assert len(files(tmp_path / "lab" / "cache" / "factors")) == 3 * linear


def test_every_trial_of_a_rank_search_uses_the_same_decompositions(
    cli: Callable[..., int], population: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, real = list[Any](), torch.linalg.svd

    def counted(x: torch.Tensor, **how: Any) -> Any:
        calls.append(x.shape)
        return real(x, **how)

    monkeypatch.setattr(torch.linalg, "svd", counted)
    experts = [population / task for task in ("parity", "loop")]
    words = [
        "search",
        "cart",
        "--base",
        population / "base",
        "--experts",
        *experts,
        "--sampler",
        "random",
        "--trials",
        4,
    ]
    assert cli(*words, "--limit", 20, "-o", tmp_path / "best", "--store", tmp_path / "lab" / "x.duckdb") == 0
    assert len(calls) == len(files(tmp_path / "lab" / "cache" / "factors")) > 0


def test_the_lab_remembers_below_its_own_folder(population: Path, tmp_path: Path) -> None:
    from mergectl.families import open_family

    family = open_family(str(population / "base"), [(None, str(population / "parity"))])
    lab = Lab(store_path=tmp_path / "lab" / "x.duckdb")
    remember = supplies_of(lab, family, Recipe("tsv_m"))["remember"]
    assert remember.folder == tmp_path / "lab" / "cache" / "factors"
