"""How fast and how small a step of AdaRank is, against the plain form: a graph through U diag(b s) V^T of every task.

    python -m tests.perf.adarank [--shape roberta vit] [--layers 1] [--repeats 3] [--kept 1 0.7 0.16] [--form ours]

Each row is a process of its own on one thread with random factors of the real shapes: a few of a model's twelve layers
(RoBERTa-base for 7 tasks with batches of 8 x 64 tokens, ViT-B/32 for 8 tasks with batches of 16 images of 50 tokens)
and the model's own forward and backward pass on them. Times are processor seconds, so that other work on the machine
matters little: of a whole step, and of its `own` part, which is all but the model's passes (weights are built from
masks and coefficients; their gradients, random ones, become those of masks and coefficients, which Adam moves). `12
layers` is a step of the whole model, without embeddings and head; `model` its passes alone. Memory is the peak of whole
steps that is not page cache, without interpreter and libraries: factors, weights, gradients, what a form keeps for its
backward pass, and the model with its activations. The plain form comes as the language program of the authors has it
(`diag`, a dense diagonal matrix) and improved by scaled columns (`scaled`). The goals, a third of the own time and half
of the memory, are for `diag`. `kept` is the share of components that the masks keep; `ours` holds factors as `--hold`
says.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.func import functional_call

from mergectl.methods import _blend, _descent, _masked_ranks
from mergectl.methods._spectral import Factors
from mergectl.methods._task_vectors import TaskVectors
from tests.perf.processes import watched

TASKS = {"roberta": 7, "vit": 8}
HOLD = {"ours": "float32", "ours, bfloat16": "bfloat16", "ours, disk": "disk"}
FORMS = ("diag", "scaled", *HOLD)
RIVALS = ("diag", "scaled")  # the plain form as it is published, and improved
LAYERS, GOAL_TIME, GOAL_MEMORY = 12, 3, 0.5
MATRICES = 6
Weights: TypeAlias = Mapping[str, torch.Tensor]
Step: TypeAlias = "Callable[[Weights | None], None]"  # a whole one, or from given gradients of the weights on


def model_of(shape: str, layers: int) -> tuple[Any, Callable[[int], dict[str, torch.Tensor]]]:
    """A model of a few layers with random weights, and what makes the batch of a task."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, RobertaConfig, RobertaModel

    chance = torch.Generator().manual_seed(0)
    if shape == "roberta":
        config = RobertaConfig(num_hidden_layers=layers, vocab_size=100)
        return RobertaModel(config, add_pooling_layer=False), lambda task: {
            "input_ids": torch.randint(5, 100, (8, 64), generator=chance)
        }
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "patch_size": 32}
    vision = CLIPVisionConfig(num_hidden_layers=layers, image_size=224, **sizes)
    return CLIPVisionModel(vision), lambda task: {"pixel_values": torch.randn(16, 3, 224, 224, generator=chance)}


def factors_of(weight: torch.Tensor, tasks: int, seed: int) -> Factors:
    """Random factors of all tasks, of the size of a fine-tuned model's."""
    chance, (m, n) = torch.Generator().manual_seed(seed), weight.shape
    r = min(m, n)
    values = torch.logspace(-1, -4, r).repeat(tasks)
    left = torch.randn(tasks * r, m, generator=chance).div_(m**0.5)
    return Factors(left, values, torch.randn(tasks * r, n, generator=chance).div_(n**0.5))


class Setting:
    """Model, factors, masks and batches of one measurement."""

    def __init__(self, shape: str, layers: int, kept: float, folder: Path) -> None:
        self.tasks, self.kept, self.folder = TASKS[shape], kept, folder
        self.model, batch = model_of(shape, layers)
        self.model.eval().requires_grad_(False)
        self.batches = [batch(task) for task in range(self.tasks)]
        weights = dict(self.model.named_parameters())
        self.weights = {n: x for n, x in weights.items() if x.dim() == 2 and "layer" in n and n.endswith("weight")}
        assert len(self.weights) == MATRICES * layers
        self.shapes = {name: x.shape for name, x in self.weights.items()}
        self.numbers = {name: number for number, name in enumerate(self.weights)}
        self.logits = {n: self.mask(x) for n, x in self.weights.items()}

    def factors(self, name: str) -> Factors:
        return factors_of(self.weights[name], self.tasks, self.numbers[name])

    def mask(self, weight: torch.Tensor) -> torch.Tensor:
        r = min(weight.shape)
        row = torch.full((r,), -0.1)
        row[: round(self.kept * r)] = 0.1
        return row.repeat(self.tasks, 1)

    def entropy(self, weights: Weights, task: int) -> torch.Tensor:
        hidden = functional_call(self.model, dict(weights), kwargs=self.batches[task]).last_hidden_state
        log = hidden[:, 0, :3].log_softmax(dim=-1)
        loss: torch.Tensor = -(log.exp() * log).sum(dim=-1).mean()
        return loss


