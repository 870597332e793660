"""Options: those every command has, those a method's settings become. Only here Typer meets our settings."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from mergectl.errors import UserError
from mergectl.lab import Lab
from mergectl.ranks import leads
from mergectl.terminal import Terminal

if TYPE_CHECKING:
    from mergectl.settings import Setting

ALWAYS = "Always there"
SPREAD = ("--experts", "--on", "--heads", "--against", "--eval", "--compare")  # `--on A B` means `--on A --on B`
GLOBAL_FLAGS = ("--json", "--quiet", "-q", "--debug")
GLOBAL_VALUES = ("--store", "--data", "--tasks", "--seed", "--device", "--threads")

Store = Annotated[
    str,
    typer.Option(
        "--store", envvar="MERGECTL_STORE", metavar="PLACE", rich_help_panel=ALWAYS,
        help="The DuckDB store, whose folder is the lab; or postgresql://user@host/database.",
    ),
]  # fmt: skip
Data = Annotated[
    Path | None,
    typer.Option(
        "--data", envvar="MERGECTL_DATA", help="Folder of <dataset>/<config>/<split>.parquet.", rich_help_panel=ALWAYS
    ),
]
Tasks = Annotated[
    Path | None,
    typer.Option(
        "--tasks",
        envvar="MERGECTL_TASKS",
        help="A recipe that declares your own tasks (files/...).",
        rich_help_panel=ALWAYS,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", min=0, help="Seed of every random draw; default: 0, or a file's.", rich_help_panel=ALWAYS),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.", rich_help_panel=ALWAYS)]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=0, help="Processor threads; default: 0, one per free core.", rich_help_panel=ALWAYS),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.", rich_help_panel=ALWAYS)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.", rich_help_panel=ALWAYS)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=ALWAYS)]

COMMON: dict[str, tuple[Any, Any]] = {
    "store": (Store, "lab/mergectl.duckdb"),
    "data": (Data, None),
    "own_tasks": (Tasks, None),
    "seed": (Seed, None),
    "device": (Device, "auto"),
    "threads": (Threads, None),
    "as_json": (Json, False),
    "quiet": (Quiet, False),
    "debug": (Debug, False),
}


def command(function: Callable[..., Any], extra: Mapping[str, tuple[Any, Any]] | None = None) -> Callable[..., Any]:
    """Give a verb the options that every command has: it gets them as one `Lab`, its first argument.

    `extra` are further options, {name: (annotation, default)}; they arrive as keyword arguments.
    """

    @functools.wraps(function)
    def wrapped(**values: Any) -> Any:
        common = {name: values.pop(name) for name in COMMON}
        return function(_lab(common), **values)

    own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
    own = [p for p in own if p.kind is not inspect.Parameter.VAR_KEYWORD]
    more = {**(extra or {}), **COMMON}
    keyword = inspect.Parameter.KEYWORD_ONLY
    added = [inspect.Parameter(n, keyword, default=d, annotation=a) for n, (a, d) in more.items()]
    positional = [p.replace(kind=keyword) for p in own]
    wrapped.__signature__ = inspect.Signature([*positional, *added])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in [*positional, *added]}
    del wrapped.__wrapped__
    return wrapped


def _lab(common: Mapping[str, Any]) -> Lab:
    path = Path(common["store"])
    place = {"store_path": path / "mergectl.duckdb" if path.is_dir() else path}
    return Lab(
        **({"store_url": common["store"]} if "://" in common["store"] else place),
        data=common["data"],
        own_tasks=common["own_tasks"],
        device=common["device"],
        threads=common["threads"] or 0,
        seed=common["seed"] or 0,
        typed=frozenset(name for name in ("seed", "threads") if common[name] is not None),
        terminal=Terminal(quiet=common["quiet"] or not leads(), as_json=common["as_json"] and leads()),
        command=("mergectl", *sys.argv[1:]),
    )


def setting_options(settings: Mapping[str, Setting]) -> dict[str, tuple[Any, Any]]:
    """A method's settings as options: {parameter: (annotation, default)}."""
    return {f"set_{name}": (_option(setting), None) for name, setting in settings.items()}


def calibration_options(supplies: Collection[str]) -> dict[str, tuple[Any, Any]]:
    """The options of calibration; those that only a refinement can make use of are not in the help."""
    from mergectl.calibration_options import every, for_supplies

    shown = for_supplies(supplies)
    return {
        f"set_{name}": (_option(setting, "Calibration", hidden=name not in shown), None)
        for name, setting in every().items()
    }


