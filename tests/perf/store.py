"""Whether the store keeps its promise under fire, and how fast it is: no acknowledged run lost, halved or doubled.

    python -m tests.perf.store [--writers 8] [--runs 200] [--metrics 20] [--kills 40] [--shell 3] [--seed 0]

Each writer is a process that writes so many runs, each with so many metrics, and says a run's id when the store has
acknowledged it. Two more processes only ingest. Writers and ingesters are killed (SIGKILL) at random moments and begun
again. Another process polls with questions all the time, and for some seconds a program as the DuckDB shell holds the
database file. In the end every acknowledged run must be there, finished, once, with all its metrics, also after a
rebuild from the archive. Printed are the runs a second by the clock and by processor time, and how long a run took at
most. --calm: without readers and ingesters, what writers do alone. Ends with exit code 1 where anything is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergectl.store import Store, StoreError, open_store

ROOT = Path(__file__).parent.parent.parent

WRITER = """
import sys, time
from mergectl.store import open_store
store = open_store(sys.argv[1])
writer, first, last, metrics = map(int, sys.argv[2:])
for number in range(first, last):
    began = time.monotonic()
    with store.start("trial", config={"writer": writer, "number": number}) as run:
        for step in range(metrics):
            run.metric("loss", number + step / 100, task="a/b", split="tune", step=step)
    sys.stdout.write(f"{number} {run.id} {time.monotonic() - began:.4f}\\n")
    sys.stdout.flush()
"""
INGESTER = """
import sys, time
from mergectl.store import StoreError, open_store
store = open_store(sys.argv[1])
while True:
    try:
        store.ingest()
    except StoreError:
        pass
    time.sleep(0.5)
"""
READER = """
import sys, time
from mergectl.store import StoreError, open_store
store = open_store(sys.argv[1])
before = 0
while True:
    began = time.monotonic()
    try:
        ((count, finished, odd),) = store.query(
            "SELECT count(*), count(*) FILTER (WHERE status = 'finished'), "
            "count(*) FILTER (WHERE metrics NOT IN (0, %d)) "
            "FROM (SELECT r.run_id, r.status, (SELECT count(*) FROM metrics m WHERE m.run_id = r.run_id) AS metrics "
            "FROM runs r)" % int(sys.argv[2])).rows
    except StoreError as error:
        sys.stdout.write(f"busy {error}\\n")
    else:
        sys.stdout.write(f"read {finished} {odd} {int(finished < before)} {time.monotonic() - began:.4f}\\n")
        before = finished
    sys.stdout.flush()
    time.sleep(0.1)
"""
SHELL = """
import duckdb, sys, time
until = time.monotonic() + float(sys.argv[2])
while True:
    try:
        connection = duckdb.connect(sys.argv[1], read_only=True)
        break
    except duckdb.Error:
        time.sleep(0.01)
held = 0
began = time.monotonic()
while time.monotonic() < began + float(sys.argv[2]):
    connection.execute("SELECT count(*) FROM runs").fetchall()
    time.sleep(0.05)
sys.stdout.write(f"{time.monotonic() - began:.2f}\\n")
"""


@dataclass
class Process:
    """A program in another process whose lines are read as they come."""

    words: list[str]
    lines: list[list[str]] = field(default_factory=list)
    errors: str = ""

    def __post_init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        self.child = subprocess.Popen(
            [sys.executable, "-c", *self.words], env=environment, stdout=pipe, stderr=pipe, text=True
        )
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._hear, self._complaints)]
        for reader in self._readers:
            reader.start()

    def _hear(self) -> None:
        assert self.child.stdout
        for line in self.child.stdout:
            if line.endswith("\n"):  # what a killed process said by half does not count
                self.lines.append(line.split())

    def _complaints(self) -> None:
        assert self.child.stderr
        self.errors = self.child.stderr.read()

    def end(self, how: int | None = None) -> None:
        """Wait for the end, after a signal if one is given, and for the last line."""
        if how is not None:
            self.child.send_signal(how)
        self.child.wait()
        for reader in self._readers:
            reader.join()


@dataclass
class Work:
    """One writer's share: begun again where a kill broke it off, until all its runs are acknowledged."""

    number: int
    runs: int
    metrics: int
    store: Path
    told: dict[str, int] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    died: int = 0
    process: Process | None = None

    def begin(self) -> None:
        """Go on behind the last acknowledged run."""
        first = max(self.told.values(), default=-1) + 1
        words = [str(self.store), *map(str, (self.number, first, self.runs, self.metrics))]
        self.process = Process([WRITER, *words])

    def hear(self) -> None:
        """Take in what the ended process said."""
        assert self.process is not None
        for number, name, seconds in self.process.lines:
            self.told[name] = int(number)
            self.seconds.append(float(seconds))
        if self.process.child.returncode not in (0, -signal.SIGKILL):
            raise SystemExit(f"writer {self.number} failed:\n{self.process.errors}")

    def kill(self) -> bool:
        """Kill the process and begin another; False if it had ended by itself."""
        assert self.process is not None
        if self.process.child.poll() is not None:
            return False
        self.process.end(signal.SIGKILL)
        self.hear()
        self.died += 1
        self.begin()
        return True

    def finish(self) -> None:
        """Wait until all runs are written."""
        assert self.process is not None
        self.process.end()
        self.hear()


