"""How much memory the workers of a search take, and how much of it they share.

    python -m tests.perf.search_workers --base MODEL --experts MODEL MODEL ... --data FOLDER [--workers 1 2 4]

Runs `mergectl search` with so many workers, each time in a lab of its own, and looks at the processes that hold models
(/proc/PID/smaps_rollup). Printed is, at the moment when all together took most: what the machine needs for all of them
(the sum of their proportional shares, PSS), how much of that are pages of files (the models' weights, what was merged
once, libraries), and for the one that took most: what it wrote itself and shares with nobody (private), and what it has
mapped or written in all (RSS), which it would need if nothing were shared.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MB = 1 << 20


@dataclass(frozen=True)
class Held:
    """What one process holds, in bytes."""

    shares: int  # PSS
    files: int  # of that, pages of files
    private: int
    whole: int  # RSS


def held(process: int) -> Held | None:
    """Look at a process; None once it is gone."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return None
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    if "Pss" not in kilobytes:
        return None
    return Held(*(1024 * kilobytes[name] for name in ("Pss", "Pss_File", "Private_Dirty", "Rss")))


def workers_of(leader: int) -> list[int]:
    """The processes that a leader started to work for it; itself where it works alone."""
    found = []
    for task in Path(f"/proc/{leader}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(word) for word in task.read_text().split()]
    return [child for child in found if "--join" in _words(child)] or [leader]


def _words(process: int) -> list[str]:
    try:
        return Path(f"/proc/{process}/cmdline").read_text().split("\0")
    except OSError:
        return []


def looks(command: list[str], out: Path, log: Path) -> Iterator[list[Held]]:
    """Run a search and look at its workers until the winner is written."""
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with log.open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env={**os.environ, **threads})
        while process.poll() is None:
            yield [found for worker in workers_of(process.pid) if (found := held(worker)) is not None]
            time.sleep(0.2)
            if any(out.parent.glob(f"*{out.name}*")):
                process.terminate()
                process.wait()
                return
    if process.returncode:
        raise SystemExit(log.read_text())


def measure(args: argparse.Namespace, workers: int, folder: Path) -> tuple[list[Held], int]:
    """Search with so many workers; return what they held when it was most, and the bytes that they merged once."""
    lab = ["--store", str(folder / "lab" / "mergectl.duckdb"), "--threads", "1", "--device", "cpu", "--quiet"]
    command = [sys.executable, "-m", "mergectl", *lab, *(["--data", str(args.data)] if args.data else [])]
    command += ["search", args.method, "--base", str(args.base), "--experts", *map(str, args.experts)]
    command += ["-o", str(folder / "best"), "--per-task", "scale", "--trials", str(args.trials)]
    command += ["--limit", str(args.examples), "--workers", str(workers)]
    most: list[Held] = []
    merged = 0
    for found in looks(command, folder / "best", folder / "log"):
        merged = max(merged, sum(_size(path) for path in (folder / "lab").glob("optuna/*.merged/*.f32")))
        if len(found) == workers and sum(h.shares for h in found) > sum(h.shares for h in most):
            most = found
    return most, merged


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--experts", type=Path, nargs="+", required=True)
    parser.add_argument("--data", type=Path, help="where the tasks' data lie")
    parser.add_argument("--method", default="task_arithmetic", help="one that is linear in a scale per task")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--examples", type=int, default=16, help="rows per task")
    args = parser.parse_args()
    models = [args.base, *args.experts]
    weights = sum(path.stat().st_size for model in models for path in model.glob("*.safetensors"))
    print(f"{args.method} on {len(args.experts)} experts of {args.base.name}: {weights / MB:.0f} MB of weights on disk")
    heads = ("workers", "all together", "of it pages of files", "private, each", "RSS, each", "merged once")
    print(f"| {' | '.join(heads)} |\n" + "| --- " * len(heads) + "|", flush=True)
    for workers in args.workers:
        with tempfile.TemporaryDirectory() as folder:
            most, merged = measure(args, workers, Path(folder))
        counts = (sum(h.shares for h in most), sum(h.files for h in most), max(h.private for h in most))
        cells = (f"{count / MB:.0f} MB" for count in (*counts, max(h.whole for h in most), merged))
        print(f"| {workers} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
