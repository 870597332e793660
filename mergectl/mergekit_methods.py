"""What mergekit's methods are called here, which parameters they take, and what those mean in our settings.

Each `settings` function returns our settings for one weight, asking for mergekit's parameters there. As in mergekit,
every method works tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from mergectl.errors import UserError

Settings = dict[str, Any]


@dataclass(frozen=True)
class Parameter:
    """One of mergekit's parameters: its kind, range, default (None: it must be given), and whether models have it."""

    kind: Literal["number", "whole", "flag"] = "number"
    default: float | bool | None = None
    low: float = -10.0
    high: float = 10.0
    by_model: bool = False
    idle: bool = False  # allowed, and changes nothing


class At(Protocol):
    """The parameters as they are for one weight."""

    @property
    def has_base(self) -> bool:
        """Say whether task vectors are taken from a base."""
        ...

    def __call__(self, name: str) -> Any:
        """Return a parameter of the whole merge."""
        ...

    def each(self, name: str) -> tuple[float, ...]:
        """Return a parameter of every model that is merged, in order."""
        ...


@dataclass(frozen=True)
class Method:
    """One of mergekit's methods."""

    ours: str
    base: Literal["origin", "input", "first", "optional"]  # what the base model is in it
    parameters: dict[str, Parameter]
    settings: Callable[[At], Settings]


def linear(at: At) -> Settings:
    """Weighted mean of weights."""
    if at("normalize"):
        _normalized(at.each("weight"))  # refuses a sum of zero before any work
    return {"weight": at.each("weight"), "normalize": at("normalize")}


def nuslerp(at: At) -> Settings:
    """Vectors of the last dimension, or with row_wise those of the first, unless whole tensors turn."""
    _normalized(at.each("weight"))
    along = "tensor" if at("nuslerp_flatten") else "first" if at("nuslerp_row_wise") else "last"
    return {"weight": at.each("weight"), "along": along, "on": "deltas" if at.has_base else "weights"}


def multislerp(at: At) -> Settings:
    """Directions of task vectors where there is a base, of weights where there is none."""
    if at("normalize_weights"):
        _normalized(at.each("weight"))
    on = "deltas" if at.has_base else "weights"
    return {"weight": at.each("weight"), "normalize": at("normalize_weights"), "on": on}


def summed(at: At) -> Settings:
    """Sum of weighted task vectors, the weights divided by their sum if `normalize`, times lambda."""
    weights = at.each("weight")
    shares = _normalized(weights) if at("normalize") else weights
    return {"scale": tuple(share * at("lambda") for share in shares)}


def elected(at: At) -> Settings:
    """Election of the sign of the weighted sum, 0 counting as plus; mean by weight if `normalize`, else sum."""
    combine = "disjoint_mean" if at("normalize") else "disjoint_sum"
    return {"combine": combine, "zero_sign": "plus", "weight": at.each("weight"), "scale": at("lambda")}


def trimmed(at: At) -> Settings:
    """TIES: max(1, int(density n)) entries of each tensor stay."""
    return elected(at) | {"scope": "tensor", "exact": True, "density": at.each("density")}


def dropped(at: At) -> Settings:
    """DARE: entries kept with probability density; rescaled to the tensor's sum of magnitudes."""
    return {"drop": tuple(1 - share for share in at.each("density")), **_to_mass(at)}


def _to_mass(at: At) -> Settings:
    """Rescaled to the tensor's sum of magnitudes, or not at all."""
    return {"rescale": True, "rescale_to": "l1"} if at("rescale") else {"rescale": False}


def middling(at: At) -> Settings:
    """Breadcrumbs: int(gamma n) largest dropped, the next int(density n) kept."""
    return {"keep": at.each("density"), "gamma": at.each("gamma"), "rescale": at("rescale")}


def ranked(at: At) -> Settings:
    """DELLA: kept with probability density - epsilon to density + epsilon by rank in the row."""
    for share, width in zip(at.each("density"), at.each("epsilon"), strict=True):
        if share not in (0.0, 1.0) and not 0 < share - width <= share + width < 1:
            raise UserError(
                f"density - epsilon and density + epsilon must lie inside 0 to 1, got density {share}, epsilon {width}."
            )
    return {"keep": at.each("density"), "epsilon": at.each("epsilon"), **_to_mass(at)}


def _normalized(weights: tuple[float, ...]) -> tuple[float, ...]:
    """Return weights divided by their sum."""
    whole = sum(weights)
    if abs(whole) < 1e-8:
        shown = ", ".join(f"{weight:g}" for weight in weights)
        raise UserError(f"the weights {shown} add up to zero, so they cannot be normalized. Change one of them.")
    return tuple(weight / whole for weight in weights)


