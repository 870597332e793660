"""The alpha study in the lab: whose head a merge has, search over alpha, label maps, and what it all costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mergectl import smoke
from mergectl.checkpoints import open_checkpoint
from mergectl.evaluate import evaluate
from mergectl.lab import Lab
from mergectl.models import quiet
from mergectl.preprocess import with_inputs
from mergectl.refs import Reheaded, ref_of
from mergectl.reheading import HeadedModel
from tests.conftest import Cli

Capture = pytest.CaptureFixture[str]
Weights = dict[str, torch.Tensor]
BERT = {
    "model_type": "bert", "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12,
    "max_position_embeddings": 40, "type_vocab_size": 2,
}  # fmt: skip
TASKS = ["glue/rte", "glue/sst2", "imdb/imdb", "snli/collapse", "snli/raw"]
COSTS = {
    "flops_reference", "flops_full", "flops_reference_run", "flops_full_run", "parameters", "measured_latency_ms",
    "measured_peak_memory_mb",
}  # fmt: skip


def expert(folder: Path, task: str, layers: int, number: int) -> None:
    """A classifier of so many layers that says which task it is for."""
    tasks = Lab().tasks(TASKS)
    own = next(one for one in tasks if one.id == task)
    model = smoke._fresh(folder, {**BERT, "num_hidden_layers": layers}, own, tasks, number)
    with quiet():
        model.save_pretrained(folder)
    record = {"kind": "expert", "task": task, "labels": list(own.labels)}
    (folder / "mergectl.json").write_text(json.dumps(record))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of four layers, classifiers of two (`tiny`, `feels`) and of four layers (`whole`), and rows."""
    folder = tmp_path_factory.mktemp("made")
    tasks = Lab().tasks(TASKS)
    smoke.make_base(folder / "base", {**BERT, "num_hidden_layers": 4}, tasks, 0)
    for name, task, layers, number in (
        ("tiny", "glue/rte", 2, 1), ("feels", "glue/sst2", 2, 2), ("whole", "glue/rte", 4, 3),
    ):  # fmt: skip
        expert(folder / name, task, layers, number)
    smoke.write_rows(folder / "data", tasks)
    return folder


