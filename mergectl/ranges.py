"""The words of `--range`: both ends of a range, its step, whether factors count, and the older form of a grid."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergectl.errors import UserError

if TYPE_CHECKING:
    from mergectl.methods._contract import Between
    from mergectl.settings import Setting


def read_range(setting: Setting, text: str) -> tuple[float, float, float | None, bool]:
    """Read LOW:HIGH, LOW:HIGH:STEP, LOW:HIGH:log or the older form: both ends, the step, and whether factors count."""
    log = text.endswith(":log")
    wrong = f"--range {setting.name}={text} is not {'LOW:HIGH:log' if log else 'LOW:HIGH or LOW:HIGH:STEP'}"
    if text.startswith("linear+"):
        legacy = read_legacy(setting.name, text)
        check_whole(setting, text, legacy)
        return *legacy, False
    try:
        numbers = [float(part) for part in text.removesuffix(":log").split(":")]
    except ValueError as error:
        raise UserError(f"{wrong}.") from error
    if len(numbers) not in ((2,) if log else (2, 3)) or not -math.inf < numbers[0] < numbers[1] < math.inf:
        raise UserError(f"{wrong} with LOW below HIGH.")
    if len(numbers) == 3 and not 0 < numbers[2] <= (numbers[1] - numbers[0]) * (1 + 1e-9):
        raise UserError(f"{wrong} with a STEP above 0 and no wider than the range.")
    if log and numbers[0] <= 0:
        raise UserError(f"--range {setting.name}={text}: a range in equal factors begins above 0.")
    check_whole(setting, text, numbers)
    return numbers[0], numbers[1], numbers[2] if len(numbers) == 3 else None, log


def check_whole(setting: Setting, text: str, numbers: Sequence[float]) -> None:
    """Refuse broken numbers for a setting of whole ones."""
    if setting.type == "int" and not all(number.is_integer() for number in numbers):
        raise UserError(f"--range {setting.name}={text}: {setting.name} takes whole numbers only.")


def read_legacy(name: str, text: str) -> tuple[float, float, float]:
    """Read `linear+0.8+2.21+0.1`, the older grids: from the first to below the second, rounded to one decimal."""
    import numpy as np

    try:
        low, end, step = (float(part) for part in text.split("+")[1:])
        values = sorted({round(float(value), 1) for value in np.arange(low, end, step)})
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"--range {name}={text} is not linear+START+END+STEP.") from error
    gaps = {round(b - a, 1) for a, b in itertools.pairwise(values)}
    if not values or len(gaps) > 1:
        raise UserError(
            f"--range {name}={text} holds no even steps once its values are rounded to one decimal, as this form does. "
            f"Write it as {name}=LOW:HIGH:STEP."
        )
    return values[0], values[-1], gaps.pop() if gaps else 0.1


def inside(limits: Between, low: float, high: float) -> bool:
    """Whether a setting may take every value from low to high."""
    above = low > limits.low if limits.low_open else low >= limits.low
    below = high < limits.high if limits.high_open else high <= limits.high
    return above and below


def steps(low: float, high: float, step: float) -> int:
    """How many whole steps fit, rounding errors forgiven."""
    return math.floor((high - low) / step + 1e-9)
