"""How values of settings are read, checked and refused."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from mergectl import settings
from mergectl.errors import UserError
from mergectl.merging import recipe_of
from mergectl.plan import groups, steps_of

TIES = settings.settings_of("ties")
SCALE = settings.settings_of("task_arithmetic")["scale"]
TASKS = ["rte", "cola"]


def test_ties_has_exactly_the_settings_that_are_promised() -> None:
    promised = ["density", "scale", "scope", "trim", "threshold", "elect", "combine", "zero_sign"]
    assert list(TIES)[: len(promised)] == promised
    assert TIES["scope"].words == ("model", "tensor")
    assert TIES["trim"].words == ("topk", "std", "energy", "none")
    assert TIES["elect"].words == ("mass", "normfrac", "normmass", "none")
    assert set(TIES["combine"].words) == {
        "disjoint_mean", "disjoint_sum", "disjoint_max", "mean", "sum", "median", "magnitude"
    }  # fmt: skip
    assert TIES["zero_sign"].words == ("majority", "zero", "plus")
    assert (TIES["density"].default, TIES["scale"].default, SCALE.default) == (0.2, 1.0, 0.4)


def test_a_preset_has_the_settings_of_both_and_defaults_of_its_own() -> None:
    preset = settings.describe("dare_ties")
    assert set(preset.settings) == set(TIES) | set(settings.settings_of("dare"))
    assert preset.settings["trim"].default == "none"
    assert (preset.kind, preset.method, preset.refine) == ("preset", "ties", ("dare",))
    assert preset.settings["drop"].origin == "dare"
    assert settings.describe("ties-tensor").settings["scope"].default == "tensor"


@pytest.mark.parametrize(
    ("legacy", "name"),
    [("_SUM", "average"), ("__TA", "task_arithmetic"), ("_TIES", "medusa"), ("TIES_", "ties_tensor"),
     ("TIES_TIES", "ties_tensor"), ("DARE_TIES", "dare_ties"), ("_MEDUSA", "medusa"), ("dare-average", "dare_average")],
)  # fmt: skip
def test_names_of_the_older_programs_are_understood(legacy: str, name: str) -> None:
    assert settings.describe(legacy).name == name


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("ties", {"densty": 1}, "No setting 'densty' in method 'ties'. Did you mean 'density'?"),
        ("ties", {"density": 20}, "density must lie between 0.0 and 1.0, got 20. It is a share, not a percentage."),
        ("ties", {"density": -0.1}, "density must lie between 0.0 and 1.0, got -0.1."),
        ("ties", {"density": "much"}, "density must be a number, got 'much'."),
        ("ties", {"density": True}, "density must be a number, got 'True'."),
        ("ties", {"density": float("nan")}, "density must be a number, got 'nan'."),
        ("ties", {"density": None}, "density must be a number, got 'None'."),
        ("ties", {"density": [0.1, 0.2, 0.3]}, "density has 3 values for 2 tasks (rte, cola)."),
        ("ties", {"density": {"rte": 2}}, "density must lie between 0.0 and 1.0, got 2."),
        ("ties", {"density": {"rt": 0.2}}, "density is given for a task 'rt' that is not merged. Did you mean 'rte'?"),
        ("ties", {"density": {"*": [0.1, 0.2, 0.3]}}, "density has 3 values"),
        ("ties", {"density": {}}, "density is an empty list of values"),
        ("ties", {"scale": [0.1, 0.2]}, "scale must be a number"),
        ("ties", {"trim": "topkk"}, "trim must be one of topk, std, energy, none, got 'topkk'. Did you mean 'topk'?"),
        ("ties", {"compat": "maybe"}, "compat must be true or false, got 'maybe'."),
        ("dare", {"drop": 1.0}, "drop must lie between 0.0 and 1.0 (1.0 excluded), got 1.0."),
    ],
)
def test_wrong_values_get_a_useful_sentence(name: str, given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        settings.check(name, given, TASKS)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.3", 0.3),
        ("1e-1", 0.1),
        (" 2 ", 2.0),
        ("0.3,0.5", (0.3, 0.5)),
        ("rte=0.5,cola=0.2", {"rte": 0.5, "cola": 0.2}),
        ("glue/rte=0.5", {"glue/rte": 0.5}),
        ("*.attention.*=0.5,*=0.1", {"*.attention.*": 0.5, "*": 0.1}),
    ],
)
def test_typed_values_are_read(text: str, value: Any) -> None:
    assert settings.parse(SCALE, text) == value


@pytest.mark.parametrize("text", ["", "x", "0.3,", "=0.3", "rte=0.5,0.3", "rte=x", "99"])
def test_typed_nonsense_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="scale"):
        settings.parse(SCALE, text)


def test_words_and_switches_are_read() -> None:
    assert settings.parse(TIES["trim"], "std") == "std"
    assert [settings.parse(TIES["compat"], word) for word in ("true", "No", "on", "0")] == [True, False, True, False]
    with pytest.raises(UserError, match="takes one value, not one per task"):
        settings.parse(TIES["trim"], "std,topk")


def test_checked_settings_are_complete_and_in_task_order() -> None:
    assert settings.check("task_arithmetic", {}, TASKS) == {"scale": 0.4}
    assert settings.check("task_arithmetic", {"scale": {"cola": 1}}, TASKS) == {"scale": (0.4, 1.0)}
    assert settings.check("task_arithmetic", {"scale": [1, 2]}, TASKS) == {"scale": (1.0, 2.0)}
    checked = settings.check("task_arithmetic", {"scale": {"*.a": {"rte": 1}, "*": 0.1}}, TASKS)
    assert checked == {"scale": {"*.a": (1.0, 0.4), "*": 0.1}}


def test_a_recipe_is_plain_data() -> None:
    recipe = recipe_of("ties-tensor", {"density": "a=0.5,b=0.2"}, ["dare:drop=0.5", {"dare": {"rescale": False}}], 7)
    assert json.loads(json.dumps(dataclasses.asdict(recipe))) == {
        "method": "ties_tensor",
        "settings": {"density": {"a": 0.5, "b": 0.2}},
        "refine": [["dare", {"drop": 0.5}], ["dare", {"rescale": False}]],
        "seed": 7,
    }


@pytest.mark.parametrize(
    ("refine", "words"),
    [
        ("daer", "No method 'daer'. Did you mean 'dare'?"),
        ("dare:dropp=1", "No setting 'dropp' in refinement 'dare'. Did you mean 'drop'?"),
        ("dare:drop", "Cannot read the refinement 'dare:drop'"),
        ("dare:drop=2", "drop must lie between"),
        ([3], "Cannot read the refinement 3"),
    ],
)
def test_wrong_refinements_get_a_useful_sentence(refine: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe_of("ties", {}, refine)
    assert words in str(caught.value)


def test_weights_are_grouped_by_the_first_pattern_that_fits() -> None:
    recipe = recipe_of("ties", {"density": {"*": 0.1, "*.b.*": 0.2, "*.c": 0.3}, "scale": {"*.b.*": 2.0}})
    found = groups(steps_of(recipe, TASKS), ["m.a", "m.b.x", "m.b.c", "m.c"])
    chosen = [(names, steps[-1].settings["density"], steps[-1].settings["scale"]) for names, steps in found]
    assert chosen == [(["m.a"], 0.1, 1.0), (["m.b.x", "m.b.c"], 0.2, 2.0), (["m.c"], 0.3, 1.0)]
