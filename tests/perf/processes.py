"""Run a merge in a process of its own and see what it took: seconds, processor seconds and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mergectl import settings
from mergectl.errors import UserError
from tests.perf.checkpoints import drop

ROOT = Path(__file__).parent.parent.parent

# A small merge first: it loads every library that the large one needs.
RUN = """
import json, sys, time
import torch
from pathlib import Path
from mergectl.families import open_family
from mergectl.merge import MergeJob, merge
from mergectl.plan import recipe_of

def run(method, out, base, *experts):
    experts = tuple((f"t{i}", path) for i, path in enumerate(experts))
    job = MergeJob(recipe_of(method), experts, base)
    merge(job, open_family(base, experts), Path(out), facts={}, force=False, progress=lambda *_: None)

method, threads, *jobs = json.loads(sys.argv[1])
torch.set_num_threads(threads)
for job in jobs:
    began, busy = time.perf_counter(), time.process_time()
    run(method, *job)
    took = {"seconds": time.perf_counter() - began, "processor": time.process_time() - busy}
print(json.dumps(took))
"""


@dataclass(frozen=True)
class Cost:
    """What a process took, start-up included; memory is the highest seen, in MiB."""

    seconds: float
    processor: float
    resident: float  # all pages, those of files it maps included
    anonymous: float  # without page cache
    output: str


def watched(words: Sequence[str], environment: dict[str, str]) -> Cost:
    """Run a program to its end and watch its memory from outside; its complaint ends this program, too.

    Python keeps its compiled modules, as it does for users: a program that compiles itself at every start is slower.
    """
    peaks = {"VmHWM": 0, "own": 0}
    environment = {word: value for word, value in os.environ.items() if word != "PYTHONDONTWRITEBYTECODE"} | environment
    with tempfile.TemporaryFile("w+") as errors:
        began = time.perf_counter()
        child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT, env=environment)
        ended = threading.Event()
        watcher = threading.Thread(target=_watch, args=(child.pid, peaks, ended), daemon=True)
        watcher.start()
        try:
            output = child.stdout.read() if child.stdout else ""
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            child.kill()
            raise
        seconds = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        ended.set()
        watcher.join()
        if child.returncode:
            errors.seek(0)
            raise SystemExit(f"{' '.join(words)[:300]} ... failed:\n{errors.read()[-3000:]}")
    return Cost(seconds, usage.ru_utime + usage.ru_stime, peaks["VmHWM"] / 1024, peaks["own"] / 1024, output)


def _watch(pid: int, peaks: dict[str, int], ended: threading.Event) -> None:
    """Note the highest memory of a process; what is not page cache has no mark of its own in the kernel."""
    while not ended.wait(0.005):
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            return
        kib = {key: int(value.split()[0]) for key, _, value in (line.partition(":") for line in lines) if "kB" in value}
        peaks["VmHWM"] = max(peaks["VmHWM"], kib.get("VmHWM", 0))
        peaks["own"] = max(peaks["own"], kib.get("RssAnon", 0) + kib.get("RssShmem", 0))


@dataclass(frozen=True)
class Measured:
    """One merge: seconds without start-up of interpreter and libraries, and the peak that is not page cache."""

    seconds: float
    processor: float
    mib: float


def chosen(method: str, paths: Sequence[Path]) -> tuple[Path | None, list[Path]]:
    """The base, where the method needs one, and as many experts as it takes."""
    info = settings.describe(method)
    needs = bool(info.refine) or any(info.supplies.get(word) for word in ("task_vectors", "base"))
    return paths[0] if needs else None, list(paths[1:])[: info.experts[1]]


def known(methods: Sequence[str]) -> list[str]:
    """Those of the methods that there are; the others are named."""
    found = []
    for method in methods:
        try:
            settings.describe(method)
            found.append(method)
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)
    return found


def measure(method: str, paths: Sequence[Path], out: Path, threads: int, warm: Sequence[Path]) -> Measured:
    """Merge in a fresh process, after a small merge by the same method; the result is left in `out`."""
    jobs = []
    for inputs, target in ((warm, out.with_name(f"{out.name}-warm")), (paths, out)):
        base, experts = chosen(method, inputs)
        jobs.append([str(target), None if base is None else str(base), *map(str, experts)])
    try:
        cost = watched([sys.executable, "-c", RUN, json.dumps([method, threads, *jobs])], {})
    finally:
        drop(out.with_name(f"{out.name}-warm"))
    took = json.loads(cost.output)
    return Measured(took["seconds"], took["processor"], cost.anonymous)
