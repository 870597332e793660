"""Checkpoints to measure on: random weights under the names and configurations of real models, whole or sparse."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

EXPERTS = {"roberta": 4, "llama": 3}
DTYPE = {"roberta": "float32", "llama": "bfloat16"}
SHARD = {"roberta": "5GB", "llama": "300MB"}  # a Llama is written in several files, with an index
SPARSE_EXPERTS = 3
EQUAL = 2.4e-7  # of a weight's largest value: what two orders of float32 sums may differ by


def new_model(family: str, scale: float) -> Any:
    """A RoBERTa-base (125 million weights) or a Llama of 522 million, of fewer tokens and layers at a smaller scale."""
    from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaForMaskedLM

    if family == "roberta":
        return RobertaForMaskedLM(RobertaConfig(
            vocab_size=max(64, round(50265 * scale)), num_hidden_layers=max(1, round(12 * scale)),
            max_position_embeddings=514, type_vocab_size=1, dtype="float32",
        ))  # fmt: skip
    config = LlamaConfig(
        vocab_size=max(64, round(32000 * scale)), num_hidden_layers=max(1, round(30 * scale)),
        hidden_size=1024, intermediate_size=3584, num_attention_heads=16, num_key_value_heads=16, dtype="bfloat16",
    )  # fmt: skip
    return LlamaForCausalLM(config).bfloat16()


def population(folder: Path, family: str, scale: float) -> list[Path]:
    """The base and its experts below `folder`, written by transformers where they are not there yet."""
    home = folder / f"{family}-{scale:g}"
    paths = [home / name for name in ("base", *(f"expert{i}" for i in range(EXPERTS[family])))]
    if not all((path / "config.json").exists() for path in paths):
        _write_population(paths, family, scale)
    return paths


def _write_population(paths: list[Path], family: str, scale: float) -> None:
    """Write the experts as the base plus noise, one after the other."""
    import torch

    from mergectl.models import quiet

    print(f"Writing {len(paths)} checkpoints into {paths[0].parent} ...", file=sys.stderr)
    torch.manual_seed(0)
    with quiet(), torch.no_grad():
        model = new_model(family, scale)
        start = [weight.clone() for weight in model.parameters()]
        for seed, path in enumerate(paths):
            chance = torch.Generator().manual_seed(seed)
            for weight, first in zip(model.parameters(), start, strict=True):
                weight.copy_(first if seed == 0 else first + 0.001 * torch.randn(first.shape, generator=chance))
            work = path.with_name(f"{path.name}.part")
            shutil.rmtree(work, ignore_errors=True)
            shutil.rmtree(path, ignore_errors=True)
            model.save_pretrained(work, max_shard_size=SHARD[family])
            work.rename(path)


def sparse_population(home: Path, total: float, small: bool, filled: float) -> list[Path]:
    """A base and three experts of `total` bytes together: a share of every weight is random, the rest a hole."""
    paths = [home / name for name in ("base", *(f"expert{i}" for i in range(SPARSE_EXPERTS)))]
    shutil.rmtree(home, ignore_errors=True)
    shapes = _sparse_shapes(total / len(paths), small)
    for seed, path in enumerate(paths):
        path.mkdir(parents=True)
        places: dict[str, str] = {}
        for number, names in enumerate(_cut(shapes), 1):
            file = f"model-{number:05d}.safetensors"
            _write_sparse(path / file, {name: shapes[name] for name in names}, filled, (seed, number))
            places |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": sum(map(_size, shapes.values()))}, "weight_map": places}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
        (path / "config.json").write_text(json.dumps(config | {"vocab_size": shapes["lm_head.weight"][0]}))
    return paths


def _sparse_shapes(model_bytes: float, small: bool) -> dict[str, tuple[int, ...]]:
    """A bfloat16 Llama with as many layers as fit; its largest weight does not depend on its size."""
    tokens, width, inner = (16000, 512, 1408) if small else (32000, 2048, 5632)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (tokens, width)}
    layer = {f"self_attn.{word}_proj": (width, width) for word in "qkvo"}
    layer |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    left = model_bytes - 2 * _size((tokens, width))
    for i in range(max(1, round(left / sum(map(_size, layer.values()))))):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        shapes |= {f"model.layers.{i}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    return {**shapes, "model.norm.weight": (width,), "lm_head.weight": (tokens, width)}


def _size(shape: tuple[int, ...]) -> int:
    return 2 * math.prod(shape)


def _cut(shapes: dict[str, tuple[int, ...]], limit: float = 1e9) -> Iterator[list[str]]:
    """Names for files of at most `limit` bytes, in order."""
    names: list[str] = []
    for name, shape in shapes.items():
        if names and sum(_size(shapes[n]) for n in names) + _size(shape) > limit:
            yield names
            names = []
        names.append(name)
    yield names


def _write_sparse(file: Path, shapes: dict[str, tuple[int, ...]], filled: float, seed: tuple[int, ...]) -> None:
    """Write a header, random numbers at the start of every weight, and nothing else."""
    import numpy as np

    header: dict[str, dict[str, Any]] = {}
    end = 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end := end + _size(shape)]}
    text = json.dumps(header).encode()
    chance = np.random.Generator(np.random.SFC64(seed))
    with file.open("wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        data = target.tell()
        target.truncate(data + end)
        for place in header.values():
            start, stop = place["data_offsets"]
            count = max(1, round(filled * (stop - start) / 2))
            bits = np.frombuffer(chance.bytes(2 * count), np.uint16)
            target.seek(data + start)
            target.write(((bits & 0x83FF) | 0x3800).tobytes())  # of either sign, from 2**-15 to 2**-7


def files(path: Path) -> list[Path]:
    """The weight files of a checkpoint; say which is missing."""
    index = path / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    for name in names:
        if not (path / name).exists():
            raise SystemExit(f"{path / name} is missing. Remove {path.parent} and run this again to make it anew.")
    return [path / name for name in names]


def size(path: Path) -> int:
    """The bytes of all weight files of a folder, masks and heads of tasks included."""
    return sum(file.stat().st_size for file in path.rglob("*.safetensors"))


def headers(path: Path) -> dict[str, tuple[Path, int]]:
    """Name of every weight -> its file and its bytes."""
    found = {}
    for file in files(path):
        with file.open("rb") as source:
            header = json.loads(source.read(int.from_bytes(source.read(8), "little")))
        for name, place in header.items():
            if name != "__metadata__":
                start, stop = place["data_offsets"]
                found[name] = file, stop - start
    return found


def largest_weight(path: Path) -> int:
    """The bytes of the largest weight."""
    return max(length for _, length in headers(path).values())


def difference(ours: Path, theirs: Path) -> tuple[float, float]:
    """The largest difference of any weight as a share of its largest value, and the share of unequal entries."""
    from safetensors import safe_open

    worst, above, count = 0.0, 0, 0
    mine, other = headers(ours), headers(theirs)
    if odd := set(mine) ^ set(other):
        raise SystemExit(f"'{min(odd)}' is a weight of only one of {ours} and {theirs}.")
    for name, (file, _) in mine.items():
        with safe_open(file, "pt") as one, safe_open(other[name][0], "pt") as two:
            a, b = one.get_tensor(name).double(), two.get_tensor(name).double()
        share = (a - b).abs() / b.abs().max().clamp(min=1e-30)
        worst, above, count = max(worst, float(share.max())), above + int((share > EQUAL).sum()), count + share.numel()
    return worst, above / count


def drop(*paths: Path) -> None:
    """Remove results at once: they are large."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            os.unlink(path)
