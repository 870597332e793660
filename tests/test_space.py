"""The space of a search: what varies by default, what the options say, and how numbers become settings."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergectl.errors import UserError
from mergectl.methods._contract import Between
from mergectl.plan import select
from mergectl.settings import names, settings_of
from mergectl.space import Dimension, distributions, layer_groups, space, to_settings
from mergectl.values import Setting

TASKS = ["cola", "rte"]


LAYERS = [f"encoder.layer.{layer}.{part}.weight" for layer in range(6) for part in ("attention", "mlp")]
NAMES = ["embeddings.word_embeddings.weight", *LAYERS, "norm.weight"]


def of(
    method: str, per_task: Sequence[str] = (), fixed: Mapping[str, Any] | None = None, **ranges: str
) -> list[Dimension]:
    return space(settings_of(method), TASKS, ranges=ranges, fixed=fixed or {}, per_task=per_task, names=NAMES)


def refusal(method: str, per_task: Sequence[str] = (), fixed: Mapping[str, Any] | None = None, **ranges: str) -> str:
    with pytest.raises(UserError) as caught:
        of(method, per_task, fixed, **ranges)
    return str(caught.value)


def made(kind: Any = "float", between: Between | None = None, **facts: Any) -> Setting:
    """A setting that no method has."""
    plain = {"default": 1, "help": "help", "words": (), "per_task": False, "origin": "made"}
    return Setting(name="x", type=kind, between=between, **{**plain, **facts})


@pytest.mark.parametrize("method", names())
def test_what_declares_a_range_to_search_is_searched_and_nothing_else(method: str) -> None:
    settings = settings_of(method)
    searchable = {name: s.between.search for name, s in settings.items() if s.between and s.between.search}
    for name, setting in settings.items():
        beside = setting.beside
        if beside is not None and settings[beside.setting].default not in beside.words:
            searchable.pop(name, None)  # it would change nothing
    if not searchable:
        assert "--range NAME=LOW:HIGH" in refusal(method)
        return
    assert {d.setting: (d.low, d.high) for d in of(method)} == searchable


def test_what_would_change_nothing_is_searched_only_beside_what_gives_it_a_meaning() -> None:
    assert "density" not in [d.setting for d in of("adamerging")]
    assert "density" in [d.setting for d in of("adamerging_plus")]
    assert "density" in [d.setting for d in of("adamerging", fixed={"plus": True})]
    assert "density has a meaning only with plus=true" in refusal("adamerging", density="0.1:0.3")
    assert "density has a meaning only with plus=true" in refusal("adamerging", fixed={"density": 0.3})
    found = of("adamerging", density="0.1:0.3", plus="true,false")
    params = {d.name: d.at(0.0) for d in found}
    assert to_settings({**params, "plus": True}, found, {})["density"] == 0.1
    assert "density" not in to_settings({**params, "plus": False}, found, {})
    found = of("adamerging", fixed={"density": 0.3}, plus="true,false")
    params = {d.name: d.at(0.0) for d in found}
    assert to_settings({**params, "plus": True}, found, {"density": 0.3})["density"] == 0.3
    assert "density" not in to_settings({**params, "plus": False}, found, {"density": 0.3})


def test_the_first_value_is_the_default_or_what_is_nearest_to_it() -> None:
    assert of("ties", fixed={"scale": 1.0}, density="0.05:0.5")[0].first == 0.2
    assert of("ties", density="0.3:0.5")[0].first == 0.3
    assert of("ties", density="0.05:0.1:0.02")[0].first == 0.09
    assert of("ties", density="0.25:0.9:log")[0].first == 0.25
    assert of("ties", trim="std,topk")[0].first == "topk"
    assert of("ties", trim="std,none")[0].first == "std"
    assert Dimension("x", "float", 0.0, 1.0).first == 0.5


def test_a_range_on_the_command_line_wins_over_the_declared_one() -> None:
    (scale,) = of("task_arithmetic", scale="0.1:0.3")
    assert (scale.low, scale.high, scale.step) == (0.1, 0.3, None)


def test_a_range_may_have_a_step() -> None:
    (scale,) = of("task_arithmetic", scale="0.1:0.3:0.1")
    assert scale.points(99) == [0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    ("text", "points"), [("0:1:0.35", [0, 0.35, 0.7]), ("0:1:0.3", [0, 0.3, 0.6, 0.9]), ("0:1:1", [0.0, 1.0])]
)
def test_a_step_that_does_not_divide_the_range_never_leaves_it(text: str, points: list[float]) -> None:
    (scale,) = of("task_arithmetic", scale=text)
    assert scale.points(99) == pytest.approx(points)


@pytest.mark.parametrize("text", ["0:1:0.35", "0:1:0.1", "0.05:0.6:0.05"])
def test_a_grid_and_optuna_agree_on_the_points_of_a_step(text: str) -> None:
    (scale,) = of("task_arithmetic", scale=text)
    distribution = distributions([scale])["scale"]
    assert all(distribution._contains(point) for point in scale.points(99))
    assert scale.points(99)[-1] == pytest.approx(distribution.high)


def test_a_fixed_setting_is_not_searched() -> None:
    searched = {d.setting for d in of("ties")}
    assert {d.setting for d in of("ties", fixed={"density": 0.2})} == searched - {"density"}


def test_words_can_be_searched_all_or_some() -> None:
    some = of("emr", rescaler="global_sum")
    assert [(d.kind, d.words) for d in some] == [("word", ("global_sum",))]


def test_true_and_false_can_be_searched() -> None:
    (both,) = (d for d in of("ties", round_up="true,false") if d.setting == "round_up")
    assert both.words == (True, False)


@pytest.mark.parametrize(
    ("method", "fixed", "ranges", "sentence"),
    [
        ("ties", {}, {"densty": "0:1"}, "No setting 'densty' to search or fix. Did you mean 'density'?"),
        ("ties", {"skale": 1.0}, {}, "No setting 'skale' to search or fix. Did you mean 'scale'?"),
        ("ties", {"scale": 1.0}, {"scale": "0:1"}, "'scale' is both fixed and given a range. Drop one."),
        ("ties", {}, {"density": "0:2"}, "density must lie between 0 and 1; --range asks for 0:2."),
        ("ties", {}, {"density": "low:high"}, "--range density=low:high is not LOW:HIGH or LOW:HIGH:STEP."),
        ("ties", {}, {"density": "0.5:0.1"}, "with LOW below HIGH"),
        ("ties", {}, {"density": "0:1:0"}, "is not LOW:HIGH or LOW:HIGH:STEP with a STEP above 0"),
        ("ties", {}, {"density": "0:1:2"}, "no wider than the range"),
        ("ties", {}, {"scale": "0:inf"}, "is not LOW:HIGH or LOW:HIGH:STEP"),
        ("ties", {}, {"density": "0.5"}, "is not LOW:HIGH or LOW:HIGH:STEP"),
        ("ties", {}, {"elect": "mass,mas"}, "elect is one of mass, normfrac, normmass, none, not 'mas'."),
        ("ties", {}, {"round_up": "maybe"}, "round_up is one of True, False, not 'maybe'."),
        ("dare_ties", {}, {"drop": "0:1"}, "drop must lie between 0 and below 1; --range asks for 0:1."),
    ],
)
def test_what_makes_no_sense_is_refused(
    method: str, fixed: dict[str, Any], ranges: dict[str, str], sentence: str
) -> None:
    assert sentence in refusal(method, (), fixed, **ranges)


def test_everything_fixed_leaves_nothing_to_search() -> None:
    assert refusal("task_arithmetic", (), {"scale": 0.3}) == (
        "Nothing is left to search: every setting is fixed. Name one with --range NAME=LOW:HIGH."
    )


def test_a_setting_per_task_has_one_dimension_per_task() -> None:
    found = of("task_arithmetic", ["scale"], scale="0.1:0.5")
    assert [d.name for d in found] == ["scale[cola]", "scale[rte]"]
    assert {(d.low, d.high, d.start) for d in found} == {(0.1, 0.5, 0.4)}


def test_only_what_may_differ_per_task_is_searched_per_task() -> None:
    assert refusal("medusa", ["scale"]) == "'scale' cannot differ per task. Drop --per-task scale."


def test_a_setting_per_task_that_does_not_exist_is_refused() -> None:
    assert "Did you mean 'scale'?" in refusal("task_arithmetic", ["skale"])


def test_a_setting_cannot_be_fixed_and_searched_per_task() -> None:
    assert "'scale' is both fixed and" in refusal("task_arithmetic", ["scale"], {"scale": 0.3})


def test_whole_numbers_are_searched_in_whole_steps() -> None:
    (x,) = space({"x": made("int", Between(1, 9))}, TASKS, ranges={"x": "1:7:2"}, fixed={})
    assert (x.points(2), distributions([x])["x"].step) == ([1, 3, 5, 7], 2)


@pytest.mark.parametrize("text", ["1:5:0.5", "0.5:4"])
def test_whole_numbers_take_no_broken_range(text: str) -> None:
    with pytest.raises(UserError, match="whole numbers"):
        space({"x": made("int")}, TASKS, ranges={"x": text}, fixed={})


def test_a_number_without_limits_wants_a_range() -> None:
    wanting = made(per_task=True)
    with pytest.raises(UserError, match="Give 'x' a range: --range x=LOW:HIGH"):
        space({"x": wanting}, TASKS, ranges={}, fixed={}, per_task=["x"])


def test_parameters_become_settings_with_per_task_values_gathered() -> None:
    dimensions = [*of("task_arithmetic", ["scale"]), Dimension("trim", "word", words=("topk", "std"))]
    params = {"scale[cola]": 0.1, "scale[rte]": 0.2, "trim": "std"}
    assert to_settings(params, dimensions, {"scope": "tensor"}) == {
        "scope": "tensor", "scale": {"cola": 0.1, "rte": 0.2}, "trim": "std",
    }  # fmt: skip


def test_optunas_sums_of_steps_are_rounded_to_the_points_of_a_grid() -> None:
    (ratio,) = of("task_arithmetic", scale="0.05:0.35:0.1")
    summed = distributions([ratio])["scale"].to_external_repr(0.05 + 0.1)
    assert summed != 0.15
    assert to_settings({"scale": summed}, [ratio], {}) == {"scale": 0.15}


def test_making_settings_of_parameters_leaves_the_fixed_ones_alone() -> None:
    fixed: dict[str, Any] = {"scope": "tensor"}
    to_settings({"scale": 1.0}, of("task_arithmetic"), fixed)
    assert fixed == {"scope": "tensor"}


@given(st.floats(-5, 4), st.floats(0.01, 5), st.integers(2, 40))
def test_the_points_of_a_grid_span_the_range_evenly(low: float, width: float, count: int) -> None:
    points = Dimension("x", "float", low, low + width).points(count)
    gaps = [b - a for a, b in itertools.pairwise(points)]
    assert len(points) == count
    assert (points[0], points[-1]) == pytest.approx((low, low + width), abs=1e-9)
    assert gaps == pytest.approx([width / (count - 1)] * len(gaps), abs=1e-9)


# What the reference expands these to.
LEGACY = {
    "linear+1.0+1.01+0.1": [1.0],
    "linear+0.8+2.21+0.1": [0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0, 2.1, 2.2],
    "linear+1.5+2.21+0.1": [1.5, 1.6, 1.7, 1.8, 1.9, 2.0, 2.1, 2.2],
    "linear+1.0+1.11+0.1": [1.0, 1.1],
    "linear+2.3+2.91+0.1": [2.3, 2.4, 2.5, 2.6, 2.7, 2.8, 2.9],
    "linear+0.1+1.21+0.1": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2],
    "linear+0.5+3.1+0.5": [0.5, 1.0, 1.5, 2.0, 2.5, 3.0],
}


@pytest.mark.parametrize("text", LEGACY)
def test_an_older_grid_has_the_points_that_it_always_had(text: str) -> None:
    (scale,) = of("task_arithmetic", scale=text)
    assert scale.points(99) == LEGACY[text]
    assert all(distributions([scale])["scale"]._contains(point) for point in LEGACY[text])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("linear+1+2", "is not linear+START+END+STEP"),
        ("linear+a+2+0.1", "is not linear+START+END+STEP"),
        ("linear+0+1+0", "is not linear+START+END+STEP"),
        ("linear+2+1+0.1", "holds no even steps"),
        ("linear+0+1+0.25", "holds no even steps once its values are rounded"),
    ],
)
def test_an_older_grid_that_makes_no_sense_is_refused(text: str, sentence: str) -> None:
    assert sentence in refusal("task_arithmetic", (), {}, scale=text)


def test_an_older_grid_of_whole_numbers_holds_whole_numbers() -> None:
    (x,) = space({"x": made("int")}, TASKS, ranges={"x": "linear+1+6+2"}, fixed={})
    assert x.points(99) == [1, 3, 5]
    with pytest.raises(UserError, match="whole numbers"):
        space({"x": made("int")}, TASKS, ranges={"x": "linear+0.5+3+0.5"}, fixed={})


def test_some_weights_may_have_a_range_of_their_own() -> None:
    found = of("task_arithmetic", (), {}, **{"scale@*.attention.*": "0:1", "scale": "0.2:0.4"})
    assert [(d.name, d.low, d.high) for d in found] == [
        ("scale@*.attention.*", 0.0, 1.0), ("scale@*", 0.2, 0.4),
    ]  # fmt: skip
    settings = to_settings({"scale@*.attention.*": 0.9, "scale@*": 0.3}, found, {})
    assert settings == {"scale": {"*.attention.*": 0.9, "*": 0.3}}


def test_weights_that_no_range_names_keep_the_default() -> None:
    found = of("task_arithmetic", (), {}, **{"scale@*.attention.*": "0:1"})
    assert to_settings({"scale@*.attention.*": 0.9}, found, {}) == {"scale": {"*.attention.*": 0.9}}


def test_a_range_for_weights_that_there_are_not_is_refused() -> None:
    assert refusal("task_arithmetic", (), {}, **{"scale@*.attn.*": "0:1"}) == (
        "No weight is called '*.attn.*', for which --range scale@*.attn.* is given. "
        "Write a pattern of weight names such as '*.attention.*'."
    )


def per_layer(count: int, per_task: Sequence[str] = (), **ranges: str) -> list[Dimension]:
    return space(
        settings_of("task_arithmetic"), TASKS, ranges=ranges, fixed={}, per_task=per_task, names=NAMES,
        per_layer={"scale": count},
    )  # fmt: skip


@pytest.mark.parametrize("count", [2, 3, 4, 6])
def test_every_weight_belongs_to_the_group_of_its_depth(count: int) -> None:
    found = per_layer(count)
    settings = to_settings({d.name: place for place, d in enumerate(found)}, found, {})
    groups = [select(settings["scale"], name) for name in NAMES]
    assert groups == [0, *(layer * count // 6 for layer in range(6) for _ in range(2)), count - 1]


def test_groups_are_called_by_their_layers() -> None:
    assert [d.name for d in per_layer(4)] == [
        "scale@layers 1-2", "scale@layer 3", "scale@layers 4-5", "scale@layer 6",
    ]  # fmt: skip


def test_groups_of_layers_may_have_a_number_per_task() -> None:
    found = per_layer(2, ["scale"], scale="0:1")
    assert [d.name for d in found] == [
        "scale@layers 1-3[cola]", "scale@layers 1-3[rte]", "scale@layers 4-6[cola]", "scale@layers 4-6[rte]",
    ]  # fmt: skip
    settings = to_settings({d.name: place for place, d in enumerate(found)}, found, {})
    assert select(settings["scale"], "encoder.layer.1.mlp.weight") == {"cola": 0, "rte": 1}
    assert select(settings["scale"], "norm.weight") == {"cola": 2, "rte": 3}


def test_each_stack_is_split_alike() -> None:
    names = [
        f"{side}.block.{layer}.weight" for side, count in (("encoder", 4), ("decoder", 2)) for layer in range(count)
    ]
    groups = list(layer_groups(names, 2).values())
    assert groups[0] == ["encoder.block.0.*", "encoder.block.1.*", "decoder.block.0.*"]


@pytest.mark.parametrize("count", [1, 7])
def test_a_model_is_split_into_no_more_groups_than_layers(count: int) -> None:
    with pytest.raises(UserError, match=f"--per-layer {count}: .* at least 2 and at most its 6 layers"):
        per_layer(count)


def test_a_model_without_layers_is_not_split() -> None:
    with pytest.raises(UserError, match="which this model has not"):
        layer_groups(["weight", "bias"], 2)


def test_groups_and_patterns_exclude_each_other() -> None:
    with pytest.raises(UserError, match="Drop --per-layer or the pattern"):
        per_layer(2, **{"scale@*.mlp.*": "0:1"})


@given(st.floats(0, 1))
def test_a_share_of_a_range_is_a_value_that_optuna_knows(share: float) -> None:
    for d in (
        Dimension("x", "float", -0.3, 0.9, step=0.3), Dimension("x", "float", 0.1, 0.7), Dimension("x", "int", -3, 4),
        Dimension("x", "word", words=("a", "b", "c")),
    ):  # fmt: skip
        assert distributions([d])["x"]._contains(distributions([d])["x"].to_internal_repr(d.at(share)))


def test_equal_factors_are_equal_steps_of_a_log_range() -> None:
    (scale,) = of("task_arithmetic", scale="0.01:1:log")
    assert [scale.at(share) for share in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0.01, 10**-1.5, 0.1, 1.0])
    assert scale.points(5) == pytest.approx([0.01, 10**-1.5, 0.1, 10**-0.5, 1.0])
    assert distributions([scale])["scale"].log


def test_a_log_range_of_whole_numbers_holds_whole_numbers_once() -> None:
    whole = Dimension("x", "int", 1, 8, log=True)
    assert whole.points(7) == [1, 2, 3, 4, 6, 8]
    assert distributions([whole])["x"].log


@given(st.floats(1e-6, 1e3), st.floats(1.01, 1e6), st.floats(0, 1), st.booleans())
def test_a_value_lies_at_the_share_that_it_came_from(low: float, factor: float, share: float, log: bool) -> None:
    d = Dimension("x", "float", low, low * factor, log=log)
    assert low <= d.at(share) <= low * factor
    assert d.share(d.at(share)) == pytest.approx(share, abs=1e-6)
    assert distributions([d])["x"]._contains(d.at(share))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("0:1:log", "--range scale=0:1:log: a range in equal factors begins above 0."),
        ("-1:1:log", "a range in equal factors begins above 0."),
        ("1:0.1:log", "--range scale=1:0.1:log is not LOW:HIGH:log with LOW below HIGH."),
        ("0.1:1:0.1:log", "is not LOW:HIGH:log"),
        ("0.1:1:logs", "is not LOW:HIGH or LOW:HIGH:STEP."),
    ],
)
def test_a_log_range_that_makes_no_sense_is_refused(text: str, sentence: str) -> None:
    assert sentence in refusal("task_arithmetic", scale=text)
