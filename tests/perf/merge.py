"""How fast and how small merging is, against copying the same bytes (and mergekit where it is installed).

    python -m tests.perf.merge [--family roberta|llama] [--threads N] [--mergekit /path/to/bin/mergekit-yaml]

Makes random checkpoints of real shapes (`--scale 0.05` for a quick look), merges them by every method in a process of
its own and prints, per method, the seconds without start-up of interpreter and libraries, their ratio to the copy floor
(read the method's inputs once, write as much as it wrote once, measured beside it: by one thread, as `cp` does, and by
as many as the merge has), processor seconds with their ratio (on a busy machine the steadier one), and the peak of
memory that is not page cache. Digests of the inputs are known, as
after a first merge; `--fresh-digests` forgets them.
With `--mergekit`, both programs run the same recipe as whole processes, and their results are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mergectl.checkpoints import open_checkpoint
from tests.perf.checkpoints import DTYPE, EXPERTS, difference, drop, files, population, size
from tests.perf.processes import chosen, known, measure, watched

PIECE = 1 << 22
# The most of the copy floor that a method may take; None: no goal is set.
GOALS = {
    "average": 2, "task_arithmetic": 2, "slerp": 2, "ties_tensor": 6, "ties": 10, "pcb": 10, "medusa": None, "emr": 6,
    "dare_task_arithmetic": 6, "dare_ties": 6, "della": None, "breadcrumbs": None,
}  # fmt: skip
# mergekit's word for a method of ours, and how many times faster we want to be as a whole process.
RIVALS = {
    "average": ("linear", None), "task_arithmetic": ("task_arithmetic", 3), "slerp": ("slerp", None),
    "ties_tensor": ("ties", 15),
}  # fmt: skip


def copy_floor(inputs: Sequence[Path], written: int, out: Path, threads: int) -> tuple[float, float]:
    """Seconds and processor seconds to read every input once and to write so many bytes, in reused buffers."""
    spans = [(file, start) for path in inputs for file in files(path) for start in range(0, file.stat().st_size, PIECE)]
    if written > PIECE * len(spans):
        raise SystemExit(f"{written} bytes are more than were read: the copy floor says nothing about this method.")
    target = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    sources = {file: os.open(file, os.O_RDONLY) for file in {file for file, _ in spans}}

    def copy(first: int) -> None:
        buffer = memoryview(bytearray(PIECE))
        for number in range(first, len(spans), threads):
            file, start = spans[number]
            os.preadv(sources[file], [buffer], start)
            if (rest := written - number * PIECE) > 0:
                os.pwrite(target, buffer[:rest], number * PIECE)

    began, busy = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(copy, range(threads)))
    took = time.perf_counter() - began, time.process_time() - busy
    for descriptor in (target, *sources.values()):
        os.close(descriptor)
    out.unlink()
    return took


def print_floor(paths: Sequence[Path], out: Path, threads: int) -> None:
    """Print the copy floor of all inputs, once they are in the page cache."""
    one = sum(file.stat().st_size for file in files(paths[0]))
    copy_floor(paths, one, out, 1)
    best = {n: min(copy_floor(paths, one, out, n)[0] for _ in range(3)) for n in sorted({1, threads})}
    print(f"copy floor of all inputs ({len(paths)} x {one / 1e6:.0f} MB read, one written):")
    print(", ".join(f"{n} thread{'s' * (n > 1)} {seconds:.2f} s" for n, seconds in best.items()), end="; ")
    print("measured anew beside every merge\n")


def table(args: argparse.Namespace, paths: Sequence[Path], warm: Sequence[Path]) -> None:
    """Print what every method takes: the repeat whose ratio to its floor is the middle one."""
    out, spare = args.folder / "out", args.folder / "floor.bin"
    columns = "method | inputs | seconds | floor | of the floor | goal | of the threads' | processor s | of the floor's"
    print(f"| {columns} | peak MiB |\n" + "| --- " * 10 + "|")
    for method in known(args.methods):
        base, experts = chosen(method, paths)
        inputs = [*([] if base is None else [base]), *experts]
        rows = []
        for _ in range(args.repeats):
            if args.fresh_digests:
                drop(args.folder / "cache")
            found = measure(method, paths, out, args.threads, warm)
            floor, busy = copy_floor(inputs, size(out), spare, 1)
            shared, _ = copy_floor(inputs, size(out), spare, args.threads)
            drop(out)
            rows.append((found.seconds / floor, floor, found.seconds / shared, busy, found))
        ratio = statistics.median_low(row[0] for row in rows)
        _, floor, of_threads, busy, found = next(row for row in rows if row[0] == ratio)
        goal = GOALS.get(method)
        print(
            f"| {method} | {len(inputs)} | {found.seconds:.2f} | {floor:.2f} | {ratio:.1f} | "
            f"{'-' if goal is None else f'<= {goal}'} | {of_threads:.1f} | "
            f"{found.processor:.1f} | {found.processor / busy:.1f} | {found.mib:.0f} |",
            flush=True,
        )


def recipe(method: str, paths: Sequence[Path], dtype: str) -> dict[str, object]:
    """The recipe that both programs read."""
    word, _ = RIVALS[method]
    base, experts = chosen(method, paths)
    each = {"weight": 1.0} if method == "average" else {"weight": 0.4, "density": 0.2}
    if method == "task_arithmetic":
        del each["density"]
    models = [{"model": str(path), **({} if method == "slerp" else {"parameters": each})} for path in experts]
    found: dict[str, object] = {"merge_method": word, "models": models, "dtype": dtype}
    if method == "slerp":
        return found | {"base_model": str(experts[0]), "parameters": {"t": 0.5}}
    return found if base is None else found | {"base_model": str(base)}


def rivalry(args: argparse.Namespace, paths: Sequence[Path]) -> None:
    """Print both programs' whole processes on one recipe, in turn, and how far their results differ."""
    print("\nwhole processes, one recipe, in turn; digests of the inputs not known; median of the pairs by ratio\n")
    print(
        "| method | mergectl s | mergekit s | times faster | goal | processor s | resident MiB | not cache MiB |",
        end="",
    )
    print(" differs by | in share |\n" + "| --- " * 10 + "|")
    ours, theirs, file = args.folder / "ours", args.folder / "theirs", args.folder / "recipe.yml"
    threads = str(args.threads)
    for method in (m for m in known(args.methods) if m in RIVALS):
        file.write_text(json.dumps(recipe(method, paths, DTYPE[args.family])))
        pairs = []
        for _ in range(args.pairs):
            drop(ours, theirs, args.folder / "cache")
            words = [sys.executable, "-m", "mergectl", "merge", "-c", str(file), "-o", str(ours), "--threads", threads]
            lab = ["--store", str(args.folder / "lab" / "mergectl.duckdb"), "--quiet"]
            own = watched([*words, *lab], {})
            words = [args.mergekit, str(file), str(theirs), "--quiet", "--no-copy-tokenizer", "-j", threads]
            pairs.append((own, watched(words, {"HF_HUB_OFFLINE": "1"})))
        ratio = statistics.median_low(rival.seconds / own.seconds for own, rival in pairs)
        own, rival = next(pair for pair in pairs if pair[1].seconds / pair[0].seconds == ratio)
        worst, share = difference(ours, theirs)
        drop(ours, theirs, args.folder / "lab")
        goal = RIVALS[method][1]
        print(
            f"| {method} | {own.seconds:.1f} | {rival.seconds:.1f} | {ratio:.1f} | {f'>= {goal}' if goal else '-'} | "
            f"{own.processor:.1f} : {rival.processor:.1f} | {own.resident:.0f} : {rival.resident:.0f} | "
            f"{own.anonymous:.0f} : {rival.anonymous:.0f} | {worst:.1e} | {share:.1e} |",
            flush=True,
        )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "mergectl-perf")
    parser.add_argument("--family", choices=list(EXPERTS), default="roberta")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the tokens and layers of the real model")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=list(GOALS))
    parser.add_argument("--fresh-digests", action="store_true", help="count the first reading for digests, too")
    parser.add_argument("--mergekit", help="the rival's mergekit-yaml, where it is installed")
    parser.add_argument("--pairs", type=int, default=1, help="runs of both programs")
    parser.add_argument("--only-mergekit", action="store_true", help="skip the table of methods")
    args = parser.parse_args()
    if args.mergekit and not os.access(args.mergekit, os.X_OK):
        raise SystemExit(f"{args.mergekit} is no program. Name the mergekit-yaml of an environment with mergekit.")
    paths = population(args.folder, args.family, args.scale)
    warm = population(args.folder, args.family, 0.01)
    print(f"{args.family}: a base and {len(paths) - 1} experts, {DTYPE[args.family]}, {args.threads} threads")
    print_floor(paths, args.folder / "floor.bin", args.threads)
    drop(args.folder / "out", args.folder / "out-warm")
    os.environ["XDG_CACHE_HOME"] = str(args.folder / "cache")
    for path in (*paths, *warm):
        _ = open_checkpoint(str(path)).digest
    if not args.only_mergekit:
        table(args, paths, warm)
    if args.mergekit:
        rivalry(args, paths)


if __name__ == "__main__":
    main()
