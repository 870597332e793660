"""The steps of pipelines: what each verb may be told, and how a finished one is recognised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergectl.errors import UserError
from mergectl.families import named, open_family
from mergectl.lab import Lab
from mergectl.layer_maps import given, mapped
from mergectl.layouts import Experts, laid_out
from mergectl.refs import Ref
from mergectl.tasks import answers

if TYPE_CHECKING:
    from mergectl.benchmarks._contract import Task


def words_of(what: Mapping[str, Any], key: str) -> list[str]:
    """A step's words, whether written as a list or as one."""
    words = what.get(key) or []
    return [words] if isinstance(words, str) else [str(word) for word in words]


def finetune_each(lab: Lab, folder: Path, what: Mapping[str, Any]) -> bool:
    """Train the experts of a step; where tasks have settings of their own, one after the other."""
    step = {key: value for key, value in what.items() if key != "by_task"}
    if "by_task" not in what:
        return _finetune(lab, folder, step)
    every = [{**step, **what["by_task"].get(task, {}), "tasks": [task]} for task in words_of(what, "tasks")]
    return all([_finetune(lab, folder, one) for one in every])


def _finetune(lab: Lab, folder: Path, what: dict[str, Any]) -> bool:
    from mergectl.experts import job_of, owned, train
    from mergectl.grid import check_grid

    taken = ("tasks", "base", "out", "grid", "for", *owned(what))
    options = {key: value for key, value in what.items() if key not in taken}
    base, grid = what["base"], check_grid(what.get("grid", {}))
    if isinstance(base, dict):
        base = _config_file(folder, base)
    job = job_of({**what, "against": [_inside(folder, ref) for ref in words_of(what, "against")]})
    results = train(
        lab, words_of(what, "tasks"), _inside(folder, base), folder / what.get("out", ""), options,
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


def _experts(lab: Lab, folder: Path, what: Mapping[str, Any], key: str) -> tuple[tuple[str | None, Any], ...]:
    """The models that a step names, or, with a layout, all that lie below those folders."""
    items = what[key]
    inside = tuple((task, _inside(folder, ref)) for task, ref in named([items] if isinstance(items, str) else items))
    found = laid_out(inside, what.get("layout", "none"), lab.find_run)
    only = lab.tasks(words_of(what, "only"))
    return tuple((task.id, _expert_for(task, found)) for task in only) if only else found


def _expert_for(task: Task, experts: Experts) -> Ref:
    """The expert among those of a layout that answers a task."""
    fitting = [ref for head, ref in experts if head is not None and answers(head, task)]
    if not fitting:
        there = ", ".join(head for head, _ in experts if head) or "none that says its task"
        raise UserError(f"There is no expert for {task.id}, which the key 'only' names; there are: {there}.")
    return fitting[0]


def _job(lab: Lab, folder: Path, what: Mapping[str, Any]) -> Any:
    from mergectl.merge import MergeJob
    from mergectl.plan import recipe_of

    recipe = recipe_of(what["method"], what.get("settings", {}), what.get("refine", []), lab.seed)
    base = _inside(folder, what["base"]) if what.get("base") else None
    layers = given(what.get("layer_map"), what.get("depth", "base"), what.get("head", "small"), lab.seed)
    origin, experts = mapped(base, _experts(lab, folder, what, "experts"), layers, lab.find_run)
    return MergeJob(recipe, experts, origin, options=what.get("options", {}))


def _merge(lab: Lab, folder: Path, what: dict[str, Any]) -> bool:
    from mergectl.verbs import merge_models

    make = adapter_maker(what) or merge_models
    return bool(make(lab, _job(lab, folder, what), folder / what["out"], reuse=True)["again"])


def adapter_maker(what: Mapping[str, Any]) -> Callable[..., Any] | None:
    """What merges where a step asks for an adapter; None where it does not."""
    from mergectl.adapter_merge import making

    others = ["layer-map"] if what.get("layer_map") else []
    return making(bool(what.get("adapter")), what.get("adapter_rank"), what.get("adapter_mode"), others)


def _eval(lab: Lab, folder: Path, what: dict[str, Any]) -> bool:
    from mergectl.conflict import store_conflict
    from mergectl.evaluations import evaluate_model, evaluate_references

    models = _experts(lab, folder, what, "models")
    if what.get("conflict"):
        return all([store_conflict(lab, str(model), (), reuse=True)["again"] for _, model in models])
    lab = replace(lab, seed=what.get("seed", lab.seed))
    if what.get("base"):
        family = open_family(_inside(folder, what["base"]), models, lab.find_run)
        how: dict[str, Any] = {key: what[key] for key in ("limit", "flops", "inputs") if key in what}
        return all([result["again"] for result in evaluate_references(lab, family, words_of(what, "on"), **how)])
    how = {key: what[key] for key in ("limit", "answer_metric", "flops", "inputs") if key in what}
    how["heads"] = tuple((task, _inside(folder, ref)) for task, ref in named(what.get("heads", [])))
    on = words_of(what, "on")
    # An expert of a layout does not say itself what it is for.
    asked = [(str(model), on or ([task] if task else [])) for task, model in models]
    return all([evaluate_model(lab, model, words, reuse=True, **how)["again"] for model, words in asked])


def _search(lab: Lab, folder: Path, what: dict[str, Any]) -> bool:
    from mergectl.tuning import SearchJob, search_settings

    job = SearchJob(
        merge=_job(lab, folder, {**what, "settings": what.get("fix", {})}),
        words=tuple(words_of(what, "on")),
        sampler=what.get("sampler", "random"),
        trials=what.get("trials", 20),
        ranges=what.get("range", {}),
        per_task=tuple(what.get("per_task", [])),
        limit=what.get("limit"),
        start=what.get("start", {}),
        per_layer=tuple(str(word) for word in words_of(what, "per_layer")),
        **{key: what[key] for key in MORE if key in what},
    )
    return bool(search_settings(lab, job, folder / what["out"], reuse=True)["again"])


# What each verb must be told, and what it may be told; `finetune` also takes all that a fine-tuning can be told.
MORE = ("objective", "sigma", "population", "workers", "prune", "split", "allow_report", "inputs", "include_endpoints",
        "include_default")  # fmt: skip
MODELS = ("base", "refine", "layer_map", "depth", "head", "layout", "only", "options")
KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "finetune": (("tasks", "base"), ("out", "grid", "by_task")),
    "merge": (("method", "experts", "out"), ("settings", "adapter", "adapter_rank", "adapter_mode", *MODELS)),
    "eval": (("models",), (
        "on", "heads", "limit", "answer_metric", "conflict", "layout", "only", "base", "seed", "flops", "inputs",
    )),
    "search": (("method", "experts", "out"), (
        "on", "fix", "range", "per_task", "per_layer", "sampler", "trials", "limit", "start", *MODELS, *MORE,
    )),
}  # fmt: skip
STEPS: dict[str, Callable[[Lab, Path, dict[str, Any]], bool]] = {
    "finetune": finetune_each,
    "merge": _merge,
    "eval": _eval,
    "search": _search,
}
