"""Templates written as plain words: a text and its answers, in which `{column}` stands for what the row says there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any

from mergectl.benchmarks._contract import BenchmarkError, Template


@dataclass(frozen=True)
class Words:
    """Puts a row's texts into a text and into the answers, in the order of their ids.

    >>> Words("{a} Is that {b}?", ("yes", "no, {c}"))({"a": "Rain fell.", "b": "so {c}", "c": "dry"})
    ('Rain fell. Is that so {c}?', ('yes', 'no, dry'))
    """

    text: str
    answers: tuple[str, ...]

    def __call__(self, row: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
        """Return the text and the answers of a row."""
        for name in self.columns:
            if not isinstance(row[name], str):
                raise BenchmarkError(f"The column '{name}' must hold texts, got {row[name]!r}.")
        return self.text.format_map(row), tuple(answer.format_map(row) for answer in self.answers)

    @property
    def columns(self) -> list[str]:
        """The columns that stand in the text or the answers, each once."""
        parts = [part for words in (self.text, *self.answers) for part in Formatter().parse(words)]
        return list(dict.fromkeys(name for _, name, _, _ in parts if name))


def ask(name: str, text: str, *answers: str) -> Template:
    """Return a template of plain words."""
    return Template(name, Words(text, answers))
