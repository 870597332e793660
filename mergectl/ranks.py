"""Which of the processes of one training this is: torchrun starts as many as there are devices, and all run the same.

The first writes and speaks; what the others would write goes to a store that is thrown away.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path


def leads() -> bool:
    """Whether this is the first process, or the only one."""
    return not _several() or os.environ.get("RANK", "0") == "0"


def wait_for_all() -> None:
    """Wait until every process of the training is here."""
    if _several():
        from accelerate import PartialState

        PartialState().wait_for_everyone()


@functools.cache
def scratch() -> Path:
    """A folder of this process alone, which goes when it ends."""
    folder = Path(tempfile.mkdtemp(prefix="mergectl-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def count() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def _several() -> bool:
    return count() > 1
