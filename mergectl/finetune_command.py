"""The words of `mergectl finetune`, and what it prints."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergectl.errors import UserError
from mergectl.lab import Lab

if TYPE_CHECKING:
    from mergectl.grid import Grid

OWNERSHIP = "For medusa"
LORA, WARMING = "with --peft lora", "with another --scheduler, such as constant_with_warmup"
# Of a setting whether it changes anything beside the others, and where it does.
MEANINGS: tuple[tuple[str, Callable[[Mapping[str, Any]], bool], str], ...] = (
    *((name, lambda others: others.get("peft") == "lora", LORA) for name in ("rank", "alpha", "dropout")),
    ("targets", lambda others: others.get("peft", "none") != "none", "with --peft lora or --peft ia3"),
    ("warmup", lambda others: others.get("warmup_steps") is None,
     "without --warmup-steps, which says the same in steps"),
    ("warmup", lambda others: others.get("scheduler") != "constant" or not others.get("warmup"), WARMING),
    ("warmup_steps", lambda others: others.get("scheduler") != "constant" or not others.get("warmup_steps"), WARMING),
)  # fmt: skip


def finetune(
    lab: Lab,
    ctx: typer.Context,
    tasks: Annotated[list[str], typer.Argument(help="Tasks (suite/task) or whole suites: one expert each.")],
    base: Annotated[
        str, typer.Option("--base", help="The model to start from; a config.json starts from fresh weights.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder that gets one folder per task.")] = Path("runs"),
    epochs: Annotated[float, typer.Option(min=0, help="Passes over the fit rows.")] = 3.0,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Stop after so many steps, whatever the epochs.")] = None,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate; default 5e-5, for lora 5e-4, for ia3 5e-3.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per step.")] = 16,
    accumulation: Annotated[int, typer.Option(min=1, help="Batches per optimiser step.")] = 1,
    weight_decay: Annotated[float, typer.Option(min=0, help="AdamW weight decay.")] = 0.01,
    warmup: Annotated[float, typer.Option(min=0, max=1, help="Share of the steps that warm up.")] = 0.06,
    warmup_steps: Annotated[int | None, typer.Option(min=1, help="Steps that warm up, instead of a share.")] = None,
    scheduler: Annotated[str, typer.Option(help="linear, cosine or constant.")] = "linear",
    max_length: Annotated[
        int | None, typer.Option(min=8, help="Longest text in tokens; default 128, for decoders and text-to-text 512.")
    ] = None,
    peft: Annotated[str, typer.Option(help="none, lora or ia3.")] = "none",
    rank: Annotated[int, typer.Option(min=1, help="Rank of LoRA's factors.")] = 8,
    alpha: Annotated[float, typer.Option(min=0, help="LoRA's alpha.")] = 16.0,
    dropout: Annotated[float, typer.Option(min=0, max=1, help="LoRA's dropout.")] = 0.0,
    targets: Annotated[str, typer.Option(help="Modules that get adapters: q_proj,v_proj; default: by model.")] = "",
    bf16: Annotated[bool, typer.Option("--bf16", "--mixed", help="Train in bfloat16 autocast.")] = False,
    patience: Annotated[int | None, typer.Option(min=1, help="Stop after so many evaluations without gain.")] = None,
    eval_every: Annotated[
        int | None, typer.Option(min=1, help="Evaluate every so many steps instead of each epoch.")
    ] = None,
    order: Annotated[str, typer.Option(help="shuffled, or sequential: the rows as the data have them.")] = "shuffled",
    keep: Annotated[str, typer.Option(help="best: the evaluation that scores most; or last.")] = "best",
    select_on: Annotated[
        str, typer.Option(help="The split that evaluations score: tune; report as the Medusa study did.")
    ] = "tune",
    max_grad_norm: Annotated[float, typer.Option(min=0, help="Longest gradient; 0: any length.")] = 1.0,
    model_dropout: Annotated[
        float | None, typer.Option(min=0, max=1, help="Dropout of the model; default: as its configuration says.")
    ] = None,
    preset: Annotated[
        str, typer.Option(help="Published settings by task: medusa, vision; your own options go before.")
    ] = "none",
    tiny_sample: Annotated[
        bool, typer.Option("--tiny-sample", help="With a preset: an eighth of its epochs at twice the rate.")
    ] = False,
    smaller_batch: Annotated[
        int, typer.Option(min=1, help="Cut each batch into so many parts, with the same result.")
    ] = 1,
    larger_batch: Annotated[
        int, typer.Option(min=1, help="Join so many accumulated batches into one, with the same result.")
    ] = 1,
    purpose: Annotated[
        str, typer.Option("--for", help="none, or medusa: experts that own disjoint parts of the model.")
    ] = "none",
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            help="For medusa: finished models not to be opposed; several may follow.",
            rich_help_panel=OWNERSHIP,
        ),
    ] = None,
    mask: Annotated[
        str, typer.Option(help="soft, hard, half or reference: how owners are found.", rich_help_panel=OWNERSHIP)
    ] = "soft",
    top_k: Annotated[
        float | None,
        typer.Option(
            help="Percent of each weight that a task may want; default 87.5, for adapters 100.",
            rich_help_panel=OWNERSHIP,
        ),
    ] = None,
    prepass_epochs: Annotated[
        float,
        typer.Option(min=0, help="Length of the short training that shows who wants what.", rich_help_panel=OWNERSHIP),
    ] = 1.0,
    prepass_percent: Annotated[
        float | None,
        typer.Option(help="The same in percent of each task's epochs; at least one.", rich_help_panel=OWNERSHIP),
    ] = None,
    unowned: Annotated[
        str, typer.Option(help="What no task wants: freeze it, or leave it to the first.", rich_help_panel=OWNERSHIP)
    ] = "freeze",
    limit_fit: Annotated[int | None, typer.Option(min=1, help="At most so many fit rows.")] = None,
    limit_tune: Annotated[int | None, typer.Option(min=1, help="At most so many tune rows.")] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option("--grid", help="NAME=VALUE,VALUE: an expert for each value, too. May be repeated."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the output folder if it exists.")] = False,
) -> None:
    """Fine-tune one expert per task; of all epochs the best by the tune split is kept."""
    from mergectl.experts import train
    from mergectl.grid import read_grid
    from mergectl.medusa import OWN_OPTIONS, MedusaJob
    from mergectl.terminal import print_table

    options = {
        "epochs": epochs, "max_steps": max_steps, "lr": lr, "batch_size": batch_size, "accumulation": accumulation,
        "weight_decay": weight_decay, "warmup": warmup, "warmup_steps": warmup_steps, "scheduler": scheduler,
        "max_length": max_length, "peft": peft, "rank": rank, "alpha": alpha, "dropout": dropout, "bf16": bf16,
        "targets": tuple(filter(None, targets.split(","))),
        "patience": patience, "eval_every": eval_every, "limit_fit": limit_fit, "limit_tune": limit_tune,
        "order": order, "max_grad_norm": max_grad_norm, "model_dropout": model_dropout, "keep": keep,
        "select_on": select_on,
    }  # fmt: skip
    if preset != "none":  # it says what the command line does not
        options = {name: value for name, value in options.items() if _typed(ctx, name)}
    options |= {"preset": preset, "tiny_sample": tiny_sample, "smaller_batch": smaller_batch}
    options |= {"larger_batch": larger_batch}
    varied = read_grid(grid or [])
    _refuse_both(ctx, varied)
    _refuse_idle({name for name in options if _typed(ctx, name)}, varied, options)
    job = MedusaJob(tuple(against or ()), mask, top_k, prepass_epochs, prepass_percent, unowned)
    typed = [name for name in OWN_OPTIONS if _typed(ctx, name)]
    results = train(lab, tasks, base, out, options, purpose, job, typed, varied, force=force)
    rows = [(r["task"], r["out"], r.get("score"), r["run"]) for r in results]
    lab.terminal.give(results, lambda: print_table("Experts", ("task", "folder", "tune score", "run"), rows, left=2))


def _refuse_idle(typed: Collection[str], grid: Grid, options: Mapping[str, Any]) -> None:
    """Refuse a setting that changes nothing for want of another one's value; those of a preset are not known here.

    One that the grid varies must have a meaning at each of its points, or several would be the same training.
    """
    from mergectl.grid import points

    every = [{**options, **point} for point in points(grid)]
    for name, means, where in MEANINGS:
        found = [means(point) for point in every]
        if (name in grid and not all(found)) or (name in typed and not any(found)):
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option} has a meaning only {where}. Change that, or leave {option} out.")


def _typed(ctx: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _refuse_both(ctx: typer.Context, grid: dict[str, Any]) -> None:
    """Refuse a setting that has both values in the grid and one of its own."""
    for name in grid:
        if _typed(ctx, name):
            option = name.replace("_", "-")
            raise UserError(f"'{name}' is given by --{option} and by --grid. Leave out --{option}.")
