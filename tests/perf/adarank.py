"""How fast and how small a step of AdaRank is, against the plain form: a graph through U diag(b s) V^T of every task.

    python -m tests.perf.adarank [--shape roberta vit] [--layers 1] [--repeats 3] [--kept 1 0.7 0.16]

Each row is a process of its own on one thread with random factors of the real shapes: a few of a model's twelve layers
(RoBERTa-base for 7 tasks with batches of 8 x 64 tokens, ViT-B/32 for 8 tasks with batches of 16 images of 50 tokens)
and the model's own forward and backward pass on them. Times are processor seconds, so that other work on the machine
matters little: of a step, of the model's passes, which all forms have in common, and of what is left, the building of
weights and the gradient of masks and coefficients; `12 layers` is a step of the whole model, without embeddings and
head. Memory is the peak of what is not page cache, without interpreter and libraries: factors, weights, gradients,
what a form keeps for its backward pass, and the model with its activations (`model's` is the peak of it alone, the
tasks one after the other). The plain form comes as the language program of the authors has it (`diag`, a dense diagonal
matrix) and with scaled columns (`scaled`), where the goal is set: a third of its time, half of its memory. `kept` is
the share of components that the masks keep.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.func import functional_call

from mergectl.methods import _adapting, _blend, _masked_ranks
from mergectl.methods._spectral import Factors
from mergectl.methods._task_vectors import TaskVectors
from tests.perf.processes import watched

TASKS = {"roberta": 7, "vit": 8}
FORMS = ("diag", "scaled", "ours")
LAYERS, GOAL_TIME, GOAL_MEMORY = 12, 1 / 3, 1 / 2
MATRICES = 6


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
    left = torch.randn(tasks * r, m, generator=chance) / m**0.5
    return Factors(left, values, torch.randn(tasks * r, n, generator=chance) / n**0.5)


class Setting:
    """Model, factors, masks and batches of one measurement."""

    def __init__(self, shape: str, layers: int, kept: float, folder: Path, *, factors: bool) -> None:
        self.tasks, self.kept, self.folder = TASKS[shape], kept, folder
        self.model, batch = model_of(shape, layers)
        self.model.eval().requires_grad_(False)
        self.batches = [batch(task) for task in range(self.tasks)]
        weights = dict(self.model.named_parameters())
        self.weights = {n: x for n, x in weights.items() if x.dim() == 2 and "layer" in n and n.endswith("weight")}
        assert len(self.weights) == MATRICES * layers
        chosen = list(self.weights.items()) if factors else []
        self.factors = {n: factors_of(x, self.tasks, i) for i, (n, x) in enumerate(chosen)}
        self.logits = {n: self.mask(x) for n, x in self.weights.items()}

    def mask(self, weight: torch.Tensor) -> torch.Tensor:
        r = min(weight.shape)
        row = torch.full((r,), -0.1)
        row[: round(self.kept * r)] = 0.1
        return row.repeat(self.tasks, 1)

    def entropy(self, weights: Mapping[str, torch.Tensor], task: int) -> torch.Tensor:
        hidden = functional_call(self.model, dict(weights), kwargs=self.batches[task]).last_hidden_state
        log = hidden[:, 0, :3].log_softmax(dim=-1)
        loss: torch.Tensor = -(log.exp() * log).sum(dim=-1).mean()
        return loss


def plain(setting: Setting, *, dense: bool) -> Callable[[], None]:
    """A step with a graph from the loss to masks and coefficients."""
    count = setting.tasks
    numbers = {n: torch.full((count,), 0.3, requires_grad=True) for n in setting.weights}
    logits = {n: x.clone().requires_grad_() for n, x in setting.logits.items()}
    parts = {}
    for name in list(setting.factors):
        rows = zip(*(x.chunk(count) for x in setting.factors.pop(name)), strict=True)
        parts[name] = [(u.mT.contiguous(), s, v.clone()) for u, s, v in rows]
    adam = torch.optim.Adam([*numbers.values(), *logits.values()], lr=1e-3)

    def step() -> None:
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
        torch.stack([setting.entropy(weights, task) for task in range(count)]).sum().backward()  # type: ignore[no-untyped-call]
        adam.step()

    return step


def ours(setting: Setting) -> Callable[[], None]:
    """A step as the method does it; the task vectors themselves lie in a file, as the experts do."""
    tasks = [str(task) for task in range(setting.tasks)]
    files: dict[str, torch.Tensor] = {}
    for number, (name, f) in enumerate(setting.factors.items()):
        shape = (setting.tasks, *setting.weights[name].shape)
        pages = np.memmap(setting.folder / f"{number}.bin", dtype=np.float32, mode="w+", shape=shape)
        for task, row in enumerate(pages):
            r = len(f.values) // setting.tasks
            part = slice(task * r, (task + 1) * r)
            row[:] = ((f.left[part].mT * f.values[part]) @ f.right[part]).numpy()
        pages.flush()
        del pages
        files[name] = torch.from_numpy(np.memmap(setting.folder / f"{number}.bin", np.float32, "c", shape=shape))
    vectors = TaskVectors(tasks, {n: x.shape for n, x in setting.weights.items()}, files.__getitem__)
    parts = {
        n: _masked_ranks.Ranks(setting.tasks, min(x.shape), lambda f=setting.factors[n]: f, lambda n=n: vectors[n])  # type: ignore[misc]
        for n, x in setting.weights.items()
    }
    origin = {n: x.detach() for n, x in setting.weights.items()}
    scales = [0.3] * setting.tasks
    blend = _blend.Blend(vectors, origin, parts, _blend.Rules(), scales, setting.logits)
    adam = _adapting.Adam(blend.numbers, 1e-3)

    def step() -> None:
        weights = blend.build()
        for task in range(setting.tasks):
            setting.entropy(weights, task).backward()  # type: ignore[no-untyped-call]
        adam.step(blend.numbers, blend.gradient())

    return step


def model_alone(setting: Setting) -> Callable[[], None]:
    """What both forms have in common: forward and backward passes of the model."""
    weights = {n: x.detach().clone().requires_grad_() for n, x in setting.weights.items()}

    def step() -> None:
        for task in range(setting.tasks):
            setting.entropy(weights, task).backward()  # type: ignore[no-untyped-call]

    return step


def libraries(setting: Setting) -> Callable[[], None]:
    """What a process needs before there is anything to merge: the code of the model and of its passes."""
    start = torch.ones(3, requires_grad=True)

    def step() -> None:
        (setting.entropy({}, 0) * start.sum()).backward()  # type: ignore[no-untyped-call]

    return step


def measured(form: str, shape: str, layers: int, kept: float, repeats: int) -> None:
    """Print the processor seconds of the fastest step, in this process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(shape, layers, kept, Path(folder), factors=form in FORMS)
        forms = {"diag": lambda: plain(setting, dense=True), "scaled": lambda: plain(setting, dense=False)}
        step = {**forms, "ours": lambda: ours(setting), "model": lambda: model_alone(setting),
                "libraries": lambda: libraries(setting)}[form]()  # fmt: skip
        took = []
        for _ in range(repeats):
            began = time.process_time()
            step()
            took.append(time.process_time() - began)
    print(json.dumps({"seconds": min(took)}))


