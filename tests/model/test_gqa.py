"""Grouped-query attention against its definition: the dense students (Qwen with biases, Llama) and V1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model import oracle
from model.tiny import QWEN, V1, Columns, config, layer, relative_error, weights

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import RopeScaling
from deepseek_jax.model import parameters
from deepseek_jax.model.gqa import GQA
from deepseek_jax.model.rope import rotary_tables
from deepseek_kernels import Visible

CONFIGS = {
    "v1_own_keys": config(V1),
    "qwen_bias": config(QWEN),
    "llama": config(QWEN, num_key_value_heads=1, attention_bias=False, rope_scaling=RopeScaling("llama3", 8.0, 16)),
}
SIZE = 8


def attention(tiny):
    module = nnx.eval_shape(lambda: GQA(tiny, ComputeConfig(), rngs=nnx.Rngs(0)))
    stack = weights(tiny)[0]["dense_layers"]["attention"]

    @jax.jit
    def run(x, visible, positions, memory):
        graph, state = nnx.split(module)
        state = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(state, jax.tree.map(lambda leaf: leaf[0], stack))
        return nnx.merge(graph, state)(x, rotary_tables(tiny, positions), visible, memory)

    return run, layer(stack, 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_its_definition(name):
    tiny = CONFIGS[name]
    run, params = attention(tiny)
    assert ("q_bias" in params) == tiny.attention_bias
    x = np.random.default_rng(0).standard_normal((2, SIZE, tiny.hidden_size)).astype(np.float32)
    positions = jnp.broadcast_to(jnp.arange(SIZE, dtype=jnp.int32), (2, SIZE))
    y, memory = run(x, Visible.rows(), positions, None)
    expected = [oracle.gqa(params, tiny, row.astype(np.float64), list(range(SIZE))) for row in x]
    assert memory is None
    assert relative_error(y, expected) < 1e-5


def test_decoding_takes_the_implementation_named_for_it():
    """The reference, which the text of a program shows: it alone draws S × T scores under a mask."""
    tiny, tokens = config(QWEN), jnp.zeros((1, 4), jnp.int32)
    network = parameters.merge(tiny, *weights(tiny), ComputeConfig(attention="c", decode_attention="reference"))
    texts = [str(jax.make_jaxpr(lambda a=a: network(tokens, absorbed=a).logits)()) for a in (False, True)]
    assert ["ffi_call" in text for text in texts] == [True, False]


def test_memory_of_keys_and_values_gives_the_same():
    tiny = CONFIGS["qwen_bias"]
    run, params = attention(tiny)
    x = np.random.default_rng(0).standard_normal((1, SIZE, tiny.hidden_size)).astype(np.float32)
    memory, rows = Columns.empty(tiny, 1, SIZE), []
    assert memory.buffer_BTW.shape == (1, SIZE, 2 * tiny.num_key_value_heads * tiny.head_dim)
    for s in range(0, SIZE, 4):
        positions = jnp.arange(s, s + 4, dtype=jnp.int32)[None]
        y, memory = run(x[:, s : s + 4], Visible(q_positions_BS=positions), positions, memory)
        rows.append(y[0])
    expected = oracle.gqa(params, tiny, x[0].astype(np.float64), list(range(SIZE)))
    assert relative_error(np.concatenate(rows), expected) < 1e-5
