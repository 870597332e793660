"""Where the code of a run came from: the user's own plugins, and the state of the Git checkouts that hold code."""

from __future__ import annotations

import functools
import hashlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from mergectl import plugins


def code_facts() -> dict[str, str]:
    """The commit of a checkout that the program runs from, and each plugin's digest and commit, for the store."""
    facts = {f"plugin.{name}": text for name, text in _plugins()}
    own = git_state(Path(__file__).absolute().parent)
    return facts | ({"commit.mergectl": own} if own else {})


def _plugins() -> Iterator[tuple[str, str]]:
    """The user's own files and what installed distributions offer: name -> what it is."""
    for kind in ("methods", "benchmarks"):
        for plugin in plugins.foreign(kind):
            if plugin.path is None:
                yield f"{kind}/{plugin.name}", plugin.where
                continue
            digest = hashlib.sha256(plugin.path.read_bytes()).hexdigest()[:16]
            state = git_state(plugin.path)
            yield (
                f"{kind}/{plugin.name}",
                f"sha256 {digest}" + (f", commit {state}" if state else ", in no Git checkout"),
            )


@functools.cache
def git_state(path: Path) -> str | None:
    """The commit that a file or folder is at, with "changed" where it differs from it; None outside of a checkout."""
    folder = path if path.is_dir() else path.parent
    if not any((parent / ".git").exists() for parent in (folder, *folder.parents)):
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git(folder, "status", "--porcelain", "--ignored", "--", str(path))
    return commit[:12] + (" (changed)" if changed else "")


def _git(folder: Path, *words: str) -> str | None:
    """What Git answers, or None where it cannot."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
