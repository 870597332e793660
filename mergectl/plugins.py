"""Find method and benchmark files: our own, those of installed distributions, and those in the user's folders.

Names come from listings and metadata alone. A file is imported when it is asked for, with torch and numpy deferred, so
that help texts do not wait for them. A broken file is reported by `problems` and never hides another one. Suites are
named with hyphens: `benchmarks/glue_t5.py` is `glue-t5`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from mergectl.errors import UserError, did_you_mean

_HEAVY = ("torch", "numpy")
_lock = threading.RLock()
_loaded: dict[tuple[str, str, str, int], ModuleType] = {}


@dataclass(frozen=True)
class Plugin:
    """One place where a name was found."""

    kind: str
    name: str
    where: str  # for people: a path, or the distribution
    path: Path | None = None  # a file of the user's
    entry: EntryPoint | None = None  # of an installed distribution; with neither it is our own


def names(kind: str) -> list[str]:
    """List all names of a kind ("methods" or "benchmarks"): our own first, nothing imported."""
    return list(dict.fromkeys(plugin.name for plugin in _found(kind)))


def load(kind: str, name: str) -> ModuleType:
    """Import the file of that name; a wrong name or a broken file is a UserError."""
    plugin = _own(kind).get(name) or next((plugin for plugin in _found(kind) if plugin.name == name), None)
    if plugin is None:
        raise UserError(f"No {kind.removesuffix('s')} '{name}'.{did_you_mean(name, names(kind))}")
    with _lock:
        return _import(plugin)


def foreign(kind: str) -> list[Plugin]:
    """List the plugins that are not our own, nothing imported."""
    return [plugin for plugin in _found(kind) if plugin.path is not None or plugin.entry is not None]


def problems(kind: str) -> list[str]:
    """Say in one sentence each which files are broken, and which are hidden by another of the same name."""
    sentences, first = [], dict[str, Plugin]()
    for plugin in _found(kind):
        if plugin.name in first:
            used = first[plugin.name].where
            sentences.append(f"{plugin.where}: not used, since '{plugin.name}' is already the name of {used}.")
            continue
        first[plugin.name] = plugin
        try:
            load(kind, plugin.name)
        except UserError as error:
            sentences.append(str(error))
    return sentences


def where(kind: str, name: str) -> str:
    """Say where a name was found, for messages."""
    return next((plugin.where for plugin in _found(kind) if plugin.name == name), name)


def blamed(kind: str, name: str, error: Exception) -> Exception:
    """A crash inside a user's plugin as a sentence with its file and line; one inside our own stays what it is."""
    place = where(kind, name)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == place]
    if not lines:
        return error
    return UserError(f"{place}:{lines[-1]}: {type(error).__name__}: {error}. Mend the file.")


def _found(kind: str) -> Iterator[Plugin]:
    yield from _own(kind).values()
    for entry in _entries(f"mergectl.{kind}", tuple(sys.path)):
        made_by = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an installed distribution"
        yield Plugin(kind, _shown(kind, entry.name), f"{made_by} ({entry.value})", entry=entry)
    for folder in _folders():
        for path in _files(folder / kind):
            yield Plugin(kind, _shown(kind, path.stem), str(path), path=path)


def _shown(kind: str, name: str) -> str:
    """The name that people see and type for a file or an entry point."""
    return name.replace("_", "-") if kind == "benchmarks" else name


@functools.cache
def _own(kind: str) -> dict[str, Plugin]:
    """Our own files by name; they do not change while the program runs."""
    folder = Path(__file__).parent / kind
    files = _files(folder if folder.is_dir() else folder.parent.parent / kind)
    found = [Plugin(kind, _shown(kind, path.stem), f"{kind}/{path.name}") for path in files]
    return {plugin.name: plugin for plugin in found}


@functools.cache
def _entries(group: str, path: tuple[str, ...]) -> list[EntryPoint]:
    """List what installed distributions offer; the search of the whole path is made once."""
    return sorted(entry_points(group=group), key=lambda entry: (entry.name, entry.value))


def _folders() -> Iterator[Path]:
    """Go through the folders that may hold `methods/` and `benchmarks/`: MERGECTL_PLUGINS, then the lab folder."""
    places = [Path(place) for place in os.environ.get("MERGECTL_PLUGINS", "").split(os.pathsep) if place]
    store = os.environ.get("MERGECTL_STORE", "")
    places.append(Path(store).parent if store and "://" not in store else Path("lab"))
    yield from {place.expanduser().resolve(): None for place in places}


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(p for p in folder.glob("*.py") if p.stem.isidentifier() and not p.stem.startswith("_"))
    except OSError:
        return []


def _import(plugin: Plugin) -> ModuleType:
    stamp = plugin.path.stat().st_mtime_ns if plugin.path else 0
    key = (plugin.kind, plugin.name, plugin.where, stamp)
    if key not in _loaded:
        try:
            with deferred(*_HEAVY):
                _loaded[key] = _import_now(plugin)
        except (Exception, SystemExit) as error:
            raise UserError(_complaint(plugin, error)) from error
    return _loaded[key]


def _import_now(plugin: Plugin) -> ModuleType:
    if plugin.entry is not None:
        module = plugin.entry.load()
        if not isinstance(module, ModuleType):
            raise TypeError(f"the entry point must name a module, got {type(module).__name__}")
        return module
    if plugin.path is None:
        return importlib.import_module(f"mergectl.{plugin.kind}.{plugin.name.replace('-', '_')}")
    spec = importlib.util.spec_from_file_location(f"mergectl_plugin_{plugin.kind}_{plugin.name}", plugin.path)
    if spec is None or spec.loader is None:
        raise ImportError("the file cannot be read as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


def _complaint(plugin: Plugin, error: BaseException) -> str:
    """Say where in the plugin it went wrong, and how."""
    line = error.lineno if isinstance(error, SyntaxError) else None
    if line is None and plugin.path is not None:
        frames = traceback.extract_tb(error.__traceback__)
        line = next((f.lineno for f in reversed(frames) if f.filename == str(plugin.path)), None)
    place = f"{plugin.where}:{line}" if line else plugin.where
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{place}: cannot be loaded ({type(error).__name__}: {text}). Mend or remove it; the others go on working."


class _Deferred(ModuleType):
    """Stands in for a heavy module until something of it is needed."""

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        real = importlib.import_module(self.__name__)
        self.__dict__.update(real.__dict__)  # from now on as fast as the real one
        self.__dict__["__getattr__"] = functools.partial(getattr, real)  # knows what it gets later
        object.__setattr__(self, "__class__", ModuleType)  # and as plain: a compiler looks at what kind of thing it is
        return getattr(real, name)


@contextlib.contextmanager
def deferred(*heavy: str) -> Iterator[None]:
    """Let imports inside the block bind stand-ins for heavy modules; the first use of one loads it."""
    stand_ins = {name: _Deferred(name) for name in heavy if name not in sys.modules}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name, stand_in in stand_ins.items():
            if sys.modules.get(name) is stand_in:
                del sys.modules[name]
