"""Rows of `generate` in turn, beside all of them together."""

import gc

import jax
import numpy as np
import pytest
from model.tiny import weights, whole
from small import SPEAKER, tokenizer

from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.sampling import SamplingParams

MODEL = whole(SPEAKER, *weights(SPEAKER), tokenizer())
PROMPTS = [prompt for prompt in ([5, 9, 2, 7], [8] * 19, [3]) for _ in range(3)]
ENDS = tuple(range(20, 300, 24))  # answers of all lengths


@pytest.fixture(scope="module")
def engines() -> tuple[Engine, Engine]:
    return Engine(MODEL, at_once=4), Engine(MODEL)


def assert_same(engines: tuple[Engine, Engine], prompts, sampling, key=None) -> np.ndarray:
    found, expected = (engine.generate_ids(prompts, sampling, key).here() for engine in engines)
    rows = len(prompts)
    np.testing.assert_array_equal(found.lengths_B, expected.lengths_B[:rows])
    np.testing.assert_array_equal(found.stopped_B, expected.stopped_B[:rows])
    width = found.tokens_BN.shape[1]
    np.testing.assert_array_equal(found.tokens_BN, expected.tokens_BN[:rows, :width])
    np.testing.assert_allclose(found.logprobs_BN, expected.logprobs_BN[:rows, :width], atol=1e-4)
    return np.asarray(found.lengths_B)


@pytest.mark.parametrize("key", [None, jax.random.fold_in(jax.random.key(7), 3)])
def test_rows_in_turn_answer_what_they_answer_together(engines, key):
    """By a seed that all have, and by a key with high bits; scored by temperature. The last are the longest yet."""
    sampling = SamplingParams(temperature=0.7, max_tokens=20, seed=5, stop_token_ids=ENDS)
    lengths = assert_same(engines, PROMPTS, sampling, key)
    assert lengths.min() < 8 < lengths.max() and len({*lengths.tolist()}) > 3
    greedy = [SamplingParams(temperature=0.0, max_tokens=most) for most in (3, 9)]
    assert_same(engines, [[7] * 40, [9]], greedy, key)


def test_new_weights_find_nothing_of_the_former(engines):
    params, bias = weights(SPEAKER)
    other = params | {"head": {"w": params["head"]["w"][:, ::-1]}}
    for given in (other, params):
        for engine in engines:
            engine.update(given, bias)
        assert_same(engines, PROMPTS, SamplingParams(max_tokens=4, seed=2))


def test_a_cache_that_was_given_back_is_made_anew():
    """For a learner that trains between two calls; nothing but the weights stays on the device."""
    params, bias = weights(SPEAKER)
    own = Engine(whole(SPEAKER, params, bias, tokenizer()), at_once=4)
    live = lambda: sum(array.nbytes for array in jax.live_arrays())  # noqa: E731
    gc.collect()  # of other tests
    before, sampling = live(), SamplingParams(max_tokens=6, seed=2)
    own.free()  # of which there is none yet
    first = own.generate_ids(PROMPTS, sampling)
    held = sum(array.nbytes for array in jax.tree.leaves(own.model.weights()))
    cache = live() - before - held
    own.free()
    assert cache > 10_000 and live() - before - held < cache / 20
    second = own.generate_ids(PROMPTS, sampling)
    np.testing.assert_array_equal(first.tokens_BN, second.tokens_BN)
    np.testing.assert_array_equal(first.logprobs_BN, second.logprobs_BN)


def test_a_long_prompt_and_a_long_answer_of_others_make_no_cache_anew():
    """Together they pass what the model takes: no row needs as much."""
    own = Engine(MODEL, at_once=4)
    each = [SamplingParams(max_tokens=most, temperature=0.0) for most in (2, 50)]
    made = set()
    for _ in range(2):
        own.generate_ids([[8] * 60, [3]], each)
        assert own._in_turn is not None
        made.add(own._in_turn._with_room(1))
    assert len(made) == 1


def test_what_requests_cannot_do_is_refused(engines):
    first, _ = engines
    with pytest.raises(ValueError, match="experts=True: at_once=4 answers by requests, which keep none"):
        first.generate_ids(PROMPTS, SamplingParams(), experts=True)
    with pytest.raises(ValueError, match="ids that end an answer"):
        many = SamplingParams(max_tokens=9, stop_token_ids=tuple(range(3, 99)))
        first.generate_ids(PROMPTS, [SamplingParams(max_tokens=9)] * 8 + [many])
    assert_same(engines, PROMPTS[:2], SamplingParams(max_tokens=2))  # the others are given up
    for engine in engines:
        with pytest.raises(ValueError, match="2 prompts, but 1 sampling parameters"):
            engine.generate_ids(PROMPTS[:2], [SamplingParams(max_tokens=2)])


def test_a_grammar_is_refused(engines):
    with pytest.raises(ValueError, match="json_schema, regex: for requests"):
        engines[0].generate(["a"], SamplingParams(regex="a+", max_tokens=4))
