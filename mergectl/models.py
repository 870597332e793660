"""Build live models for a task from a folder, a hub id or a bare configuration, always in float32."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergectl.checkpoints import INDEX as SHARDED
from mergectl.checkpoints import PICKLED, PICKLED_INDEX, Checkpoint, exact, find_folder, open_checkpoint
from mergectl.checkpoints import SINGLE as WHOLE
from mergectl.clip import HEAD, TextTower, is_zero_shot
from mergectl.decoders import answer_at_last_token
from mergectl.errors import UserError
from mergectl.jsonfiles import read_config
from mergectl.naming import is_backbone, is_writer, live_tensors, match
from mergectl.preprocess import Preparer, image_preparer, text_preparer
from mergectl.text2text import answer_preparer

if TYPE_CHECKING:
    import torch

    from mergectl.benchmarks._contract import Task

WEIGHTS = (WHOLE, SHARDED, PICKLED, PICKLED_INDEX, "adapter_config.json")
LABEL_KEYS = ("num_labels", "id2label", "label2id", "problem_type")
LM_HEAD = "lm_head.weight"
SET_ANEW = (*LABEL_KEYS, "dtype", "torch_dtype", "architectures", "model_type")


@dataclass(frozen=True)
class Source:
    """Where a model comes from; `weights` is None for a bare configuration."""

    ref: str
    folder: Path | None
    config: Mapping[str, Any]
    weights: Checkpoint | None
    meta: Mapping[str, Any]

    @property
    def trained_on(self) -> str | None:
        """The task whose head the model carries, where it says so."""
        return str(task) if (task := self.meta.get("task")) else None


def open_source(ref: str | Path | Checkpoint) -> Source:
    """Open a model folder, an adapter, a hub id, a JSON configuration, or a folder that holds only `config.json`."""
    if isinstance(ref, Checkpoint):
        return Source(ref.ref, ref.folder, ref.config, ref, ref.meta)
    path = Path(ref).expanduser()
    if path.is_file() and path.suffix == ".json":
        return Source(str(ref), None, read_config(path), None, {})
    if path.is_file():
        found = open_checkpoint(ref)
        return Source(str(ref), found.folder, found.config, found, found.meta)
    folder = find_folder(ref)
    if (folder / "config.json").exists() and not any((folder / name).exists() for name in WEIGHTS):
        return Source(exact(str(ref), folder), folder, read_config(folder / "config.json"), None, {})
    found = open_checkpoint(folder)
    return Source(exact(str(ref), folder), folder, found.config, found, found.meta)


def head_labels(task: Task) -> tuple[str, ...]:
    """The labels of the head that answers a task; a number is one label called score."""
    return task.head or task.labels or ("score",)


def model_config(source: Source, task: Task) -> Any:
    """The transformers configuration of a source, with the labels of a task."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    kind = source.config.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise UserError(f"{source.ref}: its configuration says model_type '{kind}', which transformers does not know.")
    _check_reads(source, str(kind), task)
    facts = {key: value for key, value in source.config.items() if key not in SET_ANEW}
    try:
        config = CONFIG_MAPPING[kind].from_dict(facts)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise UserError(f"{source.ref}: its configuration is no valid {kind} configuration: {error}") from error
    if task.kind == "text_to_text":
        if getattr(config, "decoder_start_token_id", None) is None:  # T5 begins with its padding
            config.decoder_start_token_id = config.pad_token_id
        return config
    if kind == "clip" and not is_zero_shot(source.config):
        config.architectures = source.config["architectures"]
    names = head_labels(task)
    config.num_labels = len(names)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    config.problem_type = "regression" if task.kind == "regression" else "single_label_classification"
    return config


def _check_reads(source: Source, kind: str, task: Task) -> None:
    """Refuse a text task on an image model and the reverse, and models that do not give what the task asks for."""
    from transformers.models.auto import modeling_auto as auto

    images = auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    texts = auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    writers = auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    classifier = "Classification" in (source.config.get("architectures") or [""])[0]
    wants_images = task.kind == "image_classification"
    if task.kind == "text_to_text":
        if kind in writers and not classifier:
            return
        raise UserError(
            f"{task.id} is answered in words, but {source.ref} is a {kind} {'classifier' if classifier else 'model'}. "
            "Take an encoder-decoder that writes, such as T5, or a task for classifiers (glue/rte)."
        )
    if "t5" in kind and not classifier:
        raise UserError(
            f"{task.id} is answered with a label by a classifier, but {source.ref} is a {kind} model, which answers in "
            "words. Ask it a text-to-text task (glue-t5/rte), or take another model."
        )
    if kind in (images if wants_images else texts):
        return
    if kind in (texts if wants_images else images):
        reads, has = ("images", "texts") if wants_images else ("texts", "images")
        raise UserError(f"{task.id} is made of {reads}, but {source.ref} is a {kind} model, which reads {has}.")
    raise UserError(f"{source.ref} is a {kind} model; transformers has no classifier for those.")


def unfilled(config: Any, task: Task) -> Any:
    """A model for a task as its configuration says: a classifier, or an encoder-decoder that writes."""
    import torch

    if task.kind == "image_classification" and is_zero_shot(
        {"model_type": config.model_type, "architectures": getattr(config, "architectures", None)}
    ):
        from mergectl.clip_model import ClipClassifier

        return ClipClassifier._from_config(config, dtype=torch.float32)
    return answer_at_last_token(auto_class(task).from_config(config, dtype=torch.float32))


