"""A lab in which the docs' commands can be run: tiny models under the names that the docs use, and sample rows."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergectl import smoke
from mergectl.cli import main
from mergectl.lab import Lab
from mergectl.models import quiet

ROOT = Path(__file__).parent.parent
PAGES = {
    path.name: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
NEEDS = re.compile(r"needs (the hub|a GPU|a server|the authors' files)|in (your shell)")  # said of what is not run
PATTERN = re.compile(r"\.\.\.|\b(METHOD|VERB|NAME|OTHER)\b")  # a form of commands, not one

ROBERTA = {
    "model_type": "roberta", "hidden_size": 8, "num_hidden_layers": 12, "num_attention_heads": 2,
    "intermediate_size": 12, "max_position_embeddings": 140,
}  # fmt: skip
T5 = {
    "model_type": "t5", "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 2,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "bos_token_id": 1, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 64}
SHAPE = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CLIP = {
    "model_type": "clip", "projection_dim": 8, "text_config": {**SHAPE, "max_position_embeddings": 32},
    "vision_config": {**SHAPE, "image_size": 16, "patch_size": 8},
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One family of models: its configuration, the names of its base, tasks with an expert, further tasks with rows."""

    config: dict[str, Any]
    bases: tuple[str, ...]
    experts: tuple[str, ...]
    others: tuple[str, ...] = ()


KINDS = {
    "text": Kind(
        ROBERTA,
        (
            "roberta-base",
            "roberta-large",
            "bert-base-uncased",
            "sentence-transformers/all-MiniLM-L6-v2",
            "BASE",
            "base",
        ),
        ("glue/rte", "glue/cola", "glue/sst2", "sentences/trec"),
        ("glue", "imdb/imdb"),
    ),
    "t5": Kind(T5, ("google/t5-v1_1-base",), ("glue-t5/cola", "glue-t5/rte")),
    "gpt2": Kind(GPT2, ("openai-community/gpt2",), ("glue7/cola", "glue7/rte"), ("glue7",)),
    "clip": Kind(CLIP, ("openai/clip-vit-base-patch32",), ("vision8/mnist", "vision8/svhn")),
}


@dataclass(frozen=True)
class Command:
    """A command of the docs: where it stands, its line, and what it needs that a test has not."""

    page: str
    line: str
    needs: str | None

    @property
    def kind(self) -> str:
        """The family of models that it is about."""
        if self.page == "medusa.md" or "t5" in self.line.replace("pcb-t5", ""):
            return "t5"
        return {"glue.md": "gpt2", "vision.md": "clip"}.get(self.page, "text")


def commands() -> list[Command]:
    """Every command of the docs: lines of blocks, and words in code within the text that hold a whole one."""
    found = []
    for page, text in PAGES.items():
        for part in re.split(r"\n\s*\n", text):
            marked = NEEDS.search("".join(re.findall(r"<!--.*?-->", part, flags=re.S)))
            for line in part.replace("\\\n", " ").splitlines():
                needs = marked or NEEDS.search(line)
                found += [Command(page, one, needs[0] if needs else None) for one in _in(line)]
    return found


def _in(line: str) -> list[str]:
    bare = re.sub(r"^(\$ |exec )", "", line.strip())
    if bare.startswith("mergectl ") and not bare.startswith("mergectl is"):
        lines = [re.split(r"  #|  +\(", bare)[0].strip()]
    else:
        spans: list[str] = re.findall(r"`(mergectl [^`]+)`", line)
        lines = [span for span in spans if " -" in span or span.startswith("mergectl run ")]
    return [re.sub(r"\s+", " ", one) for one in lines if not PATTERN.search(one)]