def plain(setting: Setting, *, dense: bool) -> Step:
    """A step with a graph from the loss to masks and coefficients."""
    count = setting.tasks
    numbers = {n: torch.full((count,), 0.3, requires_grad=True) for n in setting.weights}
    logits = {n: x.clone().requires_grad_() for n, x in setting.logits.items()}
    parts = {}
    for name in setting.weights:
        rows = zip(*(x.chunk(count) for x in setting.factors(name)), strict=True)
        parts[name] = [(u.mT.contiguous(), s, v.clone()) for u, s, v in rows]
    adam = torch.optim.Adam([*numbers.values(), *logits.values()], lr=1e-3)

    def step(grads: Weights | None) -> None:
        weights = {}
        for name, base in setting.weights.items():
            built = base
            for task, (u, s, v) in enumerate(parts[name]):
                chance = (logits[name][task] / 10).sigmoid()
                amount = (chance + ((logits[name][task] > 0).float() - chance).detach()) * s
                product = u @ torch.diag(amount) @ v if dense else (u * amount) @ v
                built = built + numbers[name][task] * product
            weights[name] = built
        adam.zero_grad()
        if grads is None:
            torch.stack([setting.entropy(weights, task) for task in range(count)]).sum().backward()  # type: ignore[no-untyped-call]
        else:
            torch.autograd.backward([*weights.values()], [*grads.values()])
        adam.step()

    return step


def on_disk(path: Path, rows: Iterable[torch.Tensor]) -> torch.Tensor:
    """Write rows into a file and return them mapped, as the weights of a checkpoint are."""
    count, shape = 0, torch.Size()
    with path.open("wb") as file:
        for row in rows:
            file.write(row.contiguous().numpy().data)
            count, shape = count + 1, row.shape
    return torch.from_numpy(np.memmap(path, np.float32, "c", shape=(count, *shape)))


def held(factors: Factors, how: str, path: Path) -> Factors:
    """Return factors as the method holds them."""
    left, values, right = factors
    if how == "disk":
        return Factors(*(on_disk(path.with_suffix(f".{i}"), x) for i, x in enumerate(factors)))
    half = torch.bfloat16 if how == "bfloat16" else torch.float32
    return Factors(left.to(half), values, right.to(half))


def ours(setting: Setting, how: str) -> Step:
    """A step as the method does it; base and task vectors lie in files, and the model computes with what is built."""
    count, files, origin, factors = setting.tasks, {}, {}, {}
    for name in list(setting.weights):
        path, f = setting.folder / str(setting.numbers[name]), setting.factors(name)
        rows = zip(*(x.chunk(count) for x in f), strict=True)
        files[name] = on_disk(path.with_suffix(".vectors"), ((u.mT * s) @ v for u, s, v in rows))
        factors[name] = held(f, how, path)
        origin[name] = on_disk(path.with_suffix(".base"), setting.weights.pop(name).detach())
        del f
    vectors = TaskVectors([str(task) for task in range(count)], {n: x.shape for n, x in origin.items()},
                          files.__getitem__)  # fmt: skip
    parts = {
        n: _masked_ranks.Ranks(count, min(x.shape), lambda f=factors[n]: f, lambda n=n: vectors[n])  # type: ignore[misc]
        for n, x in origin.items()
    }
    blend = _blend.Blend(vectors, origin, parts, _blend.Rules(), [0.3] * count, setting.logits)
    adam = _descent.Adam(blend.numbers, 1e-3)
    for name, x in dict(setting.model.named_parameters()).items():
        x.data = blend.weights[name].detach() if name in blend.weights else x.data

    def step(grads: Weights | None) -> None:
        weights = blend.build()
        for task in range(count if grads is None else 0):
            setting.entropy(weights, task).backward()  # type: ignore[no-untyped-call]
        for name, grad in (grads or {}).items():
            weights[name].grad = grad
        adam.step(blend.numbers, blend.gradient())

    return step


