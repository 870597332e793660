"""That merging takes no more memory for a larger model: peaks of every method on populations of 4 and of 12 GB.

    python -m tests.perf.memory [--small] [--methods ties emr ...] [--sizes 4 12]

All methods that work block by block are measured, if none is named; those that decompose whole matrices are not among
them.

The checkpoints are sparse files: of every weight a share is random, the rest is a hole that reads as zeros. The bound
is 512 MiB and twice the largest weight as it is stored, interpreter and libraries included, page cache not. The exit
code is 1 where a method goes beyond it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mergectl import settings
from mergectl.plan import recipe_of, steps_of
from tests.perf.checkpoints import drop, largest_weight, population, sparse_population
from tests.perf.processes import known, measure

MIB = 1 << 20
OFFERED = {"task_vectors", "experts", "base", "rng"}  # what a merge of files alone can supply


def streaming() -> list[str]:
    """The methods that need nothing but checkpoints, and of these no more than a block at a time."""
    found = []
    for name in settings.names():
        steps = [settings.describe(word) for word in (name, *settings.describe(name).refine)]
        if all({key for key, must in step.supplies.items() if must} <= OFFERED for step in steps) and in_blocks(name):
            found.append(name)
    return found


def in_blocks(name: str) -> bool:
    """Say whether a method as it is by default takes blocks in all its steps; one that decomposes matrices does not."""
    return all(settings.blocks_of(step.name, step.settings) for step in steps_of(recipe_of(name), ["a", "b"]))


def peaks(methods: Sequence[str], home: Path, gigabytes: float, args: argparse.Namespace) -> dict[str, float]:
    """Merge one population by every method and remove each result at once: MiB by method."""
    paths = sparse_population(home, gigabytes * 1e9, args.small, args.filled)
    bound = 512 + 2 * largest_weight(paths[0]) / MIB
    print(f"{gigabytes:g} GB: a base and {len(paths) - 1} experts; the bound is {bound:.0f} MiB\n")
    print("| method | seconds | peak MiB | within the bound |\n| --- | --- | --- | --- |")
    found = {}
    warm = population(args.folder, "llama", 0.01)
    for method in methods:
        taken = measure(method, paths, args.folder / "out", args.threads, warm)
        drop(args.folder / "out")
        found[method] = taken.mib / bound
        within = "yes" if taken.mib <= bound else "NO"
        print(f"| {method} | {taken.seconds:.1f} | {taken.mib:.0f} | {within} |", flush=True)
    print()
    drop(home)
    return found


def main() -> None:
    """Print the peaks and say which methods go beyond the bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "mergectl-perf-memory")
    parser.add_argument("--small", action="store_true", help="0.4 and 1.2 GB of narrower layers")
    parser.add_argument("--sizes", type=float, nargs="*", help="gigabytes of base and experts together")
    parser.add_argument("--filled", type=float, default=0.3, help="share of every weight that is not zero")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--methods", nargs="*", help="all that work block by block, if left out")
    args = parser.parse_args()
    sizes = args.sizes or ([0.4, 1.2] if args.small else [4, 12])
    args.folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(args.folder).free / 1e9) < 2 * max(sizes):
        raise SystemExit(f"{args.folder} has {free:.0f} GB free, {2 * max(sizes):.0f} are needed. Name a --folder.")
    os.environ["XDG_CACHE_HOME"] = str(args.folder / "cache")
    methods = known(args.methods) if args.methods else streaming()
    drop(args.folder / "out", args.folder / "out-warm")
    shares = [peaks(methods, args.folder / f"sparse-{n:g}", n, args) for n in sizes]
    if beyond := [method for method in methods if any(share[method] > 1 for share in shares)]:
        print(f"beyond the bound: {', '.join(beyond)}")
        sys.exit(1)


if __name__ == "__main__":
    main()
