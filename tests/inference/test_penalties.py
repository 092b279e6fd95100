"""Logits that an answer's own tokens have a say in, against numpy; min-p, and what batches refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inference.jaxprs import always_run

from deepseek_jax.inference.penalties import Wishes, adjusted
from deepseek_jax.inference.requests import make_requests
from deepseek_jax.inference.sampling import SamplingParams, sample

B, W, T = 4, 9, 12
ANYTHING = {"constrained_B": jnp.zeros(B, jnp.int32), "allowed_BV": jnp.full((B, 1), -1, jnp.int32)}


def wishes(repetition=(1.0,) * B, presence=(0.0,) * B, frequency=(0.0,) * B, biases=None) -> Wishes:
    ids, values = np.full((B, 3), -1, np.int32), np.zeros((B, 3), np.float32)
    for row, some in enumerate(biases or []):
        for place, (token, bias) in enumerate(some):
            ids[row, place], values[row, place] = token, bias
    per_row = {"repetition_B": repetition, "presence_B": presence, "frequency_B": frequency}
    per_row = {name: jnp.array(x, jnp.float32) for name, x in per_row.items()}
    return Wishes(**per_row, ids_BX=jnp.asarray(ids), biases_BX=jnp.asarray(values), **ANYTHING)


def test_penalties_and_biases_are_those_of_the_definition():
    """Each row in its own way; what stands behind a row's tokens counts for nothing."""
    rng = np.random.default_rng(0)
    logits, said = rng.standard_normal((B, W)).astype(np.float32), rng.integers(0, W, (B, T)).astype(np.int32)
    prompt, known = np.array([3, 1, 5, 2]), np.array([9, 1, 12, 7])
    ways = {"repetition": (1.3, 1.0, 0.8, 1.0), "presence": (0.0, 0.5, -1.0, 0.0), "frequency": (0.7, 0.0, 0.2, 0.0)}
    biases = [[(2, 1.5)], [], [(0, -4.0), (8, 2.0)], [(5, 100.0)]]
    expected = logits.astype(np.float64)
    for row in range(B):
        for token, bias in biases[row]:
            expected[row, token] += bias
        for token in range(W):
            value, answer = expected[row, token], np.sum(said[row, prompt[row] : known[row]] == token)
            if token in said[row, : known[row]]:
                value = value / ways["repetition"][row] if value > 0 else value * ways["repetition"][row]
            expected[row, token] = value - ways["frequency"][row] * answer - ways["presence"][row] * (answer > 0)
    found = jax.jit(adjusted)(logits, wishes(**ways, biases=biases), said, jnp.array(prompt), jnp.array(known))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_nothing_is_counted_where_no_row_asks():
    given = jnp.zeros((B, W)), wishes(), jnp.zeros((B, T), jnp.int32), jnp.ones(B, jnp.int32), jnp.ones(B, jnp.int32)

    always = set(always_run(jax.make_jaxpr(adjusted)(*given).jaxpr))
    assert "cond" in always and not any("scatter" in name for name in always)
    np.testing.assert_array_equal(adjusted(*given), given[0])


def test_min_p_keeps_what_is_likely_enough():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]] * 2000))
    keys, ones = jax.random.split(jax.random.key(0), 2000), jnp.ones(2000)
    min_p = jnp.where(jnp.arange(2000) < 1000, 0.4, 0.0)
    tokens, _ = sample(logits, keys, ones, ones, jnp.zeros(2000, jnp.int32), min_p)
    assert set(tokens[:1000].tolist()) == {0, 1} and set(tokens[1000:].tolist()) == {0, 1, 2, 3}
    plain, _ = sample(logits, keys, ones, ones, jnp.zeros(2000, jnp.int32))
    np.testing.assert_array_equal(plain[1000:], tokens[1000:])


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"min_p": 1.5}, r"min_p=1.5: must lie in \[0, 1\]"),
        ({"presence_penalty": -3.0}, r"presence_penalty=-3.0: must lie in \[-2, 2\]"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty=0.0: must lie in \[0.01, 100\]"),
        ({"alternatives": 21}, r"alternatives=21: must lie in \[0, 20\]"),
        ({"logit_bias": ((1, float("nan")),)}, "expected tokens and finite numbers"),
        ({"logit_bias": ((-1, 1.0),)}, "expected tokens and finite numbers"),
        ({"logit_bias": ((1, 1e300),)}, r"finite numbers up to 1e\+06"),
        ({"temperature": 2e-38}, r"temperature=2e-38: must be 0, or at least 1e-30"),
        ({"logit_bias": ((1, 1.0),) * 301}, "logit_bias has 301 tokens: expected at most 300"),
    ],
)
def test_what_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**fields)


def test_batches_refuse_what_requests_alone_can_have():
    with pytest.raises(ValueError, match="min_p=0.1: for requests by Engine.answer and submit alone"):
        make_requests([[1]], SamplingParams(min_p=0.1))
