"""From the words a user types (`glue`, `glue/rte`, `rte`) to tasks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mergectl import plugins
from mergectl.errors import UserError, did_you_mean
from mergectl.pins import COMMIT

if TYPE_CHECKING:
    from mergectl.benchmarks._contract import Task

FILES = "files"


def suite(name: str, own: Mapping[str, Task] | None = None) -> dict[str, Task]:
    """All tasks of a suite by name; `files` is what the user's own recipe declares."""
    if name == FILES:
        return dict(own or {})
    module = plugins.load("benchmarks", name)
    return {task.name: replace(task, suite=name) for task in module.TASKS}


def answers(head: str, task: Task) -> bool:
    """Whether the head of one task, by its id, answers another: the same, or one that asks for the same."""
    from mergectl.benchmarks._contract import same_question

    if head in (task.id, task.name, *task.answered_by):
        return True
    name, _, short = head.partition("/")
    trained = suite(name).get(short) if name in suites() else None
    return trained is not None and same_question(trained, task)


def suites() -> list[str]:
    """The names of all suites."""
    return [name for name in plugins.names("benchmarks") if name != FILES]


def resolve(words: Sequence[str], own: Mapping[str, Task] | None = None) -> list[Task]:
    """Turn task arguments into tasks, in the order given and each once."""
    found: dict[str, Task] = {}
    for word in words:
        for part in filter(None, word.split(",")):
            for task in _one(part, own):
                found[task.id] = task
    return list(found.values())


def _one(word: str, own: Mapping[str, Task] | None) -> Iterable[Task]:
    if "/" in word:
        name, _, rest = word.partition("/")
        name = _known_suite(name, own)
        tasks = suite(name, own)
        if rest not in tasks:
            raise UserError(f"No task '{rest}' in suite '{name}'.{did_you_mean(rest, tasks)}")
        return [tasks[rest]]
    if _hyphened(word) in suites() or (word == FILES and own):
        return _whole(_hyphened(word), own)
    return [_by_bare_name(word, own)]


def _hyphened(suite: str) -> str:
    """A suite's name as it is written; `glue_t5`, as its file is called, means `glue-t5`."""
    return suite.replace("_", "-")


def _known_suite(name: str, own: Mapping[str, Task] | None) -> str:
    if name == FILES and not own:
        raise UserError("The suite 'files' is empty: declare your tasks in a recipe and name it with --tasks FILE.")
    known = [*suites(), FILES]
    if _hyphened(name) not in known:
        raise UserError(f"No suite '{name}'.{did_you_mean(name, known)}")
    return _hyphened(name)


def _whole(name: str, own: Mapping[str, Task] | None) -> Iterable[Task]:
    tasks = suite(name, own)
    chosen = None if name == FILES else getattr(plugins.load("benchmarks", name), "DEFAULT", None)
    return [tasks[n] for n in chosen] if chosen else list(tasks.values())


def _by_bare_name(word: str, own: Mapping[str, Task] | None) -> Task:
    every = {task.id: task for name in [*suites(), FILES] for task in suite(name, own).values()}
    matches = [task for task in every.values() if task.name == word]
    if labelled := [task for task in matches if task.kind != "text_to_text"]:
        matches = labelled  # a bare `rte` is the task that classifiers answer; text-to-text tasks say their suite
    plain = min(matches, key=lambda task: (len(task.suite), task.suite), default=None)
    if plain is not None and all(answers(task.id, plain) for task in matches):
        return plain  # suites that share a data set: the one with the shortest name
    if matches:
        raise UserError(f"'{word}' names several tasks: {', '.join(task.id for task in matches)}.")
    raise UserError(f"No task or suite '{word}'.{did_you_mean(word, [*suites(), *every])}")


def own_tasks(path: Path | None) -> dict[str, Task]:
    """The tasks that a recipe file declares under `tasks:`."""
    if path is None:
        return {}
    from mergectl.config import read_yaml

    return declared(read_yaml(path).get("tasks") or {}, path)


def declared(specs: Mapping[str, Mapping[str, object]], path: Path) -> dict[str, Task]:
    """Turn the `tasks:` part of a recipe into tasks of the suite `files`."""
    if not isinstance(specs, Mapping) or not all(isinstance(spec, Mapping) for spec in specs.values()):
        raise UserError(f"{path}: 'tasks' must hold one mapping per task, each with the keys data, inputs and label.")
    module = plugins.load("benchmarks", FILES)
    return {name: replace(module.declare({"name": name, "folder": str(path.parent), **spec}), suite=FILES)
            for name, spec in specs.items()}  # fmt: skip


def task_version(task: Task) -> int | str:
    """What decides a task's rows: its version, and the commit of its data set where the lab pins one.

    For the user's own files it is what they hold and how they are read.
    """
    if not task.files:
        fixed = task.revision is not None and COMMIT.fullmatch(task.revision)
        return f"{task.version}, {task.hub}@{task.revision}" if fixed else task.version
    content = {use: hashlib.sha256(Path(path).read_bytes()).hexdigest() for use, path in task.files.items()}
    read = (content, task.kind, task.inputs, task.label, task.labels, task.metric, task.parts)
    return hashlib.sha256(repr(read).encode()).hexdigest()


def check_split(tasks: Sequence[Task], split: str) -> None:
    """Refuse a split that a task does not have, before a model is loaded."""
    for task in tasks:
        if split not in task.parts:
            raise UserError(f"{task.id} has no rows for '{split}', only for {', '.join(task.parts)}.")
