"""The verb `run`: a pipeline of verbs, in order, without doing again what the store already holds."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from mergectl.config import PipelineFile, read_file, read_value
from mergectl.errors import UserError, did_you_mean
from mergectl.families import named
from mergectl.lab import Lab
from mergectl.terminal import print_table

SHIPPED = Path(__file__).parent / "recipes"


def shipped() -> dict[str, Path]:
    """The pipelines that come with mergectl, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def show_all() -> None:
    """List the shipped pipelines."""
    rows = [(name, read_file(path, PipelineFile).title) for name, path in shipped().items()]
    print_table("Pipelines: mergectl run NAME", ("name", "what it does"), rows, left=2)


def load(name: str, changes: Mapping[str, str], *, smoke: bool = False) -> PipelineFile:
    """Read a shipped pipeline or a file, and put the settings in, with `smoke` those of a short try."""
    pipeline = _read(name)
    if smoke and not pipeline.smoke:
        raise UserError(f"The pipeline '{name}' has no settings for --smoke.")
    unknown = [key for key in changes if key not in pipeline.settings]
    if unknown:
        raise UserError(f"The pipeline has no setting '{unknown[0]}'.{did_you_mean(unknown[0], pipeline.settings)}")
    short = {key: "@base" if key == "base" else value for key, value in pipeline.smoke.items()} if smoke else {}
    settings = {**pipeline.settings, **short, **{key: read_value(value) for key, value in changes.items()}}
    steps = [_filled(step, settings) for step in pipeline.steps]
    return pipeline.model_copy(update={"steps": steps, "settings": settings})


def _read(name: str) -> PipelineFile:
    """Read a pipeline, with what it takes from the one that it is like."""
    path = shipped().get(name) or Path(name)
    if not path.exists():
        raise UserError(f"No pipeline '{name}'.{did_you_mean(name, shipped())}")
    pipeline = read_file(path, PipelineFile)
    if pipeline.like is None:
        if not pipeline.steps:
            raise UserError(f"{path}: the key 'steps' is missing.")
        return pipeline
    model = _read(pipeline.like)
    taken = {key: getattr(pipeline, key) or getattr(model, key) for key in ("paper", "steps", "next")}
    changed = {key: {**getattr(model, key), **getattr(pipeline, key)} for key in ("settings", "smoke")}
    return pipeline.model_copy(update={**taken, **changed})


def _filled(value: Any, settings: Mapping[str, Any]) -> Any:
    """Replace `${name}` by the pipeline's settings; a lone one keeps its type."""
    if isinstance(value, dict):
        return {key: _filled(item, settings) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, settings) for item in value]
    if not isinstance(value, str):
        return value
    for name in re.findall(r"\$\{(\w+)\}", value):
        if name not in settings:
            raise UserError(f"The pipeline uses ${{{name}}}, which it does not set.{did_you_mean(name, settings)}")
    whole = re.fullmatch(r"\$\{(\w+)\}", value)
    if whole:
        return settings[whole[1]]
    return re.sub(r"\$\{(\w+)\}", lambda match: str(settings[match[1]]), value)


def run(lab: Lab, name: str, changes: Mapping[str, str], *, dry_run: bool = False, smoke: bool = False) -> None:
    """Execute a pipeline's steps in order; one that a finished run already did is skipped."""
    pipeline = load(name, changes, smoke=smoke)
    lab = _set_up(lab, pipeline, changes)
    if smoke:  # in a lab of its own: its scores mean nothing
        lab = replace(lab, store_path=lab.folder / "smoke" / lab.store_path.name)
    folder = lab.folder / "runs" / (pipeline.folder or Path(name).stem)
    for number, step in enumerate(pipeline.steps, 1):
        check(lab, step, number)
    if dry_run:
        rows = [(n, _verb(step), _line(step[_verb(step)])) for n, step in enumerate(pipeline.steps, 1)]
        print_table(pipeline.title, ("step", "verb", "what"), rows, left=3)
        return
    lab.terminal.say(pipeline.title)
    if smoke:
        lab = _make_small(lab, pipeline, folder)
    began = time.perf_counter()
    for number, step in enumerate(pipeline.steps, 1):
        verb = _verb(step)
        started = time.perf_counter()
        again = STEPS[verb](lab, folder, step[verb])
        spent = "already done" if again else f"{time.perf_counter() - started:.1f} s"
        lab.terminal.say(f"[{number}/{len(pipeline.steps)}] {verb} {_line(step[verb])}: {spent}")
    lab.terminal.say(f"Done in {time.perf_counter() - began:.0f} s.")
    _finish(lab, pipeline)


