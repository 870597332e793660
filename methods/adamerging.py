"""Learn a scaling coefficient per task, or per task and weight, by the entropy of predictions (AdaMerging).

>>> from mergectl import merge_weights
>>> import torch
>>> base = {"w": torch.zeros(2)}
>>> experts = {"a": {"w": torch.tensor([2.0, 0.0])}, "b": {"w": torch.tensor([0.0, 1.0])}}
>>> falling = {"entropy": lambda weights, step: (weights["w"] * torch.tensor([1.0, -1.0])).sum()}
>>> # Adam's first step has the length lr: 0.3 - 0.1 for a, whose vector raises this entropy, 0.3 + 0.1 for b
>>> w = merge_weights("adamerging", base, experts, supplies=falling, steps=1, lr=0.1)["w"]
>>> [round(v, 4) for v in w.tolist()]
[0.4, 0.4]
>>> w = merge_weights("adamerging", base, experts, supplies=falling, steps=2, lr=0.1, clamp=True)["w"]
>>> [round(v, 4) for v in w.tolist()]
[0.2, 0.5]

W = base + sum over tasks of coefficient * task vector. AdaMerging++ first trims task vectors as TIES does and keeps of
each what agrees with the elected sign. Heads are never merged, and no label is ever read.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import torch

from mergectl.methods import _adapting, _blend, _kernels, _linears, ties
from mergectl.methods._contract import Beside, Between, Merged, OneOf, PerTask, Split
from mergectl.methods._kernels import per_task

if TYPE_CHECKING:
    from mergectl.methods._task_vectors import TaskVectors

TITLE = "AdaMerging"
PAPER = "arXiv:2310.02575"
NEUTRAL = {"steps": 0, "scale": Split(1.0), "density": 1.0}
PRESETS: dict[str, dict[str, Any]] = {
    "adamerging_taskwise": {"granularity": "task"},
    "adamerging_layerwise": {"granularity": "layer"},
    "adamerging_plus": {"plus": True},
}
CLAMP = (0.0, 1.0)
BLOCK = re.compile(r"(.*?\.)?\d+(?=\.)")  # the name of a transformer block, as encoder.layer.3
# Which weights share a coefficient, by the name under which it is kept.
GROUPS: dict[str, Callable[[str], str]] = {
    "layer": lambda name: name,  # none, as in the paper
    "block": lambda name: found[0] if (found := BLOCK.match(name)) else "outside of blocks",
    "task": lambda name: "*",
}
# Which weights are merged; the others stay those of the base.
PARAMETERS: dict[str, Callable[[str, bool], bool]] = {
    "backbone": lambda name, vision: not _adapting.is_projection(name),
    "encoder": lambda name, vision: not _adapting.is_projection(name) and (vision or not _linears.is_table(name)),
    "all": lambda name, vision: True,
}


def merge(
    task_vectors: TaskVectors,
    base: TaskVectors,
    entropy: _adapting.Entropy,
    watch: _adapting.Watch | None = None,
    *,
    granularity: Annotated[str, OneOf(GROUPS), "a coefficient per task and weight, and block, or per task"] = "layer",
    scale: Annotated[PerTask, Between(-10.0, 10.0, search=(0.1, 0.6)), "scaling coefficient to start from"] = 0.3,
    steps: Annotated[int, Between(0, 10_000_000, search=(100, 2000)), "steps of Adam, one batch per task each"] = 1000,
    lr: Annotated[float, Between(0.0, 10.0, low_open=True, search=(1e-4, 1e-2)), "Adam's learning rate"] = 1e-3,
    clamp: Annotated[bool, "use coefficients clamped to [0, 1]"] = False,
    normalize: Annotated[bool, "use the coefficients' softmax over tasks"] = False,
    plus: Annotated[bool, "AdaMerging++: trim task vectors and drop what opposes the elected sign"] = False,
    density: Annotated[
        float, Between(0.0, 1.0, search=(0.05, 1.0)), Beside("plus", (True,)), "plus: share of each task vector kept"
    ] = 0.2,
    parameters: Annotated[
        str, OneOf(PARAMETERS), "merge the backbone (without CLIP's projection), it without token tables, or all"
    ] = "backbone",
    hold: Annotated[str, OneOf(_blend.HOLD), _blend.HOLD_HELP] = "float32",
    patience: Annotated[int, Between(0, 1_000_000), "stop if that many steps bring no lower entropy; 0: never"] = 0,
) -> Merged:
    """Yield for each weight the sum of task vectors under the learned coefficients."""
    vectors, vision = agreeing(task_vectors, density) if plus else task_vectors, _adapting.is_vision(task_vectors)
    device = _adapting.device_of(entropy)
    chosen = vectors.only(name for name in vectors if PARAMETERS[parameters](name, vision))
    rows = chosen.survey(lambda name, x: _blend.Dense(_blend.held(vectors, name, x, hold, device)))
    origin = {name: base[name].float().to(device) for name in task_vectors}
    rules, scales = _blend.Rules(CLAMP if clamp else None, normalize), per_task(scale, len(task_vectors.tasks))
    groups = {name: GROUPS[granularity](name) for name in chosen}
    blend = _blend.Blend(task_vectors, origin, dict(zip(chosen, rows, strict=True)), rules, scales, {}, groups)
    _adapting.adapt(blend, entropy, watch, steps=steps, rate=lr, patience=patience)
    yield from blend.changes(base)


def agreeing(task_vectors: TaskVectors, density: float) -> TaskVectors:
    """Return task vectors trimmed over the whole model, of which only what has the elected sign is left."""
    how = ties.Trimming([density] * len(task_vectors.tasks), 0.0, by_tensor=False, round_up=False, compat=False,
                        exact=False)  # fmt: skip
    left, floors = ties.top_entries(task_vectors, how)
    trimmed = left.map(lambda name, x: _kernels.keep_above(x, floors))
    sign_of = ties.elected(trimmed, "mass", "majority", None)
    assert sign_of is not None  # there was an election

    def keep(name: str, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x * sign_of(name, x) > 0, x, 0)

    return trimmed.map(keep)
