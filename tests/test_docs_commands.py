"""Every command of the docs is run with tiny models in the places of the real ones, or says what it needs."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import docs_lab
from tests.conftest import Cli
from tests.docs_lab import KINDS, Command

Made = Callable[[str], Path]
Capture = pytest.CaptureFixture[str]
ALL = docs_lab.commands()
RUN = sorted({(command.kind, command.line) for command in ALL if command.needs is None})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The prepared lab of a family of models, made when it is first asked for."""
    folders: dict[str, Path] = {}

    def lab(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind)
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folders[kind])
                patch.setenv("MERGECTL_DATA", str(folders[kind] / "data"))
                docs_lab.make(folders[kind], KINDS[kind])
        return folders[kind]

    return lab


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "line"), RUN, ids=[f"{kind}-{line[9:60]}" for kind, line in RUN])
def test_a_command_of_the_docs_works(
    kind: str, line: str, made: Made, cli: Cli, own_lab: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    source = made(kind)
    here = own_lab / "here"
    shutil.copytree(source, here, ignore=shutil.ignore_patterns("data"))
    monkeypatch.setenv("MERGECTL_DATA", str(source / "data"))
    monkeypatch.chdir(here)
    docs_lab.prepare(line, kind)
    words = docs_lab.words_of(_with_runs(line, cli, capsys), kind)
    capsys.readouterr()
    assert cli(*words) == 0, capsys.readouterr().err


def _with_runs(line: str, cli: Cli, capsys: Capture) -> str:
    """Put ids of runs in the lab where the docs have some."""
    if not re.search(r"\bRUN\b|\b[0-9a-f]{8}\b", line):
        return line
    capsys.readouterr()
    cli("report", "--csv", "--sql", "SELECT run_id FROM runs WHERE kind IN ('merge', 'eval') ORDER BY started_at")
    ids = iter(capsys.readouterr().out.split()[1:])
    return re.sub(r"\bRUN\b|\b[0-9a-f]{8}\b", lambda _: next(ids), line)


def test_most_commands_are_run_and_the_others_say_what_they_need() -> None:
    marked = [command for command in ALL if command.needs]
    assert len(RUN) > 3 * len({command.line for command in marked if command.page != "papers.md"})
    assert {command.page for command in ALL} >= {
        "README.md",
        "merge.md",
        "eval.md",
        "search.md",
        "finetune.md",
        "report.md",
    }


def test_a_mark_beside_a_command_or_in_a_comment_before_its_table_keeps_it_from_being_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    page = """
`mergectl report --md` prints. `mergectl merge METHOD -o m` is a form.

```
mergectl eval a   # needs a GPU
mergectl eval b --on \\
  c               # scores
```

<!-- needs the hub -->
| `mergectl run x` |
"""
    monkeypatch.setattr(docs_lab, "PAGES", {"p.md": page})
    assert docs_lab.commands() == [
        Command("p.md", "mergectl report --md", None),
        Command("p.md", "mergectl eval a", "needs a GPU"),
        Command("p.md", "mergectl eval b --on c", None),
        Command("p.md", "mergectl run x", "needs the hub"),
    ]
