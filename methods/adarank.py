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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch

from mergectl.methods import _adapting, _blend, _linears, _masked_ranks, _spectral, cart
from mergectl.methods._contract import Beside, Between, Merged, MergeWarning, OneOf, Remember

if TYPE_CHECKING:
    from mergectl.methods._task_vectors import TaskVectors

TITLE = "AdaRank"
PAPER = "arXiv:2503.22178"
NEUTRAL = {"steps": 0, "start": "cart"}
LOGITS = {False: (0.1, -0.1), True: (2.0, 0.0)}  # of kept and pruned components at first; soft masks: True
BARRIER = 0.1  # how far a logit has to go before it changes its bit
NEVER = f"a logit has to go {BARRIER:g}, and goes lr at most. Take more steps, or a higher lr."
FIRST_SHARE = "share of components kept at first; ta 1, others 0.16, for images 0: one over the number of tasks"
FIRST_SCALE, RATE = "coefficient to start from; ta 0.3, cart 2, others 1", "Adam's rate; images 0.001, texts 0.00005"
MASKED = "which matrices have masks: linear layers but CLIP's projection (auto), or as for CART; full, all: tables, too"
CLAMP, WIDE_CLAMP = (0.0, 1.0), (-0.5, 2.0)


@dataclass(frozen=True)
class Start:
    """A model to begin from: one of CART's origins, and how much of what experts differ from it is added at first."""

    origin: str
    ratio: float  # share of components
    scale: float
    own_scale: float = 1.0  # the origin's


STARTS = {
    "ta": Start("base", 1.0, 0.3),
    "cart": Start("average", 0.16, 2.0),
    "tsv": Start("tsv", 0.16, 1.0),
    "ta_cart": Start("task_arithmetic", 0.16, 1.0, 0.3),
    "cart_cart": Start("cart", 0.16, 1.0),
}


def merge(
    task_vectors: TaskVectors,
    base: TaskVectors,
    entropy: _adapting.Entropy,
    linears: Mapping[str, bool] | None = None,
    remember: Remember | None = None,
    watch: _adapting.Watch | None = None,
    *,
    start: Annotated[str, OneOf(STARTS), "begin from the base (ta), the experts' mean (cart) or another merge"] = "ta",
    rank_ratio: Annotated[float | None, Between(0.0, 1.0, search=(0.01, 1.0)), FIRST_SHARE] = None,
    scale: Annotated[float | None, Between(-10.0, 10.0, search=(0.1, 3.0)), FIRST_SCALE] = None,
    steps: Annotated[int, Between(0, 10_000_000, search=(100, 10_000)), "steps of Adam, a batch per task each"] = 5000,
    lr: Annotated[float | None, Between(0.0, 10.0, low_open=True, search=(1e-5, 1e-2)), RATE] = None,
    temperature: Annotated[float, Between(0.0, 1000.0, low_open=True), "of the masks' sigmoid"] = 10.0,
    soft_mask: Annotated[bool, "weigh components by their chance instead of keeping or pruning them"] = False,
    clamp: Annotated[bool, "use coefficients clamped to [0, 1]"] = False,
    extend_clamp: Annotated[bool, Beside("clamp", (True,)), "with clamp: to [-0.5, 2] instead"] = False,
    normalize: Annotated[bool, "use the coefficients' softmax over tasks"] = False,
    decompose: Annotated[str, OneOf(["auto", *_spectral.RULES]), MASKED] = "auto",
    hold: Annotated[str, OneOf(_masked_ranks.HOLD), _masked_ranks.HOLD_HELP] = "float32",
    patience: Annotated[int, Between(0, 1_000_000), "stop if that many steps bring no lower entropy; 0: never"] = 0,
) -> Merged:
    """Yield for each weight the sum of the components left, under the learned coefficients."""
    rate = (1e-3 if _adapting.is_vision(task_vectors) else 5e-5) if lr is None else lr
    limits = (WIDE_CLAMP if extend_clamp else CLAMP) if clamp else None
    rules = _blend.Rules(limits, normalize, temperature, soft_mask)
    outset = Outset(start, rank_ratio, scale, decompose, hold)
    blend = outset.blend(task_vectors, base, linears, remember, rules, _adapting.device_of(entropy))

    def ready(left: int) -> None:
        if blend.masked and 0 < steps * rate < BARRIER and not soft_mask and left * rate < nearest(blend):
            warnings.warn(f"masks cannot change in {steps} steps at lr {rate:g}: {NEVER}", MergeWarning, stacklevel=2)

    _adapting.adapt(blend, entropy, watch, steps=steps, rate=rate, patience=patience, ready=ready)
    yield from blend.changes(base)


