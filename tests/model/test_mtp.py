"""The MTP module: the order of its input, its definition, and where a segment ends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from model import oracle
from model.tiny import V3, config, float64, relative_error, weights

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.model.block import Context
from deepseek_jax.model.mtp import MTP, mtp_segments
from deepseek_jax.model.rope import rotary_tables
from deepseek_kernels import Visible

TINY = config(V3)
PARAMS, BIAS = weights(TINY)
assert BIAS is not None
BIAS_E = BIAS[-1]
SIZE = 7


@functools.cache
def compiled():
    graph, state = nnx.split(nnx.eval_shape(lambda: MTP(TINY, ComputeConfig(), rngs=nnx.Rngs(0))))

    def run(params, hidden, following, segments, bias):
        fresh = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(fresh, params)
        positions = jnp.arange(SIZE, dtype=jnp.int32)[None]
        module = nnx.merge(graph, fresh)
        context = Context(rotary_tables(TINY, positions), Visible.rows(segments), segments)
        return module(hidden, following, context, bias)[:2]

    return jax.jit(run)


def run(params, hidden, following):
    segments = jnp.ones((1, SIZE), jnp.int32)
    out, stats = compiled()(params, hidden[None], following[None], segments, BIAS_E)
    return np.asarray(out[0]), stats


def draw():
    rng = np.random.default_rng(0)
    return (rng.standard_normal((SIZE, TINY.hidden_size)).astype(np.float32) for _ in range(2))


def test_equals_its_definition():
    hidden, following = draw()
    out, stats = run(PARAMS["mtp"], hidden, following)
    # The oracle takes h_0…h_T and embeddings 0…T and shifts; these rows are h_i and emb(t_{i+1}) already.
    shifted = np.concatenate([np.zeros((1, TINY.hidden_size)), following])
    extended = np.concatenate([hidden, np.zeros((1, TINY.hidden_size))])
    expected, router = oracle.mtp(float64(PARAMS["mtp"]), TINY, extended, shifted, float64(BIAS_E))
    assert relative_error(out, expected) < 1e-5 and router is not None
    np.testing.assert_array_equal(stats.load_E, router["load"])
    np.testing.assert_allclose(stats.balance, router["balance"], rtol=1e-5)


def test_embedding_comes_first_then_hidden():
    """The projection's first rows read the embedding of the next token, the others the hidden state."""
    params = PARAMS["mtp"]
    hidden, following = draw()
    w, width = params["proj"]["w"], TINY.hidden_size
    upper, lower = w.at[width:].set(0), w.at[:width].set(0)
    for w_half, same, other in (
        (upper, (hidden[::-1], following), (hidden, following[::-1])),
        (lower, (hidden, following[::-1]), (hidden[::-1], following)),
    ):
        changed = params | {"proj": {"w": w_half}}
        out = run(changed, hidden, following)[0]
        np.testing.assert_array_equal(run(changed, *same)[0], out)
        assert relative_error(run(changed, *other)[0], out) > 0.1


def test_each_input_has_its_own_norm():
    """Scaling either input changes nothing (beside eps)."""
    params = PARAMS["mtp"]
    hidden, following = draw()
    out = run(params, hidden, following)[0]
    assert relative_error(run(params, 10 * hidden, following / 10)[0], out) < 1e-3


def test_a_segments_last_token_counts_as_padding():
    segments = jnp.array([[1, 1, 1, 2, 3, 3, 0, 0], [0, 1, 1, 1, 1, 1, 2, 2]])
    assert mtp_segments(segments).tolist() == [[1, 1, 0, 0, 3, 0, 0, 0], [0, 1, 1, 1, 1, 0, 2, 0]]
