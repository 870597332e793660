"""What each command's words are, and which verb they call."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergectl.errors import UserError, did_you_mean
from mergectl.lab import Lab
from mergectl.legacy import modern
from mergectl.options import (
    adapt_options,
    calibration_options,
    command,
    given_calibration,
    given_settings,
    hidden,
    setting_options,
)
from mergectl.publish import Target
from mergectl.search_command import search
from mergectl.words import (
    Adapt,
    AdaptOn,
    Base,
    Depth,
    Dtype,
    Experts,
    Force,
    Head,
    LayerMaps,
    Layout,
    Out,
    Refine,
    pairs,
)

if TYPE_CHECKING:
    from mergectl.layer_maps import LayerMap
    from mergectl.merge_scores import Scoring

ShardSize = Annotated[
    str | None, typer.Option("--shard-size", help="Largest file of the result, as 500MB; default 5GB.")
]
Push = Annotated[str | None, typer.Option("--push", help="Upload the result to the hub as ORG/NAME, private.")]
Public = Annotated[bool, typer.Option("--public", help="With --push: for all to see.")]
Export = Annotated[str | None, typer.Option("--export", help="Write one task's stand-alone classifier instead.")]
Scored = Annotated[
    list[str] | None, typer.Option("--eval", help="Score the result on these tasks or suites; several may follow.")
]
OutFile = Annotated[
    Path | None, typer.Option("--out-file", help="With --eval: add models, method and scores to this text file.")
]
Adapter = Annotated[
    bool, typer.Option("--adapter/--fold", help="LoRA, IA3: make an adapter, or fold them into the base first.")
]
AdapterRank = Annotated[
    int | None, typer.Option("--adapter-rank", help="Rank of a merged LoRA adapter; default: all that it needs.")
]
AdapterMode = Annotated[
    str | None, typer.Option("--adapter-mode", help="LoRA: product, concatenate, align or factors; see docs/medusa.md.")
]


def mergers() -> list[str]:
    """Methods and presets that merge, by name."""
    from mergectl.settings import names

    return names()


def broken_methods() -> list[str]:
    """What is wrong with method files, the user's own above all."""
    from mergectl.settings import problems

    return problems()


def known_merger(word: str) -> str:
    """A method's name as its file has it, or a refusal that names the nearest."""
    from mergectl.settings import names, problems, refinements

    name = modern(word).replace("-", "_")
    for sentence in problems():
        if f"'{name}'" in sentence and name in names():
            warnings.warn(sentence, stacklevel=2)
    if name in names():
        return name
    if name in refinements():
        raise UserError(f"'{name}' refines task vectors and merges nothing. Use it before a method: --refine {name}")
    broken = [sentence for sentence in problems() if name in sentence]
    raise UserError(broken[0] if broken else f"No method '{word}'.{did_you_mean(word, names())}")


def for_method(verb: str, method: str) -> tuple[Callable[..., Any], str, str]:
    """A method's command for a verb, its help and its epilog."""
    from mergectl.settings import describe

    info = describe(method)
    function = merge if verb == "merge" else search
    options = calibration_options(info.supplies) | (setting_options(info.settings) if verb == "merge" else {})

    def run(lab: Lab, **values: Any) -> None:
        function(lab, method, **values)

    idle = () if "entropy" in info.supplies else ("adapt_on", "adapt")
    own = inspect.signature(function, eval_str=True).parameters.values()
    given = [hidden(p) if p.name in idle else p for p in own if p.name not in ("method", "values")]
    run.__signature__ = inspect.Signature(given)  # type: ignore[attr-defined]
    paper = f"{info.title}. {info.paper}" if info.paper else info.title
    return command(run, options), info.summary, paper


def merge(
    lab: Lab,
    method: str,
    experts: Experts,
    out: Out,
    base: Base = None,
    refine: Refine = None,
    dtype: Dtype = "auto",
    export: Export = None,
    layer_map: LayerMaps = None,
    depth: Depth = "base",
    head: Head = "small",
    layout: Layout = "none",
    shard_size: ShardSize = None,
    push: Push = None,
    public: Public = False,
    tasks: Scored = None,
    out_file: OutFile = None,
    adapter: Adapter = False,
    adapter_rank: AdapterRank = None,
    adapter_mode: AdapterMode = None,
    adapt_on: AdaptOn = None,
    adapt: Adapt = None,
    force: Force = False,
    **values: Any,
) -> None:
    """Merge experts by a method."""
    from mergectl.adapter_merge import making
    from mergectl.families import named
    from mergectl.layer_maps import parse
    from mergectl.layouts import laid_out
    from mergectl.merge_scores import Scoring
    from mergectl.settings import settings_of

    others = {"export": export, "layer-map": layer_map, "shard-size": shard_size, "dtype": dtype != "auto"}
    make = making(adapter, adapter_rank, adapter_mode, [name for name, given in others.items() if given])
    settings, scoring = given_settings(values, settings_of(method)), Scoring(tuple(tasks or ()), out_file)
    target, layers = Target(out, force, shard_size, push, public), parse(layer_map or (), depth, head, lab.seed)
    models = laid_out(named(experts), layout, lab.find_run)
    options = adapt_options(method, adapt_on, adapt) | given_calibration(values)
    _merge(lab, method, settings, models, base, refine or [], dtype, export, target, layers, scoring, make, options)


