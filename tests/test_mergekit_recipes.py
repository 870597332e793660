"""mergekit's recipes: read as they are, checked line by line, and merged as mergekit describes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mergectl import merge_weights
from mergectl.errors import UserError
from mergectl.gradients import Depth, evaluate, patterns
from mergectl.mergekit import flag
from mergectl.mergekit_jobs import job_of
from mergectl.mergekit_methods import METHODS
from mergectl.merging import MergeWarning
from mergectl.plan import select
from tests.conftest import Cli

LAYERS = 3
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and three fine-tuned copies of it, `base`, `chat`, `code` and `math`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from mergectl.models import quiet

    folder = tmp_path_factory.mktemp("llamas")
    config = LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        start = {name: x.clone() for name, x in model.state_dict().items()}
        model.save_pretrained(folder / "base")
        for name in ("chat", "code", "math"):
            model.load_state_dict({key: x + 0.02 * torch.randn(x.shape) for key, x in start.items()})
            model.save_pretrained(folder / name)
    return folder


@pytest.fixture
def here(llamas: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work where `models/...` is the family, as recipes name them."""
    Path("models").symlink_to(llamas)
    return llamas


def weights(name: str) -> Weights:
    return dict(load_file(Path("models") / name / "model.safetensors"))


def save(text: str) -> Path:
    path = Path("recipe.yml")
    path.write_text(text)
    return path


def run(cli: Cli, text: str) -> Weights:
    save(text)
    assert cli("merge", "-c", "recipe.yml", "-o", "out", "--force") == 0
    return dict(load_file("out/model.safetensors"))


def assert_weights(got: Weights, expected: Any, atol: float = 1e-6) -> None:
    assert set(got) == set(expected)
    for name, x in expected.items():
        torch.testing.assert_close(got[name].float(), x.float(), rtol=0, atol=atol, msg=f"{name} differs")


LINEAR = """
models:
  - model: models/chat
    parameters:
      weight: 0.3
  - model: models/code
    parameters:
      weight: 0.9
merge_method: linear
dtype: float16
"""


def test_linear_is_the_weighted_mean(cli: Cli, here: Path) -> None:
    got = run(cli, LINEAR)
    chat, code = weights("chat"), weights("code")
    assert {x.dtype for x in got.values()} == {torch.float16}
    assert_weights(got, {name: 0.25 * chat[name] + 0.75 * code[name] for name in chat}, atol=5e-4)


@pytest.mark.parametrize("word", ["false", "no", "Off", "0", "0.0"])
def test_flags_are_written_in_many_ways(word: str, cli: Cli, here: Path) -> None:
    got = run(cli, f"{LINEAR}parameters: {{normalize: {word}}}\n")
    chat, code = weights("chat"), weights("code")
    assert_weights(got, {name: 0.3 * chat[name] + 0.9 * code[name] for name in chat}, atol=2e-3)


def test_numbers_may_be_text_and_models_mappings_as_on_older_cards(cli: Cli, here: Path) -> None:
    told = LINEAR.replace("0.3", '"0.3"').replace("model: models/chat", "model: {model: {path: models/chat}}")
    assert told.count("path") == 1 and '"0.3"' in told
    assert_weights(run(cli, told), run(cli, LINEAR))
    text = SLERP.replace("[0, 3]", '["0", "3"]').replace("base_model: models/chat", "base_model: {model: models/chat}")
    assert_weights(run(cli, text), run(cli, SLERP))


def test_weights_may_be_percentages(cli: Cli, here: Path) -> None:
    assert_weights(
        run(cli, LINEAR.replace("0.3", "25").replace("0.9", "75.0")), run(cli, f"{LINEAR}out_dtype: float16")
    )


SLERP = """
slices:
  - sources:
      - model: models/chat
        layer_range: [0, 3]
      - model: models/math
        layer_range: [0, 3]
merge_method: slerp
base_model: models/chat
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: float32
"""


