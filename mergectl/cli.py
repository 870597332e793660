"""The command line: words in, one function called, results out. Heavy imports happen inside the verbs."""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import gc
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from mergectl import commands
from mergectl.errors import UserError, WorkError, did_you_mean
from mergectl.eval_command import evaluate
from mergectl.finetune_command import finetune
from mergectl.lab import Lab
from mergectl.options import arrange, command
from mergectl.publish import Target
from mergectl.report_command import report
from mergectl.search_command import join

SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"]}


class Verb(TyperCommand):
    """A command whose help is drawn by Rich."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Draw the help."""
        self.rich_markup_mode = "rich"
        super().format_help(ctx, formatter)


class Verbs(TyperGroup):
    """The verbs, in the order of the work; a misspelt one is refused with the nearest."""

    def list_commands(self, ctx: Any) -> list[str]:
        """In the order of the work."""
        return sorted(self.commands, key=("finetune", "merge", "eval", "search", "report", "run").index)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the verb, or say which was meant."""
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            raise UserError(f"No command '{args[0]}'.{did_you_mean(args[0], self.commands)}")
        return super().resolve_command(ctx, args)


class Methods(TyperGroup):
    """One command per merging method, made from its file when it is asked for."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Draw the help with Rich: the methods' sentences want whole lines; say which files are no method, and why."""
        self.rich_markup_mode = "rich"
        super().format_help(ctx, formatter)
        for sentence in commands.broken_methods():
            _say(f"warning: {sentence}", 0)

    def list_commands(self, ctx: Any) -> list[str]:
        """All methods and presets that merge."""
        return commands.mergers()

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Build a method's command from its settings."""
        cmd_name = commands.known_merger(cmd_name)
        made = typer.Typer(add_completion=False, context_settings=SETTINGS, rich_markup_mode=None)
        function, text, epilog = commands.for_method(str(self.name), cmd_name)
        made.command(cmd_name, cls=Verb, help=text, epilog=epilog)(function)
        return typer.main.get_command(made)


# The first page is plain text: loading Rich's Markdown would take half of the time it has.
app = typer.Typer(
    cls=Verbs, no_args_is_help=True, pretty_exceptions_enable=False, context_settings=SETTINGS, rich_markup_mode=None,
    help="The laboratory for merging fine-tuned transformers.",
    epilog="A model is a folder, a hub id (org/name@revision) or a run of the store; a task is suite/task or a suite.",
)  # fmt: skip
merge_app = typer.Typer(cls=Methods, invoke_without_command=True, context_settings=SETTINGS)
search_app = typer.Typer(cls=Methods, invoke_without_command=True, context_settings=SETTINGS)


