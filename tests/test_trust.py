"""Nothing is trusted and nothing is half done: lying headers, lying indexes, full disks, kills at any block."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from mergectl import artefacts
from mergectl.checkpoints import open_checkpoint
from mergectl.errors import UserError, WorkError
from mergectl.families import open_family
from mergectl.headers import LONGEST, read_header
from mergectl.merge import MergeJob, merge
from mergectl.plan import recipe_of
from tests import population as tiny
from tests.conftest import Cli

Capture = pytest.CaptureFixture[str]
GOOD = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "I64", "shape": [1], "data_offsets": [16, 24]}}  # fmt: skip
BODY = bytes(range(24))


def lay(folder: Path, header: Any, body: bytes = BODY, length: int | None = None) -> Path:
    """Write a file with this header (an object or raw bytes) and body."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + body)
    return path


def with_a(**facts: Any) -> dict[str, Any]:
    return {**GOOD, "a": {**GOOD["a"], **facts}}


TWICE = b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'
LIES: dict[str, tuple[Any, bytes, str]] = {
    "a hole before": (with_a(data_offsets=[4, 20], shape=[4]), BODY, "4 bytes before weight 'a' belong to nothing"),
    "a hole at the start": ({"b": GOOD["b"]}, BODY, "16 bytes before weight 'b' belong to nothing"),
    "a hole at the end": ({"a": GOOD["a"]}, BODY, "8 bytes after weight 'a' belong to nothing"),
    "a body cut short": (GOOD, BODY[:-1], "weight 'b' ends at byte"),
    "an overlap": (
        {**GOOD, "b": {"dtype": "I64", "shape": [1], "data_offsets": [8, 16]}},
        BODY[:16],
        "weight 'b' overlaps weight 'a'",
    ),
    "too few bytes": (with_a(data_offsets=[0, 12]), BODY, "weight 'a' (F32, [2, 2]) needs 16 bytes, but has 12"),
    "offsets turned round": (with_a(data_offsets=[16, 0]), BODY, "needs 16 bytes, but has -16"),
    "an unknown type": (with_a(dtype="F31"), BODY, "weight 'a' is of the unknown type 'F31'"),
    "a type that is no word": (with_a(dtype=["F32"]), BODY, "weight 'a' is of the unknown type ['F32']"),
    "a negative shape": (with_a(shape=[-2, -2]), BODY, "weight 'a' has the shape [-2, -2]"),
    "a fractional shape": (with_a(shape=[2.0, 2]), BODY, "weight 'a' has the shape [2.0, 2]"),
    "a true shape": (with_a(shape=[True, 4]), BODY, "weight 'a' has the shape [True, 4]"),
    "a shape beyond all numbers": (with_a(shape=[2**63, 2**63]), BODY, "which are no counts"),
    "a shape that is no list": (with_a(shape=4), BODY, "weight 'a' has the shape 4"),
    "three offsets": (with_a(data_offsets=[0, 8, 16]), BODY, "at [0, 8, 16], which are no counts"),
    "a weight without facts": ({**GOOD, "a": None}, BODY, "weight 'a' has no dtype, shape and data_offsets"),
    "a weight without a shape": ({**GOOD, "a": {"dtype": "F32"}}, BODY, "weight 'a' has no dtype, shape"),
    "a name twice": (TWICE, b"xy", "'a' stands twice in its header"),
    "a name of half a letter": (
        b'{"\\ud800":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
        b"xy",
        "cannot be printed",
    ),
    "a name that moves the cursor": ({"\x1b[2J": GOOD["a"]}, BODY[:16], "cannot be printed"),
    "a list": ([1], b"", "is no JSON object"),
    "no JSON": (b"{", b"", "its header is not JSON"),
    "no letters": (b"\xff\xfe", b"", "its header is not JSON"),
    "nesting without end": (b"[" * 100_000, b"", "its header is not JSON"),
    "a number without end": (b'{"a":' + b"9" * 5000 + b"}", b"", "its header is not JSON"),
}


@pytest.mark.parametrize("case", LIES)
def test_a_lying_header_is_refused_in_one_sentence(tmp_path: Path, case: str) -> None:
    header, body, sentence = LIES[case]
    path = lay(tmp_path, header, body)
    with pytest.raises(UserError) as caught:
        open_checkpoint(tmp_path).names  # noqa: B018
    text = str(caught.value)
    assert sentence in text and text.startswith(f"{path} is not a whole safetensors file: ") and "\n" not in text


