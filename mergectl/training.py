"""The training loop: transformers' Trainer, scored on `tune` by our own evaluation, resumable at any moment."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from torch.utils.data import Sampler, SequentialSampler
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from mergectl.bench import Bench, score_model
from mergectl.errors import WorkError
from mergectl.masking import Guard, guard_for
from mergectl.text2text import IGNORED

if TYPE_CHECKING:
    from mergectl.benchmarks._contract import Kind
    from mergectl.finetune_config import FinetuneConfig

Progress: TypeAlias = Callable[[int, int, str], None]
FIT, TUNE = {"loss": "loss", "learning_rate": "lr"}, "eval_"
UNRECORDED = ("eval_examples", "eval_seconds")


WINDOW = 50  # batches that are shuffled as one before they are sorted by length


class ByLength(Sampler[int]):
    """A shuffled order in which the rows of a batch are of like length; a function of seed and epoch alone."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths, self._size, self._seed, self._epoch = lengths, batch_size, seed, 0

    def __len__(self) -> int:
        return len(self._lengths)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        chance = random.Random(f"{self._seed} {self._epoch}")
        rows = list(range(len(self._lengths)))
        chance.shuffle(rows)
        window = WINDOW * self._size
        for start in range(0, len(rows), window):
            rows[start : start + window] = sorted(rows[start : start + window], key=self._lengths.__getitem__)
        batches = [rows[start : start + self._size] for start in range(0, len(rows), self._size)]
        short = [batches.pop()] if len(batches[-1]) < self._size else []  # only the last batch may be short
        chance.shuffle(batches)
        return (row for batch in batches + short for row in batch)


