import unicodedata

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from deepseek_jax.rl.rewards import accuracy_reward, format_reward

GOOD = "<think>7+8=15,4+3+1=08</think>85"
MARKERS = ("<think>", "</think>")


@pytest.mark.parametrize("completion", [GOOD, "<think>\n2 lines\n</think>\n\n85\n", "<think>x</think> 85 "])
def test_right_completions_score(completion):
    assert accuracy_reward(completion, "85") == format_reward(completion, "85") == 1.0


@pytest.mark.parametrize(
    ("completion", "accuracy", "form"),
    [
        # wrong or missing answers
        ("<think>7+8=15</think>84", 0, 1),
        ("<think>7+8=15</think>", 0, 0),
        ("<think>7+8=15</think> \n ", 0, 0),
        ("<think>the answer is 85", 0, 0),
        ("<think>85</think>", 0, 0),
        ("85", 0, 0),
        ("", 0, 0),
        # two answers, and text after the answer
        ("<think>x</think>85</think>85", 0, 0),
        ("<think>x</think>85\n85", 0, 0),
        ("<think>x</think>85 or 86", 0, 1),
        ("<think>x</think>85.", 0, 1),
        ("<think>x</think>85<think>", 0, 0),
        ("<think>x</think>85\u2028", 0, 1),
        ("<think>x</think>85\u202886", 0, 0),
        # nested, repeated and misplaced markers
        ("<think><think>x</think>85", 0, 0),
        ("<think>x</think></think>85", 0, 0),
        ("<think>x</think><think>y</think>85", 0, 0),
        ("</think>x<think>85", 0, 0),
        (" <think>x</think>85", 1, 0),
        ("85<think>x</think>85", 1, 0),
        ("x</think>85", 1, 0),
        # nothing thought
        ("<think></think>85", 1, 0),
        ("<think> \n\t</think>85", 1, 0),
        ("<think>\u200b\u3000\x00</think>85", 1, 0),
        ("<think>x</think>\u200b", 0, 0),
        # the same number, written otherwise
        ("<think>x</think>085", 0, 1),
        ("<think>x</think>+85", 0, 1),
        ("<think>x</think>85.0", 0, 1),
        ("<think>x</think>8 5", 0, 1),
        ("<think>x</think>８５", 0, 1),
        ("<think>x</think>٨٥", 0, 1),
        ("<think>x</think>85\u00a0", 0, 1),
        ("<think>x</think>\u200385", 0, 1),
        ("<think>x</think>8\u200b5", 0, 1),
        ("<THINK>x</THINK>85", 0, 0),
    ],
)
def test_adversarial_completions(completion, accuracy, form):
    assert (accuracy_reward(completion, "85"), format_reward(completion, "85")) == (accuracy, form)


def test_huge_completions_are_scored():
    huge = 2_000_000
    assert accuracy_reward("<think>" + "1+" * huge + "</think>85", "85") == 1.0
    assert accuracy_reward("<think>x</think>" + "9" * huge, "85") == 0.0
    assert format_reward("<think>" * huge + "</think>" * huge, "85") == 0.0
    assert accuracy_reward("<think>x</think>" + " " * huge + "85" + "\n" * huge, "85") == 1.0


pieces = st.one_of(st.sampled_from([*MARKERS, "85", " ", "\n", "think", "<", ">"]), st.text(max_size=5))


@given(st.lists(pieces, max_size=12).map("".join))
def test_only_the_exact_form_scores(completion):
    """A transcription by index of the rule: one opening at 0, one closing, and the answer alone behind it."""
    closing = completion.find("</think>")
    single = completion.count("</think>") == 1 and completion.count("<think>") <= 1
    ordered = single and completion.rfind("<think>") < closing
    tail = completion[closing + len("</think>") :]
    while tail and tail[0] in " \t\r\n":
        tail = tail[1:]
    while tail and tail[-1] in " \t\r\n":
        tail = tail[:-1]
    assert accuracy_reward(completion, "85") == float(ordered and tail == "85")
    if format_reward(completion, "85"):
        assert ordered and completion.find("<think>") == 0 and closing > len("<think>")
        assert tail and "\n" not in tail and "\r" not in tail


@given(st.integers(0, 9801), st.text(max_size=20), st.text(min_size=1, max_size=20))
def test_anything_beside_the_answer_costs_accuracy(number, thinking, extra):
    assume(extra.strip(" \t\r\n"))
    answer = str(number)
    assert accuracy_reward(f"<think>.{thinking}</think>{answer}{extra}", answer) == 0.0
    assume(not any(marker in thinking for marker in MARKERS))
    assert accuracy_reward(f"<think>.{thinking}</think>{answer}", answer) == 1.0


@given(st.text(st.characters(categories=["Nd"], exclude_characters="0123456789"), min_size=1, max_size=4))
def test_digits_of_other_scripts_do_not_count(digits):
    plain = "".join(str(unicodedata.digit(digit)) for digit in digits)
    assert accuracy_reward(f"<think>x</think>{digits}", plain) == 0.0


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("<answer>85</answer>", 1),
        (" <answer> 85 </answer>\n", 1),
        ("<answer>84</answer>", 0),
        ("so <answer>85</answer>", 0),
        ("<answer>85", 0),
        ("<answer>85</answer></answer>", 0),
        ("<answer></answer>", 0),
    ],
)
def test_an_answer_may_stand_in_r1_zeros_tags(reply, right):
    assert accuracy_reward(f"<think>x</think>{reply}", "85") == right
