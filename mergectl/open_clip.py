"""Read a CLIP vision tower under transformers' names, whatever names it is stored under.

Files of open_clip state dicts (`.pt`, `.safetensors`) hold query, key and value as one fused matrix, split here into
three; folders that transformers 5 saves from a CLIPVisionModel leave out `vision_model.`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mergectl.errors import UserError
from mergectl.weights import Checkpoint

if TYPE_CHECKING:
    import torch

FILES = (".pt", ".safetensors")
FIRST = "visual.conv1.weight"
TOWER = "vision_model."
BARE = "embeddings.class_embedding"  # as transformers 5 stores it
OUTER = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
LAYER = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
INNER = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}  # fmt: skip
FUSED = ("q_proj", "k_proj", "v_proj")

Origin = tuple[str, str]  # the stored name, and what is taken of it: "all", "turned", "0", "1" or "2" (a third)


class VisionTower(Checkpoint):
    """A vision tower under other names than those it is stored under."""

    def __init__(self, path: Path, ref: str) -> None:
        if path.is_dir():
            super().__init__(path, ref)
        else:
            self.folder, self.ref, self.meta = path.parent, ref, {}
            self.config = {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModelWithProjection"]}
            self._files = {path: []}
        self.path = path

    @property
    def place(self) -> str:
        """Where it can be opened again."""
        return str(self.path)

    @property
    def label(self) -> str:
        """A short name: the folder's, or the file's with its folder's."""
        return super().label if self.path.is_dir() else f"{self.folder.name}/{self.path.stem}"

    @cached_property
    def _origins(self) -> dict[str, Origin]:
        """Name in transformers -> where it comes from."""
        stored = list(self._file_of)
        if self.path.is_dir():
            return {name if name.startswith(TOWER) else TOWER + name: (name, "all") for name in stored}
        first = next((name for name in stored if name.endswith(FIRST)), None)
        if first is None:
            raise UserError(f"{self.ref} is no state dict of an open_clip image encoder: it has no '{FIRST}'.")
        root = first.removesuffix(FIRST) + "visual."
        return {
            name: (own, part)
            for own in stored
            if own.startswith(root)
            for name, part in _converted(own.removeprefix(root), self.ref)
        }

    @property
    def fused(self) -> bool:
        """Whether query, key and value are one matrix on disk."""
        return any(part == "1" for _, part in self._origins.values())

    def note(self) -> str:
        """What a merge should say of this form."""
        return (
            f"{self.ref} is in open_clip's layout: its fused query, key and value are merged as three matrices, so "
            "masks and spectra differ from those of the fused form."
        )

    def __getitem__(self, name: str) -> torch.Tensor:
        stored, part = self._origins[name]
        weight = super().__getitem__(stored)
        if part == "turned":
            return weight.T.contiguous()
        return weight if part == "all" else weight.chunk(3)[int(part)].contiguous()

    def __contains__(self, name: object) -> bool:
        """Say whether there is such a weight, without reading it."""
        return name in self._origins

    def __iter__(self) -> Iterator[str]:
        return iter(self._origins)

    def __len__(self) -> int:
        return len(self._origins)

    @property
    def names(self) -> list[str]:
        """Weight names as transformers spells them."""
        return list(self._origins)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight, without reading it."""
        stored, part = self._origins[name]
        whole = super().shape(stored)
        if part == "turned":
            return whole[::-1]
        return whole if part == "all" else (whole[0] // 3, *whole[1:])

    def dtype(self, name: str) -> str:
        """The word for a weight's type, without reading it."""
        return super().dtype(self._origins[name][0])

    def where(self, name: str) -> tuple[Path, int, int] | None:
        """Where a weight lies in its file as it is; None for parts of one."""
        stored, part = self._origins[name]
        return super().where(stored) if part == "all" else None


def _converted(name: str, ref: str) -> list[tuple[str, str]]:
    """The transformers names of one open_clip weight of the vision tower, and what each takes of it.

    >>> _converted("transformer.resblocks.3.attn.in_proj_bias", "")[1]
    ('vision_model.encoder.layers.3.self_attn.k_proj.bias', '1')
    """
    if name == "proj":
        return [("visual_projection.weight", "turned")]
    if name in OUTER:
        return [(TOWER + OUTER[name], "all")]
    if found := LAYER.fullmatch(name):
        layer, rest = f"{TOWER}encoder.layers.{found[1]}.", found[2]
        if rest.startswith("attn.in_proj_"):
            kind = rest.removeprefix("attn.in_proj_")
            return [(f"{layer}self_attn.{part}.{kind}", str(third)) for third, part in enumerate(FUSED)]
        module, _, kind = rest.rpartition(".")
        if module in INNER:
            return [(f"{layer}{INNER[module]}.{kind}", "all")]
    raise UserError(f"{ref} has the weight 'visual.{name}', which no CLIP vision transformer of transformers has.")


def opened(path: Path, ref: str) -> VisionTower:
    """Open a file of open_clip weights; a pickled model is refused with the way out."""
    tower = VisionTower(path, ref)
    try:
        tower.names  # noqa: B018 - reads the header
    except UserError as error:
        if "pickled code is never run" not in str(error):
            raise
        raise UserError(
            f"{ref} is no plain state dict; a pickled model is code, which is never run here. Where you trust it, save "
            "its weights alone: torch.save(torch.load(FILE, weights_only=False).state_dict(), 'weights.pt')"
        ) from error
    return tower


def layout(model: Checkpoint) -> str | None:
    """How the vision tower of a CLIP model holds query, key and value on disk: fused or split; None for others.

    They are merged as three matrices, so low ranks and masks are not those of methods that work on the fused one.
    """
    if isinstance(model, VisionTower):
        return "fused" if model.fused else "split"
    return "split" if model.config.get("model_type") in ("clip", "clip_vision_model") else None


def is_bare(model: Checkpoint) -> bool:
    """Whether a folder holds a CLIPVisionModel without `vision_model.` before its names."""
    return model.config.get("model_type") == "clip_vision_model" and BARE in model
