"""Real handwritten digits, 8x8 pixels, cut into six related tasks; no download is needed.

The 1797 images are permuted once. One share is for pre-training a base (task `pretrain`: digit and turn of an image in
all its four turns), one for the experts (fit and tune), one for the final scores; no image is in two shares. All tasks
look at the same images, in numbers from 0 to 1; they come with scikit-learn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from mergectl.benchmarks._contract import Part, Task, Use

if TYPE_CHECKING:
    import numpy as np

TITLE = "Digits (UCI optical recognition of handwritten digits)"
DEFAULT = ("digit", "parity", "loop", "large", "rotated", "noisy")

SHARES = {"pretrain": (0, 500), "experts": (500, 1347), "report": (1347, 1797)}  # places in the permutation
NOISE = 0.25  # standard deviation, where ink is 1 and paper 0
WITH_A_LOOP = (0, 6, 8, 9)  # a written 4 is mostly open, so it counts as having none

EXPERT: Mapping[Use, Part] = {
    "fit": Part("experts", 0.0, 0.8),
    "tune": Part("experts", 0.8, 1.0),
    "report": Part("report"),
}
BASE: Mapping[Use, Part] = {
    "fit": Part("pretrain", 0.0, 0.9),
    "tune": Part("pretrain", 0.9, 1.0),
    "report": Part("report"),
}


@cache
def _images() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return images [1797, 8, 8] in 0..1, their digits, and the permutation that the shares are cut from."""
    import numpy as np
    from sklearn.datasets import load_digits

    found = load_digits()
    return (found.images / 16).astype(np.float32), found.target, np.random.RandomState(0).permutation(len(found.target))


def _upright(images: np.ndarray, digits: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the images as they are and their digits."""
    return images[rows], digits[rows]


def _turned(images: np.ndarray, digits: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each image turned by its own quarter turns, and how many they are."""
    import numpy as np

    turns = np.random.RandomState(1).randint(4, size=len(digits))[rows]
    return np.stack([np.rot90(image, k) for image, k in zip(images[rows], turns, strict=True)]), turns


def _every_turn(images: np.ndarray, digits: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each image in all four turns, one after the other, and digit + 10 * turns."""
    import numpy as np

    shown = np.stack([np.rot90(image, k) for image in images[rows] for k in range(4)])
    return shown, (digits[rows][:, None] + 10 * np.arange(4)).reshape(-1)


def _noisy(images: np.ndarray, digits: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each image under its own noise, cut to 0..1, and its digit."""
    import numpy as np

    noise = np.random.RandomState(2).normal(scale=NOISE, size=images.shape)
    return np.clip(images + noise, 0, 1).astype(np.float32)[rows], digits[rows]


Look = Callable[[Any, Any, Any], tuple[Any, Any]]


def _make(look: Look, answers: tuple[int, ...], split: str) -> Mapping[str, list[Any]]:
    """Return the columns of one share: the images as the task shows them, and its answers."""
    import numpy as np

    images, digits, order = _images()
    shown, seen = look(images, digits, order[slice(*SHARES[split])])
    return {"image": [np.ascontiguousarray(image) for image in shown], "label": [answers[int(value)] for value in seen]}


def _drawing(*lines: str) -> list[list[float]]:
    """Return an image drawn with one letter per pixel: # is ink."""
    return [[float(pixel == "#") for pixel in line] for line in lines]


ZERO = _drawing("  ####  ", " ##  ## ", " #    # ", " #    # ", " #    # ", " #    # ", " ##  ## ", "  ####  ")
ONE = _drawing("   ##   ", "  ###   ", "   ##   ", "   ##   ", "   ##   ", "   ##   ", "   ##   ", "  ####  ")


def _row(
    name: str, labels: tuple[str, ...], answers: tuple[int, ...], look: Look, parts: Mapping[Use, Part] = EXPERT
) -> Task:
    """Return one row of the table; `answers` holds the label of each digit (or number of turns)."""
    one = answers[0 if look is _turned else 1]  # both samples stand upright
    return Task(
        name=name,
        kind="image_classification",
        inputs=("image",),
        label="label",
        labels=labels,
        metric="accuracy",
        parts=parts,
        samples=({"image": ZERO, "label": answers[0]}, {"image": ONE, "label": one}),
        make=partial(_make, look, answers),
    )


TEN = tuple(str(digit) for digit in range(10))
SAME = tuple(range(10))
TURNS = ("upright", "quarter", "half", "three_quarters")

TASKS = (
    _row("digit", TEN, SAME, _upright),
    _row("parity", ("even", "odd"), tuple(digit % 2 for digit in SAME), _upright),
    _row("loop", ("open", "loop"), tuple(int(digit in WITH_A_LOOP) for digit in SAME), _upright),
    _row("large", ("at_most_four", "larger_than_four"), tuple(int(digit > 4) for digit in SAME), _upright),
    _row("rotated", TURNS, SAME, _turned),
    _row("noisy", TEN, SAME, _noisy),
    _row("pretrain", tuple(f"{digit}_{turn}" for turn in TURNS for digit in TEN), tuple(range(40)), _every_turn, BASE),
)
