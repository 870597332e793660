"""Evaluations as runs of the store: check, score, record. The CLI and pipelines call these alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergectl import __version__
from mergectl.checkpoints import Checkpoint, open_checkpoint
from mergectl.errors import UserError
from mergectl.families import Family
from mergectl.lab import Lab
from mergectl.lenders import role_of
from mergectl.tasks import check_split, task_version
from mergectl.verbs import Result

if TYPE_CHECKING:
    from mergectl.benchmarks._contract import Task, Use
    from mergectl.evaluate import Evaluation
    from mergectl.store import Run


def evaluate_model(
    lab: Lab, ref: str, words: Sequence[str] = (), *, heads: Sequence[tuple[str | None, str]] = (),
    split: Use = "report", limit: int | None = None, batch_size: int = 64, dtype: str = "float32",
    answer_metric: str = "rank", show: int = 0, flops: bool = False, inputs: str = "full", reuse: bool = False,
) -> Result:  # fmt: skip
    """Score a model on tasks, with heads of its own or borrowed; record every metric."""
    from mergectl.evaluate import NO_TASKS, check_answers, evaluate
    from mergectl.heads import own_tasks_of
    from mergectl.preprocess import check_inputs

    model = open_checkpoint(ref, lab.find_run)
    by_task = _borrowed(lab, heads)
    tasks = lab.tasks(words or list(by_task) or own_tasks_of(model))
    if not tasks:
        raise UserError(NO_TASKS.format(model.ref))
    check_split(tasks, split)
    check_answers(answer_metric, show, tasks)
    check_inputs(inputs)
    odd = _not_plain(answer_metric=answer_metric, inputs=inputs, flops=flops)
    config = _eval_config(lab, model, tasks, by_task, split, limit, dtype) | odd
    if reuse and (done := lab.done("eval", config)):
        return {"run": done["run_id"], "again": True}
    with lab.start("eval", config, name=f"{model.label}@{split}") as run:
        _record_models(run, model, by_task)
        with lab.terminal.progress(f"Evaluating {model.label}") as progress:
            found = evaluate(
                model, tasks, split=split, data=lab.data, batch_size=batch_size, limit=limit,
                device=lab.torch_device(), dtype=dtype, heads=by_task, progress=progress, seed=lab.seed,
                answer_metric=answer_metric, show=show, flops=flops, inputs=inputs,
            )  # fmt: skip
        parts = [split, limit, odd.get("answer_metric"), odd.get("inputs")]
        record_scores(run, found, ":".join(str(part) for part in parts if part is not None))
    return {"run": run.id, "model": model.ref, "split": split, "evaluation": found, "again": False}


def _not_plain(**options: Any) -> dict[str, Any]:
    """What changes the scores, where it is not as usual; the usual is not written down, as it was always so."""
    return {name: value for name, value in options.items() if value not in ("rank", "full", False)}


def _record_models(run: Run, model: Checkpoint, heads: Mapping[str, Checkpoint]) -> None:
    """Note as inputs the model that is scored, and the experts that lend it their heads."""
    run.input("model", model.ref, model.digest)
    for task, expert in heads.items():
        run.input(role_of(expert, model), expert.ref, expert.digest, task=task)


def _borrowed(lab: Lab, heads: Sequence[tuple[str | None, str]]) -> dict[str, Checkpoint]:
    """The experts that lend their heads, by task id."""
    found = {}
    for task, ref in heads:
        expert = open_checkpoint(ref, lab.find_run)
        word = task or expert.task
        if word is None:
            raise UserError(f"{ref} does not say which task it is for. Name it: --heads suite/task={ref}")
        found[lab.tasks([word])[0].id] = expert
    return found


def _eval_config(
    lab: Lab,
    model: Checkpoint,
    tasks: Sequence[Task],
    heads: Mapping[str, Checkpoint],
    split: str,
    limit: int | None,
    dtype: str,
) -> dict[str, Any]:
    return {
        "model": model.digest,
        "heads": {task: expert.digest for task, expert in heads.items()},
        "tasks": {task.id: task_version(task) for task in tasks},
        "split": split,
        "limit": limit,
        "dtype": dtype,
        "data": None if lab.data is None else str(lab.data.absolute()),
        "version": __version__,
    }


def record_scores(run: Run, found: Evaluation, split: str) -> None:
    """Every metric of every task, its seconds and its number of examples."""
    for task, metrics in found.metrics.items():
        for name, value in metrics.items():
            run.metric(name, value, task=task, split=split)
        run.metric("seconds", found.seconds[task], task=task, split=split)
        run.metric("examples", found.examples[task], task=task, split=split)
    run.metric("mean_score", found.mean, split=split)


def evaluate_references(lab: Lab, family: Family, words: Sequence[str], **how: Any) -> list[Result]:
    """Score the base under each expert's head, and each expert on its own task: what merges are compared with."""
    from mergectl.tasks import answers

    trained = [(family.task_ids[name], expert) for name, expert in family.experts.items()]
    wanted = lab.tasks(words or [task for task, _ in trained])
    asked = [(task.id, expert) for head, expert in trained for task in wanted if answers(head, task)]
    heads = [(task, expert.place) for task, expert in asked]
    results = []
    for task, expert in asked:
        lends = family.has_base and role_of(family.base, expert) != "head"
        own = [(task, family.base.place)] if lends else []
        results.append(evaluate_model(lab, expert.place, [task], heads=own, reuse=True, **how))
    if family.has_base:
        base = family.base.place
        results.insert(0, evaluate_model(lab, base, [t for t, _ in heads], heads=heads, reuse=True, **how))
    return results
