"""``attention_cpu`` as XLA calls it, against the definition's mask and autodiff."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_kernels import attention_cpu
from deepseek_kernels.visible import Visible

B, S, T, H, SCALE = 2, 37, 41, 4, 0.3
SEGMENTS = jnp.asarray([[1] * 20 + [2] * 21, [1] * 30 + [0] * 11])
DESCRIBED = {
    "in row order": Visible(),
    "segments": Visible(q_segments_BS=SEGMENTS[:, :S], k_segments_BT=SEGMENTS),
    "positions": Visible(q_positions_BS=jnp.arange(S)[None] + jnp.asarray([[4], [-3]])),
    "lengths": Visible(lengths_B=jnp.asarray([5, 0]), causal=False),
    "all": Visible(causal=False, k_positions_BT=SEGMENTS),
}


def drawn(form):
    width = 7 if form == "mla" else 5
    shapes = [(B, S, H, width)]
    shapes += [(B, T, H, 9), (B, T, 2)] if form == "mla" else [(B, T, 2, 5), (B, T, 2, 4)]
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, shape) for key, shape in zip(keys, [*shapes, (B, S, H, 4)], strict=True)]


def definition(q_BSHK, keys, rest, mask_BST):
    """Attention with zeros for a query that sees nothing, for autodiff."""
    if rest.ndim == 3:
        nope, v = jnp.split(keys, [5], axis=3)
        k = jnp.concatenate([nope, jnp.broadcast_to(rest[:, :, None], (B, T, H, 2))], axis=3)
    else:
        k, v = (jnp.repeat(x, 2, axis=2) for x in (keys, rest))
    scores = jnp.where(mask_BST[:, None], jnp.einsum("bshk,bthk->bhst", q_BSHK, k) * SCALE, -1e30)
    p = jax.nn.softmax(scores, axis=-1) * mask_BST[:, None].any(axis=-1, keepdims=True)
    return jnp.einsum("bhst,bthv->bshv", p, v)


@jax.jit
def both_passes(q, keys, rest, visible, dout):
    out, log_sum = attention_cpu.forward(q, keys, rest, visible, SCALE)
    return out, *attention_cpu.backward(q, keys, rest, visible, SCALE, out, log_sum, dout)


@pytest.mark.parametrize("form", ["mla", "grouped"])
@pytest.mark.parametrize("visible", DESCRIBED.values(), ids=DESCRIBED)
def test_value_and_gradients_equal_the_definition(visible, form):
    *operands, dout = drawn(form)
    mask_BST = visible.mask(B, S, T)
    out, pullback = jax.vjp(lambda q, keys, rest: definition(q, keys, rest, mask_BST), *operands)
    for found, right in zip(both_passes(*operands, visible, dout), (out, *pullback(dout)), strict=True):
        assert found.shape == right.shape
        np.testing.assert_allclose(found, right, rtol=0, atol=1e-5)  # sums of up to 74 products of size 1


def test_a_score_that_is_not_finite_is_not_hidden():
    """Neither as a query that sees nothing, nor in other queries."""
    q, keys, rest, _ = drawn("mla")
    out, log_sum = attention_cpu.forward(q.at[1, 3].set(jnp.nan), keys, rest, Visible(), SCALE)
    assert np.all(np.isnan(out[1, 3])) and np.all(np.isnan(log_sum[1, 3]))
    assert np.all(np.isfinite(np.delete(out[1], 3, axis=0)))


def test_a_long_row_holds_no_square():
    """32k tokens, in segments of 16 so that the test is quick: the program's largest array is of its operands' size."""
    tokens = 1 << 15
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, tokens, 1, 4)), jnp.float32) for _ in range(3))
    visible = Visible.rows(jnp.arange(tokens)[None] // 16)
    program = jax.jit(lambda q, k, v, visible: attention_cpu.forward(q, k, v, visible, SCALE)[0])
    out = program(q, k, v, visible)
    memory = program.lower(q, k, v, visible).compile().memory_analysis()
    assert memory and memory.temp_size_in_bytes < 16 * q.nbytes
    at = slice(tokens - 32, tokens)
    last = dataclasses.replace(visible, q_segments_BS=None, k_segments_BT=None).mask(1, 32, 32)[0]
    last &= np.kron(np.eye(2, dtype=bool), np.ones((16, 16), bool))
    p = jax.nn.softmax(jnp.where(last, q[0, at, 0] @ k[0, at, 0].T * SCALE, -1e30), axis=-1)
    np.testing.assert_allclose(out[0, at, 0], p @ v[0, at, 0], rtol=0, atol=1e-5)


def test_shapes_that_do_not_fit_are_refused():
    forward = inspect.unwrap(attention_cpu.forward)  # without the tests' own check of shapes
    q, kv, pe, _ = drawn("mla")
    with pytest.raises(ValueError, match=r"rest \(2, 41, 2\): expected.*\(B, T, H, N\+V\)"):
        forward(q, kv[:, :, 1:], pe, Visible(), SCALE)
    q, k, v, _ = drawn("grouped")
    with pytest.raises(ValueError, match="H a multiple of G"):
        forward(q[:, :, :3], k, v, Visible(), SCALE)