def _set_up(lab: Lab, pipeline: PipelineFile, changes: Mapping[str, str]) -> Lab:
    """The lab with the pipeline's seed and threads, where the command line names none."""

    def chosen(name: str, given: int) -> int:
        value = pipeline.settings.get(name, given)
        if not isinstance(value, int) or value < 0:
            raise UserError(f"The pipeline's {name} must be a whole number of at least 0, got '{value}'.")
        return value if name in changes or not given else given

    return replace(lab, seed=chosen("seed", lab.seed), threads=chosen("threads", lab.threads))


def _make_small(lab: Lab, pipeline: PipelineFile, folder: Path) -> Lab:
    """Write sample rows and a tiny base into the pipeline's folder; return the lab that reads them."""
    from mergectl import smoke

    words = [word for step in pipeline.steps for key in ("tasks", "on") for word in _list(step[_verb(step)], key)]
    tasks = lab.tasks(words)
    smoke.write_rows(folder / "data", tasks)
    if "base" in pipeline.smoke and not (folder / "base" / "config.json").exists():
        smoke.make_base(folder / "base", pipeline.smoke["base"], tasks, lab.seed)
    return replace(lab, data=folder / "data")


def _finish(lab: Lab, pipeline: PipelineFile) -> None:
    from mergectl.report import leaderboard

    suites = {word.split("/")[0] for step in pipeline.steps for word in _list(step.get("eval", {}), "on")}
    leaderboard(lab, "report", suites.pop() if len(suites) == 1 else None, "json" if lab.terminal.as_json else "table")
    if pipeline.next:
        lab.terminal.say("\nTry next:")
        for line in pipeline.next:
            lab.terminal.say(f"  {line}")


def _verb(step: Mapping[str, Any]) -> str:
    return next(iter(step))


def check(lab: Lab, step: Mapping[str, Any], number: int) -> None:
    """Refuse a step that could not be done, before hours are spent on those before it."""
    from mergectl.experts import check_purpose, owned
    from mergectl.grid import check_grid
    from mergectl.plan import recipe_of
    from mergectl.search import check_sampler

    if len(step) != 1 or _verb(step) not in STEPS:
        known = ", ".join(STEPS)
        raise UserError(f"Step {number} of the pipeline must be one of {known}, got {', '.join(step)}.")
    what = step[_verb(step)]
    _check_keys(f"Step {number} of the pipeline ({_verb(step)})", _verb(step), what)
    if "method" in what:
        given = what.get("settings") or what.get("fix") or {}
        recipe_of(what["method"], given, what.get("refine", []), lab.seed)
    check_sampler(what.get("sampler", "random"))
    check_purpose(what.get("for", "none"), owned(what), check_grid(what.get("grid", {})), what.get("by_task", {}))
    lab.tasks([*_list(what, "tasks"), *_list(what, "on")])


def _check_keys(step: str, verb: str, what: Any) -> None:
    needed, others = KEYS[verb]
    if not isinstance(what, dict):
        raise UserError(f"{step} must be a mapping of keys to values, got '{what}'.")
    if verb == "finetune":
        from mergectl.finetune import FinetuneConfig
        from mergectl.medusa import OWN_OPTIONS
        from mergectl.presets import EXTRAS

        own = (f.name for f in fields(FinetuneConfig) if f.name not in ("task", "seed", "device", "masks"))
        others = (*others, *own, "for", *OWN_OPTIONS, *EXTRAS)
    for key in (*what, *(key for own in what.get("by_task", {}).values() for key in own)):
        if key not in (*needed, *others):
            raise UserError(f"{step} has no key '{key}'.{did_you_mean(key, (*needed, *others))}")
    for key in needed:
        if key not in what:
            raise UserError(f"{step} needs the key '{key}'.")


def _list(what: Mapping[str, Any], key: str) -> list[str]:
    """A step's words, whether written as a list or as one."""
    words = what.get(key) or []
    return [words] if isinstance(words, str) else [str(word) for word in words]


def _line(what: Mapping[str, Any]) -> str:
    words = [what.get(key) for key in ("method", "tasks", "models", "sampler")]
    return " ".join(" ".join(w) if isinstance(w, list) else str(w) for w in words if w)


