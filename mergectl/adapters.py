"""Open a PEFT adapter (LoRA, DoRA, IA3) as the full model it stands for, folded in weight by weight on reading."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergectl.errors import UserError
from mergectl.weights import Checkpoint, WeightFile, read_json

if TYPE_CHECKING:
    import torch

ROOT = "base_model.model."
START = "start.safetensors"  # beside an adapter: the factors that it was begun from, under their names in its own file
PARTS = re.compile(
    r"(?P<module>.*)\.(?P<part>lora_A\.weight|lora_B\.(weight|bias)|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector(\.weight)?|ia3_l)$"
)
# Kinds of LoRA that mean more than W + s B A; the last word of each is a value of init_lora_weights.
OTHER_LORA = (
    "layer_replication", "target_parameters", "trainable_token_indices", "use_qalora", "use_bdlora", "kasa_config",
    "arrow_config", "monteclora_config", "alora_invocation_tokens",
)  # fmt: skip
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class AdapterCheckpoint(Checkpoint):
    """A full model: the adapter's base, with the adapter folded in, and the head that was trained beside it."""

    def __init__(self, folder: Path, ref: str, open_base: Callable[[str], Checkpoint]) -> None:
        self.folder, self.ref = folder, ref
        self.settings = read_json(folder / "adapter_config.json")
        self.kind = str(self.settings.get("peft_type"))
        if self.kind not in ("LORA", "IA3"):
            raise UserError(f"{ref} is a {self.kind} adapter; only LoRA, DoRA and IA3 can be folded into weights.")
        _check_kind(self.settings, ref)
        base = self.settings.get("base_model_name_or_path")
        if not base:
            raise UserError(f"{ref}: adapter_config.json does not name its base model (base_model_name_or_path).")
        self.base = open_base(base)
        self.meta = read_json(folder / "mergectl.json") if (folder / "mergectl.json").exists() else {}
        self._adapter = WeightFile(_adapter_file(folder, ref))
        self._modules, self._saved = self._sort_out()
        self.prefix = self._find_prefix()
        self.config = dict(self.base.config)
        for module in self._modules:
            self._check_shapes(module)

    def _sort_out(self) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
        """Adapter parts by module, and whole weights (a trained head) by name."""
        modules: dict[str, dict[str, str]] = {}
        saved: dict[str, str] = {}
        for key in self._adapter.header:
            name = key.removeprefix(ROOT)
            if match := PARTS.match(name):
                modules.setdefault(match["module"], {})[match["part"].removesuffix(".weight")] = key
            elif re.search(r"\.(lora|ia3|token_adapter)_?", name):
                raise UserError(f"{self.ref} holds '{name}', a part that cannot be folded into weights.")
            elif ".original_module." not in name:
                name = name.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
                saved[name.replace(".base_layer.", ".")] = key
        return modules, saved

    def _find_prefix(self) -> str:
        """What the adapter's module names carry before the base's own names (`bert.` or nothing)."""
        first = next(iter(self._modules), "")
        for prefix in ("", first.split(".", 1)[0] + "."):
            stripped = [module.removeprefix(prefix) for module in self._modules if module.startswith(prefix)]
            if len(stripped) == len(self._modules) and all(f"{m}.weight" in self.base for m in stripped):
                return prefix
        raise UserError(f"{self.ref} adapts '{first}', which its base {self.base.ref} does not have.")

    def _check_shapes(self, module: str) -> None:
        """Refuse parts that do not fit the weight they belong to."""
        weight = self.shape(f"{module}.weight")
        outer, inner = weight[::-1] if _is_turned(self._modules[module], self.settings) else weight
        shapes = {part: self._adapter.header[key][0] for part, key in self._modules[module].items()}
        if "ia3_l" in shapes:
            fits = shapes["ia3_l"] in ((1, inner), (outer, 1), (1, outer), (inner, 1))
        else:
            down, up = (shapes.get(f"lora_{x}", shapes.get(f"lora_embedding_{x}", ())) for x in "AB")
            fits = len(down) == len(up) == 2 and (up[0], down[1]) == (outer, inner) and down[0] == up[1]
        if not fits:
            told = ", ".join(f"{part} {list(shape)}" for part, shape in shapes.items())
            raise UserError(
                f"{self.ref}: the parts for '{module}' ({told}) do not fit its base's weight of shape {list(weight)}."
            )

    @property
    def files(self) -> list[Path]:
        """The files that hold the adapter's weights and its base's."""
        return [self._adapter.path, *self.base.files]

    @cached_property
    def _names(self) -> dict[str, str | None]:
        """Every weight's name -> the base's name, or None for what the adapter itself holds."""
        names: dict[str, str | None] = {self.prefix + name: name for name in self.base}
        return names | dict.fromkeys(self._saved)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        """Say whether there is such a weight, without reading it."""
        return name in self._names

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
        if self._module_of(name) in self._modules:
            return "F32"
        own = self._names[name]
        return self._adapter.header[self._saved[name]][1] if own is None else self.base.dtype(own)

    def where(self, name: str) -> tuple[Path, int, int] | None:
        """The bytes of a weight that the adapter leaves as it is; None for the others."""
        own = self._names[name]
        return None if own is None or self._module_of(name) in self._modules else self.base.where(own)

    @staticmethod
    def _module_of(name: str) -> str:
        return name.rpartition(".")[0]

    def __getitem__(self, name: str) -> torch.Tensor:
        own = self._names[name]
        weight = self._adapter.read(self._saved[name]) if own is None else self.base[own]
        parts = self._modules.get(self._module_of(name))
        if parts is None:
            return weight
        tensors = {part: self._adapter.read(key).float() for part, key in parts.items()}
        fold = _fold_ia3 if self.kind == "IA3" else _fold_lora
        return fold(weight.float(), tensors, name, self.settings)

    @property
    def modules(self) -> dict[str, dict[str, str]]:
        """The adapted modules, each with its parts and their names in the file."""
        return self._modules

    def part(self, module: str, name: str) -> torch.Tensor:
        """One part of a module's adapter: `lora_A`, `lora_B` or `ia3_l`."""
        return self._adapter.read(self._modules[module][name]).float()

    def scaled(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Plain LoRA's factors s B and A, whose product is what it adds to a module's weight, outputs by inputs."""
        down, up = self.part(module, "lora_A"), self.part(module, "lora_B")
        return self.scale(module) * up, down

    def scale(self, module: str) -> float:
        """What plain LoRA multiplies a module's product by."""
        rank = self._adapter.header[self._modules[module]["lora_A"]].shape[0]
        return _lora_scale(f"{module}.weight", rank, self.settings)

    @property
    def has_start(self) -> bool:
        """Whether the factors that training began from lie beside the adapter."""
        return (self.folder / START).exists()

    def start(self, module: str, name: str) -> torch.Tensor:
        """A module's factor `lora_A` or `lora_B` as it was before training."""
        return self._started.read(self._modules[module][name]).float()

    @cached_property
    def _started(self) -> WeightFile:
        return WeightFile(self.folder / START)

    def product(self, module: str) -> torch.Tensor:
        """What plain LoRA adds to a module's weight."""
        up, down = self.scaled(module)
        return up @ down

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the base's digest and the adapter's files."""
        sha = hashlib.sha256(self.base.digest.encode())
        own = [self._adapter.path, self.folder / "adapter_config.json"]
        for path in [*own, self.folder / START] if self.has_start else own:
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


def _check_kind(settings: dict[str, Any], ref: str) -> None:
    """Refuse the kinds of LoRA that stand for something else than base plus product."""
    odd = [name for name in OTHER_LORA if settings.get(name)]
    if odd:
        raise UserError(f"{ref} is a LoRA adapter with {odd[0]}, which cannot be folded into weights.")
    start = str(settings.get("init_lora_weights")).lower()
    if start.startswith(CHANGES_BASE):
        raise UserError(
            f"{ref} was begun by {start}, which also changes the base. Save it once more as plain LoRA with peft: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )


def _is_turned(parts: Mapping[str, Any], settings: dict[str, Any]) -> bool:
    """Whether a module keeps its weight as [in, out]: embeddings, and GPT-2's Conv1D."""
    return "lora_embedding_A" in parts or bool(settings.get("fan_in_fan_out"))


def _fold_lora(
    weight: torch.Tensor, parts: dict[str, torch.Tensor], name: str, settings: dict[str, Any]
) -> torch.Tensor:
    """W + s B A, with s = alpha / r; DoRA then gives every output row its learned length."""
    down, up = (parts[f"lora_{x}"] if f"lora_{x}" in parts else parts[f"lora_embedding_{x}"] for x in "AB")
    scale = _lora_scale(name, len(down), settings)
    if name.endswith(".bias"):
        return weight + scale * parts["lora_B.bias"] if "lora_B.bias" in parts else weight
    turned = _is_turned(parts, settings)
    whole = (weight.T if turned else weight) + scale * (up @ down)
    if "lora_magnitude_vector" in parts:
        whole = whole * (parts["lora_magnitude_vector"] / whole.norm(dim=1)).unsqueeze(1)
    return whole.T.contiguous() if turned else whole


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
