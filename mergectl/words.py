"""Options that several commands share, and how NAME=VALUE is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from mergectl.errors import UserError

Base = Annotated[str | None, typer.Option("--base", help="The model that the experts were fine-tuned from.")]
Experts = Annotated[list[str], typer.Option("--experts", help="Models, as MODEL or task=MODEL; several may follow.")]
Layout = Annotated[
    str,
    typer.Option("--layout", help="merge-lm: --experts names one folder that holds TASK/MODEL_lrRATE of GLUE's tasks."),
]
LayerMaps = Annotated[
    list[str] | None,
    typer.Option("--layer-map", help="Experts of another depth: [EXPERT=]prefix, uniform or 0:1,1:3,..."),
]
Depth = Annotated[
    str, typer.Option("--depth", help="Layers of a mapped merge: base, or small for those that experts are mapped to.")
]
Head = Annotated[
    str,
    typer.Option(
        "--head", help="small (each expert's own), interpolate (merged with the base's) or reference (fresh)."
    ),
]
Inputs = Annotated[
    str, typer.Option("--inputs", help="full, or ids_only: token ids alone, padded to the longest text that fits.")
]
Refine = Annotated[
    list[str] | None, typer.Option("--refine", help="Change task vectors first, e.g. dare:drop=0.9. May be repeated.")
]
Out = Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the output folder if it exists.")]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype", help="Type of the merged weights: float32, bfloat16, float16, or auto: each as its models need."
    ),
]
On = Annotated[list[str] | None, typer.Option("--on", help="Tasks or suites; several may follow.")]
Split = Annotated[str, typer.Option("--split", help="fit, tune or report.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="At most so many rows per task.")]
Batch = Annotated[int, typer.Option("--batch-size", min=1, help="Rows per batch.")]
Storage = Annotated[
    str | None,
    typer.Option(
        "--study-storage", metavar="PLACE",
        help="Where studies live: a folder, a database's URL, or host:port of a gRPC proxy; default: the lab.",
    ),
]  # fmt: skip

AdaptOn = Annotated[
    str | None,
    typer.Option("--adapt-on", help="Methods that adapt: the split whose unlabelled rows they see; default: tune."),
]
Adapt = Annotated[
    list[str] | None,
    typer.Option("--adapt", help="Methods that adapt: NAME=VALUE, as batch-size=8 or score-every=100. Repeatable."),
]


def pairs(option: str, items: Sequence[str] | None) -> dict[str, str]:
    """Read NAME=VALUE as often as it was given; a hyphen in the name counts as an underscore."""
    found = {}
    for item in items or []:
        name, equals, value = item.partition("=")
        if not equals or not value:
            raise UserError(f"{option} {item} is not NAME=VALUE.")
        setting, at, pattern = name.partition("@")
        found[setting.replace("-", "_") + at + pattern] = value
    return found
