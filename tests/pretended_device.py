"""A device without a device: tensors that say they are elsewhere and refuse to meet those of main memory.

Their numbers lie in main memory, so that what is computed from them can be looked at. What a real device refuses is
refused here: operations on tensors of both, and NumPy's view of one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "elsewhere"
MEETING = {"aten::copy_", "aten::_to_copy"}  # operations that take tensors from both


class Elsewhere(torch.Tensor):
    """A tensor on the pretended device; `here` are its numbers."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> Elsewhere:
        """Have the same shape and type on the device."""
        found: Elsewhere = torch.Tensor._make_wrapper_subclass(
            cls, here.size(), strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype,
            device=torch.device(NAME, 0),
        )  # fmt: skip
        found.here = here
        return found

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse NumPy's view, give a list, and leave the rest to the operations below."""
        if func is torch.Tensor.numpy:
            raise TypeError("numpy(): the tensor is not in main memory")
        if func is torch.Tensor.tolist:
            return args[0].here.tolist()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Do it in main memory; what comes out is on the device again, unless it was asked for elsewhere."""
        given, word = dict(kwargs or {}), func._schema.name
        if word not in MEETING:
            _refuse_mixed(word, args, given)
        if (target := given.get("device")) is not None:
            given["device"] = torch.device("cpu")
        found = func(*tree_map_only(cls, _here, args), **tree_map_only(cls, _here, given))
        if func._schema.is_mutable:  # what was changed is given back
            return given.get("out", args[0]) if isinstance(found, torch.Tensor) else found
        leaves = target is not None and torch.device(target).type == "cpu"
        return found if leaves else tree_map_only(torch.Tensor, cls, found)


def _here(x: Elsewhere) -> torch.Tensor:
    return x.here


def _refuse_mixed(word: str, *given: Any) -> None:
    """Refuse tensors in main memory, but for single numbers and for places where a tensor is indexed."""
    for x in tree_leaves(given):
        here = isinstance(x, torch.Tensor) and not isinstance(x, Elsewhere) and x.dim() > 0
        if here and not ("index" in word and x.dtype in (torch.int64, torch.bool)):
            raise RuntimeError(f"{word}: tensors of two devices")


def pretend() -> str:
    """Have such a device from now on; the process keeps it. Return its name."""
    _setup_privateuseone_for_python_backend(NAME)

    def empty(size: Any, dtype: Any = None, **_: Any) -> torch.Tensor:
        return Elsewhere(torch.empty(size, dtype=dtype))

    def empty_strided(size: Any, stride: Any, dtype: Any = None, **_: Any) -> torch.Tensor:
        return Elsewhere(torch.empty_strided(size, stride, dtype=dtype))

    def copy_from(x: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        getattr(target, "here", target).copy_(getattr(x, "here", x))
        return target

    library.impl("_copy_from", copy_from, "PrivateUse1")  # type: ignore[no-untyped-call]
    library.impl("empty.memory_format", empty, "PrivateUse1")  # type: ignore[no-untyped-call]
    library.impl("empty_strided", empty_strided, "PrivateUse1")  # type: ignore[no-untyped-call]
    torch.Tensor.pin_memory = lambda x, *_: x  # type: ignore[method-assign]
    return NAME


library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
