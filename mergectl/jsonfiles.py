"""Read the JSON files of a model folder, trusting nothing in them: what the program rests on has the type it should."""

from __future__ import annotations

import json
from pathlib import Path
from reprlib import repr  # cuts what is long
from typing import Any

from mergectl.errors import UserError

TEXT, OBJECT, LIST = (str, "text"), (dict, "an object"), (list, "a list")
CONFIG: dict[str, tuple[type, str]] = {"model_type": TEXT, "architectures": LIST, "id2label": OBJECT}
RECORD: dict[str, tuple[type, str]] = {
    "kind": TEXT, "task": TEXT, "kind_of_task": TEXT, "base": TEXT, "base_digest": TEXT, "run": TEXT, "labels": LIST,
    "working_folder": TEXT, "inputs": LIST, "recipe": OBJECT, "tasks": OBJECT, "output": OBJECT,
}  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, or say in one sentence what is wrong with the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON: {error}.") from error
    except RecursionError as error:
        raise UserError(f"{path} is not readable JSON: it is nested too deeply.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} should hold a JSON object, not a {type(content).__name__}.")
    return content


def read_config(path: Path) -> dict[str, Any]:
    """A model's configuration."""
    content = read_json(path)
    _check(path, content, CONFIG)
    if not all(isinstance(name, str) for name in content.get("architectures") or ()):
        raise UserError(f"{path}: 'architectures' should be a list of names, not {repr(content['architectures'])}.")
    return content


def read_record(folder: Path) -> dict[str, Any]:
    """What the program noted beside the weights it made; nothing where there is no such note."""
    path = folder / "mergectl.json"
    if not path.exists():
        return {}
    content = read_json(path)
    _check(path, content, RECORD)
    return content


def _check(path: Path, content: dict[str, Any], types: dict[str, tuple[type, str]]) -> None:
    """Refuse a value of another type than it should be of; null is none given."""
    for key, (kind, called) in types.items():
        if content.get(key) is not None and not isinstance(content[key], kind):
            raise UserError(f"{path}: '{key}' should be {called}, not {repr(content[key])}.")
