"""Each example's gradient about a layer's weights, from what the layer read and the gradient about what it returned.

Three kinds are told apart. The gradient about a matrix is a sum of outer products over the rows of an example; that
about a table of embeddings stands in the rows that were read; any other is held for all examples at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import torch

Part: TypeAlias = "tuple[torch.Tensor, ...]"  # of one pass through a layer, the examples first
Rule: TypeAlias = "tuple[str, Callable[[Any, torch.Tensor, torch.Tensor], Part]]"  # the kind, and what makes the part


def rules_of(module: Any) -> dict[str, Rule]:
    """How the gradients about a layer's weights are found; empty for a layer of another type."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return {"weight": ("matrix", lambda module, x, slope: (_rows(slope), _rows(x), _used(slope))), "bias": SUM}
    if isinstance(module, Conv1D):
        return {"weight": ("matrix", lambda module, x, slope: (_rows(x), _rows(slope), _used(slope))), "bias": SUM}
    if isinstance(module, nn.Conv2d):
        plain = module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return {"weight": ("matrix", _patches), "bias": ("vector", _sum_of_pixels)} if plain else {}
    if isinstance(module, nn.Embedding):
        return {} if module.max_norm is not None or module.scale_grad_by_freq else {"weight": ("table", _looked_up)}
    if isinstance(module, nn.LayerNorm):
        return {"weight": ("vector", _scaled), "bias": SUM} if len(module.normalized_shape) == 1 else {}
    norm = type(module).__name__.endswith(("RMSNorm", "LayerNorm"))  # the many that models write for themselves
    return {"weight": ("vector", _scaled), "bias": SUM} if norm and module.weight.dim() == 1 else {}


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Rows of each example [example, row, entry]."""
    return x.reshape(len(x), -1, x.shape[-1])


def _used(slope: torch.Tensor) -> torch.Tensor:
    """Which rows have a gradient at all [example, row]; those of padding have none."""
    found: torch.Tensor = _rows(slope).norm(p=1, dim=-1) != 0
    return found


SUM: Rule = ("vector", lambda module, x, slope: (_rows(slope).sum(1),))


def _patches(module: Any, x: torch.Tensor, slope: torch.Tensor) -> Part:
    from torch.nn.functional import unfold

    read = unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
    pixels = slope.flatten(2).mT
    return pixels, read.mT, _used(pixels)


def _sum_of_pixels(module: Any, x: torch.Tensor, slope: torch.Tensor) -> Part:
    return (slope.flatten(2).sum(2),)


def _scaled(module: Any, x: torch.Tensor, slope: torch.Tensor) -> Part:
    """A norm's weight multiplies what it returns without one."""
    import torch
    from torch.func import functional_call

    with torch.no_grad():
        rest = {name: torch.zeros_like(p) for name, p in module.named_parameters() if name != "weight"}
        one, none = (functional_call(module, {**rest, "weight": torch.full_like(module.weight, v)}, x) for v in (1, 0))
        return (_rows(slope * (one - none)).sum(1),)


def _looked_up(module: Any, x: torch.Tensor, slope: torch.Tensor) -> Part:
    """Places that were read, and their gradients; that of padding does not count."""
    place = x.flatten(1)
    return place, _rows(slope) * (place != (-1 if module.padding_idx is None else module.padding_idx))[..., None]


def add_matrices(total: torch.Tensor, parts: Sequence[Part]) -> None:
    """Add the squares of every example's sum of outer products, over its rows in all passes."""
    import torch

    total, counts = total.view(len(total), -1), torch.stack([used.sum(1) for *_, used in parts]).sum(0)
    if len(parts) == 1 and int(counts.max()) <= 1:  # the square of an outer product is that of the squares
        left, right, used = parts[0]
        total.addmm_(left[used].square().mT, right[used].square())
        return
    places = [torch.arange(1, used.shape[1] + 1, device=used.device) for *_, used in parts]
    ends = [(used * place).amax(1).tolist() for (*_, used), place in zip(parts, places, strict=True)]
    buffer = torch.empty_like(total)
    for example in range(len(counts)):
        for number, ((left, right, _), end) in enumerate(zip(parts, ends, strict=True)):
            rows = slice(0, end[example])
            torch.addmm(buffer, left[example, rows].mT, right[example, rows], beta=min(number, 1), out=buffer)
        total.addcmul_(buffer, buffer)


def add_tables(total: torch.Tensor, parts: Sequence[Part]) -> None:
    """Add the squares of every example's sums over the places that read the same row of a table."""
    import torch

    places, slopes = (torch.cat(found, 1) for found in zip(*parts, strict=True))
    for read, slope in zip(places, slopes, strict=True):
        rows, which = read.unique(return_inverse=True)
        total.index_add_(0, rows, slope.new_zeros(len(rows), slope.shape[1]).index_add_(0, which, slope).square())


def add_vectors(total: torch.Tensor, parts: Sequence[Part]) -> None:
    """Add the squares of every example's sum."""
    import torch

    whole = torch.stack([part for (part,) in parts]).sum(0)
    total.add_(whole.square().sum(0).view_as(total))


ADDERS: dict[str, Callable[[Any, Sequence[Part]], None]]
ADDERS = {"matrix": add_matrices, "table": add_tables, "vector": add_vectors}
