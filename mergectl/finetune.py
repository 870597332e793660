"""Fine-tune an expert: one task, one base, the best checkpoint or the last, resumable after a kill."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from mergectl import artefacts
from mergectl.adapters import START
from mergectl.digests import blake3
from mergectl.dropout import rates, with_dropout
from mergectl.errors import UserError
from mergectl.finetune_config import FinetuneConfig
from mergectl.naming import is_writer

if TYPE_CHECKING:
    import torch

    from mergectl.benchmarks._contract import Task
    from mergectl.models import Source
    from mergectl.preprocess import Preparer

__all__ = ["FinetuneConfig", "finetune"]

Progress: TypeAlias = Callable[[int, int, str], None]
JOB = "job.json"


def finetune(
    config: FinetuneConfig,
    out: Path,
    *,
    data: Path | None = None,
    run: Any = None,
    progress: Progress | None = None,
    force: bool = False,
    task: Task | None = None,
) -> dict[str, Any]:
    """Train an expert into the folder `out` and return its scores, curve, steps and seconds.

    A killed training goes on where it was when it is started again with the same configuration.
    """
    from mergectl.models import open_source, pick_device, quiet
    from mergectl.training import arguments

    out = Path(out)
    artefacts.check_free(out, force)
    device = pick_device(config.device)
    task = task or _resolved(config.task)
    if task.head:
        raise UserError(f"{task.id} is answered with the head of another task, so there is nothing to train.")
    source = open_source(config.base)
    job = _job(config, task, source, data)
    with quiet(), _work_folder(out) as work:
        args = arguments(config, work, device)
        with args.main_process_first(local=False):
            if args.process_index == 0:
                _claim(work, job)
        return _train(config, task, source, args, out, data=data, run=run, progress=progress, force=force)


def _train(
    config: FinetuneConfig, task: Task, source: Source, args: Any, out: Path,
    *, data: Path | None, run: Any, progress: Progress | None, force: bool,
) -> dict[str, Any]:  # fmt: skip
    from mergectl import lowrank, models, training
    from mergectl.bench import make_bench

    given = source if config.model_dropout is None else with_dropout(source, config.model_dropout)
    model = models.build(given, task, seed=config.seed, from_scratch=config.from_scratch)
    preparer = models.preparer_for(source, model.config, task, config.max_length)
    examples = _examples(task, preparer, config, data)
    bench = make_bench(task, preparer, split=config.select_on, data=data, limit=config.limit_tune, seed=config.seed)
    begun = None
    if config.peft != "none":
        model = lowrank.put_on(model, config)
        begun = lowrank.factors(model)
    trainer = training.make_trainer(config, args, model, examples, bench, run=run, progress=progress)
    checkpoint = training.last_checkpoint(Path(args.output_dir))
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    result = _result(trainer, task, out, config, time.perf_counter() - start, checkpoint is not None)
    result |= {"examples": len(examples), "tune_examples": len(bench)}
    if trainer.is_world_process_zero():
        _write(config, task, source, trainer.model, preparer, out, result, run, force, begun)
    trainer.accelerator.wait_for_everyone()
    return result


def _resolved(word: str) -> Task:
    from mergectl.tasks import resolve

    found = resolve([word])
    if len(found) != 1:
        raise UserError(f"'{word}' is a suite of {len(found)} tasks. An expert is trained on one: name suite/task.")
    return found[0]


def _examples(task: Task, preparer: Preparer, config: FinetuneConfig, data: Path | None) -> list[dict[str, Any]]:
    from mergectl.benchmarks import _rows

    template = -1 if task.pool == "median" else 0
    rows = _rows.load(task, "fit", data=data, limit=config.limit_fit, seed=config.seed, template=template)
    examples = preparer.prepare(task, rows.columns)
    return [{**example, "labels": label} for example, label in zip(examples, rows.labels, strict=True)]


def _result(
    trainer: Any, task: Task, out: Path, config: FinetuneConfig, seconds: float, resumed: bool
) -> dict[str, Any]:
    from mergectl.training import curve

    state = trainer.state
    rows = curve(state.log_history)
    kept = state.best_global_step if config.keep == "best" else state.global_step
    best = next((row for row in rows if row["step"] == kept), rows[-1])
    names = ("score", *dict.fromkeys((task.metric, *task.metrics)))
    return {
        "out": str(out), "task": task.id, "score": best["score"], "metrics": {name: best[name] for name in names},
        "best_step": int(best["step"]), "best_epoch": best["epoch"], "steps": state.global_step, "curve": rows,
        "seconds": seconds, "resumed": resumed,
    }  # fmt: skip


def _write(
    config: FinetuneConfig, task: Task, source: Source, model: Any, preparer: Preparer, out: Path,
    result: Mapping[str, Any], run: Any, force: bool, begun: Mapping[str, torch.Tensor] | None,
) -> None:  # fmt: skip
    """Write the full model, its tokenizer or image settings, the adapter if there is one, and the record."""
    from safetensors.torch import save_file

    from mergectl import lowrank

    with artefacts.new_folder(out, force=force) as folder:
        if config.peft != "none":
            base = Path(config.base)  # a folder in full, so that the adapter loads from anywhere; a hub id as it is
            model.peft_config["default"].base_model_name_or_path = (
                str(base.absolute()) if base.is_dir() else config.base
            )
            model.save_pretrained(folder / "adapter")
            preparer.save(folder / "adapter")
            if begun:
                save_file(dict(begun), folder / "adapter" / START)
            model = lowrank.fold(model)
        _restore(model, source)
        model.save_pretrained(folder)
        preparer.save(folder)
        config = replace(config, max_length=getattr(preparer, "max_length", None))  # as used; images have none
        artefacts.add_json(folder / "mergectl.json", _record(config, task, source, result, run))


def _restore(model: Any, source: Source) -> None:
    """Let an expert's configuration say what its base's says, and whether embedding and head are one weight.

    Trainer turns the cache of generation off for good, transformers calls every T5 tied, and dropout may be ours.
    """
    config = model.config
    vars(config).pop("use_cache", None)
    if "use_cache" in source.config:
        config.use_cache = source.config["use_cache"]
    for name, rate in rates(source.config).items():
        setattr(config, name, rate)
    if is_writer(model):
        config.tie_word_embeddings = model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _record(config: FinetuneConfig, task: Task, source: Source, result: Mapping[str, Any], run: Any) -> dict[str, Any]:
    from mergectl.lab import versions

    return {
        "kind": "expert", "task": task.id, "task_version": task.version, "kind_of_task": task.kind,
        "labels": list(task.labels), "base": config.base,
        "base_digest": None if source.weights is None else source.weights.digest,
        "recipe": {**asdict(config), "lr": config.learning_rate}, "seed": config.seed,
        config.select_on: dict(result["metrics"]), "best_step": result["best_step"], "steps": result["steps"],
        "versions": versions(), "run": getattr(run, "id", None),
    }  # fmt: skip


def _job(config: FinetuneConfig, task: Task, source: Source, data: Path | None) -> dict[str, Any]:
    """What must be the same for a training to be gone on with."""
    digest = None if source.weights is None else source.weights.digest
    found = {**asdict(config), "task": task.id, "version": task.version, "base_digest": digest, "data": str(data)}
    if config.masks is not None:
        found["masks_digest"] = blake3(Path(config.masks)).hex()
    copied: dict[str, Any] = json.loads(json.dumps(found))
    return copied


@contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """The hidden folder of training checkpoints beside the output; it stays when training did not end well."""
    work = out.absolute().parent / f".{out.name}.training"
    existed = work.parent.exists()
    try:
        yield work
    except BaseException:
        if not any(work.glob("*/*")):  # there is no checkpoint to go on from
            shutil.rmtree(work, ignore_errors=True)
            if not existed:
                with suppress(OSError):
                    work.parent.rmdir()
        raise
    shutil.rmtree(work, ignore_errors=True)


def _claim(work: Path, job: Mapping[str, Any]) -> None:
    """Keep the checkpoints of an interrupted training of this very job; clear away those of any other."""
    try:
        same = json.loads((work / JOB).read_text(encoding="utf-8")) == job
    except (OSError, ValueError):
        same = False
    if not same:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    artefacts.write_json(work / JOB, job)
