"""Which weights of a checkpoint belong to linear layers, as its own architecture says, and which are stored turned.

The model is built from its configuration on the meta device: it has names, shapes and module types, and no weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergectl.checkpoints import Checkpoint
from mergectl.errors import UserError
from mergectl.models import SET_ANEW, quiet
from mergectl.naming import live_tensors, match

PROJECTIONS = ("visual_projection", "text_projection")  # of CLIP, into the space where its heads are


def known_linears(checkpoint: Checkpoint, folder: Path) -> dict[str, bool] | None:
    """What `linears_of` says, kept in a folder: loading transformers takes longer than many a merge."""
    from importlib.metadata import version

    asked = json.dumps([version("transformers"), checkpoint.config, checkpoint.names], sort_keys=True)
    note = folder / f"{hashlib.sha256(asked.encode()).hexdigest()}.json"
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(note.read_text(encoding="utf-8"))
        if known is None or isinstance(known, dict):
            return known
    found = linears_of(checkpoint)
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        work = note.with_name(f".{note.name}.{os.getpid()}")
        work.write_text(json.dumps(found), encoding="utf-8")
        work.replace(note)
    return found


def linears_of(checkpoint: Checkpoint) -> dict[str, bool] | None:
    """Name of each matrix of a linear layer outside embeddings and heads -> whether it is stored [in, out].

    None where transformers does not know the architecture, or computes with other matrices than are stored: then only
    the names can say.
    """
    model = bare_model(checkpoint.config)
    if model is None:
        return None
    turned = _turned(model)
    try:
        slots = live_tensors(model)
    except UserError:
        return None
    found, _ = match(checkpoint.names, slots, model.base_model_prefix)
    return {name: turned[id(slots[slot])] for slot, name in found.items() if id(slots[slot]) in turned} or None


def bare_model(config: Mapping[str, Any]) -> Any:
    """The backbone that a configuration describes, without weights; None if transformers does not know it."""
    import torch
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from transformers.initialization import no_init_weights

    kind, name = config.get("model_type"), (config.get("architectures") or [""])[0]
    if kind not in transformers.CONFIG_MAPPING:
        return None
    facts = {key: value for key, value in config.items() if key not in SET_ANEW}
    own = getattr(transformers, name, None) if name.endswith("WithProjection") else None  # a tower of CLIP
    try:
        with quiet(), no_init_weights(), torch.device("meta"):
            filled = transformers.CONFIG_MAPPING[kind].from_dict(facts)
            return transformers.AutoModel.from_config(filled) if own is None else own._from_config(filled)
    except (AttributeError, TypeError, ValueError, StrictDataclassError):
        return None


def _turned(model: Any) -> dict[int, bool]:
    """By identity the matrices of linear layers, not of embeddings and projections; True if stored [in, out]."""
    import torch
    from transformers.pytorch_utils import Conv1D

    outside = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    outside |= {id(getattr(model, name).weight) for name in PROJECTIONS if hasattr(model, name)}
    found: dict[int, bool] = {}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            found[id(module.weight)] = isinstance(module, Conv1D)
        elif isinstance(module, torch.nn.MultiheadAttention) and module.in_proj_weight is not None:
            found[id(module.in_proj_weight)] = False
    return {key: value for key, value in found.items() if key not in outside}
