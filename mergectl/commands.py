"""What each command's words are, and which verb they call."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from mergectl.errors import UserError, did_you_mean
from mergectl.lab import Lab
from mergectl.options import command, given_settings, setting_options
from mergectl.publish import Target

Base = Annotated[str | None, typer.Option("--base", help="The model that the experts were fine-tuned from.")]
Experts = Annotated[list[str], typer.Option("--experts", help="Models, as MODEL or task=MODEL; several may follow.")]
Refine = Annotated[
    list[str] | None, typer.Option("--refine", help="Change task vectors first, e.g. dare:drop=0.9. May be repeated.")
]
Out = Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the output folder if it exists.")]
Dtype = Annotated[str, typer.Option("--dtype", help="Type of the merged weights: auto, float32, bfloat16, float16.")]
ShardSize = Annotated[str, typer.Option("--shard-size", help="Largest file of the result: 5GB, 500MB.")]
Push = Annotated[str | None, typer.Option("--push", help="Upload the result to the hub as ORG/NAME, private.")]
Public = Annotated[bool, typer.Option("--public", help="With --push: for all to see.")]
On = Annotated[list[str] | None, typer.Option("--on", help="Tasks or suites; several may follow.")]
Split = Annotated[str, typer.Option("--split", help="fit, tune or report.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="At most so many rows per task.")]
Batch = Annotated[int, typer.Option("--batch-size", min=1, help="Rows per batch.")]


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

    name = word.replace("-", "_")
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
    options = setting_options(info.settings) if verb == "merge" else {}

    def run(lab: Lab, **values: Any) -> None:
        function(lab, method, **values)

    own = [
        p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name not in ("method", "values")
    ]
    run.__signature__ = inspect.Signature([p for p in own if p.kind is not inspect.Parameter.VAR_KEYWORD])  # type: ignore[attr-defined]
    paper = f"{info.title}. {info.paper}" if info.paper else info.title
    return command(run, options), info.summary, paper


def finetune(
    lab: Lab,
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
    scheduler: Annotated[str, typer.Option(help="linear, cosine or constant.")] = "linear",
    max_length: Annotated[int, typer.Option(min=8, help="Longest text in tokens.")] = 128,
    peft: Annotated[str, typer.Option(help="none, lora or ia3.")] = "none",
    rank: Annotated[int, typer.Option(min=1, help="Rank of LoRA's factors.")] = 8,
    alpha: Annotated[float, typer.Option(min=0, help="LoRA's alpha.")] = 16.0,
    dropout: Annotated[float, typer.Option(min=0, max=1, help="LoRA's dropout.")] = 0.0,
    targets: Annotated[str, typer.Option(help="Modules that get adapters: q_proj,v_proj; default: by model.")] = "",
    bf16: Annotated[bool, typer.Option("--bf16", help="Train in bfloat16 autocast.")] = False,
    patience: Annotated[int | None, typer.Option(min=1, help="Stop after so many evaluations without gain.")] = None,
    eval_every: Annotated[
        int | None, typer.Option(min=1, help="Evaluate every so many steps instead of each epoch.")
    ] = None,
    limit_fit: Annotated[int | None, typer.Option(min=1, help="At most so many fit rows.")] = None,
    limit_tune: Annotated[int | None, typer.Option(min=1, help="At most so many tune rows.")] = None,
    force: Force = False,
) -> None:
    """Fine-tune one expert per task; the best epoch by the tune split is kept."""
    from mergectl.terminal import print_table
    from mergectl.verbs import finetune_experts

    options = {
        "epochs": epochs, "max_steps": max_steps, "lr": lr, "batch_size": batch_size, "accumulation": accumulation,
        "weight_decay": weight_decay, "warmup": warmup, "scheduler": scheduler, "max_length": max_length, "peft": peft,
        "rank": rank, "alpha": alpha, "dropout": dropout, "bf16": bf16,
        "targets": tuple(filter(None, targets.split(","))),
        "patience": patience, "eval_every": eval_every, "limit_fit": limit_fit, "limit_tune": limit_tune,
    }  # fmt: skip
    results = finetune_experts(lab, tasks, base, out, options, force=force)
    rows = [(r["task"], r["out"], r.get("score"), r["run"]) for r in results]
    lab.terminal.give(results, lambda: print_table("Experts", ("task", "folder", "tune score", "run"), rows, left=2))


def merge(
    lab: Lab,
    method: str,
    experts: Experts,
    out: Out,
    base: Base = None,
    refine: Refine = None,
    dtype: Dtype = "auto",
    export: Annotated[
        str | None, typer.Option("--export", help="Write one task's stand-alone classifier instead.")
    ] = None,
    shard_size: ShardSize = "5GB",
    push: Push = None,
    public: Public = False,
    force: Force = False,
    **values: Any,
) -> None:
    """Merge experts by a method."""
    from mergectl.families import named
    from mergectl.settings import settings_of

    settings = given_settings(values, settings_of(method))
    target = Target(out, force, shard_size, push, public)
    _merge(lab, method, settings, named(experts), base, refine or [], dtype, export, target)


def _merge(
    lab: Lab, method: str, settings: Mapping[str, Any], experts: Any, base: str | None, refine: Any, dtype: str,
    export: str | None, target: Target,
) -> None:  # fmt: skip
    from mergectl.merge import DTYPES, MergeJob
    from mergectl.plan import recipe_of
    from mergectl.tensorfiles import parse_size
    from mergectl.verbs import merge_models

    if dtype not in ("auto", *DTYPES):
        raise UserError(f"--dtype must be auto, {', '.join(DTYPES)}, got '{dtype}'.")
    target.check()
    recipe, size = recipe_of(method, settings, refine, lab.seed), parse_size(target.shard_size)
    job = MergeJob(recipe, tuple(experts), base, dtype, export, size)
    assert target.out is not None
    result = merge_models(lab, job, target.out, force=target.force) | target.finish()
    lab.terminal.give(result, lambda: print(f"{result['out']}  (run {result['run']})"))


def merge_recipe(lab: Lab, path: Path, target: Target, *, keep_seed: bool = False) -> None:
    """Merge as a recipe file says; `keep_seed` if the command line names the seed."""
    from mergectl.config import MergeFile, read_file
    from mergectl.families import named
    from mergectl.mergekit import is_mergekit
    from mergectl.options import with_seed

    if is_mergekit(path):
        _merge_mergekit(lab, path, target)
        return
    recipe = read_file(path, MergeFile)
    target = target._replace(out=target.out or (Path(recipe.out) if recipe.out else None))
    if target.out is None:
        raise UserError(f"{path} names no output folder. Add 'out: FOLDER', or give -o FOLDER.")
    lab = lab if keep_seed else with_seed(lab, recipe.seed)
    _merge(lab, recipe.method, recipe.settings, named(recipe.experts), recipe.base, recipe.refine, recipe.dtype,
           recipe.export, target)  # fmt: skip


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


def evaluate(
    lab: Lab,
    model: Annotated[str, typer.Argument(help="The model to score.")],
    on: On = None,
    heads: Annotated[
        list[str] | None, typer.Option("--heads", help="Experts that lend their heads; several may follow.")
    ] = None,
    split: Split = "report",
    limit: Limit = None,
    batch_size: Batch = 64,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
    references: Annotated[
        bool,
        typer.Option("--references", help="Score the experts and the base too, where not done yet, to compare with."),
    ] = False,
) -> None:
    """Score a model per task; a merged model wears each task's own head."""
    from mergectl.families import named
    from mergectl.scoring import score

    score(
        lab,
        model,
        on or [],
        named(heads or []),
        split=split,
        limit=limit,
        batch_size=batch_size,
        dtype=dtype,
        references=references,
    )


