"""What a method makes of adapters: of IA3's vectors, and of LoRA's products, factors, or parts in a common space."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mergectl.adapters import ROOT, START, AdapterCheckpoint
from mergectl.errors import UserError
from mergectl.thin import Cut, align, cut, cut_dense

if TYPE_CHECKING:
    import torch

# What a merged LoRA adapter says of itself: its factors carry the scale, and nothing differs by module.
PLAIN_LORA: dict[str, Any] = {
    "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "lora_dropout": 0.0, "init_lora_weights": True,
}  # fmt: skip
LINEAR = ("average", "task_arithmetic")  # methods whose result is a weighted sum, of which concatenating is one form
FACTORS = "factors"
FACTOR_NAMES = ("lora_A", "lora_B")
Adapters = Mapping[str, AdapterCheckpoint]


class Changes(Mapping[str, "torch.Tensor"]):
    """What an adapter does to each module, computed when it is asked for."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], torch.Tensor]) -> None:
        self._shapes, self._read = shapes, read

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a change, without computing it."""
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        """Always float32."""
        return "F32"


def _merged(
    recipe: Any, start: float, shapes: Mapping[str, tuple[int, ...]], experts: Mapping[str, Changes]
) -> Mapping[str, torch.Tensor]:
    """What the method makes of what adapters do; `start` is what an adapter that changes nothing holds."""
    import torch

    return _method(recipe, Changes(shapes, lambda name: torch.full(shapes[name], start)), experts)


def _method(recipe: Any, base: Changes, experts: Mapping[str, Changes]) -> Mapping[str, torch.Tensor]:
    from mergectl.merging import merge_weights

    found = merge_weights(recipe.method, base, experts, seed=recipe.seed, refine=list(recipe.refine), **recipe.settings)
    if found.kept:
        raise UserError(f"{recipe.method} keeps something for each task, which one adapter cannot hold.")
    return found


def _read(
    adapters: Adapters, recipe: Any, start: float, read: Callable[[AdapterCheckpoint, str], torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """What the method makes of one tensor per module and adapter, under the modules' weights' names."""
    first = next(iter(adapters.values()))
    shapes = {f"{module}.weight": tuple(read(first, module).shape) for module in first.modules}

    def view(adapter: AdapterCheckpoint) -> Changes:
        return Changes(shapes, lambda name: read(adapter, name.removesuffix(".weight")))

    return _merged(recipe, start, shapes, {task: view(adapter) for task, adapter in adapters.items()})


def merge_ia3(adapters: Adapters, recipe: Any) -> dict[str, torch.Tensor]:
    """Vectors that multiply: the method works on how far they are from one."""
    found = _read(adapters, recipe, 1.0, lambda adapter, module: adapter.part(module, "ia3_l"))
    return {f"{ROOT}{name.removesuffix('.weight')}.ia3_l": vector.contiguous() for name, vector in found.items()}


def merge_lora(
    adapters: Adapters, recipe: Any, rank: int | None, mode: str
) -> tuple[dict[str, torch.Tensor], dict[str, Any], float]:
    """Factors of what the method makes of the adapters; without a rank, of the largest that some module needs.

    With them, what their settings say otherwise than the adapters', and the share of the squared norm that is kept.
    """
    if mode == FACTORS:
        return _by_factors(adapters, recipe), {}, 1.0
    modules, find = DECOMPOSING[mode](adapters, recipe)
    size = max(modules.values()) if rank is None else rank
    weights: dict[str, torch.Tensor] = {}
    kept = total = 0.0
    for module in modules:
        found = find(module, size)
        weights |= {f"{ROOT}{module}.lora_A.weight": found.down, f"{ROOT}{module}.lora_B.weight": found.up}
        kept, total = kept + found.kept, total + found.whole
    return weights, {**PLAIN_LORA, "r": size, "lora_alpha": size}, kept / total if total else 1.0


def apart(adapters: Adapters) -> str | None:
    """Why the factors of LoRA adapters do not belong together, entry by entry; None where they do."""
    import torch

    first = next(iter(adapters.values()))
    for adapter in adapters.values():
        if not adapter.has_start:
            return f"{adapter.ref} does not keep the factors that it was begun from ({START})."
        if set(adapter.modules) != set(first.modules):
            return f"{adapter.ref} and {first.ref} adapt different modules."
        if odd := {part for parts in adapter.modules.values() for part in parts} - set(FACTOR_NAMES):
            return f"{adapter.ref} has '{min(odd)}' besides plain factors."
    for name, adapter, module in ((n, a, m) for n in FACTOR_NAMES for a in adapters.values() for m in a.modules):
        if not torch.equal(adapter.start(module, name), first.start(module, name)):
            return f"{adapter.ref} and {first.ref} were begun from different factors."
        if adapter.scale(module) != first.scale(module):
            return f"{adapter.ref} and {first.ref} multiply their factors by different scales (alpha / rank)."
    return None


def factor_views(adapters: Adapters) -> tuple[Changes, dict[str, Changes]]:
    """The common start of LoRA adapters that are not `apart`, and what each made of it, under the factors' names."""
    first = next(iter(adapters.values()))
    places = {f"{module}.{name}.weight": (module, name) for module in first.modules for name in FACTOR_NAMES}
    shapes = {key: tuple(first.start(*place).shape) for key, place in places.items()}

    def view(read: Callable[[str, str], torch.Tensor]) -> Changes:
        return Changes(shapes, lambda key: read(*places[key]))

    return view(first.start), {task: view(adapter.part) for task, adapter in adapters.items()}


