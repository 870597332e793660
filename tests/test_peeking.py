"""Models on the hub are looked at by their headers before their weights are fetched."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergectl import peeking
from mergectl.checkpoints import open_checkpoint
from tests import population as made
from tests.conftest import Cli
from tests.hub import Hub

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    found = Hub(tmp_path / "hub-cache", monkeypatch)
    yield found
    found.close()
    assert not any((tmp_path / "scratch").glob("mergectl-headers-*"))


def weights_given(hub: Hub) -> list[str]:
    return [name for name in hub.given if name.endswith(".safetensors")]


def test_models_that_do_not_fit_are_refused_before_they_are_fetched(
    hub: Hub, population: Path, tmp_path: Path, cli: Cli, capsys: Capture
) -> None:
    wide = made.change(population / "loop", tmp_path / "wide", lambda w: {n: torch.cat([x, x]) for n, x in w.items()})
    for name, folder in {"base": population / "base", "parity": population / "parity", "wide": wide}.items():
        hub.put(f"org/{name}", folder)
    assert cli("merge", "average", "--base", "org/base", "--experts", "a=org/parity", "b=org/wide", "-o", "m") == 2
    assert "Experts must be fine-tuned copies of the base" in capsys.readouterr().err
    assert weights_given(hub) == []


def test_layers_that_a_recipe_asks_for_and_no_model_has_are_refused_before_they_are_fetched(
    hub: Hub, population: Path, cli: Cli, capsys: Capture
) -> None:
    hub.put("org/base", population / "base")
    source = {"model": "org/base", "layer_range": [0, 40]}
    Path("up.yml").write_text(json.dumps({"merge_method": "passthrough", "slices": [{"sources": [source]}] * 2}))
    assert cli("merge", "-c", "up.yml", "-o", "m") == 2
    assert "org/base" in capsys.readouterr().err
    assert weights_given(hub) == []


@pytest.mark.parametrize(
    "words",
    [
        ["merge", "--scale", "*.atention.*=0.5"],
        ["search", "--fix", "scale=*.atention.*=0.5"],
        ["search", "--range", "scale@*.atention.*=0:1"],
    ],
)
def test_a_pattern_that_no_weight_fits_is_refused_before_models_are_fetched(
    hub: Hub, population: Path, cli: Cli, capsys: Capture, words: list[str]
) -> None:
    for name in ("base", "parity", "loop"):
        hub.put(f"org/{name}", population / name)
    models = ["--base", "org/base", "--experts", "parity=org/parity", "loop=org/loop", "-o", "m"]
    assert cli(words[0], "task_arithmetic", *words[1:], *models) == 2
    assert "No weight is called '*.atention.*'" in capsys.readouterr().err
    assert weights_given(hub) == []


def test_models_that_fit_are_fetched_once_and_merged(hub: Hub, population: Path, cli: Cli) -> None:
    for name in ("base", "parity", "loop"):
        hub.put(f"org/{name}", population / name)
    near, far = ([f"{t}={place}{t}" for t in ("parity", "loop")] for place in (f"{population}/", "org/"))
    assert cli("merge", "ties", "--base", "org/base", "--experts", *far, "-o", "far") == 0
    assert cli("merge", "ties", "--base", population / "base", "--experts", *near, "-o", "near") == 0
    assert sorted(weights_given(hub)) == ["model.safetensors"] * 3
    one, other = (load_file(f"{name}/model.safetensors") for name in ("far", "near"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_seen_has_the_shapes_and_types_of_the_weights(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    folder.mkdir()
    parts = [
        {"a.w": torch.ones(3, 2).bfloat16(), "s": torch.tensor(2.0)},
        {"b.w": torch.ones(0, 4), "n": torch.arange(3)},
    ]
    for number, part in enumerate(parts):
        save_file(part, folder / f"{number}.safetensors")
    index = {name: f"{number}.safetensors" for number, part in enumerate(parts) for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text("{}")
    hub.put("org/model", folder)
    with peeking.peeking() as peeked:
        seen = open_checkpoint("org/model")
        assert peeked and weights_given(hub) == []
        assert {name: (seen.shape(name), seen.dtype(name)) for name in seen.names} == {
            "a.w": ((3, 2), "BF16"), "s": ((), "F32"), "b.w": ((0, 4), "F32"), "n": ((3,), "I64"),
        }  # fmt: skip
        assert open_checkpoint("org/model").folder == seen.folder
    assert not seen.folder.exists()


def test_a_model_that_is_here_is_opened_as_it_is(hub: Hub, population: Path) -> None:
    hub.put("org/base", population / "base")
    whole = open_checkpoint("org/base")
    with peeking.peeking() as peeked:
        assert open_checkpoint("org/base").folder == whole.folder
    assert not peeked


def test_a_broken_header_on_the_hub_is_told_of_the_file_that_is_fetched(
    hub: Hub, population: Path, tmp_path: Path, cli: Cli, capsys: Capture
) -> None:
    broken = made.change(population / "loop", tmp_path / "broken", lambda w: w)
    (broken / "model.safetensors").write_bytes(b"\x10" + bytes(7) + b"{" + bytes(40))
    hub.put("org/broken", broken)
    assert cli("merge", "average", "--experts", population / "parity", "b=org/broken", "-o", "m") == 2
    assert "is not a whole safetensors file" in capsys.readouterr().err
