"""Calibration: what every linear layer reads is gathered once, for any architecture, and kept for all who ask."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mergectl import merge_weights
from mergectl.calibration import Capture, linear_layers, moments_of
from mergectl.calibration_fishers import fishers_of
from mergectl.errors import UserError
from mergectl.models import quiet
from tests.test_architectures import BART, EIGHT, GPT, LLAMA, T5, TEXT

RELATIVE: dict[str, Any] = {**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
SHARED: dict[str, Any] = {
    **RELATIVE, "position_biased_input": False, "share_att_key": True, "position_buckets": 4,
    "norm_rel_ebd": "layer_norm",
}  # fmt: skip
# name -> (model class, configuration, how many linear weights of its layers read tokens)
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "bert": ("BertForSequenceClassification", TEXT, 2 * 6),
    "roberta": ("RobertaForSequenceClassification", TEXT, 2 * 6),
    "deberta": ("DebertaForSequenceClassification", {**RELATIVE, "type_vocab_size": 0}, 2 * 4),
    "deberta-v2": ("DebertaV2ForSequenceClassification", RELATIVE, 2 * 6),
    "deberta-v3": ("DebertaV2ForSequenceClassification", SHARED, 2 * 6),
    "albert": ("AlbertForSequenceClassification", {**TEXT, "embedding_size": 8}, 1 * 6),
    "gpt2": ("GPT2ForSequenceClassification", {**GPT, "pad_token_id": 0}, 2 * 4),
    "llama": ("LlamaForSequenceClassification", LLAMA, 2 * 7),
}


def model_of(kind: str, config: dict[str, Any], **more: Any) -> Any:
    import transformers

    found = getattr(transformers, kind)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return found(found.config_class(**config, **more)).eval()


def texts(lengths: list[int]) -> list[torch.Tensor]:
    chance = torch.Generator().manual_seed(0)
    return [torch.randint(3, 13, (length,), generator=chance) for length in lengths]


def padded(rows: list[torch.Tensor], fill: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts as one batch, filled up with anything, and its mask."""
    width = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (0, width - len(row)), value=fill) for row in rows])
    mask = torch.stack([(torch.arange(width) < len(row)).long() for row in rows])
    return ids, mask


