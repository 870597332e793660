"""Read the JSON files of a model folder, trusting nothing in them: what the program rests on has the type it should."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from reprlib import repr  # cuts what is long
from types import UnionType
from typing import Any, TypeAlias

from mergectl.errors import UserError

Types: TypeAlias = "dict[str, tuple[type | UnionType, str]]"

TEXT, OBJECT, LIST, NUMBER = (str, "text"), (dict, "an object"), (list, "a list"), (int | float, "a number")
CONFIG: Types = {"model_type": TEXT, "architectures": LIST, "id2label": OBJECT}
RECORD: Types = {
    "kind": TEXT, "task": TEXT, "kind_of_task": TEXT, "base": TEXT, "base_digest": TEXT, "run": TEXT, "labels": LIST,
    "working_folder": TEXT, "inputs": LIST, "recipe": OBJECT, "tasks": OBJECT, "output": OBJECT,
}  # fmt: skip
OUTPUT: Types = {
    "dtype": TEXT, "export": TEXT, "shard_bytes": (int, "a whole number"), "options": OBJECT, "digest": TEXT,
}  # fmt: skip
ADAPTER: Types = {
    "base_model_name_or_path": TEXT,
    "revision": TEXT,
    "lora_alpha": NUMBER,
    "alpha_pattern": OBJECT,
}


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
    _check(path, content.get("output") or {}, OUTPUT, "output.")
    return content


def read_adapter(folder: Path) -> dict[str, Any]:
    """An adapter's settings, as peft writes them."""
    path = folder / "adapter_config.json"
    content = read_json(path)
    _check(path, content, ADAPTER)
    for pattern, value in (content.get("alpha_pattern") or {}).items():
        _check(path, {pattern: value}, {pattern: NUMBER}, "alpha_pattern.")
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{path}: 'alpha_pattern.{pattern}' is no pattern of module names: {error}.") from error
    return content


def _check(path: Path, content: dict[str, Any], types: Types, within: str = "") -> None:
    """Refuse a value of another type than it should be of; null is none given."""
    for key, (kind, called) in types.items():
        value = content.get(key)
        odd = isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value))
        if value is not None and (odd or not isinstance(value, kind)):
            raise UserError(f"{path}: '{within}{key}' should be {called}, not {repr(value)}.")