def test_slerp_follows_its_gradients_and_filters(cli: Cli, here: Path) -> None:
    got = run(cli, SLERP)
    attention, mlp = [0, 0.3, 1], [1, 0.7, 0]
    pair = {name: weights(name) for name in ("chat", "math")}
    for name, x in got.items():
        layer = re.search(r"layers\.(\d)", name)
        at = int(layer[1]) if layer else 0
        t = attention[at] if "self_attn" in name else mlp[at] if "mlp" in name else 0.5
        alone = {task: {name: w[name]} for task, w in pair.items()}
        torch.testing.assert_close(x, merge_weights("slerp", None, alone, t=t)[name], rtol=0, atol=1e-6)


TIES = """
models:
  - model: models/base
    # nothing to say of the base
  - model: models/chat
    parameters:
      density: 0.5
      weight: 0.5
  - model: models/code
    parameters:
      density: 0.53
      weight: [0, 0.3, 0.7, 1]   # a gradient over the layers
  - model: models/math
    parameters:
      density: 0.2
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: models/base
parameters:
  normalize: true
  int8_mask: true
dtype: float32
"""


def ties_by_hand(name: str, given: list[tuple[str, float, float]]) -> torch.Tensor:
    """Trim to max(1, int(density n)), elect by the weighted sum with 0 as plus, divide by the weights that agree."""
    base = weights("base")[name].double()
    rows = []
    for model, density, weight in given:
        delta = weights(model)[name].double() - base
        count = max(1, int(density * delta.numel()))
        floor = delta.abs().flatten().sort(descending=True).values[count - 1]
        rows.append((torch.where(delta.abs() >= floor, delta, 0) * weight, weight))
    sign = torch.where(torch.stack([row for row, _ in rows]).sum(0) >= 0, 1.0, -1.0)
    mixed = torch.stack([torch.where(row.sign() == sign, row, 0) for row, _ in rows]).sum(0)
    divisor = torch.stack([(row.sign() == sign) * weight for row, weight in rows]).sum(0)
    return base + mixed / torch.where(divisor == 0, 1.0, divisor)


def test_ties_is_that_of_the_recipe_tensor_by_tensor(cli: Cli, here: Path) -> None:
    got = run(cli, TIES)
    code = {0: 0.0, 1: 0.5 * (0.3 + 0.7), 2: 1.0}
    for name, x in got.items():
        layer = re.search(r"layers\.(\d)", name)
        own = [("chat", 0.5, 0.5), ("code", 0.53, code[int(layer[1])] if layer else 0.0)]
        expected = ties_by_hand(name, [*own, ("math", 0.2, 0.5 if "mlp" in name else 0.0)])
        torch.testing.assert_close(x.double(), expected, rtol=0, atol=1e-6, msg=f"{name} differs")


DARE_TIES = """
models:
  - model: models/base
  - model: models/chat
    parameters: {density: 0.53, weight: 0.4}
  - model: models/code
    parameters: {density: 0.53, weight: 0.3}
  - model: models/math
    parameters: {density: 0.53, weight: 0.3}
merge_method: dare_ties
base_model: models/base
parameters:
  int8_mask: true
dtype: bfloat16
tokenizer_source: base
"""


def test_dare_ties_is_ours_with_its_words(cli: Cli, here: Path) -> None:
    got = run(cli, DARE_TIES)
    given: dict[str, Any] = {"drop": 1 - 0.53, "rescale_to": "l1", "weight": (0.4, 0.3, 0.3), "combine": "disjoint_sum"}
    experts = {name: weights(name) for name in ("chat", "code", "math")}
    expected = merge_weights("dare_ties", weights("base"), experts, zero_sign="plus", **given)
    assert_weights(got, {name: x.bfloat16() for name, x in expected.items()})


MODEL_STOCK = """
models:
  - model: models/chat
  - model: models/code
  - model: models/math
merge_method: model_stock
base_model: models/base
dtype: bfloat16
out_dtype: float32
"""


def test_model_stock_needs_no_parameters(cli: Cli, here: Path) -> None:
    experts = {name: weights(name) for name in ("chat", "code", "math")}
    assert_weights(run(cli, MODEL_STOCK), merge_weights("model_stock", weights("base"), experts))


