"""LoRA and IA3 through peft: which modules, how to put them on, how to fold them back."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from mergectl.errors import UserError
from mergectl.naming import is_backbone, is_writer

if TYPE_CHECKING:
    import torch

    from mergectl.finetune_config import FinetuneConfig

# The first row whose modules the model has: attention query and value for LoRA; key, value and feed-forward for IA3.
LORA = (("query", "value"), ("query_proj", "value_proj"), ("q_proj", "v_proj"), ("in_proj",), ("c_attn",), ("q", "v"))
IA3 = (
    (("key", "value"), "output.dense"),
    (("key_proj", "value_proj"), "output.dense"),
    (("k_proj", "v_proj"), "fc2"),
    (("in_proj",), "output.dense"),
    (("c_attn",), "mlp.c_proj"),
    (("k", "v"), "wo"),
)


def put_on(model: Any, config: FinetuneConfig) -> Any:
    """Freeze a model and give it trainable adapters; its head is trained in full."""
    import torch
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft advises about what is set below
        torch.manual_seed(config.seed)
        try:
            return get_peft_model(model, _settings(model, config))
        except ValueError as error:
            targets = ",".join(config.targets)
            raise UserError(f"{config.peft} cannot be put on '{targets}' of this model: {error}") from error


def _settings(model: Any, config: FinetuneConfig) -> Any:
    from peft import IA3Config, LoraConfig, TaskType

    kind = TaskType.SEQ_2_SEQ_LM if is_writer(model) else TaskType.SEQ_CLS
    facts: dict[str, Any] = {
        "task_type": None if model.main_input_name == "pixel_values" else kind,
        "modules_to_save": head_modules(model),
        "fan_in_fan_out": model.config.model_type == "gpt2",  # its Conv1D stores weights transposed
    }
    if config.peft == "lora":
        targets = list(config.targets) or list(_first(model, config, LORA))
        return LoraConfig(
            r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets, **facts
        )
    if config.targets:
        forward = [name for name in config.targets if name in {row[1] for row in IA3}]
        return IA3Config(target_modules=list(config.targets), feedforward_modules=forward, **facts)
    attention, last = next((row for row in IA3 if _has(model, (*row[0], row[1]))), ((), ""))
    if not attention:
        raise UserError(_nothing(model, config))
    return IA3Config(target_modules=[*attention, last], feedforward_modules=[last], **facts)


def _first(model: Any, config: FinetuneConfig, rows: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    for row in rows:
        if _has(model, row):
            return row
    raise UserError(_nothing(model, config))


def _has(model: Any, names: tuple[str, ...]) -> bool:
    modules = [f".{name}" for name, _ in model.named_modules()]
    return all(any(module.endswith(f".{name}") for module in modules) for name in names)


def _nothing(model: Any, config: FinetuneConfig) -> str:
    kind = model.config.model_type
    return f"No layers for {config.peft} are known in a {kind} model. Name them: --targets q_proj,v_proj"


def factors(model: Any) -> dict[str, torch.Tensor]:
    """A copy of the factors of LoRA as they are now, under the names that peft gives them on disk."""
    from mergectl.masking import trainable

    found = trainable(model)[0].items()
    return {name: weight.detach().cpu().clone().contiguous() for name, weight in found if ".lora_" in name}


def head_modules(model: Any) -> list[str]:
    """The top modules outside the backbone that learn: the classifier, for some models a pooler; none if it writes."""
    if is_writer(model):
        return []
    learning = [name for name, tensor in model.named_parameters() if tensor.requires_grad]
    outside = [name for name in learning if not is_backbone(name, model.base_model_prefix)]
    return list(dict.fromkeys(name.split(".")[0] for name in outside))


def fold(model: Any) -> Any:
    """Merge the adapters into the weights and return the plain model."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    plain = model.get_base_model()
    for path, module in list(plain.named_modules()):
        owner, _, name = path.rpartition(".")
        if isinstance(module, BaseTunerLayer):
            module.merge()
            setattr(plain.get_submodule(owner), name, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            setattr(plain.get_submodule(owner), name, module.modules_to_save[model.active_adapter])
    return plain
