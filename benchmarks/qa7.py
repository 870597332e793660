"""Seven question answering tasks for T5, answered by the likeliest answer in words.

Where the test labels are hidden, the official validation set is shuffled by Python's `random.seed(42)`: its first 32
rows tune, the others report. PAWS, QuaRTz and WikiQA keep their official splits. Scores: accuracy under the first
template. The templates are our own words, not those of the published runs, so scores compare in shape only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergectl.benchmarks._contract import Part, Task, Use, tune_few
from mergectl.benchmarks._templates import ask

TITLE = "Seven question answering tasks (PAWS, QASC, QuaRTz, StoryCloze, WikiQA, Winogrande, WSC)"
PAPER = "arXiv:2410.02396"

OFFICIAL: Mapping[Use, Part] = {"fit": Part("train"), "tune": Part("validation"), "report": Part("test")}
LETTERS = tuple("ABCDEFGH")
QASC_CHOICES = "\n".join(f"({letter}) {{{letter}}}" for letter in LETTERS)
STORY = "{InputSentence1} {InputSentence2} {InputSentence3} {InputSentence4}"
ENDINGS = ("{RandomFifthSentenceQuiz1}", "{RandomFifthSentenceQuiz2}")


def spread_choices(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the row with a column for each choice, called by its letter.

    >>> spread_choices({"choices": {"text": ["rain", "sun"], "label": ["A", "B"]}})
    {'A': 'rain', 'B': 'sun'}
    """
    rest = {name: value for name, value in row.items() if name != "choices"}
    choices = row.get("choices", {"text": (), "label": ()})
    return {**rest, **dict(zip(choices["label"], choices["text"], strict=True))}


PAWS = Task(
    name="paws",
    kind="text_to_text",
    inputs=("sentence1", "sentence2"),
    label="label",
    labels=("0", "1"),
    metric="accuracy",
    parts=OFFICIAL,
    source="paws",
    config="labeled_final",
    hub="google-research-datasets/paws",
    templates=(
        ask("meaning", "{sentence1}\n{sentence2}\nDo both sentences say the same thing? yes or no", "no", "yes"),
        ask("numbered", "1. {sentence1}\n2. {sentence2}\nIs 2 just another wording of 1? yes or no", "no", "yes"),
        ask("choose", "First: {sentence1} Second: {sentence2} They are", "different", "equivalent"),
    ),
    samples=(
        {"sentence1": "The fort lies north of the town.", "sentence2": "The town lies south of the fort.", "label": 1},
        {"sentence1": "The fort lies north of the town.", "sentence2": "The town lies north of the fort.", "label": 0},
    ),
)

QASC = Task(
    name="qasc",
    kind="text_to_text",
    inputs=("question", *LETTERS),
    label="answerKey",
    labels=LETTERS,
    metric="accuracy",
    parts=tune_few("train", cut="validation"),
    source="qasc",
    hub="allenai/qasc",
    prepare=spread_choices,
    templates=(
        ask("options", f"{{question}}\nOptions:\n{QASC_CHOICES}\nAnswer:", *(f"{{{x}}}" for x in LETTERS)),
        ask("letter", f"{{question}}\n{QASC_CHOICES}\nThe right letter is", *LETTERS),
        ask("plain", "Question: {question} Answer:", *(f"{{{x}}}" for x in LETTERS)),
    ),
    samples=(
        {
            "question": "What do bees need to make honey?", "A": "sand", "B": "nectar", "C": "iron", "D": "smoke",
            "E": "salt", "F": "oil", "G": "snow", "H": "glass", "answerKey": "B",
        },
        {
            "question": "What melts ice?", "A": "shade", "B": "frost", "C": "silence", "D": "wind", "E": "paper",
            "F": "warmth", "G": "dust", "H": "night", "answerKey": "F",
        },
    ),
)  # fmt: skip

QUARTZ = Task(
    name="quartz",
    kind="text_to_text",
    inputs=("para", "question", "A", "B"),
    label="answerKey",
    labels=("A", "B"),
    metric="accuracy",
    parts=OFFICIAL,
    source="quartz",
    hub="allenai/quartz",
    prepare=spread_choices,
    templates=(
        ask("read", "Read: {para}\nThen answer: {question}\nEither {A} or {B}:", "{A}", "{B}"),
        ask("known", "It is known that: {para}\n{question} (A) {A} (B) {B}", "{A}", "{B}"),
        ask("letter", "{para}\n\n{question}\nA: {A}\nB: {B}\nThe right letter is", "A", "B"),
    ),
    samples=(
        {
            "para": "Rough ground slows a rolling ball more than smooth ground does.",
            "question": "On which ground does the ball roll further?", "A": "smooth", "B": "rough", "answerKey": "A",
        },
        {
            "para": "Plants that get more light grow faster.",
            "question": "A fern is moved into the dark. It will now grow", "A": "faster", "B": "slower",
            "answerKey": "B",
        },
    ),
)  # fmt: skip

