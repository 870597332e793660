"""What every merging method promises, presets included; a new file in methods/ is tested here unasked."""

from __future__ import annotations

import doctest
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from mergectl import blocks, plugins, settings
from mergectl.errors import UserError
from mergectl.merging import Merged, MergeWarning, Recipe, merge_stream
from mergectl.values import meant
from tests.methods.families import (
    SHAPES,
    assert_close,
    assert_same,
    expert_count,
    family,
    merge_weights,
    neutral_settings,
    supplies_for,
)

METHODS = settings.names()
NEVER_THE_EXPERT = ("arcee_fusion", "iso_c", "iso_cts", "wudi", "doge_ta")  # their files say why
PRUNING = [name for name in METHODS if "pave" in settings.describe(name).refine]  # whole weights, not differences
each_method = pytest.mark.parametrize("method", METHODS)


def merged(method: str, tasks: int = 3, dtype: torch.dtype = torch.float32, **given: Any) -> Merged:
    base, experts = family(expert_count(method, tasks), dtype=dtype)
    return merge_weights(method, base, experts, **given)


def _meaningful(method: str, given: dict[str, Any]) -> dict[str, Any]:
    """Add values of other settings without which these would mean nothing; drop what none of them gives a meaning."""
    beside = {key: found for key in given if (found := settings.settings_of(method)[key].beside) is not None}
    full = {other.setting: other.words[-1] for other in beside.values()} | given
    return {
        key: value for key, value in full.items() if key not in beside or meant(beside[key], full[beside[key].setting])
    }


def _given(name: str, value: Any) -> dict[str, Any]:
    """Return one setting as keyword arguments."""
    return {name: value}


def test_no_method_file_has_a_problem() -> None:
    assert settings.problems() == []


def test_all_methods_of_the_papers_are_there() -> None:
    wanted = {"average", "task_arithmetic", "ties", "ties_tensor", "medusa", "slerp", "emr", "interpolate"}
    assert wanted | {"dare_ties", "dare_average", "dare_task_arithmetic"} <= set(METHODS)


@pytest.mark.parametrize("name", [*METHODS, *settings.refinements()])
def test_a_method_says_what_it_is(name: str) -> None:
    info = settings.describe(name)
    assert info.title
    assert info.paper
    assert info.summary.endswith(".")
    assert len(info.summary) < 120
    assert all(setting.help for setting in info.settings.values())


@pytest.mark.parametrize("name", plugins.names("methods"))
def test_the_first_sentence_is_short(name: str) -> None:
    doc = plugins.load("methods", name).__doc__ or ""
    assert len(doc.splitlines()[0]) < 110


@pytest.mark.parametrize("name", [*plugins.names("methods"), "_kernels", "_task_vectors", "_contract"])
def test_the_example_worked_by_hand_holds(name: str) -> None:
    module = __import__(f"mergectl.methods.{name}", fromlist=["merge"])
    result = doctest.testmod(module)
    assert result.failed == 0
    assert result.attempted > 0 or name in ("_kernels", "_contract")


@each_method
def test_task_order_does_not_matter(method: str) -> None:
    base, experts = family(expert_count(method))
    turned = dict(reversed(experts.items()))
    given: dict[str, Any] = {"t": 0.5} if method == "slerp" else {}
    forward, backward = merge_weights(method, base, experts, **given), merge_weights(method, base, turned, **given)
    assert_close(backward, forward, atol=1e-7)
    for task in experts:
        assert_close(backward.task(task), forward.task(task), atol=1e-7)


@each_method
def test_inputs_are_unchanged(method: str) -> None:
    base, experts = family(expert_count(method))
    copies = (
        {name: x.clone() for name, x in base.items()},
        {task: {name: x.clone() for name, x in weights.items()} for task, weights in experts.items()},
    )
    result = merge_weights(method, base, experts)
    for x in [*result.values(), *result.task("task0").values()]:
        x.add_(1)  # nor does the result share memory with them
    assert_same(base, copies[0])
    for task, weights in experts.items():
        assert_same(weights, copies[1][task])


@each_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_names_shapes_and_types_are_those_of_the_base(method: str, dtype: torch.dtype) -> None:
    result = merged(method, dtype=dtype)
    for weights in (result, result.task("task0")):
        assert {name: tuple(x.shape) for name, x in weights.items()} == SHAPES
        assert {x.dtype for x in weights.values()} == {dtype}


