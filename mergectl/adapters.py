"""Open a PEFT adapter (LoRA, DoRA, IA3) as the full model it stands for, folded in weight by weight on reading."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergectl.adapter_folds import check_lora, factors, fits, fold_ia3, fold_ia3_bias, fold_lora, lora_scale
from mergectl.errors import UserError
from mergectl.jsonfiles import read_adapter, read_record
from mergectl.layers import NUMBERED
from mergectl.naming import as_stored, stored_modules
from mergectl.prefixes import prefixes
from mergectl.weights import Checkpoint, WeightFile

if TYPE_CHECKING:
    import torch

ROOT = "base_model.model."
START = "start.safetensors"  # beside an adapter: the factors that it was begun from, under their names in its own file
PARTS = re.compile(
    r"(?P<module>.*)\.(?P<part>lora_A\.weight|lora_B\.(weight|bias)|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector(\.weight)?|ia3_l)$"
)


HEAD = re.compile(r"(^|\.)(classifier(\.out_proj)?|score)\.weight$")  # one row per label


class AdapterCheckpoint(Checkpoint):
    """A full model: the adapter's base, with the adapter folded in, and the head that was trained beside it."""

    def __init__(self, folder: Path, ref: str, open_base: Callable[[str], Checkpoint]) -> None:
        self.folder, self.ref = folder, ref
        self.settings = read_adapter(folder)
        self.kind = str(self.settings.get("peft_type"))
        if self.kind not in ("LORA", "IA3"):
            raise UserError(f"{ref} is a {self.kind} adapter; only LoRA, DoRA and IA3 can be folded into weights.")
        check_lora(self.settings, ref)
        base = self.settings.get("base_model_name_or_path")
        if not base:
            raise UserError(f"{ref}: adapter_config.json does not name its base model (base_model_name_or_path).")
        _check_chain(folder, ref)
        try:
            self.base = open_base(_at_revision(str(base), self.settings.get("revision")))
        except UserError as error:
            raise UserError(
                f"{ref} is an adapter of {base}: {error} Where that model lies elsewhere, say so in the adapter's "
                "adapter_config.json (base_model_name_or_path)."
            ) from error
        self.meta = read_record(folder)
        self._adapter = WeightFile(_adapter_file(folder, ref))
        self._modules, saved = self._sort_out()
        spelled = self._spelling()
        self._own = {spelled(module): module for module in self._modules}  # module as the base spells it -> as here
        self._saved = {_respelled(name, spelled): key for name, key in saved.items()}
        self.prefix = self._find_prefix(self._own) or ""
        self.config = _labelled(
            self.base.config, {name: self._adapter.header[key].shape for name, key in saved.items()}
        )
        self._turned = {module: self._is_turned(module) for module in self._own}
        for module in self._own:
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

    def _spelling(self) -> Callable[[str], str]:
        """How the base spells the adapter's modules: as they are, below its backbone's prefix, or by older names."""
        below = [lead for lead in prefixes(self.base.names) if lead]
        ways: list[Callable[[str], str]] = [str, *(lead.__add__ for lead in below)]
        if found := self._first_that_fits(ways):
            return found
        stored = stored_modules(self.base.config)  # builds the model, so it comes last
        ways = [
            lambda module: as_stored(module, stored),
            *(lambda m, p=lead: as_stored(p + m, stored) for lead in below),
        ]
        if found := self._first_that_fits(ways):
            return found
        lacks = self._find_lacking()
        raise UserError(f"{self.ref} adapts '{lacks}', which its base {self.base.ref} does not have.")

    def _first_that_fits(self, ways: Sequence[Callable[[str], str]]) -> Callable[[str], str] | None:
        return next((way for way in ways if self._find_prefix([way(m) for m in self._modules]) is not None), None)

    def _find_prefix(self, modules: Iterable[str]) -> str | None:
        """What module names carry before the base's own names (`bert.` or nothing); None if that is not all."""
        found = list(modules)
        for prefix in ("", *(f"{module.split('.', 1)[0]}." for module in found[:1])):
            if all(m.startswith(prefix) and f"{m.removeprefix(prefix)}.weight" in self.base for m in found):
                return prefix
        return None

    def _find_lacking(self) -> str:
        """The first module of which the base has no weight under any prefix."""
        leads = prefixes(self.base.names)
        ends = {module: (*(lead + module for lead in leads), module.partition(".")[2]) for module in self._modules}
        odd = (module for module in ends if not any(f"{name}.weight" in self.base for name in ends[module]))
        return next(odd, next(iter(self._modules), ""))

    def _is_turned(self, module: str) -> bool:
        """Whether a module keeps its weight as [in, out]: embeddings, and GPT-2's Conv1D.

        peft notes in its file what the last module it came to was like, so that is asked last.
        """
        parts, weight = self._shapes(module), self.shape(f"{module}.weight")
        if "lora_embedding_A" in parts or len(weight) != 2:
            return "lora_embedding_A" in parts
        straight, turned = (fits(weight, parts, turned=way) for way in (False, True))
        if straight != turned:
            return turned
        beside = self._beside(module.removeprefix(self.prefix))
        return bool(self.settings.get("fan_in_fan_out")) if beside is None else beside

    def _beside(self, module: str) -> bool | None:
        """Whether other matrices of the layer are turned: those with a bias as long as one of their sides show it."""
        match = NUMBERED.match(module)
        for name in self.base if match else ():
            if match and name.startswith(match[0]) and name.endswith(".bias"):
                weight = f"{name.removesuffix('.bias')}.weight"
                shape = self.base.shape(weight) if weight in self.base else ()
                if len(shape) == 2 and shape[0] != shape[1]:
                    return (shape[1],) == self.base.shape(name)
        return None

    def _shapes(self, module: str) -> dict[str, tuple[int, ...]]:
        return {part: self._adapter.header[key].shape for part, key in self._modules[self._own[module]].items()}

    def _check_shapes(self, module: str) -> None:
        """Refuse parts that do not fit the weight they belong to."""
        weight, shapes = self.shape(f"{module}.weight"), self._shapes(module)
        for one, other in (("A", "B"), ("B", "A"), ("embedding_A", "embedding_B"), ("embedding_B", "embedding_A")):
            if f"lora_{one}" in shapes and f"lora_{other}" not in shapes:
                raise UserError(f"{self.ref} has lora_{one} of '{module}', but not lora_{other}. Is it whole?")
        if not all(map(math.prod, shapes.values())) or not fits(weight, shapes, turned=self._turned[module]):
            told = ", ".join(f"{part} {list(shape)}" for part, shape in shapes.items())
            raise UserError(
                f"{self.ref}: the parts for '{module}' ({told}) do not fit its base's weight of shape {list(weight)}."
            )

    @property
    def files(self) -> list[Path]:
        """The files that hold the adapter's weights and its base's."""
        return [self._adapter.path, *self.base.files]

    def check_unchanged(self) -> None:
        """Refuse files of weights that are others now than when their headers were read."""
        self._adapter.check_unchanged()
        self.base.check_unchanged()

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
        if self._module_of(name) in self._own:
            return "F32"
        own = self._names[name]
        return self._adapter.header[self._saved[name]][1] if own is None else self.base.dtype(own)

    def where(self, name: str) -> tuple[Path, int, int] | None:
        """The bytes of a weight that the adapter leaves as it is; None for the others."""
        own = self._names[name]
        return None if own is None or self._module_of(name) in self._own else self.base.where(own)

    @staticmethod
    def _module_of(name: str) -> str:
        return name.rpartition(".")[0]

    def __getitem__(self, name: str) -> torch.Tensor:
        own = self._names[name]
        weight = self._adapter.read(self._saved[name]) if own is None else self.base[own]
        at = self._module_of(name)
        if at not in self._own:
            return weight
        module, bias, weight = self._own[at], name.endswith(".bias"), weight.float()
        parts = {part: self._adapter.read(key).float() for part, key in self._modules[module].items()}
        if self.kind == "IA3":
            fold, vector = fold_ia3_bias if bias else partial(fold_ia3, turned=self._turned[at]), parts["ia3_l"]
            return fold(weight, vector, module, self.settings)
        scale = lora_scale(module, len(factors(parts)[0]), self.settings)
        if bias:
            return weight + scale * parts["lora_B.bias"] if "lora_B.bias" in parts else weight
        return fold_lora(weight, parts, scale, turned=self._turned[at])

    @property
    def modules(self) -> dict[str, dict[str, str]]:
        """The adapted modules, each with its parts and their names in the file."""
        return self._modules

    def part(self, module: str, name: str) -> torch.Tensor:
        """One part of a module's adapter: `lora_A`, `lora_B` or `ia3_l`."""
        return self._adapter.read(self._modules[module][name]).float()

    def part_shape(self, module: str) -> tuple[int, ...]:
        """The shape of a module's first part: as many dimensions as the weight has that it belongs to."""
        return self._adapter.header[next(iter(self._modules[module].values()))].shape

    def scaled(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Plain LoRA's factors s B and A, whose product is what it adds to a module's weight, outputs by inputs."""
        down, up = self.part(module, "lora_A"), self.part(module, "lora_B")
        return self.scale(module) * up, down

    def scale(self, module: str) -> float:
        """What plain LoRA multiplies a module's product by."""
        rank = self._adapter.header[self._modules[module]["lora_A"]].shape[0]
        return lora_scale(module, rank, self.settings)

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


def _check_chain(folder: Path, ref: str) -> None:
    """Refuse an adapter of itself, or of an adapter of itself."""
    seen, at = [folder.resolve()], folder
    while (at / "adapter_config.json").is_file():
        at = Path(str(read_adapter(at).get("base_model_name_or_path"))).expanduser()
        if at.resolve() in seen:
            raise UserError(f"{ref} is an adapter of itself: its adapter_config.json names {at} as its base model.")
        seen.append(at.resolve())


def _at_revision(base: str, revision: str | None) -> str:
    """The base with the revision that the adapter was trained on, if its file names one; a folder has none."""
    return f"{base}@{revision}" if revision and "@" not in base and not Path(base).expanduser().is_dir() else base


def _respelled(name: str, spelled: Callable[[str], str]) -> str:
    """A whole weight's name as the base spells it."""
    module, dot, ending = name.rpartition(".")
    return spelled(module) + dot + ending if module else name


def _labelled(config: Mapping[str, Any], saved: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The base's configuration with as many labels as the head has that was trained beside the adapter."""
    rows = next((shape[0] for name, shape in saved.items() if HEAD.search(name)), None)
    if rows is None or rows == len(config.get("id2label") or range(config.get("num_labels", 2))):
        return dict(config)
    labels = {str(number): f"LABEL_{number}" for number in range(rows)}
    return {**config, "id2label": labels, "label2id": {label: int(number) for number, label in labels.items()}}
