"""Opening models: whole, in shards, pickled, from a run or from the hub; what is broken is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mergectl.checkpoints import open_checkpoint
from mergectl.errors import UserError
from tests import population as tiny
from tests.conftest import Cli

Capture = pytest.CaptureFixture[str]
Edit = Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]


@pytest.fixture
def base(population: Path, tmp_path: Path) -> Path:
    """A model that the test may spoil."""
    return tiny.change(population / "base", tmp_path / "base", lambda weights: weights)


def shard(folder: Path, count: int = 3) -> dict[str, str]:
    """Cut a model's one file into shards, every name in the index in turn; return where each weight is."""
    weights = tiny.weights(folder)
    (folder / "model.safetensors").unlink()
    files = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    where = {name: files[i % count] for i, name in enumerate(weights)}
    for file in files:
        save_file({n: w for n, w in weights.items() if where[n] == file}, folder / file, metadata={"format": "pt"})
    index(folder, where)
    return where


def index(folder: Path, where: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_checkpoint(folder).names  # noqa: B018  # the names are looked up when they are asked for
    return str(caught.value)


def test_a_model_in_shards_is_the_same_model(population: Path, base: Path) -> None:
    shard(base)
    one, many = open_checkpoint(population / "base"), open_checkpoint(base)
    assert set(one) == set(many)
    assert len(many) == len(one)
    for name in one:
        assert (many.shape(name), many.dtype(name)) == (one.shape(name), one.dtype(name))
        assert torch.equal(many[name], one[name])


def test_a_model_in_shards_merges_like_a_whole_one(cli: Cli, population: Path, base: Path) -> None:
    shard(base)
    parity = tiny.change(population / "parity", base.parent / "parity", lambda weights: weights)
    shard(parity, 2)
    for folder, expert, out in ((base, parity, "a"), (population / "base", population / "parity", "b")):
        words = ["--base", folder, "--experts", expert, population / "loop", "-o", out]
        assert cli("merge", "ties", *words) == 0
    a, b = tiny.weights(Path("a")), tiny.weights(Path("b"))
    assert set(a) == set(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ""])
def test_an_index_may_not_point_outside_the_folder(base: Path, name: str) -> None:
    where = shard(base)
    shutil.copy(base / next(iter(where.values())), base.parent / "outside.safetensors")
    index(base, {**where, next(iter(where)): name})
    assert f"names '{name}', which lies outside the folder" in refusal(base)


def test_a_link_does_not_lead_outside_either(base: Path) -> None:
    where = shard(base)
    (base.parent / "link.safetensors").symlink_to(base / next(iter(where.values())))
    index(base, {**where, next(iter(where)): "../link.safetensors"})
    assert "which lies outside the folder" in refusal(base)


def test_shards_may_be_links_as_in_the_cache_of_the_hub(base: Path) -> None:
    file = next(iter(shard(base).values()))
    (base / file).rename(base.parent / "blob")
    (base / file).symlink_to(base.parent / "blob")
    assert len(open_checkpoint(base)) > 1


def test_a_missing_shard_is_named(base: Path) -> None:
    file = next(iter(shard(base).values()))
    (base / file).unlink()
    assert f"the shard {file} named in model.safetensors.index.json is missing" in refusal(base)


@pytest.mark.parametrize("where", [{}, None, ["model.safetensors"]])
def test_an_index_without_weights(base: Path, where: Any) -> None:
    shard(base)
    index(base, where)
    assert "model.safetensors.index.json names no weights" in refusal(base)


@pytest.mark.parametrize("name", ["\x1b[2J", "a\0b", "../\x1b[2J", "\ud800"])
def test_an_index_does_not_write_to_the_screen(base: Path, name: str) -> None:
    file = next(iter(shard(base).values()))
    index(base, {"w": name})
    assert repr(name) in (said := refusal(base)) and said.isprintable()
    index(base, {name: file})
    assert repr(name) in (said := refusal(base)) and said.isprintable()


def test_an_index_that_is_no_json(base: Path) -> None:
    shard(base)
    (base / "model.safetensors.index.json").write_text('{"weight_map": {')
    assert "model.safetensors.index.json is not readable JSON" in refusal(base)


