"""Fill in the middle: rate, order, and nothing lost."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.data.fim import FimTokens, apply_fim
from deepseek_jax.data.tokenizer import Tokenizer

TOKENS = FimTokens(begin=1000, hole=1001, end=1002)


@given(ids=st.lists(st.integers(0, 999)), seed=st.integers(0, 2**32))
def test_prefix_suffix_middle_rebuild_the_document(ids: list[int], seed: int) -> None:
    out = apply_fim(ids, rng=np.random.default_rng(seed), rate=1.0, tokens=TOKENS)
    assert out[0] == TOKENS.begin
    hole, end = out.index(TOKENS.hole), out.index(TOKENS.end)
    assert hole < end and len(out) == len(ids) + 3
    assert out[1:hole] + out[end + 1 :] + out[hole + 1 : end] == ids


def test_rate(rng: np.random.Generator) -> None:
    turned = [apply_fim([1, 2, 3], rng=rng, rate=0.1, tokens=TOKENS)[0] == TOKENS.begin for _ in range(20000)]
    assert abs(np.mean(turned) - 0.1) < 5 * np.sqrt(0.1 * 0.9 / 20000)
    assert apply_fim([1, 2, 3], rng=rng, rate=0.0, tokens=TOKENS) == [1, 2, 3]


def test_the_cuts_reach_every_place(rng: np.random.Generator) -> None:
    outs = [apply_fim([1, 2, 3], rng=rng, rate=1.0, tokens=TOKENS) for _ in range(1000)]
    cuts = {(out.index(TOKENS.hole) - 1, len(out) - 1 - out.index(TOKENS.end)) for out in outs}
    assert cuts == {(start, length) for start in range(4) for length in range(4 - start)}


def test_markers_and_rates_are_checked(tokenizer: Tokenizer, rng: np.random.Generator) -> None:
    tokens = FimTokens.of(tokenizer)
    marked = tokenizer.decode([tokens.begin, tokens.hole, tokens.end])
    assert marked == "<｜fim▁begin｜><｜fim▁hole｜><｜fim▁end｜>"
    with pytest.raises(ValueError, match="rate=1.5"):
        apply_fim([1], rng=rng, rate=1.5, tokens=tokens)
