"""Shared rows of words beside a search by brute force."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.data.decontamination import Overlap, split_words, texts_of

WORDS = st.lists(st.sampled_from("abcd"), max_size=14)


@given(st.lists(WORDS, max_size=3), WORDS, st.integers(1, 5), st.integers(0, 3))
def test_it_finds_what_brute_force_finds(evaluated, text, size, fewer):
    least = max(size - fewer, 1)
    overlap = Overlap(size=size, least=least)
    added = [overlap.add(" ".join(words), source=str(number)) for number, words in enumerate(evaluated)]
    assert added == [len(words) >= least for words in evaluated]

    def shared(words: list[str]) -> bool:
        length = min(len(words), size)
        parts = [words[at : at + length] for at in range(len(words) - length + 1)]
        return len(words) >= least and any(text[at : at + length] == part for part in parts for at in range(len(text)))

    found = overlap.find(" ".join(text))
    assert (found is not None) == any(map(shared, evaluated))
    assert found is None or shared(evaluated[int(found)])


@pytest.mark.parametrize(
    ("text", "shared"),
    [
        ("one two three FOUR five six seven, eight nine-ten!", True),
        ("one two three four five six seven eight nine", False),
        ("zero one two three four five six seven eight nine ten eleven", True),
        ("What is\n1 + 1?", True),  # of three to nine words all must be there: what is 1 1
        ("what is 1?", False),
        ("x 人口是多少 y", True),
        ("人口多少", False),
        ("too few", False),
    ],
)
def test_words(text, shared):
    overlap = Overlap()
    assert overlap.add("One two three four five six seven eight nine ten.", "a")
    assert overlap.add("What is 1+1?", "b") and overlap.add("人口是多少?", "c") and not overlap.add("Too few", "d")
    assert (overlap.find(text) is not None) == shared


def test_what_is_read():
    assert split_words("Don't_stop: x₁ ÉTÉ, 3.5 §") == ["don", "t", "stop", "x₁", "été", "3", "5"]
    assert [*texts_of({"a": ["b", {"c": "d"}], "e": 3, "f": None, "g": "h"})] == ["b", "d", "h"]
    with pytest.raises(ValueError, match="least=4, size=3"):
        Overlap(size=3, least=4)
