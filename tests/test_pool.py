"""Threads that share the work of a merge: order, errors, work within work, and memory that serves again."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergectl.methods._task_vectors import TaskVectors
from mergectl.pool import Pool


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    given = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(given)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 400), st.booleans())
def test_results_come_in_the_order_of_the_work(count: int, lazy: bool) -> None:
    with Pool() as pool:
        items = (i for i in range(count)) if lazy else range(count)
        assert list(pool.map(lambda i: i * i, items)) == [i * i for i in range(count)]


def test_two_threads_work_and_torch_has_one_each() -> None:
    together = threading.Barrier(2, timeout=30)
    with Pool() as pool:
        assert list(pool.map(lambda i: (together.wait() >= 0, torch.get_num_threads()), range(2))) == [(True, 1)] * 2
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("place", [0, 7, 99])
def test_an_error_ends_the_work(place: int) -> None:
    def work(i: int) -> int:
        if i == place:
            raise ValueError(f"item {i}")
        return i

    with Pool() as pool, pytest.raises(ValueError, match=f"item {place}"):
        list(pool.map(work, range(100)))


def test_work_within_work_is_done_by_its_thread_and_has_memory_of_its_own() -> None:
    def room(use: str) -> int:
        return pool.room(use, (3,), torch.float32, "cpu").data_ptr()

    def outer(_: int) -> tuple[int, int, set[int]]:
        thread, own = threading.get_ident(), room("deltas")
        within = set(pool.map(lambda _: (threading.get_ident(), room("deltas")), range(9)))
        assert {worker for worker, _ in within} == {thread} and room("deltas") == own
        return thread, own, {place for _, place in within}

    with Pool() as pool:
        found = list(pool.map(outer, range(40)))
    for thread in {thread for thread, _, _ in found}:
        mine = [(own, within) for worker, own, within in found if worker == thread]
        assert all(one == mine[0] for one in mine)  # the same memory again and again
        assert len(mine[0][1]) == 1 and mine[0][0] not in mine[0][1]


def test_weights_are_shared_out_whole_but_large_ones_in_blocks() -> None:
    small = {f"w{i}": 10 for i in range(40)}
    sizes = {**dict(list(small.items())[:20]), "large": 1000, **small}
    shapes = {f"{name}{block}": (size // 2,) for name, size in sizes.items() for block in "ab"}
    wholes = {f"{name}{block}": (name, size) for name, size in sizes.items() for block in "ab"}
    used: dict[str, set[int]] = {}

    def double(name: str, x: torch.Tensor) -> torch.Tensor:
        used.setdefault(wholes[name][0], set()).add(threading.get_ident())
        return 2 * x

    with Pool() as pool:
        vectors = TaskVectors(["t"], shapes, lambda name: torch.ones(1, *shapes[name]), wholes=wholes, spread=pool.map)
        found = list(vectors.per_weight(lambda part: part.each(double)))
    assert [name for name, _ in found] == list(shapes) and all(bool((x == 2).all()) for _, x in found)
    assert all(len(threads) == 1 for name, threads in used.items() if name != "large")
    assert threading.get_ident() not in set().union(*used.values())


def test_torch_gets_its_threads_back_from_pools_that_overlap() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        first, second = Pool(), Pool()
        first.__enter__()
        second.__enter__()
        third = Pool()
        assert torch.get_num_threads() == 1
        first.__exit__()
        assert torch.get_num_threads() == 1
        second.__exit__()
        assert torch.get_num_threads() == 3
        assert third._threads == 3
    finally:
        torch.set_num_threads(before)
