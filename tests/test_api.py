"""The Python API: `merge_weights`, what it returns, and which weights it leaves to their tasks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

import mergectl
from mergectl import Merged, UserError, merge_weights
from mergectl.merging import MergeWarning, Recipe, merge_stream

Weights = dict[str, torch.Tensor]


def expert(*, labels: int, step: float) -> Weights:
    """Make a small classifier: a body of ones moved by a step, and a head of its own."""
    return {
        "bert.embeddings.weight": torch.ones(5, 3) + step,
        "bert.encoder.weight": torch.ones(3, 3) - step,
        "bert.encoder.bias": torch.ones(3) + step,
        "bert.position_ids": torch.arange(4),
        "classifier.dense.weight": torch.full((3, 3), step),
        "classifier.out.weight": torch.full((labels, 3), step),
    }


BASE = expert(labels=2, step=0.0)
EXPERTS = {"two": expert(labels=2, step=1.0), "three": expert(labels=3, step=-2.0)}


def test_the_version_and_all_promised_names_are_there() -> None:
    assert mergectl.__version__ == "0.1.0"
    for name in ("merge_weights", "Merged", "Between", "OneOf", "PerTask", "MethodError", "TaskVectors", "Split"):
        assert getattr(mergectl, name) is not None
        assert name in dir(mergectl)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = mergectl.nonsense


def test_importing_loads_nothing_heavy() -> None:
    code = "import sys, mergectl; print(sorted({'torch', 'numpy', 'duckdb', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_heads_of_different_shape_stay_with_their_tasks() -> None:
    merged = merge_weights("task_arithmetic", BASE, EXPERTS, scale=0.5)
    assert [name for name in BASE if name.startswith("bert.")] == list(merged)
    assert torch.equal(merged["bert.encoder.weight"], torch.full((3, 3), 1 - 0.5 + 1.0))
    for task, weights in EXPERTS.items():
        own = merged.task(task)
        assert set(own) == set(weights)
        assert torch.equal(own["classifier.out.weight"], weights["classifier.out.weight"])
        assert torch.equal(own["classifier.dense.weight"], weights["classifier.dense.weight"])
        assert torch.equal(own["bert.encoder.weight"], merged["bert.encoder.weight"])


def test_heads_of_one_shape_are_merged_like_anything_else() -> None:
    experts = {"a": expert(labels=2, step=1.0), "b": expert(labels=2, step=3.0)}
    merged = merge_weights("average", BASE, experts)
    assert torch.equal(merged["classifier.out.weight"], torch.full((2, 3), 2.0))
    assert list(merged) == list(BASE)


def test_weights_that_the_base_lacks_belong_to_their_task() -> None:
    base = {name: x for name, x in BASE.items() if not name.startswith("classifier")}
    merged = merge_weights("ties", base, EXPERTS)
    assert list(merged) == list(base)
    assert merged.task("three")["classifier.out.weight"].shape == (3, 3)


def test_a_head_that_only_the_base_has_is_carried_along() -> None:
    base = {**BASE, "cls.weight": torch.ones(7, 3)}
    merged = merge_weights("ties", base, EXPERTS)
    assert torch.equal(merged["cls.weight"], base["cls.weight"])
    assert "classifier.out.weight" not in merged


@pytest.mark.parametrize("name", ["bert.embeddings.weight", "bert.encoder.weight"])
def test_another_shape_in_the_body_is_refused_with_both_shapes(name: str) -> None:
    wrong = {**EXPERTS["three"], name: torch.zeros(9, 3)}
    with pytest.raises(UserError, match=rf"'{name}' has shape \[9, 3\] in expert 'three', \[[35], 3\] in the base"):
        merge_weights("ties", BASE, {**EXPERTS, "three": wrong})


def test_another_shape_is_refused_where_names_have_no_common_beginning() -> None:
    base = {"embeddings.weight": torch.ones(5, 3), "encoder.weight": torch.ones(6, 3), "head.weight": torch.ones(2, 3)}
    for name in ("embeddings.weight", "encoder.weight"):
        with pytest.raises(UserError, match=f"'{name}' has shape"):
            merge_weights("average", base, {"a": {**base, name: torch.ones(4, 3)}})
    moved = {name: x + 1 for name, x in base.items()}
    merged = merge_weights("average", base, {"a": {**moved, "head.weight": torch.ones(4, 3)}})
    assert list(merged) == ["embeddings.weight", "encoder.weight"]
    wrong = {"a": {"w": torch.ones(3), "b": torch.ones(1)}}
    with pytest.raises(UserError, match="'b' has shape"):
        merge_weights("average", {"w": torch.ones(3), "b": torch.ones(2)}, wrong)


def test_an_unknown_method_and_task_get_a_hint() -> None:
    with pytest.raises(UserError, match=r"No method 'tiess'\. Did you mean 'ties'\?"):
        merge_weights("tiess", BASE, EXPERTS)
    with pytest.raises(UserError, match=r"No task 'tow' in this merge\. Did you mean 'two'\?"):
        merge_weights("ties", BASE, EXPERTS).task("tow")


def test_nothing_is_kept_per_task_by_a_plain_merge() -> None:
    assert merge_weights("ties", BASE, EXPERTS).kept == {}


def test_emr_keeps_a_unified_vector_masks_and_rescalers() -> None:
    experts = {**EXPERTS, "two": {**EXPERTS["two"], "bert.encoder.bias": torch.full((3,), -7.0)}}
    merged = merge_weights("emr", BASE, experts)
    assert set(merged.kept) == {"unified", "masks", "rescalers"}
    assert list(merged.kept["masks"]) == list(merged.kept["rescalers"]) == list(EXPERTS)
    for task in EXPERTS:
        for name, unified in merged.kept["unified"].items():
            mask = merged.kept["masks"][task][name]
            assert mask.dtype == torch.bool
            rescaled = BASE[name] + merged.kept["rescalers"][task] * mask * unified
            torch.testing.assert_close(merged.task(task)[name], rescaled)
    assert not any(name.startswith("classifier") for name in merged.kept["unified"])


def test_a_merge_is_a_mapping_and_its_tasks_are_in_order() -> None:
    merged = merge_weights("average", BASE, EXPERTS)
    assert isinstance(merged, Merged)
    assert isinstance(merged, Mapping)
    assert merged.tasks == ("two", "three")
    assert len(dict(merged)) == len(merged)


def test_parameters_that_ask_for_gradients_are_merged_too() -> None:
    base = {"m.w": torch.nn.Parameter(torch.ones(2))}
    merged = merge_weights("average", base, {"a": {"m.w": torch.nn.Parameter(torch.zeros(2))}})
    assert not merged["m.w"].requires_grad


def test_transposed_weights_are_merged_too() -> None:
    base = {"m.w": torch.arange(6.0).reshape(2, 3).T, "m.v": torch.ones(4)}
    turned = {"a": {"m.w": base["m.w"] + 1, "m.v": torch.zeros(4)}}
    for method in ("ties", "emr", "interpolate", "dare_ties"):
        assert merge_weights(method, base, turned)["m.w"].shape == (3, 2)


class Lazy(Mapping[str, torch.Tensor]):
    """Weights that know shapes and types without being read, as files do."""

    def __init__(self, weights: Weights) -> None:
        self.weights, self.reads = weights, list[str]()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.reads.append(name)
        return self.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def __contains__(self, name: object) -> bool:
        return name in self.weights

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.weights[name].shape)

    def dtype(self, name: str) -> str:
        return {"torch.float32": "F32", "torch.int64": "I64"}[str(self.weights[name].dtype)]


def test_everything_is_checked_before_a_weight_is_read() -> None:
    base, experts = Lazy(BASE), {task: Lazy(weights) for task, weights in EXPERTS.items()}
    wrong: list[tuple[str, dict[str, Any]]] = [("tiess", {}), ("ties", {"density": 20}), ("interpolate", {})]
    for method, given in wrong:
        with pytest.raises(UserError):
            merge_weights(method, base, experts, **given)
    merge_stream(Recipe("ties"), base, {"two": Lazy(EXPERTS["two"])})
    assert base.reads == []


def test_lazy_weights_merge_like_others() -> None:
    lazy: Any = {task: Lazy(weights) for task, weights in EXPERTS.items()}
    merged, expected = merge_weights("ties", Lazy(BASE), lazy), merge_weights("ties", BASE, EXPERTS)
    assert list(merged) == list(expected)
    assert all(torch.equal(merged[name], x) for name, x in expected.items())


def test_an_expert_equal_to_the_base_is_named_in_a_warning() -> None:
    with pytest.warns(MergeWarning, match="The expert 'same' equals the base"):
        merge_weights("ties", BASE, {"two": EXPERTS["two"], "same": BASE})


def test_a_needed_supply_that_is_missing_is_named(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "needy.py").write_text('"""Need grams."""\ndef merge(task_vectors, grams): yield from ()\n')
    monkeypatch.setenv("MERGECTL_PLUGINS", str(tmp_path))
    with pytest.raises(UserError, match="Method 'needy' needs 'grams'"):
        merge_weights("needy", BASE, EXPERTS)


def test_the_pieces_of_a_merge_keep_their_numbers_while_it_goes_on() -> None:
    base = {f"w{i}": torch.full((300,), float(i)) for i in range(40)}
    experts = {"a": {name: w + 1 for name, w in base.items()}}
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        stream = merge_stream(Recipe("task_arithmetic", {"scale": 1.0}), base, experts)
        assert sum(1 for _ in stream.run(lambda piece: None)) == 40
        for _ in range(2):
            assert [float(piece.weight[0]) for piece in list(stream)] == [i + 1.0 for i in range(40)]
    finally:
        torch.set_num_threads(before)


def test_a_merge_that_its_type_cannot_hold_is_refused() -> None:
    base, expert = ({"w": torch.full((3,), x, dtype=torch.float16)} for x in (60000.0, 65000.0))
    with pytest.raises(UserError, match=r"The merged 'w' holds numbers that torch\.float16 cannot hold"):
        merge_weights("task_arithmetic", base, {"a": expert}, scale=2.0)


@pytest.mark.parametrize(("one", "other"), [([0], [1.0]), ([1.0], [0]), ([True], [1.0])])
def test_real_numbers_where_the_base_has_whole_ones_are_refused(one: list[Any], other: list[Any]) -> None:
    base, expert = ({"v": torch.ones(2), "w": torch.tensor(numbers)} for numbers in (one, other))
    with pytest.raises(UserError, match=r"Weight 'w' is of the type \w+ in expert 'a', \w+ in the base"):
        merge_weights("average", base, {"a": expert})


def test_a_base_without_weights_is_refused() -> None:
    with pytest.raises(UserError, match="The base holds no weights"):
        merge_weights("average", {}, EXPERTS)
