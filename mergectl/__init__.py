"""A laboratory for merging fine-tuned transformers."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergectl.benchmarks._contract import Part, Task, Template, tune_few, tune_share
    from mergectl.checkpoints import load_checkpoint
    from mergectl.errors import UserError
    from mergectl.evaluate import evaluate
    from mergectl.merging import Merged, merge_weights
    from mergectl.methods._contract import (
        Beside,
        Between,
        MergeWarning,
        MethodError,
        OneOf,
        PerTask,
        Rng,
        Split,
        Tasks,
        Weights,
    )
    from mergectl.methods._contract import Merged as MergedVectors
    from mergectl.methods._task_vectors import TaskVectors
    from mergectl.store import open_store

__version__ = "0.1.0"

# Where the links mergectl/methods, benchmarks and store are no folders (Windows, some archives), look beside us.
if not (Path(__file__).parent / "methods").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

_HOMES = {
    "load_checkpoint": "mergectl.checkpoints",
    "evaluate": "mergectl.evaluate",
    "open_store": "mergectl.store",
    "merge_weights": "mergectl.merging",
    "Merged": "mergectl.merging",
    "UserError": "mergectl.errors",
    "TaskVectors": "mergectl.methods._task_vectors",
    "Beside": "mergectl.methods._contract",
    "Between": "mergectl.methods._contract",
    "MergeWarning": "mergectl.methods._contract",
    "MergedVectors": "mergectl.methods._contract",
    "MethodError": "mergectl.methods._contract",
    "OneOf": "mergectl.methods._contract",
    "PerTask": "mergectl.methods._contract",
    "Rng": "mergectl.methods._contract",
    "Split": "mergectl.methods._contract",
    "Tasks": "mergectl.methods._contract",
    "Weights": "mergectl.methods._contract",
    "Part": "mergectl.benchmarks._contract",
    "Task": "mergectl.benchmarks._contract",
    "Template": "mergectl.benchmarks._contract",
    "tune_few": "mergectl.benchmarks._contract",
    "tune_share": "mergectl.benchmarks._contract",
}

__all__ = [
    "Beside",
    "Between",
    "MergeWarning",
    "Merged",
    "MergedVectors",
    "MethodError",
    "OneOf",
    "Part",
    "PerTask",
    "Rng",
    "Split",
    "Task",
    "TaskVectors",
    "Tasks",
    "Template",
    "UserError",
    "Weights",
    "__version__",
    "evaluate",
    "load_checkpoint",
    "merge_weights",
    "open_store",
    "tune_few",
    "tune_share",
]


def __getattr__(name: str) -> Any:
    """Load a part of the Python API when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mergectl' has no attribute '{name}'")
    value = getattr(import_module(_HOMES[name]), {"MergedVectors": "Merged"}.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the Python API."""
    return sorted(__all__)
