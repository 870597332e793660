"""`run --again RUN`: do a run once more, apart from the lab, and say whether the result is the same bit by bit."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from mergectl.again import difference, other_versions, record_of, remake
from mergectl.errors import UserError, WorkError
from mergectl.lab import Lab

Facts = Mapping[str, Any]  # a run as `Store.find` gives it
TIMED = re.compile(r"seconds|latency|memory|per_second")  # metrics that no two runs share


def repeat(lab: Lab, name: str) -> None:
    """Repeat a finished run and print whether the result is the same; a row of kind `again` keeps the answer."""
    run = lab.store.find(name)
    if run is None:
        raise UserError(f"No run '{name}' in {lab.store_name}.")
    if run["kind"] not in KINDS:
        line = f" It was: {shlex.join(run['command'])}" if run.get("command") else ""
        raise UserError(f"Runs of kind '{run['kind']}' are repeated with what they were part of.{line}")
    if run["status"] != "finished":
        raise UserError(f"Run {run['run_id']} is {run['status']}; only finished runs have a result to compare with.")
    what, do = KINDS[run["kind"]]
    with lab.start("again", {"run": run["run_id"]}, name=run["name"], seed=run["seed"] or 0) as row:
        row.input("run", run["run_id"], run_id=run["run_id"])
        with _as_then(lab, run) as (there, scratch):
            odd = do(there, run, scratch)
        row.metric("identical", float(odd is None))
        if odd is not None:
            then = {"versions": _versions(run)}
            raise WorkError(f"Run {run['run_id']}, done again, has other {what}: {odd}.{other_versions(then)}")
    result = {"run": run["run_id"], "kind": run["kind"], "again": row.id, "compared": what, "identical": True}
    sentence = f"Run {run['run_id']} ({run['kind']}), done again, has the same {what}, bit by bit."
    lab.terminal.give(result, lambda: print(sentence))


@contextlib.contextmanager
def _as_then(lab: Lab, run: Facts) -> Iterator[tuple[Lab, Path]]:
    """The lab with the run's seed, device and data, in the folder where it was begun, and a place for what it makes."""
    facts, config = run["environment"], run["config"]
    data = config.get("data") if lab.data is None else str(lab.data.absolute())
    lab = replace(
        lab, seed=run["seed"] or 0, data=None if data is None else Path(data), store_path=lab.store_path.absolute(),
        device=facts.get("device", lab.device) if lab.device == "auto" else lab.device,
        own_tasks=lab.own_tasks and lab.own_tasks.absolute(),
    )  # fmt: skip
    folder = Path(facts.get("working_folder", "."))
    with (
        tempfile.TemporaryDirectory(prefix="mergectl-again-") as scratch,
        contextlib.chdir(folder if folder.is_dir() else "."),
    ):
        yield lab, Path(scratch)


def _apart(lab: Lab, scratch: Path) -> Lab:
    """The lab with a store of its own, which goes when the answer is known."""
    return replace(lab, store_path=scratch / "lab" / "mergectl.duckdb", store_url=None)


def _versions(run: Facts) -> dict[str, str]:
    return {k.removeprefix("version."): v for k, v in run["environment"].items() if k.startswith("version.")}


def _inputs(lab: Lab, run: Facts, *roles: str) -> list[dict[str, Any]]:
    """The run's inputs in some roles; run ids among the references become the folders that these runs wrote."""
    rows = [dict(row) for row in run["inputs"] if row["role"] in roles]
    for row in rows:
        if "/" not in row["ref"] and not Path(row["ref"]).exists():
            row["ref"] = str(lab.find_run(row["ref"]) or row["ref"])
    return rows


def _check(row: Mapping[str, Any], digest: str | None) -> None:
    """Refuse an input that is no longer what it was."""
    if row["digest"] is not None and row["digest"] != digest:
        raise UserError(
            f"{row['ref']} has changed since then (digest {str(digest)[:12]}, then {row['digest'][:12]}). "
            "Bring back what it was."
        )


def _model(run: Facts) -> tuple[Path, str]:
    """Where the run's model lay, and its digest."""
    row = next((row for row in run["artifacts"] if row["kind"] == "model" and row["digest"]), None)
    if row is None:
        raise UserError(f"Run {run['run_id']} left no model to compare with.")
    return Path(row["path"]), row["digest"]


def _weights(old: Path, digest: str, new: Path) -> str | None:
    """What differs between a model made again and that of the run: by weight where that still lies there."""
    from mergectl.checkpoints import open_checkpoint

    if open_checkpoint(str(new)).digest == digest:
        return None
    kept = old.is_dir() and open_checkpoint(str(old)).digest == digest
    return difference(old, new, {}) if kept else f"their digest is not {digest[:12]}"


def _merge(lab: Lab, run: Facts, scratch: Path) -> str | None:
    """Merge again: as the model's own record says, or, where the model is gone or another, as the store does."""
    from mergectl.checkpoints import open_checkpoint

    folder, digest = _model(run)
    if folder.is_dir() and open_checkpoint(str(folder)).digest == digest:
        return remake(lab, record_of(folder), folder, None)
    rows = _inputs(lab, run, "base", "expert")
    config = run["config"]
    if len(rows) != len(config["inputs"]):
        raise UserError(f"{folder} is gone, and run {run['run_id']} was made of parts of models. Use its recipe.")
    recipe = {key: config[key] for key in ("method", "settings", "refine", "seed")}
    output = {key: config[key] for key in ("dtype", "export", "shard_bytes")} | {"digest": digest}
    output["options"] = config.get("options", {})
    tasks = {row["task"]: row["task"] for row in rows if row["role"] == "expert"}
    return remake(lab, {"recipe": recipe, "inputs": rows, "tasks": tasks, "output": output}, scratch / "gone", None)


