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
from model.tiny import V2_LITE, V3, Columns, config, layer, relative_error, weights

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig, RopeScaling
from deepseek_jax.model.mla import MLA
from deepseek_jax.model.rope import rotary_tables
from deepseek_kernels import Visible

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
    graph, abstract = nnx.split(nnx.eval_shape(lambda: MLA(tiny, ComputeConfig(), rngs=nnx.Rngs(0))))
    stack = weights(tiny)[0]["dense_layers"]["attention"]

    @functools.partial(jax.jit, static_argnames="absorbed")
    def run(x, visible, positions, memory, absorbed):
        state = jax.tree.map(lambda leaf: leaf, abstract)
        nnx.replace_by_pure_dict(state, jax.tree.map(lambda leaf: leaf[0], stack))
        return nnx.merge(graph, state)(x, rotary_tables(tiny, positions), visible, memory, absorbed=absorbed)

    return run, layer(stack, 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_plain_and_absorbed_equal_the_equations(name):
    tiny = CONFIGS[name]
    run, params = attention(tiny)
    x = np.random.default_rng(0).standard_normal((2, SIZE, tiny.hidden_size)).astype(np.float32)
    positions = jnp.asarray([POSITIONS, POSITIONS], jnp.int32)
    expected = [oracle.mla(params, tiny, row.astype(np.float64), POSITIONS) for row in x]
    for absorbed in (False, True):
        y, memory = run(x, Visible.rows(), positions, None, absorbed=absorbed)
        assert memory is None
        assert relative_error(y, expected) < 1e-5


def test_memory_gets_the_normalised_latent_and_the_rotated_key():
    tiny = CONFIGS["v3"]
    run, p = attention(tiny)
    x = np.random.default_rng(1).standard_normal((1, 3, tiny.hidden_size)).astype(np.float32)
    positions = jnp.array([[5, 6, 7]], jnp.int32)
    memory = dataclasses.replace(Columns.empty(tiny, 1, 6), length=jnp.int32(2))
    _, memory = run(x, Visible(q_positions_BS=jnp.array([[2, 3, 4]])), positions, memory, absorbed=True)
    compressed = x[0].astype(np.float64) @ p["kv_a"]["w"]
    width = tiny.kv_lora_rank
    latent = oracle.rms_norm(compressed[:, :width], p["kv_norm"]["gain"], 1e-6)
    key = [oracle.rope(tiny, row[width:], t) for row, t in zip(compressed, (5, 6, 7), strict=True)]
    buffer = memory.buffer_BTW
    assert buffer.shape == (1, 6, tiny.kv_lora_rank + tiny.qk_rope_head_dim) and memory.length == 5
    assert relative_error(buffer[0, 2:5], np.concatenate([latent, key], axis=1)) < 1e-5
    assert not np.any(buffer[0, :2]) and not np.any(buffer[0, 5:])


def test_cache_size_of_the_released_models():
    """C + R numbers a token and layer: 35,136 for V3's 61 layers (facts 2.1)."""
    heads: dict[str, Any] = dict(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, num_hidden_layers=61)
    v3 = ModelConfig(**heads, num_attention_heads=128)
    assert v3.cache_numbers_per_token_layer * v3.num_hidden_layers == 35_136
