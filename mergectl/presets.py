"""Published settings of fine-tuning by name, and how a batch is cut so that it fits into memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergectl.errors import UserError
from mergectl.finetune_config import FinetuneConfig

PRESETS = ("none", "medusa", "vision")
# They decide settings of a fine-tuning, and are none themselves.
EXTRAS = ("preset", "smaller_batch", "larger_batch", "tiny_sample", "prepass_percent")
LAYERS_OF_LARGE = 24  # T5-base has 12
STUDY_WORDS = {"validation": "report"}  # the Medusa study's name of the split that it both chose and reported on

# Epochs; rows at once in float32 for a base and a large model, and in bfloat16.
FULL = {
    "cola": (10, 128, 32, 128, 64), "sst2": (10, 64, 16, 128, 32), "qqp": (3, 32, 8, 64, 16),
    "wnli": (20, 32, 8, 32, 8), "mnli": (1, 16, 4, 32, 8), "rte": (20, 16, 4, 16, 8), "qnli": (3, 16, 4, 32, 8),
}  # fmt: skip
ADAPTED = {
    "cola": (16, 16), "mnli": (6, 2), "rte": (16, 2), "sst2": (8, 8), "qnli": (2, 2), "qqp": (8, 2), "wnli": (32, 2),
}  # fmt: skip
EFFECTIVE = {"rte": 16, "wnli": 32}  # rows per optimiser step; all others:
USUAL = 256
USUAL_EPOCHS = FinetuneConfig.epochs
SHARED = {"scheduler": "constant", "warmup": 0.0, "weight_decay": 0.0, "max_grad_norm": 0.0, "model_dropout": 0.0}
OF_ADAPTERS = {"lr": 1e-4, "rank": 16, "alpha": 16.0, "dropout": 0.1}
TINY_LR, TINY_SHARE = 6e-4, 8

# CLIP's vision tower as the task arithmetic and PCB studies train it; other data sets by the number of steps they name.
IMAGES = {
    "lr": 1e-5, "weight_decay": 0.1, "scheduler": "cosine", "warmup_steps": 500, "batch_size": 128,
    "max_grad_norm": 1.0,
}  # fmt: skip
IMAGE_EPOCHS = {
    "cars": 35, "dtd": 76, "eurosat": 12, "gtsrb": 11, "mnist": 5, "resisc45": 15, "sun397": 14, "svhn": 4,
}  # fmt: skip
IMAGE_STEPS = 2000


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are settings of a fine-tuning themselves, in our words."""
    found = {name: value for name, value in options.items() if name not in EXTRAS}
    return found | {key: STUDY_WORDS[found[key]] for key in ("select_on",) if found.get(key) in STUDY_WORDS}


def settled(task: str, model: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of one task's fine-tuning: what is given, and for the rest what the preset says.

    >>> settled("glue-t5/cola", {"num_layers": 12}, {"preset": "medusa", "smaller_batch": 4})["batch_size"]
    32
    """
    given = plain(options)
    preset = options.get("preset") or "none"
    if preset not in PRESETS:
        raise UserError(f"preset must be one of {', '.join(PRESETS)}, got '{preset}'.")
    tiny = bool(options.get("tiny_sample"))
    if preset == "none" and tiny:
        raise UserError("tiny_sample shortens the trainings of a preset. Name one: --preset medusa")
    if preset == "vision" and tiny:
        raise UserError("tiny_sample shortens the trainings of the preset medusa, not those of vision.")
    if preset != "none":  # null in a pipeline: as the preset says
        given = {name: value for name, value in given.items() if value is not None}
    found = given if preset == "none" else _published(preset, task, model, given, tiny=tiny) | given
    if percent := options.get("prepass_percent"):
        long = "epochs" if found.get("max_steps") is None else "max_steps"
        found = found | {long: max(1, int(found.get(long, USUAL_EPOCHS) * percent / 100))}
    return _joined(_cut(found, options.get("smaller_batch") or 1), options.get("larger_batch") or 1)


def _published(
    preset: str, task: str, model: Mapping[str, Any], given: Mapping[str, Any], *, tiny: bool
) -> dict[str, Any]:
    """What a preset says of a task."""
    return _medusa(task, model, given, tiny=tiny) if preset == "medusa" else _vision(task, model, given)


def _vision(task: str, model: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What the vision studies do."""
    if "vision_config" not in model and "image_size" not in model:
        raise UserError(f"The preset vision is for models that read images, and {task} is trained from another.")
    epochs = IMAGE_EPOCHS.get(task.rsplit("/", 1)[-1])
    if "epochs" in given or "max_steps" in given:
        return dict(IMAGES)
    return IMAGES | ({"max_steps": IMAGE_STEPS} if epochs is None else {"epochs": epochs})


def _medusa(task: str, model: Mapping[str, Any], given: Mapping[str, Any], *, tiny: bool) -> dict[str, Any]:
    """What the published program calls modularised."""
    name, adapters = task.rsplit("/", 1)[-1], given.get("peft", "none") != "none"
    epochs, rows = _table(task, name, model, given, adapters)
    found: dict[str, Any] = {**SHARED, **(OF_ADAPTERS if adapters else {"lr": 3e-4})}
    rows = min(rows, EFFECTIVE.get(name, USUAL)) if "batch_size" not in given else rows
    found |= {"epochs": epochs, "batch_size": rows, "accumulation": max(1, EFFECTIVE.get(name, USUAL) // rows)}
    return found | ({"lr": TINY_LR, "epochs": max(1, epochs // TINY_SHARE)} if tiny else {})


def _table(
    task: str, name: str, model: Mapping[str, Any], given: Mapping[str, Any], adapters: bool
) -> tuple[float, int]:
    """Epochs and rows at once; of tasks that the study did not have, as given."""
    if name in FULL:
        large = max(int(model.get(key) or 0) for key in ("num_layers", "num_hidden_layers")) >= LAYERS_OF_LARGE
        epochs, *sizes = FULL[name]
        rows = sizes[large + 2 * bool(given.get("bf16"))]
        if adapters:
            epochs, rows = ADAPTED[name]
        return given.get("epochs", epochs), given.get("batch_size", rows)
    if "epochs" not in given or "batch_size" not in given:
        raise UserError(f"The preset medusa says nothing of {task}. Give --epochs and --batch-size with it.")
    return given["epochs"], given["batch_size"]


def _cut(found: dict[str, Any], parts: int) -> dict[str, Any]:
    """The same batches in smaller parts, which give the same gradient."""
    if parts == 1:
        return found
    rows = found.get("batch_size", 16)
    if rows % parts:
        raise UserError(f"smaller_batch must divide the batch of {rows} rows, got {parts}.")
    return found | {"batch_size": rows // parts, "accumulation": found.get("accumulation", 1) * parts}


def _joined(found: dict[str, Any], parts: int) -> dict[str, Any]:
    """The same batches in larger parts; as many as are accumulated at most."""
    if parts == 1:
        return found
    count = found.get("accumulation", 1)
    if count % parts:
        raise UserError(
            f"larger_batch must divide the number of batches that are accumulated per step, {count}, got {parts}. "
            "For more rows per step set batch_size."
        )
    return found | {"batch_size": found.get("batch_size", 16) * parts, "accumulation": count // parts}
