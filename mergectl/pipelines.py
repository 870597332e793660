"""The verb `run`: a pipeline of verbs, in order, without doing again what the store already holds."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from mergectl import pinning
from mergectl.config import PipelineFile, read_file, read_value
from mergectl.errors import UserError, did_you_mean
from mergectl.lab import Lab
from mergectl.steps import KEYS, STEPS, adapter_maker, words_of
from mergectl.terminal import print_table

SHIPPED = Path(__file__).parent / "recipes"


def shipped() -> dict[str, Path]:
    """The pipelines that come with mergectl, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def show_all() -> None:
    """List the shipped pipelines, those of one paper together."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for name in shipped():
        pipeline = _read(name)
        groups.setdefault(pipeline.paper or "mergectl itself", []).append((name, pipeline.title))
    for paper, rows in groups.items():
        print_table(f"{paper}: mergectl run NAME", ("name", "what it does"), rows, left=2)


def load(name: str, changes: Mapping[str, str], *, smoke: bool = False) -> PipelineFile:
    """Read a shipped pipeline or a file, and put the settings in, with `smoke` those of a short try."""
    pipeline = _read(name)
    if smoke and not pipeline.smoke:
        raise UserError(f"The pipeline '{name}' has no settings for --smoke.")
    unknown = [key for key in changes if key not in pipeline.settings]
    if unknown:
        raise UserError(f"The pipeline has no setting '{unknown[0]}'.{did_you_mean(unknown[0], pipeline.settings)}")
    short = {key: f"@{key}" if made(value) else value for key, value in pipeline.smoke.items()} if smoke else {}
    settings = {**pipeline.settings, **short, **{key: read_value(value) for key, value in changes.items()}}
    steps = [_filled(step, settings) for step in pipeline.steps]
    return pipeline.model_copy(update={"steps": steps, "settings": settings})


def made(value: Any) -> bool:
    """Whether a setting of a smoke run is a configuration, of which a tiny model (or a population) is made."""
    return isinstance(value, Mapping) and "model_type" in value


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


def try_all(lab: Lab, changes: Mapping[str, str]) -> None:
    """Try every shipped pipeline that can be, one after the other in this process, and show what each took."""
    rows: list[tuple[str, str]] = []
    for name in shipped():
        if not _read(name).smoke:
            continue
        began = time.perf_counter()
        lab.terminal.say(f"\n{name}")
        run(lab, name, changes, smoke=True, finish=False)
        rows.append((name, f"{time.perf_counter() - began:.0f} s"))
    total = sum(int(took.split()[0]) for _, took in rows)
    print_table("Tried with tiny models, offline", ("pipeline", "took"), [*rows, ("all", f"{total} s")], left=1)


def run(
    lab: Lab,
    name: str,
    changes: Mapping[str, str],
    *,
    dry_run: bool = False,
    smoke: bool = False,
    finish: bool = True,
    pins: Path | None = None,
    update_pins: bool = False,
) -> None:
    """Execute a pipeline's steps in order; one that a finished run already did is skipped. Then show the scores.

    Hub ids are pinned to commits before the first step: to those of the file `pins`, of the lab, or the present ones.
    """
    pipeline = load(name, changes, smoke=smoke)
    lab = _set_up(lab, pipeline, changes)
    if smoke:  # in a lab of its own: its scores mean nothing
        lab = replace(lab, store_path=lab.folder / "smoke" / lab.store_path.name, store_url=None)
    folder = lab.folder / "runs" / (pipeline.folder or Path(name).stem)
    for number, step in enumerate(pipeline.steps, 1):
        check(lab, step, number)
    if dry_run:
        _plan(lab, pipeline, folder)
        if not smoke and (found := pinning.shown(lab, pipeline.steps, pins, renew=update_pins)):
            print("\n".join(["", "From the hub:", *(f"  {what}: {state}" for what, state in found)]))
        return
    lab.terminal.say(pipeline.title)
    if smoke:
        lab = _make_small(lab, pipeline, folder)
    else:
        pinning.settle(lab, pipeline.steps, pins, renew=update_pins)
    began = time.perf_counter()
    for number, step in enumerate(pipeline.steps, 1):
        verb = _verb(step)
        started = time.perf_counter()
        again = STEPS[verb](lab, folder, step[verb])
        spent = "already done" if again else f"{time.perf_counter() - started:.1f} s"
        lab.terminal.say(f"[{number}/{len(pipeline.steps)}] {verb} {_line(step[verb])}: {spent}")
    lab.terminal.say(f"Done in {time.perf_counter() - began:.0f} s.")
    if finish:
        _finish(lab, pipeline)


def _plan(lab: Lab, pipeline: PipelineFile, folder: Path) -> None:
    """Show the steps, with what they will take."""
    from mergectl import estimates

    speed = estimates.speed(lab.torch_device())
    found = [estimates.estimate(step, pipeline.settings) for step in pipeline.steps]
    words = estimates.in_words([*found, estimates.total(found)], speed)
    said = [(str(n), _verb(step), _line(step[_verb(step)])) for n, step in enumerate(pipeline.steps, 1)]
    rows = [(*line, *cost) for line, cost in zip([*said, ("", "all", str(folder))], words, strict=True)]
    print_table(pipeline.title, ("step", "verb", "what", "disk", "time"), rows, left=3)
    print(estimates.ASSUMED.format(speed=speed / 1e9))


def _set_up(lab: Lab, pipeline: PipelineFile, changes: Mapping[str, str]) -> Lab:
    """The lab with the pipeline's seed and threads, where the command line names none."""

    def chosen(name: str, given: int) -> int:
        value = pipeline.settings.get(name, given)
        if not isinstance(value, int) or value < 0:
            raise UserError(f"The pipeline's {name} must be a whole number of at least 0, got '{value}'.")
        return value if name in changes or name not in lab.typed else given

    return replace(lab, seed=chosen("seed", lab.seed), threads=chosen("threads", lab.threads))


