"""How fast PAVE purifies an expert, against the plain form: a singular value decomposition and an inverse.

    python -m tests.perf.pave [--width 768] [--rank-scale 0.875] [--pairs 3]

Makes one layer of RoBERTa-base's shapes (four square weights, one into and one out of the wider inner layer) with
random weights and moments, and purifies each in turn: in the plain form, U_r S_r V_r^T C^-1 of `torch.linalg.svd(W C)`,
in float32 and in float64, and as `pave` does, which multiplies in float32 and decomposes in float64; all on one thread.
Printed are the best processor seconds of several such rounds, per shape and per layer, and what they make for the 72
weights of twelve layers and for eight experts: extrapolated, not measured. Another rank is a merge whose decompositions
are remembered. The last columns are the largest differences from the plain form in float64, in the largest weight.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mergectl import settings
from mergectl.methods import _ranks, _spectral, pave
from mergectl.methods._task_vectors import TaskVectors

GOAL = 3  # times faster than the plain form in float32, over the shapes of a layer
LAYERS, EXPERTS = 12, 8
Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # base, expert, moment


@dataclass(frozen=True)
class Times:
    """Processor seconds of one weight in each form."""

    single: float
    double: float
    ours: float
    again: float
    wrong: float  # the plain form in float32
    differs: float


def layer(out: int, width: int, seed: int) -> Layer:
    """A weight, its fine-tuned form, and moments of inputs whose sizes spread over two decades, some of them large."""
    draw = torch.Generator().manual_seed(seed)
    base = 0.04 * torch.randn(out, width, generator=draw)
    sizes = torch.logspace(0.3, -1.7, width)[torch.randperm(width, generator=draw)]
    sizes[:3] = 15.0
    x = torch.randn(4096, width, generator=draw) * sizes
    return base, base + 0.002 * torch.randn(out, width, generator=draw), x.mT @ x / 4096


def plain(layer: Layer, rank: int, dtype: torch.dtype) -> torch.Tensor:
    """The task vector of the truncated decomposition times the inverse."""
    base, expert, moment = (x.to(dtype) for x in layer)
    damped = moment + 0.1 * torch.eye(len(moment), dtype=dtype)
    u, s, vt = torch.linalg.svd(expert @ damped, full_matrices=False)
    found: torch.Tensor = (u[:, :rank] * s[:rank]) @ vt[:rank] @ torch.linalg.inv(damped) - base
    return found


def ours(layer: Layer, share: float, memory: Any) -> torch.Tensor:
    """The task vector that the refinement gives, with its decomposition kept in a memory."""
    base, expert, moment = layer
    vectors = TaskVectors(["a"], {"w.weight": tuple(base.shape)}, lambda name: (expert - base)[None])
    given = settings.check("pave", {"rank_scale": share, "allocation": "none"}, ["a"])
    refined = pave.refine(vectors, {"w.weight": base}, {"a": {"w.weight": moment}}, None, memory, **given)
    found: torch.Tensor = refined["w.weight"][0]
    return found


def took(work: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    """Processor seconds of a piece of work, and its result."""
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


def measure(layer: Layer, share: float, pairs: int) -> Times:
    """The best times of a weight, all forms in turn."""
    rank = _ranks.rank_of(share, min(layer[0].shape))
    rows: list[tuple[float, ...]] = []
    for _ in range(pairs):
        memory = _spectral.remembering(None)
        work: list[Callable[[], torch.Tensor]] = [
            functools.partial(plain, layer, rank, torch.float32),
            functools.partial(plain, layer, rank, torch.float64),
            functools.partial(ours, layer, share, memory),
            functools.partial(ours, layer, (share + 1) / 2, memory),
        ]
        found = [took(part) for part in work]
        rows.append(tuple(seconds for seconds, _ in found))
    wrong, differs = (
        float((found[form][1] - found[1][1]).abs().max() / layer[1].abs().max()) for form in (0, 2)
    )  # fmt: skip
    single, double, mine, again = (min(column) for column in zip(*rows, strict=True))
    return Times(single, double, mine, again, wrong, differs)


def line(name: str, times: Times) -> str:
    """A row of the table."""
    ratio = f"{times.single / times.ours:.1f} | {times.double / times.ours:.1f}"
    seconds = " | ".join(f"{value:.3f}" for value in (times.single, times.double, times.ours))
    return f"| {name} | {seconds} | {ratio} | {times.again:.3f} | {times.wrong:.0e} | {times.differs:.0e} |"


def total(parts: Sequence[Times]) -> Times:
    """What several weights take together."""
    return Times(
        sum(part.single for part in parts), sum(part.double for part in parts), sum(part.ours for part in parts),
        sum(part.again for part in parts), max(part.wrong for part in parts), max(part.differs for part in parts),
    )  # fmt: skip


def scaled(times: Times, factor: int) -> Times:
    """What so many of the same take."""
    return Times(
        times.single * factor, times.double * factor, times.ours * factor, times.again * factor, times.wrong,
        times.differs,
    )  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rank-scale", type=float, default=0.875)
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    wide = 4 * args.width
    print("| weight | plain float32 s | plain float64 s | pave s | times faster than float32 | than float64 |", end="")
    print(" another rank s | float32 differs by | pave differs by |\n" + "| --- " * 9 + "|")
    parts = []
    for count, shape in ((4, (args.width, args.width)), (1, (wide, args.width)), (1, (args.width, wide))):
        found = measure(layer(*shape, seed=0), args.rank_scale, args.pairs)
        print(line(f"{shape[0]} x {shape[1]}", found), flush=True)
        parts.append(scaled(found, count))
    one = total(parts)
    print(line("one layer (4 + 1 + 1)", one))
    print(line(f"one expert: {LAYERS} layers, extrapolated", scaled(one, LAYERS)))
    print(line(f"{EXPERTS} experts, extrapolated", scaled(one, LAYERS * EXPERTS)))
    print(f"\ngoal: {GOAL} times faster than the plain form in float32: {one.single / one.ours:.1f}")


if __name__ == "__main__":
    main()
