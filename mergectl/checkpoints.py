"""Open a model wherever it is: a folder, a hub id, a run of the store, or an adapter that stands for a full model."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

from mergectl import open_clip, peeking, pins
from mergectl.adapters import AdapterCheckpoint
from mergectl.errors import UserError
from mergectl.jsonfiles import read_json
from mergectl.pins import exact
from mergectl.refs import Cut, Ref, Reheaded, Stack
from mergectl.reheading import HeadedModel
from mergectl.stacking import CutTokens, Stacked
from mergectl.weights import INDEX, PICKLED, PICKLED_INDEX, SINGLE, Checkpoint

__all__ = [
    "INDEX",
    "PICKLED",
    "PICKLED_INDEX",
    "SINGLE",
    "Checkpoint",
    "download",
    "exact",
    "find_folder",
    "load_checkpoint",
    "open_checkpoint",
    "read_json",
]

HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.spm", "*.codes", "*.jinja", "*.md", "*.tiktoken", "*.py"]
# The same weights once more in their makers' own form, and what training left.
NOT_FETCHED = ["*consolidated*", "original/*", "*training_args.bin", "*optimizer.bin", "*scheduler.bin"]


def find_folder(ref: str | Path, find_run: Callable[[str], Path | None] | None = None) -> Path:
    """Turn a model argument into a local folder: a folder, a run of the store, or a hub id (`org/name@revision`)."""
    if not str(ref).strip():
        raise UserError("The name of a model is empty. Name a folder, a hub id or a run.")
    path = Path(ref).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{ref} is a file; name the model's folder.")
    text = str(ref)
    if find_run is not None and "/" not in text and (found := find_run(text)) is not None:
        return found
    if text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise UserError(f"There is no folder '{ref}'.")
    return download(text)


def download(ref: str) -> Path:
    """Fetch a model from the hub (weights, config, tokenizer only) and return its folder in the local cache.

    It is that of the revision that is named, else of the commit that the lab pins, else the present one.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils.tqdm import disable_progress_bars

    repo, _, named = ref.partition("@")
    revision = named or pins.commit_of("models", repo)
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        if (peeked := peeking.look(repo, revision, HUB_FILES[1:], NOT_FETCHED)) is not None:
            return peeked
        fetch = functools.partial(snapshot_download, repo, revision=revision, ignore_patterns=NOT_FETCHED)
        folder = Path(fetch(allow_patterns=HUB_FILES))
        if not any(folder.rglob("*.safetensors")):
            folder = Path(fetch(allow_patterns=["*.bin", *HUB_FILES[1:]]))
    except HFValidationError as error:
        raise UserError(f"There is no folder '{ref}', and it is no hub id either (org/name@revision).") from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"There is no folder '{ref}', and the hub cannot be reached to look for it. Name a local folder."
        ) from error
    except RevisionNotFoundError as error:
        if revision and not named:
            raise UserError(pins.GONE.format(commit=revision, name=repo, file=pins.lab_file())) from error
        raise UserError(f"There is no revision '{named}' of {repo} on the hub.") from error
    except (HfHubHTTPError, OSError) as error:
        raise UserError(
            f"There is no folder '{ref}', and the hub gave no model of that name ({type(error).__name__})."
        ) from error
    return folder


def open_checkpoint(ref: Ref | Path, find_run: Callable[[str], Path | None] | None = None) -> Checkpoint:
    """Open a model by folder, run id or hub id, or a file of open_clip weights.

    Adapters, stacks of layers and models under another head open as the full model they stand for.
    """
    if isinstance(ref, Reheaded):
        lender = None if ref.base is None else open_checkpoint(ref.base, find_run)
        return HeadedModel(ref, open_checkpoint(ref.model, find_run), lender)
    if isinstance(ref, Cut):
        return CutTokens(ref, open_checkpoint(ref.model, find_run))
    if isinstance(ref, Stack):
        return Stacked(ref, lambda model: open_checkpoint(model, find_run))
    path = Path(ref).expanduser()
    if path.suffix in open_clip.FILES and path.is_file():
        return open_clip.opened(path, str(ref))
    folder = find_folder(ref, find_run)
    name = exact(str(ref), folder)
    if (folder / "adapter_config.json").exists() and not any((folder / name).exists() for name in (SINGLE, INDEX)):
        return AdapterCheckpoint(folder, name, lambda base: open_checkpoint(base, find_run))
    found = Checkpoint(folder, name)
    return open_clip.VisionTower(folder, name) if open_clip.is_bare(found) else found


load_checkpoint = open_checkpoint
