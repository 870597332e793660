"""The arrows point one way, the files stay small, and help loads nothing heavy."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEAVES = ("methods", "benchmarks", "store")
HEAVY = ("torch", "transformers", "optuna", "duckdb", "datasets", "sklearn", "pandas", "numpy", "peft")
# From the top down: a module imports only from its own layer or from below.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("commands", "eval_command", "finetune_command", "report_command"),
    ("repeat", "store_care"),
    ("pipelines", "search_command"),
    ("estimates",),
    ("pinning",),
    ("steps",),
    ("experts",),
    ("scoring", "options", "merge_scores", "conflict"),
    ("tuning", "again", "grid", "search_jobs", "medusa"),
    ("adapter_merge",),
    ("adapter_modes",),
    ("html_page",),
    ("figures",),
    ("report_content",),
    ("evaluations", "verbs", "report", "mergekit_jobs", "study_report", "run_report"),
    ("study_text",),
    ("board_text", "latex", "pictures", "study_pictures"),
    ("scoreboard",),
    ("supplies",),
    ("adaptation_watch",),
    ("adaptation", "calibration_supply"),
    ("judging",),
    ("search", "workers", "finetune", "evaluate"),
    ("division",),
    ("merge", "samplers", "board", "training", "lowrank", "masking"),
    ("writing", "records", "recombine"),
    ("families", "layer_maps", "layouts", "range_ends"),
    ("lineup",),
    ("in_memory",),
    ("views",),
    ("heads", "merging", "aligned", "space", "pruning", "trials", "studies"),
    ("flops", "ranges"),
    ("bench", "stream", "tied", "calibration_fishers", "bodies"),
    ("answers",),
    (
        "calibration",
        "calibration_rows",
        "calibration_examples",
        "linears",
        "live",
        "plan",
        "inputs",
        "smoke",
        "dropout",
    ),
    ("models", "lab", "lenders"),
    ("clip", "clip_model"),
    ("tasks", "text2text", "settings"),
    ("preprocess",),
    ("checkpoints",),
    ("mergekit_slices", "vocabulary"),
    ("adapters", "stacking", "open_clip"),
    ("tensorfiles", "reheading", "calibration_cache"),
    ("weights", "artefacts", "bits", "blocks", "ownership"),
    ("factors", "peeking"),
    (
        "calibration_options",
        "calibration_gradients",
        "headers",
        "jsonfiles",
        "digests",
        "components",
        "decoders",
        "tokenizer_files",
    ),
    ("charts_svg",),
    ("charts", "learned"),
    ("provenance", "terminal", "values", "publish", "mergekit", "crew", "pool", "presets"),
    ("pins",),
    (
        "config",
        "gradients",
        "mergekit_methods",
        "layers",
        "layer_pairs",
        "prefixes",
        "naming",
        "adapter_folds",
        "refs",
        "tokens",
        "plugins",
        "finetune_config",
        "thin",
        "ranks",
        "claims",
        "packing",
        "first_token",
        "words",
    ),
    ("legacy",),
    ("errors",),
)


def imports(path: Path) -> list[str]:
    """All modules of ours that a file imports, wherever the import stands."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return [name for name in found if name.split(".")[0] == "mergectl"]


def layer(module: str) -> int:
    return next(depth for depth, names in enumerate(LAYERS) if module in names)


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_imports_only_itself(leaf: str) -> None:
    wrong = [
        f"{path.name}: {name}"
        for path in (ROOT / leaf).rglob("*.py")
        for name in imports(path)
        if name.split(".")[1] != leaf
    ]
    assert wrong == []


def test_every_module_of_the_program_has_its_layer() -> None:
    there = {path.stem for path in (ROOT / "mergectl").glob("*.py")} - {"__init__"}
    assert there == {name for names in LAYERS for name in names}


def test_imports_in_the_program_point_down() -> None:
    wrong = []
    for path in (ROOT / "mergectl").glob("*.py"):
        for name in imports(path) if path.stem != "__init__" else []:
            target = name.split(".")[1]
            if target in LEAVES or target == "__version__" or target == path.stem:
                continue
            if layer(target) < layer(path.stem) and (ROOT / "mergectl" / f"{target}.py").exists():
                wrong.append(f"{path.stem} -> {target}")
    assert wrong == []


@pytest.mark.parametrize("folder", ["mergectl", *LEAVES])
def test_modules_stay_under_four_hundred_lines(folder: str) -> None:
    long = [p.name for p in (ROOT / folder).rglob("*.py") if len(p.read_text(encoding="utf-8").splitlines()) > 400]
    assert long == []


HELPS = [
    ["--help"],
    ["merge", "--help"],
    ["merge", "ties", "--help"],
    ["search", "ties", "--help"],
    ["finetune", "--help"],
    ["report", "--help"],
]


@pytest.mark.parametrize("words", HELPS, ids=" ".join)
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys; from mergectl.cli import main; code = main(sys.argv[1:]);"
        "loaded = {n.split('.')[0] for n, m in sys.modules.items() if type(m).__name__ == 'module'};"
        "print(code, *loaded, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    exit_code, *loaded = done.stderr.split()
    assert (exit_code, set(loaded) & set(HEAVY)) == ("0", set())


def test_help_answers_within_its_budget_of_processor_time() -> None:
    def spent() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "mergectl", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(spent() for _ in range(3)) < 0.3
