"""What went wrong, for people: sentences that name the thing, the rule, the value and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. Its text is one or two sentences; the program ends with exit code 2."""


class WorkError(Exception):
    """The input was fine but the work could not be finished (full disk, busy store); exit code 1."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a hint to append to "No method 'tiess'.": the nearest known word, or all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f" Did you mean '{near[0]}'?"
    return f" Known: {', '.join(known)}." if known else ""