def main(words: Sequence[str] | None = None) -> int:
    """Run all of it, print what was found, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (("writers", 8), ("runs", 200), ("metrics", 20), ("kills", 40), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--shell", type=float, default=3.0, help="seconds for which a shell holds the file")
    parser.add_argument("--calm", action="store_true", help="no reader and no ingesters: what writers do alone")
    asked = parser.parse_args(words)
    with tempfile.TemporaryDirectory(prefix="mergectl-store-") as folder:
        found = stress(Path(folder) / "lab" / "mergectl.duckdb", asked)
    for key, value in found.items():
        print(f"{key:<32} {value}")
    return int(
        any(found[key] for key in ("lost", "partial", "doubled", "went back", "odd while reading", "rebuilt otherwise"))
    )


def stress(path: Path, asked: Any) -> dict[str, Any]:
    """Write, kill, read and hold; then count."""
    began = time.monotonic()
    writers = [Work(number, asked.runs, asked.metrics, path) for number in range(asked.writers)]
    for writer in writers:
        writer.begin()
    others = [] if asked.calm else [Process([INGESTER, str(path)]) for _ in range(2)]
    reader = None if asked.calm else Process([READER, str(path), str(asked.metrics)])
    shell = threading.Thread(target=_hold, args=(path, asked.shell), daemon=True)
    if asked.shell:
        shell.start()
    kills = _kill(writers, others, asked.kills, random.Random(asked.seed))
    for writer in writers:
        writer.finish()
    seconds = time.monotonic() - began
    if asked.shell:
        shell.join()
    for process in [*others, *([reader] if reader else [])]:
        process.end(signal.SIGKILL)
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = spent.ru_utime + spent.ru_stime
    store = open_store(path)
    ingesting = time.monotonic()
    store.ingest()
    told = {name: writer.number for writer in writers for name in writer.told}
    waits = [second for writer in writers for second in writer.seconds]
    return {
        "acknowledged runs": len(told),
        "kills": f"{kills['writer']} writers, {kills['ingester']} ingesters",
        "seconds": f"{seconds:.1f}",
        "runs a second": f"{len(told) / seconds:.0f}",
        "processor seconds, all processes": f"{busy:.1f}, or {2 * len(told) / busy:.0f} runs a second on two cores",
        "last ingest, seconds": f"{time.monotonic() - ingesting:.2f}",
        "a run, median and longest": f"{statistics.median(waits):.4f} {max(waits):.4f} s",
        **_read(reader),
        **counted(store, told, asked.metrics),
    }


def _kill(writers: list[Work], others: list[Process], kills: int, dice: random.Random) -> Counter[str]:
    """Kill a writer or an ingester at random moments, spread over the work, and begin it again."""
    done: Counter[str] = Counter()
    total = sum(writer.runs for writer in writers)
    while done.total() < kills:
        time.sleep(dice.uniform(0.01, 0.1))
        told = sum(len(writer.told) + len(writer.process.lines if writer.process else ()) for writer in writers)
        if all(w.process is not None and w.process.child.poll() is not None for w in writers):
            break
        if told < total * 0.9 * (done.total() + 1) / (kills + 1):
            continue
        if others and dice.random() < 0.3:
            index = dice.randrange(len(others))
            others[index].end(signal.SIGKILL)
            others[index] = Process(others[index].words)
            done["ingester"] += 1
        else:
            done["writer"] += dice.choice(writers).kill()
    return done


def _hold(path: Path, seconds: float) -> None:
    """Hold the database file for a while as a shell does, some time after it was made."""
    while not path.exists():
        time.sleep(0.05)
    Process([SHELL, str(path), str(seconds)]).end()


def _read(reader: Process | None) -> dict[str, Any]:
    """What the reader saw."""
    if reader is None:
        return {"went back": 0, "odd while reading": 0}
    seen = [line[1:] for line in reader.lines if line[0] == "read"]
    waits = [float(line[3]) for line in seen] or [0.0]
    return {
        "readings": f"{len(seen)}, {len(reader.lines) - len(seen)} met a busy file",
        "a reading, median and longest": f"{statistics.median(waits):.3f} {max(waits):.3f} s",
        "went back": sum(int(line[2]) for line in seen),
        "odd while reading": sum(int(line[1]) for line in seen),
    }


def counted(store: Store, told: dict[str, int], metrics: int) -> dict[str, Any]:
    """Compare what was acknowledged with what is there, before and after a rebuild."""
    found = _rows(store)
    names = Counter(name for name, *_ in found)
    whole = {name for name, status, count, steps in found if status == "finished" and count == steps == metrics}
    partial = [row for row in found if row[2:] != ((metrics, metrics) if row[1] == "finished" else (0, 0))]
    try:
        store.rebuild()
    except StoreError as error:
        raise SystemExit(f"cannot be rebuilt: {error}") from error
    return {
        "runs in the store": f"{len(found)} ({json.dumps(Counter(status for _, status, *_ in found))})",
        "lost": len(set(told) - whole),
        "partial": len(partial),
        "doubled": sum(count - 1 for count in names.values()),
        "rebuilt otherwise": int(_rows(store) != found),
    }


def _rows(store: Store) -> list[tuple[Any, ...]]:
    return store.query(
        "SELECT r.run_id, r.status, count(m.run_id), count(DISTINCT m.step) FROM runs r "
        "LEFT JOIN metrics m ON m.run_id = r.run_id GROUP BY r.run_id, r.status ORDER BY r.run_id"
    ).rows


if __name__ == "__main__":
    raise SystemExit(main())
