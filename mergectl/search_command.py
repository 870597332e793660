"""What the words of `search` are, and what it prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from mergectl.errors import UserError
from mergectl.lab import Lab
from mergectl.words import (
    Adapt,
    AdaptOn,
    Base,
    Batch,
    Depth,
    Dtype,
    Experts,
    Force,
    Head,
    Inputs,
    LayerMaps,
    Layout,
    Limit,
    On,
    Out,
    Refine,
    Storage,
    pairs,
)

Sampler = Annotated[str, typer.Option("--sampler", help="random, qmc, grid, tpe, gp, cmaes, cobyla, nsga2 or nsga3.")]
Trials = Annotated[int, typer.Option("--trials", min=1, help="How many candidates to evaluate in all.")]
Ranges = Annotated[
    list[str] | None,
    typer.Option(
        "--range",
        help="NAME=LOW:HIGH[:STEP or :log] or NAME=word,word; NAME@PATTERN=... for the weights called so. Repeatable.",
    ),
]
Fix = Annotated[list[str] | None, typer.Option("--fix", help="NAME=VALUE, not searched. May be repeated.")]
PerTask = Annotated[
    list[str] | None, typer.Option("--per-task", help="Search this setting once per task. May be repeated.")
]
PerLayer = Annotated[
    list[str] | None,
    typer.Option("--per-layer", metavar="[NAME=]K", help="Search once per group of layers, K groups. May be repeated."),
]
Objective = Annotated[
    str, typer.Option("--objective", help="mean, worst, size, tasks (each one's score) or tasks' names, by commas.")
]
Start = Annotated[
    list[str] | None, typer.Option("--start", help="NAME=VALUE where cmaes and cobyla begin; default: the default.")
]
Sigma = Annotated[
    float | None, typer.Option("--sigma", help="First step of cmaes and cobyla; default: (high - low) / 6.")
]
Population = Annotated[
    int | None, typer.Option("--population", min=4, help="Candidates per generation of cmaes, nsga2, nsga3.")
]
AllowReport = Annotated[
    bool, typer.Option("--allow-report", help="Let --split report be searched; the study says so from then on.")
]
Workers = Annotated[int, typer.Option("--workers", min=1, help="Processes on this machine.")]
Prune = Annotated[
    float | None,
    typer.Option(
        "--prune", min=1e-6, max=0.5, metavar="CHANCE",
        help="Stop candidates that fall behind; CHANCE to stop one as good as the best, e.g. 0.05. Default: never.",
    ),
]  # fmt: skip
SearchSplit = Annotated[
    str, typer.Option("--split", "--search-split", help="fit, tune or report: the rows that candidates are scored on.")
]
Endpoints = Annotated[
    bool, typer.Option("--include-endpoints", help="With random and qmc: begin with the low and the high ends.")
]
Default = Annotated[
    bool, typer.Option("--include-default", help="Begin with the method's defaults; cobyla does, without --start.")
]
WAIT = 60.0  # seconds
Study = Annotated[str | None, typer.Option("--study", help="Name of the study; default: made from the question.")]


def search(
    lab: Lab,
    method: str,
    experts: Experts,
    out: Out,
    base: Base = None,
    on: On = None,
    sampler: Sampler = "random",
    trials: Trials = 20,
    range_: Ranges = None,
    fix: Fix = None,
    per_task: PerTask = None,
    per_layer: PerLayer = None,
    objective: Objective = "mean",
    start: Start = None,
    sigma: Sigma = None,
    population: Population = None,
    split: SearchSplit = "tune",
    allow_report: AllowReport = False,
    limit: Limit = None,
    batch_size: Batch = 64,
    workers: Workers = 1,
    study: Study = None,
    study_storage: Storage = None,
    prune: Prune = None,
    refine: Refine = None,
    layer_map: LayerMaps = None,
    depth: Depth = "base",
    head: Head = "small",
    layout: Layout = "none",
    inputs: Inputs = "full",
    include_endpoints: Endpoints = False,
    include_default: Default = False,
    dtype: Dtype = "auto",
    adapt_on: AdaptOn = None,
    adapt: Adapt = None,
    force: Force = False,
    **values: Any,
) -> None:
    """Search a method's settings."""
    from mergectl.families import named
    from mergectl.layer_maps import mapped, parse
    from mergectl.layouts import laid_out
    from mergectl.merge import MergeJob
    from mergectl.options import adapt_options, given_calibration
    from mergectl.plan import recipe_of
    from mergectl.scoring import search_and_show
    from mergectl.settings import parse as parse_setting
    from mergectl.settings import settings_of
    from mergectl.tuning import SearchJob

    if allow_report and split != "report":
        raise UserError(f"--allow-report is for --split report, and this search looks at '{split}'. Leave it out.")
    settings = settings_of(method)
    fixed = {
        name: parse_setting(settings[name], text) if name in settings else text
        for name, text in pairs("--fix", fix).items()
    }
    layers, models = parse(layer_map or (), depth, head, lab.seed), laid_out(named(experts), layout, lab.find_run)
    origin, models = mapped(base, models, layers, lab.find_run)
    job = SearchJob(
        MergeJob(
            recipe_of(method, fixed, refine or [], lab.seed), models, origin, dtype,
            options=adapt_options(method, adapt_on, adapt) | given_calibration(values),
        ),
        tuple(on or ()), sampler, trials, pairs("--range", range_), _names(per_task), limit, split, study, batch_size,
        tuple(per_layer or ()), objective, _numbers("--start", start), sigma, population, allow_report, workers,
        study_storage, prune, inputs.replace("-", "_"), include_endpoints, include_default,
    )  # fmt: skip
    search_and_show(lab, job, out, force=force)


def _names(words: Sequence[str] | None) -> tuple[str, ...]:
    return tuple(word.replace("-", "_") for word in words or ())


def _numbers(option: str, items: Sequence[str] | None) -> dict[str, float]:
    found = {}
    for name, text in pairs(option, items).items():
        try:
            found[name] = float(text)
        except ValueError as error:
            raise UserError(f"{option} {name}={text} is not a number.") from error
    return found


def join(
    lab: Lab,
    ctx: typer.Context,
    study: Annotated[
        str | None, typer.Option("--join", metavar="STUDY", help="Work for a search that another process leads.")
    ] = None,
    study_storage: Storage = None,
    wait: Annotated[
        float, typer.Option("--wait", min=0, help="With --join: seconds without a leader after which to give up.")
    ] = WAIT,
) -> None:
    """Search a method's settings on `tune`, keep the best, score it once on `report`."""
    if study is None:
        if ctx.invoked_subcommand is None:
            print(ctx.get_help())
            raise typer.Exit(2)
        if wait != WAIT:
            raise UserError("--wait is for --join. Leave it out.")
        if study_storage is not None:
            where = f"mergectl search {ctx.invoked_subcommand} ... --study-storage {study_storage}"
            raise UserError(f"Give --study-storage behind the method: {where}")
        return
    if ctx.invoked_subcommand is not None:
        raise UserError(f"--join takes everything from the study. Leave out '{ctx.invoked_subcommand}', or --join.")
    from mergectl.tuning import join_search

    done = join_search(lab, study, storage=study_storage, wait=wait)
    document: dict[str, Any] = {"study": study, "evaluated": done}
    lab.terminal.give(document, lambda: print(f"{done} candidates of '{study}' were scored here."))
