"""Batches that waste little on padding, and a last layer that computes one token: faster, with the same answers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergectl.bench import Bench, batch_logits, bench_of, logits
from mergectl.benchmarks import _rows
from mergectl.first_token import first_token_only
from mergectl.heads import open_live
from mergectl.live import LiveModel
from mergectl.packing import cuts, one_more
from tests import tiny_models as tiny

LENGTHS = st.lists(st.integers(0, 30), max_size=9).map(lambda found: sorted(found, reverse=True))


def spent(lengths: Sequence[int], places: Sequence[tuple[int, int]], cost: int) -> int:
    return sum(cost + (end - start) * max(lengths[start], 1) for start, end in places)


def all_cuts(count: int, most: int) -> list[list[tuple[int, int]]]:
    """Every way to cut so many rows."""
    found = []
    for inner in itertools.product((False, True), repeat=max(count - 1, 0)):
        ends = [0, *(place + 1 for place, cut in enumerate(inner) if cut), count]
        pieces = list(itertools.pairwise(ends))
        if all(end - start <= most for start, end in pieces):
            found.append(pieces)
    return found


@given(LENGTHS, st.integers(1, 5), st.integers(0, 40))
def test_no_other_way_to_cut_costs_less(lengths: list[int], most: int, cost: int) -> None:
    found = cuts(lengths, most, cost)
    assert [row for start, end in found for row in range(start, end)] == list(range(len(lengths)))
    assert all(end - start <= most for start, end in found)
    if lengths:
        assert spent(lengths, found, cost) == min(spent(lengths, way, cost) for way in all_cuts(len(lengths), most))


@given(st.integers(0, 70), st.integers(1, 20), st.integers(1, 9), st.integers(1, 100))
def test_rows_of_one_length_are_cut_into_whole_batches(count: int, most: int, length: int, cost: int) -> None:
    expected = [(start, min(start + most, count)) for start in range(0, count, most)]
    assert cuts([length] * count, most, cost) == expected


def test_an_accelerator_gets_larger_batches_than_a_processor() -> None:
    lengths = sorted(np.random.default_rng(0).integers(4, 120, 640).tolist(), reverse=True)
    few, many = (len(cuts(lengths, 64, one_more(device))) for device in ("cuda:0", "cpu"))
    assert few == 640 / 64 < many


def benches(live: LiveModel, task: Any, rows: int = 40) -> tuple[Bench, Bench]:
    """The same rows of very different lengths, in equal batches and in packed ones."""
    found = _rows.load(task, "report")
    columns = {name: (list(values) * rows)[:rows] for name, values in found.columns.items()}
    first = task.inputs[0]
    columns[first] = [" ".join([text] * (1 + row * row % 5)) for row, text in enumerate(columns[first])]
    labels = (list(found.labels) * rows)[:rows]
    plain, packed = (bench_of(task, live.preparer, columns, labels, 16, one_more=cost) for cost in (None, 4))
    return plain, packed


def padded(bench: Bench) -> int:
    return sum(batch["input_ids"].numel() for batch in bench.batches)


@pytest.mark.parametrize("family", [family for family in tiny.FAMILIES if family != "vit"])
def test_packed_batches_compute_fewer_tokens_and_answer_the_same(tmp_path: Path, family: str) -> None:
    live = open_live(tiny.expert(tmp_path / "expert", family), [tiny.MOOD])
    plain, packed = benches(live, tiny.MOOD)
    assert padded(packed) < padded(plain)
    assert sum(packed.sizes) == sum(plain.sizes) == 40
    outputs, expected = (logits(live.use(tiny.MOOD.id), bench) for bench in (packed, plain))
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)
    assert np.array_equal(outputs.argmax(1), expected.argmax(1))


def tokens_after(live: LiveModel, bench: Bench) -> list[int]:
    """How many tokens of each row the last layer's second half computes, batch by batch."""
    seen: list[int] = []
    layer = live.model.base_model.encoder.layer[-1].intermediate
    hook = layer.register_forward_hook(lambda module, given, found: seen.append(given[0].shape[1]))
    logits(live.use(bench.task.id), bench)
    hook.remove()
    return seen


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_the_last_layer_computes_the_first_token_alone_and_answers_the_same(tmp_path: Path, family: str) -> None:
    live = open_live(tiny.expert(tmp_path / "expert", family), [tiny.MOOD])
    _, bench = benches(live, tiny.MOOD)
    expected, before = logits(live.use(tiny.MOOD.id), bench), tokens_after(live, bench)
    assert first_token_only(live.model, lambda: batch_logits(live.model, bench, 0))
    found = logits(live.use(tiny.MOOD.id), bench)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert np.array_equal(found.argmax(1), expected.argmax(1))
    assert tokens_after(live, bench) == [1] * len(bench.batches) < before


def test_a_head_that_reads_all_tokens_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live = open_live(tiny.expert(tmp_path / "expert", "bert"), [tiny.MOOD])
    _, bench = benches(live, tiny.MOOD)
    pooler = live.model.base_model.pooler
    monkeypatch.setattr(pooler, "forward", lambda hidden: torch.tanh(pooler.dense(hidden.mean(1))))
    expected = logits(live.use(tiny.MOOD.id), bench)
    assert not first_token_only(live.model, lambda: batch_logits(live.model, bench, 0))
    assert np.array_equal(logits(live.use(tiny.MOOD.id), bench), expected)
    assert min(tokens_after(live, bench)) > 1


@pytest.mark.parametrize("family", ["gpt2", "deberta-v2"])
def test_a_model_of_another_build_is_left_as_it_was(tmp_path: Path, family: str) -> None:
    live = open_live(tiny.expert(tmp_path / "expert", family), [tiny.MOOD])
    _, bench = benches(live, tiny.MOOD)
    expected = logits(live.use(tiny.MOOD.id), bench)
    first_token_only(live.model, lambda: batch_logits(live.model, bench, 0))
    np.testing.assert_allclose(logits(live.use(tiny.MOOD.id), bench), expected, rtol=1e-5, atol=1e-6)


def test_rows_padded_to_one_length_are_not_packed_by_their_own(tmp_path: Path) -> None:
    live = open_live(tiny.expert(tmp_path / "expert", "bert"), [tiny.MOOD])
    alone = replace(live.preparer, ids_only=True)  # type: ignore[type-var]
    columns = {"sentence": ["good", "good film", "the good film was fine"]}
    (batch,) = bench_of(tiny.MOOD, alone, columns, [1, 1, 1], 16).batches
    assert batch["input_ids"].shape == (3, 40)
