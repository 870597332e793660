"""The words of `mergectl eval`."""

from __future__ import annotations

from typing import Annotated

import typer

from mergectl.errors import UserError
from mergectl.lab import Lab
from mergectl.words import Batch, Inputs, Limit, On, Split

Model = Annotated[str | None, typer.Argument(help="The model to score.", metavar="MODEL")]
Heads = Annotated[list[str] | None, typer.Option("--heads", help="Experts that lend their heads; several may follow.")]
Precision = Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")]
References = Annotated[
    bool, typer.Option("--references", help="Score the experts and the base too, where not done yet, to compare with.")
]
AnswerMetric = Annotated[
    str, typer.Option("--answer-metric", help="Text-to-text: rank (the likeliest answer) or greedy_prob (Medusa's).")
]
Show = Annotated[
    int, typer.Option("--show", min=0, help="Text-to-text: of each task so many texts, with what the model writes.")
]
Flops = Annotated[bool, typer.Option("--flops", help="Count operations and parameters, measure latency and memory.")]
Conflict = Annotated[
    bool, typer.Option("--conflict", help="Measure the experts' opposite signs instead, and what each changed.")
]
Compared = Annotated[
    list[str] | None,
    typer.Option("--experts", help="With --conflict: experts of the base MODEL; several may follow."),
]


def evaluate(
    lab: Lab,
    model: Model = None,
    on: On = None,
    heads: Heads = None,
    split: Split = "report",
    limit: Limit = None,
    batch_size: Batch = 64,
    dtype: Precision = "float32",
    references: References = False,
    answer_metric: AnswerMetric = "rank",
    show: Show = 0,
    flops: Flops = False,
    inputs: Inputs = "full",
    conflict: Conflict = False,
    experts: Compared = None,
) -> None:
    """Score a model per task; a merged model wears each task's own head."""
    from mergectl.families import named
    from mergectl.scoring import score

    model, on = _model_and_tasks(lab, model, on or [])
    if conflict or experts:
        from mergectl.conflict import show_conflict

        others = {
            "on": on, "heads": heads, "split": split != "report", "limit": limit,
            "batch-size": batch_size != 64, "dtype": dtype != "float32", "references": references,
            "answer-metric": answer_metric != "rank", "show": show, "flops": flops, "inputs": inputs != "full",
        }  # fmt: skip
        show_conflict(lab, model, named(experts or []), asked=conflict, others=[n for n, v in others.items() if v])
        return
    score(
        lab, model, on, named(heads or []), split=split, limit=limit, batch_size=batch_size, dtype=dtype,
        references=references, answer_metric=answer_metric.replace("-", "_"), show=show, flops=flops,
        inputs=inputs.replace("-", "_"),
    )  # fmt: skip


def _model_and_tasks(lab: Lab, model: str | None, on: list[str]) -> tuple[str, list[str]]:
    """Tell the model from the tasks where it stands behind `--on`, which takes all words that follow."""
    if model is not None:
        return model, on
    if len(on) > 1 and not _is_task(lab, on[-1]):
        return on[-1], on[:-1]
    raise UserError("Which model is to be scored? Name it first: mergectl eval MODEL --on TASKS.")


def _is_task(lab: Lab, word: str) -> bool:
    try:
        return bool(lab.tasks([word]))
    except UserError:
        return False
