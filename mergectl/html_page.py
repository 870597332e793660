"""`report --html`: everything the lab knows as one page that needs no network, for people with or without a mouse."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mergectl import artefacts
from mergectl.charts import Bars, Field, Graph, HeatMap, Plot
from mergectl.charts_svg import MARKS, MOST, clean, drawn
from mergectl.errors import UserError
from mergectl.lab import Lab
from mergectl.report_content import Content, gather
from mergectl.scoreboard import percent
from mergectl.terminal import cell

ROWS = 500  # of the table beside a picture


def write_pages(
    lab: Lab,
    split: str,
    suite: str | None,
    study: str | None,
    storage: str | None,
    compare: Sequence[str],
    *,
    html: Path | None,
    png: Path | None,
    svg: Path | None,
) -> None:
    """Write the page, and the pictures for papers in the forms asked for."""  # fmt: skip
    if html is not None and (html.is_dir() or html.suffix.lower() not in (".html", ".htm")):
        raise UserError(f"--html {html} must name a file that ends in .html.")
    content = gather(lab, split, suite, study, storage, compare)
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        artefacts.write_text(html, page(content, str(lab.store_path)))
        print(html)
    for form, folder in (("png", png), ("svg", svg)):
        if folder is not None:
            from mergectl.figures import write_figures

            for path in write_figures(content, folder, form):
                print(path)


def page(content: Content, store: str) -> str:
    """The whole page as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    from mergectl import __version__

    templates = Environment(
        loader=PackageLoader("mergectl", "pages"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    templates.filters |= {
        "percent": lambda value: percent(value) or "–", "mb": _mb, "time": _time, "cell": cell, "figure": _figure,
        "when": _when,
    }  # fmt: skip
    templates.tests |= {"plot": lambda c: isinstance(c, Plot), "graph": lambda c: isinstance(c, Graph),
                        "bars": lambda c: isinstance(c, Bars), "map": lambda c: isinstance(c, HeatMap),
                        "field": lambda c: isinstance(c, Field)}  # fmt: skip
    script = _file("report.js")
    text = templates.get_template("report.html").render(
        content=content, store=store, version=__version__, made=_when(datetime.now(UTC)), rows_shown=ROWS,
        style=Markup(_file("report.css")), script=Markup(script), script_digest=_digest(script),
        svg=lambda chart: Markup(drawn(chart)), marks=MARKS, most=MOST,
    )  # fmt: skip
    return clean(text.lstrip())


def _file(name: str) -> str:
    return (Path(__file__).parent / "pages" / name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    """What the page's policy knows its only script by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _mb(count: float | None) -> str:
    return "–" if count is None else f"{count / 1e6:,.1f}"


def _time(seconds: float | None) -> str:
    """A duration as people say it."""
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _figure(value: Any, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _when(time: datetime | None) -> str:
    return "–" if time is None else time.strftime("%Y-%m-%d %H:%M") + " UTC"