def _finetune_each(lab: Lab, folder: Path, what: Mapping[str, Any]) -> bool:
    """Train the experts of a step; where tasks have settings of their own, one after the other."""
    step = {key: value for key, value in what.items() if key != "by_task"}
    if "by_task" not in what:
        return _finetune(lab, folder, step)
    every = [{**step, **what["by_task"].get(task, {}), "tasks": [task]} for task in _list(what, "tasks")]
    return all([_finetune(lab, folder, one) for one in every])


def _finetune(lab: Lab, folder: Path, what: dict[str, Any]) -> bool:
    from mergectl.experts import job_of, owned, train
    from mergectl.grid import check_grid

    taken = ("tasks", "base", "out", "grid", "for", *owned(what))
    options = {key: value for key, value in what.items() if key not in taken}
    base, grid = what["base"], check_grid(what.get("grid", {}))
    if isinstance(base, dict):
        base = _config_file(folder, base)
    job = job_of({**what, "against": [_inside(folder, ref) for ref in _list(what, "against")]})
    results = train(
        lab, _list(what, "tasks"), _inside(folder, base), folder / what.get("out", ""), options,
        what.get("for", "none"), job, owned(what), grid, reuse=True,
    )  # fmt: skip
    return all(result["again"] for result in results)


def _config_file(folder: Path, config: Mapping[str, Any]) -> str:
    """A model configuration written in the pipeline, as a file to start from."""
    import json

    from mergectl.artefacts import write_text

    path = folder / "config" / f"{config['model_type']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(config, indent=2) + "\n")
    return str(path)


def _inside(folder: Path, ref: str) -> str:
    """`@name` is the model that an earlier step wrote."""
    return str(folder / ref[1:]) if ref.startswith("@") else ref


def _job(lab: Lab, folder: Path, what: Mapping[str, Any]) -> Any:
    from mergectl.merge import MergeJob
    from mergectl.plan import recipe_of

    recipe = recipe_of(what["method"], what.get("settings", {}), what.get("refine", []), lab.seed)
    experts = tuple((task, _inside(folder, ref)) for task, ref in named(what["experts"]))
    base = what.get("base")
    return MergeJob(recipe, experts, _inside(folder, base) if base else None)


def _merge(lab: Lab, folder: Path, what: dict[str, Any]) -> bool:
    from mergectl.verbs import merge_models

    return bool(merge_models(lab, _job(lab, folder, what), folder / what["out"], reuse=True)["again"])


def _eval(lab: Lab, folder: Path, what: dict[str, Any]) -> bool:
    from mergectl.conflict import store_conflict
    from mergectl.verbs import evaluate_model

    models = [_inside(folder, model) for model in what["models"]]
    if what.get("conflict"):
        return all([store_conflict(lab, model, (), reuse=True)["again"] for model in models])
    heads = tuple((task, _inside(folder, ref)) for task, ref in named(what.get("heads", [])))
    how = {key: what[key] for key in ("limit", "answer_metric") if key in what}
    results = [evaluate_model(lab, model, _list(what, "on"), heads=heads, reuse=True, **how) for model in models]
    return all(result["again"] for result in results)


def _search(lab: Lab, folder: Path, what: dict[str, Any]) -> bool:
    from mergectl.tuning import SearchJob, search_settings

    job = SearchJob(
        merge=_job(lab, folder, {**what, "settings": what.get("fix", {})}),
        words=tuple(_list(what, "on")),
        sampler=what.get("sampler", "random"),
        trials=what.get("trials", 20),
        ranges=what.get("range", {}),
        per_task=tuple(what.get("per_task", [])),
        limit=what.get("limit"),
        start=what.get("start", {}),
        per_layer=tuple(str(word) for word in _list(what, "per_layer")),
        **{key: what[key] for key in ("objective", "sigma", "population", "workers", "prune") if key in what},
    )
    return bool(search_settings(lab, job, folder / what["out"], reuse=True)["again"])


# What each verb must be told, and what it may be told; `finetune` also takes all that a fine-tuning can be told.
KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "finetune": (("tasks", "base"), ("out", "grid", "by_task")),
    "merge": (("method", "experts", "out"), ("base", "settings", "refine")),
    "eval": (("models",), ("on", "heads", "limit", "answer_metric", "conflict")),
    "search": (("method", "experts", "out"), (
        "base", "on", "fix", "range", "per_task", "per_layer", "refine", "sampler", "trials", "limit", "objective",
        "start", "sigma", "population", "workers", "prune",
    )),
}  # fmt: skip
STEPS: dict[str, Callable[[Lab, Path, dict[str, Any]], bool]] = {
    "finetune": _finetune_each,
    "merge": _merge,
    "eval": _eval,
    "search": _search,
}
