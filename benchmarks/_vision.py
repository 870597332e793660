"""The twenty image data sets of the vision papers: where their rows come from, their classes and their prompts.

Splits as in those papers: a tenth of the train split, at most 5000 rows, tunes, and the official test split reports.
Prompts are those of the OpenAI CLIP repository and of the papers after it. Of a hub copy `Task.revision` is read.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

from mergectl.benchmarks import _eurosat
from mergectl.benchmarks import _vision_names as names
from mergectl.benchmarks._contract import Part, Task, Use, tune_share

VALIDATION = 5000  # rows that tune, at most
DIGITS = tuple("0123456789")
BOTH = ("a photo of a {}.", "a photo of the {}.")
LOOKS = ("{}", "blurry {}", "black and white {}", "low contrast {}", "high contrast {}", "bad {}", "good {}")
CIFAR = tuple(
    f"a {look.format('photo')} of {article} {size}{{}}."
    for article in ("a", "the")
    for look, size in [*((look, "") for look in LOOKS), ("{}", "small "), ("{}", "big ")]
)
CARS = (
    *BOTH, "a photo of my {}.", "i love my {}!", "a photo of my dirty {}.", "a photo of my clean {}.",
    "a photo of my new {}.", "a photo of my old {}.",
)  # fmt: skip
TEXTURES = tuple(
    f"a photo of {a} {{}} {what}." for a in ("a", "the") for what in ("texture", "pattern", "thing", "object")
)
SATELLITE = tuple(f"a centered satellite photo of {article}{{}}." for article in ("", "a ", "the "))
ABOVE = tuple(
    f"{kind} {view} of {article}{{}}."
    for kind in ("satellite", "aerial")
    for view in ("imagery", "photo", "view")
    for article in ("", "a ", "the ")
)
SIGNS = tuple(f'a {how} photo of a "{{}}" traffic sign.' for how in ("zoomed in", "centered", "close up"))
FACES = (
    "a photo of a {} looking face.", "a photo of a face showing the emotion: {}.", "a photo of a face looking {}.",
    "a face that looks {}.", "they look {}.", "look at how {} they are.",
)  # fmt: skip
NUMBER = ('a photo of the number: "{}".',)

LAND = (
    "AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop", "Residential",
    "River", "SeaLake",
)  # fmt: skip
LAND_WORDS = (
    "annual crop land", "forest", "brushland or shrubland", "highway or road",
    "industrial buildings or commercial buildings", "pasture land", "permanent crop land",
    "residential buildings or homes or apartments", "river", "lake or sea",
)  # fmt: skip
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
STL10 = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
FEELINGS = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")
FEELING_WORDS = (
    "angry", "disgusted", "fearful", "happy|smiling", "sad|depressed", "surprised|shocked|spooked", "neutral|bored",
)  # fmt: skip
CLOTHES = (
    "T - shirt / top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
CLOTHES_WORDS = ("t-shirt or top", *(name.lower() for name in CLOTHES[1:]))
KANA = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")

FER2013_OBTAIN = (
    "FER2013 may not be passed on: get it from kaggle.com (challenges in representation learning, facial expression "
    "recognition) and save its faces as image files beside a CSV with the columns image (the file's path) and label "
    "(0 to 6 as in the original: angry, disgust, fear, happy, sad, surprise, neutral)."
)
EMNIST_OBTAIN = (
    "EMNIST comes from nist.gov (the EMNIST dataset, part 'digits'): save its images as files beside a CSV with the "
    "columns image (the file's path) and label (the digit)."
)


def _picture(*lines: str) -> dict[str, Any]:
    """A PNG drawn with one letter per pixel (# is ink), as a Parquet file holds it."""
    rows = b"".join(b"\0" + bytes(0 if pixel == "#" else 255 for pixel in line) for line in lines)
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", len(lines[0]), len(lines), 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return {"bytes": png, "path": None}


SQUARE = _picture("        ", " ###### ", " #    # ", " #    # ", " #    # ", " #    # ", " ###### ", "        ")
BAR = _picture("   ##   ", "   ##   ", "   ##   ", "   ##   ", "   ##   ", "   ##   ", "   ##   ", "   ##   ")


def _row(
    name: str,
    labels: tuple[str, ...],
    prompts: tuple[str, ...],
    *,
    hub: str = "",
    source: str = "",
    columns: tuple[str, str] = ("image", "label"),
    report: str = "test",
    **facts: Any,
) -> Task:
    """Return one data set of the table; its folder below `--data` has its name unless `source` says another."""
    image, label = columns
    parts: dict[Use, Part] = tune_share(report=report, tail=VALIDATION)
    samples = ({image: SQUARE, label: 0}, {image: BAR, label: 1})
    return Task(
        name=name, kind="image_classification", inputs=(image,), label=label, labels=labels, metric="accuracy",
        parts=parts, source=source or name, hub=hub, samples=samples, prompts=prompts, **facts,
    )  # fmt: skip


EIGHT = (
    _row("sun397", names.SUN397, BOTH, hub="tanganke/sun397"),
    _row("cars", names.CARS, CARS, hub="tanganke/stanford_cars"),
    _row("resisc45", names.RESISC45, ABOVE, hub="tanganke/resisc45"),
    _row("eurosat", LAND, SATELLITE, hub="tanganke/eurosat", words=LAND_WORDS, lists=_eurosat.lists),
    _row("svhn", DIGITS, NUMBER, hub="ufldl-stanford/svhn", config="cropped_digits"),
    _row("gtsrb", names.GTSRB, SIGNS, hub="tanganke/gtsrb"),
    _row("mnist", DIGITS, NUMBER, hub="ylecun/mnist", config="mnist"),
    _row("dtd", names.DTD, TEXTURES, hub="tanganke/dtd"),
)
FOURTEEN = (
    *EIGHT,
    _row("cifar100", names.CIFAR100, CIFAR, hub="uoft-cs/cifar100", config="cifar100", columns=("img", "fine_label")),
    _row("stl10", STL10, BOTH, hub="tanganke/stl10"),
    _row("flowers102", names.FLOWERS, ("a photo of a {}, a type of flower.",), hub="dpdl-benchmark/oxford_flowers102"),
    _row("pets", names.PETS, ("a photo of a {}, a type of pet.",), hub="timm/oxford-iiit-pet"),
    _row(
        "pcam", ("false", "true"), ("this is a photo of {}",), hub="1aurent/PatchCamelyon",
        words=("lymph node", "lymph node containing metastatic tumor tissue"),
    ),
    _row("fer2013", FEELINGS, FACES, obtain=FER2013_OBTAIN, words=FEELING_WORDS),
)  # fmt: skip
TWENTY = (
    *FOURTEEN,
    _row("emnist", DIGITS, ('a photo of the digit character: "{}".',), obtain=EMNIST_OBTAIN),
    _row("cifar10", CIFAR10, CIFAR, hub="uoft-cs/cifar10", config="plain_text", columns=("img", "label")),
    _row("food101", names.FOOD101, ("a photo of {}, a type of food.",), hub="ethz/food101", report="validation"),
    _row(
        "fashion_mnist", CLOTHES, BOTH, hub="zalando-datasets/fashion_mnist", config="fashion_mnist",
        words=CLOTHES_WORDS,
    ),
    _row("rendered_sst2", ("negative", "positive"), ("a {} review of a movie.",), hub="nateraw/rendered-sst2"),
    _row("kmnist", KANA, ("a photo of the character {}.",), hub="tanganke/kmnist"),
)  # fmt: skip
