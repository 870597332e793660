"""Interpolation of a small with a large encoder against the study's own program; see alpha/manifest.json."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mergectl import MergeWarning, UserError, merge_weights
from mergectl.models import quiet
from mergectl.trials import Trial, best_of

HERE = Path(__file__).parent / "alpha"
MANIFEST: dict[str, Any] = json.loads((HERE / "manifest.json").read_text())
Weights = dict[str, torch.Tensor]


@cache
def tensors(file: str) -> Weights:
    return dict(load_file(HERE / file))


def part(prefix: str, file: str = MANIFEST["inputs"]) -> Weights:
    return {name[len(prefix) + 1 :]: x for name, x in tensors(file).items() if name.startswith(f"{prefix}.")}


def interpolated(alpha: float, **how: Any) -> Any:
    return merge_weights("interpolate", part("base"), {"rte": part("small")}, alpha=alpha, layer_map="prefix", **how)


def bert(config: dict[str, Any], weights: Weights) -> Any:
    import transformers

    with quiet():
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**config, num_labels=2)).eval()
    missing = model.load_state_dict(weights, strict=False).missing_keys
    assert all("classifier" in name for name in missing)
    return model


def changed(got: Any, before: Weights) -> set[str]:
    return {name for name, x in before.items() if not torch.equal(got[name], x)}


CASES = list(MANIFEST["cases"].values())
EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=list(MANIFEST["cases"]))


@EVERY_CASE
def test_encoder_and_pooler_are_those_of_the_study(case: dict[str, Any]) -> None:
    got = interpolated(case["alpha"], head="reference")
    expected = {n: x for n, x in part("expected", case["file"]).items() if not n.startswith("probe")}
    assert set(got) == set(expected)
    for name, x in expected.items():
        torch.testing.assert_close(got[name], x, rtol=0, atol=case["suggested_atol"], msg=name)
    names = changed(got, part("base"))
    assert len(names) == case["num_tensors_interpolated"]
    assert names <= set(MANIFEST["interpolated_names"])


@EVERY_CASE
def test_the_pooled_outputs_are_those_of_the_study(case: dict[str, Any]) -> None:
    model = bert(MANIFEST["base_config"], dict(interpolated(case["alpha"], head="reference"))).bert
    probe, expected = part("probe"), tensors(case["file"])
    with torch.no_grad():
        for inputs, name in ((probe, "output"), ({"input_ids": probe["input_ids"]}, "output_ids_only")):
            pooled = model(**inputs).pooler_output
            torch.testing.assert_close(
                pooled, expected[f"expected.probe_pooler_{name}"], rtol=0, atol=case["suggested_probe_atol"]
            )


@EVERY_CASE
def test_by_default_the_pooler_is_interpolated_and_the_small_head_kept(case: dict[str, Any]) -> None:
    merged = interpolated(case["alpha"])
    got = merged.task("rte")
    recommended = part("recommended", case["file"])
    logits = recommended.pop("probe_logits")
    for name, x in recommended.items():
        torch.testing.assert_close(got[name], x, rtol=0, atol=case["suggested_atol"], msg=name)
    with torch.no_grad():
        found = bert(MANIFEST["base_config"], got)(**part("probe")).logits
    torch.testing.assert_close(found, logits, rtol=0, atol=case["suggested_probe_atol"])
    assert all(torch.equal(got[name], x) for name, x in part("small").items() if name.startswith("classifier"))


def test_both_ends_are_the_models_themselves() -> None:
    base, small = part("base"), part("small")
    assert changed(interpolated(0.0), base) == set()
    got = interpolated(1.0)
    assert all(torch.equal(x, small.get(name, base[name])) for name, x in got.items())


@settings(max_examples=8)
@given(alpha=st.floats(0, 1))
def test_every_weight_is_linear_in_alpha(alpha: float) -> None:
    ends, got = (interpolated(0.0), interpolated(1.0)), interpolated(alpha)
    for name, x in got.items():
        line = (1 - alpha) * ends[0][name] + alpha * ends[1][name]
        torch.testing.assert_close(x, line, rtol=0, atol=1e-6, msg=name)


def test_half_way_it_does_not_matter_which_model_is_the_base() -> None:
    small = {name: x for name, x in part("small").items() if "classifier" not in name}
    base = {name: x for name, x in part("base").items() if name in small}
    one = merge_weights("interpolate", base, {"a": small}, alpha=0.5)
    other = merge_weights("interpolate", small, {"a": base}, alpha=0.5)
    assert all(torch.equal(one[name], other[name]) for name in one)


def stack(layers: int, seed: int, hidden: int = 4, head: bool = False) -> Weights:
    """An encoder whose layers have sixteen weights each, as BERT's."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=9, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=6,
        max_position_embeddings=8,
    )  # fmt: skip
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = transformers.BertForSequenceClassification(config).state_dict()
        found = {name: x + 0.01 * torch.randn(x.shape) for name, x in made.items() if x.is_floating_point()}
    return found if head else {name: x for name, x in found.items() if "classifier" not in name}


