"""The image suites: which data sets, how many classes, in which words, cut how."""

from __future__ import annotations

import hashlib
import io
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mergectl.benchmarks import _eurosat, _rows, _vision, vision8, vision14, vision20, vision_literal
from mergectl.benchmarks._contract import BenchmarkError, Part, Task, Use, same_question, with_suite
from mergectl.benchmarks._tables import Table
from mergectl.clip import texts_of

ALL = {task.name: with_suite(task, "vision20") for task in vision20.TASKS}

every_task = pytest.mark.parametrize("task", ALL.values(), ids=lambda task: task.name)


def save(folder: Path, task: Task, split: str, labels: list[object]) -> None:
    """Write a split whose rows all show the first sample."""
    image = task.samples[0][task.inputs[0]]
    path = folder / task.source / task.config / f"{split}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({task.inputs[0]: [image] * len(labels), task.label: labels}), path)


def test_each_suite_begins_with_the_smaller_one() -> None:
    assert [len(module.TASKS) for module in (vision8, vision14, vision20)] == [8, 14, 20]
    assert vision20.TASKS[:14] == vision14.TASKS
    assert vision14.TASKS[:8] == vision8.TASKS


def test_every_data_set_has_its_number_of_classes() -> None:
    assert {name: len(task.labels) for name, task in ALL.items()} == {
        "sun397": 397, "cars": 196, "resisc45": 45, "eurosat": 10, "svhn": 10, "gtsrb": 43, "mnist": 10, "dtd": 47,
        "cifar100": 100, "stl10": 10, "flowers102": 102, "pets": 37, "pcam": 2, "fer2013": 7,
        "emnist": 10, "cifar10": 10, "food101": 101, "fashion_mnist": 10, "rendered_sst2": 2, "kmnist": 10,
    }  # fmt: skip


def test_every_data_set_has_the_papers_number_of_prompts() -> None:
    assert {name: len(task.prompts) for name, task in ALL.items()} == {
        "sun397": 2, "cars": 8, "resisc45": 18, "eurosat": 3, "svhn": 1, "gtsrb": 3, "mnist": 1, "dtd": 8,
        "cifar100": 18, "stl10": 2, "flowers102": 1, "pets": 1, "pcam": 1, "fer2013": 6,
        "emnist": 1, "cifar10": 18, "food101": 1, "fashion_mnist": 2, "rendered_sst2": 1, "kmnist": 1,
    }  # fmt: skip


@every_task
def test_prompts_have_one_place_for_the_class_and_every_class_has_a_word(task: Task) -> None:
    assert all(prompt.count("{}") == 1 for prompt in task.prompts)
    assert len(set(task.prompts)) == len(task.prompts)
    assert len(task.words) in (0, len(task.labels))
    assert "_" not in "".join(task.words or task.labels)


@pytest.mark.parametrize("name", ["sun397", "resisc45", "dtd", "cifar100", "food101", "pets", "stl10", "cifar10"])
def test_classes_that_are_numbered_by_the_alphabet_stand_in_it(name: str) -> None:
    labels = [label.replace(" indoor", "").lower() for label in ALL[name].labels]
    assert labels == sorted(labels)


@pytest.mark.parametrize(("name", "number", "label"), [
    ("gtsrb", 14, "stop"), ("cars", 195, "smart fortwo Convertible 2012"), ("flowers102", 0, "pink primrose"),
    ("kmnist", 3, "tsu"), ("fer2013", 6, "neutral"), ("eurosat", 2, "HerbaceousVegetation"),
])  # fmt: skip
def test_a_label_has_its_number(name: str, number: int, label: str) -> None:
    assert ALL[name].labels[number] == label


def test_samples_are_pictures() -> None:
    from PIL import Image

    found = [Image.open(io.BytesIO(picture["bytes"])) for picture in (_vision.SQUARE, _vision.BAR)]
    assert [(image.size, image.getpixel((3, 0)), image.getpixel((1, 1))) for image in found] == [
        ((8, 8), 255, 0), ((8, 8), 0, 255),
    ]  # fmt: skip


def test_a_tenth_of_train_tunes_but_never_more_than_five_thousand_rows() -> None:
    parts = ALL["mnist"].parts
    counts = {
        rows: [len(_rows.choose(rows, parts[use], None, 0)) for use in ("fit", "tune")]
        for rows in (10, 3670, 60000, 73257)
    }
    assert counts == {10: [9, 1], 3670: [3303, 367], 60000: [55000, 5000], 73257: [68257, 5000]}


def test_the_tail_moves_only_cuts_inside_the_split() -> None:
    assert len(_rows.choose(100, Part("train", tail=3), None, 0)) == 100


@pytest.mark.parametrize(("declared", "found"), [
    (["River", "Forest"], [1, 0]),
    (["river", "FOREST"], [1, 0]),
    (["something", "else"], [0, 1]),
])  # fmt: skip
def test_the_order_of_classes_that_a_file_declares_counts(declared: list[str], found: list[int]) -> None:
    task = replace(ALL["eurosat"], labels=("Forest", "River"))
    table = Table({}, "here", None, {"label": tuple(declared)})
    columns = {"image": [0, 0], "label": [0, 1]}
    assert _rows._labelled(task, columns, [0, 1], table)[1] == found


def test_truth_values_are_labels_of_pcam(tmp_path: Path) -> None:
    save(tmp_path, ALL["pcam"], "test", [True, False])
    assert _rows.load(ALL["pcam"], "report", data=tmp_path).labels == [1, 0]