@each_method
def test_global_randomness_is_neither_used_nor_moved(method: str) -> None:
    torch.manual_seed(1)
    first, state = merged(method), torch.get_rng_state()
    torch.manual_seed(2)
    assert_same(merged(method), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


@each_method
def test_copies_of_one_model_merge_to_it(method: str) -> None:
    tasks = expert_count(method)
    info = settings.describe(method)
    if info.neutral is None:
        assert method in NEVER_THE_EXPERT
        return
    found = {key: setting.default for key, setting in info.settings.items()} | dict(info.neutral)
    neutral = {key: value for key, value in info.neutral.items()
               if (beside := info.settings[key].beside) is None or meant(beside, found[beside.setting])}  # fmt: skip
    base, experts = family(1)
    copies = {f"task{i}": experts["task0"] for i in range(tasks)}
    result = merge_weights(method, base, copies, **neutral_settings(neutral, tasks))
    assert_close(result.task("task0"), experts["task0"])


@each_method
def test_a_setting_that_means_nothing_for_want_of_another_value_is_refused_and_with_it_taken(method: str) -> None:
    known = settings.settings_of(method)
    for key, setting in known.items():
        if setting.beside is None:
            continue
        words = known[setting.beside.setting].words or (True, False)
        others = (value for value in (*setting.words, True, False) if value != setting.default)
        value = 0.7 if setting.type == "float" else next(others)
        for word in words:
            given = {setting.beside.setting: word, key: value}
            if word in setting.beside.words:
                assert settings.check(method, given, ["a", "b"])[key] == value
            else:
                with pytest.raises(UserError, match=f"{key} has a meaning only with {setting.beside.setting}="):
                    settings.check(method, given, ["a", "b"])


@each_method
def test_the_merged_vector_is_linear_where_the_file_says_so(method: str) -> None:
    info = settings.describe(method)
    base, experts = family(expert_count(method))
    for name in info.linear:
        values = [0.25, 0.5, 0.75]
        deltas = [
            {key: x - base[key] for key, x in merge_weights(method, base, experts, **_given(name, value)).items()}
            for value in values
        ]
        middle = {key: (deltas[0][key] + deltas[2][key]) / 2 for key in base}
        assert_close(deltas[1], middle)
        assert_close({key: 2 * x for key, x in deltas[0].items()}, deltas[1])


@each_method
def test_streaming_gives_what_one_shot_gives(method: str) -> None:
    base, experts = family(expert_count(method))
    pieces = list(merge_stream(Recipe(method), base, experts, supplies=supplies_for(method, experts)))
    assert_same(
        {piece.name: piece.weight for piece in sorted(pieces, key=lambda p: list(base).index(p.name))},
        merge_weights(method, base, experts),
    )


@each_method
def test_the_order_of_the_weights_does_not_matter(method: str) -> None:
    base, experts = family(expert_count(method))
    turned = merge_weights(method, dict(reversed(base.items())), experts)
    assert_same({name: turned[name] for name in base}, merge_weights(method, base, experts))


@each_method
def test_the_number_of_threads_does_not_matter(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "LENGTH", 1 << 12)
    generator = torch.Generator().manual_seed(3)
    base = {f"m.{i}": torch.randn(100, 150, generator=generator) for i in range(4)}
    experts = {
        f"task{i}": {name: x + 0.1 * torch.randn(100, 150, generator=generator) for name, x in base.items()}
        for i in range(expert_count(method))
    }
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = merge_weights(method, base, experts)
        torch.set_num_threads(3)
        three = merge_weights(method, base, experts)
    finally:
        torch.set_num_threads(before)
    assert_same(three, one)
    assert three.kept.get("rescalers") == one.kept.get("rescalers")


@each_method
def test_an_expert_equal_to_the_base_gives_a_warning_and_a_finite_result(method: str) -> None:
    base, experts = family(expert_count(method))
    experts["task0"] = {name: x.clone() for name, x in base.items()}
    with pytest.warns(MergeWarning, match="'task0' equals the base"):
        result = merge_weights(method, base, experts)
    assert all(bool(x.isfinite().all()) for task in experts for x in result.task(task).values())


@each_method
def test_experts_all_equal_to_the_base_give_the_base(method: str) -> None:
    base, experts = family(expert_count(method))
    given: dict[str, Any] = {"rank_scale": 1.0} if method in PRUNING else {}
    with pytest.warns(MergeWarning):
        result = merge_weights(method, base, dict.fromkeys(experts, base), **given)
    assert_close(result, base)
    assert_close(result.task("task0"), base)


@each_method
def test_empty_weights_and_integers_pass_through(method: str) -> None:
    base, experts = family(expert_count(method))
    nothing = {f"m.nothing{i}": torch.zeros(shape) for i, shape in enumerate([(0, 4), (0,), (3, 0)])}
    extra = {**nothing, "m.position_ids": torch.arange(5)}
    base |= extra
    result = merge_weights(method, base, {task: {**weights, **extra} for task, weights in experts.items()})
    assert list(result) == list(base)
    assert torch.equal(result["m.position_ids"], torch.arange(5))
    assert all(result[name].shape == x.shape for name, x in nothing.items())


@each_method
@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_numbers_that_cannot_be_merged_are_refused(method: str, dtype: torch.dtype) -> None:
    base, experts = family(expert_count(method))
    experts["task0"]["m.layer.0.weight"] = experts["task0"]["m.layer.0.weight"].to(dtype)
    with pytest.raises(UserError, match=r"'m\.layer\.0\.weight' is of the type (complex64|float8_e4m3fn)"):
        merge_weights(method, base, experts)


@each_method
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_not_finite_is_refused_by_name(method: str, bad: float, dtype: torch.dtype) -> None:
    base, experts = family(expert_count(method), dtype=dtype)
    last = list(experts)[-1]
    experts[last]["m.layer.0.weight"][3, 2] = bad
    with pytest.raises(UserError, match=rf"'m\.layer\.0\.weight' of the expert '{last}'"):
        merge_weights(method, base, experts)
    base, experts = family(expert_count(method), dtype=dtype)
    base["m.norm"][0] = bad
    with pytest.raises(UserError, match=r"'m\.norm' of the base"):
        merge_weights(method, base, experts)


@each_method
def test_another_shape_is_refused_with_both_shapes(method: str) -> None:
    base, experts = family(expert_count(method))
    experts["task0"]["m.layer.1.weight"] = torch.zeros(5, 8)
    with pytest.raises(UserError, match=r"'m\.layer\.1\.weight' has shape \[5, 8\] in expert 'task0', \[6, 8\]"):
        merge_weights(method, base, experts)


@each_method
def test_a_weight_that_an_expert_lacks_is_named(method: str) -> None:
    base, experts = family(expert_count(method))
    del experts["task0"]["m.layer.1.weight"]
    with pytest.raises(UserError, match=r"'task0' has no weight 'm\.layer\.1\.weight'"):
        merge_weights(method, base, experts)


@each_method
def test_unknown_settings_supplies_and_wrong_values_are_refused(method: str) -> None:
    base, experts = family(expert_count(method))
    with pytest.raises(UserError, match="No setting 'nonsense'"):
        merge_weights(method, base, experts, nonsense=1)
    with pytest.raises(UserError, match=r"no supply 'mask'\. Did you mean 'masks'\?"):
        merge_weights(method, base, experts, supplies={"mask": {}})
    unasked = next(name for name in ("grams", "signs", "masks") if name not in settings.describe(method).supplies)
    with pytest.raises(UserError, match=f"does not take the supply '{unasked}'"):
        merge_weights(method, base, experts, supplies={unasked: {}})
    for setting in settings.settings_of(method).values():
        if setting.between is not None:
            with pytest.raises(UserError, match=f"{setting.name} must lie between"):
                merge_weights(method, base, experts, **_given(setting.name, setting.between.high + 1000))
        with pytest.raises(UserError, match=f"{setting.name} must be"):
            merge_weights(method, base, experts, **_given(setting.name, object()))


@each_method
def test_every_word_of_every_setting_works(method: str) -> None:
    base, experts = family(expert_count(method))
    for setting in settings.settings_of(method).values():
        for word in setting.words or ((True, False) if setting.type == "bool" else ()):
            result = merge_weights(method, base, experts, **_meaningful(method, {setting.name: word}))
            assert all(bool(x.isfinite().all()) for x in result.values())


@pytest.mark.filterwarnings("ignore:masks cannot change")  # in two steps
@each_method
def test_numpy_numbers_are_numbers(method: str) -> None:
    import numpy as np

    base, experts = family(expert_count(method))
    numbers: dict[str, Any] = {}
    for setting in settings.settings_of(method).values():
        if setting.between is not None:
            numbers[setting.name] = 2 if setting.type == "int" else 0.6 if setting.between.high > 0.6 else 0.2
    plain = _meaningful(method, numbers)
    expected = merge_weights(method, base, experts, **plain)
    for kind in (np.float64, np.float32, torch.tensor):
        given: dict[str, Any] = plain | {name: kind(number) for name, number in numbers.items() if name in plain}
        assert settings.check(method, given, list(experts)) == settings.check(method, plain, list(experts))
        assert_same(merge_weights(method, base, experts, **given), expected)


@each_method
def test_too_few_and_too_many_experts_are_refused(method: str) -> None:
    least, most = settings.describe(method).experts
    base, experts = family((most or 1) + 1)
    with pytest.raises(UserError, match="no expert"):
        merge_weights(method, base, {})
    if least > 1:
        with pytest.raises(UserError, match=f"Method '{method}' takes (exactly|at least) {least}"):
            merge_weights(method, base, {"task0": experts["task0"]})
    if most is not None:
        with pytest.raises(UserError, match=f"takes exactly {most}"):
            merge_weights(method, base, experts)


@each_method
def test_a_method_that_needs_the_base_says_so(method: str) -> None:
    _, experts = family(expert_count(method))
    info = settings.describe(method)
    if info.supplies.get("task_vectors") or info.supplies.get("base") or info.refine:
        with pytest.raises(UserError, match=r"needs the base .* Add it: --base MODEL, in Python the argument `base`\."):
            merge_weights(method, None, experts)
    else:
        assert list(merge_weights(method, None, experts)) == list(SHAPES)


@pytest.mark.parametrize("name", plugins.names("methods"))
def test_no_function_is_long(name: str) -> None:
    module = plugins.load("methods", name)
    functions = [f for f in vars(module).values() if inspect.isfunction(f) and f.__module__ == module.__name__]
    assert all(len(inspect.getsource(function).splitlines()) < 40 for function in functions)
    assert len(Path(str(module.__file__)).read_text().splitlines()) < 300
