"""Set all dropout of a model, whatever its architecture calls it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergectl.models import Source


def with_dropout(source: Source, rate: float) -> Source:
    """The same model with every dropout rate of its configuration set."""
    return replace(source, config={**source.config, **dict.fromkeys(rates(source.config), rate)})


def rates(config: Mapping[str, Any]) -> dict[str, float]:
    """The dropout rates of a configuration, those that it leaves at transformers' defaults included.

    >>> rates({"hidden_dropout_prob": 0.1, "hidden_size": 16, "classifier_dropout": None})
    {'hidden_dropout_prob': 0.1}
    """
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    usual = CONFIG_MAPPING[kind]().to_dict() if kind in CONFIG_MAPPING else {}
    return {
        name: value
        for name, value in {**usual, **config}.items()
        if _is_rate(name) and isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
    }


def _is_rate(name: str) -> bool:
    """`dropout_rate`, `attn_pdrop`, `layerdrop`: all that drops by chance."""
    return "drop" in name
