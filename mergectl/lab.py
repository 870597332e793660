"""The lab a command works in: its store, its data, its device, and what is recorded about the machine."""

from __future__ import annotations

import functools
import os
import platform
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergectl.errors import UserError
from mergectl.ranks import leads, scratch
from mergectl.terminal import Terminal

if TYPE_CHECKING:
    from mergectl.benchmarks._contract import Task
    from mergectl.store import Run, Store

RECORDED = (
    "mergectl", "torch", "transformers", "datasets", "safetensors", "peft", "accelerate", "optuna", "cmaes", "duckdb",
    "numpy", "scikit-learn",
)  # fmt: skip


@dataclass(frozen=True)
class Lab:
    """Where results go, where data come from, and how the command talks."""

    store_path: Path = Path("lab/mergectl.duckdb")
    store_url: str | None = None  # of a server that holds the runs in place of the file; the lab is still its folder
    data: Path | None = None
    own_tasks: Path | None = None  # a recipe that declares the user's own tasks
    device: str = "auto"
    threads: int = 0  # 0: as many as there are free cores
    seed: int = 0
    typed: frozenset[str] = frozenset()  # of seed and threads those that the user named: a file's do not count then
    terminal: Terminal = field(default_factory=Terminal)
    command: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """The lab folder: the store's own."""
        return self.store_path.parent

    @functools.cached_property
    def store(self) -> Store:
        """The experiment store."""
        from mergectl.store import Store

        return Store(self.store_url or self.store_path)

    @functools.cached_property
    def _runs(self) -> Store:
        """Where the runs of this process are written."""
        from mergectl.store import Store

        return self.store if leads() else Store(scratch() / "mergectl.duckdb")

    @property
    def store_name(self) -> str:
        """The store as a person reads it: the file, or the server without a password."""
        return str(self.store_path) if self.store_url is None else self.store.name

    @property
    def has_store(self) -> bool:
        """Whether there can be runs: a server, or a file or its archive."""
        return not self.store.places.empty()

    def tasks(self, words: Sequence[str]) -> list[Task]:
        """Turn task arguments into tasks, the user's own included, with data sets of the hub at the lab's commits."""
        from mergectl import pins
        from mergectl.tasks import own_tasks, resolve

        found, path = resolve(words, own_tasks(self.own_tasks)), self.folder / pins.FILE
        return pins.pinned(found, self.data, path) if path.exists() else found

    def start(self, kind: str, config: Mapping[str, Any], **facts: Any) -> Run:
        """Begin a run: a row from its first moment. Of the processes of one training only the first one's is kept."""
        return self._runs.start(
            kind,
            config=dict(config),
            seed=facts.pop("seed", self.seed),
            command=list(self.command),
            environment=environment(self.device),
            **facts,
        )

    def done(
        self, kind: str, config: Mapping[str, Any], seed: int | None = None, out: Path | None = None
    ) -> dict[str, Any] | None:
        """A finished run of exactly this work, so that it need not be done again; what it made must lie in `out`."""
        from mergectl.artefacts import MODEL
        from mergectl.checkpoints import open_checkpoint
        from mergectl.store import digest_of

        digest = digest_of(dict(config))
        gone = out is not None and not any((out / name).exists() for name in MODEL)
        if gone or self.store.finished(digest, kind=kind) is None:
            return None
        found = self.store.query(
            "SELECT r.run_id FROM runs r LEFT JOIN artifacts a ON a.run_id = r.run_id AND a.kind = 'model' "
            "WHERE r.config_digest = ? AND r.kind = ? AND r.seed = ? AND r.status = 'finished' "
            "AND a.digest IS NOT DISTINCT FROM ? ORDER BY r.ended_at DESC LIMIT 1",
            [digest, kind, self.seed if seed is None else seed, None if out is None else open_checkpoint(out).digest],
        )
        return self.store.find(found.rows[0][0]) if found.rows else None

    def find_run(self, ref: str) -> Path | None:
        """The model folder that a run of this store wrote, or None if there is no such run."""
        if self.store_url is None and not self.store_path.parent.exists():
            return None
        run = self.store.find(ref)
        if run is None:
            return None
        for artifact in run.get("artifacts", ()):
            if artifact["kind"] == "model":
                return _unchanged(run["run_id"], Path(artifact["path"]), artifact["digest"])
        raise UserError(f"Run {run['run_id']} ({run['kind']}, {run['status']}) has no model.")

    def merge_device(self) -> str:
        """Set torch's threads and return the device to merge on: a CUDA device only where it is asked for by name.

        Merging waits for the disk most of the time, and the processor's results are the same everywhere.
        """
        device = self.torch_device()
        return device if self.device.startswith("cuda") else "cpu"

    def torch_device(self) -> str:
        """Set torch's threads and return the device to compute on; `auto` is CUDA, then MPS, then the processor."""
        import torch

        from mergectl.models import pick_device

        if self.threads or "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(self.threads or free_cores())
        return pick_device(self.device)


def _unchanged(run_id: str, path: Path, digest: str | None) -> Path:
    """The folder that a run wrote, if it still holds what the run wrote."""
    from mergectl.checkpoints import open_checkpoint

    if not path.is_dir():
        raise UserError(f"Run {run_id} wrote {path}, which is gone.")
    if digest is not None and open_checkpoint(path).digest != digest:
        raise UserError(f"Run {run_id} wrote {path}, but another model lies there now. Name the folder to take that.")
    return path


def free_cores() -> int:
    """Cores that nobody uses just now, at least one: threads that wait for each other on a busy core crawl."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return max(1, cores - round(busy))


@functools.cache
def versions() -> dict[str, str]:
    """The versions of what decides a number, from package metadata alone."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in RECORDED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def environment(device: str) -> dict[str, str]:
    """What is recorded about code and machine with every run."""
    from mergectl.provenance import code_facts

    facts = {f"version.{name}": text for name, text in versions().items()}
    return (
        facts
        | code_facts()
        | _computing()
        | {
            "host": socket.gethostname(),
            "platform": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "cores": str(os.cpu_count()),
            "device": device,
            "working_folder": str(Path.cwd()),
            "executable": Path(sys.executable).name,
        }
    )


def _computing() -> dict[str, str]:
    """What torch computes with, where the command has loaded it: threads, and the name of a CUDA device."""
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "get_num_threads"):
        return {}
    facts = {"threads": str(torch.get_num_threads())}
    if torch.cuda.is_available():
        facts["cuda_device"] = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return facts
