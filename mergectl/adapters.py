"""Open a PEFT adapter (LoRA, DoRA, IA3) as the full model it stands for, folded in weight by weight on reading."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergectl.errors import UserError
from mergectl.weights import Checkpoint, WeightFile, read_json

if TYPE_CHECKING:
    import torch

ROOT = "base_model.model."
PARTS = re.compile(
    r"(?P<module>.*)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
    r"(\.weight)?|ia3_l)$"
)


class AdapterCheckpoint(Checkpoint):
    """A full model: the adapter's base, with the adapter folded in, and the head that was trained beside it."""

    def __init__(self, folder: Path, ref: str, open_base: Callable[[str], Checkpoint]) -> None:
        self.folder, self.ref = folder, ref
        self.settings = read_json(folder / "adapter_config.json")
        self.kind = str(self.settings.get("peft_type"))
        if self.kind not in ("LORA", "IA3"):
            raise UserError(f"{ref} is a {self.kind} adapter; only LoRA, DoRA and IA3 can be folded into weights.")
        base = self.settings.get("base_model_name_or_path")
        if not base:
            raise UserError(f"{ref}: adapter_config.json does not name its base model (base_model_name_or_path).")
        self.base = open_base(base)
        self.meta = read_json(folder / "mergectl.json") if (folder / "mergectl.json").exists() else {}
        self._adapter = WeightFile(_adapter_file(folder, ref))
        self._modules, self._saved = self._sort_out()
        self.prefix = self._find_prefix()
        self.config = dict(self.base.config)

    def _sort_out(self) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
        """Adapter parts by module, and whole weights (a trained head) by name."""
        modules: dict[str, dict[str, str]] = {}
        saved: dict[str, str] = {}
        for key in self._adapter.header:
            name = key.removeprefix(ROOT)
            if match := PARTS.match(name):
                modules.setdefault(match["module"], {})[match["part"].removesuffix(".weight")] = key
            else:
                saved[name.replace(".modules_to_save.default", "").replace(".modules_to_save", "")] = key
        return modules, saved

    def _find_prefix(self) -> str:
        """What the adapter's module names carry before the base's own names (`bert.` or nothing)."""
        first = next(iter(self._modules), "")
        for prefix in ("", first.split(".", 1)[0] + "."):
            stripped = [module.removeprefix(prefix) for module in self._modules if module.startswith(prefix)]
            if len(stripped) == len(self._modules) and all(f"{m}.weight" in self.base for m in stripped):
                return prefix
        raise UserError(f"{self.ref} adapts '{first}', which its base {self.base.ref} does not have.")

    @cached_property
    def _names(self) -> dict[str, str | None]:
        """Every weight's name -> the base's name, or None for what the adapter itself holds."""
        names: dict[str, str | None] = {self.prefix + name: name for name in self.base}
        return names | dict.fromkeys(self._saved)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def names(self) -> list[str]:
        """Weight names: the base's, then the trained head's."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight, without reading it."""
        own = self._names[name]
        return self._adapter.header[self._saved[name]][0] if own is None else self.base.shape(own)

    def dtype(self, name: str) -> str:
        """The type of a weight: adapted ones are float32, whatever the base is stored in."""
        own = self._names[name]
        if own is None:
            return self._adapter.header[self._saved[name]][1]
        return "F32" if self._module_of(name) in self._modules else self.base.dtype(own)

    @staticmethod
    def _module_of(name: str) -> str:
        return name.rpartition(".")[0]

    def __getitem__(self, name: str) -> torch.Tensor:
        own = self._names[name]
        if own is None:
            return self._adapter.read(self._saved[name])
        weight = self.base[own]
        parts = self._modules.get(self._module_of(name))
        if parts is None:
            return weight
        tensors = {part: self._adapter.read(key).float() for part, key in parts.items()}
        fold = _fold_ia3 if self.kind == "IA3" else _fold_lora
        return fold(weight.float(), tensors, name, self.settings)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the base's digest and the adapter's files."""
        sha = hashlib.sha256(self.base.digest.encode())
        for path in (self._adapter.path, self.folder / "adapter_config.json"):
            sha.update(path.read_bytes())
        return sha.hexdigest()

    @property
    def label(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def head_names(self) -> tuple[str, ...]:
        """The whole weights that were trained beside the adapter."""
        return tuple(self._saved)


def _adapter_file(folder: Path, ref: str) -> Path:
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).exists():
            return folder / name
    raise UserError(f"{ref} has adapter_config.json but no adapter_model.safetensors.")


def _fold_lora(
    weight: torch.Tensor, parts: dict[str, torch.Tensor], name: str, settings: dict[str, Any]
) -> torch.Tensor:
    """W + s B A, with s = alpha / r; DoRA then gives every output row its learned length."""
    if name.endswith(".bias"):
        return weight
    if "lora_embedding_A" in parts:
        down, up = parts["lora_embedding_A"], parts["lora_embedding_B"]
        return weight + _lora_scale(name, len(down), settings) * (up @ down).T
    down, up = parts["lora_A"], parts["lora_B"]
    turned = bool(settings.get("fan_in_fan_out"))
    whole = (weight.T if turned else weight) + _lora_scale(name, len(down), settings) * (up @ down)
    if "lora_magnitude_vector" in parts:
        whole = whole * (parts["lora_magnitude_vector"] / whole.norm(dim=1)).unsqueeze(1)
    return whole.T if turned else whole


def _lora_scale(name: str, rank: int, settings: dict[str, Any]) -> float:
    alpha = float(settings["lora_alpha"])
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name.rpartition(".")[0]):
            alpha = float(value)
            break
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def _fold_ia3(
    weight: torch.Tensor, parts: dict[str, torch.Tensor], name: str, settings: dict[str, Any]
) -> torch.Tensor:
    """Scale what the vector scales: inputs of feed-forward modules (1 x in), outputs of the others (out x 1)."""
    vector = parts["ia3_l"]
    if name.endswith(".bias"):
        return weight * vector.reshape(-1) if vector.shape[1] == 1 and vector.shape[0] == len(weight) else weight
    turned = bool(settings.get("fan_in_fan_out"))
    return ((weight.T if turned else weight) * vector).T if turned else weight * vector