def auto_class(task: Task) -> Any:
    """The transformers class that builds a model for a task, where it is not CLIP without a trained classifier."""
    import transformers

    if task.kind == "text_to_text":
        return transformers.AutoModelForSeq2SeqLM
    images = task.kind == "image_classification"
    return transformers.AutoModelForImageClassification if images else transformers.AutoModelForSequenceClassification


def new_model(config: Any, task: Task, seed: int) -> Any:
    """A model with fresh weights, the same for the same seed, leaving the global generator alone."""
    import torch

    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return unfilled(config, task)


def empty_model(config: Any, task: Task, device: str = "cpu") -> Any:
    """A model whose weights are not set; on device `meta` it has only names and shapes."""
    import torch
    from transformers.initialization import no_init_weights

    with quiet(), no_init_weights(), torch.device(device):
        return unfilled(copy.deepcopy(config), task)


def preparer_for(source: Source, config: Any, task: Task, max_length: int | None = None) -> Preparer:
    """The preprocessing that belongs to a model: its tokenizer, or its image size."""
    if task.kind == "image_classification":
        return image_preparer(source.folder, source.ref, config)
    if task.kind == "text_to_text":
        return answer_preparer(source.folder, source.ref, config, max_length)
    return text_preparer(source.folder, source.ref, config, max_length)


def tie(model: Any, source: Source, seed: int = 0) -> None:
    """Make a writing model's embedding and head one weight, unless the source has two: transformers ties every T5.

    Without weights to load, a head of its own is drawn anew, spread like the embedding.
    """
    import torch

    model.tie_weights()
    head, tokens = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not tokens.weight or not _own_head(source):
        return
    own = torch.empty_like(tokens.weight)
    if source.weights is None:
        own = torch.randn(own.shape, generator=torch.Generator().manual_seed(seed + 1)) * tokens.weight.std().detach()
    head.weight = torch.nn.Parameter(own)
    model.all_tied_weights_keys.pop(LM_HEAD, None)


def _own_head(source: Source) -> bool:
    """Whether the head is more than a copy of the embedding; a configuration that ties them may be wrong about it."""
    import torch

    says_so = source.config.get("tie_word_embeddings") is False
    weights = source.weights
    if weights is None:
        return says_so
    tokens = [name for name in ("shared.weight", "encoder.embed_tokens.weight") if name in weights.names]
    if LM_HEAD not in weights.names or not tokens:
        return False
    return says_so or not torch.equal(weights[LM_HEAD], weights[tokens[0]])


def fill(model: Any, weights: Mapping[str, torch.Tensor], ref: str, *, with_head: bool) -> set[str]:
    """Copy a checkpoint into a live model; return the slots it left unset (the head, or what the base lacks).

    A weight of the backbone may only be lacking if it is a pooler: those are trained with the head.
    """
    slots, prefix = live_tensors(model), model.base_model_prefix
    found, _ = match(weights, slots, prefix)
    if not with_head:
        found = {slot: name for slot, name in found.items() if is_backbone(slot, prefix)}
    check_complete(slots, found, prefix, ref, with_head=with_head)
    for slot, name in found.items():
        put(slots[slot], weights[name], slot, ref)
    same = {id(slots[slot]) for slot in found}
    return {slot for slot, tensor in slots.items() if id(tensor) not in same}


def check_complete(
    slots: Mapping[str, torch.Tensor], found: Mapping[str, str], prefix: str, ref: str, *, with_head: bool
) -> None:
    """Refuse weights that would leave parts of the model random."""
    same = {id(slots[slot]) for slot in found}
    for slot, tensor in slots.items():
        if id(tensor) in same:
            continue
        inside = is_backbone(slot, prefix)
        if (inside and ".pooler." not in slot) or with_head:
            part = "weight" if inside else "head weight"
            raise UserError(f"{ref} has no {part} '{slot}', so it is no {prefix} model that can be loaded here.")


def put(slot: torch.Tensor, weight: torch.Tensor, name: str, ref: str) -> None:
    """Copy one weight into its place in a live model."""
    import torch

    if slot.shape != weight.shape:
        raise UserError(f"'{name}' has shape {list(weight.shape)} in {ref}, but the model needs {list(slot.shape)}.")
    with torch.no_grad():
        slot.copy_(weight)


def build(source: Source, task: Task, *, seed: int = 0, from_scratch: bool = False) -> Any:
    """A model to train on a task: the source's backbone, and a fresh head unless it has one for this very task."""
    config = model_config(source, task)
    model = new_model(config, task, seed)
    writes = is_writer(model)
    if writes:
        tie(model, replace(source, weights=None) if from_scratch else source, seed)
    if source.weights is not None and not from_scratch:
        fill(model, source.weights, source.ref, with_head=writes or source.trained_on == task.id)
    if task.kind == "image_classification" and is_zero_shot(source.config):
        _read_out(model, source, task)
    return model


def _read_out(model: Any, source: Source, task: Task) -> None:
    """Give a CLIP model the head of a task, its own or one made by its text tower."""
    if source.weights is None:
        raise UserError(f"{source.ref} has no weights, and the heads of a CLIP model are made by its text tower.")
    own = HEAD in source.weights and source.trained_on == task.id
    head = source.weights[HEAD] if own else TextTower(source.weights).head(task)
    put(model.get_parameter(HEAD), head, HEAD, source.ref)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from printing advice and progress bars; its former settings come back afterwards."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def pick_device(device: str = "auto") -> str:
    """Check a device's name; `auto` is the first accelerator that torch can use, else the CPU."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        raise UserError(f"There is no device '{device}'. Use auto, cpu, cuda, cuda:1 or mps.")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: this machine has no usable CUDA device. Try --device cpu.")
    return device
