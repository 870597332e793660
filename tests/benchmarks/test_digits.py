"""The digits suite: real images, related tasks, shares that never mix."""

from __future__ import annotations

import numpy as np

from mergectl.benchmarks import _rows, digits
from mergectl.benchmarks._contract import Task

TASKS: dict[str, Task] = {task.name: task for task in digits.TASKS}


def _images(name: str, *uses: str) -> list[bytes]:
    return [image.tobytes() for use in uses for image in _rows.load(TASKS[name], use).columns["image"]]  # type: ignore[arg-type]


def test_images_are_numbers_between_zero_and_one() -> None:
    images = [image for name in TASKS for image in _rows.load(TASKS[name], "tune").columns["image"]]
    assert {(image.shape, image.dtype.name) for image in images} == {((8, 8), "float32")}
    assert min(image.min() for image in images) == 0.0
    assert max(image.max() for image in images) == 1.0


def test_every_image_of_the_data_set_has_one_share() -> None:
    shares = [_images("pretrain", "fit", "tune")[::4], _images("digit", "fit", "tune"), _images("digit", "report")]
    assert sum(map(len, shares)) == 1797


def test_no_report_image_was_seen_before_by_base_or_experts() -> None:
    seen = {*_images("pretrain", "fit", "tune"), *_images("digit", "fit", "tune")}
    assert seen.isdisjoint(_images("digit", "report"))


def test_the_tasks_ask_different_things_about_the_same_image() -> None:
    asked = {name: _rows.load(TASKS[name], "report").labels for name in ("digit", "parity", "loop", "large")}
    expected = [(d, d % 2, int(d in (0, 6, 8, 9)), int(d > 4)) for d in map(int, asked["digit"])]
    assert list(zip(*asked.values(), strict=True)) == expected


def test_a_turned_image_is_the_upright_one_turned_by_its_label() -> None:
    upright = _rows.load(TASKS["digit"], "report").columns["image"]
    turned = _rows.load(TASKS["rotated"], "report")
    back = [np.rot90(image, -int(turns)) for image, turns in zip(turned.columns["image"], turned.labels, strict=True)]
    assert {0, 1, 2, 3} == set(turned.labels)
    assert all(np.array_equal(a, b) for a, b in zip(upright, back, strict=True))


def test_noise_changes_the_image_and_keeps_the_digit() -> None:
    clean, noisy = (_rows.load(TASKS[name], "report") for name in ("digit", "noisy"))
    assert clean.labels == noisy.labels
    assert not any(np.array_equal(a, b) for a, b in zip(clean.columns["image"], noisy.columns["image"], strict=True))


def test_images_are_the_same_in_every_run() -> None:
    noisy = _rows.load(TASKS["noisy"], "report")
    digits._images.cache_clear()
    again = _rows.load(TASKS["noisy"], "report")
    assert all(np.array_equal(a, b) for a, b in zip(noisy.columns["image"], again.columns["image"], strict=True))


def test_the_labels_of_the_first_report_images_stay_what_they_are() -> None:
    assert _rows.load(TASKS["digit"], "report").labels[:10] == [0, 7, 7, 4, 7, 2, 0, 1, 2, 4]


def test_changing_a_share_by_hand_leaves_the_data_set_alone() -> None:
    first = _rows.load(TASKS["digit"], "report").columns["image"][0]
    before = first.copy()
    first[:] = 0.5
    assert np.array_equal(_rows.load(TASKS["digit"], "report").columns["image"][0], before)
