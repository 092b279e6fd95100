"""Multi-head latent attention: both forms against the papers' equations, and what its cache holds."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model import oracle
from model.tiny import V2_LITE, V3, config, float64, layer, relative_error, weights

from deepseek_jax.config import ModelConfig, RopeScaling
from deepseek_jax.model.attention import Cache, masked_softmax, packed_mask
from deepseek_jax.model.mla import MLA
from deepseek_jax.model.rope import rotary_tables

# Only an eps other than the released models' 1e-6 shows that the latents' norms keep theirs.
CONFIGS = {
    "v3": config(V3, rms_norm_eps=1e-2),
    "no_query_compression_bias_yarn": config(V2_LITE),
    "query_bias_halves_llama3": config(
        V3, attention_bias=True, rope_interleave=False, rope_scaling=RopeScaling("llama3", 8.0, 16)
    ),
}
SIZE = 9
POSITIONS = [0, 1, 2, 3, 4, 7, 8, 30, 31]


def attention(tiny):
    """One layer's module with its weights, as a pure function."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: MLA(tiny, rngs=nnx.Rngs(0))))
    stack = weights(tiny)[0]["dense_layers"]["attention"]

    @functools.partial(jax.jit, static_argnames="absorbed")
    def run(x, mask, positions, buffer, length, absorbed):
        _, state = nnx.split(nnx.eval_shape(lambda: MLA(tiny, rngs=nnx.Rngs(0))))
        nnx.replace_by_pure_dict(state, jax.tree.map(lambda leaf: leaf[0], stack))
        cache = None if buffer is None else (buffer, length)
        return nnx.merge(graph, state)(x, rotary_tables(tiny, positions), mask, cache, absorbed=absorbed)

    return run, layer(stack, 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_plain_and_absorbed_equal_the_equations(name):
    tiny = CONFIGS[name]
    run, params = attention(tiny)
    x = np.random.default_rng(0).standard_normal((2, SIZE, tiny.hidden_size)).astype(np.float32)
    mask = packed_mask(jnp.ones((2, SIZE), jnp.int32))
    positions = jnp.asarray([POSITIONS, POSITIONS], jnp.int32)
    expected = [oracle.mla(params, tiny, row.astype(np.float64), POSITIONS) for row in x]
    for absorbed in (False, True):
        y, buffer = run(x, mask, positions, None, None, absorbed=absorbed)
        assert buffer is None
        assert relative_error(y, expected) < 1e-5


def test_cache_holds_the_normalised_latent_and_the_rotated_key():
    tiny = CONFIGS["v3"]
    run, p = attention(tiny)
    x = np.random.default_rng(1).standard_normal((1, 3, tiny.hidden_size)).astype(np.float32)
    positions = jnp.array([[5, 6, 7]], jnp.int32)
    empty = Cache.empty(tiny, 1, 6)
    claimed, mask = dataclasses.replace(empty, length=jnp.int32(2)).claim(positions)
    _, buffer = run(x, mask, positions, claimed.layers[0], claimed.length, absorbed=True)
    compressed = x[0].astype(np.float64) @ p["kv_a"]["w"]
    width = tiny.kv_lora_rank
    latent = oracle.rms_norm(compressed[:, :width], p["kv_norm"]["gain"], 1e-6)
    key = [oracle.rope(tiny, row[width:], t) for row, t in zip(compressed, (5, 6, 7), strict=True)]
    assert buffer.shape == (1, 6, tiny.kv_lora_rank + tiny.qk_rope_head_dim)
    assert relative_error(buffer[0, 2:5], np.concatenate([latent, key], axis=1)) < 1e-5
    assert not np.any(buffer[0, :2]) and not np.any(buffer[0, 5:])


def test_cache_size_of_the_released_models():
    """C + R numbers a token and layer: 35,136 for V3's 61 layers (facts 2.1)."""
    heads: dict[str, Any] = dict(
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        num_hidden_layers=61,
        num_attention_heads=128,
    )
    v3 = ModelConfig(**heads, dtype="bfloat16")
    cache = jax.eval_shape(lambda: Cache.empty(v3, 1, 1))
    assert sum(leaf.size for leaf in cache.layers) == 35_136
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in cache.layers) == 70_272


def test_claim_hides_padding_the_future_and_free_columns():
    cache = Cache.empty(config(), 2, 5)
    cache, mask = cache.claim(jnp.array([[0, 1, 2], [-1, -1, 0]], jnp.int32))
    assert mask.astype(int).tolist() == [
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]],
        [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0]],
    ]
    _, mask = dataclasses.replace(cache, length=jnp.int32(3)).claim(jnp.array([[3], [1]], jnp.int32))
    assert mask.astype(int).tolist() == [[[1, 1, 1, 1, 0]], [[0, 0, 1, 1, 0]]]


def test_packed_mask_is_causal_within_a_segment():
    ids = np.array([[1, 1, 2, 2, 0], [3, 1, 1, 1, 3]])
    mask = np.asarray(packed_mask(jnp.asarray(ids)))
    for b, s, t in np.ndindex(mask.shape):
        assert mask[b, s, t] == (t <= s and ids[b, s] == ids[b, t])


def test_softmax_is_float32_and_finite_where_nothing_is_visible():
    scores = jnp.array([[[[300.0, 301.0, -50.0], [1.0, 2.0, 3.0]]]], jnp.bfloat16)
    mask = jnp.array([[[True, True, False], [False, False, False]]])
    p = masked_softmax(scores, mask)
    assert p.dtype == jnp.float32
    seen = float64(scores)[0, 0, 0, :2]
    np.testing.assert_allclose(p[0, 0, 0, :2], oracle.softmax(seen), rtol=1e-6)
    assert p[0, 0, 0, 2] == 0
    np.testing.assert_allclose(p[0, 0, 1], 1 / 3, rtol=1e-6)
