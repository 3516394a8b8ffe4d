"""Templates of prompts: the texts that rows become, and which candidate is right."""

import pytest

from gossamer.algorithms.tasks.templates import Prompt, find_template

PREMISE = {"premise": "The cat sleeps.", "hypothesis": "A cat rests."}
PAIR = {"word": "bank", "sentence1": "A river bank.", "sentence2": "The bank paid."}
PRONOUN = {"text": "Ann met Eve. She left.", "span1_text": "Ann", "span2_text": "She"}
COPA = {"premise": "It rained.", "choice1": "The grass got wet.", "choice2": "I ran."}
BLANK = {"sentence": "Ann beat Eve so _ won.", "option1": "Ann", "option2": "Eve"}
ANSWER = {"paragraph": "Ann ran.", "question": "Who ran?", "answer": "Ann"}
STORY = {
    "passage": "Ann met Eve.\n@highlight\nThey spoke.\n@highlight\nEve left.",
    "query": "Then @placeholder saw @placeholder.",
    "entities": ["Ann", "Eve", "Ann", "Ms Eve"],
}
ARTICLE = {"title": "Runs", "context": "Ann {A} ran. ", "question": " Who ran?"}
COUNT = {"passage": "He ran 2 miles.", "question": "How many miles? "}


@pytest.mark.parametrize(
    ("name", "version", "row", "texts", "gold"),
    [
        (
            "sst2",
            0,
            {"sentence": "a fine film ", "label": 1},
            ["a fine film It was |terrible", "a fine film It was |great"],
            1,
        ),
        (
            "sst2",
            1,
            {"sentence": "a fine film ", "label": 0},
            ["a fine film |terrible", "a fine film |great"],
            0,
        ),
        (
            "rte",
            0,
            PREMISE | {"label": 0},
            [
                'The cat sleeps.\nDoes this mean that "A cat rests." is true? Yes or No?\n|' + word
                for word in ("Yes", "No")
            ],
            0,
        ),
        (
            "rte",
            1,
            PREMISE | {"label": 1},
            ['The cat sleeps.\n"A cat rests."\n|' + word for word in ("Yes", "No")],
            1,
        ),
        (
            "cb",
            0,
            PREMISE | {"label": 2},
            [
                'Suppose The cat sleeps. Can we infer that "A cat rests."? Yes, No, or Maybe?\n|'
                + word
                for word in ("Yes", "No", "Maybe")
            ],
            2,
        ),
        (
            "boolq",
            0,
            {"passage": "Cats sleep.", "question": "do cats sleep", "label": 1},
            ["Cats sleep. Do cats sleep?\n|No", "Cats sleep. Do cats sleep?\n|Yes"],
            1,
        ),
        (
            "wsc",
            0,
            PRONOUN | {"label": 0},
            [
                "Ann met Eve. She left.\nIn the previous sentence, does the pronoun "
                f'"she" refer to Ann? Yes or No?\n|{word}'
                for word in ("No", "Yes")
            ],
            0,
        ),
        (
            "wic",
            0,
            PAIR | {"label": 0},
            [
                'Does the word "bank" have the same meaning in these two sentences? Yes, No?\n'
                f"A river bank.\nThe bank paid.\n|{word}"
                for word in ("No", "Yes")
            ],
            0,
        ),
        (
            "multirc",
            0,
            ANSWER | {"label": 1},
            [
                'Ann ran.\nQuestion: Who ran?\nI found this answer "Ann". Is that correct? '
                f"Yes or No?\n|{word}"
                for word in ("No", "Yes")
            ],
            1,
        ),
        (
            "copa",
            0,
            COPA | {"question": "effect", "label": 0},
            ["It rained so |the grass got wet.", "It rained so |I ran."],
            0,
        ),
        (
            "copa",
            0,
            COPA | {"question": "cause", "label": 1},
            ["It rained because |the grass got wet.", "It rained because |I ran."],
            1,
        ),
        (
            "winogrande",
            0,
            BLANK | {"answer": "2"},
            ["Ann beat Eve so |Ann won.", "Ann beat Eve so |Eve won."],
            1,
        ),
        (
            "record",
            0,
            STORY | {"answers": ["Eve", "Ms Eve"]},
            [
                f"Ann met Eve.\n- They spoke.\n- Eve left.\n- |Then {name} saw {name}."
                for name in ("Ann", "Eve", "Ms Eve")
            ],
            1,
        ),
        (
            "squad",
            0,
            ARTICLE | {"answers": {"text": [" Ann {A}", "Ann"], "answer_start": [0, 0]}},
            ["Title: Runs\nContext: Ann {A} ran.\nQuestion: Who ran?\nAnswer: |Ann {A}\n"],
            0,
        ),
        (
            "drop",
            0,
            COUNT | {"answers_spans": {"spans": ["2", "two"], "types": ["number", "span"]}},
            ["Passage: He ran 2 miles.\nQuestion: How many miles?\nAnswer: |2\n"],
            0,
        ),
    ],
)
def test_a_template_renders_to_its_text(name, version, row, texts, gold):
    template = find_template(name, version=version)
    assert [f"{p.before}|{p.option}{p.after}" for p in template.render(row)] == texts
    assert template.gold(row) == gold


def test_a_template_of_ones_own_takes_columns_words_and_other_names():
    template = find_template(
        "Review: {text:lower} Verdict {label} .",
        labels={"pos": "good", "neg": "bad {text}"},
        label="verdict",
        columns={"text": "body"},
    )
    row = {"body": " So GOOD {} ", "verdict": "neg"}
    assert template.render(row) == [
        Prompt("Review: so good {} Verdict ", "good", " ."),
        Prompt("Review: so good {} Verdict ", "bad So GOOD {}", " ."),
    ]
    assert template.gold(row) == 1


def test_the_right_answers_of_a_row_are_a_list_or_one_text_wherever_the_label_says():
    squad = find_template("squad")
    assert squad.answers({"answers": {"text": ["Ann", " ", "A. "]}}) == ["Ann", "A."]
    assert find_template("squad", label="gold").answers({"gold": "Ann"}) == ["Ann"]
    record = find_template("record", columns={"entities": "names"}, label="gold")
    row = STORY | {"names": ["Eve", "Ann"], "gold": ["Ann", "Bob"]}
    assert record.right(row) == [False, True]
    assert [p.option for p in record.render(row)] == ["Then Eve saw Eve.", "Then Ann saw Ann."]