WEIGHT = {"weight": Parameter(low=-1e4, high=1e4, by_model=True)}
FLAG, IDLE_FLAG = Parameter("flag", False), Parameter("flag", False, idle=True)
SHARE = Parameter("number", 1.0, 0.0, 1.0, by_model=True)


def _family(normalize: bool, rescale: bool, /, **more: Parameter) -> dict[str, Parameter]:
    """Return the parameters that all methods on task vectors share, with the defaults that differ."""
    flags = {"normalize": replace(FLAG, default=normalize), "rescale": replace(FLAG, default=rescale)}
    return {**WEIGHT, **flags, "lambda": Parameter("number", 1.0), "int8_mask": IDLE_FLAG, "density": SHARE, **more}


# A density of 0 leaves a random choice nothing to rescale.
SOME = replace(SHARE, low=1e-6)
GAMMA = {"gamma": Parameter("number", 0.01, 0.0, 1.0, by_model=True)}
EPSILON = {"epsilon": Parameter("number", 0.15, 0.0, 0.5, by_model=True)}
NOT_TRIMMED = {"density": replace(SHARE, idle=True), "rescale": IDLE_FLAG}

METHODS: dict[str, Method] = {
    "linear": Method("average", "input", {**WEIGHT, "normalize": Parameter("flag", True)}, linear),
    "slerp": Method("slerp", "first", {"t": Parameter(low=0.0, high=1.0)}, lambda at: {"t": at("t")}),
    "nuslerp": Method(
        "nuslerp", "optional",
        {**WEIGHT, "nuslerp_flatten": Parameter("flag", True), "nuslerp_row_wise": FLAG}, nuslerp,
    ),
    "multislerp": Method(
        "multislerp", "optional",
        {**WEIGHT, "normalize_weights": Parameter("flag", True), "eps": Parameter("number", 1e-8, 0.0, idle=True)},
        multislerp,
    ),
    "karcher": Method(
        "karcher", "input",
        {"max_iter": Parameter("whole", 10, 1, 1000), "tol": Parameter("number", 1e-5, 0.0, 1.0)},
        lambda at: {"max_iter": at("max_iter"), "tol": at("tol")},
    ),
    "task_arithmetic": Method("task_arithmetic", "origin", _family(False, False, **NOT_TRIMMED), summed),
    "ties": Method("ties", "origin", _family(True, False), trimmed),
    "dare_ties": Method(
        "dare_ties", "origin", _family(False, True, density=SOME), lambda at: dropped(at) | elected(at)
    ),
    "dare_linear": Method(
        "dare_task_arithmetic", "origin", _family(False, True, density=SOME), lambda at: dropped(at) | summed(at)
    ),
    "breadcrumbs": Method(
        "breadcrumbs", "origin", _family(False, False, **GAMMA), lambda at: middling(at) | summed(at)
    ),
    "breadcrumbs_ties": Method(
        "breadcrumbs_ties", "origin", _family(False, False, **GAMMA), lambda at: middling(at) | elected(at)
    ),
    "della": Method("della", "origin", _family(True, True, **EPSILON), lambda at: ranked(at) | elected(at)),
    "della_linear": Method(
        "della_linear", "origin", _family(False, True, **EPSILON), lambda at: ranked(at) | summed(at)
    ),
    "model_stock": Method(
        "model_stock", "origin", {"filter_wise": FLAG}, lambda at: {"filter_wise": at("filter_wise")}
    ),
    "sce": Method(
        "sce", "origin", {"select_topk": Parameter("number", 1.0, 0.0, 1.0), "int8_mask": IDLE_FLAG},
        lambda at: {"density": at("select_topk")},
    ),
    "arcee_fusion": Method("arcee_fusion", "origin", {}, lambda at: {}),
    "passthrough": Method(
        "passthrough", "input", {"scale": Parameter("number", 1.0, by_model=True)},
        lambda at: {"scale": at.each("scale")[0]},
    ),
    "nearswap": Method("nearswap", "origin", {"t": Parameter(low=0.0)}, lambda at: {"t": at("t")}),
}  # fmt: skip
# TIES with `rescale` is its trimming as a refinement (no largest entries dropped), rescaled, and then the election.
RESCALED_TIES = Method(
    "breadcrumbs_ties", "origin", METHODS["ties"].parameters,
    lambda at: elected(at) | {"keep": at.each("density"), "gamma": 0.0, "rescale": at("rescale")},
)  # fmt: skip
NOT_READ = {
    "ram": "its importance scores are not built",
}