def _make_small(lab: Lab, pipeline: PipelineFile, folder: Path) -> Lab:
    """Write sample rows and a tiny base into the pipeline's folder; return the lab that reads them."""
    from mergectl import smoke

    words = [word for step in pipeline.steps for key in ("tasks", "on") for word in words_of(step[_verb(step)], key)]
    tasks = lab.tasks(words)
    smoke.write_rows(folder / "data", tasks)
    models = {key: config for key, config in pipeline.smoke.items() if made(config)}
    for number, (key, config) in enumerate(models.items()):
        if not (folder / key).exists():
            smoke.make(folder / key, config, tasks, lab.seed + number)
    return replace(lab, data=folder / "data")


def _finish(lab: Lab, pipeline: PipelineFile) -> None:
    from mergectl.report import leaderboard

    suites = {word.split("/")[0] for step in pipeline.steps for word in words_of(step.get("eval", {}), "on")}
    scored = [step["eval"] for step in pipeline.steps if "eval" in step and not step["eval"].get("conflict")]
    limits = {what.get("limit") for what in scored}
    limit = limits.pop() if len(limits) == 1 else None
    split, suite = "report" if limit is None else f"report:{limit}", suites.pop() if len(suites) == 1 else None
    leaderboard(lab, split, suite, "json" if lab.terminal.as_json else "table")
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
    _check_options(f"Step {number} of the pipeline", what.get("options", {}))
    adapter_maker(what)
    check_sampler(what.get("sampler", "random"))
    check_purpose(what.get("for", "none"), owned(what), check_grid(what.get("grid", {})), what.get("by_task", {}))
    lab.tasks([*words_of(what, "tasks"), *words_of(what, "on")])


def _check_options(step: str, options: Mapping[str, Any]) -> None:
    """Refuse unknown options of what the lab supplies, and those of adapting that make no sense."""
    from mergectl.adaptation import read_options
    from mergectl.calibration_options import every
    from mergectl.supplies import GROUPS

    for given, known in ((options, GROUPS), (options.get("calibration", {}), every())):
        if unknown := [name for name in given if name not in known]:
            raise UserError(f"{step} has no options '{unknown[0]}'.{did_you_mean(unknown[0], known)}")
    read_options(options.get("adapt", {}))


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


def _line(what: Mapping[str, Any]) -> str:
    words = [what.get(key) for key in ("method", "tasks", "models", "sampler")]
    return " ".join(" ".join(w) if isinstance(w, list) else str(w) for w in words if w)