def batches(rows: list[torch.Tensor], size: int) -> Iterator[dict[str, torch.Tensor]]:
    for start in range(0, len(rows), size):
        ids, mask = padded(rows[start : start + size])
        yield {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", MODELS)
def test_padded_batches_give_the_moments_of_texts_one_by_one(name: str) -> None:
    kind, config, count = MODELS[name]
    model, rows = model_of(kind, config, num_labels=3), texts([5, 3, 7, 4, 6])
    together, alone = moments_of(model, batches(rows, 3)), moments_of(model, batches(rows, 1))
    assert together.unread == ()
    tokens = [key for key, gram in together.grams.items() if gram.rows % 25 == 0]  # ALBERT's layers are one
    assert len([key for key in tokens if key.startswith(f"{model.base_model_prefix}.")]) >= count
    for key in tokens:
        torch.testing.assert_close(together.grams[key].moment, alone.grams[key].moment, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_moment_is_the_mean_of_outer_products_of_the_rows_that_a_layer_reads(name: str) -> None:
    kind, config, _ = MODELS[name]
    model, text = model_of(kind, config), texts([6])
    seen: dict[str, torch.Tensor] = {}

    def look(key: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            seen.setdefault(key, args[0].detach())  # the first call is the tokens'

        return hook

    handles = [module.register_forward_hook(look(key)) for key, module in linear_layers(model).items()]
    found = moments_of(model, batches(text, 1)).grams
    for handle in handles:
        handle.remove()
    for key, gram in found.items():
        x = seen[key].reshape(-1, seen[key].shape[-1]).double()
        if gram.rows == len(x):
            torch.testing.assert_close(gram.moment.double(), x.t() @ x / len(x), atol=1e-5, rtol=1e-4)
    assert any(gram.rows == 6 for gram in found.values())


def test_a_layer_that_also_reads_positions_keeps_its_tokens_and_in_parity_mode_all() -> None:
    model = model_of("DebertaV2ForSequenceClassification", SHARED)
    rows = texts([5, 5, 5, 5])
    key = next(name for name in linear_layers(model) if name.endswith("0.attention.self.key_proj.weight"))
    assert moments_of(model, batches(rows, 4)).grams[key].rows == 20
    both = moments_of(model, batches(rows, 4), Capture(include_padding=True)).grams[key]
    assert both.rows > 20


def test_layers_that_read_only_positions_keep_them() -> None:
    model = model_of("DebertaForSequenceClassification", MODELS["deberta"][1])
    found = moments_of(model, batches(texts([5, 5, 5]), 3)).grams
    assert {gram.rows for key, gram in found.items() if ".pos_" in key} == {10}


def test_gpt2_layers_stored_the_other_way_round_are_found() -> None:
    found = moments_of(model_of("GPT2ForSequenceClassification", MODELS["gpt2"][1]), batches(texts([5, 4]), 2)).grams
    assert len(found["transformer.h.0.mlp.c_proj.weight"].moment) == 12
    assert len(found["transformer.h.0.attn.c_attn.weight"].moment) == 8


@pytest.mark.parametrize(
    ("kind", "config"), [("T5ForConditionalGeneration", T5), ("BartForConditionalGeneration", BART)]
)
def test_what_encoder_and_decoder_read_is_told_apart_where_texts_and_answers_are_equally_long(
    kind: str, config: dict[str, Any]
) -> None:
    model = model_of(kind, config)
    asked, answers = texts([5, 3, 4, 5]), texts([2, 5, 3, 5])

    def pairs(size: int) -> Iterator[dict[str, torch.Tensor]]:
        for start in range(0, 4, size):
            (ids, mask), (read, _) = padded(asked[start : start + size]), padded(answers[start : start + size])
            labels, _ = padded(answers[start : start + size], fill=-100)
            yield {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": read, "labels": labels}

    together, alone = moments_of(model, pairs(4)).grams, moments_of(model, pairs(1)).grams
    cross = [key for key in together if ".EncDecAttention.k" in key or ".encoder_attn.k_proj" in key]
    own = [key for key in together if "EncDecAttention.q" in key or ".encoder_attn.q_proj" in key]
    assert {together[key].rows for key in cross} == {17}
    assert {together[key].rows for key in own} == {15}
    assert model.get_output_embeddings() not in linear_layers(model).values()
    for key, gram in together.items():
        torch.testing.assert_close(gram.moment, alone[key].moment, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["ViTForImageClassification", "CLIPForImageClassification"])
def test_patches_of_images_are_rows(kind: str) -> None:
    config = {"vision_config": {**EIGHT, "projection_dim": 8}} if kind.startswith("CLIP") else EIGHT
    model, images = model_of(kind, config), torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = moments_of(model, [{"pixel_values": images}]).grams
    layers = [gram.rows for key, gram in found.items() if ".layers." in key or ".layer." in key]
    assert len(layers) == 2 * 6
    assert set(layers) == {3 * 5}


def test_a_joint_projection_of_queries_keys_and_values_is_seen_where_they_are_one() -> None:
    class Model(torch.nn.Module):
        def __init__(self, same: bool) -> None:
            super().__init__()
            self.same, self.config = same, type("Config", (), {"is_encoder_decoder": False})()
            self.attention = torch.nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.attention(x, x if self.same else 2 * x, x, need_weights=False)[0]
            return found

    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    found = moments_of(Model(same=True).eval(), [{"x": x}])
    rows = x.reshape(6, 4)
    torch.testing.assert_close(found.grams["attention.in_proj_weight"].moment, rows.t() @ rows / 6)
    assert found.unread == ("attention.out_proj.weight",)
    assert moments_of(Model(same=False).eval(), [{"x": x}]).grams == {}


def test_rows_are_capped_in_their_order_whatever_the_batches() -> None:
    model, rows = model_of("BertForSequenceClassification", TEXT), texts([5, 3, 7, 4, 6])
    key = "bert.encoder.layer.0.attention.self.query.weight"
    small, large = (moments_of(model, batches(rows, size), Capture(10)).grams[key] for size in (1, 5))
    assert small.rows == large.rows == 10
    torch.testing.assert_close(small.moment, large.moment, atol=1e-6, rtol=1e-5)
    whole = moments_of(model, batches(rows, 5), Capture(1000, divisor="requested")).grams[key]
    torch.testing.assert_close(whole.moment * 1000 / 25, moments_of(model, batches(rows, 5)).grams[key].moment)


def test_inputs_that_are_not_finite_name_their_layer() -> None:
    model = model_of("BertForSequenceClassification", TEXT)
    model.bert.encoder.layer[1].attention.output.LayerNorm.weight.data[2] = math.nan
    with pytest.raises(UserError, match=r"'bert\.encoder\.layer\.1\.intermediate\.dense' are not finite"):
        moments_of(model, batches(texts([4]), 1))


def test_no_hook_stays_behind() -> None:
    model = model_of("BertForSequenceClassification", TEXT)
    moments_of(model, batches(texts([4]), 1))
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_fisher_information_is_the_expected_square_of_each_examples_gradient(name: str) -> None:
    kind, config, _ = MODELS[name]
    model, rows = model_of(kind, config, num_labels=3), texts([5, 3, 6])
    found, examples = fishers_of(model, batches(rows, 2))
    expected = {key: torch.zeros_like(p) for key, p in model.named_parameters()}
    for row in rows:
        for label in range(3):
            model.zero_grad()
            logs = model(input_ids=row[None]).logits[0].log_softmax(-1)
            logs[label].backward()
            for key, p in model.named_parameters():
                expected[key] += 0 if p.grad is None else logs[label].exp().detach() * p.grad**2 / 3
    assert examples == 3
    for key, x in expected.items():
        torch.testing.assert_close(found[key], x, atol=1e-7, rtol=1e-3)
    assert not any(module.sparse for module in model.modules() if isinstance(module, torch.nn.Embedding))


def test_a_batchs_sum_is_squared_only_if_asked_for_and_a_regression_looks_at_its_labels() -> None:
    model, rows = model_of("BertForSequenceClassification", TEXT, num_labels=1), texts([4, 4])
    labels = torch.tensor([0.5, -1.0])
    given = [{**next(batches(rows, 2)), "labels": labels}]
    key = "classifier.bias"
    logits = model(**next(batches(rows, 2))).logits[:, 0].detach()
    slopes = 2 * (logits - labels)
    assert float(fishers_of(model, given)[0][key]) == pytest.approx(float((slopes**2).mean()), rel=1e-4)
    expected = float(slopes.mean() ** 2 / 2)
    assert float(fishers_of(model, given, "batch_sum")[0][key]) == pytest.approx(expected, rel=1e-4)


# The methods themselves.

E = {
    "a": {"l.weight": torch.tensor([[1.0, 2.0], [3.0, -1.0]])},
    "b": {"l.weight": torch.tensor([[5.0, 0.0], [1.0, 1.0]])},
}
BASE = {"l.weight": torch.zeros(2, 2)}


def grams(*moments: list[list[float]]) -> dict[str, Any]:
    return {"grams": {task: {"l.weight": torch.tensor(m)} for task, m in zip(E, moments, strict=False)}}


def test_regmean_is_the_mean_where_all_moments_are_equal() -> None:
    moment = [[2.0, 0.7], [0.7, 1.0]]
    got = merge_weights("regmean", BASE, E, supplies=grams(moment, moment))["l.weight"]
    torch.testing.assert_close(got, torch.tensor([[3.0, 1.0], [2.0, 0.0]]))


def test_regmean_without_off_diagonal_entries_is_a_weighted_mean_per_input() -> None:
    given = grams([[3.0, 0.9], [0.9, 1.0]], [[1.0, -0.5], [-0.5, 4.0]])
    got = merge_weights("regmean", BASE, E, supplies=given, off_diagonal=0.0)["l.weight"]
    torch.testing.assert_close(got, torch.tensor([[(3 + 5) / 4, 2 / 5], [(9 + 1) / 4, (-1 + 4) / 5]]))


def test_regmean_gives_the_outputs_nearest_to_the_experts_own() -> None:
    chance = torch.Generator().manual_seed(0)
    x = {
        task: torch.randn(50, 2, generator=chance).double() @ torch.tensor([[1.0, 0.4], [0.0, 2.0]]).double()
        for task in E
    }
    given = {"grams": {task: {"l.weight": rows.t() @ rows / 50} for task, rows in x.items()}}
    got = merge_weights("regmean", BASE, E, supplies=given)["l.weight"].double()

    def error(w: torch.Tensor) -> float:
        return sum(float(((x[t] @ (w - E[t]["l.weight"].double()).t()) ** 2).sum()) for t in E)

    assert all(error(got) < error(got + 1e-3 * torch.randn(2, 2, generator=chance).double()) for _ in range(5))


@pytest.mark.parametrize("moment", [[[1.0, 1.0], [1.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])
def test_equal_experts_and_a_lone_one_come_back_whatever_the_moments(moment: list[list[float]]) -> None:
    for experts in ({"a": E["a"]}, {"a": E["a"], "b": E["a"]}):
        got = merge_weights("regmean", BASE, experts, supplies=grams(*[moment] * len(experts)))["l.weight"]
        assert torch.equal(got, E["a"]["l.weight"])


def test_regmean_along_directions_that_no_input_has_takes_the_mean() -> None:
    given = grams([[4.0, 0.0], [0.0, 0.0]], [[4.0, 0.0], [0.0, 0.0]])
    got = merge_weights("regmean", BASE, E, supplies=given)["l.weight"]
    torch.testing.assert_close(got, torch.tensor([[3.0, 1.0], [2.0, 0.0]]))


def test_a_weight_stored_in_by_out_is_solved_the_other_way_round() -> None:
    given = grams([[3.0, 1.0], [1.0, 1.0]], [[1.0, 0.0], [0.0, 2.0]])
    plain = merge_weights("regmean", BASE, E, supplies=given)["l.weight"]
    turned = {task: {"l.weight": x["l.weight"].t().contiguous()} for task, x in E.items()}
    got = merge_weights("regmean", BASE, turned, supplies={**given, "linears": {"l.weight": True}})["l.weight"]
    torch.testing.assert_close(got, plain.t())


def test_a_weight_that_was_not_captured_is_averaged() -> None:
    got = merge_weights("regmean", BASE, E, supplies={"grams": {"a": {}, "b": {}}})["l.weight"]
    torch.testing.assert_close(got, torch.tensor([[3.0, 1.0], [2.0, 0.0]]))


def test_missing_misshapen_and_infinite_moments_are_refused() -> None:
    with pytest.raises(UserError, match="no grams for the task 'b', only for a"):
        merge_weights("regmean", BASE, E, supplies={"grams": {"a": {}}})
    with pytest.raises(UserError, match=r"'l\.weight' are of 3 inputs, and the weight has shape \[2, 2\]"):
        merge_weights("regmean", BASE, E, supplies={"grams": {t: {"l.weight": torch.eye(3)} for t in E}})
    with pytest.raises(UserError, match=r"'l\.weight' on the task 'a' hold NaN or infinity"):
        merge_weights("regmean", BASE, E, supplies=grams([[math.nan, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]))


@pytest.mark.parametrize("normalize", [True, False])
def test_fisher_merging_is_the_mean_where_the_information_is_equal(normalize: bool) -> None:
    known = {"fishers": {task: {"l.weight": torch.tensor([[1.0, 0.0], [7.0, 1e-9]])} for task in E}}
    got = merge_weights("fisher", BASE, E, supplies=known, normalize=normalize)["l.weight"]
    torch.testing.assert_close(got, torch.tensor([[3.0, 1.0], [2.0, 0.0]]))


def test_fisher_merging_follows_information_and_coefficients_and_normalises_scale_away() -> None:
    first, second = torch.tensor([[9.0, 1.0], [1.0, 1.0]]), torch.ones(2, 2)
    known = {"fishers": {"a": {"l.weight": first}, "b": {"l.weight": second}}}
    got = merge_weights("fisher", BASE, E, supplies=known, normalize=False, coefficient={"a": 1.0, "b": 3.0})[
        "l.weight"
    ]
    assert float(got[0, 0]) == pytest.approx((9 * 1 + 3 * 5) / 12, rel=1e-5)
    scaled = {"fishers": {"a": {"l.weight": 1e6 * first}, "b": {"l.weight": second}}}
    torch.testing.assert_close(
        merge_weights("fisher", BASE, E, supplies=scaled, epsilon=1e-9)["l.weight"],
        merge_weights("fisher", BASE, E, supplies=known, epsilon=1e-9)["l.weight"],
    )
    with pytest.raises(UserError, match="coefficients of the experts add up to zero"):
        merge_weights("fisher", BASE, E, supplies=known, coefficient=0.0)
