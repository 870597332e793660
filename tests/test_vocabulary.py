"""`tokenizer_source`: rows are merged where they mean the same tokens; what is not well defined is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mergectl.checkpoints import open_checkpoint
from mergectl.models import quiet
from mergectl.refs import Cut, Reheaded
from mergectl.vocabulary import vocabulary
from tests import tiny_models as tiny
from tests.conftest import Cli

WORDS = ["<s>", "a", "b", "c"]


def make(name: str, rows: int, words: Sequence[str] | None, added: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """Save a tiny Llama with so many rows, and beside it a tokenizer of these words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=rows, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(name) + rows)
        LlamaForCausalLM(config).save_pretrained(name)
    if words is not None:
        extra = [{"id": len(words) + n, "content": word} for n, word in enumerate(added)]
        content = {"model": {"vocab": {word: n for n, word in enumerate(words)}}, "added_tokens": extra}
        Path(name, "tokenizer.json").write_text(json.dumps(content))
    return dict(load_file(f"{name}/model.safetensors"))


def run(cli: Cli, source: str, names: Sequence[str] = ("chat", "code")) -> int:
    listed = "".join(f"  - model: {name}\n    parameters: {{weight: 0.5}}\n" for name in names)
    text = f"models:\n{listed}merge_method: task_arithmetic\nbase_model: base\ntokenizer_source: {source}\n"
    Path("recipe.yml").write_text(text)
    return cli("merge", "-c", "recipe.yml", "-o", "out", "--force")


def result() -> tuple[dict[str, torch.Tensor], dict[str, Any], set[str]]:
    """The weights, the configuration, and the tokens of the tokenizer that lies beside them."""
    config = json.loads(Path("out/config.json").read_text())
    return dict(load_file("out/model.safetensors")), config, set((vocabulary(open_checkpoint("out")) or {}).values())


def test_the_bases_vocabulary_cuts_the_rows_of_longer_models(cli: Cli) -> None:
    base, chat, code = make("base", 4, WORDS), make("chat", 6, WORDS, ["<im>", "</im>"]), make("code", 4, WORDS)
    assert run(cli, "base") == 0
    got, config, tokens = result()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        expected = base[name] + 0.5 * (chat[name][:4] - base[name]) + 0.5 * (code[name] - base[name])
        torch.testing.assert_close(got[name], expected, rtol=0, atol=1e-6)
    assert (config["vocab_size"], tokens) == (4, set(WORDS))
    assert cli("merge", "--again", "out") == 0
    record = json.loads(Path("out/mergectl.json").read_text())
    assert [row["ref"] for row in record["inputs"]] == ["base", "chat (tokens 0 to 3)", "code"]
    assert record["notes"][0] == "chat goes in without its tokens from 4 on."


def test_the_bases_vocabulary_stays_where_models_are_shorter(cli: Cli) -> None:
    base, _, _ = make("base", 6, WORDS, ["<x>", "<y>"]), make("chat", 4, WORDS), make("code", 4, WORDS)
    assert run(cli, "base") == 0
    got, config, tokens = result()
    assert torch.equal(got["lm_head.weight"][4:], base["lm_head.weight"][4:])
    assert (config["vocab_size"], tokens) == (6, {*WORDS, "<x>", "<y>"})


def test_layers_of_several_models_are_cut_too(cli: Cli) -> None:
    make("base", 4, WORDS)
    chat = make("chat", 6, WORDS, ["<im>", "</im>"])
    make("code", 6, WORDS, ["<im>", "</im>"])
    Path("recipe.yml").write_text(
        "slices:\n"
        "  - sources: [{model: chat, layer_range: [0, 2]}]\n"
        "  - sources: [{model: code, layer_range: [1, 2]}]\n"
        "merge_method: passthrough\nbase_model: base\ntokenizer_source: base\n"
    )
    assert cli("merge", "-c", "recipe.yml", "-o", "out") == 0
    got, config, tokens = result()
    torch.testing.assert_close(got["model.embed_tokens.weight"], chat["model.embed_tokens.weight"][:4])
    assert (config["vocab_size"], config["num_hidden_layers"], tokens) == (4, 3, set(WORDS))
    assert cli("merge", "--again", "out") == 0


def test_a_union_is_the_vocabulary_of_the_model_that_has_all_tokens(cli: Cli) -> None:
    base, chat, _ = make("base", 4, WORDS), make("chat", 6, WORDS, ["<im>", "</im>"]), make("code", 4, WORDS)
    assert run(cli, "union") == 0
    got, config, tokens = result()
    assert got["lm_head.weight"].shape[0] == config["vocab_size"] == 6
    torch.testing.assert_close(got["lm_head.weight"][4:], chat["lm_head.weight"][4:])
    assert tokens == {*WORDS, "<im>", "</im>"}
    assert base["lm_head.weight"].shape[0] == 4


def test_models_without_a_tokenizer_are_taken_as_equal(cli: Cli) -> None:
    for name in ("base", "chat", "code"):
        make(name, 4, None)
    assert run(cli, "base") == run(cli, "union") == 0


def merged(cli: Cli, *experts: str, more: Sequence[str] = ("--base", "base")) -> int:
    return cli("merge", "task_arithmetic", *more, "--experts", *experts, "-o", "out", "--scale", "0.5", "--force")


