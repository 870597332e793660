"""Which weights are those of linear layers: as the lab says, or guessed from names and shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mergectl.methods._task_vectors import TaskVectors

# Tables, norms, biases and heads, as the parts of a name between its dots say. BERT's pooler belongs to the body.
_TABLES = re.compile(r"embed|position|pos_emb|^pos$|^w[tp]e$|^shared$|relative_")
_OTHERS = re.compile(
    r"norm|^ln(_|\d|$)|bias|(^|_)heads?$|classif|^score$|^qa_outputs$|^cls$|predictions|^(visual|text)_projection$"
)


def linear_weights(linears: Mapping[str, bool] | None, task_vectors: TaskVectors) -> dict[str, bool]:
    """Return the names of linear layers' weights, with True where one is stored transposed, [in, out].

    Without `linears` they are guessed: all matrices but tables, norms and heads, none of them transposed.
    """
    if linears is not None:
        return {name: linears[name] for name in task_vectors if name in linears}
    return {name: False for name, shape in task_vectors.shapes.items() if len(shape) == 2 and _is_linear(name)}


def is_table(name: str) -> bool:
    """Say whether a weight's name is that of an embedding: a table of tokens, positions or types."""
    return any(_TABLES.search(part) for part in name.lower().split("."))


def _is_linear(name: str) -> bool:
    return not is_table(name) and not any(_OTHERS.search(part) for part in name.lower().split("."))
