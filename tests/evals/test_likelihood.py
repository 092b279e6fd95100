"""Log-likelihoods beside a sum over the softmax of all logits, in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from model.tiny import weights, whole
from small import SPEAKER

from deepseek_jax.evals.likelihood import likelihoods, windows

MODEL = whole(SPEAKER, *weights(SPEAKER))
LONGEST = SPEAKER.max_position_embeddings


FORWARD = jax.jit(lambda tokens: MODEL.network()(tokens).logits)


def expected(context: list[int], continuation: list[int]) -> tuple[float, bool]:
    ids = [*context, *continuation]
    logits = logits_of(ids)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    places = range(len(context) - 1, len(ids) - 1)
    return sum(logprobs[i, ids[i + 1]] for i in places), all(logits[i].argmax() == ids[i + 1] for i in places)


def logits_of(ids: list[int]) -> np.ndarray:
    return np.asarray(FORWARD(jnp.asarray([ids + [0] * (LONGEST + 1 - len(ids))])), np.float64)[0]


def test_they_are_sums_of_log_softmax():
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(0, 300, n).tolist(), rng.integers(0, 300, m).tolist()) for n, m in ((3, 5), (20, 1), (9, 9))]
    ids = [5, 7]
    for _ in range(3):  # and a greedy one
        ids.append(int(logits_of(ids)[len(ids) - 1].argmax()))
    pairs += [(ids[:2], ids[2:]), (ids[:2], [*ids[2:4], (ids[4] + 1) % 300]), ([4], [])]
    found = likelihoods(MODEL, pairs, batch_size=4)
    wanted = [expected(*pair) for pair in pairs]
    np.testing.assert_allclose([logprob for logprob, _ in found], [logprob for logprob, _ in wanted], rtol=2e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted] == [False] * 3 + [True, False, True]


def test_a_long_context_loses_its_beginning():
    ids = np.random.default_rng(1).integers(0, 300, LONGEST + 30).tolist()
    (found,) = likelihoods(MODEL, [(ids[:-2], ids[-2:])], batch_size=1)
    assert found[0] == pytest.approx(expected(ids[-LONGEST - 1 : -2], ids[-2:])[0], rel=2e-5)
    with pytest.raises(ValueError, match=f"most max_position_embeddings={LONGEST}"):
        likelihoods(MODEL, [([1], ids)])
    with pytest.raises(ValueError, match="a context of 0 tokens"):
        likelihoods(MODEL, [([], [1])])


@given(st.integers(0, 40), st.integers(1, 9))
def test_windows_predict_each_token_once_after_as_many_as_fit(count, longest):
    ids, seen = list(range(1, count + 1)), []
    for context, continuation in windows(ids, 0, longest):
        assert len(context) >= 1 and len(context) + len(continuation) == min(continuation[-1], longest) + 1
        assert [*context, *continuation] == list(range(context[0], continuation[-1] + 1))
        seen += continuation
    assert seen == ids
