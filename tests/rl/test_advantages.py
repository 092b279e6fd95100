"""Rewards of steps, overlong shaping and dynamic sampling against their formulas."""

import numpy as np
import pytest
from small import tokenizer

from deepseek_jax.rl.advantages import choose_groups, has_signal, levelled, step_advantages, token_ends
from deepseek_jax.rl.rewards.length import overlong


def by_hand(steps, lengths, scale):
    """DeepSeekMath 4.1.3: ``A_t = Σ_{index(j) >= t} r̃_j``, normalised over all steps of the group."""
    rewards = [reward for answer in steps for _, reward in answer]
    mean = sum(rewards) / len(rewards)
    std = (sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5
    unit = std if scale == "std" else 1.0
    return [
        [sum((reward - mean) / unit for end, reward in answer if end >= t) for t in range(length)]
        for answer, length in zip(steps, lengths, strict=True)
    ]


@pytest.mark.parametrize("scale", ["std", "none"])
def test_process_supervision_equals_its_formula(scale):
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = rng.integers(1, 9, 4).tolist()
        steps = [[(int(rng.integers(-1, n)), float(rng.normal())) for _ in range(rng.integers(0, 4))] for n in lengths]
        steps[0] += [(lengths[0] - 1, 1.0), (0, 0.5)]  # in any order, and never none at all
        found = step_advantages(steps, lengths, scale=scale)
        for advantage, expected in zip(found, by_hand(steps, lengths, scale), strict=True):
            np.testing.assert_allclose(advantage, expected, atol=1e-12)


@pytest.mark.parametrize("steps", [[[], []], [[(0, 0.3), (2, 0.3)], [(1, 0.3)]], [[(2, 5.0)], []]])
def test_steps_that_are_none_equal_or_alone_teach_nothing(steps):
    for scale in ("std", "none"):
        assert [x.tolist() for x in step_advantages(steps, [3, 2], scale=scale)] == [[0, 0, 0], [0, 0]]


def test_steps_have_no_leave_one_out():
    with pytest.raises(ValueError, match='advantage="leave_one_out" compares whole answers, but a reward gives steps'):
        step_advantages([[(0, 1.0)]], [1], scale="leave_one_out")


def test_a_character_lies_in_the_token_that_completes_it():
    """Every cut of a text with characters of several bytes, against the decoded beginnings."""
    text = "so 7*8=56, é ☃ 🎲 def add\n</think>56"
    ids = [*tokenizer().encode(text, allow_special=True), tokenizer().eos_id]
    assert len(ids) < len(text.encode())
    for start in ("", "<think>"):
        whole = start + text
        found = token_ends(tokenizer(), ids, start, whole, [(end, float(end)) for end in range(len(whole) + 1)])
        assert [reward for _, reward in found] == list(range(len(whole) + 1))
        for end, (token, _) in enumerate(found):
            if end <= len(start):
                assert token == -1
            elif end == len(whole):
                assert token == len(ids) - 1  # the end of sentence belongs to the last step
            else:
                said = [start + tokenizer().decode(ids[:n], skip_special_tokens=False) for n in (token, token + 1)]
                assert whole.startswith(said[1]) and len(said[0].rstrip("\ufffd")) < end <= len(said[1])


def test_an_answer_that_was_cut_within_a_character_ends_in_its_last_token():
    ids = tokenizer().encode("a☃")[:-1]
    text = tokenizer().decode(ids, skip_special_tokens=False)
    assert text.endswith("\ufffd")
    assert token_ends(tokenizer(), ids, "", text, [(1, 0.0), (len(text), 1.0)]) == [(0, 0.0), (len(ids) - 1, 1.0)]


def test_overlong_shaping_equals_its_formula():
    """DAPO, equation 13, for a limit of 20 tokens and a buffer of 8."""
    lengths = np.arange(1, 21)
    expected = [0.0 if n <= 12 else (12 - n) / 8 for n in lengths]
    np.testing.assert_allclose(overlong(lengths, limit=20, buffer=8), expected)
    assert overlong(np.array([20]), limit=20, buffer=8) == -1


def test_which_groups_have_signal_and_which_are_trained_on():
    totals = np.array([[0.0, 0.0], [0.0, 0.04], [0.0, 1.0], [0.5, 0.5]], np.float32)
    steps = [[[], []], [[], []], [[], []], [[(3, 0.1)], [(3, 0.9), (5, 0.9)]]]
    assert has_signal(totals, steps, 1e-6).tolist() == [False, True, True, True]
    assert has_signal(totals, steps, 0.05).tolist() == [False, False, True, True]
    np.testing.assert_array_equal(levelled(totals, 1e-6), totals)
    np.testing.assert_array_equal(levelled(totals, 0.05), [[0, 0], [0, 0], [0, 1], [0.5, 0.5]])
    signal = np.array([False, True, False, True, True])
    for count, expected in ((2, [1, 3]), (3, [1, 3, 4]), (4, [0, 1, 3, 4]), (5, [0, 1, 2, 3, 4])):
        assert choose_groups(signal, count).tolist() == expected