STORY_CLOZE = Task(
    name="story_cloze",
    kind="text_to_text",
    inputs=(*(f"InputSentence{n}" for n in (1, 2, 3, 4)), "RandomFifthSentenceQuiz1", "RandomFifthSentenceQuiz2"),
    label="AnswerRightEnding",
    labels=("1", "2"),
    metric="accuracy",
    parts=tune_few("validation", cut="test"),
    source="story_cloze",
    config="2016",
    obtain=(
        "StoryCloze may not be passed on; its authors hand it out (https://cs.rochester.edu/nlp/rocstories). Of their "
        "spring 2016 files, save cloze_test_ALL_val.csv as validation.csv and cloze_test_ALL_test.csv as test.csv."
    ),
    templates=(
        ask("ending", f"{STORY}\nWhich sentence ends the story?\n- {ENDINGS[0]}\n- {ENDINGS[1]}", *ENDINGS),
        ask("continue", f"Story: {STORY}\nNext:", *ENDINGS),
        ask("better", f"{STORY}\nThe better last sentence, of '{ENDINGS[0]}' and '{ENDINGS[1]}', is", *ENDINGS),
    ),
    samples=(
        {
            "InputSentence1": "Ana planted a seed.", "InputSentence2": "She watered it each day.",
            "InputSentence3": "For weeks nothing came.", "InputSentence4": "She did not give up.",
            "RandomFifthSentenceQuiz1": "One morning a green leaf showed.",
            "RandomFifthSentenceQuiz2": "The bus was late again.", "AnswerRightEnding": 1,
        },
        {
            "InputSentence1": "Tom lost his key.", "InputSentence2": "He looked under the mat.",
            "InputSentence3": "He looked in the car.", "InputSentence4": "At last he felt in his pocket.",
            "RandomFifthSentenceQuiz1": "Tom won the chess game.",
            "RandomFifthSentenceQuiz2": "The key had been there all along.", "AnswerRightEnding": 2,
        },
    ),
)  # fmt: skip

WIKI_QA = Task(
    name="wiki_qa",
    kind="text_to_text",
    inputs=("question", "answer"),
    label="label",
    labels=("0", "1"),
    metric="accuracy",
    parts=OFFICIAL,
    source="wiki_qa",
    hub="microsoft/wiki_qa",
    templates=(
        ask("answers", "Question: {question}\nSentence: {answer}\nDoes the sentence answer it? yes or no", "no", "yes"),
        ask("asked", "Someone asks: {question} Someone says: {answer} Is that an answer? yes or no", "no", "yes"),
        ask("found", "Wanted: {question}\nFound: {answer}\nThe wanted fact is", "missing", "there"),
    ),
    samples=(
        {"question": "who wrote the anthem", "answer": "The anthem was written by a schoolteacher.", "label": 1},
        {"question": "who wrote the anthem", "answer": "The anthem is sung before matches.", "label": 0},
    ),
)

WINOGRANDE = Task(
    name="winogrande",
    kind="text_to_text",
    inputs=("sentence", "option1", "option2"),
    label="answer",
    labels=("1", "2"),
    metric="accuracy",
    parts=tune_few("train", cut="validation"),
    source="winogrande",
    config="winogrande_xl",
    hub="allenai/winogrande",
    templates=(
        ask("blank", "{sentence}\nWhat belongs in place of _? {option1} or {option2}", "{option1}", "{option2}"),
        ask("fill", "Fill the gap _ in: {sentence}\nChoose {option1} or {option2}:", "{option1}", "{option2}"),
        ask("means", "In '{sentence}' the mark _ means", "{option1}", "{option2}"),
    ),
    samples=(
        {"sentence": "The cup did not fit the box because the _ was too big.", "option1": "cup", "option2": "box",
         "answer": "1"},
        {"sentence": "The cup did not fit the box because the _ was too small.", "option1": "cup", "option2": "box",
         "answer": "2"},
    ),
)  # fmt: skip

WSC = Task(
    name="wsc",
    kind="text_to_text",
    inputs=("text", "span1_text", "span2_text"),
    label="label",
    labels=("False", "True"),
    metric="accuracy",
    parts=tune_few("train", cut="validation"),
    source="super_glue",
    config="wsc.fixed",
    hub="aps/super_glue",
    templates=(
        ask("stands", "{text}\nDoes '{span2_text}' stand for '{span1_text}' here? yes or no", "no", "yes"),
        ask("same", "{text}\n'{span1_text}' and '{span2_text}' are the same here: yes or no?", "no", "yes"),
        ask("replace", "Text: {text}\nMay '{span2_text}' be replaced by '{span1_text}'? yes or no", "no", "yes"),
    ),
    samples=(
        {"text": "Ida thanked Eve because she had helped.", "span1_text": "Eve", "span2_text": "she", "label": 1},
        {"text": "Ida thanked Eve because she was grateful.", "span1_text": "Eve", "span2_text": "she", "label": 0},
    ),
)

TASKS = (PAWS, QASC, QUARTZ, STORY_CLOZE, WIKI_QA, WINOGRANDE, WSC)