def nearest(blend: _blend.Blend) -> float:
    """Return how far the logit that is nearest to its border is from it; what was learned before may have moved it."""
    logits = [blend.logits(name, blend.numbers) for name in blend.masked]
    return min((float(x.abs().min()) for x in logits if x.numel()), default=BARRIER)


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
        begin, (kept, pruned), ratio = STARTS[self.start], LOGITS[rules.soft], self.rank_ratio
        if ratio is None:
            ratio = begin.ratio
        elif vision and ratio == 0:
            ratio = 1 / tasks
        memory = _spectral.remembering(remember) if self.hold == "disk" else remember or _spectral.plainly
        shift, of = self.shift(task_vectors, linears, memory)
        vectors = task_vectors if shift is None else task_vectors.map(lambda name, x: x.double() - shift(name, x))
        kit = _masked_ranks.Kit(vectors, memory, of, self.hold, device, ratio)
        parts = kit.parts(self.merged(task_vectors, vision), self.masked(task_vectors, linears))
        ranks = {name: part for name, part in parts.items() if isinstance(part, _masked_ranks.Ranks)}
        logits = {name: kit.logits(name, part, kept, pruned) for name, part in ranks.items()}
        origin = {n: base[n] if shift is None else base[n] + shift(n, task_vectors[n]) for n in task_vectors}
        origin = {name: x.float().to(device) for name, x in origin.items()}  # the base's own may be mapped from disk
        scales = [begin.scale if self.scale is None else self.scale] * tasks
        return _blend.Blend(task_vectors, origin, parts, rules, scales, logits)

    @property
    def rule(self) -> str:
        """Which matrices are decomposed, in the words of all spectral methods."""
        return "linear" if self.decompose == "auto" else self.decompose

    def shift(
        self, task_vectors: TaskVectors, linears: Mapping[str, bool] | None, memory: Remember
    ) -> tuple[Callable[[str, torch.Tensor], torch.Tensor] | None, str]:
        """Return what gives the origin less the base, nothing for the base, and words for what differs from it."""
        begin, names = STARTS[self.start], _spectral.decomposed(self.rule, linears, task_vectors)
        if begin.origin == "base" or not len(task_vectors):
            return None, ""

        def make(name: str, x: torch.Tensor) -> tuple[torch.Tensor, str]:
            weight = cart.Weight(name, task_vectors.tasks, x, name in names, 1, memory)
            return cart.origin_of(weight, begin.origin, begin.own_scale, None, begin.ratio)

        if begin.origin == "average":  # quickly made, so that it is not kept
            return lambda name, x: make(name, x)[0], make(name := next(iter(task_vectors)), task_vectors[name])[1]
        found = task_vectors.survey(make)
        made = {name: x.float() for name, (x, _) in zip(task_vectors, found, strict=True)}
        return lambda name, x: made[name].to(x.device), found[0][1]

    def merged(self, task_vectors: TaskVectors, vision: bool) -> list[str]:
        """Return the weights that have coefficients: all of an image model, without token tables of any other."""
        every = vision or self.decompose in ("full", "all")
        return [name for name in task_vectors if every or not _linears.is_table(name)]

    def masked(self, task_vectors: TaskVectors, linears: Mapping[str, bool] | None) -> list[str]:
        """Return the matrices that have masks."""
        names = _spectral.decomposed(self.rule, linears, task_vectors)
        return [name for name in names if self.decompose != "auto" or not _adapting.is_projection(name)]
