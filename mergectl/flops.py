"""What a model costs: operations counted from the layers that it runs, parameters, and measured time and memory.

`flops_reference` counts as the profiler of the alpha study did: two operations for each multiplication of a linear
layer or a convolution, and for each element that a layer normalisation gives. `flops_full` adds the other matrix
products, those of attention. Nothing is known by the name of an architecture: layers are found by their type while the
model reads one row.
"""

from __future__ import annotations

import contextlib
import math
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

    from mergectl.bench import Bench

REPEATS = 5  # of a measured forward pass, after one that is not measured


class Work(NamedTuple):
    """Multiplications of one forward pass: of linear layers, of normalisations, and of all other matrix products."""

    linear: int = 0
    norms: int = 0
    products: int = 0

    @property
    def reference(self) -> int:
        """Operations as the alpha study counted them."""
        return 2 * (self.linear + self.norms)

    @property
    def full(self) -> int:
        """Operations with the matrix products of attention."""
        return self.reference + 2 * self.products

    def __mul__(self, times: int) -> Work:  # type: ignore[override]
        return Work(*(times * part for part in self))

    def __add__(self, other: Work) -> Work:  # type: ignore[override]
        return Work(*(one + two for one, two in zip(self, other, strict=True)))


def count(model: Any, run: Callable[[], Any]) -> Work:
    """The work of `run`, which lets the model read something; its weights may be on the device `meta`."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    found: Counter[str] = Counter()
    hooks = [module.register_forward_hook(_noted(found, module)) for module in model.modules()]
    try:
        with _eager(model), _frozen(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return Work(found["linear"], found["norms"], int(counter.get_total_flops()) // 2 - found["linear"])


def _noted(found: Counter[str], module: Any) -> Callable[..., None]:
    """A hook that adds what a module does."""

    def note(_module: Any, _inputs: Any, output: Any) -> None:
        kind, each = _each(module)
        if kind is not None:
            found[kind] += output.numel() * each

    return note


def _each(module: Any) -> tuple[str | None, int]:
    """What kind of work a module does, and how many multiplications for each element that it gives."""
    import torch
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, torch.nn.Linear):
        return "linear", module.in_features
    if isinstance(module, Conv1D):
        return "linear", module.weight.shape[0]
    if isinstance(module, torch.nn.modules.conv._ConvNd):
        return "linear", module.in_channels // module.groups * math.prod(module.kernel_size)
    return ("norms", 1) if isinstance(module, torch.nn.LayerNorm) else (None, 0)


@contextlib.contextmanager
def _eager(model: Any) -> Iterator[None]:
    """Let attention be computed by plain matrix products, which alone can be counted on every device."""
    used = getattr(model.config, "_attn_implementation", None)
    if used in (None, "eager"):
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(used)


@contextlib.contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """Let no weight ask for a gradient: the counter cannot follow one that goes through a layer as its input."""
    asking = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in asking:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in asking:
            weight.requires_grad_(True)


def parameters(model: Any) -> int:
    """How many numbers a model consists of, tied ones once."""
    return sum(weight.numel() for weight in {id(weight): weight for weight in model.parameters()}.values())


def costs(model: Any, bench: Bench) -> dict[str, float]:
    """What the rows of a bench cost a model: operations, its parameters, and what was measured on one row.

    `flops_reference` and `flops_full` take every text as long as the model reads it, as the published totals do; with
    `_run` behind it, as long as its batch was padded. Memory is the process's own so far, on CUDA that of the device.
    """
    import torch

    device = next(model.parameters()).device
    fixed, actual = total(model, bench, full_length=True), total(model, bench, full_length=False)
    first = next(_parts(model, bench, bench.batches[0], True, device))
    return {
        "flops_reference": fixed.reference,
        "flops_full": fixed.full,
        "flops_reference_run": actual.reference,
        "flops_full_run": actual.full,
        "parameters": parameters(model),
        "measured_latency_ms": 1000 * _latency(first.run, torch.device(device)),
        "measured_peak_memory_mb": _peak_memory(torch.device(device)) / 2**20,
    }


class _Part(NamedTuple):
    """One row's share of a batch: what is alike in many batches has one key; how often it is done."""

    key: tuple[object, ...]
    run: Callable[[], Any]
    times: int


def total(model: Any, bench: Bench, *, full_length: bool) -> Work:
    """The work of reading all rows, each as long as the model reads or as long as its batch was padded."""
    device = next(model.parameters()).device
    known: dict[tuple[object, ...], Work] = {}
    found = Work()
    for each in (bench, *bench.others):
        for batch in each.batches:
            for part in _parts(model, each, batch, full_length, device):
                if part.key not in known:
                    known[part.key] = count(model, part.run)
                found += known[part.key] * part.times
    return found


def _parts(
    model: Any, bench: Bench, batch: Mapping[str, torch.Tensor], full_length: bool, device: Any
) -> Iterator[_Part]:
    """What a model does with a batch, for one row (or one answer) each."""
    import torch

    if "pixels" in batch:
        image = {"pixels": batch["pixels"][:1].to(device)}
        yield _Part(("image",), lambda: model(**bench.preparer.finish(image)), len(batch["pixels"]))
        return
    rows, width = batch["input_ids"].shape
    width = int(getattr(bench.preparer, "max_length", width)) if full_length else width
    text = torch.full((1, width), int(getattr(bench.preparer, "pad", 1) == 0), device=device)
    if "answers" not in batch:
        yield _Part(("read", width), lambda: model(input_ids=text), rows)
        return
    answers, length = batch["decoder_input_ids"].shape
    yield _Part(("read", width), lambda: model.get_encoder()(input_ids=text), rows)
    yield _Part(("write", width, length), lambda: _answer(model, width, batch["decoder_input_ids"][:1]), answers)


def _answer(model: Any, width: int, asked: torch.Tensor) -> Any:
    """Let the decoder go through one answer to a text of `width` tokens."""
    import torch
    from transformers.modeling_outputs import BaseModelOutput

    weight = next(model.parameters())
    read = BaseModelOutput(last_hidden_state=torch.zeros((1, width, model.config.d_model), device=weight.device))
    return model(encoder_outputs=read, decoder_input_ids=asked.to(weight.device), use_cache=False)


def _latency(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a forward pass: the median of a few, after one that warms up."""
    import torch

    seconds = []
    with torch.inference_mode():
        for _ in range(REPEATS + 1):
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def _peak_memory(device: torch.device) -> float:
    """The most bytes held so far: on CUDA by tensors on the device, else by the whole process."""
    import torch

    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)
