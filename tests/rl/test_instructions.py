"""IFEval's instructions: replies that follow each and that do not, written down before the checks were run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.data.text import Record
from deepseek_jax.rl.instructions import CHECKS, count_sentences, follows
from deepseek_jax.rl.tasks import TaskConfig, make_task

AT_LEAST, LESS = "at least", "less than"
# Instruction, its arguments, replies that follow it, replies that do not.
CASES = [
    ("keywords:existence", {"keywords": ["river", "old bank"]}, ["The RIVER left the Old Bank."], ["a river, a bank"]),
    ("keywords:existence", {"keywords": ["c++"]}, ["I write C++."], ["I write C."]),
    (
        "keywords:frequency",
        {"keyword": "sun", "frequency": 2, "relation": AT_LEAST},
        ["Sun and sunset", "sun sun sun"],
        ["one sun"],
    ),
    ("keywords:frequency", {"keyword": "sun", "frequency": 2, "relation": LESS}, ["one sun"], ["sun sun"]),
    (
        "keywords:forbidden_words",
        {"forbidden_words": ["cat", "big dog"]},
        ["The category of a dog.", "a bigger dog"],
        ["A Cat.", "cat", "my big dog!", "(cat)"],
    ),
    (
        "keywords:letter_frequency",
        {"letter": "e", "let_frequency": 3, "let_relation": AT_LEAST},
        ["Eleven", "e e e"],
        ["ee"],
    ),
    ("keywords:letter_frequency", {"letter": "Q", "let_frequency": 1, "let_relation": LESS}, ["none"], ["quick"]),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": AT_LEAST},
        ["One. Two.", "Really?! Yes", 'He said "Go." Then he went.'],
        ["Only one.", "About 3.5 metres", "Dr. Smith came."],
    ),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": LESS}, ["One."], ["One. Two."]),
    (
        "length_constraints:number_words",
        {"num_words": 3, "relation": AT_LEAST},
        ["one two three"],
        ["one two", "- - -"],
    ),
    ("length_constraints:number_words", {"num_words": 3, "relation": LESS}, ["one two"], ["one two three"]),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["One\n***\nTwo", "***\nOne\n***\nTwo\n***", "One *** Two"],
        ["One\n\nTwo", "One\n***\n***\nTwo", "A\n***\nB\n***\nC"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "weather"},
        ["One.\n\nWeather is fine.", 'One.\n\n"Weather," he said.'],
        ["Weather.\n\nTwo.", "One.\n\nWeathered.", "One.\n\nTwo.\n\nWeather", "weather"],
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        ["Dear [name], at [address].", "[a][b][c]"],
        ["Dear [name].", "no [open"],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        ["Bye.\nP.S. Call me.", "Bye.\n\np. s. call"],
        ["Bye. PS call", "Bye.\nP.P.S. Call"],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.P.S"},
        ["Bye.\nP.P.S Call me.", "Bye.\nP.P.S. x"],
        ["P.S. one"],
    ),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* one\n* two", "- one\n  - two\nthat is all"],
        ["* one", "* one\n* two\n* three", "**bold**\n* one", "1. one\n2. two"],
    ),
    (
        "detectable_format:constrained_response",
        {},
        ["My answer is yes.", "Well: My answer is maybe."],
        ["Yes.", "my answer is yes"],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*one* and *two words*", "**one** and **two**"],
        ["*one*", "* one\n* two", "**  ** and *x*"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        ["Section 1\na\nSection 2\nb", "Section1 Section2 Section3"],
        ["Section 1\na", "Section one\nSection two"],
    ),
    (
        "detectable_format:json_format",
        {},
        ['{"a": [1]}', '```json\n{"a": 1}\n```', "```[]```"],
        ["{a: 1}", "So: {}"],
    ),
    ("detectable_format:title", {}, ["<<Joy>>\nText", "Text <<Two words>>"], ["<Joy>", "<<>>", "<< >>", "<<Joy\n>>"]),
    (
        "combination:two_responses",
        {},
        ["One\n******\nTwo", "******One******Two******"],
        ["One", "One******One", "A******B******C", "A************B"],
    ),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "What is up?"},
        ["what is up? The sky.", "  What is up?"],
        ["The sky. What is up?"],
    ),
    (
        "startend:end_checker",
        {"end_phrase": "Any more?"},
        ["Fine. any more?", '"Any more?"'],
        ["Any more? No.", "Any more"],
    ),
    ("startend:quotation", {}, ['"All of it"', ' "a" and "b" '], ['"Half', "'All'", '"']),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": AT_LEAST},
        ["WE said NO", "I AM", "HIGH-END TV"],
        ["We said NO", "HIGH-END"],
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 1, "capital_relation": LESS},
        ["all small"],
        ["One NASA"],
    ),
    ("change_case:english_capital", {}, ["ALL OF IT, 1!"], ["Not ALL", "12"]),
    ("change_case:english_lowercase", {}, ["all of it, 1!"], ["not All", "12"]),
    ("punctuation:no_comma", {}, ["one; two"], ["one, two"]),
    (
        "language:response_language",
        {"language": "de"},
        ["Das ist ein schöner Tag, und wir gehen alle zusammen in den Wald."],
        ["This is a fine day and all of us walk to the woods together."],
    ),
]


@pytest.mark.parametrize(("instruction", "arguments", "right", "wrong"), CASES)
def test_what_follows_an_instruction(instruction, arguments, right, wrong):
    if instruction == "language:response_language":
        pytest.importorskip("py3langid", reason="py3langid (the extra rewards) is not installed")
    assert [text for text in right if not follows(text, instruction, arguments)] == []
    assert [text for text in [*wrong, "", " \n"] if follows(text, instruction, arguments)] == []


def test_every_instruction_has_its_cases():
    assert {case[0] for case in CASES} == set(CHECKS)


@given(st.text("aB. ?!\n'\"[]*<>-", max_size=60), st.sampled_from([case[:2] for case in CASES[:-1]]))
def test_any_reply_is_judged(text, case):
    assert follows(text, *case) in (True, False)


def test_sentences():
    told = {
        "": 0,
        "One": 1,
        "One. ": 1,
        "a.b.c": 1,
        "Hm... well.": 2,
        "U.S. law": 1,
        "你好。 再见。": 2,
        "“So?” Yes.": 2,
    }
    assert {text: count_sentences(text) for text in told} == told


def test_the_task_is_strict():
    task = make_task(TaskConfig(name="ifeval"))
    names = ["punctuation:no_comma", "keywords:existence", "length_constraints:number_words"]
    nothing = dict.fromkeys(("keywords", "num_words", "relation", "language"))
    kwargs = [nothing, nothing | {"keywords": ["sea"]}, nothing | {"num_words": 3.0, "relation": LESS}]
    row = {"prompt": "Write.", "instruction_id_list": names, "kwargs": kwargs}
    assert task.messages(row) == [{"role": "user", "content": "Write."}] and task.right(row) is None
    right, half = "<think>first, long, thoughts of it</think>the sea", "a long, long sea"
    assert [task.accuracy(text, row) for text in (right, half, "", "<think>the sea")] == [1, 0, 0, 0]
    assert task.figures is not None
    assert task.figures([(row, right, True), (row, half, False)]) == {"instructions": 4 / 6}
    wrong = [
        ({"kwargs": []}, "lists of one length"),
        ({"instruction_id_list": [*names[:2], "keywords:rhyme"]}, "instruction 'keywords:rhyme': expected one of"),
        ({"kwargs": [{"keywords": ["a"]}, *kwargs[1:]]}, "punctuation:no_comma takes no arguments, got keywords"),
        ({"kwargs": [None, {}, *kwargs[2:]]}, "keywords:existence takes keywords, got none"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            task.accuracy("", Record(row | change, "x:1"))