def test_a_weight_in_two_shards_is_refused(base: Path) -> None:
    where = shard(base)
    name, file = next(iter(where.items()))
    other = next(f for f in where.values() if f != file)
    both = {n: w for n, w in open_checkpoint(base).items() if where[n] == other or n == name}
    save_file(both, base / other)
    assert f"weight '{name}' stands in both {file} and {other}" in refusal(base)


@pytest.mark.parametrize("zipped", [True, False], ids=["zipped", "from before torch 1.6"])
def test_pickled_weights_are_read(population: Path, base: Path, zipped: bool) -> None:
    weights = tiny.weights(base)
    torch.save(weights, base / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (base / "model.safetensors").unlink()
    one, pickled = open_checkpoint(population / "base"), open_checkpoint(base)
    assert set(pickled) == set(one)
    for name in one:
        assert (pickled.shape(name), pickled.dtype(name)) == (one.shape(name), one.dtype(name))
        assert torch.equal(pickled[name], one[name])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"epoch": 3, "state_dict": {}}, "holds something else than weights by name"),
        ([1, 2], "holds something else than weights by name"),
        ({"w": torch.zeros(2, dtype=torch.complex64)}, "'w' is of the type complex64"),
        ({"w": torch.ones(2, 2).to_sparse()}, "weight 'w' is not stored in full"),
        ({"w": torch.zeros(2, device="meta")}, "weight 'w' is without numbers"),
        ({"w\0": torch.zeros(2)}, "a weight is called 'w\\x00', which cannot be printed"),
        ({"w\x1b[2J": torch.zeros(2)}, "a weight is called 'w\\x1b[2J', which cannot be printed"),
        ({"\ud800": torch.zeros(2)}, "a weight is called '\\ud800', which cannot be printed"),
    ],
    ids=["training state", "list", "complex", "sparse", "meta", "NUL", "escape code", "half a letter"],
)
def test_pickles_that_are_no_weights(base: Path, content: Any, sentence: str) -> None:
    (base / "model.safetensors").unlink()
    torch.save(content, base / "pytorch_model.bin")
    assert sentence in refusal(base)


def test_safetensors_are_preferred_to_pickles(population: Path, base: Path) -> None:
    (base / "pytorch_model.bin").write_bytes(b"never read")
    assert set(open_checkpoint(base)) == set(open_checkpoint(population / "base"))


@pytest.mark.parametrize("keep", [0, 4, 200])
def test_a_file_cut_short_in_its_header_is_named(base: Path, keep: int) -> None:
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert f"{path} is not a whole safetensors file" in refusal(base)


def test_a_folder_without_weights_says_what_was_looked_for(base: Path) -> None:
    (base / "model.safetensors").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json is in" in refusal(base)


def test_a_configuration_that_is_no_json(base: Path) -> None:
    (base / "config.json").write_text("{")
    assert f"{base / 'config.json'} is not readable JSON" in refusal(base)


def test_a_file_is_not_a_folder(base: Path) -> None:
    assert "is a file; name the model's folder" in refusal(base / "config.json")


def test_the_digest_stays_when_a_model_moves(base: Path) -> None:
    before = open_checkpoint(base).digest
    moved = base.rename(base.parent / "elsewhere")
    (moved / "README.md").write_text("nothing that computes")
    assert open_checkpoint(moved).digest == before


def spoil_one(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = next(n for n, w in weights.items() if w.numel() > 1)
    return {**weights, name: weights[name] + torch.finfo(torch.float32).eps}


def rename_one(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = next(iter(weights))
    return {f"{name}x" if n == name else n: w for n, w in weights.items()}


@pytest.mark.parametrize("edit", [spoil_one, rename_one])
def test_the_digest_changes_with_a_weight(population: Path, tmp_path: Path, edit: Edit) -> None:
    changed = tiny.change(population / "base", tmp_path / "changed", edit)
    assert open_checkpoint(changed).digest != open_checkpoint(population / "base").digest


def test_the_digest_changes_with_the_configuration(population: Path, base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 0.1}))
    assert open_checkpoint(base).digest != open_checkpoint(population / "base").digest


@pytest.mark.parametrize("part", ["unified.safetensors", "tasks/loop/head.safetensors", "tasks/loop/masks.safetensors"])
def test_the_digest_of_a_merged_model_covers_what_is_kept_per_task(cli: Cli, population: Path, part: str) -> None:
    words = ["--base", population / "base", "--experts", population / "parity", population / "loop", "-o", "m"]
    assert cli("merge", "emr", *words) == 0
    before = open_checkpoint("m").digest
    path = Path("m", part)
    path.write_bytes(path.read_bytes()[:-1] + b"\x17")
    assert open_checkpoint("m").digest != before


