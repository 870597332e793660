"""How many candidates a search tries a minute, against merging each anew and against writing each to disk.

    python -m tests.perf.search --base MODEL --experts MODEL MODEL ... --data FOLDER [--method pcb] [--trials 6]

Draws random candidates with one coefficient per task, and tries them, turn by turn in one process on one thread:

- fast: recombined in place into the live model, as `mergectl search` does;
- memory: merged anew in memory, then put into the live model;
- disk: merged and written to a folder by `merge`, which is then opened, its rows tokenised, and evaluated, as in a loop
  over the library; imports, tasks and the experts' headers are read once;
- commands, with `--commands`: `mergectl merge` and `mergectl eval`, two processes a trial.

All ways must give each candidate the same scores. The first two keep the tokenised rows, in batches that waste little
on padding; the others make batches of `--batch-size` rows, sorted by length, as `eval` does.

Printed are trials a minute by the clock and by processor time, at `--examples` and at `--few` rows per task, the share
of a fast trial that is not the model's own computing, what is spent once before the first trial, and, at `--examples`,
how many rows pruning saves, and whether the winner is as good.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mergectl import bench, settings
from mergectl.components import Shelf
from mergectl.evaluate import evaluate
from mergectl.families import Family, open_family
from mergectl.judging import Judge
from mergectl.lab import Lab
from mergectl.merge import MergeJob, merge
from mergectl.plan import recipe_of
from mergectl.pruning import Pruner, Verdict, Watch, difference, variance

Settings = dict[str, Any]
CLOCKS = ("wall", "processor")


@dataclass(frozen=True)
class Spent:
    """What something took."""

    wall: float
    processor: float

    def __sub__(self, other: Spent) -> Spent:
        return Spent(self.wall - other.wall, self.processor - other.processor)


def now() -> Spent:
    """Both clocks; the processor's counts finished child processes, too."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Spent(time.perf_counter(), time.process_time() + children.ru_utime + children.ru_stime)


def timed(work: Callable[[], Any]) -> tuple[Spent, Any]:
    """What a piece of work takes, and what it gives."""
    start = now()
    found = work()
    return now() - start, found


@dataclass(frozen=True)
class Search:
    """What is searched."""

    args: argparse.Namespace
    family: Family
    lab: Lab
    shelf: Shelf = field(default_factory=Shelf)  # components are made once, for all comparisons

    @property
    def tasks(self) -> list[str]:
        return [self.family.task_ids[task] for task in self.family.experts]

    def judge(self, examples: int, *, fast: bool) -> Judge:
        """A judge, with or without the fast way."""
        recipe = recipe_of(self.args.method)
        how: Any = {"varying": {"scale"}, "limit": examples, "batch_size": self.args.batch_size}
        found = Judge(self.lab, recipe, self.family, self.lab.tasks(self.tasks), **how)
        if not fast:
            found.recombiner = None
        elif found.recombiner is not None:
            found.recombiner.shelf = self.shelf
        return found

    def on_disk(self, candidate: Settings, examples: int) -> Mapping[str, float]:
        """Merge into a folder, load the folder, evaluate."""
        out = Path(self.args.folder) / "candidate"
        shutil.rmtree(out, ignore_errors=True)
        experts = tuple((None, str(expert)) for expert in self.args.experts)
        job = MergeJob(replace(recipe_of(self.args.method), settings=candidate), experts, str(self.args.base))
        merge(job, self.family, out, facts={}, force=True, progress=lambda *_: None)
        return evaluate(
            str(out),
            self.lab.tasks(self.tasks),
            split="tune",
            data=self.lab.data,
            limit=examples,
            device="cpu",
            batch_size=self.args.batch_size,
        ).scores

    def by_commands(self, candidate: Settings, examples: int) -> Mapping[str, float]:
        """The same as two commands."""
        out, folder = Path(self.args.folder) / "candidate", Path(self.args.folder) / "commands"
        lab = ["--store", str(folder / "mergectl.duckdb"), "--threads", str(self.args.threads), "--device", "cpu"]
        start = [sys.executable, "-m", "mergectl", *lab, *(["--data", str(self.args.data)] if self.args.data else [])]
        scales = ",".join(f"{task}={value!r}" for task, value in candidate["scale"].items())
        merging = ["merge", self.args.method, "--base", str(self.args.base), "--experts", *map(str, self.args.experts)]
        merging += ["-o", str(out), "--force", "--scale", scales]
        rows = ["--split", "tune", "--limit", str(examples), "--batch-size", str(self.args.batch_size)]
        subprocess.run([*start, *merging], check=True, capture_output=True)
        asked = [*start, "--json", "eval", str(out), *rows, "--on", *self.tasks]
        told = subprocess.run(asked, check=True, capture_output=True, text=True).stdout
        return {row["task"]: row["score"] for row in json.loads(told)["tasks"]}

    def candidates(self) -> Iterator[Settings]:
        """Random coefficients from the range that a search would try."""
        limits = settings.settings_of(self.args.method)["scale"].between
        assert limits is not None
        low, high = limits.search or (limits.low, limits.high)
        rng = random.Random(self.args.seed)
        while True:
            yield {"scale": {task: rng.uniform(low, high) for task in self.family.experts}}


class Forward:
    """Counts what the model's own computing takes, from now on."""

    def __init__(self) -> None:
        self.wall, self.processor, self._real = 0.0, 0.0, bench.batch_logits

    def __call__(self, *args: Any, **more: Any) -> torch.Tensor:
        start = now()
        outputs = self._real(*args, **more)
        spent = now() - start
        self.wall += spent.wall
        self.processor += spent.processor
        return outputs