def make(folder: Path, kind: Kind) -> None:
    """Fill the present folder: bases under all their names, rows, experts, and a scored merge of them."""
    tasks = Lab().tasks([*kind.experts, *kind.others])
    smoke.write_rows(folder / "data", tasks)
    for name in kind.bases:
        smoke.make(folder / name, kind.config, tasks, 0)
    base = kind.bases[0]
    run(["finetune", *kind.experts, "--base", base, "--max-steps", "2", "--quiet"])
    experts = [f"runs/{task.split('/')[1]}" for task in kind.experts]
    run(["merge", "average", "--base", base, "--experts", *experts, "-o", "merged"])
    run(["eval", "merged", "--references"])


def run(words: list[str]) -> None:
    """Run a command that must work."""
    code = main([*words])
    assert code == 0, f"mergectl {shlex.join(words)} ended with exit code {code}"


SHORTER = (  # the same command on less work
    (r"--(steps|trials|limit|max-steps|eval-every) \d+", r"--\1 2"),
    (r"--population \d+", "--population 4"),
    (r"--num-ada-examples \d+", "--num-ada-examples 64"),
    (r"( merge ada\w+)(?!.* --steps)", r"\1 --steps 2"),
    (r"--epochs \d+", "--epochs 1"),
    (r"--workers \d+", "--workers 2"),
    (r"(--preset medusa)", r"\1 --max-steps 2"),
    (r"(--preset vision)", r"\1 --epochs 1 --max-steps 2"),
    (r"run digits$", "run digits --set trials=1 --set pretraining=1 --set epochs=1"),
)
STANDS_FOR = (  # words of the docs that a reader replaces
    (r"/shared/studies|\$STUDIES", "studies"),
    (r"\bSTUDY\b", "best-study"),
    (r"\b(MERGED|FOLDER)\b", "merged"),
    (r"--experts A B\b", "--experts runs/cola runs/rte"),
)


def words_of(line: str, kind: str) -> list[str]:
    """A command's words, with less work and the toy lab's names in it, patterns of files as the shell gives them."""
    for found, instead in (*SHORTER, *STANDS_FOR):
        line = re.sub(found, instead, line)
    if kind == "t5":
        line = re.sub(r"\bBASE\b", KINDS[kind].bases[0], line)
    words = shlex.split(line)[1:]
    return [one for word in words for one in (sorted(str(path) for path in Path().glob(word)) or [word])]


def prepare(line: str, kind: str) -> None:
    """Put into the present folder what a command finds there beside experts and a merge, and remove what it writes."""
    for needed, do in BEFORE.items():
        if re.search(needed, line):
            do(kind)
    written = re.search(r" -o (\S+)", line)
    if written:
        shutil.rmtree(written[1], ignore_errors=True)
    if " finetune " in line:
        shutil.rmtree("runs")


def _blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], flags=re.S)


def _copies(*names: str) -> Callable[[str], None]:
    def do(kind: str) -> None:
        own = [task.split("/")[1] for task in KINDS[kind].experts]
        for name in names:
            source = next((task for task in own if name.endswith(task) or f"/{task}-" in name), own[0])
            shutil.copytree(f"runs/{source}", name)

    return do


def _shallow(_: str) -> None:
    """A classifier of six layers, with the vocabulary of the others."""
    tasks = Lab().tasks([*KINDS["text"].experts, *KINDS["text"].others])
    model = smoke._fresh(Path("runs/tiny"), ROBERTA | {"num_hidden_layers": 6}, tasks[0], tasks, 1)
    with quiet():
        model.save_pretrained("runs/tiny")
    record = {"kind": "expert", "task": "glue/rte", "labels": list(tasks[0].labels)}
    Path("runs/tiny/mergectl.json").write_text(json.dumps(record))


def _population(_: str) -> None:
    """Two experts in the folders of a public population, with the vocabulary of the others."""
    tasks = Lab().tasks([*KINDS["text"].experts, *KINDS["text"].others])
    for number, task in enumerate(tasks[:2], 1):
        smoke._make_expert(Path("glue_ckpts") / task.name / "roberta-base_lr1e-05", ROBERTA, task, tasks, number)


