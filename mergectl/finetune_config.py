"""All that decides what an expert becomes, checked before any work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mergectl.errors import UserError

LEARNING_RATES = {"none": 5e-5, "lora": 5e-4, "ia3": 5e-3}
SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial")
ORDERS = ("shuffled", "sequential")
KEPT = ("best", "last")
SELECTS = ("tune", "report")


@dataclass(frozen=True)
class FinetuneConfig:
    """All that decides what an expert becomes."""

    task: str
    base: str
    epochs: float = 3.0
    max_steps: int | None = None  # instead of epochs
    lr: float | None = None  # None: 5e-5, for lora 5e-4, for ia3 5e-3
    batch_size: int = 16
    weight_decay: float = 0.01
    warmup: float = 0.06  # share of all steps
    warmup_steps: int | None = None  # their number, instead of the share
    scheduler: str = "linear"
    max_length: int | None = None  # tokens of a text; None: 128, for text-to-text and decoders 512
    seed: int = 0
    peft: str = "none"
    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0  # of LoRA
    targets: tuple[str, ...] = ()  # modules that get adapters; empty: chosen by the model
    bf16: bool = False
    accumulation: int = 1
    patience: int | None = None  # stop after so many evaluations without a better score
    eval_every: int | None = None  # steps; None: each epoch
    device: str = "auto"
    limit_fit: int | None = None
    limit_tune: int | None = None
    by_length: bool = False  # rows of like length share a batch: less padding, up to twice as fast on texts
    from_scratch: bool = False  # the base's configuration with fresh weights
    order: str = "shuffled"  # or sequential: the rows as the data have them, in every epoch
    max_grad_norm: float = 1.0  # longer gradients are cut to this length; 0: never
    model_dropout: float | None = None  # None: as the base's configuration says
    keep: str = "best"  # of all evaluations; or last: what training ends with
    select_on: Literal["tune", "report"] = "tune"  # or report: the best is the best on the rows that report
    masks: str | None = None  # a file of ownership masks: only what they mark is trained

    def __post_init__(self) -> None:
        for name, low, high, rule in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(f"{name} must {rule}, got {value}.")
        for name, words in _WORDS:
            if getattr(self, name) not in words:
                raise UserError(f"{name} must be one of {', '.join(words)}, got '{getattr(self, name)}'.")
        if self.by_length and self.order == "sequential":
            raise UserError("by_length puts rows in an order of its own, so order=sequential has no meaning beside it.")

    @property
    def learning_rate(self) -> float:
        """The rate in use."""
        return LEARNING_RATES[self.peft] if self.lr is None else self.lr


_WORDS = (
    ("peft", tuple(LEARNING_RATES)), ("scheduler", SCHEDULERS), ("order", ORDERS), ("keep", KEPT),
    ("select_on", SELECTS),
)  # fmt: skip
_MANY = 10**9
_RANGES: tuple[tuple[str, float, float, str], ...] = (
    ("epochs", 1e-6, 10**6, "be above 0"),
    ("max_steps", 1, _MANY, "be at least 1"),
    ("lr", 1e-12, 10, "lie above 0 and at most be 10"),
    ("batch_size", 1, 10**6, "be at least 1"),
    ("weight_decay", 0, 10, "lie between 0 and 10"),
    ("warmup", 0, 0.99, "lie between 0 and 0.99: it is a share of all steps"),
    ("warmup_steps", 1, _MANY, "be at least 1"),
    ("max_length", 4, 10**6, "be at least 4 tokens"),
    ("rank", 1, 4096, "lie between 1 and 4096"),
    ("alpha", 1e-6, 10**6, "be above 0"),
    ("dropout", 0, 0.99, "lie between 0 and 0.99"),
    ("model_dropout", 0, 0.99, "lie between 0 and 0.99"),
    ("max_grad_norm", 0, 10**6, "be at least 0, which means no limit"),
    ("accumulation", 1, 10**6, "be at least 1"),
    ("patience", 1, _MANY, "be at least 1"),
    ("eval_every", 1, _MANY, "be at least 1"),
    ("limit_fit", 1, _MANY, "be at least 1"),
    ("limit_tune", 1, _MANY, "be at least 1"),
    ("seed", 0, 2**32 - 1, "lie between 0 and 4294967295"),
)