def search(
    lab: Lab,
    method: str,
    experts: Experts,
    out: Out,
    base: Base = None,
    on: On = None,
    sampler: Annotated[str, typer.Option(help="random, tpe, cmaes or grid.")] = "random",
    trials: Annotated[int, typer.Option(min=1, help="How many candidates to try in all.")] = 20,
    range_: Annotated[
        list[str] | None, typer.Option("--range", help="NAME=LOW:HIGH[:STEP] or NAME=word,word. May be repeated.")
    ] = None,
    fix: Annotated[list[str] | None, typer.Option("--fix", help="NAME=VALUE, not searched. May be repeated.")] = None,
    per_task: Annotated[list[str] | None, typer.Option("--per-task", help="Search this setting once per task.")] = None,
    split: Split = "tune",
    limit: Limit = None,
    batch_size: Batch = 64,
    study: Annotated[
        str | None, typer.Option("--study", help="Name of the study; default: made from the question.")
    ] = None,
    refine: Refine = None,
    dtype: Dtype = "auto",
    force: Force = False,
) -> None:
    """Search a method's settings."""
    from mergectl.families import named
    from mergectl.merge import MergeJob
    from mergectl.plan import recipe_of
    from mergectl.scoring import search_and_show
    from mergectl.settings import parse, settings_of
    from mergectl.tuning import SearchJob

    settings = settings_of(method)
    fixed = {
        name: parse(settings[name], text) if name in settings else text for name, text in _pairs("--fix", fix).items()
    }
    job = MergeJob(recipe_of(method, fixed, refine or [], lab.seed), named(experts), base, dtype)
    ranges = _pairs("--range", range_)
    search_job = SearchJob(
        job, tuple(on or ()), sampler, trials, ranges, tuple(per_task or ()), limit, split, study, batch_size
    )
    search_and_show(lab, search_job, out, force=force)


def _pairs(option: str, items: list[str] | None) -> dict[str, str]:
    found = {}
    for item in items or []:
        name, equals, value = item.partition("=")
        if not equals or not value:
            raise UserError(f"{option} {item} is not NAME=VALUE.")
        found[name.replace("-", "_")] = value
    return found


def report(
    lab: Lab,
    run: Annotated[str | None, typer.Argument(help="A run's id or name; default: the leaderboard.")] = None,
    sql: Annotated[
        str | None, typer.Option("--sql", help="Answer one SELECT over the store's tables and views.")
    ] = None,
    split: Split = "report",
    suite: Annotated[str | None, typer.Option("--suite", help="Only this suite's tasks.")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Comma-separated values on stdout.")] = False,
    as_md: Annotated[bool, typer.Option("--md", help="A Markdown table on stdout.")] = False,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Make the database anew from the archive.")] = False,
) -> None:
    """Print the leaderboard, one run, or the answer to any SQL question."""
    from mergectl import report as pages

    form = pages.choose_format(lab.terminal.as_json, as_csv, as_md)
    if rebuild:
        print(f"{lab.store.rebuild()} runs restored into {lab.store_path}")
    elif sql is not None:
        pages.show(lab.store.query(sql), form)
    elif run is not None:
        pages.one_run(lab, run, form)
    else:
        pages.leaderboard(lab, split, suite, form)


def run(
    lab: Lab,
    pipeline: Annotated[str | None, typer.Argument(help="A shipped pipeline's name, or a pipeline file.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE of the pipeline's settings. May be repeated.")
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="List the shipped pipelines.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the steps only.")] = False,
) -> None:
    """Run a pipeline of verbs; steps that the store already holds are skipped."""
    from mergectl import pipelines

    if show or pipeline is None:
        pipelines.show_all()
    else:
        pipelines.run(lab, pipeline, _pairs("--set", settings), dry_run=dry_run)
