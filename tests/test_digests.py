"""Remembered digests are those of the file as it is."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import blake3 as library
import pytest

from mergectl import digests


def test_a_large_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "big"
    path.write_bytes(os.urandom(digests.LARGE))
    first = digests.blake3(path)
    assert first == library.blake3(path.read_bytes()).digest()
    monkeypatch.setattr(digests, "_read", lambda *_: b"read again")
    assert digests.blake3(path) == first


@pytest.mark.parametrize("keep_time", [True, False])
def test_a_changed_file_is_read_again(tmp_path: Path, keep_time: bool) -> None:
    path = tmp_path / "big"
    path.write_bytes(b"a" * digests.LARGE)
    before, facts = digests.blake3(path), path.stat()
    path.write_bytes(b"b" * digests.LARGE)
    if keep_time:
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert digests.blake3(path) != before


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = tmp_path / "big"
    path.write_bytes(b"a" * digests.LARGE)
    assert digests.blake3(path) == library.blake3(path.read_bytes()).digest()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("size", [100, digests.LARGE])
def test_a_forked_process_reads_files_after_its_parent_did(tmp_path: Path, size: int) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for path in (first, second):
        path.write_bytes(os.urandom(size))
    digests.blake3(first)
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # ends a child that waits for ever
        os._exit(0 if len(digests.blake3(second)) == 32 else 1)
    assert os.waitpid(child, 0)[1] == 0
