"""Recipes as people write them for models of seven billion parameters, run on tiny models of the same names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergectl.config import read_yaml
from mergectl.models import quiet
from tests.conftest import Cli

RECIPES = sorted((Path(__file__).parent / "recipes").glob("*.yml"))
LAYERS = 32  # as many as the recipes name
IDS = torch.tensor([[1, 5, 7, 3]])
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def names_in(content: Any) -> Iterator[str]:
    """Every model that a recipe names."""
    if isinstance(content, dict):
        yield from (value for key, value in content.items() if key in ("model", "base_model"))
        content = list(content.values())
    for part in content if isinstance(content, list) else ():
        yield from names_in(part)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds `organisation/model` for every model of the recipes: one tiny family each of two kinds."""
    folder = tmp_path_factory.mktemp("hub")
    refs = dict.fromkeys(ref for path in RECIPES for ref in names_in(read_yaml(path)))
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        starts = {kind: start(kind, folder / kind) for kind in ("Mistral", "Llama")}
        for ref in refs:
            kind = "Llama" if any(word in ref.lower() for word in ("llama", "openchat")) else "Mistral"
            (folder / ref).mkdir(parents=True)
            own = {name: x + 0.02 * torch.randn(x.shape) for name, x in starts[kind].items()}
            save_file({n: x.bfloat16() for n, x in own.items()}, folder / ref / "model.safetensors")
            config = json.loads((folder / kind / "config.json").read_text()) | {"dtype": "bfloat16"}
            (folder / ref / "config.json").write_text(json.dumps(config))
    return folder


def start(kind: str, folder: Path) -> dict[str, torch.Tensor]:
    """The weights that a family starts from."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(folder)
    return dict(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_others_runs_unchanged_and_its_result_answers(
    path: Path, hub: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    for organisation in hub.iterdir():
        Path(organisation.name).symlink_to(organisation)
    recipe = read_yaml(path)
    assert cli("merge", "-c", path, "-o", "merged") == 0
    with quiet():
        model, info = AutoModelForCausalLM.from_pretrained("merged", output_loading_info=True)
    assert not any(info.values()), info
    counts = {"passthrough-mistral-48-layers": 48, "passthrough-llama-expansion": 34}
    assert model.config.num_hidden_layers == len(model.model.layers) == counts.get(path.stem, LAYERS)
    assert model.dtype == DTYPES[recipe.get("out_dtype", recipe["dtype"])]
    with torch.no_grad():
        assert model(IDS).logits.isfinite().all()
    merged = load_file("merged/model.safetensors")
    for ref in dict.fromkeys(names_in(recipe)):
        own = load_file(f"{ref}/model.safetensors")
        assert not all(torch.equal(x, own[name].to(x)) for name, x in merged.items() if name in own), ref