def _recipe(_: str) -> None:
    """README's recipe, and one of mergekit's."""
    text = next(block for block in _blocks("README.md", "yaml") if block.startswith("method:"))
    Path("recipe.yaml").write_text(text)
    kit = {
        "merge_method": "linear",
        "models": [{"model": f"runs/{n}", "parameters": {"weight": 1}} for n in ("rte", "cola")],
    }
    Path("recipe.yml").write_text(json.dumps(kit))
    shutil.rmtree("merged", ignore_errors=True)


def _tickets(_: str) -> None:
    text = next(block for block in _blocks("README.md", "yaml") if "tickets" in block)
    Path("tasks.yaml").write_text(text)
    rows = [f"printer {n},it is on fire,{('no', 'yes')[n % 2]}" for n in range(40)]
    for name in ("train.csv", "test.csv"):
        Path(name).write_text("\n".join(["subject,body,urgent", *rows]))


def _hotels(_: str) -> None:
    import pandas

    Path("lab/benchmarks").mkdir(parents=True, exist_ok=True)
    Path("lab/benchmarks/hotels.py").write_text(_blocks("benchmarks.md", "python")[0])
    rows = Path("data/hotels/default")
    rows.mkdir(parents=True)
    for split in ("train", "test"):
        reviews = {"review": ["good stay", "cold room"] * 32, "label": [1, 0] * 32}
        pandas.DataFrame(reviews).to_parquet(rows / f"{split}.parquet")


def _own_method(_: str) -> None:
    Path("lab/methods").mkdir(parents=True, exist_ok=True)
    code = _blocks("methods.md", "python")[0]
    Path("lab/methods/consensus_min.py").write_text(code)


def _adapters(_: str) -> None:
    shutil.rmtree("runs")
    base = KINDS["t5"].bases[0]
    run(["finetune", "glue-t5/cola", "glue-t5/rte", "--base", base, "--max-steps", "2", "--peft", "lora", "--quiet"])


def _study(name: str, *options: str) -> Callable[[str], None]:
    def do(kind: str) -> None:
        experts = [f"runs/{task.split('/')[1]}" for task in KINDS[kind].experts]
        words = ["--base", KINDS[kind].bases[0], "--experts", *experts, "-o", "best", "--trials", "2", "--study", name]
        run(["search", "task_arithmetic", *words, *options, "--quiet"])

    return do


def _adapted(_: str) -> None:
    shutil.rmtree("merged")
    run(
        [
            "merge",
            "adarank",
            "--base",
            "roberta-base",
            "--experts",
            "runs/rte",
            "runs/cola",
            "-o",
            "merged",
            "--steps",
            "1",
        ]
    )


def _tone(kind: str) -> None:
    run(["finetune", "hotels/tone", "--base", KINDS[kind].bases[3], "--data", "data", "--max-steps", "2", "--quiet"])


BEFORE: dict[str, Callable[[str], object]] = {
    r"runs/tiny": _shallow,
    r"glue_ckpts": _population,
    r"-c recipe": _recipe,
    r"files/tickets": _tickets,
    r"hotels/": _hotels,
    r"eval runs/tone": _tone,
    r"consensus_min": _own_method,
    r"/adapter ": _adapters,
    r"start-from=merged": _adapted,
    r"org/some-model": _copies("org/some-model", "org/another"),
    r"tanganke/gpt2": _copies("tanganke/gpt2_cola", "tanganke/gpt2_rte"),
    r"tanganke/clip": _copies("tanganke/clip-vit-base-patch32_mnist", "tanganke/clip-vit-base-patch32_svhn"),
    r"runs/rte-lr1e-05-seed0": _copies("runs/rte-lr1e-05-seed0", "runs/rte-lr1e-05-seed1"),
    r"STUDY|--join best-study": _study("best-study"),
    r"--join pcb1": _study("pcb1", "--study-storage", "studies"),
    r"other-lab": lambda _: shutil.copytree("lab", "../other-lab"),
    r"--import backup": lambda _: run(["report", "--export", "backup"]),
}
