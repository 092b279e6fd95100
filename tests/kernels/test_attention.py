"""``mla_attention`` against the definition and its autodiff."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_kernels import mla_attention, mla_attention_reference


def case(dtype=jnp.float32, size=9):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (2, size, 3, 7), (2, size, 3, 5 + 4), (2, size, 2), (2, size, 3, 4)  # N = 5, R = 2, V = 4
    q, kv, pe, dout = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))
    segments = jnp.asarray([[1] * 4 + [2] * (size - 4), [1] * (size - 2) + [0] * 2])
    mask = jnp.tril(jnp.ones((size, size), bool)) & (segments[:, :, None] == segments[:, None, :])
    return (q, kv, pe), mask, dout


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_equals_the_definition_in_numpy():
    (q, kv, pe), mask, _ = case()
    q64, kv64, pe64 = (np.asarray(x, np.float64) for x in (q, kv, pe))
    scores = np.einsum("bshn,bthn->bhst", q64[..., :5], kv64[..., :5])
    scores = (scores + np.einsum("bshr,btr->bhst", q64[..., 5:], pe64)) * 0.3
    scores = np.where(np.asarray(mask)[:, None], scores, -np.inf)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    wanted = np.einsum("bhst,bthv->bshv", p / p.sum(axis=-1, keepdims=True), kv64[..., 5:])
    assert relative(mla_attention(q, kv, pe, mask, 0.3), wanted) < 1e-6


@pytest.mark.parametrize("size", [9, 70, 150])
def test_gradients_equal_autodiff_of_the_definition(size):
    """Of any size: strips of 32 queries and panels of 32 columns, whole and ragged; a query that sees nothing too."""
    inputs, mask, dout = case(size=size)
    mask = mask.at[0, 2].set(False)

    def loss(attention):
        return lambda *inputs: jnp.sum(attention(*inputs, mask, 0.3) * dout)

    ours = jax.grad(loss(mla_attention), argnums=(0, 1, 2))(*inputs)
    wanted = jax.grad(loss(mla_attention_reference), argnums=(0, 1, 2))(*inputs)
    for mine, theirs in zip(ours, wanted, strict=True):
        assert relative(mine, theirs) < 1e-6


def test_bfloat16_stays_within_its_rounding():
    inputs, mask, dout = case(jnp.bfloat16)
    exact = tuple(x.astype(jnp.float32) for x in inputs)
    (q, kv, pe), (q32, kv32, pe32) = inputs, exact
    assert relative(mla_attention(q, kv, pe, mask, 0.3), mla_attention_reference(q32, kv32, pe32, mask, 0.3)) < 2**-8

    def gradients(attention, inputs, dout):
        loss = lambda *inputs: jnp.sum(attention(*inputs, mask, 0.3).astype(jnp.float32) * dout)  # noqa: E731
        return jax.grad(loss, argnums=(0, 1, 2))(*inputs)

    ours = gradients(mla_attention, inputs, dout)
    wanted = gradients(mla_attention_reference, exact, dout.astype(jnp.float32))
    for mine, theirs in zip(ours, wanted, strict=True):
        assert relative(mine, theirs) < 2**-7


@pytest.mark.parametrize("row", [0, 3])
def test_a_query_that_may_attend_to_nothing_gets_the_mean(row):
    (q, kv, pe), mask, _ = case()
    mask = mask.at[0, row].set(False)
    out: jax.Array = mla_attention(q, kv, pe, mask, 0.3)
    np.testing.assert_allclose(out[0, row], jnp.mean(kv[0, ..., 5:], axis=0), rtol=1e-5)


def test_what_does_not_fit_is_refused_with_its_shapes():
    (q, kv, pe), mask, _ = case()
    attention = inspect.unwrap(mla_attention)  # without the tests' own check of shapes
    for wrong in (mask[:1], mask[:, :, 1:], mask.astype(jnp.float32)):
        with pytest.raises(ValueError, match=rf"mask {re.escape(str(wrong.shape))} of {wrong.dtype}: expected"):
            attention(q, kv, pe, wrong, 0.3)
    for arrays in ((q[:1], kv, pe), (q, kv[:, 1:], pe), (q, kv, pe[:, 1:]), (q[..., :1], kv, pe)):
        with pytest.raises(ValueError, match=rf"q {re.escape(str(arrays[0].shape))}, kv .*, pe .*: expected"):
            attention(*arrays, mask, 0.3)
