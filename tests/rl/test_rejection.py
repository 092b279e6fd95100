"""Which answers are kept, each reason by an answer that has it alone; and R1-Zero's form as a chat's."""

import dataclasses

import pytest

from deepseek_jax.rl.rejection import REASONS, Readable, Sampled, as_reply, choose, counts

GOOD = Sampled("1+1?", "<think>one and one are two</think>2", 9, True, True)
STRICT = Readable(per_prompt=2, language_share=0.8, longest=20, repeated=0.2, code=False, paragraph=60)


def other(**changes) -> Sampled:
    return dataclasses.replace(GOOD, **changes)


@pytest.mark.parametrize(
    ("text", "reply"),
    [
        ("<think>a</think>b", "<think>a</think>b"),
        ("\n<think>\na\n</think>\n\nb ", "<think>\na\n</think>\n\nb"),
        ("a</think>b", "<think>a</think>b"),  # the prompt may have opened it
        ("b", "b"),
        (" <think> a </think> <answer> b </answer>", "<think> a </think> b"),
        ("<think>a</think>\n\n<answer>\nb\nc\n</answer> and on", "<think>a</think>\n\nb\nc"),
        ("<think>write <answer> first</think>b", "<think>write <answer> first</think>b"),
        ("<answer>b</answer>", "b"),
        ("", None),
        ("<think>a", None),
        ("<think>a</think>", None),
        ("<think> </think>b", None),
        ("so <think>a</think>b", None),
        ("<think><think>a</think>b", None),
        ("<think>a</think>b</think>c", None),
        ("<think>a</think>b<think>c", None),
        ("<think>a</think><answer>b", None),
        ("<think>a</think>b</answer>", None),
        ("<think>a</think><answer></answer>", None),
        ("<think>a</think><answer>b</answer><answer>c</answer>", None),
        ("<think>a</think></answer>b<answer>", None),
    ],
)
def test_an_answer_as_a_chat_learns_it(text, reply):
    assert as_reply(text) == reply


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"ended": False}, "cut_off"),
        ({"correct": False}, "wrong"),
        ({"text": "2"}, "form"),
        ({"text": "<think>one und ещё один два</think>2"}, "language"),
        ({"text": "<think>ещё один, это два</think>2", "row": {"language": "ru"}}, ""),
        ({"tokens": 21}, "long"),
        ({"text": f"<think>{'we add one and one again now ' * 4}</think>2", "tokens": 20}, "repeated"),
        ({"text": "<think>so ```1+1``` is two</think>2"}, "code"),
        ({"text": "<think>so it is two</think>```2```"}, ""),
        ({"text": f"<think>short\n\n{'long' * 15}.</think>2"}, "paragraph"),
        ({"text": f"<think>{'long' * 10}\n\n{'wide' * 10}</think>2"}, ""),
    ],
)
def test_reasons(changes, reason):
    ((reply, found),) = choose([other(**changes)], STRICT)
    assert found == reason and (reply is None) == bool(reason)


def test_of_a_question_those_that_say_the_same_count_once_and_no_more_than_asked_for():
    texts = ["one and one", "one  and\none", "it is two", "so two", "one and one"]
    answers = [other(text=f"<think>{text}</think>2") for text in texts]
    answers += [dataclasses.replace(answers[0], prompt="1 + 1 = ?")]
    assert [reason for _, reason in choose(answers, STRICT)] == ["", "duplicate", "", "surplus", "duplicate", ""]
    found = counts(answers, choose(answers, STRICT))
    assert found["dropped"] == {"duplicate": 2, "surplus": 1} and found["correct"] == 1
    assert (found["questions"], found["answers"], found["kept"], found["questions_kept"]) == (2, 6, 3, 2)
    assert [reason for _, reason in choose(answers, Readable())].count("") == 4  # no limit


def test_without_a_right_answer_the_judge_decides():
    answers = [other(text=f"<think>{score} it is</think>2", correct=None, score=score) for score in (0.4, 0.6, None)]
    assert [reason for _, reason in choose(answers, Readable(), least=0.5)] == ["judged", "", "judged"]
    assert [reason for _, reason in choose(answers, Readable())] == ["", "", ""]
    assert [reason for _, reason in choose([GOOD], Readable(), least=0.5)] == [""]
    assert "correct" not in counts(answers, choose(answers, Readable()))


def test_plain_replies_any_language_and_wrong_options():
    loose = Readable(thought=False, language="")
    texts = ["Привет!", "<think>a</think>b", "<think>a"]
    assert [reason for _, reason in choose([other(text=text) for text in texts], loose)] == ["", "", "form"]
    with pytest.raises(ValueError, match="language 'klingon': expected one of en"):
        Readable(language="klingon")
    with pytest.raises(ValueError, match=r"Readable.repeated=2.0: a share is at most 1"):
        Readable(repeated=2.0)
    assert {*REASONS} >= {"cut_off", "wrong", "judged", "form", "language", "long", "repeated", "code", "paragraph"}