def test_rows_beyond_the_common_ones_come_from_the_model_that_has_tokens_there_and_so_does_the_tokenizer(
    cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    make("base", 4, WORDS)
    chat, code = make("chat", 6, WORDS, ["<im>", "</im>"]), make("code", 9, WORDS, ["<im>"])
    padded = make("padded", 16, WORDS)
    assert merged(cli, "chat", "code", "padded") == 0
    got, config, tokens = result()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        for own, start, end in ((chat, 4, 6), (padded, 6, 16)):
            assert torch.equal(got[name][start:end], own[name][start:end])
    assert (config["vocab_size"], tokens) == (16, {*WORDS, "<im>", "</im>"})
    err = capsys.readouterr().err
    assert "rows 4 to 5 kept from 'chat' and 6 to 15 kept from 'padded'; those of 'code' are not used." in err
    assert len(code["lm_head.weight"]) == 9 and "of the vocabulary is" not in err
    assert cli("merge", "--again", "out") == 0


def test_a_row_that_is_another_token_in_another_model_is_told(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    make("base", 4, WORDS)
    make("chat", 6, WORDS, ["<x>", "<z>"])
    make("code", 6, WORDS, ["<y>", "<x>"])
    said = "Row 4 of the vocabulary is \"<y>\" in 'code' and \"<x>\" in 'chat' (1 more such): the result's row is"
    assert merged(cli, "chat", "code") == 0
    assert said in capsys.readouterr().err and said in Path("out/README.md").read_text()
    assert cli("merge", "average", "--experts", "chat", "code", "-o", "out", "--force") == 0
    assert said in capsys.readouterr().err
    Path("code/tokenizer.json").write_text('{"model": 3}')
    assert merged(cli, "chat", "code") == 0
    assert "of the vocabulary is" not in capsys.readouterr().err


@pytest.mark.parametrize("text", ['{"model": 3}', '{"model": {"vocab": [1]}}', '{"added_tokens": [{"id": 1}]}', "3"])
def test_a_tokenizer_of_another_form_is_refused_where_it_is_needed(
    text: str, cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("base", "chat", "code"):
        make(name, 4, WORDS)
    Path("code/tokenizer.json").write_text(text)
    assert run(cli, "union") == 2
    assert "code" in capsys.readouterr().err and not Path("out").exists()


def test_tokens_that_were_added_beside_a_list_of_words_are_known() -> None:
    make("base", 6, None)
    Path("base/vocab.json").write_text(json.dumps({word: n for n, word in enumerate(WORDS)}))
    Path("base/added_tokens.json").write_text(json.dumps({"<x>": 4}))
    assert vocabulary(open_checkpoint("base")) == dict(enumerate([*WORDS, "<x>"]))


WRONG: dict[str, tuple[str, list[tuple[int, list[str] | None, list[str]]], str]] = {
    "another token in a row": (
        "base", [(4, WORDS, []), (4, ["<s>", "a", "c", "b"], []), (4, WORDS, [])],
        'line 8: tokenizer_source base: row 2 stands for "b" in base and for "c" in chat.',
    ),
    "two new tokens in one row": (
        "union", [(4, WORDS, []), (5, WORDS, ["<x>"]), (5, WORDS, ["<y>"])],
        'line 8: tokenizer_source union: row 4 stands for "<x>" in chat and for "<y>" in code.',
    ),
    "tokens in padding": (
        "union", [(6, WORDS, []), (6, WORDS, ["<x>"]), (6, WORDS, [])],
        'chat has the token "<x>", which base, with the most rows, has not.',
    ),
    "padding in the shorter model": (
        "union", [(5, WORDS, []), (6, WORDS, ["<x>", "<y>"]), (4, WORDS, [])],
        'row 4 stands for "<x>" in chat and for nothing in base.',
    ),
    "no tokenizer to compare": (
        "union", [(4, WORDS, []), (6, None, []), (4, WORDS, [])],
        "has no vocabulary that could be compared.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_well_defined_is_refused(case: str, cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    source, models, sentence = WRONG[case]
    for name, (rows, words, added) in zip(("base", "chat", "code"), models, strict=True):
        make(name, rows, words, added)
    assert run(cli, source) == 2
    assert sentence in capsys.readouterr().err


def test_vocabularies_are_read_from_the_files_that_people_have() -> None:
    for name in ("list", "json", "txt"):
        make(name, 3, None)
    Path("list/tokenizer.json").write_text(json.dumps({"model": {"vocab": [[word, 0.0] for word in WORDS]}}))
    Path("json/vocab.json").write_text(json.dumps({word: n for n, word in enumerate(WORDS)}))
    Path("txt/vocab.txt").write_text("\n".join(WORDS) + "\n")
    found = [vocabulary(open_checkpoint(name)) for name in ("list", "json", "txt")]
    assert found == [{0: "<s>", 1: "a", 2: "b"}] * 3  # tokens without a row are left out


@pytest.mark.parametrize(
    "ref", [lambda path: Cut(path, 5), lambda path: Reheaded(path, "interpolate")], ids=["cut", "head"]
)
def test_a_model_made_of_another_says_which_weights_it_has(ref: Any, tmp_path: Path) -> None:
    model = tiny.expert(tmp_path / "model", "bert")
    made = open_checkpoint(ref(str(model)))
    assert set(made) == set(made.names) == set(open_checkpoint(str(model)).names)
    assert made.names[0] in made
    assert "no.such.weight" not in made