def _merge(
    lab: Lab, method: str, settings: Mapping[str, Any], experts: Any, base: str | None, refine: Any, dtype: str,
    export: str | None, target: Target, layers: LayerMap, scoring: Scoring | None = None,
    make: Callable[..., Any] | None = None, options: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    from mergectl.layer_maps import mapped
    from mergectl.merge import DTYPES, MergeJob
    from mergectl.merge_scores import Scoring, shown
    from mergectl.plan import recipe_of
    from mergectl.tensorfiles import parse_size
    from mergectl.verbs import merge_models

    if dtype not in ("auto", *DTYPES):
        raise UserError(f"--dtype must be auto, {', '.join(DTYPES)}, got '{dtype}'.")
    target.check()
    recipe, size = recipe_of(method, settings, refine, lab.seed), parse_size(target.shard_size)
    origin, models = mapped(base, tuple(experts), layers, lab.find_run)
    job = MergeJob(recipe, models, origin, dtype, export, size, options or {})
    assert target.out is not None
    scoring = scoring or Scoring()
    scoring.check(lab)
    check = partial(scoring.check_models, lab, export)
    result = (make or merge_models)(lab, job, target.out, force=target.force, check=check) | target.finish()
    scores = scoring.finish(lab, result)
    lines = [f"{result['out']}  (run {result['run']})", *shown(scores)]
    lab.terminal.give(result | scores, lambda: print("\n".join(lines)))


def merge_recipe(lab: Lab, path: Path, target: Target) -> None:
    """Merge as a recipe file says."""
    from mergectl.config import MergeFile, naming_lines, read_file
    from mergectl.families import named
    from mergectl.layer_maps import given
    from mergectl.layouts import laid_out
    from mergectl.mergekit import is_mergekit
    from mergectl.options import with_seed
    from mergectl.plan import check_beforehand, recipe_of

    if is_mergekit(path):
        _merge_mergekit(lab, path, target)
        return
    recipe = read_file(path, MergeFile)
    target = target._replace(
        out=target.out or (Path(recipe.out).expanduser() if recipe.out else None),
        shard_size=target.shard_size or recipe.shard_size,
    )
    if target.out is None:
        raise UserError(f"{path} names no output folder. Add 'out: FOLDER', or give -o FOLDER.")
    lab = with_seed(lab, recipe.seed)
    models = laid_out(named(recipe.experts), recipe.layout, lab.find_run)
    with naming_lines(path, "settings", "refine"):
        told = recipe_of(recipe.method, recipe.settings, recipe.refine, lab.seed)
        check_beforehand(told, [task for task, _ in models])
    _merge(lab, recipe.method, recipe.settings, models, recipe.base, recipe.refine, recipe.dtype,
           recipe.export, target, given(recipe.layer_map, recipe.depth, recipe.head, lab.seed),
           options=recipe.options)  # fmt: skip


def _merge_mergekit(lab: Lab, path: Path, target: Target) -> None:
    """Merge as a recipe of mergekit's says, which names no folder and no seed."""
    from mergectl.mergekit_jobs import job_of
    from mergectl.tensorfiles import parse_size
    from mergectl.verbs import merge_models

    if target.out is None:
        raise UserError(f"{path} is a recipe of mergekit's and names no output folder. Give -o FOLDER.")
    target.check()
    job = replace(job_of(path, lab.seed, lab.find_run), shard_bytes=parse_size(target.shard_size))
    result = merge_models(lab, job, target.out, force=target.force) | target.finish()
    lab.terminal.give(result, lambda: print(f"{result['out']}  (run {result['run']})"))


def run(
    lab: Lab,
    pipeline: Annotated[str | None, typer.Argument(help="A shipped pipeline's name, or a pipeline file.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE of the pipeline's settings. May be repeated.")
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="List the shipped pipelines.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the steps only.")] = False,
    smoke: Annotated[
        bool,
        typer.Option("--smoke", help="Try it, or all, in seconds: tiny fresh models and sample rows, in lab/smoke."),
    ] = False,
    again: Annotated[
        str | None, typer.Option("--again", metavar="RUN", help="Repeat a run of the store: is the result the same?")
    ] = None,
    pins: Annotated[
        Path | None, typer.Option("--pins", help="Take models and data sets at the commits of this lock file.")
    ] = None,
    update_pins: Annotated[
        bool, typer.Option("--update-pins", help="Move the pipeline's pins to the hub's present commits.")
    ] = False,
) -> None:
    """Run a pipeline of verbs; steps that the store already holds are skipped."""
    from mergectl import pipelines

    if pins is not None and update_pins:
        raise UserError(
            "--pins takes the commits of a file, --update-pins the hub's present ones. Leave one of them out."
        )
    if (pins is not None or update_pins) and (smoke or show or pipeline is None):
        raise UserError(
            "--pins and --update-pins are for running a pipeline with models of the hub: mergectl run NAME."
        )

    if again is not None:
        from mergectl.repeat import repeat

        if pipeline is not None or show or settings or dry_run or smoke:
            raise UserError("--again takes everything from the run. Leave out the rest.")
        repeat(lab, again)
        return
    if show and (pipeline is not None or settings or dry_run or smoke):
        raise UserError("--list shows all pipelines. Leave out the rest.")
    if pipeline is None and (dry_run or (settings and not smoke)):
        raise UserError(f"{'--dry-run' if dry_run else '--set'} is for one pipeline. Name it: mergectl run NAME")
    if smoke and pipeline is None:
        pipelines.try_all(lab, pairs("--set", settings))
    elif show or pipeline is None:
        pipelines.show_all()
    else:
        changes = pairs("--set", settings)
        pipelines.run(lab, pipeline, changes, dry_run=dry_run, smoke=smoke, pins=pins, update_pins=update_pins)