def compare(search: Search, examples: int, trials: int, forward: Forward) -> None:
    """Print trials a minute of the three ways, tried turn by turn on the same candidates."""
    fast, memory = search.judge(examples, fast=True), search.judge(examples, fast=False)
    candidates = list(itertools.islice(search.candidates(), trials + 1))
    assert fast.recombiner is not None
    once, _ = timed(lambda: fast.put(candidates[0]))
    fast(candidates[0])  # loads what the metrics need
    ways: dict[str, Callable[[Settings], Mapping[str, float]]] = {
        "fast": lambda candidate: fast(candidate).scores,
        "memory": lambda candidate: memory(candidate).scores,
        "disk": lambda candidate: search.on_disk(candidate, examples),
    }
    if search.args.commands:
        ways["commands"] = lambda candidate: search.by_commands(candidate, examples)
    spent: dict[str, list[Spent]] = {way: [] for way in ways}
    computing: list[Spent] = []
    found: dict[str, list[dict[str, float]]] = {}  # the scores of each candidate, way by way
    for candidate, way in itertools.product(candidates[1:], ways):
        before = Spent(forward.wall, forward.processor)
        each, scores = timed(functools.partial(ways[way], candidate))
        spent[way].append(each)
        found.setdefault(repr(candidate), []).append(dict(scores))
        if way == "fast":
            computing.append(Spent(forward.wall, forward.processor) - before)
    print(f"\n{examples} examples per task, {trials} trials each; once before them {once.wall:.1f} s for components")
    print(
        "| way | trials a minute | by processor | s per trial | fast is faster | by processor |\n" + "| --- " * 6 + "|"
    )
    for way, those in spent.items():
        wall, processor = (statistics.median(getattr(s, clock) for s in those) for clock in CLOCKS)
        by_wall, by_processor = ratios(those, spent["fast"])
        print(
            f"| {way} | {60 / wall:.1f} | {60 / processor:.1f} | {wall:.2f} | {by_wall:.2f} | {by_processor:.2f} |",
            flush=True,
        )
    same = sum(own == scores[0] for scores in found.values() for own in scores[1:])
    print(f"{same} of {len(found) * (len(ways) - 1)} times a slower way gave each task the same score, digit by digit")
    wall, processor = (1 - ratio for ratio in ratios(computing, spent["fast"]))
    print(f"beyond the model's computing: {wall:.1%} of a fast trial, {processor:.1%} by processor (goal: under 5 %)")


def ratios(those: list[Spent], these: list[Spent]) -> list[float]:
    """By both clocks the median of the ratios of runs that followed each other."""
    pairs = list(zip(those, these, strict=True))
    return [statistics.median(getattr(a, clock) / getattr(b, clock) for a, b in pairs) for clock in CLOCKS]


def prune(search: Search, examples: int, trials: int) -> None:
    """Print what pruning would have saved on fully evaluated candidates, and how good its winner is."""
    judge = search.judge(examples, fast=True)
    full: list[Verdict] = []
    rows: list[int] = []
    stopped: list[bool] = []
    best: Verdict | None = None
    for candidate in itertools.islice(search.candidates(), trials):
        look, cut = Pruner().watch(best), list[int]()
        full.append(judge(candidate, functools.partial(_noting, look, cut)))
        rows.append(cut[0] if cut else full[-1].rows)
        stopped.append(bool(cut))
        if not cut and (best is None or full[-1].mean > best.mean):
            best = full[-1]
    assert best is not None
    winner = max(full, key=lambda verdict: verdict.mean)
    saved = 1 - sum(rows) / sum(verdict.rows for verdict in full)
    print(f"\npruning, {trials} trials at {examples} examples: {sum(stopped)} stopped, {saved:.0%} of the rows saved")
    apart = 0.0 if best.mean == winner.mean else (winner.mean - best.mean) / noise(winner, best)
    print(f"winner: {best.mean:.4f} with pruning, {winner.mean:.4f} without, {apart:.1f} standard errors apart")


def _noting(look: Watch, cut: list[int], step: int, so_far: Verdict) -> bool:
    """Note at how many rows a candidate would have been stopped, and let it go on."""
    if not cut and look(step, so_far):
        cut.append(so_far.rows)
    return False


def noise(one: Verdict, other: Verdict) -> float:
    """The standard error of the difference of two candidates, as if the rows were a sample of many more."""
    total = 0.0
    for task, answers in one.answers.items():
        endless = replace(answers, total=10**9)
        assert difference(endless, answers.found) == 0
        total += variance(endless, other.answers[task].found)
    return float(total**0.5) / len(one.answers)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--experts", type=Path, nargs="+", required=True)
    parser.add_argument("--data", type=Path, help="where the tasks' data lie")
    parser.add_argument("--method", default="pcb", help="one that is linear in a scale per task")
    parser.add_argument("--examples", type=int, default=512, help="rows per task")
    parser.add_argument("--few", type=int, default=128, help="rows per task in a second comparison")
    parser.add_argument("--trials", type=int, default=3, help="candidates per comparison; 0: none")
    parser.add_argument("--pruned-trials", type=int, default=12, help="candidates to look at pruning with; 0: none")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--commands", action="store_true", help="try two commands per candidate, too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        args.folder = folder
        family = open_family(str(args.base), [(None, str(expert)) for expert in args.experts])
        lab = Lab(Path(folder) / "lab" / "mergectl.duckdb", data=args.data, device="cpu", threads=args.threads)
        search = Search(args, family, lab)
        lab.torch_device()
        print(f"{args.method} on {len(family.experts)} experts of {args.base.name}, {args.threads} threads")
        forward = Forward()
        bench.batch_logits = forward
        for examples in sorted({args.few, args.examples}) if args.trials else ():
            compare(search, examples, args.trials, forward)
        if args.pruned_trials:
            prune(search, args.examples, args.pruned_trials)


if __name__ == "__main__":
    main()
