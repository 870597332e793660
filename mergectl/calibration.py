"""Second moments of what every linear layer of a live model reads, gathered while batches pass through it once.

Linear layers are found by type: `nn.Linear`, GPT-2's `Conv1D`, and the joint projection of `nn.MultiheadAttention`
where queries, keys and values are one tensor. No input row outlives the batch that it came with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from mergectl.errors import UserError
from mergectl.methods._moments import Gram

if TYPE_CHECKING:
    import torch

Batch: TypeAlias = "Mapping[str, torch.Tensor]"
IGNORED = -100  # stands in labels where an answer has no more tokens


@dataclass(frozen=True)
class Capture:
    """Which rows count: at most `max_tokens` per layer, those of padding or not, and by what they are divided.

    With `include_padding` every row of every call counts, as in the reference program. Without, rows of padding are
    left out, and where a layer also reads something besides tokens (a table of relative positions), only tokens count.
    """

    max_tokens: int = 4096
    include_padding: bool = False
    divisor: str = "actual"  # or "requested": by max_tokens, however few rows there are


@dataclass
class _Layer:
    """The sum of x x^T over the rows so far."""

    total: torch.Tensor | None = None
    rows: int = 0


@dataclass
class _Pass:
    """One batch on its way through the model."""

    masks: tuple[torch.Tensor | None, torch.Tensor | None]  # of the text, and of what a decoder reads
    size: int  # examples
    encoded: Any = None  # what the encoder gave, if there is one: its rows are the text's
    waiting: dict[str, list[torch.Tensor]] = field(default_factory=dict)  # rows of no example, by layer
    read_tokens: set[str] = field(default_factory=set)  # layers that have read others in this pass


@dataclass(frozen=True)
class Moments:
    """What was gathered: per weight its moment, the linear weights that read nothing, how many examples passed."""

    grams: dict[str, Gram]
    unread: tuple[str, ...]
    examples: int

    @property
    def rows(self) -> int:
        """The most rows that any layer read."""
        return max((gram.rows for gram in self.grams.values()), default=0)


def linear_layers(model: Any) -> dict[str, Any]:
    """Name of the weight -> module, for every linear layer but the one that turns hidden states into words."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    words = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            found[f"{name}.in_proj_weight"] = module
        elif isinstance(module, nn.Linear | Conv1D) and module is not words:
            found[f"{name}.weight"] = module
    return found


def moments_of(
    model: Any, batches: Iterable[Batch], capture: Capture | None = None, progress: Callable[[int], None] | None = None
) -> Moments:
    """Let batches pass through a model in evaluation mode until its first linear layer has read enough rows.

    A batch is what the model takes; labels are not passed on. `progress` is called with the rows so far.
    """
    import torch

    watch = _Watch(model, capture or Capture())
    device, examples = next(model.parameters()).device, 0
    with watch.attached(), torch.no_grad():
        for batch in batches:
            given = {name: x.to(device) for name, x in batch.items()}
            examples += watch.run(given)
            if progress is not None:
                progress(watch.first_rows)
            if watch.first_rows >= watch.capture.max_tokens:
                break
    return watch.result(examples)


class _Watch:
    """Hooks on every linear layer, and what they have gathered."""

    def __init__(self, model: Any, capture: Capture) -> None:
        self.model, self.capture = model, capture
        self.modules = linear_layers(model)
        self.layers = {name: _Layer() for name in self.modules}
        self.first: str | None = None  # the layer that is called first
        self.now = _Pass((None, None), 0)
        decoder = model.get_decoder() if model.config.is_encoder_decoder else None
        self.decoding = set() if decoder is None else {id(module) for module in decoder.modules()}

    @property
    def first_rows(self) -> int:
        """How many rows the first layer has read."""
        return self.layers[self.first].rows if self.first is not None else 0

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Put the hooks on; they come off whatever happens."""
        handles = [m.register_forward_pre_hook(self._hook(n), with_kwargs=True) for n, m in self.modules.items()]
        if self.decoding:
            handles.append(self.model.get_encoder().register_forward_hook(self._keep_encoded))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def run(self, batch: Batch) -> int:
        """Pass one batch through the model; return how many examples it had."""
        given = {name: x for name, x in batch.items() if name != "labels"}
        first = next(iter(given.values()))
        answers = given.get("decoder_attention_mask")
        if answers is None and "decoder_input_ids" in given and "labels" in batch:
            answers = batch["labels"] != IGNORED
        self.now = _Pass((given.get("attention_mask"), answers), len(first))
        more = {"use_cache": False} if self.decoding else {}
        self.model(**given, **more)
        for name, parts in self.now.waiting.items():
            if name not in self.now.read_tokens:
                for rows in parts:
                    self._add(name, rows)
        return self.now.size

    def _hook(self, name: str) -> Callable[..., None]:
        def see(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if name.endswith(".in_proj_weight"):
                x, *others = [args[i] if i < len(args) else kwargs[k] for i, k in enumerate(("query", "key", "value"))]
                if any(other is not x for other in others):
                    return
                x = x if module.batch_first or x.dim() < 3 else x.transpose(0, 1)
            else:
                x = args[0] if args else kwargs["input"]
            self._see(name, id(module) in self.decoding, x)

        return see

    def _keep_encoded(self, module: Any, args: Any, output: Any) -> None:
        self.now.encoded = output[0]

    def _see(self, name: str, decoding: bool, x: torch.Tensor) -> None:
        self.first = self.first or name
        if self.layers[name].rows >= self.capture.max_tokens:
            return
        width = x.shape[-1]
        if self.capture.include_padding:
            self._add(name, x.reshape(-1, width))
            return
        mask = self._mask(x, decoding)
        if mask is None and self._is_aside(x):
            self.now.waiting.setdefault(name, []).append(x.reshape(-1, width))
            return
        self.now.read_tokens.add(name)
        self._add(name, x.reshape(-1, width) if mask is None else x.reshape(-1, width)[mask.reshape(-1).bool()])

    def _mask(self, x: torch.Tensor, decoding: bool) -> torch.Tensor | None:
        """The mask that says which of a layer's rows are padding; None where its rows are not those of a text."""
        text, answer = self.now.masks
        mask = answer if decoding and x is not self.now.encoded else text
        if mask is None or x.shape[:-1] not in (mask.shape, (mask.numel(),)):
            return None
        return mask if x.dim() > 2 or len(x) != self.now.size else None  # a row per example has no padding

    def _is_aside(self, x: torch.Tensor) -> bool:
        """Whether rows without a mask belong to no example: a table of positions, windows of an image."""
        return x.dim() > 2 and (self.now.masks[0] is not None or len(x) != self.now.size)

    def _add(self, name: str, rows: torch.Tensor) -> None:
        import torch

        layer = self.layers[name]
        rows = rows[: self.capture.max_tokens - layer.rows].float()
        if not bool(torch.isfinite(rows).all()):
            raise UserError(
                f"The inputs of '{name.rpartition('.')[0]}' are not finite: they hold NaN or infinity. "
                "The model cannot be calibrated; look at its weights, or at the rows of its task."
            )
        if layer.total is None:
            layer.total = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
        layer.total.addmm_(rows.t(), rows)
        layer.rows += len(rows)

    def result(self, examples: int) -> Moments:
        """Divide the sums."""
        grams = {}
        for name, layer in self.layers.items():
            if layer.total is not None and layer.rows:
                by = self.capture.max_tokens if self.capture.divisor == "requested" else layer.rows
                grams[name] = Gram(layer.total.div_(by), layer.rows)
        return Moments(grams, tuple(name for name in self.layers if name not in grams), examples)