def _eval(lab: Lab, run: Facts, scratch: Path) -> str | None:
    """Score again with the same heads on the same rows."""
    from mergectl.checkpoints import open_checkpoint
    from mergectl.evaluations import evaluate_model
    from mergectl.tasks import task_version

    config = run["config"]
    if "tasks" not in config:
        raise UserError(f"Run {run['run_id']} measured a conflict. Repeat it: {shlex.join(run['command'] or [])}")
    (model,) = _inputs(lab, run, "model")
    heads = [row for row in _inputs(lab, run, "head", "texts", "tokenizer") if row["task"] in config["heads"]]
    for row in (model, *heads):
        _check(row, open_checkpoint(row["ref"]).digest)
    for task in lab.tasks(list(config["tasks"])):
        if task_version(task) != config["tasks"][task.id]:
            raise UserError(f"The rows of {task.id} are others now than when run {run['run_id']} was scored on them.")
    known = {key: config[key] for key in ("answer_metric", "inputs", "flops") if key in config}
    result = evaluate_model(
        (apart := _apart(lab, scratch)), model["ref"], list(config["tasks"]), split=config["split"],
        heads=[(row["task"], row["ref"]) for row in heads], limit=config["limit"], dtype=config["dtype"], **known,
    )  # fmt: skip
    return _numbers(_metrics(lab, run["run_id"]), _metrics(apart, result["run"]))


def _metrics(lab: Lab, run: str) -> dict[tuple[Any, ...], Any]:
    rows = lab.store.query("SELECT task, split, name, step, value FROM metrics WHERE run_id = ?", [run]).rows
    return {row[:4]: row[4] for row in rows if not TIMED.search(row[2])}


def _numbers(then: Mapping[Any, Any], now: Mapping[Any, Any]) -> str | None:
    """The first number that is not the same."""
    for key in sorted({*then, *now}, key=str):
        if then.get(key) != now.get(key):
            name = " ".join(str(part) for part in key if part is not None)
            return f"{name} is {now.get(key)}, then {then.get(key)}"
    return None


def _finetune(lab: Lab, run: Facts, scratch: Path) -> str | None:
    """Train again from the same base on the same rows."""
    from mergectl.digests import blake3
    from mergectl.finetune_config import FinetuneConfig
    from mergectl.verbs import Masked, base_source, finetune_one

    old, digest = _model(run)
    (base,) = _inputs(lab, run, "base")
    config = dict(run["config"])
    masks = next(iter(_inputs(lab, run, "masks")), None)
    if config["masks"] is not None and (masks is None or not Path(masks["ref"]).is_file()):
        raise UserError(f"The ownership masks that run {run['run_id']} was trained with are gone.")
    if masks is not None:
        _check(masks, blake3(Path(masks["ref"])).hex())
    source = base_source(lab, base["ref"])
    _check(base, source.weights.digest if source.weights is not None else None)
    config |= {
        "base": str(source.folder or source.ref),
        "masks": masks and masks["ref"],
        "targets": tuple(config["targets"]),
    }
    config["device"] = lab.torch_device()
    settings = FinetuneConfig(**{f.name: config[f.name] for f in fields(FinetuneConfig) if f.name in config})
    (task,) = lab.tasks([settings.task])
    own = None if masks is None else Masked(Path(masks["ref"]), masks["digest"], ())
    new = scratch / old.name
    finetune_one(_apart(lab, scratch), task, source, new, settings, own, False, False)
    return _weights(old, digest, new)


def _search(lab: Lab, run: Facts, scratch: Path) -> str | None:
    """Search again in a study of its own; every trial must be the same, and so the model."""
    from mergectl.search_jobs import heard
    from mergectl.studies import close, load_study
    from mergectl.tuning import search_settings
    from mergectl.workers import study_facts

    old, digest = _model(run)
    study = load_study(lab.folder / "optuna", run["study"])
    try:
        told = json.loads(json.dumps(study_facts(study)["search"]))
    finally:
        close(study)
    apart = _apart(lab, scratch)
    told["job"] |= {"study": None, "storage": None, "trials": run["config"]["trials"]}
    job = replace(heard(apart, told, shared=True).job, study=None)
    new = scratch / old.name
    result = search_settings(apart, job, new)
    odd = _numbers(_trials(lab, run["study"], job.trials), _trials(apart, result["study"], job.trials))
    return odd or _weights(old, digest, new)


def _trials(lab: Lab, study: str, count: int) -> dict[tuple[Any, ...], Any]:
    """A study's trials: settings and value, or nothing where a candidate was refused."""
    rows = lab.store.query(
        "SELECT r.trial, r.config, t.value FROM runs r JOIN trials t ON t.run_id = r.run_id "
        "WHERE r.study = ? AND r.kind = 'trial' AND r.status IN ('finished', 'failed') AND r.trial < ?", [study, count],
    ).rows  # fmt: skip
    return {("trial", trial): (json.loads(config)["settings"], value) for trial, config, value in rows}


# What is compared, and how it is done again.
KINDS: dict[str, tuple[str, Callable[[Lab, Facts, Path], str | None]]] = {
    "merge": ("weights", _merge),
    "eval": ("scores", _eval),
    "finetune": ("weights", _finetune),
    "search": ("trials and weights", _search),
}
