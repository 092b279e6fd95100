"""The words of reflection, counted by hand."""

import pytest

from deepseek_jax.rl.words import REFLECTIVE, wait_words, waits


@pytest.mark.parametrize(
    ("text", "reflective", "wait"),
    [
        ("", 0, 0),
        ("4 + 4 = 8, so the answer is 8.", 0, 0),
        ("Wait, wait. WAIT! That's an aha moment.", 3, 3),
        ("Hmm... <think>wait</think>", 1, 1),
        ("But that is wrong; however, let me re-check: no error, no mistake.", 6, 0),
        ("retry\nverify\tevaluate", 3, 0),
        ("waiting, waiter, await, checked, mistaken, butter, errors, wait_all", 0, 0),
        ("等等wait，再check一次", 2, 1),
    ],
)
def test_words_are_counted_whole(text, reflective, wait):
    assert (wait_words(text), waits(text)) == (reflective, wait)


def test_the_list_is_the_papers():
    assert len(set(REFLECTIVE)) == 10
    assert all(wait_words(word) == wait_words(word.capitalize()) == 1 for word in REFLECTIVE)
