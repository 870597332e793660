"""A store of its own for every test, and a way to run code in other processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import mergectl.store
from mergectl.store import Store, open_store

ROOT = Path(mergectl.store.__file__).absolute().parents[2]
Launch = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "lab" / "mergectl.duckdb")


@pytest.fixture
def launch(store: Store) -> Iterator[Launch]:
    """Start Python code in another process; it finds the store's path in sys.argv[1], more arguments after it."""
    started: list[subprocess.Popen[str]] = []

    def start(code: str, *arguments: object) -> subprocess.Popen[str]:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        words = [sys.executable, "-c", code, str(store.path), *map(str, arguments)]
        process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout
        process.stdout.close()
