"""How methods are found: our files, installed distributions, the user's folders; and what happens to broken ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mergectl import merge_weights, plugins, settings
from mergectl.errors import UserError

GOOD = '''"""Add half of every task vector."""

from __future__ import annotations

from typing import Annotated

import torch

from mergectl import Between

TITLE = "Halves"
PAPER = "none"
NEUTRAL = None  # it shrinks


def merge(task_vectors, *, part: Annotated[float, Between(0.0, 1.0), "how much of each"] = 0.5):
    """Yield the shrunken sum."""
    for name, x in task_vectors.items():
        yield name, part * torch.sum(x, dim=0)
'''


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test a plugin folder of its own, and an empty lab."""
    monkeypatch.setenv("MERGECTL_STORE", str(tmp_path / "lab" / "mergectl.duckdb"))
    monkeypatch.setenv("MERGECTL_PLUGINS", str(tmp_path / "mine"))
    (tmp_path / "mine" / "methods").mkdir(parents=True)
    return tmp_path / "mine" / "methods"


def check_halves(name: str = "halves") -> None:
    base, experts = {"m.w": torch.ones(2)}, {"a": {"m.w": torch.tensor([3.0, 1.0])}}
    assert merge_weights(name, base, experts)["m.w"].tolist() == [2.0, 1.0]
    assert merge_weights(name, base, experts, part=1.0)["m.w"].tolist() == [3.0, 1.0]


def run(code: str, **environment: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_file_in_a_folder_of_the_users_is_a_method(folder: Path) -> None:
    (folder / "halves.py").write_text(GOOD)
    assert "halves" in plugins.names("methods")
    assert "halves" in settings.names()
    assert settings.describe("halves").summary == "Add half of every task vector."
    assert settings.settings_of("halves")["part"].default == 0.5
    check_halves()


def test_a_file_in_the_lab_is_a_method(tmp_path: Path) -> None:
    (tmp_path / "lab" / "methods").mkdir(parents=True)
    (tmp_path / "lab" / "methods" / "halves.py").write_text(GOOD)
    check_halves()


def test_an_installed_distribution_may_bring_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    facts = site / "halves_plugin-1.2.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: halves-plugin\nVersion: 1.2\n")
    (facts / "entry_points.txt").write_text(
        "[mergectl.methods]\nhalves_installed = halves_plugin\nlost = no_such_module\nfn = halves_plugin:merge\n"
    )
    (site / "halves_plugin.py").write_text(GOOD)
    monkeypatch.syspath_prepend(str(site))
    check_halves("halves_installed")
    problems = "\n".join(settings.problems())
    assert "halves-plugin 1.2 (no_such_module): cannot be loaded (ModuleNotFoundError" in problems
    assert "must name a module, got function" in problems


def test_names_come_from_listings_alone(folder: Path) -> None:
    (folder / "bomb.py").write_text("raise RuntimeError('boom')")
    assert "bomb" in plugins.names("methods")


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("x = 1\nraise RuntimeError('boom')", 2, "RuntimeError: boom"),
        ("def merge(:\n", 1, "SyntaxError"),
        ("import nowhere_to_be_found", 1, "ModuleNotFoundError"),
        ("\nimport sys\nsys.exit(3)", 3, "SystemExit"),
    ],
)
def test_a_broken_file_is_reported_by_line_and_stops_no_other(folder: Path, text: str, line: int, words: str) -> None:
    (folder / "bomb.py").write_text(text)
    (folder / "halves.py").write_text(GOOD)
    (problem,) = settings.problems()
    assert f"{folder / 'bomb.py'}:{line}: cannot be loaded ({words}" in problem
    assert "bomb" not in settings.names()
    with pytest.raises(UserError, match=r"bomb\.py"):
        settings.describe("bomb")
    check_halves()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("task_vectors, *,", "task_vectors, fisherz, *,", "the lab cannot supply 'fisherz', only task_vectors"),
        ("task_vectors, *,", "task_vectors, *stuff,", "the lab cannot supply 'stuff'"),
        (" = 0.5", "", "setting 'part' must have a default"),
        (', "how much of each"', "", "setting 'part' must say type, range and help"),
        ("Annotated[float", "Annotated[list", "setting 'part' must say type, range and help"),
        ("Between(0.0, 1.0)", "Among(0.0, 1.0)", "the type of setting 'part' cannot be read"),
        ("def merge", "def fuse", "it must hold one function, `merge` or `refine`, got 0"),
        ('"""Add half of every task vector."""', "", "must begin with a sentence"),
    ],
)
def test_a_file_that_breaks_the_contract_is_told_how(folder: Path, old: str, new: str, words: str) -> None:
    text = GOOD.replace("from __future__ import annotations\n", "") if old.startswith('"""') else GOOD
    (folder / "halves.py").write_text(text.replace(old, new, 1))
    if "Among" in new:
        (folder / "halves.py").write_text(GOOD.replace(old, new, 1))
    (problem,) = settings.problems()
    assert words in problem
    assert problem.startswith(str(folder / "halves.py"))
    assert "halves" not in settings.names()


def test_of_two_with_one_name_our_own_is_used_and_the_other_mentioned(folder: Path) -> None:
    (folder / "ties.py").write_text(GOOD)
    (problem,) = settings.problems()
    assert problem == f"{folder / 'ties.py'}: not used, since 'ties' is already the name of methods/ties.py."
    assert settings.describe("ties").title == "TIES-Merging"