def test_a_run_stands_for_the_model_it_made(cli: Cli, capsys: Capture, population: Path) -> None:
    words = ["--base", population / "base", "--experts", population / "parity", population / "loop"]
    assert cli("--json", "merge", "average", *words, "-o", "m") == 0
    run = json.loads(capsys.readouterr().out)["run"]
    assert cli("merge", "average", "--experts", f"parity={run}", population / "loop", "-o", "n") == 0
    assert json.loads(Path("n/mergectl.json").read_text())["inputs"][-2]["ref"] == run
    shutil.rmtree("m")
    assert cli("merge", "average", "--experts", f"parity={run}", population / "loop", "-o", "o") == 2
    assert f"Run {run} wrote" in capsys.readouterr().err


def test_a_run_does_not_stand_for_what_replaced_its_model(cli: Cli, capsys: Capture, population: Path) -> None:
    words = ["--base", population / "base", "--experts", population / "parity", population / "loop", "-o", "m"]
    assert cli("--json", "merge", "task_arithmetic", *words) == 0
    run = json.loads(capsys.readouterr().out)["run"]
    assert cli("merge", "task_arithmetic", *words, "--scale", 0.9, "--force") == 0
    assert cli("eval", run) == 2
    assert "another model lies there now" in capsys.readouterr().err


class Hub:
    """Stands in for the model hub: notes what was asked for, and holds one folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.asked = folder, list[dict[str, Any]]()
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.snapshot_download)

    def snapshot_download(self, repo: str, **facts: Any) -> str:
        self.asked.append({"repo": repo, **facts})
        return str(self.folder)


def test_a_model_of_the_hub_is_fetched_at_its_revision(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(base, monkeypatch)
    opened = open_checkpoint("org/name@abc123")
    assert [(ask["repo"], ask["revision"]) for ask in hub.asked] == [("org/name", "abc123")]
    assert (opened.folder, opened.label) == (base, "org/name@abc123")


def test_only_weights_and_texts_are_fetched_from_the_hub(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fnmatch import fnmatch

    hub = Hub(base, monkeypatch)
    open_checkpoint("org/name")
    (ask,) = hub.asked
    wanted = ["model.safetensors", "model-00001-of-00002.safetensors", "below/model.safetensors", "config.json",
              "vocab.txt", "spm.model", "source.spm", "bpe.codes", "chat_template.jinja",
                  "modeling.py", "qwen.tiktoken"]  # fmt: skip
    there = [*wanted, "pytorch_model.bin", "tf_model.h5", "model.onnx", "flax_model.msgpack",
             "rust_model.ot", "consolidated.safetensors", "consolidated.00.pth", "original/model.safetensors",
             "original/consolidated.safetensors"]  # fmt: skip
    fetched = [name for name in there if any(fnmatch(name, pattern) for pattern in ask["allow_patterns"])]
    assert [n for n in fetched if not any(fnmatch(n, pattern) for pattern in ask["ignore_patterns"])] == wanted


def test_pickles_are_fetched_only_where_there_is_nothing_better(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(tiny.weights(base), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    hub = Hub(base, monkeypatch)
    open_checkpoint("org/name@main")
    assert ["*.bin" in ask["allow_patterns"] for ask in hub.asked] == [False, True]
    assert {ask["revision"] for ask in hub.asked} == {"main"}


@pytest.mark.parametrize("ref", ["org/nowhere", "nowhere", "org/nowhere@v2"])
def test_without_the_hub_one_sentence_says_so(ref: str) -> None:
    assert refusal(Path(ref)) == (
        f"There is no folder '{ref}', and the hub cannot be reached to look for it. Name a local folder."
    )


@pytest.mark.parametrize("ref", ["./nowhere", "/no/where", "a/b/c", "~/nowhere/at/all"])
def test_a_path_is_never_looked_for_on_the_hub(ref: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(base, monkeypatch)
    with pytest.raises(UserError, match="There is no folder"):
        open_checkpoint(ref)
    assert hub.asked == []
