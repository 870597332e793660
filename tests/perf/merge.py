"""How fast and how small merging is, against copying the same bytes (and mergekit where it is installed).

    python -m tests.perf.merge [--folder DIR] [--family roberta|llama] [--mergekit /path/to/bin/mergekit-yaml]

Makes random checkpoints of real shapes, merges them by every method in a process of its own and prints, per method,
the seconds without interpreter and library start-up, their ratio to the copy floor (read every input once, write the
output once, measured in the same run), and the peak of memory that is not page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHUNK = 1 << 22
METHODS = (
    "average", "task_arithmetic", "slerp", "ties_tensor", "ties", "medusa", "emr", "dare_task_arithmetic", "dare_ties",
)  # fmt: skip

RUN = """
import json, sys, threading, time
import torch
import mergectl.merging, mergectl.settings, mergectl.writing, duckdb
from pathlib import Path
from mergectl.families import open_family
from mergectl.merge import MergeJob, merge
from mergectl.plan import recipe_of

method, base, out, threads, *experts = sys.argv[1:]
torch.set_num_threads(int(threads))
mergectl.settings.describe(method)
peak, done = [0], threading.Event()

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

def watch():
    while not done.wait(0.01):
        peak[0] = max(peak[0], anonymous())

start = anonymous()
threading.Thread(target=watch, daemon=True).start()
began = time.perf_counter()
family = open_family(base, [(f"t{i}", path) for i, path in enumerate(experts)])
job = MergeJob(recipe_of(method), tuple((None, path) for path in experts), base)
merge(job, family, Path(out), facts={}, force=False, progress=lambda *_: None)
seconds = time.perf_counter() - began
done.set()
print(json.dumps({"seconds": seconds, "mib": (peak[0] - start) / 1024}))
"""


def shapes(family: str) -> dict[str, tuple[int, ...]]:
    """The weights of a RoBERTa-base, or of a Llama of half a billion parameters."""
    found: dict[str, tuple[int, ...]] = {}
    if family == "roberta":
        found = {"embeddings.word": (50265, 768), "embeddings.position": (514, 768)}
        for i in range(12):
            layer = f"encoder.layer.{i}."
            found |= {layer + name: (768, 768) for name in ("query", "key", "value", "output")}
            found |= {layer + "up": (3072, 768), layer + "down": (768, 3072)}
            found |= {layer + name: (768,) for name in ("b1", "b2", "b3", "b4", "norm1", "norm2")}
        return found
    found = {"embed_tokens": (32000, 1024), "lm_head": (32000, 1024)}
    for i in range(30):
        layer = f"layers.{i}."
        found |= {layer + name: (1024, 1024) for name in ("q", "k", "v", "o")}
        found |= {layer + name: (3584, 1024) for name in ("gate", "up")} | {layer + "down": (1024, 3584)}
        found |= {layer + name: (1024,) for name in ("norm1", "norm2")}
    return found


def population(folder: Path, family: str, experts: int) -> list[Path]:
    """Write a base and its experts, once."""
    import torch
    from safetensors.torch import save_file

    dtype = torch.float32 if family == "roberta" else torch.bfloat16
    paths = [folder / family / name for name in ["base", *(f"expert{i}" for i in range(experts))]]
    for seed, path in enumerate(paths):
        if (path / "config.json").exists():
            continue
        path.mkdir(parents=True, exist_ok=True)
        chance = torch.Generator().manual_seed(seed)
        start = torch.Generator().manual_seed(0)
        weights = {}
        for name, shape in shapes(family).items():
            weight = 0.02 * torch.randn(shape, generator=start)
            weights[name] = (weight + (0.001 * torch.randn(shape, generator=chance) if seed else 0)).to(dtype)
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text('{"model_type": "test"}')
    return paths


def copy_floor(paths: list[Path], out: Path) -> float:
    """Read every input once and write as much as one of them, in reused buffers."""
    buffer = bytearray(CHUNK)
    began = time.perf_counter()
    with out.open("wb", buffering=0) as target:
        for number, path in enumerate(paths):
            with (path / "model.safetensors").open("rb", buffering=0) as source:
                while size := source.readinto(buffer):
                    if number == 0:
                        target.write(memoryview(buffer)[:size])
    seconds = time.perf_counter() - began
    out.unlink()
    return seconds


def measure(method: str, paths: list[Path], out: Path, threads: int) -> dict[str, float]:
    """Merge once in a fresh process."""
    chosen = paths[:3] if method == "slerp" else paths
    words = [method, str(paths[0]), str(out), str(threads), *map(str, chosen[1:])]
    done = subprocess.run([sys.executable, "-c", RUN, *words], capture_output=True, text=True, check=True)
    shutil.rmtree(out)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def mergekit(program: str, method: str, paths: list[Path], out: Path) -> float:
    """The whole process of the rival on the same files."""
    models = [{"model": str(p), "parameters": {"weight": 0.4, "density": 0.2}} for p in paths[1:]]
    recipe = {"merge_method": method, "base_model": str(paths[0]), "models": models, "dtype": "float32"}
    file = out.with_suffix(".yml")
    file.write_text(json.dumps(recipe))
    began = time.perf_counter()
    subprocess.run([program, str(file), str(out)], check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "mergectl-perf")
    parser.add_argument("--family", choices=["roberta", "llama"], default="roberta")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--mergekit", help="the rival's mergekit-yaml, where it is installed")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    args = parser.parse_args()
    paths = population(args.folder, args.family, 4 if args.family == "roberta" else 3)
    copy_floor(paths, args.folder / "floor.bin")
    floor = min(copy_floor(paths, args.folder / "floor.bin") for _ in range(3))
    print(f"{args.family}, {len(paths) - 1} experts and the base, {args.threads} threads: copy floor {floor:.2f} s\n")
    print("| method | seconds | of the floor | peak MiB |\n| --- | --- | --- | --- |")
    for method in args.methods:
        best = min(
            (measure(method, paths, args.folder / "out", args.threads) for _ in range(2)), key=lambda f: f["seconds"]
        )
        print(f"| {method} | {best['seconds']:.2f} | {best['seconds'] / floor:.1f} | {best['mib']:.0f} |", flush=True)
    for method in ("task_arithmetic", "ties") if args.mergekit else ():
        print(
            f"mergekit {method}: {mergekit(args.mergekit, method, paths, args.folder / 'rival'):.1f} s (whole process)"
        )


if __name__ == "__main__":
    main()
