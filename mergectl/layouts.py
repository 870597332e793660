"""Populations as others publish them: which folders below a root are the experts of which tasks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from mergectl.checkpoints import find_folder
from mergectl.errors import UserError, did_you_mean
from mergectl.refs import Ref

Experts: TypeAlias = "tuple[tuple[str | None, Ref], ...]"

LAYOUTS = ("none", "merge-lm")
GLUE = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")  # in the order of the published tables
FAST = {"roberta": ("mrpc",), "bert": ("cola", "mrpc", "stsb")}  # tasks learnt at 5e-5, the others at 1e-5


def laid_out(experts: Experts, layout: str = "none", find_run: Callable[[str], Path | None] | None = None) -> Experts:
    """The experts that the roots named as `experts` hold, each with its task; without a layout they are the experts.

    `merge-lm`: `<root>/<task>/<model>_lr<rate>/`, the eight tasks of GLUE, or those of them that are there.
    """
    if layout not in LAYOUTS:
        raise UserError(f"--layout must be {' or '.join(LAYOUTS)}, got '{layout}'.{did_you_mean(layout, LAYOUTS)}")
    if layout == "none":
        return experts
    found: list[tuple[str | None, Ref]] = []
    for task, root in experts:
        if task is not None or not isinstance(root, str):
            raise UserError(
                f"With --layout {layout} name the folder that holds all experts, without a task: got {root}."
            )
        found += _glue_experts(find_folder(root, find_run), root)
    return tuple(found)


def _glue_experts(folder: Path, root: str) -> list[tuple[str | None, Ref]]:
    """One expert for each task of GLUE that has a folder, in the order of the tables."""
    below = {_plain(path.name): path for path in sorted(folder.iterdir()) if path.is_dir()}
    found: list[tuple[str | None, Ref]] = [
        (f"glue/{task}", str(_expert_in(below[task], task))) for task in GLUE if task in below
    ]
    if not found:
        raise UserError(f"{root} has no folder of a GLUE task ({', '.join(GLUE)}), as the layout merge-lm wants it.")
    return found


def _expert_in(folder: Path, task: str) -> Path:
    """The expert of a task's folder; of several, the one trained at the published learning rate."""
    if (folder / "config.json").exists():
        return folder
    models = [path for path in sorted(folder.iterdir()) if (path / "config.json").exists()]
    if not models:
        raise UserError(f"{folder} holds no model: none of its folders has a config.json.")
    published = [path for path in models if path.name == f"{_architecture(path)}_lr{_rate(path, task)}"]
    chosen = models if len(models) == 1 else published
    if len(chosen) != 1:
        names = ", ".join(path.name for path in models)
        raise UserError(f"{folder} holds several experts ({names}). Name one: --experts glue/{task}={models[0]} ...")
    return chosen[0]


def _architecture(model: Path) -> str:
    return model.name.partition("_lr")[0]


def _rate(model: Path, task: str) -> str:
    return "5e-05" if task in FAST.get(_architecture(model).partition("-")[0], ()) else "1e-05"


def _plain(name: str) -> str:
    """`SST-2`, `sst_2` and `sst2` are one task."""
    return name.lower().replace("-", "").replace("_", "")
