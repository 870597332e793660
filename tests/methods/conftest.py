"""Keep the tests of methods away from the user's own plugins."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test a lab folder of its own."""
    folder = tmp_path / "lab"
    monkeypatch.setenv("MERGECTL_STORE", str(folder / "mergectl.duckdb"))
    monkeypatch.delenv("MERGECTL_PLUGINS", raising=False)
    return folder
