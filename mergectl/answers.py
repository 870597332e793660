"""How likely an encoder-decoder finds each of the answers that a row offers, and what it writes by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from mergectl.models import quiet
from mergectl.text2text import IGNORED

if TYPE_CHECKING:
    import torch

Batch = Mapping[str, "torch.Tensor"]


def rank(model: Any, batch: Batch) -> torch.Tensor:
    """Log-probability of each answer [rows, answers]: the sum over its tokens and the end, each after the earlier ones.

    Nothing is divided by the length. The encoder reads a row once, whatever the number of its answers; no more answers
    than rows are decoded at a time. A row with fewer answers than others has -inf in the places it lacks.
    """
    import torch
    from torch.nn.functional import cross_entropy
    from transformers.modeling_outputs import BaseModelOutput

    mask = batch["attention_mask"]
    hidden = model.get_encoder()(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
    parts = [torch.split(batch[name], len(mask)) for name in ("owner", "decoder_input_ids", "answers")]
    found = []
    for owner, asked, answers in zip(*parts, strict=True):
        read = BaseModelOutput(last_hidden_state=hidden[owner])
        out = model(encoder_outputs=read, attention_mask=mask[owner], decoder_input_ids=asked, use_cache=False)
        lost = cross_entropy(out.logits.float().transpose(1, 2), answers, ignore_index=IGNORED, reduction="none")
        found.append(-lost.sum(1))
    return _by_row(torch.cat(found), batch)


def greedy_prob(model: Any, batch: Batch) -> torch.Tensor:
    """Likelihood of each answer [rows, answers] by what the model expects while it writes greedily, never ending."""
    import torch

    answers = batch["answers"]
    words = (answers != IGNORED).sum(1) - 1  # all but the end
    scores = write(model, batch, int(words.max()), ends=False).scores
    return greedy_likelihoods(torch.stack(scores, 1).float(), batch)


def greedy_likelihoods(scores: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Product of the probabilities of an answer's tokens at their places in greedy decoding; its end is not counted.

    `scores` are the logits of each step [rows, steps, tokens]. A right answer that another one equals has lost: it
    stands at -1.
    """
    import torch

    answers, owner = batch["answers"], batch["owner"]
    places = torch.arange(answers.shape[1], device=answers.device)
    counted = places < ((answers != IGNORED).sum(1) - 1)[:, None]
    steps = min(answers.shape[1], scores.shape[1])
    counted, tokens = counted[:, :steps], answers[:, :steps].clamp(min=0)
    likely = scores.softmax(-1)[owner[:, None], places[:steps], tokens]
    found = torch.where(counted, likely, 1.0).prod(1)
    right = _right(batch)[owner]  # for each answer its row's right one
    equal = (found == found[right]) & (answers != answers[right]).any(1)
    found[right[equal]] = -1.0
    return _by_row(found, batch)


def _right(batch: Batch) -> torch.Tensor:
    """For each row the place of its right answer among the answers of all rows."""
    import torch

    rows = torch.arange(len(batch["right"]), device=batch["right"].device)
    first: torch.Tensor = torch.searchsorted(batch["owner"], rows) + batch["right"]
    return first


def right_answers(batch: Batch) -> torch.Tensor:
    """The tokens of each row's right answer."""
    return batch["answers"][_right(batch)]


def _by_row(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """One value per answer as [rows, answers], with -inf where a row has fewer answers than others."""
    import torch

    owner, rows = batch["owner"], len(batch["attention_mask"])
    counts = torch.bincount(owner, minlength=rows)
    place = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner]
    table = values.new_full((rows, int(counts.max())), -torch.inf)
    table[owner, place] = values
    return table


def write(model: Any, batch: Batch, length: int, *, ends: bool = True) -> Any:
    """What the model writes for each text, the likeliest token each time: at most `length` tokens, or just as many."""
    from transformers import GenerationConfig

    config = model.config
    settings = GenerationConfig(
        max_new_tokens=length, min_new_tokens=None if ends else length, do_sample=False, num_beams=1,
        decoder_start_token_id=config.decoder_start_token_id, pad_token_id=config.pad_token_id,
        eos_token_id=config.eos_token_id, output_scores=not ends, return_dict_in_generate=True,
    )  # fmt: skip
    with quiet():
        return model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], generation_config=settings
        )


ANSWER_METRICS: dict[str, Callable[[Any, Batch], torch.Tensor]] = {"rank": rank, "greedy_prob": greedy_prob}