def test_a_changed_file_is_read_again(folder: Path) -> None:
    (folder / "halves.py").write_text(GOOD)
    assert settings.describe("halves").title == "Halves"
    (folder / "halves.py").write_text(GOOD.replace("Halves", "Doubles"))
    os.utime(folder / "halves.py", ns=(1, 1))
    assert settings.describe("halves").title == "Doubles"


def test_an_unknown_name_gets_a_hint() -> None:
    with pytest.raises(UserError, match=r"No method 'tiess'\. Did you mean 'ties'\?"):
        plugins.load("methods", "tiess")
    with pytest.raises(UserError, match=r"No method 'dare_tie'\. Did you mean 'dare_ties'\?"):
        settings.describe("dare_tie")


def test_a_method_that_yields_nonsense_is_named(folder: Path) -> None:
    base, experts = {"m.w": torch.ones(2)}, {"a": {"m.w": torch.zeros(2)}}
    for old, new, words in (
        ("part * torch.sum(x, dim=0)", "x", "unknown or misshapen weight 'm.w'"),
        ("yield name", "yield 'other'", "unknown or misshapen weight 'other'"),
        ("task_vectors.items()", "[]", "gave no weight 'm.w'"),
        ("yield name, part", "yield name, x[0]; yield name, part", "unknown or misshapen weight 'm.w'"),
    ):
        (folder / "halves.py").write_text(GOOD.replace("yield name, x[0]; ", "").replace(old, new))
        os.utime(folder / "halves.py", ns=(2, hash(new) % 10**9))
        with pytest.raises(UserError, match=words):
            merge_weights("halves", base, experts)


def test_describing_and_checking_loads_neither_torch_nor_numpy(folder: Path) -> None:
    (folder / "halves.py").write_text(GOOD)
    out = run(
        "import sys\n"
        "from mergectl import settings\n"
        "infos = [settings.describe(name) for name in [*settings.names(), 'dare', 'ties', 'halves']]\n"
        "settings.check('ties', {'density': 0.3}, ['a'])\n"
        "assert settings.problems() == []\n"
        "print(len(infos), sorted({'torch', 'numpy', 'transformers', 'duckdb'} & set(sys.modules)))\n"
    )
    assert out.split(maxsplit=1)[1].strip() == "[]"


def test_a_deferred_torch_becomes_the_real_one_when_used(folder: Path) -> None:
    (folder / "halves.py").write_text(GOOD.replace("import torch\n", "import torch\nfrom torch import nn\n"))
    (folder / "later.py").write_text(GOOD.replace("import torch\n", "import torch\nimport numpy as np\n"))
    out = run(
        "from mergectl import plugins\n"
        "late = plugins.load('methods', 'later')\n"
        "early = plugins.load('methods', 'halves')\n"
        "import torch, numpy\n"
        "assert early.nn is torch.nn\n"
        "assert late.torch.Tensor is torch.Tensor and late.np.ndarray is numpy.ndarray\n"
        "print(list(late.merge({'w': torch.ones(2, 2)}))[0][1].tolist())\n"
    )
    assert out.strip() == "[1.0, 1.0]"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["average", "task_arithmetic", "ties", "emr", "pcb"])
def test_loops_are_compiled_in_a_process_that_loaded_the_method_before_anything_else(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "nothing-yet"))
    out = run(
        "import sys\n"
        "from mergectl import plugins\n"
        f"plugins.load('methods', '{method}')\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
        "import torch\n"
        "from mergectl import merge_weights\n"
        "from mergectl.methods import _fused, _stored\n"
        "_stored.MANY = 1\n"
        "drawn = torch.Generator().manual_seed(0)\n"
        "models = [{'w': torch.randn(600, 500, generator=drawn)} for _ in range(3)]\n"
        "experts = dict(zip('ab', models[1:]))\n"
        f"base = None if '{method}' == 'average' else models[0]\n"
        f"compiled = merge_weights('{method}', base, experts)['w']\n"
        "assert 'numba' in sys.modules\n"
        "_fused.LEAST = 1 << 62\n"
        f"plain = merge_weights('{method}', base, experts)['w']\n"
        "print(torch.allclose(compiled, plain, rtol=1e-6, atol=1e-6))\n"
    )
    assert out.strip() == "True"


def test_a_method_may_keep_masks_of_what_it_was_lent_and_no_rescalers(folder: Path) -> None:
    (folder / "first.py").write_text(
        '"""Keep the first."""\nTITLE = "First"\nPAPER = "none"\nNEUTRAL = None\nEXTRA_BITS = 1\n'
        "def merge(task_vectors):\n"
        "    return task_vectors.each(lambda name, x: (x[0], x > 0))\n"
    )
    names = [f"w{i}" for i in range(4)]
    base, expert = ({name: torch.full((2,), own) for name in names} for own in (0.0, 3.0))
    merged = merge_weights("first", base, {"a": {name: x + i for i, (name, x) in enumerate(expert.items())}})
    expected = {name: [3.0 + i] * 2 for i, name in enumerate(names)}
    assert {name: x.tolist() for name, x in merged.items()} == expected
    assert {name: x.tolist() for name, x in merged.task("a").items()} == expected
    assert merged.kept["rescalers"] == {"a": 1.0}


@pytest.mark.slow
def test_a_full_disk_keeps_no_loop_from_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("resource")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "full"))
    out = run(
        "import resource, signal\n"
        "import numpy as np\n"
        "from mergectl.methods import _fused\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "found = _fused.balance(np.ones((2, 10), np.float32), np.zeros(2, np.float32), np.ones(2, np.float32))\n"
        "print(found)\n"
    )
    assert out.strip() == "10"
