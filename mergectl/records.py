"""What stands beside a merged model: the machine's record, from which it can be made again, and the people's card."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergectl import artefacts
from mergectl.families import Family
from mergectl.pins import origin
from mergectl.stacking import parts_of
from mergectl.weights import Checkpoint


def write_records(
    recipe: Mapping[str, Any], output: Mapping[str, Any], family: Family, folder: Path, facts: Mapping[str, Any]
) -> None:
    """Write `mergectl.json` and the card `README.md`; `output` says how the result was written."""
    export = output["export"]
    record = {
        "kind": "merged" if export is None else "expert",
        "recipe": recipe,
        "inputs": list(family.inputs),
        "tasks": family.task_ids,
        "output": dict(output),
        "notes": list(family.population.notes),
        **({} if export is None else _task_record(family, export)),
        **facts,
    }
    artefacts.add_json(folder / "mergectl.json", record)
    (folder / "README.md").write_text(card(recipe, family, export), encoding="utf-8", errors="backslashreplace")


def _task_record(family: Family, task: str) -> dict[str, Any]:
    meta = family.experts[task].meta
    return {"task": family.task_ids[task], "labels": meta.get("labels"), "base": family.base.ref}


def card(recipe: Mapping[str, Any], family: Family, export: str | None = None) -> str:
    """The model card: what was merged from what, and how to use it; `export` is the task whose own model it is."""
    parents = _hub_ids(family)
    lineage = ["base_model:", *(f"- {name}" for name in parents), "base_model_relation: merge"] if parents else []
    notes = ["Notes:", "", *(f"- {note}" for note in family.population.notes), ""] if family.population.notes else []
    lines = [
        "---", "library_name: transformers", "tags: [merge, mergectl]", *lineage, "---", "",
        f"# Merged with `{recipe['method']}`", "",
        f"Base: `{family.base.ref if family.has_base else 'none'}`", "", "| task | expert |", "| --- | --- |",
        *(f"| {family.task_ids[task]} | `{_from_where(expert)}` |" for task, expert in family.experts.items()), "",
        "Recipe:", "", "```json", json.dumps(recipe, indent=2, default=str), "```", "", *notes,
        *_usage(family, export), "`mergectl merge --again FOLDER` makes the same weights anew.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _usage(family: Family, export: str | None) -> list[str]:
    """How to open the result, and where the heads are, if the experts have any."""
    headless = export is None and not family.has_base and any(family.population.heads.values())
    config = (family.base if export is None else family.experts[export]).config
    named = re.fullmatch(r"\w+", str((config.get("architectures") or [""])[0]))
    form = named[0] if named and not headless else "AutoModel"
    whole = [f"A plain transformers checkpoint: `{form}.from_pretrained(folder)`."]
    if export is not None:
        return [*whole, f"It answers {family.task_ids[export]} with that expert's own head."]
    if not any(family.population.heads.values()):
        return whole
    return [
        *whole,
        "Each task's head is in `tasks/<task>/head.safetensors`; `mergectl eval` puts it on by itself, and",
        "`mergectl merge ... --export TASK` writes one stand-alone classifier.",
    ]


def _from_where(model: Checkpoint) -> str:
    """Where a model came from; of a folder in the hub's cache, the hub id, its commit and the place in there."""
    found = origin(model.folder) if str(model.ref) == str(model.folder) else None
    return str(model.ref) if found is None else f"{found[0]}@{found[1]}: {found[2]}"


def _hub_ids(family: Family) -> list[str]:
    """The inputs that came from the model hub, without revisions."""
    models = [*([family.base] if family.has_base else []), *family.experts.values()]
    refs = [_from_where(part) for model in models for part in parts_of(model)]
    hub = [ref for ref in refs if re.fullmatch(r"[\w.-]+/[\w.-]+(@.+)?", ref) and not Path(ref).exists()]
    return list(dict.fromkeys(ref.partition("@")[0] for ref in hub))
