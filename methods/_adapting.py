"""Learn the numbers of a merge by Adam on the prediction entropy of unlabelled inputs.

The merged weights are leaves: the entropy's gradient with respect to them is taken as it is, and what it means for
coefficients and masks follows in closed form, weight by weight. No graph is kept through the merge.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from mergectl.methods._contract import MethodError
from mergectl.methods._descent import Adam

if TYPE_CHECKING:
    from mergectl.methods._blend import Blend


class Entropy(Protocol):
    """`entropy(weights, step)`: the sum over tasks of the mean prediction entropy on the unlabelled batches of a step.

    It is a scalar to be differentiated with respect to the weights that require it; or a plain number, where the
    gradients have been added to their `.grad` already, task by task. It may say on which `device` it wants weights.
    """

    def __call__(self, weights: Mapping[str, torch.Tensor], step: int) -> torch.Tensor | float:
        """Return the entropy of the candidate weights."""
        ...


class Watch(Protocol):
    """`watch(learned)` follows an adaptation: it is called after every step, and once more at the end.

    A true answer stops. With a method `resume` it is asked first for the `state` that it kept of the same adaptation.
    """

    def __call__(self, learned: Learned) -> bool | None:
        """Take note of a step; say whether that is enough."""
        ...


class Learned:
    """What an adaptation has learned after a step, as its watcher sees it; nothing here is to be changed."""

    def __init__(
        self, blend: Blend, adam: Adam, entropy: Entropy, steps: int, losses: list[float], *, done: bool
    ) -> None:
        """Take the adaptation's own objects; everything else is worked out when asked for."""
        self._blend, self._adam, self.entropy, self.losses = blend, adam, entropy, losses
        self.step, self.steps, self.tasks, self.done = adam.steps, steps, blend.tasks, done

    @property
    def coefficients(self) -> dict[str, torch.Tensor]:
        """The stored coefficients [task] of every merged weight, or of the group that shares them; "*": of all."""
        return self._columns(self._blend.coefficients(self._blend.numbers))

    @property
    def used(self) -> dict[str, torch.Tensor]:
        """The coefficients as they are used: clamped or normalised where that was asked for."""
        return self._columns(self._blend.rules.used(self._blend.coefficients(self._blend.numbers)))

    @property
    def logits(self) -> dict[str, torch.Tensor]:
        """The mask logits [task, component] of every weight that has masks; a component is kept above 0."""
        return {name: self._blend.logits(name, self._blend.numbers).clone() for name in self._blend.masked}

    @property
    def ranks(self) -> dict[str, int]:
        """How many components every weight with masks has, those that are not held included."""
        return {name: min(self._blend.weights[name].shape) for name in self._blend.masked}

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """All that another process needs to go on from here."""
        losses = torch.tensor(self.losses, dtype=torch.float64)
        own = {"numbers": self._blend.numbers, "first": self._adam.first, "second": self._adam.second}
        return {**{name: x.cpu().clone() for name, x in own.items()}, "losses": losses}

    def weights(self) -> dict[str, torch.Tensor]:
        """The merged weights, brought up to this step."""
        return {name: x.detach() for name, x in self._blend.build().items()}

    def _columns(self, numbers: torch.Tensor) -> dict[str, torch.Tensor]:
        return {group: numbers[:, i].clone() for i, group in enumerate(self._blend.groups)}


def adapt(
    blend: Blend, entropy: Entropy, watch: Watch | None, *, steps: int, rate: float, patience: int,
    ready: Callable[[int], None] | None = None,
) -> None:  # fmt: skip
    """Learn until the steps are done, the watcher says stop, or the entropy has not fallen for `patience` steps.

    `ready` is told how many steps are left once it is known which numbers they begin with.
    """
    adam, losses = Adam(blend.numbers, rate), list[float]()
    resume = getattr(watch, "resume", None)
    if resume is not None and (state := resume()) is not None:
        if len(state["numbers"]) != len(blend.numbers):
            raise MethodError(
                f"There are {len(state['numbers'])} numbers to go on from, and {len(blend.numbers)} to be learned."
            )
        losses += state["losses"].tolist()
        adam.steps = len(losses)
        for name, own in (("numbers", blend.numbers), ("first", adam.first), ("second", adam.second)):
            own.copy_(state[name])
    if ready is not None:
        ready(steps - adam.steps)
    while adam.steps < steps and not stale(losses, patience):
        losses.append(_loss(entropy, blend.build(), adam.steps))
        adam.step(blend.numbers, blend.gradient())
        if watch is not None and watch(Learned(blend, adam, entropy, steps, losses, done=False)):
            break
    blend.build()
    if watch is not None:
        watch(Learned(blend, adam, entropy, steps, losses, done=True))


def stale(losses: Sequence[float], patience: int) -> bool:
    """Say whether the mean of the last `patience` entropies is no lower than that of as many before; never for 0."""
    if not patience or len(losses) < 2 * patience:
        return False
    return math.fsum(losses[-patience:]) >= math.fsum(losses[-2 * patience : -patience])


def _loss(entropy: Entropy, weights: Mapping[str, torch.Tensor], step: int) -> float:
    """Evaluate the entropy, its gradients added to the weights' own."""
    with torch.enable_grad():
        found = entropy(weights, step)
        if isinstance(found, torch.Tensor) and found.requires_grad:
            torch.autograd.backward(found)
    value = float(found.detach() if isinstance(found, torch.Tensor) else found)
    if not math.isfinite(value):
        raise MethodError(f"The entropy is {value} at step {step}. Lower lr, or begin from a smaller scale.")
    return value


def device_of(entropy: Entropy) -> torch.device:
    """Return where the entropy wants weights to be."""
    return torch.device(getattr(entropy, "device", "cpu"))


def is_projection(name: str) -> bool:
    """Say whether a weight is CLIP's projection to the space that images and texts share."""
    return re.search(r"(^|\.)(visual|text)_projection\.", name) is not None


def is_vision(names: Iterable[str]) -> bool:
    """Say whether these are the weights of an image model: one that cuts images into patches."""
    return any("patch_embed" in name for name in names)
