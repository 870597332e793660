"""`mergectl report` in LaTeX, as one page, as pictures, run beside run, and on a narrow terminal."""

from __future__ import annotations

import html.parser
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergectl.store import Store, open_store
from tests import chromium
from tests.conftest import Cli

Capture = pytest.CaptureFixture[str]
Say = Callable[..., str]
HOSTILE = "<script>alert(1)</script>\"'&{{7*7}}|\x1b[31m\x00x"
TASKS = ("glue/rte", "glue/cola", "sentences/trec")
BASE, OWN = 0.5, 0.9


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lab made by hand: a base, three experts with curves, merges, a search, learned ranks, a failure."""
    path = tmp_path_factory.mktemp("pages") / "lab/mergectl.duckdb"
    lab = open_store(path)
    for task in TASKS:
        expert(lab, task)
    scored(lab, "base", "B", dict.fromkeys(TASKS, BASE))
    merge(lab, "average", "M1", "average", (0.5, 0.6, 0.7))
    merge(lab, "ties", "M2", "ties", (0.7, 0.6, 0.8), extra=3e7)
    merge(lab, HOSTILE, "M3", "ties", (0.6, 0.55, 0.97), note=HOSTILE)
    adarank(lab)
    searched(lab)
    with pytest.raises(RuntimeError), lab.start("merge", config={"method": "ties"}, name=f"broken {HOSTILE}"):
        raise RuntimeError(HOSTILE)
    return path


def expert(lab: Store, task: str) -> None:
    name = task.rpartition("/")[2]
    inputs = [{"role": "base", "ref": "models/base", "digest": "B"}]
    with lab.start("finetune", config={"task": task, "lr": 1e-4}, seed=0, name=name, inputs=inputs) as run:
        for step in (1, 2, 3):
            run.metric("score", 0.3 * step, task=task, split="tune", step=step)
            run.metric("loss", 1 / step, task=task, split="fit", step=step)
        run.artifact("model", f"runs/{name}", digest=f"E-{task}", bytes=int(1e8))
    scored(lab, name, f"E-{task}", {task: OWN})


def scored(lab: Store, name: str, digest: str, scores: dict[str, float]) -> None:
    config = {"model": name, "on": list(scores), "digest": digest}
    with lab.start("eval", config=config, name=f"{name}@report") as run:
        run.input("model", f"models/{name}", digest=digest)
        for task, score in scores.items():
            run.metric("score", score, task=task, split="report")


def merge(lab: Store, name: str, digest: str, method: str, scores: tuple[float, ...], **facts: Any) -> None:
    config = {"method": method, "settings": {"scale": facts.get("note", 0.5)}, "name": name}
    with lab.start("merge", config=config, seed=1, name=name, command=["mergectl", "merge", method, name]) as run:
        run.input("base", "models/base", digest="B")
        for task in TASKS:
            run.input("expert", f"runs/{task}", digest=f"E-{task}", task=task)
        run.artifact("model", f"m/{name}", digest=digest, bytes=int(1e8 + facts.get("extra", 0)))
    scored(lab, name, digest, dict(zip(TASKS, scores, strict=True)))


def adarank(lab: Store) -> None:
    with lab.start("merge", config={"method": "adarank"}, name="adapted") as run:
        for step in (10, 20):
            for layer in (2, 10):
                for task in TASKS[:2]:
                    run.metric(f"kept_rank:layer.{layer}.weight", layer + step, task=task, step=step)


def searched(lab: Store) -> None:
    for trial in range(8):
        config = {"method": "ties", "settings": {"scale": 0.1 * trial, "density": 0.02 * (trial * 3 % 8)}}
        with lab.start("trial", config=config, study="ties-study", trial=trial) as run:
            run.metric("mean_score", 0.5 + 0.01 * (trial % 5), split="tune")
            for task in TASKS:
                run.metric("score", 0.5 + 0.01 * (trial % 5), task=task, split="tune")


@pytest.fixture
def say(cli: Cli, capsys: Capture, store: Path) -> Say:
    def said(*words: object) -> str:
        capsys.readouterr()
        assert cli("report", "--store", store, *words) == 0
        return capsys.readouterr().out

    return said


@pytest.fixture(scope="module")
def page(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mergectl.cli import main

    path = tmp_path_factory.mktemp("page") / "out.html"
    assert main(["report", "--store", str(store), "--html", str(path)]) == 0
    return path


class Reader(html.parser.HTMLParser):
    """What a page is made of: tags with their attributes, and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def read(page: Path) -> Reader:
    return Reader(page.read_text(encoding="utf-8"))