@pytest.mark.parametrize(
    ("length", "sentence"),
    [
        (10**6, "claims 1000000 bytes, but the file has only"),
        (LONGEST + 1, "more than the"),
        (2**64 - 1, "more than the"),
    ],
)
def test_a_header_may_not_claim_more_than_there_is(tmp_path: Path, length: int, sentence: str) -> None:
    path = lay(tmp_path, GOOD, length=length)
    with pytest.raises(UserError, match=sentence):
        read_header(path)


def test_a_good_header_is_read_with_its_places(tmp_path: Path) -> None:
    path = lay(tmp_path, {"__metadata__": {"x": "y"}, **GOOD})
    body = path.stat().st_size - len(BODY)
    assert read_header(path) == {"a": ((2, 2), "F32", body, 16), "b": ((1,), "I64", body + 16, 8)}


def read_or_refused(folder: Path) -> None:
    """Either one sentence, or exactly what the safetensors library reads."""
    path = folder / "model.safetensors"
    try:
        opened = open_checkpoint(folder)
        found = {name: opened[name] for name in opened}
    except UserError as error:
        text = str(error)
    else:
        text = ""
    if text:
        assert str(folder) in text and path.name in text and text.isprintable()
        return
    with contextlib.suppress(SafetensorError), safe_open(path, framework="pt") as library:
        assert set(library.keys()) == set(found)
        for name, weight in found.items():
            theirs = library.get_tensor(name)
            assert (theirs.dtype, theirs.shape) == (weight.dtype, weight.shape)
            same = weight.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8)
            assert torch.equal(*same) or weight.dtype == torch.bool


FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SAMPLE = (lambda text: len(text).to_bytes(8, "little") + text + BODY)(json.dumps(GOOD).encode())


@FUZZ
@given(data=st.data())
def test_flipped_bytes_are_refused_or_read_right(tmp_path: Path, data: st.DataObject) -> None:
    spoilt = bytearray(SAMPLE)
    for _ in range(data.draw(st.integers(1, 4))):
        spoilt[data.draw(st.integers(0, len(spoilt) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "model.safetensors").write_bytes(bytes(spoilt))
    read_or_refused(tmp_path)


@FUZZ
@given(start=st.integers(0, len(SAMPLE)), end=st.integers(0, len(SAMPLE)), middle=st.binary(max_size=12))
def test_spliced_files_are_refused_or_read_right(tmp_path: Path, start: int, end: int, middle: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(SAMPLE[:start] + middle + SAMPLE[end:])
    read_or_refused(tmp_path)


COUNTS = st.integers(-3, 30) | st.sampled_from([2**31, 2**63, 2**64, True, 1.0, None, "1"])
NAMES = st.sampled_from(["a", "b", "__metadata__", "", "ü"]) | st.text(max_size=3)
FACTS = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "F4", "U16", "", 3]),
        "shape": st.lists(COUNTS, max_size=3) | COUNTS,
        "data_offsets": st.lists(COUNTS, max_size=3) | COUNTS,
        "more": COUNTS,
    },
)


@FUZZ
@given(header=st.dictionaries(NAMES, FACTS | COUNTS), body=st.binary(max_size=40))
def test_invented_headers_are_refused_or_read_right(tmp_path: Path, header: dict[str, Any], body: bytes) -> None:
    lay(tmp_path, header, body)
    read_or_refused(tmp_path)


@FUZZ
@given(shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=4),
       word=st.sampled_from(["float32", "bfloat16", "int8", "bool", "float64", "uint16"]))  # fmt: skip
def test_what_the_library_writes_is_read(tmp_path: Path, shapes: list[list[int]], word: str) -> None:
    made = {f"w{i}": torch.ones(shape).to(getattr(torch, word)) for i, shape in enumerate(shapes)}
    save_file(made, tmp_path / "model.safetensors")
    opened = open_checkpoint(tmp_path)
    assert set(opened) == set(made) and all(torch.equal(opened[name], made[name]) for name in made)


def test_a_file_that_shrinks_while_it_is_read_is_an_error_and_no_crash(population: Path, tmp_path: Path) -> None:
    folder = tiny.change(population / "base", tmp_path / "base", lambda own: own)
    opened = open_checkpoint(folder)
    last = opened.names[-1]
    os.truncate(folder / "model.safetensors", 4000)
    with pytest.raises(UserError, match="became shorter while"):
        opened[last].sum()