@pytest.mark.parametrize(("few", "many"), [(6, 12), (3, 7), (2, 2)])
def test_five_weights_and_sixteen_per_layer_are_interpolated(few: int, many: int) -> None:
    base, small = stack(many, 0), stack(few, 1, head=True)
    how: dict[str, Any] = {"alpha": 0.3, "layer_map": "prefix"}
    encoder = changed(merge_weights("interpolate", base, {"a": small}, head="reference", **how), base)
    assert len(encoder) == 5 + 16 * few
    default = merge_weights("interpolate", base, {"a": small}, **how)
    assert changed(default, base) - encoder == {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert set(default.task("a")) - set(base) == {"classifier.weight", "classifier.bias"}


def test_the_inputs_stay_as_they_are() -> None:
    base, small = part("base"), part("small")
    before = {**{f"b.{n}": x.clone() for n, x in base.items()}, **{f"s.{n}": x.clone() for n, x in small.items()}}
    for head in ("small", "reference"):
        merged = interpolated(0.4, head=head)
        merged["bert.embeddings.word_embeddings.weight"].zero_()
    after = {**{f"b.{n}": x for n, x in base.items()}, **{f"s.{n}": x for n, x in small.items()}}
    assert all(torch.equal(x, after[name]) for name, x in before.items())


@pytest.mark.parametrize("case", MANIFEST["selection_cases"], ids=["first of equals", "all zero"])
def test_the_first_of_the_best_is_chosen(case: dict[str, Any]) -> None:
    trials = [
        Trial(number, {"alpha": alpha}, score, again=False, values=(score,))
        for number, (alpha, score) in enumerate(case["trials"])
    ]
    best = best_of(trials, ("mean",))
    assert best is not None
    assert best.settings["alpha"] == case["expected_best_alpha"]


MAPS: dict[str, Any] = {"prefix": [0, 1, 2], "uniform": [1, 3, 5], "explicit": [4, 0, 3]}


@pytest.mark.parametrize("name", MAPS)
def test_unmapped_layers_are_the_bases_and_mapped_ones_lie_between(name: str) -> None:
    base, small = stack(6, 0), stack(3, 1)
    given_map = name if name != "explicit" else dict(enumerate(MAPS[name]))
    got = merge_weights("interpolate", base, {"a": small}, alpha=0.25, layer_map=given_map)
    for weight, x in base.items():
        parts = weight.split(".")
        if parts[2] == "layer":
            at = int(parts[3])
            parts[3] = str(MAPS[name].index(at)) if at in MAPS[name] else "none"
        partner = small.get(".".join(parts))
        expected = x if partner is None else 0.75 * x + 0.25 * partner
        torch.testing.assert_close(got[weight], expected, rtol=0, atol=1e-6, msg=weight)


def test_the_small_models_depth_keeps_the_mapped_layers_alone() -> None:
    base, small = stack(6, 0), stack(3, 1)
    got = merge_weights("interpolate", base, {"a": small}, alpha=0.5, layer_map="uniform", depth="small")
    assert set(got) == set(small)
    for number, layer in enumerate([1, 3, 5]):
        name = "encoder.layer.{}.output.dense.weight"
        expected = (base[f"bert.{name.format(layer)}"] + small[f"bert.{name.format(number)}"]) / 2
        torch.testing.assert_close(got[f"bert.{name.format(number)}"], expected, rtol=0, atol=1e-6)


def test_any_method_merges_models_of_different_depth() -> None:
    base, small, whole = stack(6, 0), stack(3, 1, head=True), stack(6, 2, head=True)
    got = merge_weights("ties", base, {"a": small, "b": whole}, density=0.5, layer_map={"a": "uniform"})
    alone = merge_weights("ties", base, {"b": whole}, density=0.5)
    name = "bert.encoder.layer.{}.output.dense.weight"
    assert torch.equal(got[name.format(0)], alone[name.format(0)])
    assert not torch.equal(got[name.format(1)], alone[name.format(1)])
    assert torch.equal(got.task("a")["classifier.weight"], small["classifier.weight"])


def test_a_drawn_head_is_that_of_its_seed() -> None:
    base, small = stack(4, 0), stack(2, 1, head=True)

    def head(seed: int) -> Weights:
        merged = merge_weights("interpolate", base, {"a": small}, layer_map="prefix", head="reference", seed=seed)
        return {name: x for name, x in merged.task("a").items() if "classifier" in name}

    one, again, other = head(1), head(1), head(2)
    assert all(torch.equal(x, again[name]) for name, x in one.items())
    assert not torch.equal(one["classifier.weight"], other["classifier.weight"])
    assert not torch.equal(one["classifier.weight"], small["classifier.weight"])
    assert not one["classifier.bias"].any()


def test_heads_are_interpolated_where_both_models_have_one() -> None:
    base, small = stack(4, 0, head=True), stack(2, 1, head=True)
    how: dict[str, Any] = {"alpha": 0.25, "layer_map": "prefix"}
    got = merge_weights("interpolate", base, {"a": small}, head="interpolate", **how)["classifier.weight"]
    torch.testing.assert_close(got, 0.75 * base["classifier.weight"] + 0.25 * small["classifier.weight"])
    kept = merge_weights("interpolate", base, {"a": small}, **how)
    assert torch.equal(kept["classifier.weight"], base["classifier.weight"])
    assert torch.equal(kept.task("a")["classifier.weight"], small["classifier.weight"])
    with pytest.raises(UserError, match="where both models have one of one shape, and the base and 'a' have not"):
        merge_weights("interpolate", stack(4, 0), {"a": small}, head="interpolate", **how)


def test_what_only_one_model_has_is_copied() -> None:
    base, small = stack(4, 0), stack(2, 1, head=True)
    lean = {name: x for name, x in small.items() if "pooler" not in name}
    got = merge_weights("interpolate", base, {"a": lean}, alpha=0.5, layer_map="prefix")
    assert torch.equal(got["bert.pooler.dense.weight"], base["bert.pooler.dense.weight"])
    bare = {name: x for name, x in base.items() if "pooler" not in name}
    whole = merge_weights("interpolate", bare, {"a": small}, alpha=0.5, layer_map="prefix").task("a")
    assert torch.equal(whole["bert.pooler.dense.weight"], small["bert.pooler.dense.weight"])


def test_half_precision_is_interpolated_in_single_and_cast_back() -> None:
    base, small = stack(4, 0), stack(2, 1)
    half = {name: x.half() for name, x in base.items()}, {name: x.half() for name, x in small.items()}
    got = merge_weights("interpolate", half[0], {"a": half[1]}, alpha=0.3, layer_map="prefix")
    wide = [{name: x.float() for name, x in model.items()} for model in half]
    expected = merge_weights("interpolate", wide[0], {"a": wide[1]}, alpha=0.3, layer_map="prefix")
    assert {x.dtype for x in got.values()} == {torch.float16}
    assert all(torch.equal(x, expected[name].half()) for name, x in got.items())


def test_projections_of_a_distillation_are_left_out_with_a_notice() -> None:
    base, small = stack(4, 0), stack(2, 1, head=True)
    more = {**small, "fit_dense.weight": torch.ones(3, 4), "fit_dense.bias": torch.ones(3)}
    with pytest.warns(MergeWarning, match="projections of its distillation"):
        got = merge_weights("interpolate", base, {"a": more}, alpha=0.5, layer_map="prefix")
    assert not any("fit_dense" in name for name in got.task("a"))


class OneReading(dict[str, torch.Tensor]):
    """Weights whose shapes can be asked for, and that may not be read."""

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(dict.__getitem__(self, name).shape)

    def dtype(self, name: str) -> str:
        return "F32"

    def __getitem__(self, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was read")


def test_a_model_of_another_width_is_refused_before_any_weight_is_read() -> None:
    base, small = OneReading(stack(4, 0, hidden=8)), OneReading(stack(2, 1, hidden=4))
    with pytest.raises(UserError, match=r"'bert.embeddings.word_embeddings.weight' has shape \[9, 4\] in expert 'a'"):
        merge_weights("interpolate", base, {"a": small}, layer_map="prefix")


def test_what_cannot_be_aligned_is_refused_in_one_sentence() -> None:
    base, small = stack(4, 0), stack(3, 1)
    broken = {name: x * float("nan") for name, x in small.items()}
    wrong: list[tuple[Any, Any, dict[str, Any], str]] = [
        (small, {"a": base}, {"layer_map": "prefix"}, "has 4 layers, more than the 3"),
        (base, {"a": small}, {"layer_map": "uniform"}, "needs a multiple of 3 layers"),
        (base, {"a": small}, {"layer_map": "unifrom"}, "Did you mean 'uniform'?"),
        (base, {"a": small}, {"layer_map": {"b": "prefix"}}, "There is no expert 'b'"),
        (base, {"a": small}, {"layer_map": "prefix", "depth": "half"}, "depth must be base or small, got 'half'"),
        (base, {"a": small}, {"layer_map": "prefix", "head": "smal"}, "Did you mean 'small'?"),
        (base, {"a": small}, {"depth": "small"}, "Add the map"),
        (None, {"a": small}, {"layer_map": "prefix"}, "Give the base"),
        (base, {"a": broken}, {"layer_map": "prefix"}, "NaN or infinite"),
    ]
    for origin, experts, how, sentence in wrong:
        with pytest.raises(UserError, match=sentence):
            merge_weights("interpolate", origin, experts, **how)


def test_alpha_beyond_its_ends_has_to_be_asked_for() -> None:
    base, small = stack(4, 0), stack(2, 1)
    for alpha in (-0.1, 1.5):
        with pytest.raises(UserError, match="alpha must lie between"):
            merge_weights("interpolate", base, {"a": small}, alpha=alpha, layer_map="prefix")
    got = merge_weights("interpolate", base, {"a": small}, alpha=1.5, extrapolate=True, layer_map="prefix")
    name = "bert.encoder.layer.0.output.dense.weight"
    torch.testing.assert_close(got[name], 1.5 * small[name] - 0.5 * base[name], rtol=0, atol=1e-6)