class TaskTrainer(Trainer):  # type: ignore[misc, unused-ignore]
    """Trainer, but evaluation is by our benches, checkpoints carry live names, and a misload is never silent."""

    control: Any

    def __init__(
        self, *, bench: Bench, dtype: str, sampler: Sampler[int] | None = None, guard: Guard | None = None, **facts: Any
    ) -> None:
        super().__init__(**facts)
        self._bench, self._dtype, self._sampler, self._guard = bench, dtype, sampler, guard

    def create_optimizer(self, model: Any = None) -> Any:
        """With ownership masks, an optimiser that is kept to them."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh and self._guard is not None:
            self._guard.attach(optimizer)
        return optimizer

    def _clip_grad_norm(self, model: Any) -> Any:
        """What a branch does not own has no part in the length of its gradient."""
        if self._guard is not None:
            self._guard.zero_gradients()
        return super()._clip_grad_norm(model)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Score the model on the split that chooses and tell the callbacks."""
        found = score_model(self.model, self._bench, dtype=self._dtype)
        metrics = {f"{TUNE}{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Batches of neighbours in length where the job asks for them."""
        return self._sampler or super()._get_train_sampler(train_dataset)

    def floating_point_ops(self, inputs: Any) -> int:
        """Nobody reads Trainer's own estimate, which costs a walk over all weights each step."""
        return 0

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save under the live names: Trainer loads them back that way, and a ViT is stored under others."""
        from peft import PeftModel
        from safetensors.torch import save_model

        if isinstance(self.model, PeftModel):
            super()._save(output_dir, state_dict)
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.model, str(folder / "model.safetensors"))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Weights that a checkpoint lacks would stay random: that is an error here."""
        lost = [name for name in load_result.missing_keys if not self._is_tied(name)]
        if lost or load_result.unexpected_keys:
            name = (lost + list(load_result.unexpected_keys))[0]
            raise WorkError(f"The training checkpoint in {self.args.output_dir} does not fit the model ('{name}').")

    def _is_tied(self, name: str) -> bool:
        """Whether a weight is another's under a second name: of those, only one is saved."""
        state = self.model.state_dict(keep_vars=True)
        return sum(tensor is state[name] for tensor in state.values()) > 1


class Recorder(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Tells the caller how far training is, and the run what was measured."""

    def __init__(self, task: str, run: Any, progress: Progress | None, scored: str) -> None:
        self._task, self._run, self._progress, self._scored = task, run, progress, scored
        self._seen: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After a resume, repeat what was measured before the interruption."""
        for entry in state.log_history:
            self._record(entry, int(entry["step"]))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report one step."""
        if self._progress is not None and state.is_world_process_zero:
            facts = "".join(f" {name} {value:.3f}" for name, value in self._seen.items())
            self._progress(state.global_step, state.max_steps, f"{self._task}{facts}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any) -> None:
        """Record the training loss, the learning rate and the scores."""
        self._record(logs or {}, state.global_step)

    def _record(self, entry: Mapping[str, float], step: int) -> None:
        for name, split, value in measured(entry, self._scored):
            if name in ("loss", "score"):
                self._seen[name] = value
            if self._run is not None:
                self._run.metric(name, value, task=self._task, split=split, step=step)


def measured(entry: Mapping[str, float], scored: str = "tune") -> list[tuple[str, str, float]]:
    """What one entry of the Trainer's log says, as (name, split, value); `scored` is the split of its scores."""
    fit = [(new, "fit", float(entry[old])) for old, new in FIT.items() if old in entry]
    scores = [
        (name.removeprefix(TUNE), scored, float(value))
        for name, value in entry.items()
        if name.startswith(TUNE) and name not in UNRECORDED
    ]
    return fit + scores


def loss(kind: Kind) -> Callable[..., Any]:
    """Mean loss per example (per token of the answers) of the whole batch.

    The mean is the same however the batch is cut into accumulated parts or spread over devices.
    """
    from torch.nn.functional import cross_entropy, mse_loss

    def compute(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        logits = outputs["logits"].float()
        items = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        if kind == "regression":
            return mse_loss(logits.view(-1), labels.float().view(-1), reduction="sum") / items
        return cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum") / items

    return compute


def arguments(config: FinetuneConfig, folder: Path, device: str) -> TrainingArguments:
    """Trainer's settings for a fine-tuning job."""
    import torch

    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    every = "epoch" if config.eval_every is None else "steps"
    found = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation, num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1, max_grad_norm=config.max_grad_norm,
        learning_rate=config.learning_rate, weight_decay=config.weight_decay,
        warmup_steps=config.warmup_steps or config.warmup, lr_scheduler_type=config.scheduler,
        seed=config.seed, data_seed=config.seed, bf16=config.bf16, use_cpu=device == "cpu",
        eval_strategy=every, save_strategy=every, logging_strategy=every,
        eval_steps=config.eval_every or 1, save_steps=config.eval_every or 1, logging_steps=config.eval_every or 1,
        save_total_limit=1, load_best_model_at_end=config.keep == "best",
        metric_for_best_model="score", greater_is_better=True,
        restore_callback_states_from_checkpoint=True, remove_unused_columns=False, label_names=["labels"],
        dataloader_pin_memory=device.startswith("cuda"), dataloader_num_workers=0, ddp_find_unused_parameters=False,
        report_to="none", disable_tqdm=True, log_level="error",
    )  # fmt: skip
    if found.n_gpu > 1:
        found._n_gpu = 1  # several GPUs are for torchrun; DataParallel would change the batch
    return found


def make_trainer(
    config: FinetuneConfig,
    args: TrainingArguments,
    model: Any,
    examples: Sequence[dict[str, Any]],
    bench: Bench,
    *,
    run: Any = None,
    progress: Progress | None = None,
) -> TaskTrainer:
    """Put model, data and callbacks together."""
    from transformers import PrinterCallback

    callbacks: list[Any] = [Recorder(bench.task.id, run, progress, config.select_on)]
    if config.patience is not None:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=config.patience))
    trainer = TaskTrainer(
        sampler=_sampler(config, examples, bench), guard=guard_for(model, Path(config.masks)) if config.masks else None,
        bench=bench, dtype="bfloat16" if config.bf16 else "float32", model=model, args=args,
        train_dataset=examples, eval_dataset=list(examples[:1]), data_collator=bench.preparer.collate,
        compute_loss_func=loss(bench.task.kind), callbacks=callbacks,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def _sampler(config: FinetuneConfig, examples: Sequence[dict[str, Any]], bench: Bench) -> Sampler[int] | None:
    """The order of the rows, where it is not plainly by chance."""
    if config.order == "sequential":
        return SequentialSampler(examples)
    if not config.by_length or not examples:
        return None
    lengths = [bench.preparer.length(example) for example in examples]
    return ByLength(lengths, config.batch_size * config.accumulation, config.seed)


def last_checkpoint(folder: Path) -> str | None:
    """The newest training checkpoint that was written to its end, or None."""
    found = {int(path.name.split("-")[1]): path for path in folder.glob("checkpoint-*") if _is_whole(path)}
    return str(found[max(found)]) if found else None


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))  # written last
    except (OSError, ValueError):
        return False
    return True


def curve(history: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """One row per evaluation: step, epoch, training loss, learning rate and the tune metrics."""
    rows: dict[int, dict[str, float]] = {}
    for entry in history:
        found = {name: value for name, _, value in measured(entry)}
        if found:
            rows.setdefault(int(entry["step"]), {"step": entry["step"], "epoch": entry["epoch"]}).update(found)
    return list(rows.values())