def test_a_weight_listed_in_a_shard_that_lacks_it_is_refused(population: Path, tmp_path: Path) -> None:
    own = tiny.weights(population / "base")
    names = list(own)
    save_file({n: own[n] for n in names[:3]}, tmp_path / "x.safetensors")
    save_file({n: own[n] for n in names[3:]}, tmp_path / "y.safetensors")
    where = {n: "x.safetensors" if n in names[:3] else "y.safetensors" for n in names}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    assert set(open_checkpoint(tmp_path)) == set(names)
    for lie in ({"gone.weight": "x.safetensors"}, {names[0]: "y.safetensors"}):
        index.write_text(json.dumps({"weight_map": {**where, **lie}}))
        (name,), (file,) = lie.keys(), lie.values()
        with pytest.raises(UserError, match=f"places weight '{name}' in {file}, which has none such"):
            open_checkpoint(tmp_path).names  # noqa: B018


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.complex64])
def test_what_holds_no_real_numbers_is_not_merged(population: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    name = "embeddings.cls_token"
    base = tiny.change(population / "base", tmp_path / "base", lambda own: {**own, name: own[name].to(dtype)})
    with pytest.raises(UserError, match=f"'{name}' is of the type"):
        open_family(str(base), [("one", str(population / "parity"))])
    one = tiny.change(
        population / "parity", tmp_path / "one", lambda own: {**own, f"vit.{name}": own[f"vit.{name}"].to(dtype)}
    )
    with pytest.raises(UserError, match=f"'{name}' is of the type"):
        open_family(str(population / "base"), [("one", str(one))])


CONFIGS = {
    '{"architectures": [null]}': "'architectures' should be a list of names, not [None]",
    '{"architectures": {}}': "'architectures' should be a list, not {}",
    '{"model_type": ["vit"]}': "'model_type' should be text, not ['vit']",
    '{"id2label": [0]}': "'id2label' should be an object, not [0]",
    '{"deep": ' + "[" * 200_000 + "]" * 200_000 + "}": "is not readable JSON: it is nested too deeply",
}


@pytest.mark.parametrize("text", CONFIGS, ids=lambda text: text[:16])
def test_a_configuration_of_another_form_is_refused(
    cli: Cli, capsys: Capture, population: Path, tmp_path: Path, text: str
) -> None:
    one = tiny.change(population / "parity", tmp_path / "one", lambda own: own)
    (one / "config.json").write_text(text)
    words = ["merge", "average", "--base", population / "base", "--experts", f"one={one}", population / "loop"]
    assert cli(*words, "-o", "out") == 2 and not Path("out").exists()
    assert f"{one / 'config.json'}" in (err := capsys.readouterr().err) and CONFIGS[text] in err


RECORDS = {"task": 3, "recipe": 3, "base_digest": ["a"], "base": {}, "labels": "a", "inputs": {}, "tasks": [], "run": 1}


@pytest.mark.parametrize("key", RECORDS)
def test_a_record_of_another_form_is_refused(
    cli: Cli, capsys: Capture, population: Path, tmp_path: Path, key: str
) -> None:
    one = tiny.change(population / "parity", tmp_path / "one", lambda own: own)
    record = json.loads((population / "parity/mergectl.json").read_text())
    (one / "mergectl.json").write_text(json.dumps({**record, key: RECORDS[key]}))
    words = ["merge", "average", "--base", population / "base", "--experts", one, population / "loop"]
    assert cli(*words, "-o", "out") == 2 and not Path("out").exists()
    err = capsys.readouterr().err
    assert f"{one / 'mergectl.json'}: '{key}' should be " in err and f", not {RECORDS[key]!r}." in err


def test_models_of_whole_numbers_only_are_refused(cli: Cli, capsys: Capture, population: Path, tmp_path: Path) -> None:
    def whole(own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: weight.to(torch.int64) for name, weight in own.items()}

    base, one, two = (tiny.change(population / n, tmp_path / n, whole) for n in ("base", "parity", "loop"))
    assert cli("merge", "average", "--base", base, "--experts", f"one={one}", f"two={two}", "-o", "out") == 2
    assert f"{base} holds whole numbers only, and only real numbers can be merged." in capsys.readouterr().err


def test_a_quantised_model_is_not_merged(population: Path, tmp_path: Path) -> None:
    one = tiny.change(population / "parity", tmp_path / "one", lambda own: own)
    config = json.loads((one / "config.json").read_text())
    (one / "config.json").write_text(json.dumps({**config, "quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(UserError, match="is quantised"):
        open_family(str(population / "base"), [("one", str(one))])


def test_counters_that_differ_are_named_and_the_bases_kept(cli: Cli, capsys: Capture, population: Path) -> None:
    def count(value: int, prefix: str) -> Any:
        return lambda own: {**own, f"{prefix}norm.num_batches_tracked": torch.tensor(value)}

    base = tiny.change(population / "base", Path("base"), count(3, ""))
    one = tiny.change(population / "parity", Path("one"), count(9, "vit."))
    two = tiny.change(population / "loop", Path("two"), count(3, "vit."))
    assert cli("merge", "average", "--base", base, "--experts", f"one={one}", f"two={two}", "-o", "m") == 0
    note = "Whole numbers of 'one' differ from the base's, which are kept: 'norm.num_batches_tracked'."
    assert note in capsys.readouterr().err and note in Path("m/README.md").read_text()
    assert note in json.loads(Path("m/mergectl.json").read_text())["notes"]
    assert tiny.weights(Path("m"))["norm.num_batches_tracked"] == 3


def test_weights_that_only_the_base_has_are_named(cli: Cli, capsys: Capture, population: Path) -> None:
    base = tiny.change(population / "base", Path("base"), lambda own: {**own, "pooler.dense.bias": torch.ones(16)})
    experts = [population / "parity", population / "loop"]
    assert cli("merge", "average", "--base", base, "--experts", *experts, "-o", "m") == 0
    assert "note: No expert has 'pooler.dense.bias': kept from the base." in capsys.readouterr().err
    assert tiny.weights(Path("m"))["pooler.dense.bias"].eq(1).all()


def test_every_weight_of_every_input_is_accounted_for(population: Path, tmp_path: Path) -> None:
    base = tiny.change(population / "base", tmp_path / "base", lambda own: {**own, "extra": torch.ones(2)})
    tasks = ("parity", "loop", "digit")
    family = open_family(str(base), [(task, str(population / task)) for task in tasks])
    found = family.population
    assert {*found.base.own_name.values(), *found.carried, *found.tied} == set(family.base)
    for task in tasks:
        own = {*found.experts[task].own_name.values(), *found.heads[task], *found.copies[task]}
        assert own == set(family.experts[task])


# Writing


def merged(population: Path, out: Path, progress: Any = lambda *_: None, **facts: Any) -> str:
    """Merge two experts by the function that the command calls."""
    experts = (("parity", str(population / "parity")), ("loop", str(population / "loop")))
    family = open_family(str(population / "base"), experts)
    job = MergeJob(recipe_of(facts.pop("method", "average"), {}, [], 0), experts, str(population / "base"), **facts)
    return merge(job, family, out, facts={}, force=True, progress=progress)


def beside(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir())


@pytest.mark.parametrize("who", ["base", "parity"])
@pytest.mark.parametrize("way", ["replaced", "written to"])
def test_a_model_that_changes_while_it_is_merged_leaves_no_result(
    population: Path, tmp_path: Path, way: str, who: str
) -> None:
    own = shutil.copytree(population, tmp_path / "own")
    file = own / who / "model.safetensors"

    def change(*_: Any) -> None:
        if way == "replaced":
            shutil.copy2(file, file.with_name("new"))
            file.with_name("new").replace(file)
        else:
            file.touch()

    with pytest.raises(UserError, match=f"{who}/model.safetensors changed while it was merged. Merge again when"):
        merged(own, tmp_path / "m", lambda done, total, _: change() if done == total else None)
    assert beside(tmp_path / "m") == ["own"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("at", [0, 5, 30])
def test_a_disk_that_fills_up_leaves_nothing(
    population: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, code: int
) -> None:
    whole, calls = os.pwrite, []

    def full(*words: Any) -> int:
        calls.append(words)
        if len(calls) > at:
            raise OSError(code, os.strerror(code))
        return whole(*words)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(WorkError, match=f"The disk that holds {tmp_path} is full. Nothing was written."):
        merged(population, tmp_path / "m")
    assert len(calls) == at + 1 and beside(tmp_path / "m") == []


def test_a_full_disk_is_exit_code_1_and_spares_what_was_there(
    cli: Cli, capsys: Capture, population: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["merge", "average", "--experts", population / "parity", population / "loop", "-o", "m"]
    assert cli(*words) == 0
    before = Path("m/model.safetensors").read_bytes()

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "pwrite", full)
    assert cli(*words, "--force", "--dtype", "float64") == 1
    assert "is full. Nothing was written." in capsys.readouterr().err
    assert Path("m/model.safetensors").read_bytes() == before and beside(Path("m")) == ["lab", "m"]


@pytest.mark.parametrize("method", ["average", "emr"])
def test_space_is_checked_before_the_first_byte(
    population: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    merged(population, tmp_path / "m", method=method)
    size = sum(p.stat().st_size for p in (tmp_path / "m").rglob("*.safetensors"))
    headers = 20_000
    shutil.rmtree(tmp_path / "m")
    free = 0
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12, free))
    monkeypatch.setattr(os, "pwrite", lambda *_: pytest.fail("a byte was written"))
    for free in (0, size - headers):  # noqa: B007  # the lambda reads it
        with pytest.raises(WorkError, match=r"needs .* GB, but the disk that holds .* has only .* GB free"):
            merged(population, tmp_path / "m", method=method)
        assert beside(tmp_path / "m") == []


def test_short_writes_are_finished(population: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merged(population, tmp_path / "a")
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, at: whole(handle, bytes(data)[:100], at))
    merged(population, tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


@contextlib.contextmanager
def killed_in_child() -> Iterator[bool]:
    """Run the block in a forked child that ends there; yields whether this is the child."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        yield False
        return
    try:
        yield True
    finally:
        os._exit(1)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("replaced", [False, True], ids=["new", "replaced"])
@pytest.mark.parametrize("at", [1, 2, 17, 34, "sync", "rename"])
def test_killed_at_any_block_there_is_no_half_model(
    population: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int | str, replaced: bool
) -> None:
    out = tmp_path / "m"
    if replaced:
        merged(population, out, dtype="bfloat16")
    before = (out / "model.safetensors").read_bytes() if replaced else None
    with killed_in_child() as child:
        if child:
            die_at(at, monkeypatch)
            merged(population, out)
    stale = [name for name in beside(out) if name != "m"]
    assert any(name.startswith(".m.tmp-") for name in stale)
    assert before is None or at == "rename" or (out / "model.safetensors").read_bytes() == before
    assert replaced or not out.exists()
    merged(population, out)
    assert beside(out) == ["m"] and open_checkpoint(out).dtype("embeddings.cls_token") == "F32"


def die_at(at: int | str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrange for SIGKILL at the n-th block, when files are synced, or between the two renames."""
    whole, count = os.pwrite, [0]

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def block(*words: Any) -> int:
        count[0] += 1
        if count[0] == at:
            die()
        return whole(*words)

    monkeypatch.setattr(os, "pwrite", block)
    if at == "sync":
        monkeypatch.setattr(artefacts, "_swap", die)
    if at == "rename":
        rename = Path.rename

        def second(path: Path, target: Path) -> Path:
            if ".old-" not in target.name:
                die()
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", second)


def test_a_folder_caught_between_two_renames_is_put_back(population: Path, tmp_path: Path) -> None:
    merged(population, tmp_path / "m")
    (tmp_path / "m").rename(tmp_path / ".m.old-999999999")
    (tmp_path / ".m.tmp-999999999").mkdir()
    with pytest.raises(ZeroDivisionError), artefacts.new_folder(tmp_path / "m", force=True):
        1 / 0  # noqa: B018
    assert beside(tmp_path / "m") == ["m"] and load_file(tmp_path / "m/model.safetensors")


def test_what_a_process_of_the_same_number_left_is_removed(population: Path, tmp_path: Path) -> None:
    work = tmp_path / f".m[1].tmp-{os.getpid()}"  # every run of a container may have the same number
    work.mkdir()
    (work / "half").touch()
    merged(population, tmp_path / "m[1]")
    assert beside(tmp_path / "m[1]") == ["m[1]"]


def test_leftovers_of_a_name_with_brackets_are_removed(population: Path, tmp_path: Path) -> None:
    (tmp_path / ".m[1].tmp-999999999").mkdir()
    merged(population, tmp_path / "m[1]")
    assert beside(tmp_path / "m[1]") == ["m[1]"]


def test_a_result_that_appeared_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    slow = artefacts.new_folder(tmp_path / "m")
    slow.__enter__()
    (tmp_path / "m").mkdir()
    (tmp_path / "m/quick").touch()
    with pytest.raises(UserError, match="exists already"):
        slow.__exit__(None, None, None)
    assert beside(tmp_path / "m") == ["m"] and (tmp_path / "m/quick").exists()


@pytest.mark.parametrize("there", [True, False], ids=["link", "dangling"])
def test_a_link_is_no_output_folder(cli: Cli, capsys: Capture, population: Path, tmp_path: Path, there: bool) -> None:
    (tmp_path / "link").symlink_to(population / "digit" if there else tmp_path / "nowhere")
    words = ["merge", "average", "--experts", population / "parity", population / "loop", "-o", "link", "--force"]
    assert cli(*words) == 2
    assert "link is a link, which a folder does not replace." in capsys.readouterr().err
    assert (tmp_path / "link").is_symlink() and not list(tmp_path.glob(".link*"))


@pytest.mark.parametrize("out", [250 * "x", f"{300 * 'x'}/m", "dangling/m", "dangling/deep/m"], ids=len)
def test_an_output_folder_that_cannot_be_is_refused(cli: Cli, capsys: Capture, population: Path, out: str) -> None:
    Path("dangling").symlink_to("nowhere")
    assert cli("merge", "average", "--experts", population / "parity", population / "loop", "-o", out) == 2
    said = "dangling is a link that leads nowhere." if "dangling" in out else "too long for a folder."
    assert said in capsys.readouterr().err and {path.name for path in Path().iterdir()} <= {"dangling", "lab"}


def test_force_spares_a_project_that_has_a_config(cli: Cli, capsys: Capture, population: Path) -> None:
    Path("project/src").mkdir(parents=True)
    Path("project/config.json").write_text("{}")
    words = ["merge", "average", "--experts", population / "parity", population / "loop", "-o", "project", "--force"]
    assert cli(*words) == 2
    assert "is not a model folder" in capsys.readouterr().err and Path("project/src").exists()


@pytest.mark.parametrize("linked", [False, True])
def test_force_spares_models_inside_the_folder(
    cli: Cli, capsys: Capture, population: Path, tmp_path: Path, linked: bool
) -> None:
    run = tmp_path / "run"
    shutil.copytree(population / "parity", run)
    expert = shutil.copytree(population / "loop", tmp_path / "loop" if linked else run / "checkpoint-5")
    if linked:
        (expert / "model.safetensors").rename(run / "other.safetensors")
        (expert / "model.safetensors").symlink_to(run / "other.safetensors")
    words = ["--base", population / "base", "--experts", population / "parity", expert, "-o", run, "--force"]
    assert cli("merge", "average", *words) == 2
    assert f"of a model to merge, lies in {run}, which the result would replace." in capsys.readouterr().err
    assert load_file(expert / "model.safetensors")


def test_a_disk_that_is_full_for_the_heads_is_said_as_well(
    population: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(WorkError, match=r"is full\. Nothing was written\."):
        merged(population, tmp_path / "m")
    assert beside(tmp_path / "m") == []


def test_what_another_living_process_writes_is_left_alone(population: Path, tmp_path: Path) -> None:
    other = tmp_path / f".m.tmp-{os.getppid()}"
    other.mkdir()
    merged(population, tmp_path / "m")
    assert other.exists()


def test_a_stranger_with_a_similar_name_is_left_alone(population: Path, tmp_path: Path) -> None:
    for name in (".m.tmp-notes", ".m2.tmp-999999999", ".m.tmp-999999999x"):
        (tmp_path / name).mkdir()
    merged(population, tmp_path / "m")
    assert len(beside(tmp_path / "m")) == 4


# Names


@pytest.mark.parametrize("name", [".", "..", "x/..", "x/", "a\nb", "\x1b[2J", "n" * 300])
def test_a_name_that_no_folder_can_have_is_refused(cli: Cli, capsys: Capture, population: Path, name: str) -> None:
    experts = [f"{name}={population / 'parity'}", population / "loop"]
    assert cli("merge", "average", "--base", population / "base", "--experts", *experts, "-o", "m") == 2
    assert "An expert cannot be called" in capsys.readouterr().err and not Path("m").exists()


def test_names_of_files_that_are_not_utf8_are_merged_and_reported(cli: Cli, capsys: Capture, population: Path) -> None:
    odd, out = os.fsdecode(b"parit\xe9"), os.fsdecode(b"m\xff")
    shutil.copytree(population / "parity", odd)
    assert cli("merge", "average", "--experts", f"one={odd}", population / "loop", "-o", out) == 0
    assert cli("merge", "--again", out) == 0
    assert cli("report", "--sql", "select name from runs") == 0
    assert "Error" not in capsys.readouterr().err
