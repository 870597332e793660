"""Learn which singular components of each task vector to add, and how much of it, by the entropy (AdaRank).

>>> from mergectl import merge_weights
>>> import torch
>>> base = {"w": torch.zeros(2, 2)}
>>> experts = {"a": {"w": torch.diag(torch.tensor([4.0, 2.0]))}, "b": {"w": torch.diag(torch.tensor([0.0, 8.0]))}}
>>> falling = {"entropy": lambda weights, step: (weights["w"] * torch.tensor([[-1.0, 0.0], [0.0, 1.0]])).sum()}
>>> how = {"start": "ta", "scale": 0.5, "lr": 0.2, "temperature": 10.0}
>>> merge_weights("adarank", base, experts, supplies=falling, steps=0, **how)["w"].tolist()
[[2.0, 0.0], [0.0, 5.0]]
>>> # one step of length 0.2: logits 0.1 - 0.2 prune the components at the second place, which raise this entropy,
>>> # and a's first one stays; its coefficient goes to 0.7 (-4 + 2 < 0), that of b to 0.3
>>> w = merge_weights("adarank", base, experts, supplies=falling, steps=1, **how)["w"]
>>> [[round(v, 4) for v in row] for row in w.tolist()]
[[2.8, 0.0], [0.0, 0.0]]

W = origin + sum over tasks of coefficient * U diag(b * s) V^T; origin and vectors are the base and theta - base (start
ta), or the mean of the experts and theta - mean (start cart). A component is kept (b = 1) while its logit is above 0.
The gradient passes straight through b, so that a pruned component can come back: with G that of W, q = u^T G v and
p = sigmoid(logit / temperature), a coefficient has sum(b s q), a logit coefficient * s * q * p (1 - p) / temperature.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch

from mergectl.methods import _adapting, _blend, _kernels, _linears, _masked_ranks, _spectral
from mergectl.methods._contract import Between, Merged, MergeWarning, OneOf, Remember

if TYPE_CHECKING:
    from mergectl.methods._task_vectors import TaskVectors

TITLE = "AdaRank"
PAPER = "arXiv:2503.22178"
NEUTRAL = {"steps": 0, "start": "cart"}
STARTS: dict[str, tuple[float, float]] = {"ta": (1.0, 0.3), "cart": (0.16, 2.0)}  # share of components, scale
LOGITS = {False: (0.1, -0.1), True: (2.0, 0.0)}  # of kept and pruned components at first; soft masks: True
BARRIER = 0.1  # how far a logit has to go before it changes its bit
NEVER = f"a logit has to go {BARRIER:g}, and goes lr at most. Take more steps, or a higher lr."
FIRST_SHARE = "share of components kept at first; ta 1, cart 0.16, for images 0: one over the number of tasks"
FIRST_SCALE, RATE = "coefficient to start from; ta 0.3, cart 2", "Adam's learning rate; images 0.001, texts 0.00005"
MASKED = "which matrices have masks: linear layers but CLIP's projection (auto), or as for CART; full, all: tables, too"
CLAMP, WIDE_CLAMP = (0.0, 1.0), (-0.5, 2.0)
FROM_MEAN = "differences from the average"


def merge(
    task_vectors: TaskVectors,
    base: TaskVectors,
    entropy: _adapting.Entropy,
    linears: Mapping[str, bool] | None = None,
    remember: Remember | None = None,
    watch: _adapting.Watch | None = None,
    *,
    start: Annotated[str, OneOf(STARTS), "begin from the base (task arithmetic) or the experts' mean (CART)"] = "ta",
    rank_ratio: Annotated[float | None, Between(0.0, 1.0, search=(0.01, 1.0)), FIRST_SHARE] = None,
    scale: Annotated[float | None, Between(-10.0, 10.0, search=(0.1, 3.0)), FIRST_SCALE] = None,
    steps: Annotated[int, Between(0, 10_000_000, search=(100, 10_000)), "steps of Adam, a batch per task each"] = 5000,
    lr: Annotated[float | None, Between(0.0, 10.0, low_open=True, search=(1e-5, 1e-2)), RATE] = None,
    temperature: Annotated[float, Between(0.0, 1000.0, low_open=True), "of the masks' sigmoid"] = 10.0,
    soft_mask: Annotated[bool, "weigh components by their chance instead of keeping or pruning them"] = False,
    clamp: Annotated[bool, "use coefficients clamped to [0, 1]"] = False,
    extend_clamp: Annotated[bool, "with clamp: to [-0.5, 2] instead"] = False,
    normalize: Annotated[bool, "use the coefficients' softmax over tasks"] = False,
    decompose: Annotated[str, OneOf(["auto", *_spectral.RULES]), MASKED] = "auto",
    hold: Annotated[str, OneOf(_masked_ranks.HOLD), _masked_ranks.HOLD_HELP] = "float32",
    patience: Annotated[int, Between(0, 1_000_000), "stop if that many steps bring no lower entropy; 0: never"] = 0,
) -> Merged:
    """Yield for each weight the sum of the components left, under the learned coefficients."""
    rate = (1e-3 if _adapting.is_vision(task_vectors) else 5e-5) if lr is None else lr
    limits = (WIDE_CLAMP if extend_clamp else CLAMP) if clamp else None
    rules = _blend.Rules(False, limits, normalize, temperature, soft_mask)
    outset = Outset(start, rank_ratio, scale, decompose, hold)
    blend = outset.blend(task_vectors, base, linears, remember, rules, _adapting.device_of(entropy))
    if blend.masked and 0 < steps * rate < BARRIER and not soft_mask:
        warnings.warn(f"masks cannot change in {steps} steps at lr {rate:g}: {NEVER}", MergeWarning, stacklevel=2)
    _adapting.adapt(blend, entropy, watch, steps=steps, rate=rate, patience=patience)
    yield from blend.changes(base)


@dataclass(frozen=True)
class Outset:
    """Where the learning begins, and which weights take part in it."""

    start: str
    rank_ratio: float | None
    scale: float | None
    decompose: str
    hold: str

    def blend(
        self, task_vectors: TaskVectors, base: TaskVectors, linears: Mapping[str, bool] | None,
        remember: Remember | None, rules: _blend.Rules, device: torch.device,
    ) -> _blend.Blend:  # fmt: skip
        """Return the merge as a function of what is to be learned."""
        tasks, vision = len(task_vectors.tasks), _adapting.is_vision(task_vectors)
        (ratio, scale), (kept, pruned) = STARTS[self.start], LOGITS[rules.soft]
        if self.rank_ratio is not None:
            ratio = 1 / tasks if vision and self.rank_ratio == 0 else self.rank_ratio
        cart = self.start == "cart"
        vectors = task_vectors.map(lambda name, x: x.double() - mean(x)) if cart else task_vectors
        memory = _spectral.remembering(remember) if self.hold == "disk" else remember or _spectral.plainly
        kit = _masked_ranks.Kit(vectors, memory, FROM_MEAN if cart else "", self.hold, device, ratio)
        parts = kit.parts(self.merged(task_vectors, vision), self.masked(task_vectors, linears))
        ranks = {name: part for name, part in parts.items() if isinstance(part, _masked_ranks.Ranks)}
        logits = {name: kit.logits(name, part, kept, pruned) for name, part in ranks.items()}
        origin = {name: base[name] + mean(task_vectors[name]) if cart else base[name] for name in task_vectors}
        origin = {name: x.float().to(device, copy=True) for name, x in origin.items()}
        scales = [scale if self.scale is None else self.scale] * tasks
        return _blend.Blend(task_vectors, origin, parts, rules, scales, logits)

    def merged(self, task_vectors: TaskVectors, vision: bool) -> list[str]:
        """Return the weights that have coefficients: all of an image model, without token tables of any other."""
        every = vision or self.decompose in ("full", "all")
        return [name for name in task_vectors if every or not _linears.is_table(name)]

    def masked(self, task_vectors: TaskVectors, linears: Mapping[str, bool] | None) -> list[str]:
        """Return the matrices that have masks."""
        rule = "linear" if self.decompose == "auto" else self.decompose
        names = _spectral.decomposed(rule, linears, task_vectors)
        return [name for name in names if self.decompose != "auto" or not _adapting.is_projection(name)]


def mean(x: torch.Tensor) -> torch.Tensor:
    """Return the mean over tasks, in float64."""
    return _kernels.total(x) / len(x)