def test_nothing_a_name_holds_becomes_markup(page: Path, read: Reader) -> None:
    assert len(read.named("script")) == 1
    assert not [name for _, attributes in read.tags for name in attributes if name.startswith("on")]
    assert any("<script>alert(1)</script>\"'&{{7*7}}|" in text for text in read.texts)
    assert not set(page.read_text(encoding="utf-8")) & {"\x00", "\x1b"}


def test_the_page_asks_for_nothing_outside_itself(page: Path, read: Reader) -> None:
    policy = next(m["content"] or "" for m in read.named("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")
    sources = [value or "" for _, facts in read.tags for key, value in facts.items() if key in ("src", "href")]
    assert {source[:1] for source in sources} <= {"#", "d"}
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", page.read_text(encoding="utf-8"))


def test_every_section_of_the_lab_is_on_the_page(read: Reader) -> None:
    sections = [section["id"] for section in read.named("section")]
    assert sections == [
        "leaderboard", "experts", "cost", "searches", "learned", "curves", "lineage", "differences", "provenance",
    ]  # fmt: skip
    links = {link["href"] for link in read.named("a")}
    assert {f"#{name}" for name in sections} <= links
    targets = {facts.get("id") for _, facts in read.tags}
    assert {str(link)[1:] for link in links} <= targets


def test_every_picture_says_what_it_shows_and_has_its_numbers_beside_it(page: Path, read: Reader) -> None:
    drawn = [svg for svg in read.named("svg") if svg.get("role") == "img"]
    assert len(drawn) >= 7
    assert all(svg["aria-label"] for svg in drawn)
    figures = re.findall(r"<figure.*?</figure>", page.read_text(encoding="utf-8"), flags=re.S)
    assert len(figures) > len(drawn)
    assert all("<table" in figure for figure in figures)


def test_the_table_can_be_sorted_by_buttons_that_are_buttons(read: Reader, page: Path) -> None:
    heads = re.findall(r"<th scope=\"col\" class=\"\w*\">(<button.*?</button>)</th>", page.read_text(encoding="utf-8"))
    assert [re.sub("<.*?>", "", head) for head in heads] == [
        "model", "method", "cola", "rte", "trec", "mean", "of expert", "normalised", "stored, MB", "time", "run",
    ]  # fmt: skip


def test_means_and_shares_on_the_page_are_right_by_hand(page: Path) -> None:
    row = re.search(r"<th scope=\"row\">ties</th>(.*?)</tr>", page.read_text(encoding="utf-8"), flags=re.S)
    assert row is not None
    cells = [re.sub("<.*?>", "", cell).strip() for cell in re.findall(r"<td.*?</td>", row[1], flags=re.S)]
    assert cells[1:8] == [
        "60.0 (best)", "70.0 (best)", "80.0 (second)", "70.0 (second)", "77.8 (second)", "50.0 (second)", "130.0",
    ]  # fmt: skip


def test_learned_ranks_are_the_last_ones_from_input_to_output(page: Path) -> None:
    found = re.search(r"Ranks learned by adapted.*?</figure>", page.read_text(encoding="utf-8"), flags=re.S)
    assert found is not None
    rows = re.findall(r"<th scope=\"row\">(layer.*?)</th><td.*?>(.*?)</td>", found[0])
    assert rows == [("layer.2", "22"), ("layer.10", "30")]


def test_a_page_is_written_whole_or_not_at_all(
    cli: Cli, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out.html").write_text("before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mergectl.artefacts.sync", full)
    assert cli("report", "--store", store, "--html", "out.html") == 1
    assert (tmp_path / "out.html").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.html"]


def test_an_empty_lab_gives_a_page_that_says_what_to_do(cli: Cli, tmp_path: Path) -> None:
    with open_store("lab/mergectl.duckdb").start("run", config={}):
        pass
    assert cli("report", "--html", "deep/out.html") == 0
    assert "No scores on <b>report</b> yet" in Path("deep/out.html").read_text(encoding="utf-8")


def test_latex_marks_the_best_bold_and_the_second_underlined(say: Say) -> None:
    lines = say("--latex").splitlines()
    assert lines[1:3] == [r"\begin{tabular}{lrrrrr}", r"\toprule"]
    assert r"Base & 50.0 & 50.0 & 50.0 & 50.0 & 0.0 \\" in lines
    assert r"Individual experts & 90.0 & 90.0 & 90.0 & 90.0 & 100.0 \\" in lines
    ties = next(line for line in lines if line.startswith("ties &"))
    assert ties == (r"ties & \textbf{60.0} & \textbf{70.0} & \underline{80.0} & \underline{70.0} & \underline{50.0} \\")
    average = next(line for line in lines if line.startswith("average &"))
    assert average == r"average & \textbf{60.0} & 50.0 & 70.0 & 60.0 & 25.0 \\"
    assert lines[-2:] == [r"\bottomrule", r"\end{tabular}"]


def test_latex_of_any_question_escapes_what_is_special(say: Say) -> None:
    out = say("--sql", r"select 'a_b & 50% $x$ #1 {y} \z ~^' as w, 0.5 as v", "--latex")
    assert r"a\_b \& 50\% \$x\$ \#1 \{y\} \textbackslash{}z \textasciitilde{}\textasciicircum{} & 0.5 \\" in out
    assert out.startswith(r"\begin{tabular}{lr}")


def test_runs_side_by_side_show_what_differs_and_say_how_much_is_alike(say: Say) -> None:
    out = say("--compare", "average", "ties")
    assert re.search(r"│ method +│ average +│ ties +│", out)
    assert not re.search(r"│ settings.scale ", out)
    assert re.search(r"\d+ more facts are the same", out)
    whole = say("--compare", "average", "ties", "--csv").splitlines()
    assert any(line.startswith("setting,settings.scale,0.5,0.5") for line in whole)


def test_one_run_cannot_be_compared_with_itself(cli: Cli, capsys: Capture, store: Path) -> None:
    assert cli("report", "--store", store, "--compare", "ties") == 2
    assert "two different runs" in capsys.readouterr().err
    assert cli("report", "--store", store, "--compare", "ties", "nothing") == 2
    assert "No run 'nothing'" in capsys.readouterr().err


def test_a_run_shows_its_curves_parents_and_scores(say: Say) -> None:
    out = say("rte")
    assert re.search(r"│ loss +│ glue/rte │ fit +│ █▃▁ +│ +1 │ +0.333 │", out)
    assert re.search(r"│ base +│ –.*│ models/base │ B", out)
    assert re.search(r"│ glue/rte │ report │ +90.0 │ +100.0 │ +100.0 │ ██████████ │", out)
    assert re.search(r"│ glue/cola │ ▁█ ", say("adapted"))


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("mergectl.terminal.width", lambda: 80)
    monkeypatch.setattr("mergectl.board_text.width", lambda: 80)
    return 80


def test_a_narrow_terminal_gets_every_score_on_lines_that_fit(say: Say, narrow: int) -> None:
    out = say()
    assert max(map(len, out.splitlines())) <= narrow
    words = out.split()
    assert {"rte", "cola", "trec", "mean", "60.0", "70.0", "80.0", "97.0"} <= set(words)
    assert "███···" in out  # ties lies halfway between base and experts, with or without colours


def test_bars_and_curves_stay_within_their_length() -> None:
    from mergectl.terminal import bar, sparkline

    assert [bar(share, 4) for share in (-1.0, 0.0, 0.5, 1.0, 7.0, None)] == ["····", "····", "██··", "████", "████", ""]
    assert bar(0.53125, 4) == "██▏·"
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert sparkline(list(map(float, range(1000))), 8) == "▁▂▃▄▅▆▇█"


@pytest.mark.slow
def test_pictures_for_papers_are_drawn(say: Say, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    names = {Path(line).name for line in say("--svg", "svg", "--png", "png").splitlines()}
    for stem in ("mean-score", "heat-map", "mean-score-against-storage", "ties-study-history", "loss-on-fit"):
        assert {f"{stem}.svg", f"{stem}.png"} <= names
    assert {path.name for path in (tmp_path / "svg").iterdir()} == {name for name in names if name.endswith(".svg")}
    assert (tmp_path / "png/heat-map.png").read_bytes().startswith(b"\x89PNG")
    assert "77.8" in (tmp_path / "svg/heat-map.svg").read_text(encoding="utf-8")


def test_without_matplotlib_the_way_out_is_said(
    cli: Cli, capsys: Capture, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli("report", "--store", store, "--png", "png") == 2
    assert "pip install 'mergectl[plots]'" in capsys.readouterr().err
    assert not Path("png").exists()


REFUSED = {
    "a folder": (["--html", "."], "must name a file that ends in .html"),
    "another kind": (["--html", "out.pdf"], "--html out.pdf must name a file that ends in .html."),
    "no such study": (["--html", "out.html", "--study", "zzz"], "No study 'zzz'"),
    "no such run": (["--html", "out.html", "--compare", "zzz"], "No run 'zzz'"),
    "two forms": (["--latex", "--md"], "--md and --latex exclude each other."),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_written(cli: Cli, capsys: Capture, store: Path, what: str) -> None:
    words, sentence = REFUSED[what]
    assert cli("report", "--store", store, *words) == 2
    assert sentence in capsys.readouterr().err
    assert not Path("out.html").exists()


def test_pages_are_part_of_the_package() -> None:
    import tomllib

    root = Path(__file__).parent.parent
    data = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    assert "pages/*" in data["mergectl"]
    assert {path.name for path in (root / "mergectl/pages").iterdir()} == {"report.html", "report.css", "report.js"}


@pytest.mark.skipif(chromium.PROGRAM is None, reason="no Chromium is installed")
def test_a_browser_shows_the_page_on_phones_and_desks_by_day_and_night(page: Path, tmp_path: Path) -> None:
    with chromium.Page(tmp_path / "profile") as browser:
        for width in (390, 1280):
            backgrounds = set()
            for scheme in ("light", "dark"):
                browser.open(page, width, scheme=scheme)
                assert browser.value("document.documentElement.scrollWidth") == width
                backgrounds.add(browser.value("getComputedStyle(document.body).backgroundColor"))
            assert len(backgrounds) == 2
        column = "[...document.querySelectorAll('#board-1 tbody.ranked tr')].map(row => row.cells[5].dataset.sort)"
        order = "document.querySelector('#board-1 th[aria-sort]').getAttribute('aria-sort')"
        browser.value("document.querySelectorAll('#board-1 thead button')[5].focus()")
        for key, word in (("Enter", "descending"), (" ", "ascending")):
            browser.press(key)
            means = [float(text) for text in browser.value(column)]
            assert (browser.value(order), means) == (word, sorted(means, reverse=word == "descending"))
        browser.press("Tab")
        assert browser.value("document.activeElement.textContent") == "of expert"
        assert browser.value("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        run = browser.value("document.querySelector('#board-1 tbody.ranked a').click(), location.hash.slice(1)")
        assert browser.value(f"document.getElementById('{run}').open")
        assert browser.complaints == []
        assert {address for address in browser.asked if not address.startswith("data:")} == {page.as_uri()}


def test_importance_is_for_high_scores_not_for_low_ones() -> None:
    import random

    import optuna

    from mergectl.study_report import document

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize")
    study.set_user_attr("objectives", ["mean"])
    draw, span = random.Random(0), {name: optuna.distributions.FloatDistribution(0, 1) for name in ("lifts", "ruins")}
    for number in range(200):
        params = {name: draw.random() for name in span}
        score = float(params["lifts"] > 0.8) - float(params["ruins"] > 0.8) + 0.1 * draw.random()
        facts = {"candidate": number}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=span, value=score, user_attrs=facts))
    shares = document(study)["importance"]["mean"]
    assert shares["lifts"] > 2 * shares["ruins"]