BREADCRUMBS = """
merge_method: breadcrumbs_ties
base_model: models/base
models:
  - model: models/chat
    parameters: {weight: 0.6, density: 0.6, gamma: 0.05}
  - model: models/code
    parameters: {weight: 0.4, density: 0.9}
parameters:
  lambda: 1.1
  gamma: 0.01
"""


def test_breadcrumbs_ties_takes_each_models_own_shares(cli: Cli, here: Path) -> None:
    experts = {name: weights(name) for name in ("chat", "code")}
    expected = merge_weights(
        "breadcrumbs_ties", weights("base"), experts, keep=(0.6, 0.9), gamma=(0.05, 0.01), weight=(0.6, 0.4), scale=1.1,
        combine="disjoint_sum", zero_sign="plus",
    )  # fmt: skip
    assert_weights(run(cli, BREADCRUMBS), expected)


WITH_BASE = "base_model: models/base\nmodels:\n  - model: models/chat\n{}  - model: models/code\n{}"
WEIGHTED = "    parameters: {weight: 0.5}\n"
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "task_arithmetic": ("task_arithmetic", {"scale": (0.5, 0.5)}),
    "dare_linear": ("dare_task_arithmetic", {"scale": (0.5, 0.5), "drop": (0.0, 0.0), "rescale_to": "l1"}),
    "breadcrumbs": ("breadcrumbs", {"scale": (0.5, 0.5), "keep": 1.0}),
    "della": ("della", {"weight": (0.5, 0.5), "keep": 1.0, "zero_sign": "plus", "combine": "disjoint_mean"}),
    "della_linear": ("della_linear", {"scale": (0.5, 0.5), "keep": 1.0}),
    "multislerp": ("multislerp", {"on": "deltas"}),
    "nuslerp": ("nuslerp", {"on": "deltas"}),
    "sce": ("sce", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_methods_on_two_models_and_a_base(name: str, here: Path) -> None:
    method, given = OTHERS[name]
    own = "" if name == "sce" else WEIGHTED
    job = job_of(save(f"merge_method: {name}\n" + WITH_BASE.format(own, own)), 0)
    experts = {task: weights(task) for task in ("chat", "code")}
    got = merge_weights(job.recipe.method, weights("base"), experts, **job.recipe.settings)
    assert (job.base, [ref for _, ref in job.experts]) == ("models/base", ["models/chat", "models/code"])
    assert_weights(dict(got), merge_weights(method, weights("base"), experts, **given))


@pytest.mark.parametrize(("name", "extra"), [("arcee_fusion", ""), ("nearswap", "parameters: {t: 0.01}\n")])
def test_methods_that_move_the_base_towards_one_model(name: str, extra: str, cli: Cli, here: Path) -> None:
    got = run(cli, f"merge_method: {name}\nbase_model: models/base\nmodels:\n  - model: models/chat\n{extra}")
    given: dict[str, Any] = {"t": 0.01} if extra else {}
    assert_weights(got, merge_weights(name, weights("base"), {"chat": weights("chat")}, **given))


def test_a_base_counts_in_karcher_and_linear(cli: Cli, here: Path) -> None:
    models = {name: weights(name) for name in ("base", "chat")}
    text = "base_model: models/base\nmodels: [{model: models/chat}]\n"
    assert_weights(run(cli, f"merge_method: karcher\n{text}"), merge_weights("karcher", None, models))
    job = job_of(save(f"merge_method: linear\n{text}parameters: {{weight: 1}}\n"), 0)
    assert [ref for _, ref in job.experts] == ["models/base", "models/chat"]


def test_every_method_of_mergekit_that_we_share_is_read() -> None:
    assert set(METHODS) == {
        "linear", "slerp", "nuslerp", "multislerp", "task_arithmetic", "ties", "dare_ties", "dare_linear",
        "breadcrumbs", "breadcrumbs_ties", "della", "della_linear", "model_stock", "sce", "karcher",
        "arcee_fusion", "nearswap", "passthrough",
    }  # fmt: skip


def test_normalized_task_arithmetic_divides_by_the_sum_of_the_weights() -> None:
    text = "merge_method: task_arithmetic\nbase_model: b\nmodels:\n"
    text += "  - {model: x/a, parameters: {weight: 1}}\n  - {model: y/a, parameters: {weight: 3}}\n"
    assert job_of(save(text), 0).recipe.settings == {"scale": (1.0, 3.0)}
    job = job_of(save(text + "parameters: {normalize: true, lambda: 0.5}\n"), 7)
    assert (job.recipe.settings, job.recipe.seed) == ({"scale": (0.125, 0.375)}, 7)
    assert job.experts == (("a_1", "x/a"), ("a_2", "y/a"))


def test_ties_with_rescale_trims_and_rescales_first() -> None:
    text = "merge_method: ties\nbase_model: b\nmodels: [{model: a, parameters: {weight: 1, density: 0.5}}]\n"
    job = job_of(save(text + "parameters: {rescale: true}\n"), 0)
    assert job.recipe.method == "breadcrumbs_ties"
    assert {key: job.recipe.settings[key] for key in ("keep", "gamma", "rescale")} == {
        "keep": (0.5,), "gamma": 0.0, "rescale": True,
    }  # fmt: skip


MODELS = "models:\n  - model: a\n    parameters: {weight: 1}\n  - model: c\n    parameters: {weight: 1}\n"
WRONG = {
    "merge_method: tiess\nmodels: [{model: a}]\n": "line 1: there is no merge_method 'tiess'. Did you mean 'ties'?",
    "merge_method: passthrough\nslices: []\n": "line 2: 'slices' must be a list with at least one entry",
    f"merge_method: passthrough\n{MODELS}": "line 4: unknown parameter 'weight' in passthrough.",
    "merge_method: passthrough\nmodels: [{model: a}, {model: c}]\n": "takes exactly 1 expert, got 2.",
    f"name: mine\nmerge_method: ties\nbase_model: b\n{MODELS}": (
        "line 1: unknown key 'name'. Known: base_model, dtype, merge_method, models, out_dtype, parameters, slices, "
        "tokenizer_source."
    ),
    f"merge_method: ties\nbase_modle: b\n{MODELS}": "line 2: unknown key 'base_modle'. Did you mean 'base_model'?",
    f"merge_method: ties\n{MODELS}": "line 1: ties needs a base_model.",
    f"merge_method: linear\n{MODELS}tokenizer_source: onion\n": "line 7: tokenizer_source 'onion' is not read, only",
    f"merge_method: linear\n{MODELS}tokenizer: {{source: base}}\n": "line 7: 'tokenizer' is not read",
    f"merge_method: linear\n{MODELS}dtype: float61\n": "line 7: dtype must be one of",
    f"merge_method: linear\n{MODELS}parameters:\n  normalise: true\n": (
        "line 8: unknown parameter 'normalise' in linear. Did you mean 'normalize'?"
    ),
    f"merge_method: linear\n{MODELS}---\nmerge_method: linear\n": "line 7: another document begins here",
    f"merge_method: linear\n{MODELS}parameters:\n  normalize: 2\n": "line 8: normalize must be true or false, got 2.",
    f"merge_method: linear\n{MODELS}parameters:\n  normalize: x\n": "line 8: normalize must be true or false, got 'x'",
    "merge_method: linear\nmodels:\n  - model: a\n    parameters: {weight: [[0, 1], [1]]}\n  - model: c\n": (
        "line 4: 'weight' must be a value, a list of numbers"
    ),
    "merge_method: linear\nmodels:\n- model: a\n  parameters:\n    weight:\n    - filter: [q, k]\n      value: 1\n": (
        "line 6: a filter is a part of weights' names, got ['q', 'k']."
    ),
    "merge_method: linear\nmodels:\n  - model: {model: {path: a}, lora: b}\n": "line 3: 'a': a model with an adapter",
    "merge_method: linear\nmodels:\n  - model: {model: {pth: a}}\n": "line 3: unknown key 'pth'. Did you mean 'path'?",
    "merge_method: karcher\nmodels: [{model: a}, {model: c}]\nparameters:\n  max_iter: 10.5\n": (
        "line 4: max_iter must be a whole number, got 10.5."
    ),
    "merge_method: karcher\nmodels: [{model: a}, {model: c}]\nparameters:\n  max_iter: [1, 10]\n": (
        "line 4: max_iter is a whole number, and those have no gradient."
    ),
    "merge_method: della\nbase_model: b\nparameters:\n  density: 0.1\n  weight: 1\nmodels: [{model: c}]\n": (
        "line 4: density - epsilon and density + epsilon must lie inside 0 to 1, got density 0.1, epsilon 0.15."
    ),
    f"merge_method: linear\nmodels: [{{model: a, parameters: {{weight: 1{'0' * 400}}}}}]\n": (
        "line 2: weight must be a number, got 1"
    ),
    "merge_method: linear\nmodels: [a, c]\n": "line 2: 'models, entry 1' must be a mapping of keys to values, got 'a'.",
    "merge_method: ties\nbase_model: b\nmodels:\n  - model: a\n    parameters:\n      weight: 1\n      density: 53\n": (
        "line 7: density must lie between 0 and 1, got 53. It is a share, not a percentage."
    ),
    "merge_method: ties\nbase_model: b\nmodels:\n  - model: a\n    parameters:\n      weight: 1\n      lambda: 1\n": (
        "line 7: 'lambda' holds for the whole merge"
    ),
    "merge_method: ties\nbase_model: b\nmodels:\n  - model: a\n  - model: c\n": "line 4: 'a' has no weight.",
    "merge_method: ties\nbase_model: b\nmodels:\n  - model: a\n    weight: 1\n": "line 5: unknown key 'weight'.",
    "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: c, parameters: {weight: -1}}]\n": (
        "the weights 1, -1 add up to zero"
    ),
    "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 1}}\n- {model: c, parameters: {weight: -1}}\n": (
        "line 3: the weights 1, -1 add up to zero"
    ),
    "merge_method: ties\nbase_model: b\nparameters: {weight: 0}\nmodels:\n- {model: a}\n- {model: c}\n": (
        "line 3: all weights are 0, so nothing would be merged."
    ),
    f"merge_method: [ties]\n{MODELS}": "line 1: merge_method is the name of a method, got ['ties'].",
    f"merge_method: linear\n{MODELS}out_dtype: [float16]\n": "line 7: out_dtype must be one of",
    "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: c}]\n": "slerp needs the parameter t.",
    "merge_method: slerp\nbase_model: a\nmodels: [{model: a}]\nparameters: {t: 0.5}\n": "takes exactly 2 experts, got",
    "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: c}]\nparameters:\n  t: [0, 1.5]\n": (
        "line 5: t must lie between 0 and 1, got 1.5."
    ),
    "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: c}]\nparameters:\n  t:\n    - fliter: mlp\n": (
        "line 6: unknown key 'fliter'. Did you mean 'filter'?"
    ),
    "merge_method: della\nbase_model: a\nmodels: [{model: c, parameters: {weight: 1, density: 0.9}}]\n": (
        "density - epsilon and density + epsilon must lie inside 0 to 1, got density 0.9, epsilon 0.15."
    ),
    "merge_method: dare_ties\nbase_model: a\nmodels: [{model: c, parameters: {weight: 1, density: 0}}]\n": (
        "line 3: density must lie between"
    ),
    "merge_method: model_stock\nbase_model: a\nmodels: [{model: c}]\n": "takes at least 2 experts, got 1",
    "merge_method: linear\nmodels: [{model: a+lora, parameters: {weight: 1}}]\n": "line 2: 'a+lora': a model with an",
    "merge_method: linear\nmodels: []\n": "line 2: 'models' must be a list with at least one entry",
    "merge_method: linear\n": "line 1: a recipe lists its inputs either as 'models' or as 'slices'.",
    "merge_method: slerp\nslices:\n  - sources: [{model: a, layer_range: [8, 8]}]\n": (
        "line 3: layer_range is the first layer, from 0, and that after the last, got [8, 8]."
    ),
    "merge_method: slerp\nslices:\n  - sources: [{model: a, layer_range: [0, 1.5]}]\n": (
        "line 3: layer_range is the first layer"
    ),
    "merge_method: slerp\nslices:\n  - sources: [{model: a, layer_range: [0, 2]}]\n  - sources: [{model: a}]\n": (
        "line 4: 'a' needs a layer_range, as the recipe has several slices."
    ),
    "merge_method: slerp\nbase_model: a\nslices:\n  - sources: [{model: c, layer_range: [0, 2]}]\n": (
        "line 4: base_model is one of the two models of slerp: list it in every slice."
    ),
    "merge_method: linear\nslices:\n  - sources: [{model: a}]\n    base_model: c\n": (
        "line 4: 'base_model' of a slice is not read: all slices have the base_model at the top."
    ),
    "merge_method: linear\nslices:\n  - sources: [{model: a}]\n    residual_weight: 0.5\n": (
        "line 4: 'residual_weight' of a slice is not read"
    ),
    "merge_method: linear\nslices:\n  - sources: [{model: a}]\n    layer_range: [0, 2]\n": (
        "line 4: unknown key 'layer_range'."
    ),
    "merge_method: ties\nbase_model: b\nslices:\n  - sources:\n    - {model: a, layer_range: [0, 2]}\n"
    "    - {model: c, layer_range: [2, 4]}\n": "line 4: the layers of base_model are not clear here",
    "merge_method: model_stock\nbase_model: b\nslices:\n  - sources:\n    - {model: a, layer_range: [0, 2]}\n"
    "    - {model: c, layer_range: [0, 2]}\n  - sources: [{model: a, layer_range: [2, 4]}]\n": (
        "line 7: this slice has another number of models, which model_stock cannot take."
    ),
}  # fmt: skip


@pytest.mark.parametrize("text", WRONG, ids=WRONG.__getitem__)
def test_a_wrong_recipe_is_refused_before_any_model_is_opened(text: str) -> None:
    with pytest.raises(UserError) as caught:
        job_of(save(text), 0)
    assert str(caught.value).startswith("recipe.yml")
    assert WRONG[text] in str(caught.value)


def test_sources_of_one_slice_need_as_many_layers(here: Path) -> None:
    with pytest.raises(UserError, match=r"line 7: 'models/math' has 3 layers in this slice and 'models/chat' 2: all"):
        job_of(save(SLERP.replace("[0, 3]", "[0, 2]", 1)), 0)


def test_layers_that_a_model_has_not_are_refused_with_their_line(here: Path) -> None:
    with pytest.raises(UserError, match=r"line 5: 'models/chat' has 3 layers, and none up to 3"):
        job_of(save(SLERP.replace("[0, 3]", "[1, 4]")), 0)


ANCHORED = """
models:
  - &first
    model: models/chat
    parameters: &shares {weight: 0.3}
  - <<: *first
    model: models/code
  - model: models/math
    parameters:
      <<: *shares
      weight: 0.9
merge_method: linear
dtype: torch.float32
out_dtype: null
"""


def test_a_recipe_may_repeat_parts_of_itself_and_change_them(cli: Cli, here: Path) -> None:
    got = run(cli, ANCHORED)
    chat, code, math = weights("chat"), weights("code"), weights("math")
    assert_weights(got, {name: (0.3 * chat[name] + 0.3 * code[name] + 0.9 * math[name]) / 1.5 for name in chat})


def test_what_a_repeated_part_says_is_refused_where_it_stands() -> None:
    with pytest.raises(UserError, match=r"line 3: unknown key 'weigth'\."):
        job_of(save(ANCHORED.replace("  - &first\n", "  - &first\n    weigth: 1\n")[1:]), 0)


def test_a_recipe_without_an_output_folder_says_so(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    save(LINEAR)
    assert cli("merge", "-c", "recipe.yml") == 2
    assert "Give -o FOLDER" in capsys.readouterr().err


def test_what_changes_nothing_is_said() -> None:
    text = "merge_method: task_arithmetic\nbase_model: b\nmodels:\n  - model: b\n    parameters: {weight: 1}\n"
    text += "  - {model: a, parameters: {weight: 1, density: 0.5}}\n"
    with pytest.warns(MergeWarning) as caught:
        job_of(save(text), 0)
    assert [str(one.message) for one in caught] == [
        "recipe.yml: 'density' changes nothing in task_arithmetic.",
        "recipe.yml: the parameters of base_model change nothing in task_arithmetic.",
    ]


def test_the_record_holds_patterns_that_people_can_read(cli: Cli, here: Path) -> None:
    run(cli, SLERP)
    settings = json.loads(Path("out/mergectl.json").read_text())["recipe"]["settings"]
    assert settings["t"] == {
        "model.layers.0.mlp.*": 1.0, "model.layers.0.self_attn.*": 0.0,
        "model.layers.1.mlp.*": 0.7, "model.layers.1.self_attn.*": 0.3,
        "model.layers.2.mlp.*": 0.0, "model.layers.2.self_attn.*": 1.0, "*": 0.5,
    }  # fmt: skip


def test_depth_counts_layers_and_nothing_else() -> None:
    names = [
        f"{stack}.{i}.{part}" for stack, n in (("enc.block", 5), ("dec.block", 3)) for i in range(n) for part in "abc"
    ]
    depth = Depth([*names, "embed", "head.0.weight", "enc.block.1.experts.7.w"])
    assert (depth.count, depth.of("enc.block.1.experts.7.w"), depth.of("dec.block.1.a")) == (5, 0.25, 0.5)
    assert (depth.of("embed"), depth.of("head.0.weight")) == (0, 0)


@pytest.mark.parametrize(("depth", "value"), [(0, 0), (0.25, 0.5), (0.5, 1), (0.625, 0.875), (1, 0.5)])
def test_a_gradient_runs_straight_between_its_numbers(depth: float, value: float) -> None:
    assert evaluate([0, 1, 0.5], "x", depth) == value


@pytest.mark.parametrize(("depth", "value"), [(0, True), (0.3, True), (0.5, False), (0.9, False), (1, True)])
def test_flags_change_from_layer_to_layer_in_steps(depth: float, value: bool) -> None:
    assert evaluate([True, False, True], "x", depth) is value
    assert evaluate(["on", 0, "yes"], "x", depth, flag) is value


def test_a_gradient_of_flags_holds_layer_by_layer(cli: Cli, here: Path) -> None:
    got = run(cli, f"{LINEAR}parameters: {{normalize: [true, false]}}\n")
    chat, code = weights("chat"), weights("code")
    last = max(int(found[1]) for name in chat if (found := re.search(r"layers\.(\d)", name)))
    whole = {name: 1.0 if f"layers.{last}." in name else 1.2 for name in chat}
    assert_weights(got, {name: (0.3 * chat[name] + 0.9 * code[name]) / whole[name] for name in chat}, atol=2e-3)


def test_the_first_filter_that_fits_decides_and_none_leaves_it_to_the_next_level() -> None:
    setting = [{"filter": "attn", "value": 1}, {"filter": "q_", "value": 2}]
    assert [evaluate(setting, name, 0) for name in ("l.attn.q_", "l.q_", "l.mlp")] == [1, 2, None]
    assert evaluate([*setting, {"filter": "*", "value": 3}], "l.mlp", 0) == 3


def test_patterns_say_what_each_weight_has() -> None:
    values = {"a.1.x": 1, "a.1.y": 1, "a.10.x": 2, "a.10.y": 3, "b[0]": 2, "c": 1}
    found = patterns(values)
    assert {name: select(found, name) for name in values} == values
    assert found == {"a.10.x": 2, "a.10.y": 3, "b[[]0]": 2, "*": 1}