def main() -> None:
    """Compare the forms and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kept", nargs="+", type=float, default=[1.0, 0.7, 0.16])
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        form, shape = args.child
        measured(form, shape, args.layers, args.kept[0], args.repeats)
        return
    table(args)


def child(form: str, shape: str, layers: int, repeats: int, kept: float) -> tuple[float, float]:
    """Measure one form in a process of its own: processor seconds of a step, and peak memory in MiB."""
    words = ["-m", "tests.perf.adarank", "--child", form, shape, "--layers", str(layers)]
    words += ["--repeats", str(repeats), "--kept", str(kept)]
    cost = watched([sys.executable, *words], {"OMP_NUM_THREADS": "1"})
    return json.loads(cost.output.splitlines()[-1])["seconds"], cost.anonymous


def table(args: argparse.Namespace) -> None:
    """Print a row per shape, share and form."""
    names = ["shape", "kept", "form", "s/step", "model's", "build and gradient", "12 layers"]
    names += ["faster: build and gradient", "step", "MiB", "model's", "of scaled's MiB: without model", "all"]
    print("|", " | ".join(names), "|\n" + "| --- " * len(names) + "|")
    for shape in args.shape:
        idle = child("libraries", shape, 0, 1, 1.0)[1]
        for kept in args.kept:
            rows: dict[str, tuple[float, float]] = {}
            for form in ("model", *FORMS):
                seconds, memory = child(form, shape, args.layers, args.repeats, kept)
                rows[form] = seconds, memory - idle
            (model, room), (seconds, mib) = rows["model"], rows["scaled"]
            for form in FORMS:
                own, memory = rows[form]
                times = [f"{own:.2f}", f"{model:.2f}", f"{own - model:.2f}", f"{LAYERS / args.layers * own:.0f}"]
                faster = [f"{(seconds - model) / (own - model):.1f}", f"{seconds / own:.1f}"]
                shares = [f"{(memory - room) / (mib - room):.2f}", f"{memory / mib:.2f}"]
                words = [shape, str(kept), form, *times, *faster, f"{memory:.0f}", f"{room:.0f}", *shares]
                print("|", " | ".join(words), "|", flush=True)
    print(f"\ngoals: at least {1 / GOAL_TIME:.0f} times faster and at most {GOAL_MEMORY} of the memory")


if __name__ == "__main__":
    main()
