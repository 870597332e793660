"""Whose tokens the rows of embeddings and heads stand for, by the tokenizers beside the models.

A merge goes row by row, so it is well defined where a row means the same token in all models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mergectl.errors import UserError
from mergectl.jsonfiles import read_json
from mergectl.refs import Cut, Ref, Reheaded
from mergectl.tokens import TOKENS, token_dim
from mergectl.weights import Checkpoint

Vocabulary = dict[int, str]
LISTS = ("tokenizer.json", "vocab.json", "vocab.txt", "added_tokens.json")  # of tokens and their numbers


def rows_of(model: Checkpoint) -> int:
    """How many tokens a model has rows for."""
    shapes = [model.shape(name) for name in model.names if TOKENS.search(name)]
    return max((shape[token_dim(shape)] for shape in shapes if shape), default=0)


def vocabulary(model: Checkpoint) -> Vocabulary | None:
    """A model's tokens by number, as far as it has rows for them; None where no file tells."""
    try:
        found = _listed(model.folder)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise UserError(f"The tokenizer in {model.folder} lists its tokens in a way that cannot be read.") from error
    rows = rows_of(model)
    return None if found is None else {number: token for number, token in found.items() if number < rows}


def _listed(folder: Path) -> Vocabulary | None:
    """All tokens that a folder's tokenizer lists, by number."""
    if (folder / "tokenizer.json").exists():
        content = read_json(folder / "tokenizer.json")
        listed = (content.get("model") or {}).get("vocab") or {}
        pairs = listed.items() if isinstance(listed, Mapping) else ((row[0], n) for n, row in enumerate(listed))
        found = {int(number): str(token) for token, number in pairs}
        return found | {int(row["id"]): str(row["content"]) for row in content.get("added_tokens") or ()}
    if (folder / "vocab.json").exists():
        found = {int(number): token for token, number in read_json(folder / "vocab.json").items()}
    elif (folder / "vocab.txt").exists():
        found = dict(enumerate((folder / "vocab.txt").read_text(encoding="utf-8").splitlines()))
    else:
        return None
    added = folder / "added_tokens.json"
    return found | ({int(number): token for token, number in read_json(added).items()} if added.exists() else {})


def as_told(model: Checkpoint) -> Vocabulary | None:
    """A model's tokens by number, None also where its files cannot be read."""
    try:
        return vocabulary(model)
    except UserError:
        return None


def _digest(path: Path) -> bytes:
    """A fingerprint of a tokenizer's file, but for how it cuts and pads texts, which stands before its tokens."""
    content = path.read_bytes()
    return hashlib.sha256(content[max(content.find(b'"added_tokens"'), 0) :]).digest()


def other_tokens(models: Mapping[str, Checkpoint]) -> Iterator[str]:
    """Say which models use a row for another token than one before them; those of one tokenizer need no look."""
    files = {
        who: tuple(_digest(path) for path in (model.folder / name for name in LISTS) if path.is_file())
        for who, model in models.items()
    }
    if len(set(files.values()) - {()}) < 2:
        return
    seen: dict[int, tuple[str, str]] = {}
    common = min(rows_of(model) for model in models.values())
    for who, model in models.items():
        found = as_told(model) or {}
        odd = [row for row in sorted(found) if row in seen and seen[row][0] != found[row]]
        if odd:
            token, other = seen[odd[0]]
            more = f" ({len(odd) - 1} more such)" if len(odd) > 1 else ""
            result = "merged of both" if odd[0] < common else "that of one of them"
            yield (
                f"Row {odd[0]} of the vocabulary is {json.dumps(found[odd[0]])} in {who} and {json.dumps(token)} in "
                f"{other}{more}: the result's row is {result}."
            )
        seen = {row: (token, who) for row, token in found.items()} | seen


def check_rows(models: Sequence[Checkpoint], word: str) -> None:
    """Refuse models in which one row stands for different tokens; a model that has no vocabulary is taken as equal."""
    seen: dict[int, tuple[str, str]] = {}  # row -> token, and the first model that has it
    for model in models:
        found = vocabulary(model) or {}
        odd = next((row for row in sorted(found) if row in seen and seen[row][0] != found[row]), None)
        if odd is not None:
            token, who = seen[odd]
            raise UserError(
                f"tokenizer_source {word}: row {odd} stands for {json.dumps(token)} in {who} and for "
                f"{json.dumps(found[odd])} in {model.ref}. Only models whose rows mean the same tokens are merged."
            )
        seen = {row: (token, model.ref) for row, token in found.items()} | seen


def check_union(base: Checkpoint | None, experts: Sequence[Checkpoint]) -> None:
    """Refuse models whose vocabularies have no union: where one has all tokens of the others, that is it."""
    models = [*([] if base is None else [base]), *experts]
    check_rows(models, "union")
    most = max(experts, key=rows_of)
    lender = base if base is not None and rows_of(base) >= rows_of(most) else most
    whole = vocabulary(lender)
    for model in models:
        found = vocabulary(model)
        if found is None or whole is None:
            if rows_of(model) != rows_of(lender):
                raise UserError(f"tokenizer_source union: {model.ref} has no vocabulary that could be compared.")
            continue
        if extra := sorted(found.keys() - whole.keys()):
            raise UserError(
                f"tokenizer_source union: {model.ref} has the token {json.dumps(found[extra[0]])}, which "
                f"{lender.ref}, with the most rows, has not. A tokenizer of several is not built."
            )
        if lacking := sorted(n for n in whole.keys() - found.keys() if n < rows_of(model)):
            raise UserError(
                f"tokenizer_source union: row {lacking[0]} stands for {json.dumps(whole[lacking[0]])} in {lender.ref} "
                f"and for nothing in {model.ref}."
            )


def with_base_tokens(model: Ref, opened: Checkpoint, base: Checkpoint) -> Ref:
    """A model with no rows beyond those of the base."""
    if isinstance(model, Cut | Reheaded) or not rows_of(opened) > rows_of(base) > 0:
        return model
    return Cut(model, rows_of(base))