@pytest.fixture
def here(made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A fresh folder in which those models lie."""
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.setenv("MERGECTL_DATA", str(made / "data"))
    return tmp_path


def weights(folder: str | Path, file: str = "model.safetensors") -> Weights:
    return dict(load_file(Path(folder) / file))


def merge(cli: Cli, *words: Any, out: str = "out") -> Weights:
    assert cli("merge", "interpolate", "--layer-map", "prefix", *words, "-o", out, "--force") == 0
    return weights(out)


def head_of(folder: str, task: str = "rte") -> Weights:
    return weights(folder, f"tasks/{task}/head.safetensors")


def test_by_default_the_head_is_the_experts_own(cli: Cli, here: Path) -> None:
    merge(cli, "--base", "base", "--experts", "tiny", "--alpha", 0.3)
    tiny = weights("tiny")
    assert all(torch.equal(x, tiny[name]) for name, x in head_of("out").items())


def test_a_drawn_head_leaves_the_pooler_of_the_base(cli: Cli, here: Path) -> None:
    words = ("--base", "base", "--experts", "tiny", "--alpha", 0.3, "--head", "reference")
    got, base = merge(cli, *words, "--seed", 5), weights("base")
    changed = {name for name, x in base.items() if not torch.equal(got[name], x)}
    assert len([name for name in base if "layer.0." in name or "layer.1." in name]) == 32
    assert not any("pooler" in name or "layer.2." in name or "layer.3." in name for name in changed)
    drawn = head_of("out")
    assert not torch.equal(drawn["classifier.weight"], weights("tiny")["classifier.weight"])
    merge(cli, *words, "--seed", 5, out="again")
    merge(cli, *words, "--seed", 6, out="other")
    assert torch.equal(head_of("again")["classifier.weight"], drawn["classifier.weight"])
    assert not torch.equal(head_of("other")["classifier.weight"], drawn["classifier.weight"])
    record = json.loads(Path("out/mergectl.json").read_text())["inputs"][1]
    assert record["head"] == {"policy": "reference", "base": "base", "seed": 5}
    assert cli("merge", "--again", "out") == 0


def test_two_heads_are_interpolated_like_all_weights(cli: Cli, here: Path) -> None:
    words = ("--base", "whole", "--experts", "tiny", "--alpha", 0.25, "--head", "interpolate")
    got = merge(cli, *words)["classifier.weight"]
    whole, tiny = (weights(name)["classifier.weight"] for name in ("whole", "tiny"))
    torch.testing.assert_close(got, 0.75 * whole + 0.25 * tiny)
    assert torch.equal(head_of("out")["classifier.weight"], got)
    assert cli("merge", "--again", "out") == 0
    alone = merge(cli, *words, "--export", "rte", out="alone")
    assert torch.equal(alone["classifier.weight"], got)


def test_one_head_alone_cannot_be_interpolated(cli: Cli, here: Path, capsys: Capture) -> None:
    words = ("--base", "base", "--experts", "tiny", "--layer-map", "prefix", "--head", "interpolate", "-o", "out")
    assert cli("merge", "interpolate", *words) == 2
    sentence = "base and expert 'rte' have no head weight in common. Keep the expert's: --head small"
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(("head", "base"), [("small", "base"), ("reference", "base"), ("interpolate", "whole")])
def test_a_search_scores_what_it_writes(cli: Cli, here: Path, capsys: Capture, head: str, base: str) -> None:
    words = ["--experts", "tiny", "--base", base, "--head", head, "--layer-map", "uniform", "--trials", 3]
    assert cli("--json", "search", "interpolate", *words, "--seed", 4, "--limit", 20, "-o", "best") == 0
    told = json.loads(capsys.readouterr().out)
    task = Lab().tasks(["glue/rte"])[0]
    scored = evaluate("best", [task], split="tune", limit=20, seed=4, device="cpu")
    assert scored.mean == told["tune"]
    question = "select m.name, m.value from metrics m join runs r using (run_id) where r.kind = 'trial'"
    assert cli("--json", "report", "--sql", question) == 0
    names = [row["name"] for row in json.loads(capsys.readouterr().out)]
    assert {"accuracy", "weighted_f1", "evaluation_seconds"} <= set(names)
    assert names.count("weighted_f1") == 3


def test_the_same_seed_searches_the_same_alphas(cli: Cli, here: Path, capsys: Capture) -> None:
    def alphas(*more: Any) -> list[float]:
        words = ["--experts", "tiny", "--base", "base", "--layer-map", "prefix", "--trials", 4, "--limit", 8, "--force"]
        assert cli("--json", "search", "interpolate", *words, "-o", "best", *more) == 0
        study = json.loads(capsys.readouterr().out)["study"]
        which = f"study = '{study}' and kind = 'trial' order by trial"
        question = f"select config->>'$.settings.alpha' as a from runs where {which}"
        assert cli("--json", "report", "--sql", question) == 0
        return [float(row["a"]) for row in json.loads(capsys.readouterr().out)]

    first = alphas("--seed", 3)
    ends = alphas("--seed", 3, "--include-endpoints")
    assert all(0 <= alpha <= 1 for alpha in first)
    assert first != alphas("--seed", 2)
    assert ends == [0.0, 1.0, *first[2:]]
    both = alphas("--seed", 3, "--include-default", "--include-endpoints")
    assert both == [0.5, 0.0, 1.0, *first[3:]]


def test_workers_are_told_of_stacks_and_heads(cli: Cli, here: Path, capsys: Capture) -> None:
    from mergectl.layer_maps import mapped, parse
    from mergectl.search_jobs import _told

    layers = parse(["prefix"], "base", "reference", 7)
    _base, ((_, ref),) = mapped("base", ((None, "tiny"),), layers)
    opened = open_checkpoint(ref)
    told = _told(opened)
    assert isinstance(opened, HeadedModel)
    assert isinstance(told, dict)
    again = ref_of(json.loads(json.dumps(told)))
    assert isinstance(again, Reheaded)
    assert open_checkpoint(again).digest == opened.digest
    assert str((here / "tiny").absolute()) in str(again)


def test_an_expert_answers_the_data_sets_of_the_study(cli: Cli, here: Path, capsys: Capture) -> None:
    words = ("--base", "base", "--experts", "tiny", "feels", "--layer-map", "prefix", "-o", "out")
    assert cli("merge", "average", *words) == 0
    capsys.readouterr()
    for model, tasks in (("out", ["imdb/imdb", "snli/collapse"]), ("tiny", ["snli/raw"]), ("feels", ["imdb/imdb"])):
        assert cli("--json", "eval", model, "--on", *tasks) == 0
        assert [row["task"] for row in json.loads(capsys.readouterr().out)["tasks"]] == sorted(tasks)
    assert cli("eval", "feels", "--on", "snli/collapse") == 2
    assert "has no head for snli/collapse" in capsys.readouterr().err


def test_raw_labels_never_find_a_contradiction() -> None:
    from mergectl.benchmarks import _metrics

    raw, collapse = Lab().tasks(["snli/raw", "snli/collapse"])
    truth = [0, 0, 1, 2, 2, 2]
    for answer in (0, 1):
        logits = [[1.0 - answer, float(answer)]] * len(truth)
        assert _metrics.scores(raw, truth, logits)["accuracy"] == truth.count(answer) / 6
    assert raw.prepare is None
    assert collapse.prepare is not None
    joined = [int(collapse.prepare({"label": label})["label"]) for label in truth]
    found = _metrics.scores(collapse, joined, [[1.0, 0.0]] * 6)
    assert found["accuracy"] == pytest.approx(2 / 6)  # the share of entailment
    assert {"balanced_accuracy": 0.5, "majority": pytest.approx(4 / 6)}.items() <= found.items()


def test_mrpc_as_rte_answers_it_counts_equivalent_as_entailment(here: Path) -> None:
    from mergectl.benchmarks import _rows

    usual, turned = Lab().tasks(["glue/mrpc", "glue/mrpc_rte"])
    smoke.write_rows(Path("rows"), [usual])
    labels = [_rows.load(task, "report", data=Path("rows")).labels for task in (usual, turned)]
    assert labels[1] == [1 - label for label in labels[0]]


def test_costs_are_metrics_and_the_lengths_of_a_run_cost_less(cli: Cli, here: Path, capsys: Capture) -> None:
    assert cli("--json", "eval", "tiny", "--on", "snli/collapse", "--limit", 8, "--flops") == 0
    found = json.loads(capsys.readouterr().out)
    costs = found["costs"]["snli/collapse"]
    assert set(costs) == COSTS
    # 2 layers, width 8, inner width 12, 40 tokens: linear layers, normalisations, pooler and classifier
    macs = 2 * (4 * 64 + 2 * 96) * 40 + 5 * 40 * 8 + 64 + 16
    assert costs["flops_reference"] == 8 * 2 * macs
    assert costs["flops_full"] - costs["flops_reference"] == 8 * 2 * (2 * 2 * 40**2 * 8)
    assert 0 < costs["flops_reference_run"] < costs["flops_reference"]
    assert costs["parameters"] == sum(x.numel() for name, x in weights("tiny").items())
    assert costs["measured_latency_ms"] > 0
    assert costs["measured_peak_memory_mb"] > 1
    question = f"select count(*) as n from metrics where run_id = '{found['run']}' and name like 'flops%'"
    assert cli("--json", "report", "--sql", question) == 0
    assert json.loads(capsys.readouterr().out) == [{"n": 4}]


def test_a_merge_of_the_bases_depth_costs_what_the_base_does_and_a_small_one_less(cli: Cli, here: Path) -> None:
    def cost(folder: str) -> float:
        task = Lab().tasks(["glue/rte"])[0]
        return evaluate(folder, [task], limit=4, flops=True, device="cpu").metrics["glue/rte"]["flops_reference"]

    words = ("--base", "base", "--experts", "tiny")
    merge(cli, *words)
    merge(cli, *words, "--depth", "small", out="small")
    assert cost("out") == cost("whole")
    assert cost("small") == cost("tiny") < cost("out")


def test_token_ids_alone_are_padded_and_nothing_else_is_read(cli: Cli, here: Path, capsys: Capture) -> None:
    from mergectl.heads import open_live

    task = Lab().tasks(["glue/rte"])[0]
    live = open_live("tiny", [task], device="cpu")
    preparer = with_inputs(live.preparer_of(task.id), "ids_only")
    rows = preparer.prepare(task, {name: [task.samples[0][name]] for name in task.inputs})
    batch = preparer.stack(rows)
    assert set(batch) == {"input_ids"}
    assert batch["input_ids"].shape == (1, 40)
    assert cli("--json", "eval", "tiny", "--inputs", "ids_only") == 0
    capsys.readouterr()
    assert cli("--json", "report", "--sql", "select distinct split from metrics") == 0
    assert json.loads(capsys.readouterr().out) == [{"split": "report:ids_only"}]
    assert cli("eval", "tiny", "--inputs", "ids_onyl") == 2
    assert "Did you mean 'ids_only'?" in capsys.readouterr().err


WRONG: dict[tuple[str, ...], str] = {
    ("--head", "smal"): "head must be small, reference, interpolate, got 'smal'. Did you mean 'small'?",
    ("--alpha", "1.5"): "alpha must lie between 0.0 and 1.0, got 1.5. To go beyond the models: ",
    ("--layout", "mergelm"): "--layout must be none or merge-lm, got 'mergelm'. Did you mean 'merge-lm'?",
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_words_are_refused(cli: Cli, here: Path, capsys: Capture, words: tuple[str, ...]) -> None:
    usual = ("--base", "base", "--experts", "tiny", "--layer-map", "prefix", "-o", "out")
    assert cli("merge", "interpolate", *usual, *words) == 2
    assert WRONG[words] in capsys.readouterr().err
    assert not Path("out").exists()


def test_endpoints_are_for_samplers_that_draw(cli: Cli, here: Path, capsys: Capture) -> None:
    words = ["--experts", "tiny", "--base", "base", "--layer-map", "prefix", "--sampler", "cmaes", "-o", "best"]
    assert cli("search", "interpolate", *words, "--include-endpoints") == 2
    assert "--include-endpoints is for random and qmc, not for cmaes." in capsys.readouterr().err


def test_projections_of_a_distillation_are_noted_and_left_out(cli: Cli, here: Path, capsys: Capture) -> None:
    from safetensors.torch import save_file

    Path("more").mkdir()
    for name in ("config.json", "mergectl.json", "tokenizer.json", "tokenizer_config.json"):
        (Path("more") / name).write_bytes((here / "tiny" / name).read_bytes())
    save_file({**weights("tiny"), "fit_dense.weight": torch.ones(3, 8)}, "more/model.safetensors")
    merge(cli, "--base", "base", "--experts", "more")
    assert "'rte' holds projections of its distillation, 'fit_dense.weight': left out." in capsys.readouterr().err
    assert set(head_of("out")) == {"classifier.weight", "classifier.bias"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tinybert-sst2-imdb", "pave-emr-deberta"])
def test_a_pipeline_of_the_studies_is_tried_offline(cli: Cli, capsys: Capture, name: str) -> None:
    assert cli("run", name, "--smoke") == 0
    out = capsys.readouterr().out
    assert "interpolate" in out if name.startswith("tiny") else "pave_emr" in out


def test_the_pipelines_have_the_settings_of_the_papers() -> None:
    from mergectl import pipelines

    shares = {("ta", "roberta"): [1.0] + [0.96875] * 7, ("ta", "deberta"): [0.96875] * 8}
    for kind in ("ta", "ties", "emr"):
        for model in ("roberta", "deberta"):
            settings = pipelines.load(f"pave-{kind}-{model}", {}).settings
            assert settings["rank_scale"] == shares.get((kind, model), 0.984375 if kind == "ties" else 0.875)
            assert settings["num_ada_examples"] == 4096
            assert settings["layout"] == "merge-lm"
    kinds = ("ta-roberta", "ta-deberta", "ties-roberta", "ties-deberta")
    assert [pipelines.load(f"pave-{kind}", {}).settings["scale"] for kind in kinds] == [0.3, 0.1, 0.9, 0.5]
    picked = [pipelines.load(f"pave-emr-{model}", {}).settings["participants"] for model in ("roberta", "deberta")]
    assert picked == [["sst2", "qqp", "mnli"], ["sst2"]]
    for name in ("tinybert-sst2-imdb", "tinybert-rte-snli"):
        settings = pipelines.load(name, {}).settings
        assert (settings["trials"], settings["epochs"], settings["limit"], settings["sample"]) == (20, 3, 5000, 42)


def test_another_depth_without_a_map_is_refused_with_the_way_out(cli: Cli, here: Path, capsys: Capture) -> None:
    assert cli("merge", "interpolate", "--base", "base", "--experts", "tiny", "-o", "out") == 2
    said = capsys.readouterr().err
    assert "Those of another depth need a map: --layer-map prefix" in said
    assert said.count("\n") == 1
