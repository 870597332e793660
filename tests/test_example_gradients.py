"""Fisher information of a batch whose examples share their passes is that of the examples one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

from mergectl.calibration_examples import Squares
from mergectl.calibration_fishers import contrasts, fishers_of
from tests.test_architectures import EIGHT, T5
from tests.test_calibration import MODELS, batches, model_of, texts

Batch = dict[str, torch.Tensor]
Found = dict[str, torch.Tensor]


def plain(model: Any, examples: Iterable[Batch]) -> Found:
    """The expectation over labels of the squared gradient of each one's log probability, one by one, in float64."""
    found: Found = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    count = 0
    for example in examples:
        logs = model(**example).logits[0].float().log_softmax(-1)
        for log in logs:
            model.zero_grad()
            log.backward(retain_graph=True)
            for name, p in model.named_parameters():
                if p.grad is not None:
                    found[name] += log.exp().detach().double() * p.grad.double() ** 2
        count += 1
    model.zero_grad()
    return {name: total / count for name, total in found.items()}


def assert_alike(got: Found, expected: Found) -> None:
    assert set(got) == set(expected)
    for name, x in expected.items():
        torch.testing.assert_close(got[name].double(), x, rtol=1e-4, atol=1e-6 * float(x.max()) + 1e-12, msg=name)


def left_over(model: Any, batch: Batch) -> set[str]:
    """The weights for which the examples do not share passes."""
    weights = dict(model.named_parameters())
    squares = Squares(model, weights, {name: torch.zeros_like(p, requires_grad=False) for name, p in weights.items()})
    return squares.add_shared(batch, lambda model, batch: model(**batch).logits, contrasts)


@pytest.mark.parametrize("followed", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_examples_in_batches_are_those_of_one_by_one(
    name: str, followed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: Any) -> None:
        raise RuntimeError("vmap: it depends on the data")

    if not followed:
        monkeypatch.setattr(Squares, "add_followed", refuse)
    kind, config, _ = MODELS[name]
    model, rows = model_of(kind, config, num_labels=2 if followed else 4), texts([5, 3, 7, 4, 6, 6])
    found, count = fishers_of(model, batches(rows, 4))
    assert count == 6
    assert_alike(found, plain(model, batches(rows, 1)))


def test_the_row_of_padding_in_a_table_learns_nothing_even_where_a_text_has_it() -> None:
    kind, config, _ = MODELS["bert"]
    model = model_of(kind, config, num_labels=2)
    rows = [torch.tensor([5, 0, 7, 7]), torch.tensor([3, 4, 0])]
    found, _ = fishers_of(model, batches(rows, 2))
    assert_alike(found, plain(model, batches(rows, 1)))
    assert not found["bert.embeddings.word_embeddings.weight"][0].any()


def test_few_numbers_at_a_time_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    kind, config, _ = MODELS["deberta-v3"]
    model, rows = model_of(kind, config, num_labels=3), texts([5, 3, 7, 4])
    whole, _ = fishers_of(model, batches(rows, 4))
    monkeypatch.setattr("mergectl.calibration_examples.NUMBERS", 1)
    assert_alike(fishers_of(model, batches(rows, 4))[0], {name: x.double() for name, x in whole.items()})


@pytest.mark.parametrize("kind", ["ViTForImageClassification", "CLIPForImageClassification"])
def test_examples_of_images_are_those_of_one_by_one(kind: str) -> None:
    config = {"vision_config": {**EIGHT, "projection_dim": 8}} if kind.startswith("CLIP") else EIGHT
    model, chance = model_of(kind, config, num_labels=3), torch.Generator().manual_seed(0)
    images = torch.randn(3, 1, 8, 8, generator=chance)
    found, _ = fishers_of(model, [{"pixel_values": images}])
    assert_alike(found, plain(model, ({"pixel_values": image[None]} for image in images)))


def test_each_offered_answer_of_a_text_counts_by_its_likelihood() -> None:
    model = model_of("T5ForConditionalGeneration", T5)
    ids, answers = texts([5])[0][None], torch.tensor([[4, 1, -100], [5, 6, 1], [7, 1, -100]])
    read = torch.cat([torch.zeros(3, 1, dtype=torch.long), answers[:, :-1].clamp(min=0)], 1)
    batch = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "answers": answers, "decoder_input_ids": read,
        "owner": torch.tensor([0, 0, 0]), "right": torch.tensor([1]),
    }  # fmt: skip
    found, _ = fishers_of(model, [batch])
    scores = []
    for answer, asked in zip(answers, read, strict=True):
        logs = model(input_ids=ids, decoder_input_ids=asked[None]).logits[0].log_softmax(-1)
        scores.append(sum(logs[place, token] for place, token in enumerate(answer) if token >= 0))
    logs = torch.stack(scores).log_softmax(-1)
    expected = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    for log in logs:
        model.zero_grad()
        log.backward(retain_graph=True)
        for name, p in model.named_parameters():
            expected[name] += 0 if p.grad is None else log.exp().detach() * p.grad.double() ** 2
    assert_alike(found, expected)


@pytest.mark.parametrize("name", ["bert", "roberta", "albert", "gpt2", "llama"])
def test_no_weight_of_common_models_needs_passes_of_its_own(name: str) -> None:
    kind, config, _ = MODELS[name]
    model = model_of(kind, config, num_labels=3)
    assert left_over(model, next(batches(texts([5, 3, 7, 4]), 4))) == set()


class Toy(nn.Module):
    """A classifier of rows [examples, 4], of which a test may replace what happens in between."""

    def __init__(self, between: Callable[[Toy, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.last, self.table = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 4)
        self.between, self.config = between, type("Config", (), {"is_encoder_decoder": False})()

    def forward(self, x: torch.Tensor) -> Any:
        return type("Output", (), {"logits": self.last(self.between(self, self.first(x)))})()


BETWEEN: dict[str, tuple[Callable[[Toy, torch.Tensor], torch.Tensor], set[str]]] = {
    "a layer": (lambda toy, x: toy.table(x).tanh(), set()),
    "a layer called twice": (lambda toy, x: toy.table(toy.table(x).tanh()), set()),
    "a layer that reads as many rows for all examples": (
        lambda toy, x: x @ toy.table(torch.eye(4)), {"table.weight", "table.bias"}
    ),
    "a weight used bare, too": (lambda toy, x: toy.table(x).tanh() @ toy.table.weight, {"table.weight"}),
    "an output that is overwritten": (lambda toy, x: toy.table(x).mul_(2).sin(), {"table.weight", "table.bias"}),
}  # fmt: skip


@pytest.mark.parametrize("name", BETWEEN)
def test_what_examples_do_not_have_to_themselves_is_left_over_and_still_right(name: str) -> None:
    between, expected = BETWEEN[name]
    model, x = Toy(between), torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    assert left_over(model, {"x": x}) == expected
    found, _ = fishers_of(model, [{"x": x}])
    assert_alike(found, plain(model, ({"x": row[None]} for row in x)))
