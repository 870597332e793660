"""The weights that go into a merge: which of them are shared, and reading them one by one with checks."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from mergectl import blocks
from mergectl.blocks import Block, BlockReader
from mergectl.errors import UserError

if TYPE_CHECKING:
    import torch

    from mergectl.methods._stored import Array

Weights = Mapping[str, "torch.Tensor"]


def shape_of(weights: Any, name: str) -> tuple[int, ...]:
    """Return a weight's shape, without reading it where the mapping can say it."""
    ask = getattr(weights, "shape", None)
    return tuple(ask(name) if callable(ask) else weights[name].shape)


def dtype_of(weights: Any, name: str) -> Any:
    """Return a weight's type, without reading it where the mapping can say it."""
    ask = getattr(weights, "dtype", None)
    return ask(name) if callable(ask) else weights[name].dtype


def is_floating(weights: Any, name: str) -> bool:
    """Say whether a weight holds floating-point numbers; its type may be torch's or the name safetensors uses."""
    dtype = str(dtype_of(weights, name)).upper()
    return "FLOAT" in dtype or dtype.startswith(("F", "BF"))


Room: TypeAlias = "Callable[[str, tuple[int, ...], torch.dtype, str], torch.Tensor]"


def _fresh(use: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    import torch

    return torch.empty(shape, dtype=dtype, device=device)


class Inputs:
    """Base and experts of one merge, read weight by weight in float32; every weight is checked when first read.

    Weights stored in float64 stay so, task vectors do not. `unchanged` holds the tasks whose expert has not differed
    from the base so far. Several threads may read at once.
    """

    def __init__(self, base: Weights | None, experts: Mapping[str, Weights], device: str = "cpu") -> None:
        """Check names and shapes of base and experts."""
        if not experts:
            raise UserError("There is no expert to merge. Give at least one.")
        self.base, self.experts, self.tasks, self.device = base, experts, tuple(experts), device
        self.first: Weights = next(iter(experts.values())) if base is None else base
        self.floating = [name for name in self.first if is_floating(self.first, name)]
        self.carried = [name for name in self.first if not is_floating(self.first, name)]
        self.shapes = {name: shape_of(self.first, name) for name in self.floating}
        self._count = sum(math.prod(shape) for shape in self.shapes.values())  # numbers of a model
        self.blocks: dict[str, Block] = {}
        self.unchanged = set(self.tasks)
        self.room: Room = _fresh  # where what is read is put
        self._seen: set[str] = set()  # weights that were checked
        self._unchecked: set[str] = set()
        self._last = threading.local()  # the base's weight that a thread read last
        self._readers = {id(model): BlockReader(model) for model in self._models()}
        for model in self._models():
            _refuse_odd_types(model)
        for task, expert in experts.items():
            check_names(self.first, expert, task, self.floating)
            _check_kinds(self.first, expert, task)

    def _models(self) -> list[Weights]:
        return [*self.experts.values(), *([] if self.base is None else [self.base])]

    def close(self) -> None:
        """Close the files that reading opened."""
        for reader in self._readers.values():
            reader.close()

    def cut(self, names: Sequence[str], *, in_rows: bool) -> list[str]:
        """Return the names with every long weight replaced by its blocks, where all models can be read by blocks."""
        can_be_read = [n for n in names if all(blocks.readable(model, n) for model in self._models())]
        found = blocks.cut(self.shapes, can_be_read, in_rows=in_rows)
        self.blocks |= found
        self.shapes |= {name: block.shape for name, block in found.items()}
        own: dict[str, list[str]] = {}
        for block in found.values():
            own.setdefault(block.weight, []).append(block.name)
        return [unit for name in names for unit in own.get(name, [name])]

    def wholes(self, names: Iterable[str]) -> dict[str, tuple[str, int]]:
        """Return the weight and its number of elements for each name that stands for a block."""
        found = {name: self.blocks[name].weight for name in names if name in self.blocks}
        return {name: (weight, math.prod(self.shapes[weight])) for name, weight in found.items()}

    def _stored(self, model: Weights, name: str) -> torch.Tensor:
        """Read a weight or a block as it is stored; it belongs to the model and is not to be changed."""
        stored = self._readers[id(model)].read(self.blocks[name]) if name in self.blocks else model[name].detach()
        return stored if stored.is_cpu else stored.cpu()

    def _get(self, model: Weights, name: str) -> torch.Tensor:
        """Read a weight or a block as it is stored, to the device where it is merged."""
        stored = self._stored(model, name)
        if self.device == "cpu":
            return stored
        return stored.pin_memory().to(self.device, non_blocking=True)  # torch keeps it until it has been copied

    def base_weight(self, name: str) -> torch.Tensor:
        """Read one weight of the base."""
        if getattr(self._last, "name", None) != name:
            assert self.base is not None
            self._keep_base(name, self._get(self.base, name))
        weight: torch.Tensor = self._last.weight
        return weight

    def _keep_base(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        """Keep a weight of the base, as it is stored, for this thread's next question."""
        weight = _wide(stored)
        self._last.weight, self._last.name = weight, name
        return weight

    def weights(self, name: str) -> torch.Tensor:
        """Read one weight of all experts: [task, *shape]."""
        result = self._stacked(name, [self._get(expert, name) for expert in self.experts.values()])
        self._check(name, result)
        return result

    def lent_weights(self, name: str) -> Sequence[torch.Tensor]:
        """Do what `weights` does, without a copy where that can be, and leave the check to `check_result`."""
        import torch

        from mergectl.methods import _stored

        bits, stored = self._read(tuple(self.experts.values()), name)
        rows: Sequence[torch.Tensor] = stored
        if bits is not None:
            rows = _stored.Stored(bits, self.shapes[name], looped=self._many)
        elif not all(row.dtype == torch.float32 for row in stored):
            rows = list(self._stacked(name, stored))
        if name not in self._unchecked:
            self._compare(name, rows)
            self._unchecked.add(name)
        return rows

    def _stacked(self, name: str, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        dtype = torch.float64 if any(row.dtype == torch.float64 for row in rows) else torch.float32
        result = self.room("weights", (len(rows), *self.shapes[name]), dtype, self.device)
        for copy, row in zip(result, rows, strict=True):
            copy.copy_(row)
        return result

    def deltas(self, name: str) -> torch.Tensor:
        """Read one weight of all task vectors in float32: [task, *shape]."""
        from mergectl.methods import _fused

        result = self._deltas(name, *self._read(self._all(), name, looped=_fused.started()))
        self._check(name, result, result)
        return result

    def lent_deltas(self, name: str) -> Sequence[torch.Tensor] | torch.Tensor:
        """Do what `deltas` does, without a copy where that can be, and leave the check to `check_result`."""
        from mergectl.methods import _stored

        bits, stored = self._read(self._all(), name)
        result: Sequence[torch.Tensor] | torch.Tensor
        if bits is not None:
            result = _stored.Stored(bits[1:], self.shapes[name], bits[0], looped=self._many)
        else:
            result = self._deltas(name, None, stored)
        self._note_changed(result)
        self._unchecked.add(name)
        return result

    @functools.cached_property
    def _many(self) -> bool:
        """Whether the models hold so many numbers that loops are worth the compiler's start for sums alone."""
        from mergectl.methods import _stored

        return self._count * len(self._models()) >= _stored.MANY

    def _all(self) -> tuple[Weights, ...]:
        """The base and all experts."""
        assert self.base is not None
        return (self.base, *self.experts.values())

    def _read(
        self, models: Sequence[Weights], name: str, *, looped: bool = True
    ) -> tuple[list[Array] | None, list[torch.Tensor]]:
        """Read a weight of some models: its bits, where loops may go through them, or else as it is stored."""
        from mergectl.methods import _stored

        if looped and (bits := self._bits(models, name)) is not None:
            return bits, []
        stored = [self._get(model, name) for model in models]
        return _stored.bits(stored) if looped else None, stored

    def _bits(self, models: Sequence[Weights], name: str) -> list[Array] | None:
        """Look for the bits of a weight in the models' files."""
        from mergectl.methods import _stored

        block = self.blocks.get(name)
        if block is None or self.device != "cpu":
            return None
        return _stored.alike(self._readers[id(model)].bits(block) for model in models)

    def _deltas(self, name: str, bits: Sequence[Array] | None, stored: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        from mergectl.methods import _stored

        result = self.room("deltas", (len(self.tasks), *self.shapes[name]), torch.float32, self.device)
        if bits is not None:
            for delta, own in zip(result, bits[1:], strict=True):
                _stored.subtract(own, bits[0], delta)
            return result
        base = self._keep_base(name, stored[0])
        for delta, row in zip(result, stored[1:], strict=True):
            if row.dtype == base.dtype == torch.float32:
                torch.sub(row, base, out=delta)
            elif row.dtype == torch.float64 or base.dtype == torch.float64:
                delta.copy_(row.double() - base)
            else:
                delta.copy_(row).sub_(base)
        return result

    def some_deltas(self, name: str, step: int) -> Array:
        """Read one entry in `step` of a weight of all task vectors, unchecked, in float32: [task, elements]."""
        import torch

        from mergectl.methods import _stored
        from mergectl.methods._order import thinned

        if (bits := self._bits(self._all(), name)) is not None:
            return _stored.Stored(bits[1:], self.shapes[name], bits[0]).thinned(step)
        stored = [self._stored(model, name) for model in self._all()]
        base, *rows = (_wide(thinned(row.reshape(-1), step)) for row in stored)
        found: Array = torch.stack([(row - base).float() for row in rows]).numpy()
        return found

    def on_base(self, name: str, merged: torch.Tensor, *, lent: bool) -> torch.Tensor:
        """Return the base's weight plus a merged task vector; if `lent`, in memory that will serve again."""
        import torch

        from mergectl.methods import _fused, _stored

        assert self.base is not None
        if not lent or merged.dtype != torch.float32:
            return self.base_weight(name) + merged
        bits = self._bits([self.base], name) if merged.is_contiguous() and _fused.started() else None
        if bits is None and (base := self.base_weight(name)).dtype != merged.dtype:
            return base + merged
        result = self.room("merged", self.shapes[name], merged.dtype, self.device)
        return torch.add(base, merged, out=result) if bits is None else _stored.put_on_top(bits[0], merged, result)

    def _weight(self, name: str) -> str:
        return self.blocks[name].weight if name in self.blocks else name

    def _check(self, name: str, rows: torch.Tensor, deltas: torch.Tensor | None = None) -> None:
        """The first time a weight is read: refuse what is not finite, and note who is unchanged."""
        if name in self._seen:
            return
        if not _finite_sum(rows):  # a sum of finite numbers may overflow, so look again
            self._refuse_infinite(name)
        if deltas is None:
            self._compare(name, rows)
        else:
            self._note_changed(deltas)
        self._seen.add(name)

    def _compare(self, name: str, rows: Sequence[torch.Tensor] | torch.Tensor) -> None:
        """Look at the base beside the experts' weights."""
        if self.base is None:
            return
        base = self.base_weight(name)
        if not _finite_sum(base):
            self._refuse_infinite(name)
        self._note_changed(rows, base)

    def _note_changed(self, rows: Sequence[torch.Tensor] | torch.Tensor, base: torch.Tensor | None = None) -> None:
        for place, task in enumerate(self.tasks):
            if task in self.unchanged and bool((rows[place] if base is None else rows[place] - base).any()):
                self.unchanged.discard(task)

    def check_result(self, name: str, result: torch.Tensor) -> None:
        """Refuse a sum of rows that were lent unchecked where one of them is not finite: then the sum is not."""
        if name in self._unchecked and name not in self._seen and not _finite_sum(result):
            self._refuse_infinite(name)

    def _refuse_infinite(self, name: str) -> None:
        """Name the model that holds NaN or infinite numbers, if there is one."""
        models = {f"the expert '{task}'": model for task, model in self.experts.items()}
        for who, model in {**models, **({} if self.base is None else {"the base": self.base})}.items():
            if not _is_finite(self._get(model, name)):
                raise UserError(
                    f"Weight '{self._weight(name)}' of {who} holds NaN or infinite numbers; such a model is not merged."
                )


def _finite_sum(x: torch.Tensor) -> bool:
    return math.isfinite(float(x.sum()))


def _is_finite(x: torch.Tensor) -> bool:
    """Say whether there is no NaN and no infinity: both reach the smallest or the largest entry."""
    return x.numel() == 0 or all(math.isfinite(float(end)) for end in x.aminmax())


def _wide(x: torch.Tensor) -> torch.Tensor:
    """Return a weight as float32, float64 if it is stored so."""
    return x if x.element_size() == 8 else x.float()


def _refuse_odd_types(model: Weights) -> None:
    """Refuse complex numbers and those of 8 bits: no mean of them is what was meant."""
    for name in model:
        word = str(dtype_of(model, name)).removeprefix("torch.")
        if word.startswith(("complex", "float8", "C", "F8")):
            raise UserError(f"'{name}' is of the type {word}. Only real numbers of 16, 32 or 64 bits can be merged.")


def check_names(base: Weights, expert: Weights, task: str, names: Iterable[str]) -> None:
    """Refuse an expert that lacks one of the weights or has another shape of it."""
    for name in names:
        if name not in expert:
            raise UserError(f"The expert '{task}' has no weight '{name}', but the base has: another architecture.")
        ours, theirs = shape_of(base, name), shape_of(expert, name)
        if ours != theirs:
            raise UserError(f"Weight '{name}' has shape {list(theirs)} in expert '{task}', {list(ours)} in the base.")


def _check_kinds(base: Weights, expert: Weights, task: str) -> None:
    """Refuse an expert that has real numbers where the base has whole ones, or the other way round."""
    for name in base:
        if name in expert and is_floating(base, name) != is_floating(expert, name):
            words = [str(dtype_of(model, name)).removeprefix("torch.") for model in (expert, base)]
            raise UserError(f"Weight '{name}' is of the type {words[0]} in expert '{task}', {words[1]} in the base.")


class Subset(Mapping[str, "torch.Tensor"]):
    """Some of the weights of a mapping, read when asked for."""

    def __init__(self, weights: Weights, names: Iterable[str]) -> None:
        """Take the names that the mapping has."""
        self.weights, self._names = weights, {name: None for name in names if name in weights}

    def __getitem__(self, name: str) -> torch.Tensor:
        """Read one weight."""
        if name not in self._names:
            raise KeyError(name)
        return self.weights[name]

    def __iter__(self) -> Iterator[str]:
        """Go through the names in order."""
        return iter(self._names)

    def __len__(self) -> int:
        """Return the number of weights."""
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        """Say whether there is such a weight, without reading it."""
        return name in self._names

    def where(self, name: str) -> Any:
        """Return the place of a weight in a file, if the mapping knows one."""
        ask = getattr(self.weights, "where", None)
        return ask(name) if callable(ask) else None

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a weight's shape."""
        return shape_of(self.weights, name)

    def dtype(self, name: str) -> Any:
        """Return a weight's type."""
        return dtype_of(self.weights, name)
