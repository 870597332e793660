"""The supply `entropy`: how sure a merged model is of its answers to unlabelled rows of every task.

The candidate weights stand in for those of one live model, whose heads are the experts' and frozen: nothing is copied.
Tasks take turns, each with a backward pass of its own, so that no more than one task's activations are in memory.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergectl.errors import UserError, did_you_mean
from mergectl.families import Family
from mergectl.lab import Lab
from mergectl.methods._contract import MergeWarning
from mergectl.models import head_labels
from mergectl.naming import live_names, live_tensors, match

if TYPE_CHECKING:
    import torch

    from mergectl.benchmarks._contract import Task, Use
    from mergectl.live import LiveModel

FILE = "adaptation.safetensors"  # in a model's folder
NUMBERS = {"batch_size": 1, "limit": 1, "score_every": 0, "score_limit": 1}  # the least that each may be


@dataclass(frozen=True)
class AdaptOptions:
    """On which rows an adaptation looks, and how."""

    on: Use = "tune"  # `report` is the papers' test-time setting: to be asked for, and noted
    batch_size: int = 16  # rows per task and step
    limit: int | None = None  # rows per task to draw from
    dtype: str = "float32"  # of the model's computations; weights are always built in float32
    entropy: str = "row"  # or batch_mean: of the mean prediction of a batch, as one program has it
    eps: float = 0.0  # added within the logarithm
    score_every: int | None = None  # steps after which the model is scored on `tune`, to look at; 0: never
    score_limit: int = 200  # rows per task of such a score
    start_from: str | None = None  # a model's folder: begin with the numbers that were learned for it


def read_options(given: Mapping[str, Any]) -> AdaptOptions:
    """Check what the user said, as values or as typed."""
    from mergectl.bench import AUTOCAST

    known = {field.name for field in fields(AdaptOptions)}
    found = {key.replace("-", "_"): value for key, value in given.items()}
    if unknown := [key for key in found if key not in known]:
        raise UserError(f"--adapt has no '{unknown[0]}'.{did_you_mean(unknown[0], known)}")
    try:
        found |= {key: int(found[key]) for key in NUMBERS if found.get(key) is not None}
        found |= {"eps": float(found.get("eps", 0.0))}
    except (TypeError, ValueError) as error:
        raise UserError(f"--adapt wants a number there: {error}.") from error
    options = AdaptOptions(**found)
    words = {"on": ("tune", "fit", "report"), "entropy": ("row", "batch_mean"), "dtype": tuple(AUTOCAST)}
    for key, allowed in words.items():
        if (value := getattr(options, key)) not in allowed:
            option = "--adapt-on" if key == "on" else f"--adapt {key}"
            raise UserError(f"{option} must be one of {', '.join(allowed)}, got '{value}'.")
    for key, least in NUMBERS.items():
        if (number := getattr(options, key)) is not None and number < least:
            raise UserError(f"--adapt {key} must be at least {least}, got {number}.")
    if options.start_from is not None and not learned_file(options.start_from).exists():
        raise UserError(f"--adapt start_from={options.start_from}: there is no {FILE}, so nothing was learned there.")
    if not 0 <= options.eps < 1:
        raise UserError(f"--adapt eps must lie between 0 and 1, got {options.eps}.")
    return options


def learned_file(folder: str) -> Path:
    """Where an adaptation has left its numbers."""
    return Path(folder) / FILE


@dataclass(frozen=True)
class Draws:
    """Which rows of a task make up the batch of a step: all of them in turn, shuffled anew each time around."""

    task: str
    rows: int
    batch_size: int
    seed: int

    def __call__(self, step: int) -> list[int]:
        """Return the row numbers; the last batch of a round may be short."""
        import numpy as np

        turn, place = divmod(step, -(-self.rows // self.batch_size))
        digest = hashlib.sha256(repr((self.seed, self.task, turn)).encode()).digest()
        order = np.random.default_rng(int.from_bytes(digest[:8], "little")).permutation(self.rows)
        return [int(row) for row in order[place * self.batch_size : (place + 1) * self.batch_size]]


class LabEntropy:
    """The sum over tasks of the mean prediction entropy on the batches of a step; gradients are added to `.grad`.

    `by_task` holds each task's part of the last value. Labels are not even kept.
    """

    def __init__(self, lab: Lab, family: Family, options: AdaptOptions) -> None:
        """Load the model with the heads of the experts."""
        import torch

        from mergectl.heads import open_live

        self.lab, self.options, self.tasks = lab, options, tasks_of(lab, family)
        heads = {task: family.experts[name] for task, name in family.answering.items()}
        self.live: LiveModel = open_live(family.base, self.tasks, heads=heads, device=lab.torch_device())
        self.live.model.requires_grad_(False)
        self.device, self.threads = self.live.device, torch.get_num_threads()
        self._merged = frozenset(family.population.base)
        self.expert_of = family.answering
        learning = [task for task in self.tasks if len(head_labels(task)) > 1]
        for task in (task for task in self.tasks if task not in learning):
            warnings.warn(f"{task.id} contributes no loss: its head has one output.", MergeWarning, stacklevel=2)
        self._learning, self._examples = {task.id: task for task in learning}, dict[str, Sequence[Any]]()
        self._paths: dict[str, str] | None = None  # where the live model computes with a weight
        self._slots: dict[str, str] = {}  # whose weights are lent to it
        self.by_task: dict[str, float] = {}

    def _batch(self, task: str, step: int) -> dict[str, torch.Tensor]:
        """The inputs of a step; rows are read when they are first asked for."""
        from mergectl.benchmarks import _rows

        options, preparer = self.options, self.live.preparer_of(task)
        if task not in self._examples:
            how: dict[str, Any] = {"data": self.lab.data, "limit": options.limit, "seed": self.lab.seed}
            rows = _rows.load(self._learning[task], options.on, **how)
            self._examples[task] = preparer.prepare(self._learning[task], rows.columns)
        draws = Draws(task, len(self._examples[task]), options.batch_size, self.lab.seed)
        batch = preparer.stack([self._examples[task][row] for row in draws(step)])
        return preparer.finish({name: x.to(self.device) for name, x in batch.items()})

    def __call__(self, weights: Mapping[str, torch.Tensor], step: int) -> float:
        """Return the entropy of a step, with each weight's gradient added to it."""
        import torch

        if self._paths is None:
            self._paths = self._find_paths(weights)
        self._lend(weights)
        own = {path: weights[name] for name, path in self._paths.items()}
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            self.by_task = {task: self._backward(task, own, step) for task in self._learning}
        finally:
            torch.set_num_threads(before)
        return sum(self.by_task.values())

    def _backward(self, task: str, weights: Mapping[str, torch.Tensor], step: int) -> float:
        import torch
        from torch.func import functional_call

        from mergectl.bench import autocast

        inputs, model = self._batch(task, step), self.live.use(task)
        with autocast(self.device.split(":")[0], self.options.dtype):
            logits = functional_call(model, dict(weights), kwargs=inputs, strict=False).logits.float()
        loss = entropy_of(logits, self.options)
        if loss.requires_grad:
            torch.autograd.backward(loss)
        return float(loss.detach())

    def _find_paths(self, weights: Mapping[str, torch.Tensor]) -> dict[str, str]:
        """For each candidate weight the name under which the live model computes with it."""
        if self._merged - weights.keys():
            raise UserError("A method that adapts learns all weights together: give its settings one value each.")
        slots, unknown = match(weights, self.live.backbone, self.live.prefix)
        names = live_names(self.live.model)
        for slot, name in slots.items():
            if self.live.backbone[slot].shape != weights[name].shape:
                raise UserError(
                    f"'{name}' has another number of tokens in some model. Adapting needs models of one vocabulary."
                )
        if lost := [name for name in unknown if name not in self.live.unused]:
            raise UserError(f"The {self.live.prefix} model has no weight '{lost[0]}', so it cannot be adapted.")
        learned = {name for name, x in weights.items() if x.requires_grad}
        if not learned & set(slots.values()):
            raise UserError("None of the weights to be learned has a place in the model that is adapted.")
        self._slots = slots
        return {name: names[slot] for slot, name in slots.items()}

    def _lend(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Let the live model's own weights be these, so that no second backbone is in memory and none is copied."""
        live = live_tensors(self.live.model)
        for slot, name in self._slots.items():
            live[slot].data = weights[name].detach().to(live[slot].device, live[slot].dtype)
            self.live.backbone[slot] = live[slot].data

    def score(self, weights: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Score weights on `tune`, to look at; nothing is chosen by it."""
        from mergectl.bench import make_bench, score_model

        self._lend(weights)
        how: dict[str, Any] = {"split": "tune", "data": self.lab.data, "seed": self.lab.seed}
        found = {}
        for task in self.tasks:
            bench = make_bench(task, self.live.preparer_of(task.id), limit=self.options.score_limit, **how)
            found[task.id] = score_model(self.live, bench, dtype=self.options.dtype)["score"]
        return found


def entropy_of(logits: torch.Tensor, options: AdaptOptions) -> torch.Tensor:
    """Return the mean over rows of -sum p log p."""
    log = (logits.mean(dim=0, keepdim=True) if options.entropy == "batch_mean" else logits).log_softmax(dim=-1)
    inner = (log.exp() + options.eps).log() if options.eps else log
    return -(log.exp() * inner).sum(dim=-1).mean()


def tasks_of(lab: Lab, family: Family) -> list[Task]:
    """The tasks of a merge, checked: the entropy over the labels of at least one of them can be minimised."""
    named = [task for task in family.answering if "/" in task]
    if lost := [name for name, task in family.task_ids.items() if "/" not in task]:
        raise UserError(f"The expert '{lost[0]}' does not say which task it is for. Name it: --experts suite/task=...")
    tasks = lab.tasks(named)
    if worded := [task.id for task in tasks if task.kind == "text_to_text"]:
        raise UserError(f"{worded[0]} is answered in words; entropy is minimised over the labels of classifiers only.")
    alone = [task.id for task in tasks if len(head_labels(task)) == 1]
    if len(alone) == len(tasks):
        raise UserError(
            f"Every head has one output ({', '.join(alone)}), whose entropy is 0: there is nothing to learn."
        )
    return tasks


def facts(options: AdaptOptions, tasks: Mapping[str, Any], lab: Lab) -> dict[str, Any]:
    """What decides an adaptation besides the recipe, for the record; `tasks` are the versions of their rows."""
    data = None if lab.data is None else str(lab.data.absolute())
    found = {**asdict(options), "tasks": dict(tasks), "data": data, "seed": lab.seed}
    if options.start_from is not None:
        found["start_from"] = hashlib.sha256(learned_file(options.start_from).read_bytes()).hexdigest()
    return {"adapt": found}