def test_images_may_lie_as_files_beside_a_csv(tmp_path: Path) -> None:
    folder = tmp_path / "fer2013" / "default"
    (folder / "faces").mkdir(parents=True)
    (folder / "faces" / "1.png").write_bytes(_vision.BAR["bytes"])
    (folder / "test.csv").write_text("image,label\nfaces/1.png,happy\n")
    rows = _rows.load(ALL["fer2013"], "report", data=tmp_path)
    assert (rows.labels, rows.columns["image"][0].size) == ([3], (8, 8))


@pytest.mark.parametrize("name", ["fer2013", "emnist"])
def test_a_data_set_without_a_hub_copy_says_where_to_get_it_and_where_to_put_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError) as error:
        _rows.load(ALL[name], "report", data=tmp_path)
    assert ALL[name].obtain in str(error.value)
    assert str(tmp_path / name / "default" / "test.csv") in str(error.value)


def put(folder: Path, *names: str) -> None:
    """Write a picture under each of these names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(_vision.BAR["bytes"])


def test_images_may_lie_in_a_folder_for_each_class(tmp_path: Path) -> None:
    folder = tmp_path / "resisc45" / "default" / "test"
    put(folder, "storage_tank/b.png", "storage_tank/a.JPG", "Airport/deep/c.png", "airport2/notes.txt")
    rows = _rows.load(ALL["resisc45"], "report", data=tmp_path)
    names = [ALL["resisc45"].labels[int(label)] for label in rows.labels]
    assert (names, rows.ids) == (["airport", "storage tank", "storage tank"], ["test/0", "test/1", "test/2"])
    assert rows.columns["image"][0].size == (8, 8)


def test_folders_may_carry_the_numbers_of_classes(tmp_path: Path) -> None:
    put(tmp_path / "gtsrb" / "default" / "test", "00014/1.ppm", "00002/1.ppm")
    assert _rows.load(ALL["gtsrb"], "report", data=tmp_path).labels == [2, 14]


@pytest.mark.parametrize(("name", "sentence"), [
    ("abbey/readme.txt", "has no images in folders named after the classes of vision20/mnist"),
    ("eleven/1.png", "'label' is 'eleven', which is no label of vision20/mnist"),
])  # fmt: skip
def test_folders_of_other_classes_are_refused(name: str, sentence: str, tmp_path: Path) -> None:
    put(tmp_path / "mnist" / "mnist" / "test", name)
    with pytest.raises(BenchmarkError, match=sentence):
        _rows.load(ALL["mnist"], "report", data=tmp_path)


LISTS = {
    "fit": (21600, "616cadd644bc7859"), "tune": (2700, "a554158b576c5727"), "report": (2700, "d8a73aa4767620a7"),
}  # fmt: skip
USES: tuple[Use, ...] = ("fit", "tune", "report")


def test_the_lists_that_cut_eurosat_are_always_the_same() -> None:
    found = {use: [file for file, _ in _eurosat.lists(use)] for use in USES}
    digest = {use: hashlib.blake2b("\n".join(files).encode(), digest_size=8) for use, files in found.items()}
    assert {use: (len(files), digest[use].hexdigest()) for use, files in found.items()} == LISTS
    assert len(set().union(*found.values())) == 27000


@pytest.mark.parametrize("use", ["tune", "report"])
def test_every_class_of_eurosat_gives_270_images(use: Use) -> None:
    counts = Counter(label for _, label in _eurosat.lists(use))
    assert counts == dict.fromkeys(ALL["eurosat"].labels, 270)


def test_eurosats_own_tree_of_images_is_cut_by_the_lists(tmp_path: Path) -> None:
    task = replace(ALL["eurosat"], lists=lambda use: _eurosat.lists(use)[:3])
    for use in USES:
        put(tmp_path / "eurosat" / "default" / "images", *(file for file, _ in _eurosat.lists(use)[:3]))
    save(tmp_path, task, "test", ["River"])  # the tree goes before it
    rows = _rows.load(task, "report", data=tmp_path)
    assert (rows.labels, rows.ids[0], rows.split) == ([0, 0, 0], "listed for report/0", "listed for report")
    assert len({row for use in USES for row in _rows.load(task, use, data=tmp_path).ids}) == 9


def test_an_image_that_the_lists_name_and_the_tree_lacks_is_told(tmp_path: Path) -> None:
    (tmp_path / "eurosat" / "default" / "images").mkdir(parents=True)
    with pytest.raises(BenchmarkError, match=r"AnnualCrop_10\.jpg could not be read"):
        _rows.load(ALL["eurosat"], "report", data=tmp_path)


def test_where_the_images_that_the_lists_cut_may_be_saved_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tree = tmp_path / "eurosat" / "default" / "images"
    wanted = f"{tree.parent}/train.parquet, or the class folders of the original archive below {tree}."
    with pytest.raises(BenchmarkError, match=re.escape(f"Put them at {wanted}")):
        _rows.load(ALL["eurosat"], "fit", data=tmp_path)
    put(tree, _eurosat.lists("fit")[0][0])  # of the first class
    wanted = f"Save all class folders of the original archive below {tree}, or rename that folder"
    with pytest.raises(BenchmarkError, match=rf"/Forest_\d+\.jpg could not be read: there is no.*{re.escape(wanted)}"):
        _rows.load(ALL["eurosat"], "fit", data=tmp_path)


def test_the_literal_task_asks_in_the_printed_lists_of_the_published_heads() -> None:
    (literal,) = vision_literal.TASKS
    usual = ALL["fer2013"]
    assert literal.words[0] == "['angry']"
    assert texts_of(literal)[3][0] == "a photo of a ['happy', 'smiling'] looking face."
    assert (literal.labels, literal.prompts, literal.source) == (usual.labels, usual.prompts, usual.source)
    assert not same_question(literal, usual)
