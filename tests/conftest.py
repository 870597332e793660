"""Every test has its own lab, one thread, and no network."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis
import pytest
import torch

# A busy machine is no failure: examples are limited in number, not in time.
hypothesis.settings.register_profile(
    "ours", deadline=None, max_examples=50, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("ours")

torch.set_num_threads(1)

Cli = Callable[..., int]


def pytest_collection_finish() -> None:
    """Hide all tests and libraries from garbage collection: every training asks for a whole one."""
    gc.collect()
    gc.freeze()


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Do the same with what the tests of a file have loaded."""
    if nextitem is not None and nextitem.path != item.path:
        pytest_collection_finish()


def pytest_unconfigure() -> None:
    """Let libraries that count their objects at the end see them go."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def own_lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a fresh folder, with no settings from outside."""
    for name in ("MERGECTL_STORE", "MERGECTL_DATA", "MERGECTL_TASKS", "MERGECTL_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.parent / f"{tmp_path.name}-cache"))
    monkeypatch.setattr(os, "fsync", os.fstat)  # a lab of a test need not outlive a power cut
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def population(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three experts that no test may change."""
    from tests import population

    return population.make(tmp_path_factory.mktemp("population"))


@pytest.fixture
def cli() -> Cli:
    """Run the program as a user types it; returns the exit code."""
    from mergectl.cli import main

    return lambda *words: main([str(word) for word in words])
