"""Eleven tasks held out from T0's training, answered by the likeliest answer in words.

The official validation set is shuffled by Python's `random.seed(42)`: its first 32 rows tune, the others report. ANLI
cuts its dev sets so and reports on its test sets. A task's score is the median over its templates, which are our own
words, not those of the published runs, so scores compare in shape only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mergectl.benchmarks._contract import Task, Template, tune_few
from mergectl.benchmarks._templates import ask
from mergectl.benchmarks.qa7 import STORY_CLOZE, WINOGRANDE, WSC

TITLE = "Tasks held out from T0 (RTE, CB, Winogrande, WiC, WSC, COPA, HellaSwag, StoryCloze, ANLI)"
PAPER = "arXiv:2205.05638"

PAIR = ("premise", "hypothesis")
LINKS = {"cause": "This came about because:", "effect": "As a result:"}
COPA_CHOICES = ("{choice1}", "{choice2}")
SCENES = ("{ending0}", "{ending1}", "{ending2}", "{ending3}")


def inference(*order: int) -> tuple[Template, ...]:
    """Return templates of inference whose answers (follows, open, contradicts) stand in the order of a task's ids.

    >>> inference(0, 2)[0].ask({"premise": "It rained.", "hypothesis": "It was wet."})
    ('It rained.\\nDoes the next line follow? yes or no\\nIt was wet.', ('yes', 'no'))
    """

    def answers(*words: str) -> list[str]:
        return [words[place] for place in order]

    three = "yes, maybe or no" if 1 in order else "yes or no"
    return (
        ask("follows", f"{{premise}}\nDoes the next line follow? {three}\n{{hypothesis}}",
            *answers("yes", "maybe", "no")),
        ask("given", f"Given: {{premise}}\nClaim: {{hypothesis}}\nIs the claim right? {three}",
            *answers("yes", "maybe", "no")),
        ask("read", "After reading '{premise}', one would say that '{hypothesis}' is",
            *answers("true", "uncertain", "false")),
        ask("sure", f"{{premise}} Can we then be sure of '{{hypothesis}}'? {three}", *answers("yes", "maybe", "no")),
    )  # fmt: skip


def link_choices(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the row of COPA with the words that lead from the premise to a choice.

    >>> link_choices({"question": "effect"})["link"]
    'As a result:'
    """
    return {"link": LINKS.get(row["question"]), **row}


def spread_endings(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the row of HellaSwag with a column for each ending.

    >>> spread_endings({"endings": ["he sits", "he runs"]})
    {'ending0': 'he sits', 'ending1': 'he runs'}
    """
    rest = {name: value for name, value in row.items() if name != "endings"}
    return {**rest, **{f"ending{n}": text for n, text in enumerate(row.get("endings", ()))}}


RTE = Task(
    name="rte",
    kind="text_to_text",
    inputs=PAIR,
    label="label",
    labels=("entailment", "not_entailment"),
    metric="accuracy",
    parts=tune_few("train", cut="validation"),
    source="super_glue",
    config="rte",
    hub="aps/super_glue",
    templates=inference(0, 2),
    pool="median",
    samples=(
        {"premise": "The king died in Paris in 1610.", "hypothesis": "The king is dead.", "label": 0},
        {"premise": "The king went to Paris.", "hypothesis": "The king was ill.", "label": 1},
    ),
)

CB = replace(
    RTE,
    name="cb",
    labels=("entailment", "contradiction", "neutral"),
    config="cb",
    templates=inference(0, 2, 1),
    samples=(
        {"premise": "He knew that the shop was shut.", "hypothesis": "the shop was shut", "label": 0},
        {"premise": "I doubt that the shop was shut.", "hypothesis": "the shop was shut", "label": 1},
    ),
)

WIC = replace(
    RTE,
    name="wic",
    inputs=("word", "sentence1", "sentence2"),
    labels=("False", "True"),
    config="wic",
    templates=(
        ask("sense", "{sentence1}\n{sentence2}\nHas '{word}' one sense in both? yes or no", "no", "yes"),
        ask("word", "Word: {word}\n1. {sentence1}\n2. {sentence2}\nIs its meaning the same? yes or no", "no", "yes"),
        ask("used", "In '{sentence1}' and '{sentence2}' the word '{word}' is used in", "two senses", "one sense"),
    ),
    samples=(
        {"word": "bank", "sentence1": "The bank lent him money.", "sentence2": "Ask your bank.", "label": 1},
        {"word": "bank", "sentence1": "The bank lent him money.", "sentence2": "We sat on the bank.", "label": 0},
    ),
)

COPA = replace(
    RTE,
    name="copa",
    inputs=("premise", "choice1", "choice2", "question", "link"),
    labels=("choice1", "choice2"),
    config="copa",
    prepare=link_choices,
    templates=(
        ask("choose", "{premise}\nWhich is the likelier {question}?\n- {choice1}\n- {choice2}", *COPA_CHOICES),
        ask("link", "{premise} {link}", *COPA_CHOICES),
        ask("name", "Name the {question} of this: {premise} Choose: {choice1} Or: {choice2}", *COPA_CHOICES),
    ),
    samples=(
        {"premise": "The lamp went out.", "choice1": "The power failed.", "choice2": "The sun rose.",
         "question": "cause", "link": LINKS["cause"], "label": 0},
        {"premise": "The glass fell.", "choice1": "It sang.", "choice2": "It broke.",
         "question": "effect", "link": LINKS["effect"], "label": 1},
    ),
)  # fmt: skip

HELLASWAG = replace(
    RTE,
    name="h-swag",
    inputs=("activity_label", "ctx", "ending0", "ending1", "ending2", "ending3"),
    labels=("0", "1", "2", "3"),
    source="hellaswag",
    config="default",
    hub="Rowan/hellaswag",
    prepare=spread_endings,
    templates=(
        ask("continue", "{ctx}\nHow does it go on?\n- " + "\n- ".join(SCENES) + "\nIt goes on:", *SCENES),
        ask("plain", "{activity_label}: {ctx}", *SCENES),
        ask("scene", "A scene about '{activity_label}' begins: {ctx}\nIt ends:", *SCENES),
    ),
    samples=(
        {"activity_label": "Baking", "ctx": "She opens the oven and", "ending0": "takes out the bread.",
         "ending1": "climbs the mast.", "ending2": "reads the tide.", "ending3": "tunes it.", "label": "0"},
        {"activity_label": "Rowing", "ctx": "The crew grips the oars and", "ending0": "butters them.",
         "ending1": "paints a fence.", "ending2": "pulls as one.", "ending3": "sleeps.", "label": "2"},
    ),
)  # fmt: skip


def _anli(number: int) -> Task:
    return replace(
        RTE,
        name=f"anli-r{number}",
        labels=("entailment", "neutral", "contradiction"),
        parts=tune_few(f"train_r{number}", cut=f"dev_r{number}", report=f"test_r{number}"),
        source="anli",
        config="plain_text",
        hub="facebook/anli",
        templates=inference(0, 1, 2),
        samples=(
            {"premise": "The ferry sails at noon and at six.", "hypothesis": "It sails twice a day.", "label": 0},
            {"premise": "The ferry sails at noon and at six.", "hypothesis": "It never sails.", "label": 2},
        ),
    )


TASKS = (
    RTE,
    CB,
    replace(WINOGRANDE, pool="median"),
    WIC,
    replace(WSC, pool="median"),
    COPA,
    HELLASWAG,
    replace(STORY_CLOZE, pool="median"),
    _anli(1),
    _anli(2),
    _anli(3),
)
