"""What the words of `report` are, and which page they ask for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from mergectl.errors import UserError
from mergectl.lab import Lab
from mergectl.words import Split, Storage

Html = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Write everything as one page that needs no network.")
]
Png = Annotated[Path | None, typer.Option("--png", metavar="FOLDER", help="Write the pictures for papers as PNG.")]
Svg = Annotated[Path | None, typer.Option("--svg", metavar="FOLDER", help="Write the pictures for papers as SVG.")]

TIMEOUT = 300.0  # seconds
Timeout = Annotated[float, typer.Option("--timeout", min=0.001, help="With --sql: seconds after which to give up.")]
CARE = "The store itself"
Check = Annotated[
    bool,
    typer.Option("--check", help="Verify database, archive and models on disk.", rich_help_panel=CARE),
]
Rebuild = Annotated[
    bool, typer.Option("--rebuild", help="Make the database anew from the archive.", rich_help_panel=CARE)
]
MergeStore = Annotated[
    str | None,
    typer.Option("--merge-store", metavar="OTHER", help="Take in another store's runs.", rich_help_panel=CARE),
]
Export = Annotated[
    Path | None,
    typer.Option("--export", metavar="FOLDER", help="Write all tables as Parquet files.", rich_help_panel=CARE),
]
Import = Annotated[
    Path | None, typer.Option("--import", metavar="FOLDER", help="Take in exported runs.", rich_help_panel=CARE)
]


def report(
    lab: Lab,
    run: Annotated[str | None, typer.Argument(help="A run's id or name; default: the leaderboard.")] = None,
    compare: Annotated[
        list[str] | None, typer.Option("--compare", help="Runs side by side, what differs first; several may follow.")
    ] = None,
    sql: Annotated[
        str | None, typer.Option("--sql", help="Answer one SELECT over the store's tables and views.")
    ] = None,
    split: Split = "report",
    suite: Annotated[str | None, typer.Option("--suite", help="Only this suite's tasks.")] = None,
    study: Annotated[
        str | None, typer.Option("--study", help="A search: its history, what mattered, its best.")
    ] = None,
    study_storage: Storage = None,
    html: Html = None,
    png: Png = None,
    svg: Svg = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Comma-separated values on stdout.")] = False,
    as_md: Annotated[bool, typer.Option("--md", help="A Markdown table on stdout.")] = False,
    as_latex: Annotated[bool, typer.Option("--latex", help="A LaTeX table (booktabs) on stdout.")] = False,
    timeout: Timeout = TIMEOUT,
    check: Check = False,
    rebuild: Rebuild = False,
    merge_store: MergeStore = None,
    export: Export = None,
    import_: Import = None,
) -> None:
    """Print the leaderboard, one run, several side by side, one search, or the answer to any SQL question."""
    from mergectl import report as pages

    form = pages.choose_format(lab.terminal.as_json, as_csv, as_md, as_latex)
    care = bool(check or rebuild or merge_store or export or import_)
    files = html is not None or png is not None or svg is not None
    _one_question(
        {
            "--check, --rebuild, --merge-store, --export or --import": care,
            "--html, --png or --svg": files,
            "--sql": sql is not None,
            "--study": study is not None and not files,
            "--compare": bool(compare) and not files,
            "a run": run is not None and not compare,
        }
    )
    page = files or not (care or sql is not None or study is not None or compare or run is not None)
    _no_idle(
        {
            "--timeout": (timeout != TIMEOUT, sql is not None, "--sql"),
            "--split": (split != "report", page, "the leaderboard and for pages"),
            "--suite": (suite is not None, page, "the leaderboard and for pages"),
            "--study-storage": (study_storage is not None, files or study is not None, "--study and for pages"),
            f"--{form}": (form not in ("table", "json"), not care, "answers and tables"),
        }
    )
    if files and form != "table":
        raise UserError(
            f"--html, --png and --svg write files; --{form} is for what goes to stdout. Ask for one of them."
        )
    if care:
        from mergectl.store_care import Care, take_care

        take_care(lab, Care(rebuild, check, merge_store, import_, export))
    elif files:
        from mergectl.html_page import write_pages

        write_pages(lab, split, suite, study, study_storage, compare or [], html=html, png=png, svg=svg)
    elif study is not None:
        from mergectl.study_report import show_study

        show_study(lab, study, study_storage, form)
    elif sql is not None:
        pages.show(lab.store.query(sql, limit=timeout), form)
    elif compare:
        from mergectl.run_report import compare_runs

        compare_runs(lab, [*([run] if run else []), *compare], form)
    elif run is not None:
        from mergectl.run_report import one_run

        one_run(lab, run, form)
    else:
        pages.leaderboard(lab, split, suite, form)


def _one_question(asked: Mapping[str, bool]) -> None:
    """Refuse to answer one question and pass over another."""
    both = [name for name, given in asked.items() if given]
    if len(both) > 1:
        raise UserError(f"Ask for one thing at a time: {both[0]}, or {both[1]}.")


def _no_idle(given: Mapping[str, tuple[bool, bool, str]]) -> None:
    """Refuse an option that changes nothing: {option: (whether given, whether it has a meaning, what it is for)}."""
    for option, (typed, meant, use) in given.items():
        if typed and not meant:
            raise UserError(f"{option} is for {use}. Leave it out.")