def _by_factors(adapters: Adapters, recipe: Any) -> dict[str, torch.Tensor]:
    """The method works on the factors A and B themselves, as on weights that were fine-tuned from their start."""
    start, experts = factor_views(adapters)
    found = _method(recipe, start, experts)
    return {f"{ROOT}{name}": factor.contiguous() for name, factor in found.items()}


Found = tuple[dict[str, int], Callable[[str, int], Cut]]  # the rank that each module needs; its factors of a rank


def _sums(adapters: Adapters) -> dict[str, int]:
    """For each module the sum of the adapters' ranks."""
    modules = next(iter(adapters.values())).modules
    return {module: sum(len(adapter.part(module, "lora_A")) for adapter in adapters.values()) for module in modules}


def _by_product(adapters: Adapters, recipe: Any) -> Found:
    """The method works on the products B A as on weights."""
    found = _read(adapters, recipe, 0.0, lambda adapter, module: adapter.product(module))
    return _sums(adapters), lambda module, rank: cut_dense(found[f"{module}.weight"], rank)


def _concatenated(adapters: Adapters, recipe: Any) -> Found:
    """All factors beside each other, each B times its adapter's share: a weighted sum of the products."""
    import torch

    linear = recipe.method in LINEAR and not recipe.refine and recipe.settings.get("combine", "mean") == "mean"
    if not linear:
        raise UserError(
            f"--adapter-mode concatenate is for weighted sums ({', '.join(LINEAR)}), which {recipe.method} as it is "
            "given here is not. Take product or align."
        )
    unit = torch.eye(len(adapters))
    shapes = {f"{module}.weight": (len(adapters),) for module in next(iter(adapters.values())).modules}
    ones = {task: dict.fromkeys(shapes, row) for task, row in zip(adapters, unit, strict=True)}
    shares = _merged(recipe, 0.0, shapes, {task: Changes(shapes, own.__getitem__) for task, own in ones.items()})

    def find(module: str, rank: int) -> Cut:
        pairs = [adapter.scaled(module) for adapter in adapters.values()]
        own = shares[f"{module}.weight"]
        up = torch.cat([share * up for share, (up, _) in zip(own, pairs, strict=True)], 1)
        return cut(up, torch.cat([down for _, down in pairs]), rank)

    return _sums(adapters), find


def _aligned(adapters: Adapters, recipe: Any) -> Found:
    """The method works on the adapters' parts V of one decomposition of all products beside each other (KnOTS)."""
    shared: dict[str, torch.Tensor] = {}
    parts: dict[str, dict[str, torch.Tensor]] = {task: {} for task in adapters}
    for module in next(iter(adapters.values())).modules:
        ups, downs = zip(*(adapter.scaled(module) for adapter in adapters.values()), strict=True)
        shared[module], own = align(ups, downs)
        for task, part in zip(adapters, own, strict=True):
            parts[task][f"{module}.weight"] = part
    shapes = {name: tuple(part.shape) for name, part in next(iter(parts.values())).items()}
    found = _merged(recipe, 0.0, shapes, {task: Changes(shapes, own.__getitem__) for task, own in parts.items()})
    ranks = {module: left.shape[1] for module, left in shared.items()}
    return ranks, lambda module, rank: cut(shared[module], found[f"{module}.weight"], rank)


DECOMPOSING: dict[str, Callable[[Adapters, Any], Found]] = {
    "product": _by_product, "concatenate": _concatenated, "align": _aligned,
}  # fmt: skip
MODES = (*DECOMPOSING, FACTORS)