def model_alone(setting: Setting) -> Step:
    """What both forms have in common: forward and backward passes of the model."""
    weights = {n: x.detach().clone().requires_grad_() for n, x in setting.weights.items()}

    def step(grads: Weights | None) -> None:
        for task in range(setting.tasks if grads is None else 0):
            setting.entropy(weights, task).backward()  # type: ignore[no-untyped-call]

    return step


def libraries(setting: Setting) -> Step:
    """What a process needs before there is anything to merge: the code of the model and of its passes."""
    start = torch.ones(3, requires_grad=True)

    def step(grads: Weights | None) -> None:
        (setting.entropy({}, 0) * start.sum()).backward()  # type: ignore[no-untyped-call]

    return step


def measured(form: str, shape: str, layers: int, kept: float, repeats: int) -> None:
    """Print the processor seconds of the fastest step, with and without the model's passes, in this process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(shape, layers, kept, Path(folder))
        forms = {"diag": lambda: plain(setting, dense=True), "scaled": lambda: plain(setting, dense=False),
                 "model": lambda: model_alone(setting), "libraries": lambda: libraries(setting)}  # fmt: skip
        step = ours(setting, HOLD[form]) if form in HOLD else forms[form]()
        whole = fastest(lambda: step(None), repeats)
        chance = torch.Generator().manual_seed(1)
        grads = {name: torch.randn(shape, generator=chance) for name, shape in setting.shapes.items()}
        own = fastest(lambda: step(grads), repeats)
    print(json.dumps({"step": whole, "own": own}))


def fastest(work: Callable[[], None], repeats: int) -> float:
    """Return the least processor seconds that some work takes."""
    took = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        took.append(time.process_time() - began)
    return min(took)


def main() -> None:
    """Compare the forms and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kept", nargs="+", type=float, default=[1.0, 0.7, 0.16])
    parser.add_argument("--form", nargs="+", default=list(HOLD), choices=list(HOLD))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        form, shape = args.child
        measured(form, shape, args.layers, args.kept[0], args.repeats)
        return
    table(args)


def child(form: str, shape: str, layers: int, repeats: int, kept: float) -> tuple[float, float, float]:
    """Measure one form in a process of its own: processor seconds of a step, of its own part, and peak MiB."""
    words = ["-m", "tests.perf.adarank", "--child", form, shape, "--layers", str(layers)]
    words += ["--repeats", str(repeats), "--kept", str(kept)]
    cost = watched([sys.executable, *words], {"OMP_NUM_THREADS": "1"})
    found = json.loads(cost.output.splitlines()[-1])
    return found["step"], found["own"], cost.anonymous


def table(args: argparse.Namespace) -> None:
    """Print a row per shape, share and form."""
    names = ["shape", "kept", "form", "own s", "s/step", "12 layers", "MiB"]
    names += [f"of {rival}'s: {what}" for rival in RIVALS for what in ("own s", "step", "MiB")]
    print("|", " | ".join(names), "|\n" + "| --- " * len(names) + "|")
    for shape in args.shape:
        idle = child("libraries", shape, 0, 1, 1.0)[2]
        for kept in args.kept:
            rows: dict[str, tuple[float, float, float]] = {}
            for form in ("model", *(form for form in FORMS if form in (*RIVALS, *args.form))):
                whole, own, memory = child(form, shape, args.layers, args.repeats, kept)
                rows[form] = own, whole, memory - idle
            for form, (own, whole, memory) in rows.items():
                words = [shape, str(kept), form, f"{own:.2f}", f"{whole:.2f}", f"{LAYERS / args.layers * whole:.0f}"]
                words += [f"{memory:.0f}"]
                for rival in RIVALS if form != "model" else ():
                    words += [f"1/{rows[rival][0] / own:.1f}", f"1/{rows[rival][1] / whole:.1f}"]
                    words += [f"{memory / rows[rival][2]:.2f}"]
                print("|", " | ".join(words), "|", flush=True)
    print(f"\ngoals, of {RIVALS[0]}: own seconds at most 1/{GOAL_TIME}, memory at most {GOAL_MEMORY}")


if __name__ == "__main__":
    main()
