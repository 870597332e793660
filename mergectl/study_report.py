"""`report --study`: a search's history, which settings mattered, what each value gave, and its Pareto front."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mergectl.lab import Lab
from mergectl.report import as_text
from mergectl.studies import close, is_journal, journal_of, load_study, open_storage
from mergectl.study_text import show
from mergectl.trials import directions

if TYPE_CHECKING:
    import optuna

TRIALS = (
    "SELECT t.trial, t.status, t.value, t.best_so_far, t.seconds, t.error, r.settings AS recipe "
    "FROM trials t LEFT JOIN recipes r ON r.run_id = t.run_id WHERE t.study = ? ORDER BY t.trial, t.started_at"
)
SPLIT = "SELECT max(m.split) FROM metrics m JOIN runs r ON r.run_id = m.run_id WHERE r.study = ? AND r.kind = 'trial'"
BINS = 5  # into which the values of a number are sorted


def show_study(lab: Lab, name: str, storage: str | None, form: str) -> None:
    """Print what a study holds, as tables, JSON, or its history as CSV, Markdown or LaTeX."""
    study = load_study(lab.folder / "optuna", name, where=storage)
    try:
        found = document(study)
    finally:
        close(study)
    if form == "json":
        print(json.dumps(found, indent=2, ensure_ascii=False, default=str))
    elif form in ("csv", "md", "latex"):
        from mergectl.store import Table

        columns = list(found["history"][0]) if found["history"] else ["candidate"]
        rows = [tuple(_flat(row[column]) for column in columns) for row in found["history"]]
        print(as_text(Table(columns, rows), form))
    else:
        show(found)


def documents(lab: Lab, names: Sequence[str], storage: str | None, *, must: bool) -> list[dict[str, Any]]:
    """What several studies hold; one whose journal is not here is told from the store, unless it `must` be there."""
    import optuna

    if must:
        close(load_study(lab.folder / "optuna", names[0], where=storage))
    elif is_journal(storage) and not journal_of(lab.folder / "optuna", storage).exists():
        return [from_store(lab, name) for name in names]
    place = open_storage(lab.folder / "optuna", storage)
    there = {study.study_name for study in place.get_all_studies()}
    studies = {name: optuna.load_study(study_name=name, storage=place) for name in names if name in there}
    try:
        return [document(studies[name]) if name in studies else from_store(lab, name) for name in names]
    finally:
        for study in list(studies.values())[:1]:
            close(study)


def from_store(lab: Lab, name: str) -> dict[str, Any]:
    """What the store's trials tell of a study: all but importance, which needs the ranges."""
    rows = lab.store.query(TRIALS, [name]).records()
    done = [row for row in rows if row["status"] == "finished" and row["value"] is not None]
    history = [
        {
            "candidate": row["trial"], "mean": row["value"], "best mean": row["best_so_far"],
            "seconds": row["seconds"], "scores": {}, "settings": _unfolded(row["recipe"]),
        }
        for row in done
    ]  # fmt: skip
    best = max(done, key=lambda row: float(row["value"]), default=None)
    return {
        "study": name, "searched_on": lab.store.query(SPLIT, [name]).rows[0][0] or "tune", "objectives": ["mean"],
        "states": {status: [row["status"] for row in rows].count(status) for status in {r["status"] for r in rows}},
        "history": history, "importance": {"mean": None}, "importance_by": "PED-ANOVA", "slices": {}, "log": [],
        "front": [] if best is None else [best["trial"]],
        "refused": [
            {"candidate": row["trial"], "settings": _unfolded(row["recipe"]), "why": row["error"]}
            for row in rows
            if row["status"] == "failed"
        ],
    }  # fmt: skip


def _unfolded(recipe: str | None) -> dict[str, Any]:
    """A trial's settings, one entry for each task where they differ per task, as studies have them."""
    settings = json.loads(recipe or "{}")
    parts = {name: value if isinstance(value, dict) else {"": value} for name, value in settings.items()}
    return {f"{name}[{key}]" if key else name: part for name, own in parts.items() for key, part in own.items()}


def _flat(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, dict) else value


def document(study: optuna.Study) -> dict[str, Any]:
    """All that is shown, fit for JSON."""
    facts = study.user_attrs
    objectives = list(facts.get("objectives", ["mean"]))
    trials = sorted(
        (trial for trial in study.get_trials(deepcopy=False) if "candidate" in trial.user_attrs),
        key=lambda trial: (trial.user_attrs["candidate"], trial.number),
    )
    return {
        "study": study.study_name,
        "searched_on": facts.get("searched_on", "tune"),
        "objectives": objectives,
        "states": _states(trials),
        "history": _history(trials, objectives),
        "importance": {name: _importance(study, place) for place, name in enumerate(objectives)},
        "importance_by": "PED-ANOVA",
        "slices": _slices(trials, objectives),
        "log": _in_factors(trials),
        "front": [trial.user_attrs["candidate"] for trial in _best(study, trials)],
        "refused": _refused(trials),
    }


