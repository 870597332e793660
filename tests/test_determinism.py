"""A merge gives the same bits on any number of threads, in any order of shards and, for thresholds, by any blocks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from mergectl import blocks, merge_weights, settings
from mergectl.methods import _fused, _stored
from tests.conftest import Cli

EXPERTS = ("a", "b", "c")
LENGTH = 1 << 13  # elements of a block
# Two weights of many blocks, one of them in bfloat16, where many magnitudes are equal; and short ones.
SHAPES = {"embed.weight": (512, 300), "layer.0.weight": (300, 440), "layer.0.bias": (400,), "layer.1.weight": (3, 700)}
# Thresholds, whole-model sums, sums over a weight, ranks in a row, random draws.
METHODS = [
    *("ties", "ties_tensor", "breadcrumbs", "pcb", "emr", "sce", "model_stock", "karcher", "della", "dare_ties"),
]
EXACT = ["ties", "ties_tensor", "breadcrumbs"]  # their numbers come from order statistics and from nothing else


def weights(seed: int) -> dict[str, torch.Tensor]:
    start, chance = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in SHAPES.items():
        noise = 0.01 * torch.randn(shape, generator=chance) * (seed > 0)
        found[name] = (torch.randn(shape, generator=start) + noise).to(
            torch.bfloat16 if name.startswith("embed") else torch.float32
        )
    return found


def write(folder: Path, content: Mapping[str, torch.Tensor], shards: list[list[str]]) -> None:
    """Write a checkpoint in as many files as there are lists of names."""
    folder.mkdir(parents=True)
    places: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"part-{number}.safetensors"
        save_file({name: content[name] for name in names}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text('{"model_type": "plain"}')


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same base and experts twice: `forth` and, in other files and another order, `back`."""
    home, names = tmp_path_factory.mktemp("families"), list(SHAPES)
    orders = {"forth": [names[:2], names[2:]], "back": [[name] for name in reversed(names)]}
    for seed, model in enumerate(("base", *EXPERTS)):
        for order, shards in orders.items():
            write(home / order / model, weights(seed), shards)
    return home


@pytest.fixture(autouse=True)
def own_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Cut short blocks, and give torch its threads back."""
    monkeypatch.setattr(blocks, "LENGTH", LENGTH)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def merged(cli: Cli, method: str, family: Path, out: str, threads: int = 1) -> dict[str, bytes]:
    """Merge and return the bits of every weight, mask and rescaler of the result."""
    experts = [f"{name}={family / name}" for name in EXPERTS]
    words = ["--base", family / "base", "--experts", *experts, "-o", out, "--threads", threads, "--quiet"]
    assert cli("merge", method, *words) == 0
    found = {}
    for file in sorted(Path(out).rglob("*.safetensors")):
        for name, weight in load_file(file).items():
            bits = weight.contiguous().flatten().view(torch.uint8)
            found[f"{file.relative_to(out)}: {name}"] = bytes(bits.numpy())
    for file in sorted(Path(out).glob("tasks/*/task.json")):
        found[str(file.relative_to(out))] = str(json.loads(file.read_text()).get("rescaler")).encode()
    assert len(found) >= len(SHAPES)
    return found


@pytest.fixture(scope="module")
def usual() -> dict[str, dict[str, bytes]]:
    """Method -> its result on one thread; each is made when it is first asked for."""
    return {}


@pytest.fixture
def expected(method: str, usual: dict[str, dict[str, bytes]], cli: Cli, families: Path) -> dict[str, bytes]:
    if method not in usual:
        usual[method] = merged(cli, method, families / "forth", "usual")
    return usual[method]


@pytest.mark.parametrize("method", METHODS)
def test_the_number_of_threads_does_not_matter(
    method: str, cli: Cli, families: Path, expected: dict[str, bytes]
) -> None:
    assert merged(cli, method, families / "forth", "other", threads=3) == expected


@pytest.mark.parametrize("method", METHODS)
def test_how_shards_are_ordered_does_not_matter(
    method: str, cli: Cli, families: Path, expected: dict[str, bytes]
) -> None:
    assert merged(cli, method, families / "back", "other") == expected


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("length", [1 << 12, 99_991, 1 << 30])
def test_the_length_of_blocks_does_not_move_a_threshold(
    method: str, length: int, cli: Cli, families: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "LENGTH", length)
    assert merged(cli, method, families / "forth", "other", threads=2) == expected


@pytest.mark.parametrize("method", [*METHODS, "average", "task_arithmetic", "slerp"])
def test_what_is_written_is_what_tensors_in_memory_give(
    method: str, cli: Cli, families: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 2 if method == "slerp" else 3
    base, *experts = (weights(seed) for seed in range(count + 1))
    own = base if method not in ("average", "slerp") else None
    monkeypatch.setattr(_fused, "LEAST", 1 << 62)
    expected = merge_weights(method, own, dict(zip(EXPERTS, experts, strict=False)))
    monkeypatch.setattr(_fused, "LEAST", 1)
    monkeypatch.setattr(_stored, "MANY", 1)
    models = [f"{name}={families / 'forth' / name}" for name in EXPERTS[:count]]
    given = [] if own is None else ["--base", families / "forth" / "base"]
    assert cli("merge", method, *given, "--experts", *models, "-o", "out", "--quiet") == 0
    found = {
        name: weight for file in Path("out").glob("model*.safetensors") for name, weight in load_file(file).items()
    }
    assert set(found) == set(expected) == set(SHAPES)
    for name, weight in expected.items():
        assert_close(
            found[name].float(), weight.float(), rtol=8e-3 if weight.dtype == torch.bfloat16 else 1e-6, atol=1e-6
        )


def test_every_method_tried_here_exists() -> None:
    assert set(METHODS) <= set(settings.names())
