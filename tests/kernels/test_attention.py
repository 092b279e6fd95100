"""``mla_attention`` against the definition and its autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_kernels import mla_attention, mla_attention_reference


def case(dtype=jnp.float32, size=9):
    keys = jax.random.split(jax.random.key(0), 4)
    q, k = (jax.random.normal(key, (2, size, 3, 6), dtype) for key in keys[:2])
    v, dout = (jax.random.normal(key, (2, size, 3, 4), dtype) for key in keys[2:])
    segments = jnp.asarray([[1] * 4 + [2] * (size - 4), [1] * (size - 2) + [0] * 2])
    mask = jnp.tril(jnp.ones((size, size), bool)) & (segments[:, :, None] == segments[:, None, :])
    return (q, k, v), mask, dout


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_equals_the_definition_in_numpy():
    (q, k, v), mask, _ = case()
    scores = np.einsum("bshk,bthk->bhst", *(np.asarray(x, np.float64) for x in (q, k))) * 0.3
    scores = np.where(np.asarray(mask)[:, None], scores, -np.inf)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    wanted = np.einsum("bhst,bthv->bshv", p / p.sum(axis=-1, keepdims=True), np.asarray(v, np.float64))
    assert relative(mla_attention(q, k, v, mask, 0.3), wanted) < 1e-6


@pytest.mark.parametrize("size", [9, 70, 150])
def test_gradients_equal_autodiff_of_the_definition(size):
    """Of any size: strips of 64 queries and panels of 32 columns, whole and ragged; a query that sees nothing too."""
    inputs, mask, dout = case(size=size)
    mask = mask.at[0, 2].set(False)

    def loss(attention):
        return lambda *qkv: jnp.sum(attention(*qkv, mask, 0.3) * dout)

    ours = jax.grad(loss(mla_attention), argnums=(0, 1, 2))(*inputs)
    wanted = jax.grad(loss(mla_attention_reference), argnums=(0, 1, 2))(*inputs)
    for mine, theirs in zip(ours, wanted, strict=True):
        assert relative(mine, theirs) < 1e-6


def test_bfloat16_stays_within_its_rounding():
    inputs, mask, dout = case(jnp.bfloat16)
    exact = tuple(x.astype(jnp.float32) for x in inputs)
    (q, k, v), (q32, k32, v32) = inputs, exact
    assert relative(mla_attention(q, k, v, mask, 0.3), mla_attention_reference(q32, k32, v32, mask, 0.3)) < 2**-8

    def gradient(attention, qkv, dout):
        q, k, v = qkv
        return jax.grad(lambda v: jnp.sum(attention(q, k, v, mask, 0.3).astype(jnp.float32) * dout))(v)

    ours = gradient(mla_attention, inputs, dout)
    assert relative(ours, gradient(mla_attention_reference, exact, dout.astype(jnp.float32))) < 2**-7


@pytest.mark.parametrize("row", [0, 3])
def test_a_query_that_may_attend_to_nothing_gets_the_mean(row):
    (q, k, v), mask, _ = case()
    mask = mask.at[0, row].set(False)
    out: jax.Array = mla_attention(q, k, v, mask, 0.3)
    np.testing.assert_allclose(out[0, row], jnp.mean(v[0], axis=0), rtol=1e-5)