def _states(trials: Sequence[Any]) -> dict[str, int]:
    from collections import Counter

    words = [
        "refused" if "refused" in trial.user_attrs else "lost" if trial.user_attrs.get("lost")
        else {"COMPLETE": "finished", "PRUNED": "stopped early", "FAIL": "interrupted"}.get(trial.state.name, "open")
        for trial in trials
    ]  # fmt: skip
    return dict(Counter(words))


def _history(trials: Sequence[Any], objectives: Sequence[str]) -> list[dict[str, Any]]:
    """The finished trials in their order, with the best up to each."""
    signs = [-1.0 if way == "minimize" else 1.0 for way in directions(objectives)]
    best, rows = float("-inf"), []
    for trial in trials:
        if trial.state.name != "COMPLETE":
            continue
        merit = signs[0] * trial.values[0]
        best = max(best, merit)
        rows.append(
            {
                "candidate": trial.user_attrs["candidate"],
                **dict(zip(objectives, trial.values, strict=True)),
                f"best {objectives[0]}": signs[0] * best,
                "seconds": trial.user_attrs.get("seconds"),
                "scores": dict(trial.user_attrs.get("scores", {})),
                "settings": dict(trial.params),
            }
        )
    return rows


def _importance(study: optuna.Study, place: int) -> dict[str, float] | None:
    """How much of the difference between trials each setting explains; None where there is too little to tell."""
    import optuna

    # PED-ANOVA asks what makes its target low, whatever the study's direction, and warns that it does.
    sign = 1.0 if study.directions[place].name == "MINIMIZE" else -1.0
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="PedAnova")
            found = optuna.importance.get_param_importances(study, target=lambda trial: sign * trial.values[place])
    except (ValueError, RuntimeError):  # fewer than two trials, or all alike
        return None
    return {name: float(share) for name, share in found.items()}


def _slices(trials: Sequence[Any], objectives: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """For each setting, what the trials with a value in each fifth of its range, or with each word, scored."""
    done = [trial for trial in trials if trial.state.name == "COMPLETE"]
    found = {}
    for name in dict.fromkeys(name for trial in done for name in trial.params):
        groups: dict[Any, list[float]] = {}
        own = [trial for trial in done if name in trial.params]
        for trial in own:
            groups.setdefault(_bin(trial, name), []).append(trial.values[0])
        found[name] = [
            {"value": label, "trials": len(values), "average": sum(values) / len(values),
             "lowest": min(values), "highest": max(values)}
            for label, values in ((groups_of, groups[groups_of]) for groups_of in sorted(groups, key=_order))
        ]  # fmt: skip
    return found


def _in_factors(trials: Sequence[Any]) -> list[str]:
    """The settings that were searched in equal factors."""
    kinds = [(name, kind) for trial in trials for name, kind in trial.distributions.items()]
    return sorted({name for name, kind in kinds if getattr(kind, "log", False)})


def _bin(trial: Any, name: str) -> str:
    kind, value = trial.distributions[name], trial.params[name]
    if not hasattr(kind, "low") or kind.low == kind.high:
        return str(value)
    if kind.log:
        share, factor = (
            math.log(value / kind.low) / math.log(kind.high / kind.low),
            (kind.high / kind.low) ** (1 / BINS),
        )
        place = min(int(share * BINS), BINS - 1)
        low, high = (kind.low * factor**edge for edge in (place, place + 1))
    else:
        place = min(int((value - kind.low) / (kind.high - kind.low) * BINS), BINS - 1)
        low, high = (kind.low + (kind.high - kind.low) * edge / BINS for edge in (place, place + 1))
    return f"{low:.4g} to {high:.4g}"


def _order(label: str) -> tuple[bool, float, str]:
    """Numbers by their size, then words."""
    try:
        return False, float(label.partition(" to ")[0]), label
    except ValueError:
        return True, 0.0, label


def _best(study: optuna.Study, trials: Sequence[Any]) -> list[Any]:
    """The Pareto front; of one objective the best trial."""
    numbers = {trial.number for trial in study.best_trials}
    front = [trial for trial in trials if trial.number in numbers]
    return front if len(study.directions) > 1 else front[:1]


def _refused(trials: Sequence[Any]) -> list[dict[str, Any]]:
    return [
        {"candidate": trial.user_attrs["candidate"], "settings": dict(trial.params), "why": trial.user_attrs["refused"]}
        for trial in trials
        if "refused" in trial.user_attrs
    ]
