"""What README and docs say is true: the methods table is the code's, commands parse, examples run."""

from __future__ import annotations

import filecmp
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from mergectl import settings
from tests import tiny_models as tiny
from tests.conftest import Cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    path.name: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
BEGIN, END = "<!-- methods: checked by tests/test_docs.py -->\n", "<!-- end of methods -->"


def methods_table() -> str:
    """The table that README must hold."""
    lines = ["| method | what it does | settings | paper |", "| --- | --- | --- | --- |"]
    for name in [*settings.names(), *settings.refinements()]:
        info = settings.describe(name)
        own = ", ".join(f"`{key}`" for key in info.settings)
        kind = "`--refine` " if info.kind == "refinement" else ""
        lines.append(f"| {kind}`{name}` | {info.summary} | {own} | {info.paper} |")
    return "\n".join(lines) + "\n"


def commands() -> list[str]:
    """Every command line of the docs, continued lines joined, comments dropped."""
    found = []
    for text in PAGES.values():
        for block in re.findall(r"^```\n(.*?)^```", text, flags=re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("mergectl ") and "RUN" not in line:
                    found.append(line.split("  #")[0].strip())
    return found


def test_the_methods_table_is_the_codes_own() -> None:
    assert README.split(BEGIN)[1].split(END)[0] == methods_table()


@pytest.mark.parametrize("line", commands())
def test_every_command_of_the_docs_has_options_that_exist(
    line: str, cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    if "consensus_min" in line:
        install_example()
    assert cli(*shlex.split(line)[1:], "--help") == 0, capsys.readouterr().err


def install_example(in_blocks: bool = False) -> Path:
    """Save the docs' method where a user would."""
    code, blocks = re.findall(r"```python\n(.*?)```", PAGES["methods.md"], flags=re.S)
    code = code.split("def merge(")[0] + blocks if in_blocks else code
    path = Path("lab/methods/consensus_min.py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code)
    return path


def test_the_docs_method_merges(cli: Cli, population: Path) -> None:
    words = ["--base", population / "base", "--experts", population / "parity", population / "loop", "--scale", "1.5"]
    for in_blocks, out in ((False, "whole"), (True, "blocks")):
        install_example(in_blocks)
        assert cli("merge", "consensus_min", *words, "-o", out) == 0
    assert filecmp.cmp("whole/model.safetensors", "blocks/model.safetensors", shallow=False)


def rows_of(cli: Cli, capsys: pytest.CaptureFixture[str], question: str) -> list[dict[str, Any]]:
    """What the store answers."""
    capsys.readouterr()
    assert cli("report", "--json", "--sql", question) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def test_the_docs_benchmark_scores(cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pandas

    (code,) = re.findall(r"```python\n(.*?)```", PAGES["benchmarks.md"], flags=re.S)
    place = Path("lab/benchmarks/hotels.py")
    place.parent.mkdir(parents=True)
    place.write_text(code)
    rows = tmp_path / "data" / "hotels" / "default"
    rows.mkdir(parents=True)
    reviews = pandas.DataFrame(tiny.sentences("test")).rename(columns={"sentence": "review"})
    reviews.to_parquet(rows / "test.parquet")
    model = tiny.expert(tmp_path / "model", "bert", labels=["unkind", "kind"])
    record = json.loads((model / "mergectl.json").read_text())
    (model / "mergectl.json").write_text(json.dumps(record | {"task": "hotels/tone"}))
    assert cli("eval", model, "--on", "hotels/tone", "--data", tmp_path / "data") == 0, capsys.readouterr().err
    (row,) = rows_of(cli, capsys, "select score, split from leaderboard where task = 'hotels/tone'")
    assert 0 <= row["score"] <= 1
    assert row["split"] == "report"


def test_the_docs_sql_runs(cli: Cli, population: Path) -> None:
    cli("merge", "average", "--experts", population / "parity", population / "loop", "-o", "m")
    (block,) = re.findall(r"```sql\n(.*?)```", PAGES["store.md"], flags=re.S)
    assert [cli("report", "--sql", question) for question in block.strip().split(";\n")] == [0] * 5


def test_nothing_in_the_repository_names_a_machine() -> None:
    own = [p for folder in ("mergectl", "methods", "benchmarks", "store", "docs") for p in (ROOT / folder).rglob("*.*")]
    texts = {
        p: p.read_text(encoding="utf-8") for p in own if p.suffix in (".py", ".md", ".sql", ".yaml") and p.is_file()
    }
    assert [p.name for p, text in texts.items() if re.search(r"/(work|root|home)/", text)] == []
