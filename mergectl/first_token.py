"""Leave out what no head reads: of the last layer of a BERT-like encoder everything but the first token's place."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_NEAR = 1e-5  # how nearly the outputs agree, as a share of the largest: batched sums are not added up in one order


def first_token_only(model: Any, outputs: Callable[[], torch.Tensor]) -> bool:
    """Let the last layer compute the first token alone, where the outputs stay the same; whether they do.

    `outputs` runs the model on some rows. Attention still sees every token; after it, the first token goes on alone.
    """
    layers = getattr(getattr(getattr(model, "base_model", None), "encoder", None), "layer", None)
    after = getattr(getattr(layers[-1] if layers else None, "attention", None), "output", None)
    if after is None:
        return False
    whole = outputs()
    hook = after.register_forward_pre_hook(lambda _, states: tuple(state[:, :1] for state in states))
    try:
        short = outputs()
        same = short.shape == whole.shape and float((short - whole).abs().max()) <= _NEAR * float(whole.abs().max())
    except (RuntimeError, TypeError, IndexError, AttributeError):  # a model that is built in another way
        same = False
    if not same:
        hook.remove()
    return same