def given_calibration(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options of calibration that the user typed, for the lab's supplies."""
    from mergectl.calibration_options import every

    given = given_settings(values, every())
    return {"calibration": given} if given else {}


def _option(setting: Setting, panel: str = "Settings", *, hidden: bool = False) -> Any:
    flag = "--" + setting.name.replace("_", "-")
    option = typer.Option(
        flag,
        help=f"{setting.help} {_range(setting)}",
        metavar=metavar(setting),
        rich_help_panel=panel,
        show_default=False,
        hidden=hidden,
    )
    return Annotated[list[str] | None, option]


def hidden(parameter: inspect.Parameter) -> inspect.Parameter:
    """An option that the help leaves out; a method that has no use for it says so."""
    kind, option = get_args(parameter.annotation)
    option = copy.copy(option)
    option.hidden = True
    return parameter.replace(annotation=Annotated[kind, option])


def metavar(setting: Setting) -> str:
    """What stands after the option's name: NUMBER, WHOLE, YES/NO or the words."""
    return {"float": "NUMBER", "int": "WHOLE", "bool": "true|false", "tasks": "TASKS"}.get(setting.type) or "|".join(
        map(str, setting.words)
    )


def _range(setting: Setting) -> str:
    """Range and default in brackets, as the help shows them."""
    parts = []
    if (limits := setting.between) is not None:
        low = f"above {limits.low:g}" if limits.low_open else f"{limits.low:g}"
        parts.append(f"{low} to {'below ' if limits.high_open else ''}{limits.high:g}")
    if setting.per_task:
        parts.append("may differ per task")
    default = str(setting.default)
    if setting.default is not None:  # else the help says what happens
        parts.append(f"default {default.lower() if isinstance(setting.default, bool) else default}")
    return f"({'; '.join(parts)})" if parts else ""


def given_settings(values: Mapping[str, Any], settings: Mapping[str, Setting]) -> dict[str, Any]:
    """The settings that the user typed, parsed; the others keep their defaults."""
    from mergectl.settings import parse

    typed = {name: values.get(f"set_{name}") for name in settings}
    return {name: parse(settings[name], ",".join(texts)) for name, texts in typed.items() if texts}


def arrange(args: Sequence[str]) -> list[str]:
    """Let the command line be written as people write it.

    Options of every command may stand before the verb, and `--experts A B C` takes all that follows.
    """
    front, rest = _front(list(args))
    if rest[:1] in (["merge"], ["search"]):  # between the verb and the method, too
        more, tail = _front(rest[1:])
        front, rest = [*front, *more], [rest[0], *tail]
    spread: list[str] = []
    index = 0
    while index < len(rest):
        word = rest[index]
        if word not in SPREAD:
            spread.append(word)
            index += 1
            continue
        index += 1
        values = []
        while index < len(rest) and not rest[index].startswith("-"):
            values.append(rest[index])
            index += 1
        if not values:
            raise UserError(f"{word} takes at least one word, and none stands behind it.")
        spread += [part for value in values for part in (word, value)]
    return [*spread, *front] if rest else front


def _front(args: list[str]) -> tuple[list[str], list[str]]:
    index = 0
    while index < len(args):
        if args[index] in GLOBAL_FLAGS or args[index].startswith(tuple(f"{name}=" for name in GLOBAL_VALUES)):
            index += 1
        elif args[index] in GLOBAL_VALUES and index + 1 < len(args):
            index += 2
        else:
            break
    return args[:index], args[index:]


def with_seed(lab: Lab, seed: int | None) -> Lab:
    """The same lab with the seed that a recipe names, where the command line names none."""
    return lab if seed is None or "seed" in lab.typed else replace(lab, seed=seed)


def adapt_options(method: str, on: str | None, items: Sequence[str] | None) -> dict[str, Any]:
    """What `--adapt-on` and `--adapt` say, for the lab's supplies; refused where the method learns nothing."""
    from mergectl.settings import describe
    from mergectl.words import pairs

    given: dict[str, Any] = pairs("--adapt", items) | ({} if on is None else {"on": on})
    if given and "entropy" not in describe(method).supplies:
        raise UserError(f"'{method}' does not adapt to unlabelled rows. Leave out --adapt-on and --adapt.")
    return {"adapt": given} if given else {}