def _version(on: bool) -> None:
    if on:
        from mergectl import __version__

        print(f"mergectl {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _merge(
    lab: Lab,
    ctx: typer.Context,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="A recipe file instead of options.")] = None,
    again: Annotated[
        Path | None, typer.Option("--again", help="Make the merge recorded in this folder anew and compare.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="With -c or --again: the folder to write.")] = None,
    force: Annotated[bool, typer.Option("--force", help="With -c or --again: replace the output folder.")] = False,
    shard_size: commands.ShardSize = None,
    push: commands.Push = None,
    public: commands.Public = False,
) -> None:
    """Merge experts into one model by a method, as a recipe file says (-c), or as once before (--again)."""
    target = Target(out, force, shard_size, push, public)
    if config is not None and ctx.invoked_subcommand is not None:
        raise UserError(f"-c {config} names its method itself. Leave out '{ctx.invoked_subcommand}', or the recipe.")
    if again is not None and (config is not None or ctx.invoked_subcommand is not None):
        raise UserError("--again takes the method and everything else from the folder's record. Leave out the rest.")
    if ctx.invoked_subcommand is not None and (early := _typed(ctx, "out", "force", "shard_size", "push", "public")):
        option = "--" + early[0].replace("_", "-")
        raise UserError(f"Give {option} behind the method: mergectl merge {ctx.invoked_subcommand} ... {option}.")
    if config is not None:
        commands.merge_recipe(lab, config, target)
    elif again is not None:
        from mergectl.again import show_again

        show_again(lab, again, target)
    elif ctx.invoked_subcommand is None:
        print(ctx.get_help())
        raise typer.Exit(2)


def _typed(ctx: typer.Context, *names: str) -> list[str]:
    """Those of the options that stand on the command line."""
    sources = {name: ctx.get_parameter_source(name) for name in names}
    return [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]


merge_app.callback()(command(_merge))


search_app.callback()(command(join))
app.command("finetune", cls=Verb, short_help="Fine-tune one expert per task.")(command(finetune))
app.add_typer(merge_app, name="merge", short_help="Merge experts into one model.")
app.command("eval", cls=Verb, short_help="Score a model on tasks.")(command(evaluate))
app.add_typer(search_app, name="search", short_help="Search a method's settings.")
app.command("report", cls=Verb, short_help="Print the leaderboard, a run, or an answer in SQL.")(command(report))
app.command("run", cls=Verb, short_help="Run a pipeline of verbs.")(command(commands.run))


@functools.cache
def _program() -> Any:
    """All verbs with their options; made once, since it takes longer than many a command."""
    return typer.main.get_command(app)


def main(args: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    words = list(sys.argv[1:] if args is None else args)
    with contextlib.suppress(AttributeError):  # file names that are not UTF-8 can be printed as well
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        with _plugins_of(words), warnings.catch_warnings():
            _our_warnings_only("--debug" in words)
            _program()(arrange(words), prog_name="mergectl")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except KeyboardInterrupt:
        return _say("Interrupted.", 130)
    except Exception as error:
        if "--debug" in words:
            traceback.print_exc()
        return _explain(error)
    return 0


@contextlib.contextmanager
def _plugins_of(words: Sequence[str]) -> Iterator[None]:
    """A lab's own methods count from the moment methods are listed, before --store is parsed."""
    before = os.environ.get("MERGECTL_STORE")
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == "--store" and (equals or index + 1 < len(words)):
            os.environ["MERGECTL_STORE"] = value if equals else words[index + 1]
    try:
        yield
    finally:
        os.environ.pop("MERGECTL_STORE", None)
        if before is not None:
            os.environ["MERGECTL_STORE"] = before


def _our_warnings_only(everything: bool) -> None:
    """Print our own warnings as sentences; those of libraries only with --debug."""
    if not everything:
        warnings.simplefilter("ignore")
    warnings.filterwarnings("always", module=r"mergectl(\.|$)")
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)


def _explain(error: Exception) -> int:
    """One sentence for a person, and the exit code that belongs to it."""
    from mergectl.benchmarks._contract import BenchmarkError
    from mergectl.methods._contract import MethodError
    from mergectl.store.errors import StoreError

    if isinstance(error, UserError | MethodError | BenchmarkError | StoreError):
        return _say(f"Error: {error}", 2)
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return _say(f"Error: {str(error.filename)[:40]}... is longer than a name may be. Name something else.", 2)
    if isinstance(error, WorkError | OSError | MemoryError):
        return _say(f"Failed: {error or type(error).__name__}", 1)
    return _say(f"Failed, and the fault is ours: {type(error).__name__}: {error}. See it with --debug.", 1)


def _say(text: str, code: int) -> int:
    sys.stderr.write(text + "\n")
    return code


def entry() -> None:
    """The console script; a polite kill (SIGTERM) ends a run as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    _open_more_files()
    gc.set_threshold(50_000, 20, 20)  # importing torch makes half a million objects that stay: a quarter second less
    ending = _Ending()
    atexit.register(ending)  # the first to be registered is the last to be called
    ending.code = main()
    for late in (signal.SIGINT, signal.SIGTERM):  # all is done and said
        signal.signal(late, signal.SIG_IGN)
    sys.exit(ending.code)


def _open_more_files() -> None:
    """Allow as many open files as the machine does: a merge keeps all shards of its models open."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class _Ending:
    """Ends the process when all else is done; to take every object apart first costs half a second with torch."""

    code = 1  # where an exception ends it

    def __call__(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody reads any more
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(self.code)
