"""Threads that share the work of a merge, block by block, while torch itself uses one thread.

Reading, computing and writing a block happen in one thread, so that its numbers stay near that processor; while one
thread waits for the disk the others compute. Results come in the order of the work, whatever finishes first.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

KEPT = 1 << 22  # elements up to which a thread keeps memory for its next piece of work
ROOMS = 8  # of such memories that a thread keeps at most
AHEAD = 2  # shares of the work per thread that wait or are done before they are asked for
SHARES = 16  # per thread, at least: the last one ends soon after the others
TOGETHER = 8  # pieces of work in a share at most: handing one over costs as much as a short piece
_torch = threading.Lock()  # how many threads torch has is the process's own
_pools = 0  # that keep torch to one thread
_given = 1  # threads that torch had before the first of them
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # numbers of GNU malloc.h


class Pool:
    """As many threads as torch was given, with a stream of their own on a CUDA device; torch gets them back at the end.

    A device has two threads at least: while one waits for copies, the other's block is computed.
    """

    def __init__(self, device: str = "cpu") -> None:
        import torch

        self._device = device if device.startswith("cuda") else None
        with _torch:
            given = _given if _pools else torch.get_num_threads()
        self._threads = max(2, given) if self._device else given
        self._worker = threading.local()
        self._executor = ThreadPoolExecutor(self._threads) if self._threads > 1 else None

    def __enter__(self) -> Pool:
        import torch

        global _pools, _given
        with _torch:
            if not _pools:
                _given = torch.get_num_threads()
                torch.set_num_threads(1)
            _pools += 1
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for what runs, forget what waits."""
        import torch

        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
        global _pools
        with _torch:
            _pools -= 1
            if not _pools:
                torch.set_num_threads(_given)

    def map(self, work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """Do what the builtin `map` does, several items at a time; work that asks for more work does it itself."""
        if self._executor is None or getattr(self._worker, "depth", 0) > 0:
            for item in items:
                yield self._do(work, item)
            return
        waiting: deque[Future[list[Any]]] = deque()
        size = min(max(len(items) // (SHARES * self._threads), 1), TOGETHER) if isinstance(items, Sized) else 1
        left = iter(items)
        try:
            while some := list(itertools.islice(left, size)):
                waiting.append(self._executor.submit(self._do_all, work, some))
                if len(waiting) > AHEAD * self._threads:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def _do_all(self, work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        return [self._do(work, item) for item in items]

    def _do(self, work: Callable[[Any], Any], item: Any) -> Any:
        self._worker.depth = getattr(self._worker, "depth", 0) + 1
        try:
            return self._on_device(work, item)
        finally:
            self._worker.depth -= 1

    def room(self, use: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
        """Memory to be filled: in a piece of work what the thread last had for this use and shape.

        Work that a piece of work asks for has memory of its own.
        """
        import torch

        depth = getattr(self._worker, "depth", 0)
        if depth == 0 or math.prod(shape) > KEPT:
            return torch.empty(shape, dtype=dtype, device=device)
        rooms: dict[Any, torch.Tensor] = self._worker.__dict__.setdefault("rooms", {})
        key = (depth, use, shape, dtype)
        if key not in rooms:
            if len(rooms) == ROOMS:
                rooms.clear()
            rooms[key] = torch.empty(shape, dtype=dtype, device=device)
        return rooms[key]

    def _on_device(self, work: Callable[[Any], Any], item: Any) -> Any:
        if self._device is None:
            return work(item)
        import torch

        if not hasattr(self._worker, "stream"):
            self._worker.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._worker.stream):
            return work(item)


def keep_freed_memory() -> None:
    """Let the C library keep what is freed: blocks come and go, and fresh pages cost more than filling them.

    Only for a process that does nothing else; without GNU's allocator nothing happens.
    """
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, 1 << 25)
        mallopt(_TRIM_THRESHOLD, 1 << 28)
