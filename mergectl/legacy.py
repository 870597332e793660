"""The names that Medusa's program has for its merges, as they stand in its scripts and tables."""

from __future__ import annotations

# Trimmed or not, by where the underscore stands: TIES_ trims, _TIES is the elected mean alone, as _MEDUSA is.
NAMES = {
    "SUM": "average", "TA": "task_arithmetic",
    "TIES_": "ties_tensor", "TIES_TIES": "ties_tensor", "TIES": "ties_tensor",
    "_TIES": "medusa", "MEDUSA": "medusa", "DARE_SUM": "dare_average", "DARE_TA": "dare_task_arithmetic",
    "DARE_TIES": "dare_ties",
}  # fmt: skip


def modern(word: str) -> str:
    """A method's name as it is called here; any other word stays as it is.

    >>> [modern(word) for word in ("__SUM", "_TIES", "TIES_", "__DARE_TIES", "_MEDUSA", "ties")]
    ['average', 'medusa', 'ties_tensor', 'dare_ties', 'medusa', 'ties']
    """
    bare = word.lstrip("_")
    marked = f"_{bare}" if word != bare else bare  # any number of underscores before it counts as one
    return NAMES.get(marked) or NAMES.get(bare) or word
